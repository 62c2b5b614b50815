//! One suite for every device that trains: each operation against plain formulas in f64, and that it gives the same bits
//! again.
//!
//! Shapes are not multiples of anything. Matrices lie at odd places inside arrays that are NaN around them: what is read there
//! spoils the result, and what is written there is noticed.

mod formulas;
mod listed;
mod rows;
mod step;

use super::{Check, Random, training_dense};
use crate::BackendError;
use crate::training::{Device, View, ViewMut};

type Result<T> = std::result::Result<T, BackendError>;

struct Suite<'a, D: Device> {
    device: &'a D,
    random: Random,
    tolerance: f32,
    checks: Vec<Check>,
    /// Few and small shapes, each once.
    small: bool,
}

/// A matrix inside a larger array.
struct Inside {
    all: Vec<f32>,
    start: usize,
    rows: usize,
    cols: usize,
}

/// What an array has to hold.
struct Expected {
    part: &'static str,
    values: Vec<f64>,
    /// Where the values are, and all that was there before, which has to stay around them.
    inside: Option<(usize, Vec<f32>)>,
}

impl Inside {
    fn values(&self) -> &[f32] {
        &self.all[self.start..self.start + self.rows * self.cols]
    }

    fn array<D: Device>(&self, device: &D) -> Result<D::Array> {
        device.array(self.all.clone())
    }

    fn of<'a, A>(&self, array: &'a A) -> View<'a, A> {
        View { array, start: self.start, rows: self.rows, cols: self.cols }
    }

    fn of_mut<'a, A>(&self, array: &'a mut A) -> ViewMut<'a, A> {
        ViewMut { array, start: self.start, rows: self.rows, cols: self.cols }
    }

    /// Expects these values in its place.
    fn becomes(&self, part: &'static str, values: Vec<f64>) -> Expected {
        assert_eq!(values.len(), self.rows * self.cols, "{part}");
        Expected { part, values, inside: Some((self.start, self.all.clone())) }
    }
}

impl Expected {
    fn all(part: &'static str, values: Vec<f64>) -> Self {
        Self { part, values, inside: None }
    }

    /// The largest difference, relative to the root mean square; infinite where anything is wrong that has no size.
    fn error(&self, found: &[f32]) -> f32 {
        let found = match &self.inside {
            None => found,
            Some((start, before)) => {
                let end = start + self.values.len();
                let same = |a: &[f32], b: &[f32]| a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits()));
                if found.len() != before.len()
                    || !same(&found[..*start], &before[..*start])
                    || !same(&found[end..], &before[end..])
                {
                    return f32::INFINITY;
                }
                &found[*start..end]
            }
        };
        if found.len() != self.values.len() {
            return f32::INFINITY;
        }
        let rms = (self.values.iter().map(|v| v.powi(2)).sum::<f64>() / self.values.len().max(1) as f64).sqrt();
        let difference = |(a, b): (&f32, &f64)| ((f64::from(*a) - b).abs() / rms.max(1e-20)) as f32;
        let worse = |worst: f32, x: f32| if x.is_nan() { f32::INFINITY } else { worst.max(x) };
        found.iter().zip(&self.values).map(difference).fold(0.0, worse)
    }
}

/// All elements of an array.
fn all<D: Device>(device: &D, x: &D::Array) -> Result<Vec<f32>> {
    Ok(device.values(View::of(x, 1, device.len(x)))?.into_owned())
}

impl<D: Device> Suite<'_, D> {
    /// Compares the arrays that `f` yields, by parts; and with those of another run.
    fn check(&mut self, name: &str, expected: &[Expected], f: impl Fn(&D) -> Result<Vec<Vec<f32>>>) -> Result<()> {
        let found = f(self.device)?;
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.iter().zip(expected) {
            let name = format!("training: {name}: {}", expected.part);
            self.checks.push(Check { name, error: expected.error(found), tolerance: self.tolerance });
        }
        if !self.small {
            let bits = |found: &[Vec<f32>]| found.iter().flatten().map(|x| x.to_bits()).collect::<Vec<u32>>();
            let same = bits(&found) == bits(&f(self.device)?);
            self.exact(&format!("{name}: again"), same);
        }
        Ok(())
    }

    fn exact(&mut self, name: &str, right: bool) {
        let name = format!("training: {name}");
        self.checks.push(Check { name, error: f32::from(u8::from(!right)), tolerance: 0.0 });
    }

    /// A matrix at an odd place, NaN around it.
    fn inside(&mut self, rows: usize, cols: usize, scale: f32) -> Inside {
        let start = 1 + 2 * (self.random.0 >> 60) as usize;
        let mut all = vec![f32::NAN; start];
        all.extend(self.random.values(rows * cols, scale));
        all.extend([f32::NAN; 7]);
        Inside { all, start, rows, cols }
    }

    fn everything(&mut self) -> Result<()> {
        self.arrays()?;
        self.elements()?;
        self.columns()?;
        self.norms()?;
        self.heads()?;
        self.listed_rows()?;
        self.taps()?;
        self.pixels()?;
        self.loss()?;
        self.square_sums()?;
        self.adamw()?;
        training_dense::products(self.device, self.tolerance, self.small, &mut self.checks)?;
        training_dense::attentions(self.device, self.tolerance, self.small, &mut self.checks)
    }
}

fn suite<D: Device>(device: &D, tolerance: f32, small: bool) -> Result<Vec<Check>> {
    let mut suite = Suite { device, random: Random(1), tolerance, checks: Vec::new(), small };
    suite.everything()?;
    Ok(suite.checks)
}

/// Runs the whole suite; `tolerance` is relative to the root mean square of what is expected.
pub fn run<D: Device>(device: &D, tolerance: f32) -> Result<Vec<Check>> {
    suite(device, tolerance, false)
}

/// As [`run`] with few and small shapes: every operation, for devices that a tool slows down.
pub fn run_small<D: Device>(device: &D, tolerance: f32) -> Result<Vec<Check>> {
    suite(device, tolerance, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_noticed() {
        let inside = Inside { all: vec![f32::NAN, 1.0, 2.0, f32::NAN], start: 1, rows: 1, cols: 2 };
        let expected = inside.becomes("", vec![3.0, 4.0]);
        assert_eq!(expected.error(&[f32::NAN, 3.0, 4.0, f32::NAN]), 0.0);
        assert!(expected.error(&[f32::NAN, 3.0, 4.1, f32::NAN]) > 0.01);
        assert_eq!(expected.error(&[f32::NAN, 3.0, f32::NAN, f32::NAN]), f32::INFINITY);
        assert_eq!(expected.error(&[0.0, 3.0, 4.0, f32::NAN]), f32::INFINITY);
        assert_eq!(expected.error(&[f32::NAN, 3.0, 4.0, 0.0]), f32::INFINITY);
        assert_eq!(Expected::all("", vec![1.0]).error(&[]), f32::INFINITY);
    }
}

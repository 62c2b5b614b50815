//! Muon: a matrix's momentum is made orthogonal before it becomes a step, so that all directions of the matrix move alike.
//!
//! Steps are scaled to the size that AdamW's have (`0.2 sqrt(max(rows, cols))`), so both take the same learning rate and decay.

use keye_backend::matmul::Old;
use keye_backend::training::{Device, Precision, View, ViewMut};

use crate::layers::Result;

const MOMENTUM: f32 = 0.95;
/// Of the root mean square of a step.
const SIZE: f32 = 0.2;
const ITERATIONS: usize = 5;
/// `a x + b x^3 + c x^5` takes singular values from (0, 1] to near 1 within [`ITERATIONS`].
const POLYNOMIAL: [f32; 3] = [3.4445, -4.775, 2.0315];
const EPS: f32 = 1e-7;

/// What a step of a matrix takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Muon {
    /// Its first element in parameters, gradients and means.
    pub(crate) start: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) lr: f32,
    pub(crate) decay: f32,
    /// What gradients are multiplied with first.
    pub(crate) clip: f32,
}

impl Muon {
    /// One step of the matrix in parameters `p` with gradients `g` and momenta `m`.
    pub(crate) fn step<D: Device>(&self, device: &D, p: &mut D::Array, g: &D::Array, m: &mut D::Array) -> Result<()> {
        let Self { start, rows, cols, lr, decay, clip } = *self;
        let gradient = View { array: g, start, rows, cols };
        device.combine(MOMENTUM, ViewMut { array: m, start, rows, cols }, clip, gradient)?;
        let mut x = device.repeat(View { array: m, start, rows, cols }, 1)?;
        device.combine(MOMENTUM, ViewMut::of(&mut x, rows, cols), clip, gradient)?;
        let x = orthogonalised(device, x, rows, cols)?;
        let size = SIZE * (rows.max(cols) as f32).sqrt();
        let p = ViewMut { array: p, start, rows, cols };
        device.combine(1.0 - lr * decay, p, -lr * size, View::of(&x, rows, cols))
    }
}

/// The matrix with all singular values brought near 1 (Newton and Schulz), by the products of its shorter side.
fn orthogonalised<D: Device>(device: &D, mut x: D::Array, rows: usize, cols: usize) -> Result<D::Array> {
    let [a, b, c] = POLYNOMIAL;
    let (short, tall) = (rows.min(cols), rows > cols);
    let norm = device.square_sum(View::of(&x, rows, cols))?.sqrt() as f32;
    let mut next = device.zeros(rows * cols)?;
    device.combine(0.0, ViewMut::of(&mut next, rows, cols), 1.0 / (norm + EPS), View::of(&x, rows, cols))?;
    std::mem::swap(&mut x, &mut next);
    let mut gram = device.zeros(short * short)?;
    let mut square = device.zeros(short * short)?;
    let bf16 = Precision::Bf16;
    for _ in 0..ITERATIONS {
        let whole = View::of(&x, rows, cols);
        let (left, right) = if tall { (whole.t(), whole.plain()) } else { (whole.plain(), whole.t()) };
        device.product(bf16, left, right, ViewMut::of(&mut gram, short, short), Old::Replace)?;
        let grams = View::of(&gram, short, short);
        device.product(bf16, grams.plain(), grams.plain(), ViewMut::of(&mut square, short, short), Old::Replace)?;
        device.combine(c, ViewMut::of(&mut square, short, short), b, grams)?;
        device.combine(0.0, ViewMut::of(&mut next, rows, cols), a, whole)?;
        let square = View::of(&square, short, short).plain();
        let (left, right) = if tall { (whole.plain(), square) } else { (square, whole.plain()) };
        device.product(bf16, left, right, ViewMut::of(&mut next, rows, cols), Old::Keep)?;
        std::mem::swap(&mut x, &mut next);
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;

    #[test]
    fn a_step_moves_every_direction_alike() {
        // Different singular values, tall and wide.
        for (rows, cols) in [(3, 5), (5, 3)] {
            let mut g = vec![0.0; 15];
            for (i, value) in [1.0, 0.3, 0.1].into_iter().enumerate() {
                g[i * cols + i] = value;
            }
            let (mut p, mut m) = (vec![0.0; 15], vec![0.0; 15]);
            let muon = Muon { start: 0, rows, cols, lr: 0.1, decay: 0.0, clip: 2.0 };
            muon.step(&Cpu::detect(), &mut p, &g, &mut m).unwrap();
            let size = 0.1 * 0.2 * 5f32.sqrt();
            for i in 0..3 {
                let ratio = -p[i * cols + i] / size;
                assert!((0.65..1.25).contains(&ratio), "{i}: {ratio}");
            }
            assert_eq!(m[0], 2.0);
            assert!(p.iter().enumerate().all(|(i, p)| i % (cols + 1) == 0 || p.abs() < 1e-3));
        }
        // Decay alone.
        let (mut p, mut m) = (vec![1.0; 4], vec![0.0; 4]);
        let muon = Muon { start: 0, rows: 2, cols: 2, lr: 0.1, decay: 0.5, clip: 1.0 };
        muon.step(&Cpu::detect(), &mut p, &vec![0.0; 4], &mut m).unwrap();
        assert!(p.iter().all(|p| (p - 0.95).abs() < 1e-6));
    }
}

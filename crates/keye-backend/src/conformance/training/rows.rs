//! Operations on rows and their reverses.

use super::formulas::{Heads, Norm, widen};
use super::{Expected, Result, Suite, all};
use crate::training::{Angles, Device, HeadNorm};

/// `a + b`, element by element.
fn sum(a: &[f32], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) + b).collect()
}

fn column_sums(x: &[f32], cols: usize) -> Vec<f64> {
    let mut sums = vec![0.0; cols];
    x.chunks_exact(cols).for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x)));
    sums
}

impl<D: Device> Suite<'_, D> {
    pub(super) fn columns(&mut self) -> Result<()> {
        let shapes: &[_] =
            if self.small { &[(1, 5), (19, 270)] } else { &[(0, 9), (1, 5), (7, 300), (333, 72), (2500, 33)] };
        for &(n, d) in shapes {
            let (x, row) = (self.random.values(n * d, 1.0), self.inside(1, d, 1.0));
            let added = x.iter().zip(row.values().iter().cycle()).map(|(x, y)| f64::from(*x) + f64::from(*y)).collect();
            self.check(&format!("add_row {n}x{d}"), &[Expected::all("x", added)], |device| {
                let mut to = device.array(x.clone())?;
                device.add_row(&mut to, row.of(&row.array(device)?))?;
                Ok(vec![all(device, &to)?])
            })?;
            let expected = row.becomes("sums", sum(row.values(), &column_sums(&x, d)));
            self.check(&format!("add_column_sums {n}x{d}"), &[expected], |device| {
                let mut sums = row.array(device)?;
                device.add_column_sums(&device.array(x.clone())?, row.of_mut(&mut sums))?;
                Ok(vec![all(device, &sums)?])
            })?;
            let repeated = widen(&row.values().repeat(n));
            self.check(&format!("repeat {d}, {n} times"), &[Expected::all("rows", repeated)], |device| {
                Ok(vec![all(device, &device.repeat(row.of(&row.array(device)?), n)?)?])
            })?;
        }
        Ok(())
    }

    pub(super) fn norms(&mut self) -> Result<()> {
        let shapes: &[_] = if self.small { &[(19, 270)] } else { &[(0, 40), (1, 5), (9, 72), (33, 1153), (2500, 33)] };
        for &(n, d) in shapes {
            // Rows that are not centred, so that the mean matters.
            let x: Vec<f32> = self.random.values(n * d, 2.0).iter().map(|x| x + 1.0).collect();
            let dy = self.random.values(n * d, 1.0);
            let (w, bias) = (self.inside(1, d, 1.0), self.inside(1, d, 1.0));
            let (dx, dw) = (self.random.values(n * d, 1.0), self.inside(1, d, 1.0));
            for centred in [false, true] {
                let name = format!("{} {n}x{d}", if centred { "LayerNorm" } else { "RMSNorm" });
                let (weight, b) = (widen(w.values()), widen(bias.values()));
                let eps = 1e-3f32;
                let plain = Norm { weight: &weight, bias: centred.then_some(&b[..]), eps: eps.into() };
                let (y, stats) = plain.forward(&widen(&x));
                let narrow: Vec<f32> = stats.iter().map(|x| *x as f32).collect();
                self.check(&name, &[Expected::all("y", y), Expected::all("statistics", stats)], |device| {
                    let (w_at, b_at) = (w.array(device)?, bias.array(device)?);
                    let bias = centred.then(|| bias.of(&b_at));
                    let (y, stats) = device.norm(&device.array(x.clone())?, w.of(&w_at), bias, eps)?;
                    Ok(vec![all(device, &y)?, all(device, &stats)?])
                })?;
                let (of_x, of_w) = plain.backward(&widen(&x), &widen(&dy));
                let expected = [Expected::all("dx", sum(&dx, &of_x)), dw.becomes("dw", sum(dw.values(), &of_w))];
                self.check(&format!("{name} reversed"), &expected, |device| {
                    let (x, stats) = (device.array(x.clone())?, device.array(narrow.clone())?);
                    let (dy, mut dx) = (device.array(dy.clone())?, device.array(dx.clone())?);
                    let mut to = dw.array(device)?;
                    device.norm_backward(&x, &stats, w.of(&w.array(device)?), centred, &dy, &mut dx)?;
                    device.norm_weight_backward(&x, &stats, &dy, dw.of_mut(&mut to))?;
                    Ok(vec![all(device, &dx)?, all(device, &to)?])
                })?;
            }
        }
        Ok(())
    }

    pub(super) fn heads(&mut self) -> Result<()> {
        let shapes: &[_] = match self.small {
            true => &[(5, 9, 6)],
            false => &[(0, 2, 8), (1, 1, 8), (5, 3, 72), (37, 4, 128), (9, 2, 130), (3000, 12, 4)],
        };
        for &(n, heads, d) in shapes {
            let half = d / 2;
            let [x, dy] = [(); 2].map(|()| self.random.values(n * heads * d, 1.0));
            let [cosines, sines] = [(); 2].map(|()| self.random.values(n * half, 1.0));
            let (w, dw, eps) = (self.inside(1, d, 1.0), self.inside(1, d, 1.0), 1e-3f32);
            let weight = widen(w.values());
            let turned = [&cosines, &sines].map(|x| widen(x));
            for (normed, turns) in [(false, false), (false, true), (true, false), (true, true)] {
                let plain = Heads {
                    n,
                    heads,
                    d,
                    norm: normed.then_some((&weight, eps.into())),
                    angles: turns.then_some([&turned[0], &turned[1]]),
                };
                let name = format!(
                    "heads {n}x{heads}x{d}{}{}",
                    if normed { ", normalised" } else { "" },
                    if turns { ", turned" } else { "" }
                );
                let angles = |device: &D| -> Result<Option<Angles<D::Array>>> {
                    let [cos, sin] = [&cosines, &sines].map(|x| device.array(x.clone()));
                    Ok(turns.then_some(Angles { half, cos: cos?, sin: sin? }))
                };
                let split = Expected::all("split", plain.split(&widen(&x)));
                self.check(&name, &[split, Expected::all("merged", plain.merge(&widen(&x)))], |device| {
                    let (angles, w_at, x) = (angles(device)?, w.array(device)?, device.array(x.clone())?);
                    let norm = normed.then(|| HeadNorm { weight: w.of(&w_at), eps });
                    let split = device.split_heads(&x, heads, d, norm, angles.as_ref())?;
                    Ok(vec![all(device, &split)?, all(device, &device.merge_heads(&x, heads, d)?)?])
                })?;
                let (of_x, of_w) = plain.split_backward(&widen(&x), &widen(&dy));
                let expected = [
                    Expected::all("dx", of_x.clone()),
                    dw.becomes("dw", sum(dw.values(), &of_w)),
                    Expected::all("dx alone", of_x),
                ];
                self.check(&format!("{name}, reversed"), &expected, |device| {
                    let (angles, w_at, x) = (angles(device)?, w.array(device)?, device.array(x.clone())?);
                    let norm = normed.then(|| HeadNorm { weight: w.of(&w_at), eps });
                    let mut to = dw.array(device)?;
                    let [mut with, mut without] = [const { Vec::new() }; 2];
                    for (found, dw) in [(&mut with, normed.then(|| dw.of_mut(&mut to))), (&mut without, None)] {
                        let dy = device.array(dy.clone())?;
                        let dx = device.split_heads_backward(&x, heads, d, norm, angles.as_ref(), dy, dw)?;
                        *found = all(device, &dx)?;
                    }
                    Ok(vec![with, all(device, &to)?, without])
                })?;
            }
        }
        self.odd_heads()
    }

    /// Heads that cannot be turned may have any width.
    fn odd_heads(&mut self) -> Result<()> {
        let (n, heads, d) = (4, 3, 37);
        let x = self.random.values(n * heads * d, 1.0);
        let plain = Heads { n, heads, d, norm: None, angles: None };
        let expected = [
            Expected::all("split", plain.split(&widen(&x))),
            Expected::all("reversed", plain.split_backward(&widen(&x), &widen(&x)).0),
        ];
        self.check(&format!("heads {n}x{heads}x{d}"), &expected, |device| {
            let x_at = device.array(x.clone())?;
            let split = device.split_heads(&x_at, heads, d, None, None)?;
            let dy = device.array(x.clone())?;
            let back = device.split_heads_backward(&x_at, heads, d, None, None, dy, None)?;
            Ok(vec![all(device, &split)?, all(device, &back)?])
        })
    }
}

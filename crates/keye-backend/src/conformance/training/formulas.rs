//! The formulas of training as they are written down, in f64: one loop a formula. Finite differences prove the reverses.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use crate::training::Gelu;

pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// LayerNorm where there is a bias, else RMSNorm.
pub struct Norm<'a> {
    pub weight: &'a [f64],
    pub bias: Option<&'a [f64]>,
    pub eps: f64,
}

impl Norm<'_> {
    /// Mean (0 in RMSNorm) and reciprocal deviation of a row.
    fn of_row(&self, x: &[f64]) -> [f64; 2] {
        let d = x.len() as f64;
        let mean = if self.bias.is_some() { x.iter().sum::<f64>() / d } else { 0.0 };
        let squares = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d;
        [mean, 1.0 / (squares + self.eps).sqrt()]
    }

    pub fn forward(&self, x: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut y, mut stats) = (Vec::new(), Vec::new());
        for row in x.chunks_exact(self.weight.len()) {
            let [mean, r] = self.of_row(row);
            stats.extend([mean, r]);
            y.extend(
                row.iter()
                    .enumerate()
                    .map(|(c, x)| (x - mean) * r * self.weight[c] + self.bias.map_or(0.0, |bias| bias[c])),
            );
        }
        (y, stats)
    }

    /// Gradients of x and of the weight.
    pub fn backward(&self, x: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let d = self.weight.len();
        let (mut dx, mut dw) = (Vec::new(), vec![0.0; d]);
        for (x, dy) in x.chunks_exact(d).zip(dy.chunks_exact(d)) {
            let [mean, r] = self.of_row(x);
            let xhat: Vec<f64> = x.iter().map(|x| (x - mean) * r).collect();
            let g: Vec<f64> = dy.iter().zip(self.weight).map(|(dy, w)| dy * w).collect();
            let mean_g = if self.bias.is_some() { g.iter().sum::<f64>() / d as f64 } else { 0.0 };
            let mean_gx = g.iter().zip(&xhat).map(|(g, x)| g * x).sum::<f64>() / d as f64;
            dx.extend(g.iter().zip(&xhat).map(|(g, xhat)| r * (g - mean_g - xhat * mean_gx)));
            (0..d).for_each(|c| dw[c] += dy[c] * xhat[c]);
        }
        (dx, dw)
    }
}

/// Rows of heads: norm (weight and eps) and turn (cosines and sines, `[n, d / 2]`).
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    pub n: usize,
    pub heads: usize,
    pub d: usize,
    pub norm: Option<(&'a [f64], f64)>,
    pub angles: Option<[&'a [f64]; 2]>,
}

impl Heads<'_> {
    /// Turns a row's head by `sign` times its angles.
    fn turn(&self, row: usize, head: &mut [f64], sign: f64) {
        let Some([cosines, sines]) = self.angles else { return };
        let half = self.d / 2;
        for j in 0..half {
            let (a, b) = (head[j], head[j + half]);
            let (cosine, sine) = (cosines[row * half + j], sign * sines[row * half + j]);
            (head[j], head[j + half]) = (a * cosine - b * sine, b * cosine + a * sine);
        }
    }

    /// Calls `f(row, place among rows, place among heads)` for each head of each row.
    fn each(&self, mut f: impl FnMut(usize, usize, usize)) {
        for row in 0..self.n {
            for head in 0..self.heads {
                f(row, (row * self.heads + head) * self.d, (head * self.n + row) * self.d);
            }
        }
    }

    pub fn split(&self, x: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; x.len()];
        self.each(|row, from, to| {
            let x = &x[from..from + self.d];
            let mut head = match self.norm {
                Some((weight, eps)) => Norm { weight, bias: None, eps }.forward(x).0,
                None => x.to_vec(),
            };
            self.turn(row, &mut head, 1.0);
            out[to..to + self.d].copy_from_slice(&head);
        });
        out
    }

    pub fn merge(&self, x: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; x.len()];
        self.each(|_, to, from| out[to..to + self.d].copy_from_slice(&x[from..from + self.d]));
        out
    }

    /// Gradients of x and of the norm's weight.
    pub fn split_backward(&self, x: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut dx, mut dw) = (vec![0.0; dy.len()], vec![0.0; self.d]);
        self.each(|row, to, from| {
            let mut head = dy[from..from + self.d].to_vec();
            self.turn(row, &mut head, -1.0);
            if let Some((weight, eps)) = self.norm {
                let norm = Norm { weight, bias: None, eps };
                let (dhead, dweight) = norm.backward(&x[to..to + self.d], &head);
                head = dhead;
                dw.iter_mut().zip(dweight).for_each(|(dw, part)| *dw += part);
            }
            dx[to..to + self.d].copy_from_slice(&head);
        });
        (dx, dw)
    }
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

pub fn silu_mul(gate: f64, up: f64) -> f64 {
    gate * sigmoid(gate) * up
}

/// Gradients of gate and up.
pub fn silu_mul_backward(gate: f64, up: f64, d: f64) -> [f64; 2] {
    let s = sigmoid(gate);
    [d * up * (s + gate * s * (1.0 - s)), d * gate * s]
}

/// The error function, by a series of positive terms.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

pub fn gelu(form: Gelu, z: f64) -> f64 {
    match form {
        Gelu::Tanh => 0.5 * z * (1.0 + ((2.0 / PI).sqrt() * (z + 0.044715 * z.powi(3))).tanh()),
        Gelu::Erf => z * 0.5 * (1.0 + erf(z * FRAC_1_SQRT_2)),
    }
}

pub fn gelu_slope(form: Gelu, z: f64) -> f64 {
    match form {
        Gelu::Tanh => {
            let root = (2.0 / PI).sqrt();
            let t = (root * (z + 0.044715 * z.powi(3))).tanh();
            0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * root * (1.0 + 3.0 * 0.044715 * z * z)
        }
        Gelu::Erf => 0.5 * (1.0 + erf(z * FRAC_1_SQRT_2)) + z * (-0.5 * z * z).exp() / (2.0 * PI).sqrt(),
    }
}

/// Losses, and the gradient of the sum of the weighted losses.
pub fn softmax_loss(logits: &[f64], targets: &[(u32, f32)]) -> (Vec<f64>, Vec<f64>) {
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    let cols = (logits.len() / targets.len().max(1)).max(1);
    for (row, (token, weight)) in logits.chunks_exact(cols).zip(targets) {
        let token = *token as usize;
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|x| (x - top).exp()).sum();
        losses.push(top + sum.ln() - row[token]);
        let p = |(c, x): (usize, &f64)| (x - top).exp() / sum - f64::from(u8::from(c == token));
        gradient.extend(row.iter().enumerate().map(p).map(|p| p * f64::from(*weight)));
    }
    (losses, gradient)
}

#[cfg(test)]
mod tests {
    use super::super::super::Random;
    use super::*;

    fn values(random: &mut Random, n: usize) -> Vec<f64> {
        widen(&random.values(n, 1.0))
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// `gradient` is that of `f`.
    fn prove(what: &str, f: impl Fn(&[f64]) -> f64, at: &[f64], gradient: &[f64]) {
        assert_eq!(at.len(), gradient.len(), "{what}");
        for (i, gradient) in gradient.iter().enumerate() {
            let beside = |step: f64| {
                let mut at = at.to_vec();
                at[i] += step;
                f(&at)
            };
            let step = 1e-5;
            let slope = (beside(step) - beside(-step)) / (2.0 * step);
            assert!((slope - gradient).abs() < 1e-7 * (1.0 + gradient.abs()), "{what}, {i}: {slope} and {gradient}");
        }
    }

    #[test]
    fn reverses_are_what_finite_differences_say() {
        let random = &mut Random(7);
        let (n, heads, d) = (3, 2, 6);
        let [x, dy] = [(); 2].map(|()| values(random, n * heads * d));
        let [w, bias] = [(); 2].map(|()| values(random, d));
        for bias in [None, Some(&bias[..])] {
            let (dx, dw) = Norm { weight: &w, bias, eps: 1e-3 }.backward(&x, &dy);
            let loss = |x: &[f64], weight: &[f64]| dot(&Norm { weight, bias, eps: 1e-3 }.forward(x).0, &dy);
            prove("x of a norm", |x| loss(x, &w), &x, &dx);
            prove("weight of a norm", |w| loss(&x, w), &w, &dw);
        }
        let [cosines, sines] = [(); 2].map(|()| values(random, n * d / 2));
        for norm in [false, true] {
            let angles = Some([&cosines[..], &sines]);
            let of = Heads { n, heads, d, norm: norm.then_some((&w, 1e-3)), angles };
            let (dx, dw) = of.split_backward(&x, &dy);
            prove("x of heads", |x| dot(&of.split(x), &dy), &x, &dx);
            let loss = |w: &[f64]| dot(&Heads { norm: norm.then_some((w, 1e-3)), ..of }.split(&x), &dy);
            prove("weight of heads", loss, &w, &dw);
        }
        for (gate, up) in x.iter().zip(&dy) {
            let gradient = silu_mul_backward(*gate, *up, 0.7);
            prove("silu_mul", |x| 0.7 * silu_mul(x[0], x[1]), &[*gate, *up], &gradient);
            for form in [Gelu::Tanh, Gelu::Erf] {
                prove("gelu", |z| gelu(form, z[0]), &[*gate], &[gelu_slope(form, *gate)]);
            }
        }
        let targets = [(1, 0.5), (0, 2.0), (3, 0.0)];
        let weighted =
            |x: &[f64]| softmax_loss(x, &targets).0.iter().zip(targets).map(|(loss, (_, w))| loss * f64::from(w)).sum();
        prove("softmax_loss", weighted, &x[..12], &softmax_loss(&x[..12], &targets).1);
    }

    #[test]
    fn heads_merge_to_what_was_split() {
        let x = values(&mut Random(8), 3 * 4 * 5);
        let heads = Heads { n: 3, heads: 4, d: 5, norm: None, angles: None };
        assert_eq!(heads.merge(&heads.split(&x)), x);
        assert_ne!(heads.split(&x), x);
    }

    #[test]
    fn the_error_function_is_that_of_tables() {
        for (x, value) in [(0.0, 0.0), (0.5, 0.520_499_877_813_046_5), (-1.0, -0.842_700_792_949_714_9)] {
            assert!((erf(x) - value).abs() < 1e-14, "{x}");
        }
        assert!((1.0 - erf(3.0) - 2.209_049_699_858_544e-5).abs() < 1e-14);
    }
}

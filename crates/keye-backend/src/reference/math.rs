//! Formulas on one row.

use crate::Activation;

/// A sum in eight interleaved lanes, then the lanes from left to right: f32, and close to torch's rounding error.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        lanes[i % 8] += a * b;
    }
    lanes.iter().sum()
}

/// The mean in f64, so that the definition has no rounding worth naming.
fn mean(values: impl ExactSizeIterator<Item = f32>) -> f64 {
    let n = values.len() as f64;
    values.map(f64::from).sum::<f64>() / n
}

pub(super) fn layer_norm(row: &mut [f32], gamma: &[f32], beta: &[f32], eps: f32) {
    let centre = mean(row.iter().copied());
    let variance = row.iter().map(|v| (f64::from(*v) - centre).powi(2)).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (variance + f64::from(eps)).sqrt();
    for ((v, gamma), beta) in row.iter_mut().zip(gamma).zip(beta) {
        *v = ((f64::from(*v) - centre) * scale) as f32 * gamma + beta;
    }
}

pub(super) fn rms_norm(row: &mut [f32], gamma: &[f32], eps: f32) {
    let scale = 1.0 / (mean(row.iter().map(|v| v * v)) + f64::from(eps)).sqrt();
    for (v, gamma) in row.iter_mut().zip(gamma) {
        *v = (f64::from(*v) * scale) as f32 * gamma;
    }
}

/// `out[j] = v[j] cos - v[j+h] sin`, `out[j+h] = v[j+h] cos + v[j] sin`, h half a head; angles are cosines, then sines.
pub(super) fn rope(row: &mut [f32], heads: usize, angles: &[f32]) {
    let head_dim = row.len() / heads;
    let half = head_dim / 2;
    let (cos, sin) = angles.split_at(half);
    for head in row.chunks_exact_mut(head_dim) {
        let (low, high) = head.split_at_mut(half);
        for j in 0..half {
            let (a, b) = (low[j], high[j]);
            low[j] = a * cos[j] - b * sin[j];
            high[j] = b * cos[j] + a * sin[j];
        }
    }
}

/// `out[2j] = v[2j] cos - v[2j+1] sin`, `out[2j+1] = v[2j+1] cos + v[2j] sin` in the last columns of each head.
pub(super) fn rope_pairs(row: &mut [f32], heads: usize, angles: &[f32]) {
    let (head_dim, width) = (row.len() / heads, angles.len());
    let (cos, sin) = angles.split_at(width / 2);
    for head in row.chunks_exact_mut(head_dim) {
        for (pair, (cos, sin)) in head[head_dim - width..].chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = b * cos + a * sin;
        }
    }
}

pub(super) fn activate(z: f32, activation: Activation) -> f32 {
    match activation {
        Activation::None => z,
        Activation::GeluTanh => {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (z + 0.044_715 * z * z * z);
            0.5 * z * (1.0 + inner.tanh())
        }
        Activation::GeluErf => gelu_erf(z),
    }
}

pub(crate) fn gelu_erf(z: f32) -> f32 {
    let z = f64::from(z);
    (0.5 * z * (1.0 + erf(z * std::f64::consts::FRAC_1_SQRT_2))) as f32
}

/// The error function to about 1e-15: its Taylor series up to 3, a continued fraction of erfc beyond.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a > 6.0 {
        return x.signum();
    }
    if a < 3.0 {
        // erf x = 2/sqrt(pi) e^(-x^2) sum over n of 2^n x^(2n+1) / (1*3*..*(2n+1)): all terms positive.
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term > sum * 1e-17 {
            n += 1.0;
            term *= 2.0 * a * a / (2.0 * n + 1.0);
            sum += term;
        }
        return x.signum() * std::f64::consts::FRAC_2_SQRT_PI * (-a * a).exp() * sum;
    }
    // erfc x = e^(-x^2) / sqrt(pi) * 1/(x + (1/2)/(x + 1/(x + (3/2)/(x + ...)))).
    let mut fraction = a;
    for n in (1..=60).rev() {
        fraction = a + f64::from(n) / 2.0 / fraction;
    }
    x.signum() * (1.0 - (-a * a).exp() / std::f64::consts::PI.sqrt() / fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_at_known_points() {
        let cases = [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (2.999, 0.9999777698314002),
            (3.5, 0.9999992569016276),
        ];
        for (x, y) in cases {
            assert!((erf(x) - y).abs() < 1e-14, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
    }
}

//! Formulas on rows, compiled for each instruction set: plain loops that the compiler turns into vectors.
//!
//! Products and sums are never fused and sums run in [`LANES`] lanes, so a result is the same on every machine.

use keye_backend::Isa;

/// Partial sums of a row; lane l takes the elements l, l + 16, ...
const LANES: usize = 16;

/// Defines `fn name(isa, args)` whose body is compiled for every instruction set.
macro_rules! vectorized {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
        pub(crate) fn $name(isa: Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                match isa {
                    // SAFETY: an Isa is only made where the machine has it.
                    Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: an Isa is only made where the machine has it.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            body($($arg),*)
        }
    )*};
}

#[inline(always)]
fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}

/// The sum of `f(a, b)` over pairs.
#[inline(always)]
fn reduce(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] += f(a[l], b[l]);
        }
    }
    for (l, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[l] += f(*a, *b);
    }
    sum_lanes(lanes)
}

/// `e^x` within 2 units in the last place; 0 below -87.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let t = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = t - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
        p = p * r + c;
    }
    let y = (p * r * r + r + 1.0) * f32::from_bits((t.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.0 { 0.0 } else { y }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// The normal distribution function, by Abramowitz and Stegun 7.1.26 (error below 1e-7).
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = ((((1.061_405_4 * t - 1.453_152) * t + 1.421_413_7) * t - 0.284_496_74) * t + 0.254_829_6) * t;
    let tail = 0.5 * p * exp(-z * z);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// `sqrt(2 / pi)`, of the tanh form of GELU.
const GELU: f32 = 0.797_884_6;

vectorized! {
    /// `sum a_i b_i`
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        reduce(a, b, |a, b| a * b)
    }

    /// `a = a + b`
    fn add(a: &mut [f32], b: &[f32]) {
        for (a, b) in a.iter_mut().zip(b) {
            *a += b;
        }
    }

    /// `y = a y + b x`; y may hold anything where a is 0.
    fn combine(a: f32, y: &mut [f32], b: f32, x: &[f32]) {
        if a == 0.0 {
            y.fill(0.0);
        }
        for (y, x) in y.iter_mut().zip(x) {
            *y = a * *y + b * x;
        }
    }

    /// `a = a + s b`
    fn add_scaled(a: &mut [f32], b: &[f32], s: f32) {
        for (a, b) in a.iter_mut().zip(b) {
            *a += s * b;
        }
    }

    /// `y = x / sqrt(mean(x^2) + eps) * w`; returns `1 / sqrt(..)`.
    fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32 {
        let r = 1.0 / (reduce(x, x, |a, b| a * b) / x.len() as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * r * w;
        }
        r
    }

    /// `y = (x - mean) / sqrt(var + eps) * w + b`; returns the mean and `1 / sqrt(..)`.
    fn layer_norm(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32]) -> [f32; 2] {
        let mean = reduce(x, x, |a, _| a) / x.len() as f32;
        let r = 1.0 / (reduce(x, x, |a, _| (a - mean) * (a - mean)) / x.len() as f32 + eps).sqrt();
        for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
            *y = (x - mean) * r * w + b;
        }
        [mean, r]
    }

    /// `dx += r (g - [centred] mean(g) - xhat mean(g xhat))` with `g = dy w`, `xhat = (x - mean) r`.
    fn norm_backward(x: &[f32], w: &[f32], mean: f32, r: f32, centred: bool, dy: &[f32], dx: &mut [f32]) {
        let n = x.len() as f32;
        let (mut gs, mut gx) = ([0.0f32; LANES], [0.0f32; LANES]);
        for ((x, w), dy) in x.chunks(LANES).zip(w.chunks(LANES)).zip(dy.chunks(LANES)) {
            for (l, ((x, w), dy)) in x.iter().zip(w).zip(dy).enumerate() {
                let g = dy * w;
                gs[l] += g;
                gx[l] += g * ((x - mean) * r);
            }
        }
        let mean_g = if centred { sum_lanes(gs) / n } else { 0.0 };
        let mean_gx = sum_lanes(gx) / n;
        for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(w).zip(dy) {
            *dx += r * (dy * w - mean_g - (x - mean) * r * mean_gx);
        }
    }

    /// `dw += dy xhat`
    fn norm_weight_backward(x: &[f32], mean: f32, r: f32, dy: &[f32], dw: &mut [f32]) {
        for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
            *dw += dy * ((x - mean) * r);
        }
    }

    /// `a = silu(g) u`
    fn silu_mul(g: &[f32], u: &[f32], a: &mut [f32]) {
        for ((a, g), u) in a.iter_mut().zip(g).zip(u) {
            *a = g * sigmoid(*g) * u;
        }
    }

    /// Takes g and u and leaves their gradients, from that of `silu(g) u`.
    fn silu_mul_backward(g: &mut [f32], u: &mut [f32], da: &[f32]) {
        for ((g, u), da) in g.iter_mut().zip(u).zip(da) {
            let s = sigmoid(*g);
            let (gate, up) = (*g, *u);
            *u = da * gate * s;
            *g = da * up * s * (1.0 + gate * (1.0 - s));
        }
    }

    /// `y = 0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))`
    fn gelu_tanh(z: &[f32], y: &mut [f32]) {
        for (y, z) in y.iter_mut().zip(z) {
            *y = 0.5 * z * (1.0 + tanh(GELU * (z + 0.044_715 * z * z * z)));
        }
    }

    /// `dy = dy gelu_tanh'(z)`
    fn gelu_tanh_backward(z: &[f32], dy: &mut [f32]) {
        for (dy, z) in dy.iter_mut().zip(z) {
            let t = tanh(GELU * (z + 0.044_715 * z * z * z));
            let inner = GELU * (1.0 + 3.0 * 0.044_715 * z * z);
            *dy *= 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner;
        }
    }

    /// `y = z Phi(z)`
    fn gelu_erf(z: &[f32], y: &mut [f32]) {
        for (y, z) in y.iter_mut().zip(z) {
            *y = z * normal_cdf(*z);
        }
    }

    /// `dy = dy (Phi(z) + z phi(z))`
    fn gelu_erf_backward(z: &[f32], dy: &mut [f32]) {
        for (dy, z) in dy.iter_mut().zip(z) {
            *dy *= normal_cdf(*z) + z * 0.398_942_3 * exp(-0.5 * z * z);
        }
    }

    /// `y = softmax(scale x)`; returns `log sum exp(scale x)`.
    fn softmax(x: &mut [f32], scale: f32) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in x.chunks(LANES) {
            for (max, x) in lanes.iter_mut().zip(chunk) {
                *max = if *x > *max { *x } else { *max };
            }
        }
        let max = scale * lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
        let mut sums = [0.0f32; LANES];
        for chunk in x.chunks_mut(LANES) {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *x = exp(scale * *x - max);
                *sum += *x;
            }
        }
        let sum = sum_lanes(sums);
        let factor = 1.0 / sum;
        for x in x.iter_mut() {
            *x *= factor;
        }
        max + sum.ln()
    }

    /// `x = exp(scale x - lse)`: the probabilities again, from the scores and what [`softmax`] returned.
    fn probabilities(x: &mut [f32], scale: f32, lse: f32) {
        for x in x.iter_mut() {
            *x = exp(scale * *x - lse);
        }
    }

    /// `dp = scale p (dp - d)`: the scores' gradient from that of the probabilities, `d = sum p dp`.
    fn softmax_backward(p: &[f32], dp: &mut [f32], d: f32, scale: f32) {
        for (dp, p) in dp.iter_mut().zip(p) {
            *dp = scale * p * (*dp - d);
        }
    }

    /// Rotates the halves of a head; the inverse with `sign` -1.
    fn rope(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let (a, b) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            let (x, y, sin) = (*a, *b, sign * sin);
            *a = x * cos - y * sin;
            *b = y * cos + x * sin;
        }
    }

    /// One step of AdamW on a part of a tensor; `g` is scaled by `clip` first. `m_scale` and `v_scale` correct the bias.
    fn adamw(
        p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32],
        clip: f32, betas: [f32; 2], m_scale: f32, v_scale: f32, eps: f32, lr: f32, decay: f32,
    ) {
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * clip;
            *m = betas[0] * *m + (1.0 - betas[0]) * g;
            *v = betas[1] * *v + (1.0 - betas[1]) * g * g;
            *p -= lr * (*m * m_scale / ((*v * v_scale).sqrt() + eps) + decay * *p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_accurate_and_equal_on_every_instruction_set() {
        for i in -2000..2000 {
            let x = i as f32 * 0.01;
            assert!((exp(x) - x.exp()).abs() <= 3e-7 * x.exp(), "exp {x}");
            assert!((tanh(x) - x.tanh()).abs() < 3e-7, "tanh {x}");
        }
        // Phi at a few places, from a table.
        for (x, want) in [(0.0, 0.5), (1.0, 0.841_344_8), (-1.96, 0.024_997_895), (3.0, 0.998_650_1)] {
            assert!((normal_cdf(x) - want).abs() < 2e-7, "{x}");
        }
        let x: Vec<f32> = (0..77).map(|i| ((i * 37) % 77) as f32 * 0.1 - 3.0).collect();
        for isa in Isa::available() {
            let mut y = x.clone();
            let lse = softmax(isa, &mut y, 0.7);
            let mut portable = x.clone();
            assert_eq!(softmax(Isa::Portable, &mut portable, 0.7), lse);
            assert_eq!(portable, y);
            let sum: f64 = x.iter().map(|x| f64::from(0.7 * x).exp()).sum();
            assert!((f64::from(lse) - sum.ln()).abs() < 1e-6);
            assert_eq!(dot(isa, &x, &y), dot(Isa::Portable, &x, &y));
        }
    }
}

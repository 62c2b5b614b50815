//! Formulas on one row, in vectors.

use super::isa::{Simd, dispatch};
use crate::Activation;
use crate::reference::gelu_erf;

dispatch! {
    /// bf16 to f32.
    fn widen(from: &[u16], to: &mut [f32]) = widen_row
}
dispatch! {
    /// `z = silu(z) * up`
    fn silu_mul(z: &mut [f32], up: &[f32]) = silu_mul_row
}
dispatch! {
    /// `z = 0.5 z (1 + tanh(..))`
    fn gelu_tanh(z: &mut [f32]) = gelu_tanh_row
}
dispatch! {
    /// `out = (x - mean) / sqrt(var + eps) * gamma + beta`
    fn layer_norm(x: &[f32], gamma: &[f32], beta: &[f32], eps: f32, out: &mut [f32]) = layer_norm_row
}
dispatch! {
    /// `x = x / sqrt(mean(x^2) + eps) * gamma`
    fn rms_norm(x: &mut [f32], gamma: &[f32], eps: f32) = rms_norm_row
}
dispatch! {
    /// Rotates the halves of a head.
    fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) = rope_head
}

/// Applies an activation in place.
pub(crate) fn activate(isa: super::Isa, z: &mut [f32], activation: Activation) {
    match activation {
        Activation::None => {}
        Activation::GeluTanh => gelu_tanh(isa, z),
        // Only the projector has it, a thousandth of the work: exact, in f64.
        Activation::GeluErf => z.iter_mut().for_each(|z| *z = gelu_erf(*z)),
    }
}

/// Rotates neighbouring pairs: a few dozen numbers beside a head's product, so plainly.
pub(crate) fn rope_pairs(head: &mut [f32], angles: &[f32]) {
    let (cos, sin) = angles.split_at(angles.len() / 2);
    for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
        let (a, b) = (pair[0], pair[1]);
        pair[0] = a * cos - b * sin;
        pair[1] = b * cos + a * sin;
    }
}

/// Calls `$full(i)` for every whole vector of `$n` elements and `$part(i, count)` for the rest.
macro_rules! vectors {
    ($s:ident, $n:expr, |$i:ident, $load:ident, $store:ident| $body:block) => {{
        let n = $n;
        let mut $i = 0;
        while $i + $s::LANES <= n {
            macro_rules! $load {
                ($p:expr) => {
                    $s::load($p.as_ptr().add($i))
                };
            }
            macro_rules! $store {
                ($p:expr, $v:expr) => {
                    $s::store($p.as_mut_ptr().add($i), $v)
                };
            }
            $body
            $i += $s::LANES;
        }
        if $i < n {
            let count = n - $i;
            macro_rules! $load {
                ($p:expr) => {
                    $s::load_first($p.as_ptr().add($i), count)
                };
            }
            macro_rules! $store {
                ($p:expr, $v:expr) => {{
                    let mut lanes = [0.0f32; 16];
                    $s::store(lanes.as_mut_ptr(), $v);
                    $p[$i..].copy_from_slice(&lanes[..count]);
                }};
            }
            $body
        }
    }};
}

#[inline(always)]
unsafe fn widen_row<S: Simd>(from: &[u16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    // SAFETY: vectors! stays inside slices of equal length; the caller guarantees the instruction set.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= from.len() {
            S::store(to.as_mut_ptr().add(i), S::load_bf16(from.as_ptr().add(i)));
            i += S::LANES;
        }
        for (to, from) in to[i..].iter_mut().zip(&from[i..]) {
            *to = crate::weight::bf16_to_f32(*from);
        }
    }
}

#[inline(always)]
unsafe fn silu_mul_row<S: Simd>(z: &mut [f32], up: &[f32]) {
    assert_eq!(z.len(), up.len());
    // SAFETY: vectors! stays inside slices of equal length; the caller guarantees the instruction set.
    unsafe {
        let one = S::splat(1.0);
        vectors!(S, z.len(), |i, load, store| {
            let v = load!(z);
            let e = S::exp(S::sub(S::splat(0.0), v));
            let silu = S::div(v, S::add(one, e));
            store!(z, S::mul(silu, load!(up)));
        });
    }
}

#[inline(always)]
unsafe fn gelu_tanh_row<S: Simd>(z: &mut [f32]) {
    // SAFETY: vectors! stays inside the slice; the caller guarantees the instruction set.
    unsafe {
        let one = S::splat(1.0);
        vectors!(S, z.len(), |i, load, store| {
            let v = load!(z);
            let cube = S::mul(S::mul(v, v), v);
            let inner = S::mul(S::splat(0.797_884_6), S::fma(S::splat(0.044_715), cube, v));
            // 0.5 (1 + tanh u) = 1 / (1 + e^(-2u))
            let e = S::exp(S::mul(S::splat(-2.0), inner));
            store!(z, S::div(v, S::add(one, e)));
        });
    }
}

#[inline(always)]
unsafe fn layer_norm_row<S: Simd>(x: &[f32], gamma: &[f32], beta: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len();
    assert!(gamma.len() == n && beta.len() == n && out.len() == n);
    // SAFETY: vectors! stays inside slices of equal length; the caller guarantees the instruction set.
    unsafe {
        let mut sum = S::splat(0.0);
        vectors!(S, n, |i, load, _store| {
            sum = S::add(sum, load!(x));
        });
        let mean = S::sum(sum) / n as f32;
        let centre = S::splat(mean);
        let mut squares = S::splat(0.0);
        let whole = n - n % S::LANES;
        let mut i = 0;
        while i < whole {
            let d = S::sub(S::load(x.as_ptr().add(i)), centre);
            squares = S::fma(d, d, squares);
            i += S::LANES;
        }
        let tail: f32 = x[whole..].iter().map(|v| (v - mean) * (v - mean)).sum();
        let scale = S::splat(1.0 / ((S::sum(squares) + tail) / n as f32 + eps).sqrt());
        vectors!(S, n, |i, load, store| {
            let v = S::mul(S::sub(load!(x), centre), scale);
            store!(out, S::fma(v, load!(gamma), load!(beta)));
        });
    }
}

#[inline(always)]
unsafe fn rms_norm_row<S: Simd>(x: &mut [f32], gamma: &[f32], eps: f32) {
    let n = x.len();
    assert!(gamma.len() == n);
    // SAFETY: vectors! stays inside slices of equal length; the caller guarantees the instruction set.
    unsafe {
        let mut squares = S::splat(0.0);
        vectors!(S, n, |i, load, _store| {
            let v = load!(x);
            squares = S::fma(v, v, squares);
        });
        let scale = S::splat(1.0 / (S::sum(squares) / n as f32 + eps).sqrt());
        vectors!(S, n, |i, load, store| {
            store!(x, S::mul(S::mul(load!(x), scale), load!(gamma)));
        });
    }
}

#[inline(always)]
unsafe fn rope_head<S: Simd>(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    assert!(head.len() == 2 * half && sin.len() == half);
    let (low, high) = head.split_at_mut(half);
    // SAFETY: vectors! stays inside slices of equal length; the caller guarantees the instruction set.
    unsafe {
        vectors!(S, half, |i, load, store| {
            let (a, b, c, s) = (load!(low), load!(high), load!(cos), load!(sin));
            store!(low, S::sub(S::mul(a, c), S::mul(b, s)));
            store!(high, S::add(S::mul(b, c), S::mul(a, s)));
        });
    }
}

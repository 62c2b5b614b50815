//! Activations in integers, as packed weights are multiplied with: in eight bits beside int4 and int8 ([`NarrowRows`]), in
//! fourteen beside int10 and int12 ([`WideRows`]).
//!
//! Each group of a row's columns has a scale of its own, `a = max|x| / LARGEST`, and codes `c = round(x / a)`, ties to even.
//! A product is then, per output, over the groups from left to right,
//!
//! `sum = fma(t_g, S_g * a_g, sum)`,
//!
//! with `t_g` an exact integer, rounded to f32. Narrow, groups of [`GROUP`]: `t_g` sums `c (u - 128)`; for int8 `u` as stored
//! and `S` the f16 scale; for int4 `u = 8q + z` and `S = S(s)`, and the whole times `row_scale / 8`. Wide, groups of
//! [`BLOCK_COLS`]: `t_g` sums `c * f * q` and `S` is 1, and the whole times `row_scale`. Integers are exact and the order of
//! the groups is fixed, so every instruction set and every tile gives the same bits.

use crate::cpu::Isa;
use crate::host::HostTensor;
use crate::packed::{BLOCK_COLS, GROUP};
use crate::spare::{NARROW_CODES, Spare, WIDE_CODES};

/// Rows in eight bits.
pub(crate) type NarrowRows = CodedRows<i8>;
/// Rows in fourteen bits: 64 products with weights below 2^12 fit 32 bits.
pub(crate) type WideRows = CodedRows<i16>;

/// A type of codes.
pub(crate) trait Code: Copy + Default + Send + Sync + 'static {
    /// Columns of a group.
    const GROUP: usize;
    const LARGEST: f32;
    /// Stored weights are this much above what they stand for.
    const WEIGHT_OFFSET: i32;
    const SPARE: &'static Spare<Self>;
    fn new(code: i32) -> Self;
    fn to_i32(self) -> i32;
    /// One row in codes; `codes`, `scales` and `offsets` are a row's of [`CodedRows`].
    fn of_row(isa: Isa, x: &[f32], codes: &mut [Self], scales: &mut [f32], offsets: &mut [i32]);
}

impl Code for i8 {
    const GROUP: usize = GROUP;
    const LARGEST: f32 = 127.0;
    const WEIGHT_OFFSET: i32 = 128;
    const SPARE: &'static Spare<i8> = &NARROW_CODES;

    #[inline(always)]
    fn new(code: i32) -> Self {
        code as i8
    }

    #[inline(always)]
    fn to_i32(self) -> i32 {
        self.into()
    }

    fn of_row(isa: Isa, x: &[f32], codes: &mut [Self], scales: &mut [f32], offsets: &mut [i32]) {
        narrow(isa, x, codes, scales, offsets);
    }
}

impl Code for i16 {
    const GROUP: usize = BLOCK_COLS;
    const LARGEST: f32 = 8191.0;
    const WEIGHT_OFFSET: i32 = 0;
    const SPARE: &'static Spare<i16> = &WIDE_CODES;

    #[inline(always)]
    fn new(code: i32) -> Self {
        code as i16
    }

    #[inline(always)]
    fn to_i32(self) -> i32 {
        self.into()
    }

    fn of_row(isa: Isa, x: &[f32], codes: &mut [Self], scales: &mut [f32], offsets: &mut [i32]) {
        wide(isa, x, codes, scales, offsets);
    }
}

/// Rows of codes with their scales.
#[derive(Debug)]
pub(crate) struct CodedRows<C: Code> {
    /// Columns, filled up with zeros to a multiple of [`BLOCK_COLS`].
    pub cols: usize,
    /// `[rows, cols]`
    pub codes: Vec<C>,
    /// `[rows, groups]`
    pub scales: Vec<f32>,
    /// `[rows, groups]`: sums of the codes of a group times what stored weights have too much; empty if that is nothing.
    pub offsets: Vec<i32>,
}

impl<C: Code> CodedRows<C> {
    /// Room for `rows` rows of `cols` columns, with whatever is in it.
    pub fn new(rows: usize, cols: usize) -> Self {
        let cols = cols.next_multiple_of(BLOCK_COLS);
        let groups = rows * cols / C::GROUP;
        let offsets = if C::WEIGHT_OFFSET == 0 { 0 } else { groups };
        Self { cols, codes: C::SPARE.stale(rows * cols), scales: vec![0.0; groups], offsets: vec![0; offsets] }
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols / C::GROUP
    }

    /// Offsets of a row.
    pub fn row_offsets(&self) -> usize {
        if C::WEIGHT_OFFSET == 0 { 0 } else { self.groups() }
    }

    /// The values that are multiplied in place of `x`.
    pub fn rounded(x: &HostTensor) -> HostTensor {
        let mut out = x.clone();
        let mut rows = Self::new(1, x.cols);
        for row in 0..x.rows {
            C::of_row(Isa::Portable, x.row(row), &mut rows.codes, &mut rows.scales, &mut rows.offsets);
            for (k, value) in out.row_mut(row).iter_mut().enumerate() {
                *value = rows.codes[k].to_i32() as f32 * rows.scales[k / C::GROUP];
            }
        }
        out
    }
}

impl<C: Code> Drop for CodedRows<C> {
    fn drop(&mut self) {
        C::SPARE.give(std::mem::take(&mut self.codes));
    }
}

crate::cpu::isa::dispatch! {
    fn narrow(x: &[f32], codes: &mut [i8], scales: &mut [f32], offsets: &mut [i32]) = narrow_in
}
crate::cpu::isa::dispatch! {
    fn wide(x: &[f32], codes: &mut [i16], scales: &mut [f32], offsets: &mut [i32]) = wide_in
}

#[allow(clippy::extra_unused_type_parameters, reason = "plain code, compiled once for each instruction set")]
#[inline(always)]
unsafe fn narrow_in<S>(x: &[f32], codes: &mut [i8], scales: &mut [f32], offsets: &mut [i32]) {
    row_in::<i8, GROUP>(x, codes, scales, offsets);
}

#[allow(clippy::extra_unused_type_parameters, reason = "plain code, compiled once for each instruction set")]
#[inline(always)]
unsafe fn wide_in<S>(x: &[f32], codes: &mut [i16], scales: &mut [f32], offsets: &mut [i32]) {
    row_in::<i16, BLOCK_COLS>(x, codes, scales, offsets);
}

#[allow(clippy::needless_range_loop, reason = "lanes")]
#[inline(always)]
fn row_in<C: Code, const N: usize>(x: &[f32], codes: &mut [C], scales: &mut [f32], offsets: &mut [i32]) {
    let groups = x.len().div_ceil(N);
    codes[groups * N..].fill(C::default());
    for (group, x) in x.chunks(N).enumerate() {
        let mut filled = [0.0f32; N];
        let x: &[f32; N] = match x.try_into() {
            Ok(x) => x,
            Err(_) => {
                filled[..x.len()].copy_from_slice(x);
                &filled
            }
        };
        let mut lanes = [0.0f32; 8];
        for c in 0..N / 8 {
            for l in 0..8 {
                let v = x[8 * c + l].abs();
                lanes[l] = if v > lanes[l] { v } else { lanes[l] };
            }
        }
        let largest = lanes.iter().fold(0.0f32, |a, b| if *b > a { *b } else { a });
        let scale = largest / C::LARGEST;
        // What is too small to divide by counts as zero; an infinity keeps its scale and so is not lost.
        let inverse = if scale > f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
        let out: &mut [C] = &mut codes[group * N..(group + 1) * N];
        let mut sum = 0i32;
        for k in 0..N {
            // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
            out[k] = C::new((x[k] * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000);
            if C::WEIGHT_OFFSET != 0 {
                sum += out[k].to_i32();
            }
        }
        scales[group] = scale;
        if C::WEIGHT_OFFSET != 0 {
            offsets[group] = -C::WEIGHT_OFFSET * sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coded<C: Code>(isa: Isa, x: &[f32]) -> CodedRows<C> {
        let mut rows = CodedRows::new(1, x.len());
        rows.codes.fill(C::new(77));
        C::of_row(isa, x, &mut rows.codes, &mut rows.scales, &mut rows.offsets);
        rows
    }

    fn codes_are_the_nearest<C: Code>() {
        for len in [100usize, 70, 64] {
            let x: Vec<f32> = (0..len).map(|k| ((k * 7919 % 1009) as f32 - 500.0) * 0.013).collect();
            for isa in Isa::available() {
                let rows = coded::<C>(isa, &x);
                assert_eq!((rows.cols, rows.groups()), (len.next_multiple_of(64), len.next_multiple_of(64) / C::GROUP));
                for (group, codes) in rows.codes.chunks_exact(C::GROUP).enumerate() {
                    let scale = rows.scales[group];
                    for (k, code) in (group * C::GROUP..).zip(codes) {
                        let (code, value) = (code.to_i32() as f32, x.get(k).copied().unwrap_or(0.0));
                        assert!(code.abs() <= C::LARGEST, "{k}: {code}");
                        assert!((code * scale - value).abs() <= scale * 0.5001, "{isa:?} {k}");
                    }
                    if C::WEIGHT_OFFSET != 0 {
                        let sum: i32 = codes.iter().map(|code| code.to_i32()).sum();
                        assert_eq!(-C::WEIGHT_OFFSET * sum, rows.offsets[group]);
                    }
                }
            }
        }
    }

    fn zeros_tiny_and_huge<C: Code>(lost: f32) {
        for value in [0.0, 1e-44, 1e-38, 1e38, 3e38] {
            let rows = coded::<C>(Isa::detect(), &[value; 32]);
            let found = rows.codes[0].to_i32() as f32 * rows.scales[0];
            assert!((found - value).abs() <= value * 1e-6 || value < lost, "{value}: {found}");
        }
    }

    #[test]
    fn narrow() {
        codes_are_the_nearest::<i8>();
        zeros_tiny_and_huge::<i8>(1e-35);
    }

    #[test]
    fn wide() {
        codes_are_the_nearest::<i16>();
        zeros_tiny_and_huge::<i16>(1e-33);
    }
}

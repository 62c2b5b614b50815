//! Tiles of int10 and int12: codes in planes of low and high bits with a small factor per group, see [`packed`](crate::packed).

use crate::cpu::Isa;
use crate::packed::{BLOCK_COLS, GROUP, TILE_ROWS, f32_at, group_of};

/// Bytes of the head of a tile: row scales.
pub(crate) const WIDE_HEAD: usize = 64;
/// Codes of a vector: 16 rows by 2 columns.
const LANES: usize = 2 * TILE_ROWS;
/// Vectors of a block.
pub(crate) const VECTORS: usize = BLOCK_COLS / 2;
/// Bytes of the factors, and where the high bits begin.
const FACTORS: usize = TILE_ROWS;
const HIGH: usize = FACTORS + VECTORS * LANES;

/// Bytes of a block whose codes have `high` bits beside their low eight.
pub(crate) const fn block_bytes(high: usize) -> usize {
    HIGH + VECTORS * LANES * high / 8
}

/// The largest code, and the largest factor: their product is below 2^12, so that the products of 64 columns with codes of
/// 14 bits fit 32 bits.
const fn largest(high: usize) -> (i16, i16) {
    ((1 << (7 + high)) - 1, 1 << (5 - high))
}

/// The codes of vector `v`, times their group's factors.
#[inline(always)]
fn vector<const HIGH_BITS: usize>(block: &[u8], factors: &[[i16; LANES]; 2], v: usize) -> [i16; LANES] {
    let together = 8 / HIGH_BITS;
    let low = &block[FACTORS + v * LANES..][..LANES];
    let high = &block[HIGH + v / together * LANES..][..LANES];
    let shift = 16 - HIGH_BITS - HIGH_BITS * (v % together);
    let factors = &factors[v / (VECTORS / 2)];
    let mut out = [0; LANES];
    for lane in 0..LANES {
        let sign_and_high = (u16::from(high[lane]) << shift).cast_signed() >> (16 - HIGH_BITS) << 8;
        // What is not from `pack` may be too large; it wraps the same everywhere.
        out[lane] = (sign_and_high | i16::from(low[lane])).wrapping_mul(factors[lane]);
    }
    out
}

#[inline(always)]
fn factors_of(block: &[u8]) -> [[i16; LANES]; 2] {
    let mut out = [[0; LANES]; 2];
    for lane in 0..LANES {
        let both = block[lane / 2];
        out[0][lane] = i16::from(both & 15) + 1;
        out[1][lane] = i16::from(both >> 4) + 1;
    }
    out
}

crate::cpu::isa::dispatch! {
    /// Codes times factors of whole blocks: `out [blocks][VECTORS][stride]`, the first `LANES` of each.
    fn unpack_blocks(high: usize, blocks: &[u8], stride: usize, out: &mut [i16]) = unpack_blocks_in
}

#[allow(clippy::extra_unused_type_parameters, reason = "plain code, compiled once for each instruction set")]
#[inline(always)]
unsafe fn unpack_blocks_in<S>(high: usize, blocks: &[u8], stride: usize, out: &mut [i16]) {
    match high {
        2 => unpack_with::<2>(blocks, stride, out),
        _ => unpack_with::<4>(blocks, stride, out),
    }
}

#[inline(always)]
fn unpack_with<const HIGH_BITS: usize>(blocks: &[u8], stride: usize, out: &mut [i16]) {
    let blocks = blocks.chunks_exact(const { block_bytes(HIGH_BITS) });
    for (block, out) in blocks.zip(out.chunks_mut(VECTORS * stride)) {
        let factors = factors_of(block);
        for (v, out) in out.chunks_mut(stride).enumerate() {
            out[..LANES].copy_from_slice(&vector::<HIGH_BITS>(block, &factors, v));
        }
    }
}

/// The values of row `r` of a tile.
pub(crate) fn unpack_row(high: usize, tile: &[u8], r: usize, out: &mut [f32]) {
    let scale = f32_at(tile, 4 * r);
    let mut codes = [0; VECTORS * LANES];
    for (block, out) in tile[WIDE_HEAD..].chunks_exact(block_bytes(high)).zip(out.chunks_mut(BLOCK_COLS)) {
        unpack_blocks(Isa::Portable, high, block, LANES, &mut codes);
        for (k, out) in out.iter_mut().enumerate() {
            *out = scale * f32::from(codes[k / 2 * LANES + 2 * r + k % 2]);
        }
    }
}

/// Packs up to 16 rows of values `[_, cols]`.
pub(crate) fn pack(isa: Isa, high: usize, cols: usize, values: &[f32], tile: &mut [u8]) {
    let (top, factor) = largest(high);
    let together = 8 / high;
    tile.fill(0);
    let (head, blocks) = tile.split_at_mut(WIDE_HEAD);
    for (r, row) in values.chunks_exact(cols.max(1)).enumerate() {
        let widest = row.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        let steps = f32::from(top) * f32::from(factor);
        let mut row_scale = widest / steps;
        // Smaller ones cannot be divided by; their row is zero.
        if row_scale < f32::MIN_POSITIVE * 1024.0 {
            continue;
        }
        if row_scale * steps > widest {
            row_scale = row_scale.next_down();
        }
        head[4 * r..][..4].copy_from_slice(&row_scale.to_le_bytes());
        for (number, block) in blocks.chunks_exact_mut(block_bytes(high)).enumerate() {
            for half in 0..2 {
                let found = search(isa, &group_of(values, cols, r, 2 * number + half), row_scale, top, factor);
                block[r] |= ((found.factor - 1) as u8) << (4 * half);
                for (k, q) in found.q.iter().enumerate() {
                    let (v, lane) = (half * GROUP / 2 + k / 2, 2 * r + k % 2);
                    let bits = q.cast_unsigned();
                    block[FACTORS + v * LANES + lane] = bits as u8;
                    let field = (bits >> 8) as u8 & ((1 << high) - 1);
                    block[HIGH + v / together * LANES + lane] |= field << (high * (v % together));
                }
            }
        }
    }
}

/// A group's factor and codes.
#[derive(Clone, Copy)]
pub(crate) struct WideGroup {
    factor: i16,
    q: [i16; GROUP],
}

crate::cpu::isa::dispatch! {
    /// Tries the smallest factor that holds all values, and those below it, which cut some off.
    fn search(x: &[f32; GROUP], row_scale: f32, top: i16, most: i16) -> WideGroup = search_in
}

#[allow(clippy::needless_range_loop, reason = "lanes")]
#[allow(clippy::extra_unused_type_parameters, reason = "plain code, compiled once for each instruction set")]
#[inline(always)]
unsafe fn search_in<S>(x: &[f32; GROUP], row_scale: f32, top: i16, most: i16) -> WideGroup {
    let mut best = WideGroup { factor: 1, q: [0; GROUP] };
    let mut least = f32::INFINITY;
    let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    let holds = (largest / (row_scale * f32::from(top))).ceil().clamp(1.0, f32::from(most)) as i16;
    let top = f32::from(top);
    for factor in (1.max(holds - 2)..=holds).rev() {
        let step = row_scale * f32::from(factor);
        let inverse = 1.0 / step;
        let mut q = [0.0f32; GROUP];
        let mut errors = [0.0f32; 8];
        for k in 0..GROUP {
            q[k] = (x[k] * inverse).round_ties_even().clamp(-top, top);
            // Relative to the step, so that the square of a huge weight is finite.
            let error = q[k] - x[k] * inverse;
            errors[k % 8] += error * error;
        }
        let error = errors.iter().sum::<f32>() * (f32::from(factor) * f32::from(factor));
        if error < least {
            least = error;
            best.factor = factor;
            for k in 0..GROUP {
                best.q[k] = q[k] as i16;
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code with every factor comes back, on every instruction set.
    #[test]
    fn codes_come_back_times_their_factors() {
        for high in [2, 4] {
            let (top, most) = largest(high);
            assert!(i64::from(top) * i64::from(most) * 8191 * 64 < 1 << 31);
            let mut block = vec![0; block_bytes(high)];
            for (byte, value) in block.iter_mut().enumerate() {
                *value = (byte * 167 + byte / 251) as u8;
            }
            let code = |v: usize, lane: usize| {
                let (together, at) = (8 / high, HIGH + v / (8 / high) * LANES + lane);
                let field = i32::from(block[at]) >> (high * (v % together)) & ((1 << high) - 1);
                let q = field << 8 | i32::from(block[FACTORS + v * LANES + lane]);
                let q = if q > i32::from(top) { q - 2 * (i32::from(top) + 1) } else { q };
                let factor = (i32::from(block[lane / 2]) >> (v / 16 * 4) & 15) + 1;
                (q * factor) as i16
            };
            for isa in Isa::available() {
                let mut out = vec![0; VECTORS * 3 * LANES];
                unpack_blocks(isa, high, &block, 3 * LANES, &mut out);
                for (at, found) in out.iter().enumerate() {
                    let (v, lane) = (at / (3 * LANES), at % (3 * LANES));
                    assert_eq!(*found, if lane < LANES { code(v, lane) } else { 0 }, "{isa:?} {high} {v} {lane}");
                }
            }
        }
    }
}

//! Scales, zero points and codes of int4 and int8 groups that lose least: what [`packed`](crate::packed) stores.
//!
//! Plain code in eight lanes, compiled for each instruction set; all find the same.

use crate::packed::{GROUP, Group, scale_code, scale_of};
use crate::weight::f16_to_f32;

/// A group in four bits.
#[derive(Clone, Copy)]
pub(crate) struct Int4Group {
    /// Scale code.
    pub s: u8,
    /// 128 less the zero point in eighths of a step.
    pub z: u8,
    pub q: [u8; GROUP],
}

crate::cpu::isa::dispatch! {
    /// The group's codes with the least squared error that the search finds.
    fn search_int4(x: &Group, row_scale: f32) -> Int4Group = search_int4_in
}
crate::cpu::isa::dispatch! {
    /// The same for int8: f16 scale and codes in -127..=127.
    fn search_int8(x: &Group) -> (u16, [i8; GROUP]) = search_int8_in
}

/// Sums in eight lanes, so that every instruction set adds in the same order.
#[inline(always)]
fn sum(term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; 8];
    for c in 0..GROUP / 8 {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += term(8 * c + l);
        }
    }
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
}

/// Codes `round(x / d + z / 8)` of a group, and the squared error of `d (q - z / 8)`.
#[allow(clippy::needless_range_loop, reason = "lanes")]
#[inline(always)]
fn int4_codes(x: &Group, d: f32, z: f32) -> ([f32; GROUP], f32) {
    let (inverse, offset) = (1.0 / d, z / 8.0);
    let mut q = [0.0f32; GROUP];
    for k in 0..GROUP {
        let code = (x[k] * inverse + offset).round_ties_even();
        let code = if code > 0.0 { code } else { 0.0 };
        q[k] = if code < 15.0 { code } else { 15.0 };
    }
    let error = sum(|k| {
        let e = d * (q[k] - offset) - x[k];
        e * e
    });
    (q, error)
}

/// Starts from ranges of 12 to 19 steps, some of which cut the ends off, and fits line and codes to each other; then tries
/// what is near the best scale and zero point.
#[allow(clippy::needless_range_loop, reason = "lanes")]
#[allow(clippy::extra_unused_type_parameters, reason = "plain code, compiled once for each instruction set")]
#[inline(always)]
unsafe fn search_int4_in<S>(x: &Group, row_scale: f32) -> Int4Group {
    let mut lo = 0.0f32;
    let mut hi = 0.0f32;
    for v in x {
        lo = if *v < lo { *v } else { lo };
        hi = if *v > hi { *v } else { hi };
    }
    let mut best = Int4Group { s: 0, z: 128, q: [0; GROUP] };
    let mut least = f32::INFINITY;
    let mut keep = |s: u8, z: f32, q: &[f32; GROUP], error: f32| {
        if error < least {
            least = error;
            best.s = s;
            best.z = 128 - z as u8;
            for k in 0..GROUP {
                best.q[k] = q[k] as u8;
            }
        }
        (best.s, best.z)
    };
    let mut found = (0, 128);
    let mean_x = sum(|k| x[k]) / GROUP as f32;
    for start in 0..15 {
        let over = start as f32 * 0.5 - 3.0;
        let mut step = (hi - lo) / (15.0 + over);
        let mut zero = if step > 0.0 { -lo / step } else { 0.0 };
        if over > 0.0 {
            zero *= 1.0 - over / 30.0;
        }
        for _ in 0..2 {
            let s = scale_code(step / row_scale);
            let d = row_scale * scale_of(s);
            let z = (zero * (step / d) * 8.0).round_ties_even().clamp(0.0, 127.0);
            let (q, error) = int4_codes(x, d, z);
            found = keep(s, z, &q, error);
            // The line through (q, x) with the least squares gives the next step and zero point.
            let mean_q = sum(|k| q[k]) / GROUP as f32;
            let spread = sum(|k| (q[k] - mean_q) * (q[k] - mean_q));
            let slope = sum(|k| (q[k] - mean_q) * (x[k] - mean_x)) / spread;
            if !(slope > 0.0 && slope.is_finite()) {
                break;
            }
            step = slope;
            zero = mean_q - mean_x / slope;
        }
    }
    let (s, z) = (i32::from(found.0), 128.0 - f32::from(found.1));
    for near in [s, s - 1, s + 1].into_iter().filter(|s| (0..64).contains(s)) {
        // The middle of the codes stays where it is.
        let ratio = scale_of(s as u8) / scale_of(near as u8);
        let middle = (60.0 - (60.0 - z) * ratio).round_ties_even();
        for offset in -4..=4 {
            let z = (middle + offset as f32).clamp(0.0, 127.0);
            let (q, error) = int4_codes(x, row_scale * scale_of(near as u8), z);
            keep(near as u8, z, &q, error);
        }
    }
    best
}

#[allow(clippy::needless_range_loop, reason = "lanes")]
#[allow(clippy::extra_unused_type_parameters, reason = "plain code, compiled once for each instruction set")]
#[inline(always)]
unsafe fn search_int8_in<S>(x: &Group) -> (u16, [i8; GROUP]) {
    let mut largest = 0.0f32;
    for v in x {
        largest = if v.abs() > largest { v.abs() } else { largest };
    }
    let mut best = (0u16, [0i8; GROUP]);
    let mut least = sum(|k| x[k] * x[k]);
    for start in 0..5 {
        let mut step = largest / (127.0 - start as f32 * 0.75);
        for _ in 0..2 {
            let bits = f32_to_f16(step);
            let d = f16_to_f32(bits);
            if !(d > 0.0 && d.is_finite()) {
                break;
            }
            let inverse = 1.0 / d;
            let mut q = [0.0f32; GROUP];
            for k in 0..GROUP {
                let code = (x[k] * inverse).round_ties_even();
                let code = if code > -127.0 { code } else { -127.0 };
                q[k] = if code < 127.0 { code } else { 127.0 };
            }
            let error = sum(|k| {
                let e = d * q[k] - x[k];
                e * e
            });
            if error < least {
                least = error;
                best.0 = bits;
                for k in 0..GROUP {
                    best.1[k] = q[k] as i8;
                }
            }
            step = sum(|k| q[k] * x[k]) / sum(|k| q[k] * q[k]);
        }
    }
    best
}

/// Rounds a number that is not negative to the nearest half, ties to even; too large ones to the largest.
fn f32_to_f16(x: f32) -> u16 {
    if x >= 65504.0 {
        return 0x7bff;
    }
    if x < 6.103_515_6e-5 {
        // Subnormal: steps of 2^-24.
        return (x * 16_777_216.0).round_ties_even() as u16;
    }
    let bits = x.to_bits() - (112 << 23);
    ((bits + 0xfff + ((bits >> 13) & 1)) >> 13) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_to_nearest_even() {
        for bits in 0..0x7c00u16 {
            assert_eq!(f32_to_f16(f16_to_f32(bits)), bits);
        }
        for bits in 1..0x7bff {
            let middle = f16_to_f32(bits) / 2.0 + f16_to_f32(bits + 1) / 2.0;
            assert_eq!(f32_to_f16(middle), if bits % 2 == 0 { bits } else { bits + 1 });
        }
    }
}

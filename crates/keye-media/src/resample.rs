//! Pillow's and torch's antialiased resampling of interleaved RGB (spec §10.6).

#[cfg(target_arch = "x86_64")]
use crate::resample_avx2::Packed;

/// The interpolating function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Cubic convolution with a = -0.5, four pixels wide.
    Bicubic,
    /// A triangle, two pixels wide.
    Bilinear,
}

/// The arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Pillow up to 11: weights with 22 fraction bits, bytes between the passes. Bit exact.
    Pil22,
    /// torch `interpolate` of uint8 on the CPU: weights of 16 bits, bytes between the passes. Bit exact.
    Int16,
    /// torchvision's resize of uint8 tensors: float32 throughout, products fused into sums and into the kernel's polynomial
    /// as torch's build does, rounded once at the end. Bit exact.
    Float,
}

/// Buffers that live from frame to frame.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    bytes: Vec<u8>,
    floats: Vec<f32>,
    row: Vec<f32>,
    #[cfg(target_arch = "x86_64")]
    tail: crate::resample_avx2::Tail,
}

/// Resizes pictures of one size to another. The horizontal pass comes first; a pass that changes nothing is skipped.
#[derive(Debug)]
pub(crate) struct Resizer {
    in_h: usize,
    in_w: usize,
    out_h: usize,
    out_w: usize,
    passes: Passes,
    /// The integer passes for wide registers, across and down, if the processor has them.
    #[cfg(target_arch = "x86_64")]
    packed: Option<[Option<Packed>; 2]>,
}

#[derive(Debug)]
enum Passes {
    Integer { across: Option<Axis<i32>>, down: Option<Axis<i32>> },
    Float { across: Option<Axis<f32>>, down: Option<Axis<f32>> },
}

/// Weights of one dimension.
#[derive(Debug)]
struct Axis<W> {
    /// Per output index: first input index, and the part of `weights` that starts there.
    taps: Vec<(usize, std::ops::Range<usize>)>,
    weights: Vec<W>,
    /// Fraction bits of integer weights.
    bits: u32,
}

impl Resizer {
    /// From `in_h` x `in_w` to `out_h` x `out_w` pixels; no side is 0.
    pub(crate) fn new(in_h: u32, in_w: u32, out_h: u32, out_w: u32, kernel: Kernel, mode: Mode) -> Self {
        let passes = match mode {
            Mode::Float => Passes::Float {
                across: (in_w != out_w).then(|| float_axis(in_w, out_w, kernel)),
                down: (in_h != out_h).then(|| float_axis(in_h, out_h, kernel)),
            },
            Mode::Pil22 | Mode::Int16 => Passes::Integer {
                across: (in_w != out_w).then(|| integer_axis(in_w, out_w, kernel, mode)),
                down: (in_h != out_h).then(|| integer_axis(in_h, out_h, kernel, mode)),
            },
        };
        #[cfg(target_arch = "x86_64")]
        let packed = match &passes {
            // The vertical pass takes 32 bytes at once.
            Passes::Integer { across, down } if is_x86_feature_detected!("avx2") && out_w >= 11 => {
                Some([across, down].map(|axis| axis.as_ref().map(|axis| Packed::new(axis.outputs(), axis.bits))))
            }
            _ => None,
        };
        let [in_h, in_w, out_h, out_w] = [in_h, in_w, out_h, out_w].map(|side| side as usize);
        Self {
            in_h,
            in_w,
            out_h,
            out_w,
            passes,
            #[cfg(target_arch = "x86_64")]
            packed,
        }
    }

    /// Replaces `out` by the resized picture. `rgb` is `[in_h, in_w, 3]`, `out` becomes `[out_h, out_w, 3]`. The result
    /// does not depend on the processor: wider registers change no order of sums, and fused products are asked for by
    /// name (without the instruction they are slow, but the same).
    pub(crate) fn run(&self, rgb: &[u8], out: &mut Vec<u8>, scratch: &mut Scratch) {
        #[cfg(target_arch = "x86_64")]
        if let Some([across, down]) = &self.packed {
            // SAFETY: there are packed weights only if the processor has AVX2.
            return unsafe { self.run_packed(across.as_ref(), down.as_ref(), rgb, out, scratch) };
        }
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has AVX2 and FMA, all that the function asks for.
            return unsafe { self.run_avx2(rgb, out, scratch) };
        }
        self.run_here(rgb, out, scratch);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn run_avx2(&self, rgb: &[u8], out: &mut Vec<u8>, scratch: &mut Scratch) {
        self.run_here(rgb, out, scratch);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn run_packed(
        &self,
        across: Option<&Packed>,
        down: Option<&Packed>,
        rgb: &[u8],
        out: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) {
        self.check(rgb);
        let resize = |buffer: &mut Vec<u8>, rows: usize| buffer.resize(rows * self.out_w * 3, 0);
        match (across, down) {
            (None, None) => {
                out.clear();
                out.extend_from_slice(rgb);
            }
            (Some(across), None) => {
                resize(out, self.in_h);
                across.across(rgb, self.in_w, out, &mut scratch.tail);
            }
            (None, Some(down)) => {
                resize(out, self.out_h);
                down.down(rgb, out, self.out_w * 3);
            }
            (Some(across), Some(down)) => {
                resize(&mut scratch.bytes, self.in_h);
                resize(out, self.out_h);
                across.across(rgb, self.in_w, &mut scratch.bytes, &mut scratch.tail);
                down.down(&scratch.bytes, out, self.out_w * 3);
            }
        }
    }

    fn check(&self, rgb: &[u8]) {
        assert_eq!(rgb.len(), self.in_h * self.in_w * 3, "a frame of another size than the resizer's");
    }

    #[inline(always)]
    fn run_here(&self, rgb: &[u8], out: &mut Vec<u8>, scratch: &mut Scratch) {
        self.check(rgb);
        out.clear();
        match &self.passes {
            Passes::Integer { across, down } => {
                let narrow = match across {
                    None => rgb,
                    Some(axis) => {
                        let target = if down.is_some() { &mut scratch.bytes } else { &mut *out };
                        target.resize(self.in_h * self.out_w * 3, 0);
                        let rows = rgb.chunks_exact(self.in_w * 3).zip(target.chunks_exact_mut(self.out_w * 3));
                        rows.for_each(|(from, to)| axis.across(from, to));
                        if down.is_none() {
                            return;
                        }
                        &scratch.bytes[..self.in_h * self.out_w * 3]
                    }
                };
                match down {
                    None => out.extend_from_slice(narrow),
                    Some(axis) => {
                        out.resize(self.out_h * self.out_w * 3, 0);
                        axis.down(narrow, out, self.out_w * 3);
                    }
                }
            }
            Passes::Float { across, down } => {
                let Scratch { floats, row, .. } = scratch;
                floats.resize(self.in_h * self.out_w * 3, 0.0);
                for (from, to) in rgb.chunks_exact(self.in_w * 3).zip(floats.chunks_exact_mut(self.out_w * 3)) {
                    match across {
                        Some(axis) => axis.across(from, to),
                        None => to.iter_mut().zip(from).for_each(|(to, from)| *to = f32::from(*from)),
                    }
                }
                out.resize(self.out_h * self.out_w * 3, 0);
                match down {
                    Some(axis) => axis.down(floats, out, self.out_w * 3, row),
                    None => out.iter_mut().zip(&*floats).for_each(|(to, from)| *to = round(*from)),
                }
            }
        }
    }
}

/// Clamped to a byte, half to even.
#[inline(always)]
fn round(value: f32) -> u8 {
    value.clamp(0.0, 255.0).round_ties_even() as u8
}

impl Axis<i32> {
    /// First input index and weights of every output.
    #[cfg(target_arch = "x86_64")]
    fn outputs(&self) -> impl Iterator<Item = (usize, &[i32])> + Clone {
        self.taps.iter().map(|(first, range)| (*first, &self.weights[range.clone()]))
    }

    #[inline(always)]
    fn finish(&self, sum: i32) -> u8 {
        (sum >> self.bits).clamp(0, 255) as u8
    }

    /// `2^(bits-1)`: sums start with it so that the shift rounds.
    #[inline(always)]
    fn half(&self) -> i32 {
        (1 << self.bits) >> 1
    }

    // Sums cannot overflow: the absolute values of a pixel's weights add up to less than 2 * 2^22, times 255 is below
    // 2^31. The wrapping operations only keep the checks out of the loops.
    #[inline(always)]
    fn across(&self, from: &[u8], to: &mut [u8]) {
        for ((first, range), pixel) in self.taps.iter().zip(to.chunks_exact_mut(3)) {
            let mut sum = [self.half(); 3];
            let weights = &self.weights[range.clone()];
            for (source, weight) in from[first * 3..].chunks_exact(3).zip(weights) {
                for c in 0..3 {
                    sum[c] = sum[c].wrapping_add(i32::from(source[c]).wrapping_mul(*weight));
                }
            }
            for c in 0..3 {
                pixel[c] = self.finish(sum[c]);
            }
        }
    }

    #[inline(always)]
    fn down(&self, from: &[u8], to: &mut [u8], stride: usize) {
        const LANES: usize = 64;
        for ((first, range), row) in self.taps.iter().zip(to.chunks_exact_mut(stride)) {
            let weights = &self.weights[range.clone()];
            let mut x = 0;
            for part in row.chunks_mut(LANES) {
                let mut sum = [self.half(); LANES];
                for (k, weight) in weights.iter().enumerate() {
                    let start = (first + k) * stride + x;
                    let source = &from[start..start + part.len()];
                    for (sum, source) in sum.iter_mut().zip(source) {
                        *sum = sum.wrapping_add(i32::from(*source).wrapping_mul(*weight));
                    }
                }
                part.iter_mut().zip(&sum).for_each(|(to, sum)| *to = self.finish(*sum));
                x += LANES;
            }
        }
    }
}

impl Axis<f32> {
    #[inline(always)]
    fn across(&self, from: &[u8], to: &mut [f32]) {
        for ((first, range), pixel) in self.taps.iter().zip(to.chunks_exact_mut(3)) {
            let mut sum = [0.0f32; 3];
            let weights = &self.weights[range.clone()];
            for (source, weight) in from[first * 3..].chunks_exact(3).zip(weights) {
                for c in 0..3 {
                    sum[c] = f32::from(source[c]).mul_add(*weight, sum[c]);
                }
            }
            pixel.copy_from_slice(&sum);
        }
    }

    #[inline(always)]
    fn down(&self, from: &[f32], to: &mut [u8], stride: usize, sum: &mut Vec<f32>) {
        for ((first, range), row) in self.taps.iter().zip(to.chunks_exact_mut(stride)) {
            sum.clear();
            sum.resize(stride, 0.0);
            for (k, weight) in self.weights[range.clone()].iter().enumerate() {
                let source = &from[(first + k) * stride..][..stride];
                sum.iter_mut().zip(source).for_each(|(sum, source)| *sum = source.mul_add(*weight, *sum));
            }
            row.iter_mut().zip(&*sum).for_each(|(to, sum)| *to = round(*sum));
        }
    }
}

impl Kernel {
    fn support(self) -> f64 {
        match self {
            Kernel::Bicubic => 2.0,
            Kernel::Bilinear => 1.0,
        }
    }

    fn weight(self, t: f64) -> f64 {
        const A: f64 = -0.5;
        let t = t.abs();
        match self {
            Kernel::Bicubic if t < 1.0 => ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0,
            Kernel::Bicubic if t < 2.0 => (((t - 5.0) * t + 8.0) * t - 4.0) * A,
            Kernel::Bilinear if t < 1.0 => 1.0 - t,
            _ => 0.0,
        }
    }

    fn weight_f32(self, t: f32) -> f32 {
        const A: f32 = -0.5;
        let t = t.abs();
        match self {
            Kernel::Bicubic if t < 1.0 => ((A + 2.0).mul_add(t, -(A + 3.0)) * t).mul_add(t, 1.0),
            Kernel::Bicubic if t < 2.0 => A.mul_add(t, -5.0 * A).mul_add(t, 8.0 * A).mul_add(t, -4.0 * A),
            Kernel::Bilinear if t < 1.0 => 1.0 - t,
            _ => 0.0,
        }
    }
}

/// Weights in double, as Pillow and torch's uint8 kernel compute them.
fn double_axis(n_in: u32, n_out: u32, kernel: Kernel) -> Axis<f64> {
    let scale = f64::from(n_in) / f64::from(n_out);
    let stretch = scale.max(1.0);
    let (support, inverse) = (kernel.support() * stretch, 1.0 / stretch);
    let mut axis = Axis { taps: Vec::with_capacity(n_out as usize), weights: Vec::new(), bits: 0 };
    for o in 0..n_out {
        let center = (f64::from(o) + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as u32;
        let end = ((center + support + 0.5) as u32).min(n_in);
        let start = axis.weights.len();
        axis.weights.extend((first..end).map(|x| kernel.weight((f64::from(x) - center + 0.5) * inverse)));
        let sum: f64 = axis.weights[start..].iter().sum();
        if sum != 0.0 {
            axis.weights[start..].iter_mut().for_each(|weight| *weight /= sum);
        }
        axis.taps.push((first as usize, start..axis.weights.len()));
    }
    axis
}

fn integer_axis(n_in: u32, n_out: u32, kernel: Kernel, mode: Mode) -> Axis<i32> {
    let Axis { taps, weights, .. } = double_axis(n_in, n_out, kernel);
    let bits = if mode == Mode::Int16 { int16_bits(&weights) } else { 22 };
    let one = f64::from(1u32 << bits);
    // Half away from zero; Rust's `round` agrees with truncating w + 0.5 except within an ulp of a half.
    let whole = |weight: &f64| (weight * one + 0.5f64.copysign(*weight)) as i32;
    Axis { taps, weights: weights.iter().map(whole).collect(), bits }
}

/// The most fraction bits, up to 22, with which the largest weight stays below 2^15.
fn int16_bits(weights: &[f64]) -> u32 {
    let largest = weights.iter().copied().fold(0.0, f64::max);
    let mut bits = 0;
    while bits < 22 && ((0.5 + largest * f64::from(1u32 << (bits + 1))) as i64) < 1 << 15 {
        bits += 1;
    }
    bits
}

/// Weights in float32, as torch computes them for float tensors.
fn float_axis(n_in: u32, n_out: u32, kernel: Kernel) -> Axis<f32> {
    let scale = n_in as f32 / n_out as f32;
    let stretch = scale.max(1.0);
    let (support, inverse) = (kernel.support() as f32 * stretch, 1.0 / stretch);
    let mut axis = Axis { taps: Vec::with_capacity(n_out as usize), weights: Vec::new(), bits: 0 };
    for o in 0..n_out {
        let center = scale * (o as f32 + 0.5);
        let first = (center - support + 0.5).max(0.0) as u32;
        let end = ((center + support + 0.5) as u32).min(n_in);
        let first = first.min(end);
        let start = axis.weights.len();
        axis.weights.extend((first..end).map(|x| kernel.weight_f32((x as f32 - center + 0.5) * inverse)));
        let sum: f32 = axis.weights[start..].iter().sum();
        if sum != 0.0 {
            axis.weights[start..].iter_mut().for_each(|weight| *weight /= sum);
        }
        axis.taps.push((first as usize, start..axis.weights.len()));
    }
    axis
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    const ALL: [(Kernel, Mode); 6] = [
        (Kernel::Bicubic, Mode::Pil22),
        (Kernel::Bilinear, Mode::Pil22),
        (Kernel::Bicubic, Mode::Int16),
        (Kernel::Bilinear, Mode::Int16),
        (Kernel::Bicubic, Mode::Float),
        (Kernel::Bilinear, Mode::Float),
    ];

    /// Wide registers and narrow ones give the same bytes, whatever was in the buffers before.
    #[test]
    fn the_result_does_not_depend_on_the_processor() {
        let rgb = noise(97 * 131 * 3);
        for (kernel, mode) in ALL {
            let (mut reused, mut scratch) = (vec![1; 7], Scratch::default());
            for (h, w) in [(28, 56), (97, 56), (28, 131), (97, 131), (196, 280), (1, 1)] {
                let resizer = Resizer::new(97, 131, h, w, kernel, mode);
                let mut plain = Vec::new();
                resizer.run_here(&rgb, &mut plain, &mut Scratch::default());
                resizer.run(&rgb, &mut reused, &mut scratch);
                assert!(reused == plain && plain.len() == (h * w * 3) as usize, "{kernel:?} {mode:?} {h}x{w}");
                assert!((h, w) != (97, 131) || plain == rgb, "the same size is the identity");
            }
        }
    }

    /// The same over random sizes, pictures of noise and of the extreme values that overflow first.
    #[test]
    fn wide_registers_give_the_same_bytes_at_any_size() {
        let mut state = 1u64;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let picture = noise(80 * 80 * 3);
        let extremes: Vec<u8> = picture.iter().map(|v| if *v < 128 { 0 } else { 255 }).collect();
        let (mut out, mut plain, mut scratch) = (Vec::new(), Vec::new(), Scratch::default());
        for round in 0..4000 {
            let [in_h, in_w, out_h, out_w] = [0; 4].map(|_| 1 + below(80) as u32);
            let (kernel, mode) = ALL[round % ALL.len()];
            let rgb = &[&picture, &extremes][below(2) as usize][..(in_h * in_w * 3) as usize];
            let resizer = Resizer::new(in_h, in_w, out_h, out_w, kernel, mode);
            resizer.run_here(rgb, &mut plain, &mut Scratch::default());
            resizer.run(rgb, &mut out, &mut scratch);
            assert!(out == plain, "{kernel:?} {mode:?} {in_h}x{in_w} to {out_h}x{out_w}");
        }
    }

    #[test]
    fn a_flat_picture_stays_flat() {
        for (kernel, mode) in ALL {
            let resizer = Resizer::new(33, 57, 84, 28, kernel, mode);
            let mut out = Vec::new();
            for value in [0, 1, 127, 254, 255] {
                resizer.run(&vec![value; 33 * 57 * 3], &mut out, &mut Scratch::default());
                assert!(out.iter().all(|got| got.abs_diff(value) <= 1), "{kernel:?} {mode:?} {value}");
            }
        }
    }

    #[test]
    #[ignore = "prints timings"]
    fn timings() {
        let rgb = noise(1080 * 1920 * 3);
        for (kernel, mode) in ALL {
            let resizer = Resizer::new(1080, 1920, 392, 700, kernel, mode);
            let (mut out, mut scratch) = (Vec::new(), Scratch::default());
            resizer.run(&rgb, &mut out, &mut scratch);
            let start = std::time::Instant::now();
            (0..10).for_each(|_| resizer.run(&rgb, &mut out, &mut scratch));
            println!("{kernel:?} {mode:?}: {:?} a frame", start.elapsed() / 10);
        }
    }
}

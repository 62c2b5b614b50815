//! Rows of heads side by side, `[n, heads * d]`, to head after head, `[heads, n, d]`, and back; norm and rotation between.

use keye_backend::Isa;
use rayon::prelude::*;

use super::kernels;

/// Cosines and sines of every row, `[n, d/2]` each.
#[derive(Debug, Clone, Default)]
pub(crate) struct Angles {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Angle j of a row is `positions[axis[j]] * frequency[j]`, all in f32 as at inference.
    pub(crate) fn new<const N: usize>(frequency: &[f32], axis: &[usize], positions: &[[u32; N]]) -> Self {
        let angles =
            positions.iter().flat_map(|p| frequency.iter().zip(axis).map(move |(f, axis)| p[*axis] as f32 * f));
        let (cos, sin) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        Self { half: frequency.len(), cos, sin }
    }

    fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let range = row * self.half..(row + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// `theta^(-2j/width)` for `j < width/2`.
pub(crate) fn frequencies(theta: f64, width: usize) -> Vec<f32> {
    (0..width / 2).map(|j| theta.powf(-2.0 * j as f64 / width as f64) as f32).collect()
}

/// `[n, heads * d]` to `[heads, n, d]`; each head's row is normalised where there is a weight and turned where there are
/// angles.
pub(crate) fn split(
    isa: Isa,
    x: &[f32],
    heads: usize,
    d: usize,
    norm: Option<(&[f32], f32)>,
    angles: Option<&Angles>,
) -> Vec<f32> {
    let n = x.len() / (heads * d);
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(n * d).enumerate().for_each(|(head, out)| {
        for (row, out) in out.chunks_exact_mut(d).enumerate() {
            let from = &x[(row * heads + head) * d..(row * heads + head + 1) * d];
            match norm {
                Some((w, eps)) => {
                    kernels::rms_norm(isa, from, w, eps, out);
                }
                None => out.copy_from_slice(from),
            }
            if let Some(angles) = angles {
                let (cos, sin) = angles.row(row);
                kernels::rope(isa, out, cos, sin, 1.0);
            }
        }
    });
    out
}

/// `[heads, n, d]` to `[n, heads * d]`.
pub(crate) fn merge(x: &[f32], heads: usize, d: usize) -> Vec<f32> {
    let n = x.len() / (heads * d);
    let mut out = vec![0.0; x.len()];
    super::rows::each_row(&mut out, heads * d, |row, out| {
        for (head, out) in out.chunks_exact_mut(d).enumerate() {
            out.copy_from_slice(&x[(head * n + row) * d..(head * n + row + 1) * d]);
        }
    });
    out
}

/// The reverse of [`split`]: `dy [heads, n, d]` to the gradient of x `[n, heads * d]`, and that of the norm's weight is
/// added to `dw`. `dy` is used up.
#[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
pub(crate) fn split_backward(
    isa: Isa,
    x: &[f32],
    heads: usize,
    d: usize,
    norm: Option<(&[f32], f32)>,
    angles: Option<&Angles>,
    mut dy: Vec<f32>,
    dw: Option<&mut [f32]>,
) -> Vec<f32> {
    let n = x.len() / (heads * d);
    let mut partial = vec![0.0; heads * d];
    dy.par_chunks_mut(n * d).zip(partial.par_chunks_mut(d)).enumerate().for_each(|(head, (dy, partial))| {
        let mut dx = vec![0.0; d];
        for (row, dy) in dy.chunks_exact_mut(d).enumerate() {
            if let Some(angles) = angles {
                let (cos, sin) = angles.row(row);
                kernels::rope(isa, dy, cos, sin, -1.0);
            }
            if let Some((w, eps)) = norm {
                let x = &x[(row * heads + head) * d..(row * heads + head + 1) * d];
                let r = 1.0 / (kernels::dot(isa, x, x) / d as f32 + eps).sqrt();
                kernels::norm_weight_backward(isa, x, 0.0, r, dy, partial);
                dx.fill(0.0);
                kernels::norm_backward(isa, x, w, 0.0, r, false, dy, &mut dx);
                dy.copy_from_slice(&dx);
            }
        }
    });
    if let Some(dw) = dw {
        partial.chunks_exact(d).for_each(|partial| kernels::add(isa, dw, partial));
    }
    merge(&dy, heads, d)
}

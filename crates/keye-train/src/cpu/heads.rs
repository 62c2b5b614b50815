//! Rows of heads side by side, `[n, heads * d]`, to head after head, `[heads, n, d]`, and back; norm and rotation between.

use keye_backend::Isa;
use keye_backend::training::Angles;
use rayon::prelude::*;

use super::kernels;

fn row(angles: &Angles<Vec<f32>>, row: usize) -> (&[f32], &[f32]) {
    let range = row * angles.half..(row + 1) * angles.half;
    (&angles.cos[range.clone()], &angles.sin[range])
}

/// `[n, heads * d]` to `[heads, n, d]`; each head's row is normalised where there is a weight and turned where there are
/// angles.
pub(super) fn split(
    isa: Isa,
    x: &[f32],
    heads: usize,
    d: usize,
    norm: Option<(&[f32], f32)>,
    angles: Option<&Angles<Vec<f32>>>,
) -> Vec<f32> {
    let n = x.len() / (heads * d);
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut((n * d).max(1)).enumerate().for_each(|(head, out)| {
        for (i, out) in out.chunks_exact_mut(d).enumerate() {
            let from = &x[(i * heads + head) * d..(i * heads + head + 1) * d];
            match norm {
                Some((w, eps)) => {
                    kernels::rms_norm(isa, from, w, eps, out);
                }
                None => out.copy_from_slice(from),
            }
            if let Some(angles) = angles {
                let (cos, sin) = row(angles, i);
                kernels::rope(isa, out, cos, sin, 1.0);
            }
        }
    });
    out
}

/// `[heads, n, d]` to `[n, heads * d]`.
pub(super) fn merge(x: &[f32], heads: usize, d: usize) -> Vec<f32> {
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
pub(super) fn split_backward(
    isa: Isa,
    x: &[f32],
    heads: usize,
    d: usize,
    norm: Option<(&[f32], f32)>,
    angles: Option<&Angles<Vec<f32>>>,
    mut dy: Vec<f32>,
    dw: Option<&mut [f32]>,
) -> Vec<f32> {
    let n = dy.len() / (heads * d);
    let mut partial = vec![0.0; heads * d];
    dy.par_chunks_mut((n * d).max(1)).zip(partial.par_chunks_mut(d)).enumerate().for_each(|(head, (dy, partial))| {
        let mut dx = vec![0.0; d];
        for (i, dy) in dy.chunks_exact_mut(d).enumerate() {
            if let Some(angles) = angles {
                let (cos, sin) = row(angles, i);
                kernels::rope(isa, dy, cos, sin, -1.0);
            }
            if let Some((w, eps)) = norm {
                let x = &x[(i * heads + head) * d..(i * heads + head + 1) * d];
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

//! Angles by which heads are turned.

use keye_backend::training::{Angles, Device};

use super::Result;

/// Angle j of a row is `positions[axis[j]] * frequency[j]`, all in f32 as at inference.
pub(crate) fn angles<D: Device, const N: usize>(
    device: &D,
    frequency: &[f32],
    axis: &[usize],
    positions: &[[u32; N]],
) -> Result<Angles<D::Array>> {
    let angles = positions.iter().flat_map(|p| frequency.iter().zip(axis).map(move |(f, axis)| p[*axis] as f32 * f));
    let (cos, sin) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
    Ok(Angles { half: frequency.len(), cos: device.array(cos)?, sin: device.array(sin)? })
}

/// `theta^(-2j/width)` for `j < width/2`.
pub(crate) fn frequencies(theta: f64, width: usize) -> Vec<f32> {
    (0..width / 2).map(|j| theta.powf(-2.0 * j as f64 / width as f64) as f32).collect()
}

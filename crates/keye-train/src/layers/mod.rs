//! What the models are made of: places of parameters, with the device's operations on them and their reverses.

pub(crate) mod angles;
pub(crate) mod linear;
pub(crate) mod norm;

use keye_backend::BackendError;
use keye_backend::training::{Device, View};

/// Of operations on a device.
pub(crate) type Result<T> = std::result::Result<T, BackendError>;

/// A copy of an array.
pub(crate) fn copy<D: Device>(device: &D, x: &D::Array) -> Result<D::Array> {
    device.repeat(View::of(x, 1, device.len(x)), 1)
}

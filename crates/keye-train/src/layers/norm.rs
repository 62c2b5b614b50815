//! RMSNorm and LayerNorm over rows.

use keye_backend::training::Device;

use super::Result;
use crate::params::{Gradients, Params, Slot};

/// A norm's weight and, for LayerNorm, bias; without bias it is RMSNorm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    pub(crate) weight: Slot,
    pub(crate) bias: Option<Slot>,
    pub(crate) eps: f32,
}

impl Norm {
    /// `[n, d]` to `[n, d]`.
    pub(crate) fn forward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        x: &D::Array,
    ) -> Result<(D::Array, D::Array)> {
        device.norm(x, params.get(self.weight), self.bias.map(|bias| params.get(bias)), self.eps)
    }

    /// `dx += ..` and the gradients of weight and bias.
    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    pub(crate) fn backward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        gradients: &mut Gradients<D::Array>,
        x: &D::Array,
        stats: &D::Array,
        dy: &D::Array,
        dx: &mut D::Array,
    ) -> Result<()> {
        if let Some(dw) = gradients.get_mut(self.weight) {
            device.norm_weight_backward(x, stats, dy, dw)?;
        }
        if let Some(db) = self.bias.and_then(|bias| gradients.get_mut(bias)) {
            device.add_column_sums(dy, db)?;
        }
        device.norm_backward(x, stats, params.get(self.weight), self.bias.is_some(), dy, dx)
    }
}

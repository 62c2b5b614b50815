//! Watching intermediate tensors.

use keye_backend::{Backend, BackendError};

/// An observer of named tensors. Names are those of the golden files: `vit_embeddings`, `vit_layer0`, `vit_out`, `projector`
/// (prefixed `image_` or `video_`), `inputs_embeds`, `lm_layer0`, `lm_final_norm`;
/// those of layer l end in `.l` (`hidden_states`, `attn_out`, `moe_out`, `router_index`, `router_weight`, `idx_q`, `idx_k`,
/// `idx_w`, `selected`).
pub trait Tap {
    /// False spares the copy.
    fn wants(&self, name: &str) -> bool;
    /// Rows `[rows, cols]` of the tensor `name`, in order; a tensor may come in several pieces.
    fn record(&mut self, name: &str, cols: usize, rows: &[f32]);
}

/// Watches nothing.
pub struct NoTap;

impl Tap for NoTap {
    fn wants(&self, _name: &str) -> bool {
        false
    }
    fn record(&mut self, _name: &str, _cols: usize, _rows: &[f32]) {}
}

/// Hands a tensor to whoever watches.
pub(crate) fn record<B: Backend>(
    backend: &B,
    tap: &mut dyn Tap,
    name: std::fmt::Arguments<'_>,
    x: &B::Tensor,
) -> Result<(), BackendError> {
    let name = name.to_string();
    if tap.wants(&name) {
        tap.record(&name, backend.cols(x), &backend.download(x)?);
    }
    Ok(())
}

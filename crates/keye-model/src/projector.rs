//! The projector `mlp_AR` (spec §5): 2x2 patches become one token of the decoder.

use keye_backend::{Activation, Backend, BackendError};
use keye_processor::{ProjectorNorm, VisionConfig};

use crate::ModelError;
use crate::vision::Grid;
use crate::weights::{LayerNorm, Linear, Weights};

/// The projector's LayerNorm has torch's default epsilon, not the tower's.
const EPS: f32 = 1e-5;

pub(crate) struct Projector<B: Backend> {
    norm: ProjectorNorm,
    merge: usize,
    pre_norm: LayerNorm<B>,
    linear_1: Linear<B>,
    linear_2: Linear<B>,
}

impl<B: Backend> Projector<B> {
    pub(crate) fn load(
        weights: &Weights<'_, B>,
        config: &VisionConfig,
        norm: ProjectorNorm,
        hidden_size: usize,
    ) -> Result<Self, ModelError> {
        let weights = weights.at("mlp_AR");
        let merge = config.spatial_merge_size;
        let merged = merge * merge * config.hidden_size;
        let norm_width = match norm {
            ProjectorNorm::BeforeMerge => config.hidden_size,
            ProjectorNorm::AfterMerge => merged,
        };
        Ok(Self {
            norm,
            merge,
            pre_norm: weights.layer_norm("pre_norm", norm_width, EPS)?,
            linear_1: weights.linear("linear_1", merged, merged, true)?,
            linear_2: weights.linear("linear_2", hidden_size, merged, true)?,
        })
    }

    /// Patch numbers in the order of the merged tokens: frame, token row, token column; inside a token row, then column.
    pub(crate) fn order(&self, grids: &[Grid]) -> Vec<u32> {
        let m = self.merge;
        let mut order = Vec::with_capacity(grids.iter().map(Grid::len).sum());
        let mut start = 0;
        for grid in grids {
            for frame in 0..grid.t {
                for (row, col) in (0..grid.h / m).flat_map(|row| (0..grid.w / m).map(move |col| (row, col))) {
                    for (p1, p2) in (0..m).flat_map(|p1| (0..m).map(move |p2| (p1, p2))) {
                        let patch = (frame * grid.h + row * m + p1) * grid.w + col * m + p2;
                        order.push((start + patch) as u32);
                    }
                }
            }
            start += grid.len();
        }
        order
    }

    /// Features of tokens whose patches stand in merged order: `[4n, D]` to `[n, H]`.
    pub(crate) fn forward(&self, backend: &B, patches: &B::Tensor) -> Result<B::Tensor, BackendError> {
        let rows = backend.rows(patches);
        let in_order = backend.upload_index(&(0..rows as u32).collect::<Vec<_>>())?;
        let group = self.merge * self.merge;
        let merged = match self.norm {
            ProjectorNorm::BeforeMerge => {
                backend.gather_rows(&self.pre_norm.forward(backend, patches)?, &in_order, group)?
            }
            ProjectorNorm::AfterMerge => {
                self.pre_norm.forward(backend, &backend.gather_rows(patches, &in_order, group)?)?
            }
        }; // [n, 4D]
        let h = self.linear_1.forward(backend, &merged, Activation::GeluErf)?;
        self.linear_2.forward(backend, &h, Activation::None)
    }
}

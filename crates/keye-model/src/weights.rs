//! From the checkpoint's tensors to the backend's weights.

use std::ops::Range;

use keye_backend::{Activation, Backend, BackendError, BlockScales, Dtype, WeightSource};
use keye_processor::{Checkpoint, StoredTensor};

use crate::ModelError;
use crate::ranks::Shard;

/// A weight matrix and its bias.
pub(crate) struct Linear<B: Backend> {
    /// `[out, in]`
    pub weight: B::Weight,
    /// `[out]`
    pub bias: Option<B::Weight>,
}

impl<B: Backend> Linear<B> {
    /// `activation(x weight^T + bias)`: `[n, in]` to `[n, out]`.
    pub(crate) fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        activation: Activation,
    ) -> Result<B::Tensor, BackendError> {
        backend.linear(x, &self.weight, self.bias.as_ref(), activation)
    }

    /// `y += x weight^T + bias`.
    pub(crate) fn add(&self, backend: &B, x: &B::Tensor, y: &mut B::Tensor) -> Result<(), BackendError> {
        backend.linear_add(x, &self.weight, self.bias.as_ref(), y)
    }
}

/// Gain and shift of a LayerNorm.
pub(crate) struct LayerNorm<B: Backend> {
    /// `[width]`
    pub weight: B::Weight,
    /// `[width]`
    pub bias: B::Weight,
    pub eps: f32,
}

impl<B: Backend> LayerNorm<B> {
    pub(crate) fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, BackendError> {
        backend.layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// Names tensors relative to a prefix.
pub(crate) struct Weights<'a, B: Backend> {
    checkpoint: &'a Checkpoint,
    backend: &'a B,
    fp8_block: [usize; 2],
    shard: Shard,
    prefix: String,
}

impl<'a, B: Backend> Weights<'a, B> {
    /// `fp8_block`: rows and columns of 8-bit weights that share a scale; `shard`: the part that a rank takes of what is
    /// divided.
    pub(crate) fn new(checkpoint: &'a Checkpoint, backend: &'a B, fp8_block: [usize; 2], shard: Shard) -> Self {
        Self { checkpoint, backend, fp8_block, shard, prefix: String::new() }
    }

    pub(crate) fn shard(&self) -> Shard {
        self.shard
    }

    /// The weights below `name`.
    pub(crate) fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..*self }
    }

    /// A stored tensor of any shape that has `shape`'s elements in `shape`'s order.
    pub(crate) fn source(&self, name: &str, shape: &[usize]) -> Result<WeightSource, ModelError> {
        let name = format!("{}{name}", self.prefix);
        let tensor = self.checkpoint.tensor(&name, shape)?;
        let (rows, cols) = match shape {
            [n] => (1, *n),
            [rows, rest @ ..] => (*rows, rest.iter().product()),
            [] => (1, 1),
        };
        let dtype = dtype(&tensor)?;
        let scales = if dtype == Dtype::F8E4M3 { Some(self.scales(&name, rows, cols)?) } else { None };
        Ok(WeightSource { dtype, name, rows, cols, bytes: tensor.bytes, scales })
    }

    /// The blocks' scales of the 8-bit weight `name`: `name_scale_inv`, which is a factor despite its name (spec of 671B, §6).
    fn scales(&self, name: &str, rows: usize, cols: usize) -> Result<BlockScales, ModelError> {
        let block = self.fp8_block;
        let shape = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
        let tensor = self.checkpoint.tensor(&format!("{name}_scale_inv"), &shape)?;
        if tensor.dtype != keye_processor::Dtype::F32 {
            let reason = format!("{}: expected F32 scales, found {}", tensor.file.display(), tensor.dtype);
            return Err(BackendError::Weight { name: tensor.name, reason }.into());
        }
        Ok(BlockScales { bytes: tensor.bytes, block, first_row: 0 })
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.checkpoint.get(&format!("{}{name}", self.prefix)).is_some()
    }

    /// `[rows, cols]`
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<B::Weight, ModelError> {
        Ok(self.backend.load(&self.source(name, &[rows, cols])?)?)
    }

    /// A matrix `[first + second, cols]` as two.
    pub(crate) fn split_rows(&self, name: &str, rows: [usize; 2], cols: usize) -> Result<[B::Weight; 2], ModelError> {
        let whole = self.source(name, &[rows[0] + rows[1], cols])?;
        let [first, second] = [whole.slice_rows(0..rows[0])?, whole.slice_rows(rows[0]..whole.rows)?];
        Ok([self.backend.load(&first)?, self.backend.load(&second)?])
    }

    /// The stored shape, if the tensor is there.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.checkpoint.get(&format!("{}{name}", self.prefix)).map(|tensor| tensor.shape)
    }

    /// `[n]`
    pub(crate) fn vector(&self, name: &str, n: usize) -> Result<B::Weight, ModelError> {
        Ok(self.backend.load(&self.source(name, &[n])?)?)
    }

    /// `name.weight [out, in]` and, if there is to be one, `name.bias [out]`.
    pub(crate) fn linear(&self, name: &str, out: usize, input: usize, bias: bool) -> Result<Linear<B>, ModelError> {
        let at = self.at(name);
        let bias = if bias { Some(at.vector("bias", out)?) } else { None };
        Ok(Linear { weight: at.matrix("weight", out, input)?, bias })
    }

    /// As [`Weights::linear`], of which only the outputs `part` are wanted; in place.
    pub(crate) fn linear_outputs(
        &self,
        name: &str,
        out: usize,
        input: usize,
        bias: bool,
        part: Range<usize>,
    ) -> Result<Linear<B>, ModelError> {
        let at = self.at(name);
        let weight = self.backend.load(&at.source("weight", &[out, input])?.slice_rows(part.clone())?)?;
        let bias = match bias {
            true => Some(self.backend.load(&at.source("bias", &[out])?.copy_columns(part)?)?),
            false => None,
        };
        Ok(Linear { weight, bias })
    }

    /// As [`Weights::linear`], which only has the inputs `part`; its results are summed over the ranks, so rank 0 alone
    /// has the bias.
    pub(crate) fn linear_inputs(
        &self,
        name: &str,
        out: usize,
        input: usize,
        bias: bool,
        part: Range<usize>,
    ) -> Result<Linear<B>, ModelError> {
        let at = self.at(name);
        let bias = if bias && self.shard.rank == 0 { Some(at.vector("bias", out)?) } else { None };
        let weight = self.backend.load(&at.source("weight", &[out, input])?.copy_columns(part)?)?;
        Ok(Linear { weight, bias })
    }

    /// `name.weight [n]` and `name.bias [n]`.
    pub(crate) fn layer_norm(&self, name: &str, n: usize, eps: f32) -> Result<LayerNorm<B>, ModelError> {
        let at = self.at(name);
        Ok(LayerNorm { weight: at.vector("weight", n)?, bias: at.vector("bias", n)?, eps })
    }

    pub(crate) fn backend(&self) -> &'a B {
        self.backend
    }
}

fn dtype(tensor: &StoredTensor) -> Result<Dtype, ModelError> {
    use keye_processor::{Dtype as Stored, PackedFormat};
    match tensor.packed {
        Some(PackedFormat::Int4) => return Ok(Dtype::Int4),
        Some(PackedFormat::Int12) => return Ok(Dtype::Int12),
        Some(PackedFormat::Int10) => return Ok(Dtype::Int10),
        Some(PackedFormat::Int8) => return Ok(Dtype::Int8),
        None => {}
    }
    match tensor.dtype {
        Stored::F32 => Ok(Dtype::F32),
        Stored::Bf16 => Ok(Dtype::Bf16),
        Stored::F16 => Ok(Dtype::F16),
        Stored::F8E4M3 => Ok(Dtype::F8E4M3),
        other => Err(BackendError::Weight {
            name: tensor.name.clone(),
            reason: format!("{}: expected F32, BF16, F16 or F8_E4M3 elements, found {other}", tensor.file.display()),
        }
        .into()),
    }
}

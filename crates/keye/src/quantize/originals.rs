//! Where the weights of the tensors that are yet to be packed lie in the original checkpoint.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::Result;
use keye_backend::{BlockScales, Dtype, WeightSource};
use keye_model::stored_layout;
use keye_processor::{Checkpoint, Dtype as Stored, ModelConfig, ProcessorError, StoredTensor};

use super::SCALES;

/// A tensor of the new checkpoint, in the original's.
pub(super) struct Original {
    pub stored: StoredTensor,
    /// Of the new tensor.
    pub shape: Vec<usize>,
    expert: Option<ExpertPart>,
    /// Of a matrix in 8-bit floats.
    scales: Option<BlockScales>,
}

/// Where a matrix of one expert lies in the tensor of all.
struct ExpertPart {
    /// The expert's rows of the stored tensor, seen as a matrix.
    rows: Range<usize>,
    /// Columns of that matrix.
    width: usize,
    /// Input-major: the column of the expert's first output. Output-major: none, and `rows` are the outputs.
    column: Option<usize>,
}

impl Original {
    fn whole(stored: StoredTensor) -> Self {
        Self { shape: stored.shape.clone(), stored, expert: None, scales: None }
    }

    pub(super) fn count(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }

    /// Where the bytes of rows `first..first + rows` of a matrix lie.
    pub(super) fn bytes_of(&self, first: usize, rows: usize) -> Range<usize> {
        let row = self.shape.get(1).copied().unwrap_or(0) * self.stored.dtype.size();
        match &self.expert {
            Some(ExpertPart { rows, width, column: Some(_) }) => {
                let row = width * self.stored.dtype.size();
                rows.start * row..rows.end * row
            }
            Some(part) => (part.rows.start + first) * row..(part.rows.start + first + rows) * row,
            None => first * row..(first + rows) * row,
        }
    }

    /// Rows `first..first + rows` of a matrix.
    pub(super) fn rows(&self, first: usize, rows: usize) -> Result<Vec<f32>> {
        let (size, dtype) = (self.stored.dtype.size(), source_dtype(&self.stored)?);
        let cols = self.shape.get(1).copied().unwrap_or(0);
        let widened = |bytes| {
            let name = self.stored.name.clone();
            let scales = self.scales.clone().map(|scales| BlockScales { first_row: first, ..scales });
            WeightSource { name, dtype, rows, cols, bytes, scales }.to_f32().into_owned()
        };
        let Some(ExpertPart { rows: stored, width, column: Some(column) }) = &self.expert else {
            return Ok(widened(self.stored.bytes.slice(self.bytes_of(first, rows))));
        };
        let mut turned = vec![0u8; rows * cols * size];
        for (input, row) in stored.clone().enumerate() {
            let at = (row * width + column + first) * size;
            for (output, element) in self.stored.bytes[at..at + rows * size].chunks_exact(size).enumerate() {
                turned[(output * cols + input) * size..][..size].copy_from_slice(element);
            }
        }
        Ok(widened(turned.into()))
    }
}

/// The tensors that inference uses, by our names; experts one by one.
pub(super) fn originals(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<BTreeMap<String, Original>> {
    let mut originals = BTreeMap::new();
    for tensor in stored_layout(config, checkpoint) {
        let stored = checkpoint.tensor(&tensor.name, &tensor.shape)?;
        let dtype = source_dtype(&stored)?;
        let scales = if dtype == Dtype::F8E4M3 { Some(scales_of(config, checkpoint, &stored)?) } else { None };
        match (tensor.name.rsplit_once(".experts."), &config.text.experts) {
            (Some((mlp, name @ ("gate_up_proj" | "down_proj"))), Some(experts)) => {
                let width = experts.moe_intermediate_size;
                for expert in 0..experts.num_experts {
                    for (name, original) in expert_parts(name, expert, &stored, width, config.text.hidden_size) {
                        originals.insert(format!("{mlp}.experts.{expert}.{name}_proj.weight"), original);
                    }
                }
            }
            _ => {
                let mut original = Original::whole(stored);
                if let Some(scales) = scales {
                    original.scales =
                        Some(BlockScales { bytes: scales.bytes.clone(), block: config.fp8_block, first_row: 0 });
                    originals.insert(scales.name.clone(), Original::whole(scales));
                }
                originals.insert(tensor.name, original);
            }
        }
    }
    // Some tied models have the output matrix too, and then it is used.
    if let Some(stored) = checkpoint.get("lm_head.weight") {
        originals.insert("lm_head.weight".into(), Original::whole(stored));
    }
    Ok(originals)
}

/// The scales of a matrix in 8-bit floats, F32 for each block.
fn scales_of(config: &ModelConfig, checkpoint: &Checkpoint, matrix: &StoredTensor) -> Result<StoredTensor> {
    let error = |tensor: &StoredTensor, reason: String| ProcessorError::Tensor {
        path: tensor.file.clone(),
        name: tensor.name.clone(),
        reason,
    };
    let &[rows, cols] = matrix.shape.as_slice() else {
        let reason = format!("8-bit floats of shape {:?}: expected a matrix, experts one by one", matrix.shape);
        return Err(error(matrix, reason).into());
    };
    let [down, across] = config.fp8_block;
    let shape = [rows.div_ceil(down), cols.div_ceil(across)];
    let scales = checkpoint.tensor(&format!("{}{SCALES}", matrix.name), &shape)?;
    match scales.dtype {
        Stored::F32 => Ok(scales),
        other => Err(error(&scales, format!("expected F32 scales, found {other}")).into()),
    }
}

/// The matrices of expert `e` in a fused tensor: gate and up `[f, h]`, or down `[h, f]`.
fn expert_parts(name: &str, e: usize, stored: &StoredTensor, f: usize, h: usize) -> Vec<(&'static str, Original)> {
    let part = |rows: Range<usize>, width: usize, column: Option<usize>, shape: [usize; 2]| Original {
        stored: stored.clone(),
        shape: shape.to_vec(),
        expert: Some(ExpertPart { rows, width, column }),
        scales: None,
    };
    let gate_up = name == "gate_up_proj";
    // Where both readings fit, input-major it is, as the loader has it.
    let input_major = stored.shape[1..] == if gate_up { [h, 2 * f] } else { [f, h] };
    match (gate_up, input_major) {
        (true, true) => {
            let rows = e * h..(e + 1) * h;
            vec![("gate", part(rows.clone(), 2 * f, Some(0), [f, h])), ("up", part(rows, 2 * f, Some(f), [f, h]))]
        }
        (true, false) => {
            let (gate, up) = (2 * e * f..(2 * e + 1) * f, (2 * e + 1) * f..2 * (e + 1) * f);
            vec![("gate", part(gate, h, None, [f, h])), ("up", part(up, h, None, [f, h]))]
        }
        (false, true) => vec![("down", part(e * f..(e + 1) * f, h, Some(0), [h, f]))],
        (false, false) => vec![("down", part(e * h..(e + 1) * h, f, None, [h, f]))],
    }
}

fn source_dtype(stored: &StoredTensor) -> Result<Dtype, ProcessorError> {
    match stored.dtype {
        Stored::F32 => Ok(Dtype::F32),
        Stored::Bf16 => Ok(Dtype::Bf16),
        Stored::F16 => Ok(Dtype::F16),
        Stored::F8E4M3 => Ok(Dtype::F8E4M3),
        other => Err(ProcessorError::Tensor {
            path: stored.file.clone(),
            name: stored.name.clone(),
            reason: format!("expected F32, BF16, F16 or F8_E4M3 elements, found {other}"),
        }),
    }
}

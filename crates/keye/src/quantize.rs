//! Checkpoints in integers of four to twelve bits: which tensors are packed, and the streaming that packs them.

mod originals;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use keye_backend::Dtype;
use keye_backend::packed::{TILE_ROWS, pack_rows, tile_bytes, unpack};
use keye_model::{split_experts, weight_layout};
use keye_processor::{
    Checkpoint, CheckpointFiles, Dtype as Stored, ModelConfig, NewTensor, PackedFormat, PackedTag, PackedTags,
    StoredTensor, write_packed_checkpoint,
};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use crate::LoadError;
use crate::new_dir::{NewDir, is_small_file};
use originals::{Original, originals};

const CONFIG: &str = "config.json";
const CONFIG_BYTES: u64 = 4 << 20;
/// Elements of a shard, as transformers saves them.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Values that are widened to f32 at a time.
const SLICE_VALUES: usize = 8 << 20;

/// What a tensor is to the model; decides how it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Attention and MLP matrices of the decoder.
    Decoder,
    /// The table of token embeddings.
    Embedding,
    /// The output matrix.
    LmHead,
    /// Attention and MLP matrices of the vision tower.
    Vision,
    /// The projector's matrices.
    Projector,
    /// Norms, biases, patch and position embedding, routers, indexers: few bytes on which much depends.
    Kept,
}

impl Role {
    /// The role of the tensor that a checkpoint calls `name`.
    pub fn of(name: &str, shape: &[usize]) -> Self {
        let matrix = shape.len() == 2 && name.ends_with(".weight");
        let projection = name.ends_with("_proj.weight");
        match name {
            _ if !matrix => Self::Kept,
            "model.embed_tokens.weight" => Self::Embedding,
            "lm_head.weight" => Self::LmHead,
            _ if name.contains(".sa_indexer.") => Self::Kept,
            // Latent attention takes it apart into matrices per head, one of them transposed.
            _ if name.ends_with(".kv_b_proj.weight") => Self::Kept,
            _ if name.starts_with("model.layers.") && projection => Self::Decoder,
            _ if name.starts_with("mlp_AR.linear_") => Self::Projector,
            _ if name.starts_with("visual.vision_model.encoder.layers.")
                && (projection || name.ends_with(".fc1.weight") || name.ends_with(".fc2.weight")) =>
            {
                Self::Vision
            }
            _ => Self::Kept,
        }
    }

    /// How tensors of this role are stored in a model quantised to `to`; `None`: as they are.
    ///
    /// Vision tower and projector are 5 % of an 8 B model's weights, and what they lose all later layers see. In int8 the
    /// features are 2 to 3 % off, half of it by the weights and half by the activations; these formats are multiplied with
    /// activations in fourteen bits and lose about 0.5 and 0.2 %.
    pub fn stored_as(self, to: PackedFormat) -> Option<PackedFormat> {
        match self {
            Self::Decoder | Self::Embedding | Self::LmHead => Some(to),
            Self::Vision | Self::Projector if to == PackedFormat::Int4 => Some(PackedFormat::Int10),
            Self::Vision | Self::Projector => Some(PackedFormat::Int12),
            Self::Kept => None,
        }
    }
}

/// The backend's type of a packed format.
pub(crate) fn packed_dtype(format: PackedFormat) -> Dtype {
    match format {
        PackedFormat::Int12 => Dtype::Int12,
        PackedFormat::Int10 => Dtype::Int10,
        PackedFormat::Int8 => Dtype::Int8,
        PackedFormat::Int4 => Dtype::Int4,
    }
}

/// Behind the name of a matrix in 8-bit floats: the scales of its blocks.
const SCALES: &str = "_scale_inv";

/// `tensors` as they are stored in a model quantised to `to`, and the tags of those that are packed. Scales of 8-bit floats
/// come after their matrix.
pub(crate) fn packed_layout(tensors: Vec<NewTensor>, to: PackedFormat) -> Result<(Vec<NewTensor>, PackedTags)> {
    let mut tags = PackedTags::new();
    let mut stored = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        // Scales of a matrix that was in 8-bit floats.
        if tensor.name.strip_suffix(SCALES).is_some_and(|matrix| tags.contains_key(matrix)) {
            continue;
        }
        let (Some(format), &[rows, cols]) =
            (Role::of(&tensor.name, &tensor.shape).stored_as(to), tensor.shape.as_slice())
        else {
            stored.push(tensor);
            continue;
        };
        let bytes = packed_dtype(format).stored_bytes(rows, cols);
        let bytes = bytes.with_context(|| format!("{}: {rows} x {cols} weights are too many", tensor.name))?;
        tags.insert(tensor.name.clone(), PackedTag { format, rows, cols });
        stored.push(NewTensor { dtype: Stored::U8, shape: vec![bytes], ..tensor });
    }
    Ok((stored, tags))
}

/// config.json's note on how the weights are stored.
pub(crate) fn quantization_config(to: PackedFormat) -> Value {
    json!({"quant_method": "keye", "version": keye_backend::packed::PACKED_VERSION, "format": to.name()})
}

/// What became of the tensors of one role.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoleReport {
    /// Which.
    pub role: Role,
    /// `int4` to `int12`, or the type as it was.
    pub format: String,
    /// How many.
    pub tensors: usize,
    /// Weights in them.
    pub weights: u64,
    /// Bytes they take now.
    pub bytes: u64,
    /// Root of the mean squared error over that of the mean square; 0 for what is kept.
    pub relative_rms_error: f64,
}

/// What quantising did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// By role and format.
    pub roles: Vec<RoleReport>,
    /// Weights in all tensors.
    pub weights: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bits a weight, over all tensors.
    pub bits_per_weight: f64,
    /// Tensors of the original that inference does not use: they are left out.
    pub left_out: usize,
}

#[derive(Default)]
struct Sums {
    tensors: usize,
    weights: u64,
    bytes: u64,
    error: f64,
    square: f64,
}

/// Writes the checkpoint `from` with its matrices packed as the new directory `to_dir`.
///
/// Tensors are read and written in slices of rows, so that memory does not grow with the model. `progress` is told weights
/// done and in all; when it returns false the work is given up, and nothing is left.
///
/// # Errors
/// Names the file or tensor: a checkpoint that is quantised already, a value that is not finite, no room.
pub fn quantize(
    from: impl Into<CheckpointFiles>,
    to: PackedFormat,
    to_dir: &Path,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Report> {
    quantize_files(&from.into(), to, to_dir, progress)
}

fn quantize_files(
    from: &CheckpointFiles,
    to: PackedFormat,
    to_dir: &Path,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Report> {
    let config = ModelConfig::load(from).map_err(LoadError::from)?;
    let checkpoint = Checkpoint::open(from).map_err(LoadError::from)?;
    let mut raw: Value = serde_json::from_slice(&from.read(CONFIG, CONFIG_BYTES)?)
        .with_context(|| format!("{} is not json", from.path(CONFIG).display()))?;
    let fp8 = raw["quantization_config"]["quant_method"] == "fp8";
    if checkpoint.is_packed() || !fp8 && raw.get("quantization_config").is_some_and(|value| !value.is_null()) {
        bail!("{}: is quantised already; quantise the original model", from.root().display());
    }
    raw["quantization_config"] = quantization_config(to);
    if fp8 {
        // Some matrices stay as they are.
        raw["quantization_config"]["weight_block_size"] = json!(config.fp8_block);
    }

    let originals = originals(&config, &checkpoint)?;
    let (tensors, tags) = packed_layout(in_layout_order(planned(&originals), &config), to)?;
    let weights: u64 = tensors.iter().map(|tensor| originals[&tensor.name].count()).sum();
    let bytes: u64 = tensors.iter().filter_map(NewTensor::bytes).sum();
    let used = originals.values().map(|original| &original.stored.name).collect::<BTreeSet<_>>().len();
    let dir = NewDir::create(to_dir, &format!("the {to} model"), bytes)?;
    copy_small_files(from, &dir.path)?;
    write_json(&dir.path.join(CONFIG), &raw)?;

    let mut sums: BTreeMap<(Role, String), Sums> = BTreeMap::new();
    let mut done = 0;
    let mut failure = None;
    let written = write_packed_checkpoint(&dir.path, &tensors, &tags, SHARD_BYTES, &mut |tensor, out| {
        let original = &originals[&tensor.name];
        let tag = tags.get(&tensor.name);
        let role = Role::of(&tensor.name, &original.shape);
        let format =
            tag.map_or_else(|| original.stored.dtype.name().to_lowercase(), |tag| tag.format.name().to_owned());
        let sums = sums.entry((role, format)).or_default();
        sums.tensors += 1;
        sums.bytes += tensor.bytes().unwrap_or(0);
        sums.weights += original.count();
        let mut advance = |n: u64| {
            done += n;
            progress(done, weights)
        };
        let result = match tag {
            Some(tag) => pack(original, *tag, out, sums, &mut advance),
            None => keep(&original.stored, out, &mut advance),
        };
        result.map_err(|error| {
            let text = error.to_string();
            failure = Some(error);
            io::Error::other(text)
        })
    });
    if let Some(error) = failure {
        return Err(error);
    }
    written?;
    dir.keep()?;
    let roles: Vec<RoleReport> = sums
        .into_iter()
        .map(|((role, format), sums)| RoleReport {
            role,
            format,
            tensors: sums.tensors,
            weights: sums.weights,
            bytes: sums.bytes,
            relative_rms_error: if sums.square > 0.0 { (sums.error / sums.square).sqrt() } else { 0.0 },
        })
        .collect();
    Ok(Report {
        bits_per_weight: 8.0 * bytes as f64 / weights.max(1) as f64,
        left_out: checkpoint.names().count().saturating_sub(used),
        roles,
        weights,
        bytes,
    })
}

/// Bytes of all tensors of `checkpoint` quantised to `to`.
///
/// # Errors
/// As [`quantize`]: a tensor that is missing or cannot be quantised.
pub fn quantized_bytes(config: &ModelConfig, checkpoint: &Checkpoint, to: PackedFormat) -> Result<u64> {
    let (tensors, _) = packed_layout(planned(&originals(config, checkpoint)?), to)?;
    Ok(tensors.iter().filter_map(NewTensor::bytes).sum())
}

/// The originals as tensors that are yet to be packed.
fn planned(originals: &BTreeMap<String, Original>) -> Vec<NewTensor> {
    let tensor = |(name, original): (&String, &Original)| NewTensor {
        name: name.clone(),
        dtype: original.stored.dtype,
        shape: original.shape.clone(),
    };
    originals.iter().map(tensor).collect()
}

/// In the order of a forward pass, so that what is read together lies together.
fn in_layout_order(mut tensors: Vec<NewTensor>, config: &ModelConfig) -> Vec<NewTensor> {
    let layout = split_experts(weight_layout(config));
    let order: BTreeMap<String, usize> = layout.into_iter().map(|t| t.name).zip(0..).collect();
    tensors.sort_by_key(|tensor| {
        let matrix = tensor.name.strip_suffix(SCALES).unwrap_or(&tensor.name);
        order.get(matrix).copied().unwrap_or(usize::MAX)
    });
    tensors
}

/// Writes the tensor packed, a slice of rows at a time.
fn pack(
    original: &Original,
    tag: PackedTag,
    out: &mut dyn Write,
    sums: &mut Sums,
    advance: &mut dyn FnMut(u64) -> bool,
) -> Result<()> {
    let (dtype, cols) = (packed_dtype(tag.format), tag.cols);
    let stored = &original.stored;
    let tile = tile_bytes(dtype, cols).context("a tile is too large")?;
    let slice_rows = (SLICE_VALUES / cols.max(1) / TILE_ROWS).max(1) * TILE_ROWS;
    let mut packed = vec![0u8; slice_rows.min(tag.rows.next_multiple_of(TILE_ROWS)) / TILE_ROWS * tile];
    for start in (0..tag.rows).step_by(slice_rows) {
        let rows = slice_rows.min(tag.rows - start);
        let packed = &mut packed[..rows.div_ceil(TILE_ROWS) * tile];
        let tiles = packed.par_chunks_mut(tile).enumerate().map(|(i, out)| -> Result<(f64, f64)> {
            let first = start + i * TILE_ROWS;
            let rows = TILE_ROWS.min(start + rows - first);
            let values = original.rows(first, rows)?;
            pack_rows(dtype, rows, cols, &values, out).map_err(|mut error| {
                error.row += first;
                anyhow::anyhow!("{}: tensor {}: {error}", stored.file.display(), stored.name)
            })?;
            let found = unpack(dtype, rows, cols, out)?;
            let square = |value: f32| f64::from(value).powi(2);
            let error = values.iter().zip(&found).map(|(a, b)| square(a - b)).sum();
            Ok((error, values.iter().map(|value| square(*value)).sum()))
        });
        for tile in tiles.collect::<Vec<_>>() {
            let (error, value) = tile?;
            sums.error += error;
            sums.square += value;
        }
        out.write_all(packed).with_context(|| format!("cannot write tensor {}", stored.name))?;
        forget(&stored.bytes[original.bytes_of(start, rows)]);
        if !advance((rows * cols) as u64) {
            bail!("given up");
        }
    }
    Ok(())
}

/// Writes the tensor as it is.
fn keep(original: &StoredTensor, out: &mut dyn Write, advance: &mut dyn FnMut(u64) -> bool) -> Result<()> {
    for piece in original.bytes.chunks(SLICE_VALUES) {
        out.write_all(piece).with_context(|| format!("cannot write tensor {}", original.name))?;
        forget(piece);
        if !advance((piece.len() / original.dtype.size()) as u64) {
            bail!("given up");
        }
    }
    Ok(())
}

/// Takes the pages of a part of the map out of this process, so that the model does not gather in its memory.
fn forget(bytes: &[u8]) {
    const PAGE: usize = 4096;
    let start = (bytes.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (bytes.as_ptr() as usize + bytes.len()) / PAGE * PAGE;
    if start < end {
        // SAFETY: whole pages inside a read-only map of a file: their content is read again when it is needed.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

fn copy_small_files(from: &CheckpointFiles, to: &Path) -> Result<()> {
    let is_copied = |name: &str| {
        let replaced = name == CONFIG || name.ends_with(".safetensors.index.json");
        !replaced && !name.ends_with(".bin.index.json") && is_small_file(name)
    };
    let from = match from {
        CheckpointFiles::Directory(dir) => dir,
        CheckpointFiles::Embedded(embedded) => {
            for (name, bytes) in embedded.files.iter().filter(|(name, _)| is_copied(name)) {
                fs::write(to.join(name), bytes).with_context(|| format!("cannot write {name}"))?;
            }
            return Ok(());
        }
    };
    let cannot = || format!("cannot copy the files of {}", from.display());
    for entry in fs::read_dir(from).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // The hub's cache has links to files.
        let is_file = fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file());
        if is_file && is_copied(&name) {
            fs::copy(entry.path(), to.join(&name))
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

pub(crate) fn write_json(path: &Path, content: &Value) -> Result<()> {
    fs::write(path, format!("{content:#}\n")).with_context(|| format!("cannot write {}", path.display()))
}

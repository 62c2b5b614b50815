//! Activations, weights and integers on the device.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::Products;
use super::device::{Arg, Device, Grid, Memory};
use crate::input_major::InputMajor;
use crate::packed::{GROUP, INT4_BLOCK, INT4_HEAD, INT8_BLOCK, tile_bytes};
use crate::weight::f32_to_bf16;
use crate::{BackendError, Dtype, WeightSource};

/// Columns of a step of the bf16 products; rows are padded to it.
const STEP: usize = 32;
/// Columns of a block of packed weights.
const BLOCK: usize = crate::packed::BLOCK_COLS;

/// Rows of f32 activations, and what was made of them for products.
pub struct Tensor {
    pub(super) memory: Memory,
    pub(super) rows: usize,
    pub(super) cols: usize,
    narrow: OnceLock<Arc<Memory>>,
    quantized: OnceLock<Arc<Quantized>>,
    wide: OnceLock<Arc<Memory>>,
}

/// Rows in eight bits, each group of 32 columns with a scale.
pub(super) struct Quantized {
    pub codes: Memory,
    pub scales: Memory,
    pub sums: Memory,
    /// Bytes of a row.
    pub stride: usize,
}

/// A weight.
pub struct Weight {
    pub(super) memory: Memory,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Elements from one row to the next; of packed types unused.
    pub(super) stride: usize,
    /// Columns that share a scale of 8-bit floats.
    pub(super) block: usize,
    pub(super) form: Form,
}

/// How a weight is stored on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    Bf16,
    /// As [`Form::F32`], for products with rows in fourteen bits: int10 and int12 without the matrix cores' rounding.
    Wide,
    /// 8-bit floats, rows padded to the products' step; behind them a scale per row and block of columns.
    Fp8,
    Int8,
    Int4,
}

/// Small integers.
pub struct Index {
    pub(super) memory: Memory,
    pub(super) len: usize,
}

impl Tensor {
    pub(super) fn new(memory: Memory, rows: usize, cols: usize) -> Self {
        Self { memory, rows, cols, narrow: OnceLock::new(), quantized: OnceLock::new(), wide: OnceLock::new() }
    }

    pub(super) fn room(device: &Arc<Device>, rows: usize, cols: usize) -> Result<Self, BackendError> {
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(4)).unwrap_or(usize::MAX / 2);
        Ok(Self::new(device.allocate("activations", bytes)?, rows, cols))
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows * self.cols * 4
    }

    /// Called before its values change: what was made of them is stale.
    pub(super) fn change(&mut self) -> Arg {
        self.narrow = OnceLock::new();
        self.quantized = OnceLock::new();
        self.wide = OnceLock::new();
        self.memory.arg()
    }

    /// Elements of a row of [`Tensor::narrow`].
    pub(super) fn narrow_stride(&self) -> usize {
        self.cols.next_multiple_of(STEP)
    }

    /// Its rows in bf16, padded with zeros; made once, for all products with these rows.
    pub(super) fn narrow(&self, device: &Arc<Device>) -> Result<Arc<Memory>, BackendError> {
        if let Some(narrow) = self.narrow.get() {
            return Ok(Arc::clone(narrow));
        }
        let stride = self.narrow_stride();
        let memory = device.allocate("activations", self.rows * stride * 2)?;
        let args = [self.memory.arg(), memory.arg(), Arg::U32(self.cols as u32), Arg::U32(stride as u32)];
        device.launch("narrow_rows", Grid::of(self.rows, 1, 256), &args)?;
        Ok(Arc::clone(self.narrow.get_or_init(|| Arc::new(memory))))
    }

    /// Its rows in eight bits; made once.
    pub(super) fn quantized(&self, device: &Arc<Device>) -> Result<Arc<Quantized>, BackendError> {
        if let Some(quantized) = self.quantized.get() {
            return Ok(Arc::clone(quantized));
        }
        let stride = self.cols.next_multiple_of(BLOCK);
        let groups = stride / GROUP;
        let quantized = Quantized {
            codes: device.allocate("activations", self.rows * stride)?,
            scales: device.allocate("activations", self.rows * groups * 4)?,
            sums: device.allocate("activations", self.rows * groups * 4)?,
            stride,
        };
        let args = [
            self.memory.arg(),
            quantized.codes.arg(),
            quantized.scales.arg(),
            quantized.sums.arg(),
            Arg::U32(self.cols as u32),
            Arg::U32(stride as u32),
        ];
        device.launch("quantize_rows", Grid::of(self.rows, groups.div_ceil(8), 256), &args)?;
        Ok(Arc::clone(self.quantized.get_or_init(|| Arc::new(quantized))))
    }

    /// Its rows rounded to fourteen bits, as f32; made once.
    pub(super) fn wide(&self, device: &Arc<Device>) -> Result<Arc<Memory>, BackendError> {
        if let Some(wide) = self.wide.get() {
            return Ok(Arc::clone(wide));
        }
        let memory = device.allocate("activations", self.bytes())?;
        let groups = self.cols.div_ceil(GROUP);
        let args = [self.memory.arg(), memory.arg(), Arg::U32(self.cols as u32)];
        device.launch("round_rows_wide", Grid::of(self.rows, groups.div_ceil(8), 256), &args)?;
        Ok(Arc::clone(self.wide.get_or_init(|| Arc::new(memory))))
    }
}

impl Weight {
    /// Uploads a weight: vectors and halves as f32, bf16 with rows padded to the products' step, packed types in the order
    /// in which the matrix cores take them.
    ///
    /// For products in bf16, 8-bit floats stay so when the products' steps fit into their blocks, and int10 and int12 become
    /// bf16, which is about as exact. For products in f32 both are widened.
    pub(super) fn load(device: &Arc<Device>, source: &WeightSource, products: Products) -> Result<Self, BackendError> {
        source.check()?;
        let (rows, cols) = (source.rows, source.cols);
        let what = format!("tensor {}", source.name);
        let form = match source.dtype {
            _ if rows == 1 => Form::F32,
            Dtype::F32 | Dtype::F16 => Form::F32,
            Dtype::Bf16 => Form::Bf16,
            Dtype::F8E4M3 => match &source.scales {
                Some(scales) if products == Products::Bf16 && scales.block[1] % STEP == 0 => Form::Fp8,
                _ => Form::F32,
            },
            Dtype::Int10 | Dtype::Int12 if products == Products::Bf16 => Form::Bf16,
            Dtype::Int10 | Dtype::Int12 => Form::Wide,
            Dtype::Int8 => Form::Int8,
            Dtype::Int4 => Form::Int4,
        };
        let mut block = 0;
        let (memory, stride) = match form {
            Form::Fp8 => {
                let stride = cols.next_multiple_of(STEP);
                let mut bytes = Vec::with_capacity(rows * stride);
                for row in source.bytes.chunks_exact(cols) {
                    bytes.extend_from_slice(row);
                    bytes.resize(bytes.len().next_multiple_of(stride), 0);
                }
                if let Some(scales) = &source.scales {
                    // A row's scales once for each row: no division in the products.
                    let across = cols.div_ceil(scales.block[1]);
                    for row in 0..rows {
                        let at = (scales.first_row + row) / scales.block[0] * across * 4;
                        bytes.extend_from_slice(&scales.bytes[at..at + across * 4]);
                    }
                    block = scales.block[1].min(stride);
                }
                (device.upload(&what, &bytes)?, stride)
            }
            Form::F32 | Form::Wide => {
                let values = source.to_f32();
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                (device.upload(&what, &bytes)?, cols)
            }
            Form::Bf16 => {
                let stride = cols.next_multiple_of(STEP);
                let halves = match source.dtype {
                    Dtype::Int10 | Dtype::Int12 => narrow(&source.to_f32()).into(),
                    _ => source.bytes.clone(),
                };
                let memory = match stride == cols {
                    true => device.upload(&what, &halves)?,
                    false => {
                        let mut padded = vec![0; rows * stride * 2];
                        for (to, from) in padded.chunks_exact_mut(stride * 2).zip(halves.chunks_exact(cols * 2)) {
                            to[..cols * 2].copy_from_slice(from);
                        }
                        device.upload(&what, &padded)?
                    }
                };
                (memory, stride)
            }
            Form::Int8 | Form::Int4 => (Self::repack(device, source, &what)?, 0),
        };
        Ok(Self { memory, rows, cols, stride, block, form })
    }

    /// Columns of a stored matrix `[in, width]` as a weight `[out, in]`, turned on the host.
    pub(super) fn load_columns(
        device: &Arc<Device>,
        source: &WeightSource,
        columns: Range<usize>,
        products: Products,
    ) -> Result<Self, BackendError> {
        let values = InputMajor::of(source, &columns)?.widen(columns.len());
        let turned = WeightSource::from_f32(source.name.clone(), columns.len(), source.rows, &values);
        let turned = match source.dtype {
            Dtype::Bf16 => WeightSource { dtype: Dtype::Bf16, bytes: narrow(&values).into(), ..turned },
            _ => turned,
        };
        Self::load(device, &turned, products)
    }

    /// The packed layout of files to that of packed.cu.
    fn repack(device: &Arc<Device>, source: &WeightSource, what: &str) -> Result<Memory, BackendError> {
        let (tiles, blocks) = (source.rows.div_ceil(16), source.cols.div_ceil(BLOCK));
        let (kernel, codes, file_tile) = match source.dtype {
            Dtype::Int4 => ("repack_int4", 512, INT4_HEAD + blocks * INT4_BLOCK),
            _ => ("repack_int8", 1024, blocks * INT8_BLOCK),
        };
        debug_assert_eq!(tile_bytes(source.dtype, source.cols), Some(file_tile.next_multiple_of(64)));
        let staged = device.upload(what, &source.bytes)?;
        let memory = device.allocate(what, tiles * blocks * (codes + 64) + tiles * 64)?;
        let args = [staged.arg(), memory.arg(), Arg::U32(source.rows as u32), Arg::U32(source.cols as u32)];
        device.launch(kernel, Grid::of(tiles * blocks, 1, 32), &args)?;
        Ok(memory)
    }

    /// A vector's address.
    pub(super) fn vector(&self) -> Arg {
        assert!(self.rows == 1 && self.form == Form::F32, "a vector");
        self.memory.arg()
    }
}

/// Values as bf16, rounded to nearest even.
fn narrow(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| f32_to_bf16(*value).to_le_bytes()).collect()
}

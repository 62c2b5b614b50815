//! Sharded safetensors, memory-mapped.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::ProcessorError;

/// Element types of stored weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// 64-bit integer.
    I64,
    /// 32-bit integer.
    I32,
    /// Byte.
    U8,
}

/// One tensor: a slice of the map.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Its name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Little-endian elements; keeps the map alive.
    pub bytes: Bytes,
    /// The file, for messages.
    pub file: PathBuf,
}

/// The weights of a directory, or of one safetensors file.
pub struct Checkpoint {}

impl Checkpoint {
    /// Maps every shard of `dir` (`model.safetensors.index.json`, or `model.safetensors`) and checks the headers.
    pub fn open(dir: &Path) -> Result<Self, ProcessorError> {
        let _ = dir;
        Ok(Self {})
    }

    /// Maps one file.
    pub fn open_file(path: &Path) -> Result<Self, ProcessorError> {
        let _ = path;
        Ok(Self {})
    }

    /// The tensor `name`, whose shape must be `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, ProcessorError> {
        let _ = (name, shape);
        Err(ProcessorError::Prompt("not loaded".into()))
    }

    /// The tensor `name` whatever its shape, if it is there.
    pub fn get(&self, name: &str) -> Option<StoredTensor> {
        let _ = name;
        None
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::empty()
    }
}

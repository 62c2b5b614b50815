//! Tensors in memory under the names of the golden files: made, read, written, compared.

use std::path::Path;

use anyhow::{Result, bail};
use keye_processor::{Checkpoint, Dtype, NewTensor, write_file};

/// Elements, of the types that golden files have.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    U8(Vec<u8>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    F32(Vec<f32>),
}

/// A named tensor, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Values,
}

impl Tensor {
    pub fn new(name: impl Into<String>, shape: &[usize], values: Values) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), values }
    }

    pub fn dtype(&self) -> Dtype {
        match self.values {
            Values::U8(_) => Dtype::U8,
            Values::I32(_) => Dtype::I32,
            Values::I64(_) => Dtype::I64,
            Values::F32(_) => Dtype::F32,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match &self.values {
            Values::U8(values) => values.clone(),
            Values::I32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Values::I64(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Values::F32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    /// Element `i`, exact for floats and bytes.
    fn get(&self, i: usize) -> f64 {
        match &self.values {
            Values::U8(values) => f64::from(values[i]),
            Values::I32(values) => f64::from(values[i]),
            Values::I64(values) => values[i] as f64,
            Values::F32(values) => f64::from(values[i]),
        }
    }

    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Root of the mean square.
    pub fn rms(&self) -> f64 {
        let squares: f64 = (0..self.len()).map(|i| self.get(i).powi(2)).sum();
        (squares / self.len().max(1) as f64).sqrt()
    }
}

/// Writes a file of tensors.
pub fn write(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(Tensor::bytes).collect();
    let list: Vec<(NewTensor, &[u8])> = tensors
        .iter()
        .zip(&bytes)
        .map(|(t, bytes)| {
            (NewTensor { name: t.name.clone(), dtype: t.dtype(), shape: t.shape.clone() }, bytes.as_slice())
        })
        .collect();
    Ok(write_file(path, &list)?)
}

/// A golden file.
pub struct Golden {
    file: Checkpoint,
}

/// How a tensor differs from the golden one.
#[derive(Debug, Clone, PartialEq)]
pub enum Difference {
    /// The golden file does not have it.
    Absent,
    /// Every element is equal.
    Equal,
    /// Largest absolute difference.
    Largest(f64),
    /// It cannot be compared: type or shape.
    Unlike(String),
}

impl Golden {
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { file: Checkpoint::open_file(path)? })
    }

    /// The tensor `name`, if it is there.
    pub fn get(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(stored) = self.file.get(name) else { return Ok(None) };
        let bytes = &stored.bytes;
        let values = match stored.dtype {
            Dtype::U8 => Values::U8(bytes.to_vec()),
            Dtype::I32 => Values::I32(bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()),
            Dtype::I64 => Values::I64(bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()),
            Dtype::F32 => Values::F32(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            other => {
                bail!("{}: tensor {name}: expected type U8, I32, I64 or F32, found {other}", self.file.path().display())
            }
        };
        Ok(Some(Tensor { name: name.to_owned(), shape: stored.shape, values }))
    }

    /// The whole tensor `name`: an error when the file has only some of its rows.
    pub fn whole(&self, name: &str) -> Result<Option<Tensor>> {
        if self.file.get(&format!("{name}.rows")).is_some() {
            bail!("{}: tensor {name} has only some of its rows here", self.file.path().display());
        }
        self.get(name)
    }

    /// Whole numbers `name`, if they are there.
    pub fn integers(&self, name: &str) -> Result<Option<Vec<i64>>> {
        match self.get(name)?.map(|tensor| tensor.values) {
            None => Ok(None),
            Some(Values::I64(values)) => Ok(Some(values)),
            Some(_) => bail!("{}: tensor {name}: expected type I64", self.file.path().display()),
        }
    }

    /// Names of tensors, without the lists of rows.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.file.names().filter(|name| !name.ends_with(".rows"))
    }

    /// Compares with the golden tensor of that name; `NAME.rows` tells which rows it has.
    pub fn compare(&self, found: &Tensor) -> Result<Difference> {
        let Some(golden) = self.get(&found.name)? else { return Ok(Difference::Absent) };
        let path = self.file.path().display();
        let unlike = |reason: String| Ok(Difference::Unlike(reason));
        if golden.dtype() != found.dtype() {
            return unlike(format!("type {} there", golden.dtype()));
        }
        let rows = self.integers(&format!("{}.rows", found.name))?;
        let same_rows = rows.is_some() || golden.shape.first() == found.shape.first();
        if !same_rows || golden.shape.len() != found.shape.len() || golden.shape.get(1..) != found.shape.get(1..) {
            return unlike(format!("shape {:?} there", golden.shape));
        }
        let width: usize = found.shape.get(1..).unwrap_or_default().iter().product();
        let (have, there) = (found.shape.first().copied().unwrap_or(1), golden.shape.first().copied().unwrap_or(1));
        let rows = rows.unwrap_or_else(|| (0..there as i64).collect());
        if rows.len() != there {
            bail!("{path}: tensor {}.rows has {} rows, expected {there}", found.name, rows.len());
        }
        let mut largest = 0.0f64;
        for (at, row) in rows.into_iter().enumerate() {
            let Some(row) = usize::try_from(row).ok().filter(|row| *row < have) else {
                return unlike(format!("row {row} there"));
            };
            for i in 0..width {
                let difference = (found.get(row * width + i) - golden.get(at * width + i)).abs();
                // A NaN has to show.
                largest = if difference.is_nan() { f64::INFINITY } else { largest.max(difference) };
            }
        }
        Ok(if largest == 0.0 { Difference::Equal } else { Difference::Largest(largest) })
    }
}

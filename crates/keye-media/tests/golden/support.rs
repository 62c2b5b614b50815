//! Reads the golden files.
#![allow(dead_code, reason = "two test binaries use different parts")]

use std::collections::HashMap;
use std::path::PathBuf;

/// The folder of a fixture.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

pub const PREVIEW: &str = "keye-preview-tiny";
pub const SLOW_FAST: &str = "keye-1_5-tiny";

/// A json file of a fixture.
pub fn json(fixture_name: &str, path: &str) -> serde_json::Value {
    let path = fixture(fixture_name).join(path);
    serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// One tensor: its shape and little-endian bytes.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn u8(&self) -> &[u8] {
        assert_eq!(self.dtype, "U8");
        &self.bytes
    }

    pub fn i64(&self) -> Vec<i64> {
        assert_eq!(self.dtype, "I64");
        self.bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
    }

    pub fn i32(&self) -> Vec<i32> {
        assert_eq!(self.dtype, "I32");
        self.bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
    }

    pub fn f32(&self) -> Vec<f32> {
        assert_eq!(self.dtype, "F32");
        self.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// Part `i` along the first dimension.
    pub fn part(&self, i: usize) -> &[u8] {
        let len = self.bytes.len() / self.shape[0];
        &self.bytes[i * len..][..len]
    }
}

/// The tensors of a safetensors file: a length, a json header, the data.
pub fn tensors(fixture_name: &str, path: &str) -> HashMap<String, Tensor> {
    let path = fixture(fixture_name).join(path);
    let file = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&file[8..8 + header_len]).unwrap();
    let data = &file[8 + header_len..];
    let tensor = |value: &serde_json::Value| {
        let numbers = |key: &str| -> Vec<usize> {
            value[key].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
        };
        let offsets = numbers("data_offsets");
        let dtype = value["dtype"].as_str().unwrap().to_owned();
        Tensor { dtype, shape: numbers("shape"), bytes: data[offsets[0]..offsets[1]].to_vec() }
    };
    header.iter().filter(|(name, _)| *name != "__metadata__").map(|(name, v)| (name.clone(), tensor(v))).collect()
}

/// Compares rows of `got` with the golden tensor `name`, which may hold only the rows that `name.rows` lists.
pub fn assert_rows(tensors: &HashMap<String, Tensor>, name: &str, got: &[u8], context: &str) {
    let golden = tensors.get(name).unwrap_or_else(|| panic!("{context}: no tensor {name}"));
    let row = golden.bytes.len() / golden.shape[0];
    assert_eq!(got.len() % row, 0, "{context}: rows of {name}");
    match tensors.get(&format!("{name}.rows")) {
        None => assert!(got == golden.u8(), "{context}: {name} differs"),
        Some(rows) => {
            for (i, at) in rows.i64().into_iter().enumerate() {
                assert!(got[at as usize * row..][..row] == *golden.part(i), "{context}: row {at} of {name} differs");
            }
        }
    }
}

/// `[3, H, W]` to `[H, W, 3]`.
pub fn interleave(planar: &[u8]) -> Vec<u8> {
    let area = planar.len() / 3;
    (0..area).flat_map(|i| [planar[i], planar[area + i], planar[2 * area + i]]).collect()
}

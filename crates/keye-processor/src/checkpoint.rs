//! Sharded safetensors, memory-mapped or inside the program.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::Deserialize;

use crate::safetensors_file::{Entry, SafetensorsFile};
use crate::{CheckpointFiles, Dtype, PackedFormat, ProcessorError};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// An index of 10 000 tensors has 1 MB; a map of short names takes ten times its text.
const MAX_INDEX_BYTES: u64 = 32 << 20;

/// Prefixes of our names (spec §3), and those under which later transformers save the same tensors.
const ALIASES: [(&str, &[&str]); 3] = [
    ("visual.", &["model.visual."]),
    ("mlp_AR.", &["model.mlp_AR.", "model.mm_projector.", "mm_projector."]),
    ("model.", &["model.language_model."]),
];

/// One tensor: a slice of the map.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Its name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, row-major; the matrix's when it is packed.
    pub shape: Vec<usize>,
    /// How the bytes are packed, if they are; `dtype` is [`Dtype::U8`] then.
    pub packed: Option<PackedFormat>,
    /// Little-endian elements; keeps the map alive. Not always aligned to the element size.
    pub bytes: Bytes,
    /// The file, for messages.
    pub file: PathBuf,
}

impl StoredTensor {
    /// Elements.
    pub fn len(&self) -> usize {
        match self.packed {
            Some(_) => self.shape.iter().product(),
            None => self.bytes.len() / self.dtype.size(),
        }
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Tensors and bytes of one element type, for display.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DtypeTotal {
    /// Tensors.
    pub tensors: usize,
    /// Elements.
    pub elements: u64,
    /// Bytes.
    pub bytes: u64,
}

/// The weights of a checkpoint, or of one safetensors file.
pub struct Checkpoint {
    /// The directory, file or embedded checkpoint, for messages.
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Name to index of its file and place in it.
    tensors: BTreeMap<String, (usize, Entry)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Maps every shard (`model.safetensors.index.json` says which, or `model.safetensors`) and checks the headers.
    ///
    /// Where there is an index, its tensors are the checkpoint's: others in the shards are left out.
    pub fn open(from: impl Into<CheckpointFiles>) -> Result<Self, ProcessorError> {
        let files = from.into();
        if files.exists(INDEX) {
            return Self::open_index(&files);
        }
        if !files.exists(SINGLE) {
            return Err(ProcessorError::File { path: files.root().to_owned(), reason: no_weights(&files) });
        }
        Ok(Self::of_file(files.root(), SafetensorsFile::open_in(&files, SINGLE)?))
    }

    /// Maps one file.
    pub fn open_file(path: &Path) -> Result<Self, ProcessorError> {
        Ok(Self::of_file(path, SafetensorsFile::open(path)?))
    }

    fn of_file(path: &Path, mut file: SafetensorsFile) -> Self {
        let tensors = std::mem::take(&mut file.entries).into_iter().map(|(name, entry)| (name, (0, entry))).collect();
        Self { path: path.to_owned(), files: vec![file], tensors }
    }

    fn open_index(from: &CheckpointFiles) -> Result<Self, ProcessorError> {
        let index_path = from.path(INDEX);
        let wrong = |reason: String| ProcessorError::File { path: index_path.clone(), reason };
        let text = from.read(INDEX, MAX_INDEX_BYTES)?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, shard) in index.weight_map {
            shards.entry(shard).or_default().push(name);
        }
        let (mut files, mut tensors) = (Vec::with_capacity(shards.len()), BTreeMap::new());
        for (shard, names) in shards {
            if shard.contains(['/', '\\', '\0']) || !shard.ends_with(".safetensors") {
                return Err(wrong(format!(
                    "weight_map: expected names of .safetensors files beside it, found {shard:?}"
                )));
            }
            if !from.exists(&shard) {
                let count = names.len();
                return Err(wrong(format!(
                    "shard {shard}, which holds {count} tensors, is missing; download it again"
                )));
            }
            let mut file = SafetensorsFile::open_in(from, &shard)?;
            for name in names {
                let Some(entry) = file.entries.remove(&name) else {
                    let path = file.path;
                    let reason = format!("{} says that it is in this file; it is not", index_path.display());
                    return Err(ProcessorError::Tensor { path, name, reason });
                };
                tensors.insert(name, (files.len(), entry));
            }
            file.entries.clear();
            files.push(file);
        }
        Ok(Self { path: from.root().to_owned(), files, tensors })
    }

    /// The tensor `name`, whose shape must be `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, ProcessorError> {
        let error =
            |path: &Path, reason| ProcessorError::Tensor { path: path.to_owned(), name: name.to_owned(), reason };
        let Some((stored_name, file, entry)) = self.find(name) else {
            let hint = self.nearest(name).map_or_else(String::new, |near| format!("; the nearest name is {near}"));
            return Err(error(&self.path, format!("missing among {} tensors{hint}", self.tensors.len())));
        };
        if let Err(dtype) = &entry.dtype {
            return Err(error(&file.path, format!("its type {dtype} is not one that this build reads")));
        }
        if entry.shape != shape {
            return Err(error(&file.path, format!("expected shape {shape:?}, found {:?}", entry.shape)));
        }
        stored(stored_name, file, entry).ok_or_else(|| error(&file.path, "cannot be read".into()))
    }

    /// The tensor `name` whatever its shape, if it is there in a type that this build reads.
    pub fn get(&self, name: &str) -> Option<StoredTensor> {
        let (name, file, entry) = self.find(name)?;
        stored(name, file, entry)
    }

    /// All names as the files have them, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The directory or file that was opened, or the embedded checkpoint's name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The shards.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// `__metadata__` of the first shard.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.first().into_iter().flat_map(|file| file.metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())))
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|(_, entry)| (entry.end - entry.start) as u64).sum()
    }

    /// Whether some tensor is packed.
    pub fn is_packed(&self) -> bool {
        self.tensors.values().any(|(_, entry)| entry.packed.is_some())
    }

    /// Tensors, elements and bytes by element type; types that this build does not read are left out.
    pub fn totals(&self) -> BTreeMap<Dtype, DtypeTotal> {
        let mut totals: BTreeMap<Dtype, DtypeTotal> = BTreeMap::new();
        for (_, entry) in self.tensors.values() {
            if let Ok(dtype) = entry.dtype {
                let (total, bytes) = (totals.entry(dtype).or_default(), (entry.end - entry.start) as u64);
                total.tensors += 1;
                total.bytes += bytes;
                total.elements += bytes / dtype.size() as u64;
            }
        }
        totals
    }

    /// `name` as it is, or under the prefix of a later transformers save.
    fn find(&self, name: &str) -> Option<(&str, &SafetensorsFile, &Entry)> {
        let exact = self.tensors.get_key_value(name);
        let found = exact.or_else(|| {
            let saved_as = |(ours, theirs): &(&str, &[&str])| {
                let rest = name.strip_prefix(ours)?;
                theirs.iter().find_map(|prefix| self.tensors.get_key_value(format!("{prefix}{rest}").as_str()))
            };
            ALIASES.iter().find_map(saved_as)
        });
        found.map(|(name, (file, entry))| (name.as_str(), &self.files[*file], entry))
    }

    /// The existing name that differs least from a missing one, if it differs by little.
    fn nearest(&self, name: &str) -> Option<&str> {
        const MOST: usize = 4;
        if name.len() > 256 {
            return None;
        }
        let candidates = self.names().take(100_000).filter(|other| other.len().abs_diff(name.len()) <= MOST);
        let nearest = candidates.map(|other| (edit_distance(name.as_bytes(), other.as_bytes()), other)).min()?;
        (nearest.0 <= MOST).then_some(nearest.1)
    }
}

fn stored(name: &str, file: &SafetensorsFile, entry: &Entry) -> Option<StoredTensor> {
    Some(StoredTensor {
        name: name.to_owned(),
        dtype: *entry.dtype.as_ref().ok()?,
        shape: entry.shape.clone(),
        packed: entry.packed.map(|tag| tag.format),
        bytes: file.map.slice(entry.start..entry.end),
        file: file.path.clone(),
    })
}

/// Why there are no weights among the files, and what to do.
fn no_weights(files: &CheckpointFiles) -> String {
    if matches!(files, CheckpointFiles::Directory(dir) if !dir.is_dir()) {
        return "expected a checkpoint directory; there is none".into();
    }
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|name| files.exists(name));
    let hint = if pickled { "; pytorch_model.bin is not read: save it as safetensors" } else { "" };
    format!("no weights: neither {INDEX} nor {SINGLE} is there{hint}")
}

/// Levenshtein's distance.
fn edit_distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distances() {
        for (a, b, distance) in [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("k_proj", "q_proj", 1)] {
            assert_eq!(edit_distance(a.as_bytes(), b.as_bytes()), distance);
            assert_eq!(edit_distance(b.as_bytes(), a.as_bytes()), distance);
        }
    }
}

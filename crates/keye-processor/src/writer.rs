//! Writing safetensors: a file at a time, tensors streamed, never half a file under its final name.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value, json};

use crate::packed::{TAG_PREFIX, VERSION, VERSION_KEY};
use crate::{Dtype, PACKED_ALIGNMENT, PackedTag, ProcessorError};

/// A tensor that is about to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, row-major.
    pub shape: Vec<usize>,
}

impl NewTensor {
    /// Bytes of its elements; `None` when they cannot be counted in 64 bits.
    pub fn bytes(&self) -> Option<u64> {
        self.shape.iter().try_fold(self.dtype.size() as u64, |bytes, &dim| bytes.checked_mul(dim as u64))
    }
}

/// Writes one safetensors file: names, types and shapes first, then the elements in that order.
///
/// The file appears under its name when [`finish`](Self::finish) has put all of it on the disk; dropped before that, the
/// writer leaves nothing. Larger elements should come first: then all of them are aligned.
pub struct SafetensorsWriter {
    out: BufWriter<File>,
    partial: PartialFile,
    tensors: VecDeque<NewTensor>,
    /// A tensor that is written only in part: all that follows would be out of place.
    broken: Option<String>,
}

impl SafetensorsWriter {
    /// Writes the header of the file that will be `path`. `metadata` is a list of keys and values; `("format", "pt")` is what
    /// transformers asks for.
    pub fn create(path: &Path, tensors: &[NewTensor], metadata: &[(&str, &str)]) -> Result<Self, ProcessorError> {
        let header = header(tensors, metadata).map_err(|(name, reason)| ProcessorError::Tensor {
            path: path.to_owned(),
            name,
            reason,
        })?;
        let (partial, file) = PartialFile::create(path)?;
        let tensors = tensors.iter().cloned().collect();
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let written = out.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&header));
        written.map_err(|source| ProcessorError::Write { path: path.to_owned(), source })?;
        Ok(Self { out, partial, tensors, broken: None })
    }

    /// Writes the elements of the next tensor: `fill` writes as many little-endian bytes as the tensor has.
    pub fn write_next(
        &mut self,
        fill: impl FnOnce(&NewTensor, &mut dyn Write) -> io::Result<()>,
    ) -> Result<(), ProcessorError> {
        self.whole()?;
        let path = &self.partial.path;
        let Some(tensor) = self.tensors.pop_front() else {
            return Err(ProcessorError::File { path: path.clone(), reason: "all its tensors are written".into() });
        };
        self.broken = Some(tensor.name.clone());
        let bytes = tensor.bytes().unwrap_or(0);
        let mut limited = Limited { out: &mut self.out, left: bytes };
        fill(&tensor, &mut limited).map_err(|source| ProcessorError::Write { path: path.clone(), source })?;
        if limited.left != 0 {
            let reason = format!("expected {bytes} bytes, found {} fewer", limited.left);
            return Err(ProcessorError::Tensor { path: path.clone(), name: tensor.name, reason });
        }
        self.broken = None;
        Ok(())
    }

    /// Refuses to go on behind a tensor that failed.
    fn whole(&self) -> Result<(), ProcessorError> {
        let Some(name) = self.broken.clone() else { return Ok(()) };
        let reason = "its elements could not be written; write the file anew".into();
        Err(ProcessorError::Tensor { path: self.partial.path.clone(), name, reason })
    }

    /// Puts the file on the disk and gives it its name.
    ///
    /// # Errors
    /// It cannot be written, or a tensor has not been, or only in part.
    pub fn finish(mut self) -> Result<(), ProcessorError> {
        self.whole()?;
        let path = &self.partial.path;
        if let Some(tensor) = self.tensors.pop_front() {
            let reason = "its elements have not been written".into();
            return Err(ProcessorError::Tensor { path: path.clone(), name: tensor.name, reason });
        }
        self.out.flush().map_err(|source| ProcessorError::Write { path: path.clone(), source })?;
        self.partial.keep(self.out.get_ref())
    }
}

/// Writes a file of tensors that are in memory.
pub fn write_file(path: &Path, tensors: &[(NewTensor, &[u8])]) -> Result<(), ProcessorError> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(tensor, _)| std::cmp::Reverse(tensor.dtype.size()));
    let list: Vec<NewTensor> = order.iter().map(|(tensor, _)| tensor.clone()).collect();
    let mut writer = SafetensorsWriter::create(path, &list, &[("format", "pt")])?;
    for (_, bytes) in order {
        writer.write_next(|_, out| out.write_all(bytes))?;
    }
    writer.finish()
}

/// Which tensors of a checkpoint are packed, by name.
pub type PackedTags = BTreeMap<String, PackedTag>;

/// Writes sharded `model-0000x-of-0000y.safetensors` and the index; `fill` is asked for each tensor's bytes in turn.
///
/// A shard has at most `shard_bytes` of elements unless one tensor alone is larger. What fits in one shard becomes
/// `model.safetensors` without an index, as transformers has it, and an index that is there is removed. The index comes last.
pub fn write_checkpoint(
    dir: &Path,
    tensors: &[NewTensor],
    shard_bytes: u64,
    fill: &mut dyn FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
) -> Result<(), ProcessorError> {
    write_packed_checkpoint(dir, tensors, &PackedTags::new(), shard_bytes, fill)
}

/// As [`write_checkpoint`], some of the tensors packed: those are `U8 [bytes]` in `tensors`, of a multiple of
/// [`PACKED_ALIGNMENT`] bytes, and come first in their shard.
pub fn write_packed_checkpoint(
    dir: &Path,
    tensors: &[NewTensor],
    packed: &PackedTags,
    shard_bytes: u64,
    fill: &mut dyn FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
) -> Result<(), ProcessorError> {
    let index_path = dir.join("model.safetensors.index.json");
    let mut names = BTreeSet::new();
    let mut shards: Vec<(u64, Vec<NewTensor>)> = Vec::new();
    let mut total: u64 = 0;
    for tensor in tensors {
        let wrong = |reason: &str| ProcessorError::Tensor {
            path: dir.to_owned(),
            name: tensor.name.clone(),
            reason: reason.to_owned(),
        };
        if !names.insert(&tensor.name) {
            return Err(wrong("is there twice"));
        }
        let bytes = tensor.bytes().ok_or_else(|| wrong("has more bytes than can be counted"))?;
        if packed.contains_key(&tensor.name)
            && (tensor.dtype != Dtype::U8 || !bytes.is_multiple_of(PACKED_ALIGNMENT as u64))
        {
            return Err(wrong("is packed; expected U8 elements, a multiple of 64 of them"));
        }
        total = total.checked_add(bytes).ok_or_else(|| wrong("makes the checkpoint too large"))?;
        match shards.last_mut() {
            Some((size, shard)) if size.saturating_add(bytes) <= shard_bytes => {
                *size += bytes;
                shard.push(tensor.clone());
            }
            _ => shards.push((bytes, vec![tensor.clone()])),
        }
    }
    let count = shards.len();
    let mut weight_map = Map::new();
    for (i, (_, mut shard)) in shards.into_iter().enumerate() {
        let file = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        shard.sort_by_key(|tensor| (!packed.contains_key(&tensor.name), std::cmp::Reverse(tensor.dtype.size())));
        let metadata = metadata(&shard, packed);
        let metadata: Vec<(&str, &str)> = metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let mut writer = SafetensorsWriter::create(&dir.join(&file), &shard, &metadata)?;
        for tensor in &shard {
            writer.write_next(&mut *fill)?;
            weight_map.insert(tensor.name.clone(), Value::String(file.clone()));
        }
        writer.finish()?;
    }
    if count == 1 {
        // That of an earlier checkpoint would win over the file.
        return match std::fs::remove_file(&index_path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(ProcessorError::Write { path: index_path, source })
            }
            _ => Ok(()),
        };
    }
    weight_map.sort_keys();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    let (partial, mut file) = PartialFile::create(&index_path)?;
    file.write_all(format!("{index:#}\n").as_bytes())
        .map_err(|source| ProcessorError::Write { path: index_path.clone(), source })?;
    partial.keep(&file)
}

/// What transformers asks for, and the tags of the packed tensors.
fn metadata(shard: &[NewTensor], packed: &PackedTags) -> Vec<(String, String)> {
    let tags = shard.iter().filter_map(|tensor| Some((&tensor.name, packed.get(&tensor.name)?)));
    let tags: Vec<_> = tags.map(|(name, tag)| (format!("{TAG_PREFIX}{name}"), tag.to_string())).collect();
    let mut metadata = vec![("format".to_owned(), "pt".to_owned())];
    if !tags.is_empty() {
        metadata.push((VERSION_KEY.to_owned(), VERSION.to_string()));
    }
    metadata.extend(tags);
    metadata
}

/// The json header, padded with spaces so that elements begin at a multiple of [`PACKED_ALIGNMENT`], or the tensor that is wrong and why.
fn header(tensors: &[NewTensor], metadata: &[(&str, &str)]) -> Result<Vec<u8>, (String, String)> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), Value::String((*value).to_owned())));
        header.insert("__metadata__".into(), Value::Object(metadata.collect()));
    }
    let mut at: u64 = 0;
    for tensor in tensors {
        let wrong = |reason: &str| (tensor.name.clone(), reason.to_owned());
        let end = tensor.bytes().and_then(|bytes| at.checked_add(bytes));
        let end = end.ok_or_else(|| wrong("has more bytes than can be counted"))?;
        let entry = json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [at, end]});
        if tensor.name == "__metadata__" || header.insert(tensor.name.clone(), entry).is_some() {
            return Err(wrong("the name is there twice"));
        }
        at = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize((8 + header.len()).next_multiple_of(PACKED_ALIGNMENT) - 8, b' ');
    Ok(header)
}

/// Passes on at most `left` bytes.
struct Limited<'a> {
    out: &'a mut BufWriter<File>,
    left: u64,
}

impl Write for Limited<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            let excess = bytes.len() as u64 - self.left;
            return Err(io::Error::other(format!("{excess} bytes more than the tensor has")));
        }
        let written = self.out.write(bytes)?;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A file under a temporary name beside its final one; removed when dropped before it is kept.
struct PartialFile {
    path: PathBuf,
    partial: PathBuf,
}

impl PartialFile {
    fn create(path: &Path) -> Result<(Self, File), ProcessorError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut tries = 0;
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let partial = path.with_file_name(format!(".{name}.{}.{count}.partial", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&partial) {
                Ok(file) => return Ok((Self { path: path.to_owned(), partial }, file)),
                // Of a run that was killed, in a container where every run has the same number; or of one that still writes.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < 1000 => tries += 1,
                Err(source) => {
                    let exists = source.kind() == io::ErrorKind::AlreadyExists;
                    return Err(ProcessorError::Write { path: if exists { partial } else { path.to_owned() }, source });
                }
            }
        }
    }

    /// Syncs `file`, renames it, and syncs the directory so that the name survives a crash too.
    fn keep(self, file: &File) -> Result<(), ProcessorError> {
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let kept = file.sync_all().and_then(|()| std::fs::rename(&self.partial, &self.path));
        let kept = kept.and_then(|()| File::open(parent)?.sync_all());
        kept.map_err(|source| ProcessorError::Write { path: self.path.clone(), source })
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        // Nothing is there any more once it has been renamed.
        let _ = std::fs::remove_file(&self.partial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Checkpoint;

    fn tensors(count: usize) -> Vec<NewTensor> {
        (0..count).map(|i| NewTensor { name: format!("t{i}"), dtype: Dtype::U8, shape: vec![4] }).collect()
    }

    #[test]
    fn what_a_killed_run_left_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        for count in 0..50 {
            let left = format!(".model.safetensors.{}.{count}.partial", std::process::id());
            std::fs::write(dir.path().join(left), b"x").unwrap();
        }
        write_file(&path, &[(tensors(1).remove(0), &[1; 4])]).unwrap();
        assert!(Checkpoint::open_file(&path).is_ok());
    }

    #[test]
    fn a_single_file_replaces_an_index() {
        let dir = tempfile::tempdir().unwrap();
        for (value, shard_bytes) in [(1, 4), (2, 100), (3, 4), (4, 100)] {
            let mut fill = |_: &NewTensor, out: &mut dyn Write| out.write_all(&[value; 4]);
            write_checkpoint(dir.path(), &tensors(2), shard_bytes, &mut fill).unwrap();
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(&checkpoint.tensor("t1", &[4]).unwrap().bytes[..], &[value; 4]);
        }
    }

    #[test]
    fn a_file_with_a_tensor_that_failed_is_never_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let mut writer = SafetensorsWriter::create(&path, &tensors(2), &[]).unwrap();
        let failed = writer.write_next(|_, out| out.write_all(&[1; 2]).and(Err(io::Error::other("no more"))));
        assert!(failed.unwrap_err().to_string().contains("no more"));
        let next = writer.write_next(|_, out| out.write_all(&[2; 4])).unwrap_err().to_string();
        assert!(next.contains("tensor t0: its elements could not be written"), "{next}");
        assert!(writer.finish().unwrap_err().to_string().contains("tensor t0"));
        let mut writer = SafetensorsWriter::create(&path, &tensors(1), &[]).unwrap();
        assert!(writer.write_next(|_, out| out.write_all(&[1; 2])).is_err());
        assert!(writer.finish().is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

//! One safetensors file, memory-mapped: `u64` header length, json header, elements.
//!
//! The header is believed only after it has been checked against the size of the file: its length, every tensor's place,
//! that tensors follow each other without holes or overlaps, and that shape times element size is what the place holds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::few::Few;
use crate::packed::{self, PackedTag};
use crate::{CheckpointFiles, Dtype, ProcessorError};

/// The limit of the reference implementation; the header of the largest checkpoints is below 1 MB.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors of a file, and most pairs of metadata: several times those of the largest models.
const MAX_ENTRIES: usize = 1 << 18;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 16;
/// The header's key that is not a tensor.
const METADATA_KEY: &str = "__metadata__";

/// Where a tensor is in its file.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Element type, or the name of one that this build does not read.
    pub dtype: Result<Dtype, String>,
    /// Row-major.
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
    /// How the bytes are packed, if they are; `shape` is the matrix's then.
    pub packed: Option<PackedTag>,
}

/// A mapped file and its checked header.
pub(crate) struct SafetensorsFile {
    pub path: PathBuf,
    pub map: Bytes,
    pub metadata: BTreeMap<String, String>,
    /// Sorted by name.
    pub entries: BTreeMap<String, Entry>,
}

impl SafetensorsFile {
    /// Maps `path` and checks its header. Elements are not touched.
    pub fn open(path: &Path) -> Result<Self, ProcessorError> {
        let read = |source| ProcessorError::Read { path: path.to_owned(), source };
        if !std::fs::metadata(path).map_err(read)?.is_file() {
            return Err(ProcessorError::File {
                path: path.to_owned(),
                reason: "expected a safetensors file, found something else".into(),
            });
        }
        let file = File::open(path).map_err(read)?;
        // SAFETY: the map is read-only and private to this process. A file that another process shortens while it is mapped
        // ends in SIGBUS; checkpoints are replaced by rename, never written in place.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(read)?;
        // Weights are streamed from end to end once a token, and a page of 2 MiB costs one walk of the page tables where
        // small ones cost 512. Advice: a system without huge pages for files refuses, and nothing is lost.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Self::parse(path, Bytes::from_owner(map))
    }

    /// File `name` of a checkpoint, where it lies.
    pub fn open_in(files: &CheckpointFiles, name: &str) -> Result<Self, ProcessorError> {
        let path = files.path(name);
        match files {
            CheckpointFiles::Directory(_) => Self::open(&path),
            CheckpointFiles::Embedded(embedded) => {
                let absent = || ProcessorError::Read { path: path.clone(), source: ErrorKind::NotFound.into() };
                Self::parse(&path, Bytes::from_static(embedded.get(name).ok_or_else(absent)?))
            }
        }
    }

    fn parse(path: &Path, map: Bytes) -> Result<Self, ProcessorError> {
        let (metadata, entries) =
            parse_header(&map).map_err(|reason| ProcessorError::File { path: path.to_owned(), reason })?;
        Ok(Self { path: path.to_owned(), map, metadata, entries })
    }
}

/// Metadata and tensors of a file.
type CheckedHeader = (BTreeMap<String, String>, BTreeMap<String, Entry>);

/// Metadata and tensors of the file whose bytes are `file`, or what is wrong with it.
fn parse_header(file: &[u8]) -> Result<CheckedHeader, String> {
    let size = file.len();
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("truncated: {size} bytes are less than the 8 of a safetensors header length"));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(format!(
            "not a safetensors file: it says that its header has {length} bytes; at most {MAX_HEADER_BYTES} are believed"
        ));
    }
    let length = length as usize;
    let Some(header) = rest.get(..length) else {
        let missing = length - rest.len();
        return Err(format!(
            "truncated: {missing} bytes of the header are missing (file of {size} bytes, header of {length}); download it again"
        ));
    };
    let header: Header = serde_json::from_slice(header).map_err(|e| format!("header: {e}"))?;
    let data = 8 + length;
    let mut entries = BTreeMap::new();
    let mut places = Vec::with_capacity(header.tensors.len());
    for (name, raw) in header.tensors {
        let entry = raw.entry(data).map_err(|reason| format!("tensor {name}: {reason}"))?;
        places.push((entry.start, entry.end, name.clone()));
        if entries.insert(name.clone(), entry).is_some() {
            return Err(format!("tensor {name}: the header has it twice"));
        }
    }
    places.sort_unstable();
    let mut at = data;
    for (start, end, name) in &places {
        if *start != at {
            let what = if *start < at { "overlaps what is before it" } else { "leaves a hole before it" };
            return Err(format!("tensor {name}: {what} (starts at byte {start}, expected {at})"));
        }
        at = *end;
    }
    if at > size {
        return Err(format!(
            "truncated: {} bytes are missing (the header describes {at} bytes, the file has {size}); download it again",
            at - size
        ));
    }
    if at < size {
        return Err(format!("{} bytes after the last tensor belong to none", size - at));
    }
    packed::tag(&header.metadata, &mut entries)?;
    Ok((header.metadata, entries))
}

struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Few<u64, MAX_DIMS>,
    data_offsets: [u64; 2],
}

impl RawTensor {
    /// `data` is where elements begin.
    fn entry(self, data: usize) -> Result<Entry, String> {
        let ([start, end], Few(dims)) = (self.data_offsets, self.shape);
        let place = |offset: u64| usize::try_from(offset).ok().and_then(|offset| offset.checked_add(data));
        let (Some(first), Some(last), Some(stored)) = (place(start), place(end), end.checked_sub(start)) else {
            return Err(format!("data_offsets [{start}, {end}] are impossible"));
        };
        let dtype = Dtype::from_name(&self.dtype).ok_or(self.dtype);
        if let Ok(dtype) = dtype {
            let bytes = dims.iter().try_fold(dtype.size() as u64, |bytes, &dim| bytes.checked_mul(dim));
            if bytes != Some(stored) {
                let needed =
                    bytes.map_or_else(|| "more bytes than can be counted".to_owned(), |b| format!("{b} bytes"));
                return Err(format!("{dtype} {:?} needs {needed}, its place has {stored}", dims));
            }
        }
        let shape = dims.iter().map(|&dim| usize::try_from(dim)).collect::<Result<_, _>>();
        let shape = shape.map_err(|_| format!("shape {:?} is impossible", dims))?;
        Ok(Entry { dtype, shape, start: first, end: last, packed: None })
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map from tensor names to their places")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: BTreeMap::new(), tensors: Vec::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        header.metadata = map.next_value::<Metadata>()?.0;
                    } else if header.tensors.len() == MAX_ENTRIES {
                        return Err(A::Error::custom(format!("expected at most {MAX_ENTRIES} tensors, found more")));
                    } else {
                        let tensor = map.next_value().map_err(|e| A::Error::custom(format!("tensor {name}: {e}")))?;
                        header.tensors.push((name, tensor));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Pairs of metadata, few enough to hold.
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;
        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut pairs = BTreeMap::new();
                while let Some((key, value)) = map.next_entry()? {
                    if pairs.len() == MAX_ENTRIES {
                        return Err(A::Error::custom(format!(
                            "metadata: expected at most {MAX_ENTRIES} pairs, found more"
                        )));
                    }
                    pairs.insert(key, value);
                }
                Ok(Metadata(pairs))
            }
        }
        deserializer.deserialize_map(MetadataVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    fn reason(bytes: &[u8]) -> String {
        parse_header(bytes).map(|_| ()).unwrap_err()
    }

    #[test]
    fn reads_places_and_metadata() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[2,2],"data_offsets":[4,12]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"e":{"dtype":"I64","shape":[0,9],"data_offsets":[12,12]}}"#;
        let (metadata, entries) = parse_header(&file(header, 12)).unwrap();
        assert_eq!(metadata["format"], "pt");
        let data = 8 + header.len();
        assert_eq!((entries["a"].start, entries["a"].end), (data, data + 4));
        assert_eq!((entries["b"].start, entries["b"].end), (data + 4, data + 12));
        assert_eq!(entries["e"].shape, [0, 9]);
    }

    #[test]
    fn a_header_of_terabytes_is_refused_before_anything_is_allocated() {
        let mut bytes = (1u64 << 42).to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        assert!(reason(&bytes).contains("4398046511104 bytes"), "{}", reason(&bytes));
        assert!(reason(&u64::MAX.to_le_bytes()).contains("not a safetensors file"));
        assert!(reason(&1000u64.to_le_bytes()).contains("1000 bytes of the header are missing"));
        assert!(reason(b"1234567").contains("7 bytes are less"));
        assert!(reason(b"").contains("0 bytes are less"));
    }

    /// A header of the size that is believed took forty times its size in memory.
    #[test]
    fn headers_of_very_many_things_are_refused() {
        let dims = format!(r#"{{"a":{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}}}"#, "1,".repeat(100_000));
        let found = reason(&file(&dims, 1));
        assert!(found.contains("tensor a: expected a list of at most 16, found more"), "{found}");
        let entry = |i: usize| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
        let many = (0..=MAX_ENTRIES).map(entry).collect::<Vec<_>>().join(",");
        let found = reason(&file(&format!("{{{many}}}"), 0));
        assert!(found.contains("expected at most 262144 tensors"), "{found}");
        let pairs = (0..=MAX_ENTRIES).map(|i| format!(r#""{i}":"""#)).collect::<Vec<_>>().join(",");
        let found = reason(&file(&format!(r#"{{"__metadata__":{{{pairs}}}}}"#), 0));
        assert!(found.contains("metadata: expected at most 262144 pairs"), "{found}");
    }

    #[test]
    fn truncation_says_how_much_is_missing() {
        let whole = file(r#"{"a":{"dtype":"F32","shape":[25],"data_offsets":[0,100]}}"#, 100);
        assert!(parse_header(&whole).is_ok());
        let cut = &whole[..whole.len() - 37];
        assert!(reason(cut).contains("truncated: 37 bytes are missing"), "{}", reason(cut));
        let mut long = whole.clone();
        long.extend_from_slice(&[0; 5]);
        assert!(reason(&long).contains("5 bytes after the last tensor"));
    }

    #[test]
    fn impossible_places_are_refused() {
        for (header, data, expected) in [
            (r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8, "F32 [3] needs 12 bytes, its place has 8"),
            (r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#, 0, "than can be counted"),
            (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[8,4]}}"#, 8, "[8, 4] are impossible"),
            (
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]}}"#,
                0,
                "impossible",
            ),
            (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#, 8, "leaves a hole"),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
                6,
                "tensor b: overlaps",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
                2,
                "tensor a: the header has it twice",
            ),
            (r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#, 1, "tensor a: invalid value"),
            (r#"{"a":{"dtype":"U8","shape":[1]}}"#, 1, "missing field `data_offsets`"),
            (r#"[1]"#, 0, "expected a map"),
            (r#"{"a"#, 0, "header: EOF"),
        ] {
            let found = reason(&file(header, data));
            assert!(found.contains(expected), "{header}: {found}");
        }
    }

    #[test]
    fn types_that_are_not_read_do_not_spoil_the_file() {
        let header = r#"{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
        let (_, entries) = parse_header(&file(header, 6)).unwrap();
        assert_eq!(entries["a"].dtype, Err("F4".to_owned()));
        assert_eq!(entries["b"].dtype, Ok(Dtype::U8));
    }

    #[test]
    fn eight_bit_floats_take_a_byte_each() {
        let header = r#"{"w":{"dtype":"F8_E4M3","shape":[3,5],"data_offsets":[0,15]},
            "w_scale_inv":{"dtype":"F32","shape":[1,1],"data_offsets":[15,19]},
            "v":{"dtype":"F8_E5M2","shape":[2],"data_offsets":[19,21]},"s":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[21,22]}}"#;
        let (_, entries) = parse_header(&file(header, 22)).unwrap();
        let found = |name: &str| (entries[name].dtype.clone(), entries[name].end - entries[name].start);
        assert_eq!(found("w"), (Ok(Dtype::F8E4M3), 15));
        // Behind an odd number of bytes numbers are not aligned, and still in place.
        assert_eq!(found("w_scale_inv"), (Ok(Dtype::F32), 4));
        assert_eq!(entries["w_scale_inv"].start, entries["w"].end);
        assert_eq!(found("v").0, Ok(Dtype::F8E5M2));
        assert_eq!(found("s").0, Ok(Dtype::F8E8M0));
        for (shape, place, expected) in [
            ("[3,5]", 30, "F8_E4M3 [3, 5] needs 15 bytes, its place has 30"),
            ("[3,5]", 14, "needs 15 bytes, its place has 14"),
            ("[4294967296,4294967296]", 0, "more bytes than can be counted"),
        ] {
            let header = format!(r#"{{"w":{{"dtype":"F8_E4M3","shape":{shape},"data_offsets":[0,{place}]}}}}"#);
            let found = reason(&file(&header, place));
            assert!(found.contains(expected), "{found}");
        }
        // Another spelling is another type, that of a tensor nobody may use.
        let header = r#"{"w":{"dtype":"F8_E4M3FNUZ","shape":[2],"data_offsets":[0,2]}}"#;
        let (_, entries) = parse_header(&file(header, 2)).unwrap();
        assert_eq!(entries["w"].dtype, Err("F8_E4M3FNUZ".to_owned()));
    }
}

//! Tags of packed tensors: weights quantised into the backend's tiles, stored as plain bytes.
//!
//! A packed tensor lies in the file as `U8 [bytes]` under its own name. `__metadata__` says what the bytes are:
//! `"keye_packed_version": "2"` and, per tensor, `"keye_packed:NAME": "int4 ROWS COLS"`. Its bytes start at a multiple of
//! [`PACKED_ALIGNMENT`], so that the kernels read them in the memory map.

use std::collections::BTreeMap;

use crate::Dtype;
use crate::safetensors_file::Entry;

/// Packed tensors start at multiples of this many bytes of their file.
pub const PACKED_ALIGNMENT: usize = 64;
/// The version that this build writes and reads: the tiles of `keye_backend::packed`.
pub(crate) const VERSION: u32 = 2;
pub(crate) const VERSION_KEY: &str = "keye_packed_version";
pub(crate) const TAG_PREFIX: &str = "keye_packed:";

/// Formats of packed tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PackedFormat {
    /// 12-bit codes.
    Int12,
    /// 10-bit codes.
    Int10,
    /// 8-bit groups.
    Int8,
    /// 4-bit groups.
    Int4,
}

impl PackedFormat {
    /// The name in tags and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int12 => "int12",
            Self::Int10 => "int10",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// The format called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Int12, Self::Int10, Self::Int8, Self::Int4].into_iter().find(|format| format.name() == name)
    }
}

impl std::fmt::Display for PackedFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What the bytes of a packed tensor stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedTag {
    /// How they are packed.
    pub format: PackedFormat,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
}

impl PackedTag {
    /// `int4 ROWS COLS`.
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let format = PackedFormat::from_name(words.next()?)?;
        let (rows, cols) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let fits = usize::checked_mul(rows, cols).is_some_and(|n| n > 0);
        (fits && words.next().is_none()).then_some(Self { format, rows, cols })
    }
}

impl std::fmt::Display for PackedTag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.format, self.rows, self.cols)
    }
}

/// Puts the tags of a file's metadata on its tensors, or says what is wrong with them.
pub(crate) fn tag(metadata: &BTreeMap<String, String>, entries: &mut BTreeMap<String, Entry>) -> Result<(), String> {
    let mut tags = metadata.iter().filter_map(|(key, tag)| Some((key.strip_prefix(TAG_PREFIX)?, tag))).peekable();
    match metadata.get(VERSION_KEY).map(|version| (version, version.parse::<u32>())) {
        None if tags.peek().is_none() => return Ok(()),
        Some((_, Ok(VERSION))) => {}
        found => {
            let found = found.map_or("none", |(version, _)| version.as_str());
            return Err(format!(
                "{VERSION_KEY}: expected {VERSION}, found {found}; quantise the original model again with this build \
                 (keye quantize), or use the build that wrote it"
            ));
        }
    }
    for (name, text) in tags {
        let tag = PackedTag::parse(text)
            .ok_or_else(|| format!("{TAG_PREFIX}{name}: expected int4|int8|int10|int12 ROWS COLS, found {text:?}"))?;
        let entry = entries.get_mut(name).ok_or_else(|| format!("{TAG_PREFIX}{name}: there is no such tensor"))?;
        if entry.dtype != Ok(Dtype::U8) {
            let found = entry.dtype.as_ref().map_or_else(String::as_str, |dtype| dtype.name());
            return Err(format!("tensor {name}: packed as {text}, expected type U8, found {found}"));
        }
        if entry.start % PACKED_ALIGNMENT != 0 {
            return Err(format!(
                "tensor {name}: packed, starts at byte {}, expected a multiple of {PACKED_ALIGNMENT}",
                entry.start
            ));
        }
        // A weight is at least 4 bits: no larger matrix is believed than there are bytes for.
        let elements = tag.rows.saturating_mul(tag.cols);
        if elements / 2 > entry.end - entry.start {
            return Err(format!("tensor {name}: {text} needs more than its {} bytes", entry.end - entry.start));
        }
        entry.packed = Some(tag);
        entry.shape = vec![tag.rows, tag.cols];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tagged(metadata: &[(&str, &str)], entry: Entry) -> Result<Entry, String> {
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let mut entries = BTreeMap::from([("w".to_owned(), entry)]);
        tag(&metadata, &mut entries)?;
        Ok(entries.remove("w").unwrap())
    }

    fn entry() -> Entry {
        Entry { dtype: Ok(Dtype::U8), shape: vec![640], start: 128, end: 768, packed: None }
    }

    const CURRENT: (&str, &str) = (VERSION_KEY, "2");

    #[test]
    fn a_tag_gives_the_logical_shape() {
        let plain = tagged(&[("format", "pt")], entry()).unwrap();
        assert_eq!((plain.shape, plain.packed), (vec![640], None));
        let packed = tagged(&[CURRENT, ("keye_packed:w", "int4 16 64")], entry()).unwrap();
        assert_eq!(packed.shape, [16, 64]);
        assert_eq!(packed.packed, Some(PackedTag { format: PackedFormat::Int4, rows: 16, cols: 64 }));
        assert_eq!(packed.packed.unwrap().to_string(), "int4 16 64");
    }

    #[test]
    fn what_is_wrong_is_told() {
        let int4 = ("keye_packed:w", "int4 16 64");
        let reason = |metadata: &[_], entry| tagged(metadata, entry).map(|_| ()).unwrap_err();
        for version in ["1", "3", "", "-1"] {
            assert!(reason(&[(VERSION_KEY, version), int4], entry()).contains("expected 2"));
        }
        assert!(reason(&[int4], entry()).contains("found none; quantise the original model again"));
        for text in ["", "int4", "int3 16 64", "int4 16", "int4 16 64 1", "int4 0 64", "int4 -1 64", "int8 1.0 2"] {
            assert!(reason(&[CURRENT, ("keye_packed:w", text)], entry()).contains("expected int4|int8"), "{text}");
        }
        let huge = format!("int4 {} 2", usize::MAX / 2);
        assert!(reason(&[CURRENT, ("keye_packed:w", &huge)], entry()).contains("more than its 640 bytes"));
        assert!(reason(&[CURRENT, ("keye_packed:v", "int4 16 64")], entry()).contains("no such tensor"));
        assert!(reason(&[CURRENT, int4], Entry { start: 136, ..entry() }).contains("multiple of 64"));
        assert!(reason(&[CURRENT, int4], Entry { dtype: Ok(Dtype::F32), ..entry() }).contains("found F32"));
    }
}

//! Files of records as a source of samples.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine;
use keye_media::{FrameItem, ItemOptions, MediaItem, MediaKind, Source};
use keye_world::{Rng, Row, RowFile};
use serde_json::Value;

use super::example::{Body, Example, Visual};
use crate::TrainError;
use crate::checkpoint_dir::io;

/// Files whose row groups are mixed with one another (§3.6).
const WINDOW: usize = 5;

/// The rows of some files, in an order of its own for every round. One row group is in memory.
pub(crate) struct Rows {
    files: Vec<RowFile>,
    total: u64,
    seed: u64,
    /// The row groups of a round in their order.
    order: Option<(u64, Vec<Group>)>,
    /// Rows of a group.
    cached: Option<(Group, Vec<Row>)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Group {
    file: usize,
    group: usize,
    rows: usize,
}

impl Rows {
    pub(crate) fn open(paths: &[PathBuf], seed: u64) -> Result<Self, TrainError> {
        let mut files = Vec::with_capacity(paths.len());
        for path in listed(paths)? {
            files.push(RowFile::open(&path).map_err(|error| TrainError::Data(error.to_string()))?);
        }
        let total = files.iter().flat_map(RowFile::groups).map(|rows| rows as u64).sum();
        if total == 0 {
            let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
            let reason = "expected records, found none; name files that have some";
            return Err(TrainError::Data(format!("{}: {reason}", names.join(", "))));
        }
        Ok(Self { files, total, seed, order: None, cached: None })
    }

    /// Sample `number` of all rounds one after the other.
    pub(crate) fn example(&mut self, number: u64) -> Result<Example, TrainError> {
        let (round, mut at) = (number / self.total, (number % self.total) as usize);
        if self.order.as_ref().is_none_or(|(known, _)| *known != round) {
            self.order = Some((round, self.shuffled(round)));
        }
        let groups = self.order.as_ref().map_or(&[][..], |(_, groups)| groups);
        let mut chosen = None;
        for group in groups {
            if at < group.rows {
                chosen = Some(*group);
                break;
            }
            at -= group.rows;
        }
        let group = chosen.ok_or_else(|| TrainError::Data(format!("there is no row {number}")))?;
        if self.cached.as_ref().is_none_or(|(known, _)| *known != group) {
            let rows = self.files[group.file].read(group.group);
            self.cached = Some((group, rows.map_err(|error| TrainError::Data(error.to_string()))?));
        }
        let rows = self.cached.as_ref().map_or(&[][..], |(_, rows)| rows);
        let mut order: Vec<usize> = (0..rows.len()).collect();
        Rng::new(&[self.seed, round, group.file as u64, group.group as u64]).shuffle(&mut order);
        let path = self.files[group.file].path();
        example(&rows[order[at]], path.parent().unwrap_or(Path::new("")))
    }

    fn shuffled(&self, round: u64) -> Vec<Group> {
        let mut rng = Rng::new(&[self.seed, round]);
        let mut files: Vec<usize> = (0..self.files.len()).collect();
        rng.shuffle(&mut files);
        let groups = |file: usize| {
            let groups = self.files[file].groups().into_iter().enumerate();
            groups.map(move |(group, rows)| Group { file, group, rows }).collect::<Vec<_>>()
        };
        files
            .chunks(WINDOW)
            .flat_map(|window| {
                let mut mixed: Vec<Group> = window.iter().flat_map(|file| groups(*file)).collect();
                rng.shuffle(&mut mixed);
                mixed
            })
            .collect()
    }
}

/// The files, those of lists in the place of the list.
fn listed(paths: &[PathBuf]) -> Result<Vec<PathBuf>, TrainError> {
    let mut files = Vec::with_capacity(paths.len());
    for path in paths {
        if path.extension().is_none_or(|end| end != "json") {
            files.push(path.clone());
            continue;
        }
        let text = std::fs::read(path).map_err(io(path))?;
        let names: Vec<PathBuf> = serde_json::from_slice(&text).map_err(|error| {
            TrainError::Data(format!("{}: expected a list of files of records: {error}", path.display()))
        })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        files.extend(names.iter().map(|name| folder.join(name)));
    }
    Ok(files)
}

/// A row with its media found; their paths are relative to `dir`.
fn example(row: &Row, dir: &Path) -> Result<Example, TrainError> {
    let wrong = |what: String| TrainError::Data(format!("{}: {what}", row.uuid));
    let parse = |name: &str, text: &str| -> Result<Value, TrainError> {
        serde_json::from_str(text).map_err(|error| wrong(format!("{name}: {error}")))
    };
    let names = |name: &str, text: &Option<String>| -> Result<BTreeMap<String, String>, TrainError> {
        let Some(text) = text.as_deref().filter(|text| !text.is_empty()) else { return Ok(BTreeMap::new()) };
        serde_json::from_str(text).map_err(|error| wrong(format!("{name}: expected names with paths: {error}")))
    };
    let (images, videos) = (names("images", &row.images)?, names("videos", &row.videos)?);
    let list = |name: &str, text: &str| match parse(name, text)? {
        Value::Array(items) => Ok(items),
        other => Err(wrong(format!("{name}: expected a list, found {other}"))),
    };
    let body = match (&row.messages, &row.segments) {
        (Some(text), _) => Body::Messages(list("messages", text)?),
        (None, Some(text)) => Body::Segments(list("segments", text)?),
        (None, None) => return Err(wrong("it has neither messages nor segments".into())),
    };
    let blocks: Vec<&Value> = match &body {
        Body::Messages(messages) => messages.iter().filter_map(|m| m["content"].as_array()).flatten().collect(),
        Body::Segments(parts) => parts.iter().collect(),
        Body::Caption(_) => Vec::new(),
    };
    let source = |name: &Value, of: &BTreeMap<String, String>| -> Result<Source, TrainError> {
        let named = name.as_str().and_then(|name| of.get(name));
        let text = named.ok_or_else(|| wrong(format!("the picture or clip {name} is not among those of the row")))?;
        Ok(file_or_bytes(text, dir))
    };
    let mut media = Vec::new();
    for block in blocks {
        let (kind, source) = match block["type"].as_str() {
            Some("image") => (MediaKind::Image, source(&block["image"], &images)?),
            Some("video") => match block["video"].as_array() {
                Some(frames) => {
                    let frame = |name| Ok(FrameItem { source: source(name, &images)?, options: None });
                    (MediaKind::Video, Source::Frames(frames.iter().map(frame).collect::<Result<_, TrainError>>()?))
                }
                None => (MediaKind::Video, source(&block["video"], &videos)?),
            },
            Some("text") => continue,
            _ => return Err(wrong(format!("expected a block of type text, image or video, found {block}"))),
        };
        media.push(Visual::Item(Box::new(MediaItem { kind, source, options: ItemOptions::default() })));
    }
    Ok(Example { uuid: row.uuid.clone(), body, media })
}

/// Base64, with or without the head of a data URL; else a path.
fn file_or_bytes(text: &str, dir: &Path) -> Source {
    let coded = match text.strip_prefix("data:") {
        Some(url) => url.split_once(',').map(|(_, coded)| coded),
        None if dir.join(text).exists() => None,
        None => Some(text),
    };
    match coded.and_then(|coded| base64::engine::general_purpose::STANDARD.decode(coded).ok()) {
        Some(bytes) => Source::Bytes(bytes.into()),
        None => Source::Path(dir.join(text)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn row(messages: &str, images: &str) -> Row {
        Row { uuid: "r".into(), messages: Some(messages.into()), images: Some(images.into()), ..Row::default() }
    }

    #[test]
    fn rows_name_files_bytes_and_frames() {
        let messages = r#"[{"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "x"},
            {"type": "video", "video": ["a", "b"]}]}, {"role": "assistant", "content": "y"}]"#;
        let found = example(&row(messages, r#"{"a": "aGk=", "b": "no/such.png"}"#), Path::new("/d")).unwrap();
        let [Visual::Item(image), Visual::Item(video)] = &found.media[..] else { panic!("{:?}", found.media) };
        assert_eq!((image.kind, &image.source), (MediaKind::Image, &Source::Bytes(Arc::from(&b"hi"[..]))));
        let Source::Frames(frames) = &video.source else { panic!("{:?}", video.source) };
        assert_eq!(frames[1].source, Source::Path("/d/no/such.png".into()));
    }

    #[test]
    fn wrong_rows_are_named() {
        let picture = r#"[{"role": "user", "content": [{"type": "image", "image": "a"}]}]"#;
        for (messages, images) in [("{}", "{}"), ("[", "{}"), (picture, "{}"), (picture, "[]")] {
            let error = example(&row(messages, images), Path::new("")).unwrap_err().to_string();
            assert!(error.starts_with("data: r: "), "{error}");
        }
    }
}

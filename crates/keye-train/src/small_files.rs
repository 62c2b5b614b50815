//! What lies beside weights in a checkpoint directory: config, tokenizer, chat template, preprocessor and generation config.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::TrainError;
use crate::checkpoint_dir::{STATE_JSON, io};

/// Most bytes of one.
const SMALL_FILE: u64 = 64 << 20;
/// Endings of those that decide what a model reads and how; a README decides nothing.
const DECIDING: [&str; 3] = ["json", "jinja", "txt"];

/// Files of a directory that are not weights, also behind links, as the hub's cache has them.
fn small_files(dir: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let entry = entry.map_err(io(dir))?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if name.contains("safetensors") || name == STATE_JSON || name.starts_with('.') {
            continue;
        }
        let meta = fs::metadata(&path).map_err(io(&path))?;
        if meta.is_file() && meta.len() <= SMALL_FILE {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Copies the small files of several folders into one.
pub(crate) fn gather(folders: &[PathBuf], to: &Path) -> Result<(), TrainError> {
    for folder in folders {
        for file in small_files(folder)? {
            fs::copy(&file, to.join(file.file_name().unwrap_or_default())).map_err(io(&file))?;
        }
    }
    Ok(())
}

/// The first file that two folders do not both have with the same content. A folder without any, as the first runs left
/// checkpoints, is like every other.
pub(crate) fn different_file(a: &Path, b: &Path) -> Result<Option<String>, TrainError> {
    let (of_a, of_b) = (deciding(a)?, deciding(b)?);
    if of_a.is_empty() || of_b.is_empty() {
        return Ok(None);
    }
    for name in of_a.union(&of_b) {
        let both = of_a.contains(name) && of_b.contains(name);
        if !both || content(&a.join(name))? != content(&b.join(name))? {
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

fn deciding(dir: &Path) -> Result<BTreeSet<OsString>, TrainError> {
    let mut files = small_files(dir)?;
    files.retain(|path| path.extension().is_some_and(|end| DECIDING.iter().any(|deciding| end == *deciding)));
    Ok(files.iter().filter_map(|path| path.file_name()).map(OsString::from).collect())
}

#[derive(PartialEq)]
enum Content {
    Json(Value),
    Bytes(Vec<u8>),
}

/// Json by its values, because every export writes config.json in a form and with an element type of its own.
fn content(path: &Path) -> Result<Content, TrainError> {
    let bytes = fs::read(path).map_err(io(path))?;
    let Ok(mut value) = serde_json::from_slice::<Value>(&bytes) else { return Ok(Content::Bytes(bytes)) };
    if let Some(fields) = value.as_object_mut().filter(|_| path.ends_with("config.json")) {
        fields.remove("torch_dtype");
    }
    Ok(Content::Json(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
        dir
    }

    #[test]
    fn files_differ_by_what_they_say() {
        let written = [("config.json", r#"{"a": 1, "torch_dtype": "float32"}"#), ("merges.txt", "x y")];
        let a = folder(&written);
        let different = |files: &[(&str, &str)]| different_file(a.path(), folder(files).path()).unwrap();
        let exported = ("config.json", "{\n \"torch_dtype\": \"bfloat16\",\n \"a\": 1}");
        assert_eq!(different(&[exported, written[1], ("README.md", "new")]), None);
        assert_eq!(different(&[]), None);
        let named = |files: &[(&str, &str)], name: &str| assert_eq!(different(files).as_deref(), Some(name));
        named(&[("config.json", r#"{"a": 2}"#), written[1]], "config.json");
        named(&[written[0], ("merges.txt", "y x")], "merges.txt");
        named(&written[..1], "merges.txt");
        named(&[written[0], written[1], ("tokenizer.json", "{}")], "tokenizer.json");
    }

    #[cfg(unix)]
    #[test]
    fn files_behind_links_are_gathered() {
        let blobs = folder(&[("0a1b", "{}")]);
        let (from, to) = (folder(&[("tokenizer.json", "{}")]), folder(&[]));
        std::os::unix::fs::symlink(blobs.path().join("0a1b"), from.path().join("config.json")).unwrap();
        gather(&[from.path().to_owned()], to.path()).unwrap();
        let names = ["config.json", "tokenizer.json"].map(|name| to.path().join(name));
        assert_eq!(small_files(to.path()).unwrap(), names);
        std::os::unix::fs::symlink("gone", from.path().join("vocab.json")).unwrap();
        let error = gather(&[from.path().to_owned()], to.path()).unwrap_err().to_string();
        assert!(error.contains("vocab.json"), "{error}");
    }
}

//! Where a checkpoint's files are: a directory, or the program itself.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::ProcessorError;
use crate::files::file_error;

/// The files of a checkpoint. Everything that reads one takes a path or this.
#[derive(Debug, Clone)]
pub enum CheckpointFiles {
    /// In a directory.
    Directory(PathBuf),
    /// Compiled into the program.
    Embedded(&'static EmbeddedFiles),
}

/// A checkpoint inside the program: nothing is written to disk, and weights are used where they lie.
#[derive(Debug)]
pub struct EmbeddedFiles {
    /// What the checkpoint is called; stands for the directory in messages.
    pub name: &'static str,
    /// Names and contents. Weights have to be aligned as in a memory map, to 64 bytes.
    pub files: &'static [(&'static str, &'static [u8])],
}

impl<P: AsRef<Path> + ?Sized> From<&P> for CheckpointFiles {
    fn from(directory: &P) -> Self {
        Self::Directory(directory.as_ref().to_owned())
    }
}

impl From<&CheckpointFiles> for CheckpointFiles {
    fn from(files: &CheckpointFiles) -> Self {
        files.clone()
    }
}

impl CheckpointFiles {
    /// The directory, or the name of the embedded checkpoint.
    pub fn root(&self) -> &Path {
        match self {
            Self::Directory(path) => path,
            Self::Embedded(embedded) => Path::new(embedded.name),
        }
    }

    /// Where file `name` is, for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Whether there is such a file.
    pub fn exists(&self, name: &str) -> bool {
        match self {
            Self::Directory(path) => path.join(name).exists(),
            Self::Embedded(embedded) => embedded.get(name).is_some(),
        }
    }

    /// The bytes of file `name`, at most `limit` of them.
    ///
    /// # Errors
    /// [`ProcessorError::Read`] when it cannot be read, of the kind `NotFound` when it is not there; [`ProcessorError::File`] when
    /// it is larger than `limit`.
    pub fn read(&self, name: &str, limit: u64) -> Result<Cow<'static, [u8]>, ProcessorError> {
        let cannot = |source| ProcessorError::Read { path: self.path(name), source };
        let bytes: Cow<'static, [u8]> = match self {
            Self::Directory(path) => {
                let mut bytes = Vec::new();
                // Opening a pipe waits for whoever writes into it.
                if !std::fs::metadata(path.join(name)).map_err(cannot)?.is_file() {
                    return Err(file_error(&self.path(name), "expected a file, found something else"));
                }
                let file = File::open(path.join(name)).map_err(cannot)?;
                file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(cannot)?;
                bytes.into()
            }
            Self::Embedded(embedded) => {
                embedded.get(name).ok_or_else(|| cannot(io::ErrorKind::NotFound.into()))?.into()
            }
        };
        if bytes.len() as u64 > limit {
            return Err(file_error(&self.path(name), format!("expected at most {limit} bytes, found more")));
        }
        Ok(bytes)
    }

    /// The text of file `name`.
    pub(crate) fn read_text(&self, name: &str, limit: u64) -> Result<String, ProcessorError> {
        String::from_utf8(self.read(name, limit)?.into_owned()).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            file_error(&self.path(name), format!("expected UTF-8, found another byte at {at}"))
        })
    }

    /// The json value in file `name`.
    pub(crate) fn read_json(&self, name: &str, limit: u64) -> Result<Value, ProcessorError> {
        serde_json::from_slice(&self.read(name, limit)?)
            .map_err(|e| file_error(&self.path(name), format!("expected json: {e}")))
    }

    /// Like [`Self::read_json`]; `None` when there is no such file.
    pub(crate) fn read_json_if_present(&self, name: &str, limit: u64) -> Result<Option<Value>, ProcessorError> {
        match self.read_json(name, limit) {
            Err(ProcessorError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }
}

impl EmbeddedFiles {
    /// The contents of file `name`.
    pub fn get(&self, name: &str) -> Option<&'static [u8]> {
        self.files.iter().find(|(other, _)| *other == name).map(|(_, bytes)| *bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let made = std::process::Command::new("mkfifo").arg(dir.path().join("config.json")).status().unwrap();
        assert!(made.success());
        let error = CheckpointFiles::from(dir.path()).read("config.json", 10).unwrap_err().to_string();
        assert!(error.ends_with("config.json: expected a file, found something else"), "{error}");
    }
}

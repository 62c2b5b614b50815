//! Clips as files, each written once.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use keye_world::{Clip, WriteError, write_mp4, write_mp4_at};

/// A folder of clips: one that stays, or one that goes in the end.
pub(crate) struct Clips {
    folder: PathBuf,
    temporary: Option<tempfile::TempDir>,
    square: Option<u32>,
}

impl Clips {
    /// Clips in `folder`, which is made, or in a temporary one; with `square`, squeezed to so many pixels a side.
    pub(crate) fn new(folder: Option<&Path>, square: Option<u32>) -> std::io::Result<Self> {
        let temporary = match folder {
            Some(folder) => {
                std::fs::create_dir_all(folder)?;
                None
            }
            None => Some(tempfile::Builder::new().prefix("keye-eval-").tempdir()?),
        };
        let path = temporary.as_ref().map_or_else(|| folder.unwrap_or(Path::new("")), tempfile::TempDir::path);
        Ok(Self { folder: path.to_owned(), temporary, square })
    }

    /// The file of a clip, written unless it is there.
    pub(crate) fn write(&self, name: &str, clip: &Clip) -> Result<PathBuf, WriteError> {
        let path = self.folder.join(self.name(name, clip));
        if path.exists() {
            return Ok(path);
        }
        // Another process may write the same clip to the same folder.
        let partial = path.with_extension(format!("{}.partial", std::process::id()));
        match self.square {
            Some(side) => write_mp4_at(clip, [side, side], &partial)?,
            None => write_mp4(clip, &partial)?,
        }
        std::fs::rename(&partial, &path).map_err(|source| WriteError::Io { path: path.clone(), source })?;
        Ok(path)
    }

    /// Called when a clip is no longer looked at.
    pub(crate) fn done(&self, path: &Path) {
        if self.temporary.is_some() {
            // The folder goes in the end in any case.
            let _ = std::fs::remove_file(path);
        }
    }

    /// The story is in the name, so that a file of a world that has changed since is not taken for the clip.
    fn name(&self, name: &str, clip: &Clip) -> String {
        let mut hasher = DefaultHasher::new();
        format!("{:?}", clip.story()).hash(&mut hasher);
        let story = hasher.finish();
        match self.square {
            Some(side) => format!("{name}-{story:016x}-{side}x{side}.mp4"),
            None => format!("{name}-{story:016x}.mp4"),
        }
    }
}

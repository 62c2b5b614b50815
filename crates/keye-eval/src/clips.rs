//! Clips as files, each written once.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use keye_world::{Clip, Encoder, WriteError, write_mp4, write_mp4_at};

/// A folder of clips: one that stays, or one that goes in the end.
pub(crate) struct Clips {
    folder: PathBuf,
    temporary: Option<tempfile::TempDir>,
    square: Option<u32>,
    /// Whether `ffmpeg` turned out to have no H.264.
    without_h264: AtomicBool,
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
        Ok(Self { folder: path.to_owned(), temporary, square, without_h264: AtomicBool::new(false) })
    }

    /// The file of a clip, written unless it is there. What is not H.264 looks a little different: it says so in its name, and
    /// is taken only where `ffmpeg` has no H.264.
    pub(crate) fn write(&self, name: &str, clip: &Clip) -> Result<PathBuf, WriteError> {
        let stem = self.stem(name, clip);
        let file = |end: &str| self.folder.join(format!("{stem}{end}"));
        let (h264, mpeg4) = (file(".mp4"), file("-mpeg4.mp4"));
        if h264.exists() {
            return Ok(h264);
        }
        if self.without_h264.load(Ordering::Relaxed) && mpeg4.exists() {
            return Ok(mpeg4);
        }
        // Another process may write the same clip to the same folder.
        let partial = file(&format!(".{}.partial", std::process::id()));
        let written = match self.square {
            Some(side) => write_mp4_at(clip, [side, side], &partial),
            None => write_mp4(clip, &partial),
        };
        let encoder = written.inspect_err(|_| {
            // The error that is told is the first one.
            let _ = std::fs::remove_file(&partial);
        })?;
        self.without_h264.store(encoder != Encoder::H264, Ordering::Relaxed);
        let path = if encoder == Encoder::H264 { h264 } else { mpeg4 };
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
    fn stem(&self, name: &str, clip: &Clip) -> String {
        let mut hasher = DefaultHasher::new();
        format!("{:?}", clip.story()).hash(&mut hasher);
        let story = hasher.finish();
        match self.square {
            Some(side) => format!("{name}-{story:016x}-{side}x{side}"),
            None => format!("{name}-{story:016x}"),
        }
    }
}

//! Frames on disk, for clips whose frame sizes are known only after the last frame was seen.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use crate::MediaError;

/// Frames of one size in a temporary file without a name; it is gone with this, or with the process.
pub(crate) struct Spill {
    file: File,
    bytes: u64,
}

impl Spill {
    /// An empty file in the folder for temporary files (`$TMPDIR`).
    pub fn new() -> Result<Self, MediaError> {
        tempfile::tempfile().map(|file| Self { file, bytes: 0 }).map_err(temporary)
    }

    /// Adds a frame.
    pub fn write(&mut self, frame: &[u8]) -> Result<(), MediaError> {
        self.file.write_all(frame).map_err(temporary)?;
        self.bytes += frame.len() as u64;
        Ok(())
    }

    /// Bytes of all frames so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Goes back to the first frame.
    pub fn rewind(&mut self) -> Result<(), MediaError> {
        self.file.seek(SeekFrom::Start(0)).map(|_| ()).map_err(temporary)
    }

    /// Reads the next frame over `frame`, which has its size.
    pub fn read(&mut self, frame: &mut [u8]) -> Result<(), MediaError> {
        self.file.read_exact(frame).map_err(temporary)
    }
}

/// What failed in the folder for temporary files.
pub(crate) fn temporary(error: std::io::Error) -> MediaError {
    MediaError::Temporary { folder: std::env::temp_dir(), error }
}

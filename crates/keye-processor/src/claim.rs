//! Directories that one process at a time writes to.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How often a directory may be gone again before it is locked.
const TRIES: usize = 100;

/// Whose a directory is.
#[derive(Debug)]
pub enum Claim {
    /// This process's, for as long as the file is open and under any name that the directory is given.
    Ours(File),
    /// Another one's.
    Taken,
    /// Nobody can tell: the file system locks no directories, as some of networks.
    Unknown,
}

/// Makes the directory `path` where it is not there, and claims it.
///
/// # Errors
/// It cannot be made or opened.
pub fn claim_dir(path: &Path) -> io::Result<Claim> {
    for _ in 0..TRIES {
        fs::create_dir_all(path)?;
        let dir = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            dir => dir?,
        };
        match dir.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Claim::Taken),
            Err(TryLockError::Error(_)) => return Ok(Claim::Unknown),
        }
        let ours = dir.metadata()?;
        // Whoever had it may have renamed or removed it before the lock was free.
        if fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino())) {
            return Ok(Claim::Ours(dir));
        }
    }
    Ok(Claim::Unknown)
}

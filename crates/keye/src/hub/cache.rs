//! The cache that Hugging Face's tools share: blobs by their tag, snapshots of commits as links to them, refs from branches to
//! commits.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::http::Failure;
use super::is_word;

/// What the longest tag has; with its ending it has to be the name of a file.
const MOST_TAG_BYTES: usize = 128;

/// The name of a blob: one plain path component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Etag(String);

impl Etag {
    /// The tag of a header, without quotes and the mark of a weak one; `None` where it could not name a file.
    pub(super) fn parse(header: &str) -> Option<Self> {
        let tag = header.strip_prefix("W/").unwrap_or(header).trim_matches('"');
        (is_word(tag) && tag.len() <= MOST_TAG_BYTES).then(|| Self(tag.to_owned()))
    }

    /// Large files have their content's SHA-256 as their tag, others Git's number, which is shorter.
    fn is_sha256(&self) -> bool {
        self.0.len() == 64 && self.0.bytes().all(|b| b.is_ascii_hexdigit())
    }
}

/// One model's part of the cache.
pub(super) struct Repo {
    root: PathBuf,
    locks: PathBuf,
}

impl Repo {
    pub(super) fn new(cache: &Path, id: &str) -> io::Result<Self> {
        let cache = std::path::absolute(cache)?;
        let name = format!("models--{}", id.replace('/', "--"));
        Ok(Self { root: cache.join(&name), locks: cache.join(".locks").join(name) })
    }

    /// The directory of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The commit to which `revision` points.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        let commit = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| super::is_commit(commit))
    }

    /// Points `revision` to `commit`.
    pub(super) fn point(&self, revision: &str, commit: &str) -> io::Result<()> {
        // A commit needs nothing that points to it.
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        // Branches may have slashes.
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, commit)
    }

    /// How many of the `size` bytes of a blob are there, in part or whole.
    pub(super) fn present(&self, etag: &Etag, size: u64) -> u64 {
        let length = |path: PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
        length(self.blob(etag)).max(length(self.part(etag))).min(size)
    }

    /// Makes `name` of the commit the blob.
    pub(super) fn link(&self, etag: &Etag, commit: &str, name: &str) -> Result<(), Failure> {
        let (dir, entry) = (self.snapshot(commit), self.snapshot(commit).join(name));
        let link = || {
            fs::create_dir_all(&dir)?;
            // A link to a blob that is gone.
            if fs::symlink_metadata(&entry).is_ok() && !entry.exists() {
                fs::remove_file(&entry)?;
            }
            std::os::unix::fs::symlink(Path::new("../../blobs").join(&etag.0), &entry)
        };
        // Another process may have been faster.
        link().or_else(|error| if entry.exists() { Ok(()) } else { Err(cannot("link", &entry, &error)) })
    }

    fn blob(&self, etag: &Etag) -> PathBuf {
        self.root.join("blobs").join(&etag.0)
    }

    fn part(&self, etag: &Etag) -> PathBuf {
        self.root.join("blobs").join(format!("{}.part", etag.0))
    }
}

/// What is there of a blob that is being downloaded. It stays when dropped, for the next attempt.
pub(super) struct Part {
    pub(super) etag: Etag,
    /// Bytes of the whole blob.
    pub(super) size: u64,
    /// Bytes that are there.
    pub(super) len: u64,
    path: PathBuf,
    blob: PathBuf,
    file: File,
    /// Of the bytes that are there, if the tag is that of the whole.
    digest: Option<Sha256>,
    /// Locked as long as it is open.
    _lock: File,
}

impl Part {
    /// Takes up the part of a blob of `size` bytes, for this process alone. `None` if the blob is there.
    pub(super) fn open(repo: &Repo, etag: &Etag, size: u64) -> Result<Option<Self>, Failure> {
        let (path, blob) = (repo.part(etag), repo.blob(etag));
        for dir in [&repo.locks, &repo.root.join("blobs")] {
            fs::create_dir_all(dir).map_err(|error| cannot("create", dir, &error))?;
        }
        let lock_path = repo.locks.join(format!("{}.lock", etag.0));
        let lock = OpenOptions::new().create(true).append(true).open(&lock_path);
        let lock = lock.map_err(|error| cannot("open", &lock_path, &error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::Held(format!(
                    "another process is downloading it and holds {}; try again when that has ended",
                    lock_path.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(cannot("lock", &lock_path, &error)),
        }
        if fs::metadata(&blob).is_ok_and(|metadata| metadata.len() == size) {
            return Ok(None);
        }
        let file = OpenOptions::new().create(true).read(true).append(true).open(&path);
        let file = file.map_err(|error| cannot("open", &path, &error))?;
        let digest = etag.is_sha256().then(Sha256::new);
        let mut part = Self { etag: etag.clone(), size, len: 0, path, blob, file, digest, _lock: lock };
        part.take_up().map_err(|error| cannot("read", &part.path, &error))?;
        if part.len > size {
            part.restart()?;
        }
        Ok(Some(part))
    }

    /// Counts, and digests where that is asked for, what an earlier run left.
    fn take_up(&mut self) -> io::Result<()> {
        let Some(digest) = &mut self.digest else {
            self.len = self.file.metadata()?.len();
            return Ok(());
        };
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = self.file.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            digest.update(&buffer[..n]);
            self.len += n as u64;
        }
    }

    /// Puts `bytes` behind what is there.
    pub(super) fn add(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.len + bytes.len() as u64 > self.size {
            let size = self.size;
            self.restart()?;
            return Err(Failure::Damaged(format!("expected {size} bytes, found more")));
        }
        self.file.write_all(bytes).map_err(|error| cannot("write", &self.path, &error))?;
        self.digest.iter_mut().for_each(|digest| digest.update(bytes));
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Throws away what is there.
    pub(super) fn restart(&mut self) -> Result<(), Failure> {
        self.file.set_len(0).map_err(|error| cannot("shorten", &self.path, &error))?;
        self.len = 0;
        self.digest = self.etag.is_sha256().then(Sha256::new);
        Ok(())
    }

    /// Makes a whole part the blob; what is not what its tag says is thrown away.
    pub(super) fn finish(mut self) -> Result<Etag, Failure> {
        if let Some(digest) = self.digest.take() {
            let found: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            if !found.eq_ignore_ascii_case(&self.etag.0) {
                self.restart()?;
                return Err(Failure::Damaged(format!(
                    "expected content with the SHA-256 {}, found {found}",
                    self.etag.0
                )));
            }
        }
        self.file.sync_all().map_err(|error| cannot("write", &self.path, &error))?;
        fs::rename(&self.path, &self.blob).map_err(|error| cannot("rename", &self.path, &error))?;
        Ok(self.etag)
    }
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::Here(format!("cannot {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_name_files_and_nothing_else() {
        let tag = |header: &str| Etag::parse(header).map(|etag| etag.0);
        for (header, expected) in [("\"a-1_b.c\"", "a-1_b.c"), ("W/\"0af\"", "0af"), ("0af", "0af")] {
            assert_eq!(tag(header).as_deref(), Some(expected));
        }
        let long = "a".repeat(MOST_TAG_BYTES + 1);
        for header in ["", "\"\"", "..", ".a", "../x", "/etc/passwd", "a/b", "a\\b", "a b", "a\0", "ä", long.as_str()]
        {
            assert_eq!(tag(header), None, "{header:?}");
        }
    }

    #[test]
    fn parts_count_as_room_that_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let repo = Repo::new(dir.path(), "org/name").unwrap();
        let etag = Etag::parse("tag").unwrap();
        assert_eq!(repo.present(&etag, 100), 0);
        Part::open(&repo, &etag, 100).unwrap().unwrap().add(&[0; 40]).unwrap();
        assert_eq!(repo.present(&etag, 100), 40);
        let mut part = Part::open(&repo, &etag, 100).unwrap().unwrap();
        part.add(&[0; 60]).unwrap();
        part.finish().unwrap();
        assert_eq!(repo.present(&etag, 100), 100);
        assert!(Part::open(&repo, &etag, 100).unwrap().is_none());
        assert_eq!(repo.present(&etag, 30), 30, "never more than is wanted");
    }
}

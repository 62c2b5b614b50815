//! A directory of a checkpoint that appears whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::disk::free_bytes;

/// What json files and headers need, generously.
const EXTRA_BYTES: u64 = 64 << 20;

/// `DIR.partial`, removed when dropped before it is kept. What a killed run left is taken away by the next one.
pub(crate) struct NewDir {
    pub(crate) path: PathBuf,
    dir: PathBuf,
}

impl NewDir {
    /// The directory that will be `dir`, which must be absent or empty, with room for `bytes` of `what`.
    pub(crate) fn create(dir: &Path, what: &str, bytes: u64) -> Result<Self> {
        let is_empty = |dir: &Path| fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
        if dir.exists() && !is_empty(dir) {
            bail!("{} is there already and not an empty directory; choose another name or remove it", dir.display());
        }
        let free =
            free_bytes(dir).with_context(|| format!("cannot tell how much room there is for {}", dir.display()))?;
        if bytes.saturating_add(EXTRA_BYTES) > free {
            let gigabytes = |bytes: u64| bytes as f64 / 1e9;
            bail!("{what} needs {:.1} GB, {} has room for {:.1} GB", gigabytes(bytes), dir.display(), gigabytes(free));
        }
        let name = dir.file_name().with_context(|| format!("{}: expected the name of a directory", dir.display()))?;
        let mut name = name.to_owned();
        name.push(".partial");
        let new = Self { path: dir.with_file_name(name), dir: dir.to_owned() };
        remove(&new.path);
        fs::create_dir_all(&new.path).with_context(|| format!("cannot create {}", new.path.display()))?;
        if fs::read_dir(&new.path)?.next().is_some() {
            let path = new.path.clone();
            bail!("{} holds files that this program did not write; remove it", path.display());
        }
        Ok(new)
    }

    /// Gives it its name.
    pub(crate) fn keep(self) -> Result<()> {
        fs::rename(&self.path, &self.dir)
            .with_context(|| format!("cannot rename {} to {}", self.path.display(), self.dir.display()))
    }
}

impl Drop for NewDir {
    fn drop(&mut self) {
        // Nothing is there any more once it has been renamed.
        remove(&self.path);
    }
}

/// Whether `name` is that of a small file of a checkpoint: config, tokenizer, template, licence, readme, code.
pub(crate) fn is_small_file(name: &str) -> bool {
    let extensions = [".json", ".jinja", ".txt", ".md", ".model", ".py", ".tiktoken"];
    ["LICENSE", "LICENCE", "NOTICE"].iter().any(|start| name.starts_with(start))
        || extensions.iter().any(|end| name.ends_with(end))
}

/// Removes a checkpoint's files from `dir`, and the directory if nothing else is in it.
pub(crate) fn remove(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = is_small_file(&name) || name.ends_with(".safetensors") || name.ends_with(".partial");
        if ours && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            // What cannot be removed makes the next step fail with a message.
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir(dir);
}

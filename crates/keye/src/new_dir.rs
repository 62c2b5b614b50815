//! A directory of a checkpoint that appears whole or not at all.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use keye_processor::{Claim, claim_dir};

use crate::disk::free_bytes;
use crate::units::bytes_text;

/// What json files and headers need, generously.
const EXTRA_BYTES: u64 = 64 << 20;

/// `DIR.partial`, removed when dropped before it is kept. No other run comes in while it lives; what a killed run left is taken
/// away by the next one.
pub(crate) struct NewDir {
    pub(crate) path: PathBuf,
    dir: PathBuf,
    kept: bool,
    _claim: Claim,
}

impl NewDir {
    /// The directory that will be `dir`, as [`check_new_dir`] wants it, with room for `bytes` of `what`.
    pub(crate) fn create(dir: &Path, what: &str, bytes: u64) -> Result<Self> {
        check_new_dir(dir)?;
        let dir = plain(dir);
        let name = dir.file_name().with_context(|| format!("{}: expected the name of a directory", dir.display()))?;
        let mut name = name.to_owned();
        name.push(".partial");
        let path = dir.with_file_name(name);
        let claim = claim_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        if matches!(claim, Claim::Taken) {
            bail!("{} is being written by another run; wait for it or choose another name", dir.display());
        }
        let new = Self { path, dir, kept: false, _claim: claim };
        // Another run may have finished it since.
        check_new_dir(&new.dir)?;
        clear(&new.path);
        if fs::read_dir(&new.path)?.next().is_some() {
            bail!("{} holds files that this program did not write; remove it", new.path.display());
        }
        let free = free_bytes(&new.path)
            .with_context(|| format!("cannot tell how much room there is for {}", new.dir.display()))?;
        if bytes.saturating_add(EXTRA_BYTES) > free {
            let (needed, free) = (bytes_text(bytes), bytes_text(free));
            bail!("{what} needs {needed}, {} has room for {free}", new.dir.display());
        }
        Ok(new)
    }

    /// Gives it its name. What cannot be renamed stays: it is whole.
    pub(crate) fn keep(mut self) -> Result<()> {
        self.kept = true;
        let (path, dir) = (self.path.display(), self.dir.display());
        fs::rename(&self.path, &self.dir)
            .with_context(|| format!("cannot rename {path} to {dir}; {path} has all files, move it"))
    }
}

impl Drop for NewDir {
    fn drop(&mut self) {
        if !self.kept {
            clear(&self.path);
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Refuses a directory that a finished one cannot take the place of, before the work.
///
/// # Errors
/// `dir` is there and not an empty directory, or is a link or a mount point; the message names the remedy.
pub fn check_new_dir(dir: &Path) -> Result<()> {
    let dir = plain(dir);
    let Ok(found) = fs::symlink_metadata(&dir) else { return Ok(()) };
    let above = dir.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let elsewhere = |above: fs::Metadata| above.dev() != found.dev();
    let fixed = match () {
        () if found.is_symlink() => Some("a link"),
        () if found.is_dir() && fs::metadata(above).is_ok_and(elsewhere) => Some("a mount point"),
        () => None,
    };
    if let Some(kind) = fixed {
        let (inside, dir) = (dir.join("model"), dir.display());
        bail!(
            "{dir} is {kind}, and no new directory takes its place; name one inside of it, like {}",
            inside.display()
        );
    }
    if !fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_none()) {
        bail!("{} is there already and not an empty directory; choose another name or remove it", dir.display());
    }
    Ok(())
}

/// Without a slash behind it, which would lead through a link.
fn plain(dir: &Path) -> PathBuf {
    dir.components().collect()
}

/// Whether `name` is that of a small file of a checkpoint: config, tokenizer, template, licence, readme, code.
pub(crate) fn is_small_file(name: &str) -> bool {
    let extensions = [".json", ".jinja", ".txt", ".md", ".model", ".py", ".tiktoken"];
    ["LICENSE", "LICENCE", "NOTICE"].iter().any(|start| name.starts_with(start))
        || extensions.iter().any(|end| name.ends_with(end))
}

/// Removes a checkpoint's files from `dir`.
fn clear(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = is_small_file(&name) || name.ends_with(".safetensors") || name.ends_with(".partial");
        if ours && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            // What cannot be removed makes the next step fail with a message.
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(dir: &Path) -> String {
        match NewDir::create(dir, "a model", 1) {
            Ok(_) => panic!("{} is taken", dir.display()),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn what_cannot_be_replaced_is_refused_before_the_work() {
        let root = tempfile::tempdir().unwrap();
        let (empty, link) = (root.path().join("empty"), root.path().join("link"));
        fs::create_dir(&empty).unwrap();
        std::os::unix::fs::symlink(&empty, &link).unwrap();
        for link in [link.clone(), link.join(""), link.join(".")] {
            let refusal = refusal(&link);
            assert!(refusal.contains("is a link") && refusal.contains("link/model"), "{refusal}");
        }
        NewDir::create(&link.join("model"), "a model", 1).unwrap().keep().unwrap();
        assert!(empty.join("model").is_dir());
        assert!(refusal(&empty).contains("not an empty directory"));
        assert!(!root.path().join("empty.partial").exists() && !root.path().join("link.partial").exists());
        #[cfg(target_os = "linux")]
        assert!(refusal(Path::new("/proc")).contains("is a mount point"));
    }

    #[test]
    fn two_runs_do_not_share_a_directory() {
        let root = tempfile::tempdir().unwrap();
        let (dir, partial) = (root.path().join("m"), root.path().join("m.partial"));
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("model.safetensors"), "of a killed run").unwrap();
        let first = NewDir::create(&dir, "a model", 1).unwrap();
        assert_eq!(fs::read_dir(&partial).unwrap().count(), 0);
        fs::write(first.path.join("config.json"), "{}").unwrap();
        let second = refusal(&dir);
        assert!(second.contains(dir.to_str().unwrap()) && second.contains("another run"), "{second}");
        assert!(partial.join("config.json").exists());
        drop(first);
        assert!(!partial.exists());
        let third = NewDir::create(&dir, "a model", 1).unwrap();
        fs::write(third.path.join("config.json"), "{}").unwrap();
        third.keep().unwrap();
        assert!(dir.join("config.json").exists() && !partial.exists());
    }

    #[test]
    fn a_finished_directory_that_cannot_be_renamed_stays() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("m");
        let new = NewDir::create(&dir, "a model", 1).unwrap();
        fs::write(new.path.join("config.json"), "{}").unwrap();
        fs::write(&dir, "in the way").unwrap();
        let error = format!("{:#}", new.keep().unwrap_err());
        assert!(error.contains("m.partial has all files"), "{error}");
        assert!(root.path().join("m.partial/config.json").exists());
    }

    #[test]
    fn room_is_told_in_suitable_units() {
        let root = tempfile::tempdir().unwrap();
        let error = match NewDir::create(&root.path().join("m"), "a model", u64::MAX / 2) {
            Ok(_) => panic!("there is no such disk"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains("has room for") && !error.contains(" 0.0 GB"), "{error}");
        assert!(!root.path().join("m.partial").exists());
    }
}

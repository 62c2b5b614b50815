//! Where a trace goes: into the place of another trace, never of a device or of what is read.

use std::path::{Path, PathBuf};

use anyhow::Result;
use keye::{CheckpointFiles, MediaItem, Source};

use super::super::args::check_output;
use super::super::failure::Usage;

/// Refuses what is no name of a file, and files among `inputs`.
pub fn check(out: &Path, inputs: impl IntoIterator<Item = PathBuf>) -> Result<()> {
    check_output(out)?;
    let Ok(place) = out.canonicalize() else { return Ok(()) };
    let out = out.display();
    if !place.is_file() {
        return Err(Usage(format!("--out {out} is no regular file; the name of a file is expected")).into());
    }
    match inputs.into_iter().any(|input| input.canonicalize().is_ok_and(|input| input == place)) {
        true => Err(Usage(format!("--out {out} is an input too; choose another name")).into()),
        false => Ok(()),
    }
}

/// Refuses places in the model's directory, where a new file of tensors would be taken for one of the model, and the files that
/// its links lead to.
pub fn check_model(out: &Path, files: &CheckpointFiles) -> Result<()> {
    let CheckpointFiles::Directory(dir) = files else { return Ok(()) };
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let inside = |dir: PathBuf| folder.canonicalize().is_ok_and(|folder| folder.starts_with(dir));
    if dir.canonicalize().is_ok_and(inside) {
        let (out, dir) = (out.display(), dir.display());
        return Err(
            Usage(format!("--out {out} is in the model's directory {dir}; choose a place outside of it")).into()
        );
    }
    check(out, std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()))
}

/// Refuses files of media; relative paths start at `root`.
pub fn check_media(out: &Path, media: &[MediaItem], root: &Path) -> Result<()> {
    let mut paths = Vec::new();
    media.iter().for_each(|item| gather(&item.source, root, &mut paths));
    check(out, paths)
}

fn gather(source: &Source, root: &Path, paths: &mut Vec<PathBuf>) {
    match source {
        Source::Path(path) => {
            paths.push(root.join(path));
            // The loader reads escapes where there is no file of the name as it is.
            paths.extend(path.to_str().and_then(unescaped).map(|plain| root.join(plain)));
        }
        Source::Frames(frames) => frames.iter().for_each(|frame| gather(&frame.source, root, paths)),
        Source::Url(_) | Source::Bytes(_) => {}
    }
}

/// A name with the characters that its escapes like `%20` stand for.
fn unescaped(name: &str) -> Option<String> {
    let mut parts = name.split('%');
    let mut plain = parts.next()?.as_bytes().to_vec();
    for part in parts {
        match part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => plain.extend([&[byte], &part.as_bytes()[2..]].concat()),
            None => plain.extend([b"%", part.as_bytes()].concat()),
        }
    }
    String::from_utf8(plain).ok()
}

//! Naming and opening sources.

use std::borrow::Cow;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{DecodeSliceError, Engine};

use crate::{Access, Limits, MediaError, Progress, Source};

impl Source {
    /// Reads a source as the messages of `keye-vl-utils` name it: `http://` or `https://`, `file://` and a path (the
    /// first seven characters are cut; escapes are read only where there is no file of the name as it is),
    /// `data:...;base64,...`, or else a path.
    ///
    /// # Errors
    /// [`MediaError::Unreadable`] for a data URL that is no base64.
    pub fn parse(text: &str) -> Result<Self, MediaError> {
        let scheme = |prefix: &str| text.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix));
        if scheme("http://") || scheme("https://") {
            Ok(Source::Url(text.to_owned()))
        } else if scheme("file://") {
            Ok(Source::Path(PathBuf::from(&text["file://".len()..])))
        } else if scheme("data:") {
            let input = || format!("data URL of {} characters", text.len());
            let unreadable = |reason: String| MediaError::Unreadable { input: input(), reason };
            let Some((head, body)) = text.split_once(',') else {
                return Err(unreadable("it has no comma; expected data:TYPE;base64,DATA".into()));
            };
            if !head.to_ascii_lowercase().ends_with(";base64") {
                return Err(unreadable(format!("it begins with {head:.60}; expected data:TYPE;base64,DATA")));
            }
            let bytes =
                decode_base64(body).map_err(|e| unreadable(format!("what follows the comma is no base64: {e}")))?;
            Ok(Source::Bytes(bytes))
        } else {
            Ok(Source::Path(PathBuf::from(text)))
        }
    }

    /// The source's name in errors.
    pub(crate) fn name(&self) -> String {
        match self {
            Source::Path(path) => path_name(path),
            Source::Url(url) => url.clone(),
            Source::Bytes(bytes) => format!("data of {} bytes", bytes.len()),
            Source::Frames(list) => match list.first() {
                Some(first) => format!("list of {} frames from {}", list.len(), first.source.name()),
                None => "list of no frames".to_owned(),
            },
        }
    }
}

/// A path, cut where it is far longer than any: base64 without the head of a data URL is taken for one.
fn path_name(path: &Path) -> String {
    const LONGEST: usize = 4096;
    let name = path.display().to_string();
    match name.char_indices().nth(60) {
        Some((at, _)) if name.len() > LONGEST => {
            let head = &name[..at];
            format!("{head}... ({} bytes: no path is as long; bytes are sent as data:TYPE;base64,DATA)", name.len())
        }
        _ => name,
    }
}

/// Base64 of either alphabet, with or without padding and white space. Bodies are large: what is plain already is decoded
/// in place, and straight into the memory that is kept.
fn decode_base64(text: &str) -> Result<Arc<[u8]>, String> {
    let config = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    let plain = match text.bytes().any(|b| b.is_ascii_whitespace() || b == b'-' || b == b'_') {
        false => Cow::Borrowed(text.as_bytes()),
        true => Cow::Owned(text.bytes().filter(|b| !b.is_ascii_whitespace()).map(standard).collect()),
    };
    // Four characters are three bytes; a last group of two or three is one byte or two.
    let padding = plain.iter().rev().take_while(|b| **b == b'=').count();
    let length = (plain.len() - padding) / 4 * 3 + ((plain.len() - padding) % 4).saturating_sub(1);
    let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, length).collect();
    let target = Arc::get_mut(&mut bytes).ok_or("its memory is shared")?;
    match GeneralPurpose::new(&base64::alphabet::STANDARD, config).decode_slice(&*plain, target) {
        Ok(decoded) if decoded == length => Ok(bytes),
        Ok(decoded) => Err(format!("{decoded} bytes came of {length}")),
        Err(DecodeSliceError::DecodeError(error)) => Err(error.to_string()),
        Err(DecodeSliceError::OutputSliceTooSmall) => Err(format!("it is longer than {length} bytes")),
    }
}

/// A character of the URL alphabet in the standard one.
fn standard(character: u8) -> u8 {
    match character {
        b'-' => b'+',
        b'_' => b'/',
        other => other,
    }
}

/// A source that passed the rules of [`Access`] and the limit of bytes.
pub(crate) enum Opened {
    /// In memory.
    Bytes(Arc<[u8]>),
    /// A regular file at its start: the caller's, or an unlinked one that holds what was fetched.
    File(File),
}

/// What opening needs besides the source.
pub(crate) struct Opener<'a> {
    pub access: &'a Access,
    pub limits: &'a Limits,
    pub deadline: Instant,
}

impl Opener<'_> {
    /// Opens anything but a frame list.
    pub(crate) fn open(
        &self,
        source: &Source,
        progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Opened, MediaError> {
        let name = source.name();
        match source {
            Source::Bytes(bytes) => {
                within_limit(&name, bytes.len() as u64, self.limits.bytes)?;
                Ok(Opened::Bytes(bytes.clone()))
            }
            Source::Path(path) if path.as_os_str().is_empty() => {
                let reason = "the name is empty; expected a path or a URL".to_owned();
                Err(MediaError::Unreadable { input: "\"\"".to_owned(), reason })
            }
            Source::Path(path) => self.open_named(path, &name).map(Opened::File),
            Source::Url(url) => self.fetch(url, progress).map(Opened::File),
            Source::Frames(_) => {
                Err(MediaError::Unreadable { input: name, reason: "a frame list inside a frame list".into() })
            }
        }
    }

    /// A file by its name, or by the name without escapes when there is none: `file://` URLs that programs make have them,
    /// those that the reference takes have not. The other name passes the same rules, and when it does not, nothing is told
    /// about it.
    fn open_named(&self, path: &Path, name: &str) -> Result<File, MediaError> {
        match self.open_path(path, name) {
            Err(MediaError::Read { input, source }) if source.kind() == ErrorKind::NotFound => {
                let plain = path.to_str().and_then(percent_decoded);
                let found = plain.and_then(|plain| self.open_path(Path::new(&plain), &plain).ok());
                found.ok_or(MediaError::Read { input, source })
            }
            result => result,
        }
    }

    fn open_path(&self, path: &Path, name: &str) -> Result<File, MediaError> {
        let denied = |reason: &str| MediaError::Denied { input: name.to_owned(), reason: reason.to_owned() };
        let failed = |source| MediaError::Read { input: name.to_owned(), source };
        if self.access.no_files {
            return Err(denied("files are not opened here; send the bytes"));
        }
        let mut target = match &self.access.root {
            Some(root) => root.join(path),
            None => path.to_path_buf(),
        };
        let mut inside = None;
        if self.access.confine {
            let root = self.access.root.as_deref().ok_or_else(|| denied("no media root is set"))?;
            let outside = || denied("it lies outside of the media root");
            // Before anything is looked up, so that refusals tell nothing about files outside.
            if leaves(path, root) {
                return Err(outside());
            }
            let root = root.canonicalize().map_err(failed)?;
            target = target.canonicalize().map_err(failed)?;
            if !target.starts_with(&root) {
                return Err(outside());
            }
            inside = Some(root);
        }
        let irregular = || MediaError::Unreadable { input: name.to_owned(), reason: "not a regular file".into() };
        if !std::fs::metadata(&target).map_err(failed)?.is_file() {
            return Err(irregular());
        }
        let file = open_nonblocking(&target).map_err(failed)?;
        // Again on the opened file: the path may have changed hands in between.
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(irregular());
        }
        if let (Some(root), Some(opened)) = (inside, path_of(&file))
            && !opened.starts_with(&root)
        {
            return Err(denied("it lies outside of the media root"));
        }
        within_limit(name, metadata.len(), self.limits.bytes)?;
        Ok(file)
    }

    #[cfg(not(feature = "remote"))]
    fn fetch(&self, url: &str, _progress: &mut dyn FnMut(Progress) -> bool) -> Result<File, MediaError> {
        let reason = "this program was built without the feature `remote`".to_owned();
        Err(MediaError::Denied { input: url.to_owned(), reason })
    }

    #[cfg(feature = "remote")]
    fn fetch(&self, url: &str, progress: &mut dyn FnMut(Progress) -> bool) -> Result<File, MediaError> {
        if !self.access.remote {
            let reason = "remote media are off (a server allows them by --allow-remote-media)".to_owned();
            return Err(MediaError::Denied { input: url.to_owned(), reason });
        }
        crate::remote::fetch(url, self.access.remote_policy.as_ref(), self.limits.bytes, self.deadline, progress)
    }
}

impl Opened {
    /// A file with these bytes, for readers that need one.
    pub(crate) fn into_file(self) -> std::io::Result<File> {
        match self {
            Opened::File(file) => Ok(file),
            Opened::Bytes(bytes) => {
                let mut file = tempfile::tempfile()?;
                file.write_all(&bytes)?;
                file.rewind()?;
                Ok(file)
            }
        }
    }

    /// The first bytes, at most `most`.
    pub(crate) fn head(&mut self, most: usize) -> std::io::Result<Vec<u8>> {
        match self {
            Opened::Bytes(bytes) => Ok(bytes[..bytes.len().min(most)].to_vec()),
            Opened::File(file) => {
                let mut head = Vec::new();
                file.take(most as u64).read_to_end(&mut head)?;
                file.rewind()?;
                Ok(head)
            }
        }
    }

    /// Everything in memory, at most `most` bytes.
    pub(crate) fn into_bytes(self, name: &str, most: u64) -> Result<Arc<[u8]>, MediaError> {
        let failed = |source| MediaError::Read { input: name.to_owned(), source };
        match self {
            Opened::Bytes(bytes) => {
                within_limit(name, bytes.len() as u64, most)?;
                Ok(bytes)
            }
            Opened::File(file) => {
                within_limit(name, file.metadata().map_err(failed)?.len(), most)?;
                let mut bytes = Vec::new();
                // The file may grow while it is read.
                file.take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
                within_limit(name, bytes.len() as u64, most)?;
                Ok(bytes.into())
            }
        }
    }
}

pub(crate) fn within_limit(name: &str, found: u64, limit: u64) -> Result<(), MediaError> {
    if found > limit {
        return Err(MediaError::Limit { input: name.to_owned(), what: "the number of bytes", found, limit });
    }
    Ok(())
}

/// A name without its escapes (`%20`), if it has any and is text then.
fn percent_decoded(name: &str) -> Option<String> {
    let (first, rest) = name.split_once('%')?;
    let mut bytes = first.as_bytes().to_vec();
    for part in rest.split('%') {
        let digits = part.get(..2).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}

/// Whether a path, read letter by letter, leads out of `root`.
fn leaves(path: &Path, root: &Path) -> bool {
    let path = match path.is_absolute() {
        false => path,
        true => match path.strip_prefix(root) {
            Ok(rest) => rest,
            // Another spelling of the root is left to the check of the resolved path.
            Err(_) => return !root.canonicalize().is_ok_and(|root| path.starts_with(root)),
        },
    };
    let mut depth = 0usize;
    for component in path.components() {
        match component {
            Component::Normal(_) => depth += 1,
            Component::ParentDir if depth == 0 => return true,
            Component::ParentDir => depth -= 1,
            _ => {}
        }
    }
    false
}

/// Opens without waiting for the other end, should the path be a FIFO by now.
#[cfg(unix)]
fn open_nonblocking(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

#[cfg(not(unix))]
fn open_nonblocking(path: &Path) -> std::io::Result<File> {
    File::open(path)
}

/// Where an open file lies, as far as the system tells.
#[cfg(target_os = "linux")]
fn path_of(file: &File) -> Option<PathBuf> {
    use std::os::fd::AsRawFd;
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()
}

#[cfg(not(target_os = "linux"))]
fn path_of(_file: &File) -> Option<PathBuf> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FrameItem;

    fn open(source: Source, access: &Access, limits: &Limits) -> Result<Vec<u8>, MediaError> {
        let opener = Opener { access, limits, deadline: Instant::now() + limits.time };
        opener.open(&source, &mut |_| true)?.into_bytes("test", u64::MAX).map(|bytes| bytes.to_vec())
    }

    #[test]
    fn base64_that_is_taken_for_a_path_is_not_told_whole() {
        let name = Source::parse(&"iVBORw0KGgo".repeat(1000)).unwrap().name();
        assert!(name.len() < 200 && name.contains("11000 bytes") && name.contains("data:TYPE;base64"), "{name}");
    }

    #[test]
    fn names_are_read_as_the_reference_reads_them() {
        assert_eq!(Source::parse("a b.png").unwrap(), Source::Path("a b.png".into()));
        assert_eq!(Source::parse("file:///x/a%20b.png").unwrap(), Source::Path("/x/a%20b.png".into()));
        assert_eq!(Source::parse("https://x/y").unwrap(), Source::Url("https://x/y".into()));
        assert_eq!(Source::parse("").unwrap(), Source::Path("".into()));
    }

    #[test]
    fn escapes_of_names_are_read_where_the_name_itself_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("a b.txt"), "in").unwrap();
        std::fs::write(root.join("c d.txt"), "plain").unwrap();
        std::fs::write(root.join("c%20d.txt"), "as it is").unwrap();
        std::fs::write(folder.path().join("out é.txt"), "out").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(folder.path().join("out é.txt"), root.join("a link.txt")).unwrap();
        let access = Access { root: Some(root.clone()), confine: true, ..Access::default() };
        let read = |name: &str| open(Source::parse(name).unwrap(), &access, &Limits::default());
        for name in ["file://a%20b.txt".to_owned(), format!("file://{}/a%20b.txt", root.display())] {
            assert_eq!(read(&name).unwrap(), b"in");
        }
        assert_eq!(read("file://c%20d.txt").unwrap(), b"as it is");
        let outside =
            ["file://%2e%2e/out%20%C3%A9.txt", "file://sub/%2E%2e/%2e%2e/out%20%C3%A9.txt", "file://a%20link.txt"];
        for name in ["file://a%20c.txt", "file://100%.txt", "file://%é", "file://a%00b"].into_iter().chain(outside) {
            let told = read(name).unwrap_err().to_string();
            assert!(told.contains("cannot read") && !told.contains("out é"), "{told}");
        }
        assert!(read("").unwrap_err().to_string().starts_with("\"\": the name is empty; expected a path or a URL"));
    }

    #[test]
    fn errors_tell_data_and_lists_apart() {
        let list = ["a.png", "b.png"].map(|name| FrameItem { source: Source::Path(name.into()), options: None });
        assert_eq!(Source::Frames(list.into()).name(), "list of 2 frames from a.png");
        assert_eq!(Source::Frames(Vec::new()).name(), "list of no frames");
        assert_eq!(Source::parse("data:;base64,/+8A").unwrap().name(), "data of 3 bytes");
    }

    #[test]
    fn data_urls_in_all_spellings() {
        for body in ["/+8A", "/+8A\n", "_-8A", " /+ 8A"] {
            let url = format!("data:image/png;base64,{body}");
            assert_eq!(Source::parse(&url).unwrap(), Source::Bytes(Arc::from([0xff, 0xef, 0x00])), "{body:?}");
        }
        for body in ["/w==", "/w", "/w="] {
            assert_eq!(
                Source::parse(&format!("data:;base64,{body}")).unwrap(),
                Source::Bytes(Arc::from([0xff])),
                "{body:?}"
            );
        }
        let long: Vec<u8> = (0..=255).cycle().take(1000).collect();
        for length in 995..1000 {
            let text = base64::prelude::BASE64_STANDARD.encode(&long[..length]);
            let lines = text.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect::<Vec<_>>();
            for text in [&text, &*lines.join("\n"), text.trim_end_matches('=')] {
                let source = Source::parse(&format!("data:;base64,{text}")).unwrap();
                assert_eq!(source, Source::Bytes(Arc::from(&long[..length])));
            }
        }
        let bad =
            ["data:image/png;base64", "data:image/png,abc", "data:;base64,é", "data:;base64,a", "data:;base64,a=bc"];
        for url in bad.into_iter().chain(["data:;base64,=", "data:;base64,AAAAA", "data:;base64,AA=A"]) {
            assert!(matches!(Source::parse(url), Err(MediaError::Unreadable { .. })), "{url}");
        }
    }

    #[test]
    fn a_media_root_confines() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(root.join("sub/in.txt"), "in").unwrap();
        std::fs::write(folder.path().join("out.txt"), "out").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(folder.path().join("out.txt"), root.join("link.txt")).unwrap();
        let access = Access { root: Some(root.clone()), confine: true, ..Access::default() };
        let limits = Limits::default();
        let path = |p: &str| open(Source::Path(p.into()), &access, &limits);
        assert_eq!(path("sub/in.txt").unwrap(), b"in");
        assert_eq!(path("sub/../sub/in.txt").unwrap(), b"in");
        assert_eq!(path(root.join("sub/in.txt").to_str().unwrap()).unwrap(), b"in");
        for outside in ["../out.txt", "sub/../../out.txt", "link.txt", "/etc/passwd", "/nonexistent"] {
            assert!(matches!(path(outside), Err(MediaError::Denied { .. })), "{outside}: {:?}", path(outside));
        }
        assert!(matches!(path("missing.txt"), Err(MediaError::Read { .. })));
        let open_access = Access { root: Some(root), ..Access::default() };
        assert_eq!(open(Source::Path("../out.txt".into()), &open_access, &limits).unwrap(), b"out");
    }

    #[test]
    fn only_regular_files_within_the_limits() {
        let folder = tempfile::tempdir().unwrap();
        let (access, limits) = (Access::default(), Limits { bytes: 3, ..Limits::default() });
        let path = folder.path().join("file");
        std::fs::write(&path, "1234").unwrap();
        assert!(matches!(open(Source::Path(path), &access, &limits), Err(MediaError::Limit { found: 4, .. })));
        let bytes = Source::Bytes(Arc::from(*b"1234"));
        assert!(matches!(open(bytes, &access, &limits), Err(MediaError::Limit { found: 4, limit: 3, .. })));
        for irregular in [folder.path().to_path_buf(), "/dev/zero".into()] {
            let got = open(Source::Path(irregular), &access, &limits);
            assert!(matches!(got, Err(MediaError::Unreadable { .. })), "{got:?}");
        }
        let none = Access { no_files: true, ..Access::default() };
        assert!(matches!(open(Source::Path("x".into()), &none, &limits), Err(MediaError::Denied { .. })));
        assert!(matches!(open(Source::Url("http://x/".into()), &access, &limits), Err(MediaError::Denied { .. })));
    }
}

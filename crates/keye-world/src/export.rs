//! Clips and stills as files.

use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Clip;

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// The encoder of pictures.
    #[error("{}: {source}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// The encoder's word.
        source: image::ImageError,
    },
    /// `ffmpeg` is missing or failed.
    #[error("{}: ffmpeg, which writes clips: {reason}", path.display())]
    Ffmpeg {
        /// The file.
        path: PathBuf,
        /// What it said, and what helps.
        reason: String,
    },
}

/// What a clip was encoded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoder {
    /// H.264 at a quality that keeps small things.
    H264,
    /// MPEG-4 part 2, where `ffmpeg` was built without H.264.
    Mpeg4,
}

impl Encoder {
    /// In the order in which they are tried.
    const ALL: [Self; 2] = [Self::H264, Self::Mpeg4];

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::H264 => &["-c:v", "libx264", "-preset", "veryfast", "-crf", "8"],
            Self::Mpeg4 => &["-c:v", "mpeg4", "-q:v", "2"],
        }
    }
}

/// Begins what `ffmpeg` says of an encoder that it was built without.
const UNKNOWN: &str = "Unknown encoder";
/// What helps where `ffmpeg` does not do.
const REMEDY: &str = "install it (apt-get install -y ffmpeg; brew install ffmpeg), or let KEYE_FFMPEG name it";

/// Writes a clip as an mp4 file, by a child process `ffmpeg` (`$KEYE_FFMPEG`, else of the search path). Tells what it is
/// encoded with.
///
/// # Errors
/// Without `ffmpeg`, and when it cannot write.
pub fn write_mp4(clip: &Clip, path: &Path) -> Result<Encoder, WriteError> {
    write_mp4_at(clip, [clip.width(), clip.height()], path)
}

/// Writes a clip as [`write_mp4`] does, every frame squeezed or stretched to `size`: width and height, even numbers of
/// pixels.
///
/// # Errors
/// Without `ffmpeg`, and when it cannot write.
pub fn write_mp4_at(clip: &Clip, size: [u32; 2], path: &Path) -> Result<Encoder, WriteError> {
    let program = std::env::var_os("KEYE_FFMPEG").filter(|name| !name.is_empty()).unwrap_or_else(|| "ffmpeg".into());
    write_with(&program, clip, size, path).map_err(|reason| WriteError::Ffmpeg { path: path.into(), reason })
}

/// The second encoder is for programs that do not know the first one, not for whatever else fails: a clip must not look
/// different because a disk was full once.
fn write_with(program: &OsStr, clip: &Clip, size: [u32; 2], path: &Path) -> Result<Encoder, String> {
    let mut unknown = String::new();
    for encoder in Encoder::ALL {
        match encode(program, clip, size, path, encoder) {
            Err(reason) if reason.contains(UNKNOWN) => unknown = reason,
            result => return result.map(|()| encoder),
        }
    }
    Err(format!("{unknown}; {REMEDY}"))
}

fn encode(
    program: &OsStr,
    clip: &Clip,
    [width, height]: [u32; 2],
    path: &Path,
    encoder: Encoder,
) -> Result<(), String> {
    let size = format!("{}x{}", clip.width(), clip.height());
    let scale = format!("scale={width}:{height}:flags=bicubic,setsar=1");
    let scaled: &[&str] = if [width, height] == [clip.width(), clip.height()] { &[] } else { &["-vf", &scale] };
    let rate = clip.fps().to_string();
    // A name that begins with a dash, or looks like a protocol, is still a file.
    let target =
        [OsString::from("file:"), path.as_os_str().to_owned()].iter().map(OsString::as_os_str).collect::<OsString>();
    let mut command = Command::new(program);
    command
        .args(["-hide_banner", "-loglevel", "error", "-y", "-threads", "1"])
        .args(["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", &size, "-r", &rate, "-i", "pipe:0"])
        .args(scaled)
        .args(encoder.arguments())
        .args(["-pix_fmt", "yuv420p", "-threads", "1", "-f", "mp4"])
        .arg(target)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // A Ctrl-C of the terminal does not reach it: the caller decides what ends.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!("{} was not found; {REMEDY}", Path::new(program).display()),
        _ => format!("cannot run {}: {error}", Path::new(program).display()),
    })?;
    let mut input = child.stdin.take().ok_or("it has no standard input")?;
    let fed = clip.frames().try_for_each(|frame| input.write_all(&frame));
    drop(input);
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    match (output.status.success(), fed) {
        (true, Ok(())) => Ok(()),
        (true, Err(error)) => Err(error.to_string()),
        (false, _) => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Writes the first frame as a PNG file.
///
/// # Errors
/// When the file cannot be written.
pub fn write_png(clip: &Clip, path: &Path) -> Result<(), WriteError> {
    let (width, height) = (clip.width(), clip.height());
    image::save_buffer_with_format(path, &clip.frame(0), width, height, image::ColorType::Rgb8, image::ImageFormat::Png)
        .map_err(|source| WriteError::Picture { path: path.into(), source })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{Split, World};

    /// A program that writes down its process, its group and its arguments in a line of `calls`, then does what `body` says.
    fn fake(dir: &Path, body: &str) -> PathBuf {
        let path = dir.join("ffmpeg");
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = -version ] && exit\necho $$ $(cut -d' ' -f5 /proc/$$/stat) $* >> {}\n{body}\n",
            dir.join("calls").display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        // A child that another test starts just now may still hold the script open for writing, which forbids running it.
        while Command::new(&path).arg("-version").output().is_err() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        path
    }

    /// What came of writing a clip with a program that does what `body` says, and its calls.
    fn written(body: &str) -> (Result<Encoder, String>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let program = fake(dir.path(), body);
        let clip = World::new(Split::Test).clip(0).media[0].1.clip().clone();
        let result = write_with(program.as_os_str(), &clip, [clip.width(), clip.height()], &dir.path().join("a.mp4"));
        let calls = fs::read_to_string(dir.path().join("calls")).unwrap();
        (result, calls.lines().map(str::to_owned).collect())
    }

    #[test]
    fn the_other_encoder_is_for_programs_without_the_first() {
        let without =
            "case \"$*\" in *libx264*) echo \"Unknown encoder 'libx264'\" >&2; exit 1;; esac; cat > /dev/null";
        let (result, calls) = written(without);
        assert_eq!((result, calls.len()), (Ok(Encoder::Mpeg4), 2));
        assert!(calls[0].contains("libx264") && calls[1].contains(" mpeg4 "), "{calls:?}");
        let (result, calls) = written("cat > /dev/null");
        assert_eq!((result, calls.len()), (Ok(Encoder::H264), 1));
        let (result, calls) = written("echo \"Unknown encoder 'any'\" >&2; exit 1");
        assert!(
            result.is_err_and(|reason| reason.contains("any") && reason.contains("install it")) && calls.len() == 2
        );

        // What a Ctrl-C does to it, and a full disk.
        for (body, told) in [("exit 255", "255"), ("echo No space left on device >&2; exit 1", "No space left")] {
            let (result, calls) = written(body);
            assert!(result.as_ref().is_err_and(|reason| reason.contains(told)), "{result:?}");
            assert_eq!(calls.len(), 1, "{calls:?}");
        }
    }

    #[test]
    fn the_child_has_its_own_group() {
        let (_, calls) = written("cat > /dev/null");
        let ids: Vec<&str> = calls[0].split(' ').take(2).collect();
        assert_eq!(ids[0], ids[1]);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let clip = World::new(Split::Test).clip(0).media[0].1.clip().clone();
        let reason = write_with("/nowhere/ffmpeg".as_ref(), &clip, [64, 64], Path::new("a.mp4")).unwrap_err();
        assert!(reason.starts_with("/nowhere/ffmpeg was not found; install it"), "{reason}");
        assert!(reason.contains("KEYE_FFMPEG"), "{reason}");
    }
}

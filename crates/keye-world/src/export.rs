//! Clips and stills as files.

use std::ffi::OsString;
use std::io::Write;
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
    #[error("{}: {reason}; clips are written by ffmpeg: install it, or let KEYE_FFMPEG name it", path.display())]
    Ffmpeg {
        /// The file.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
}

/// Encoders in the order in which they are tried: H.264 at a quality that keeps small things, else MPEG-4 part 2.
const ENCODERS: [&[&str]; 2] =
    [&["-c:v", "libx264", "-preset", "veryfast", "-crf", "8"], &["-c:v", "mpeg4", "-q:v", "2"]];

/// Writes a clip as an mp4 file, by a child process `ffmpeg` (`$KEYE_FFMPEG`, else of the search path).
///
/// # Errors
/// Without `ffmpeg`, and when it cannot write.
pub fn write_mp4(clip: &Clip, path: &Path) -> Result<(), WriteError> {
    write_mp4_at(clip, [clip.width(), clip.height()], path)
}

/// Writes a clip as [`write_mp4`] does, every frame squeezed or stretched to `size`: width and height, even numbers of
/// pixels.
///
/// # Errors
/// Without `ffmpeg`, and when it cannot write.
pub fn write_mp4_at(clip: &Clip, size: [u32; 2], path: &Path) -> Result<(), WriteError> {
    let mut failure = String::new();
    for encoder in ENCODERS {
        match encode(clip, size, path, encoder) {
            Ok(()) => return Ok(()),
            Err(reason) => failure = reason,
        }
    }
    Err(WriteError::Ffmpeg { path: path.into(), reason: failure })
}

fn encode(clip: &Clip, [width, height]: [u32; 2], path: &Path, encoder: &[&str]) -> Result<(), String> {
    let program = std::env::var_os("KEYE_FFMPEG").filter(|name| !name.is_empty()).unwrap_or_else(|| "ffmpeg".into());
    let size = format!("{}x{}", clip.width(), clip.height());
    let scale = format!("scale={width}:{height}:flags=bicubic,setsar=1");
    let scaled: &[&str] = if [width, height] == [clip.width(), clip.height()] { &[] } else { &["-vf", &scale] };
    let rate = clip.fps().to_string();
    // A name that begins with a dash, or looks like a protocol, is still a file.
    let target =
        [OsString::from("file:"), path.as_os_str().to_owned()].iter().map(OsString::as_os_str).collect::<OsString>();
    let mut child = Command::new(program)
        .args(["-hide_banner", "-loglevel", "error", "-y", "-threads", "1"])
        .args(["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", &size, "-r", &rate, "-i", "pipe:0"])
        .args(scaled)
        .args(encoder)
        .args(["-pix_fmt", "yuv420p", "-threads", "1", "-f", "mp4"])
        .arg(target)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut input = child.stdin.take().ok_or("it has no standard input")?;
    let fed = clip.frames().try_for_each(|frame| input.write_all(&frame));
    drop(input);
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    match (output.status.success(), fed) {
        (true, Ok(())) => Ok(()),
        (true, Err(error)) => Err(error.to_string()),
        (false, _) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
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

//! Makes clips with the local `ffmpeg`, and decodes them in full to compare with.
#![allow(dead_code, reason = "two test binaries use different parts")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs `ffmpeg` with these words.
pub fn ffmpeg(words: &[&str]) -> Output {
    let ffmpeg = std::env::var_os("KEYE_FFMPEG").unwrap_or("ffmpeg".into());
    Command::new(ffmpeg).args(["-nostdin", "-hide_banner", "-loglevel", "error", "-y"]).args(words).output().unwrap()
}

/// A moving test picture.
pub fn pattern(height: u32, width: u32, fps: u32, seconds: f64) -> String {
    format!("testsrc2=size={width}x{height}:rate={fps}:duration={seconds}")
}

/// Writes `dir/name` from a source of ffmpeg's lavfi with these output options. `None` when this ffmpeg lacks the
/// encoder; every other failure is one of the test.
pub fn make(dir: &Path, name: &str, source: &str, options: &[&str]) -> Option<PathBuf> {
    let path = dir.join(name);
    let target = path.to_str().unwrap();
    let output = ffmpeg(&[&["-f", "lavfi", "-i", source], options, &[target]].concat());
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && messages.contains("Unknown encoder") {
        eprintln!("{name}: left out, this ffmpeg lacks the encoder");
        return None;
    }
    assert!(output.status.success(), "{name}: {messages}");
    Some(path)
}

/// Every frame of a clip as `[height, width, 3]` bytes, by a full decode.
pub fn all_frames(path: &Path, height: u32, width: u32) -> Vec<Vec<u8>> {
    let decode = |every_frame| {
        let path = path.to_str().unwrap();
        ffmpeg(&["-i", path, "-map", "0:V:0", every_frame, "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"])
    };
    let mut output = decode("-fps_mode");
    if output.stdout.is_empty() {
        output = decode("-vsync");
    }
    let size = height as usize * width as usize * 3;
    assert!(output.stdout.len() >= size && output.stdout.len() % size == 0, "frames of another size than expected");
    output.stdout.chunks(size).map(<[u8]>::to_vec).collect()
}

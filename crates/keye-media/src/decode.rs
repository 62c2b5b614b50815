//! Exactly the wanted frames of a clip, as RGB, from an `ffmpeg` child.
//!
//! A `select` filter picks frames by their number, so the frames are those that a full decode gives at these indices;
//! the conversion to RGB is left at swscale's defaults, with which it equals decord's byte for byte.
//!
//! **Hardware.** What decodes H.264 or HEVC in hardware gives the same pixels in another order (`nv12` where the CPU has
//! `yuv420p`), and swscale rounds differently from there. So frames are put back in the CPU's order first, which loses nothing, and
//! clips for which that is not known to hold (other than 4:2:0 of limited range in 8 or 10 bits) are decoded by the CPU.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;

use crate::damage;
use crate::ffmpeg::{Output, Programs, Watch, first_message, silent};
use crate::probe::{Clip, input_options};
use crate::{Limits, MediaError};

/// Decoder threads beyond this cost memory and bring little.
const MAX_THREADS: usize = 8;
/// Bytes of a filter that goes with the arguments, where it leaves no file behind however this ends; Linux takes 128 KiB.
const MAX_ARGUMENT: usize = 96 << 10;

/// The frames of a clip at ascending indices, in order. The child is gone when this is dropped.
pub(crate) struct Frames {
    output: Output,
    frame_bytes: usize,
    /// Kept for as long as the child may read it.
    _filter: Option<tempfile::NamedTempFile>,
}

impl Frames {
    /// Starts decoding. `indices` do not decrease; an index that comes twice gives one frame.
    pub fn start(
        programs: &Programs,
        file: &File,
        clip: &Clip,
        indices: &[u64],
        limits: &Limits,
        watch: &mut Watch,
    ) -> Result<Self, MediaError> {
        let modern = programs.is_modern(watch)?;
        // The explicit size does nothing, unless a clip changes its size midway: then all frames get the first size.
        let (w, h) = (clip.width, clip.height);
        let order = hardware(programs, clip).map_or(String::new(), |_| format!("format={},", clip.pixel_format));
        let filter = format!("select='{}',{order}scale={w}:{h},format=rgb24", select(indices));
        let mut args = decoder_options(programs, clip, limits, modern);
        let script = match filter.len() <= MAX_ARGUMENT {
            true => {
                args.extend(["-filter:v".into(), filter.into()]);
                None
            }
            false => {
                let failed =
                    |e: std::io::Error| MediaError::Ffmpeg(format!("cannot write a temporary file for ffmpeg: {e}"));
                let mut file = tempfile::NamedTempFile::with_prefix("keye-select-").map_err(failed)?;
                file.write_all(filter.as_bytes()).and_then(|()| file.flush()).map_err(failed)?;
                args.push(if modern { "-/filter:v" } else { "-filter_script:v" }.into());
                args.push(file.path().into());
                Some(file)
            }
        };
        args.extend(["-c:v", "rawvideo", "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1"].map(Into::into));
        let frame_bytes = frame_bytes(clip).ok_or_else(|| watch.unreadable("a frame is too large for this machine"))?;
        let output = Output::start(&programs.ffmpeg, &args, Some(file), frame_bytes)?;
        Ok(Self { output, frame_bytes, _filter: script })
    }

    /// The next wanted frame, `[height, width, 3]` bytes; `None` when the clip ended, even in the middle of a frame.
    pub fn next(&mut self, watch: &mut Watch) -> Result<Option<Vec<u8>>, MediaError> {
        Ok(self.output.next(watch)?.filter(|frame| frame.len() == self.frame_bytes))
    }

    /// Returns a frame's memory for reuse.
    pub fn give_back(&self, frame: Vec<u8>) {
        self.output.give_back(frame);
    }

    /// What ffmpeg found damaged so far.
    pub fn damage(&self, clip: &Clip) -> Option<String> {
        damage::told(&self.output.messages(), &clip.codec)
    }

    /// After the clip ended: waits for ffmpeg.
    ///
    /// # Errors
    /// The child was killed: then the end is not the clip's.
    pub fn finish(&mut self, watch: &mut Watch) -> Result<(), MediaError> {
        self.output.finish(watch).map(|_| ())
    }
}

/// Bytes of an RGB frame.
pub(crate) fn frame_bytes(clip: &Clip) -> Option<usize> {
    (clip.height as usize).checked_mul(clip.width as usize)?.checked_mul(3)
}

/// The frames that can be decoded.
pub(crate) struct Counted {
    /// When they are shown, in seconds, the first one 0 (to the millisecond).
    pub times: Vec<f64>,
    /// When the first is shown on ffmpeg's clock.
    pub first: f64,
    /// What ffmpeg found damaged.
    pub damage: Option<String>,
}

/// Decodes the whole clip and tells when its frames are shown.
///
/// The packets of some files promise more frames than come out: cut or damaged files, fields in packets of their own.
///
/// # Errors
/// Not a single frame can be decoded, or more than the limit allows.
pub(crate) fn count(
    programs: &Programs,
    file: &File,
    clip: &Clip,
    limits: &Limits,
    watch: &mut Watch,
) -> Result<Counted, MediaError> {
    let mut args = decoder_options(programs, clip, limits, programs.is_modern(watch)?);
    args.extend(["-c:v", "wrapped_avframe", "-f", "mkvtimestamp_v2", "pipe:1"].map(Into::into));
    let mut output = Output::start(&programs.ffmpeg, &args, Some(file), 4 << 10)?;
    let mut text = Vec::new();
    let mut counted = 0;
    while let Some(block) = output.next(watch)? {
        watch.check()?;
        counted += block.iter().filter(|b| **b == b'\n').count() as u64;
        watch.limit("the number of frames", counted.saturating_sub(1), limits.source_frames)?;
        text.extend_from_slice(&block);
        output.give_back(block);
    }
    let (status, messages) = output.finish(watch)?;
    let text = String::from_utf8_lossy(&text);
    let mut stamps: Vec<f64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    stamps.sort_unstable_by(f64::total_cmp);
    let Some(&first) = stamps.first() else {
        silent(&programs.ffmpeg, "KEYE_FFMPEG", status, &messages, watch)?;
        let (codec, message) = (&clip.codec, first_message(&messages));
        let by = hardware(programs, clip).map_or(String::new(), |name| format!(" (by KEYE_HWACCEL={name})"));
        return Err(watch.unreadable(format!("no frame of its {codec} video can be decoded{by}: {message}")));
    };
    let times = stamps.into_iter().map(|ms| (ms - first) / 1000.0).collect();
    Ok(Counted { times, first: first / 1000.0, damage: damage::told(&messages, &clip.codec) })
}

/// What decodes this clip beside the CPU.
fn hardware<'a>(programs: &'a Programs, clip: &Clip) -> Option<&'a str> {
    let exact = matches!(clip.pixel_format.as_str(), "yuv420p" | "yuv420p10le");
    programs.accelerator.as_deref().filter(|_| exact)
}

/// Everything up to the filter: no questions, few words, one stream, every frame once.
fn decoder_options(programs: &Programs, clip: &Clip, limits: &Limits, modern: bool) -> Vec<OsString> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).to_string();
    let mut args: Vec<OsString> =
        ["-nostdin", "-hide_banner", "-loglevel", "error", "-threads", &threads].map(Into::into).into();
    if let Some(name) = hardware(programs, clip) {
        args.extend(["-hwaccel", name].map(Into::into));
    }
    // Filters built anew where the size or format of frames changes would number them from 0 again. `scale` takes any
    // frame, the filters that turn pictures do not: they stay out where the container names no angle. Where it does,
    // and frames change as well, those after the change may be other ones than wanted.
    if !clip.turned {
        args.extend(["-noautorotate", "-reinit_filter", "0"].map(Into::into));
    }
    args.extend(input_options(clip.demuxer, limits));
    let stream = format!("0:{}", clip.stream);
    let every_frame = if modern { "-fps_mode" } else { "-vsync" };
    args.extend(["-map", &stream, every_frame, "passthrough"].map(Into::into));
    args
}

/// An expression over the frame number `n` that is true at the indices. A search tree, so that a frame costs
/// log(indices) and the parser's stack, which ends at about 100 levels, is never deep.
fn select(indices: &[u64]) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &index in indices {
        match runs.last_mut() {
            Some((_, end)) if index <= *end + 1 => *end = index,
            _ => runs.push((index, index)),
        }
    }
    let mut text = String::new();
    tree(&runs, &mut text);
    text
}

fn tree(runs: &[(u64, u64)], text: &mut String) {
    use std::fmt::Write;
    // Writing to a String cannot fail.
    let _ = match runs {
        [] => write!(text, "0"),
        [(start, end)] if start == end => write!(text, "eq(n,{start})"),
        [(start, end)] => write!(text, "between(n,{start},{end})"),
        _ => {
            let (low, high) = runs.split_at(runs.len() / 2);
            let _ = write!(text, "if(lt(n,{}),", high[0].0);
            tree(low, text);
            text.push(',');
            tree(high, text);
            write!(text, ")")
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_is_a_shallow_tree_of_runs() {
        assert_eq!(select(&[4]), "eq(n,4)");
        assert_eq!(select(&[0, 1, 1, 2, 7]), "if(lt(n,7),between(n,0,2),eq(n,7))");
        let many: Vec<u64> = (0..16_384).map(|i| i * 3).collect();
        let mut depth = 0;
        let deepest = select(&many).chars().fold(0, |deepest, c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            deepest.max(depth)
        });
        assert!(deepest <= 16, "{deepest} levels");
    }
}

//! What a clip is, told by `ffprobe` before anything is decoded: its size, rates and the presentation time of every
//! frame, from one pass over the packets (0.1 s of CPU for a minute of video).

use std::ffi::OsString;
use std::fs::File;

use crate::damage::{self, Promise};
use crate::ffmpeg::{INPUT, Output, Programs, Watch, first_message, silent};
use crate::{Limits, MediaError};

/// A clip's facts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Clip {
    /// ffmpeg's demuxer.
    pub demuxer: &'static str,
    /// Index of the video stream among all streams.
    pub stream: u32,
    /// Codec, for messages.
    pub codec: String,
    /// How the decoder stores pixels, by ffmpeg's name; empty when it is not known.
    pub pixel_format: String,
    /// Height of a frame as shown (after rotation), in pixels.
    pub height: u32,
    /// Width of a frame as shown, in pixels.
    pub width: u32,
    /// True when the container says how to turn the picture, be it by nothing.
    pub turned: bool,
    /// Average frames per second, as the container has it (what decord's `get_avg_fps` gives).
    pub fps: f64,
    /// Presentation time of every frame in seconds, ascending, the first one 0.
    pub times: Vec<f64>,
    /// True when there may be packets that give no frame, so that a frame's number is not its packet's: packets that
    /// share their time or have none, and VP8, whose hidden frames are packets of their own.
    pub uncounted: bool,
    /// What is known of its length and damage.
    pub promise: Promise,
}

impl Clip {
    /// False when some frame is shown more than half a frame from where the average rate puts it.
    pub fn has_constant_rate(&self) -> bool {
        self.times.iter().enumerate().all(|(i, t)| (t * self.fps - i as f64).abs() <= 0.5)
    }
}

/// The options that both programs get: which file, by which demuxer, through which protocol, and how large a frame may
/// be. Twice the limit, since decoders count padding; the exact size is checked here.
pub(crate) fn input_options(demuxer: &str, limits: &Limits) -> Vec<OsString> {
    let pixels = limits.source_pixels.saturating_mul(2).clamp(1 << 16, i32::MAX as u64).to_string();
    let mut options: Vec<OsString> = ["-max_pixels", &pixels, "-protocol_whitelist", "file"].map(Into::into).into();
    if demuxer == "mov" {
        // Both are ffmpeg's defaults; they decide whether a file may name others, so they are not left to a default.
        options.extend(["-enable_drefs", "0", "-use_absolute_path", "0"].map(Into::into));
    }
    options.extend(["-f", demuxer, "-i", INPUT].map(Into::into));
    options
}

/// One line `packet|...` of ffprobe.
#[derive(Debug, Clone, Copy)]
struct Packet {
    pts: Option<i64>,
    dts: Option<i64>,
}

/// One line `stream|...` of ffprobe, with the packets that are shown.
#[derive(Debug, Default)]
struct Stream {
    index: u32,
    codec: String,
    pixel_format: String,
    width: u32,
    height: u32,
    average: Option<f64>,
    base: Option<(i64, i64)>,
    default: bool,
    /// In degrees, where the container has an angle.
    rotation: Option<f64>,
    /// In seconds, or counted in frames.
    duration: Option<f64>,
    frames: Option<f64>,
}

#[derive(Debug, Default)]
struct Report {
    packets: Vec<(u32, Vec<Packet>)>,
    counted: u64,
    streams: Vec<Stream>,
    /// Seconds: where the clocks of all streams begin, and how long the longest of them is.
    start: Option<f64>,
    duration: Option<f64>,
}

/// Asks ffprobe and checks the answer against the limits.
///
/// # Errors
/// No video stream, no frame, a file that cannot be demuxed, or more pixels or frames than the limits allow.
pub(crate) fn probe(
    programs: &Programs,
    clip: &File,
    demuxer: &'static str,
    limits: &Limits,
    watch: &mut Watch,
) -> Result<Clip, MediaError> {
    // Side data as a whole: its parts have one name in release 4.4 and another one in later ones.
    let entries = "packet=stream_index,pts,dts,flags:\
         stream=index,codec_name,pix_fmt,width,height,avg_frame_rate,r_frame_rate,time_base,duration,nb_frames:\
         stream_disposition=default:stream_side_data_list:stream_tags=rotate,DURATION:format=start_time,duration";
    let mut args: Vec<OsString> = ["-hide_banner", "-v", "error"].map(Into::into).into();
    args.extend(input_options(demuxer, limits));
    // V: video streams that are no cover pictures.
    args.extend(["-select_streams", "V", "-show_entries", entries, "-of", "compact"].map(Into::into));

    let mut output = Output::start(&programs.ffprobe, &args, Some(clip), 64 << 10)?;
    let mut report = Report::default();
    let mut rest = Vec::new();
    while let Some(block) = output.next(watch)? {
        rest.extend_from_slice(&block);
        output.give_back(block);
        let whole = rest.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        for line in rest[..whole].split(|b| *b == b'\n') {
            report.read(&String::from_utf8_lossy(line));
        }
        rest.drain(..whole);
        if rest.len() > 1 << 20 {
            return Err(watch.unreadable("ffprobe answered with a line without end"));
        }
        watch.check()?;
        watch.limit("the number of frames", report.counted, limits.source_frames)?;
    }
    let (status, messages) = output.finish(watch)?;
    report.read(&String::from_utf8_lossy(&rest));
    if report.streams.is_empty() && !status.success() {
        silent(&programs.ffprobe, "KEYE_FFPROBE", status, &messages, watch)?;
        return Err(refusal(watch, demuxer, &messages, limits));
    }
    report.clip(demuxer, &messages, limits, watch)
}

fn refusal(watch: &Watch, demuxer: &str, messages: &str, limits: &Limits) -> MediaError {
    if let Some(size) = messages.split("Picture size ").nth(1).filter(|_| messages.contains("max pixel count")) {
        let mut sides = size.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
        let found = sides.next().unwrap_or(0u64).saturating_mul(sides.next().unwrap_or(0));
        let limit = limits.source_pixels;
        return MediaError::Limit { input: watch.input.into(), what: "the number of pixels of a frame", found, limit };
    }
    let message = first_message(messages);
    if messages.contains("moov atom not found") {
        return watch.unreadable(
            "the index of the file (moov atom) is missing, so the end of the file is: it was cut short while being \
             written or copied",
        );
    }
    watch.unreadable(format!("it looks like {demuxer}, but cannot be read as such: {message}"))
}

impl Report {
    fn read(&mut self, line: &str) {
        let mut fields = line.trim_end().split('|');
        match fields.next() {
            Some("packet") => self.read_packet(fields),
            Some("stream") => self.read_stream(fields),
            Some("format") => {
                for (name, value) in fields.filter_map(|field| field.split_once('=')) {
                    match name {
                        "start_time" => self.start = seconds(value),
                        "duration" => self.duration = seconds(value),
                        _ => {}
                    }
                }
            }
            // Release 4.4 has side data on lines of their own, after their stream.
            Some("side_data") => {
                if let (Some(stream), Some(angle)) = (self.streams.last_mut(), fields.find_map(rotation)) {
                    stream.rotation = Some(angle);
                }
            }
            _ => {}
        }
    }

    fn read_packet<'a>(&mut self, fields: impl Iterator<Item = &'a str>) {
        let mut packet = Packet { pts: None, dts: None };
        let mut stream = 0;
        for (name, value) in fields.filter_map(|field| field.split_once('=')) {
            match name {
                "stream_index" => stream = value.parse().unwrap_or(0),
                "pts" => packet.pts = value.parse().ok(),
                "dts" => packet.dts = value.parse().ok(),
                // Decoded but not shown: what an edit list cuts off.
                "flags" if value.contains('D') => return,
                _ => {}
            }
        }
        self.counted += 1;
        match self.packets.iter_mut().find(|(index, _)| *index == stream) {
            Some((_, packets)) => packets.push(packet),
            None => self.packets.push((stream, vec![packet])),
        }
    }

    fn read_stream<'a>(&mut self, fields: impl Iterator<Item = &'a str>) {
        let mut stream = Stream::default();
        let mut real = None;
        for field in fields {
            let Some((name, value)) = field.split_once('=') else { continue };
            match name {
                "index" => stream.index = value.parse().unwrap_or(0),
                "codec_name" => stream.codec = value.into(),
                "pix_fmt" => stream.pixel_format = value.into(),
                "width" => stream.width = value.parse().unwrap_or(0),
                "height" => stream.height = value.parse().unwrap_or(0),
                "avg_frame_rate" => stream.average = rate(value),
                "r_frame_rate" => real = rate(value),
                "time_base" => stream.base = ratio(value).filter(|(n, d)| *n > 0 && *d > 0),
                "duration" => stream.duration = seconds(value).or(stream.duration),
                "nb_frames" => stream.frames = seconds(value),
                // Matroska has it as a tag.
                "tag:DURATION" => stream.duration = stream.duration.or(clock(value)),
                "disposition:default" => stream.default = value == "1",
                // Old files carry the angle as a tag; ffmpeg turns it into side data, so this is for its old releases.
                "tag:rotate" => stream.rotation = stream.rotation.or(value.parse().ok()),
                _ => stream.rotation = rotation(field).or(stream.rotation),
            }
        }
        stream.average = stream.average.or(real);
        self.streams.push(stream);
    }

    fn clip(self, demuxer: &'static str, messages: &str, limits: &Limits, watch: &Watch) -> Result<Clip, MediaError> {
        let order = |s: &Stream| (s.default, u64::from(s.width) * u64::from(s.height), std::cmp::Reverse(s.index));
        let Some(stream) = self.streams.into_iter().max_by_key(order) else {
            return Err(watch.unreadable("there is no video stream in it (only sound or a cover picture)"));
        };
        let packets = self.packets.into_iter().find(|(index, _)| *index == stream.index).map(|(_, p)| p);
        let packets = packets.unwrap_or_default();
        if stream.width == 0 || stream.height == 0 {
            return Err(refusal(watch, demuxer, messages, limits));
        }
        let (width, height) = match stream.rotation.is_some_and(is_quarter_turn) {
            true => (stream.height, stream.width),
            false => (stream.width, stream.height),
        };
        watch.limit("the number of pixels of a frame", u64::from(width) * u64::from(height), limits.source_pixels)?;
        if packets.is_empty() {
            return Err(watch.unreadable("the video has no frame"));
        }
        let ticks = ticks(&packets).zip(stream.base);
        let measured = ticks.as_ref().map(|(ticks, (n, d))| {
            let seconds = |tick: i64| (tick as i128 - ticks[0] as i128) as f64 * *n as f64 / *d as f64;
            ticks.iter().map(|t| seconds(*t)).collect::<Vec<f64>>()
        });
        // Decoders count from where the container begins.
        let first = ticks.map(|(ticks, (n, d))| ticks[0] as f64 * n as f64 / d as f64 - self.start.unwrap_or(0.0));
        let fps = stream.average.or_else(|| average(measured.as_deref()?)).unwrap_or(25.0);
        let times = measured.unwrap_or_else(|| (0..packets.len()).map(|i| i as f64 / fps).collect());
        let (turned, uncounted) = (stream.rotation.is_some(), stream.codec == "vp8" || !has_own_times(&packets));
        let counted = stream.frames.map(|frames| frames / fps);
        // A cut AVI has the length of what is left, and the number of frames that there were.
        let promised = [stream.duration, counted].into_iter().flatten().reduce(f64::max).or(self.duration);
        let promise = Promise { seconds: promised, first, damage: damage::told(messages, &stream.codec) };
        let Stream { index, codec, pixel_format, .. } = stream;
        Ok(Clip { demuxer, stream: index, codec, pixel_format, height, width, turned, fps, times, uncounted, promise })
    }
}

/// Presentation times in the stream's unit, ascending: `pts` where every packet has one, else `dts`. `None` without,
/// and when the clock starts again on the way, as it does where transport streams were written one after another.
fn ticks(packets: &[Packet]) -> Option<Vec<i64>> {
    if !packets.iter().filter_map(|p| p.dts).is_sorted() {
        return None;
    }
    let all = |pick: fn(&Packet) -> Option<i64>| packets.iter().map(pick).collect::<Option<Vec<i64>>>();
    let mut ticks = all(|p| p.pts).or_else(|| all(|p| p.dts))?;
    ticks.sort_unstable();
    Some(ticks)
}

/// Whether every packet has a presentation time that no other one has.
fn has_own_times(packets: &[Packet]) -> bool {
    let mut times: Vec<Option<i64>> = packets.iter().map(|p| p.pts).collect();
    times.sort_unstable();
    times.first().is_none_or(Option::is_some) && times.windows(2).all(|pair| pair[0] != pair[1])
}

/// The angle in a field of side data: `rotation=90`, with its section's name in front from release 8 on.
fn rotation(field: &str) -> Option<f64> {
    let (name, value) = field.split_once('=')?;
    (name == "rotation" || name.ends_with(":rotation")).then(|| value.parse().ok()).flatten()
}

/// Mean rate of frames at these times.
pub(crate) fn average(times: &[f64]) -> Option<f64> {
    let span = times.last()? - times.first()?;
    (span > 0.0).then(|| (times.len() - 1) as f64 / span)
}

/// A finite number.
fn seconds(text: &str) -> Option<f64> {
    text.parse().ok().filter(|seconds: &f64| seconds.is_finite())
}

/// `00:01:02.500` in seconds.
fn clock(text: &str) -> Option<f64> {
    text.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + seconds(part)?))
}

fn ratio(text: &str) -> Option<(i64, i64)> {
    let (numerator, denominator) = text.split_once('/')?;
    Some((numerator.parse().ok()?, denominator.parse().ok()?))
}

fn rate(text: &str) -> Option<f64> {
    let (numerator, denominator) = ratio(text)?;
    (numerator > 0 && denominator > 0).then(|| numerator as f64 / denominator as f64)
}

/// ffmpeg transposes at 90 and 270 degrees, give or take one; at other angles the size stays.
fn is_quarter_turn(degrees: f64) -> bool {
    let turned = degrees.rem_euclid(180.0);
    (turned - 90.0).abs() < 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarter_turns_swap_sides() {
        for (degrees, turned) in
            [(90.0, true), (-90.0, true), (270.0, true), (180.0, false), (0.0, false), (45.0, false)]
        {
            assert_eq!(is_quarter_turn(degrees), turned, "{degrees}");
        }
    }

    fn clip_of(lines: &[&str], limits: &Limits) -> Result<Clip, MediaError> {
        let mut report = Report::default();
        lines.iter().for_each(|line| report.read(line));
        let mut keep = |_| true;
        let far = std::time::Instant::now() + limits.time;
        let watch = Watch { input: "x", deadline: far, time: limits.time, progress: &mut keep, done: 0, total: 0 };
        report.clip("mov", "", limits, &watch)
    }

    #[test]
    fn times_are_sorted_and_start_at_zero() {
        let clip = clip_of(
            &[
                "packet|stream_index=0|pts=900|dts=700|flags=KD",
                "packet|stream_index=0|pts=1000|dts=800|flags=K_",
                "packet|stream_index=0|pts=3000|dts=900|flags=__",
                "packet|stream_index=0|pts=2000|dts=1000|flags=__",
                "stream|index=0|codec_name=h264|width=64|height=48|r_frame_rate=1/1|avg_frame_rate=0/0|\
                 time_base=1/1000|disposition:default=1|side_data|rotation=-90",
            ],
            &Limits::default(),
        )
        .unwrap();
        assert_eq!((clip.times.as_slice(), clip.fps, clip.height, clip.width), (&[0.0, 1.0, 2.0][..], 1.0, 64, 48));
    }

    const STREAM: &str = "stream|index=0|codec_name=h264|width=64|height=48|avg_frame_rate=10/1|time_base=1/1000|\
                          disposition:default=1";

    /// How releases 5.1, 8 and 4.4 print an angle.
    #[test]
    fn an_angle_is_found_wherever_a_release_prints_it() {
        let packet = "packet|stream_index=0|pts=0|dts=0|flags=K_";
        let matrix = r"side_data_type=Display Matrix|displaymatrix=\n00000000:    0   -65536   0\n";
        let same_line = [format!("{STREAM}|side_data|{matrix}|rotation=-90")];
        let named = [format!(
            "{STREAM}|side_datum/display_matrix:side_data_type=Display Matrix|side_datum/display_matrix:rotation=90"
        )];
        let own_line = [STREAM.to_owned(), format!("side_data|{matrix}|rotation=90")];
        for lines in [&same_line[..], &named, &own_line] {
            let lines: Vec<&str> = [packet].into_iter().chain(lines.iter().map(String::as_str)).collect();
            let clip = clip_of(&lines, &Limits::default()).unwrap();
            assert_eq!((clip.height, clip.width, clip.turned), (64, 48, true), "{lines:?}");
        }
        let flat = clip_of(&[packet, STREAM], &Limits::default()).unwrap();
        assert_eq!((flat.height, flat.width, flat.turned), (48, 64, false));
    }

    fn packets(stamps: &[(&str, &str)]) -> Vec<String> {
        stamps.iter().map(|(pts, dts)| format!("packet|stream_index=0|pts={pts}|dts={dts}|flags=__")).collect()
    }

    #[test]
    fn a_clock_that_starts_again_tells_no_time() {
        let lines =
            packets(&[("200", "0"), ("400", "100"), ("300", "200"), ("200", "0"), ("400", "100"), ("300", "200")]);
        let lines: Vec<&str> = lines.iter().map(String::as_str).chain([STREAM]).collect();
        let clip = clip_of(&lines, &Limits::default()).unwrap();
        assert_eq!(clip.times, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]);
    }

    #[test]
    fn packets_that_may_give_no_frame_are_told() {
        let vp8 = STREAM.replace("h264", "vp8");
        for (stamps, stream, uncounted) in [
            ([("0", "0"), ("200", "100"), ("100", "200")], STREAM, false),
            ([("0", "0"), ("100", "100"), ("100", "100")], STREAM, true),
            ([("0", "0"), ("N/A", "100"), ("200", "200")], STREAM, true),
            ([("0", "0"), ("100", "100"), ("200", "200")], &vp8, true),
        ] {
            let lines = packets(&stamps);
            let lines: Vec<&str> = lines.iter().map(String::as_str).chain([stream]).collect();
            assert_eq!(clip_of(&lines, &Limits::default()).unwrap().uncounted, uncounted, "{lines:?}");
        }
    }

    #[test]
    fn the_default_stream_wins_and_hostile_numbers_are_refused() {
        let stream = |index, size, default| {
            format!(
                "stream|index={index}|width={size}|height={size}|avg_frame_rate=5/1|time_base=1/5|disposition:default={default}"
            )
        };
        let lines = ["packet|stream_index=2|pts=0|flags=K_".into(), stream(0, 99, 0), stream(2, 50, 1)];
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        assert_eq!(clip_of(&lines, &Limits::default()).unwrap().stream, 2);
        let small = Limits { source_pixels: 2499, ..Limits::default() };
        assert!(matches!(clip_of(&lines, &small), Err(MediaError::Limit { found: 2500, .. })));
        let huge = stream(2, u32::MAX, 1);
        assert!(matches!(clip_of(&[lines[0], &huge], &Limits::default()), Err(MediaError::Limit { .. })));
        assert!(clip_of(&[&stream(0, 8, 1)], &small).unwrap_err().to_string().contains("no frame"));
    }
}

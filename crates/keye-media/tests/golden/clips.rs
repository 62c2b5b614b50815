//! Clips of every kind that `ffmpeg` can make here, whole and broken. Needs `ffmpeg`.

use std::path::{Path, PathBuf};

use keye_media::{
    FrameItem, FrameKind, ItemOptions, Limits, Loaded, Loader, Media, MediaConfig, MediaError, MediaItem, MediaKind,
    Pixels, Progress, Source, TimestampRule,
};

use crate::make::{all_frames, ffmpeg, make, pattern};

const H: u32 = 84;
const W: u32 = 112;

fn item(path: &Path, options: ItemOptions) -> MediaItem {
    MediaItem { kind: MediaKind::Video, source: Source::Path(path.into()), options }
}

/// Preview's rule with frames left at their size, so that patches hold the decoder's pixels.
fn load_as_is(path: &Path, size: (u32, u32), nframes: usize) -> Result<Media, MediaError> {
    load_and_hear(path, size, nframes).map(|loaded| loaded.media)
}

fn load_and_hear(path: &Path, (h, w): (u32, u32), nframes: usize) -> Result<Loaded, MediaError> {
    let options = ItemOptions {
        nframes: Some(nframes as f64),
        resized_height: Some(h),
        resized_width: Some(w),
        ..ItemOptions::default()
    };
    Loader::new(MediaConfig::preview()).load_with_warnings(&item(path, options), &mut |_| true)
}

fn refusal(path: &Path) -> MediaError {
    load_as_is(path, (H, W), 4).unwrap_err()
}

/// The frames of a media whose size is a multiple of 14, put together from its patches.
fn frames_of(media: &Media) -> Vec<Vec<u8>> {
    let Pixels::U8(pixels) = &media.patches.pixels else { panic!("clips give bytes") };
    let [(t, h, w)] =
        media.patches.grid_thw.iter().map(|[t, h, w]| (*t, *h as usize, *w as usize)).collect::<Vec<_>>()[..]
    else {
        panic!("one row expected")
    };
    assert_eq!(t as usize, media.frames.len());
    let mut frames = vec![vec![0; h * w * 14 * 14 * 3]; t as usize];
    for (i, patch) in pixels.chunks(3 * 14 * 14).enumerate() {
        let (frame, row, column) = (i / (h * w), i / w % h, i % w);
        for (j, value) in patch.iter().enumerate() {
            let (channel, y, x) = (j / 196, j / 14 % 14, j % 14);
            frames[frame][((row * 14 + y) * w * 14 + column * 14 + x) * 3 + channel] = *value;
        }
    }
    frames
}

fn stamps(media: &Media) -> Vec<f32> {
    media.frames.iter().map(|frame| frame.timestamp.unwrap()).collect()
}

fn linspace(frames: usize, n: usize) -> Vec<usize> {
    (0..n).map(|i| (i as f64 * (frames - 1) as f64 / (n - 1) as f64).round_ties_even() as usize).collect()
}

/// Loads 8 frames and compares them with a full decode. The clip is whole, so there is nothing to be said about it.
fn assert_exact(path: &Path, (h, w): (u32, u32)) -> Media {
    let Loaded { media, warnings } = load_and_hear(path, (h, w), 8).unwrap_or_else(|e| panic!("{e}"));
    assert!(warnings.is_empty(), "{}: {warnings:?}", path.display());
    let all = all_frames(path, h, w);
    let indices: Vec<usize> = media.frames.iter().map(|frame| frame.index).collect();
    assert_eq!(indices, linspace(all.len(), 8), "{}", path.display());
    let wanted = indices.iter().map(|i| &all[*i]);
    assert!(frames_of(&media).iter().eq(wanted), "{}: pixels differ from a full decode", path.display());
    media
}

#[test]
fn every_container_and_codec_gives_the_frames_of_a_full_decode() {
    let dir = tempfile::tempdir().unwrap();
    let source = pattern(H, W, 10, 2.0);
    let clips: [(&str, &[&str]); 14] = [
        ("h264.mp4", &["-c:v", "libx264"]),
        ("h264.mov", &["-c:v", "libx264", "-movflags", "+faststart"]),
        ("fragmented.mp4", &["-c:v", "libx264", "-g", "5", "-movflags", "+frag_keyframe+empty_moov"]),
        ("h264.mkv", &["-c:v", "libx264"]),
        ("h264.ts", &["-c:v", "libx264"]),
        ("h264.flv", &["-c:v", "libx264"]),
        ("10bit.mp4", &["-c:v", "libx264", "-pix_fmt", "yuv420p10"]),
        ("444.mp4", &["-c:v", "libx264", "-pix_fmt", "yuv444p"]),
        ("hevc.mp4", &["-c:v", "libx265", "-x265-params", "log-level=none", "-preset", "ultrafast"]),
        ("vp9.webm", &["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"]),
        ("av1.mp4", &["-c:v", "libaom-av1", "-cpu-used", "8", "-usage", "realtime"]),
        ("mpeg4.avi", &["-c:v", "mpeg4", "-bf", "2"]),
        ("theora.ogv", &["-c:v", "libtheora"]),
        ("plain.gif", &[]),
    ];
    let mut tried = 0;
    for (name, options) in clips {
        let Some(path) = make(dir.path(), name, &source, options) else { continue };
        let media = assert_exact(&path, (H, W));
        // A gif counts in hundredths, matroska in thousandths of a second.
        let close = stamps(&media).iter().zip(&media.frames).all(|(t, f)| (t - f.index as f32 / 10.0).abs() < 0.011);
        assert!(close && stamps(&media)[0] == 0.0, "{name}: {:?}", stamps(&media));
        tried += 1;
    }
    assert!(tried >= 8, "only {tried} kinds could be made");

    let broadcast = pattern(H, W, 25, 2.0);
    for (name, options) in [("mpeg2.mpg", &["-c:v", "mpeg2video"][..]), ("wmv2.wmv", &["-c:v", "wmv2"])] {
        if let Some(path) = make(dir.path(), name, &broadcast, options) {
            assert_exact(&path, (H, W));
        }
    }
}

#[test]
fn names_say_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let webm = make(dir.path(), "x.mkv", &pattern(H, W, 10, 1.0), &["-c:v", "libx264"]).unwrap();
    let renamed = dir.path().join("file:pipe%03d.png");
    std::fs::rename(webm, &renamed).unwrap();
    assert_eq!(load_as_is(&renamed, (H, W), 4).unwrap().frames.len(), 4);
}

#[test]
fn rotated_clips_are_turned_upright() {
    let dir = tempfile::tempdir().unwrap();
    let flat = make(dir.path(), "flat.mp4", &pattern(H, W, 10, 1.0), &["-c:v", "libx264"]).unwrap();
    for (angle, size) in [("90", (W, H)), ("180", (H, W)), ("270", (W, H))] {
        let turned = dir.path().join(format!("{angle}.mp4"));
        let (from, to) = (flat.to_str().unwrap(), turned.to_str().unwrap());
        // Newer releases take the first form only, older ones the second.
        if !ffmpeg(&["-display_rotation", angle, "-i", from, "-c", "copy", to]).status.success() {
            let tag = format!("rotate={angle}");
            assert!(ffmpeg(&["-i", from, "-c", "copy", "-metadata:s:v", &tag, to]).status.success());
        }
        let media = assert_exact(&turned, size);
        assert_ne!(frames_of(&media), frames_of(&assert_exact(&flat, (H, W))));
    }
}

#[test]
fn odd_sizes_are_resized_whole() {
    let dir = tempfile::tempdir().unwrap();
    let options = ["-c:v", "libx264", "-pix_fmt", "yuv444p"];
    for (h, w) in [(75, 101), (17, 333), (2, 2)] {
        let path = make(dir.path(), "odd.mp4", &pattern(h, w, 10, 1.0), &options).unwrap();
        for config in [MediaConfig::preview(), MediaConfig::slow_fast()] {
            let media = Loader::new(config).load(&item(&path, ItemOptions::default()), &mut |_| true).unwrap();
            assert!(!media.frames.is_empty() && media.frames.iter().all(|f| f.height % 28 == 0 && f.width % 28 == 0));
        }
    }
}

#[test]
fn variable_rates_have_true_times() {
    let dir = tempfile::tempdir().unwrap();
    // 20 frames in the first second, then 2 a second.
    let source = format!("{},select='if(lt(t,1),1,not(mod(n,10)))'", pattern(H, W, 20, 5.0));
    let path = make(dir.path(), "vfr.mp4", &source, &["-c:v", "libx264", "-fps_mode", "vfr"]).unwrap();
    let media = assert_exact(&path, (H, W));
    let truth = |index: usize| if index < 20 { index as f32 / 20.0 } else { 1.0 + (index - 20) as f32 / 2.0 };
    for frame in &media.frames {
        assert!((frame.timestamp.unwrap() - truth(frame.index)).abs() < 1e-3, "{frame:?}");
    }
    assert_eq!(media.frames.last().unwrap().index, 27);
    // 8 frames of 28 that last from 0 to 4.5 s and one mean gap more.
    assert!((media.sample_fps.unwrap() - 8.0 / (4.5 * 28.0 / 27.0)).abs() < 1e-6);

    let options = ItemOptions { fps: Some(2.0), ..ItemOptions::default() };
    let reference = Loader { timestamps: TimestampRule::Reference, ..Loader::new(MediaConfig::slow_fast()) };
    let media = reference.load(&item(&path, options.clone()), &mut |_| true).unwrap();
    let last = media.frames.last().unwrap();
    assert!((last.timestamp.unwrap() - truth(last.index)).abs() > 0.1, "the reference's rule is wrong here");

    // A range means times, not numbers of frames.
    let options = ItemOptions { video_start: Some(1.9), nframes: Some(4.0), ..ItemOptions::default() };
    let media = Loader::new(MediaConfig::preview()).load(&item(&path, options), &mut |_| true).unwrap();
    assert_eq!(stamps(&media)[0], 2.0);
    assert_eq!(media.frames.last().unwrap().index, 27);

    // It is sampled at its own rate: there are two frames a second, though the whole clip has more.
    let options = ItemOptions { video_start: Some(1.9), fps: Some(2.0), ..ItemOptions::default() };
    for config in [MediaConfig::slow_fast(), MediaConfig::adaptive()] {
        let media = Loader::new(config).load(&item(&path, options.clone()), &mut |_| true).unwrap();
        assert_eq!(stamps(&media), [2.0, 2.5, 3.0, 3.5, 4.0, 4.5]);
    }

    let options = ItemOptions { video_end: Some(-1.0), ..options };
    let nothing = ItemOptions { video_start: None, ..options };
    let error = Loader::new(MediaConfig::slow_fast()).load(&item(&path, nothing), &mut |_| true).unwrap_err();
    let text = error.to_string();
    assert!(
        text.ends_with(
            "option video_end: no frame is shown in this part of the clip; its 28 frames are shown from 0 to 4.50 s"
        ),
        "{text}"
    );
}

/// The first bytes of a file.
fn cut(path: &Path, bytes: usize) -> PathBuf {
    let target = path.with_extension("cut.mp4");
    std::fs::write(&target, &std::fs::read(path).unwrap()[..bytes]).unwrap();
    target
}

#[test]
fn a_cut_file_gives_its_prefix_if_it_has_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let source = pattern(H, W, 10, 4.0);
    let path = make(dir.path(), "front.mp4", &source, &["-c:v", "libx264", "-movflags", "+faststart"]).unwrap();
    let all = all_frames(&path, H, W);
    let bytes = std::fs::read(&path).unwrap();
    let most = bytes.len() * 57 / 100;
    let media = load_as_is(&cut(&path, most), (H, W), 8).unwrap();
    let last = media.frames.last().unwrap().index;
    assert!((10..35).contains(&last) && media.frames.len() == 8, "last frame {last}");
    // The last frame before the cut may be damaged, the others are whole.
    let found = frames_of(&media);
    assert!(media.frames.iter().zip(&found).take(7).all(|(frame, pixels)| *pixels == all[frame.index]));
    let slow_fast = Loader::new(MediaConfig::slow_fast());
    let media = slow_fast.load(&item(&cut(&path, most), ItemOptions::default()), &mut |_| true).unwrap();
    assert!((2..7).contains(&media.frames.len()));

    let back = make(dir.path(), "back.mp4", &source, &["-c:v", "libx264"]).unwrap();
    let error = refusal(&cut(&back, most)).to_string();
    assert!(error.contains("moov") && error.contains("cut short"), "{error}");
    // Only the index is left.
    let data = bytes.windows(4).position(|name| name == b"mdat").unwrap();
    let error = refusal(&cut(&path, data + 4));
    assert!(matches!(error, MediaError::Unreadable { .. }) && error.to_string().contains("no frame"), "{error}");
}

#[test]
fn damaged_bytes_cost_pixels_not_the_clip() {
    let dir = tempfile::tempdir().unwrap();
    let source = pattern(H, W, 10, 4.0);
    let path = make(dir.path(), "front.mp4", &source, &["-c:v", "libx264", "-movflags", "+faststart"]).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let (from, length) = (bytes.len() / 3, bytes.len() * 2 / 3);
    let mut state = 12345u32;
    for _ in 0..60 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let at = from + (state >> 8) as usize % length;
        bytes[at] ^= (state >> 3) as u8 | 1;
    }
    std::fs::write(&path, bytes).unwrap();
    assert!(load_as_is(&path, (H, W), 8).unwrap().frames.len() >= 4);
}

#[test]
fn what_holds_no_video_is_refused_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let sound = make(dir.path(), "sound.m4a", "sine=duration=1", &[]).unwrap();
    let still = make(dir.path(), "still.png", &pattern(H, W, 10, 0.1), &["-frames:v", "1"]).unwrap();
    std::fs::rename(&still, at("still.mp4")).unwrap();
    std::fs::write(at("empty.mp4"), b"").unwrap();
    std::fs::write(at("noise.mp4"), b"\0\0\0\x18ftypisom\0\0\0\0isommp42 and nothing that makes sense").unwrap();
    std::fs::write(at("text.mp4"), b"hello").unwrap();
    let mut cases =
        vec![(sound, "no video stream"), (at("still.mp4"), "a still picture (PNG)"), (at("empty.mp4"), "empty")];
    cases.extend([(at("noise.mp4"), "moov"), (at("text.mp4"), "this is text, not a picture or clip")]);
    let (a, cover) = (cases[0].0.to_str().unwrap().to_owned(), at("cover.m4a"));
    let picture = at("still.mp4");
    let words = ["-i", &a, "-f", "png_pipe", "-i", picture.to_str().unwrap(), "-map", "0", "-map", "1", "-c", "copy"];
    let words = [&words[..], &["-disposition:v", "attached_pic", cover.to_str().unwrap()]].concat();
    assert!(ffmpeg(&words).status.success());
    cases.push((cover, "cover picture"));
    for (path, words) in cases {
        let error = refusal(&path);
        let text = error.to_string();
        assert!(matches!(error, MediaError::Unreadable { .. }) && text.contains(words), "{text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }
}

#[test]
fn lists_that_name_other_files_are_never_followed() {
    let dir = tempfile::tempdir().unwrap();
    let secret = make(dir.path(), "secret.ts", &pattern(H, W, 10, 1.0), &["-c:v", "libx264"]).unwrap();
    let secret = secret.to_str().unwrap();
    let lists = [
        ("m3u8", format!("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n")),
        ("ffconcat", format!("ffconcat version 1.0\nfile '{secret}'\n")),
        ("mpd", format!("<?xml version=\"1.0\"?><MPD><Period><BaseURL>file://{secret}</BaseURL></Period></MPD>")),
        ("sdp", format!("v=0\no=- 0 0 IN IP4 127.0.0.1\ns={secret}\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n")),
    ];
    for (extension, text) in lists {
        for extension in [extension, "mp4"] {
            let path = dir.path().join(format!("list.{extension}"));
            std::fs::write(&path, &text).unwrap();
            let error = refusal(&path).to_string();
            assert!(error.contains("only names other files"), "{error}");
        }
    }
}

#[test]
fn limits_hold_before_and_while_decoding() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "clip.mp4", &pattern(H, W, 10, 3.0), &["-c:v", "libx264"]).unwrap();
    let most = Limits::default();
    let cases = [
        (
            "the number of pixels of a frame",
            Limits { source_pixels: u64::from(H * W) - 1, ..most.clone() },
            u64::from(H * W),
        ),
        ("the number of frames", Limits { source_frames: 29, ..most.clone() }, 30),
        ("the number of sampled frames", Limits { frames: 5, ..most.clone() }, 6),
        ("the number of patches", Limits { patches: 100, ..most.clone() }, 0),
        ("the time in seconds", Limits { time: std::time::Duration::ZERO, ..most.clone() }, 1),
    ];
    for (name, limits, measured) in cases {
        for config in [MediaConfig::preview(), MediaConfig::slow_fast()] {
            let loader = Loader { limits: limits.clone(), ..Loader::new(config) };
            match loader.load(&item(&path, ItemOptions::default()), &mut |_| true) {
                Err(MediaError::Limit { what, found, limit, .. }) => {
                    assert_eq!(what, name);
                    assert!(found > limit && (measured == 0 || found == measured), "{name}: {found} > {limit}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }
    let enough = Limits { source_pixels: u64::from(H * W), source_frames: 30, frames: 6, ..most };
    let loader = Loader { limits: enough, ..Loader::new(MediaConfig::preview()) };
    assert_eq!(loader.load(&item(&path, ItemOptions::default()), &mut |_| true).unwrap().frames.len(), 6);
}

#[test]
fn progress_counts_sampled_frames() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "clip.mp4", &pattern(H, W, 10, 3.0), &["-c:v", "libx264"]).unwrap();
    let mut seen = Vec::new();
    let load = &mut |progress| {
        if let Progress::Decoding { done, total: 6 } = progress {
            seen.push(done);
        }
        true
    };
    Loader::new(MediaConfig::preview()).load(&item(&path, ItemOptions::default()), load).unwrap();
    seen.dedup();
    assert_eq!(seen, [0, 1, 2, 3, 4, 5, 6]);
}

/// Six shots with cuts at 1.20, 3.04, 5.48, 7.48 and 9.68 s, as ffmpeg's scene filter finds them.
#[test]
fn the_sample_clip_has_slow_frames_at_its_cuts() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../media/bikes.mp4");
    let loader = Loader::new(MediaConfig::slow_fast());
    let loaded = loader.load_with_warnings(&item(&path, ItemOptions::default()), &mut |_| true).unwrap();
    let Loaded { media, warnings } = loaded;
    assert_eq!(warnings, [""; 0]);
    assert_eq!(media.frames.len(), 20);
    for cut in [0.0, 1.2, 3.04, 5.48, 7.48, 9.68] {
        let first = media.frames.iter().find(|frame| frame.timestamp.unwrap() >= cut).unwrap();
        assert_eq!(first.kind, FrameKind::Slow, "the first frame after {cut} s: {first:?}");
    }
    // The street moves in some shots, so there are more slow frames than shots; they are not most of the clip's tokens.
    let slow = media.frames.iter().filter(|frame| frame.kind == FrameKind::Slow).count();
    assert_eq!(slow, 12);
    let [slow, fast] = [FrameKind::Slow, FrameKind::Fast]
        .map(|kind| media.frames.iter().find(|f| f.kind == kind).map(|f| f.height * f.width).unwrap());
    assert!(fast * 3 <= slow, "{fast} and {slow} pixels");
}

#[test]
fn a_clip_that_changes_its_size_keeps_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let first = make(dir.path(), "first.ts", &pattern(H, W, 10, 2.0), &["-c:v", "libx264"]).unwrap();
    let options = ["-c:v", "libx264", "-output_ts_offset", "2"];
    let second = make(dir.path(), "second.ts", &pattern(2 * H, W, 10, 2.0), &options).unwrap();
    let both = joined(&first, &second);
    // The second half is scaled as a whole.
    let scaled = format!("scale={W}:{H}");
    let words = ["-i", second.to_str().unwrap(), "-vf", &scaled, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"];
    let mut all = all_frames(&first, H, W);
    all.extend(ffmpeg(&words).stdout.chunks((H * W * 3) as usize).map(<[u8]>::to_vec));
    assert_eq!(all.len(), 40);
    let media = load_as_is(&both, (H, W), 8).unwrap();
    assert!(media.frames.last().unwrap().timestamp.unwrap() > 3.0);
    assert_eq!(media.frames.iter().map(|frame| frame.index).collect::<Vec<_>>(), linspace(40, 8));
    let found = frames_of(&media);
    assert!(media.frames.iter().zip(&found).all(|(frame, pixels)| *pixels == all[frame.index]));
}

/// One transport stream after the other in a file.
fn joined(first: &Path, second: &Path) -> PathBuf {
    let target = first.with_extension("joined.ts");
    std::fs::write(&target, [std::fs::read(first).unwrap(), std::fs::read(second).unwrap()].concat()).unwrap();
    target
}

#[test]
fn a_clock_that_starts_again_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "half.ts", &pattern(H, W, 10, 2.0), &["-c:v", "libx264"]).unwrap();
    let media = assert_exact(&joined(&path, &path), (H, W));
    assert!(stamps(&media).iter().zip(&media.frames).all(|(t, f)| (t - f.index as f32 / 10.0).abs() < 1e-3));
    assert_eq!(media.frames.last().unwrap().index, 39);
}

/// VP8 with its hidden frames, which are packets and no frames.
#[test]
fn a_part_of_a_clip_with_hidden_frames_is_the_part_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("passes");
    let coding = ["-c:v", "libvpx", "-b:v", "200k", "-auto-alt-ref", "1", "-lag-in-frames", "25", "-passlogfile"];
    let coding = [&coding[..], &[log.to_str().unwrap(), "-pass"]].concat();
    let pass = |name, number| make(dir.path(), name, &pattern(H, W, 10, 8.0), &[&coding[..], &[number]].concat());
    let Some(path) = pass("first.webm", "1").and_then(|_| pass("clip.webm", "2")) else { return };
    let all = all_frames(&path, H, W);
    assert_eq!(all.len(), 80);
    let options = ItemOptions {
        video_start: Some(4.0),
        video_end: Some(6.0),
        nframes: Some(6.0),
        resized_height: Some(H),
        resized_width: Some(W),
        ..ItemOptions::default()
    };
    let media = Loader::new(MediaConfig::preview()).load(&item(&path, options), &mut |_| true).unwrap();
    assert_eq!(stamps(&media), [4.0, 4.4, 4.8, 5.2, 5.6, 6.0]);
    assert_eq!(media.frames.iter().map(|frame| frame.index).collect::<Vec<_>>(), [40, 44, 48, 52, 56, 60]);
    let found = frames_of(&media);
    assert!(media.frames.iter().zip(&found).all(|(frame, pixels)| *pixels == all[frame.index]));
}

#[test]
fn an_absurd_size_is_refused_before_memory_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "clip.mp4", &pattern(H, W, 10, 1.0), &["-c:v", "libx264"]).unwrap();
    for config in [MediaConfig::preview(), MediaConfig::slow_fast(), MediaConfig::adaptive()] {
        let options = ItemOptions { min_pixels: Some(1_000_000_000_000_000_000), ..ItemOptions::default() };
        let error = Loader::new(config).load(&item(&path, options), &mut |_| true).unwrap_err();
        assert!(matches!(error, MediaError::Limit { what: "the number of patches", .. }), "{error}");
        assert!(error.to_string().contains("; lower min_pixels or max_pixels"), "{error}");
    }
}

#[test]
fn an_absurd_size_of_many_pictures_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "frame.png", &pattern(28, 28, 10, 0.1), &["-frames:v", "1"]).unwrap();
    let own = ItemOptions { max_pixels: Some(784), min_pixels: Some(784), ..ItemOptions::default() };
    let frame = FrameItem { source: Source::Bytes(std::fs::read(path).unwrap().into()), options: Some(own) };
    let options = ItemOptions { min_pixels: Some(10_000_000_000_000_000_000), ..ItemOptions::default() };
    let list = MediaItem { kind: MediaKind::Video, source: Source::Frames(vec![frame; 400]), options };
    let error = Loader::new(MediaConfig::adaptive()).load(&list, &mut |_| true).unwrap_err();
    assert!(matches!(error, MediaError::Limit { found: u64::MAX, .. }), "{error}");
}

/// A budget that keeps sizes open to the last frame, and no room for the frames until then.
#[test]
fn frames_without_room_on_disk_are_decoded_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "clip.mp4", &pattern(H, W, 10, 6.0), &["-c:v", "libx264"]).unwrap();
    let options = ItemOptions { video_total_pixels: Some(12 * 60 * 784), ..ItemOptions::default() };
    let load = |spilled_bytes: u64| {
        let limits = Limits { spilled_bytes, ..Limits::default() };
        let loader = Loader { limits, ..Loader::new(MediaConfig::slow_fast()) };
        let mut passes = 0;
        let media = loader.load(&item(&path, options.clone()), &mut |progress| {
            passes += usize::from(matches!(progress, Progress::Decoding { done: 1, .. }));
            true
        });
        (media.unwrap(), passes)
    };
    let ((roomy, once), (tight, twice)) = (load(u64::MAX), load(u64::from(2 * H * W * 3)));
    assert!(roomy.frames.len() > 5 && twice > once, "{} frames, {once} and {twice}", roomy.frames.len());
    assert!(roomy == tight);
}

/// Two hours by 2.0's rule: within its budget of tokens, and no more in memory than the patches that come out.
#[test]
fn two_hours_fit_their_budget() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.mp4");
    // A frame every two seconds, as lectures have slides.
    let input = ["-f", "lavfi", "-i", "testsrc=duration=7200:size=320x180:rate=0.5"];
    let coding = ["-c:v", "libx264", "-preset", "ultrafast", "-b:v", "4k", "-pix_fmt", "yuv420p"];
    ffmpeg(&[&input[..], &coding[..], &[path.to_str().unwrap()]].concat());
    let config = MediaConfig::adaptive();
    let media = Loader::new(config.clone()).load(&item(&path, ItemOptions::default()), &mut |_| true).unwrap();
    assert_eq!(media.frames.len(), 2880);
    assert_eq!((stamps(&media)[0], stamps(&media)[2879]), (0.0, 7198.0));
    assert!(
        media.frames.iter().all(|frame| (frame.height, frame.width) == (media.frames[0].height, media.frames[0].width))
    );
    let pixels = media.frames.iter().map(|frame| u64::from(frame.height) * u64::from(frame.width)).sum::<u64>();
    assert!(pixels <= config.video.total_pixels + 2880 * 784 && pixels > config.video.total_pixels / 2, "{pixels}");
    let Pixels::U8(bytes) = &media.patches.pixels else { panic!("clips give bytes") };
    assert_eq!((bytes.len() as u64, bytes.capacity()), (pixels * 3, bytes.len()));
    // A tenth of the budget takes a tenth of the frames.
    let options = ItemOptions { video_total_pixels: Some(config.video.total_pixels / 10), ..ItemOptions::default() };
    let media = Loader::new(config).load(&item(&path, options), &mut |_| true).unwrap();
    assert_eq!(media.frames.len(), 288);
}

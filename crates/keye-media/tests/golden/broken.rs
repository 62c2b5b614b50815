//! What is said of clips that are cut short or damaged, and that nothing is said of whole ones. Needs `ffmpeg`.

use std::path::{Path, PathBuf};

use keye_media::{ItemOptions, Loaded, Loader, MediaConfig, MediaItem, MediaKind, Source};

use crate::make::{ffmpeg, make, pattern};
use crate::support::{SLOW_FAST, fixture};

const H: u32 = 84;
const W: u32 = 112;

fn load(path: &Path, options: ItemOptions) -> Loaded {
    let item = MediaItem { kind: MediaKind::Video, source: Source::Path(path.into()), options };
    let loaded = Loader::new(MediaConfig::slow_fast()).load_with_warnings(&item, &mut |_| true);
    loaded.unwrap_or_else(|error| panic!("{error}"))
}

fn warnings(path: &Path) -> Vec<String> {
    load(path, ItemOptions::default()).warnings
}

/// The one thing that is said.
fn warning(path: &Path) -> String {
    let warnings = warnings(path);
    let [warning] = &warnings[..] else { panic!("{}: {warnings:?}", path.display()) };
    warning.clone()
}

#[track_caller]
fn assert_whole(path: &Path) {
    assert_eq!(warnings(path), [""; 0], "{}", path.display());
}

/// A copy with other bytes.
fn edited(path: &Path, name: &str, edit: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = std::fs::read(path).unwrap();
    edit(&mut bytes);
    let target = path.with_file_name(format!("{name}-{}", path.file_name().unwrap().to_str().unwrap()));
    std::fs::write(&target, bytes).unwrap();
    target
}

fn first_part(path: &Path, percent: usize) -> PathBuf {
    edited(path, "cut", |bytes| bytes.truncate(bytes.len() * percent / 100))
}

/// Where the frames are said to end.
fn end(warning: &str) -> f64 {
    let rest = warning.strip_prefix("frames end at ").unwrap_or_else(|| panic!("{warning}"));
    rest.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_cut_clip_says_where_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let source = pattern(H, W, 25, 6.0);
    let h264 = ["-c:v", "libx264", "-g", "12"];
    let clips: [(&str, &[&str]); 7] = [
        ("front.mp4", &["-movflags", "+faststart"]),
        ("front.mov", &["-movflags", "+faststart"]),
        ("fragmented.mp4", &["-movflags", "+frag_keyframe+empty_moov"]),
        ("clip.mkv", &[]),
        ("clip.flv", &[]),
        ("clip.avi", &["-c:v", "mpeg4"]),
        ("clip.wmv", &["-c:v", "wmv2"]),
    ];
    for (name, options) in clips {
        let Some(path) = make(dir.path(), name, &source, &[&h264[..], options].concat()) else { continue };
        assert_whole(&path);
        let said = warning(&first_part(&path, 60));
        // FLV counts from its first frame on, which has a time of its own.
        let (of, seems) = match name {
            "fragmented.mp4" => (" s, where ", "the file breaks off: it seems cut short"),
            _ => (" s of 6.", " s: the file seems cut short or damaged"),
        };
        assert!(said.contains(of) && said.ends_with(seems), "{name}: {said}");
        assert!((1.0..5.5).contains(&end(&said)), "{name}: {said}");
    }
}

#[test]
fn a_clip_that_was_not_filled_to_its_end_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let source = pattern(H, W, 25, 6.0);
    for (name, options) in [("front.mp4", &["-movflags", "+faststart"][..]), ("clip.mkv", &[])] {
        let path = make(dir.path(), name, &source, &[&["-c:v", "libx264"], options].concat()).unwrap();
        let hollow = edited(&path, "hollow", |bytes| {
            let from = bytes.len() * 6 / 10;
            bytes[from..].fill(0);
        });
        let said = warning(&hollow);
        assert!(said.contains(" s of 6.0 s: ") && (1.0..5.5).contains(&end(&said)), "{name}: {said}");
    }
}

#[test]
fn damaged_bytes_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let front = ["-c:v", "libx264", "-movflags", "+faststart"];
    let path = make(dir.path(), "front.mp4", &pattern(H, W, 10, 4.0), &front).unwrap();
    let damaged = edited(&path, "damaged", |bytes| {
        let (from, length) = (bytes.len() / 3, bytes.len() / 2);
        let mut state = 12345u32;
        for _ in 0..60 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bytes[from + (state >> 8) as usize % length] ^= (state >> 3) as u8 | 1;
        }
    });
    let said = warning(&damaged);
    assert!(said.starts_with("the file seems damaged, frames may be missing or look wrong: "), "{said}");
    assert!(!said.contains("0x"), "{said}");
}

#[test]
fn a_part_before_the_cut_lacks_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "clip.mkv", &pattern(H, W, 25, 6.0), &["-c:v", "libx264"]).unwrap();
    let cut = first_part(&path, 60);
    let part = |start, end| ItemOptions { video_start: start, video_end: end, ..ItemOptions::default() };
    assert_eq!(load(&cut, part(None, Some(1.0))).warnings, [""; 0]);
    assert_eq!(load(&cut, part(Some(1.0), None)).warnings.len(), 1);
    assert_eq!(load(&path, part(Some(1.0), Some(4.0))).warnings, [""; 0]);
}

#[test]
fn whole_clips_are_not_suspected() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let video = make(dir.path(), "video.mp4", &pattern(H, W, 25, 3.0), &["-c:v", "libx264", "-g", "40"]).unwrap();
    let long = make(dir.path(), "long.m4a", "sine=duration=8", &[]).unwrap();
    let short = make(dir.path(), "short.m4a", "sine=duration=1", &[]).unwrap();
    let video = video.to_str().unwrap();
    for (sound, kinds) in [(long, &["mp4", "mkv", "avi", "flv", "ts"][..]), (short, &["mp4", "mkv"])] {
        for kind in kinds {
            let path = at(&format!("{}.{kind}", sound.file_stem().unwrap().to_str().unwrap()));
            let words = ["-i", video, "-i", sound.to_str().unwrap(), "-c", "copy", path.to_str().unwrap()];
            assert!(ffmpeg(&words).status.success());
            assert_whole(&path);
            if *kind == "flv" {
                assert_whole(&edited(&path, "padded", |bytes| bytes.extend([0; 7])));
            }
        }
    }
    // Begins between two whole pictures, by an edit list and without; the first frames of the latter cannot be decoded.
    let cut = at("edit.mp4");
    assert!(ffmpeg(&["-ss", "0.9", "-i", video, "-c", "copy", cut.to_str().unwrap()]).status.success());
    assert_whole(&cut);
    let stream = make(dir.path(), "clip.ts", &pattern(H, W, 25, 4.0), &["-c:v", "libx264", "-g", "50"]).unwrap();
    let middle = edited(&stream, "middle", |bytes| {
        bytes.drain(..bytes.len() / 188 / 3 * 188);
    });
    assert_whole(&middle);
    // The last frame stays for long, and fewer come than their rate says.
    let uneven = format!("{},select='if(lt(t,1),1,not(mod(n,60)))'", pattern(H, W, 20, 9.0));
    for name in ["uneven.mp4", "uneven.mkv"] {
        assert_whole(&make(dir.path(), name, &uneven, &["-c:v", "libx264", "-fps_mode", "vfr"]).unwrap());
    }
    // Written to a pipe, where nobody can come back to write the length.
    let piped = at("piped.mkv");
    let output = ffmpeg(&["-i", video, "-c", "copy", "-f", "matroska", "-"]);
    std::fs::write(&piped, output.stdout).unwrap();
    assert_whole(&piped);
    // Two fields to a frame.
    let fields = ["-c:v", "mpeg2video", "-flags", "+ilme+ildct"];
    assert_whole(&make(dir.path(), "fields.mpg", &pattern(96, W, 25, 2.0), &fields).unwrap());
    let media = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../media");
    assert_whole(&media.join("shapes-1.mp4"));
    assert_whole(&fixture(SLOW_FAST).join("inputs/clip.mp4"));
}

/// All of a clip is decoded at its full size, and never held: its frames alone would be twice what is allowed.
#[cfg(target_os = "linux")]
#[test]
fn a_clip_streams_through_bounded_memory() {
    const AGAIN: &str = "KEYE_TEST_CLIP";
    const MOST_KB: usize = 110 << 10;
    const FRAMES: u32 = 600;
    if let Some(path) = std::env::var_os(AGAIN) {
        let options = ItemOptions {
            nframes: Some(f64::from(FRAMES)),
            resized_height: Some(28),
            resized_width: Some(56),
            ..ItemOptions::default()
        };
        let item = MediaItem { kind: MediaKind::Video, source: Source::Path(path.into()), options };
        let media = Loader::new(MediaConfig::preview()).load(&item, &mut |_| true).unwrap();
        assert_eq!(media.frames.len(), FRAMES as usize);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let peak: usize = peak.split_whitespace().next().unwrap().parse().unwrap();
        assert!(peak < MOST_KB, "{peak} kB");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (h, w) = (270, 480);
    assert!((FRAMES * h * w * 3) as usize > 2 * (MOST_KB << 10));
    let fast = ["-c:v", "libx264", "-preset", "ultrafast"];
    let path = make(dir.path(), "clip.mp4", &pattern(h, w, 30, f64::from(FRAMES) / 30.0), &fast).unwrap();
    // Of its own, so that no other test is counted.
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    again.args(["broken::a_clip_streams_through_bounded_memory", "--exact"]).env(AGAIN, path);
    let output = again.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

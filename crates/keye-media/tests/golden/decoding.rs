//! The decoder from inside the crate: that it yields exactly the frames a full decode has at the wanted indices, and
//! that children come to no harm and do none, whatever they do. Needs `ffmpeg`.

#[path = "make.rs"]
mod make;

use std::fs::{File, read_to_string};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use make::{all_frames, make, pattern};

use crate::decode::{Frames, count};
use crate::ffmpeg::{Programs, Watch};
use crate::probe::probe;
use crate::{ItemOptions, Limits, Loader, Media, MediaConfig, MediaError, Progress};

/// Runs `work` with a watch that never fires.
fn watched<T>(work: impl FnOnce(&mut Watch) -> T) -> T {
    let limit = Duration::from_secs(60);
    let mut keep = |_| true;
    work(&mut Watch {
        input: "clip",
        deadline: Instant::now() + limit,
        time: limit,
        progress: &mut keep,
        done: 0,
        total: 0,
    })
}

fn select(path: &Path, indices: &[u64]) -> Vec<Vec<u8>> {
    watched(|watch| {
        let (programs, limits) = (Programs::find().unwrap(), Limits::default());
        let file = File::open(path).unwrap();
        let clip = probe(&programs, &file, "mov", &limits, watch).unwrap();
        let mut frames = Frames::start(&programs, &file, &clip, indices, &limits, watch).unwrap();
        std::iter::from_fn(|| frames.next(watch).unwrap()).collect()
    })
}

#[test]
fn selected_frames_equal_a_full_decode() {
    let dir = tempfile::tempdir().unwrap();
    let (h, w) = (46, 62);
    let source = pattern(h, w, 25, 12.0);
    let b_frames = ["-c:v", "libx264", "-preset", "fast", "-bf", "3", "-g", "40"];
    let constant = make(dir.path(), "constant.mp4", &source, &b_frames).unwrap();
    let uneven = format!("{source},select='if(lt(t,4),1,if(lt(t,8),not(mod(n,3)),not(mod(n,7))))'");
    let variable = make(dir.path(), "variable.mp4", &uneven, &[&b_frames[..], &["-fps_mode", "vfr"]].concat()).unwrap();
    for (path, least) in [(&constant, 300), (&variable, 140)] {
        let all = all_frames(path, h, w);
        assert!(all.len() >= least, "{} frames", all.len());
        // As the reference samples: 33 and 7 of 300 have ties on the way; more terms than a flat sum could have.
        for n in [1, 2, 7, 33, 64, 120, 137, all.len()] {
            let step = (all.len() - 1) as f64 / (n.max(2) - 1) as f64;
            let indices: Vec<u64> = (0..n).map(|i| (i as f64 * step).round_ties_even() as u64).collect();
            let wanted: Vec<&Vec<u8>> = indices.iter().map(|i| &all[*i as usize]).collect();
            assert!(select(path, &indices).iter().eq(wanted), "{n} frames of {}", path.display());
        }
    }
}

#[test]
fn an_edit_list_hides_frames() {
    let dir = tempfile::tempdir().unwrap();
    let options = ["-c:v", "libx264", "-bf", "2", "-g", "100"];
    let whole = make(dir.path(), "whole.mp4", &pattern(32, 48, 10, 4.0), &options).unwrap();
    let cut = dir.path().join("cut.mp4");
    let words = ["-ss", "1.3", "-i", whole.to_str().unwrap(), "-c", "copy", cut.to_str().unwrap()];
    assert!(make::ffmpeg(&words).status.success());
    let all = all_frames(&cut, 32, 48);
    assert!(all.len() < 40, "the copy has no hidden frame, so this tests nothing");
    watched(|watch| {
        let (programs, file) = (Programs::find().unwrap(), File::open(&cut).unwrap());
        let clip = probe(&programs, &file, "mov", &Limits::default(), watch).unwrap();
        assert_eq!(clip.times.len(), all.len());
        let counted = count(&programs, &file, &clip, &Limits::default(), watch).unwrap();
        assert_eq!(counted.times.len(), all.len());
        assert!(clip.times.iter().zip(&counted.times).all(|(a, b)| (a - b).abs() < 2e-3), "{:?}", clip.times);
    });
    let indices: Vec<u64> = (0..all.len() as u64).collect();
    assert!(select(&cut, &indices) == all);
}

/// A program that does what `body` says when it is asked for anything but its version, after writing down its id.
fn fake(dir: &Path, name: &str, body: &str) -> PathBuf {
    let version = "[ \"$1\" = -version ] && exec /usr/bin/env ffmpeg -version";
    script(dir, name, &format!("{version}\necho $$ > {}\n{body}", dir.join("pid").display()))
}

/// A program of the shell's.
fn script(dir: &Path, name: &str, body: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    // A child that another test starts just now may still hold the script open for writing, which forbids running it.
    while std::process::Command::new(&path).arg("-version").output().is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    path
}

fn clip_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keye-preview-tiny/inputs/clip.mp4")
}

fn load_by(
    programs: &Programs,
    limit: Duration,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Media, MediaError> {
    let loader = Loader::new(MediaConfig::preview());
    let options = ItemOptions { min_pixels: Some(6272), max_pixels: Some(15_680), ..ItemOptions::default() };
    let watch = Watch { input: "clip", deadline: Instant::now() + limit, time: limit, progress, done: 0, total: 0 };
    crate::video::load_with(programs, &loader, &options, (&File::open(clip_path()).unwrap(), "mov"), watch)
        .map(|loaded| loaded.media)
}

/// True when the program that wrote its id here is gone.
fn is_gone(dir: &Path) -> bool {
    let pid = read_to_string(dir.join("pid")).unwrap();
    !Path::new("/proc").join(pid.trim()).exists()
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_child_that_hangs_is_ended_when_its_time_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let sleeper = fake(dir.path(), "ffmpeg", "exec sleep 1000");
    let real = Programs::find().unwrap();
    for programs in
        [Programs { ffmpeg: sleeper.clone(), ..real.clone() }, Programs { ffprobe: sleeper.clone(), ..real.clone() }]
    {
        let start = Instant::now();
        let error = load_by(&programs, Duration::from_secs(1), &mut |_| true).unwrap_err();
        assert!(matches!(error, MediaError::Limit { what: "the time in seconds", limit: 1, .. }), "{error}");
        assert!(start.elapsed() < Duration::from_secs(10));
        assert!(is_gone(dir.path()));
    }
}

#[test]
fn cancelling_ends_the_child_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let real = Programs::find().unwrap();
    let programs = Programs { ffmpeg: fake(dir.path(), "ffmpeg", "exec sleep 1000"), ..real.clone() };
    let start = Instant::now();
    let pid = dir.path().join("pid");
    // Given up once the child is there and sleeps.
    let error = load_by(&programs, LONG, &mut |_| !pid.exists()).unwrap_err();
    assert!(matches!(error, MediaError::Cancelled), "{error}");
    assert!(is_gone(dir.path()) && start.elapsed() < Duration::from_secs(10));

    // In the middle of a real decode, after some frames.
    let mut seen = 0;
    let error = load_by(&real, LONG, &mut |progress| {
        if let Progress::Decoding { done, .. } = progress {
            seen = done;
        }
        seen < 2
    });
    assert!(matches!(error, Err(MediaError::Cancelled)) && seen == 2);
}

#[test]
fn a_killed_child_is_an_error_of_this_item_only() {
    let dir = tempfile::tempdir().unwrap();
    let real = Programs::find().unwrap();
    let killed = Programs { ffmpeg: fake(dir.path(), "ffmpeg", "kill -9 $$"), ..real.clone() };
    let error = load_by(&killed, LONG, &mut |_| true).unwrap_err().to_string();
    assert!(error.contains("clip: ffmpeg was ended by signal 9"), "{error}");
    assert_eq!(load_by(&real, LONG, &mut |_| true).unwrap().frames.len(), 4);
}

#[test]
fn nonsense_from_a_child_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let real = Programs::find().unwrap();
    let quiet = fake(dir.path(), "ffmpeg", "yes complaint | head -n 100000 >&2; exit 1");
    let error = load_by(&Programs { ffmpeg: quiet, ..real.clone() }, LONG, &mut |_| true).unwrap_err().to_string();
    assert!(error.contains("no frame") && error.contains("complaint") && error.len() < 400, "{error}");
    let mute = fake(dir.path(), "ffprobe", "exit 3");
    let error = load_by(&Programs { ffprobe: mute, ..real.clone() }, LONG, &mut |_| true).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, MediaError::Ffmpeg(_)) && text.contains("ffprobe failed without a message"), "{text}");
    assert!(text.contains("exit status: 3") && text.contains("KEYE_FFPROBE"), "{text}");
    let mute = Programs { ffmpeg: fake(dir.path(), "ffmpeg", "exit 4"), ..real.clone() };
    let text = load_by(&mute, LONG, &mut |_| true).unwrap_err().to_string();
    assert!(text.contains("ffmpeg failed without a message (exit status: 4)"), "{text}");
    let liar = "echo 'packet|stream_index=0|pts=x|flags=K_'; echo 'stream|index=0|width=-1|height=99999999999'";
    let liar = fake(dir.path(), "ffprobe", liar);
    let error = load_by(&Programs { ffprobe: liar, ..real.clone() }, LONG, &mut |_| true).unwrap_err();
    assert!(matches!(error, MediaError::Unreadable { .. }), "{error}");
    let gone = Programs { ffmpeg: dir.path().join("nothing"), ..real };
    let error = load_by(&gone, LONG, &mut |_| true).unwrap_err().to_string();
    assert!(error.contains("apt-get install -y ffmpeg") && error.contains("KEYE_FFMPEG"), "{error}");
}

/// A release is asked for anew when it could not be told. This one is 4.4.
#[test]
fn a_failed_look_at_the_release_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let [broken, words] = ["broken", "words"].map(|name| dir.path().join(name));
    std::fs::write(&broken, "").unwrap();
    let body = format!(
        "if [ \"$1\" = -version ]; then\n[ -e {} ] && exit 3\necho 'libavutil      56. 70.100 / 56. 70.100'\nelse\n\
         echo \"$*\" >> {}\nfi",
        broken.display(),
        words.display()
    );
    let programs = Programs { ffmpeg: script(dir.path(), "ffmpeg", &body), ..Programs::find().unwrap() };
    let error = load_by(&programs, LONG, &mut |_| true).unwrap_err();
    assert!(matches!(&error, MediaError::Ffmpeg(text) if text.contains("-version failed")), "{error}");
    std::fs::remove_file(broken).unwrap();
    load_by(&programs, LONG, &mut |_| true).unwrap_err();
    let words = read_to_string(words).unwrap();
    assert!(words.contains("-vsync passthrough") && !words.contains("-fps_mode"), "{words}");
}

/// Release 4.4 does not know side data under the name that later ones print.
#[test]
fn an_old_ffprobe_understands_the_question() {
    let dir = tempfile::tempdir().unwrap();
    let real = Programs::find().unwrap();
    let body = format!(
        "case \"$*\" in *stream_side_data=*) echo \"No match for section 'stream_side_data'\" >&2; exit 1;; esac\n\
         exec {} \"$@\"",
        real.ffprobe.display()
    );
    let old = Programs { ffprobe: fake(dir.path(), "ffprobe", &body), ..real };
    assert_eq!(load_by(&old, LONG, &mut |_| true).unwrap().frames.len(), 4);
}

/// Some packets come twice, as those of hidden frames do, and give no frame: a part of the clip is the same without them.
#[test]
fn packets_without_a_frame_do_not_move_a_part() {
    let dir = tempfile::tempdir().unwrap();
    let real = Programs::find().unwrap();
    let path = make(dir.path(), "clip.mp4", &pattern(46, 62, 10, 8.0), &["-c:v", "libx264", "-bf", "0"]).unwrap();
    let twice = "awk '{ print } /^packet/ && ++n % 13 == 0 { print }'";
    let body = format!("{} \"$@\" | {twice}", real.ffprobe.display());
    let more = Programs { ffprobe: fake(dir.path(), "ffprobe", &body), ..real.clone() };
    let options = ItemOptions { video_start: Some(4.0), video_end: Some(6.0), ..ItemOptions::default() };
    let load = |programs: &Programs| {
        let (loader, file, deadline) =
            (Loader::new(MediaConfig::slow_fast()), File::open(&path).unwrap(), Instant::now() + LONG);
        let mut keep = |_| true;
        let watch = Watch { input: "clip", deadline, time: LONG, progress: &mut keep, done: 0, total: 0 };
        crate::video::load_with(programs, &loader, &options, (&file, "mov"), watch).unwrap().media
    };
    let (by_packets, expected) = (load(&more), load(&real));
    assert_eq!(expected.frames.iter().map(|frame| frame.index).collect::<Vec<_>>(), [40, 47, 53, 60]);
    assert!(by_packets == expected);
}

/// Hardware gives the same pixels with both colours side by side. Here the CPU imitates it: `-hwaccel NAME` becomes a filter.
#[test]
fn hardware_decodes_to_the_same_bytes() {
    const IMITATION: &str = r#"
for word; do
    shift
    case "$before $word" in
    *" -hwaccel" | "-hwaccel "*) ;;
    "-filter:v "*) set -- "$@" "format=nv12,$word" ;;
    *) set -- "$@" "$word" ;;
    esac
    before=$word
done
exec /usr/bin/env ffmpeg "$@""#;
    let dir = tempfile::tempdir().unwrap();
    let real = Programs::find().unwrap();
    let expected = load_by(&real, LONG, &mut |_| true).unwrap();
    let hardware = fake(dir.path(), "ffmpeg", IMITATION);
    let accelerator = Some("cuda".to_owned());
    let by = Programs { ffmpeg: hardware, accelerator, ..real.clone() };
    let same = |media: Media| media.patches == expected.patches && media.frames == expected.frames;
    assert!(same(load_by(&by, LONG, &mut |_| true).unwrap()));
    let untold = Programs { accelerator: None, ..by };
    assert!(!same(load_by(&untold, LONG, &mut |_| true).unwrap()), "the other order is rounded in another way");
    // Whatever this machine has, or nothing.
    let auto = Programs { accelerator: Some("auto".into()), ..real.clone() };
    assert!(same(load_by(&auto, LONG, &mut |_| true).unwrap()));
    let unknown = Programs { accelerator: Some("abacus".into()), ..real };
    let error = load_by(&unknown, LONG, &mut |_| true).unwrap_err().to_string();
    assert!(error.contains("KEYE_HWACCEL=abacus") && error.contains("abacus"), "{error}");
}

//! How much more an item costs here than its plain decoding: for `keye bench` and `examples/media_bench.rs`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::ffmpeg::Programs;
use crate::{Loader, MediaError, MediaItem, MediaKind};

/// What loading an item cost, and what its plain decoding cost in the same run: `ffmpeg -i CLIP -f null -`, or for a JPEG
/// libjpeg-turbo's `djpeg`, if it is installed. The best of all rounds, each figure on its own; CPU time is user and
/// system time with all children.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct MediaCost {
    /// What was loaded.
    pub clip: String,
    /// CPU seconds.
    pub cpu_s: f64,
    /// Seconds.
    pub wall_s: f64,
    /// Most resident memory of this process while loading, in MB; 0 where the system does not tell.
    pub rss_mb: f64,
    /// Most resident memory of the decoder, in MB; 0 where the system does not tell, or none was seen.
    pub child_rss_mb: f64,
    /// The program that decoded alone.
    pub decoder: String,
    /// CPU seconds of decoding alone.
    pub decode_cpu_s: f64,
    /// Seconds of decoding alone.
    pub decode_wall_s: f64,
    /// `cpu_s / decode_cpu_s`.
    pub ratio_to_decode: f64,
    /// `wall_s / decode_wall_s`.
    pub wall_ratio_to_decode: f64,
    /// Frames and patches that came out.
    pub frames: usize,
    /// Patches that came out.
    pub patches: usize,
}

/// Loads `item` and has the file `path` behind it decoded alone, in turns, `rounds` times.
///
/// # Errors
/// Those of [`Loader::load`], and an `ffmpeg` that cannot be run or fails.
pub fn media_cost(loader: &Loader, item: &MediaItem, path: &Path, rounds: u32) -> Result<MediaCost, MediaError> {
    let programs = Programs::find()?;
    let mut cost = MediaCost {
        clip: item.source.name(),
        cpu_s: f64::INFINITY,
        wall_s: f64::INFINITY,
        rss_mb: 0.0,
        child_rss_mb: 0.0,
        decoder: String::new(),
        decode_cpu_s: f64::INFINITY,
        decode_wall_s: f64::INFINITY,
        ratio_to_decode: 0.0,
        wall_ratio_to_decode: 0.0,
        frames: 0,
        patches: 0,
    };
    for _ in 0..rounds.max(1) {
        let (cpu, wall) =
            timed(|| decode_alone(&programs.ffmpeg, item.kind, path).map(|program| cost.decoder = program))?;
        (cost.decode_cpu_s, cost.decode_wall_s) = (cost.decode_cpu_s.min(cpu), cost.decode_wall_s.min(wall));
        forget_peak();
        let (cpu, wall) = timed(|| {
            let media = loader.load(item, &mut |_| {
                cost.child_rss_mb = cost.child_rss_mb.max(children_peak_mb());
                true
            })?;
            (cost.frames, cost.patches) = (media.frames.len(), media.patches.len());
            Ok(())
        })?;
        (cost.cpu_s, cost.wall_s) = (cost.cpu_s.min(cpu), cost.wall_s.min(wall));
        cost.rss_mb = cost.rss_mb.max(peak_mb("self").unwrap_or(0.0));
    }
    cost.ratio_to_decode = cost.cpu_s / cost.decode_cpu_s;
    cost.wall_ratio_to_decode = cost.wall_s / cost.decode_wall_s;
    Ok(cost)
}

/// Writes a minute of 720p at 30 frames per second, about 3 Mbit/s of H.264 with B frames: 25 s of a moving texture with
/// grain, 15 s where only the grain moves, 20 s of a test pattern. Takes about half a minute.
///
/// # Errors
/// An `ffmpeg` that cannot be run, or that lacks libx264.
pub fn write_sample_clip(path: &Path) -> Result<(), MediaError> {
    let programs = Programs::find()?;
    let texture = "testsrc2=s=1280x720:r=30:d=0.03,noise=c0s=90:allf=p,gblur=sigma=2.5,loop=-1:1:0";
    let filter = format!(
        "{texture},scroll=h=0.0031:v=0.0017,noise=alls=5:allf=t,trim=duration=25,setpts=PTS-STARTPTS[a];\
         {texture},noise=alls=5:allf=t,trim=duration=15,setpts=PTS-STARTPTS[b];\
         testsrc2=s=1280x720:r=30:d=20,noise=alls=5:allf=t[c];[a][b][c]concat=n=3,format=yuv420p[v]"
    );
    let mut command = Command::new(&programs.ffmpeg);
    command.args(["-nostdin", "-loglevel", "error", "-y", "-filter_complex", &filter, "-map", "[v]", "-t", "60"]);
    command.args(["-c:v", "libx264", "-preset", "veryfast", "-b:v", "3M", "-maxrate", "5M", "-bufsize", "6M"]);
    run(command.arg("-f").arg("mp4").arg(path), "cannot write the sample clip")
}

/// Writes a photo of 4032 x 3024 pixels as a JPEG of 3.5 MB with the usual halved chroma.
///
/// # Errors
/// An `ffmpeg` that cannot be run.
pub fn write_sample_photo(path: &Path) -> Result<(), MediaError> {
    let programs = Programs::find()?;
    let source = "testsrc2=s=4032x3024:r=1:d=1,noise=alls=60:allf=p,gblur=sigma=1,format=yuvj420p";
    let mut command = Command::new(&programs.ffmpeg);
    command.args(["-nostdin", "-loglevel", "error", "-y", "-f", "lavfi", "-i", source, "-frames:v", "1"]);
    command.args(["-c:v", "mjpeg", "-q:v", "3", "-f", "image2", "-update", "1"]);
    run(command.arg(path), "cannot write the sample photo")
}

/// Gives the name of the program.
fn decode_alone(ffmpeg: &Path, kind: MediaKind, file: &Path) -> Result<String, MediaError> {
    let jpeg = file.extension().is_some_and(|e| e.eq_ignore_ascii_case("jpg") || e.eq_ignore_ascii_case("jpeg"));
    if kind == MediaKind::Image && jpeg {
        let mut djpeg = Command::new("djpeg");
        djpeg.args(["-outfile", "/dev/null"]).arg(file);
        if run(&mut djpeg, "djpeg").is_ok() {
            return Ok("djpeg".into());
        }
    }
    let mut command = Command::new(ffmpeg);
    command.args(["-nostdin", "-loglevel", "error", "-i"]).arg(file).args(["-f", "null", "-"]);
    run(&mut command, "cannot decode it")?;
    Ok("ffmpeg".into())
}

fn run(command: &mut Command, what: &str) -> Result<(), MediaError> {
    let done = command.stdin(Stdio::null()).stdout(Stdio::null()).output();
    let output = done.map_err(|e| MediaError::Ffmpeg(format!("{what}: {e}")))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(MediaError::Ffmpeg(format!("{what}: {}", String::from_utf8_lossy(&output.stderr).trim()))),
    }
}

/// CPU seconds, children included, and seconds.
fn timed(work: impl FnOnce() -> Result<(), MediaError>) -> Result<(f64, f64), MediaError> {
    let (cpu, start) = (cpu_seconds(), Instant::now());
    work()?;
    Ok((cpu_seconds() - cpu, start.elapsed().as_secs_f64()))
}

/// User and system time of this process and of all children that were waited for.
fn cpu_seconds() -> f64 {
    let of = |who| {
        // SAFETY: all bytes of `rusage` are integers, for which zero is a value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: `usage` is a valid place for what is written; on failure it stays zero.
        unsafe { libc::getrusage(who, &mut usage) };
        let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
        seconds(usage.ru_utime) + seconds(usage.ru_stime)
    };
    of(libc::RUSAGE_SELF) + of(libc::RUSAGE_CHILDREN)
}

/// Starts this process's peak anew; a system that does not offer it shows the peak since its start.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// `VmHWM` of a process, Linux only.
fn peak_mb(process: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<f64>().ok()? / 1024.0)
}

/// The largest peak of the children that this thread started.
fn children_peak_mb() -> f64 {
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    children.split_whitespace().filter_map(peak_mb).fold(0.0, f64::max)
}

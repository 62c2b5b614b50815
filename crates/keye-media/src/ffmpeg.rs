//! Finding and running `ffmpeg` and `ffprobe`.
//!
//! A child gets the clip as its standard input and opens it under that one name, so it needs no path of ours; its
//! environment is empty but for a few names; it is killed and reaped when its [`Output`] is dropped, however the work
//! ends, and on Linux by the kernel when this process is killed. A Ctrl-C of the terminal does not reach it: the caller
//! decides what ends. Nobody waits for a child without looking at the clock and at the caller's wish to stop ([`Watch`]).

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{MediaError, Progress};

/// How a child names the file it was handed as standard input. Linux opens it anew, so that it can be sought in.
#[cfg(target_os = "linux")]
pub(crate) const INPUT: &str = "file:/proc/self/fd/0";
/// How a child names the file it was handed as standard input.
#[cfg(not(target_os = "linux"))]
pub(crate) const INPUT: &str = "file:/dev/fd/0";

/// Bytes of a child's messages that are kept.
const STDERR_KEPT: usize = 8 << 10;
/// Blocks of output that may wait for their reader.
const BLOCKS_AHEAD: usize = 2;
/// How often a waiting reader looks at the clock and the caller.
const TICK: Duration = Duration::from_millis(100);
/// What a child sees of our environment.
const ENVIRONMENT: [&str; 8] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
    // Which hardware decodes.
    "CUDA_VISIBLE_DEVICES",
    "LIBVA_DRIVER_NAME",
];

/// The clock and the caller's wish, looked at while waiting.
pub(crate) struct Watch<'a> {
    /// Name of the item in errors.
    pub input: &'a str,
    /// When the item's time is over.
    pub deadline: Instant,
    /// The whole time an item may take, for the error.
    pub time: Duration,
    /// The caller.
    pub progress: &'a mut dyn FnMut(Progress) -> bool,
    /// Sampled frames so far.
    pub done: u32,
    /// Sampled frames in all; 0 while unknown.
    pub total: u32,
}

impl Watch<'_> {
    /// Reports progress.
    ///
    /// # Errors
    /// [`MediaError::Cancelled`] when the caller gives up, [`MediaError::Limit`] when the time is over.
    pub fn check(&mut self) -> Result<(), MediaError> {
        if !(self.progress)(Progress::Decoding { done: self.done, total: self.total }) {
            return Err(MediaError::Cancelled);
        }
        if Instant::now() >= self.deadline {
            let limit = self.time.as_secs();
            let found = limit.saturating_add(1);
            return Err(MediaError::Limit { input: self.input.into(), what: "the time in seconds", found, limit });
        }
        Ok(())
    }

    /// [`MediaError::Limit`] when more was found than allowed.
    pub fn limit(&self, what: &'static str, found: u64, limit: u64) -> Result<(), MediaError> {
        match found > limit {
            true => Err(MediaError::Limit { input: self.input.into(), what, found, limit }),
            false => Ok(()),
        }
    }

    /// An [`MediaError::Unreadable`] for this item.
    pub fn unreadable(&self, reason: impl Into<String>) -> MediaError {
        MediaError::Unreadable { input: self.input.into(), reason: reason.into() }
    }
}

/// The two programs.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    /// Decodes.
    pub ffmpeg: PathBuf,
    /// Tells facts.
    pub ffprobe: PathBuf,
    /// What ffmpeg decodes with beside the CPU, as its `-hwaccel` names it: `cuda` is NVDEC, `auto` whatever works.
    pub accelerator: Option<String>,
}

impl Programs {
    /// `$KEYE_FFMPEG` and `$KEYE_FFPROBE`, else (for ffprobe) the neighbour of `$KEYE_FFMPEG`, else `PATH`; `$KEYE_HWACCEL`.
    pub fn find() -> Result<Self, MediaError> {
        let ffmpeg_named = std::env::var_os("KEYE_FFMPEG").filter(|v| !v.is_empty());
        let ffmpeg = locate("ffmpeg", "KEYE_FFMPEG", ffmpeg_named.clone())?;
        let ffprobe_named = std::env::var_os("KEYE_FFPROBE").filter(|v| !v.is_empty()).or_else(|| {
            let beside = Path::new(&ffmpeg_named?).with_file_name("ffprobe");
            beside.is_file().then(|| beside.into_os_string())
        });
        let ffprobe = locate("ffprobe", "KEYE_FFPROBE", ffprobe_named)?;
        Ok(Self { ffmpeg, ffprobe, accelerator: named_accelerator(std::env::var_os("KEYE_HWACCEL"))? })
    }

    /// True when `ffmpeg` is of release 8 or later, which dropped `-vsync` and `-filter_script`, or does not say. Asked
    /// once a program.
    ///
    /// # Errors
    /// A program that cannot be run or fails; it is asked anew the next time.
    pub fn is_modern(&self, watch: &mut Watch) -> Result<bool, MediaError> {
        static KNOWN: Mutex<Option<HashMap<PathBuf, bool>>> = Mutex::new(None);
        let known = |map: &mut Option<HashMap<PathBuf, bool>>| map.get_or_insert_default().get(&self.ffmpeg).copied();
        if let Some(modern) = known(&mut KNOWN.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(modern);
        }
        let mut output = Output::start(&self.ffmpeg, &["-version".into()], None, 64 << 10)?;
        let mut text = Vec::new();
        while let Some(block) = output.next(watch)? {
            if text.len() < STDERR_KEPT * 8 {
                text.extend_from_slice(&block);
            }
            output.give_back(block);
        }
        let (status, messages) = output.finish(watch)?;
        if !status.success() {
            let (program, message) = (self.ffmpeg.display(), first_message(&messages));
            return Err(MediaError::Ffmpeg(format!("{program} -version failed ({status}): {message}")));
        }
        let Some(major) = libavutil_major(&String::from_utf8_lossy(&text)) else { return Ok(true) };
        let mut map = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(*map.get_or_insert_default().entry(self.ffmpeg.clone()).or_insert(major >= 60))
    }
}

/// `libavutil      57. 28.100 / ...` has major version 57 (ffmpeg 4.4: 56, 5: 57, 6: 58, 7: 59, 8: 60). The version in
/// the first line of `-version` is of no use: distributions and nightly builds write what they like there.
fn libavutil_major(text: &str) -> Option<u32> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("libavutil"))?;
    line.trim_start().split('.').next()?.trim().parse().ok()
}

fn missing(program: &str, variable: &str, what: &str) -> MediaError {
    MediaError::Ffmpeg(format!(
        "{what}: videos are decoded by the {program} program. Install it (apt-get install -y ffmpeg; \
         brew install ffmpeg) or set {variable} to its path"
    ))
}

fn named_accelerator(named: Option<OsString>) -> Result<Option<String>, MediaError> {
    let Some(named) = named.filter(|name| !name.is_empty()) else { return Ok(None) };
    let known = named.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric()));
    let found = || MediaError::Ffmpeg(format!("KEYE_HWACCEL: expected auto, cuda or vaapi, found {named:?}"));
    known.map(|name| Some(name.to_owned())).ok_or_else(found)
}

fn locate(program: &str, variable: &str, named: Option<OsString>) -> Result<PathBuf, MediaError> {
    if let Some(named) = named {
        let path = PathBuf::from(named);
        return match path.is_file() {
            true => Ok(path),
            false => Err(missing(program, variable, &format!("{variable} names {}, which is no file", path.display()))),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| missing(program, variable, &format!("{program} was not found in PATH")))
}

/// Keeps the terminal's signals from the child, and on Linux ends it with the thread that started it, which is the one that
/// reads from it: without, a decoder that has nothing to write for minutes outlives a killed parent by minutes.
#[cfg(unix)]
fn bind_life(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    #[cfg(target_os = "linux")]
    {
        let parent = std::process::id();
        let bind = move || {
            // SAFETY: a system call with integers for arguments, async-signal-safe.
            if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // The parent may have died before the call above.
            match std::os::unix::process::parent_id() == parent {
                true => Ok(()),
                false => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
            }
        };
        // SAFETY: the closure makes async-signal-safe system calls only and allocates nothing.
        unsafe { command.pre_exec(bind) };
    }
}

#[cfg(not(unix))]
fn bind_life(_command: &mut Command) {}

/// A running child and its standard output, read ahead by a thread in blocks of one size (the last may be shorter).
pub(crate) struct Output {
    child: Child,
    name: String,
    blocks: Receiver<std::io::Result<Vec<u8>>>,
    used: SyncSender<Vec<u8>>,
    messages: Arc<Mutex<Vec<u8>>>,
    messages_end: Receiver<()>,
}

impl Output {
    /// Starts `program` with `clip` as standard input, if there is one.
    pub fn start(program: &Path, args: &[OsString], clip: Option<&File>, block: usize) -> Result<Self, MediaError> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let failed = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::NotFound => {
                missing(&name, if name.contains("probe") { "KEYE_FFPROBE" } else { "KEYE_FFMPEG" }, "it is gone")
            }
            _ => MediaError::Ffmpeg(format!("cannot run {}: {e}", program.display())),
        };
        let stdin = match clip {
            Some(mut clip) => {
                clip.seek(SeekFrom::Start(0)).map_err(failed)?;
                Stdio::from(clip.try_clone().map_err(failed)?)
            }
            None => Stdio::null(),
        };
        let environment = ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
        let mut command = Command::new(program);
        command.args(args).env_clear().envs(environment);
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        bind_life(&mut command);
        let mut child = command.spawn().map_err(failed)?;
        let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(MediaError::Ffmpeg(format!("{name}: no pipe to the child")));
        };
        enlarge(&stdout);

        let (send, blocks) = sync_channel(BLOCKS_AHEAD);
        let (used, free) = sync_channel::<Vec<u8>>(BLOCKS_AHEAD + 2);
        std::thread::spawn(move || {
            loop {
                let mut buffer = free.try_recv().unwrap_or_default();
                buffer.resize(block, 0);
                let read = fill(&mut stdout, &mut buffer);
                let last = !matches!(read, Ok(n) if n == block);
                let sent = send.send(read.map(|n| {
                    buffer.truncate(n);
                    buffer
                }));
                if last || sent.is_err() {
                    break;
                }
            }
        });
        let messages = Arc::new(Mutex::new(Vec::new()));
        let (ended, messages_end) = sync_channel(1);
        let kept = Arc::clone(&messages);
        std::thread::spawn(move || {
            let mut chunk = [0; 1024];
            while let Ok(n @ 1..) = stderr.read(&mut chunk) {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                let room = STDERR_KEPT.saturating_sub(kept.len());
                kept.extend_from_slice(&chunk[..n.min(room)]);
            }
            let _ = ended.send(());
        });
        Ok(Self { child, name, blocks, used, messages, messages_end })
    }

    /// The next block; shorter than the block size only at the end; `None` after it.
    pub fn next(&mut self, watch: &mut Watch) -> Result<Option<Vec<u8>>, MediaError> {
        loop {
            match self.blocks.recv_timeout(TICK) {
                Ok(Ok(block)) if block.is_empty() => return Ok(None),
                Ok(Ok(block)) => return Ok(Some(block)),
                Ok(Err(e)) => return Err(MediaError::Ffmpeg(format!("cannot read from {}: {e}", self.name))),
                Err(RecvTimeoutError::Timeout) => watch.check()?,
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }

    /// Returns a block's memory for reuse.
    pub fn give_back(&self, block: Vec<u8>) {
        let _ = self.used.try_send(block);
    }

    /// What the child has written to standard error so far.
    pub fn messages(&self) -> String {
        String::from_utf8_lossy(&self.messages.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// After the last block: how the child ended, and the first lines it wrote to standard error.
    ///
    /// # Errors
    /// A child that was ended by a signal says nothing about the clip, so this is an error of its own.
    pub fn finish(&mut self, watch: &mut Watch) -> Result<(ExitStatus, String), MediaError> {
        let status = loop {
            let waited = self.child.try_wait();
            match waited.map_err(|e| MediaError::Ffmpeg(format!("cannot wait for {}: {e}", self.name)))? {
                Some(status) => break status,
                None => {
                    watch.check()?;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        };
        let _ = self.messages_end.recv_timeout(TICK);
        let text = self.messages();
        #[cfg(unix)]
        if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
            return Err(MediaError::Ffmpeg(format!(
                "{}: {} was ended by signal {signal} (out of memory, or killed by someone)",
                watch.input, self.name
            )));
        }
        Ok((status, text))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads until `buffer` is full or the stream ends.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match from.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// A pipe of 1 MiB instead of 64 KiB spares both sides most of their switches; it is only a wish.
#[cfg(target_os = "linux")]
fn enlarge(pipe: &impl std::os::fd::AsRawFd) {
    // SAFETY: fcntl on a descriptor that we own; F_SETPIPE_SZ takes an int and touches no memory of ours.
    unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, 1 << 20) };
}

#[cfg(not(target_os = "linux"))]
fn enlarge<T>(_pipe: &T) {}

/// The first telling line of a child's messages, without the `[mov,mp4 @ 0x55...]` in front.
pub(crate) fn first_message(messages: &str) -> &str {
    messages
        .lines()
        .map(|line| match line.split_once("] ") {
            Some((origin, rest)) if origin.starts_with('[') && origin.contains(" @ 0x") => rest.trim(),
            _ => line.trim(),
        })
        .find(|line| !line.is_empty())
        .unwrap_or("no message")
}

/// A program that fails without a word has found nothing wrong with the clip: what fails is the program.
///
/// # Errors
/// [`MediaError::Ffmpeg`] then.
pub(crate) fn silent(
    program: &Path,
    variable: &str,
    status: ExitStatus,
    messages: &str,
    watch: &Watch,
) -> Result<(), MediaError> {
    if status.success() || !messages.trim().is_empty() {
        return Ok(());
    }
    Err(MediaError::Ffmpeg(format!(
        "{}: {} failed without a message ({status}); install it anew or let {variable} name another one",
        watch.input,
        program.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_libavutil() {
        let text = "ffmpeg version N-1234-gabc\nconfiguration: x\nlibavutil      57. 28.100 / 57. 28.100\n";
        assert_eq!(libavutil_major(text), Some(57));
        assert_eq!(libavutil_major("ffmpeg version 7\n"), None);
    }

    #[test]
    fn messages_lose_their_origin() {
        assert_eq!(first_message("\n[mov,mp4,m4a @ 0x55aa] moov atom not found\nmore"), "moov atom not found");
        assert_eq!(first_message(""), "no message");
    }

    #[test]
    fn an_accelerator_is_a_word() {
        assert_eq!(named_accelerator(None).unwrap(), None);
        assert_eq!(named_accelerator(Some("".into())).unwrap(), None);
        assert_eq!(named_accelerator(Some("cuda".into())).unwrap().as_deref(), Some("cuda"));
        let error = named_accelerator(Some("cuda -i /etc/passwd".into())).unwrap_err().to_string();
        assert!(error.contains("KEYE_HWACCEL: expected auto, cuda or vaapi"), "{error}");
    }

    #[test]
    fn a_missing_program_says_how_to_get_it() {
        let error = locate("ffmpeg", "KEYE_FFMPEG", Some("/nowhere/ffmpeg".into())).unwrap_err().to_string();
        assert!(error.contains("apt-get install -y ffmpeg") && error.contains("/nowhere/ffmpeg"), "{error}");
        let error = locate("no-such-program", "KEYE_FFMPEG", None).unwrap_err().to_string();
        assert!(error.contains("KEYE_FFMPEG") && error.contains("PATH"), "{error}");
    }
}

//! Ctrl-C (and SIGTERM).
//!
//! While something runs that has to be ended in order ([`guard`]), the first signal only raises a flag, and says so; the second
//! ends the program, unless it comes at once: `timeout` signals its child, then the group that the child is in. At all other
//! times the first one does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static GUARDED: AtomicBool = AtomicBool::new(false);
static ANNOUNCED: AtomicBool = AtomicBool::new(false);
/// When the first signal came, in milliseconds of the monotonic clock; 0: none has.
static FIRST: AtomicU64 = AtomicU64::new(0);

/// Signals this much later than the first, in milliseconds, are still the same one.
const SAME: u64 = 300;

const INTERRUPTED: libc::c_int = 130;

extern "C" fn on_signal(_signal: libc::c_int) {
    // Only what a signal handler may do: atomics, clock_gettime, write, _exit.
    let now = milliseconds();
    let first = FIRST.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst).err();
    if !GUARDED.load(Ordering::SeqCst) || first.is_some_and(|first| now.saturating_sub(first) > SAME) {
        say(b"\n");
        // SAFETY: async-signal-safe, touches no memory.
        unsafe { libc::_exit(INTERRUPTED) }
    } else if first.is_none() && ANNOUNCED.load(Ordering::SeqCst) {
        say(b"\nstopping; once more ends it at once\n");
    }
}

/// Of the monotonic clock; never 0.
fn milliseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: async-signal-safe, writes to `now` alone.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    (now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000).max(1)
}

/// Writes to standard error from a signal's handler.
fn say(text: &[u8]) {
    // SAFETY: async-signal-safe, and the buffer outlives the call.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

/// Takes the signals over. A closed pipe stays an error of writing, which Rust's runtime sees to.
pub fn install() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: all-zero bytes are a valid sigaction: no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: `action` is initialised, and the handler is async-signal-safe.
        unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    }
}

/// While it lives the first signal raises a flag only.
pub struct Guard(());

/// Starts a guarded piece of work that may take a while to stop.
pub fn guard() -> Guard {
    start(true)
}

/// Starts one that stops within a blink: nothing has to be said.
pub fn swift_guard() -> Guard {
    start(false)
}

fn start(announced: bool) -> Guard {
    FIRST.store(0, Ordering::SeqCst);
    ANNOUNCED.store(announced, Ordering::SeqCst);
    GUARDED.store(true, Ordering::SeqCst);
    Guard(())
}

impl Guard {
    /// Whether a signal came.
    pub fn interrupted(&self) -> bool {
        FIRST.load(Ordering::SeqCst) > 0
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        GUARDED.store(false, Ordering::SeqCst);
    }
}

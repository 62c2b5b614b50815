//! What is shown: answers on standard output, everything else on standard error.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
pub use keye::bytes_text as bytes;
use keye::{FinishReason, LoadProgress, Stage, Timings, Usage};
use keye_media::Progress;
use keye_processor::{Part, ThinkSplitter};

use super::failure::OutputClosed;

const DIM: &str = "\x1b[2m";
const RED: &str = "\x1b[31m";
const PLAIN: &str = "\x1b[0m";
/// Start of line, and clear it.
const CLEAR: &str = "\r\x1b[2K";
/// Screens are redrawn at most this often, and plain logs get a line of progress.
const REDRAW: Duration = Duration::from_millis(80);
const LOG: Duration = Duration::from_secs(5);
/// Work that is announced as long, in seconds.
const LONG: f64 = 30.0;

/// `keye: message`, on standard error.
pub fn error_line(message: &str) {
    let stderr = io::stderr();
    let (on, off) = if colors(stderr.is_terminal()) { (RED, PLAIN) } else { ("", "") };
    // There is nobody left to tell when this fails.
    let _ = writeln!(stderr.lock(), "{on}keye:{off} {}", printable(message));
}

/// Names from files and servers with what would steer the terminal made visible.
fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

/// Whether to use colors on a stream (`NO_COLOR` and dumb terminals say no).
fn colors(terminal: bool) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    terminal && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Writes to standard output; a closed pipe is [`OutputClosed`].
pub fn out(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
        result => result.context("cannot write to standard output"),
    }
}

/// The line at the bottom that says what is going on.
pub struct Status {
    quiet: bool,
    terminal: bool,
    /// Something is on the line.
    shown: bool,
    last: Option<Instant>,
    names: Vec<String>,
    estimate: f64,
    announced: bool,
}

impl Status {
    pub fn new(quiet: bool) -> Self {
        let terminal = colors(io::stderr().is_terminal());
        Self { quiet, terminal, shown: false, last: None, names: Vec::new(), estimate: 0.0, announced: false }
    }

    /// Names of the media of the next request.
    pub fn media(&mut self, names: Vec<String>) {
        let names = names.iter().map(|name| printable(name)).collect();
        (self.names, self.estimate, self.announced) = (names, 0.0, false);
    }

    /// A line that stays.
    pub fn line(&mut self, text: &str) {
        if !self.quiet {
            self.clear();
            let (on, off) = if self.terminal { (DIM, PLAIN) } else { ("", "") };
            let _ = writeln!(io::stderr().lock(), "{on}{text}{off}");
        }
    }

    /// A line that the next one replaces; logs get one of them from time to time.
    pub fn progress(&mut self, text: &str) {
        let pause = if self.terminal { REDRAW } else { LOG };
        if self.quiet || self.last.is_some_and(|last| last.elapsed() < pause) {
            return;
        }
        self.last = Some(Instant::now());
        let mut stderr = io::stderr().lock();
        if self.terminal {
            let width = width().saturating_sub(1).max(20);
            let text: String = text.chars().take(width).collect();
            let _ = write!(stderr, "{CLEAR}{DIM}{text}{PLAIN}");
            let _ = stderr.flush();
            self.shown = true;
        } else {
            let _ = writeln!(stderr, "{text}");
        }
    }

    /// Takes the replaceable line away.
    pub fn clear(&mut self) {
        if self.shown {
            let mut stderr = io::stderr().lock();
            let _ = write!(stderr, "{CLEAR}");
            let _ = stderr.flush();
            self.shown = false;
        }
        if self.terminal {
            self.last = None;
        }
    }

    pub fn loading(&mut self, progress: LoadProgress<'_>) {
        match progress {
            LoadProgress::Downloading { file, done, total } => self.progress(&format!(
                "downloading {file}: {} of {} ({:.0}%)",
                bytes(done),
                bytes(total),
                100.0 * done as f64 / total.max(1) as f64
            )),
            LoadProgress::Loading(dir) => self.progress(&format!("loading {}", dir.display())),
        }
    }

    fn name(&self, index: usize) -> String {
        let name = self.names.get(index).cloned().unwrap_or_else(|| format!("media {}", index + 1));
        if self.names.len() > 1 { format!("[{}/{}] {name}", index + 1, self.names.len()) } else { name }
    }

    pub fn stage(&mut self, stage: &Stage) {
        match stage {
            Stage::Queued => {}
            Stage::Media { index, progress } => {
                let name = self.name(*index);
                self.progress(&match progress {
                    Progress::Fetching { done, total: Some(total) } => {
                        format!("{name}: fetching, {} of {}", bytes(*done), bytes(*total))
                    }
                    Progress::Fetching { done, total: None } => format!("{name}: fetching, {}", bytes(*done)),
                    Progress::Decoding { total: 0, .. } => format!("{name}: decoding"),
                    Progress::Decoding { done, total } => format!("{name}: decoding, frame {done} of {total}"),
                });
            }
            Stage::MediaReady { index, frames, slow_frames, tokens, estimate, warnings, .. } => {
                let frames = match (*frames, *slow_frames) {
                    (1, _) => String::new(),
                    (frames, slow) if frames == slow => format!("{frames} frames, "),
                    (frames, slow) => format!("{frames} frames ({slow} slow, {} fast), ", frames - slow),
                };
                let name = self.name(*index);
                self.line(&format!("{name}: {frames}{tokens} tokens"));
                for warning in warnings.iter() {
                    self.line(&format!("{name}: {}", printable(warning)));
                }
                self.estimate += estimate.unwrap_or(0.0);
                if self.estimate > LONG && !self.announced {
                    self.announced = true;
                    let time = duration(self.estimate);
                    self.line(&format!(
                        "looking at this will take about {time} here; a lower --fps, --max-pixels or --max-frames cuts it"
                    ));
                }
            }
            Stage::Vision { index, fraction } => {
                let name = self.name(*index);
                self.progress(&format!("{name}: looking, {:.0}%", 100.0 * fraction));
            }
            Stage::Prefill { done, total } => self.progress(&format!("reading the prompt, token {done} of {total}")),
        }
    }

    /// The last line of an answer.
    pub fn finished(&mut self, usage: &Usage, timings: &Timings, reason: &FinishReason) {
        if *reason == FinishReason::Length {
            let tokens = usage.completion_tokens;
            self.line(&format!("cut off after {tokens} tokens; --max-tokens and --max-model-len set the limit"));
        }
        self.line(&summary(usage, timings));
    }
}

/// Counts and speeds of an answer.
pub fn summary(usage: &Usage, timings: &Timings) -> String {
    let rate = |tokens: usize, time: Duration| match time.as_secs_f64() {
        seconds if seconds > 0.0 && tokens > 0 => format!(" at {} tok/s", figures(tokens as f64 / seconds)),
        _ => String::new(),
    };
    let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
    let decoded = usage.completion_tokens.saturating_sub(1);
    format!(
        "prompt {} tokens ({} media, {} cached){} | answer {} tokens{} | first token {}, total {}",
        usage.prompt_tokens,
        usage.media_tokens,
        usage.cached_tokens,
        rate(computed, timings.prefill),
        usage.completion_tokens,
        rate(decoded, timings.decode),
        duration(timings.first_token.as_secs_f64()),
        duration(timings.total.as_secs_f64()),
    )
}

/// Three figures.
fn figures(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{} s", figures(s)),
        s if s < 3600.0 => format!("{:.0} min {:.0} s", (s / 60.0).floor(), (s % 60.0).floor()),
        s => format!("{:.0} h {:.0} min", (s / 3600.0).floor(), (s % 3600.0 / 60.0).floor()),
    }
}

/// 1234567 as 1,234,567.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Columns of the terminal.
fn width() -> usize {
    // SAFETY: all-zero bytes are a valid winsize.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: TIOCGWINSZ writes one winsize, and `size` outlives the call.
    let told = unsafe { libc::ioctl(2, libc::TIOCGWINSZ, &raw mut size) } == 0;
    if told && size.ws_col > 0 { usize::from(size.ws_col) } else { 80 }
}

/// How an answer is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// As the model wrote it, tags included.
    Verbatim,
    /// For the eye: tags removed, analysis and thinking dimmed.
    Dimmed,
    /// Without analysis and thinking.
    AnswerOnly,
}

impl Shown {
    pub fn choose(quiet: bool) -> Self {
        match (quiet, io::stdout().is_terminal()) {
            (true, _) => Self::AnswerOnly,
            (_, true) => Self::Dimmed,
            _ => Self::Verbatim,
        }
    }
}

/// Writes an answer while it comes.
pub struct AnswerWriter {
    shown: Shown,
    colors: bool,
    splitter: ThinkSplitter,
    part: Option<Part>,
}

impl AnswerWriter {
    pub fn new(shown: Shown) -> Self {
        let colors = colors(io::stdout().is_terminal());
        Self { shown, colors, splitter: ThinkSplitter::new(), part: None }
    }

    /// For an answer with a form that was asked for.
    pub fn before_form(self) -> Self {
        Self { splitter: self.splitter.before_form(), ..self }
    }

    pub fn push(&mut self, text: &str) -> anyhow::Result<()> {
        match self.shown {
            Shown::Verbatim => out(text),
            _ => {
                let pieces = self.splitter.push(text);
                self.pieces(pieces)
            }
        }
    }

    /// Ends the answer and its line.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        let pieces = self.splitter.finish();
        self.pieces(pieces)?;
        out(if self.dim(self.part) { "\x1b[0m\n" } else { "\n" })
    }

    fn dim(&self, part: Option<Part>) -> bool {
        self.colors && matches!(part, Some(Part::Analysis | Part::Thinking))
    }

    fn pieces(&mut self, pieces: Vec<(Part, String)>) -> anyhow::Result<()> {
        for (part, text) in pieces {
            if self.shown == Shown::AnswerOnly {
                if part == Part::Answer {
                    out(&text)?;
                }
                continue;
            }
            if self.part != Some(part) {
                let off = if self.dim(self.part) { PLAIN } else { "" };
                let gap = if self.part.is_some() { "\n\n" } else { "" };
                let on = if self.dim(Some(part)) { DIM } else { "" };
                out(&format!("{off}{gap}{on}"))?;
                self.part = Some(part);
            }
            out(&text)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 9.876, 98.76, 987.6].map(figures), ["0.00", "9.88", "98.8", "988"]);
        assert_eq!([0.5, 59.0, 61.0, 3725.0].map(duration), ["0.50 s", "59.0 s", "1 min 1 s", "1 h 2 min"]);
        assert_eq!([7, 1234, 123_456, 1_234_567].map(grouped), ["7", "1,234", "123,456", "1,234,567"]);
    }
}

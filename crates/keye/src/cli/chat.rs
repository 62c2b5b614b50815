//! `keye chat`: a conversation on standard input.

use std::ffi::OsString;
use std::io::{self, BufRead, IsTerminal, Read, Write};

use anyhow::{Context, Result};
use keye::{Conversation, Keye, MediaItem, Request, ThinkMode, media_item};
use serde_json::{Value, json};

use super::args::{MediaArgs, ModelArgs, SamplingArgs, conversation, name_of};
use super::ask::{is_stdin, open_media};
use super::failure::{Interrupted, OutputClosed, Usage, message};
use super::generate::generate;
use super::signals;
use super::ui::{AnswerWriter, Shown, Status};

const AFTER_HELP: &str = "\
Examples:
  keye chat -m ./model
  keye chat -m Kwai-Keye/Keye-VL-1_5-8B clip.mp4
  keye chat -m ./model --no-think --fps 1 clip.mp4
  printf 'What is this?\\nAnd in French?\\n' | keye chat -m ./model -q photo.jpg

Each line is a question; media that were added go with the next one. What was said and seen before is kept and not computed again.

  /add FILE           add a picture or clip (NAME#fps=1 works here too)
  /think on|off|auto  ask for thinking, for none, or leave it to the model
  /clear              forget everything
  /save FILE          write the messages as JSON
  /help, /quit

Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does.";

/// Bytes of a question.
const LINE_BYTES: u64 = 16 << 20;

const HELP: &str = "/add FILE  /think on|off|auto  /clear  /save FILE  /help  /quit; Ctrl-C stops an answer";

/// Talk about images and videos, with memory
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Images and videos of the first question
    media_files: Vec<OsString>,
    /// System message, instead of the checkpoint's own
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Only the answers: no status, no thinking
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    media: MediaArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

struct Chat<'a> {
    args: &'a Args,
    keye: Keye,
    status: Status,
    conversation: Conversation,
    /// Go with the next question.
    pending: Vec<MediaItem>,
    think: ThinkMode,
    /// The first question that was not answered.
    failure: Option<anyhow::Error>,
}

pub fn run(args: Args) -> Result<()> {
    args.sampling.check()?;
    if args.media_files.iter().any(|name| name.to_str().is_some_and(is_stdin)) {
        return Err(Usage("- (standard input) holds the questions of a chat, not media".into()).into());
    }
    let pending = open_media(&args.media_files)?;
    args.media.check_part(&pending)?;
    let mut status = Status::new(args.quiet);
    // Whoever types a URL behind /add wants it fetched.
    let keye = args.model.load(true, 1, &mut status)?;
    let mut chat = Chat {
        args: &args,
        keye,
        status,
        conversation: conversation(args.system.as_deref()),
        pending: Vec::new(),
        think: args.sampling.think_mode(),
        failure: None,
    };
    pending.into_iter().for_each(|item| chat.add(item));
    if io::stdin().is_terminal() {
        chat.status.line(HELP);
    }
    while let Some(line) = read_line()? {
        match line.trim() {
            "" => {}
            "/quit" | "/exit" | "/q" => break,
            line if line.starts_with('/') => {
                if let Err(error) = chat.command(line) {
                    super::ui::error_line(&message(&error));
                }
            }
            question => chat.question(question)?,
        }
    }
    match chat.failure {
        // Whoever types has seen it; a script sees the exit code.
        Some(error) if !io::stdin().is_terminal() => Err(error.context("a question was not answered")),
        _ => Ok(()),
    }
}

/// The next line of standard input, with a prompt where somebody types.
fn read_line() -> Result<Option<String>> {
    if io::stdin().is_terminal() {
        let mut stderr = io::stderr().lock();
        let _ = write!(stderr, "> ");
        let _ = stderr.flush();
    }
    let mut line = Vec::new();
    let mut input = io::stdin().lock().take(LINE_BYTES + 1);
    let read = input.read_until(b'\n', &mut line).context("cannot read standard input")?;
    if read as u64 > LINE_BYTES {
        return Err(Usage("a line of standard input has more than 16 MiB; a question is expected".into()).into());
    }
    Ok((read > 0).then(|| String::from_utf8_lossy(&line).into_owned()))
}

impl Chat<'_> {
    fn add(&mut self, mut item: MediaItem) {
        self.args.media.apply(&mut item, self.keye.processor().media.video.rule);
        self.status.line(&format!("{} goes with the next question", name_of(&item)));
        self.pending.push(item);
    }

    fn command(&mut self, line: &str) -> Result<()> {
        let (command, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let argument = argument.trim();
        match (command, argument) {
            ("/help", _) => self.status.line(HELP),
            ("/add", "") => return Err(Usage("/add FILE: which one?".into()).into()),
            ("/add", name) => {
                let item = media_item(name)?;
                self.add(item);
            }
            ("/clear", _) => {
                self.conversation = conversation(self.args.system.as_deref());
                self.pending.clear();
                self.status.line("forgotten");
            }
            ("/think", "on") => self.think = ThinkMode::Think,
            ("/think", "off") => self.think = ThinkMode::NoThink,
            ("/think", "auto") => self.think = ThinkMode::Auto,
            ("/think", other) => {
                return Err(Usage(format!("/think takes on, off or auto, found {other:?}")).into());
            }
            ("/save", "") => return Err(Usage("/save FILE: into which one?".into()).into()),
            ("/save", path) => {
                std::fs::write(path, format!("{:#}\n", saved(&self.conversation)))
                    .with_context(|| format!("cannot write {path}"))?;
                self.status.line(&format!("saved to {path}"));
            }
            _ => return Err(Usage(format!("{command} is unknown; there are {HELP}")).into()),
        }
        Ok(())
    }

    /// Asks, and keeps question and answer; a question that failed or was stopped leaves no trace.
    fn question(&mut self, question: &str) -> Result<()> {
        let mut conversation = self.conversation.clone();
        conversation.push_user(self.pending.clone(), question);
        self.status.media(conversation.media().iter().map(name_of).collect());
        let request = Request {
            conversation: conversation.clone(),
            sampling: self.args.sampling.over(self.keye.default_sampling()),
            think: self.think,
            max_reasoning_tokens: self.args.sampling.max_reasoning_tokens,
            ..Request::default()
        };
        let guard = signals::swift_guard();
        let mut writer = AnswerWriter::new(Shown::choose(self.args.quiet));
        let mut begun = false;
        let result = generate(&self.keye, request, &mut self.status, &guard, &mut |text| {
            begun = true;
            writer.push(text)
        });
        if begun || result.is_ok() {
            writer.finish()?;
        }
        match result {
            Ok(finished) => {
                self.status.finished(&finished.usage, &finished.timings, &finished.reason);
                conversation.push_assistant(&finished.text);
                self.conversation = conversation;
                self.pending.clear();
            }
            Err(error) if error.is::<Interrupted>() => self.status.line("stopped; the question is forgotten"),
            Err(error) if error.is::<OutputClosed>() => return Err(error),
            // Media that cannot be read would fail every further question.
            Err(error) => {
                super::ui::error_line(&message(&error));
                if !self.pending.is_empty() {
                    self.status.line("the media of this question are dropped; /add them again");
                    self.pending.clear();
                }
                self.failure.get_or_insert(error);
            }
        }
        Ok(())
    }
}

/// Messages as `keye trace` and the server read them: media parts with their options.
fn saved(conversation: &Conversation) -> Value {
    let mut messages = conversation.messages().to_vec();
    let mut media = conversation.media().iter();
    for part in messages.iter_mut().filter_map(|message| message["content"].as_array_mut()).flatten() {
        if part["type"] != "image" && part["type"] != "video" {
            continue;
        }
        let options = media.next().and_then(|item| serde_json::to_value(&item.options).ok());
        if let (Some(part), Some(Value::Object(options))) = (part.as_object_mut(), options) {
            part.extend(options);
        }
    }
    json!({ "messages": messages })
}

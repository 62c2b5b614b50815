//! `keye ask`: one question.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use keye::{
    ArgumentError, EngineError, FinishReason, Grammar, MediaError, MediaItem, MediaKind, Request, Source, media_file,
    media_item,
};
use serde_json::{Value, json};

use super::args::{MediaArgs, ModelArgs, SamplingArgs, conversation, name_of, wants_remote};
use super::each::Each;
use super::failure::{Interrupted, Usage};
use super::generate::{Finished, generate, seconds};
use super::signals;
use super::ui::{self, AnswerWriter, Shown, Status};

/// How long an interrupted request may take to end in order.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes that standard input may give: they are kept in memory.
const STDIN_BYTES: u64 = 1 << 30;

const AFTER_HELP: &str = "\
Examples:
  keye ask -m Kwai-Keye/Keye-VL-1_5-8B clip.mp4 \"What happens in this clip?\"
  keye ask -m ./model before.jpg after.jpg \"What has changed?\"
  keye ask -m ./model 'match.mp4#fps=1&t=30,90' \"Who scores?\"     options of one item
  keye ask -m ./model --fps 1 --max-pixels 100352 long.mkv \"Summarise it.\"
  keye ask -m ./model --think --json chart.png \"Which year was best?\" | jq -r .parts.answer
  curl -s https://example.org/cat.jpg | keye ask -m ./model - \"Which breed?\"
  keye ask -m ./model \"What is the capital of France?\"            no media at all
  keye ask -q clip.mp4 \"Is there a ring?\" --choice yes --choice no
  keye ask -q clip.mp4 \"What is shown?\" --json-schema schema.json | jq .title
  keye ask --json clip.mp4 \"What is shown?\" | jq '.media[0].shown[] | [.time, .kind]'
  keye ask --each clips/*.mp4 \"Describe this clip.\" > captions.jsonl

Media are files, URLs (naming one is the consent to fetch it) or - for standard input. Pictures and clips are told apart by \
content, URLs by extension; image:NAME and video:NAME decide it. A file is read as NAME#OPTION=VALUE&... unless a file of that \
whole name exists; options are fps, nframes, min_frames, max_frames, min_pixels, max_pixels, resized_height, resized_width, \
total_pixels, video_total_pixels, min_frame_similarity, video_start, video_end, exif, and t=START,END in seconds.

--json prints answer, parts (analysis, thinking, answer, boxed), finish_reason, usage, timings in seconds, media, model, device \
and seed. Each of media has name, kind, the numbers of frames, slow_frames, patches and tokens, and shown: the frames as the model \
saw them, each with index in the source, time in seconds or null, kind (slow or fast), width and height; warnings tell of clips \
that are cut short or damaged.

--each asks about every medium on its own and prints such an object for each, a line each, in their order, as soon as those before \
it are done, with source, the medium as it was named. The line of one that fails has source and error; the others go on, and the exit \
code tells.

The answer goes to standard output, all else to standard error. Exit codes: 0 done, 1 failed, or cut off before it had the form \
that was asked for, 2 wrong usage, 3 the model cannot be loaded, 4 media cannot be read, 130 interrupted.";

/// Ask one question about any number of images and videos
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP, override_usage = "keye ask [OPTIONS] [MEDIA]... <QUESTION>")]
pub struct Args {
    /// Images and videos in order, then the question
    #[arg(required = true, value_name = "MEDIA... QUESTION")]
    words: Vec<OsString>,
    /// System message, instead of the checkpoint's own
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// One JSON object on standard output, nothing else; its fields are told below
    #[arg(long)]
    json: bool,
    /// Only the answer: no status, no thinking
    #[arg(short, long)]
    quiet: bool,
    /// The answer, behind what is thought before it, is JSON of this schema: a file, or the schema itself
    #[arg(long, value_name = "FILE|JSON", conflicts_with = "choice")]
    json_schema: Option<String>,
    /// The same, one of these texts: an option for each
    #[arg(long, value_name = "TEXT")]
    choice: Vec<String>,
    /// Ask about each of the media on its own; a line of JSON for each
    #[arg(long)]
    each: bool,
    /// With --each: how many are asked at the same time
    #[arg(long, value_name = "N", default_value = "4", requires = "each", value_parser = clap::value_parser!(u16).range(1..=64))]
    at_once: u16,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    media: MediaArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(args: Args) -> Result<()> {
    let Some((last, names)) = args.words.split_last() else {
        return Err(Usage("a question is expected".into()).into());
    };
    let question = question(last, names)?;
    args.sampling.check()?;
    let form = form(&args)?;
    if args.each && names.is_empty() {
        return Err(Usage("--each: expected media before the question, found none".into()).into());
    }
    // Of many, those that cannot be opened have lines like others that fail.
    let mut opened: Vec<Result<MediaItem>> = match args.each {
        true => names.iter().map(|name| open_media(std::slice::from_ref(name)).map(|mut one| one.remove(0))).collect(),
        false => open_media(names).map_err(misplaced)?.into_iter().map(Ok).collect(),
    };
    let media: Vec<MediaItem> = opened.iter().flatten().cloned().collect();
    args.media.check(&media)?;

    let mut status = Status::new(args.quiet || args.json && !args.each);
    let at_once = if args.each { usize::from(args.at_once) } else { 1 };
    let keye = args.model.load(wants_remote(&media), at_once, &mut status)?;
    // Until the model is there nothing needs an orderly end; from here on decoders run.
    let guard = signals::swift_guard();
    let rule = keye.processor().media.video.rule;
    opened.iter_mut().flatten().for_each(|item| args.media.apply(item, rule));
    let asked = Asked { args: &args, keye: &keye, question, form };
    let result = match args.each {
        true => asked.about_each(opened, &mut status, &guard),
        false => asked.about_all(&opened.into_iter().flatten().collect::<Vec<_>>(), &mut status, &guard),
    };
    end(keye, result.as_ref().is_err_and(|error| error.is::<Interrupted>()));
    result
}

/// Ends the engine's threads, and with them their children, while signals still wait. Somebody who interrupts does not wait
/// long for what hangs, like a silent server.
fn end(keye: keye::Keye, interrupted: bool) {
    if !interrupted {
        return drop(keye);
    }
    let (ended, end) = mpsc::channel();
    thread::spawn(move || {
        drop(keye);
        let _ = ended.send(());
    });
    // The process ends either way.
    let _ = end.recv_timeout(PATIENCE);
}

/// A question to a model.
struct Asked<'a> {
    args: &'a Args,
    keye: &'a keye::Keye,
    question: &'a str,
    form: Option<Form>,
}

impl Asked<'_> {
    fn flag(&self) -> Option<&'static str> {
        self.form.as_ref().map(|form| form.flag)
    }

    fn request(&self, media: &[MediaItem]) -> Request {
        let mut conversation = conversation(self.args.system.as_deref());
        conversation.push_user(media.to_vec(), self.question);
        Request {
            conversation,
            sampling: self.args.sampling.over(self.keye.default_sampling()),
            grammar: self.form.as_ref().map(|form| form.grammar.clone()),
            think: self.args.sampling.think_mode(),
            max_reasoning_tokens: self.args.sampling.max_reasoning_tokens,
            ..Request::default()
        }
    }

    fn about_all(&self, media: &[MediaItem], status: &mut Status, guard: &signals::Guard) -> Result<()> {
        let (keye, flag, request) = (self.keye, self.flag(), self.request(media));
        status.media(media.iter().map(name_of).collect());
        if self.args.json {
            let finished =
                generate(keye, request, status, guard, &mut |_| Ok(())).map_err(|error| of_form(error, flag))?;
            ui::out(&format!("{:#}\n", self.object(&finished, media)))?;
            return self.has_form(&finished);
        }
        let mut writer = AnswerWriter::new(Shown::choose(self.args.quiet));
        if flag.is_some() {
            writer = writer.before_form();
        }
        let mut begun = false;
        let result = generate(keye, request, status, guard, &mut |text| {
            begun = true;
            writer.push(text)
        });
        if begun || result.is_ok() {
            writer.finish()?;
        }
        let finished = result.map_err(|error| of_form(error, flag))?;
        let complete = self.has_form(&finished);
        match complete {
            Ok(()) => status.finished(&finished.usage, &finished.timings, &finished.reason),
            // That it was cut off is the error.
            Err(_) => status.line(&ui::summary(&finished.usage, &finished.timings)),
        }
        complete
    }

    fn about_each(&self, opened: Vec<Result<MediaItem>>, status: &mut Status, guard: &signals::Guard) -> Result<()> {
        // Each is asked for once.
        let errors = RefCell::new(BTreeMap::new());
        let keep = |(index, item): (usize, Result<MediaItem>)| {
            item.map_err(|error| errors.borrow_mut().insert(index, error)).ok()
        };
        let media: Vec<Option<MediaItem>> = opened.into_iter().enumerate().map(keep).collect();
        let one = |index: usize| media[index].as_slice();
        // As it was named, since files of several folders may share a name.
        let source = |index: usize| match self.args.words[index].to_string_lossy() {
            url if url.starts_with("data:") => "a data URL".to_owned(),
            name => name.into_owned(),
        };
        let each = Each {
            count: media.len(),
            at_once: usize::from(self.args.at_once),
            request: &|index| errors.borrow_mut().remove(&index).map_or_else(|| Ok(self.request(one(index))), Err),
            line: &|index, finished| {
                self.has_form(&finished)?;
                let mut line = self.object(&finished, one(index));
                line["source"] = source(index).into();
                Ok(line)
            },
            failed: &|index, reason| json!({"source": source(index), "error": reason}),
        };
        each.ask(self.keye, status, guard).map_err(|error| of_form(error, self.flag()))
    }

    /// Refuses an answer that was cut off before it had its form: programs that read it would take it for a whole one.
    fn has_form(&self, finished: &Finished) -> Result<()> {
        match self.flag().filter(|_| finished.reason == FinishReason::Length) {
            Some(flag) => bail!(
                "{flag}: the answer was cut off after {} tokens and does not have its form: shorten the thinking before it by \
             --no-think or --max-reasoning-tokens, or raise --max-tokens (it is {}) or --max-model-len",
                finished.usage.completion_tokens,
                self.args.sampling.max_tokens
            ),
            None => Ok(()),
        }
    }

    /// The answer with all that is known of it.
    fn object(&self, finished: &Finished, media: &[MediaItem]) -> Value {
        let answer = &finished.answer;
        let media = media.iter().zip(&finished.media).map(|(item, facts)| named(item, facts.clone()));
        json!({
            "answer": finished.text,
            "parts": {
                "analysis": answer.analysis,
                "thinking": answer.thinking,
                "answer": answer.answer,
                "boxed": answer.boxed,
            },
            "finish_reason": finished.reason,
            "usage": finished.usage,
            "timings": seconds(&finished.timings),
            "media": media.collect::<Vec<_>>(),
            "model": self.args.model.name(),
            "device": self.keye.device(),
            "seed": self.args.sampling.over(self.keye.default_sampling()).seed,
        })
    }
}

/// A medium's facts with its name and kind.
fn named(item: &MediaItem, mut facts: Value) -> Value {
    facts["name"] = name_of(item).into();
    facts["kind"] = if item.kind == MediaKind::Image { "image" } else { "video" }.into();
    facts
}

/// The last word, which is the question. A medium there means that the question is forgotten or stands elsewhere.
fn question<'a>(last: &'a OsStr, names: &[OsString]) -> Result<&'a str> {
    let shown = last.to_string_lossy();
    if let Some(kind) = medium(last) {
        let order = "the question comes last, behind the media";
        let words = names.iter().find(|name| medium(name).is_none());
        return Err(match words {
            Some(words) => Usage(format!("{order}: {words:?} stands before {shown:.80}, which is {kind}")),
            None => Usage(format!("{order}, and is missing: {shown:.80} is {kind}")),
        }
        .into());
    }
    Ok(last.to_str().ok_or_else(|| Usage(format!("the question is not UTF-8: {shown}")))?)
}

/// What a word is that names a picture or clip; `None` for other words.
fn medium(word: &OsStr) -> Option<&'static str> {
    let Some(text) = word.to_str() else { return Path::new(word).is_file().then_some("a file") };
    if is_stdin(text) {
        return Some("standard input");
    }
    match media_item(text).ok()?.source {
        Source::Path(_) => Some("a file"),
        // Questions may begin with one.
        Source::Url(_) => (!text.contains(char::is_whitespace)).then_some("a URL"),
        Source::Bytes(_) => Some("a data URL"),
        Source::Frames(_) => None,
    }
}

/// A question among the media is not only a file that is not there.
fn misplaced(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<ArgumentError>() {
        Some(ArgumentError::Media(MediaError::Read { input, source }))
            if source.kind() == ErrorKind::NotFound && input.contains(char::is_whitespace) =>
        {
            let reason = "there is no such file; if it is the question, that comes last, behind the media".to_owned();
            MediaError::Unreadable { input: input.clone(), reason }.into()
        }
        _ => error,
    }
}

/// What an answer has to look like, and the flag that says so.
struct Form {
    flag: &'static str,
    grammar: Grammar,
}

/// A form that cannot be is told with its flag.
fn of_form(error: anyhow::Error, flag: Option<&str>) -> anyhow::Error {
    match (flag, error.downcast_ref::<EngineError>()) {
        (Some(flag), Some(EngineError::Grammar(reason))) => Usage(format!("{flag}: {reason}")).into(),
        _ => error,
    }
}

/// The form that is asked for.
fn form(args: &Args) -> Result<Option<Form>> {
    if args.choice.iter().any(String::is_empty) {
        return Err(Usage("--choice: expected a text that the answer may be, found an empty one".into()).into());
    }
    let Some(schema) = &args.json_schema else {
        let choice = Form { flag: "--choice", grammar: Grammar::Choice(args.choice.clone()) };
        return Ok((!args.choice.is_empty()).then_some(choice));
    };
    let text = match schema.trim_start().starts_with('{') {
        true => schema.clone(),
        false => std::fs::read_to_string(schema).map_err(|error| {
            Usage(format!(
                "--json-schema {schema}: expected a file, or a schema like {{\"type\": \"object\"}}: {error}"
            ))
        })?,
    };
    let schema = serde_json::from_str(&text)
        .map_err(|error| Usage(format!("--json-schema {schema}: expected a schema in JSON: {error}")))?;
    Ok(Some(Form { flag: "--json-schema", grammar: Grammar::JsonSchema(schema) }))
}

/// Media from the command line; `-` is standard input.
pub fn open_media(names: &[OsString]) -> Result<Vec<MediaItem>> {
    if names.iter().filter(|name| name.to_str().is_some_and(is_stdin)).count() > 1 {
        return Err(Usage("- (standard input) can be given once only".into()).into());
    }
    let open = |name: &OsString| match name.to_str() {
        Some(name) if is_stdin(name) => from_stdin(name),
        Some(name) => Ok(media_item(name)?),
        // Options and prefixes are text; a name of other bytes has none.
        None => Ok(media_file(Path::new(name))?),
    };
    names.iter().map(open).collect()
}

/// `-`, with a prefix or options.
pub fn is_stdin(name: &str) -> bool {
    let name = name.strip_prefix("image:").or_else(|| name.strip_prefix("video:")).unwrap_or(name);
    name == "-" || name.starts_with("-#")
}

fn from_stdin(name: &str) -> Result<MediaItem> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().take(STDIN_BYTES + 1).read_to_end(&mut bytes).context("cannot read standard input")?;
    if bytes.len() as u64 > STDIN_BYTES {
        let reason = "more than 1 GiB came; save it to a file and name that".to_owned();
        return Err(keye::MediaError::Unreadable { input: "standard input".into(), reason }.into());
    }
    if bytes.is_empty() {
        let reason = "nothing came; a picture or clip is expected there".to_owned();
        return Err(keye::MediaError::Unreadable { input: "standard input".into(), reason }.into());
    }
    let kind = match () {
        () if name.starts_with("image:") => MediaKind::Image,
        () if name.starts_with("video:") => MediaKind::Video,
        () => keye::kind_of_bytes(&bytes),
    };
    // The options are read as those of any other name.
    let options = match name.split_once('#') {
        Some((_, fragment)) => media_item(&format!("video:https://-/-#{fragment}"))?.options,
        None => keye::ItemOptions::default(),
    };
    Ok(MediaItem { kind, source: Source::Bytes(bytes.into()), options })
}

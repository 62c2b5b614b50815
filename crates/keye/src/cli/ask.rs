//! `keye ask`: one question.

use std::io::Read;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use keye::{Grammar, MediaItem, MediaKind, Request, Source, media_item};
use serde_json::{Value, json};

use super::args::{MediaArgs, ModelArgs, SamplingArgs, conversation, name_of, wants_remote};
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

Media are files, URLs (naming one is the consent to fetch it) or - for standard input. Pictures and clips are told apart by \
content, URLs by extension; image:NAME and video:NAME decide it. A file is read as NAME#OPTION=VALUE&... unless a file of that \
whole name exists; options are fps, nframes, min_frames, max_frames, min_pixels, max_pixels, resized_height, resized_width, \
total_pixels, video_total_pixels, min_frame_similarity, video_start, video_end, exif, and t=START,END in seconds.

The answer goes to standard output, all else to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the model cannot \
be loaded, 4 media cannot be read, 130 interrupted.";

/// Ask one question about any number of images and videos
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP, override_usage = "keye ask [OPTIONS] [MEDIA]... <QUESTION>")]
pub struct Args {
    /// Images and videos in order, then the question
    #[arg(required = true, value_name = "MEDIA... QUESTION")]
    words: Vec<String>,
    /// System message, instead of the checkpoint's own
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// One JSON object on standard output, nothing else
    #[arg(long, conflicts_with = "quiet")]
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
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    media: MediaArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(args: Args) -> Result<()> {
    let Some((question, names)) = args.words.split_last() else {
        return Err(Usage("a question is expected".into()).into());
    };
    if names.is_empty() && std::path::Path::new(question).is_file() {
        return Err(Usage(format!("{question} is a file: the question comes last, behind the media")).into());
    }
    args.sampling.check()?;
    let grammar = grammar(&args)?;
    let mut media = open_media(names)?;
    args.media.check(&media)?;

    let mut status = Status::new(args.quiet || args.json);
    let keye = args.model.load(wants_remote(&media), &mut status)?;
    // Until the model is there nothing needs an orderly end; from here on decoders run.
    let guard = signals::swift_guard();
    let result = answer(&args, &keye, question, grammar, &mut media, &mut status, &guard);
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

fn answer(
    args: &Args,
    keye: &keye::Keye,
    question: &str,
    grammar: Option<Grammar>,
    media: &mut [MediaItem],
    status: &mut Status,
    guard: &signals::Guard,
) -> Result<()> {
    media.iter_mut().for_each(|item| args.media.apply(item, keye.processor().media.video.rule));
    status.media(media.iter().map(name_of).collect());
    let sampling = args.sampling.over(keye.default_sampling());
    let seed = sampling.seed;
    let mut conversation = conversation(args.system.as_deref());
    conversation.push_user(media.to_vec(), question);
    let has_form = grammar.is_some();
    let request = Request { conversation, sampling, grammar, think: args.sampling.think_mode(), ..Request::default() };

    if args.json {
        let finished = generate(keye, request, status, guard, &mut |_| Ok(()))?;
        return ui::out(&format!("{:#}\n", object(&finished, media, seed, args, keye)));
    }
    let mut writer = AnswerWriter::new(Shown::choose(args.quiet));
    if has_form {
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
    let finished = result?;
    status.finished(&finished.usage, &finished.timings, &finished.reason);
    Ok(())
}

/// The form that is asked for.
fn grammar(args: &Args) -> Result<Option<Grammar>> {
    let Some(schema) = &args.json_schema else {
        return Ok(Some(Grammar::Choice(args.choice.clone())).filter(|_| !args.choice.is_empty()));
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
    Ok(Some(Grammar::JsonSchema(schema)))
}

/// Media from the command line; `-` is standard input.
pub fn open_media(names: &[String]) -> Result<Vec<MediaItem>> {
    if names.iter().filter(|name| is_stdin(name)).count() > 1 {
        return Err(Usage("- (standard input) can be given once only".into()).into());
    }
    let open = |name: &String| if is_stdin(name) { from_stdin(name) } else { Ok(media_item(name)?) };
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

fn object(finished: &Finished, media: &[MediaItem], seed: u64, args: &Args, keye: &keye::Keye) -> Value {
    let answer = &finished.answer;
    let media = media.iter().zip(&finished.media).map(|(item, facts)| {
        let mut facts = facts.clone();
        facts["name"] = name_of(item).into();
        facts["kind"] = if item.kind == MediaKind::Image { "image" } else { "video" }.into();
        facts
    });
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
        "model": args.model.name(),
        "device": keye.device(),
        "seed": seed,
    })
}

//! The engine as its callers see it: a real checkpoint's text side and real media, a fake model.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use keye_media::{Access, ItemOptions, Loader, Media, MediaItem, MediaKind, Source};
use keye_model::NoTap;
use keye_processor::{Conversation, Overrides, Processor, ThinkMode, ThinkTag};

use crate::fake::FakeRunner;
use crate::{
    Engine, EngineError, EngineOptions, Event, EventStream, Fault, FinishReason, Grammar, Request, SamplingParams,
    Stage, trace,
};

pub(super) fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keye-preview-tiny")
}

pub(super) fn processor() -> Arc<Processor> {
    Arc::new(Processor::load(&fixture().join("model"), &Overrides::default()).expect("the fixture is whole"))
}

pub(super) fn loader(processor: &Processor) -> Loader {
    let access = Access { root: Some(fixture()), ..Access::default() };
    Loader { access, ..Loader::new(processor.media.clone()) }
}

pub(super) fn engine(runner: FakeRunner, options: EngineOptions) -> Engine {
    let processor = processor();
    let loader = loader(&processor);
    Engine::new(Box::new(runner), processor, loader, options)
}

/// A runner whose answers take a while.
fn slow_runner() -> FakeRunner {
    let mut runner = FakeRunner::new(500, 64);
    runner.step_time = Duration::from_millis(2);
    runner
}

pub(super) fn picture(path: impl Into<PathBuf>) -> MediaItem {
    MediaItem { kind: MediaKind::Image, source: Source::Path(path.into()), options: ItemOptions::default() }
}

pub(super) fn request(media: Vec<MediaItem>, text: &str, max_tokens: usize) -> Request {
    let mut conversation = Conversation::new();
    conversation.push_user(media, text);
    let sampling = SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() };
    Request { conversation, sampling, ..Request::default() }
}

fn text_of(stream: EventStream) -> Result<(Vec<u32>, String, crate::Usage), EngineError> {
    let mut tokens = Vec::new();
    for event in stream {
        match event {
            Event::Token { id, .. } => tokens.push(id),
            Event::Finished { text, usage, reason, .. } => {
                assert_eq!(reason, FinishReason::Length);
                return Ok((tokens, text, usage));
            }
            Event::Failed(error) => return Err(error),
            Event::Stage(_) | Event::Thinking(_) => {}
        }
    }
    panic!("a stream without an end");
}

pub(super) fn wait_for(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "nothing happened in 10 s");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_question_about_a_picture_and_a_clip() {
    let processor = processor();
    let loader = loader(&processor);
    let clip = MediaItem { kind: MediaKind::Video, ..picture("inputs/clip.mp4") };
    let media = vec![picture("inputs/one.png"), clip];
    let asked = Request { think: ThinkMode::NoThink, ..request(media.clone(), "What is this?", 9) };

    let loaded: Vec<Media> = media.iter().map(|item| loader.load(item, &mut |_| true).expect("a fixture")).collect();
    let conversation = asked.conversation.with_think(ThinkMode::NoThink);
    let prompt = processor.prompt(&conversation, &loaded.iter().collect::<Vec<_>>(), &asked.template).expect("fits");
    let mut alone = FakeRunner::new(500, 64);
    let expected = trace(&mut alone, &loaded, &prompt, &mut NoTap, 9).expect("fits");

    let engine = engine(FakeRunner::new(500, 64), EngineOptions { max_batch_tokens: 37, ..EngineOptions::default() });
    let events: Vec<Event> = engine.submit(asked.clone()).expect("room").collect();
    assert!(matches!(events[0], Event::Stage(Stage::Queued)));
    let position = |wanted: fn(&Stage) -> bool| {
        let found = |event: &Event| matches!(event, Event::Stage(stage) if wanted(stage));
        events.iter().position(found).expect("every stage is told")
    };
    let ready = position(|stage| matches!(stage, Stage::MediaReady { index: 1, .. }));
    let vision = position(|stage| matches!(stage, Stage::Vision { index: 1, .. }));
    let prefill = position(|stage| matches!(stage, Stage::Prefill { .. }));
    assert!(ready < vision && vision < prefill);
    let streamed: String = events
        .iter()
        .filter_map(|event| if let Event::Token { text, .. } = event { Some(text.as_str()) } else { None })
        .collect();
    let Some(Event::Finished { text, usage, timings, .. }) = events.last() else { panic!("{events:?}") };
    assert_eq!(*text, processor.tokenizer.decode(&expected.generated, true).expect("ids of the vocabulary"));
    assert_eq!(streamed, *text);
    assert_eq!(usage.prompt_tokens, prompt.input_ids.len());
    assert_eq!(usage.media_tokens, prompt.features.iter().map(|span| span.len).sum::<usize>());
    assert!(timings.media > Duration::ZERO);

    let (tokens, _, usage) = text_of(engine.submit(asked).expect("room")).expect("no error");
    assert_eq!(tokens, expected.generated);
    assert!(usage.cached_tokens > 0);
}

#[test]
fn a_file_that_changes_is_read_again() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("picture.png");
    let copy = |from: &str| std::fs::copy(fixture().join("inputs").join(from), &file).expect("copied");
    let engine = engine(FakeRunner::new(500, 64), EngineOptions::default());
    let ask = || text_of(engine.submit(request(vec![picture(&file)], "Which?", 5)).expect("room")).expect("no error");
    copy("wide.png");
    let wide = ask();
    assert_eq!(ask().0, wide.0);
    copy("tall.png");
    assert_ne!(ask().2.media_tokens, 0);
    assert_ne!(ask().0, wide.0);
    std::fs::remove_file(&file).expect("it was there");
    let gone = text_of(engine.submit(request(vec![picture(&file)], "Which?", 5)).expect("room"));
    assert!(matches!(gone, Err(EngineError::Media(_))), "{gone:?}");
}

#[test]
fn errors_come_where_they_are_found() {
    let engine = engine(FakeRunner::new(4, 64), EngineOptions::default());
    assert_eq!((engine.max_model_len(), engine.info().vocab_size), (256, 64));
    let mut wrong = request(vec![], "Hello", 5);
    wrong.sampling.temperature = f32::NAN;
    assert!(matches!(engine.submit(wrong), Err(EngineError::Refused(why)) if why.contains("temperature")));
    let missing = text_of(engine.submit(request(vec![picture("no/such.png")], "x", 5)).expect("room"));
    assert!(matches!(missing, Err(EngineError::Media(_))), "{missing:?}");
    let long = text_of(engine.submit(request(vec![], &"word and ".repeat(400), 5)).expect("room"));
    assert!(matches!(long, Err(EngineError::ContextLength { max: 256, .. })), "{long:?}");
    // Too many pictures are given up at the first that does not fit: what follows is not looked at.
    let mut pictures = vec![picture("inputs/wide.png"); 300];
    pictures.push(picture("no/such.png"));
    let many = text_of(engine.submit(request(pictures, "x", 5)).expect("room"));
    assert!(matches!(many, Err(EngineError::ContextLength { max: 256, .. })), "{many:?}");
    assert_eq!(text_of(engine.submit(request(vec![], "Hello", 5)).expect("room")).expect("no error").0.len(), 5);
    wait_for(|| engine.stats().waiting == 0);
}

#[test]
fn all_answers_to_a_request_fail_alike() {
    let engine = engine(FakeRunner::new(4, 64), EngineOptions::default());
    let options = ItemOptions { nframes: Some(0.0), ..ItemOptions::default() };
    let clip = |options: ItemOptions| MediaItem { kind: MediaKind::Video, options, ..picture("inputs/clip.mp4") };
    let many = vec![picture("inputs/one.png"), picture("no/such.png"), picture("inputs/one.png")];
    let broken = Request { raw_prompt: Some("<|vision_start|><|image_pad|>".into()), ..request(vec![], "", 5) };
    for (asked, fault) in [
        (request(vec![picture("no/such.png")], "x", 5), Fault::Media),
        (request(vec![picture("../outside.png")], "x", 5), Fault::Media),
        (request(vec![clip(options)], "x", 5), Fault::Request),
        (request(many, "x", 5), Fault::Media),
        (broken, Fault::Request),
        (request(vec![], &"word and ".repeat(400), 5), Fault::Request),
        (Request { grammar: Some(Grammar::Regex("(".into())), ..request(vec![], "x", 5) }, Fault::Request),
    ] {
        let one = text_of(engine.submit(asked.clone()).expect("room")).expect_err("it fails");
        assert_eq!(one.fault(), fault, "{one:?}");
        for stream in engine.submit_many(asked, &[1, 2, 3, 4]).expect("room") {
            let other = text_of(stream).expect_err("it fails");
            assert_eq!((format!("{other:?}"), other.fault()), (format!("{one:?}"), fault));
        }
    }
}

#[test]
fn a_full_queue_refuses_until_somebody_leaves() {
    let options = EngineOptions { max_queue: 3, ..EngineOptions::default() };
    let engine = engine(slow_runner(), options);
    let mut running = engine.submit(request(vec![], "Hello", 10_000)).expect("room");
    assert!(running.any(|event| matches!(event, Event::Token { .. })));
    let mut waiting: Vec<EventStream> =
        (0..3).map(|_| engine.submit(request(vec![], "Hello", 3)).expect("room")).collect();
    assert_eq!(engine.stats().waiting, 3);
    for _ in 0..3 {
        assert!(matches!(engine.submit(request(vec![], "Hello", 3)), Err(EngineError::QueueFull(3))));
        waiting.remove(0);
        wait_for(|| engine.submit(request(vec![], "Hello", 3)).map(|stream| waiting.push(stream)).is_ok());
    }
    drop(running);
    for stream in waiting {
        assert_eq!(text_of(stream).expect("no error").0.len(), 3);
    }
    wait_for(|| engine.stats().free_blocks == engine.stats().num_blocks && engine.stats().waiting == 0);
}

#[test]
fn dropping_the_last_handle_stops_everything() {
    let runner = slow_runner();
    let log = Arc::clone(&runner.log);
    let engine = engine(runner, EngineOptions::default());
    let streams: Vec<EventStream> = (0..5)
        .map(|_| engine.submit(request(vec![picture("inputs/one.png")], "Hello", 10_000)).expect("room"))
        .collect();
    let other = engine.clone();
    drop(engine);
    assert!(!other.inner.shared.stopping(), "a clone keeps it alive");
    let shared = Arc::downgrade(&other.inner.shared);
    drop(other);
    assert_eq!((shared.strong_count(), Arc::strong_count(&log)), (0, 1), "threads and runner are gone");
    for stream in streams {
        let end = text_of(stream);
        assert!(matches!(end, Err(EngineError::Stopped)), "{end:?}");
    }
}

#[test]
fn a_request_given_up_while_its_media_load_is_given_up_at_once() {
    let engine = engine(FakeRunner::new(500, 64), EngineOptions::default());
    let clip = MediaItem { kind: MediaKind::Video, ..picture("inputs/clip.mp4") };
    for wait in [0, 5, 20, 60] {
        let stream = engine.submit(request(vec![clip.clone(); 50], "Hello", 3)).expect("room");
        std::thread::sleep(Duration::from_millis(wait));
        drop(stream);
        wait_for(|| engine.stats().waiting == 0);
    }
    assert!(text_of(engine.submit(request(vec![], "Hello", 3)).expect("room")).is_ok());
    wait_for(|| engine.stats().free_blocks == engine.stats().num_blocks);
}

#[test]
fn text_does_not_wait_behind_media_that_load() {
    let engine = engine(FakeRunner::new(500, 64), EngineOptions { max_running: 4, ..EngineOptions::default() });
    let clip = MediaItem { kind: MediaKind::Video, ..picture("inputs/clip.mp4") };
    // Every pass decodes anew: their sizes differ.
    let media = (0..40u64).map(|index| {
        let options = ItemOptions { max_pixels: Some(20_000 + 1000 * index), ..ItemOptions::default() };
        MediaItem { options, ..clip.clone() }
    });
    let slow = engine.submit(request(media.collect(), "Hello", 3)).expect("room");
    text_of(engine.submit(request(vec![], "Hello", 3)).expect("room")).expect("no error");
    assert_eq!(engine.stats().waiting, 1, "the media are still being decoded");
    drop(slow);
    wait_for(|| engine.stats().waiting == 0);
}

#[test]
fn several_answers_are_refused_together_when_there_is_no_room() {
    let options = EngineOptions { max_queue: 3, ..EngineOptions::default() };
    let engine = engine(slow_runner(), options);
    let mut running = engine.submit(request(vec![], "Hello", 10_000)).expect("room");
    assert!(running.any(|event| matches!(event, Event::Token { .. })));
    let one = engine.submit(request(vec![], "Hello", 3)).expect("room");
    assert!(matches!(engine.submit_many(request(vec![], "Hello", 3), &[1, 2, 3]), Err(EngineError::QueueFull(3))));
    assert_eq!(engine.stats().waiting, 1);
    let two = engine.submit_many(request(vec![], "Hello", 3), &[1, 2]).expect("room");
    drop(running);
    for stream in two.into_iter().chain([one]) {
        assert_eq!(text_of(stream).expect("no error").0.len(), 3);
    }
}

#[test]
fn a_prompt_becomes_a_vector_of_length_one() {
    let engine = engine(FakeRunner::new(500, 64), EngineOptions { max_batch_tokens: 7, ..EngineOptions::default() });
    for pooling in [crate::Pooling::Last, crate::Pooling::Mean] {
        let embed = |text: &str| engine.embed(request(vec![picture("inputs/one.png")], text, 1), pooling);
        let first = embed("What is this?").expect("room").wait().expect("no error");
        let again = embed("What is this?").expect("room").wait().expect("no error");
        let other = embed("What is that?").expect("room").wait().expect("no error");
        assert_eq!(first.values, again.values, "cached or not");
        assert_ne!(first.values, other.values);
        assert!((first.values.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
        assert!(first.usage.media_tokens > 0 && first.usage.completion_tokens == 0);
    }
    // Nothing is generated, so the prompt may fill all there is; one token more may not.
    let tokens = |text: &str| {
        let asked = Request { raw_prompt: Some(text.into()), ..request(vec![], "", 1) };
        let Ok(embedding) = engine.embed(asked, crate::Pooling::Last).expect("room").wait() else { panic!("{text}") };
        embedding.usage.prompt_tokens
    };
    let text = "word and ".repeat(9);
    let exact = EngineOptions { max_model_len: Some(tokens(&text)), ..EngineOptions::default() };
    let exact = super::handle::engine(FakeRunner::new(500, 64), exact);
    for (text, fits) in [(text.clone(), true), (format!("{text} more"), false)] {
        let asked = Request { raw_prompt: Some(text), ..request(vec![], "", 1) };
        let answered = text_of(exact.submit(asked.clone()).expect("room"));
        assert!(matches!(answered, Err(EngineError::ContextLength { .. })), "{answered:?}");
        let embedded = exact.embed(asked, crate::Pooling::Mean).expect("room").wait();
        assert_eq!(embedded.is_ok(), fits, "{embedded:?}");
        assert!(fits || matches!(embedded, Err(EngineError::ContextLength { .. })));
    }
    let missing = engine.embed(request(vec![picture("no/such.png")], "x", 1), crate::Pooling::Last).expect("room");
    assert!(matches!(missing.wait(), Err(EngineError::Media(_))));
}

#[test]
fn a_prompt_that_opens_thinking_says_so_before_the_first_token() {
    let engine = engine(FakeRunner::new(500, 64), EngineOptions::default());
    for (prompt, opened) in [
        ("a<|im_end|>\n<think>\n", Some(ThinkTag::Think)),
        ("a<|im_end|>\n<analysis>", Some(ThinkTag::Analysis)),
        ("<think>\n\n</think>\n\n", None),
    ] {
        let asked = Request { raw_prompt: Some(prompt.into()), ..request(vec![], "", 5) };
        let events: Vec<Event> = engine.submit(asked).expect("room").collect();
        let told = events.iter().filter_map(|event| if let Event::Thinking(tag) = event { Some(*tag) } else { None });
        assert_eq!(told.collect::<Vec<_>>(), Vec::from_iter(opened), "{prompt:?}: {events:?}");
        let position = |wanted: fn(&Event) -> bool| events.iter().position(wanted);
        let token = position(|event| matches!(event, Event::Token { .. }));
        assert!(position(|event| matches!(event, Event::Thinking(_))).is_none_or(|at| Some(at) < token));
        let Some(Event::Finished { text, answer, .. }) = events.last() else { panic!("{events:?}") };
        let inside = |tag| (opened == Some(tag)).then_some(text.trim());
        assert_eq!(answer.thinking.as_deref(), inside(ThinkTag::Think), "{prompt:?}");
        assert_eq!(answer.analysis.as_deref(), inside(ThinkTag::Analysis), "{prompt:?}");
    }
}

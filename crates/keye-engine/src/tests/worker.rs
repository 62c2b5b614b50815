//! The promises of the thread that owns the model.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use keye_media::{FrameKind, Media};
use keye_model::ModelError;

use super::harness::{Ask, Harness, Outcome, alone, ask, options, outcome, spell};
use crate::event::event_channel;
use crate::fake::{BAD_MEDIA, BAD_TOKEN, FakeRunner, PANIC_MEDIA, PANIC_TOKEN, SLOW_MEDIA, clip, prompt};
use crate::sequence::{Clock, PreparedRequest};
use crate::{EngineError, EngineOptions, Event, EventStream, FinishReason, SamplingParams, Stage};

fn some_asks() -> Vec<Ask> {
    let text: Vec<u32> = (0..40).collect();
    vec![
        ask(&[1, 2, 3], &[], 12),
        ask(&text, &[clip(1, 9)], 12),
        ask(&text, &[clip(2, 9)], 12),
        ask(&text[..7], &[clip(1, 9), clip(2, 5)], 12),
        ask(&text[..30], &[clip(2, 9), clip(2, 9), clip(3, 11)], 12),
        ask(&text[..11], &[], 30),
    ]
}

#[test]
fn every_chunk_size_gives_the_tokens_of_the_whole_prompt() {
    for wanted in some_asks() {
        let expected = alone(&wanted);
        for chunk in (1..=70).chain([512]) {
            let harness = Harness::new(FakeRunner::new(64, 4), options(chunk, 1));
            let got = harness.run(&wanted);
            assert_eq!(got.tokens, expected, "chunks of {chunk}");
            assert_eq!(got.streamed, got.text);
            assert!(harness.log.steps().iter().all(|step| step.iter().sum::<usize>() <= chunk));
            assert_eq!(harness.stats().free_blocks, 64, "free before the end is told");
        }
    }
}

#[test]
fn the_same_tokens_alone_among_others_and_after_preemption() {
    let asks: Vec<Ask> = some_asks().into_iter().cycle().take(30).collect();
    // The smallest pool just holds the longest request.
    for (blocks, running, batch) in [(200, 4, 16), (24, 6, 32), (24, 3, 5), (200, 30, 64)] {
        let harness = Harness::new(FakeRunner::new(blocks, 4), options(batch, running));
        let streams: Vec<EventStream> = asks.iter().map(|ask| harness.submit(ask)).collect();
        for (ask, stream) in asks.iter().zip(streams) {
            assert_eq!(outcome(stream).expect("no error").tokens, alone(ask), "{blocks} blocks, {running} at once");
        }
        harness.assert_all_free();
        assert!(harness.log.steps().iter().any(|step| step.len() > 1), "steps are shared");
    }
}

#[test]
fn a_seed_gives_the_same_answer_whatever_else_runs() {
    let mut wanted = ask(&[1, 2, 3], &[clip(1, 9)], 20);
    wanted.sampling =
        SamplingParams { temperature: 1.5, top_p: 0.95, seed: 11, repetition_penalty: 1.1, ..wanted.sampling };
    let harness = Harness::new(FakeRunner::new(200, 4), options(16, 8));
    let first = harness.run(&wanted).tokens;
    let streams: Vec<EventStream> = some_asks().iter().map(|ask| harness.submit(ask)).collect();
    assert_eq!(harness.run(&wanted).tokens, first);
    drop(streams);
    wanted.sampling.seed = 12;
    assert_ne!(harness.run(&wanted).tokens, first);
}

#[test]
fn a_cached_prompt_is_not_computed_again_and_changes_nothing() {
    let harness = Harness::new(FakeRunner::new(64, 4), options(512, 1));
    let wanted = ask(&[9; 13], &[clip(1, 9)], 6);
    let first = harness.run(&wanted);
    let again = harness.run(&wanted);
    assert_eq!((first.usage.cached_tokens, again.usage.cached_tokens), (0, 24));
    assert_eq!((again.usage.prompt_tokens, again.usage.media_tokens, again.usage.completion_tokens), (25, 9, 6));
    assert_eq!(again.tokens, first.tokens);
    assert_eq!(harness.log.encodes.load(Ordering::SeqCst), 1);
    assert!(again.stages.contains(&Stage::Prefill { done: 25, total: 25 }));
}

#[test]
fn the_same_pads_over_another_clip_answer_about_the_other_clip() {
    let harness = Harness::new(FakeRunner::new(64, 4), options(512, 1));
    let one = ask(&[9; 13], &[clip(1, 9)], 6);
    let other = ask(&[9; 13], &[clip(2, 9)], 6);
    assert_eq!(prompt(&one.text, &one.media), prompt(&other.text, &other.media), "only the content differs");
    let first = harness.run(&one);
    let second = harness.run(&other);
    assert_eq!(second.usage.cached_tokens, 0);
    assert_eq!(first.tokens, alone(&one));
    assert_eq!(second.tokens, alone(&other));
    assert_ne!(first.tokens, second.tokens);
}

#[test]
fn media_are_encoded_once_while_the_cache_holds_them() {
    let (a, b) = (ask(&[1; 3], &[clip(1, 9), clip(1, 9)], 2), ask(&[2; 3], &[clip(2, 9)], 2));
    for (bytes, encodes, kept) in [(1000, 2, 2), (90, 3, 1), (0, 3, 0)] {
        let options = EngineOptions { feature_cache_bytes: bytes, ..options(512, 1) };
        // Blocks too large to be shared, so that only the features can be.
        let harness = Harness::new(FakeRunner::new(8, 64), options);
        for ask in [&a, &b, &a] {
            assert_eq!(harness.run(ask).tokens, alone(ask));
        }
        assert_eq!(harness.log.encodes.load(Ordering::SeqCst), encodes, "{bytes} bytes");
        assert_eq!(harness.log.features.load(Ordering::SeqCst), kept);
        assert_eq!(harness.stats().feature_bytes, kept * 90);
    }
}

#[test]
fn media_are_announced_with_what_they_cost() {
    let harness = Harness::new(FakeRunner::new(8, 64), options(512, 1));
    for seconds in [3.6, 0.0] {
        let stages = harness.run(&ask(&[1; 3], &[clip(1, 9)], 2)).stages;
        let Stage::MediaReady { shown, .. } = &stages[0] else { panic!("{:?}", stages[0]) };
        assert_eq!((shown.len(), shown[0].kind), (1, FrameKind::Slow));
        let (shown, estimate, warnings) = (Arc::clone(shown), Some(seconds), Arc::new([]));
        let ready = Stage::MediaReady {
            index: 0,
            frames: 1,
            slow_frames: 1,
            patches: 36,
            tokens: 9,
            shown,
            estimate,
            warnings,
        };
        assert_eq!(stages[0], ready);
    }
}

#[test]
fn dropping_a_stream_frees_its_blocks_and_harms_nobody() {
    let mut runner = FakeRunner::new(400, 4);
    runner.step_time = Duration::from_millis(1);
    let harness = Harness::new(runner, options(16, 2));
    let mut generating = harness.submit(&ask(&[1; 20], &[], 1000));
    assert!(generating.any(|event| matches!(event, Event::Token { .. })));
    // 100 s of vision work.
    let mut encoding = harness.submit(&ask(&[1; 20], &[clip(SLOW_MEDIA, 9)], 1000));
    let waiting = harness.submit(&ask(&[1; 30], &[], 10));
    let kept = ask(&[5; 9], &[clip(1, 9)], 10);
    let other = harness.submit(&kept);
    assert!(encoding.any(|event| matches!(event, Event::Stage(Stage::Vision { .. }))));
    drop((generating, waiting));
    drop(encoding);
    assert_eq!(outcome(other).expect("no error").tokens, alone(&kept));
    harness.assert_all_free();
}

#[test]
fn a_canceller_ends_the_stream_with_an_error() {
    let mut runner = FakeRunner::new(400, 4);
    runner.step_time = Duration::from_millis(1);
    let harness = Harness::new(runner, options(16, 2));
    for media in [vec![], vec![clip(SLOW_MEDIA, 9)]] {
        let stream = harness.submit(&ask(&[1; 20], &media, 1000));
        let canceller = stream.canceller();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            canceller.cancel();
        });
        assert!(matches!(outcome(stream), Err(EngineError::Cancelled)));
        thread.join().expect("no panic");
        harness.assert_all_free();
    }
}

#[test]
fn a_request_that_fails_fails_alone() {
    let harness = Harness::new(FakeRunner::new(200, 4), options(64, 5));
    let good = some_asks();
    let first: Vec<EventStream> = good.iter().map(|ask| harness.submit(ask)).collect();
    let bad_token = harness.submit(&ask(&[1, BAD_TOKEN, 1], &[], 5));
    let panic_token = harness.submit(&ask(&[1, PANIC_TOKEN], &[], 5));
    let bad_media = harness.submit(&ask(&[1], &[clip(1, 9), clip(BAD_MEDIA, 9)], 5));
    let panic_media = harness.submit(&ask(&[1], &[clip(PANIC_MEDIA, 9)], 5));
    let second: Vec<EventStream> = good.iter().map(|ask| harness.submit(ask)).collect();
    let model_error = |stream| match outcome(stream) {
        Err(EngineError::Model(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(*model_error(bad_token), ModelError::Batch(_)));
    assert!(matches!(*model_error(bad_media), ModelError::Media(_)));
    for panicked in [panic_token, panic_media] {
        let error = outcome(panicked).expect_err("it panicked").to_string();
        assert!(error.contains("on purpose"), "{error}");
    }
    for (ask, stream) in good.iter().chain(&good).zip(first.into_iter().chain(second)) {
        assert_eq!(outcome(stream).expect("no error").tokens, alone(ask));
    }
    harness.assert_all_free();
}

#[test]
fn a_reader_that_does_not_read_stalls_nobody() {
    let harness = Harness::new(FakeRunner::new(400, 4), options(64, 1));
    let unread = harness.submit(&ask(&[1; 20], &[], 1000));
    assert_eq!(harness.run(&ask(&[2; 5], &[], 10)).tokens.len(), 10);
    assert_eq!(outcome(unread).expect("no error").tokens.len(), 1000);
}

#[test]
fn a_stop_string_over_several_tokens_is_never_shown() {
    let harness = Harness::new(FakeRunner::new(64, 4), options(64, 1));
    let mut wanted = ask(&[1, 2, 3], &[], 12);
    let free = harness.run(&wanted);
    assert_eq!(free.text, free.tokens.iter().map(|id| spell(*id)).collect::<String>());
    // From inside the fourth token's text to inside the sixth's.
    let (start, end) = (7, 11);
    let stop = free.text[start..end].to_owned();
    let found = free.text.find(&stop).expect("taken from it");
    wanted.sampling.stop = vec!["never".into(), stop];
    let got = harness.run(&wanted);
    assert_eq!(got.text, free.text[..found]);
    assert_eq!((got.streamed.as_str(), got.reason), (got.text.as_str(), FinishReason::Stop));
    assert_eq!(got.tokens.len(), (found + end - start).div_ceil(2));
    // A beginning of a stop string is shown when the answer ends otherwise.
    wanted.sampling.stop = vec![format!("{}no", &free.text[20..])];
    let got = harness.run(&wanted);
    assert_eq!((got.text.as_str(), got.streamed.as_str()), (free.text.as_str(), free.text.as_str()));
}

#[test]
fn end_tokens_end_unless_told_otherwise() {
    let harness = Harness::new(FakeRunner::new(64, 4), options(64, 1));
    let mut wanted = ask(&[1, 2, 3], &[], 12);
    let free = harness.run(&wanted);
    assert_eq!(free.reason, FinishReason::Length);
    let end = free.tokens[4];
    let at = free.tokens.iter().position(|id| *id == end).expect("it is there");
    let ends = |got: &Outcome| {
        assert_eq!(got.tokens, free.tokens[..=at]);
        assert_eq!(got.text, free.tokens[..at].iter().map(|id| spell(*id)).collect::<String>());
        assert_eq!((got.reason.clone(), got.usage.completion_tokens), (FinishReason::Stop, at + 1));
    };
    wanted.end_tokens = vec![55, end];
    ends(&harness.run(&wanted));
    wanted.sampling.ignore_eos = true;
    assert_eq!(harness.run(&wanted).tokens, free.tokens);
    wanted.sampling.stop_token_ids = vec![end];
    ends(&harness.run(&wanted));
}

#[test]
fn lengths_are_limited_by_the_request_the_options_and_the_pool() {
    let wanted = ask(&[1; 10], &[], 100);
    for (blocks, max_model_len, expected) in [(64, Some(20), 8), (5, None, 8), (64, None, 100)] {
        let options = EngineOptions { max_model_len, ..options(64, 1) };
        let harness = Harness::new(FakeRunner::new(blocks, 4), options);
        let got = harness.run(&wanted);
        assert_eq!((got.tokens.len(), got.reason), (expected, FinishReason::Length));
        let error = outcome(harness.submit(&ask(&[1; 300], &[], 1))).expect_err("too long");
        let max = max_model_len.unwrap_or(blocks * 4);
        assert!(matches!(error, EngineError::ContextLength { tokens: 302, max: limit } if limit == max), "{error}");
    }
}

#[test]
fn features_that_do_not_fit_the_prompt_are_refused() {
    let harness = Harness::new(FakeRunner::new(64, 4), options(64, 1));
    let (events, stream) = event_channel();
    let request = PreparedRequest {
        order: 0,
        prompt: Arc::new(prompt(&[1], &[clip(1, 9)])),
        media: vec![clip(1, 8)],
        warnings: Vec::new(),
        sampling: SamplingParams::default(),
        end_tokens: Arc::new([]),
        detokenize: Box::new(|_| Ok(String::new())),
        events,
        clock: Clock::start(),
        place: None,
        logprobs: None,
        constraint: None,
        pool: None,
        siblings: Vec::new(),
    };
    assert!(harness.shared.prepared.push(request).is_ok());
    assert!(matches!(outcome(stream), Err(EngineError::Model(_))));
    harness.assert_all_free();
}

/// A busy machine may take time that belongs to no stage from any single attempt.
#[test]
fn times_add_up() {
    let most = Duration::from_millis(50);
    assert!((0..10).any(|_| time_without_stage() < most), "ten times more than {most:?} of an answer that takes 20 ms");
}

fn time_without_stage() -> Duration {
    let mut runner = FakeRunner::new(64, 4);
    runner.step_time = Duration::from_millis(3);
    let harness = Harness::new(runner, options(8, 1));
    let timings = harness.run(&ask(&[1; 20], &[clip(1, 9)], 5)).timings;
    assert!(timings.prefill >= Duration::from_millis(9) && timings.decode >= Duration::from_millis(12), "{timings:?}");
    let sum = timings.queued + timings.media + timings.vision + timings.prefill + timings.decode;
    assert!(sum <= timings.total, "{timings:?}");
    assert!(timings.first_token <= timings.total - timings.decode, "{timings:?}");
    timings.total - sum
}

#[test]
fn stopping_tells_every_reader_and_ends_the_thread() {
    let mut runner = FakeRunner::new(400, 4);
    runner.step_time = Duration::from_millis(1);
    let harness = Harness::new(runner, options(16, 1));
    let mut generating = harness.submit(&ask(&[1; 20], &[], 1000));
    let waiting = harness.submit(&ask(&[1; 20], &[clip(SLOW_MEDIA, 9)], 10));
    assert!(generating.any(|event| matches!(event, Event::Token { .. })));
    drop(harness);
    for stream in [generating, waiting] {
        assert!(matches!(outcome(stream), Err(EngineError::Stopped)));
    }
}

#[test]
fn a_picture_does_not_take_the_features_of_a_clip_with_its_pixels() {
    let harness = Harness::new(FakeRunner::new(8, 64), options(512, 1));
    let picture = Media { kind: keye_media::MediaKind::Image, ..(*clip(1, 9)).clone() };
    for media in [clip(1, 9), Arc::new(picture)] {
        let wanted = ask(&[1; 3], &[media], 4);
        assert_eq!(harness.run(&wanted).tokens, alone(&wanted));
    }
    assert_eq!(harness.log.encodes.load(Ordering::SeqCst), 2);
}

/// The longest wait for a token of a running stream beside a long clip and a long prompt; steps take 2 ms.
fn largest_gap_beside_long_work() -> Duration {
    let mut runner = FakeRunner::new(4000, 4);
    runner.step_time = Duration::from_millis(2);
    let harness = Harness::new(runner, options(512, 4));
    let mut running = harness.submit(&ask(&[1; 5], &[], 3000));
    for _ in 0..20 {
        running.next();
    }
    let _clip = harness.submit(&ask(&[1; 5], &[clip(SLOW_MEDIA, 9)], 5));
    let long: Vec<u32> = (0..2000).map(|i| i % 40).collect();
    let long = harness.submit(&ask(&long, &[], 1));
    let (mut gaps, mut last) = (Vec::new(), Instant::now());
    for event in running.by_ref().take(200) {
        if matches!(event, Event::Token { .. }) {
            gaps.push(last.elapsed());
            last = Instant::now();
        }
    }
    let steps = harness.log.steps();
    assert!(steps.iter().any(|step| step.len() == 2 && step.contains(&1)), "prompt and answer share steps");
    drop(running);
    assert_eq!(outcome(long).expect("no error").tokens.len(), 1);
    gaps[1..].iter().copied().max().expect("tokens came")
}

/// A busy machine may hold up any single attempt.
#[test]
fn a_running_stream_goes_on_while_a_long_clip_is_encoded_and_a_long_prompt_computed() {
    let most = Duration::from_millis(150);
    assert!(
        (0..5).any(|_| largest_gap_beside_long_work() < most),
        "2 ms steps, yet five times more than {most:?} between tokens"
    );
}

#[test]
fn a_picture_does_not_wait_for_a_long_clip_nor_a_short_question_for_a_long_prompt() {
    let harness = Harness::new(FakeRunner::new(4000, 4), options(64, 4));
    let _clip = harness.submit(&ask(&[1; 5], &[clip(SLOW_MEDIA, 90)], 5));
    let picture = ask(&[1; 5], &[clip(1, 9)], 5);
    assert_eq!(harness.run(&picture).tokens, alone(&picture));
    assert_eq!(harness.run(&ask(&[2; 5], &[], 5)).tokens.len(), 5);
}

#[test]
fn text_does_not_wait_for_media_however_many_are_encoded() {
    for (running, clips) in [(4, 4), (4, 9), (2, 2)] {
        let harness = Harness::new(FakeRunner::new(4000, 4), options(64, running));
        // Each 100 s of vision work.
        let slow = |i: u32| harness.submit(&ask(&[1, 2, i], &[clip(SLOW_MEDIA, 9)], 5));
        let mut held: Vec<EventStream> = (0..clips).map(slow).collect();
        assert!(held[0].any(|event| matches!(event, Event::Stage(Stage::Vision { .. }))));
        let begun = Instant::now();
        for text in 1..6 {
            let text = ask(&[text; 9], &[], 12);
            assert_eq!(harness.run(&text).tokens, alone(&text), "{running} may run, {clips} clips are encoded");
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "it waited for the clips");
        drop(held);
        harness.assert_all_free();
    }
}

#[test]
fn media_come_to_their_turn_among_more_text_than_may_run() {
    let harness = Harness::new(FakeRunner::new(400, 4), options(64, 2));
    let texts: Vec<Ask> = (0..30).map(|i| ask(&[i; 9], &[], 40)).collect();
    let pictures: Vec<Ask> = (1..5).map(|i| ask(&[1; 5], &[clip(i, 9)], 6)).collect();
    let streams = |asks: &[Ask]| asks.iter().map(|ask| harness.submit(ask)).collect::<Vec<_>>();
    let (first, media, rest) = (streams(&texts[..4]), streams(&pictures), streams(&texts[4..]));
    for (ask, stream) in pictures.iter().zip(media) {
        assert_eq!(outcome(stream).expect("no error").tokens, alone(ask));
    }
    // The last came 26 texts later.
    let mut rest = rest;
    let last = rest.last_mut().expect("some").next_timeout(Duration::ZERO);
    assert!(!matches!(last, Ok(Some(Event::Finished { .. }))), "{last:?}");
    for (ask, stream) in texts.iter().zip(first.into_iter().chain(rest)) {
        assert_eq!(outcome(stream).expect("no error").tokens, alone(ask));
    }
    harness.assert_all_free();
}

#[test]
fn several_answers_encode_their_media_once_whatever_the_cache_holds() {
    for (bytes, running, size) in [(0, 4, 64), (0, 1, 64), (50, 4, 4), (1 << 20, 4, 64)] {
        let options = EngineOptions { feature_cache_bytes: bytes, ..options(512, running) };
        let harness = Harness::new(FakeRunner::new(400, size), options);
        let wanted = ask(&[1; 3], &[clip(1, 90)], 5);
        for stream in harness.submit_many(&wanted, &[1, 2, 3]) {
            assert_eq!(outcome(stream).expect("no error").tokens, alone(&wanted));
        }
        assert_eq!(harness.log.encodes.load(Ordering::SeqCst), 1, "{bytes} bytes, {running} at once, blocks of {size}");
        harness.assert_all_free();
        assert!(harness.stats().feature_bytes <= bytes && harness.log.feature_bytes.load(Ordering::SeqCst) <= bytes);
    }
}

/// What is encoded is in use from then on: others that end meanwhile drive it out of no cache.
#[test]
fn features_are_not_lost_before_they_are_used() {
    let mut runner = FakeRunner::new(4000, 4);
    runner.step_time = Duration::from_millis(1);
    let harness = Harness::new(runner, EngineOptions { feature_cache_bytes: 50, ..options(64, 8) });
    let mut streams = Vec::new();
    for round in 0..8u8 {
        for i in 0..8u32 {
            let small = ask(&[(i + 3 * u32::from(round)) % 40, 2, i], &[clip(20, 4)], 3 + i as usize);
            streams.push(harness.submit(&small));
        }
        streams.push(harness.submit(&ask(&[1, 2, round.into()], &[clip(100 + round, 40)], 5)));
    }
    streams.into_iter().for_each(|stream| drop(outcome(stream).expect("no error")));
    assert_eq!(harness.log.encodes.load(Ordering::SeqCst), 9, "each of the nine once");
}

#[test]
fn features_too_large_for_the_cache_drive_nothing_out() {
    let options = EngineOptions { feature_cache_bytes: 100, ..options(512, 1) };
    let harness = Harness::new(FakeRunner::new(8, 64), options);
    let (small, large) = (ask(&[1; 3], &[clip(1, 9)], 2), ask(&[2; 3], &[clip(2, 40)], 2));
    for ask in [&small, &large, &small] {
        assert_eq!(harness.run(ask).tokens, alone(ask));
    }
    assert_eq!(harness.log.encodes.load(Ordering::SeqCst), 2, "the small ones were still there");
    assert_eq!(harness.stats().feature_bytes, 90);
}

#[test]
fn several_answers_share_one_prompt() {
    for (running, batch) in [(8, 64), (1, 64), (3, 5)] {
        let harness = Harness::new(FakeRunner::new(200, 4), options(batch, running));
        let mut wanted = ask(&[7; 20], &[clip(1, 9)], 8);
        wanted.sampling.temperature = 1.0;
        let seeds = [3, 4, 5, 6];
        let streams = harness.submit_many(&wanted, &seeds);
        let answers: Vec<Outcome> = streams.into_iter().map(|stream| outcome(stream).expect("no error")).collect();
        for (seed, answer) in seeds.iter().zip(&answers) {
            let single = Harness::new(FakeRunner::new(200, 4), options(512, 1));
            let mut same = wanted.clone();
            same.sampling.seed = *seed;
            assert_eq!(single.run(&same).tokens, answer.tokens);
        }
        // 32 tokens are 8 blocks, the last of which is computed by each.
        assert_eq!(answers.iter().map(|a| a.usage.cached_tokens).collect::<Vec<_>>(), [0, 28, 28, 28]);
        assert_eq!(harness.log.encodes.load(Ordering::SeqCst), 1);
        harness.assert_all_free();
    }
}

#[test]
fn the_others_go_on_when_the_first_of_several_is_given_up() {
    let mut runner = FakeRunner::new(200, 4);
    runner.step_time = Duration::from_millis(1);
    let harness = Harness::new(runner, options(4, 8));
    let wanted = ask(&[7; 60], &[], 8);
    let mut streams = harness.submit_many(&wanted, &[1, 2, 3]);
    std::thread::sleep(Duration::from_millis(5));
    drop(streams.remove(0));
    drop(streams.remove(1));
    assert_eq!(outcome(streams.remove(0)).expect("no error").tokens, alone(&wanted));
    harness.assert_all_free();
}

#[test]
fn guesses_change_no_token_and_save_steps() {
    // Greedy answers of a prompt that contains its own answer.
    let first = alone(&ask(&[1, 2, 3], &[], 30));
    for speculation in [1, 3, 8] {
        let plain = Harness::new(FakeRunner::new(400, 64), options(64, 4));
        let harness = Harness::new(FakeRunner::new(400, 64), EngineOptions { speculation, ..options(64, 4) });
        for temperature in [0.0, 0.7] {
            for text in [vec![1, 2, 3], first.iter().chain(&first).copied().collect(), vec![5; 70]] {
                let mut wanted = ask(&text, &[], 40);
                wanted.sampling.temperature = temperature;
                wanted.sampling.top_k = 2;
                wanted.sampling.repetition_penalty = 1.1;
                assert_eq!(harness.run(&wanted).tokens, plain.run(&wanted).tokens, "{speculation} {temperature}");
            }
        }
        let stats = harness.stats();
        assert!(stats.speculation_accepted > 0 && stats.speculation_accepted <= stats.speculation_proposed);
        let steps = [&harness, &plain].map(|harness| harness.log.steps().len() as u64);
        assert!(steps[0] + stats.speculation_accepted / 2 < steps[1], "{speculation}: {steps:?} steps, {stats:?}");
    }
}

#[test]
fn log_probabilities_come_with_the_tokens() {
    let harness = Harness::new(FakeRunner::new(200, 4), options(64, 1));
    let wanted = Ask { logprobs: Some(3), ..ask(&[1, 2, 3], &[], 6) };
    let mut seen = 0;
    for event in harness.submit(&wanted) {
        if let Event::Token { id, logprob, .. } = event {
            let logprob = logprob.expect("asked for");
            assert_eq!(logprob.top.len(), 3);
            assert_eq!(logprob.top[0], (id, logprob.logprob), "greedy takes the most likely");
            assert!(logprob.top.windows(2).all(|pair| pair[0].1 >= pair[1].1) && logprob.logprob < 0.0);
            seen += 1;
        }
    }
    assert_eq!(seen, 6);
}

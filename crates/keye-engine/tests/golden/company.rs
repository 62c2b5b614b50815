//! Real models: the answer of a request is the same alone, with nothing cached and nothing guessed, and in any company.

use std::sync::Arc;

use keye_backend::{Cpu, CpuOptions, KvDtype};
use keye_engine::{Engine, EngineOptions, Event, EventStream, Grammar, Request, SamplingParams};
use keye_media::{Access, ItemOptions, Loader, MediaItem, MediaKind, Source};
use keye_model::{KeyeModel, LoadOptions};
use keye_processor::{Checkpoint, Conversation, ModelConfig, Overrides, Processor, ThinkMode};

use crate::fixtures;

fn engine(name: &str, cache_tokens: usize, options: EngineOptions) -> Engine {
    let dir = fixtures().join(name).join("model");
    let config = ModelConfig::load(&dir).expect("a fixture");
    let checkpoint = Checkpoint::open(&dir).expect("a fixture");
    let processor = Arc::new(Processor::load(&dir, &Overrides::default()).expect("a fixture"));
    let cpu = Cpu::new(CpuOptions::default()).expect("a machine");
    let sizes = LoadOptions { cache_tokens, kv_dtype: KvDtype::F32 };
    let model =
        KeyeModel::load(cpu, &config, &processor.media.processor, &checkpoint, sizes).expect("a whole checkpoint");
    let access = Access { root: Some(fixtures().join(name).join("inputs")), ..Access::default() };
    let loader = Loader { access, ..Loader::new(processor.media.clone()) };
    Engine::new(Box::new(model), processor, loader, options)
}

/// A small generator (Knuth's MMIX constants); what is drawn only has to vary.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn random_request(dice: &mut Dice) -> Request {
    let text = ["What is this?", "And then, and then, and then?", "Say it again and again.", "Why?"];
    let media = ["one.png", "tall.png", "wide.png"];
    let media = (0..dice.roll(5) / 2).map(|_| MediaItem {
        kind: MediaKind::Image,
        source: Source::Path(media[dice.roll(3) as usize].into()),
        options: ItemOptions { max_pixels: Some(20_000), ..ItemOptions::default() },
    });
    let mut conversation = Conversation::new();
    conversation.push_user(media.collect(), text[dice.roll(4) as usize]);
    let mut sampling = SamplingParams { max_tokens: 1 + dice.roll(12) as usize, ..SamplingParams::default() };
    if dice.roll(2) == 0 {
        sampling = SamplingParams { temperature: 0.8, top_p: 0.9, seed: dice.roll(50), ..sampling };
    }
    let grammar = (dice.roll(6) == 0).then(|| Grammar::Regex("[a-z ]{2,9}[.]".into()));
    Request { conversation, sampling, grammar, think: ThinkMode::NoThink, ..Request::default() }
}

fn tokens(stream: EventStream) -> Vec<u32> {
    let mut tokens = Vec::new();
    for event in stream {
        match event {
            Event::Token { id, .. } => tokens.push(id),
            Event::Finished { .. } => return tokens,
            Event::Failed(error) => panic!("{error}"),
            Event::Stage(_) | Event::Thinking(_) => {}
        }
    }
    panic!("a stream without an end");
}

fn company(name: &str, count: usize) {
    let off = EngineOptions { max_batch_tokens: 8192, feature_cache_bytes: 0, ..EngineOptions::default() };
    let mut dice = Dice(11);
    let mut checked = 0;
    while checked < count {
        let options = EngineOptions {
            max_batch_tokens: 20 + dice.roll(300) as usize,
            max_running: 2 + dice.roll(7) as usize,
            max_queue: 1000,
            feature_cache_bytes: [0, 1 << 30][dice.roll(2) as usize],
            speculation: [0, 4][dice.roll(2) as usize],
            ..EngineOptions::default()
        };
        let together = engine(name, 1024, options);
        let mut waiting = Vec::new();
        for _ in 0..50 {
            let asked = random_request(&mut dice);
            let seeds: Vec<u64> = (0..1 + dice.roll(6) / 4).map(|n| asked.sampling.seed + n).collect();
            for (seed, stream) in seeds.iter().zip(together.submit_many(asked.clone(), &seeds).expect("room")) {
                let sampling = SamplingParams { seed: *seed, ..asked.sampling.clone() };
                waiting.push((Request { sampling, ..asked.clone() }, stream));
            }
            if dice.roll(8) == 0 {
                waiting.swap_remove(dice.roll(waiting.len() as u64) as usize);
            }
        }
        // A fresh one now and then: its prefix cache is all that a request could share.
        let mut alone = engine(name, 8192, off.clone());
        for (index, (asked, stream)) in waiting.into_iter().enumerate() {
            if index % 5 == 0 {
                alone = engine(name, 8192, off.clone());
            }
            let expected = tokens(alone.submit(asked.clone()).expect("room"));
            assert_eq!(tokens(stream), expected, "{:?}", asked.sampling);
            checked += 1;
        }
    }
}

#[test]
fn preview_answers_the_same_in_any_company() {
    company("keye-preview-tiny", 100);
}

#[test]
fn keye_1_5_answers_the_same_in_any_company() {
    company("keye-1_5-tiny", 100);
}

#[test]
#[ignore = "minutes"]
fn ten_thousand_requests_answer_the_same_in_any_company() {
    company("keye-1_5-tiny", 10_000);
}

//! Random requests, alone and in company.

use std::sync::atomic::Ordering;

use super::harness::{Ask, Harness, alone, ask, options, outcome};
use crate::fake::{FakeRunner, clip};
use crate::random::philox;
use crate::{EngineOptions, EventStream};

struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: usize) -> usize {
        self.0 += 1;
        philox([self.0 as u32, (self.0 >> 32) as u32, 0, 0], [3, 1])[0] as usize % n
    }
}

fn random_ask(dice: &mut Dice) -> Ask {
    // Few families of beginnings, so that prompts share blocks.
    let family = dice.roll(5) as u32;
    let text: Vec<u32> = (0..1 + dice.roll(50) as u32).map(|index| (index * family + family) % 40).collect();
    let media: Vec<_> =
        (0..dice.roll(3)).map(|_| 1 + dice.roll(4)).map(|seed| clip(seed as u8, 2 * seed + 3)).collect();
    let mut ask = ask(&text, &media, 1 + dice.roll(20));
    if dice.roll(2) == 0 {
        ask.sampling.temperature = 0.5 + dice.roll(10) as f32 / 10.0;
        ask.sampling.top_k = dice.roll(6) as u32;
        ask.sampling.top_p = 0.9;
        ask.sampling.repetition_penalty = 1.0 + dice.roll(3) as f32 / 10.0;
    }
    ask.sampling.seed = dice.roll(1000) as u64;
    ask
}

/// The answer of a machine that has nothing else to do and nothing cached.
fn answer_alone(ask: &Ask) -> Vec<u32> {
    if ask.sampling.temperature == 0.0 && ask.sampling.repetition_penalty == 1.0 {
        return alone(ask);
    }
    Harness::new(FakeRunner::new(100, 64), options(4096, 1)).run(ask).tokens
}

/// Runs `count` random requests, some of them with several answers, some given up, in machines of random sizes; every
/// answer has to be the one of the request alone.
fn random_requests(count: usize, seed: u64) {
    let mut dice = Dice(seed << 40);
    let (mut checked, mut preemptions, mut hits, mut accepted) = (0, 0, 0, 0);
    while checked < count {
        // The longest request has 114 tokens.
        let size = [1, 3, 4, 16, 64][dice.roll(5)];
        let blocks = 115usize.div_ceil(size) + dice.roll(60);
        let options = EngineOptions {
            feature_cache_bytes: [0, 90, 100_000][dice.roll(3)],
            speculation: [0, 0, 1, 4, 16][dice.roll(5)],
            prefill_share: [0.0, 1.0, 100.0][dice.roll(3)],
            ..options(1 + dice.roll(100), 1 + dice.roll(12))
        };
        let harness = Harness::new(FakeRunner::new(blocks, size), options);
        let mut waiting: Vec<(Ask, EventStream)> = Vec::new();
        for _ in 0..60 {
            let asked = random_ask(&mut dice);
            let seeds: Vec<u64> =
                (0..1 + dice.roll(8).saturating_sub(5) as u64).map(|n| asked.sampling.seed + n).collect();
            for (seed, stream) in seeds.iter().zip(harness.submit_many(&asked, &seeds)) {
                let mut asked = asked.clone();
                asked.sampling.seed = *seed;
                waiting.push((asked, stream));
            }
            match dice.roll(6) {
                0 => drop(waiting.swap_remove(dice.roll(waiting.len()))),
                1 => std::thread::yield_now(),
                2 => {
                    let (ask, stream) = waiting.swap_remove(dice.roll(waiting.len()));
                    assert_eq!(
                        outcome(stream).expect("no error").tokens,
                        answer_alone(&ask),
                        "{:?} {:?}",
                        ask.text,
                        ask.sampling
                    );
                    checked += 1;
                }
                _ => {}
            }
        }
        for (ask, stream) in waiting {
            assert_eq!(
                outcome(stream).expect("no error").tokens,
                answer_alone(&ask),
                "{:?} {:?}",
                ask.text,
                ask.sampling
            );
            checked += 1;
        }
        harness.assert_all_free();
        let stats = harness.stats();
        preemptions += stats.preemptions;
        hits += stats.prefix_hits;
        accepted += stats.speculation_accepted;
        assert_eq!(stats.feature_bytes, harness.log.feature_bytes.load(Ordering::SeqCst), "features leaked");
    }
    assert!(preemptions > 0 && hits > 0 && accepted > 0, "{preemptions} {hits} {accepted}");
}

#[test]
fn a_request_gives_the_same_answer_in_any_company() {
    random_requests(1500, 1);
}

#[test]
#[ignore = "a minute"]
fn ten_thousand_requests_give_the_same_answers_in_any_company() {
    random_requests(10_000, 2);
}

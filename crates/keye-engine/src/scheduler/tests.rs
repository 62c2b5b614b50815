//! What the scheduler promises, over arrivals of all kinds.

use std::collections::{HashMap, HashSet};

use super::*;
use crate::random::philox;

/// Small numbers below `n` from a counter.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: usize) -> usize {
        self.0 += 1;
        philox([self.0 as u32, 0, 0, 0], [17, 4])[0] as usize % n
    }
}

fn scheduler(blocks: usize, size: usize, batch: usize, running: usize) -> Scheduler {
    Scheduler::new(BlockManager::new(blocks, size), batch, running)
}

/// Runs one step of sequences that each want `lengths[id]` tokens in all; returns who got a token.
fn step(scheduler: &mut Scheduler, lengths: &HashMap<u64, usize>) -> Vec<u64> {
    let mut generated = Vec::new();
    for Planned { id, range } in scheduler.schedule(usize::MAX) {
        let whole = scheduler.get(id).map(|s| s.tokens.len()) == Some(range.end);
        scheduler.commit(id, range.len());
        if whole {
            scheduler.append(id, range.end as u32);
            generated.push(id);
            if range.end + 1 == lengths[&id] {
                scheduler.remove(id);
            }
        }
    }
    generated
}

#[test]
fn prefill_and_generation_share_a_step() {
    let mut s = scheduler(16, 4, 8, 4);
    s.add(Scheduled::new(1, vec![1; 5], vec![]));
    s.add(Scheduled::new(2, vec![2; 9], vec![]));
    assert_eq!(s.schedule(usize::MAX), [Planned { id: 1, range: 0..5 }, Planned { id: 2, range: 0..3 }]);
    s.commit(1, 5);
    s.commit(2, 3);
    s.append(1, 9);
    assert_eq!(s.schedule(usize::MAX), [Planned { id: 1, range: 5..6 }, Planned { id: 2, range: 3..9 }]);
}

#[test]
fn short_prompts_are_not_held_up_by_a_long_one() {
    let mut s = scheduler(64, 4, 8, 3);
    s.add(Scheduled::new(1, vec![1; 64], vec![]));
    assert_eq!(s.schedule(usize::MAX), [Planned { id: 1, range: 0..8 }]);
    s.commit(1, 8);
    for id in 2..5 {
        s.add(Scheduled::new(id, vec![id as u32; 3], vec![]));
    }
    assert_eq!(s.schedule(usize::MAX), [Planned { id: 2, range: 0..3 }, Planned { id: 1, range: 8..13 }]);
    assert_eq!((s.num_running(), s.num_waiting()), (2, 2), "one place is kept");
    let mut s = scheduler(64, 4, 8, 4);
    s.add(Scheduled::new(1, vec![1; 64], vec![]));
    let first = s.schedule(usize::MAX)[0].range.len();
    s.commit(1, first);
    s.add(Scheduled::new(2, vec![2; 40], vec![]));
    assert_eq!(s.schedule(usize::MAX), [Planned { id: 1, range: 8..16 }], "not much shorter");
}

/// Tokens that all take media features.
fn media(tokens: usize, hash: u8) -> Vec<ContentSpan> {
    vec![ContentSpan { start: 0, len: tokens, hash: [hash; 32], row: 0 }]
}

fn whole(id: u64, tokens: usize) -> Planned {
    Planned { id, range: 0..tokens }
}

#[test]
fn text_passes_media_that_wait_for_features() {
    let mut s = scheduler(64, 4, 64, 2);
    for id in [1, 2, 3] {
        s.add(Scheduled::new(id, vec![7; 8], media(8, id as u8)));
    }
    s.add(Scheduled::new(4, vec![4; 3], vec![]));
    s.add(Scheduled::new(5, vec![5; 3], vec![]));
    s.add(Scheduled::new(6, vec![6; 3], vec![]));
    assert_eq!(s.schedule(usize::MAX), [whole(4, 3), whole(5, 3)], "both places are theirs");
    assert_eq!((s.num_running(), s.num_waiting()), (4, 2), "as many with media run, and no more");
    for id in [4, 5] {
        s.commit(id, 3);
        s.append(id, 9);
    }
    s.set_ready(2);
    assert_eq!(s.schedule(usize::MAX).iter().map(|p| p.id).collect::<Vec<_>>(), [4, 5], "no place is taken away");
    s.remove(5);
    let ids: Vec<u64> = s.schedule(usize::MAX).iter().map(|p| p.id).collect();
    assert_eq!(ids, [4, 2], "media get a free place before those in line");
    s.remove(4);
    assert_eq!(s.schedule(usize::MAX).iter().map(|p| p.id).collect::<Vec<_>>(), [2, 6]);
    s.remove(2);
    s.schedule(usize::MAX);
    assert!(s.get(3).is_some(), "the third may wait for features now");
}

#[test]
fn one_at_a_time_waits_for_features_too() {
    let mut s = scheduler(64, 4, 64, 1);
    s.add(Scheduled::new(1, vec![7; 8], media(8, 1)));
    s.add(Scheduled::new(2, vec![2; 3], vec![]));
    assert_eq!(s.schedule(usize::MAX), []);
    assert_eq!((s.num_running(), s.num_waiting()), (1, 1));
    s.set_ready(1);
    assert_eq!(s.schedule(usize::MAX), [whole(1, 8)]);
    s.remove(1);
    assert_eq!(s.schedule(usize::MAX), [whole(2, 3)]);
}

/// Sent back to the line its encoding would be given up.
#[test]
fn media_that_wait_for_features_keep_waiting_when_blocks_run_out() {
    let mut s = scheduler(4, 2, 8, 2);
    s.add(Scheduled::new(1, vec![1; 6], vec![]));
    s.schedule(usize::MAX);
    s.commit(1, 6);
    s.remove(1);
    s.add(Scheduled::new(2, vec![2; 2], vec![]));
    // Its first blocks are in the cache, the media come later.
    let content = vec![ContentSpan { start: 4, len: 2, hash: [1; 32], row: 0 }];
    s.add(Scheduled::new(3, vec![1; 6], content));
    assert_eq!(s.schedule(usize::MAX), [whole(2, 2)]);
    assert_eq!(s.get(3).map(|s| s.computed), Some(4));
    for end in 2..7 {
        s.commit(2, if end == 2 { 2 } else { 1 });
        s.append(2, 9);
        assert_eq!(s.schedule(usize::MAX), [Planned { id: 2, range: end..end + 1 }]);
        assert_eq!((s.num_running(), s.preemptions), (2, 0));
    }
    assert_eq!(s.get(3).map(|s| (s.computed, s.ready, s.block_table.len())), Some((0, false, 0)));
    s.remove(2);
    s.set_ready(3);
    assert_eq!(s.schedule(usize::MAX), [whole(3, 6)]);
}

#[test]
fn one_at_a_time_when_told_so() {
    let mut s = scheduler(16, 4, 8, 1);
    s.add(Scheduled::new(1, vec![1; 2], vec![]));
    s.add(Scheduled::new(2, vec![2; 2], vec![]));
    assert_eq!(s.schedule(usize::MAX), [Planned { id: 1, range: 0..2 }]);
    s.remove(1);
    assert_eq!(s.schedule(usize::MAX), [Planned { id: 2, range: 0..2 }]);
}

#[test]
fn the_youngest_gives_way_and_comes_back_to_its_cached_blocks() {
    let mut s = scheduler(4, 2, 8, 2);
    s.add(Scheduled::new(1, vec![1; 4], vec![]));
    s.add(Scheduled::new(2, vec![2; 4], vec![]));
    let lengths = HashMap::from([(1, 8), (2, 6)]);
    assert_eq!(step(&mut s, &lengths), [1, 2]);
    assert_eq!(s.schedule(usize::MAX), [Planned { id: 1, range: 4..5 }], "2 lost its blocks to 1");
    s.commit(1, 1);
    s.append(1, 5);
    s.remove(1);
    assert_eq!(s.schedule(usize::MAX), [Planned { id: 2, range: 2..5 }], "one of its blocks was still cached");
    assert_eq!(s.get(2).and_then(|s| s.cached), Some(0), "counts what was cached when it first came");
}

#[test]
fn random_arrivals_cancellations_and_shortage() {
    for seed in 0..60u64 {
        let mut dice = Dice(seed << 32);
        let (size, blocks) = (1 + dice.roll(5), 6 + dice.roll(30));
        let (batch, running) = (1 + dice.roll(24), 1 + dice.roll(6));
        let mut s = scheduler(blocks, size, batch, running);
        let mut lengths = HashMap::new();
        let mut unfinished: HashSet<u64> = HashSet::new();
        let mut first_tokens: Vec<u64> = Vec::new();
        let (mut next, mut steps) = (0u64, 0usize);
        while next < 60 || !unfinished.is_empty() {
            let arrivals = if next < 60 { dice.roll(4) } else { 0 };
            for _ in 0..arrivals {
                let longest = blocks * size;
                let length = 2 + dice.roll(longest.min(40) - 1);
                let prompt = 1 + dice.roll(length - 1);
                let family = dice.roll(3) as u32;
                let tokens: Vec<u32> = (0..prompt as u32).map(|i| i * family).collect();
                let content = if dice.roll(3) == 0 { media(1 + dice.roll(prompt), family as u8) } else { vec![] };
                s.add(Scheduled::new(next, tokens, content));
                lengths.insert(next, length);
                unfinished.insert(next);
                next += 1;
            }
            if next > 0 && dice.roll(6) == 0 {
                let victim = dice.roll(next as usize) as u64;
                s.remove(victim);
                unfinished.remove(&victim);
            }
            let blocked: Vec<u64> = s.running().filter(|s| !s.ready).map(|s| s.id).collect();
            blocked.into_iter().filter(|_| dice.roll(4) == 0).for_each(|id| s.set_ready(id));
            let plan = s.schedule(usize::MAX);
            // Nothing runs only when all that was admitted waits for features.
            assert!(!plan.is_empty() || s.running.iter().all(|s| !s.ready) && (s.is_empty() || s.num_running() > 0));
            assert!(plan.iter().map(|p| p.range.len()).sum::<usize>() <= batch);
            assert_eq!(plan.iter().map(|p| p.id).collect::<HashSet<_>>().len(), plan.len());
            assert!(s.num_placed() <= running && s.running.iter().filter(|s| s.has_media()).count() <= running);
            assert!(s.running.iter().all(|s| s.ready || !s.placed));
            check_blocks(&s);
            for Planned { id, range } in plan {
                let sequence = s.get(id).expect("planned sequences run");
                assert!(sequence.ready);
                assert_eq!(range.start, sequence.computed);
                assert!(!range.is_empty() && range.end <= sequence.tokens.len());
                assert!(sequence.block_table.len() * size >= range.end);
                let whole = range.end == sequence.tokens.len();
                s.commit(id, range.len());
                if whole {
                    if !first_tokens.contains(&id) {
                        first_tokens.push(id);
                    }
                    s.append(id, (id as u32) << 8 | range.end as u32);
                    if range.end + 1 >= lengths[&id] {
                        s.remove(id);
                        unfinished.remove(&id);
                    }
                }
            }
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: no progress");
        }
        assert!(s.is_empty());
        assert_eq!(s.blocks.num_free(), blocks, "seed {seed}: blocks leaked");
    }
}

#[test]
fn equal_requests_get_their_first_tokens_in_order() {
    for running in [1, 2, 5] {
        let mut s = scheduler(12, 4, 6, running);
        let lengths: HashMap<u64, usize> = (0..20).map(|id| (id, 15)).collect();
        (0..20).for_each(|id| s.add(Scheduled::new(id, vec![id as u32; 7], vec![])));
        let mut seen = Vec::new();
        while !s.is_empty() {
            for id in step(&mut s, &lengths) {
                if !seen.contains(&id) {
                    seen.push(id);
                }
            }
        }
        assert_eq!(seen, (0..20).collect::<Vec<_>>(), "{running} at once");
    }
}

/// No block is written by one sequence while another has it, and shared ones are complete.
fn check_blocks(s: &Scheduler) {
    let size = s.blocks.block_tokens();
    let mut owners: HashMap<u32, Vec<&Scheduled>> = HashMap::new();
    for sequence in &s.running {
        let distinct: HashSet<_> = sequence.block_table.iter().collect();
        assert_eq!(distinct.len(), sequence.block_table.len());
        sequence.block_table.iter().for_each(|block| owners.entry(*block).or_default().push(sequence));
    }
    for (block, sequences) in &owners {
        for sequence in &sequences[..sequences.len() - 1] {
            let last = sequences[sequences.len() - 1];
            let at = sequence.block_table.iter().position(|b| b == block).expect("an owner");
            assert_eq!(last.block_table[at], *block, "shared at the same place");
            assert!(sequence.computed >= (at + 1) * size && last.computed >= (at + 1) * size);
            assert_eq!(sequence.tokens[..(at + 1) * size], last.tokens[..(at + 1) * size]);
        }
    }
    assert_eq!(owners.len() + s.blocks.num_free(), s.blocks.num_blocks());
}

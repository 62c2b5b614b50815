//! Which tokens of which sequences run in the next step.
//!
//! First come, first served. A step takes one token of every sequence that generates, then prompt tokens in order of
//! arrival until `max_batch_tokens` are reached, but half of them go to prompts that are much shorter than the first, and
//! these are admitted beside it: so a long clip does not hold up short questions. Sequences that wait for media features
//! hold their place. When the blocks run out, the youngest running sequence gives its own back and waits, first in line, to
//! be computed again; much of it is usually still in the prefix cache.

use std::collections::VecDeque;
use std::ops::Range;

use crate::block_manager::{BlockManager, ContentSpan, Key, block_key};

/// A prompt with this part of another's tokens is much shorter.
const MUCH_SHORTER: usize = 4;

/// A sequence as the scheduler sees it.
#[derive(Debug)]
pub(crate) struct Scheduled {
    pub id: u64,
    /// Prompt, then what was generated.
    pub tokens: Vec<u32>,
    /// What stands behind the media tokens among them, in token order.
    pub content: Vec<ContentSpan>,
    /// Blocks, in order.
    pub block_table: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
    /// Tokens that were in the cache when it was first admitted; `None` until then.
    pub cached: Option<usize>,
    /// What stands behind its media tokens is there, or not needed.
    pub ready: bool,
    /// It computes all of its prompt itself.
    pub private: bool,
    /// Keys of the full blocks so far.
    keys: Vec<Key>,
}

impl Scheduled {
    pub fn new(id: u64, tokens: Vec<u32>, content: Vec<ContentSpan>) -> Self {
        let (ready, block_table, keys) = (content.is_empty(), Vec::new(), Vec::new());
        Self { id, tokens, content, block_table, computed: 0, cached: None, ready, private: false, keys }
    }

    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

/// A part of a step: these tokens of this sequence. Its blocks are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planned {
    pub id: u64,
    pub range: Range<usize>,
}

/// Waiting and running sequences, and the blocks that they share.
#[derive(Debug)]
pub(crate) struct Scheduler {
    pub blocks: BlockManager,
    waiting: VecDeque<Scheduled>,
    /// In order of admission.
    running: Vec<Scheduled>,
    max_batch_tokens: usize,
    max_running: usize,
    /// Times that a sequence gave its blocks back.
    pub preemptions: u64,
}

impl Scheduler {
    pub fn new(blocks: BlockManager, max_batch_tokens: usize, max_running: usize) -> Self {
        let max_batch_tokens = max_batch_tokens.max(1);
        // More could not all generate in one step.
        let max_running = max_running.clamp(1, max_batch_tokens);
        Self { blocks, waiting: VecDeque::new(), running: Vec::new(), max_batch_tokens, max_running, preemptions: 0 }
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Queues a sequence. At its longest it has to fit into the pool alone.
    pub fn add(&mut self, sequence: Scheduled) {
        self.waiting.push_back(sequence);
    }

    /// A running sequence.
    pub fn get(&self, id: u64) -> Option<&Scheduled> {
        self.running.iter().find(|sequence| sequence.id == id)
    }

    /// The running sequences, in order of admission.
    pub fn running(&self) -> impl Iterator<Item = &Scheduled> {
        self.running.iter()
    }

    /// The media that the sequence needs from here on are there.
    pub fn set_ready(&mut self, id: u64) {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) {
            sequence.ready = true;
        }
    }

    /// Tokens after the last one that the sequence's blocks have room for.
    pub fn room(&self, id: u64) -> usize {
        self.get(id).map_or(0, |s| (s.block_table.len() * self.blocks.block_tokens()).saturating_sub(s.tokens.len()))
    }

    /// The next step, with at most `max_prefill` prompt tokens beside those of sequences that generate. Empty only when
    /// there is no sequence that is ready.
    pub fn schedule(&mut self, max_prefill: usize) -> Vec<Planned> {
        let mut plan = Vec::new();
        let mut budget = self.max_batch_tokens;
        let mut before = self.running.len();
        let generating: Vec<u64> = self.running.iter().filter(|s| s.pending() == 1).map(|s| s.id).collect();
        generating.into_iter().for_each(|id| self.plan(id, &mut plan, &mut budget));
        budget = budget.min(max_prefill.max(1));
        // A long prompt takes all that it can get until it is done; the last place is kept for the next of its kind.
        let long = self.running.iter().find(|s| s.pending() > 1 && s.ready).map_or(0, Scheduled::pending);
        while self.running.len() >= before
            && self.running.len() + 1 < self.max_running
            && self.waiting.front().is_some_and(|s| s.tokens.len() <= long / MUCH_SHORTER)
            && self.admit().is_some()
        {}
        before = before.max(self.running.len());
        let prompts: Vec<(u64, usize)> =
            self.running.iter().filter(|s| s.pending() > 1 && s.ready).map(|s| (s.id, s.pending())).collect();
        if let Some((_, first)) = prompts.first() {
            let mut half = budget / 2;
            budget -= half;
            for (id, _) in prompts.iter().filter(|(_, pending)| *pending <= *first / MUCH_SHORTER) {
                self.plan(*id, &mut plan, &mut half);
            }
            budget += half;
        }
        for (id, _) in prompts {
            if !plan.iter().any(|planned| planned.id == id) {
                self.plan(id, &mut plan, &mut budget);
            }
        }
        // Whoever was just sent back would only be admitted to be sent back again.
        while self.running.len() >= before && self.running.len() < self.max_running && budget > 0 {
            let Some(id) = self.admit() else { break };
            self.plan(id, &mut plan, &mut budget);
        }
        plan
    }

    /// Admits the first in line if the pool holds all of its tokens, using what is cached of them.
    fn admit(&mut self) -> Option<u64> {
        let mut sequence = self.waiting.pop_front()?;
        let (table, keys) = match sequence.private {
            true => (Vec::new(), Vec::new()),
            false => self.blocks.take_prefix(&sequence.tokens, &sequence.content),
        };
        sequence.block_table = table;
        let missing = self.blocks.blocks_for(sequence.tokens.len()) - sequence.block_table.len();
        if missing > self.blocks.num_free() {
            self.blocks.release(&mut sequence.block_table);
            self.waiting.push_front(sequence);
            return None;
        }
        sequence.keys = keys;
        sequence.computed = sequence.block_table.len() * self.blocks.block_tokens();
        sequence.cached.get_or_insert(sequence.computed);
        let id = sequence.id;
        self.running.push(sequence);
        Some(id)
    }

    /// Plans as much of a running sequence as the budget allows, at the cost of younger ones.
    fn plan(&mut self, id: u64, plan: &mut Vec<Planned>, budget: &mut usize) {
        while let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            let sequence = &mut self.running[index];
            let range = sequence.computed..sequence.computed + sequence.pending().min(*budget);
            if range.is_empty() || !sequence.ready {
                return;
            }
            if self.blocks.extend(&mut sequence.block_table, range.end) {
                *budget -= range.len();
                plan.push(Planned { id, range });
                return;
            }
            let mut youngest = self.running.pop().expect("it holds at least `id`");
            if let Some(planned) = plan.iter().position(|planned| planned.id == youngest.id) {
                *budget += plan.remove(planned).range.len();
            }
            self.reset(&mut youngest);
            self.preemptions += 1;
            self.waiting.push_front(youngest);
        }
    }

    fn reset(&mut self, sequence: &mut Scheduled) {
        self.blocks.release(&mut sequence.block_table);
        sequence.keys.clear();
        sequence.computed = 0;
        sequence.ready = sequence.content.is_empty();
    }

    /// The step ran: `tokens` more tokens of the sequence are in the cache.
    pub fn commit(&mut self, id: u64, tokens: usize) {
        let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) else { return };
        sequence.computed += tokens;
        let size = self.blocks.block_tokens();
        for index in sequence.keys.len()..sequence.computed / size {
            let start = index * size;
            let key = block_key(sequence.keys.last(), start, &sequence.tokens[start..start + size], &sequence.content);
            self.blocks.share(sequence.block_table[index], key);
            sequence.keys.push(key);
        }
    }

    /// A token was generated.
    pub fn append(&mut self, id: u64, token: u32) {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) {
            sequence.tokens.push(token);
        }
    }

    /// The sequence is over, wherever it is; its blocks are free.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            let mut sequence = self.running.remove(index);
            self.reset(&mut sequence);
        }
    }
}

#[cfg(test)]
mod tests {
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
                    s.add(Scheduled::new(next, (0..prompt as u32).map(|i| i * family).collect(), vec![]));
                    lengths.insert(next, length);
                    unfinished.insert(next);
                    next += 1;
                }
                if next > 0 && dice.roll(6) == 0 {
                    let victim = dice.roll(next as usize) as u64;
                    s.remove(victim);
                    unfinished.remove(&victim);
                }
                let plan = s.schedule(usize::MAX);
                assert_eq!(plan.is_empty(), s.is_empty());
                assert!(plan.iter().map(|p| p.range.len()).sum::<usize>() <= batch);
                assert_eq!(plan.iter().map(|p| p.id).collect::<HashSet<_>>().len(), plan.len());
                assert!(s.num_running() <= running);
                check_blocks(&s);
                for Planned { id, range } in plan {
                    let sequence = s.get(id).expect("planned sequences run");
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
}

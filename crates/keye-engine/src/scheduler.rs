//! Which tokens of which sequences run in the next step.
//!
//! First come, first served. A step takes one token of every sequence that generates, then prompt tokens in order of
//! arrival until `max_batch_tokens` are reached, but half of them go to prompts that are much shorter than the first, and
//! these are admitted beside it: so a long clip does not hold up short questions. Sequences that wait for media features
//! take no place in the steps until these have come, so that text does not wait for them, and then the first place that
//! becomes free. When the blocks run out, the youngest running sequence gives its own back and waits, first in line, to be
//! computed again; much of it is usually still in the prefix cache.

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
    /// It has a place in the steps; a running sequence without one waits for features, or for a place.
    pub placed: bool,
    /// It computes all of its prompt itself.
    pub private: bool,
    /// Keys of the full blocks so far.
    keys: Vec<Key>,
}

impl Scheduled {
    pub fn new(id: u64, tokens: Vec<u32>, content: Vec<ContentSpan>) -> Self {
        let (ready, block_table, keys) = (content.is_empty(), Vec::new(), Vec::new());
        Self { id, tokens, content, block_table, computed: 0, cached: None, ready, placed: false, private: false, keys }
    }

    fn has_media(&self) -> bool {
        !self.content.is_empty()
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

    /// A sequence without media waits.
    pub fn text_waits(&self) -> bool {
        self.waiting.iter().any(|sequence| !sequence.has_media())
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
        self.place();
        let mut plan = Vec::new();
        let mut budget = self.max_batch_tokens;
        let mut before = self.running.len();
        let generating: Vec<u64> = self.running.iter().filter(|s| s.pending() == 1).map(|s| s.id).collect();
        generating.into_iter().for_each(|id| self.plan(id, &mut plan, &mut budget));
        budget = budget.min(max_prefill.max(1));
        // A long prompt takes all that it can get until it is done; the last place is kept for the next of its kind.
        let long = self.running.iter().find(|s| s.pending() > 1 && s.placed).map_or(0, Scheduled::pending);
        while self.running.len() >= before
            && self.num_placed() + 1 < self.max_running
            && self.next().is_some_and(|next| self.waiting[next].tokens.len() <= long / MUCH_SHORTER)
            && self.admit().is_some()
        {}
        before = before.max(self.running.len());
        let prompts: Vec<(u64, usize)> =
            self.running.iter().filter(|s| s.pending() > 1 && s.placed).map(|s| (s.id, s.pending())).collect();
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
        while self.running.len() >= before && budget > 0 {
            let Some(id) = self.admit() else { break };
            self.plan(id, &mut plan, &mut budget);
        }
        plan
    }

    fn num_placed(&self) -> usize {
        self.running.iter().filter(|sequence| sequence.placed).count()
    }

    /// Sequences whose features have come get the places that are free before anyone in line does.
    fn place(&mut self) {
        let free = self.max_running.saturating_sub(self.num_placed());
        self.running.iter_mut().filter(|s| s.ready && !s.placed).take(free).for_each(|s| s.placed = true);
    }

    /// Who is to be admitted next: the first in line, but text passes media when as many run as may. Their number is
    /// bounded for themselves, since decoded media are large.
    fn next(&self) -> Option<usize> {
        // One at a time means that the next one waits, whatever the first one waits for.
        if self.max_running == 1 && !self.running.is_empty() {
            return None;
        }
        let media = self.running.iter().filter(|s| s.has_media()).count();
        let next = self.waiting.iter().position(|s| !s.has_media() || media < self.max_running)?;
        (self.waiting[next].has_media() || self.num_placed() < self.max_running).then_some(next)
    }

    /// Admits the next sequence if the pool holds all of its tokens, using what is cached of them.
    fn admit(&mut self) -> Option<u64> {
        let next = self.next()?;
        let mut sequence = self.waiting.remove(next)?;
        if !sequence.private {
            let known = std::mem::take(&mut sequence.keys);
            (sequence.block_table, sequence.keys) = self.blocks.take_prefix(&sequence.tokens, &sequence.content, known);
        }
        let missing = self.blocks.blocks_for(sequence.tokens.len()) - sequence.block_table.len();
        if missing > self.blocks.num_free() {
            // The keys are kept, so that the next try need not hash them again.
            self.blocks.release(&mut sequence.block_table);
            self.waiting.insert(next, sequence);
            return None;
        }
        sequence.computed = sequence.block_table.len() * self.blocks.block_tokens();
        sequence.cached.get_or_insert(sequence.computed);
        sequence.placed = sequence.ready;
        let id = sequence.id;
        self.running.push(sequence);
        Some(id)
    }

    /// Plans as much of a running sequence as the budget allows, at the cost of younger ones.
    fn plan(&mut self, id: u64, plan: &mut Vec<Planned>, budget: &mut usize) {
        while let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            let sequence = &mut self.running[index];
            let range = sequence.computed..sequence.computed + sequence.pending().min(*budget);
            if range.is_empty() || !sequence.placed {
                return;
            }
            if self.blocks.extend(&mut sequence.block_table, range.end) {
                *budget -= range.len();
                plan.push(Planned { id, range });
                return;
            }
            let holds = |s: &Scheduled| s.id == id || !s.block_table.is_empty();
            let youngest = self.running.iter().rposition(holds).unwrap_or(index);
            if !self.running[youngest].placed {
                // Its features may be in the making: it gives back what it found in the cache and waits where it is.
                reset(&mut self.blocks, &mut self.running[youngest]);
                continue;
            }
            let mut youngest = self.running.remove(youngest);
            if let Some(planned) = plan.iter().position(|planned| planned.id == youngest.id) {
                *budget += plan.remove(planned).range.len();
            }
            reset(&mut self.blocks, &mut youngest);
            self.preemptions += 1;
            self.waiting.push_front(youngest);
        }
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
            reset(&mut self.blocks, &mut sequence);
        }
    }
}

fn reset(blocks: &mut BlockManager, sequence: &mut Scheduled) {
    blocks.release(&mut sequence.block_table);
    sequence.keys.clear();
    sequence.computed = 0;
    sequence.ready = !sequence.has_media();
    sequence.placed = false;
}

#[cfg(test)]
mod tests;

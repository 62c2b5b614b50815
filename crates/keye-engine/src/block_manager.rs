//! Blocks of the KV cache: free list, reference counts, prefix sharing.
//!
//! A full block is known by a [`Key`]: SHA-256 over the key of the block before it, its token ids, and for every run of
//! tokens that takes media features the content hash of those media and the feature row it starts at. Token ids alone
//! would not do: every clip of a size has the same pads. Positions need no place in the key, they are a function of the
//! tokens and of the grids, which the content hash covers.

use std::collections::{BTreeSet, HashMap};

use sha2::{Digest, Sha256};

/// What is known of a block's content and of all that came before it.
pub(crate) type Key = [u8; 32];

/// `len` tokens from `start` on take the rows from `row` on of the media with content hash `hash`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentSpan {
    pub start: usize,
    pub len: usize,
    pub hash: [u8; 32],
    pub row: usize,
}

/// The key of the block that holds `tokens[start..]`, whole, after the block with key `parent`.
pub(crate) fn block_key(parent: Option<&Key>, start: usize, tokens: &[u32], content: &[ContentSpan]) -> Key {
    let mut hasher = Sha256::new();
    hasher.update(parent.unwrap_or(&[0; 32]));
    for token in tokens {
        hasher.update(token.to_le_bytes());
    }
    // Every span has the same length here and the tokens' count is fixed, so the fields cannot be mistaken for others.
    for span in content {
        let (from, to) = (span.start.max(start), (span.start + span.len).min(start + tokens.len()));
        if from < to {
            for number in [from - start, to - from, span.row + (from - span.start)] {
                hasher.update((number as u64).to_le_bytes());
            }
            hasher.update(span.hash);
        }
    }
    hasher.finalize().into()
}

#[derive(Debug, Clone, Default)]
struct Block {
    users: u32,
    /// Set when the content is complete and can be found by others.
    key: Option<Key>,
    /// When it was freed; 0 for content that nobody can find, which goes first.
    freed: u64,
}

/// The pool. Freed blocks with a key keep their content until they are needed, the longest unused first.
#[derive(Debug)]
pub(crate) struct BlockManager {
    block_tokens: usize,
    blocks: Vec<Block>,
    by_key: HashMap<Key, u32>,
    free: BTreeSet<(u64, u32)>,
    clock: u64,
}

impl BlockManager {
    pub fn new(num_blocks: usize, block_tokens: usize) -> Self {
        assert!(block_tokens > 0, "a block holds at least one token");
        let count = u32::try_from(num_blocks).unwrap_or(u32::MAX);
        Self {
            block_tokens,
            blocks: vec![Block::default(); count as usize],
            by_key: HashMap::new(),
            free: (0..count).map(|block| (0, block)).collect(),
            clock: 0,
        }
    }

    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody uses, cached ones included.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that `tokens` tokens need.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// The cached blocks that a sequence begins with, and their keys. At least one token is left to compute, since the
    /// logits of the last one are needed. The blocks are in use from here on. `known` are keys that an earlier call gave for
    /// the same tokens.
    pub fn take_prefix(&mut self, tokens: &[u32], content: &[ContentSpan], known: Vec<Key>) -> (Vec<u32>, Vec<Key>) {
        let (mut table, mut keys) = (Vec::new(), Vec::<Key>::new());
        let sharable = tokens.len().saturating_sub(1) / self.block_tokens;
        for (index, chunk) in tokens.chunks_exact(self.block_tokens).take(sharable).enumerate() {
            let computed = || block_key(keys.last(), index * self.block_tokens, chunk, content);
            let key = known.get(index).copied().unwrap_or_else(computed);
            let Some(&block) = self.by_key.get(&key) else { break };
            let entry = &mut self.blocks[block as usize];
            if entry.users == 0 {
                self.free.remove(&(entry.freed, block));
            }
            entry.users += 1;
            table.push(block);
            keys.push(key);
        }
        (table, keys)
    }

    /// Extends a block table until it covers `tokens` tokens. False, and nothing done, when there are too few blocks.
    pub fn extend(&mut self, table: &mut Vec<u32>, tokens: usize) -> bool {
        let missing = self.blocks_for(tokens).saturating_sub(table.len());
        if missing > self.free.len() {
            return false;
        }
        for _ in 0..missing {
            let (_, block) = self.free.pop_first().expect("counted above");
            let entry = &mut self.blocks[block as usize];
            if let Some(key) = entry.key.take() {
                self.by_key.remove(&key);
            }
            entry.users = 1;
            table.push(block);
        }
        true
    }

    /// Makes a block whose content is complete findable. Of two blocks with the same content the first stays.
    pub fn share(&mut self, block: u32, key: Key) {
        if let std::collections::hash_map::Entry::Vacant(vacant) = self.by_key.entry(key) {
            vacant.insert(block);
            self.blocks[block as usize].key = Some(key);
        }
    }

    /// Gives a sequence's blocks back. The last goes first: a block is of no use without those before it.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        for block in table.drain(..).rev() {
            let entry = &mut self.blocks[block as usize];
            entry.users -= 1;
            if entry.users == 0 {
                self.clock += 1;
                entry.freed = if entry.key.is_some() { self.clock } else { 0 };
                self.free.insert((entry.freed, block));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(manager: &mut BlockManager, tokens: &[u32], content: &[ContentSpan]) -> Vec<u32> {
        let (mut table, mut keys) = manager.take_prefix(tokens, content, vec![]);
        assert!(manager.extend(&mut table, tokens.len()));
        let size = manager.block_tokens();
        for index in keys.len()..tokens.len() / size {
            let key = block_key(keys.last(), index * size, &tokens[index * size..(index + 1) * size], content);
            manager.share(table[index], key);
            keys.push(key);
        }
        table
    }

    fn span(start: usize, len: usize, hash: u8, row: usize) -> ContentSpan {
        ContentSpan { start, len, hash: [hash; 32], row }
    }

    #[test]
    fn a_prefix_is_found_again_but_never_the_last_token() {
        let mut manager = BlockManager::new(8, 4);
        let tokens: Vec<u32> = (0..8).collect();
        let mut table = fill(&mut manager, &tokens, &[]);
        assert_eq!(manager.take_prefix(&tokens, &[], vec![]).0, table[..1], "the second block holds the last token");
        let longer: Vec<u32> = (0..9).collect();
        assert_eq!(manager.take_prefix(&longer, &[], vec![]).0, table);
        assert!(manager.take_prefix(&[0, 1, 2, 9, 4], &[], vec![]).0.is_empty());
        assert_eq!(manager.num_free(), 6);
        manager.release(&mut table);
        assert_eq!(manager.num_free(), 6, "others still use them");
    }

    #[test]
    fn the_same_tokens_over_other_media_share_nothing() {
        let tokens = [7; 12];
        let clip = [span(2, 8, 1, 0)];
        for other in [
            vec![],
            vec![span(2, 8, 2, 0)],
            vec![span(2, 8, 1, 1)],
            vec![span(3, 8, 1, 0)],
            vec![span(2, 1, 1, 0)],
            vec![span(2, 1, 1, 0), span(3, 7, 1, 2)],
        ] {
            let mut manager = BlockManager::new(16, 4);
            fill(&mut manager, &tokens, &clip);
            assert_eq!(manager.take_prefix(&tokens, &clip, vec![]).0.len(), 2);
            assert!(manager.take_prefix(&tokens, &other, vec![]).0.is_empty(), "{other:?}");
        }
    }

    #[test]
    fn a_clip_that_differs_later_shares_what_came_before() {
        let mut manager = BlockManager::new(16, 4);
        let tokens = [7; 13];
        let table = fill(&mut manager, &tokens, &[span(5, 6, 1, 0)]);
        assert_eq!(manager.take_prefix(&tokens, &[span(5, 6, 2, 0)], vec![]).0, table[..1]);
    }

    #[test]
    fn a_block_deep_in_a_chain_is_not_found_without_its_parents() {
        let mut manager = BlockManager::new(16, 4);
        fill(&mut manager, &[1, 1, 1, 1, 2, 2, 2, 2, 3], &[]);
        assert!(manager.take_prefix(&[2, 2, 2, 2, 3], &[], vec![]).0.is_empty());
    }

    #[test]
    fn unused_blocks_are_taken_first_then_the_longest_unused_from_its_end() {
        let mut manager = BlockManager::new(5, 2);
        let mut old = fill(&mut manager, &[1, 1, 1, 1], &[]);
        let mut new = fill(&mut manager, &[2, 2], &[]);
        let (old_blocks, new_blocks) = (old.clone(), new.clone());
        manager.release(&mut old);
        manager.release(&mut new);
        let mut table = Vec::new();
        assert!(manager.extend(&mut table, 6));
        assert!(!table[..2].iter().any(|block| old_blocks.contains(block) || new_blocks.contains(block)));
        assert_eq!(table[2], old_blocks[1]);
        assert_eq!(manager.take_prefix(&[1, 1, 1, 1, 1], &[], vec![]).0, old_blocks[..1]);
        assert!(!manager.extend(&mut Vec::new(), 4), "one block is left");
        assert_eq!(manager.num_free(), 1);
    }

    #[test]
    fn equal_content_computed_twice_is_kept_once() {
        let mut manager = BlockManager::new(4, 2);
        let key = block_key(None, 0, &[1, 1], &[]);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert!(manager.extend(&mut a, 2) && manager.extend(&mut b, 2));
        manager.share(a[0], key);
        manager.share(b[0], key);
        assert_eq!(manager.take_prefix(&[1, 1, 1], &[], vec![]).0, a);
        manager.release(&mut b);
        let mut rest = Vec::new();
        assert!(manager.extend(&mut rest, 6));
        assert_eq!(manager.take_prefix(&[1, 1, 1], &[], vec![]).0, a, "the copy's end does not touch the original");
    }
}

//! Buffers that are given back and taken again: fresh memory of a layer's size costs page faults and zeroing in every layer.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Shorter buffers come from the allocator, which has them at hand.
const SHORTEST: usize = 1 << 14;
/// Bytes that are kept of a type; the oldest buffers go first.
const KEPT: usize = 128 << 20;

/// Buffers of one type.
pub(crate) struct Spare<T>(Mutex<VecDeque<Vec<T>>>);

/// Of activations.
pub(crate) static FLOATS: Spare<f32> = Spare::new();
/// Of codes in eight bits.
pub(crate) static NARROW_CODES: Spare<i8> = Spare::new();
/// Of codes in fourteen bits.
pub(crate) static WIDE_CODES: Spare<i16> = Spare::new();

impl<T: Copy + Default> Spare<T> {
    const fn new() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }

    /// A buffer of `len` elements with whatever is in it, if there is one of that length.
    fn find(&self, len: usize) -> Option<Vec<T>> {
        if len < SHORTEST {
            return None;
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The last is likeliest to be in a cache.
        let at = kept.iter().rposition(|buffer| buffer.len() == len)?;
        kept.remove(at)
    }

    /// `len` elements with whatever is in them.
    pub(crate) fn stale(&self, len: usize) -> Vec<T> {
        self.find(len).unwrap_or_else(|| vec![T::default(); len])
    }

    /// `len` zeros.
    pub(crate) fn zeros(&self, len: usize) -> Vec<T> {
        match self.find(len) {
            Some(mut buffer) => {
                buffer.fill(T::default());
                buffer
            }
            None => vec![T::default(); len],
        }
    }

    /// Takes a buffer back.
    pub(crate) fn give(&self, buffer: Vec<T>) {
        if buffer.len() < SHORTEST {
            return;
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(buffer);
        let mut bytes: usize = kept.iter().map(|buffer| size_of::<T>() * buffer.capacity()).sum();
        while bytes > KEPT
            && let Some(oldest) = kept.pop_front()
        {
            bytes -= size_of::<T>() * oldest.capacity();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_what_is_kept_is_bounded() {
        let spare = Spare::<i16>::new();
        let len = SHORTEST;
        spare.give(vec![7; len]);
        assert_eq!(spare.stale(len + 1)[len], 0);
        assert_eq!(spare.stale(len)[0], 7);
        assert_eq!(spare.stale(len)[0], 0);
        spare.give(vec![7; len]);
        assert!(spare.zeros(len).iter().all(|value| *value == 0));
        let large = KEPT / 4;
        for value in 1..4 {
            spare.give(vec![value; large]);
        }
        assert_eq!([3, 2, 0], [0; 3].map(|_: i32| spare.stale(large)[0]));
        spare.give(vec![1; 5]);
        assert_eq!(spare.stale(5), [0; 5]);
    }
}

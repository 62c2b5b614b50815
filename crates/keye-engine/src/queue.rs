//! A queue between threads that can be looked into, cleared and closed.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    closed: bool,
}

/// First in, first out. Whoever pushes decides what may be in it; see [`Queue::insert_when`].
#[derive(Debug)]
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Queue<T> {
    pub fn new() -> Self {
        Self { state: Mutex::new(State { items: VecDeque::new(), closed: false }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends; gives the item back when the queue is closed.
    pub fn push(&self, item: T) -> Result<(), T> {
        let mut state = self.lock();
        if state.closed {
            return Err(item);
        }
        state.items.push_back(item);
        self.changed.notify_all();
        Ok(())
    }

    /// Appends, or takes the place of the last item when `replaces(last)` says so.
    pub fn push_or_replace(&self, item: T, replaces: impl FnOnce(&T) -> bool) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        match state.items.back_mut() {
            Some(last) if replaces(last) => *last = item,
            _ => state.items.push_back(item),
        }
        self.changed.notify_all();
    }

    /// Waits until `room` says that the queue has some, then puts the item before the first that `after` says comes after
    /// it. Gives the item back when the queue is closed or when `give_up` says so, which is asked from time to time.
    pub fn insert_when(
        &self,
        item: T,
        room: impl Fn(&VecDeque<T>) -> bool,
        after: impl Fn(&T, &T) -> bool,
        give_up: impl Fn(&T) -> bool,
    ) -> Result<(), T> {
        const ASK: Duration = Duration::from_millis(20);
        let mut state = self.lock();
        while !state.closed && !give_up(&item) {
            if room(&state.items) {
                let at = state.items.iter().position(|other| after(other, &item)).unwrap_or(state.items.len());
                state.items.insert(at, item);
                self.changed.notify_all();
                return Ok(());
            }
            state = self.changed.wait_timeout(state, ASK).unwrap_or_else(PoisonError::into_inner).0;
        }
        Err(item)
    }

    /// Waits for the first item; `None` once the queue is closed and empty.
    pub fn pop(&self) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                self.changed.notify_all();
                return Some(item);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Like [`Queue::pop`], for at most `timeout`. `Err` when the time is over.
    pub fn pop_timeout(&self, timeout: Duration) -> Result<Option<T>, Timeout> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                self.changed.notify_all();
                return Ok(Some(item));
            }
            if state.closed {
                return Ok(None);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Timeout);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The first item, if there is one now.
    pub fn try_pop(&self) -> Option<T> {
        let item = self.lock().items.pop_front();
        self.changed.notify_all();
        item
    }

    /// The first item that `wanted` wants, if there is one now.
    pub fn try_pop_where(&self, wanted: impl Fn(&T) -> bool) -> Option<T> {
        let mut state = self.lock();
        let at = state.items.iter().position(wanted)?;
        let item = state.items.remove(at);
        self.changed.notify_all();
        item
    }

    /// Drops the items that `keep` does not want.
    pub fn retain(&self, keep: impl FnMut(&mut T) -> bool) {
        self.lock().items.retain_mut(keep);
        self.changed.notify_all();
    }

    /// Nothing more is taken; what is there can still be popped.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

/// Nothing came in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timeout;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_closed_queue_gives_what_it_has_and_takes_nothing() {
        let queue = Queue::new();
        queue.push(1).expect("open");
        queue.close();
        assert_eq!(queue.push(2), Err(2));
        assert_eq!((queue.pop(), queue.pop()), (Some(1), None));
        assert_eq!(queue.pop_timeout(Duration::from_secs(9)), Ok(None));
    }

    #[test]
    fn waits_for_room_until_told_otherwise() {
        let queue = Arc::new(Queue::new());
        queue.push(1).expect("open");
        let fewer = |room: usize| move |items: &VecDeque<i32>| items.len() < room;
        let after = |a: &i32, b: &i32| a > b;
        assert_eq!(queue.insert_when(2, fewer(1), after, |_| true), Err(2));
        let (reader, popping) = (Arc::clone(&queue), Arc::new(AtomicBool::new(false)));
        let told = Arc::clone(&popping);
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            told.store(true, Ordering::SeqCst);
            (reader.pop(), reader.pop())
        });
        assert_eq!(queue.insert_when(3, fewer(1), after, |_| false), Ok(()));
        assert!(popping.load(Ordering::SeqCst), "there was no room before");
        assert_eq!(thread.join().expect("no panic"), (Some(1), Some(3)));
        assert_eq!(queue.pop_timeout(Duration::from_millis(1)), Err(Timeout));
        for item in [5, 9, 7, 7, 2] {
            queue.insert_when(item, |_| true, after, |_| false).expect("open");
        }
        let sorted: Vec<i32> = std::iter::from_fn(|| queue.try_pop()).collect();
        assert_eq!(sorted, [2, 5, 7, 7, 9]);
        for item in [4, 1, 3] {
            queue.push(item).expect("open");
        }
        let odd = |item: &i32| item % 2 == 1;
        let odd: Vec<i32> = std::iter::from_fn(|| queue.try_pop_where(odd)).collect();
        assert_eq!((odd, queue.try_pop()), (vec![1, 3], Some(4)));
    }
}

//! Tasks on all cores.

use rayon::prelude::*;

/// Below this many multiply-adds waking other threads costs more than it saves.
const SMALL: usize = 1 << 17;

/// Threads, and scratch memory for each.
pub(crate) struct Pool {
    threads: rayon::ThreadPool,
}

/// Reusable buffers of a thread.
#[derive(Default)]
pub(crate) struct Scratch {
    first: Vec<f32>,
    second: Vec<f32>,
    third: Vec<f32>,
}

/// Buffers of a task: one, another, and one that the task sizes itself.
type Buffers<'a> = (&'a mut [f32], (&'a mut [f32], &'a mut Vec<f32>));

impl Scratch {
    /// Two buffers of the given lengths with whatever is in them, and a third that the task sizes itself.
    pub(crate) fn split(&mut self, first: usize, second: usize) -> Buffers<'_> {
        grow(&mut self.first, first);
        grow(&mut self.second, second);
        (&mut self.first[..first], (&mut self.second[..second], &mut self.third))
    }
}

fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default();
}

impl Pool {
    pub(crate) fn new(threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("keye-cpu-{i}"));
        Ok(Self { threads: builder.build()? })
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Runs `task(0..count)` in any order; `work` is the number of multiply-adds in all.
    pub(crate) fn run(&self, count: usize, work: usize, task: impl Fn(usize, &mut Scratch) + Sync) {
        let run = |i| SCRATCH.with_borrow_mut(|scratch| task(i, scratch));
        if work < SMALL || count == 1 {
            (0..count).for_each(run);
        } else {
            self.threads.install(|| (0..count).into_par_iter().for_each(run));
        }
    }
}

/// A pointer that tasks share; each writes only what is its own.
#[derive(Clone, Copy)]
pub(crate) struct SyncPtr<T>(pub(crate) *mut T);

// SAFETY: the pointer is only a number; whoever writes through it states why the places are disjoint.
unsafe impl<T> Sync for SyncPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Send for SyncPtr<T> {}

impl<T> SyncPtr<T> {
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

//! Tasks on all cores: threads of our own that spin for a moment between jobs and sleep when there are none.
//!
//! A model's step is some hundred jobs with microseconds between them. The calling thread works too; helpers join a job
//! that is open and are waited for only once they have: one that the system does not run costs nothing. Tasks are handed
//! out one at a time, so that a slow core takes fewer.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread::{JoinHandle, Thread};

/// Below this many multiply-adds waking other threads costs more than it saves.
const SMALL: usize = 1 << 17;
/// Looks at the gate before a thread sleeps: some tens of microseconds.
const SPINS: usize = 1500;

/// Helpers inside the job.
const INSIDE: u64 = 0xffff;
/// Helpers may come in.
const OPEN: u64 = 1 << 16;
/// Helpers are to end.
const STOP: u64 = 1 << 17;
/// From one job's number to the next one's.
const JOB: u64 = 1 << 18;

/// Threads, and scratch memory for each.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by the thread whose job it is.
    turn: Mutex<()>,
}

struct Shared {
    /// Number of the job, [`OPEN`], [`STOP`], [`INSIDE`].
    gate: AtomicU64,
    /// Written while the gate is shut and nobody is inside, read from inside.
    job: UnsafeCell<Option<Job>>,
    /// The next task.
    next: AtomicUsize,
    /// Which helpers sleep.
    asleep: Vec<AtomicBool>,
    /// Who sleeps until the last helper has left.
    waiting: Mutex<Option<Thread>>,
    is_waiting: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only part that is not Sync by itself; the gate keeps writers and readers apart.
unsafe impl Sync for Shared {}
// SAFETY: the closure that a job points to is Sync, and the caller keeps it alive until the last helper has left.
unsafe impl Send for Shared {}

/// A borrowed closure and how often to call it. It lives until the caller has seen the last helper leave.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    count: usize,
}

impl Shared {
    /// Calls the job's closure until no number is left. A panic is kept for the caller, and ends the job.
    fn work(&self, job: Job) {
        // SAFETY: the caller of `run` is inside of it as long as anybody works.
        let task = unsafe { &*job.task };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.fetch_add(1, SeqCst);
                if i >= job.count {
                    return;
                }
                task(i);
            }
        }));
        if let Err(panic) = result {
            self.next.store(job.count, SeqCst);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    fn help(&self, number: usize) {
        let mut last = 0;
        loop {
            let gate = self.wait(number, last);
            if gate & STOP != 0 {
                return;
            }
            if self.gate.compare_exchange(gate, gate + 1, SeqCst, SeqCst).is_err() {
                continue;
            }
            last = gate / JOB;
            // SAFETY: the gate was open and counts this thread: nobody writes until it has left.
            if let Some(job) = unsafe { *self.job.get() } {
                self.work(job);
            }
            let left = self.gate.fetch_sub(1, SeqCst) - 1;
            if left & (INSIDE | OPEN) == 0
                && self.is_waiting.load(SeqCst)
                && let Some(caller) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take()
            {
                caller.unpark();
            }
        }
    }

    /// The gate once it is open for a job after `last`, or says stop.
    fn wait(&self, number: usize, last: u64) -> u64 {
        let look = || {
            let gate = self.gate.load(SeqCst);
            (gate & STOP != 0 || gate & OPEN != 0 && gate / JOB != last).then_some(gate)
        };
        loop {
            for _ in 0..SPINS {
                if let Some(gate) = look() {
                    return gate;
                }
                spin_loop();
            }
            // Whoever opens the gate looks at this after; this thread looks at the gate after. One of them sees.
            self.asleep[number].store(true, SeqCst);
            let gate = look();
            if gate.is_none() {
                std::thread::park();
            }
            self.asleep[number].store(false, SeqCst);
            if let Some(gate) = gate {
                return gate;
            }
        }
    }

    /// Returns when no helper is inside the shut gate.
    fn all_left(&self) {
        let empty = || self.gate.load(SeqCst) & INSIDE == 0;
        for _ in 0..SPINS {
            if empty() {
                return;
            }
            spin_loop();
        }
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        self.is_waiting.store(true, SeqCst);
        while !empty() {
            std::thread::park();
        }
        self.is_waiting.store(false, SeqCst);
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
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
    /// `threads` counts the one that calls [`Pool::run`].
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let helpers = threads.saturating_sub(1).min(INSIDE as usize);
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(JOB),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            waiting: Mutex::new(None),
            is_waiting: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut pool = Self { shared, helpers: Vec::with_capacity(helpers), turn: Mutex::new(()) };
        for number in 0..helpers {
            let shared = pool.shared.clone();
            let thread = std::thread::Builder::new().name(format!("keye-cpu-{number}"));
            pool.helpers.push(thread.spawn(move || shared.help(number))?);
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `task(0..count)` in any order; `work` is the number of multiply-adds in all. Where the helpers have another
    /// caller's job, this one works alone. Panics as a task does.
    pub(crate) fn run(&self, count: usize, work: usize, task: impl Fn(usize, &mut Scratch) + Sync) {
        let task = |i| SCRATCH.with_borrow_mut(|scratch| task(i, scratch));
        let alone = work < SMALL || count <= 1 || self.helpers.is_empty();
        if alone {
            return (0..count).for_each(task);
        }
        match self.turn.try_lock() {
            Err(TryLockError::WouldBlock) => (0..count).for_each(task),
            // A turn that ended with a task's panic has left everything in order.
            _turn => self.share(count, &task),
        }
    }

    fn share(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. This function returns after the last helper has left the gate, and never
        // unwinds before: `work` catches panics.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let job = Job { task, count };
        // SAFETY: it is this caller's turn, the gate is shut and nobody is inside.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, SeqCst);
        let number = shared.gate.load(SeqCst) / JOB + 1;
        shared.gate.store((number * JOB) | OPEN, SeqCst);
        for (asleep, helper) in shared.asleep.iter().zip(&self.helpers).take(count - 1) {
            if asleep.load(SeqCst) {
                helper.thread().unpark();
            }
        }
        shared.work(job);
        shared.gate.fetch_and(!OPEN, SeqCst);
        shared.all_left();
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.gate.fetch_or(STOP, SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // Helpers catch the panics of tasks.
            let _ = helper.join();
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

#[cfg(test)]
mod tests {
    use super::*;

    const ALWAYS: usize = usize::MAX;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(4).unwrap();
        for round in 0..3000 {
            let count = round % 37;
            let ran: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            pool.run(count, ALWAYS, |i, _| {
                ran[i].fetch_add(1, SeqCst);
            });
            assert!(ran.iter().all(|ran| ran.load(SeqCst) == 1), "round {round}");
            if round % 500 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(2)); // Long enough for helpers to fall asleep.
            }
        }
    }

    #[test]
    fn several_callers_at_once_get_their_own_tasks_done() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        let add = |i: usize, _: &mut Scratch| {
            sum.fetch_add(i, SeqCst);
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..500).for_each(|_| pool.run(20, ALWAYS, add)));
            }
        });
        assert_eq!(sum.load(SeqCst), 3 * 500 * 190);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3).unwrap();
        for bad in 0..20 {
            let run = || pool.run(20, ALWAYS, |i, _| assert!(i != bad, "task {i}"));
            let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            assert_eq!(panic.downcast_ref::<String>().unwrap(), &format!("task {bad}"));
        }
        let sum = AtomicUsize::new(0);
        pool.run(20, ALWAYS, |i, _| {
            sum.fetch_add(i, SeqCst);
        });
        assert_eq!(sum.load(SeqCst), 190);
    }
}

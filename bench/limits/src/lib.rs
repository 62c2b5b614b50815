//! What this machine can do: memory reads and arithmetic, by plain loops, to state speeds as fractions of.
//!
//! **In**: a number of threads. **Out**: [`Limits`], each the best of several runs of all threads at once.
//!
//! What it promises:
//!
//! * Nothing here knows of the kernels that are measured against it: slow kernels cannot lower a limit.
//! * Reads stream over memory far larger than any cache, in pages as large as the system gives.
//! * Arithmetic is independent multiply-adds in registers, in the widest instruction set that the machine has.

mod arithmetic;
mod read;

use std::sync::Barrier;
use std::time::Instant;

/// The machine's limits, over all threads together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Streaming reads, bytes per second.
    pub read: f64,
    /// int8 multiply-adds, operations (two each) per second; `None` where there is no instruction for them.
    pub int8: Option<f64>,
    /// f16 multiply-adds, operations per second; `None` without AVX512-FP16.
    pub f16: Option<f64>,
    /// f32 multiply-adds, operations per second; `None` where there is no loop for the machine.
    pub f32: Option<f64>,
}

/// Best of this many runs.
const RUNS: usize = 4;

/// Measures everything; about three seconds and 1 GiB of memory a thread.
pub fn measure(threads: usize) -> Limits {
    let threads = threads.max(1);
    Limits {
        read: read::rate(threads),
        int8: arithmetic::int8(threads),
        f16: arithmetic::f16(threads),
        f32: arithmetic::f32(threads),
    }
}

/// The shortest of several runs in which all threads do `work(thread)` at the same time, in seconds.
fn best(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    let run = || {
        let barrier = Barrier::new(threads);
        let times = std::thread::scope(|scope| {
            let run = |thread: usize| {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    work(thread);
                    (start, Instant::now())
                })
            };
            let workers: Vec<_> = (0..threads).map(run).collect();
            workers.into_iter().filter_map(|worker| worker.join().ok()).collect::<Vec<_>>()
        });
        let start = times.iter().map(|(start, _)| *start).min();
        let end = times.iter().map(|(_, end)| *end).max();
        start.zip(end).map_or(f64::INFINITY, |(start, end)| (end - start).as_secs_f64())
    };
    (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_one_thread_are_those_of_a_computer() {
        let rate = arithmetic::f32(1).unwrap_or(1e9);
        assert!((1e8..1e13).contains(&rate), "{rate}");
        if let Some(int8) = arithmetic::int8(1) {
            assert!(int8 > rate, "int8 {int8} is slower than f32 {rate}");
        }
    }

    #[test]
    fn all_threads_run_at_once() {
        let barrier = Barrier::new(3);
        assert!(
            best(3, |_| {
                barrier.wait();
            }) < 10.0
        );
    }
}

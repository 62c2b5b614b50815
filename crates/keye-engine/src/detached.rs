//! Work that cannot be stopped, on threads that are left alone when nobody waits for it any longer.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Threads that were left alone and still run. Dropping it does not wait for them.
pub(crate) struct Detached {
    left: Mutex<Vec<JoinHandle<()>>>,
    /// With so many of them nothing more is begun. A few begun at the same time may go over it.
    most: usize,
    /// How long work is waited for.
    time: Duration,
}

/// Why there is no result.
#[derive(Debug)]
pub(crate) enum Unfinished {
    /// The time is over.
    Late(Duration),
    /// Nobody wants the result.
    GivenUp,
    /// So many threads that were left alone still run.
    Full(usize),
    /// The system has no thread for it.
    NoThread(std::io::Error),
}

impl Detached {
    pub fn new(most: usize, time: Duration) -> Self {
        Self { left: Mutex::new(Vec::new()), most, time }
    }

    /// Does the work on a thread of its own and waits for it; `give_up` is asked from time to time. A panic goes on here.
    pub fn run<T: Send + 'static>(
        &self,
        thread: Builder,
        give_up: &dyn Fn() -> bool,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unfinished> {
        const ASK: Duration = Duration::from_millis(20);
        let left = self.num_left();
        if left >= self.most {
            return Err(Unfinished::Full(left));
        }
        let (sender, receiver) = channel();
        let work = move || {
            // Nobody may be left to hear of it.
            let _ = sender.send(catch_unwind(AssertUnwindSafe(work)));
        };
        let start = Instant::now();
        let handle = thread.spawn(work).map_err(Unfinished::NoThread)?;
        let why = loop {
            match receiver.recv_timeout(ASK) {
                Ok(Ok(result)) => return Ok(result),
                Ok(Err(panic)) => resume_unwind(panic),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Unfinished::NoThread(std::io::Error::other("it ended without a result")));
                }
                Err(RecvTimeoutError::Timeout) if give_up() => break Unfinished::GivenUp,
                Err(RecvTimeoutError::Timeout) if start.elapsed() >= self.time => break Unfinished::Late(self.time),
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
        Err(why)
    }

    /// Threads that were left alone and still run.
    pub fn num_left(&self) -> usize {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.retain(|thread| !thread.is_finished());
        left.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_takes_too_long_is_left_alone_and_too_much_of_it_ends_all() {
        let detached = Detached::new(2, Duration::from_millis(60));
        let run =
            |give_up: bool, work: Box<dyn FnOnce() -> u32 + Send>| detached.run(Builder::new(), &|| give_up, work);
        assert!(matches!(run(true, Box::new(|| 7)), Ok(7)), "it was done before anyone asked");
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..2).map(|_| channel::<()>()).unzip();
        let mut receivers = receivers.into_iter();
        let mut endless = |give_up| {
            let receiver = receivers.next().expect("one for each");
            run(give_up, Box::new(move || receiver.recv().map_or(1, |()| 2)))
        };
        assert!(matches!(endless(false), Err(Unfinished::Late(_))));
        assert!(matches!(run(false, Box::new(|| 8)), Ok(8)), "one is left alone, two may be");
        assert!(matches!(endless(true), Err(Unfinished::GivenUp)));
        assert!(matches!(run(false, Box::new(|| 9)), Err(Unfinished::Full(2))));
        drop(senders);
        let deadline = Instant::now() + Duration::from_secs(10);
        while detached.num_left() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(matches!(run(false, Box::new(|| 10)), Ok(10)), "those that were left have ended");
    }

    #[test]
    fn a_panic_reaches_whoever_waits() {
        let detached = Detached::new(1, Duration::from_secs(10));
        let run = || detached.run(Builder::new(), &|| false, || panic!("on purpose"));
        let caught = catch_unwind(AssertUnwindSafe(run)).expect_err("it panicked");
        assert_eq!(caught.downcast_ref::<&str>(), Some(&"on purpose"));
        assert_eq!(detached.num_left(), 0);
    }
}

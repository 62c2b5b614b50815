//! `keye ask --each`: one question about each of many media, a line of JSON for each.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use keye::{EngineError, EventStream, Keye, Request};
use serde_json::Value;

use super::failure::{self, Interrupted, Usage};
use super::generate::{Collector, Finished, submit};
use super::signals::Guard;
use super::ui::{self, Status};

/// How long an event or an interruption may go unseen.
const LOOK: Duration = Duration::from_millis(20);

/// A question for each of `count` media.
pub struct Each<'a> {
    pub count: usize,
    /// How many are asked at the same time.
    pub at_once: usize,
    pub request: &'a dyn Fn(usize) -> Request,
    /// The line of one that was answered, or the error that it ends with instead.
    pub line: &'a dyn Fn(usize, Finished) -> Result<Value>,
    /// The line of one that failed.
    pub failed: &'a dyn Fn(usize, &str) -> Value,
}

/// A request on its way.
struct Asked {
    index: usize,
    stream: EventStream,
    collector: Collector,
}

impl Each<'_> {
    /// Asks all; lines are printed in the order of the media, each as soon as those before it are.
    ///
    /// # Errors
    /// An interruption, wrong usage, which would be the same for all, and some that failed. What was answered is printed before.
    pub fn ask(&self, keye: &Keye, status: &mut Status, guard: &Guard) -> Result<()> {
        let mut lines = Lines { next: 0, early: BTreeMap::new() };
        let mut failures = Failures { count: 0, first: None };
        let result = self.run(keye, status, guard, &mut lines, &mut failures);
        status.clear();
        // Also what stands behind one that was given up.
        lines.rest()?;
        result?;
        failures.result(self.count)
    }

    fn run(
        &self,
        keye: &Keye,
        status: &mut Status,
        guard: &Guard,
        lines: &mut Lines,
        failures: &mut Failures,
    ) -> Result<()> {
        let begin = Instant::now();
        let (mut next, mut done) = (0, 0);
        let mut running: Vec<Asked> = Vec::new();
        // Dropping a stream cancels its request.
        while done < self.count {
            while next < self.count && running.len() < self.at_once {
                let stream = submit(keye, (self.request)(next))?;
                running.push(Asked { index: next, stream, collector: Collector::default() });
                next += 1;
            }
            if guard.interrupted() {
                return Err(Interrupted.into());
            }
            let before = done;
            let mut waiting = Vec::with_capacity(running.len());
            for mut asked in running.drain(..) {
                let index = asked.index;
                let line = match asked.poll() {
                    Ok(None) => {
                        waiting.push(asked);
                        continue;
                    }
                    Ok(Some(finished)) => (self.line)(index, finished),
                    Err(error) => Err(error),
                };
                done += 1;
                let line = match line {
                    Err(error) if is_of_all(&error) => return Err(error),
                    Err(error) => {
                        let line = (self.failed)(index, &failure::message(&error));
                        failures.add(error);
                        line
                    }
                    Ok(line) => line,
                };
                status.clear();
                lines.add(index, line)?;
            }
            running = waiting;
            if done > before {
                let left = begin.elapsed().as_secs_f64() * (self.count - done) as f64 / done as f64;
                status.progress(&format!("{done} of {}{}, {} left", self.count, failures.told(), ui::duration(left)));
            } else {
                thread::sleep(LOOK);
            }
        }
        Ok(())
    }
}

impl Asked {
    /// Takes all events that are there.
    fn poll(&mut self) -> Result<Option<Finished>> {
        // One line tells of all requests.
        let mut silent = Status::new(true);
        while let Ok(event) = self.stream.next_timeout(Duration::ZERO) {
            if let Some(finished) = self.collector.take(event, &mut silent, &mut |_| Ok(()))? {
                return Ok(Some(finished));
            }
        }
        Ok(None)
    }
}

/// Whether the others would fail with it as well: what is asked for is wrong, whatever the medium.
fn is_of_all(error: &anyhow::Error) -> bool {
    let engine = error.downcast_ref::<EngineError>();
    error.is::<Usage>() || matches!(engine, Some(EngineError::Grammar(_) | EngineError::Refused(_)))
}

/// Lines in the order of what was asked.
struct Lines {
    next: usize,
    early: BTreeMap<usize, Value>,
}

impl Lines {
    fn add(&mut self, index: usize, line: Value) -> Result<()> {
        self.early.insert(index, line);
        while let Some(line) = self.early.remove(&self.next) {
            self.next += 1;
            ui::out(&format!("{line}\n"))?;
        }
        Ok(())
    }

    /// Those behind one that was not finished.
    fn rest(self) -> Result<()> {
        self.early.values().try_for_each(|line| ui::out(&format!("{line}\n")))
    }
}

struct Failures {
    count: usize,
    /// Tells the exit code.
    first: Option<anyhow::Error>,
}

impl Failures {
    fn add(&mut self, error: anyhow::Error) {
        self.count += 1;
        self.first.get_or_insert(error);
    }

    fn told(&self) -> String {
        if self.count == 0 { String::new() } else { format!(" ({} failed)", self.count) }
    }

    fn result(self, of: usize) -> Result<()> {
        match self.first {
            None => Ok(()),
            Some(first) => Err(first.context(format!("{} of {of} failed, as their lines say; the first", self.count))),
        }
    }
}

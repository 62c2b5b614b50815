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
    /// The question about one, or why it cannot be asked.
    pub request: &'a dyn Fn(usize) -> Result<Request>,
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
        let mut refused = Vec::new();
        status.progress(&format!("0 of {}", self.count));
        // Dropping a stream cancels its request.
        while done < self.count {
            while next < self.count && running.len() < self.at_once {
                match (self.request)(next) {
                    Ok(request) => {
                        let stream = submit(keye, request)?;
                        running.push(Asked { index: next, stream, collector: Collector::default() });
                    }
                    Err(error) => refused.push((next, error)),
                }
                next += 1;
            }
            if guard.interrupted() {
                return Err(Interrupted.into());
            }
            let before = done;
            let mut ended: Vec<(usize, Result<Value>)> = refused.drain(..).map(|(i, error)| (i, Err(error))).collect();
            let mut waiting = Vec::with_capacity(running.len());
            for mut asked in running.drain(..) {
                match asked.poll() {
                    Ok(None) => waiting.push(asked),
                    Ok(Some(finished)) => ended.push((asked.index, (self.line)(asked.index, finished))),
                    Err(error) if is_of_all(&error) => return Err(error),
                    Err(error) => ended.push((asked.index, Err(error))),
                }
            }
            for (index, line) in ended {
                done += 1;
                let line = line.unwrap_or_else(|error| {
                    let line = (self.failed)(index, &failure::message(&error));
                    failures.add(index, error);
                    line
                });
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
    /// Tells the exit code: that of the first medium that failed, whichever ended first.
    first: Option<(usize, anyhow::Error)>,
}

impl Failures {
    fn add(&mut self, index: usize, error: anyhow::Error) {
        self.count += 1;
        if self.first.as_ref().is_none_or(|(first, _)| index < *first) {
            self.first = Some((index, error));
        }
    }

    fn told(&self) -> String {
        if self.count == 0 { String::new() } else { format!(" ({} failed)", self.count) }
    }

    fn result(self, of: usize) -> Result<()> {
        match self.first {
            None => Ok(()),
            Some((_, first)) => {
                Err(first.context(format!("{} of {of} failed, as their lines say; the first", self.count)))
            }
        }
    }
}

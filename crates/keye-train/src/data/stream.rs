//! Packs prepared ahead.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use keye_processor::Processor;
use serde_json::Value;

use super::config::DataConfig;
use super::packer::{Packer, State};
use crate::{Pack, PackSource, TrainError};

/// Packs of a [`DataConfig`], made on threads of their own, a few ahead.
pub struct Stream {
    config: DataConfig,
    processor: Arc<Processor>,
    /// After the last pack handed out.
    state: State,
    worker: Option<Worker>,
    /// Hears why samples are left out.
    told: Box<dyn FnMut(&str)>,
}

/// A pack with the state after it, and why samples before it were left out.
type Made = (Result<(Pack, State), TrainError>, Vec<String>);

/// Half of the machine's: where the CPU trains as well, it has the other half to itself.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() / 2).max(1)
}

struct Worker {
    packs: Receiver<Made>,
    thread: JoinHandle<()>,
}

impl Stream {
    /// Starts at the first sample of every source.
    ///
    /// # Errors
    /// A config that contradicts itself; files that cannot be read.
    pub fn new(config: DataConfig, processor: Arc<Processor>) -> Result<Self, TrainError> {
        let packer = Packer::new(config.clone(), Arc::clone(&processor), threads())?;
        let state = packer.state.clone();
        let worker = Some(Worker::start(packer, config.ahead)?);
        Ok(Self { config, processor, state, worker, told: Box::new(|_| ()) })
    }

    /// Tells of samples that are left out for the sides of their pictures.
    pub fn telling(mut self, told: impl FnMut(&str) + 'static) -> Self {
        self.told = Box::new(told);
        self
    }

    fn stop(&mut self) {
        if let Some(Worker { packs, thread }) = self.worker.take() {
            // A worker that waits for room ends when nobody can receive any more.
            drop(packs);
            let _ = thread.join();
        }
    }
}

impl Worker {
    fn start(mut packer: Packer, ahead: usize) -> Result<Self, TrainError> {
        let (send, packs) = sync_channel(ahead);
        let work = move || {
            loop {
                let made = packer.next_pack().map(|pack| (pack, packer.state.clone()));
                let failed = made.is_err();
                if send.send((made, std::mem::take(&mut packer.no_size))).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("data".into()).spawn(work);
        let thread = thread.map_err(|error| TrainError::Data(format!("no thread for reading data: {error}")))?;
        Ok(Self { packs, thread })
    }
}

impl PackSource for Stream {
    fn next_pack(&mut self) -> Result<Pack, TrainError> {
        let ended = || TrainError::Data("reading has ended after an error".into());
        let worker = self.worker.as_ref().ok_or_else(ended)?;
        let (made, left_out) = worker.packs.recv().map_err(|_| ended())?;
        left_out.iter().for_each(|reason| (self.told)(reason));
        let (pack, state) = made?;
        self.state = state;
        Ok(pack)
    }

    fn state(&self) -> Value {
        serde_json::to_value(&self.state).unwrap_or_default()
    }

    fn restore(&mut self, state: &Value) -> Result<(), TrainError> {
        let wrong = |error| TrainError::Data(format!("the state of the data cannot be read: {error}"));
        let state: State = serde_json::from_value(state.clone()).map_err(wrong)?;
        let mut packer = Packer::new(self.config.clone(), Arc::clone(&self.processor), threads())?;
        packer.restore(state.clone())?;
        self.stop();
        self.worker = Some(Worker::start(packer, self.config.ahead)?);
        self.state = state;
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop();
    }
}

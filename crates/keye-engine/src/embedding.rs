//! A prompt as one vector.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::{Canceller, EngineError, Event, EventStream, NothingYet, Pooling, Stage, Usage};

/// A prompt's vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// Hidden states after the decoder's last norm, pooled, then scaled to length 1.
    pub values: Vec<f32>,
    /// Counts; nothing is generated.
    pub usage: Usage,
    /// What [`Stage::MediaReady`] has to say, by medium.
    pub warnings: Vec<(usize, String)>,
}

/// An embedding that is being made. Dropping it cancels the request.
pub struct EmbeddingStream {
    stream: EventStream,
    values: Arc<Mutex<Vec<f32>>>,
    warnings: Vec<(usize, String)>,
}

impl EmbeddingStream {
    pub(crate) fn new(stream: EventStream, values: Arc<Mutex<Vec<f32>>>) -> Self {
        Self { stream, values, warnings: Vec::new() }
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Those of a request.
    pub fn wait(mut self) -> Result<Embedding, EngineError> {
        loop {
            if let Ok(end) = self.wait_timeout(Duration::from_secs(3600)) {
                return end;
            }
        }
    }

    /// Waits for the end for at most `timeout`.
    ///
    /// # Errors
    /// [`NothingYet`] when it has not come; inside, those of a request.
    pub fn wait_timeout(&mut self, timeout: Duration) -> Result<Result<Embedding, EngineError>, NothingYet> {
        loop {
            match self.stream.next_timeout(timeout)? {
                Some(Event::Finished { usage, .. }) => {
                    let values = std::mem::take(&mut *self.values.lock().unwrap_or_else(PoisonError::into_inner));
                    return Ok(Ok(Embedding { values, usage, warnings: std::mem::take(&mut self.warnings) }));
                }
                Some(Event::Failed(error)) => return Ok(Err(error)),
                Some(Event::Stage(Stage::MediaReady { index, warnings, .. })) => {
                    self.warnings.extend(warnings.iter().map(|warning| (index, warning.clone())));
                }
                Some(Event::Stage(_) | Event::Thinking(_) | Event::Token { .. }) => {}
                None => return Ok(Err(EngineError::Stopped)),
            }
        }
    }

    /// A handle that cancels this request.
    pub fn canceller(&self) -> Canceller {
        self.stream.canceller()
    }
}

/// Pools the hidden states of a prompt's tokens as its chunks are computed.
#[derive(Debug)]
pub(crate) struct Pool {
    pub pooling: Pooling,
    /// The sum so far.
    sum: Vec<f64>,
    /// Rows in it.
    rows: usize,
    /// Where the result goes.
    pub values: Arc<Mutex<Vec<f32>>>,
}

impl Pool {
    pub fn new(pooling: Pooling, values: Arc<Mutex<Vec<f32>>>) -> Self {
        Self { pooling, sum: Vec::new(), rows: 0, values }
    }

    /// Takes the rows of a step after which `computed` of `total` tokens are done.
    pub fn add(&mut self, hidden: &[f32], computed: usize, total: usize) {
        let rows = match self.pooling {
            Pooling::Last if computed < total => return,
            Pooling::Last => 1,
            Pooling::Mean => computed - self.rows.min(computed),
        };
        self.rows += rows;
        let width = hidden.len() / rows.max(1);
        self.sum.resize(width, 0.0);
        for row in hidden.chunks_exact(width.max(1)) {
            self.sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
        }
    }

    /// Begins again.
    pub fn clear(&mut self) {
        self.rows = 0;
        self.sum.clear();
    }

    /// Hands the result over, scaled to length 1: so a mean needs no division.
    pub fn finish(&self) {
        let length = self.sum.iter().map(|value| value * value).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        let values = self.sum.iter().map(|value| (value / length) as f32).collect();
        *self.values.lock().unwrap_or_else(PoisonError::into_inner) = values;
    }
}

//! The engine's handle and its threads: some prepare requests, one runs the model.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use keye_media::Loader;
use keye_model::{Runner, RunnerInfo};
use keye_processor::Processor;

use crate::embedding::Pool;
use crate::event::{EventSender, event_channel};
use crate::prepare::Preparer;
use crate::queue::Queue;
use crate::sequence::{Clock, Place, PreparedRequest};
use crate::worker::Worker;
use crate::{EmbeddingStream, EngineError, EventStream, MAX_LOGPROBS, Pooling, Request, Stage};

/// Threads that wait for grammars to be compiled: one that takes long does not hold up the others.
const GRAMMAR_THREADS: usize = 2;

/// Limits of an engine.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineOptions {
    /// Longest sequence, prompt and answer together; at most the model's and what the pool of blocks holds.
    pub max_model_len: Option<usize>,
    /// Most tokens in one step: prompts longer than this are cut into chunks.
    pub max_batch_tokens: usize,
    /// Sequences that share steps; as many with media may run, those included whose media are being encoded, which take no
    /// place in the steps. With 1 a request gets the whole machine and the next one waits.
    pub max_running: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Bytes of media features kept for later requests.
    pub feature_cache_bytes: usize,
    /// Bytes of decoded media kept for later requests, such as the next turn of a chat.
    pub media_cache_bytes: usize,
    /// Threads that fetch and decode media, each for one request. Text alone never waits for them.
    pub media_threads: usize,
    /// Tokens that may be guessed ahead by prompt look-up and checked in one step; 0 is off. Changes no answer.
    pub speculation: usize,
    /// While something generates, prompts and media get this many times a decode step's time between two steps: a
    /// running stream's gaps are then at most about `1 + prefill_share` steps. Never less than one piece of work.
    pub prefill_share: f64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_model_len: None,
            max_batch_tokens: 512,
            max_running: 1,
            max_queue: 64,
            feature_cache_bytes: 512 << 20,
            media_cache_bytes: 256 << 20,
            media_threads: 2,
            speculation: 0,
            prefill_share: 2.0,
        }
    }
}

/// What an engine is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct EngineStats {
    /// Requests that wait or are being prepared.
    pub waiting: usize,
    /// Sequences that generate, whose prompt is being processed or whose media are being encoded.
    pub running: usize,
    /// Blocks of the KV cache that no sequence uses.
    pub free_blocks: usize,
    /// Blocks in all.
    pub num_blocks: usize,
    /// Bytes of media features held.
    pub feature_bytes: usize,
    /// Tokens generated since the start.
    pub generated_tokens: u64,
    /// Prompt tokens found in the KV cache, and those that had to be computed.
    pub prefix_hits: u64,
    /// See [`EngineStats::prefix_hits`].
    pub prefix_misses: u64,
    /// Media whose features were there, and those that had to be encoded.
    pub feature_hits: u64,
    /// See [`EngineStats::feature_hits`].
    pub feature_misses: u64,
    /// Media that were still decoded from before, and those that had to be decoded.
    pub media_hits: u64,
    /// See [`EngineStats::media_hits`].
    pub media_misses: u64,
    /// Times that a sequence gave its blocks back to be computed again.
    pub preemptions: u64,
    /// Tokens guessed ahead.
    pub speculation_proposed: u64,
    /// Of them those that were right.
    pub speculation_accepted: u64,
}

/// A handle to the engine; clones are the same engine. When the last one is dropped the engine stops: requests that are
/// not finished end with [`EngineError::Stopped`], and the drop returns when the threads are gone.
#[derive(Clone)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    info: RunnerInfo,
    max_queue: usize,
    threads: Vec<JoinHandle<()>>,
}

/// A request that nothing was done for yet.
pub(crate) struct Submission {
    /// Number of its arrival.
    pub order: u64,
    pub request: Request,
    /// One for every answer wanted.
    pub branches: Vec<Branch>,
    pub clock: Clock,
    pub pool: Option<Pool>,
}

/// One of the answers to a request.
pub(crate) struct Branch {
    pub seed: u64,
    pub events: EventSender,
    pub place: Place,
}

/// What the handle and the threads share.
pub(crate) struct Shared {
    /// Plain text, text with a grammar to compile, and requests with media: none waits behind the slower ones.
    pub submissions: [Queue<Submission>; 3],
    pub prepared: Queue<PreparedRequest>,
    pub max_model_len: usize,
    pub stopping: AtomicBool,
    places: Arc<AtomicUsize>,
    arrivals: AtomicU64,
    stats: Mutex<EngineStats>,
}

impl Shared {
    pub fn new(info: &RunnerInfo, options: &EngineOptions) -> Self {
        let longest = info.max_positions.min(info.num_blocks.saturating_mul(info.block_tokens));
        Self {
            submissions: [Queue::new(), Queue::new(), Queue::new()],
            prepared: Queue::new(),
            max_model_len: options.max_model_len.map_or(longest, |wanted| wanted.min(longest)),
            stopping: AtomicBool::new(false),
            places: Arc::new(AtomicUsize::new(0)),
            arrivals: AtomicU64::new(0),
            stats: Mutex::new(EngineStats::default()),
        }
    }

    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Ends all threads; what is queued is dropped and so ends with [`EngineError::Stopped`].
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for submissions in &self.submissions {
            submissions.close();
            submissions.retain(|_| false);
        }
        self.prepared.close();
        self.prepared.retain(|_| false);
    }

    /// The reason to give for `error`: work that was given up fails in all kinds of ways.
    pub fn why(&self, events: &EventSender, error: EngineError) -> EngineError {
        if events.cancelled() {
            EngineError::Cancelled
        } else if self.stopping() {
            EngineError::Stopped
        } else {
            error
        }
    }

    pub fn stats(&self) -> MutexGuard<'_, EngineStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn count_token(&self) {
        self.stats().generated_tokens += 1;
    }
}

impl Engine {
    /// Starts the engine's threads.
    pub fn new(runner: Box<dyn Runner>, processor: Arc<Processor>, loader: Loader, options: EngineOptions) -> Self {
        let info = runner.info().clone();
        let shared = Arc::new(Shared::new(&info, &options));
        let worker = Worker::new(runner, Arc::clone(&shared), &options);
        let preparer = Arc::new(Preparer::new(processor, loader, Arc::clone(&shared), options.media_cache_bytes));
        let mut threads = vec![spawn("keye-engine", move || worker.run())];
        for (queue, count) in [(0, 1), (1, GRAMMAR_THREADS), (2, options.media_threads.max(1))] {
            for _ in 0..count {
                let (preparer, shared) = (Arc::clone(&preparer), Arc::clone(&shared));
                threads.push(spawn("keye-prepare", move || preparer.run(&shared.submissions[queue])));
            }
        }
        Self { inner: Arc::new(Inner { shared, info, max_queue: options.max_queue, threads }) }
    }

    /// Queues a request. Errors that need no work (wrong parameters, no room in the queue) are returned, all others are
    /// streamed.
    pub fn submit(&self, request: Request) -> Result<EventStream, EngineError> {
        let seed = request.sampling.seed;
        self.queue(request, &[seed], None)?.pop().ok_or(EngineError::Stopped)
    }

    /// Queues a request once for every seed; the streams come in the seeds' order. Its media are loaded once and its prompt
    /// is computed once, the blocks of which are shared.
    ///
    /// # Errors
    /// Those of [`Engine::submit`]; [`EngineError::QueueFull`] when there is not room for all, and then none is queued.
    pub fn submit_many(&self, request: Request, seeds: &[u64]) -> Result<Vec<EventStream>, EngineError> {
        self.queue(request, seeds, None)
    }

    /// Queues a prompt to be made one vector; nothing is generated.
    ///
    /// # Errors
    /// Those of [`Engine::submit`].
    pub fn embed(&self, request: Request, pooling: Pooling) -> Result<EmbeddingStream, EngineError> {
        let values = Arc::new(Mutex::new(Vec::new()));
        let pool = Pool::new(pooling, Arc::clone(&values));
        let stream = self.queue(request, &[0], Some(pool))?.pop().ok_or(EngineError::Stopped)?;
        Ok(EmbeddingStream::new(stream, values))
    }

    fn queue(&self, request: Request, seeds: &[u64], pool: Option<Pool>) -> Result<Vec<EventStream>, EngineError> {
        let shared = &self.inner.shared;
        request.sampling.validate().map_err(EngineError::Refused)?;
        if request.logprobs.is_some_and(|k| k > MAX_LOGPROBS) {
            return Err(EngineError::Refused(format!("logprobs of at most {MAX_LOGPROBS} tokens can be given")));
        }
        let max_queue = self.inner.max_queue;
        let take = || Place::take_many(&shared.places, seeds.len(), max_queue);
        let places = take().or_else(|| {
            // Requests that were given up while they waited may still be in the queue.
            for submissions in &shared.submissions {
                submissions.retain(|submission| {
                    submission.branches.retain(|branch| !branch.events.cancelled());
                    !submission.branches.is_empty()
                });
            }
            shared.prepared.retain(|prepared| !prepared.cancelled());
            take()
        });
        let places = places.ok_or(EngineError::QueueFull(max_queue))?;
        let (mut branches, mut streams) = (Vec::new(), Vec::new());
        for (seed, place) in seeds.iter().copied().zip(places) {
            let (events, stream) = event_channel();
            events.stage(Stage::Queued);
            branches.push(Branch { seed, events, place });
            streams.push(stream);
        }
        let queue = match (request.conversation.media().is_empty(), &request.grammar) {
            (true, None) => 0,
            (true, Some(_)) => 1,
            (false, _) => 2,
        };
        let queue = &shared.submissions[queue];
        let order = shared.arrivals.fetch_add(1, Ordering::Relaxed);
        let submission = Submission { order, request, branches, clock: Clock::start(), pool };
        queue.push(submission).map_err(|_| EngineError::Stopped)?;
        Ok(streams)
    }

    /// Sizes of the model.
    pub fn info(&self) -> &RunnerInfo {
        &self.inner.info
    }

    /// Longest sequence, prompt and answer together.
    pub fn max_model_len(&self) -> usize {
        self.inner.shared.max_model_len
    }

    /// What it is doing now.
    pub fn stats(&self) -> EngineStats {
        EngineStats { waiting: self.inner.shared.places.load(Ordering::Acquire), ..*self.inner.shared.stats() }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            // A panic has been told where it happened.
            let _ = thread.join();
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    std::thread::Builder::new().name(name.into()).spawn(work).expect("the system can start a thread")
}

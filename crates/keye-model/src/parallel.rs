//! A model whose decoder is divided among several devices: a [`Runner`] that fans out.
//!
//! Rank 0 is a [`KeyeModel`] on the thread of whoever calls; every other rank is a thread with a device, its part of the
//! decoder's weights and its part of the cache. In a step rank 0 embeds the tokens and puts the media's features in their
//! places, the rows go to all ranks ([`Collective::broadcast`]), every layer sums twice ([`Collective::all_reduce_sum`]),
//! and rank 0 gathers the logits, a part of the vocabulary from each. So features, tokens and what a tap watches are only
//! rank 0's business.
//!
//! Tower and projector are not divided: rank 0 runs them, on the CPU with the threads of all ranks, since the others wait.
//! Their features have the same bits as without ranks; nothing of theirs is stored twice or has to fit the heads of a
//! smaller model.
//!
//! An error or a panic of any rank ends the step on all of them and is the step's error; the next step begins anew.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use keye_backend::{BLOCK_TOKENS, Backend, BackendError, Collective};
use keye_media::{MediaKind, Patches, ProcessorConfig};
use keye_processor::{Checkpoint, ModelConfig};

use crate::decoder::Decoder;
use crate::model::rows_of;
use crate::panic::panicked;
use crate::ranks::{Peers, cache_spec, check};
use crate::step::Rows;
use crate::weights::Weights;
use crate::{
    Batch, Cost, EncodeProgress, FeatureId, KeyeModel, LoadOptions, ModelError, Outputs, Runner, RunnerInfo, Tap,
};

/// A device and its place among the others.
pub struct RankDevice<B: Backend> {
    /// The device.
    pub backend: B,
    /// Where it meets the others.
    pub collective: Arc<dyn Collective<B>>,
}

/// A loaded model on several devices.
pub struct ParallelModel<B: Backend> {
    leader: KeyeModel<B>,
    collective: Arc<dyn Collective<B>>,
    workers: Vec<Worker>,
    layers: usize,
}

/// A rank other than the first, on a thread of its own.
struct Worker {
    /// `None` when the thread is to end.
    steps: Option<Sender<Arc<Step>>>,
    results: Receiver<Result<(), ModelError>>,
    thread: Option<JoinHandle<()>>,
}

/// What every rank is told of a step.
struct Step {
    rows: Rows,
    /// Tensors that rank 0's tap wants and that take a sum over the ranks.
    watched: BTreeSet<String>,
}

/// Takes part in the sums that rank 0's tap wants.
struct Watched<'a>(&'a BTreeSet<String>);

impl Tap for Watched<'_> {
    fn wants(&self, name: &str) -> bool {
        self.0.contains(name)
    }
    fn record(&mut self, _name: &str, _cols: usize, _rows: &[f32]) {}
}

/// A rank's part of the model.
struct Part<B: Backend> {
    backend: B,
    collective: Arc<dyn Collective<B>>,
    decoder: Decoder<B>,
    cache: B::Cache,
}

impl<B: Backend> Part<B> {
    fn load(
        RankDevice { backend, collective }: RankDevice<B>,
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        options: LoadOptions,
    ) -> Result<Self, ModelError> {
        let peers = Peers(Some(Arc::clone(&collective)));
        let shard = peers.shard();
        let weights = Weights::new(checkpoint, &backend, config.fp8_block, shard);
        let decoder = Decoder::load(&weights, &config.text, peers)?;
        let spec = cache_spec(&config.text, options.kv_dtype, shard.ranks);
        let cache = backend.cache(&spec, options.cache_tokens.div_ceil(BLOCK_TOKENS))?;
        Ok(Self { backend, collective, decoder, cache })
    }

    fn step(&mut self, Step { rows, watched }: &Step) -> Result<(), ModelError> {
        let Self { backend, decoder, cache, .. } = self;
        let x = decoder.forward(backend, None, rows, cache, &mut Watched(watched))?;
        if !rows.wanted.is_empty() {
            decoder.logits(backend, &x, rows)?;
        }
        Ok(())
    }

    /// Runs steps until there will be none.
    fn work(mut self, steps: Receiver<Arc<Step>>, results: Sender<Result<(), ModelError>>) {
        for step in steps {
            let collective = Arc::clone(&self.collective);
            let result = guarded(&*collective, || self.step(&step)).unwrap_or_else(|panic| {
                let (rank, ranks) = (collective.rank(), collective.ranks());
                Err(BackendError::Rank { rank, ranks, reason: panicked(&*panic) }.into())
            });
            if results.send(result).is_err() {
                return;
            }
        }
    }
}

/// Runs a rank's part of a step; when it fails or panics the others do not wait for it.
fn guarded<B: Backend, T>(
    collective: &dyn Collective<B>,
    work: impl FnOnce() -> Result<T, ModelError>,
) -> std::thread::Result<Result<T, ModelError>> {
    // What a panic leaves half done is a part of the cache that nobody reads before it is written again.
    let result = catch_unwind(AssertUnwindSafe(work));
    match &result {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => collective.abort(&error.to_string()),
        Err(panic) => collective.abort(&panicked(&**panic)),
    }
    result
}

impl<B: Backend> ParallelModel<B> {
    /// As [`KeyeModel::load`], on all of `ranks`, in their order. `encoder` runs tower and projector in the place of the first
    /// rank's backend, whose device it shares; it may be a CPU backend with more threads.
    ///
    /// # Errors
    ///
    /// What does not divide among so many ranks; what a rank's loading says.
    pub fn load(
        ranks: Vec<RankDevice<B>>,
        encoder: Option<B>,
        config: &ModelConfig,
        processor: &ProcessorConfig,
        checkpoint: &Checkpoint,
        options: LoadOptions,
    ) -> Result<Self, ModelError> {
        check(&config.text, ranks.len())?;
        let in_order = |(number, rank): (usize, &RankDevice<B>)| {
            (rank.collective.rank(), rank.collective.ranks()) == (number, ranks.len())
        };
        let mut devices = match ranks.iter().enumerate().all(in_order) {
            true => ranks.into_iter(),
            false => return Err(ModelError::Ranks("ranks of one group, all and in order, are expected".into())),
        };
        let Some(first) = devices.next() else { return Err(ModelError::Ranks("no ranks".into())) };
        let collective = Arc::clone(&first.collective);
        let (leader, parts) = std::thread::scope(|scope| {
            // Each part is copied by a thread of its own.
            let load = |device| scope.spawn(move || Part::load(device, config, checkpoint, options));
            let loading: Vec<_> = devices.map(load).collect();
            let peers = Peers(Some(Arc::clone(&collective)));
            let leader = KeyeModel::load_rank(first.backend, encoder, peers, config, processor, checkpoint, options);
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Part<B>, ModelError>>| {
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            let parts: Vec<_> = loading.into_iter().map(join).collect();
            (leader, parts)
        });
        let leader = leader?;
        let workers = parts.into_iter().map(|part| Worker::start(part?)).collect::<Result<_, _>>()?;
        Ok(Self { leader, collective, workers, layers: config.text.num_hidden_layers })
    }
}

impl Worker {
    fn start<B: Backend>(part: Part<B>) -> Result<Self, ModelError> {
        let rank = part.collective.rank();
        let ((steps, todo), (done, results)) = (channel(), channel());
        let thread = std::thread::Builder::new().name(format!("rank-{rank}")).spawn(move || part.work(todo, done));
        let thread =
            thread.map_err(|error| ModelError::Ranks(format!("cannot start a thread for rank {rank}: {error}")))?;
        Ok(Self { steps: Some(steps), results, thread: Some(thread) })
    }

    /// False when the thread has ended.
    fn send(&self, step: &Arc<Step>) -> bool {
        self.steps.as_ref().is_some_and(|steps| steps.send(Arc::clone(step)).is_ok())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.steps = None;
        if let Some(thread) = self.thread.take() {
            // It catches its panics.
            let _ = thread.join();
        }
    }
}

impl<B: Backend> Runner for ParallelModel<B> {
    fn info(&self) -> &RunnerInfo {
        self.leader.info()
    }

    fn begin_encode(&mut self, kind: MediaKind, patches: &Patches) -> Result<FeatureId, ModelError> {
        self.leader.begin_encode(kind, patches)
    }

    fn encode_step(
        &mut self,
        feature: FeatureId,
        patches: &Patches,
        flops: f64,
        tap: &mut dyn Tap,
    ) -> Result<EncodeProgress, ModelError> {
        self.leader.encode_step(feature, patches, flops, tap)
    }

    fn feature_rows(&self, feature: FeatureId) -> usize {
        self.leader.feature_rows(feature)
    }

    fn release(&mut self, feature: FeatureId) {
        self.leader.release(feature);
    }

    fn step(&mut self, batch: &Batch, tap: &mut dyn Tap) -> Result<Outputs, ModelError> {
        self.leader.check(batch)?;
        if batch.chunks.is_empty() {
            return Ok(Outputs::default());
        }
        let names = |layer| [format!("attn_out.{layer}"), format!("moe_out.{layer}")];
        let watched = (0..self.layers).flat_map(names).filter(|name| tap.wants(name)).collect();
        let step = Arc::new(Step { rows: rows_of(batch), watched });
        let told: Vec<&Worker> = self.workers.iter().filter(|worker| worker.send(&step)).collect();
        let result = guarded(&*self.collective, || match told.len() == self.workers.len() {
            true => self.leader.step(batch, tap),
            false => Err(ModelError::Ranks("a rank's thread has ended; load the model again".into())),
        });
        let mut failed = None;
        for worker in told {
            let ended = || Err(ModelError::Ranks("a rank's thread has ended; load the model again".into()));
            if let Err(error) = worker.results.recv().unwrap_or_else(|_| ended()) {
                failed.get_or_insert(error);
            }
        }
        self.collective.recover();
        match (result, failed) {
            (Err(panic), _) => resume_unwind(panic),
            (Ok(Ok(_)), Some(error)) => Err(error),
            (Ok(result), _) => result,
        }
    }

    fn synchronize(&mut self) -> Result<(), ModelError> {
        self.leader.synchronize()
    }

    fn cost(&self, kind: MediaKind, grid_thw: &[[u32; 3]], tokens: usize) -> Cost {
        self.leader.cost(kind, grid_thw, tokens)
    }

    fn flops_per_second(&mut self) -> f64 {
        self.leader.flops_per_second()
    }
}

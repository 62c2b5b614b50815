//! A model on several ranks: the golden data, bits that depend on nothing but the number of ranks, and ranks that fail.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use keye_backend::{Backend, BackendError, Collective, Cpu, CpuOptions, KvDtype, Reference, SharedMemory};
use keye_model::{Batch, Chunk, LoadOptions, LogitRows, ModelError, NoTap, ParallelModel, RankDevice, Runner};
use keye_processor::{Checkpoint, ModelConfig};

use crate::invariance::bits;
use crate::support::fixture;
use crate::{cases, invariance, keye_2};

fn cpu(threads: usize) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(threads), isa: None }).unwrap()
}

/// The model of `dir` on devices that `make` makes.
pub fn load<B: Backend>(
    dir: &Path,
    config: &ModelConfig,
    ranks: usize,
    make: impl Fn() -> B,
) -> Result<ParallelModel<B>, ModelError>
where
    SharedMemory: Collective<B>,
{
    let group = SharedMemory::group(ranks).into_iter();
    let devices = group.map(|member| RankDevice { backend: make(), collective: Arc::new(member) }).collect();
    load_devices(dir, config, devices)
}

fn load_devices<B: Backend>(
    dir: &Path,
    config: &ModelConfig,
    devices: Vec<RankDevice<B>>,
) -> Result<ParallelModel<B>, ModelError> {
    let options = LoadOptions { cache_tokens: 2048, kv_dtype: KvDtype::F32 };
    let checkpoint = Checkpoint::open(dir).unwrap();
    ParallelModel::load(devices, None, config, &config.facts().media.processor, &checkpoint, options)
}

fn load_fixture(name: &str, ranks: usize, threads: usize) -> ParallelModel<Cpu> {
    let dir = fixture(name).join("model");
    load(&dir, &ModelConfig::load(&dir).unwrap(), ranks, || cpu(threads)).unwrap()
}

/// Two key/value heads: of four ranks two share one.
#[test]
fn ranks_reproduce_every_case() {
    for ranks in [2, 4] {
        cases::check_loaded(&format!("{ranks} ranks"), |fixture| Box::new(load_fixture(fixture, ranks, 1)));
    }
}

#[test]
fn ranks_reproduce_the_second_generation() {
    let dir = fixture("keye-2-tiny").join("model");
    let config = |sparse: bool| {
        let mut config = ModelConfig::load(&dir).unwrap();
        config.text.indexer = config.text.indexer.filter(|_| sparse);
        config
    };
    for ranks in [2, 4] {
        keye_2::check_loaded(|sparse| Box::new(load(&dir, &config(sparse), ranks, || cpu(1)).unwrap()));
    }
    keye_2::check_loaded(|sparse| Box::new(load(&dir, &config(sparse), 2, || Reference).unwrap()));
}

/// Bit for bit in any chunks and company, on any number of threads, whenever it runs.
#[test]
fn bits_depend_on_the_number_of_ranks_alone() {
    let logits = |threads| {
        let dense = invariance::check_chunks(&mut load_fixture("keye-1_5-tiny", 2, threads));
        (dense, bits(&keye_2::check_chunks(&mut load_fixture("keye-2-tiny", 2, threads))))
    };
    let first = logits(1);
    assert!(first == logits(1) && first == logits(3));
}

#[test]
fn a_model_that_does_not_divide_is_refused_with_figures() {
    let dir = fixture("keye-2-tiny").join("model");
    let config = ModelConfig::load(&dir).unwrap();
    let error = load(&dir, &config, 3, || Reference).err().unwrap().to_string();
    assert_eq!(error, "4 query heads do not divide among 3 ranks (--tp); this model takes 1, 2, 4");
}

/// What goes wrong on a rank.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Error,
    Panic,
}

/// A rank that has a fault in one of its sums.
struct Faulty {
    inner: SharedMemory,
    fault: Fault,
    /// Sums until then.
    left: Arc<AtomicUsize>,
}

impl Collective<Cpu> for Faulty {
    fn rank(&self) -> usize {
        Collective::<Cpu>::rank(&self.inner)
    }
    fn ranks(&self) -> usize {
        Collective::<Cpu>::ranks(&self.inner)
    }
    fn all_reduce_sum(&self, backend: &Cpu, x: &mut <Cpu as Backend>::Tensor) -> Result<(), BackendError> {
        match (self.left.fetch_sub(1, SeqCst), self.fault) {
            (0, Fault::Error) => Err(BackendError::Setting("the device is gone".into())),
            (0, Fault::Panic) => panic!("the device is gone"),
            _ => self.inner.all_reduce_sum(backend, x),
        }
    }
    fn gather_columns(
        &self,
        backend: &Cpu,
        x: <Cpu as Backend>::Tensor,
    ) -> Result<Option<<Cpu as Backend>::Tensor>, BackendError> {
        self.inner.gather_columns(backend, x)
    }
    fn broadcast(
        &self,
        backend: &Cpu,
        x: Option<<Cpu as Backend>::Tensor>,
    ) -> Result<<Cpu as Backend>::Tensor, BackendError> {
        self.inner.broadcast(backend, x)
    }
    fn abort(&self, reason: &str) {
        Collective::<Cpu>::abort(&self.inner, reason);
    }
    fn recover(&self) {
        Collective::<Cpu>::recover(&self.inner);
    }
}

#[test]
fn a_rank_that_fails_ends_the_step_and_the_next_begins_anew() {
    const NEVER: usize = usize::MAX / 2;
    let dir = fixture("keye-1_5-tiny").join("model");
    let config = ModelConfig::load(&dir).unwrap();
    let chunk = Chunk {
        tokens: (5..45).collect(),
        start: 0,
        positions: (0..40).map(|i| [i; 3]).collect(),
        features: vec![],
        block_table: vec![1],
        logits: LogitRows::Last,
    };
    let batch = Batch { chunks: vec![chunk] };
    for (rank, fault) in [(1, Fault::Error), (1, Fault::Panic), (0, Fault::Error), (0, Fault::Panic)] {
        let left = Arc::new(AtomicUsize::new(NEVER));
        let member = |inner: SharedMemory| -> Arc<dyn Collective<Cpu>> {
            match Collective::<Cpu>::rank(&inner) == rank {
                true => Arc::new(Faulty { inner, fault, left: Arc::clone(&left) }),
                false => Arc::new(inner),
            }
        };
        let group = SharedMemory::group(2).into_iter();
        let devices = group.map(|inner| RankDevice { backend: cpu(1), collective: member(inner) }).collect();
        let mut model = load_devices(&dir, &config, devices).unwrap();
        let good = model.step(&batch, &mut NoTap).unwrap();
        // In the first layer, in the middle, and in the last of two sums a layer.
        for at in [0, 3, 2 * config.text.num_hidden_layers - 1] {
            left.store(at, SeqCst);
            let step = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| model.step(&batch, &mut NoTap)));
            match (rank, fault, step) {
                (0, Fault::Panic, Err(panic)) => assert_eq!(panic.downcast_ref(), Some(&"the device is gone")),
                (0, Fault::Error, Ok(Err(error))) => assert_eq!(error.to_string(), "the device is gone"),
                (1, Fault::Panic, Ok(Err(error))) => {
                    assert_eq!(error.to_string(), "rank 1 of 2: panicked: the device is gone");
                }
                (1, Fault::Error, Ok(Err(error))) => assert_eq!(error.to_string(), "rank 1 of 2: the device is gone"),
                (_, _, step) => panic!("rank {rank}: {step:?}"),
            }
            left.store(NEVER, SeqCst);
            assert_eq!(model.step(&batch, &mut NoTap).unwrap(), good);
        }
    }
}

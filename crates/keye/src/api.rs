//! A checkpoint, ready to be asked.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use keye_backend::{BackendError, KvDtype};
use keye_engine::{
    Canceller, Engine, EngineError, EngineOptions, Event, EventStream, NothingYet, Request, SamplingParams,
};
use keye_media::{Access, Loader, MediaItem, TimestampRule};
use keye_model::ModelError;
use keye_processor::{
    AttentionKind, Checkpoint, CheckpointFiles, Conversation, GenerationConfig, IndexScorer, Overrides, Processor,
    ProcessorError,
};

use crate::device::{CacheSize, DeviceOptions};
use crate::media_argument::{ArgumentError, media_item};
use crate::memory::MemoryPlan;

/// What can be chosen when a model is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// What computes.
    pub device: DeviceOptions,
    /// Longest prompt and answer together, in tokens; `None` is the model's longest, cut so that the cache fits half of
    /// the memory that is free.
    pub max_model_len: Option<usize>,
    /// Element type of the KV cache.
    pub kv_dtype: KvDtype,
    /// Of models with an indexer: its choice of keys, or all; `None` is as the checkpoint says.
    pub attention: Option<AttentionKind>,
    /// Numbers of the indexer's scores; `None` is f32.
    pub scorer: Option<IndexScorer>,
    /// Instead of what preprocessor_config.json says.
    pub processor: Overrides,
    /// Where a clip's time stamps come from.
    pub timestamps: TimestampRule,
    /// What may be opened; by default local files and no URLs.
    pub access: Access,
    /// Use the hub's cache only.
    pub offline: bool,
    /// Limits of the engine; its `max_model_len` is set from the one above.
    pub engine: EngineOptions,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: DeviceOptions::default(),
            max_model_len: None,
            kv_dtype: KvDtype::F32,
            attention: None,
            scorer: None,
            processor: Overrides::default(),
            timestamps: TimestampRule::True,
            access: Access::default(),
            offline: false,
            engine: EngineOptions::default(),
        }
    }
}

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Neither a directory nor a hub id that can be had.
    #[error("{0}")]
    Resolve(String),
    /// The checkpoint's files.
    #[error(transparent)]
    Checkpoint(#[from] ProcessorError),
    /// The weights.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The machine.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A length that the machine cannot hold.
    #[error("{0}")]
    Length(String),
    /// An option that this model does not take.
    #[error("{0}")]
    Setting(String),
}

/// Why a question was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// A medium's name or options.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// How far loading is; for display only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadProgress<'a> {
    /// Bytes of the checkpoint that are here, and in all.
    Downloading {
        /// The file that is being read.
        file: &'a str,
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The weights are being mapped.
    Loading(&'a Path),
}

/// A loaded model. Clones are the same model.
#[derive(Clone)]
pub struct Keye {
    engine: Engine,
    processor: Arc<Processor>,
    device: String,
    files: CheckpointFiles,
    memory: MemoryPlan,
}

impl Keye {
    /// Loads keye-nano, the small model inside this library: it answers questions about the synthetic clips of `keye-world`,
    /// and knows nothing else.
    #[cfg(feature = "nano")]
    pub fn embedded(options: LoadOptions) -> Result<Self, LoadError> {
        Self::load(crate::NANO, options)
    }

    /// Loads a checkpoint directory, a hub id (`org/name`, `org/name@revision`), which is downloaded when it is not cached, or
    /// [`NANO`](crate::NANO).
    pub fn load(model: impl AsRef<str>, options: LoadOptions) -> Result<Self, LoadError> {
        Self::load_with(model.as_ref(), options, &mut |_| ())
    }

    /// As [`Keye::load`]; `progress` is told how far it is.
    pub fn load_with(
        model: &str,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress<'_>),
    ) -> Result<Self, LoadError> {
        Self::load_adjusted(model, options, progress, |_| ())
    }

    /// As [`Keye::load_with`]; `adjust` may change the rules and limits of media before the first request, as servers do.
    pub fn load_adjusted(
        model: &str,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress<'_>),
        adjust: impl FnOnce(&mut Loader),
    ) -> Result<Self, LoadError> {
        let files = resolve_model(model, options.offline, progress)?;
        progress(LoadProgress::Loading(files.root()));
        let mut processor = load_processor(&files, &options.processor)?;
        processor.config.choose_attention(options.attention, options.scorer)?;
        let checkpoint = Checkpoint::open(&files)?;
        let loaded = options.device.load(
            &processor.config,
            &processor.media.processor,
            &checkpoint,
            options.kv_dtype,
            CacheSize::Fit(options.max_model_len),
        )?;
        let mut loader =
            Loader { access: options.access, timestamps: options.timestamps, ..Loader::new(processor.media.clone()) };
        adjust(&mut loader);
        let processor = Arc::new(processor);
        let engine_options = EngineOptions { max_model_len: Some(loaded.fit.tokens), ..options.engine };
        let engine = Engine::new(loaded.runner, Arc::clone(&processor), loader, engine_options);
        Ok(Self { engine, processor, device: loaded.device, files, memory: loaded.fit.plan })
    }

    /// Asks about media, each a path or URL as [`media_item`] reads it: `clip.mp4#fps=1`, `image:photo`.
    ///
    /// The checkpoint's own sampling defaults are used. Dropping the stream cancels the request.
    pub fn ask<M: AsRef<str>>(&self, media: &[M], question: &str) -> Result<Events, AskError> {
        let media = media.iter().map(|text| media_item(text.as_ref())).collect::<Result<Vec<MediaItem>, _>>()?;
        let mut conversation = Conversation::new();
        conversation.push_user(media, question);
        let request = Request { conversation, sampling: self.default_sampling(), ..Request::default() };
        Ok(Events { stream: self.submit(request)? })
    }

    /// Queues any request.
    pub fn submit(&self, request: Request) -> Result<EventStream, EngineError> {
        self.engine.submit(request)
    }

    /// The checkpoint's sampling defaults (generation_config.json), with seed 0.
    pub fn default_sampling(&self) -> SamplingParams {
        default_sampling(&self.processor.generation)
    }

    /// The engine below.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The checkpoint's config, tokenizer, template and media rules.
    pub fn processor(&self) -> &Processor {
        &self.processor
    }

    /// As [`Keye::processor`], to be kept.
    pub fn shared_processor(&self) -> Arc<Processor> {
        Arc::clone(&self.processor)
    }

    /// Device, instruction set and threads.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// What weights, cache and activations take.
    pub fn memory(&self) -> &MemoryPlan {
        &self.memory
    }

    /// The checkpoint's files.
    pub fn files(&self) -> &CheckpointFiles {
        &self.files
    }
}

/// The events of a question, the failure as an error: [`Event::Failed`] does not occur.
pub struct Events {
    stream: EventStream,
}

impl Events {
    /// Waits for the next event for at most `timeout`: `Ok(None)` is the end, `Err` that nothing came.
    pub fn next_timeout(&mut self, timeout: Duration) -> Result<Option<Result<Event, EngineError>>, NothingYet> {
        Ok(self.stream.next_timeout(timeout)?.map(failure_as_error))
    }

    /// A handle that cancels the question from elsewhere.
    pub fn canceller(&self) -> Canceller {
        self.stream.canceller()
    }
}

impl Iterator for Events {
    type Item = Result<Event, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.stream.next().map(failure_as_error)
    }
}

fn failure_as_error(event: Event) -> Result<Event, EngineError> {
    match event {
        Event::Failed(error) => Err(error),
        event => Ok(event),
    }
}

/// Sampling parameters as generation_config.json has them; greedy when `do_sample` is false.
pub fn default_sampling(generation: &GenerationConfig) -> SamplingParams {
    let neutral = SamplingParams::default();
    let repetition_penalty = generation.repetition_penalty.unwrap_or(neutral.repetition_penalty);
    if !generation.do_sample {
        return SamplingParams { repetition_penalty, ..neutral };
    }
    SamplingParams {
        temperature: generation.temperature.unwrap_or(1.0),
        top_k: generation.top_k.unwrap_or(neutral.top_k),
        top_p: generation.top_p.unwrap_or(neutral.top_p),
        min_p: generation.min_p.unwrap_or(neutral.min_p),
        repetition_penalty,
        ..neutral
    }
}

/// The processor of a checkpoint. What is wrong with the overrides is told apart from what is wrong with the files.
fn load_processor(files: &CheckpointFiles, overrides: &Overrides) -> Result<Processor, LoadError> {
    Processor::load(files, overrides).map_err(|error| match Processor::load(files, &Overrides::default()) {
        Ok(_) => LoadError::Setting(error.to_string()),
        Err(_) => error.into(),
    })
}

/// The file that every checkpoint has.
const CONFIG: &str = "config.json";

/// Why a directory is no checkpoint. The trainer writes models into folders `model`, one below each stage's: the newest is told.
fn without_config(dir: &Path) -> String {
    let stages = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let models = stages.chain([dir.to_owned()]).map(|folder| folder.join("model"));
    let written = |model: &PathBuf| model.join(CONFIG).metadata().and_then(|file| file.modified()).ok();
    let newest = models.filter_map(|model| Some((written(&model)?, model))).max();
    let hint = newest.map_or_else(String::new, |(_, model)| format!("; there is one in {}", model.display()));
    let expected = "expected a checkpoint directory (config.json, tokenizer, weights), found no config.json";
    format!("{}: {expected}{hint}", dir.display())
}

/// The files of `model`: a directory, a hub id, or [`NANO`](crate::NANO).
pub fn resolve_model(
    model: &str,
    offline: bool,
    progress: &mut dyn FnMut(LoadProgress<'_>),
) -> Result<CheckpointFiles, LoadError> {
    if model == crate::NANO {
        return embedded();
    }
    // A local model needs none of the hub's settings.
    if Path::new(model).is_dir() {
        return match Path::new(model).join(CONFIG).exists() {
            true => Ok(model.into()),
            false => Err(LoadError::Resolve(without_config(Path::new(model)))),
        };
    }
    #[cfg(feature = "hub")]
    {
        let variable = |name: &str| match (name, offline) {
            ("HF_HUB_OFFLINE", true) => Some("1".to_owned()),
            _ => std::env::var(name).ok().filter(|value| !value.is_empty()),
        };
        let mut on_download = |step: crate::hub::Download<'_>| {
            progress(LoadProgress::Downloading { file: step.file, done: step.done, total: step.total });
        };
        let hub = crate::hub::Hub::from_lookup(&variable);
        let dir = hub.and_then(|hub| hub.resolve(model, &mut on_download));
        dir.map(CheckpointFiles::Directory).map_err(|error| LoadError::Resolve(format!("{error:#}")))
    }
    #[cfg(not(feature = "hub"))]
    {
        let _ = (offline, progress);
        Err(LoadError::Resolve(format!(
            "{model}: there is no such directory; this build has no downloads (feature hub)"
        )))
    }
}

#[cfg(feature = "nano")]
fn embedded() -> Result<CheckpointFiles, LoadError> {
    Ok(CheckpointFiles::Embedded(&crate::nano::FILES))
}

#[cfg(not(feature = "nano"))]
fn embedded() -> Result<CheckpointFiles, LoadError> {
    let reason = "this build has no model inside (feature nano); name a checkpoint directory or a hub id";
    Err(LoadError::Resolve(format!("{}: {reason}", crate::NANO)))
}

//! Flags that several commands share.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::{Args, ValueEnum};
use keye::{
    Access, AttentionKind, Conversation, Device, DeviceOptions, IndexScorer, Keye, KvDtype, LoadOptions, MediaItem,
    MediaKind, NANO, Overrides, SamplingParams, Source, ThinkMode, TimestampRule,
};
use keye_media::{BUDGET_SHARES, REPORTED_BUDGET_SHARES, VideoRule};
use keye_processor::FramePrefix;

use super::failure::Usage;
use super::ui::Status;

/// Said when the model inside the program is used unasked.
pub const UNNAMED: &str =
    "no --model: using keye-nano, the small model trained on synthetic shapes; it knows nothing else";

/// Which model, and how it is loaded.
#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Checkpoint directory, or hub id like Kwai-Keye/Keye-VL-1_5-8B (downloaded once, resumed when cut off)
    #[cfg_attr(feature = "nano", doc = "[default: keye-nano, inside this program, which knows synthetic shapes only]")]
    #[arg(short, long, env = "KEYE_MODEL", value_name = "DIR|HUB_ID")]
    #[cfg_attr(not(feature = "nano"), arg(required = true))]
    model: Option<String>,
    /// Use downloaded models only, never the network
    #[arg(long)]
    pub offline: bool,
    /// What computes: cpu, cuda (the first GPU) or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,
    /// Threads of the CPU [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Part of a GPU's memory that may be in use, what others use included: weights, activations, and cache in the rest
    #[cfg(feature = "cuda")]
    #[arg(long, value_name = "PART", default_value = "0.9", value_parser = part)]
    pub gpu_memory: f64,
    /// Divide the decoder among N ranks (tensor parallelism, docs/parallel.md), each with its part of the threads
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub tp: u16,
    /// Longest prompt and answer together, in tokens [default: the model's, cut to half of the free memory]
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<usize>,
    /// Element type of the KV cache; bf16 halves its memory, int8 quarters it
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub kv_cache: KvCache,
    #[command(flatten)]
    pub attention: AttentionArgs,
    /// Fewest pixels of a still picture, instead of preprocessor_config.json's
    #[arg(long, value_name = "PIXELS")]
    pub processor_min_pixels: Option<u64>,
    /// Most pixels of a still picture, instead of preprocessor_config.json's
    #[arg(long, value_name = "PIXELS")]
    pub processor_max_pixels: Option<u64>,
    /// Text before each frame of a clip, {ts:.Nf} for its seconds [default: <|frame|>{ts:.1f}] (2.0 only)
    #[arg(long, value_name = "TEMPLATE", value_parser = FramePrefix::parse)]
    pub frame_prefix: Option<FramePrefix>,
    /// How much of the budget of pixels short clips get (2.0 only)
    #[arg(long, value_name = "RULE")]
    pub video_budget: Option<VideoBudget>,
    /// Time stamps as the reference computes them (index / average rate) instead of the clip's own
    #[arg(long)]
    pub reference_timestamps: bool,
}

/// What a model with an indexer attends to.
#[derive(Args)]
pub struct AttentionArgs {
    /// The keys that the model's indexer chooses, or all with the same weights [default: as the checkpoint says] (2.0 only)
    #[arg(long, value_name = "KIND", value_parser = ["dsa", "dense"])]
    attention: Option<String>,
    /// Numbers of the indexer's scores; fp8 is the official server's, with the Hadamard transform [default: f32] (2.0 only)
    #[arg(long, value_name = "TYPE", value_parser = ["f32", "fp8"])]
    scorer: Option<String>,
}

impl AttentionArgs {
    pub fn kind(&self) -> Option<AttentionKind> {
        self.attention.as_deref().map(|kind| if kind == "dense" { AttentionKind::Dense } else { AttentionKind::Sparse })
    }

    pub fn scorer(&self) -> Option<IndexScorer> {
        self.scorer.as_deref().map(|scorer| if scorer == "fp8" { IndexScorer::Fp8 } else { IndexScorer::F32 })
    }
}

/// Element type of the KV cache.
#[derive(Clone, Copy, ValueEnum)]
pub enum KvCache {
    F32,
    Bf16,
    Int8,
}

impl KvCache {
    pub fn dtype(self) -> KvDtype {
        match self {
            Self::F32 => KvDtype::F32,
            Self::Bf16 => KvDtype::Bf16,
            Self::Int8 => KvDtype::Int8,
        }
    }
}

/// Shares of the budget of pixels by the length of a clip.
#[derive(Clone, Copy, ValueEnum)]
pub enum VideoBudget {
    /// All of it, whatever the length [default]
    Whole,
    /// 9 % up to 259 s, 18 % up to 518 s, 36 % up to 1036 s, 70 % up to 2016 s: the official server's switch
    Adaptive,
    /// An eighth up to 256 s, a quarter up to 512 s, half up to 1024 s: the technical report's
    Report,
}

impl ModelArgs {
    /// Loads the model, telling `status` how far it is. `remote` is the consent to open URLs; `at_once` requests share its steps.
    pub fn load(&self, remote: bool, at_once: usize, status: &mut Status) -> Result<Keye> {
        warn_of_device(self.device, status);
        let mut options = self.options(Access { remote, ..Access::default() });
        options.engine.max_running = at_once;
        let keye = Keye::load_with(self.chosen(status), options, &mut |progress| status.loading(progress))?;
        status.clear();
        warn_of_disk(&keye, status);
        Ok(keye)
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        self.named().unwrap_or(NANO)
    }

    /// An empty `KEYE_MODEL`, as build and container files leave it, names nothing.
    fn named(&self) -> Option<&str> {
        self.model.as_deref().filter(|name| !name.is_empty())
    }

    /// As [`Self::name`]; `status` tells when nobody named it.
    pub fn chosen(&self, status: &mut Status) -> &str {
        if self.named().is_none() {
            status.line(UNNAMED);
        }
        self.name()
    }

    /// What the flags say about loading.
    pub fn options(&self, access: Access) -> LoadOptions {
        LoadOptions {
            device: self.device_options(),
            max_model_len: self.max_model_len,
            kv_dtype: self.kv_cache.dtype(),
            attention: self.attention.kind(),
            scorer: self.attention.scorer(),
            processor: self.overrides(),
            timestamps: match self.reference_timestamps {
                true => TimestampRule::Reference,
                false => TimestampRule::True,
            },
            access,
            offline: self.offline,
            ..LoadOptions::default()
        }
    }

    fn device_options(&self) -> DeviceOptions {
        DeviceOptions {
            device: self.device,
            threads: self.threads.map(usize::from),
            ranks: self.tp.into(),
            #[cfg(feature = "cuda")]
            gpu_memory: self.gpu_memory,
            #[cfg(not(feature = "cuda"))]
            gpu_memory: DeviceOptions::default().gpu_memory,
        }
    }

    pub fn overrides(&self) -> Overrides {
        Overrides {
            processor_min_pixels: self.processor_min_pixels,
            processor_max_pixels: self.processor_max_pixels,
            frame_prefix: self.frame_prefix.clone(),
            budget_shares: self.video_budget.map(|budget| match budget {
                VideoBudget::Whole => &[][..],
                VideoBudget::Adaptive => BUDGET_SHARES,
                VideoBudget::Report => REPORTED_BUDGET_SHARES,
            }),
        }
    }
}

/// Says what is to be known before a device is used.
pub fn warn_of_device(device: Device, status: &mut Status) {
    if let Some(caution) = device.caution() {
        status.line(caution);
    }
}

/// A part of a whole, above 0.
#[cfg(feature = "cuda")]
fn part(text: &str) -> Result<f64, String> {
    let part = text.parse::<f64>().ok().filter(|part| *part > 0.0 && *part <= 1.0);
    part.ok_or_else(|| "expected a number above 0, at most 1".into())
}

/// Says that a model is larger than the memory, if it is.
pub fn warn_of_disk(keye: &Keye, status: &mut Status) {
    let plan = keye.memory();
    if plan.reads_experts_from_disk() {
        let machine = super::ui::bytes(plan.machine.unwrap_or(0));
        status.line(&format!(
            "{plan}; this machine has {machine}: experts are read from the disk as they are chosen, slowly"
        ));
    }
}

/// Options of the media, for all that take them.
#[derive(Args)]
#[command(next_help_heading = "Media (for all items that take the option; NAME#OPTION=VALUE is for one item)")]
pub struct MediaArgs {
    /// Frames per second to look at
    #[arg(long, value_name = "FPS", allow_negative_numbers = true, conflicts_with = "nframes")]
    pub fps: Option<f64>,
    /// Exact number of frames to look at
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub nframes: Option<u32>,
    /// Fewest frames
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub min_frames: Option<u32>,
    /// Most frames
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_frames: Option<u32>,
    /// Fewest pixels of a picture or frame
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub min_pixels: Option<u64>,
    /// Most pixels of a picture or frame
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub max_pixels: Option<u64>,
    /// Budget of pixels over a whole clip
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub total_pixels: Option<u64>,
    /// Start of the part of a clip to look at, in seconds
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub start: Option<f64>,
    /// End of the part of a clip to look at, in seconds
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub end: Option<f64>,
    /// Turn pictures upright as their EXIF tag says (the reference does not)
    #[arg(long)]
    pub exif: bool,
}

impl MediaArgs {
    /// Refuses flags that no item takes.
    pub fn check(&self, media: &[MediaItem]) -> Result<()> {
        let flags = [
            ("--fps", self.fps.is_some(), MediaKind::Video),
            ("--nframes", self.nframes.is_some(), MediaKind::Video),
            ("--min-frames", self.min_frames.is_some(), MediaKind::Video),
            ("--max-frames", self.max_frames.is_some(), MediaKind::Video),
            ("--total-pixels", self.total_pixels.is_some(), MediaKind::Video),
            ("--start", self.start.is_some(), MediaKind::Video),
            ("--end", self.end.is_some(), MediaKind::Video),
            ("--exif", self.exif, MediaKind::Image),
        ];
        for (flag, given, kind) in flags {
            if given && !media.iter().any(|item| item.kind == kind) {
                let kind = if kind == MediaKind::Video { "videos" } else { "images" };
                return Err(Usage(format!("{flag} is for {kind}, and there are none")).into());
            }
        }
        if (self.min_pixels.is_some() || self.max_pixels.is_some()) && media.is_empty() {
            return Err(Usage("--min-pixels and --max-pixels are for media, and there are none".into()).into());
        }
        self.check_part(media)
    }

    /// Refuses a part of a clip that ends before it starts.
    pub fn check_part(&self, media: &[MediaItem]) -> Result<()> {
        let clips = media.iter().filter(|item| item.kind == MediaKind::Video).map(|item| &item.options);
        let parts = clips.map(|own| (own.video_start.or(self.start), own.video_end.or(self.end)));
        // A chat has its clips later.
        for part in parts.chain([(self.start, self.end)]) {
            if let (Some(start), Some(end)) = part
                && end < start
            {
                let reason =
                    format!("--end: the part to look at ends at {end} s, before it starts (--start) at {start} s");
                return Err(Usage(reason).into());
            }
        }
        Ok(())
    }

    /// Sets on an item what it takes; what the item says itself stays.
    pub fn apply(&self, item: &mut MediaItem, rule: VideoRule) {
        let options = &mut item.options;
        options.min_pixels = options.min_pixels.or(self.min_pixels);
        options.max_pixels = options.max_pixels.or(self.max_pixels);
        if item.kind == MediaKind::Image {
            options.exif = options.exif.or(self.exif.then_some(true));
            return;
        }
        if options.fps.is_none() && options.nframes.is_none() {
            (options.fps, options.nframes) = (self.fps, self.nframes.map(f64::from));
        }
        options.min_frames = options.min_frames.or(self.min_frames);
        options.max_frames = options.max_frames.or(self.max_frames);
        options.video_start = options.video_start.or(self.start);
        options.video_end = options.video_end.or(self.end);
        let total = match rule {
            VideoRule::WholeClip => &mut options.total_pixels,
            VideoRule::SlowFast | VideoRule::Adaptive => &mut options.video_total_pixels,
        };
        *total = total.or(self.total_pixels);
    }
}

/// How tokens are chosen.
#[derive(Args)]
#[command(next_help_heading = "Answer (defaults: the checkpoint's generation_config.json)")]
pub struct SamplingArgs {
    /// Always take the most probable token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    pub greedy: bool,
    /// Temperature; 0 is greedy
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Choose among the K best; 0 is off
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<u32>,
    /// Choose among the best that together have probability P; 1 is off
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Leave out what has less than P times the probability of the best
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Divides logits of tokens that have been seen; 1 is off
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from logits of tokens that the answer has
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtracted for every time that the answer has the token
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Same seed, same answer [default: a new one each time]
    #[arg(long, value_name = "SEED", allow_negative_numbers = true)]
    pub seed: Option<u64>,
    /// The answer ends before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value = "4096")]
    pub max_tokens: usize,
    /// Most tokens of thinking; then it is closed, and the answer begins
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_reasoning_tokens: Option<usize>,
    /// Keep going where the model would end
    #[arg(long)]
    pub ignore_eos: bool,
    /// Ask for thinking (puts /think behind the question)
    #[arg(long, conflicts_with_all = ["no_think", "auto"])]
    pub think: bool,
    /// Ask for no thinking (puts /no_think behind the question)
    #[arg(long, conflicts_with = "auto")]
    pub no_think: bool,
    /// Leave it to the model [default]
    #[arg(long)]
    pub auto: bool,
}

impl SamplingArgs {
    /// Finds values that are out of range before a model is loaded.
    pub fn check(&self) -> Result<()> {
        self.over(SamplingParams::default()).validate().map_err(|reason| Usage(with_flag(&reason)).into())
    }

    /// The checkpoint's defaults with these flags.
    pub fn over(&self, base: SamplingParams) -> SamplingParams {
        let temperature = if self.greedy { 0.0 } else { self.temperature.unwrap_or(base.temperature) };
        SamplingParams {
            temperature,
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            seed: self.seed.unwrap_or_else(new_seed),
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            ..base
        }
    }

    pub fn think_mode(&self) -> ThinkMode {
        match (self.think, self.no_think) {
            (true, _) => ThinkMode::Think,
            (_, true) => ThinkMode::NoThink,
            _ => ThinkMode::Auto,
        }
    }
}

/// What is wrong with a parameter, with its flag in place of its name. All but stop strings are named first.
fn with_flag(reason: &str) -> String {
    match reason.split_once(" is ") {
        Some((name, rest)) if !name.contains(' ') => format!("--{} is {rest}", name.replace('_', "-")),
        _ => format!("--stop: {reason}"),
    }
}

/// Differs from run to run, and is short enough to be typed again.
fn new_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos()) ^ u64::from(std::process::id()) << 12
}

/// A conversation with the system message, if there is one.
pub fn conversation(system: Option<&str>) -> Conversation {
    match system {
        Some(text) => Conversation::new().with_system(text),
        None => Conversation::new(),
    }
}

/// Whether a medium is to be fetched: naming its URL on the command line is the consent.
pub fn wants_remote(media: &[MediaItem]) -> bool {
    media.iter().any(|item| matches!(item.source, Source::Url(_)))
}

/// The name of an item, for display.
pub fn name_of(item: &MediaItem) -> String {
    match &item.source {
        Source::Path(path) => path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
        Source::Url(url) => url.clone(),
        Source::Bytes(_) => "standard input or a data URL".into(),
        Source::Frames(frames) => format!("{} frames", frames.len()),
    }
}

/// A directory that is to be made, checked before work is put into what it will hold.
pub fn check_new_dir(flag: &str, dir: &Path) -> Result<()> {
    keye::check_new_dir(dir).map_err(|error| Usage(format!("{flag}: {error}")).into())
}

/// A path for output, checked before work is put into what it will hold.
pub fn check_output(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    match parent {
        Some(parent) if !parent.is_dir() => {
            Err(Usage(format!("{}: there is no directory {}", path.display(), parent.display())).into())
        }
        _ if path.is_dir() => {
            Err(Usage(format!("{} is a directory; the name of a file is expected", path.display())).into())
        }
        _ => Ok(()),
    }
}

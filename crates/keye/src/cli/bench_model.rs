//! The measurements of `keye bench`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use keye::{
    CacheSize, CheckpointFiles, Claim, Device, ItemOptions, LoadError, MediaItem, MemoryPlan, Overrides, Source,
    cache_spec_of_ranks, claim_dir, resolve_model,
};
use keye_backend::{BLOCK_TOKENS, CacheSpec};
use keye_limits::Limits;
use keye_media::{Loader, MediaCost, MediaKind, Patches, Pixels, media_cost, write_sample_clip};
use keye_model::{Batch, Chunk, LogitRows, NoTap, Runner};
use keye_processor::{Checkpoint, ModelConfig, Processor};

use super::bench::{Part, Plan};
use super::bench_report::{Decode, Prefill, Report, Vision};
use super::failure::Usage;
use super::ui::{self, Status};

/// Tokens of a decode run.
const DECODED: usize = 8;
/// Patches and the blocks that they attend in: one of 1024; eight frames of 512.
const VISION: [(usize, [u32; 3]); 2] = [(1, [1, 32, 32]), (8, [1, 16, 32])];
/// As the engine cuts prompts.
const CHUNK: usize = 512;
/// How often work is looked at that tells nothing itself.
const LOOK: Duration = Duration::from_millis(100);
/// What the engine asks for when it decodes greedily.
const GREEDY: LogitRows = LogitRows::Highest(1);
/// Memory that is left to others when random weights go to /dev/shm.
const SPARE: u64 = 4 << 30;

/// What the folders of random weights are called, with a process's id behind it.
const TEMPORARY: &str = "keye-bench-";

/// The checkpoint that is measured; a temporary one is gone when this is dropped, and from the disk once it is loaded.
pub struct Model {
    name: String,
    quant: String,
    files: CheckpointFiles,
    temporary: Option<Temporary>,
}

/// A folder that is gone when this is dropped; maps of its files stay.
struct Temporary {
    folder: PathBuf,
    _claim: Claim,
}

impl Model {
    /// A directory, not yet written, for `bytes` of weights.
    pub fn temporary(name: &str, quant: &str, dir: Option<&Path>, bytes: u64) -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let root = match dir {
            Some(dir) => dir.to_owned(),
            None if room(memory).is_some_and(|room| room > bytes.saturating_add(SPARE)) => memory.to_owned(),
            None => std::env::temp_dir(),
        };
        if !root.is_dir() {
            return Err(Usage(format!("--dir: there is no directory {}", root.display())).into());
        }
        let temporary = Temporary::create(&root)?;
        let files = CheckpointFiles::Directory(temporary.folder.join("model"));
        Ok(Self { name: name.to_owned(), quant: quant.to_owned(), files, temporary: Some(temporary) })
    }

    /// A checkpoint that is there.
    pub fn stored(name: &str, status: &mut Status) -> Result<Self> {
        let files = resolve_model(name, false, &mut |progress| status.loading(progress))?;
        Ok(Self { name: name.to_owned(), quant: "as stored".into(), files, temporary: None })
    }

    pub fn dir(&self) -> &Path {
        self.files.root()
    }
}

impl Temporary {
    /// In `root`, which is rid of what killed runs left there.
    fn create(root: &Path) -> Result<Self> {
        for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let process = name.strip_prefix(TEMPORARY).is_some_and(|id| id.parse::<u32>().is_ok());
            let folder = process && entry.file_type().is_ok_and(|kind| kind.is_dir());
            // One that still runs has a claim of its own.
            if folder && let Ok(claim @ Claim::Ours(_)) = claim_dir(&entry.path()) {
                drop(Self { folder: entry.path(), _claim: claim });
            }
        }
        let folder = root.join(format!("{TEMPORARY}{}", std::process::id()));
        match claim_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))? {
            Claim::Taken => bail!("{} is another run's; name another --dir", folder.display()),
            claim => Ok(Self { folder, _claim: claim }),
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // What cannot be removed is left to the next run.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Bytes that may go to a file system in memory: its own room, and the machine's.
fn room(memory: &Path) -> Option<u64> {
    let free = keye::free_bytes(memory).ok().filter(|_| memory.is_dir())?;
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    Some(free.min(kilobytes(&text, "MemAvailable:")?))
}

/// The field `name` of a file in /proc, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.saturating_mul(1024))
}

/// Measures what the plan says.
pub fn measure(model: &mut Model, plan: &Plan, stop: &dyn Fn() -> bool, status: &mut Status) -> Result<Report> {
    let wants = |part: Part| plan.parts.contains(&part);
    let step = |status: &mut Status, text: &str| {
        status.line(text);
        if stop() { bail!("given up") } else { Ok(()) }
    };
    // A GPU's limits are not those of the machine.
    let limits = |before: Option<Limits>| {
        (plan.device.device == Device::Cpu).then(|| {
            let now = keye_limits::measure(plan.threads);
            before.map_or(now, |before| better(before, now))
        })
    };
    step(status, "the machine's limits")?;
    let before = limits(None);
    let processor = Processor::load(&model.files, &Overrides::default()).map_err(LoadError::from)?;
    let mut media = Vec::new();
    if wants(Part::Media) {
        step(status, "media: making a minute of 720p to decode, which takes a while")?;
        media.push(media_run(&processor, plan.repeat, status)?);
    }
    // From here on the peak is the model's.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    step(status, "start: loading, and a first token")?;
    let longest = plan.prompts.iter().chain(&plan.contexts).max().copied().unwrap_or(0);
    let tokens = longest + CHUNK;
    let start = Instant::now();
    let mut bench = Bench::load(&model.files, plan, tokens)?;
    bench.prefill(16, 0, 16)?;
    let first_token = start.elapsed().as_secs_f64();
    model.temporary = None;

    let mut report = Report {
        model: model.name.clone(),
        quant: model.quant.clone(),
        device: bench.device.clone(),
        threads: plan.threads,
        limits: before,
        first_token: wants(Part::Start).then_some(first_token),
        prefill: Vec::new(),
        decode: Vec::new(),
        vision: Vec::new(),
        media,
        cache_tokens: bench.cache_tokens,
        rss: 0,
    };
    for tokens in plan.prompts.iter().copied().filter(|_| wants(Part::Prefill)) {
        step(status, &format!("prefill: {tokens} tokens"))?;
        // Each run in blocks of its own: together they fill the cache for decoding.
        let seconds = best(plan.repeat, |run| {
            let first_block = bench.blocks_from(run * tokens, tokens);
            bench.prefill(tokens, first_block, CHUNK)
        })?;
        let operations = bench.runner.cost(MediaKind::Image, &[], tokens).prefill;
        report.prefill.push(Prefill { tokens, seconds, operations });
    }
    for context in plan.contexts.iter().copied().filter(|_| wants(Part::Decode)) {
        step(status, &format!("decode: behind {context} tokens"))?;
        bench.fill(context, &mut |done| {
            status.progress(&format!("filling the cache: {done} of {context} tokens"));
            !stop()
        })?;
        let seconds = best(plan.repeat, |_| bench.decode(context))? / DECODED as f64;
        report.decode.push(Decode { context, seconds, bytes: bench.bytes_per_token(context) });
    }
    for (frames, grid) in VISION.into_iter().filter(|_| wants(Part::Vision)) {
        let grids = vec![grid; frames];
        let patches = grids.iter().map(|[t, h, w]| (t * h * w) as usize).sum();
        step(status, &format!("vision: {patches} patches"))?;
        let pixels = bench.patches(&grids, patches);
        let seconds = best(plan.repeat, |_| bench.encode(&pixels))?;
        let operations = bench.runner.cost(MediaKind::Image, &grids, 0).vision;
        report.vision.push(Vision { patches, seconds, operations });
    }
    let status_file = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    report.rss = kilobytes(&status_file, "VmHWM:").unwrap_or(0);
    step(status, "the machine's limits again")?;
    report.limits = limits(before);
    Ok(report)
}

/// Of two measurements of a limit the higher one: what disturbs makes it lower only.
fn better(a: Limits, b: Limits) -> Limits {
    let max = |a: Option<f64>, b: Option<f64>| Some(a?.max(b?));
    Limits { read: a.read.max(b.read), int8: max(a.int8, b.int8), f16: max(a.f16, b.f16), f32: max(a.f32, b.f32) }
}

/// The shortest of several runs, in seconds.
fn best(runs: usize, mut work: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    let mut shortest = f64::INFINITY;
    for run in 0..runs.max(1) {
        let start = Instant::now();
        work(run)?;
        shortest = shortest.min(start.elapsed().as_secs_f64());
    }
    Ok(shortest)
}

/// As `write_sample_clip`; `status` tells how large the file is.
fn write_clip(path: &Path, status: &mut Status) -> Result<()> {
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| write_sample_clip(path));
        while !writing.is_finished() {
            let bytes = std::fs::metadata(path).map_or(0, |file| file.len());
            status.progress(&format!("media: making the clip, {} so far", ui::bytes(bytes)));
            std::thread::sleep(LOOK);
        }
        let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.context("media need an ffmpeg with libx264; --only leaves them out")
    })
}

fn media_run(processor: &Processor, repeat: usize, status: &mut Status) -> Result<MediaCost> {
    let path = std::env::temp_dir().join(format!("keye-bench-{}.mp4", std::process::id()));
    let mut run = || -> Result<MediaCost> {
        write_clip(&path, status)?;
        status.line("media: the clip to patches");
        let item =
            MediaItem { kind: MediaKind::Video, source: Source::Path(path.clone()), options: ItemOptions::default() };
        let mut cost = media_cost(&Loader::new(processor.media.clone()), &item, &path, repeat as u32)?;
        cost.clip = "60 s of 720p H.264".into();
        Ok(cost)
    };
    let cost = run();
    let _ = std::fs::remove_file(&path);
    cost
}

/// A loaded model with its cache.
struct Bench {
    runner: Box<dyn Runner>,
    device: String,
    config: ModelConfig,
    /// Stored bytes of the weights that a token reads.
    weight_bytes: f64,
    kv_bytes_per_token: f64,
    index_bytes_per_token: f64,
    /// Tokens that fit beside the weights in the machine's memory, when it computes.
    cache_tokens: Option<u64>,
    /// Tokens of the cache that have been written, from the first block on.
    filled: usize,
}

impl Bench {
    fn load(files: &CheckpointFiles, plan: &Plan, tokens: usize) -> Result<Self> {
        let processor = Processor::load(files, &Overrides::default()).map_err(LoadError::from)?;
        let checkpoint = Checkpoint::open(files).map_err(LoadError::from)?;
        let config = processor.config.clone();
        let pixels = &processor.media.processor;
        let loaded = plan.device.load(&config, pixels, &checkpoint, plan.kv_dtype, CacheSize::Exactly(tokens))?;
        let ranks = plan.device.ranks;
        let spec = cache_spec_of_ranks(&config, plan.kv_dtype, ranks);
        let cache_bytes = spec.block_bytes() / BLOCK_TOKENS;
        let kv_bytes = CacheSpec { index_dim: 0, ..spec }.block_bytes() / BLOCK_TOKENS;
        // A GPU's memory is not the machine's.
        let memory =
            (plan.device.device == Device::Cpu).then(|| MemoryPlan::new(&config, &checkpoint, plan.kv_dtype, 0, ranks));
        Ok(Self {
            runner: loaded.runner,
            device: loaded.device,
            weight_bytes: weight_bytes(&config, &checkpoint),
            kv_bytes_per_token: kv_bytes as f64,
            index_bytes_per_token: (cache_bytes - kv_bytes) as f64,
            cache_tokens: memory.and_then(|memory| memory.tokens_that_fit(cache_bytes)),
            config,
            filled: 0,
        })
    }

    /// The first block of a run's own part of the cache, or the start when it is used up.
    fn blocks_from(&self, token: usize, tokens: usize) -> usize {
        let fits = token + tokens <= self.runner.info().num_blocks * BLOCK_TOKENS;
        if fits { token / BLOCK_TOKENS } else { 0 }
    }

    /// A prompt of `tokens` tokens into the blocks from `first_block` on, `chunk` at a time.
    fn prefill(&mut self, tokens: usize, first_block: usize, chunk: usize) -> Result<()> {
        for start in (0..tokens).step_by(chunk) {
            let end = tokens.min(start + chunk);
            let logits = if end == tokens { GREEDY } else { LogitRows::None };
            self.step(start, end - start, first_block, logits)?;
        }
        if first_block * BLOCK_TOKENS <= self.filled {
            self.filled = self.filled.max(first_block * BLOCK_TOKENS + tokens);
        }
        Ok(())
    }

    /// Writes the cache up to `tokens`, with prompts of a chunk each: their content does not matter, only that the memory
    /// is there.
    fn fill(&mut self, tokens: usize, progress: &mut dyn FnMut(usize) -> bool) -> Result<()> {
        while self.filled < tokens {
            let block = self.filled / BLOCK_TOKENS;
            let n = CHUNK.min(tokens.next_multiple_of(BLOCK_TOKENS) - block * BLOCK_TOKENS);
            self.prefill(n, block, CHUNK)?;
            if !progress(self.filled) {
                bail!("given up");
            }
        }
        Ok(())
    }

    fn decode(&mut self, context: usize) -> Result<()> {
        (0..DECODED).try_for_each(|i| self.step(context + i, 1, 0, GREEDY))
    }

    fn step(&mut self, start: usize, tokens: usize, first_block: usize, logits: LogitRows) -> Result<()> {
        let blocks = (start + tokens).div_ceil(BLOCK_TOKENS);
        let vocab = self.config.text.vocab_size;
        let chunk = Chunk {
            tokens: (start..start + tokens).map(|i| (i * 7919 % vocab) as u32).collect(),
            start,
            positions: (start..start + tokens).map(|i| [i as u32; 3]).collect(),
            features: Vec::new(),
            block_table: (first_block..first_block + blocks).map(|block| block as u32).collect(),
            logits,
        };
        self.runner.step(&Batch { chunks: vec![chunk] }, &mut NoTap)?;
        Ok(())
    }

    fn patches(&self, grids: &[[u32; 3]], patches: usize) -> Patches {
        let vision = &self.config.vision;
        let patch = vision.num_channels * vision.patch_size * vision.patch_size;
        let pixels = Pixels::U8((0..patches * patch).map(|i| (i * 31 % 251) as u8).collect());
        Patches { pixels, grid_thw: grids.to_vec(), hash: [0; 32] }
    }

    fn encode(&mut self, patches: &Patches) -> Result<()> {
        let feature = self.runner.encode(MediaKind::Image, patches, &mut NoTap, &mut |_, _| true)?;
        // Nothing is fetched that a device would have to be done for.
        self.runner.synchronize()?;
        self.runner.release(feature);
        Ok(())
    }

    /// Weights with their scales, the embedding table left out, and the cached rows that are looked at: of sparse attention
    /// all index keys, and as many keys and values as are chosen.
    fn bytes_per_token(&self, context: usize) -> f64 {
        let read = self.config.text.indexer.map_or(context, |indexer| indexer.topk.min(context));
        self.weight_bytes + self.kv_bytes_per_token * read as f64 + self.index_bytes_per_token * context as f64
    }
}

/// Stored bytes of the decoder's weights that one token reads: of experts those that it is sent to.
fn weight_bytes(config: &ModelConfig, checkpoint: &Checkpoint) -> f64 {
    let text = &config.text;
    let tied = text.tie_word_embeddings && checkpoint.get("lm_head.weight").is_none();
    let expert_part = text.experts.as_ref().map_or(1.0, |e| e.num_experts_per_tok as f64 / e.num_experts as f64);
    let read = |name: &str| match name {
        "model.embed_tokens.weight" => f64::from(u8::from(tied)),
        "lm_head.weight" | "model.norm.weight" => 1.0,
        _ if name.contains(".mlp.experts.") => expert_part,
        _ if name.starts_with("model.layers.") => 1.0,
        _ => 0.0,
    };
    let layout = keye_model::stored_layout(config, checkpoint);
    let bytes = |name: &str| checkpoint.get(name).map_or(0, |tensor| tensor.bytes.len()) as f64;
    layout.iter().map(|tensor| read(&tensor.name) * bytes(&tensor.name)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_higher_limit_counts() {
        let a = Limits { read: 1.0, int8: Some(5.0), f16: None, f32: Some(2.0) };
        let b = Limits { read: 3.0, int8: Some(4.0), f16: None, f32: Some(2.5) };
        assert_eq!(better(a, b), Limits { read: 3.0, int8: Some(5.0), f16: None, f32: Some(2.5) });
    }

    #[test]
    fn what_killed_runs_left_is_taken_away_and_what_others_use_stays() {
        let root = tempfile::tempdir().unwrap();
        let [killed, running, other] =
            ["keye-bench-1", "keye-bench-2", "keye-bench-mine"].map(|name| root.path().join(name));
        for folder in [&killed, &other] {
            std::fs::create_dir_all(folder.join("model.partial")).unwrap();
        }
        let claim = claim_dir(&running).unwrap();
        assert!(matches!(claim, Claim::Ours(_)));
        let ours = Temporary::create(root.path()).unwrap();
        assert!(!killed.exists() && running.exists() && other.exists() && ours.folder.exists());
        assert!(Temporary::create(root.path()).is_err(), "the process has one already");
        drop((ours, claim));
        Temporary::create(root.path()).unwrap();
        let left: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, [other]);
    }

    #[test]
    #[cfg(feature = "nano")]
    fn the_model_inside_is_measured_too() {
        let model = Model::stored(keye::NANO, &mut Status::new(true)).unwrap();
        let device = keye::DeviceOptions { threads: Some(1), ..keye::DeviceOptions::default() };
        let (parts, prompts, contexts) = (Vec::new(), Vec::new(), Vec::new());
        let plan = Plan { parts, prompts, contexts, device, threads: 1, repeat: 1, kv_dtype: keye::KvDtype::F32 };
        Bench::load(&model.files, &plan, 16).unwrap().prefill(16, 0, 16).unwrap();
    }

    #[test]
    fn fields_of_proc_are_bytes() {
        assert_eq!(kilobytes("VmPeak:\t 9 kB\nVmHWM:\t   12 kB\n", "VmHWM:"), Some(12 * 1024));
        assert_eq!(kilobytes("VmHWM: 12", "VmHWM:"), None);
    }
}

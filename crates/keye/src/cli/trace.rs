//! `keye trace`: every intermediate tensor of one request, or of given token ids.

mod inputs;
mod output;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use keye::{
    Access, CheckpointFiles, Conversation, KvDtype, LoadError, MediaError, MediaKind, ModelFiles, TimestampRule,
    load_cpu, load_ranks, resolve_model,
};
use keye_backend::Reference;
use keye_media::{Loader, Media, Pixels, ProcessorConfig, VideoRule};
use keye_model::{LoadOptions, Runner, Tap};
use keye_processor::{Checkpoint, ModelConfig, Overrides, Processor, Prompt, TemplateOptions, seconds_per_grid};
use serde_json::Value;

use super::args::AttentionArgs;
use super::failure::Usage;
use super::golden::{self, Difference, Golden, Tensor, Values};
use super::ui::{self, Status};

const AFTER_HELP: &str = "\
Examples:
  keye trace --model DIR --request cases/image_one.json --media-root . --out /tmp/trace.safetensors
  keye trace --model DIR --request r.json --out t.safetensors --backend cpu
  keye trace --model DIR --request r.json --out t.safetensors --compare golden.safetensors
  keye trace --model DIR --request r.json --out t.safetensors --pixels golden.safetensors --compare golden.safetensors
  keye trace --model DIR --inputs inputs.safetensors --generate 8 --attention dense --out t.safetensors

The request is {\"messages\": [...]} as transformers and OpenAI clients write it; other fields are ignored, URLs are refused. \
--inputs is for Keye-VL-2.0 and 671B checkpoints without tokenizer: input_ids I64 [n], and where there are pads pixel_values and \
image_grid_thw, pixel_values_videos and video_grid_thw (F32 patches, I64 [n, 3]). They are written back unchanged. \
Exit code 1 when --compare finds whole numbers or shapes that differ.";

/// Bytes of a request with its data URLs.
const REQUEST_BYTES: u64 = 1 << 30;
/// Greedy tokens after the prompt.
const GENERATED: usize = 16;
/// The float pixels are written too when there are fewer values than this.
const FLOAT_PIXELS: usize = 200_000;

/// Write all intermediate tensors of a request, to compare with another implementation
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Checkpoint directory, or hub id
    #[arg(short, long, env = "KEYE_MODEL", value_name = "DIR|HUB_ID")]
    model: String,
    /// JSON object with `messages`
    #[arg(long, value_name = "FILE.json", required_unless_present = "inputs", conflicts_with = "inputs")]
    request: Option<PathBuf>,
    /// Token ids and float pixels instead of a request
    #[arg(long, value_name = "FILE.safetensors")]
    inputs: Option<PathBuf>,
    /// Greedy tokens after the prompt; end tokens do not end them [default: 16 with --request, 0 with --inputs]
    #[arg(long, value_name = "N")]
    generate: Option<usize>,
    #[command(flatten)]
    attention: AttentionArgs,
    /// Where relative paths of media start [default: the folder of the request]
    #[arg(long, value_name = "DIR", conflicts_with = "inputs")]
    media_root: Option<PathBuf>,
    /// Take the patches from this file instead of the decoded ones
    #[arg(long, value_name = "FILE.safetensors", conflicts_with = "inputs")]
    pixels: Option<PathBuf>,
    /// Output
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
    /// Print the largest absolute difference of every tensor from this file's
    #[arg(long, value_name = "FILE.safetensors")]
    compare: Option<PathBuf>,
    /// What computes
    #[arg(long, default_value = "reference", value_parser = BACKENDS)]
    backend: String,
    /// Divide the decoder among N ranks (tensor parallelism, docs/parallel.md), each with its part of the threads
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=16))]
    tp: u16,
}

/// What may compute.
#[cfg(not(feature = "cuda"))]
const BACKENDS: [&str; 2] = ["reference", "cpu"];
/// What may compute; `cuda-f32` without the matrix cores' rounding.
#[cfg(feature = "cuda")]
const BACKENDS: [&str; 4] = ["reference", "cpu", "cuda", "cuda-f32"];

pub fn run(args: Args) -> Result<()> {
    let given = [&args.request, &args.inputs, &args.pixels, &args.compare];
    output::check(&args.out, given.into_iter().flatten().cloned())?;
    let mut status = Status::new(false);
    if args.backend.starts_with("cuda") {
        super::args::warn_of_device(keye::Device::Cuda(0), &mut status);
    }
    let files = resolve_model(&args.model, false, &mut |progress| status.loading(progress))?;
    output::check_model(&args.out, &files)?;
    let tensors = match (&args.inputs, &args.request) {
        (Some(path), _) => from_inputs(&args, &files, path, &mut status)?,
        (None, Some(path)) => from_request(&args, &files, path, &mut status)?,
        (None, None) => return Err(Usage("expected --request or --inputs".into()).into()),
    };
    status.clear();
    golden::write(&args.out, &tensors)?;
    let golden = args.compare.as_deref().map(Golden::open).transpose()?;
    show(&tensors, golden.as_ref())
}

fn from_inputs(args: &Args, files: &CheckpointFiles, path: &Path, status: &mut Status) -> Result<Vec<Tensor>> {
    let mut config = ModelConfig::load(files).map_err(LoadError::from)?;
    choose_attention(args, &mut config)?;
    let inputs = inputs::Inputs::read(path, &config, args.generate.unwrap_or(0))?;
    status.progress("computing");
    let pixels = config.facts().media.processor;
    let mut runner = load(args, files, &config, &pixels, inputs.options())?;
    inputs.run(runner.as_mut(), &config)
}

fn from_request(args: &Args, files: &CheckpointFiles, path: &Path, status: &mut Status) -> Result<Vec<Tensor>> {
    let mut processor = Processor::load(files, &Overrides::default()).map_err(LoadError::from)?;
    choose_attention(args, &mut processor.config)?;
    let conversation = read_request(path)?;
    let mut media = load_media(args, path, &processor, &conversation, status)?;
    if let Some(path) = &args.pixels {
        feed_pixels(&Golden::open(path)?, &mut media, processor.media.video.rule, path)?;
    }
    let prompt = processor.prompt(&conversation, &media.iter().collect::<Vec<_>>(), &TemplateOptions::default())?;
    let mut tensors = prompt_tensors(&prompt);
    tensors.extend(media_tensors(&media, &processor)?);

    status.progress("computing");
    let (n, generate) = (prompt.input_ids.len(), args.generate.unwrap_or(GENERATED));
    let longest = processor.config.text.max_position_embeddings;
    if n.checked_add(generate).is_none_or(|sum| sum > longest) {
        bail!("{n} tokens and --generate {generate}: the model's longest is {longest} together");
    }
    let options = LoadOptions { cache_tokens: n + generate, kv_dtype: KvDtype::F32 };
    let mut runner = load(args, files, &processor.config, &processor.media.processor, options)?;
    tensors.extend(computed_tensors(runner.as_mut(), &media, &prompt, generate)?);
    Ok(tensors)
}

fn choose_attention(args: &Args, config: &mut ModelConfig) -> Result<()> {
    Ok(config.choose_attention(args.attention.kind(), args.attention.scorer())?)
}

fn load(
    args: &Args,
    files: &CheckpointFiles,
    config: &ModelConfig,
    pixels: &ProcessorConfig,
    options: LoadOptions,
) -> Result<Box<dyn Runner>> {
    let checkpoint = Checkpoint::open(files).map_err(LoadError::from)?;
    let model = ModelFiles { config, processor: pixels, checkpoint: &checkpoint };
    let ranks = args.tp.into();
    Ok(match args.backend.as_str() {
        "cpu" => load_cpu(ranks, None, model, options)?.0,
        #[cfg(feature = "cuda")]
        "cuda" | "cuda-f32" if ranks > 1 => {
            return Err(Usage(
                "--tp divides a model among parts of the CPU, not GPUs yet: choose --backend cpu".into(),
            )
            .into());
        }
        #[cfg(feature = "cuda")]
        name @ ("cuda" | "cuda-f32") => {
            use keye_backend::{Cuda, CudaOptions, Products};
            let products = if name == "cuda" { Products::Bf16 } else { Products::F32 };
            let cuda = Cuda::new(CudaOptions { products, ..CudaOptions::default() }).map_err(LoadError::from)?;
            let loaded = keye_model::KeyeModel::load(cuda, config, pixels, &checkpoint, options);
            Box::new(loaded.map_err(LoadError::from)?)
        }
        _ => load_ranks(ranks, || Ok(Reference), None, model, options)?,
    })
}

fn read_request(path: &Path) -> Result<Conversation> {
    let mut text = Vec::new();
    let mut read = |path| File::open(path)?.take(REQUEST_BYTES + 1).read_to_end(&mut text);
    let bytes = read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if bytes as u64 > REQUEST_BYTES {
        bail!("{} has more than 1 GiB; a request is expected", path.display());
    }
    let value: Value = serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))?;
    if value.get("messages").is_none() {
        bail!("{}: expected an object with messages", path.display());
    }
    Conversation::from_json(&value).with_context(|| path.display().to_string())
}

fn load_media(
    args: &Args,
    request: &Path,
    processor: &Processor,
    conversation: &Conversation,
    status: &mut Status,
) -> Result<Vec<Media>> {
    let folder = request.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let root = args.media_root.as_deref().unwrap_or(folder);
    output::check_media(&args.out, conversation.media(), root)?;
    let loader = Loader {
        access: Access { root: Some(root.to_owned()), ..Access::default() },
        timestamps: TimestampRule::Reference,
        ..Loader::new(processor.media.clone())
    };
    status.media(conversation.media().iter().map(super::args::name_of).collect());
    let mut media = Vec::new();
    for (index, item) in conversation.media().iter().enumerate() {
        let loaded = loader.load(item, &mut |progress| {
            status.stage(&keye::Stage::Media { index, progress });
            true
        });
        media.push(loaded.map_err(|error| match error {
            MediaError::Denied { input, reason } if input.contains("://") => {
                let reason = format!("{reason}: a URL inside a request file is not fetched; name a file");
                MediaError::Denied { input, reason }
            }
            error => error,
        })?);
    }
    Ok(media)
}

/// The tensor names of a kind of media: patches as bytes and as floats, grids.
fn names(kind: MediaKind) -> [&'static str; 3] {
    match kind {
        MediaKind::Image => ["pixel_values_u8", "pixel_values", "image_grid_thw"],
        MediaKind::Video => ["pixel_values_videos_u8", "pixel_values_videos", "video_grid_thw"],
    }
}

/// Replaces decoded patches with recorded ones, item after item.
fn feed_pixels(file: &Golden, media: &mut [Media], rule: VideoRule, path: &Path) -> Result<()> {
    for kind in [MediaKind::Image, MediaKind::Video] {
        let items: Vec<&mut Media> = media.iter_mut().filter(|item| item.kind == kind).collect();
        let [bytes, floats, grid] = names(kind);
        if items.is_empty() {
            continue;
        }
        let decoded: Vec<i64> = items.iter().flat_map(|item| grid_rows(item, rule)).flatten().map(i64::from).collect();
        let recorded = file.integers(grid)?.with_context(|| format!("{}: no tensor {grid}", path.display()))?;
        if decoded != recorded {
            let rows = |values: &[i64]| format!("{:?}", values.chunks(3).collect::<Vec<_>>());
            let (decoded, recorded) = (rows(&decoded), rows(&recorded));
            bail!("{}: {grid} is {recorded}, the decoded media have {decoded}", path.display());
        }
        let tensor = match file.whole(bytes)? {
            Some(tensor) => tensor,
            None => file
                .whole(floats)?
                .with_context(|| format!("{}: neither {bytes} nor {floats} is there", path.display()))?,
        };
        let patches: usize = items.iter().map(|item| item.patches.len()).sum();
        if tensor.shape.first() != Some(&patches) {
            bail!("{}: {} has shape {:?}, expected {patches} patches", path.display(), tensor.name, tensor.shape);
        }
        let width: usize = tensor.shape[1..].iter().product();
        let mut at = 0;
        for item in items {
            let range = at * width..(at + item.patches.len()) * width;
            at += item.patches.len();
            item.patches.pixels = match &tensor.values {
                Values::U8(values) => Pixels::U8(values[range].to_vec()),
                Values::F32(values) => Pixels::F32(values[range].to_vec()),
                _ => bail!("{}: {} has type {}, expected U8 or F32", path.display(), tensor.name, tensor.dtype()),
            };
        }
    }
    Ok(())
}

fn prompt_tensors(prompt: &Prompt) -> Vec<Tensor> {
    let n = prompt.input_ids.len();
    let axes = (0..3).flat_map(|axis| prompt.positions.iter().map(move |position| i64::from(position[axis])));
    vec![
        Tensor::new("input_ids", &[n], Values::I64(prompt.input_ids.iter().map(|id| i64::from(*id)).collect())),
        Tensor::new("position_ids", &[3, n], Values::I64(axes.collect())),
        Tensor::new("rope_delta", &[1], Values::I64(vec![prompt.rope_delta])),
    ]
}

fn media_tensors(media: &[Media], processor: &Processor) -> Result<Vec<Tensor>> {
    let mut tensors = Vec::new();
    let config = &processor.media.processor;
    let side = config.patch_size as usize;
    for kind in [MediaKind::Image, MediaKind::Video] {
        let items: Vec<&Media> = media.iter().filter(|item| item.kind == kind).collect();
        if items.is_empty() {
            continue;
        }
        let [bytes_name, floats_name, grid_name] = names(kind);
        let patches: usize = items.iter().map(|item| item.patches.len()).sum();
        let shape = [patches, 3, side, side];
        let (mut bytes, mut floats) = (Vec::new(), Vec::new());
        for item in &items {
            match &item.patches.pixels {
                Pixels::U8(values) => {
                    bytes.extend_from_slice(values);
                    floats.extend(normalised(values, config));
                }
                Pixels::F32(values) => floats.extend_from_slice(values),
            }
        }
        let count: usize = shape.iter().product();
        // Patches that were fed as floats have no bytes.
        if bytes.len() == count {
            tensors.push(Tensor::new(bytes_name, &shape, Values::U8(bytes)));
        }
        if count < FLOAT_PIXELS {
            tensors.push(Tensor::new(floats_name, &shape, Values::F32(floats)));
        }
        let grids: Vec<i64> = items
            .iter()
            .flat_map(|item| grid_rows(item, processor.media.video.rule))
            .flatten()
            .map(i64::from)
            .collect();
        tensors.push(Tensor::new(grid_name, &[grids.len() / 3, 3], Values::I64(grids)));
    }
    let videos: Vec<&Media> = media.iter().filter(|item| item.kind == MediaKind::Video).collect();
    if videos.is_empty() {
        return Ok(tensors);
    }
    match processor.media.video.rule {
        VideoRule::WholeClip => {
            let seconds: Option<Vec<f32>> = videos.iter().map(|video| seconds_per_grid(video)).collect();
            let seconds = seconds.context("a video has no sampling rate")?;
            tensors.push(Tensor::new("second_per_grid_ts", &[seconds.len()], Values::F32(seconds)));
        }
        VideoRule::SlowFast | VideoRule::Adaptive => {
            let frames = videos.iter().map(|video| video.frames.len() as i64).collect();
            tensors.push(Tensor::new("num_frames", &[videos.len()], Values::I64(frames)));
            for (i, video) in videos.iter().enumerate() {
                let times: Option<Vec<f32>> = video.frames.iter().map(|frame| frame.timestamp).collect();
                if let Some(times) = times {
                    tensors.push(Tensor::new(format!("timestamps_{i}"), &[times.len()], Values::F32(times)));
                }
            }
        }
    }
    Ok(tensors)
}

/// Grid rows as the variant's processor has them: 2.0 gives every frame one of its own.
fn grid_rows(item: &Media, rule: VideoRule) -> Vec<[u32; 3]> {
    match rule {
        VideoRule::Adaptive => item.frame_grids().collect(),
        VideoRule::WholeClip | VideoRule::SlowFast => item.patches.grid_thw.clone(),
    }
}

/// Bytes as the image processor hands them on: rescaled, then mean and standard deviation, each step rounded to f32 (spec §10.1).
fn normalised<'a>(bytes: &'a [u8], config: &'a ProcessorConfig) -> impl Iterator<Item = f32> + 'a {
    let plane = (config.patch_size * config.patch_size) as usize;
    bytes.iter().enumerate().map(move |(i, byte)| {
        let channel = i / plane % 3;
        let value = match config.do_rescale {
            true => (f64::from(*byte) * config.rescale_factor) as f32,
            false => f32::from(*byte),
        };
        match config.do_normalize {
            true => (value - config.image_mean[channel]) / config.image_std[channel],
            false => value,
        }
    })
}

/// Keeps what the model shows: all of the media's tensors, of the decoder's those of the prompt.
struct Recorder {
    prompt_tokens: usize,
    tensors: BTreeMap<String, (usize, Vec<f32>)>,
}

const DECODER: [&str; 3] = ["inputs_embeds", "lm_layer0", "lm_final_norm"];

impl Recorder {
    /// Values that are still missing of a decoder's tensor; `None` for the media's.
    fn missing(&self, name: &str, cols: usize) -> Option<usize> {
        let have = self.tensors.get(name).map_or(0, |(_, values)| values.len());
        DECODER.contains(&name).then(|| (self.prompt_tokens * cols).saturating_sub(have))
    }
}

impl Tap for Recorder {
    fn wants(&self, name: &str) -> bool {
        let cols = self.tensors.get(name).map_or(1, |(cols, _)| *cols);
        self.missing(name, cols) != Some(0)
    }

    fn record(&mut self, name: &str, cols: usize, rows: &[f32]) {
        let most = self.missing(name, cols).unwrap_or(rows.len()).min(rows.len());
        let (_, values) = self.tensors.entry(name.to_owned()).or_insert_with(|| (cols, Vec::new()));
        values.extend_from_slice(&rows[..most]);
    }
}

fn computed_tensors(runner: &mut dyn Runner, media: &[Media], prompt: &Prompt, generate: usize) -> Result<Vec<Tensor>> {
    let mut recorder = Recorder { prompt_tokens: prompt.input_ids.len(), tensors: BTreeMap::new() };
    let trace = keye_engine::trace(runner, media, prompt, &mut recorder, generate)?;
    let mut tensors = Vec::new();
    let media_names = ["image_", "video_"]
        .iter()
        .flat_map(|kind| ["vit_embeddings", "vit_layer0", "vit_out", "projector"].map(|name| format!("{kind}{name}")));
    for name in media_names.chain(DECODER.map(str::to_owned)) {
        if let Some((cols, values)) = recorder.tensors.remove(&name) {
            tensors.push(Tensor::new(name, &[values.len() / cols, cols], Values::F32(values)));
        }
    }
    let rows = trace.prompt_logits.len();
    let logits: Vec<f32> = trace.prompt_logits.concat();
    tensors.push(Tensor::new("logits_last8", &[rows, logits.len() / rows.max(1)], Values::F32(logits)));
    let generated = trace.generated.iter().map(|id| i64::from(*id)).collect();
    tensors.push(Tensor::new("generated", &[trace.generated.len()], Values::I64(generated)));
    Ok(tensors)
}

/// A line a tensor; an error when whole numbers or shapes differ from the golden ones.
fn show(tensors: &[Tensor], golden: Option<&Golden>) -> Result<()> {
    let mut text = format!("{:<24} {:<5} {:<18} {:>12}", "tensor", "type", "shape", "rms");
    text += if golden.is_some() { "  difference\n" } else { "\n" };
    let mut wrong = Vec::new();
    for tensor in tensors {
        let shape = format!("{:?}", tensor.shape).replace(' ', "");
        text += &format!("{:<24} {:<5} {shape:<18} {:>12.6}", tensor.name, tensor.dtype().name(), tensor.rms());
        if let Some(golden) = golden {
            let difference = golden.compare(tensor)?;
            let whole = matches!(tensor.values, Values::I32(_) | Values::I64(_));
            if matches!(difference, Difference::Unlike(_)) || (whole && matches!(difference, Difference::Largest(_))) {
                wrong.push(tensor.name.clone());
            }
            text += &match difference {
                Difference::Absent => "  not in the file".into(),
                Difference::Equal => "  equal".into(),
                Difference::Largest(largest) => format!("  {largest:.3e}"),
                Difference::Unlike(how) => format!("  {how}"),
            };
        }
        text.push('\n');
    }
    for name in golden.iter().flat_map(|golden| golden.names()) {
        if !tensors.iter().any(|tensor| tensor.name == name) {
            text += &format!("{name:<24} only in the file compared with\n");
        }
    }
    ui::out(&text)?;
    match wrong.is_empty() {
        true => Ok(()),
        false => bail!("these differ from the file compared with: {}", wrong.join(", ")),
    }
}

//! A sample to tokens, patches and targets.

use std::sync::Arc;

use keye_media::{ItemOptions, Loader, Media, MediaConfig, MediaError, MediaItem, MediaKind, Pixels, RgbClip};
use keye_processor::{Processor, ProcessorError, TemplateOptions};

use super::config::Targets;
use super::example::{Body, Example, Visual};
use super::mask::{completion_mask, conversation_mask};
use crate::{Pack, TrainError};

/// Most tokens of a caption in contrastive training (§2.2).
const CAPTION_TOKENS: usize = 64;
/// A sample that is too long is processed again with limits this much smaller (§3.5).
const SHRINK: f64 = 0.7;
/// How often.
const SHRINKS: u32 = 10;
/// What ends a training text (§1.1).
const END: &str = "<|endoftext|>";

/// Makes samples ready, by the rules of one checkpoint directory.
pub struct Encoder {
    processor: Arc<Processor>,
    loader: Loader,
    targets: Targets,
}

/// A sample, ready.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// A pack of this sample alone.
    pub pack: Pack,
    /// First token and end of each image or frame, in the order of `pack.grids`.
    pub spans: Vec<[usize; 2]>,
}

impl Encoder {
    /// By the tokenizer, template and media rules of `processor`; records may name local files.
    pub fn new(processor: Arc<Processor>) -> Self {
        let loader = Loader::new(processor.media.clone());
        Self { processor, loader, targets: Targets::Answers }
    }

    /// Learns these tokens of conversations.
    pub fn with_targets(self, targets: Targets) -> Self {
        Self { targets, ..self }
    }

    /// Tokens, positions, patches and targets of a sample of at most `max_tokens`; `None` when it stays too long however
    /// small its pictures, or has nothing to learn.
    ///
    /// # Errors
    /// Media that cannot be read; messages that the template refuses. [`TrainError::NoSize`]: a picture that can be read, but not
    /// resized within the limits.
    pub fn encode(&self, example: &Example, max_tokens: usize) -> Result<Option<Encoded>, TrainError> {
        let mut encoded = self.encode_with(example, &self.loader, 1.0)?;
        let mut shrunk: f64 = 1.0;
        for _ in 0..SHRINKS {
            if encoded.pack.len() <= max_tokens || example.media.is_empty() {
                break;
            }
            shrunk *= SHRINK;
            let loader = Loader { config: smaller(&self.loader.config, shrunk), ..self.loader.clone() };
            encoded = self.encode_with(example, &loader, shrunk)?;
        }
        let useful = matches!(example.body, Body::Caption(_)) || encoded.pack.targets() > 0;
        Ok((encoded.pack.len() <= max_tokens && useful).then_some(encoded))
    }

    /// With options whose limits are `factor` times as large as those of the example.
    fn encode_with(&self, example: &Example, loader: &Loader, factor: f64) -> Result<Encoded, TrainError> {
        let of_sample = |reason: String| TrainError::Data(format!("{}: {reason}", example.uuid));
        let of_rules = |error: ProcessorError| of_sample(error.to_string());
        let media = example.media.iter().map(|visual| {
            load(loader, &example.uuid, visual, factor).map_err(|error| {
                let reason = format!("{}: {error}", example.uuid);
                match is_of_sides(&error, loader, visual) {
                    true => TrainError::NoSize(reason),
                    false => TrainError::Data(reason),
                }
            })
        });
        let media = media.collect::<Result<Vec<Media>, _>>()?;
        let borrowed: Vec<&Media> = media.iter().collect();
        let tokenizer = &self.processor.tokenizer;
        // The answer is in the messages: no header of one to come.
        let whole = TemplateOptions { add_generation_prompt: false, ..TemplateOptions::default() };

        let (ids, positions, loss_mask, spans) = match &example.body {
            Body::Caption(text) => {
                let mut ids = tokenizer.encode(text)?;
                ids.truncate(CAPTION_TOKENS);
                let positions = (0..ids.len() as u32).map(|at| [at; 3]).collect();
                let mask = vec![false; ids.len()];
                (ids, positions, mask, Vec::new())
            }
            Body::Messages(messages) => {
                let text = self.processor.template.render(messages, &whole).map_err(of_rules)?;
                let prompt = self.processor.raw_prompt(text + END, &borrowed).map_err(of_rules)?;
                let mask = match self.targets {
                    Targets::Answers => conversation_mask(&prompt.input_ids, tokenizer)?,
                    Targets::Text => completion_mask(&prompt.input_ids, tokenizer)?,
                };
                (prompt.input_ids, prompt.positions, mask, prompt.features)
            }
            Body::Segments(parts) => {
                let text: String = parts
                    .iter()
                    .map(|part| match part["type"].as_str() {
                        Some("image") => "<|vision_start|><|image_pad|><|vision_end|>",
                        Some("video") => "<|vision_start|><|video_pad|><|vision_end|>",
                        _ => part["text"].as_str().unwrap_or_default(),
                    })
                    .collect();
                let prompt = self.processor.raw_prompt(text + END, &borrowed).map_err(of_rules)?;
                let mask = completion_mask(&prompt.input_ids, tokenizer)?;
                (prompt.input_ids, prompt.positions, mask, prompt.features)
            }
        };
        if ids.is_empty() {
            return Err(of_sample("it has no text".into()));
        }
        let mut pack = Pack { cu_seqlens: vec![0, ids.len() as u32], ids, loss_mask, positions, ..Pack::default() };
        for item in &media {
            pack.grids.extend(item.frame_grids().map(|[_, h, w]| [h, w]));
            match &item.patches.pixels {
                Pixels::U8(bytes) => pack.patches.extend(bytes),
                Pixels::F32(_) => return Err(of_sample("its pixels are floats, expected bytes".into())),
            }
        }
        let spans = spans.iter().map(|span| [span.start, span.start + span.len]).collect();
        pack.check()?;
        Ok(Encoded { pack, spans })
    }
}

impl Encoded {
    /// The beginning of the sample, at most `tokens` long: a picture is kept whole or left out with all that follows.
    /// `None` when nothing to learn is left.
    pub fn cut(&self, tokens: usize) -> Option<Pack> {
        let torn = self.spans.iter().find(|[start, end]| *start < tokens && *end > tokens);
        let end = torn.map_or(tokens, |[start, _]| *start).min(self.pack.len());
        let grids: Vec<[u32; 2]> =
            self.pack.grids.iter().zip(&self.spans).filter(|(_, span)| span[1] <= end).map(|(grid, _)| *grid).collect();
        let patches: usize = grids.iter().map(|[h, w]| (h * w) as usize * crate::PATCH_VALUES).sum();
        let pack = Pack {
            ids: self.pack.ids[..end].to_vec(),
            loss_mask: self.pack.loss_mask[..end].to_vec(),
            positions: self.pack.positions[..end].to_vec(),
            cu_seqlens: vec![0, end as u32],
            patches: self.pack.patches[..patches].to_vec(),
            grids,
        };
        (pack.targets() > 0).then_some(pack)
    }
}

/// Limits of pictures, frames and clips times `factor`.
fn smaller(config: &MediaConfig, factor: f64) -> MediaConfig {
    let mut config = config.clone();
    let scaled = |pixels: u64, least: u64| ((pixels as f64 * factor) as u64).max(least);
    config.image.max_pixels = scaled(config.image.max_pixels, config.image.min_pixels);
    config.processor.max_pixels = scaled(config.processor.max_pixels, config.processor.min_pixels);
    config.video.max_pixels = scaled(config.video.max_pixels, config.video.min_pixels);
    config.video.total_pixels = scaled(config.video.total_pixels, config.video.min_pixels);
    config
}

/// The same for what an item asks for itself.
fn smaller_item(options: &ItemOptions, factor: f64) -> ItemOptions {
    let least = options.min_pixels.unwrap_or(0);
    let scaled = |pixels: Option<u64>| pixels.map(|pixels| ((pixels as f64 * factor) as u64).max(least));
    ItemOptions {
        max_pixels: scaled(options.max_pixels),
        total_pixels: scaled(options.total_pixels),
        video_total_pixels: scaled(options.video_total_pixels),
        ..options.clone()
    }
}

fn load(loader: &Loader, name: &str, visual: &Visual, factor: f64) -> Result<Media, MediaError> {
    match visual {
        Visual::World(MediaKind::Image, clip, options) => {
            let size = (clip.height(), clip.width());
            loader.load_rgb(name, size, clip.frame(0), &smaller_item(options, factor))
        }
        Visual::World(MediaKind::Video, clip, options) => {
            let mut frame = |index: u64| clip.frame(index as u32);
            let (height, width, frames) = (clip.height(), clip.width(), u64::from(clip.len()));
            let mut clip = RgbClip { name, height, width, fps: clip.fps(), frames, frame: &mut frame };
            loader.load_frames(&mut clip, &smaller_item(options, factor))
        }
        Visual::Item(item) => {
            let options = smaller_item(&item.options, factor);
            loader.load(&MediaItem { options, ..(**item).clone() }, &mut |_| true)
        }
    }
}

/// Whether a picture could not be loaded for its sides alone: it can at a size that does not depend on them.
fn is_of_sides(error: &MediaError, loader: &Loader, visual: &Visual) -> bool {
    /// A side that every model's patches divide.
    const SIDE: u32 = 28;
    let (MediaError::Unreadable { .. }, MediaKind::Image) = (error, visual.kind()) else { return false };
    // What is rendered here can always be read.
    let Visual::Item(item) = visual else { return true };
    let mut loader = loader.clone();
    let pixels = u64::from(SIDE * SIDE);
    (loader.config.image.min_pixels, loader.config.image.max_pixels) = (pixels, pixels);
    loader.config.processor.do_resize = false;
    let options = ItemOptions { resized_height: Some(SIDE), resized_width: Some(SIDE), ..ItemOptions::default() };
    loader.load(&MediaItem { options, ..(**item).clone() }, &mut |_| true).is_ok()
}

//! A checkpoint's text side, loaded once.

use keye_media::{Media, MediaConfig, VideoRule};

use crate::expand::Expander;
use crate::files::file_error;
use crate::positions::{positions, sequential_positions};
use crate::preprocessor_config;
use crate::{
    ChatTemplate, CheckpointFiles, Conversation, FeatureSpan, FramePrefix, GenerationConfig, ModelConfig, PositionRule,
    ProcessorError, TemplateOptions, Tokenizer,
};

/// What the caller wants other than the checkpoint's files say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overrides {
    /// `min_pixels` of preprocessor_config.json.
    pub processor_min_pixels: Option<u64>,
    /// `max_pixels` of preprocessor_config.json: the cap of every still picture.
    pub processor_max_pixels: Option<u64>,
    /// What is written before each frame of a clip (2.0).
    pub frame_prefix: Option<FramePrefix>,
    /// Shares of the clip budget by length, [`keye_media::VideoConfig::budget_shares`] (2.0).
    pub budget_shares: Option<&'static [(f64, f64)]>,
}

/// What the model is given.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// The rendered template, before expansion.
    pub text: String,
    /// Token ids, expanded. `[n]`
    pub input_ids: Vec<u32>,
    /// Positions (time, row, column) of each token. `[n]`
    pub positions: Vec<[u32; 3]>,
    /// Position of generated token k is `n + k + rope_delta` on all axes.
    pub rope_delta: i64,
    /// Which tokens take media features, in token order.
    pub features: Vec<FeatureSpan>,
}

/// Config, tokenizer, template and media rules of one checkpoint.
pub struct Processor {
    /// config.json.
    pub config: ModelConfig,
    /// generation_config.json, or its defaults; its end tokens are config.json's where it has none.
    pub generation: GenerationConfig,
    /// Media rules: the variant's, then preprocessor_config.json, then the overrides.
    pub media: MediaConfig,
    /// Tokenizer, padded to the model's vocabulary.
    pub tokenizer: Tokenizer,
    /// The chat template.
    pub template: ChatTemplate,
    expander: Expander,
}

impl Processor {
    /// Reads the files of a checkpoint; weights are not touched.
    pub fn load(from: impl Into<CheckpointFiles>, overrides: &Overrides) -> Result<Self, ProcessorError> {
        let files = &from.into();
        let config = ModelConfig::load(files)?;
        let mut generation = GenerationConfig::load(files, config.text.vocab_size)?;
        if generation.eos_token_id.is_empty() {
            generation.eos_token_id.clone_from(&config.eos_token_id);
        }
        let media = media_config(files, &config, overrides)?;
        // Every vocabulary that `config` accepts fits 32 bits.
        let tokenizer = Tokenizer::load(files)?.padded_to(config.text.vocab_size as u32);
        if tokenizer.vocab_size() > config.text.vocab_size {
            let (have, found) = (config.text.vocab_size, tokenizer.vocab_size());
            let reason = format!("vocab_size: expected at least the {found} ids of the tokenizer, found {have}");
            return Err(file_error(&files.path("config.json"), reason));
        }
        let template = ChatTemplate::load(files, config.variant)?;
        let expander = Expander::new(&config, &tokenizer, media.processor.merge_size, overrides.frame_prefix.as_ref())?;
        Ok(Self { config, generation, media, tokenizer, template, expander })
    }

    /// Renders, expands and tokenises a conversation whose media have been processed, in order.
    pub fn prompt(
        &self,
        conversation: &Conversation,
        media: &[&Media],
        options: &TemplateOptions,
    ) -> Result<Prompt, ProcessorError> {
        let wanted = conversation.media();
        if wanted.len() != media.len() || wanted.iter().zip(media).any(|(item, media)| item.kind != media.kind) {
            let reason =
                format!("expected the {} media of the conversation in order, found {}", wanted.len(), media.len());
            return Err(ProcessorError::Prompt(reason));
        }
        self.raw_prompt(self.template.render(conversation.messages(), options)?, media)
    }

    /// Expands and tokenises a text as it is, without the chat template.
    pub fn raw_prompt(&self, text: String, media: &[&Media]) -> Result<Prompt, ProcessorError> {
        let (input_ids, blocks) = self.expander.expand(&text, media, &self.tokenizer)?;
        let (positions, rope_delta) = match self.config.facts().positions {
            PositionRule::ThreeAxis => positions(input_ids.len(), &blocks, self.config.vision.tokens_per_second)?,
            PositionRule::Sequential => sequential_positions(input_ids.len())?,
        };
        let features = blocks.into_iter().map(|block| block.span).collect();
        Ok(Prompt { text, input_ids, positions, rope_delta, features })
    }
}

/// The variant's rules, then preprocessor_config.json, then the overrides.
fn media_config(
    files: &CheckpointFiles,
    config: &ModelConfig,
    overrides: &Overrides,
) -> Result<MediaConfig, ProcessorError> {
    let variant = config.facts().media;
    let (mut processor, video) = preprocessor_config::load(files, variant.video)?;
    let path = files.path(preprocessor_config::FILE);
    for (name, found, vision) in [
        ("patch_size", processor.patch_size, config.vision.patch_size),
        ("merge_size", processor.merge_size, config.vision.spatial_merge_size),
    ] {
        if found as usize != vision {
            let reason = format!("{name}: expected {vision} as config.json's vision_config says, found {found}");
            return Err(file_error(&path, reason));
        }
    }
    processor.min_pixels = overrides.processor_min_pixels.unwrap_or(processor.min_pixels);
    processor.max_pixels = overrides.processor_max_pixels.unwrap_or(processor.max_pixels);
    if processor.min_pixels == 0 || processor.min_pixels > processor.max_pixels {
        let found = format!("{} and {}", processor.min_pixels, processor.max_pixels);
        let reason = format!("processor min_pixels and max_pixels: expected 1 or more, in rising order, found {found}");
        return Err(file_error(&path, reason));
    }
    let mut media = MediaConfig { processor, video, ..variant };
    if let Some(shares) = overrides.budget_shares {
        if media.video.rule != VideoRule::Adaptive {
            let reason = format!("shares of the video budget are for Keye-VL-2.0, this is a {}", config.architecture);
            return Err(ProcessorError::Prompt(reason));
        }
        media.video.budget_shares = shares;
    }
    Ok(media)
}

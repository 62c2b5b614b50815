//! A checkpoint's text side, loaded once.

use std::path::Path;

use keye_media::{Media, MediaConfig};

use crate::{
    ChatTemplate, Conversation, FeatureSpan, GenerationConfig, ModelConfig, ProcessorError, TemplateOptions, Tokenizer,
};

/// What the caller wants other than the checkpoint's files say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overrides {
    /// `min_pixels` of preprocessor_config.json.
    pub processor_min_pixels: Option<u64>,
    /// `max_pixels` of preprocessor_config.json: the cap of every still picture.
    pub processor_max_pixels: Option<u64>,
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
    /// generation_config.json, or its defaults.
    pub generation: GenerationConfig,
    /// Media rules: the variant's, then preprocessor_config.json, then the overrides.
    pub media: MediaConfig,
    /// tokenizer.json.
    pub tokenizer: Tokenizer,
    /// The chat template.
    pub template: ChatTemplate,
}

impl Processor {
    /// Reads the files of a checkpoint directory; weights are not touched.
    pub fn load(dir: &Path, overrides: &Overrides) -> Result<Self, ProcessorError> {
        let _ = (dir, overrides);
        Err(ProcessorError::Prompt("not loaded".into()))
    }

    /// Renders, expands and tokenises a conversation whose media have been processed, in order.
    pub fn prompt(
        &self,
        conversation: &Conversation,
        media: &[&Media],
        options: &TemplateOptions,
    ) -> Result<Prompt, ProcessorError> {
        let _ = (conversation, media, options);
        Err(ProcessorError::Prompt("not loaded".into()))
    }
}

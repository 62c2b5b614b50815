//! What the engine is asked.

use keye_processor::{Conversation, TemplateOptions, ThinkMode};

use crate::SamplingParams;

/// One question.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Messages and media.
    pub conversation: Conversation,
    /// Instead of the messages: a prompt that is taken as it is, without chat template and thinking suffix.
    pub raw_prompt: Option<String>,
    /// How tokens are chosen and when to stop.
    pub sampling: SamplingParams,
    /// Suffix on the last user text.
    pub think: ThinkMode,
    /// Variables of the chat template.
    pub template: TemplateOptions,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// Its media.
    #[error(transparent)]
    Media(#[from] keye_media::MediaError),
    /// Its messages or prompt.
    #[error(transparent)]
    Processor(#[from] keye_processor::ProcessorError),
    /// The model.
    #[error(transparent)]
    Model(#[from] keye_model::ModelError),
    /// As many requests wait as may; try again later.
    #[error("{0} requests are waiting, no more are taken; try again later")]
    QueueFull(usize),
    /// It cannot be run with these limits.
    #[error("{0}")]
    Refused(String),
    /// The caller gave up.
    #[error("cancelled")]
    Cancelled,
    /// A defect: a panic, or an answer of the model that breaks its contract. Only this request is lost.
    #[error("internal error: {0}")]
    Internal(String),
    /// The engine is shutting down or its thread is gone.
    #[error("the engine has stopped")]
    Stopped,
}

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
    /// What the answer has to look like; its thinking, if there is any, is free.
    pub grammar: Option<Grammar>,
    /// With every token its log probability and those of the most likely ones, as many as given (at most
    /// [`MAX_LOGPROBS`]).
    pub logprobs: Option<usize>,
    /// Tokens of thinking after which it is closed by force.
    pub max_reasoning_tokens: Option<usize>,
}

/// Most likely tokens whose log probabilities a request may ask for.
pub const MAX_LOGPROBS: usize = 20;

/// The form of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema(serde_json::Value),
    /// Text that a regular expression matches as a whole.
    Regex(String),
    /// One of some texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's variant of Lark.
    Lark(String),
}

/// How the hidden states of a prompt's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pooling {
    /// The last token's, which alone has seen all others.
    #[default]
    Last,
    /// The mean over all tokens, media included.
    Mean,
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
    /// The prompt leaves no room for an answer.
    #[error(
        "the prompt has {tokens} tokens, prompt and answer may have {max} together; shorten it, or give its media fewer \
         frames or pixels"
    )]
    ContextLength {
        /// Tokens of the prompt.
        tokens: usize,
        /// Most tokens of prompt and answer together.
        max: usize,
    },
    /// A grammar that cannot be compiled, or that no answer can satisfy.
    #[error("grammar: {0}")]
    Grammar(String),
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

impl EngineError {
    /// The same for another answer to the same request: what holds a source that cannot be copied is told by its text.
    pub(crate) fn again(&self) -> Self {
        use keye_media::MediaError;
        match self {
            Self::QueueFull(n) => Self::QueueFull(*n),
            Self::ContextLength { tokens, max } => Self::ContextLength { tokens: *tokens, max: *max },
            Self::Grammar(reason) => Self::Grammar(reason.clone()),
            Self::Cancelled => Self::Cancelled,
            Self::Stopped => Self::Stopped,
            Self::Internal(reason) => Self::Internal(reason.clone()),
            Self::Model(_) | Self::Media(MediaError::Ffmpeg(_) | MediaError::Temporary { .. }) => {
                Self::Internal(self.to_string())
            }
            Self::Refused(_) | Self::Media(_) | Self::Processor(_) => Self::Refused(self.to_string()),
        }
    }
}

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

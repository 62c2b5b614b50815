//! The checkpoint's chat template (Jinja), rendered like transformers does.

use serde_json::Value;

/// Variables of a rendering.
#[derive(Debug, Clone, PartialEq)]
pub struct TemplateOptions {
    /// End with `<|im_start|>assistant\n`.
    pub add_generation_prompt: bool,
    /// Number pictures and videos.
    pub add_vision_id: bool,
    /// Tool definitions, for templates that take them.
    pub tools: Option<Value>,
    /// Further variables (`chat_template_kwargs`).
    pub extra: serde_json::Map<String, Value>,
}

impl Default for TemplateOptions {
    fn default() -> Self {
        Self { add_generation_prompt: true, add_vision_id: false, tools: None, extra: serde_json::Map::new() }
    }
}

/// A compiled template.
pub struct ChatTemplate {}

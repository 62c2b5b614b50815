//! Media placeholders of a rendered prompt become runs of pad tokens (spec §8.3).

/// Where rows of media features go: `len` tokens from `start` on take the feature rows from `row` on of media `media`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureSpan {
    /// Index into the conversation's media.
    pub media: usize,
    /// First token.
    pub start: usize,
    /// Tokens.
    pub len: usize,
    /// First feature row.
    pub row: usize,
}

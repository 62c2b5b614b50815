//! generation_config.json: the checkpoint's sampling defaults.

/// Defaults of a checkpoint; `None` where the file says nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// False means greedy.
    pub do_sample: bool,
    /// Temperature.
    pub temperature: Option<f32>,
    /// Top-k; 0 is off.
    pub top_k: Option<u32>,
    /// Top-p; 1 is off.
    pub top_p: Option<f32>,
    /// Min-p.
    pub min_p: Option<f32>,
    /// Repetition penalty; 1 is off.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end an answer, any of them.
    pub eos_token_id: Vec<u32>,
}

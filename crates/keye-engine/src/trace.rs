//! One request step by step, watched: for comparing a checkpoint's numbers with recorded ones.

use keye_media::Media;
use keye_model::{Batch, Chunk, FeatureId, FeatureRows, LogitRows, ModelError, Runner, Tap};
use keye_processor::Prompt;

use crate::{EngineError, SamplingParams, sample};

/// What a traced run gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trace {
    /// Greedy tokens; end tokens do not end them.
    pub generated: Vec<u32>,
    /// Index of the prompt token that the first row of `prompt_logits` belongs to.
    pub first_row: usize,
    /// Logits of the prompt's last tokens, at most 8 rows of `vocab_size` values.
    pub prompt_logits: Vec<Vec<f32>>,
    /// Logits that each of `generated` was chosen from.
    pub step_logits: Vec<Vec<f32>>,
}

/// Encodes the media, runs the whole prompt in one step and `generate` greedy steps, with `tap` watching all of it. Nobody
/// else may use the runner: its blocks are taken from the first on.
///
/// # Errors
///
/// [`EngineError::Refused`] when the runner's blocks cannot hold prompt and answer, else what the model says.
pub fn trace(
    runner: &mut dyn Runner,
    media: &[Media],
    prompt: &Prompt,
    tap: &mut dyn Tap,
    generate: usize,
) -> Result<Trace, EngineError> {
    let mut features = Vec::new();
    let trace = encode_and_run(runner, media, prompt, tap, generate, &mut features);
    features.into_iter().for_each(|feature| runner.release(feature));
    trace
}

fn encode_and_run(
    runner: &mut dyn Runner,
    media: &[Media],
    prompt: &Prompt,
    tap: &mut dyn Tap,
    generate: usize,
    features: &mut Vec<FeatureId>,
) -> Result<Trace, EngineError> {
    let tokens = prompt.input_ids.len();
    let info = runner.info().clone();
    let blocks = (tokens + generate).div_ceil(info.block_tokens.max(1));
    if tokens == 0 || blocks > info.num_blocks {
        let (found, limit) = (tokens + generate, info.num_blocks * info.block_tokens);
        return Err(EngineError::Refused(format!("prompt and answer have {found} tokens, the cache holds {limit}")));
    }
    for item in media {
        features.push(runner.encode(item.kind, &item.patches, tap, &mut |_, _| true)?);
    }
    let mut rows = Vec::new();
    for span in &prompt.features {
        let feature = *features.get(span.media).ok_or_else(|| {
            EngineError::Refused(format!("the prompt mentions media {}, there are {}", span.media, media.len()))
        })?;
        rows.push(FeatureRows { at: span.start, feature, row: span.row, len: span.len });
    }
    let block_table: Vec<u32> = (0..blocks as u32).collect();
    let first_row = tokens.saturating_sub(8);
    let mut chunk = Chunk {
        tokens: prompt.input_ids.clone(),
        start: 0,
        positions: prompt.positions.clone(),
        features: rows,
        block_table: block_table.clone(),
        logits: LogitRows::Range(first_row..tokens),
    };
    let mut trace = Trace { first_row, ..Trace::default() };
    loop {
        let wanted = if chunk.start == 0 { tokens - first_row } else { 1 };
        let mut outputs = runner.step(&Batch { chunks: vec![chunk] }, tap)?;
        let logits = outputs.logits.pop().unwrap_or_default();
        if logits.len() != wanted * info.vocab_size {
            return Err(
                ModelError::Batch(format!("asked for {wanted} rows of logits, got {} values", logits.len())).into()
            );
        }
        let rows: Vec<Vec<f32>> = logits.chunks_exact(info.vocab_size).map(<[f32]>::to_vec).collect();
        let last = rows[wanted - 1].clone();
        if trace.prompt_logits.is_empty() {
            trace.prompt_logits = rows;
        }
        if trace.generated.len() == generate {
            return Ok(trace);
        }
        let token = sample(&mut last.clone(), &SamplingParams::default(), &[], &[], 0);
        trace.generated.push(token);
        trace.step_logits.push(last);
        if trace.generated.len() == generate {
            return Ok(trace);
        }
        let index = tokens + trace.generated.len() - 1;
        chunk = Chunk {
            tokens: vec![token],
            start: index,
            positions: vec![[(index as i64 + prompt.rope_delta) as u32; 3]],
            features: Vec::new(),
            block_table: block_table.clone(),
            logits: LogitRows::Last,
        };
    }
}

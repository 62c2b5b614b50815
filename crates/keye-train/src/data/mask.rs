//! Which tokens carry loss (`docs/spec/training.md` §1.5).

use keye_processor::{ProcessorError, Tokenizer};

/// Targets of a conversation: what stands between `<|im_start|>assistant\n` and the end of `<|im_end|>\n`, the latter
/// included. `[n]`
///
/// # Errors
/// A tokenizer that cannot encode the marks.
pub fn conversation_mask(ids: &[u32], tokenizer: &Tokenizer) -> Result<Vec<bool>, ProcessorError> {
    let opening = tokenizer.encode("<|im_start|>assistant\n")?;
    let closing = tokenizer.encode("<|im_end|>\n")?;
    let mut mask = vec![false; ids.len()];
    let mut at = 0;
    while at < ids.len() {
        if !ids[at..].starts_with(&opening) {
            at += 1;
            continue;
        }
        at += opening.len();
        while at < ids.len() && !ids[at..].starts_with(&closing) {
            mask[at] = true;
            at += 1;
        }
        let end = (at + closing.len()).min(ids.len());
        mask[at..end].fill(true);
        at = end;
    }
    Ok(mask)
}

/// Targets of a document: every token but the first, which nothing predicts, what stands between `<|vision_start|>` and
/// `<|vision_end|>` with these two, and the last. `[n]`
///
/// # Errors
/// A tokenizer that cannot encode the marks.
pub fn completion_mask(ids: &[u32], tokenizer: &Tokenizer) -> Result<Vec<bool>, ProcessorError> {
    let [start, end] = ["<|vision_start|>", "<|vision_end|>"].map(|mark| tokenizer.encode(mark));
    let (start, end) = (start?, end?);
    let mut inside = false;
    let mut mask: Vec<bool> = ids
        .iter()
        .map(|id| {
            inside |= start.contains(id);
            let carries = !inside;
            inside &= !end.contains(id);
            carries
        })
        .collect();
    for edge in [mask.len().checked_sub(1), (!mask.is_empty()).then_some(0)].into_iter().flatten() {
        mask[edge] = false;
    }
    Ok(mask)
}

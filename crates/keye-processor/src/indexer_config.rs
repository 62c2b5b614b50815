//! Sparse attention in config.json, and what of it is chosen when a model is loaded.

use crate::config::{MAX_HEADS, MAX_POSITIONS};
use crate::files::Fields;
use crate::{ModelConfig, ProcessorError};

/// Sparse attention (2.0, spec §7): which keys a query attends to is chosen by an indexer of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexerConfig {
    /// Query heads of the indexer; it has one key head.
    pub num_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Keys that a query attends to.
    pub topk: usize,
    /// Frequencies that turn by time, row and column; they sum to `head_dim / 2`.
    pub mrope_section: [usize; 3],
    /// Numbers that scores are made of; not in the file, [`IndexScorer::F32`] until it is chosen.
    pub scorer: IndexScorer,
}

/// Numbers that an indexer's scores are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IndexScorer {
    /// Queries and keys as they are.
    #[default]
    F32,
    /// Their Hadamard transforms in 8-bit floats, as the official server has them (spec §7.3).
    Fp8,
}

/// Which keys a model with an indexer attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionKind {
    /// Those that its indexer chooses.
    Sparse,
    /// All, with the same weights.
    Dense,
}

impl ModelConfig {
    /// Chooses how a model with an indexer attends; `None` leaves that as it is.
    ///
    /// # Errors
    /// A choice that the model does not leave.
    pub fn choose_attention(
        &mut self,
        kind: Option<AttentionKind>,
        scorer: Option<IndexScorer>,
    ) -> Result<(), ProcessorError> {
        let wrong = |reason| Err(ProcessorError::Attention { reason });
        if kind == Some(AttentionKind::Dense) {
            if scorer.is_some() {
                return wrong("a scorer chooses the keys of sparse attention (dsa), and dense was asked for");
            }
            self.text.indexer = None;
        }
        match &mut self.text.indexer {
            Some(indexer) => indexer.scorer = scorer.unwrap_or(indexer.scorer),
            None if kind == Some(AttentionKind::Sparse) || scorer.is_some() => {
                return wrong(
                    "this checkpoint has no indexer for sparse attention (dsa) and its scorer; leave them out",
                );
            }
            None => {}
        }
        Ok(())
    }
}

/// `sa_config` (spec of 2.0, §2.1), among the decoder's fields or at the top; without it attention is dense.
pub(crate) fn indexer(
    top: &Fields,
    text: &Fields,
    head_dim: usize,
    mrope_section: [usize; 3],
) -> Result<Option<IndexerConfig>, ProcessorError> {
    let fields = match text.object("sa_config")? {
        Some(fields) => Some(fields),
        None => top.object("sa_config")?,
    };
    let Some(fields) = fields else { return Ok(None) };
    let num_heads = fields.size("indexer_num_heads", 128, Some(4))?;
    if !128usize.is_multiple_of(num_heads) {
        return Err(fields.error("indexer_num_heads", format_args!("expected a divisor of 128, found {num_heads}")));
    }
    let width = fields.size("indexer_head_dim", 128, Some(128))?;
    if ![32, 64, 128].contains(&width) {
        return Err(fields.error("indexer_head_dim", format_args!("expected 32, 64 or 128, found {width}")));
    }
    if fields.size("indexer_num_kv_heads", MAX_HEADS, Some(1))? != 1 {
        return Err(fields.error("indexer_num_kv_heads", "expected 1: the indexer has one key head"));
    }
    let section = mrope_section.map(|n| n * width / head_dim);
    if 2 * section.iter().sum::<usize>() != width {
        let reason = format!("mrope_section {mrope_section:?} of heads {head_dim} wide gives {section:?} for {width}");
        return Err(fields.error("indexer_head_dim", reason));
    }
    let topk = fields.size("topk", MAX_POSITIONS, Some(2048))?;
    Ok(Some(IndexerConfig { num_heads, head_dim: width, topk, mrope_section: section, scorer: IndexScorer::F32 }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::config::tests::load;

    #[test]
    fn an_indexer_beside_a_nested_decoder_is_found() {
        let text = json!({
            "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 128,
            "vocab_size": 200_000, "sa_config": {"indexer_head_dim": 64, "indexer_num_heads": 8, "topk": 100}
        });
        let vision = json!({
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2
        });
        let inside = json!({
            "architectures": ["KeyeVL2ForConditionalGeneration"], "text_config": text, "vision_config": vision
        });
        let mut beside = inside.clone();
        beside["sa_config"] = beside["text_config"]["sa_config"].take();
        let found = load(&inside).unwrap();
        assert_eq!(found.text.indexer.map(|indexer| (indexer.num_heads, indexer.topk)), Some((8, 100)));
        assert_eq!(load(&beside).unwrap(), found);
        let mut both = inside.clone();
        both["sa_config"] = json!({"topk": 7});
        assert_eq!(load(&both).unwrap(), found, "the decoder's own counts");
        beside["sa_config"] = json!({"topk": 0});
        let error = load(&beside).unwrap_err().to_string();
        assert!(error.contains("sa_config.topk"), "{error}");
        beside["sa_config"].take();
        assert_eq!(load(&beside).unwrap().text.indexer, None);
    }
}

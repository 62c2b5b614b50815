//! One model on several devices, the ranks: which part of the decoder each has, and where they meet.
//!
//! Every rank has all rows of a step. It computes the columns of q, k, v, gate and up of its own heads and widths, and the
//! products with the matching inputs of o and down; what these add to a row is summed over the ranks, twice a layer.
//! Norms, the router, the indexer and the narrow projections of latent attention are small and computed by every rank.

use std::ops::Range;
use std::sync::Arc;

use keye_backend::{Backend, BackendError, CacheSpec, Collective, KvDtype, WeightSource};
use keye_processor::TextConfig;

use crate::ModelError;

/// One of equal parts of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
}

impl Shard {
    /// All of it.
    pub(crate) const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// This part of `0..n`, cut at multiples of `unit`; empty when there are fewer units than parts.
    pub(crate) fn of(self, n: usize, unit: usize) -> Range<usize> {
        let units = n.div_ceil(unit);
        let cut = |rank: usize| (units * rank / self.ranks * unit).min(n);
        cut(self.rank)..cut(self.rank + 1)
    }

    /// Its query heads.
    pub(crate) fn heads(self, config: &TextConfig) -> Range<usize> {
        self.of(config.num_attention_heads, 1)
    }

    /// Its key/value heads: when there are fewer than parts, one that it shares with its neighbours.
    pub(crate) fn kv_heads(self, config: &TextConfig) -> Range<usize> {
        let heads = config.num_key_value_heads;
        if heads >= self.ranks {
            return self.of(heads, 1);
        }
        let head = self.rank * heads / self.ranks;
        head..head + 1
    }

    /// Its experts, whole ones.
    pub(crate) fn experts(self, count: usize) -> Range<usize> {
        self.of(count, 1)
    }

    /// Its part of a dimension that the rows of `rows` and the columns of `columns` have in common.
    pub(crate) fn common(
        self,
        n: usize,
        rows: &[&WeightSource],
        columns: &[&WeightSource],
    ) -> Result<Range<usize>, BackendError> {
        if self == Self::WHOLE {
            return Ok(0..n);
        }
        let units = rows.iter().map(|w| w.row_unit()).chain(columns.iter().map(|w| w.column_unit()));
        let unit = units.max().unwrap_or(1);
        let part = self.of(n, unit);
        if part.is_empty() {
            let name = rows.iter().chain(columns).next().map(|w| w.name.clone()).unwrap_or_default();
            let reason = format!("{n} in units of {unit} are too few for {} ranks", self.ranks);
            return Err(BackendError::Weight { name, reason });
        }
        Ok(part)
    }
}

/// Says what does not divide among `ranks`.
pub(crate) fn check(config: &TextConfig, ranks: usize) -> Result<(), ModelError> {
    let divides = |ranks: usize| {
        let (heads, kv) = (config.num_attention_heads, config.num_key_value_heads);
        let experts = config.experts.map_or(0, |experts| experts.num_experts);
        if !heads.is_multiple_of(ranks) {
            return Err(format!("{heads} query heads do not divide"));
        }
        if config.latent.is_none() && !kv.is_multiple_of(ranks) && !ranks.is_multiple_of(kv) {
            return Err(format!("{kv} key/value heads neither divide nor are a part of as many"));
        }
        if !experts.is_multiple_of(ranks) {
            return Err(format!("{experts} experts do not divide"));
        }
        if config.intermediate_size < ranks || config.vocab_size < ranks {
            return Err(format!(
                "a width of {} and {} tokens are too few",
                config.intermediate_size, config.vocab_size
            ));
        }
        Ok(())
    };
    if ranks == 0 {
        return Err(ModelError::Ranks("no ranks; one or more are expected".into()));
    }
    divides(ranks).map_err(|reason| {
        let possible: Vec<String> = (1..=16).filter(|n| divides(*n).is_ok()).map(|n| n.to_string()).collect();
        ModelError::Ranks(format!("{reason} among {ranks} ranks (--tp); this model takes {}", possible.join(", ")))
    })
}

/// What one of `ranks` devices caches of a token: its key/value heads, and index keys and latents, which have none, whole.
pub fn cache_spec(config: &TextConfig, dtype: KvDtype, ranks: usize) -> CacheSpec {
    // Of heads that do not divide, which no model loads, the last rank has the most.
    let ranks = ranks.max(1);
    let (kv_heads, head_dim) = match config.latent {
        Some(_) => (0, 0),
        None => (Shard { rank: ranks - 1, ranks }.kv_heads(config).len(), config.head_dim),
    };
    CacheSpec {
        layers: config.num_hidden_layers,
        kv_heads,
        head_dim,
        dtype,
        index_dim: config.indexer.map_or(0, |indexer| indexer.head_dim),
        latent_dim: config.latent.map_or(0, |latent| latent.latent_dim()),
    }
}

/// A rank's way to the others; nothing when it is alone.
pub(crate) struct Peers<B: Backend>(pub(crate) Option<Arc<dyn Collective<B>>>);

impl<B: Backend> Peers<B> {
    pub(crate) fn shard(&self) -> Shard {
        self.0.as_ref().map_or(Shard::WHOLE, |peers| Shard { rank: peers.rank(), ranks: peers.ranks() })
    }

    /// `x += what all ranks' add adds`: rank 0 adds to the rows themselves, the others to zeros, and the sum is taken.
    pub(crate) fn add(
        &self,
        backend: &B,
        x: &mut B::Tensor,
        add: impl FnOnce(&mut B::Tensor) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let Some(peers) = &self.0 else { return add(x) };
        if peers.rank() != 0 {
            *x = backend.zeros(backend.rows(x), backend.cols(x))?;
        }
        add(x)?;
        peers.all_reduce_sum(backend, x)
    }

    /// Rank 0's rows on every rank; the others bring nothing.
    pub(crate) fn share(&self, backend: &B, x: Option<B::Tensor>) -> Result<B::Tensor, BackendError> {
        match &self.0 {
            Some(peers) => peers.broadcast(backend, x),
            None => Ok(x.expect("rank 0 brings rows")),
        }
    }

    /// All columns on rank 0, nothing on the others.
    pub(crate) fn gather(&self, backend: &B, x: B::Tensor) -> Result<Option<B::Tensor>, BackendError> {
        match &self.0 {
            Some(peers) => peers.gather_columns(backend, x),
            None => Ok(Some(x)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_even_and_make_up_the_whole() {
        for (n, unit, ranks) in [(12288, 64, 8), (144, 64, 2), (151_936, 16, 4), (72, 1, 3), (4304, 64, 8), (10, 16, 4)]
        {
            let parts: Vec<_> = (0..ranks).map(|rank| Shard { rank, ranks }.of(n, unit)).collect();
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!((parts[0].start, parts[ranks - 1].end), (0, n));
            let lengths = parts.iter().map(Range::len);
            assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= unit, "{parts:?}");
        }
    }
}

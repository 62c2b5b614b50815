//! Samples of one step, packed one after the other (spec §3.6).

use crate::TrainError;

/// Pixels of a patch's side.
pub(crate) const PATCH_SIDE: usize = 14;
/// Values of a patch: 3 channels of 14 by 14.
pub const PATCH_VALUES: usize = 3 * PATCH_SIDE * PATCH_SIDE;

/// Several samples in one sequence. Attention never crosses a sample, nor an image or a frame in the vision tower.
///
/// For next-token training the pad tokens of images and videos in `ids` take, in order, the merged features of `grids`.
/// For contrastive training (stage 0) `ids` hold no pad tokens and segment i of `cu_seqlens` is the text of image i of
/// `grids`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pack {
    /// Token ids `[n]`.
    pub ids: Vec<u32>,
    /// `[n]`: whether a token is a target, that is, whether predicting it from the tokens before it carries loss. The first
    /// token of a sample never does.
    pub loss_mask: Vec<bool>,
    /// Time, row and column of every token, `[n]`; each sample starts again from 0 (`docs/spec/keye-vl-8b.md` §6.2).
    pub positions: Vec<[u32; 3]>,
    /// Where samples begin, and n: `[samples + 1]`.
    pub cu_seqlens: Vec<u32>,
    /// Bytes of the patches `[patches, 3, 14, 14]`, as `keye_media::Pixels::U8` has them.
    pub patches: Vec<u8>,
    /// Rows and columns of patches of every image or frame `(h, w)`, both even.
    pub grids: Vec<[u32; 2]>,
}

impl Pack {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Number of tokens that carry loss.
    pub fn targets(&self) -> usize {
        self.loss_mask.iter().filter(|m| **m).count()
    }

    /// Where images and frames begin in `patches`, and their number: `[grids + 1]`.
    pub fn vit_cu_seqlens(&self) -> Vec<u32> {
        let mut sum = 0;
        std::iter::once(0)
            .chain(self.grids.iter().map(|[h, w]| {
                sum += h * w;
                sum
            }))
            .collect()
    }

    /// Appends a sample whose positions start at 0.
    pub fn push(&mut self, sample: &Pack) {
        let start = self.len() as u32;
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
        }
        self.ids.extend(&sample.ids);
        self.loss_mask.extend(&sample.loss_mask);
        self.positions.extend(&sample.positions);
        self.cu_seqlens.extend(sample.cu_seqlens.iter().skip(1).map(|end| start + end));
        self.patches.extend(&sample.patches);
        self.grids.extend(&sample.grids);
    }

    /// Checks that lengths and boundaries fit one another.
    pub fn check(&self) -> Result<(), TrainError> {
        let wrong = |what: String| Err(TrainError::Pack(what));
        let n = self.len();
        if self.loss_mask.len() != n || self.positions.len() != n {
            return wrong(format!("{n} ids, {} loss flags, {} positions", self.loss_mask.len(), self.positions.len()));
        }
        let ends = &self.cu_seqlens;
        if ends.first() != Some(&0) || ends.last() != Some(&(n as u32)) || !ends.is_sorted_by(|a, b| a < b) {
            return wrong(format!("sample boundaries {ends:?} do not cut {n} tokens"));
        }
        if let Some(start) = ends[..ends.len() - 1].iter().find(|start| self.loss_mask[**start as usize]) {
            return wrong(format!("token {start} begins a sample and carries loss"));
        }
        if let Some([h, w]) = self.grids.iter().find(|[h, w]| *h == 0 || *w == 0 || h % 2 + w % 2 != 0) {
            return wrong(format!("a grid of {h}x{w} patches; both have to be even"));
        }
        let patches: u64 = self.grids.iter().map(|[h, w]| u64::from(*h) * u64::from(*w)).sum();
        if self.patches.len() as u64 != patches.saturating_mul(PATCH_VALUES as u64) {
            return wrong(format!("{} bytes for {patches} patches of {PATCH_VALUES}", self.patches.len()));
        }
        Ok(())
    }
}

/// Where packs come from; resumable.
pub trait PackSource {
    /// The next pack. Sources do not end: they go round.
    fn next_pack(&mut self) -> Result<Pack, TrainError>;

    /// All that is needed to go on with the very same packs, for [`PackSource::restore`].
    fn state(&self) -> serde_json::Value;

    /// Goes back to a state.
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), TrainError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_appended_and_damage_is_found() {
        let sample = Pack {
            ids: vec![1, 2, 3],
            loss_mask: vec![false, true, true],
            positions: vec![[0; 3], [1; 3], [2; 3]],
            cu_seqlens: vec![0, 3],
            patches: vec![7; 4 * PATCH_VALUES],
            grids: vec![[2, 2]],
        };
        let mut pack = Pack::default();
        pack.push(&sample);
        pack.push(&sample);
        pack.check().unwrap();
        assert_eq!((pack.cu_seqlens.as_slice(), pack.vit_cu_seqlens()), ([0, 3, 6].as_slice(), vec![0, 4, 8]));
        assert_eq!(pack.targets(), 4);
        let broken: [fn(&mut Pack); 5] = [
            |p| p.loss_mask.truncate(1),
            |p| p.cu_seqlens = vec![0, 3, 3, 6],
            |p| p.loss_mask[3] = true,
            |p| p.grids[0] = [1, 4],
            |p| p.patches.truncate(1),
        ];
        for damage in broken {
            let mut pack = pack.clone();
            damage(&mut pack);
            assert!(matches!(pack.check(), Err(TrainError::Pack(_))));
        }
    }
}

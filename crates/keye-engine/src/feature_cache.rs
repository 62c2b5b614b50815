//! Media features that stay with the runner, so that the same media are not encoded again.

use std::collections::HashMap;

use keye_media::{Media, MediaKind};
use keye_model::{FeatureId, Runner};

/// The same patches as a picture and as a clip give different features.
pub(crate) type FeatureKey = (MediaKind, [u8; 32]);

pub(crate) fn feature_key(media: &Media) -> FeatureKey {
    (media.kind, media.patches.hash)
}

#[derive(Debug)]
struct Entry {
    feature: FeatureId,
    bytes: usize,
    users: usize,
    /// When the last user left.
    left: u64,
}

/// Features in use are always kept; the others up to a number of bytes, the longest unused go first, and before them
/// those that do not fit alone.
#[derive(Debug)]
pub(crate) struct FeatureCache {
    entries: HashMap<FeatureKey, Entry>,
    max_unused_bytes: usize,
    clock: u64,
}

impl FeatureCache {
    pub fn new(max_unused_bytes: usize) -> Self {
        Self { entries: HashMap::new(), max_unused_bytes, clock: 0 }
    }

    pub fn contains(&self, key: &FeatureKey) -> bool {
        self.entries.contains_key(key)
    }

    /// Bytes of all features held.
    pub fn bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.bytes).sum()
    }

    /// Features for `key`, if they are here. In use until [`FeatureCache::release`].
    pub fn acquire(&mut self, key: &FeatureKey) -> Option<FeatureId> {
        let entry = self.entries.get_mut(key)?;
        entry.users += 1;
        Some(entry.feature)
    }

    /// Keeps new features, which are in use by nobody yet.
    pub fn insert(&mut self, key: FeatureKey, feature: FeatureId, runner: &dyn Runner) {
        let bytes = runner.feature_rows(feature).saturating_mul(runner.info().feature_row_bytes);
        self.clock += 1;
        self.entries.insert(key, Entry { feature, bytes, users: 0, left: self.clock });
    }

    /// One user less.
    pub fn release(&mut self, key: &FeatureKey, runner: &mut dyn Runner) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        self.clock += 1;
        entry.users -= 1;
        entry.left = self.clock;
        self.evict(runner);
    }

    fn evict(&mut self, runner: &mut dyn Runner) {
        loop {
            let unused = || self.entries.iter().filter(|(_, entry)| entry.users == 0);
            if unused().map(|(_, entry)| entry.bytes).sum::<usize>() <= self.max_unused_bytes {
                return;
            }
            let order = |entry: &Entry| (entry.bytes <= self.max_unused_bytes, entry.left);
            let Some(oldest) = unused().min_by_key(|(_, entry)| order(entry)).map(|(key, _)| *key) else { return };
            if let Some(entry) = self.entries.remove(&oldest) {
                runner.release(entry.feature);
            }
        }
    }
}

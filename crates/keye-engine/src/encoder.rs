//! Encodings that are under way: at most two, so that a picture need not wait for a long clip.

use std::sync::Arc;

use keye_media::Media;
use keye_model::{EncodeProgress, FeatureId, NoTap, Runner};

use crate::EngineError;
use crate::feature_cache::FeatureKey;
use crate::worker::guarded;

/// A second encoding begins only when it is so many times shorter than the first.
const MUCH_SHORTER: usize = 4;

struct Job {
    key: FeatureKey,
    media: Arc<Media>,
    feature: FeatureId,
}

/// The jobs take turns.
#[derive(Default)]
pub(crate) struct Encoder {
    jobs: Vec<Job>,
    /// What was finished last.
    done: Option<FeatureKey>,
    /// What could not be begun, and why.
    failed: Option<(FeatureKey, EngineError)>,
}

impl Encoder {
    pub fn busy(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// These features were made for whoever takes them first.
    pub fn just_done(&self, key: &FeatureKey) -> bool {
        self.done.as_ref() == Some(key)
    }

    /// Gives up what nobody wants any more and begins what is wanted: (key, sequence, index of its media) in order.
    pub fn update(
        &mut self,
        wanted: &[(FeatureKey, u64, usize)],
        media: impl Fn(u64, usize) -> Option<Arc<Media>>,
        runner: &mut dyn Runner,
    ) {
        for job in self.jobs.extract_if(.., |job| !wanted.iter().any(|(key, ..)| *key == job.key)) {
            runner.release(job.feature);
        }
        for (key, id, index) in wanted {
            if self.jobs.len() == 2 || self.failed.is_some() {
                return;
            }
            let Some(media) = media(*id, *index) else { continue };
            let long =
                self.jobs.first().is_some_and(|job| media.patches.len() * MUCH_SHORTER > job.media.patches.len());
            if long || self.jobs.iter().any(|job| job.key == *key) {
                continue;
            }
            match guarded(|| Ok(runner.begin_encode(media.kind, &media.patches)?)) {
                Ok(feature) => self.jobs.push(Job { key: *key, media, feature }),
                Err(error) => self.failed = Some((*key, error)),
            }
        }
    }

    /// Works on one job for about `flops` operations: how far it is, and its features when they are finished.
    #[expect(clippy::type_complexity, reason = "read at one place")]
    pub fn work(
        &mut self,
        flops: f64,
        runner: &mut dyn Runner,
    ) -> Option<(FeatureKey, Result<(EncodeProgress, Option<FeatureId>), EngineError>)> {
        if let Some((key, error)) = self.failed.take() {
            return Some((key, Err(error)));
        }
        if self.jobs.is_empty() {
            return None;
        }
        let job = self.jobs.remove(0);
        let worked = guarded(|| {
            let progress = runner.encode_step(job.feature, &job.media.patches, flops, &mut NoTap)?;
            // A device has only been told of it; how much it does between two tokens is measured by the time that it takes.
            runner.synchronize()?;
            Ok(progress)
        });
        let progress = match worked {
            Ok(progress) => progress,
            Err(error) => return Some((job.key, Err(error))),
        };
        let (key, feature) = (job.key, job.feature);
        if runner.feature_rows(feature) > 0 {
            self.done = Some(key);
            return Some((key, Ok((progress, Some(feature)))));
        }
        self.jobs.push(job);
        Some((key, Ok((progress, None))))
    }
}

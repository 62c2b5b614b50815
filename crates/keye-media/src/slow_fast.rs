//! 1.5's clips, one frame at a time (spec §10.3, steps 3 to 5).
//!
//! The sizes of slow and fast frames depend on how many there are of each, because they share a budget. They only shrink as
//! frames come, so they are settled as soon as all frames to come could be slow without changing them: for most clips up
//! to a minute early on, for clips of up to 85 frames at once. Until then frames are put aside on disk ([`Spill`]); where
//! these would be more bytes than the limit allows, the clip is only classified, and decoded a second time ([`Passes`]).

use crate::ffmpeg::Watch;
use crate::patches;
use crate::resample::{Kernel, Mode, Resizer, Scratch};
use crate::similarity::Classifier;
use crate::sizes::{SlowFastSizes, most_slow_pixels, slow_fast_sizes};
use crate::spill::Spill;
use crate::{FrameKind, ItemOptions, Loader, MediaError};

/// Classifies frames and cuts them into patches as they come.
pub(crate) struct SlowFast<'a> {
    loader: &'a Loader,
    options: &'a ItemOptions,
    h: u32,
    w: u32,
    /// Frames to come.
    remaining: u64,
    classifier: Classifier,
    kinds: Vec<FrameKind>,
    /// Frames that wait for their size.
    spill: Option<Spill>,
    /// True when there was no room for those.
    twice: bool,
    settled: Option<Settled>,
}

/// How often the frames have to be decoded.
pub(crate) enum Passes<'a> {
    /// There was no frame.
    None,
    /// Once.
    One(SlowFastClip),
    /// All of them again.
    Two(Box<SecondPass<'a>>),
}

/// Takes the frames again, now that their sizes are known.
pub(crate) struct SecondPass<'a> {
    loader: &'a Loader,
    kinds: Vec<FrameKind>,
    came: usize,
    settled: Settled,
}

/// What came out.
pub(crate) struct SlowFastClip {
    /// One a frame.
    pub kinds: Vec<FrameKind>,
    /// Of the resized frames.
    pub sizes: SlowFastSizes,
    /// The patches of all frames.
    pub pixels: Vec<u8>,
}

/// Resizes and cuts, once the sizes are known.
struct Settled {
    sizes: SlowFastSizes,
    slow: Resizer,
    fast: Resizer,
    patch: u32,
    patches: u64,
    pixels: Vec<u8>,
    resized: Vec<u8>,
    scratch: Scratch,
}

impl<'a> SlowFast<'a> {
    /// For at most `total` frames of `h` x `w` pixels.
    pub fn new(
        loader: &'a Loader,
        options: &'a ItemOptions,
        (h, w): (u32, u32),
        total: usize,
        watch: &Watch,
    ) -> Result<Self, MediaError> {
        let similarity = options.min_frame_similarity.unwrap_or(loader.config.video.min_frame_similarity);
        let classifier = Classifier::new(h, w, similarity).map_err(|reason| watch.unreadable(reason))?;
        let (kinds, remaining) = (Vec::with_capacity(total), total as u64);
        Ok(Self { loader, options, h, w, remaining, classifier, kinds, spill: None, twice: false, settled: None })
    }

    /// Takes the next frame, `[h, w, 3]`.
    pub fn push(&mut self, rgb: &[u8], watch: &mut Watch) -> Result<(), MediaError> {
        let kind = self.classifier.push(rgb);
        self.kinds.push(kind);
        self.remaining = self.remaining.saturating_sub(1);
        let waiting = self.kinds.len() - 1;
        if self.settled.is_none() && !self.twice && self.is_settled() {
            self.settle(waiting, watch)?;
        }
        match &mut self.settled {
            Some(settled) => settled.take(rgb, kind, self.loader, watch),
            None if self.twice => Ok(()),
            None => self.put_aside(rgb),
        }
    }

    /// Puts a frame on disk, or gives up all that are there when the limit leaves no room for it.
    fn put_aside(&mut self, rgb: &[u8]) -> Result<(), MediaError> {
        let mut spill = match self.spill.take() {
            Some(spill) => spill,
            None => Spill::new()?,
        };
        self.twice = spill.bytes().saturating_add(rgb.len() as u64) > self.loader.limits.spilled_bytes;
        if !self.twice {
            spill.write(rgb)?;
            self.spill = Some(spill);
        }
        Ok(())
    }

    /// After the last frame.
    pub fn finish(mut self, watch: &mut Watch) -> Result<Passes<'a>, MediaError> {
        if self.kinds.is_empty() {
            return Ok(Passes::None);
        }
        if self.twice {
            let settled = self.sized(watch)?;
            return Ok(Passes::Two(Box::new(SecondPass { loader: self.loader, kinds: self.kinds, came: 0, settled })));
        }
        if self.settled.is_none() {
            self.settle(self.kinds.len(), watch)?;
        }
        Ok(self.settled.map_or(Passes::None, |settled| Passes::One(settled.clip(self.kinds))))
    }

    /// Slow and fast frames that came.
    fn counts(&self) -> (u64, u64) {
        let slow = self.kinds.iter().filter(|kind| **kind == FrameKind::Slow).count();
        (slow as u64, (self.kinds.len() - slow) as u64)
    }

    /// Whether the frames to come, however many and of which kind, leave the sizes as they are. What a clip costs lies
    /// between these three, and the sizes follow from the pixels.
    fn is_settled(&self) -> bool {
        let (slow, fast) = self.counts();
        let most = |slow, fast| most_slow_pixels(slow, fast, self.options, &self.loader.config.video);
        let now = most(slow, fast);
        now == most(slow + self.remaining, fast) && now == most(slow, fast + self.remaining)
    }

    /// What resizes frames to the sizes that follow from those that came.
    fn sized(&self, watch: &Watch) -> Result<Settled, MediaError> {
        let (slow, fast) = self.counts();
        let sizes = slow_fast_sizes(self.h, self.w, slow, fast, self.options, &self.loader.config.video);
        let sizes = sizes.map_err(|reason| watch.unreadable(reason))?;
        let patch = self.loader.config.processor.patch_size;
        // Before memory is taken and work is done that a limit makes useless.
        let of = |size, frames| patches_of(size, patch).saturating_mul(frames);
        let known = of(sizes.slow, slow).saturating_add(of(sizes.fast, fast));
        watch.limit("the number of patches", known, self.loader.limits.patches)?;
        let resizer = |(to_h, to_w)| Resizer::new(self.h, self.w, to_h, to_w, Kernel::Bilinear, Mode::Int16);
        Ok(Settled {
            slow: resizer(sizes.slow),
            fast: resizer(sizes.fast),
            sizes,
            patch,
            patches: 0,
            pixels: Vec::new(),
            resized: Vec::new(),
            scratch: Scratch::default(),
        })
    }

    /// The sizes are those of the frames that came; the first `waiting` of these are on disk.
    fn settle(&mut self, waiting: usize, watch: &mut Watch) -> Result<(), MediaError> {
        let mut settled = self.sized(watch)?;
        if let Some(mut spill) = self.spill.take() {
            let mut frame = vec![0; self.h as usize * self.w as usize * 3];
            spill.rewind()?;
            for kind in &self.kinds[..waiting] {
                watch.check()?;
                spill.read(&mut frame)?;
                settled.take(&frame, *kind, self.loader, watch)?;
            }
        }
        self.settled = Some(settled);
        Ok(())
    }
}

impl SecondPass<'_> {
    /// Takes the next frame, `[h, w, 3]`.
    pub fn push(&mut self, rgb: &[u8], watch: &Watch) -> Result<(), MediaError> {
        if let Some(kind) = self.kinds.get(self.came) {
            self.settled.take(rgb, *kind, self.loader, watch)?;
        }
        self.came += 1;
        Ok(())
    }

    /// After the last frame.
    ///
    /// # Errors
    /// Another number of frames than in the first pass.
    pub fn finish(self, watch: &Watch) -> Result<SlowFastClip, MediaError> {
        let (first, second) = (self.kinds.len(), self.came);
        match first == second {
            true => Ok(self.settled.clip(self.kinds)),
            false => Err(watch.unreadable(format!("decoding it twice gave {first} frames, then {second}"))),
        }
    }
}

/// The patches of a frame of `(height, width)`.
pub(crate) fn patches_of((h, w): (u32, u32), patch: u32) -> u64 {
    u64::from(h / patch) * u64::from(w / patch)
}

impl Settled {
    fn size(&self, kind: FrameKind) -> (u32, u32) {
        match kind {
            FrameKind::Slow => self.sizes.slow,
            FrameKind::Fast => self.sizes.fast,
        }
    }

    fn clip(mut self, kinds: Vec<FrameKind>) -> SlowFastClip {
        self.pixels.shrink_to_fit();
        SlowFastClip { kinds, sizes: self.sizes, pixels: self.pixels }
    }

    fn take(&mut self, rgb: &[u8], kind: FrameKind, loader: &Loader, watch: &Watch) -> Result<(), MediaError> {
        let (height, width) = self.size(kind);
        self.patches = self.patches.saturating_add(patches_of((height, width), self.patch));
        watch.limit("the number of patches", self.patches, loader.limits.patches)?;
        let resizer = if kind == FrameKind::Slow { &self.slow } else { &self.fast };
        resizer.run(rgb, &mut self.resized, &mut self.scratch);
        let more = self.resized.len();
        let refused = |_| watch.unreadable(format!("no memory for the {more} bytes of a frame's patches"));
        self.pixels.try_reserve(more).map_err(refused)?;
        patches::cut(&self.resized, height, width, self.patch, &mut self.pixels);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MediaConfig, Progress};

    /// Whatever order slow and fast frames come in, early settling changes neither sizes nor patches.
    #[test]
    fn early_settling_changes_nothing() {
        let mut progress = |_: Progress| true;
        let time = std::time::Duration::from_secs(600);
        let deadline = std::time::Instant::now() + time;
        let mut watch = Watch { input: "test", deadline, time, progress: &mut progress, done: 0, total: 0 };
        let loader = Loader::new(MediaConfig::slow_fast());
        // Room for three frames, which is too little for some of these clips.
        let mut short = loader.clone();
        short.limits.spilled_bytes = 3 * 200 * 300 * 3;
        let (mut settled_at, mut twice) = (Vec::new(), 0);
        // From a budget that binds every clip to one that binds none.
        for budget in [4, 12, 40, 130] {
            for pattern in [0u64, 1, 0b1010_1010_1010, 0b1111_1100_0000, 0b0000_0011_1111, 0xfff] {
                let options = ItemOptions { video_total_pixels: Some(budget * 76 * 784), ..Default::default() };
                let size = (200, 300);
                let mut frames = SlowFast::new(&loader, &options, size, 12, &watch).unwrap();
                let (mut red, mut settled) = (false, None);
                let mut came = Vec::new();
                for i in 0..12 {
                    // Red and blue differ in every tile.
                    red ^= (pattern >> i) & 1 == 1;
                    came.push(if red { [200, 0, 0] } else { [0, 0, 200] }.repeat(200 * 300));
                    frames.push(&came[i], &mut watch).unwrap();
                    settled = settled.or(frames.settled.is_some().then_some(i));
                }
                let Passes::One(clip) = frames.finish(&mut watch).unwrap() else { panic!("the disk has room") };
                let slow = clip.kinds.iter().filter(|kind| **kind == FrameKind::Slow).count() as u64;
                let sizes = slow_fast_sizes(200, 300, slow, 12 - slow, &options, &loader.config.video).unwrap();
                assert_eq!(clip.sizes, sizes, "{budget} {pattern:b}");
                let mut pixels = Vec::new();
                for (rgb, kind) in came.iter().zip(&clip.kinds) {
                    let (h, w) = if *kind == FrameKind::Slow { sizes.slow } else { sizes.fast };
                    let (mut out, mut scratch) = (Vec::new(), Scratch::default());
                    Resizer::new(200, 300, h, w, Kernel::Bilinear, Mode::Int16).run(rgb, &mut out, &mut scratch);
                    patches::cut(&out, h, w, 14, &mut pixels);
                }
                assert!(clip.pixels == pixels, "{budget} {pattern:b}");
                settled_at.push(settled);

                let mut frames = SlowFast::new(&short, &options, size, 12, &watch).unwrap();
                for rgb in &came {
                    frames.push(rgb, &mut watch).unwrap();
                    assert!(frames.spill.as_ref().is_none_or(|spill| spill.bytes() <= short.limits.spilled_bytes));
                }
                let again = match frames.finish(&mut watch).unwrap() {
                    Passes::Two(mut second) => {
                        twice += 1;
                        came.iter().for_each(|rgb| second.push(rgb, &watch).unwrap());
                        second.finish(&watch).unwrap()
                    }
                    Passes::One(clip) => clip,
                    Passes::None => panic!("frames came"),
                };
                assert!(again.pixels == pixels && again.kinds == clip.kinds, "{budget} {pattern:b}");
            }
        }
        assert!((1..24).contains(&twice), "{twice} clips were decoded twice");
        settled_at.sort();
        settled_at.dedup();
        assert!(settled_at.len() > 2, "the clips test one case only: {settled_at:?}");
    }
}

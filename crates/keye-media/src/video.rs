//! Clips: from a file to patches (spec §10.2 and §10.3), one frame at a time.
//!
//! [`probe`](crate::probe) tells what there is, [`sampling`](crate::sampling) which frames are wanted,
//! [`decode`](crate::decode) streams them. A frame of a `WholeClip` or `Adaptive` clip is resized and cut as it comes;
//! the frames of a `SlowFast` clip go through [`slow_fast`](crate::slow_fast).
//!
//! **Frames that do not come.** The packets promise a number of frames. When the decoder gives fewer of the wanted ones
//! (a cut or damaged file, fields in packets of their own), the decodable frames are counted by decoding once, and the
//! clip is sampled anew as if it had only those; only if even that is not kept, what came is used, and
//! [`damage`](crate::damage) says what is missing. When frames are wanted
//! from the middle only, none would be missed: then the frames are counted first, where packets may hold none
//! ([`Clip::uncounted`]).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::adaptive_sampling::{adaptive_plan, adaptive_size};
use crate::damage;
use crate::decode::{self, Frames};
use crate::ffmpeg::{Programs, Watch};
use crate::frames::check_patches;
use crate::patches;
use crate::probe::{Clip, probe};
use crate::resample::{Kernel, Mode, Resizer, Scratch};
use crate::sampling::{SamplePlan, quotient_timestamp, reference_timestamp, slow_fast_plan, whole_clip_plan};
use crate::sizes::whole_clip_size;
use crate::slow_fast::{Passes, SlowFast, SlowFastClip};
use crate::smart_resize::smart_resize_hub;
use crate::sniff;
use crate::{
    Frame, FrameKind, ItemOptions, Loaded, Loader, Media, MediaError, MediaKind, Progress, Resample, TimestampRule,
    VideoRule,
};

/// Loads a clip from an opened file. `input` names it in errors; after `deadline` the item is given up.
///
/// # Errors
/// Missing programs, refused or broken files, limits, options that do not fit the clip, cancelling.
pub(crate) fn load_clip(
    loader: &Loader,
    options: &ItemOptions,
    input: &str,
    file: &File,
    deadline: Instant,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Loaded, MediaError> {
    let demuxer = sniffed(input, file)?;
    load_with(
        &Programs::find()?,
        loader,
        options,
        (file, demuxer),
        Watch { input, deadline, time: loader.limits.time, progress, done: 0, total: 0 },
    )
}

fn sniffed(input: &str, file: &File) -> Result<&'static str, MediaError> {
    let mut head = [0; sniff::HEAD];
    let mut have = 0;
    while have < head.len() {
        match file.read_at(&mut head[have..], have as u64) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => return Err(MediaError::Read { input: input.into(), source }),
        }
    }
    sniff::demuxer(&head[..have]).map_err(|reason| MediaError::Unreadable { input: input.into(), reason })
}

pub(crate) fn load_with(
    programs: &Programs,
    loader: &Loader,
    options: &ItemOptions,
    (file, demuxer): (&File, &'static str),
    mut watch: Watch,
) -> Result<Loaded, MediaError> {
    watch.check()?;
    let clip = probe(programs, file, demuxer, &loader.limits, &mut watch)?;
    let mut work = Work { programs, loader, options, file, clip, watch };
    let mut promised = None;
    let first = if work.may_miss_frames()? { None } else { work.attempt(false)? };
    let media = match first {
        Some(media) => media,
        None => {
            promised = work.recount()?;
            let media = work.attempt(true)?;
            media.ok_or_else(|| work.watch.unreadable("none of the sampled frames can be decoded"))?
        }
    };
    let (clip, gap) = (&work.clip, 1.0 / work.clip.fps);
    let end = clip.times.last().unwrap_or(&0.0) + gap;
    let frames = damage::Frames { end, gap, promised: promised.map(|last| last + gap) };
    let cut = damage::cut_short(file, demuxer);
    let warning = damage::warning(cut, &clip.promise, &frames, options.video_end);
    Ok(Loaded { media, warnings: warning.into_iter().collect() })
}

struct Work<'a, 'w> {
    programs: &'a Programs,
    loader: &'a Loader,
    options: &'a ItemOptions,
    file: &'a File,
    clip: Clip,
    watch: Watch<'w>,
}

impl Work<'_, '_> {
    /// Whether the numbers of wanted frames may be wrong, and no wanted one be missing.
    fn may_miss_frames(&self) -> Result<bool, MediaError> {
        let last = self.clip.times.len() as u64 - 1;
        Ok(self.clip.uncounted && self.plan()?.indices.last().is_some_and(|index| (1..last).contains(index)))
    }

    /// Takes the frames that can be decoded for all there are. Gives when the packets would have shown the last one, on the
    /// clock of these frames.
    fn recount(&mut self) -> Result<Option<f64>, MediaError> {
        let Self { programs, loader, file, clip, watch, .. } = self;
        let counted = decode::count(programs, file, clip, &loader.limits, watch)?;
        // Frames that are missing in front, as in recordings that begin between two whole pictures, are none at the end.
        let promised = clip.promise.first.zip(clip.times.last()).map(|(first, last)| first + last - counted.first);
        clip.promise.damage = clip.promise.damage.take().or(counted.damage);
        clip.times = counted.times;
        Ok(promised)
    }

    /// `None` when fewer frames came than wanted; with `accept_short`, when none came.
    fn attempt(&mut self, accept_short: bool) -> Result<Option<Media>, MediaError> {
        let plan = self.plan()?;
        let wanted = plan.indices.len();
        self.watch.limit("the number of sampled frames", wanted as u64, u64::from(self.loader.limits.frames))?;
        (self.watch.done, self.watch.total) = (0, wanted as u32);
        self.watch.check()?;
        let media = match self.loader.config.video.rule {
            VideoRule::WholeClip | VideoRule::Adaptive => self.one_size(&plan)?,
            VideoRule::SlowFast => self.slow_fast(&plan, accept_short)?,
        };
        Ok(media.filter(|media| media.frames.len() == wanted || (accept_short && !media.frames.is_empty())))
    }

    /// Which frames are sampled. Where the rate varies and true times are wanted, `video_start` and `video_end` mean
    /// times, and both the part's rate and its sampling rate are those of its own frames: the reference counts frames
    /// and takes the whole clip's rate in all cases.
    fn plan(&self) -> Result<SamplePlan, MediaError> {
        let video = &self.loader.config.video;
        let rule = match video.rule {
            VideoRule::WholeClip => whole_clip_plan,
            VideoRule::SlowFast => slow_fast_plan,
            VideoRule::Adaptive => adaptive_plan,
        };
        let times = &self.clip.times;
        if self.loader.timestamps == TimestampRule::Reference || self.clip.has_constant_rate() {
            let plan = rule(times.len() as u64, self.clip.fps, self.options, video);
            return plan.map_err(|refusal| refusal.of(self.watch.input));
        }
        let start = self.options.video_start.map_or(0, |s| times.partition_point(|t| *t < s));
        let end = self.options.video_end.map_or(times.len(), |e| times.partition_point(|t| *t <= e));
        let part = times.get(start..end).filter(|part| !part.is_empty()).ok_or_else(|| MediaError::Option {
            input: self.watch.input.into(),
            option: if self.options.video_start.is_some() { "video_start" } else { "video_end" },
            reason: format!(
                "no frame is shown in this part of the clip; its {} frames are shown from 0 to {:.2} s",
                times.len(),
                times.last().unwrap_or(&0.0)
            ),
        })?;
        let whole = ItemOptions { video_start: None, video_end: None, ..self.options.clone() };
        // N frames last the time from first to last and one mean gap more.
        let rate = crate::probe::average(part);
        let fps = rate.filter(|_| part.len() < times.len()).unwrap_or(self.clip.fps);
        let plan = rule(part.len() as u64, fps, &whole, video).map_err(|r| r.of(self.watch.input))?;
        let real = rate.map(|rate| plan.indices.len() as f64 / part.len() as f64 * rate);
        Ok(SamplePlan {
            indices: plan.indices.iter().map(|index| index + start as u64).collect(),
            sample_fps: real.unwrap_or(plan.sample_fps),
            total_pixels: plan.total_pixels,
        })
    }

    fn one_size(&mut self, plan: &SamplePlan) -> Result<Option<Media>, MediaError> {
        let (config, patch) = (&self.loader.config, self.loader.config.processor.patch_size);
        let (n, clip) = (plan.indices.len(), &self.clip);
        let adaptive = config.video.rule == VideoRule::Adaptive;
        let (size, kernel, mode) = match adaptive {
            true => {
                let total = plan.total_pixels;
                let size = adaptive_size(clip.height, clip.width, n as u64, total, self.options, &config.video);
                (size, Kernel::Bilinear, Mode::Int16)
            }
            false => {
                let size = whole_clip_size(clip.height, clip.width, n as u64, self.options, &config.video);
                (size, Kernel::Bicubic, Mode::Float)
            }
        };
        let between = size.map_err(|reason| self.watch.unreadable(reason))?;
        // Preview's image processor resizes frames too if its limits say so; with the published ones it never has to.
        let processor = &config.processor;
        let (height, width) = match processor.do_resize && !adaptive {
            true => {
                let (min, max) = (processor.min_pixels, processor.max_pixels);
                let hub = smart_resize_hub(between.0, between.1, processor.factor(), min, max);
                hub.map_err(|reason| self.watch.unreadable(reason))?
            }
            false => between,
        };
        // Before memory is taken for the resizing to an absurd size; of the size between there is one frame at a time.
        check_patches(self.loader, between, 1, &self.watch)?;
        let mut pixels = self.patch_memory(n, (height, width))?;
        let first = Resizer::new(clip.height, clip.width, between.0, between.1, kernel, mode);
        let second = ((height, width) != between).then(|| {
            let kernel = match processor.resample {
                Resample::Bilinear => Kernel::Bilinear,
                Resample::Bicubic => Kernel::Bicubic,
            };
            Resizer::new(between.0, between.1, height, width, kernel, Mode::Pil22)
        });
        let (mut resized, mut again, mut scratch) = (Vec::new(), Vec::new(), Scratch::default());
        let came = self.stream(plan, |rgb, _| {
            first.run(rgb, &mut resized, &mut scratch);
            let frame = match &second {
                Some(second) => {
                    second.run(&resized, &mut again, &mut scratch);
                    &again
                }
                None => &resized,
            };
            patches::cut(frame, height, width, patch, &mut pixels);
            Ok(())
        })?;
        let frames = (0..came).map(|i| self.frame(plan, i, FrameKind::Slow, (height, width))).collect();
        Ok(Some(self.media(plan, frames, pixels)))
    }

    fn slow_fast(&mut self, plan: &SamplePlan, accept_short: bool) -> Result<Option<Media>, MediaError> {
        let (size, wanted) = ((self.clip.height, self.clip.width), plan.indices.len());
        let mut frames = SlowFast::new(self.loader, self.options, size, wanted, &self.watch)?;
        let came = self.stream(plan, |rgb, watch| frames.push(rgb, watch))?;
        if came < wanted && !accept_short {
            return Ok(None);
        }
        let SlowFastClip { kinds, sizes, pixels } = match frames.finish(&mut self.watch)? {
            Passes::None => return Ok(None),
            Passes::One(clip) => clip,
            Passes::Two(mut again) => {
                self.stream(plan, |rgb, watch| again.push(rgb, watch))?;
                again.finish(&self.watch)?
            }
        };
        let size = |kind| match kind {
            FrameKind::Slow => sizes.slow,
            FrameKind::Fast => sizes.fast,
        };
        let frames = kinds.iter().enumerate().map(|(i, kind)| self.frame(plan, i, *kind, size(*kind))).collect();
        Ok(Some(self.media(plan, frames, pixels)))
    }

    /// Hands every sampled frame to `take`, a frame sampled twice twice. Gives how many came.
    fn stream(
        &mut self,
        plan: &SamplePlan,
        mut take: impl FnMut(&[u8], &mut Watch) -> Result<(), MediaError>,
    ) -> Result<usize, MediaError> {
        let Self { programs, loader, file, clip, watch, .. } = self;
        let mut frames = Frames::start(programs, file, clip, &plan.indices, &loader.limits, watch)?;
        let mut current: Option<(u64, Vec<u8>)> = None;
        for (i, &index) in plan.indices.iter().enumerate() {
            if current.as_ref().is_none_or(|(shown, _)| *shown != index) {
                if let Some((_, frame)) = current.take() {
                    frames.give_back(frame);
                }
                match frames.next(watch)? {
                    Some(frame) => current = Some((index, frame)),
                    None => {
                        frames.finish(watch)?;
                        clip.promise.damage = clip.promise.damage.take().or_else(|| frames.damage(clip));
                        return Ok(i);
                    }
                }
            }
            if let Some((_, frame)) = &current {
                take(frame, watch)?;
            }
            watch.done = i as u32 + 1;
            watch.check()?;
        }
        clip.promise.damage = clip.promise.damage.take().or_else(|| frames.damage(clip));
        Ok(plan.indices.len())
    }

    /// Memory for the patches of `n` frames of this size, if the limit allows it.
    fn patch_memory(&self, n: usize, size: (u32, u32)) -> Result<Vec<u8>, MediaError> {
        let patch = u64::from(self.loader.config.processor.patch_size);
        let bytes = check_patches(self.loader, size, n, &self.watch)?.saturating_mul(3 * patch * patch);
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut pixels = Vec::new();
        pixels
            .try_reserve_exact(bytes)
            .map_err(|_| self.watch.unreadable(format!("no memory for the {bytes} bytes of its patches")))?;
        Ok(pixels)
    }

    fn frame(&self, plan: &SamplePlan, i: usize, kind: FrameKind, (height, width): (u32, u32)) -> Frame {
        let index = plan.indices[i];
        let timestamp = match self.loader.timestamps {
            TimestampRule::True => self.clip.times[index as usize] as f32,
            TimestampRule::Reference => match self.loader.config.video.rule {
                VideoRule::Adaptive => quotient_timestamp(index, self.clip.fps),
                VideoRule::WholeClip | VideoRule::SlowFast => reference_timestamp(index, self.clip.fps),
            },
        };
        Frame { index: index as usize, timestamp: Some(timestamp), kind, height, width }
    }

    fn media(&self, plan: &SamplePlan, frames: Vec<Frame>, pixels: Vec<u8>) -> Media {
        let patch = self.loader.config.processor.patch_size;
        patches::assemble(MediaKind::Video, frames, pixels, patch, Some(plan.sample_fps))
    }
}

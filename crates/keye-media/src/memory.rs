//! Pictures and clips whose pixels are in memory already, as a renderer or a training set has them: processed like a file
//! with these frames, without a decoder.

use std::time::Instant;

use crate::ffmpeg::Watch;
use crate::options::{self, Target};
use crate::patches;
use crate::sampling::{reference_timestamp, slow_fast_plan};
use crate::slow_fast::{Passes, SlowFast, SlowFastClip};
use crate::still::{self, Picture, PixelRange};
use crate::{Frame, FrameKind, ItemOptions, Loader, Media, MediaError, MediaKind, Progress, TimestampRule, VideoRule};

/// A clip of constant rate whose frames are made when they are asked for.
pub struct RgbClip<'a> {
    /// Named in errors.
    pub name: &'a str,
    /// Height in pixels.
    pub height: u32,
    /// Width in pixels.
    pub width: u32,
    /// Frames per second.
    pub fps: f64,
    /// Number of frames.
    pub frames: u64,
    /// A frame by its number: `[height, width, 3]`. Only the sampled ones are asked for, in order; those of a clip too
    /// long for [`Limits::spilled_bytes`](crate::Limits::spilled_bytes) twice.
    pub frame: &'a mut dyn FnMut(u64) -> Vec<u8>,
}

impl Loader {
    /// A still picture, `[height, width, 3]`.
    ///
    /// # Errors
    /// Bytes of another number than the size says; options and limits as in [`Loader::load`].
    pub fn load_rgb(
        &self,
        name: &str,
        (height, width): (u32, u32),
        rgb: Vec<u8>,
        options: &ItemOptions,
    ) -> Result<Media, MediaError> {
        options::check(options, Target::Picture, self.config.video.rule).map_err(|refusal| refusal.of(name))?;
        check_bytes(name, (height, width), rgb.len())?;
        let range = PixelRange::of_pictures(&self.config.image);
        let picture = still::first_stage(Picture { height, width, rgb }, name, options, range, &self.limits)?;
        let picture = still::processor_stage(picture, name, &self.config.processor, &self.limits)?;
        let (height, width, patch) = (picture.height, picture.width, self.config.processor.patch_size);
        let mut pixels = Vec::new();
        patches::cut(&picture.rgb, height, width, patch, &mut pixels);
        let frame = Frame { index: 0, timestamp: None, kind: FrameKind::Slow, height, width };
        Ok(patches::assemble(MediaKind::Image, vec![frame], pixels, patch, None))
    }

    /// A clip, sampled and split into slow and fast frames by the rule of 1.5.
    ///
    /// # Errors
    /// Models with another rule; frames of another size than the clip says; options and limits as in [`Loader::load`].
    pub fn load_frames(&self, clip: &mut RgbClip, options: &ItemOptions) -> Result<Media, MediaError> {
        let config = &self.config.video;
        let unreadable =
            |reason: &str| MediaError::Unreadable { input: clip.name.to_owned(), reason: reason.to_owned() };
        if config.rule != VideoRule::SlowFast {
            return Err(unreadable("frames in memory are taken for Keye-VL-1.5 only; give the clip as a file"));
        }
        options::check(options, Target::ClipFile, config.rule).map_err(|refusal| refusal.of(clip.name))?;
        let plan = slow_fast_plan(clip.frames, clip.fps, options, config).map_err(|refusal| refusal.of(clip.name))?;
        let (total, time) = (plan.indices.len(), self.limits.time);
        let mut progress = |_: Progress| true;
        let deadline = Instant::now() + time;
        let mut watch =
            Watch { input: clip.name, deadline, time, progress: &mut progress, done: 0, total: total as u32 };
        watch.limit("the number of sampled frames", total as u64, u64::from(self.limits.frames))?;
        let size = (clip.height, clip.width);
        let mut each = |take: &mut Take, watch: &mut Watch| {
            watch.done = 0;
            plan.indices.iter().try_for_each(|&index| {
                let rgb = (clip.frame)(index);
                check_bytes(clip.name, size, rgb.len())?;
                take(&rgb, watch)?;
                watch.done += 1;
                Ok(())
            })
        };
        let mut frames = SlowFast::new(self, options, size, total, &watch)?;
        each(&mut |rgb, watch| frames.push(rgb, watch), &mut watch)?;
        let SlowFastClip { kinds, sizes, pixels } = match frames.finish(&mut watch)? {
            Passes::None => return Err(unreadable("it has no frame")),
            Passes::One(clip) => clip,
            Passes::Two(mut again) => {
                each(&mut |rgb, watch| again.push(rgb, watch), &mut watch)?;
                again.finish(&watch)?
            }
        };
        let timestamp = |index: u64| match self.timestamps {
            TimestampRule::True => (index as f64 / clip.fps) as f32,
            TimestampRule::Reference => reference_timestamp(index, clip.fps),
        };
        let frames = plan.indices.iter().zip(kinds).map(|(&index, kind)| {
            let (height, width) = match kind {
                FrameKind::Slow => sizes.slow,
                FrameKind::Fast => sizes.fast,
            };
            Frame { index: index as usize, timestamp: Some(timestamp(index)), kind, height, width }
        });
        let patch = self.config.processor.patch_size;
        Ok(patches::assemble(MediaKind::Video, frames.collect(), pixels, patch, Some(plan.sample_fps)))
    }
}

/// Takes a frame, `[height, width, 3]`.
type Take<'a> = dyn FnMut(&[u8], &mut Watch) -> Result<(), MediaError> + 'a;

fn check_bytes(name: &str, (height, width): (u32, u32), found: usize) -> Result<(), MediaError> {
    let expected = (u64::from(height) * u64::from(width)).saturating_mul(3);
    match expected == found as u64 && expected > 0 {
        true => Ok(()),
        false => Err(MediaError::Unreadable {
            input: name.to_owned(),
            reason: format!("expected {expected} bytes for {height}x{width} pixels, found {found}"),
        }),
    }
}

//! Clips given as a list of pictures (spec §10.2.7 and §10.3.6).

use crate::adaptive_sampling::{adaptive_plan, adaptive_size};
use crate::error::Refusal;
use crate::ffmpeg::Watch;
use crate::options::{self, Target};
use crate::patches;
use crate::resample::{Kernel, Mode, Resizer, Scratch};
use crate::sampling::{quotient_timestamp, reference_timestamp, slow_fast_plan};
use crate::similarity::Classifier;
use crate::sizes::{SlowFastSizes, slow_fast_sizes};
use crate::slow_fast::patches_of;
use crate::still::{self, Picture, PixelRange};
use crate::{Frame, FrameItem, FrameKind, ItemOptions, Loader, Media, MediaError, MediaKind, VideoRule};

/// Opens and decodes one picture of the list, asking the watch meanwhile; given by the loader.
pub(crate) type Fetch<'a> = dyn Fn(&FrameItem, bool, &mut Watch) -> Result<Picture, MediaError> + 'a;

/// Loads a list of frames as a clip. The watch has the name of the list.
pub(crate) fn load(
    loader: &Loader,
    list: &[FrameItem],
    options: &ItemOptions,
    fetch: &Fetch,
    watch: &mut Watch,
) -> Result<Media, MediaError> {
    if list.is_empty() {
        return Err(watch.unreadable("it has no frame"));
    }
    for (index, frame) in list.iter().enumerate() {
        if let Some(own) = &frame.options {
            let own_options = match loader.config.video.rule {
                rule @ (VideoRule::SlowFast | VideoRule::Adaptive) => options::check(own, Target::Picture, rule),
                VideoRule::WholeClip if *own == ItemOptions::default() => Ok(()),
                VideoRule::WholeClip => Err(Refusal::new(
                    "options",
                    "frames of Keye-VL-8B-Preview take none of their own; those of later models do",
                )),
            };
            own_options.map_err(|refusal| refusal.of(&frame.source.name()).of_frame(index))?;
        }
    }
    match loader.config.video.rule {
        VideoRule::WholeClip => whole_clip(loader, list, options, fetch, watch),
        VideoRule::SlowFast | VideoRule::Adaptive => budgeted(loader, list, options, fetch, watch),
    }
}

/// Preview: every frame is a picture on its own, resized by the rules of pictures; the last one is doubled when their
/// number is odd.
fn whole_clip(
    loader: &Loader,
    list: &[FrameItem],
    options: &ItemOptions,
    fetch: &Fetch,
    watch: &mut Watch,
) -> Result<Media, MediaError> {
    let total = list.len().next_multiple_of(2);
    watch.total = total as u32;
    watch.limit("the number of frames", total as u64, u64::from(loader.limits.frames))?;
    let range = PixelRange::of_pictures(&loader.config.image);
    let processor = &loader.config.processor;
    let patch = processor.patch_size;
    let (mut pixels, mut frames): (Vec<u8>, Vec<Frame>) = (Vec::new(), Vec::new());
    for (index, item) in list.iter().enumerate() {
        watch.done = index as u32;
        watch.check()?;
        let picture = first_stage(loader, item, options, range, fetch, watch)
            .and_then(|picture| still::processor_stage(picture, &item.source.name(), processor, &loader.limits))
            .map_err(|error| error.of_frame(index))?;
        let (height, width) = (picture.height, picture.width);
        same_size(frames.first().map(|first| (first.height, first.width)), (height, width), (index, item), watch)?;
        check_patches(loader, (height, width), total, watch)?;
        let repeats = if index + 1 == list.len() { total - index } else { 1 };
        let timestamp = options.fps.map(|fps| reference_timestamp(index as u64, fps));
        for _ in 0..repeats {
            patches::cut(&picture.rgb, height, width, patch, &mut pixels);
            frames.push(Frame { index, timestamp, kind: FrameKind::Slow, height, width });
        }
    }
    watch.done = total as u32;
    watch.check()?;
    let sample_fps = options.fps.unwrap_or(loader.config.video.fps);
    Ok(patches::assemble(MediaKind::Video, frames, pixels, patch, Some(sample_fps)))
}

/// 1.5 and 2.0: frames are first brought to a size as pictures with the limits of video frames, then sampled, classified
/// (1.5) and resized like the frames of a clip. Only sampled frames are read; there are time stamps only when `fps` is given.
fn budgeted(
    loader: &Loader,
    list: &[FrameItem],
    options: &ItemOptions,
    fetch: &Fetch,
    watch: &mut Watch,
) -> Result<Media, MediaError> {
    let (video, patch) = (&loader.config.video, loader.config.processor.patch_size);
    let list_fps = options.fps.unwrap_or(video.fps);
    let adaptive = video.rule == VideoRule::Adaptive;
    let plan = if adaptive { adaptive_plan } else { slow_fast_plan };
    let plan = plan(list.len() as u64, list_fps, options, video).map_err(|refusal| refusal.of(watch.input))?;
    let total = plan.indices.len();
    watch.total = total as u32;
    watch.limit("the number of frames", total as u64, u64::from(loader.limits.frames))?;
    let range = PixelRange {
        default: (video.min_pixels, video.max_pixels),
        pair: (loader.config.image.min_pixels, loader.config.image.max_pixels),
    };
    let threshold = options.min_frame_similarity.unwrap_or(video.min_frame_similarity);

    let (mut kept, mut kinds): (Vec<Picture>, Vec<FrameKind>) = (Vec::new(), Vec::new());
    let mut classifier: Option<Classifier> = None;
    for (done, &index) in plan.indices.iter().enumerate() {
        watch.done = done as u32;
        watch.check()?;
        let (index, item) = (index as usize, &list[index as usize]);
        let picture = first_stage(loader, item, options, range, fetch, watch).map_err(|error| error.of_frame(index))?;
        let size = (picture.height, picture.width);
        same_size(kept.first().map(|first| (first.height, first.width)), size, (index, item), watch)?;
        check_patches(loader, size, total, watch)?;
        let classifier = match &mut classifier {
            _ if adaptive => None,
            Some(classifier) => Some(classifier),
            None => {
                let new = Classifier::new(size.0, size.1, threshold);
                Some(classifier.insert(new.map_err(|reason| watch.unreadable(reason))?))
            }
        };
        kinds.push(classifier.map_or(FrameKind::Slow, |classifier| classifier.push(&picture.rgb)));
        kept.push(picture);
    }
    let Some((h, w)) = kept.first().map(|first| (first.height, first.width)) else {
        return Err(watch.unreadable("it has no frame"));
    };

    let slow_count = kinds.iter().filter(|kind| **kind == FrameKind::Slow).count();
    let sizes = match adaptive {
        true => adaptive_size(h, w, total as u64, plan.total_pixels, options, video)
            .map(|size| SlowFastSizes { slow: size, fast: size }),
        false => slow_fast_sizes(h, w, slow_count as u64, (total - slow_count) as u64, options, video),
    };
    let sizes = sizes.map_err(|reason| watch.unreadable(reason))?;
    check_patches(loader, sizes.slow, slow_count, watch)?;
    check_patches(loader, sizes.fast, total - slow_count, watch)?;
    let resizer = |(to_h, to_w)| Resizer::new(h, w, to_h, to_w, Kernel::Bilinear, Mode::Int16);
    let (slow, fast) = (resizer(sizes.slow), resizer(sizes.fast));
    let (mut resized, mut scratch, mut pixels, mut frames) = (Vec::new(), Scratch::default(), Vec::new(), Vec::new());
    for ((picture, kind), &index) in kept.into_iter().zip(kinds).zip(&plan.indices) {
        let (resizer, (height, width)) = match kind {
            FrameKind::Slow => (&slow, sizes.slow),
            FrameKind::Fast => (&fast, sizes.fast),
        };
        resizer.run(&picture.rgb, &mut resized, &mut scratch);
        patches::cut(&resized, height, width, patch, &mut pixels);
        let time = if adaptive { quotient_timestamp } else { reference_timestamp };
        let timestamp = options.fps.map(|fps| time(index, fps));
        frames.push(Frame { index: index as usize, timestamp, kind, height, width });
    }
    watch.done = total as u32;
    watch.check()?;
    Ok(patches::assemble(MediaKind::Video, frames, pixels, patch, Some(plan.sample_fps)))
}

fn first_stage(
    loader: &Loader,
    item: &FrameItem,
    options: &ItemOptions,
    range: PixelRange,
    fetch: &Fetch,
    watch: &mut Watch,
) -> Result<Picture, MediaError> {
    let options = item.options.as_ref().unwrap_or(options);
    let picture = fetch(item, options.exif == Some(true), watch)?;
    still::first_stage(picture, &item.source.name(), options, range, &loader.limits)
}

fn same_size(
    first: Option<(u32, u32)>,
    size: (u32, u32),
    (index, item): (usize, &FrameItem),
    watch: &Watch,
) -> Result<(), MediaError> {
    match first {
        Some(first) if first != size => Err(watch.unreadable(format!(
            "frame {index} ({}) becomes {}x{} pixels, the first one {}x{}; give frames of one shape, or resized_height \
             and resized_width",
            item.source.name(),
            size.0,
            size.1,
            first.0,
            first.1
        ))),
        _ => Ok(()),
    }
}

/// The patches of `frames` frames of a size, if the limit allows so many.
pub(crate) fn check_patches(
    loader: &Loader,
    size: (u32, u32),
    frames: usize,
    watch: &Watch,
) -> Result<u64, MediaError> {
    let found = patches_of(size, loader.config.processor.patch_size).saturating_mul(frames as u64);
    watch.limit("the number of patches", found, loader.limits.patches)?;
    Ok(found)
}

//! Which frames of a clip are looked at (spec §10.2 and §10.3, steps 1 to 4 and 1 to 2).

use crate::error::Refusal;
use crate::{ItemOptions, VideoConfig};

/// Frame counts of Preview are even.
const FRAME_FACTOR: f64 = 2.0;

/// The sampled frames of a clip.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SamplePlan {
    /// Indices in the clip, not decreasing; a very dense sampling can name a frame twice.
    pub indices: Vec<u64>,
    /// Sampled frames per second of the clip.
    pub sample_fps: f64,
    /// Pixels that its frames may have together.
    pub total_pixels: f64,
}

/// Preview's sampling of a clip of `total` frames at `video_fps`.
pub(crate) fn whole_clip_plan(
    total: u64,
    video_fps: f64,
    options: &ItemOptions,
    config: &VideoConfig,
) -> Result<SamplePlan, Refusal> {
    let (start, end) = frame_range(total, video_fps, options, 2)?;
    let frames = (end - start + 1) as f64;
    let wanted = match options.nframes {
        Some(_) if options.fps.is_some() => {
            return Err(Refusal::new("nframes", "excludes fps; give one of the two"));
        }
        Some(nframes) => (nframes / FRAME_FACTOR).round_ties_even() * FRAME_FACTOR,
        None => {
            let fps = options.fps.unwrap_or(config.fps);
            let min_frames = f64::from(options.min_frames.unwrap_or(config.min_frames));
            let max_frames = options.max_frames.map_or(f64::from(config.max_frames).min(frames), f64::from);
            let min_frames = (min_frames / FRAME_FACTOR).ceil() * FRAME_FACTOR;
            let max_frames = (max_frames / FRAME_FACTOR).floor() * FRAME_FACTOR;
            let wanted = (frames / video_fps * fps).max(min_frames).min(max_frames).min(frames);
            (wanted / FRAME_FACTOR).floor() * FRAME_FACTOR
        }
    };
    if !(FRAME_FACTOR <= wanted && wanted <= frames) {
        let option = if options.nframes.is_some() { "nframes" } else { "fps" };
        let reason = format!("{wanted} frames would be sampled, expected {FRAME_FACTOR} to the {frames} there are");
        return Err(Refusal::new(option, reason));
    }
    let indices = linspace(start, end, wanted as u64);
    let total_pixels = options.total_pixels.unwrap_or(config.total_pixels) as f64;
    Ok(SamplePlan { indices, sample_fps: wanted / frames.max(1e-6) * video_fps, total_pixels })
}

/// 1.5's sampling of a clip of `total` frames at `video_fps`. At least one frame is sampled, where the reference fails
/// on clips shorter than half a second. `video_start` and `video_end`, which the reference refuses, cut the range the
/// same way as Preview's.
pub(crate) fn slow_fast_plan(
    total: u64,
    video_fps: f64,
    options: &ItemOptions,
    config: &VideoConfig,
) -> Result<SamplePlan, Refusal> {
    let (start, end) = frame_range(total, video_fps, options, 1)?;
    let frames = end - start + 1;
    let wanted = slow_fast_count(frames, video_fps, options, config);
    let indices = linspace(start, end, wanted);
    let total_pixels = options.video_total_pixels.unwrap_or(config.total_pixels) as f64;
    Ok(SamplePlan { indices, sample_fps: wanted as f64 / frames as f64 * video_fps, total_pixels })
}

/// `min(int(frames / video_fps * fps), int(total_pixels / min_pixels), max_frames)`, at least 1.
fn slow_fast_count(frames: u64, video_fps: f64, options: &ItemOptions, config: &VideoConfig) -> u64 {
    let fps = options.fps.unwrap_or(config.fps).min(video_fps);
    let total_pixels = options.video_total_pixels.unwrap_or(config.total_pixels) as f64;
    let min_pixels = options.min_pixels.unwrap_or(config.min_pixels) as f64;
    let max_frames = options.max_frames.map_or(u64::from(config.max_frames), u64::from);
    let affordable = (total_pixels / min_pixels) as u64;
    let by_rate = (frames as f64 / video_fps * fps) as u64;
    by_rate.min(affordable.min(max_frames)).clamp(1, frames)
}

/// Time of frame `i` as the reference has it: the double product `(1/fps)*i`, rounded to float32.
pub(crate) fn reference_timestamp(i: u64, fps: f64) -> f32 {
    ((1.0 / fps) * i as f64) as f32
}

/// Time of frame `i` as 2.0's reference has it: the quotient, rounded to float32.
pub(crate) fn quotient_timestamp(i: u64, fps: f64) -> f32 {
    (i as f64 / fps) as f32
}

/// First and last frame of the wanted part, both included; a part named by the options has at least `shortest` frames.
pub(crate) fn frame_range(
    total: u64,
    video_fps: f64,
    options: &ItemOptions,
    shortest: u64,
) -> Result<(u64, u64), Refusal> {
    if total == 0 {
        return Err(Refusal::new("video", "the clip has no frame"));
    }
    if !(video_fps.is_finite() && video_fps > 0.0) {
        return Err(Refusal::new("video", format!("the clip's frame rate is {video_fps}, expected a positive number")));
    }
    let duration = total as f64 / video_fps;
    let clamped = |seconds: f64| seconds.min(duration).max(0.0);
    let start = options.video_start.map_or(0, |s| (clamped(s) * video_fps).ceil() as u64);
    let end = options.video_end.map_or(total - 1, |s| ((clamped(s) * video_fps).floor() as u64).min(total - 1));
    let option = if options.video_start.is_some() { "video_start" } else { "video_end" };
    let named = options.video_start.is_some() || options.video_end.is_some();
    if named && end.saturating_add(1).saturating_sub(start) < shortest {
        let part = match start > end {
            true => "no frame is shown in this part of the clip".to_owned(),
            false => format!("the part from frame {start} to frame {end} is too short"),
        };
        let reason = format!("{part}; the clip has {total} frames, {duration:.2} s at {video_fps} frames per second");
        return Err(Refusal::new(option, reason));
    }
    Ok((start, end))
}

/// `torch.linspace(start, end, n).round()` in float32, products fused into sums as torch's build does (seen in clips of
/// more than 60,000 frames); both ends included, `n` = 1 gives `start`.
pub(crate) fn linspace(start: u64, end: u64, n: u64) -> Vec<u64> {
    if n == 1 {
        return vec![start];
    }
    let (first, last) = (start as f32, end as f32);
    let step = (last - first) / (n - 1) as f32;
    let at = |i: u64| if i < n / 2 { step.mul_add(i as f32, first) } else { (-step).mul_add((n - 1 - i) as f32, last) };
    (0..n).map(|i| (at(i).round_ties_even() as u64).clamp(start, end)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MediaConfig;

    #[test]
    fn linspace_covers_both_ends_in_order() {
        for (start, end, n) in [(0, 99, 7), (5, 5, 1), (0, 1, 2), (12, 16_000_001, 768), (0, 3, 4)] {
            let indices = linspace(start, end, n);
            assert_eq!(indices.len() as u64, n);
            assert_eq!(indices[0], start);
            assert!(n == 1 || indices[n as usize - 1] == end, "{start} {end} {n}");
            assert!(indices.is_sorted() && indices.iter().all(|i| (start..=end).contains(i)));
        }
    }

    #[test]
    fn a_part_of_a_slow_fast_clip_keeps_absolute_indices() {
        let config = MediaConfig::slow_fast().video;
        let options = ItemOptions { video_start: Some(1.0), video_end: Some(2.5), ..Default::default() };
        let plan = slow_fast_plan(100, 25.0, &options, &config).unwrap();
        // 38 frames from 25 to 62: int(38/25*2) = 3.
        assert_eq!(plan.indices, [25, 44, 62]);
        let past = ItemOptions { video_start: Some(99.0), ..Default::default() };
        let refusal = slow_fast_plan(100, 25.0, &past, &config).unwrap_err();
        assert!(
            refusal.reason.starts_with("no frame is shown in this part of the clip; the clip has 100"),
            "{refusal:?}"
        );
    }

    #[test]
    fn hostile_numbers_do_not_overflow() {
        let options = ItemOptions { fps: Some(1e300), nframes: None, ..Default::default() };
        for fps in [1e-300, 1e300, 0.0, f64::NAN, f64::INFINITY] {
            let _ = whole_clip_plan(1000, fps, &options, &MediaConfig::preview().video);
            let _ = slow_fast_plan(1000, fps, &options, &MediaConfig::slow_fast().video);
        }
        assert!(whole_clip_plan(u64::MAX, 25.0, &options, &MediaConfig::preview().video).is_ok());
    }
}

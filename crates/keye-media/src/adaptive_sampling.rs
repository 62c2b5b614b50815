//! Keye-VL-2.0's frames and sizes: as many frames of one size as a budget of pixels allows (`docs/spec/keye-vl-2.md` §5.4
//! and §5.5).

use crate::error::Refusal;
use crate::sampling::{SamplePlan, frame_range, linspace};
use crate::smart_resize::{IMAGE_FACTOR, TOKEN_PIXELS, smart_resize_real};
use crate::{ItemOptions, VideoConfig};

/// The sampled frames of a clip of `total` frames at `video_fps`. `video_start` and `video_end` cut the range as they do
/// for Preview; indices stay those of the whole clip.
pub(crate) fn adaptive_plan(
    total: u64,
    video_fps: f64,
    options: &ItemOptions,
    config: &VideoConfig,
) -> Result<SamplePlan, Refusal> {
    let (start, end) = frame_range(total, video_fps, options, 1)?;
    let frames = end - start + 1;
    let total_pixels = budget(frames as f64 / video_fps, options, config);
    let fps = options.fps.unwrap_or(config.fps).min(video_fps);
    // The variant's smallest frame counts here, not the item's `min_pixels`; that is the reference's behaviour.
    let affordable = (total_pixels / config.min_pixels.max(1) as f64).floor().max(1.0) as u64;
    let max_frames = options.max_frames.unwrap_or(config.max_frames);
    let min_frames = u64::from(options.min_frames.unwrap_or(config.min_frames));
    let by_rate = (frames as f64 / video_fps * fps) as u64;
    let wanted = by_rate.max(min_frames).min(affordable.min(u64::from(max_frames))).clamp(1, frames);
    let sample_fps = wanted as f64 / frames as f64 * video_fps;
    Ok(SamplePlan { indices: linspace(start, end, wanted), sample_fps, total_pixels })
}

/// Pixels for a clip of so many seconds, not a whole number where a share of the budget is taken.
///
/// Every clip counts as the only one of its conversation, as it does in the reference's server, whose number of clips is
/// always 1. The reference's offline helper divides the budget among the clips and takes shares for a single one only;
/// here a clip's patches do not depend on its neighbours, so that they can be kept and shared by conversations.
fn budget(seconds: f64, options: &ItemOptions, config: &VideoConfig) -> f64 {
    let whole = options.video_total_pixels.unwrap_or(config.total_pixels) as f64;
    let share = config.budget_shares.iter().find(|(longest, _)| seconds <= *longest);
    share.map_or(whole, |(_, share)| whole * share)
}

/// `(height, width)` of all `n` frames of a clip of `h` x `w` within a budget of `total_pixels`.
///
/// The search ends on the first number of tokens that does *not* fit, so that the budget may be exceeded by a token a
/// frame; that is the reference's behaviour.
pub(crate) fn adaptive_size(
    h: u32,
    w: u32,
    n: u64,
    total_pixels: f64,
    options: &ItemOptions,
    config: &VideoConfig,
) -> Result<(u32, u32), String> {
    let min = options.min_pixels.unwrap_or(config.min_pixels).max(config.min_pixels);
    let tokens = tokens_limit(n, total_pixels, min, options.max_pixels.unwrap_or(config.max_pixels));
    smart_resize_real(h, w, IMAGE_FACTOR, min as f64, (u128::from(tokens) * u128::from(TOKEN_PIXELS)) as f64)
}

fn tokens_limit(n: u64, total_pixels: f64, min: u64, max: u64) -> u64 {
    let total = total_pixels as u128;
    let mut left = (min / TOKEN_PIXELS).max(1);
    let mut right = (max / TOKEN_PIXELS).max(left);
    while left < right {
        // Both are below 2^64 / 784.
        let middle = (left + right) / 2;
        match u128::from(n) * u128::from(middle) * u128::from(TOKEN_PIXELS) > total {
            true => right = middle,
            false => left = middle + 1,
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::{BUDGET_SHARES, MediaConfig};

    #[derive(Deserialize)]
    struct Cases {
        videos: Vec<Video>,
        smart_resize: Vec<Size>,
    }

    #[derive(Deserialize)]
    struct Video {
        total_frames: u64,
        video_fps: f64,
        height: u32,
        width: u32,
        preprocess_kwargs: ItemOptions,
        adaptive: bool,
        expect: Expected,
    }

    #[derive(Deserialize)]
    struct Expected {
        nframes: usize,
        first: Vec<u64>,
        last: Vec<u64>,
        index_sum: u64,
        tokens_limit: u64,
        height: u32,
        width: u32,
        tokens_per_frame: u32,
        total_tokens: u64,
        timestamps_first: Vec<String>,
        timestamps_last: Vec<String>,
    }

    #[derive(Deserialize)]
    struct Size {
        height: u32,
        width: u32,
        min_pixels: u64,
        max_pixels: u64,
        expect: Option<[u32; 2]>,
    }

    fn cases() -> Cases {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/keye-2-tiny/sampling_cases.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn frames_and_sizes_equal_the_reference() {
        let cases = cases().videos;
        assert!(cases.len() >= 40);
        for (i, case) in cases.iter().enumerate() {
            let (options, expect) = (&case.preprocess_kwargs, &case.expect);
            let mut config = MediaConfig::adaptive().video;
            if case.adaptive {
                config.budget_shares = BUDGET_SHARES;
            }
            let plan = adaptive_plan(case.total_frames, case.video_fps, options, &config).unwrap();
            let n = plan.indices.len();
            assert_eq!(n, expect.nframes, "case {i}");
            assert!(plan.indices.starts_with(&expect.first) && plan.indices.ends_with(&expect.last), "case {i}");
            assert_eq!(plan.indices.iter().sum::<u64>(), expect.index_sum, "case {i}");

            let min = options.min_pixels.unwrap_or(0).max(config.min_pixels);
            let max = options.max_pixels.unwrap_or(config.max_pixels);
            assert_eq!(tokens_limit(n as u64, plan.total_pixels, min, max), expect.tokens_limit, "case {i}");
            let size = adaptive_size(case.height, case.width, n as u64, plan.total_pixels, options, &config);
            let (h, w) = size.unwrap();
            assert_eq!((h, w), (expect.height, expect.width), "case {i}");
            assert_eq!(h * w / 784, expect.tokens_per_frame, "case {i}");
            assert_eq!(u64::from(h * w / 784) * n as u64, expect.total_tokens, "case {i}");

            let times: Vec<String> = plan
                .indices
                .iter()
                .map(|index| format!("{:.1}", crate::sampling::quotient_timestamp(*index, case.video_fps)))
                .collect();
            assert!(times.starts_with(&expect.timestamps_first), "case {i}: {:?}", &times[..5.min(n)]);
            assert!(times.ends_with(&expect.timestamps_last), "case {i}: {:?}", expect.timestamps_last);
        }
    }

    #[test]
    fn sizes_equal_the_reference() {
        let cases = cases().smart_resize;
        assert!(cases.len() >= 60);
        for case in cases {
            let (min, max) = (case.min_pixels as f64, case.max_pixels as f64);
            let found = smart_resize_real(case.height, case.width, IMAGE_FACTOR, min, max).ok();
            assert_eq!(found.map(|(h, w)| [h, w]), case.expect, "{}x{}", case.height, case.width);
        }
    }

    #[test]
    fn hostile_numbers_end() {
        let config = MediaConfig::adaptive().video;
        for (min, max, total) in [(u64::MAX, 1, 1), (1, u64::MAX, u64::MAX), (u64::MAX, u64::MAX, u64::MAX)] {
            let options = ItemOptions {
                min_pixels: Some(min),
                max_pixels: Some(max),
                video_total_pixels: Some(total),
                ..Default::default()
            };
            for fps in [1e-300, 30.0, 1e300] {
                let plan = adaptive_plan(1000, fps, &options, &config).unwrap();
                let _ = adaptive_size(720, 1280, u64::MAX, plan.total_pixels, &options, &config);
            }
        }
    }
}

//! Frame sizes of clips (spec §10.2.5, §10.3.4 and 5).

use crate::smart_resize::{IMAGE_FACTOR, TOKEN_PIXELS, smart_resize_real, smart_resize_utils};
use crate::{ItemOptions, VideoConfig};

/// The `resized_height`/`resized_width` pair is fitted into the default limits of still pictures, 4 to 16384 tokens in
/// keye-vl-utils 1.0.0; 1.5.2 takes no pair for clips.
const PAIR_PIXELS: (u64, u64) = (4 * TOKEN_PIXELS, 16_384 * TOKEN_PIXELS);

/// Sizes `(height, width)` of a slow/fast clip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlowFastSizes {
    /// Of slow frames.
    pub slow: (u32, u32),
    /// Of fast frames.
    pub fast: (u32, u32),
}

/// Preview: `(height, width)` of all `n` frames of a clip of `h` x `w`.
pub(crate) fn whole_clip_size(
    h: u32,
    w: u32,
    n: u64,
    options: &ItemOptions,
    config: &VideoConfig,
) -> Result<(u32, u32), String> {
    if let (Some(height), Some(width)) = (options.resized_height, options.resized_width) {
        return smart_resize_utils(height, width, IMAGE_FACTOR, PAIR_PIXELS.0, PAIR_PIXELS.1);
    }
    let min = options.min_pixels.unwrap_or(config.min_pixels) as f64;
    let total = options.total_pixels.unwrap_or(config.total_pixels) as f64;
    // Twice the share of a frame: the reference counts as if two frames were one time step.
    let share = total / n.max(1) as f64 * 2.0;
    let max = (config.max_pixels as f64).min(share).max((min * 1.05).floor());
    let max = options.max_pixels.map_or(max, |wanted| max.min(wanted as f64));
    smart_resize_real(h, w, IMAGE_FACTOR, min, max)
}

/// 1.5: the most pixels of a slow frame that the budget allows a clip with so many slow and fast frames.
///
/// The search for the number of tokens ends on the first one that does *not* fit, so that the budget may be exceeded a
/// little; that is the reference's behaviour.
pub(crate) fn most_slow_pixels(slow: u64, fast: u64, options: &ItemOptions, config: &VideoConfig) -> f64 {
    let side = f64::from(IMAGE_FACTOR);
    let min = least_pixels(options, config);
    let budget = options.video_total_pixels.unwrap_or(config.total_pixels);
    let min_tokens = (min as f64 / side / side) as u64;
    let estimate = |tokens: u64| {
        let fast_tokens = ((config.fast_token_ratio * tokens as f64) as u64).max(min_tokens);
        let tokens = u128::from(slow) * u128::from(tokens) + u128::from(fast) * u128::from(fast_tokens);
        tokens * u128::from(TOKEN_PIXELS)
    };

    let mut left = min as f64 / side / side;
    let mut right = options.max_pixels.unwrap_or(config.max_pixels) as f64 / side / side;
    while left < right {
        let middle = (left + right) as u64 / 2;
        if estimate(middle) > u128::from(budget) {
            right = middle as f64;
        } else {
            left = (middle + 1) as f64;
        }
    }
    left * side * side
}

fn least_pixels(options: &ItemOptions, config: &VideoConfig) -> u64 {
    options.min_pixels.unwrap_or(config.min_pixels).max(config.min_pixels)
}

/// 1.5: sizes of a clip of `h` x `w` with so many slow and fast frames.
pub(crate) fn slow_fast_sizes(
    h: u32,
    w: u32,
    slow: u64,
    fast: u64,
    options: &ItemOptions,
    config: &VideoConfig,
) -> Result<SlowFastSizes, String> {
    let side = f64::from(IMAGE_FACTOR);
    let min = least_pixels(options, config);
    let slow_max = most_slow_pixels(slow, fast, options, config);

    let min = min as f64;
    let slow_size = smart_resize_real(h, w, IMAGE_FACTOR, min, slow_max)?;
    let slow_tokens = f64::from(slow_size.0) * f64::from(slow_size.1) / side / side;
    let fast_max = (slow_tokens * config.fast_token_ratio).floor() * side * side;
    let fast_max = fast_max.max(config.min_pixels as f64);
    let fast_size = smart_resize_real(h, w, IMAGE_FACTOR, min, fast_max)?;
    Ok(SlowFastSizes { slow: slow_size, fast: fast_size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MediaConfig;

    #[test]
    fn the_search_ends_for_hostile_limits() {
        let config = MediaConfig::slow_fast().video;
        for max_pixels in [1, 37_632, 37_633, u64::MAX] {
            for budget in [1, 51_380_224, u64::MAX] {
                let options = ItemOptions {
                    max_pixels: Some(max_pixels),
                    video_total_pixels: Some(budget),
                    ..Default::default()
                };
                let _ = slow_fast_sizes(480, 640, u64::MAX, u64::MAX, &options, &config);
            }
        }
    }

    #[test]
    fn fast_frames_are_smaller_when_there_is_room() {
        let config = MediaConfig::slow_fast().video;
        let sizes = slow_fast_sizes(720, 1280, 2, 8, &ItemOptions::default(), &config).unwrap();
        let pixels = |(h, w): (u32, u32)| h * w;
        assert!(pixels(sizes.fast) * 3 <= pixels(sizes.slow), "{sizes:?}");
    }
}

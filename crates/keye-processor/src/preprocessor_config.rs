//! preprocessor_config.json.
//!
//! The published files hold the image processor alone; the limits of clips are part of a variant. A checkpoint of another
//! size than the published ones says its own under `video`: any of `fps`, `min_pixels` and `max_pixels` (of a frame),
//! `total_pixels`, `fast_token_ratio`, `min_frame_similarity`.

use std::path::Path;

use keye_media::{ProcessorConfig, Resample, VideoConfig};
use serde_json::Value;

use crate::files::{CONFIG_BYTES, Fields};
use crate::{CheckpointFiles, ProcessorError};

/// Its name.
pub(crate) const FILE: &str = "preprocessor_config.json";
const MAX_PIXELS: u64 = 1 << 40;

/// Reads `preprocessor_config.json` of a checkpoint; without the file, the published values (spec §10.1) and
/// the limits of clips as `video` has them.
pub(crate) fn load(
    files: &CheckpointFiles,
    video: VideoConfig,
) -> Result<(ProcessorConfig, VideoConfig), ProcessorError> {
    let path = files.path(FILE);
    match files.read_json_if_present(FILE, CONFIG_BYTES)? {
        Some(value) => Ok((from_value(&path, &value)?, clips(&path, &value, video)?)),
        None => Ok((ProcessorConfig::default(), video)),
    }
}

/// The limits of clips: those of `video` in the file, else those of the variant.
fn clips(path: &Path, value: &Value, variant: VideoConfig) -> Result<VideoConfig, ProcessorError> {
    let file = Fields::of(path, value)?;
    let Some(own) = file.object("video")? else { return Ok(variant) };
    let pixels =
        |name: &str, default: u64| Ok::<u64, ProcessorError>(own.uint(name, 1..=MAX_PIXELS)?.unwrap_or(default));
    let video = VideoConfig {
        fps: own.number("fps", 1e-3..=1e3)?.unwrap_or(variant.fps),
        min_pixels: pixels("min_pixels", variant.min_pixels)?,
        max_pixels: pixels("max_pixels", variant.max_pixels)?,
        total_pixels: pixels("total_pixels", variant.total_pixels)?,
        fast_token_ratio: own.number("fast_token_ratio", 0.0..=1.0)?.unwrap_or(variant.fast_token_ratio),
        min_frame_similarity: own.number("min_frame_similarity", 0.0..=1.1)?.unwrap_or(variant.min_frame_similarity),
        ..variant
    };
    if video.min_pixels > video.max_pixels {
        let found = format_args!("expected at most max_pixels ({}), found {}", video.max_pixels, video.min_pixels);
        return Err(own.error("min_pixels", found));
    }
    Ok(video)
}

/// Checks the contents of a preprocessor_config.json.
///
/// Newer files say `size: {"shortest_edge": .., "longest_edge": ..}` for `min_pixels` and `max_pixels`.
pub(crate) fn from_value(path: &Path, value: &Value) -> Result<ProcessorConfig, ProcessorError> {
    let file = Fields::of(path, value)?;
    let default = ProcessorConfig::default();
    let size = file.object("size")?;
    let pixels = |name: &str, in_size: &str, default| {
        let own = file.uint(name, 1..=MAX_PIXELS)?;
        let nested = size.as_ref().map(|size| match size.uint(name, 1..=MAX_PIXELS)? {
            Some(n) => Ok(Some(n)),
            None => size.uint(in_size, 1..=MAX_PIXELS),
        });
        Ok::<u64, ProcessorError>(own.or(nested.transpose()?.flatten()).unwrap_or(default))
    };
    let min_pixels = pixels("min_pixels", "shortest_edge", default.min_pixels)?;
    let max_pixels = pixels("max_pixels", "longest_edge", default.max_pixels)?;
    if min_pixels > max_pixels {
        return Err(
            file.error("min_pixels", format_args!("expected at most max_pixels ({max_pixels}), found {min_pixels}"))
        );
    }
    if let Some(found) = file.uint("temporal_patch_size", 1..=1024)?.filter(|n| *n != 1) {
        return Err(file.error("temporal_patch_size", format_args!("expected 1, found {found}")));
    }
    Ok(ProcessorConfig {
        min_pixels,
        max_pixels,
        patch_size: file.size("patch_size", 64, Some(default.patch_size as usize))? as u32,
        merge_size: file.size("merge_size", 8, Some(default.merge_size as usize))? as u32,
        resample: match file.uint("resample", 0..=5)? {
            None => default.resample,
            Some(2) => Resample::Bilinear,
            Some(3) => Resample::Bicubic,
            Some(other) => {
                return Err(file.error("resample", format_args!("expected 2 (bilinear) or 3 (bicubic), found {other}")));
            }
        },
        image_mean: channels(&file, "image_mean", -1e3..=1e3)?.unwrap_or(default.image_mean),
        image_std: channels(&file, "image_std", 1e-6..=1e6)?.unwrap_or(default.image_std),
        rescale_factor: file.number("rescale_factor", 1e-12..=1e3)?.unwrap_or(default.rescale_factor),
        do_resize: file.bool("do_resize")?.unwrap_or(default.do_resize),
        do_rescale: file.bool("do_rescale")?.unwrap_or(default.do_rescale),
        do_normalize: file.bool("do_normalize")?.unwrap_or(default.do_normalize),
    })
}

/// One number per channel, or one for all.
fn channels(
    file: &Fields,
    name: &str,
    range: std::ops::RangeInclusive<f64>,
) -> Result<Option<[f32; 3]>, ProcessorError> {
    let expected = format!("expected three numbers from {} to {}", range.start(), range.end());
    let wrong = || file.error(name, &expected);
    let number = |v: &Value| v.as_f64().filter(|n| range.contains(n)).map(|n| n as f32).ok_or_else(wrong);
    match file.get(name) {
        None => Ok(None),
        Some(Value::Array(list)) => match &list[..] {
            [r, g, b] => Ok(Some([number(r)?, number(g)?, number(b)?])),
            _ => Err(wrong()),
        },
        Some(one) => Ok(Some([number(one)?; 3])),
    }
}

#[cfg(test)]
mod tests {
    use keye_media::MediaConfig;
    use serde_json::json;

    use super::*;

    fn load(value: Value) -> Result<ProcessorConfig, ProcessorError> {
        from_value(Path::new("preprocessor_config.json"), &value)
    }

    #[test]
    fn absent_fields_are_the_published_values() {
        assert_eq!(load(json!({})).unwrap(), ProcessorConfig::default());
    }

    #[test]
    fn limits_stand_at_the_top_or_in_size() {
        let config = load(json!({"size": {"shortest_edge": 784, "longest_edge": 7840}, "resample": 2})).unwrap();
        assert_eq!((config.min_pixels, config.max_pixels, config.resample), (784, 7840, Resample::Bilinear));
        let config = load(json!({"size": {"min_pixels": 784, "max_pixels": 7840}, "max_pixels": 9000})).unwrap();
        assert_eq!((config.min_pixels, config.max_pixels), (784, 9000));
        assert_eq!(load(json!({"image_std": 0.25})).unwrap().image_std, [0.25; 3]);
    }

    #[test]
    fn a_checkpoint_may_have_limits_of_its_own_for_clips() {
        let load = |value: Value| clips(Path::new("preprocessor_config.json"), &value, MediaConfig::slow_fast().video);
        assert_eq!(load(json!({})).unwrap(), MediaConfig::slow_fast().video);
        let own = json!({"video": {"min_pixels": 3136, "max_pixels": 12544, "fps": 4, "min_frame_similarity": 0.95}});
        let found = load(own).unwrap();
        assert_eq!(
            (found.min_pixels, found.max_pixels, found.fps, found.min_frame_similarity),
            (3136, 12544, 4.0, 0.95)
        );
        assert_eq!(found.total_pixels, MediaConfig::slow_fast().video.total_pixels);
        for (value, named) in [
            (json!({"video": {"min_pixels": 9, "max_pixels": 8}}), "video.min_pixels"),
            (json!({"video": {"fast_token_ratio": 2}}), "video.fast_token_ratio"),
            (json!({"video": 3}), "video"),
        ] {
            let error = load(value.clone()).expect_err(named).to_string();
            assert!(error.contains(named), "{value}: {error}");
        }
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            (json!({"min_pixels": 9, "max_pixels": 8}), "min_pixels"),
            (json!({"size": {"longest_edge": "x"}}), "size.longest_edge"),
            (json!({"temporal_patch_size": 2}), "temporal_patch_size"),
            (json!({"resample": 1}), "resample"),
            (json!({"image_mean": [0.5, 0.5]}), "image_mean"),
            (json!({"image_std": [0.5, 0.5, 0]}), "image_std"),
            (json!({"patch_size": 0}), "patch_size"),
            (json!({"do_resize": 1}), "do_resize"),
        ];
        for (value, named) in cases {
            let error = load(value.clone()).expect_err(named).to_string();
            assert!(error.contains(named), "{value}: {error}");
        }
    }
}

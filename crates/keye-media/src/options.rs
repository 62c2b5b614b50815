//! Which options an item may carry, by kind of source and variant (spec §10.1 to §10.3).

use crate::error::Refusal;
use crate::{ItemOptions, VideoRule};

/// What the options apply to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// A still picture, or one frame of a list with options of its own.
    Picture,
    /// A clip in one file.
    ClipFile,
    /// A clip as a list of pictures.
    FrameList,
}

const PREVIEW: &str = "Keye-VL-8B-Preview";
const SLOW_FAST: &str = "Keye-VL-1.5";
const ADAPTIVE: &str = "Keye-VL-2.0";

/// Refuses options that are out of range or that nothing would read.
pub(crate) fn check(options: &ItemOptions, target: Target, rule: VideoRule) -> Result<(), Refusal> {
    let (preview, slow_fast) =
        (takes(Target::ClipFile, VideoRule::WholeClip), takes(Target::ClipFile, VideoRule::SlowFast));
    let allowed = takes(target, rule);
    for option in given(options) {
        if allowed.contains(&option) {
            continue;
        }
        let here = match (target, rule) {
            (Target::Picture, _) => "pictures do".to_owned(),
            (Target::ClipFile, VideoRule::WholeClip) => format!("video files of {PREVIEW} do"),
            (Target::ClipFile, VideoRule::SlowFast) => format!("video files of {SLOW_FAST} do"),
            (Target::ClipFile, VideoRule::Adaptive) => format!("video files of {ADAPTIVE} do"),
            (Target::FrameList, VideoRule::Adaptive) => format!("frame lists of {ADAPTIVE} do"),
            (Target::FrameList, VideoRule::WholeClip) => format!("frame lists of {PREVIEW} do"),
            (Target::FrameList, VideoRule::SlowFast) => format!("frame lists of {SLOW_FAST} do"),
        };
        let mut takers = Vec::new();
        if preview.contains(&option) {
            takers.push(format!("video files of {PREVIEW}"));
        }
        if slow_fast.contains(&option) {
            takers.push(format!("video files of {SLOW_FAST}"));
        }
        if takes(Target::Picture, rule).contains(&option) {
            takers.push("pictures".to_owned());
        }
        return Err(Refusal::new(option, format!("{here} not take it; {} do", takers.join(" and "))));
    }
    ranges(options)
}

/// The options that are read, by their names.
fn takes(target: Target, rule: VideoRule) -> &'static [&'static str] {
    match (target, rule) {
        (Target::Picture, _) => &["min_pixels", "max_pixels", "resized_height", "resized_width", "exif"],
        (Target::ClipFile, VideoRule::WholeClip) => &[
            "fps",
            "nframes",
            "min_frames",
            "max_frames",
            "min_pixels",
            "max_pixels",
            "resized_height",
            "resized_width",
            "video_start",
            "video_end",
            "total_pixels",
        ],
        (Target::ClipFile, VideoRule::SlowFast) => &[
            "fps",
            "max_frames",
            "min_pixels",
            "max_pixels",
            "video_total_pixels",
            "min_frame_similarity",
            "video_start",
            "video_end",
        ],
        (Target::ClipFile, VideoRule::Adaptive) => &[
            "fps",
            "min_frames",
            "max_frames",
            "min_pixels",
            "max_pixels",
            "video_total_pixels",
            "video_start",
            "video_end",
        ],
        (Target::FrameList, VideoRule::Adaptive) => &[
            "fps",
            "min_frames",
            "max_frames",
            "min_pixels",
            "max_pixels",
            "resized_height",
            "resized_width",
            "video_total_pixels",
            "exif",
        ],
        (Target::FrameList, VideoRule::WholeClip) => {
            &["fps", "min_pixels", "max_pixels", "resized_height", "resized_width", "exif"]
        }
        (Target::FrameList, VideoRule::SlowFast) => &[
            "fps",
            "max_frames",
            "min_pixels",
            "max_pixels",
            "resized_height",
            "resized_width",
            "video_total_pixels",
            "min_frame_similarity",
            "exif",
        ],
    }
}

/// The options that are set.
fn given(options: &ItemOptions) -> Vec<&'static str> {
    // Taken apart in full, so that a new option cannot be forgotten here.
    let ItemOptions {
        min_pixels,
        max_pixels,
        resized_height,
        resized_width,
        fps,
        nframes,
        min_frames,
        max_frames,
        video_start,
        video_end,
        total_pixels,
        video_total_pixels,
        min_frame_similarity,
        exif,
    } = options;
    [
        ("min_pixels", min_pixels.is_some()),
        ("max_pixels", max_pixels.is_some()),
        ("resized_height", resized_height.is_some()),
        ("resized_width", resized_width.is_some()),
        ("fps", fps.is_some()),
        ("nframes", nframes.is_some()),
        ("min_frames", min_frames.is_some()),
        ("max_frames", max_frames.is_some()),
        ("video_start", video_start.is_some()),
        ("video_end", video_end.is_some()),
        ("total_pixels", total_pixels.is_some()),
        ("video_total_pixels", video_total_pixels.is_some()),
        ("min_frame_similarity", min_frame_similarity.is_some()),
        ("exif", exif.is_some()),
    ]
    .into_iter()
    .filter_map(|(name, set)| set.then_some(name))
    .collect()
}

fn ranges(options: &ItemOptions) -> Result<(), Refusal> {
    for (name, value) in [
        ("min_pixels", options.min_pixels),
        ("max_pixels", options.max_pixels),
        ("total_pixels", options.total_pixels),
        ("video_total_pixels", options.video_total_pixels),
        ("resized_height", options.resized_height.map(u64::from)),
        ("resized_width", options.resized_width.map(u64::from)),
        ("min_frames", options.min_frames.map(u64::from)),
        ("max_frames", options.max_frames.map(u64::from)),
    ] {
        if value == Some(0) {
            return Err(Refusal::new(name, "is 0, expected at least 1"));
        }
    }
    for (name, value) in [("fps", options.fps), ("nframes", options.nframes)] {
        if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
            return Err(Refusal::new(name, format!("is {value}, expected a positive number")));
        }
    }
    // Times outside of the clip are moved to its ends, as in the reference; only nonsense is refused.
    for (name, value) in [
        ("video_start", options.video_start),
        ("video_end", options.video_end),
        ("min_frame_similarity", options.min_frame_similarity),
    ] {
        if let Some(value) = value.filter(|value| !value.is_finite()) {
            return Err(Refusal::new(name, format!("is {value}, expected a number")));
        }
    }
    if let (Some(start), Some(end)) = (options.video_start, options.video_end)
        && end < start
    {
        let reason = format!("is {end} and video_start is {start}: expected an end behind the start, in seconds");
        return Err(Refusal::new("video_end", reason));
    }
    if let Some(value) = options.min_frame_similarity.filter(|value| *value < 0.0) {
        return Err(Refusal::new("min_frame_similarity", format!("is {value}, expected 0 to 1")));
    }
    if options.fps.is_some() && options.nframes.is_some() {
        return Err(Refusal::new("nframes", "excludes fps; give one of the two"));
    }
    match (options.resized_height, options.resized_width) {
        (Some(_), None) => Err(Refusal::new("resized_height", "needs resized_width beside it")),
        (None, Some(_)) => Err(Refusal::new("resized_width", "needs resized_height beside it")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str, target: Target, rule: VideoRule) -> Refusal {
        check(&serde_json::from_str(json).unwrap(), target, rule).unwrap_err()
    }

    #[test]
    fn an_option_of_the_other_variant_names_that_variant() {
        let refusal = refused(r#"{"video_total_pixels": 1000}"#, Target::ClipFile, VideoRule::WholeClip);
        assert_eq!(refusal.option, "video_total_pixels");
        assert!(refusal.reason.contains("Keye-VL-1.5"), "{}", refusal.reason);
        let refusal = refused(r#"{"nframes": 4}"#, Target::ClipFile, VideoRule::SlowFast);
        assert_eq!(refusal.option, "nframes");
        assert!(refusal.reason.contains("Keye-VL-8B-Preview"), "{}", refusal.reason);
        let refusal = refused(r#"{"exif": true}"#, Target::ClipFile, VideoRule::SlowFast);
        assert!(refusal.reason.contains("pictures"), "{}", refusal.reason);
        assert_eq!(refused(r#"{"fps": 1}"#, Target::Picture, VideoRule::SlowFast).option, "fps");
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        use Target::ClipFile;
        use VideoRule::{SlowFast, WholeClip};
        assert_eq!(refused(r#"{"fps": 0}"#, ClipFile, SlowFast).option, "fps");
        assert_eq!(refused(r#"{"fps": -1.5}"#, ClipFile, SlowFast).option, "fps");
        assert_eq!(refused(r#"{"max_pixels": 0}"#, ClipFile, SlowFast).option, "max_pixels");
        assert_eq!(refused(r#"{"min_frame_similarity": -0.1}"#, ClipFile, SlowFast).option, "min_frame_similarity");
        assert_eq!(refused(r#"{"fps": 1, "nframes": 4}"#, ClipFile, WholeClip).option, "nframes");
        assert_eq!(refused(r#"{"resized_height": 28}"#, Target::Picture, WholeClip).option, "resized_height");
        assert_eq!(refused(r#"{"resized_width": 28}"#, Target::Picture, WholeClip).option, "resized_width");
        let nan = ItemOptions { video_start: Some(f64::NAN), ..Default::default() };
        assert_eq!(check(&nan, ClipFile, WholeClip).unwrap_err().option, "video_start");
        let backwards = refused(r#"{"video_start": 5, "video_end": 2}"#, ClipFile, SlowFast);
        assert_eq!(backwards.option, "video_end");
        assert!(backwards.reason.starts_with("is 2 and video_start is 5: expected an end behind"), "{backwards:?}");
    }

    #[test]
    fn what_the_reference_takes_is_taken() {
        let json = r#"{"fps": 2, "video_start": -1, "video_end": 99, "resized_height": 60, "resized_width": 90}"#;
        assert_eq!(check(&serde_json::from_str(json).unwrap(), Target::ClipFile, VideoRule::WholeClip), Ok(()));
    }
}

//! Clips from files against the reference: the cases of the fixtures that hold a video file.

use keye_media::{
    FrameKind, ItemOptions, Loader, Media, MediaConfig, MediaItem, MediaKind, Pixels, Source, TimestampRule,
};
use serde_json::Value;

use crate::support::{PREVIEW, SLOW_FAST, Tensor, assert_rows, fixture, json, tensors};

/// The one video part of a case's messages, with its options.
fn video_part(fixture_name: &str, case: &Value) -> MediaItem {
    let parts = case["messages"].as_array().unwrap().iter().filter_map(|m| m["content"].as_array()).flatten();
    let part = parts.into_iter().find(|part| part["type"] == "video").unwrap();
    let mut options = part.as_object().unwrap().clone();
    let path = fixture(fixture_name).join(options["video"].as_str().unwrap());
    options.remove("type");
    options.remove("video");
    let options: ItemOptions = serde_json::from_value(Value::Object(options)).unwrap();
    MediaItem { kind: MediaKind::Video, source: Source::Path(path), options }
}

fn load(config: MediaConfig, timestamps: TimestampRule, item: &MediaItem) -> Media {
    let loader = Loader { timestamps, ..Loader::new(config) };
    loader.load(item, &mut |_| true).unwrap()
}

fn bytes(media: &Media) -> &[u8] {
    match &media.patches.pixels {
        Pixels::U8(bytes) => bytes,
        Pixels::F32(_) => panic!("clips give bytes"),
    }
}

fn grid(media: &Media) -> Vec<i64> {
    media.patches.grid_thw.iter().flatten().map(|n| i64::from(*n)).collect()
}

fn texts(case: &Value, key: &str) -> Vec<String> {
    case[key][0].as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
}

#[test]
fn slow_fast_clips_equal_the_reference() {
    for name in ["video_file", "mixed"] {
        let case = json(SLOW_FAST, &format!("cases/{name}.json"));
        let golden = tensors(SLOW_FAST, &format!("cases/{name}.safetensors"));
        for rule in [TimestampRule::True, TimestampRule::Reference] {
            let media = load(MediaConfig::slow_fast(), rule, &video_part(SLOW_FAST, &case));
            let kinds: Vec<u64> = media.frames.iter().map(|f| u64::from(f.kind == FrameKind::Fast)).collect();
            assert_eq!(serde_json::json!([kinds]), case["frame_types"], "{name}");
            let stamps: Vec<f32> = media.frames.iter().map(|f| f.timestamp.unwrap()).collect();
            let stamp_texts: Vec<String> = stamps.iter().map(|t| format!("{:.1}", f64::from(*t))).collect();
            assert_eq!(stamp_texts, texts(&case, "timestamps_text"), "{name} {rule:?}");
            if rule == TimestampRule::Reference {
                assert_eq!(stamps, golden["timestamps_0"].f32(), "{name}");
            }
            for frame in &media.frames {
                let (height, width) = match frame.kind {
                    FrameKind::Slow => ("height", "width"),
                    FrameKind::Fast => ("fast_height", "fast_width"),
                };
                assert_eq!(
                    [frame.height, frame.width].map(u64::from),
                    [height, width].map(|k| case[k][0].as_u64().unwrap())
                );
            }
            assert_eq!(grid(&media), golden["video_grid_thw"].i64(), "{name}");
            assert_eq!(golden["num_frames"].i64(), [media.frames.len() as i64]);
            assert_rows(&golden, "pixel_values_videos_u8", bytes(&media), name);
        }
    }
}

/// Rows of a golden tensor that may hold only some, beside the same rows of ours.
fn row_pairs<'a>(golden: &'a Tensor, rows: Option<&Tensor>, got: &'a [u8]) -> Vec<(&'a [u8], &'a [u8])> {
    let row = golden.bytes.len() / golden.shape[0];
    let at = rows.map_or_else(|| (0..golden.shape[0] as i64).collect(), Tensor::i64);
    at.iter().enumerate().map(|(i, at)| (golden.part(i), &got[*at as usize * row..][..row])).collect()
}

#[test]
fn whole_clips_equal_the_reference() {
    for name in ["video_file", "mixed"] {
        let case = json(PREVIEW, &format!("cases/{name}.json"));
        let golden = tensors(PREVIEW, &format!("cases/{name}.safetensors"));
        let media = load(MediaConfig::preview(), TimestampRule::True, &video_part(PREVIEW, &case));
        assert_eq!(grid(&media), golden["video_grid_thw"].i64(), "{name}");
        assert_eq!(media.sample_fps, case["sample_fps"][0].as_f64(), "{name}");
        assert!(media.frames.iter().all(|frame| frame.kind == FrameKind::Slow));
        assert_eq!(media.patches.len() * 3 * 14 * 14, bytes(&media).len());

        let pixels = &golden["pixel_values_videos_u8"];
        let pairs = row_pairs(pixels, golden.get("pixel_values_videos_u8.rows"), bytes(&media));
        let off = pairs.iter().flat_map(|(a, b)| a.iter().zip(*b)).filter(|(a, b)| a != b).count();
        assert_eq!(off, 0, "{name}: values that differ");
    }
}

#[test]
fn equal_clips_have_equal_hashes_and_options_change_them() {
    let case = json(SLOW_FAST, "cases/video_file.json");
    let item = video_part(SLOW_FAST, &case);
    let hash = |item: &MediaItem| load(MediaConfig::slow_fast(), TimestampRule::True, item).patches.hash;
    let Source::Path(path) = &item.source else { unreachable!() };
    let bytes = MediaItem { source: Source::Bytes(std::fs::read(path).unwrap().into()), ..item.clone() };
    assert_eq!(hash(&item), hash(&bytes));
    let mut other = item.clone();
    other.options.min_frame_similarity = Some(0.5);
    assert_ne!(hash(&item), hash(&other));
}

//! The reference's arithmetic against what the reference computed: every row of the fixtures' `host` files. Part of
//! the library's own tests, because these functions are not public.

#[path = "support.rs"]
mod support;

use serde_json::Value;
use support::{PREVIEW, SLOW_FAST, interleave, json, tensors};

use crate::hsv::rgb_to_hsv;
use crate::resample::{Kernel, Mode, Resizer, Scratch};
use crate::sampling::{frame_range, reference_timestamp, slow_fast_plan, whole_clip_plan};
use crate::similarity::Classifier;
use crate::sizes::{slow_fast_sizes, whole_clip_size};
use crate::smart_resize::{smart_resize_hub, smart_resize_utils};
use crate::{FrameKind, ItemOptions, MediaConfig};

fn rows(fixture: &str, path: &str, least: usize) -> Vec<Value> {
    let Value::Array(rows) = json(fixture, path) else { panic!("{path} is no list") };
    assert!(rows.len() >= least, "{path} has {} rows", rows.len());
    rows
}

fn int(row: &Value, key: &str) -> u64 {
    row[key].as_u64().unwrap_or_else(|| panic!("{key} in {row}"))
}

fn options(row: &Value) -> ItemOptions {
    serde_json::from_value(row["ele"].clone()).unwrap()
}

fn ints(value: &Value) -> Option<Vec<u64>> {
    value.as_array().map(|list| list.iter().map(|n| n.as_u64().unwrap()).collect())
}

/// Whether the row lists these frames; long lists are left out of the file.
fn is_listed(indices: &[u64], row: &Value) -> bool {
    ints(&row["indices"]).map_or(indices.len() > 60, |listed| listed == indices)
}

#[test]
fn smart_resize() {
    for fixture in [PREVIEW, SLOW_FAST] {
        for row in rows(fixture, "host/smart_resize.json", 500) {
            let [h, w] = ["h", "w"].map(|key| int(&row, key) as u32);
            let (min, max) = (int(&row, "min"), int(&row, "max"));
            for (key, got) in
                [("utils", smart_resize_utils(h, w, 28, min, max)), ("processor", smart_resize_hub(h, w, 28, min, max))]
            {
                // Where the reference gets a side of 0 it fails one step later; here that is an error at once.
                let wanted = ints(&row[key]).filter(|size| !size.contains(&0));
                let got = got.ok().map(|(h, w)| vec![u64::from(h), u64::from(w)]);
                assert_eq!(got, wanted, "{fixture} {key} {row}");
            }
        }
    }
}

#[test]
fn preview_sampling() {
    let config = MediaConfig::preview().video;
    for row in rows(PREVIEW, "host/frame_sampling.json", 180) {
        let plan = whole_clip_plan(int(&row, "total"), row["video_fps"].as_f64().unwrap(), &options(&row), &config);
        match row["nframes"].as_u64() {
            None => assert!(plan.is_err(), "{row}"),
            Some(nframes) => {
                let plan = plan.unwrap();
                assert_eq!(plan.indices.len() as u64, nframes, "{row}");
                assert!(is_listed(&plan.indices, &row), "{:?} for {row}", plan.indices);
                if let Some(wanted) = row["sample_fps"].as_f64() {
                    assert!((plan.sample_fps / wanted - 1.0).abs() < 1e-15, "{} for {row}", plan.sample_fps);
                }
            }
        }
    }
}

#[test]
fn preview_ranges() {
    for row in rows(PREVIEW, "host/frame_range.json", 9) {
        let got = frame_range(int(&row, "total"), row["fps"].as_f64().unwrap(), &options(&row), 2);
        let got = got.ok().map(|(start, end)| vec![start, end, end - start + 1]);
        assert_eq!(got, ints(&row["range"]), "{row}");
    }
}

#[test]
fn slow_fast_sampling() {
    let config = MediaConfig::slow_fast().video;
    for row in rows(SLOW_FAST, "host/frame_sampling.json", 135) {
        let fps = row["video_fps"].as_f64().unwrap();
        let plan = slow_fast_plan(int(&row, "total"), fps, &options(&row), &config).unwrap();
        let nframes = int(&row, "nframes");
        if nframes == 0 {
            assert_eq!(plan.indices, [0], "the reference samples nothing, one frame is taken: {row}");
            continue;
        }
        let times: Vec<String> =
            plan.indices.iter().map(|i| format!("{:.1}", f64::from(reference_timestamp(*i, fps)))).collect();
        assert_eq!(plan.indices.len() as u64, nframes, "{row}");
        assert!(is_listed(&plan.indices, &row), "{:?} for {row}", plan.indices);
        if !row["timestamps_text"].is_null() {
            assert_eq!(serde_json::to_value(times).unwrap(), row["timestamps_text"], "{row}");
        }
    }
}

#[test]
fn preview_sizes() {
    let config = MediaConfig::preview().video;
    for row in rows(PREVIEW, "host/video_size.json", 210) {
        let [h, w] = ["h", "w"].map(|key| int(&row, key) as u32);
        let got = whole_clip_size(h, w, int(&row, "nframes"), &options(&row), &config);
        let got = got.ok().map(|(h, w)| vec![u64::from(h), u64::from(w)]);
        assert_eq!(got, ints(&row["size"]), "{row}");
    }
}

#[test]
fn slow_fast_clip_sizes() {
    let config = MediaConfig::slow_fast().video;
    for row in rows(SLOW_FAST, "host/video_size.json", 210) {
        let [h, w] = ["h", "w"].map(|key| int(&row, key) as u32);
        let got = slow_fast_sizes(h, w, int(&row, "slow"), int(&row, "fast"), &options(&row), &config);
        let got = got.ok().map(|s| [s.slow.0, s.slow.1, s.fast.0, s.fast.1].map(u64::from).to_vec());
        assert_eq!(got, ints(&row["size"]), "{row}");
    }
}

/// The reference's resized forms of the same frames: how many values differ, and by how much at most.
fn compare_resized(fixture: &str, name: &str, kernel: Kernel, mode: Mode) -> (usize, usize, u8) {
    let tensors = tensors(fixture, "host/video.safetensors");
    let frames = &tensors["frames"];
    let (mut values, mut different, mut largest) = (0, 0, 0);
    for i in 0..3 {
        let golden = &tensors[&format!("{name}_{i}")];
        let size = |tensor: &support::Tensor, at: usize| tensor.shape[at] as u32;
        let [in_h, in_w, out_h, out_w] = [size(frames, 2), size(frames, 3), size(golden, 2), size(golden, 3)];
        let resizer = Resizer::new(in_h, in_w, out_h, out_w, kernel, mode);
        let (mut out, mut scratch) = (Vec::new(), Scratch::default());
        for t in 0..golden.shape[0] {
            resizer.run(&interleave(frames.part(t)), &mut out, &mut scratch);
            for (got, wanted) in out.iter().zip(interleave(golden.part(t))) {
                let difference = got.abs_diff(wanted);
                values += 1;
                different += usize::from(difference > 0);
                largest = largest.max(difference);
            }
        }
    }
    (values, different, largest)
}

#[test]
fn torch_uint8_resampling_is_exact() {
    let (values, different, _) = compare_resized(SLOW_FAST, "bilinear", Kernel::Bilinear, Mode::Int16);
    assert!(values > 300_000);
    assert_eq!(different, 0);
}

#[test]
fn torch_float_resampling_is_exact() {
    let (values, different, largest) = compare_resized(PREVIEW, "bicubic", Kernel::Bicubic, Mode::Float);
    assert!(values > 300_000 && different == 0, "{different} of {values} values differ, by up to {largest}");
}

#[test]
fn hsv_is_opencv_s() {
    let tensors = tensors(SLOW_FAST, "host/video.safetensors");
    for (rgb, hsv) in [("hsv_in", "hsv_out"), ("work_rgb_0", "work_hsv_0")] {
        let rgb = tensors[rgb].u8();
        let mut got = vec![0; rgb.len()];
        rgb_to_hsv(rgb, &mut got);
        assert!(got == tensors[hsv].u8(), "{hsv} differs");
    }
}

#[test]
fn slow_and_fast_frames() {
    let tensors = tensors(SLOW_FAST, "host/video.safetensors");
    let frames = &tensors["frames"];
    let similarities = json(SLOW_FAST, "host/video.json")["similarity_to_last_slow"].clone();
    for (name, threshold) in [("frame_types", 0.9), ("frame_types_0.5", 0.5), ("frame_types_0.97", 0.97)] {
        let mut classifier = Classifier::new(frames.shape[2] as u32, frames.shape[3] as u32, threshold).unwrap();
        let mut kinds = Vec::new();
        for t in 0..frames.shape[0] {
            kinds.push(i32::from(classifier.push(&interleave(frames.part(t))) == FrameKind::Fast));
            if threshold == 0.9 && t > 0 {
                let row = &similarities[t - 1];
                assert_eq!(row[1].as_u64(), Some(t as u64));
                let got = f64::from(classifier.last_similarity().unwrap());
                assert!((got - row[2].as_f64().unwrap()).abs() < 1e-4, "{row}: {got}");
            }
        }
        assert_eq!(kinds, tensors[name].i32(), "threshold {threshold}");
    }
}

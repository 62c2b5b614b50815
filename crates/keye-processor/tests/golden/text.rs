//! Prompts, ids, positions and decoded text against the reference's.

use std::path::{Path, PathBuf};

use keye_media::{Frame, FrameKind, Media, MediaKind, Patches, Pixels};
use keye_processor::{
    ChatTemplate, Checkpoint, Conversation, Overrides, Processor, ProcessorError, Prompt, TemplateOptions, Variant,
    seconds_per_grid,
};
use serde_json::{Value, json};

const FIXTURES: [&str; 2] = ["keye-preview-tiny", "keye-1_5-tiny"];
const CASES: [&str; 11] = [
    "image_big",
    "image_one",
    "image_options",
    "image_two",
    "mixed",
    "text_only",
    "text_system",
    "two_videos",
    "video_file",
    "video_frames",
    "video_frames_fps",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn processor(fixture_name: &str) -> Processor {
    Processor::load(&fixture(fixture_name).join("model"), &Overrides::default()).unwrap()
}

/// A recorded run: what was asked, and what the reference made of it.
struct Case {
    json: Value,
    tensors: Checkpoint,
}

impl Case {
    fn open(fixture_name: &str, name: &str) -> Self {
        let cases = fixture(fixture_name).join("cases");
        Self {
            json: json_file(&cases.join(format!("{name}.json"))),
            tensors: Checkpoint::open_file(&cases.join(format!("{name}.safetensors"))).unwrap(),
        }
    }

    fn i64s(&self, name: &str) -> Option<Vec<i64>> {
        let tensor = self.tensors.get(name)?;
        Some(tensor.bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect())
    }

    fn f32s(&self, name: &str) -> Option<Vec<f32>> {
        let tensor = self.tensors.get(name)?;
        Some(tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    fn grids(&self, name: &str) -> Vec<[u32; 3]> {
        let rows = self.i64s(name).unwrap_or_default();
        rows.chunks_exact(3).map(|row| [row[0] as u32, row[1] as u32, row[2] as u32]).collect()
    }

    fn conversation(&self) -> Conversation {
        Conversation::from_json(&self.json["messages"]).unwrap()
    }

    /// Media with the recorded grids, kinds and times, and no pixels, in the conversation's order.
    fn media(&self, variant: Variant) -> Vec<Media> {
        let conversation = self.conversation();
        let mut images = self.grids("image_grid_thw").into_iter();
        let mut videos = 0..;
        let made = conversation.media().iter().map(|item| match (item.kind, variant) {
            (MediaKind::Image, _) => media(MediaKind::Image, vec![images.next().unwrap()], vec![], None),
            (MediaKind::Video, Variant::Preview) => {
                let i = videos.next().unwrap();
                let fps = self.json["sample_fps"][i].as_f64().unwrap();
                media(MediaKind::Video, vec![self.grids("video_grid_thw")[i]], vec![], Some(fps))
            }
            (MediaKind::Video, Variant::V1_5 | Variant::V2 | Variant::V671b) => {
                self.slow_fast_clip(videos.next().unwrap())
            }
        });
        made.collect()
    }

    fn slow_fast_clip(&self, i: usize) -> Media {
        let side = |name: &str| self.json[name][i].as_u64().unwrap() as u32;
        let times = self.f32s(&format!("timestamps_{i}"));
        let frame = |(index, kind): (usize, &Value)| {
            let (kind, height, width) = match kind.as_u64().unwrap() {
                0 => (FrameKind::Slow, side("height"), side("width")),
                _ => (FrameKind::Fast, side("fast_height"), side("fast_width")),
            };
            Frame { index, timestamp: times.as_ref().map(|times| times[index]), kind, height, width }
        };
        let frames: Vec<Frame> =
            self.json["frame_types"][i].as_array().unwrap().iter().enumerate().map(frame).collect();
        let mut grid: Vec<[u32; 3]> = Vec::new();
        for frame in &frames {
            match grid.last_mut() {
                Some([t, h, w]) if (*h, *w) == (frame.height / 14, frame.width / 14) => *t += 1,
                _ => grid.push([1, frame.height / 14, frame.width / 14]),
            }
        }
        media(MediaKind::Video, grid, frames, None)
    }
}

fn media(kind: MediaKind, grid_thw: Vec<[u32; 3]>, frames: Vec<Frame>, sample_fps: Option<f64>) -> Media {
    Media { kind, patches: Patches { pixels: Pixels::U8(vec![]), grid_thw, hash: [0; 32] }, frames, sample_fps }
}

fn prompt(processor: &Processor, case: &Case) -> (Prompt, Vec<Media>) {
    let media = case.media(processor.config.variant);
    let borrowed: Vec<&Media> = media.iter().collect();
    (processor.prompt(&case.conversation(), &borrowed, &TemplateOptions::default()).unwrap(), media)
}

/// Positions as the files have them: an axis after the other.
fn by_axis(positions: &[[u32; 3]]) -> Vec<i64> {
    (0..3).flat_map(|axis| positions.iter().map(move |p| i64::from(p[axis]))).collect()
}

#[test]
fn prompts_ids_and_positions_are_the_references() {
    for fixture_name in FIXTURES {
        let processor = processor(fixture_name);
        for name in CASES {
            let case = Case::open(fixture_name, name);
            let (prompt, media) = prompt(&processor, &case);
            let at = format!("{fixture_name}/{name}");
            assert_eq!(prompt.text, case.json["prompt"].as_str().unwrap(), "{at}");
            assert_eq!(
                prompt.input_ids.len() as u64,
                case.json["expanded_prompt_token_count"].as_u64().unwrap(),
                "{at}"
            );
            let ids: Vec<i64> = prompt.input_ids.iter().map(|id| i64::from(*id)).collect();
            assert_eq!(ids, case.i64s("input_ids").unwrap(), "{at}");
            assert_eq!(by_axis(&prompt.positions), case.i64s("position_ids").unwrap(), "{at}");
            assert_eq!([prompt.rope_delta], case.i64s("rope_delta").unwrap()[..], "{at}");

            let videos = || media.iter().filter(|m| m.kind == MediaKind::Video);
            let grids: Vec<[u32; 3]> = videos().flat_map(|m| m.patches.grid_thw.clone()).collect();
            assert_eq!(grids, case.grids("video_grid_thw"), "{at}");
            if let Some(expected) = case.f32s("second_per_grid_ts") {
                assert_eq!(videos().map(|m| seconds_per_grid(m).unwrap()).collect::<Vec<_>>(), expected, "{at}");
            }
        }
    }
}

#[test]
fn features_cover_the_pads_and_every_feature_row_once() {
    for fixture_name in FIXTURES {
        let processor = processor(fixture_name);
        for name in CASES {
            let (prompt, media) = prompt(&processor, &Case::open(fixture_name, name));
            let mut covered = vec![false; prompt.input_ids.len()];
            let mut rows = vec![0; media.len()];
            for span in &prompt.features {
                covered[span.start..span.start + span.len].fill(true);
                assert_eq!(span.row, rows[span.media], "{fixture_name}/{name}");
                rows[span.media] += span.len;
            }
            assert_eq!(rows, media.iter().map(|m| m.patches.len() / 4).collect::<Vec<_>>(), "{fixture_name}/{name}");
            let pads = [processor.config.image_token_id, processor.config.video_token_id];
            let is_pad: Vec<bool> = prompt.input_ids.iter().map(|id| pads.contains(id)).collect();
            assert_eq!(covered, is_pad, "{fixture_name}/{name}");
        }
    }
}

#[test]
fn a_left_padded_batch_has_the_unbatched_prompts() {
    let processor = processor("keye-preview-tiny");
    let batch = Case::open("keye-preview-tiny", "batch_left_padded");
    let (ids, positions) = (batch.i64s("input_ids").unwrap(), batch.i64s("position_ids").unwrap());
    let width = ids.len() / 2;
    for (row, name) in ["text_only", "image_one"].into_iter().enumerate() {
        let (prompt, _) = prompt(&processor, &Case::open("keye-preview-tiny", name));
        let padding = width - prompt.input_ids.len();
        let kept: Vec<u32> = ids[row * width + padding..(row + 1) * width].iter().map(|id| *id as u32).collect();
        assert_eq!(kept, prompt.input_ids, "{name}");
        for axis in 0..3 {
            let start = (axis * 2 + row) * width;
            let kept = &positions[start + padding..start + width];
            assert!(kept.iter().zip(&prompt.positions).all(|(p, own)| *p == i64::from(own[axis])), "{name}");
        }
    }
}

#[test]
fn expanding_piece_by_piece_equals_tokenising_the_expanded_string() {
    let processor = processor("keye-1_5-tiny");
    let case = Case::open("keye-1_5-tiny", "video_file");
    let (prompt, media) = prompt(&processor, &case);
    let mut clip = String::new();
    for (frame, seconds) in media[0].frames.iter().zip(case.json["timestamps_text"][0].as_array().unwrap()) {
        let pads = "<|video_pad|>".repeat((frame.height / 28 * (frame.width / 28)) as usize);
        let (open, close) = if frame.kind == FrameKind::Fast { ("<|fast_start|>", "<|fast_end|>") } else { ("", "") };
        clip += &format!("<|frame|>{}{open}{pads}{close}", seconds.as_str().unwrap());
    }
    let whole = prompt.text.replace("<|video_pad|>", &clip);
    assert_eq!(processor.tokenizer.encode(&whole).unwrap(), prompt.input_ids);
}

#[test]
fn tokenizer_agrees_both_ways() {
    for fixture_name in FIXTURES {
        let processor = processor(fixture_name);
        let rows = json_file(&fixture(fixture_name).join("host/tokenizer.json"));
        for row in rows.as_array().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
            assert_eq!(processor.tokenizer.encode(row["text"].as_str().unwrap()).unwrap(), ids, "{row}");
            assert_eq!(processor.tokenizer.decode(&ids, false).unwrap(), row["decoded"].as_str().unwrap(), "{row}");
            let skipped = processor.tokenizer.decode(&ids, true).unwrap();
            assert_eq!(skipped, row["decoded_skip_special"].as_str().unwrap(), "{row}");
        }
        for name in CASES {
            let case = Case::open(fixture_name, name);
            let generated: Vec<u32> = serde_json::from_value(case.json["generated"].clone()).unwrap();
            let texts = [false, true].map(|skip| processor.tokenizer.decode(&generated, skip).unwrap());
            assert!(texts.iter().any(|text| case.json["generated_text"] == text.as_str()), "{name}: {texts:?}");
        }
    }
}

#[test]
fn templates_render_as_in_transformers() {
    for fixture_name in FIXTURES {
        let model = fixture(fixture_name).join("model");
        let processor = processor(fixture_name);
        let built_in = ChatTemplate::load(Path::new("/nonexistent"), processor.config.variant).unwrap();
        assert_eq!(built_in.source(), json_file(&model.join("chat_template.json"))["chat_template"].as_str().unwrap());
        let rows = json_file(&fixture(fixture_name).join("host/chat_template.json"));
        for row in rows.as_array().unwrap() {
            let options = TemplateOptions {
                add_generation_prompt: row["add_generation_prompt"] == true,
                add_vision_id: row["add_vision_id"] == true,
                ..TemplateOptions::default()
            };
            let conversation = Conversation::from_json(&row["messages"]).unwrap();
            for template in [&processor.template, &built_in] {
                let text = template.render(conversation.messages(), &options).unwrap();
                assert_eq!(text, row["text"].as_str().unwrap(), "{row}");
            }
        }
    }
}

#[test]
fn checkpoint_files_and_overrides_shape_the_media_rules() {
    let plain = processor("keye-preview-tiny");
    assert_eq!(plain.media.processor.max_pixels, 31_360);
    assert_eq!(plain.generation.eos_token_id, [674, 672]);
    let overrides = Overrides { processor_max_pixels: Some(62_720), ..Overrides::default() };
    let model = fixture("keye-preview-tiny").join("model");
    assert_eq!(Processor::load(&model, &overrides).unwrap().media.processor.max_pixels, 62_720);
    let overrides = Overrides { processor_max_pixels: Some(100), ..Overrides::default() };
    assert!(Processor::load(&model, &overrides).err().unwrap().to_string().contains("max_pixels"));
}

#[test]
fn prompts_that_do_not_fit_their_media_are_explained() {
    let processor = processor("keye-preview-tiny");
    let ask = |messages: Value, media: &[Media]| {
        let conversation = Conversation::from_json(&messages).unwrap();
        let media: Vec<&Media> = media.iter().collect();
        processor.prompt(&conversation, &media, &TemplateOptions::default())
    };
    let image = || media(MediaKind::Image, vec![[1, 4, 6]], vec![], None);
    let clip = |fps| media(MediaKind::Video, vec![[2, 4, 4]], vec![], Some(fps));
    let message = |part: Value| json!([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]);
    let (with_image, with_clip) = (message(json!({"image": "a"})), message(json!({"video": "a"})));
    assert!(ask(with_image.clone(), &[image()]).is_ok());
    assert!(ask(with_clip.clone(), &[clip(1.0)]).is_ok());

    let smuggled = message(json!({"text": "<|image_pad|>"}));
    let dropped = json!([{"role": "user", "content": []}, {"role": "user", "content": [{"image": "a"}]}]);
    assert!(ask(dropped, &[image()]).is_ok());
    let two_rows = media(MediaKind::Image, vec![[1, 4, 6], [1, 4, 6]], vec![], None);
    let odd = media(MediaKind::Image, vec![[1, 3, 6]], vec![], None);
    let vast = media(MediaKind::Video, vec![[u32::MAX, u32::MAX - 1, u32::MAX - 1]], vec![], Some(1.0));
    let refused: [(Value, Vec<Media>, &str); 8] = [
        (smuggled, vec![], "contains that string"),
        (with_image.clone(), vec![], "found 0"),
        (with_image.clone(), vec![clip(1.0)], "in order"),
        (with_image.clone(), vec![two_rows], "one grid row"),
        (with_image, vec![odd], "multiples of 2"),
        (with_clip.clone(), vec![clip(0.0)], "sampling rate"),
        (with_clip.clone(), vec![clip(f64::NAN)], "sampling rate"),
        (with_clip, vec![vast], "too long"),
    ];
    for (messages, media, expected) in refused {
        let error = ask(messages, &media).expect_err(expected);
        assert!(matches!(error, ProcessorError::Prompt(_)) && error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn long_clips_expand() {
    let processor = processor("keye-1_5-tiny");
    let conversation = Conversation::from_json(&json!([{"role": "user", "content": [{"video": "a"}]}])).unwrap();
    let frames = 512;
    let frame = |index: usize| {
        let kind = if index.is_multiple_of(4) { FrameKind::Slow } else { FrameKind::Fast };
        Frame { index, timestamp: Some(index as f32 * 0.5), kind, height: 280, width: 336 }
    };
    let clip = media(MediaKind::Video, vec![[frames as u32, 20, 24]], (0..frames).map(frame).collect(), None);
    let start = std::time::Instant::now();
    let prompt = processor.prompt(&conversation, &[&clip], &TemplateOptions::default()).unwrap();
    println!("{} tokens in {:?}", prompt.input_ids.len(), start.elapsed());
    assert_eq!(prompt.positions.len(), prompt.input_ids.len());
    assert_eq!(prompt.features.len(), frames);
    let pads = prompt.input_ids.iter().filter(|id| **id == processor.config.video_token_id).count();
    assert_eq!(pads, frames * 120);
}

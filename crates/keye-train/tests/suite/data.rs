//! The loader: what becomes a target, what a pack holds, going on from a state.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use keye_media::{FrameKind, ItemOptions, Loader, MediaConfig, MediaItem, MediaKind, RgbClip, Source};
use keye_processor::{Overrides, Processor};
use keye_train::data::{
    Body, DataConfig, Encoder, Example, Kind, Stream, Targets, Visual, completion_mask, conversation_mask, held_out,
};
use keye_train::{Pack, PackSource, Recipe, TrainError};
use keye_world::{Split, World};

use crate::support::Numbers;

/// A directory of keye-nano's tokenizer with the fixture's config and limits of small frames.
fn nano() -> (tempfile::TempDir, Arc<Processor>) {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/keye-nano/tokenizer"));
    for file in ["tokenizer.json", "chat_template.json"] {
        std::fs::copy(tokenizer.join(file), dir.path().join(file)).unwrap();
    }
    let text = std::fs::read_to_string(crate::support::fixture().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    let words: serde_json::Value =
        serde_json::from_slice(&std::fs::read(tokenizer.join("tokenizer.json")).unwrap()).unwrap();
    let id = |name: &str| {
        words["added_tokens"].as_array().unwrap().iter().find(|t| t["content"] == name).unwrap()["id"].clone()
    };
    for (field, token) in [
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("fast_video_token_id", "<|fast_video_pad|>"),
        ("vision_token_id", "<|vision_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
        ("bos_token_id", "<|endoftext|>"),
        ("eos_token_id", "<|im_end|>"),
    ] {
        config[field] = id(token);
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let limits = serde_json::json!({
        "min_pixels": 3136, "max_pixels": 12544, "patch_size": 14, "merge_size": 2,
        "video": {"min_pixels": 3136, "max_pixels": 12544, "total_pixels": 200_704},
    });
    std::fs::write(dir.path().join("preprocessor_config.json"), limits.to_string()).unwrap();
    let processor = Arc::new(Processor::load(dir.path(), &Overrides::default()).unwrap());
    (dir, processor)
}

fn targets(processor: &Processor, pack: &Pack) -> String {
    let ids: Vec<u32> = pack.ids.iter().zip(&pack.loss_mask).filter(|(_, mask)| **mask).map(|(id, _)| *id).collect();
    processor.tokenizer.decode(&ids, false).unwrap()
}

/// Acceptance test 2 of the spec, the loss mask.
#[test]
fn loss_is_on_answers_and_what_closes_them() {
    let (_dir, processor) = nano();
    let text = "<|im_start|>user\nassistant?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nmore\
                <|im_end|>\n<|im_start|>assistant\n2\n3<|im_end|>\n<|endoftext|>";
    let ids = processor.tokenizer.encode(text).unwrap();
    let mask = conversation_mask(&ids, &processor.tokenizer).unwrap();
    let pack = Pack { ids, loss_mask: mask, ..Pack::default() };
    assert_eq!(targets(&processor, &pack), "red<|im_end|>\n2\n3<|im_end|>\n");

    let ids = processor.tokenizer.encode("a red<|vision_start|><|image_pad|><|vision_end|> ring<|endoftext|>").unwrap();
    let mask = completion_mask(&ids, &processor.tokenizer).unwrap();
    let first = processor.tokenizer.decode(&ids[..1], false).unwrap();
    let pack = Pack { ids, loss_mask: mask, ..Pack::default() };
    assert_eq!(first + &targets(&processor, &pack), "a red ring");
}

#[test]
fn a_sample_of_the_world_becomes_what_inference_would_see() {
    let (_dir, processor) = nano();
    let encoder = Encoder::new(Arc::clone(&processor));
    let mut fast = 0;
    for index in 0..40 {
        let sample = World::new(Split::Train).clip(index);
        let encoded = encoder.encode(&Example::conversation(&sample), 2048).unwrap().unwrap();
        let pack = &encoded.pack;
        let answers: String = sample.turns.iter().map(|turn| turn.answer.clone() + "<|im_end|>\n").collect();
        assert_eq!(targets(&processor, pack), answers);
        let tokens: u32 = pack.grids.iter().map(|[h, w]| h * w / 4).sum();
        let pads = pack.ids.iter().filter(|id| **id == processor.config.video_token_id).count();
        assert_eq!(pads, tokens as usize);
        assert!(pack.grids.len() as u32 >= sample.story.frames / 2 && pack.grids.iter().all(|[h, w]| h * w <= 64));
        fast += pack.grids.iter().filter(|[h, w]| h * w < 40).count();
    }
    assert!(fast > 20, "{fast} fast frames");
}

#[test]
fn packs_keep_their_length_and_go_on_from_a_state() {
    let (_dir, processor) = nano();
    let config = DataConfig::of_world(&[(Kind::Clip, 2), (Kind::Still, 1), (Kind::Text, 1)], 1024, 7);
    for config in [config.clone(), DataConfig { cut: true, ..config }] {
        let mut stream = Stream::new(config.clone(), Arc::clone(&processor)).unwrap();
        let mut used = 0;
        for _ in 0..6 {
            let pack = stream.next_pack().unwrap();
            pack.check().unwrap();
            assert!(pack.len() <= 1024 && pack.targets() > 0);
            used += pack.len();
        }
        assert!(used > 6 * 1024 * 6 / 10, "{used} of {}", 6 * 1024);
        let state = stream.state();
        let next: Vec<Pack> = (0..5).map(|_| stream.next_pack().unwrap()).collect();
        let mut other = Stream::new(config, Arc::clone(&processor)).unwrap();
        other.restore(&state).unwrap();
        assert!((0..5).all(|i| other.next_pack().unwrap() == next[i]));
        stream.restore(&state).unwrap();
        assert!(stream.next_pack().unwrap() == next[0] && next[0] != next[1]);
    }
}

#[test]
fn pairs_are_pictures_with_a_caption_each() {
    let (_dir, processor) = nano();
    let config = DataConfig { pairs: 8, ..DataConfig::of_world(&[(Kind::Pair, 1)], 4096, 0) };
    let pack = Stream::new(config, Arc::clone(&processor)).unwrap().next_pack().unwrap();
    assert_eq!((pack.grids.len(), pack.cu_seqlens.len(), pack.targets()), (8, 9, 0));
    let first = processor.tokenizer.decode(&pack.ids[..pack.cu_seqlens[1] as usize], false).unwrap();
    assert!(World::new(Split::Train).pair(0).turns[0].answer.starts_with(&first), "{first}");
}

#[test]
fn what_does_not_fit_is_cut_before_a_picture() {
    let (_dir, processor) = nano();
    let encoder = Encoder::new(Arc::clone(&processor));
    let sample = World::new(Split::Train).still(3);
    let whole = encoder.encode(&Example::conversation(&sample), 2048).unwrap().unwrap();
    let [[start, end]] = whole.spans[..] else { panic!("one picture: {:?}", whole.spans) };
    assert_eq!(whole.cut(end - 1), None, "nothing is learnt before the picture");
    let cut = whole.cut(whole.pack.len() - 1).unwrap();
    assert_eq!((cut.len(), cut.grids.len()), (whole.pack.len() - 1, 1));
    cut.check().unwrap();
    assert!(start > 0 && whole.cut(start).is_none());
}

#[test]
fn long_samples_shrink_or_are_left_out() {
    let (_dir, processor) = nano();
    let encoder = Encoder::new(Arc::clone(&processor));
    let sample = (0..).map(|i| World::new(Split::Train).clip(i)).find(|s| s.story.frames == 32).unwrap();
    let example = Example::conversation(&sample);
    let whole = encoder.encode(&example, 4096).unwrap().unwrap().pack;
    let smaller = encoder.encode(&example, whole.len() - 20).unwrap().unwrap().pack;
    assert!(smaller.len() <= whole.len() - 20 && smaller.grids.len() == whole.grids.len());
    assert!(smaller.patches.len() < whole.patches.len());
    assert_eq!(encoder.encode(&example, 30).unwrap(), None);
    let config = DataConfig::of_world(&[(Kind::Text, 1)], 16, 0);
    let error = Stream::new(config, processor).unwrap().next_pack().unwrap_err();
    assert!(matches!(&error, TrainError::Data(text) if text.contains("max_tokens")), "{error}");
}

/// By the same tokenizer, with limits within which pictures that are not square have a side of 0 patches.
fn narrow() -> (tempfile::TempDir, Arc<Processor>) {
    let (dir, _) = nano();
    let path = dir.path().join("preprocessor_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let narrow = text.replacen("3136", "784", 1).replacen("12544", "1000", 1);
    assert!(narrow.starts_with("{\"min_pixels\":784,\"max_pixels\":1000"), "{narrow}");
    std::fs::write(&path, narrow).unwrap();
    let processor = Arc::new(Processor::load(dir.path(), &Overrides::default()).unwrap());
    (dir, processor)
}

/// A picture that no size fits is left out and told of, where one that cannot be read is an error.
#[test]
fn pictures_without_a_size_are_left_out() {
    let (_dir, processor) = narrow();
    let config = DataConfig::of_world(&[(Kind::Still, 1)], 400, 0);
    let told = Rc::new(RefCell::new(Vec::new()));
    let log = Rc::clone(&told);
    let mut stream = Stream::new(config.clone(), Arc::clone(&processor)).unwrap();
    let plain: Vec<Pack> = (0..4).map(|_| stream.next_pack().unwrap()).collect();
    assert!(plain.iter().all(|pack| pack.grids.iter().all(|[h, w]| h == w)));
    let stream = Stream::new(config.clone(), processor).unwrap();
    let mut stream = stream.telling(move |reason| log.borrow_mut().push(reason.to_owned()));
    assert!(plain.iter().all(|pack| *pack == stream.next_pack().unwrap()));
    let told = told.borrow();
    assert!(!told.is_empty() && told.iter().all(|reason| reason.contains("no size fits")), "{told:?}");

    // All of them, so that nothing is left: not an endless search.
    let (dir, _) = narrow();
    let path = dir.path().join("preprocessor_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("784", "1", 1).replacen("1000", "700", 1)).unwrap();
    let none = Arc::new(Processor::load(dir.path(), &Overrides::default()).unwrap());
    let error = Stream::new(config, none).unwrap().next_pack().unwrap_err();
    assert!(matches!(&error, TrainError::Data(text) if text.contains("no size fits")), "{error}");
}

/// The same of files: a picture of 60x1000 has a side of 0 within the limits, a cut one cannot be read.
#[test]
fn a_picture_without_a_size_is_told_from_one_that_cannot_be_read() {
    let (_dir, processor) = nano();
    let encoder = Encoder::new(processor);
    let (width, height) = (60u32, 1000u32);
    // A BMP of 24 bits a pixel: its header, and a header of the picture.
    let mut bmp = b"BM".to_vec();
    for value in [54 + width * height * 3, 0, 54, 40, width, height] {
        bmp.extend(value.to_le_bytes());
    }
    bmp.extend([1, 0, 24, 0]);
    bmp.extend([0; 24]);
    bmp.resize(bmp.len() + (width * height * 3) as usize, 90);
    let encode = |bytes: &[u8]| {
        let source = Source::Bytes(bytes.into());
        let item = MediaItem { kind: MediaKind::Image, source, options: ItemOptions::default() };
        let messages = serde_json::json!([
            {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "red"},
        ]);
        let body = Body::Messages(messages.as_array().unwrap().clone());
        encoder.encode(&Example { uuid: "r7".into(), body, media: vec![Visual::Item(Box::new(item))] }, 2048)
    };
    let error = encode(&bmp).unwrap_err();
    assert!(matches!(&error, TrainError::NoSize(text) if text.starts_with("r7: ")), "{error:?}");
    let error = encode(&bmp[..200]).unwrap_err();
    assert!(matches!(&error, TrainError::Data(text) if text.starts_with("r7: ")), "{error:?}");
    // 60x100, which has a size.
    bmp[22..26].copy_from_slice(&100u32.to_le_bytes());
    assert!(encode(&bmp).unwrap().is_some());
}

#[test]
fn a_recipe_names_its_data() {
    let table = |text: &str| toml::from_str::<toml::Table>(text).unwrap();
    let text = "max_tokens = 512\n[[sources]]\nworld = \"clip\"\nweight = 3\n[[sources]]\nworld = \"text\"";
    let config = DataConfig::from_table(&table(text)).unwrap();
    assert_eq!(config, DataConfig::of_world(&[(Kind::Clip, 3), (Kind::Text, 1)], 512, 0));
    for wrong in ["max_tokens = 512", "max_tokens = 1\nsources = [{world = \"song\"}]", "tokens = 1\nsources = []"] {
        assert!(matches!(DataConfig::from_table(&table(wrong)), Err(TrainError::Data(_))), "{wrong}");
    }
}

/// A picture from memory is processed like the same picture in a file.
#[test]
fn memory_and_files_give_the_same_patches() {
    let (_dir, processor) = nano();
    let loader = Loader::new(processor.media.clone());
    let file = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/keye-1_5-tiny/inputs/one.png"));
    let item = MediaItem { kind: MediaKind::Image, source: Source::Path(file.into()), options: ItemOptions::default() };
    let from_file = loader.load(&item, &mut |_| true).unwrap();
    let encoder = Encoder::new(Arc::clone(&processor));
    let messages = serde_json::json!([
        {"role": "user", "content": [{"type": "image", "image": "one"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "red"},
    ]);
    let body = Body::Messages(messages.as_array().unwrap().clone());
    let example = Example { uuid: "one".into(), body, media: vec![Visual::Item(Box::new(item))] };
    let encoded = encoder.encode(&example, 2048).unwrap().unwrap();
    assert_eq!(keye_media::Pixels::U8(encoded.pack.patches), from_file.patches.pixels);

    let still = World::new(Split::Train).still(0);
    let clip = still.media[0].1.clip();
    let (size, rgb) = ((clip.height(), clip.width()), clip.frame(0));
    let from_memory = loader.load_rgb("still", size, rgb.clone(), &ItemOptions::default()).unwrap();
    let header = format!("P6\n{} {}\n255\n", clip.width(), clip.height());
    assert!(loader.load_rgb("still", (1, 1), [header.as_bytes(), &rgb].concat(), &ItemOptions::default()).is_err());
    assert_eq!(from_memory.patches.len() as u32, clip.height() / 28 * 2 * (clip.width() / 28 * 2));
}

#[test]
fn configs_that_contradict_themselves_are_refused() {
    let (_dir, processor) = nano();
    let good = DataConfig::of_world(&[(Kind::Clip, 1)], 512, 0);
    let mut both = good.clone();
    both.sources[0].parquet = vec!["a.parquet".into()];
    let mixed = DataConfig::of_world(&[(Kind::Pair, 1), (Kind::Clip, 1)], 512, 0);
    let mut split = good.clone();
    split.sources[0].split = "dev".into();
    let mut silent = good.clone();
    silent.sources[0].questions = 0;
    let none = DataConfig { sources: Vec::new(), ..good.clone() };
    for config in [both, mixed, split, silent, none, DataConfig { max_tokens: 0, ..good }] {
        assert!(matches!(Stream::new(config, Arc::clone(&processor)), Err(TrainError::Data(_))));
    }
}

/// Learning all text adds what is told and asked, but nothing that is seen.
#[test]
fn all_text_can_be_learnt() {
    let (_dir, processor) = nano();
    let sample = World::new(Split::Train).still(2);
    let encode = |targets| {
        let encoder = Encoder::new(Arc::clone(&processor)).with_targets(targets);
        encoder.encode(&Example::conversation(&sample), 2000).unwrap().unwrap().pack
    };
    let (answers, all) = (encode(Targets::Answers), encode(Targets::Text));
    assert!(answers.ids == all.ids && answers.targets() < all.targets());
    let (asked, answered) = (&sample.turns[0].question, &sample.turns[0].answer);
    assert!(!targets(&processor, &answers).contains(asked.as_str()));
    let text = targets(&processor, &all);
    assert!(
        text.contains(asked.as_str()) && text.contains(answered.as_str()) && !text.contains("<|image_pad|>"),
        "{text}"
    );
}

/// Held-out packs are of the validation split, and the same each time.
#[test]
fn held_out_packs_are_not_those_of_training() {
    let (dir, processor) = nano();
    let recipe = |validation: &str, data: &str| {
        let path = dir.path().join("recipe.toml");
        let text = format!(
            "name = \"a\"\nobjective = \"next-token\"\nfiles = [\".\"]\ntrained = []\nsteps = 2\nwarmup = 0\nlr = 1e-3\nmin_lr = 0.0\n\
             {validation}\n[data]\nmax_tokens = 400\n{data}\n"
        );
        std::fs::write(&path, text).unwrap();
        Recipe::load(&path)
    };
    let world = "sources = [{ world = \"still\" }]";
    let measured = recipe("[validation]\nevery = 1\npacks = 2", world).unwrap();
    let packs = held_out(&measured, &processor).unwrap();
    assert!(packs.len() == 2 && packs == held_out(&measured, &processor).unwrap());
    let split = |split: &str| {
        let table: toml::Table =
            format!("max_tokens = 400\nsources = [{{ world = \"still\", split = \"{split}\" }}]").parse().unwrap();
        let mut stream = Stream::new(DataConfig::from_table(&table).unwrap(), Arc::clone(&processor)).unwrap();
        [stream.next_pack().unwrap(), stream.next_pack().unwrap()]
    };
    assert!(packs[..] == split("validation") && packs[..] != split("train"));
    assert!(held_out(&recipe("", world).unwrap(), &processor).unwrap().is_empty());
    let files = recipe("[validation]\nevery = 1\npacks = 1", "sources = [{ parquet = [\"a.parquet\"] }]").unwrap();
    assert!(held_out(&files, &processor).unwrap_err().to_string().contains("[validation.data]"));
    assert!(recipe("[validation]\nevery = 0\npacks = 1", world).unwrap_err().to_string().contains("validation"));
}

/// Acceptance test 11 of the spec: a clip at rest has one slow frame, noise has only slow ones, and neither takes more tokens
/// than it may.
#[test]
fn rest_is_fast_and_noise_is_slow() {
    let loader = Loader::new(MediaConfig::slow_fast());
    let (height, width, fps) = (420, 560, 2.0);
    for (frames, tokens) in [(8, 1000), (24, 2000)] {
        for at_rest in [true, false] {
            // Coarse noise: frames are compared by tiles, over which fine noise is always the same.
            let mut frame = |index: u64| {
                let mut numbers = Numbers(if at_rest { 1 } else { index + 1 });
                let blocks: Vec<u8> = (0..12).map(|_| numbers.below(2) as u8 * 255).collect();
                let block = |i: u32| blocks[(i / width / 140 * 4 + i % width / 140) as usize];
                (0..height * width).flat_map(|i| [block(i), 0, 0]).collect()
            };
            let options = ItemOptions { video_total_pixels: Some(tokens * 784), ..ItemOptions::default() };
            let mut clip = RgbClip { name: "clip", height, width, fps, frames, frame: &mut frame };
            let media = loader.load_frames(&mut clip, &options).unwrap();
            assert_eq!(media.frames.len() as u64, frames);
            let slow = media.frames.iter().filter(|frame| frame.kind == FrameKind::Slow).count() as u64;
            assert_eq!(slow, if at_rest { 1 } else { frames });
            let taken = media.patches.len() as u64 / 4;
            assert!(taken <= tokens && taken * 2 > tokens, "{taken} of {tokens}, at rest: {at_rest}");
        }
    }
}

/// Limits of a source: those of its pictures alone, and they shrink like all others when a sample is too long.
#[test]
fn a_source_has_its_own_limits() {
    let (_dir, processor) = nano();
    let config = |more: &str| {
        let text = format!("max_tokens = 400\nsources = [{{ world = \"still\"{more} }}]");
        DataConfig::from_table(&toml::from_str(&text).unwrap()).unwrap()
    };
    let first = |config| Stream::new(config, Arc::clone(&processor)).unwrap().next_pack().unwrap();
    let (plain, small) = (first(config("")), first(config(", images = { max_pixels = 6272 }")));
    assert!(small.grids.iter().all(|[h, w]| h * w <= 32) && plain.grids.iter().any(|[h, w]| h * w > 32));
    assert!(first(config(", videos = { max_pixels = 6272 }")) == plain, "stills are no clips");
    let wrong = toml::from_str("max_tokens = 4\nsources = [{ world = \"still\", images = { pixels = 3 } }]").unwrap();
    assert!(DataConfig::from_table(&wrong).unwrap_err().to_string().contains("pixels"));

    let sample = World::new(Split::Train).still(0);
    let options = ItemOptions { min_pixels: Some(3136), max_pixels: Some(12544), ..ItemOptions::default() };
    let example = Example::conversation(&sample).read_by(&options, &ItemOptions::default());
    let encoder = Encoder::new(processor);
    let whole = encoder.encode(&example, 400).unwrap().unwrap().pack;
    let less = encoder.encode(&example, whole.len() - 4).unwrap().unwrap().pack;
    assert!(less.patches.len() < whole.patches.len() && less.len() <= whole.len() - 4);
}

/// What `keye world` writes is trained on like what is drawn in this process: the same tokens and targets.
#[cfg(feature = "parquet")]
#[test]
fn files_of_records_come_round_and_go_on_from_a_state() {
    use keye_train::data::SourceConfig;
    use keye_world::{Record, Row, write_rows};

    let (dir, processor) = nano();
    let world = World::new(Split::Train);
    let samples: Vec<_> = (0..12).map(|i| if i % 2 == 0 { world.still(i) } else { world.text(i) }).collect();
    let rows: Vec<Row> = samples.iter().map(|s| Row::from(&Record::write(s, dir.path()).unwrap())).collect();
    let files = ["a.parquet", "b.parquet"].map(|name| dir.path().join(name));
    write_rows(&files[0], &rows[..5]).unwrap();
    write_rows(&files[1], &rows[5..]).unwrap();
    std::fs::write(dir.path().join("all.json"), r#"["a.parquet", "b.parquet"]"#).unwrap();
    let parquet = vec!["all.json".into()];
    let source = SourceConfig { world: None, parquet, ..SourceConfig::of_world(Kind::Clip, 1) };
    let base = DataConfig::of_world(&[(Kind::Still, 1)], 400, 3);
    let config = DataConfig { sources: vec![source], ..base }.beside(dir.path());

    let encoder = Encoder::new(Arc::clone(&processor));
    let encode = |sample| encoder.encode(&Example::conversation(sample), 400).unwrap();
    let mut expected: Vec<Vec<u32>> = samples.iter().filter_map(encode).map(|encoded| encoded.pack.ids).collect();
    let mut stream = Stream::new(config.clone(), Arc::clone(&processor)).unwrap();
    let mut found: Vec<Vec<u32>> = Vec::new();
    let mut states = Vec::new();
    while found.len() < expected.len() {
        let pack = stream.next_pack().unwrap();
        found.extend(pack.cu_seqlens.windows(2).map(|w| pack.ids[w[0] as usize..w[1] as usize].to_vec()));
        states.push((stream.state(), pack));
    }
    found.truncate(expected.len());
    assert_ne!(found, expected, "rows are shuffled");
    found.sort();
    expected.sort();
    assert!(found == expected);
    let mut other = Stream::new(config.clone(), Arc::clone(&processor)).unwrap();
    other.restore(&states[0].0).unwrap();
    assert!(other.next_pack().unwrap() == states[1].1);
    for (list, words) in [
        ("{}", "expected a list"),
        ("[\"c.parquet\"]", "c.parquet"),
        ("[\"all.json\"]", "all.json"),
        ("[]", "all.json: expected records, found none"),
    ] {
        std::fs::write(dir.path().join("all.json"), list).unwrap();
        let error = Stream::new(config.clone(), Arc::clone(&processor)).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}

//! Still pictures and frame lists from outside: the fixtures' pictures and cases, and files made to do harm.

use std::sync::Arc;
use std::time::{Duration, Instant};

use keye_media::{
    Access, FrameItem, FrameKind, ItemOptions, Limits, Loader, Media, MediaConfig, MediaError, MediaItem, MediaKind,
    Pixels, Source, TimestampRule,
};
use serde_json::Value;

use crate::support::{PREVIEW, SLOW_FAST, assert_rows, fixture, json, tensors};

/// The variant's rules with the limits of the fixture's own preprocessor_config.json.
fn loader(fixture_name: &str) -> Loader {
    let mut config = if fixture_name == PREVIEW { MediaConfig::preview() } else { MediaConfig::slow_fast() };
    let file = json(fixture_name, "model/preprocessor_config.json");
    config.processor.min_pixels = file["min_pixels"].as_u64().unwrap();
    config.processor.max_pixels = file["max_pixels"].as_u64().unwrap();
    Loader { timestamps: TimestampRule::Reference, ..Loader::new(config) }
}

fn source(fixture_name: &str, path: &Value) -> Source {
    Source::Path(fixture(fixture_name).join(path.as_str().unwrap()))
}

/// A part of a message, if it is a picture or a clip.
fn item(fixture_name: &str, part: &Value) -> Option<MediaItem> {
    let kind = match part["type"].as_str()? {
        "image" => MediaKind::Image,
        "video" => MediaKind::Video,
        _ => return None,
    };
    let mut options = part.as_object().unwrap().clone();
    options.remove("type");
    let media = options.remove(if kind == MediaKind::Image { "image" } else { "video" }).unwrap();
    let source = match media.as_array() {
        None => source(fixture_name, &media),
        Some(list) => {
            let frame = |path| FrameItem { source: source(fixture_name, path), options: None };
            Source::Frames(list.iter().map(frame).collect())
        }
    };
    Some(MediaItem { kind, source, options: serde_json::from_value(Value::Object(options)).unwrap() })
}

fn load(loader: &Loader, item: &MediaItem) -> Media {
    loader.load(item, &mut |_| true).unwrap()
}

fn bytes(media: &Media) -> &[u8] {
    match &media.patches.pixels {
        Pixels::U8(bytes) => bytes,
        Pixels::F32(_) => panic!("media give bytes"),
    }
}

fn grids<'a>(media: impl IntoIterator<Item = &'a Media>) -> Vec<i64> {
    media.into_iter().flat_map(|m| m.patches.grid_thw.iter().flatten()).map(|n| i64::from(*n)).collect()
}

/// Every picture of host/images.json, after the first stage alone and after both.
#[test]
fn pictures_equal_pillow() {
    for fixture_name in [PREVIEW, SLOW_FAST] {
        let golden = tensors(fixture_name, "host/images.safetensors");
        let both = loader(fixture_name);
        let mut first = both.clone();
        first.config.processor.do_resize = false;
        let rows = json(fixture_name, "host/images.json");
        let rows = rows.as_array().unwrap();
        assert!(rows.len() >= 14);
        for row in rows {
            let key = row["key"].as_str().unwrap();
            let context = format!("{fixture_name} {key}");
            let options: ItemOptions = serde_json::from_value(row["options"].clone()).unwrap();
            let item = MediaItem { kind: MediaKind::Image, source: source(fixture_name, &row["file"]), options };

            let stage1 = load(&first, &item);
            let wanted: Vec<u64> = row["stage1_hw"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect();
            let frame = &stage1.frames[0];
            assert_eq!([frame.height, frame.width].map(u64::from), wanted[..], "{context}");
            let interleaved = rows_of(&stage1);
            assert_rows(&golden, &format!("{key}_stage1"), &interleaved, &context);

            let stage2 = load(&both, &item);
            assert_eq!(serde_json::to_value(grids([&stage2])).unwrap(), row["grid_thw"], "{context}");
            match golden.contains_key(&format!("{key}_stage2")) {
                true => assert_rows(&golden, &format!("{key}_stage2"), &rows_of(&stage2), &context),
                false => assert_eq!(stage1.patches, stage2.patches, "{context}: no second stage"),
            }
            if let Some(values) = golden.get(&format!("{key}_pixel_values")) {
                let got: Vec<f32> = bytes(&stage2).iter().map(|v| normalised(*v)).collect();
                let difference = got.iter().zip(values.f32()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(got.len() == values.f32().len() && difference <= 1e-6, "{context}: {difference}");
            }
        }
    }
}

/// `(k/255 - 0.5) / 0.5` in float32.
fn normalised(value: u8) -> f32 {
    ((f64::from(value) * (1.0 / 255.0)) as f32 - 0.5) / 0.5
}

/// A picture's patches put together again, `[H, W, 3]`.
fn rows_of(media: &Media) -> Vec<u8> {
    let w = media.frames[0].width as usize;
    let patches = bytes(media);
    let mut rgb = vec![0; patches.len()];
    for (i, value) in patches.iter().enumerate() {
        let (patch, c, y, x) = (i / 588, i / 196 % 3, i / 14 % 14, i % 14);
        let (py, px) = (patch / (w / 14), patch % (w / 14));
        rgb[((py * 14 + y) * w + px * 14 + x) * 3 + c] = *value;
    }
    rgb
}

/// The pictures of all cases, and the frame lists: pixel values, grids, kinds, time stamps.
#[test]
fn cases_equal_the_reference() {
    for fixture_name in [PREVIEW, SLOW_FAST] {
        let loader = loader(fixture_name);
        let (mut pictures, mut lists) = (0, 0);
        for name in [
            "image_big",
            "image_one",
            "image_options",
            "image_two",
            "mixed",
            "two_videos",
            "video_frames",
            "video_frames_fps",
        ] {
            let context = format!("{fixture_name} {name}");
            let case = json(fixture_name, &format!("cases/{name}.json"));
            let golden = tensors(fixture_name, &format!("cases/{name}.safetensors"));
            let messages = case["messages"].as_array().unwrap();
            let parts = messages.iter().filter_map(|message| message["content"].as_array()).flatten();
            let items: Vec<MediaItem> = parts.filter_map(|part| item(fixture_name, part)).collect();

            let images: Vec<Media> =
                items.iter().filter(|item| item.kind == MediaKind::Image).map(|item| load(&loader, item)).collect();
            if !images.is_empty() {
                let values: Vec<u8> = images.iter().flat_map(|media| bytes(media).to_vec()).collect();
                assert_rows(&golden, "pixel_values_u8", &values, &context);
                assert_eq!(grids(&images), golden["image_grid_thw"].i64(), "{context}");
                pictures += images.len();
            }

            if !items.iter().any(|item| matches!(item.source, Source::Frames(_))) {
                continue;
            }
            let clips: Vec<Media> =
                items.iter().filter(|item| item.kind == MediaKind::Video).map(|item| load(&loader, item)).collect();
            let values: Vec<u8> = clips.iter().flat_map(|media| bytes(media).to_vec()).collect();
            assert_rows(&golden, "pixel_values_videos_u8", &values, &context);
            assert_eq!(grids(&clips), golden["video_grid_thw"].i64(), "{context}");
            for (i, clip) in clips.iter().enumerate() {
                lists += 1;
                if fixture_name == PREVIEW {
                    assert_eq!(clip.sample_fps, case["sample_fps"][i].as_f64(), "{context}");
                    continue;
                }
                let kinds: Vec<u64> = clip.frames.iter().map(|f| u64::from(f.kind == FrameKind::Fast)).collect();
                assert_eq!(serde_json::to_value(kinds).unwrap(), case["frame_types"][i], "{context}");
                let times: Option<Vec<f32>> = clip.frames.iter().map(|f| f.timestamp).collect();
                assert_eq!(times, golden.get(&format!("timestamps_{i}")).map(|t| t.f32()), "{context}");
                if let Some(times) = times {
                    let texts: Vec<String> = times.iter().map(|t| format!("{:.1}", f64::from(*t))).collect();
                    assert_eq!(serde_json::to_value(texts).unwrap(), case["timestamps_text"][i], "{context}");
                }
            }
        }
        assert!(pictures >= 8 && lists >= 4, "{fixture_name}: {pictures} pictures, {lists} lists");
    }
}

fn list(fixture_name: &str, names: &[&str]) -> Source {
    let frame =
        |name: &&str| FrameItem { source: source(fixture_name, &Value::from(format!("inputs/{name}"))), options: None };
    Source::Frames(names.iter().map(frame).collect())
}

#[test]
fn an_odd_list_of_preview_repeats_its_last_frame() {
    let source = list(PREVIEW, &["frames/0.png", "frames/1.png", "frames/2.png"]);
    let options = ItemOptions { fps: Some(2.0), ..Default::default() };
    let media = load(&loader(PREVIEW), &MediaItem { kind: MediaKind::Video, source, options });
    assert_eq!(media.frames.iter().map(|f| f.index).collect::<Vec<_>>(), [0, 1, 2, 2]);
    let frame = bytes(&media).len() / 4;
    assert_eq!(bytes(&media)[2 * frame..3 * frame], bytes(&media)[3 * frame..]);
    assert_eq!(media.patches.grid_thw.len(), 1);
}

#[test]
fn frame_lists_say_what_is_wrong() {
    for fixture_name in [PREVIEW, SLOW_FAST] {
        let loader = loader(fixture_name);
        let refused = |source, options: ItemOptions| {
            loader.load(&MediaItem { kind: MediaKind::Video, source, options }, &mut |_| true).unwrap_err()
        };
        let shapes = refused(list(fixture_name, &["one.png", "tall.png"]), ItemOptions::default());
        assert!(shapes.to_string().contains("frame 1"), "{shapes}");
        let empty = refused(Source::Frames(Vec::new()), ItemOptions::default());
        assert!(empty.to_string().contains("no frame"), "{empty}");
        let nested = FrameItem { source: list(fixture_name, &["one.png"]), options: None };
        let nested = refused(Source::Frames(vec![nested]), ItemOptions::default());
        assert!(nested.to_string().contains("inside"), "{nested}");
        let ranged = ItemOptions { video_start: Some(1.0), ..Default::default() };
        let ranged = refused(list(fixture_name, &["one.png"]), ranged);
        assert!(matches!(ranged, MediaError::Option { option: "video_start", .. }), "{ranged}");
    }
    // A frame is named with its place, whatever is wrong with it.
    for fixture_name in [PREVIEW, SLOW_FAST] {
        let Source::Frames(mut frames) = list(fixture_name, &["one.png", "missing.png", "one.png"]) else { panic!() };
        let refused = |frames: &[FrameItem]| {
            let source = Source::Frames(frames.to_vec());
            let item = MediaItem { kind: MediaKind::Video, source, options: ItemOptions::default() };
            loader(fixture_name).load(&item, &mut |_| true).unwrap_err().to_string()
        };
        let missing = refused(&frames);
        assert!(missing.starts_with("frame 1 (") && missing.contains("missing.png): cannot read"), "{missing}");
        frames[1].source = Source::Bytes(Arc::from(*b"text"));
        let text = refused(&frames);
        assert!(text.starts_with("frame 1 (data of 4 bytes): this is text, not a picture"), "{text}");
        frames[1].options = Some(ItemOptions { fps: Some(1.0), ..Default::default() });
        assert!(refused(&frames).starts_with("frame 1 (data of 4 bytes): option"), "{}", refused(&frames));
    }
    // Options of a single frame are not Preview's.
    let own = ItemOptions { resized_height: Some(280), resized_width: Some(280), ..Default::default() };
    let Source::Frames(mut frames) = list(SLOW_FAST, &["one.png", "tall.png"]) else { unreachable!() };
    frames.iter_mut().for_each(|frame| frame.options = Some(own.clone()));
    let item = MediaItem { kind: MediaKind::Video, source: Source::Frames(frames), options: ItemOptions::default() };
    assert_eq!(load(&loader(SLOW_FAST), &item).frames.len(), 2);
    let refused = loader(PREVIEW).load(&item, &mut |_| true).unwrap_err();
    assert!(refused.to_string().contains("Preview take none"), "{refused}");
}

#[test]
fn an_option_that_nothing_reads_is_an_error() {
    let source = source(PREVIEW, &"inputs/one.png".into());
    let options = ItemOptions { fps: Some(2.0), ..Default::default() };
    let item = MediaItem { kind: MediaKind::Image, source, options };
    let refused = loader(PREVIEW).load(&item, &mut |_| true);
    assert!(matches!(refused, Err(MediaError::Option { option: "fps", .. })), "{refused:?}");
}

#[test]
fn a_list_can_be_cancelled() {
    let source = list(SLOW_FAST, &["frames/0.png", "frames/1.png", "frames/2.png"]);
    let item = MediaItem { kind: MediaKind::Video, source, options: ItemOptions::default() };
    let mut calls = 0;
    let stopped = loader(SLOW_FAST).load(&item, &mut |_| {
        calls += 1;
        calls < 2
    });
    assert!(matches!(stopped, Err(MediaError::Cancelled)) && calls == 2);
}

#[test]
fn a_frame_that_never_comes_can_be_given_up() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let frame = Source::Url(format!("http://{}/", listener.local_addr().unwrap()));
    let source = Source::Frames(vec![FrameItem { source: frame, options: None }; 2]);
    let item = MediaItem { kind: MediaKind::Video, source, options: ItemOptions::default() };
    for config in [MediaConfig::preview(), MediaConfig::slow_fast()] {
        let access = Access { remote: true, ..Access::default() };
        let (begin, mut calls) = (Instant::now(), 0);
        let stopped = Loader { access, ..Loader::new(config) }.load(&item, &mut |_| {
            calls += 1;
            calls < 3
        });
        assert!(matches!(stopped, Err(MediaError::Cancelled)), "{stopped:?}");
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    }
}

#[test]
fn decoding_a_picture_can_be_stopped() {
    use image::ImageFormat::{Bmp, Png, Tiff, WebP};
    let mut state = 1u32;
    let noise = image::RgbImage::from_fn(300, 300, |_, _| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        image::Rgb([state >> 8, state >> 16, state >> 24].map(|value| value as u8))
    });
    let loader = Loader::new(MediaConfig::preview());
    let mut hashes = Vec::new();
    for format in [Png, Bmp, Tiff, WebP] {
        let source = Source::Bytes(encoded(&noise.clone().into(), format).into());
        let item = MediaItem { kind: MediaKind::Image, source, options: ItemOptions::default() };
        let mut calls = 0;
        hashes.push(loader.load(&item, &mut |_| (calls += 1, true).1).unwrap().patches.hash);
        assert!(calls > 4, "{format:?}: asked {calls} times");
        for last in 1..calls {
            let mut calls = 0;
            let stopped = loader.load(&item, &mut |_| (calls += 1, calls < last).1);
            assert!(matches!(stopped, Err(MediaError::Cancelled)), "{format:?} {last}: {stopped:?}");
            assert_eq!(calls, last, "{format:?}");
        }
    }
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "reading in pieces changes a picture");
}

fn load_bytes(loader: &Loader, bytes: &[u8], options: ItemOptions) -> Result<Media, MediaError> {
    let item = MediaItem { kind: MediaKind::Image, source: Source::Bytes(Arc::from(bytes)), options };
    loader.load(&item, &mut |_| true)
}

fn encoded(image: &image::DynamicImage, format: image::ImageFormat) -> Vec<u8> {
    let mut out = std::io::Cursor::new(Vec::new());
    image.write_to(&mut out, format).unwrap();
    out.into_inner()
}

fn gradient(width: u32, height: u32) -> image::DynamicImage {
    image::RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 7) as u8, (y * 5) as u8, (x + y) as u8])).into()
}

const FORMATS: [image::ImageFormat; 6] = [
    image::ImageFormat::Png,
    image::ImageFormat::Jpeg,
    image::ImageFormat::WebP,
    image::ImageFormat::Gif,
    image::ImageFormat::Bmp,
    image::ImageFormat::Tiff,
];

/// Truncations and bit flips give a picture or a typed error, never a panic.
#[test]
fn damaged_pictures_are_typed_errors() {
    let loader = Loader::new(MediaConfig::preview());
    for format in FORMATS {
        let whole = encoded(&gradient(60, 40), format);
        assert!(load_bytes(&loader, &whole, ItemOptions::default()).is_ok(), "{format:?}");
        for parts in 0..16 {
            let cut = &whole[..whole.len() * parts / 16];
            let result = load_bytes(&loader, cut, ItemOptions::default());
            if parts <= 12 {
                assert!(matches!(result, Err(MediaError::Unreadable { .. })), "{format:?} {parts}/16: {result:?}");
            }
        }
        let mut state = 1u32;
        for _ in 0..200 {
            let mut damaged = whole.clone();
            for _ in 0..4 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let at = state as usize / 7 % damaged.len();
                damaged[at] ^= 1 << (state >> 29);
            }
            match load_bytes(&loader, &damaged, ItemOptions::default()) {
                Ok(_) | Err(MediaError::Unreadable { .. } | MediaError::Limit { .. }) => {}
                Err(other) => panic!("{format:?}: {other}"),
            }
        }
    }
}

/// What Pillow says of them. The end of a thumbnail inside is not the picture's; bytes behind the end are nobody's.
#[test]
fn a_jpeg_is_whole_or_refused() {
    let loader = Loader::new(MediaConfig::preview());
    let jpeg = encoded(&gradient(60, 40), image::ImageFormat::Jpeg);
    let segment = [&[0xff, 0xe1][..], &(jpeg.len() as u16 + 2).to_be_bytes(), &jpeg].concat();
    let with_thumbnail = [&jpeg[..2], &segment, &jpeg[2..]].concat();
    for whole in [&jpeg, &with_thumbnail] {
        let read = |bytes: &[u8]| load_bytes(&loader, bytes, ItemOptions::default());
        assert!(read(whole).is_ok());
        assert!(read(&[&whole[..], b"more"].concat()).is_ok());
        assert!(read(&[&whole[..whole.len() - 2], b"\xff\xff\xff\xd9"].concat()).is_ok());
        for missing in [1, 2, 3, 200] {
            let error = read(&whole[..whole.len() - missing]).unwrap_err();
            assert!(matches!(error, MediaError::Unreadable { .. }), "{error}");
            assert!(error.to_string().contains("cut off"), "{error}");
        }
    }
}

/// The same advice whatever the file was given as.
#[test]
fn pictures_in_other_formats_are_to_be_converted() {
    let loader = Loader::new(MediaConfig::slow_fast());
    let cases: [(&[u8], &str); 5] = [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", "AVIF"),
        (b"\0\0\0\x0CJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0CjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\x01", "PSD"),
    ];
    for (bytes, name) in cases {
        for kind in [MediaKind::Image, MediaKind::Video] {
            let item = MediaItem { kind, source: Source::Bytes(Arc::from(bytes)), options: ItemOptions::default() };
            let error = loader.load(&item, &mut |_| true).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("not read; convert it to PNG or JPEG"), "{error}");
        }
    }
}

#[test]
fn what_is_no_picture_says_so() {
    let loader = Loader::new(MediaConfig::slow_fast());
    let refused = |bytes: &[u8]| load_bytes(&loader, bytes, ItemOptions::default()).unwrap_err().to_string();
    assert!(refused(b"").contains("empty"), "{}", refused(b""));
    let text = refused(b"hello, this is text");
    assert!(text.contains("this is text, not a picture or clip. Expected a picture (PNG, JPEG, WebP"), "{text}");
    assert!(refused(b"<html><body>").contains("this is HTML, not a picture"), "{}", refused(b"<html><body>"));
    // A TIFF as scanners write it: one pixel as brightness and colour. Tag, kind, count, value.
    let tags: [[u32; 4]; 9] = [
        [256, 4, 1, 1],
        [257, 4, 1, 1],
        [258, 3, 3, 12],
        [259, 3, 1, 1],
        [262, 3, 1, 6],
        [273, 4, 1, 8],
        [277, 3, 1, 3],
        [278, 4, 1, 1],
        [279, 4, 1, 3],
    ];
    let mut tiff = b"II*\0\x12\0\0\0\x80\x80\x80\0\x08\0\x08\0\x08\0\x09\0".to_vec();
    for [tag, kind, count, value] in tags {
        tiff.extend([(tag as u16).to_le_bytes(), (kind as u16).to_le_bytes()].concat());
        tiff.extend([count.to_le_bytes(), value.to_le_bytes()].concat());
    }
    tiff.extend([0; 4]);
    let tiff = refused(&tiff);
    assert!(tiff.contains("does not support") && tiff.ends_with("; convert it to PNG or JPEG"), "{tiff}");
    let gif_without_frames = b"GIF89a\x03\0\x01\0\0\0\0;";
    assert!(refused(gif_without_frames).contains("cannot be decoded"), "{}", refused(gif_without_frames));
    let clip = std::fs::read(fixture(SLOW_FAST).join("inputs/clip.mp4")).unwrap();
    assert!(refused(&clip).contains("video"), "{}", refused(&clip));
}

#[test]
fn sizes_are_checked_before_memory_is_taken() {
    let loader = Loader::new(MediaConfig::slow_fast());
    let mut png = encoded(&gradient(60, 40), image::ImageFormat::Png);
    png[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    // The checksum of IHDR, which is 60000x60000 now.
    let crc = crc32(&png[12..29]).to_be_bytes();
    png[29..33].copy_from_slice(&crc);
    let mut bmp = encoded(&gradient(60, 40), image::ImageFormat::Bmp);
    bmp[18..26].copy_from_slice(&[0x60, 0xea, 0, 0, 0x60, 0xea, 0, 0]);
    for bytes in [png, bmp] {
        let result = load_bytes(&loader, &bytes, ItemOptions::default());
        assert!(matches!(result, Err(MediaError::Limit { found: 3_600_000_000, .. })), "{result:?}");
    }
    let small = encoded(&gradient(60, 40), image::ImageFormat::Png);
    let huge = ItemOptions { min_pixels: Some(1 << 50), max_pixels: Some(1 << 52), ..Default::default() };
    let result = load_bytes(&loader, &small, huge);
    assert!(matches!(result, Err(MediaError::Limit { .. })), "{result:?}");
    let tight = Loader { limits: Limits { source_pixels: 60 * 40 - 1, ..Limits::default() }, ..loader };
    let result = load_bytes(&tight, &small, ItemOptions::default());
    assert!(matches!(result, Err(MediaError::Limit { found: 2400, limit: 2399, .. })), "{result:?}");
    let thin = encoded(&gradient(1, 1000), image::ImageFormat::Png);
    let result = load_bytes(&tight, &thin, ItemOptions::default());
    assert!(matches!(result, Err(MediaError::Unreadable { .. })), "{result:?}");
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// The reference ignores the tag; `exif` turns the picture.
#[test]
fn exif_turns_a_picture_only_when_asked() {
    let jpeg = encoded(&gradient(112, 56), image::ImageFormat::Jpeg);
    // Orientation 6: turn by 90 degrees clockwise.
    let tag = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    let segment = [&[0xff, 0xe1][..], &(tag.len() as u16 + 2).to_be_bytes(), tag].concat();
    let tagged = [&jpeg[..2], &segment, &jpeg[2..]].concat();
    let loader = Loader::new(MediaConfig::preview());
    let size = |bytes: &[u8], exif| {
        let media = load_bytes(&loader, bytes, ItemOptions { exif, ..Default::default() }).unwrap();
        (media.frames[0].height, media.frames[0].width)
    };
    assert_eq!(size(&tagged, None), (56, 112));
    assert_eq!(size(&tagged, Some(false)), (56, 112));
    assert_eq!(size(&tagged, Some(true)), (112, 56));
    assert_eq!(size(&jpeg, Some(true)), (56, 112));
}

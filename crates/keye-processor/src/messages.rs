//! Conversations from json.

use keye_media::{FrameItem, ItemOptions, MediaItem, MediaKind, Source};
use serde_json::{Map, Value};

use crate::conversation::{shown_part, text_part};
use crate::files::{describe, whole};
use crate::{Conversation, ProcessorError};

/// Fields that clients send along and that change nothing here.
const IGNORED: [&str; 4] = ["detail", "cache_control", "uuid", "format"];
/// Whole-number options of [`ItemOptions`].
const WHOLE_OPTIONS: [&str; 8] = [
    "min_pixels",
    "max_pixels",
    "resized_height",
    "resized_width",
    "min_frames",
    "max_frames",
    "total_pixels",
    "video_total_pixels",
];
/// The other options of [`ItemOptions`].
const OTHER_OPTIONS: [&str; 6] = ["fps", "nframes", "video_start", "video_end", "min_frame_similarity", "exif"];
/// Roles of ChatML; OpenAI's `developer` counts as `system`.
const ROLES: [&str; 5] = ["system", "user", "assistant", "tool", "developer"];

impl Conversation {
    /// Reads a messages array, or an object with `messages`. Errors say where: `messages[0].content[1].fps`.
    ///
    /// Options are those of [`ItemOptions`]; they stand in the part, in its `preprocess_kwargs`, in the object that has the
    /// `url`, or in that object's `preprocess_kwargs`, and the latter win. Unknown ones are errors; `detail`, `cache_control`, `uuid`
    /// and `format` are ignored. Content of null is empty. Further fields of a message (`tool_calls`, `name`) are kept for the template.
    pub fn from_json(value: &Value) -> Result<Self, ProcessorError> {
        let messages = match value {
            Value::Array(list) => list,
            Value::Object(map) => match map.get("messages") {
                Some(Value::Array(list)) => list,
                Some(other) => return Err(wrong("", "a list of messages", other)),
                None => return Err(error("", "missing")),
            },
            other => return Err(wrong("", "a list of messages", other)),
        };
        let mut conversation = Self::new();
        for (i, message) in messages.iter().enumerate() {
            let message = conversation.read_message(&format!("[{i}]"), message)?;
            conversation.messages.push(message);
        }
        Ok(conversation)
    }

    fn read_message(&mut self, at: &str, value: &Value) -> Result<Value, ProcessorError> {
        let Value::Object(map) = value else { return Err(wrong(at, "an object", value)) };
        let role = match map.get("role") {
            Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.as_str(),
            Some(other) => return Err(wrong(&format!("{at}.role"), &format!("one of {}", ROLES.join(", ")), other)),
            None => return Err(error(&format!("{at}.role"), "missing")),
        };
        let content = match map.get("content") {
            Some(Value::String(text)) => text.as_str().into(),
            Some(Value::Array(parts)) => {
                let parts =
                    parts.iter().enumerate().map(|(j, part)| self.read_part(&format!("{at}.content[{j}]"), part));
                Value::Array(parts.collect::<Result<_, _>>()?)
            }
            Some(Value::Null) => "".into(),
            None if map.contains_key("tool_calls") => "".into(),
            None => return Err(error(&format!("{at}.content"), "missing")),
            Some(other) => return Err(wrong(&format!("{at}.content"), "a string or a list of parts", other)),
        };
        // The data URLs in content are most of a request: they are not copied.
        let kept = |name: &str, value: &Value| if name == "content" { Value::Null } else { value.clone() };
        let mut message: Map<_, _> = map.iter().map(|(name, value)| (name.clone(), kept(name, value))).collect();
        message.insert("role".into(), if role == "developer" { "system" } else { role }.into());
        message.insert("content".into(), content);
        Ok(Value::Object(message))
    }

    fn read_part(&mut self, at: &str, value: &Value) -> Result<Value, ProcessorError> {
        let map = match value {
            Value::String(text) => return Ok(text_part(text)),
            Value::Object(map) => map,
            other => return Err(wrong(at, "a string or an object", other)),
        };
        let expected = "text, image, image_url, video or video_url";
        let named = match map.get("type") {
            Some(Value::String(name)) => Some(name.as_str()),
            Some(other) => return Err(wrong(&format!("{at}.type"), expected, other)),
            None => None,
        };
        let held =
            |names: &[&'static str]| names.iter().copied().find(|name| map.get(*name).is_some_and(|v| !v.is_null()));
        let image = || held(&["image", "image_url"]);
        let video = || held(&["video", "video_url"]);
        let (kind, field) = match named {
            Some("text") => return read_text(at, map),
            Some(name @ ("image" | "image_url")) => (MediaKind::Image, image().ok_or(name)),
            Some(name @ ("video" | "video_url")) => (MediaKind::Video, video().ok_or(name)),
            Some(_) => return Err(wrong(&format!("{at}.type"), expected, &map["type"])),
            None => match (image(), video()) {
                (Some(name), None) => (MediaKind::Image, Ok(name)),
                (None, Some(name)) => (MediaKind::Video, Ok(name)),
                (None, None) if map.contains_key("text") => return read_text(at, map),
                _ => return Err(error(&format!("{at}.type"), format!("missing; expected {expected}"))),
            },
        };
        let field = field.map_err(|name| error(&format!("{at}.{name}"), "missing"))?;
        let item = read_item(at, map, kind, field)?;
        let part = shown_part(&item);
        self.media.push(item);
        Ok(part)
    }
}

fn read_text(at: &str, map: &Map<String, Value>) -> Result<Value, ProcessorError> {
    // What is empty says nothing: clients send back what they got, `"annotations": []` with it.
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    for (name, _) in map.iter().filter(|(_, value)| !empty(value)) {
        if !["type", "text"].contains(&name.as_str()) && !IGNORED.contains(&name.as_str()) {
            return Err(error(
                &format!("{at}.{name}"),
                "unknown field of a text; a picture or clip is a part of its own",
            ));
        }
    }
    match map.get("text") {
        Some(Value::String(text)) => Ok(text_part(text)),
        Some(other) => Err(wrong(&format!("{at}.text"), "a string", other)),
        None => Err(error(&format!("{at}.text"), "missing")),
    }
}

/// The medium that stands in field `field` of a part, with the options beside it and in it.
fn read_item(at: &str, map: &Map<String, Value>, kind: MediaKind, field: &str) -> Result<MediaItem, ProcessorError> {
    let mut options = ItemOptions::default();
    read_options(at, map, &["type", field], &mut options)?;
    let at = format!("{at}.{field}");
    let (at, value) = match &map[field] {
        Value::Object(inner) => {
            read_options(&at, inner, &["url"], &mut options)?;
            let at = format!("{at}.url");
            let url = inner.get("url").ok_or_else(|| error(&at, "missing"))?;
            (at, url)
        }
        other => (at, other),
    };
    let source = match (value, kind) {
        (Value::String(text), _) => source(&at, text)?,
        (Value::Array(list), MediaKind::Video) if list.is_empty() => {
            return Err(error(&at, "expected frames, found none"));
        }
        (Value::Array(list), MediaKind::Video) => {
            let frames = list.iter().enumerate().map(|(k, frame)| read_frame(&format!("{at}[{k}]"), frame));
            Source::Frames(frames.collect::<Result<_, _>>()?)
        }
        (other, MediaKind::Video) => return Err(wrong(&at, "a path, a URL or a list of frames", other)),
        (other, MediaKind::Image) => return Err(wrong(&at, "a path or a URL", other)),
    };
    Ok(MediaItem { kind, source, options })
}

/// One frame of a list: a string, or an image part with options of its own.
fn read_frame(at: &str, value: &Value) -> Result<FrameItem, ProcessorError> {
    match value {
        Value::String(text) => Ok(FrameItem { source: source(at, text)?, options: None }),
        Value::Object(map) => {
            let field = ["image", "image_url"].into_iter().find(|name| map.contains_key(*name));
            let field = field.ok_or_else(|| error(&format!("{at}.image"), "missing"))?;
            let item = read_item(at, map, MediaKind::Image, field)?;
            let options = Some(item.options).filter(|options| *options != ItemOptions::default());
            Ok(FrameItem { source: item.source, options })
        }
        other => Err(wrong(at, "a path, a URL or an object with an image", other)),
    }
}

/// Takes the options of `map`, then those of its `preprocess_kwargs`; `skip` names the fields that are no options.
fn read_options(
    at: &str,
    map: &Map<String, Value>,
    skip: &[&str],
    options: &mut ItemOptions,
) -> Result<(), ProcessorError> {
    // Clients that write every field of their types send nulls.
    for (name, value) in map.iter().filter(|(_, value)| !value.is_null()) {
        let at = format!("{at}.{name}");
        let name = name.as_str();
        if WHOLE_OPTIONS.contains(&name) || OTHER_OPTIONS.contains(&name) {
            set_option(&at, name, value, options)?;
        } else if !skip.contains(&name) && name != "preprocess_kwargs" && !IGNORED.contains(&name) {
            let known = [&WHOLE_OPTIONS[..], &OTHER_OPTIONS].concat().join(", ");
            return Err(error(&at, format!("unknown field; options are {known}")));
        }
    }
    match map.get("preprocess_kwargs") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(inner)) if !inner.contains_key("preprocess_kwargs") => {
            read_options(&format!("{at}.preprocess_kwargs"), inner, &[], options)
        }
        Some(other) => Err(wrong(&format!("{at}.preprocess_kwargs"), "an object of options", other)),
    }
}

fn set_option(at: &str, name: &str, value: &Value, options: &mut ItemOptions) -> Result<(), ProcessorError> {
    let value = match whole(value) {
        Some(n) if WHOLE_OPTIONS.contains(&name) => n.into(),
        _ => value.clone(),
    };
    let mut all = serde_json::to_value(&*options).map_err(|e| error(at, e.to_string()))?;
    all[name] = value;
    *options = serde_json::from_value(all).map_err(|e| error(at, e.to_string()))?;
    Ok(())
}

fn source(at: &str, text: &str) -> Result<Source, ProcessorError> {
    Source::parse(text).map_err(|e| error(at, e.to_string()))
}

fn error(at: &str, reason: impl Into<String>) -> ProcessorError {
    ProcessorError::Messages { at: at.to_owned(), reason: reason.into() }
}

fn wrong(at: &str, expected: &str, found: &Value) -> ProcessorError {
    error(at, format!("expected {expected}, found {}", describe(found)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ThinkMode;

    fn read(content: Value) -> Result<Conversation, ProcessorError> {
        Conversation::from_json(&json!([{"role": "user", "content": content}]))
    }

    #[test]
    fn every_form_of_a_picture_is_the_same_picture() {
        let expected =
            read(json!([{"type": "image", "image": "a.png", "max_pixels": 784}, {"type": "text", "text": "x"}]));
        let expected = expected.unwrap();
        assert_eq!(expected.media()[0].options.max_pixels, Some(784));
        for part in [
            json!({"image": "a.png", "max_pixels": 784.0, "fps": null, "video": null, "text": null}),
            json!({"type": "image_url", "image_url": "a.png", "max_pixels": 784}),
            json!({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}, "max_pixels": 784}),
            json!({"type": "image_url", "image_url": {"url": "a.png", "max_pixels": 784}, "max_pixels": 1}),
            json!({"type": "image_url", "image_url": {"url": "a.png", "preprocess_kwargs": {"max_pixels": 784}}}),
            json!({"image_url": {"url": "a.png"}, "preprocess_kwargs": {"max_pixels": 784}, "max_pixels": 2}),
        ] {
            assert_eq!(read(json!([part, {"text": "x"}])).unwrap(), expected, "{part}");
        }
    }

    #[test]
    fn clips_are_sources_or_lists_of_frames() {
        let conversation = read(json!([
            {"type": "video", "video": "a.mp4", "fps": 1.5, "nframes": 4},
            {"type": "video_url", "video_url": {"url": "b.mp4", "preprocess_kwargs": {"fps": 2}}},
            {"video": ["0.png", {"type": "image", "image": "1.png", "resized_height": 28, "resized_width": 56}], "fps": 1},
        ]));
        let conversation = conversation.unwrap();
        let [file, url, list] = conversation.media() else { panic!() };
        assert_eq!((file.kind, file.options.fps, file.options.nframes), (MediaKind::Video, Some(1.5), Some(4.0)));
        assert_eq!(url.options.fps, Some(2.0));
        let Source::Frames(frames) = &list.source else { panic!() };
        assert_eq!(frames[0], FrameItem { source: source("", "0.png").unwrap(), options: None });
        assert_eq!(frames[1].options.as_ref().unwrap().resized_width, Some(56));
        assert_eq!(conversation.messages()[0]["content"][2], json!({"type": "video", "video": ["0.png", "1.png"]}));
    }

    #[test]
    fn errors_say_where() {
        let cases = [
            (json!(3), "messages[0].content: expected a string or a list of parts, found 3"),
            (json!([7]), "messages[0].content[0]: expected"),
            (json!(["x", {"type": "audio", "audio": "a"}]), "messages[0].content[1].type: expected"),
            (json!([{"type": "image"}]), "messages[0].content[0].image: missing"),
            (json!([{"type": "text"}]), "messages[0].content[0].text: missing"),
            (json!([{"type": "text", "text": 1}]), "messages[0].content[0].text: expected a string"),
            (
                json!([{"type": "text", "text": "x", "annotations": [], "image": "y.png"}]),
                "messages[0].content[0].image: unknown field of a text",
            ),
            (json!([{"image": "a", "video": "b"}]), "messages[0].content[0].type: missing"),
            (json!([{"type": "image", "image": ["a"]}]), "messages[0].content[0].image: expected a path"),
            (json!([{"type": "image", "image": "data:image/png;base64,?"}]), "messages[0].content[0].image: "),
            (json!([{"type": "video", "video": []}]), "messages[0].content[0].video: expected frames"),
            (json!([{"type": "video", "video": ["a", 5]}]), "messages[0].content[0].video[1]: expected"),
            (json!([{"type": "video", "video": [{"x": 1}]}]), "messages[0].content[0].video[0].image: missing"),
            (
                json!([{"type": "video", "video": "a", "fpss": 5}]),
                "messages[0].content[0].fpss: unknown field; options are min_pixels",
            ),
            (json!([{"type": "video", "video": "a", "fps": "5"}]), "messages[0].content[0].fps: "),
            (json!([{"type": "image", "image": "a", "min_pixels": -5}]), "messages[0].content[0].min_pixels: "),
            (json!([{"type": "image", "image": "a", "resized_width": 5_000_000_000u64}]), ".resized_width: "),
            (json!([{"type": "video_url", "video_url": {"fps": 5}}]), "messages[0].content[0].video_url.url: missing"),
            (
                json!([{"type": "video_url", "video_url": {"url": "a", "preprocess_kwargs": {"fpz": 5}}}]),
                "messages[0].content[0].video_url.preprocess_kwargs.fpz: unknown field",
            ),
        ];
        for (content, expected) in cases {
            let error = read(content.clone()).expect_err(expected).to_string();
            assert!(error.contains(expected), "{content}: {error}");
        }
        for (value, expected) in [
            (json!("x"), "messages: expected a list"),
            (json!({}), "messages: missing"),
            (json!([[]]), "messages[0]: expected an object"),
            (json!([{"content": "x"}]), "messages[0].role: missing"),
            (json!([{"role": "king", "content": "x"}]), "messages[0].role: expected one of"),
            (json!([{"role": "user"}]), "messages[0].content: missing"),
        ] {
            let error = Conversation::from_json(&value).expect_err(expected).to_string();
            assert!(error.contains(expected), "{value}: {error}");
        }
    }

    #[test]
    fn all_options_are_known_and_others_are_not() {
        for name in WHOLE_OPTIONS.iter().chain(&OTHER_OPTIONS) {
            let value = if *name == "exif" { json!(true) } else { json!(1) };
            let item = read(json!([{"type": "video", "video": "a", *name: value}])).unwrap().media.remove(0);
            let options = serde_json::to_value(&item.options).unwrap();
            assert_eq!(options.as_object().unwrap().keys().collect::<Vec<_>>(), [name]);
        }
    }

    #[test]
    fn other_message_fields_are_kept() {
        let call = json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]});
        let conversation =
            Conversation::from_json(&json!({"messages": [{"role": "developer", "content": null}, call]})).unwrap();
        assert_eq!(conversation.messages()[0], json!({"role": "system", "content": ""}));
        assert_eq!(conversation.messages()[1]["tool_calls"], call["tool_calls"]);
    }

    #[test]
    fn builders_write_what_json_says() {
        let read = Conversation::from_json(&json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Sure?"},
        ]))
        .unwrap();
        let mut built = Conversation::new();
        built.push_user(read.media().to_vec(), "What?");
        built.push_assistant("A cat.");
        built.push_user(Vec::new(), "Sure?");
        assert_eq!(built.with_system("Be brief."), read);
    }

    #[test]
    fn think_suffix_stands_behind_the_last_user_text() {
        let last = |content: Value, mode| {
            let mut conversation = read(content).unwrap();
            conversation.push_assistant("...");
            conversation.with_think(mode).messages()[0]["content"].clone()
        };
        assert_eq!(last(json!("Why?"), ThinkMode::Think), "Why?/think");
        assert_eq!(last(json!("Why?"), ThinkMode::Auto), "Why?");
        assert_eq!(last(json!("Why? /think "), ThinkMode::Think), "Why? /think ");
        assert_eq!(last(json!("Why?/no_think"), ThinkMode::Think), "Why?/no_think");
        let parts = last(json!([{"text": "Why?"}, {"image": "a.png"}]), ThinkMode::NoThink);
        assert_eq!(parts[0]["text"], "Why?/no_think");
        assert_eq!(last(json!([{"image": "a.png"}]), ThinkMode::NoThink)[1]["text"], "/no_think");
    }
}

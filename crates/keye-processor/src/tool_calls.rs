//! Tool calls in the text of answers and prompts, in the format of the base models (Qwen3, Hermes;
//! `docs/spec/keye-vl-2.md` §8): `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`; and DeepSeek-V3.1's, which
//! 671B is taken to have (`docs/spec/keye-vl-671b.md` §8):
//! `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>`.

use serde_json::{Map, Value};

use crate::json_scan::{JsonScan, Scanned};

pub(crate) const OPEN: &str = "<tool_call>";
pub(crate) const CLOSE: &str = "</tool_call>";

/// DeepSeek-V3.1's: between a call's name and its arguments.
pub(crate) const SEPARATOR: &str = "<｜tool▁sep｜>";
/// Around all calls of an answer; they say nothing.
const AROUND: [&str; 2] = ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"];

/// Longest name of a tool between a tag and the separator.
const NAME_BYTES: usize = 256;

/// How a call is written.
#[derive(Debug, Clone, Copy)]
struct Format {
    open: &'static str,
    close: &'static str,
    /// Name and arguments apart, else one json object.
    separator: Option<&'static str>,
}

const FORMATS: [Format; 2] = [
    Format { open: OPEN, close: CLOSE, separator: None },
    Format { open: "<｜tool▁call▁begin｜>", close: "<｜tool▁call▁end｜>", separator: Some(SEPARATOR) },
];

/// A call that the model made.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// One of the tools offered.
    pub name: String,
    /// A json object.
    pub arguments: Map<String, Value>,
}

/// Text around calls, or a call.
#[derive(Debug, Clone, PartialEq)]
pub enum ToolPiece {
    /// Text of the answer.
    Text(String),
    /// A whole, well-formed call.
    Call(ToolCall),
}

/// Takes the calls out of an answer while it comes.
///
/// A call is given when it is whole, since one that turns out to be malformed (no json, no `name` among the tools, arguments that are no
/// object) stays text as the model wrote it. White space around calls is removed. A call whose closing tag is missing counts
/// if its json is whole and the answer ends there, or another call begins.
#[derive(Debug, Clone)]
pub struct ToolCallSplitter {
    names: Vec<String>,
    /// Text that may be the beginning of a tag, or a call that is not whole yet.
    pending: String,
    /// How far the json of the call in `pending` was read.
    scan: JsonScan,
    /// White space that is shown only if more text follows.
    space: String,
    /// Nothing since the last call, or since the beginning.
    fresh: bool,
}

/// What a text that begins with an opening tag is.
enum Found {
    /// Not to be told yet.
    Open,
    /// A call, and the bytes that it takes.
    Call(ToolCall, usize),
    /// So many bytes of text.
    Text(usize),
}

impl ToolCallSplitter {
    /// A splitter that knows the names of the tools.
    pub fn new(names: Vec<String>) -> Self {
        Self { names, pending: String::new(), scan: JsonScan::default(), space: String::new(), fresh: true }
    }

    /// Takes the next piece of text; returns what is settled, in order.
    pub fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        self.pending.push_str(text);
        self.settle(false)
    }

    /// What is left at the end: a call without its closing tag, or text.
    pub fn finish(&mut self) -> Vec<ToolPiece> {
        self.settle(true)
    }

    /// Settles what can be told, all of it when nothing follows.
    fn settle(&mut self, last: bool) -> Vec<ToolPiece> {
        let mut buffer = std::mem::take(&mut self.pending);
        let mut pieces = Vec::new();
        let mut done = 0;
        while let Some(at) = buffer[done..].find('<') {
            self.text(&buffer[done..done + at], &mut pieces);
            done += at;
            let tail = &buffer[done..];
            if let Some(around) = AROUND.into_iter().find(|tag| tail.starts_with(tag)) {
                self.space.clear();
                self.fresh = true;
                done += around.len();
                continue;
            }
            let begins = |tag: &str| !last && tag.starts_with(tail);
            let found = match FORMATS.into_iter().find(|format| tail.starts_with(format.open)) {
                None if AROUND.into_iter().any(begins) || FORMATS.iter().any(|format| begins(format.open)) => {
                    Found::Open
                }
                None => Found::Text(1),
                Some(format) => self.call(format, tail, last),
            };
            match found {
                Found::Open => {
                    // A call may come in many pieces: what is kept is not copied for each.
                    if done > 0 {
                        buffer.drain(..done);
                    }
                    self.pending = buffer;
                    return pieces;
                }
                Found::Call(call, taken) => {
                    self.space.clear();
                    self.fresh = true;
                    pieces.push(ToolPiece::Call(call));
                    done += taken;
                }
                Found::Text(taken) => {
                    self.text(&buffer[done..done + taken], &mut pieces);
                    done += taken;
                }
            }
            self.scan = JsonScan::default();
        }
        self.text(&buffer[done..], &mut pieces);
        pieces
    }

    /// Looks at a text that begins with `format.open`. What turns out to be no call is text from there to behind its first
    /// tag only: a good call may follow.
    fn call(&mut self, format: Format, text: &str, last: bool) -> Found {
        let no_call = Found::Text(format.open.len());
        let wait = |whole: Found| if last { whole } else { Found::Open };
        let mut begin = format.open.len();
        let mut name = None;
        if let Some(separator) = format.separator {
            let inside = &text[begin..];
            let Some(at) = inside.find('<') else {
                return if inside.len() > NAME_BYTES { no_call } else { wait(no_call) };
            };
            let tail = &inside[at..];
            if !tail.starts_with(separator) {
                return if separator.starts_with(tail) { wait(no_call) } else { no_call };
            }
            name = Some(inside[..at].trim());
            begin += at + separator.len();
            // A tool without arguments.
            let behind = text[begin..].trim_start();
            if behind.starts_with(format.close) || last && format.close.starts_with(behind) {
                let end = text.len() - behind.len() + behind.len().min(format.close.len());
                return self.named(name.unwrap_or_default(), Map::new()).map_or(no_call, |call| Found::Call(call, end));
            }
            if !behind.is_empty() && format.close.starts_with(behind) {
                return Found::Open;
            }
        }
        let json = match self.scan.read(&text.as_bytes()[begin..]) {
            Scanned::Whole(length) => &text[begin..begin + length],
            Scanned::Open => return wait(no_call),
            Scanned::Broken => return no_call,
        };
        let behind = text[begin + json.len()..].trim_start();
        let at = text.len() - behind.len();
        let mut next = FORMATS.iter().map(|format| format.open).chain([AROUND[1]]);
        let (end, closed) = if behind.starts_with(format.close) {
            (at + format.close.len(), true)
        } else if last && format.close.starts_with(behind) {
            (text.len(), true)
        } else if next.clone().any(|tag| behind.starts_with(tag) || last && tag.starts_with(behind)) {
            // Its closing tag is missing; the next thing begins.
            (at, false)
        } else if format.close.starts_with(behind) || next.any(|tag| tag.starts_with(behind)) {
            return Found::Open;
        } else {
            return no_call;
        };
        let call = match name {
            Some(name) => serde_json::from_str(json).ok().and_then(|arguments| self.named(name, arguments)),
            None => self.parse(json),
        };
        match call {
            Some(call) => Found::Call(call, end),
            None if closed => Found::Text(end),
            None => no_call,
        }
    }

    /// A call that is one json object.
    fn parse(&self, text: &str) -> Option<ToolCall> {
        let mut call: Map<String, Value> = serde_json::from_str(text).ok()?;
        let arguments = match call.remove("arguments") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(Value::String(text)) if text.trim().is_empty() => Map::new(),
            // Some models write them as OpenAI's API does.
            Some(Value::String(text)) => serde_json::from_str(&text).ok()?,
            Some(_) => return None,
        };
        self.named(call.get("name")?.as_str()?, arguments)
    }

    fn named(&self, name: &str, arguments: Map<String, Value>) -> Option<ToolCall> {
        self.names.iter().find(|known| *known == name).map(|name| ToolCall { name: name.clone(), arguments })
    }

    fn text(&mut self, text: &str, pieces: &mut Vec<ToolPiece>) {
        let text = if self.fresh { text.trim_start() } else { text };
        let shown = text.trim_end();
        if shown.is_empty() {
            self.space.push_str(text);
            return;
        }
        let piece = std::mem::take(&mut self.space) + shown;
        self.space.push_str(&text[shown.len()..]);
        self.fresh = false;
        match pieces.last_mut() {
            Some(ToolPiece::Text(last)) => last.push_str(&piece),
            _ => pieces.push(ToolPiece::Text(piece)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": \"</tool_call> <b>\", \"n\": 1}}\n</tool_call>";

    fn run(text: &str, width: usize) -> (String, Vec<ToolCall>) {
        let mut splitter = ToolCallSplitter::new(vec!["look".into(), "go".into()]);
        let chars: Vec<char> = text.chars().collect();
        let mut pieces: Vec<ToolPiece> =
            chars.chunks(width).flat_map(|chunk| splitter.push(&chunk.iter().collect::<String>())).collect();
        pieces.extend(splitter.finish());
        let (mut shown, mut calls) = (String::new(), Vec::new());
        for piece in pieces {
            match piece {
                ToolPiece::Text(text) => shown.push_str(&text),
                ToolPiece::Call(call) => calls.push(call),
            }
        }
        (shown, calls)
    }

    #[test]
    fn calls_are_taken_out_whatever_the_chunks() {
        let go = "<tool_call>{\"name\": \"go\"}</tool_call>";
        let as_text = "<tool_call>\n{\"name\": \"go\", \"arguments\": \"{\\\"a\\\": 1}\"}\n";
        let cases = [
            (format!("Let me see.\n{GOOD}\n{go}\n"), "Let me see.", vec!["look", "go"]),
            (format!("{go} and 1 < 2 <tool"), "and 1 < 2 <tool", vec!["go"]),
            (as_text.to_owned(), "", vec!["go"]),
            ("a <b> c\n".into(), "a <b> c", vec![]),
            (String::new(), "", vec![]),
        ];
        for (text, shown, names) in cases {
            for width in 1..=text.chars().count().max(1) {
                let (found, calls) = run(&text, width);
                let called: Vec<&str> = calls.iter().map(|call| call.name.as_str()).collect();
                assert_eq!((found.as_str(), called), (shown, names.clone()), "{text:?} in chunks of {width}");
            }
        }
        assert_eq!(run(GOOD, 3).1[0].arguments["at"], "</tool_call> <b>");
        assert_eq!(run(as_text, 3).1[0].arguments["a"], 1);
    }

    #[test]
    fn calls_in_deepseeks_words_are_taken_out_too() {
        let call = |name: &str, arguments: &str| {
            format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>")
        };
        let around = |inside: &str| format!("{}{inside}{}", AROUND[0], AROUND[1]);
        let tricky = call("look", "{\"at\": \"<｜tool▁call▁end｜> x\"}");
        let cases = [
            (
                format!("Let me see.{}", around(&(tricky.clone() + &call("go", "{}")))),
                "Let me see.".to_owned(),
                vec!["look", "go"],
            ),
            (around(&call("go", "\n{\"a\": 1}\n")), String::new(), vec!["go"]),
            ("<｜tool▁call▁begin｜>go<｜tool▁sep｜>{}".into(), String::new(), vec!["go"]),
            // Malformed ones stay.
            (call("fly", "{}"), call("fly", "{}"), vec![]),
            (call("go", "[1]"), call("go", "[1]"), vec![]),
            (
                "<｜tool▁call▁begin｜>go<｜tool▁call▁end｜>.".into(),
                "<｜tool▁call▁begin｜>go<｜tool▁call▁end｜>.".into(),
                vec![],
            ),
        ];
        for (text, shown, names) in cases {
            for width in 1..=text.chars().count() {
                let (found, calls) = run(&text, width);
                let called: Vec<&str> = calls.iter().map(|call| call.name.as_str()).collect();
                assert_eq!((found.as_str(), called), (shown.as_str(), names.clone()), "{text:?} in chunks of {width}");
            }
        }
        assert_eq!(run(&tricky, 2).1[0].arguments["at"], "<｜tool▁call▁end｜> x");
    }

    #[test]
    fn malformed_calls_stay_text() {
        for inside in [
            "{\"name\": \"look\"",
            "{\"name\": \"fly\", \"arguments\": {}}",
            "[1]",
            "{\"name\": \"go\", \"arguments\": 3}",
        ] {
            let text = format!("x <tool_call>{inside}</tool_call> y");
            for width in [1, 7, 1000] {
                assert_eq!(run(&text, width), (text.clone(), vec![]), "{width}");
            }
        }
    }

    #[test]
    fn a_broken_call_leaves_the_next_one_alone() {
        let go = "<tool_call>\n{\"name\": \"go\", \"arguments\": {}}\n";
        let cases = [
            // Without its closing tag.
            (format!("{go}{GOOD}"), String::new(), vec!["go", "look"]),
            (format!("{go}{go}</tool_call>"), String::new(), vec!["go", "go"]),
            // With a string that does not end.
            (
                format!("<tool_call>{{\"name\": \"go\", \"arguments\": {{\"a\": \"x}}}}</tool_call>\n{GOOD}"),
                "<tool_call>{\"name\": \"go\", \"arguments\": {\"a\": \"x}}</tool_call>".to_owned(),
                vec!["look"],
            ),
            (format!("<tool_call>{{\"name\": {go}</tool_call>"), "<tool_call>{\"name\":".to_owned(), vec!["go"]),
            // Cut in its closing tag.
            (format!("{go}</tool_call"), String::new(), vec!["go"]),
            (format!("{go}<"), String::new(), vec!["go"]),
            (format!("{go}<tool_"), "<tool_".to_owned(), vec!["go"]),
            // Without arguments.
            ("<tool_call>{\"name\": \"go\", \"arguments\": null}</tool_call>".into(), String::new(), vec!["go"]),
            ("<tool_call>{\"name\": \"go\", \"arguments\": \"\"}</tool_call>".into(), String::new(), vec!["go"]),
            ("<｜tool▁call▁begin｜>go<｜tool▁sep｜><｜tool▁call▁end｜>.".into(), ".".into(), vec!["go"]),
            ("<｜tool▁call▁begin｜>go<｜tool▁sep｜>".into(), String::new(), vec!["go"]),
            ("<｜tool▁call▁begin｜>go<｜tool▁sep｜>{}<｜tool▁call".into(), String::new(), vec!["go"]),
        ];
        for (text, shown, names) in cases {
            for width in 1..=text.chars().count() {
                let (found, calls) = run(&text, width);
                let called: Vec<&str> = calls.iter().map(|call| call.name.as_str()).collect();
                assert_eq!((found.as_str(), called), (shown.as_str(), names.clone()), "{text:?} in chunks of {width}");
            }
        }
    }

    /// Minutes, when each push looks at all of the call again.
    #[test]
    fn long_calls_take_time_by_their_length() {
        let begin = std::time::Instant::now();
        let long = format!(
            "<tool_call>{{\"name\": \"go\", \"arguments\": {{\"a\": \"{}\"}}}}</tool_call>",
            "</tool_call> ".repeat(100_000)
        );
        assert_eq!(run(&long, 3).1.len(), 1);
        let open = "<tool_call>{\"a".repeat(50_000);
        assert_eq!(run(&open, 3), (open, vec![]));
        assert!(begin.elapsed() < std::time::Duration::from_secs(10), "{:?}", begin.elapsed());
    }
}

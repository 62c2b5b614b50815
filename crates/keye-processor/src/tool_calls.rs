//! Tool calls in the text of answers and prompts, in the format of the base models (Qwen3, Hermes;
//! `docs/spec/keye-vl-2.md` §8): `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`; and DeepSeek-V3.1's, which
//! 671B is taken to have (`docs/spec/keye-vl-671b.md` §8):
//! `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>`.

use serde_json::{Map, Value, json};

use crate::{ChatTemplate, Conversation};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// DeepSeek-V3.1's: between a call's name and its arguments.
const SEPARATOR: &str = "<｜tool▁sep｜>";
/// Around all calls of an answer; they say nothing.
const AROUND: [&str; 2] = ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"];

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
/// object) stays text as the model wrote it. White space around calls is removed. A call whose closing tag is missing at the
/// end of the answer counts if its json is whole.
#[derive(Debug, Clone)]
pub struct ToolCallSplitter {
    names: Vec<String>,
    /// Text that may be the beginning of a tag, or a call that is not whole yet.
    pending: String,
    /// Bytes of the call in `pending` whose closing tags are known to stand in strings.
    searched: usize,
    /// White space that is shown only if more text follows.
    space: String,
    /// Nothing since the last call, or since the beginning.
    fresh: bool,
}

impl ToolCallSplitter {
    /// A splitter that knows the names of the tools.
    pub fn new(names: Vec<String>) -> Self {
        Self { names, pending: String::new(), searched: 0, space: String::new(), fresh: true }
    }

    /// Takes the next piece of text; returns what is settled, in order.
    pub fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        let buffer = std::mem::take(&mut self.pending) + text;
        let mut pieces = Vec::new();
        let mut rest = &buffer[..];
        while let Some(at) = rest.find('<') {
            self.text(&rest[..at], &mut pieces);
            let tail = &rest[at..];
            if let Some(around) = AROUND.into_iter().find(|tag| tail.starts_with(tag)) {
                self.space.clear();
                self.fresh = true;
                rest = &tail[around.len()..];
                continue;
            }
            let begins = |tag: &str| tag.starts_with(tail);
            let (taken, call) = match FORMATS.into_iter().find(|format| tail.starts_with(format.open)) {
                None if AROUND.into_iter().any(begins) || FORMATS.iter().any(|format| begins(format.open)) => (0, None),
                None => (1, None),
                Some(format) => self.call(format, &tail[format.open.len()..]),
            };
            match (taken, call) {
                (0, _) => {
                    self.pending = tail.to_owned();
                    return pieces;
                }
                (taken, Some(call)) => {
                    self.searched = 0;
                    self.space.clear();
                    self.fresh = true;
                    pieces.push(ToolPiece::Call(call));
                    rest = &tail[taken..];
                }
                (taken, None) => {
                    self.searched = 0;
                    self.text(&tail[..taken], &mut pieces);
                    rest = &tail[taken..];
                }
            }
        }
        self.text(rest, &mut pieces);
        pieces
    }

    /// What is left at the end: a call without its closing tag, or text.
    pub fn finish(&mut self) -> Vec<ToolPiece> {
        let rest = std::mem::take(&mut self.pending);
        let mut pieces = Vec::new();
        let whole = |format: Format| self.parse(format, rest.strip_prefix(format.open)?.trim());
        match FORMATS.into_iter().find_map(whole) {
            Some(call) => pieces.push(ToolPiece::Call(call)),
            None => self.text(&rest, &mut pieces),
        }
        pieces
    }

    /// Bytes of the tail that are settled (0: more text is needed) and the call in them.
    fn call(&mut self, format: Format, inside: &str) -> (usize, Option<ToolCall>) {
        while let Some(at) = inside.get(self.searched..).and_then(|rest| rest.find(format.close)) {
            let at = self.searched + at;
            let end = format.open.len() + at + format.close.len();
            if let Some(call) = self.parse(format, inside[..at].trim()) {
                return (end, Some(call));
            }
            // The tag may stand in a string of the arguments.
            let json = format
                .separator
                .and_then(|separator| inside.split_once(separator))
                .map_or(0, |(name, _)| name.len() + format.separator.map_or(0, str::len));
            if !inside.get(json..at + format.close.len()).is_some_and(is_open) {
                return (end, None);
            }
            self.searched = at + format.close.len();
        }
        (0, None)
    }

    fn parse(&self, format: Format, text: &str) -> Option<ToolCall> {
        let (name, arguments) = match format.separator {
            Some(separator) => {
                let (name, arguments) = text.split_once(separator)?;
                (name.trim().to_owned(), serde_json::from_str(arguments.trim()).ok()?)
            }
            None => {
                let mut call: Map<String, Value> = serde_json::from_str(text).ok()?;
                let name = call.get("name")?.as_str()?.to_owned();
                let arguments = match call.remove("arguments") {
                    None => Map::new(),
                    Some(Value::Object(arguments)) => arguments,
                    // Some models write them as OpenAI's API does.
                    Some(Value::String(text)) => serde_json::from_str(&text).ok()?,
                    Some(_) => return None,
                };
                (name, arguments)
            }
        };
        self.names.contains(&name).then_some(ToolCall { name, arguments })
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

/// Whether text is the beginning of json and could go on.
fn is_open(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_err_and(|error| error.is_eof())
}

impl Conversation {
    /// A copy for a template: with `tools` and earlier calls written into the text, as the base model's template writes
    /// them, when the template itself takes no notice of them (that of Preview and 1.5 does not). What the template does
    /// handle stays as it is, with arguments as objects.
    pub fn with_tools(&self, template: &ChatTemplate, tools: Option<&Value>) -> Self {
        let mut copy = self.clone();
        // DeepSeek's template puts arguments behind the name as text, unless it looks at what they are or prints json.
        let source = template.source();
        let as_text = source.contains(SEPARATOR) && (!source.contains("tojson") || source.contains("is string"));
        let mut room = MOST_ARGUMENTS;
        for message in copy.messages.iter_mut().filter(|_| !as_text) {
            parse_arguments(message, &mut room);
        }
        if !template.source().contains("tool_call") {
            copy.messages = copy.messages.drain(..).map(calls_as_text).collect();
            join_results(&mut copy.messages);
        }
        if let (Some(tools), false) = (tools.and_then(Value::as_array), template.source().contains("tools")) {
            add_instructions(&mut copy.messages, tools);
        }
        copy
    }
}

/// Bytes of arguments that become json: a conversation with more fits no model, and values take thirty times their text.
const MOST_ARGUMENTS: usize = 4 << 20;

/// OpenAI's clients send arguments as a string of json; templates of this family print objects. Text of more than `room`
/// bytes stays as it is.
fn parse_arguments(message: &mut Value, room: &mut usize) {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten();
    for call in calls {
        let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) else {
            continue;
        };
        let Some(text) = arguments.as_str() else { continue };
        let Some(left) = room.checked_sub(text.len()) else { continue };
        *room = left;
        if let Ok(object) = serde_json::from_str::<Map<_, _>>(text) {
            *arguments = object.into();
        }
    }
}

fn calls_as_text(mut message: Value) -> Value {
    let Some(Value::Array(calls)) = message.as_object_mut().and_then(|map| map.remove("tool_calls")) else {
        return message;
    };
    let mut lines: Vec<String> = text_of(&message["content"]).into_iter().filter(|text| !text.is_empty()).collect();
    for call in &calls {
        let function = call.get("function").unwrap_or(call);
        let call = json!({"name": function["name"], "arguments": function["arguments"]});
        lines.push(format!("{OPEN}\n{call}\n{CLOSE}"));
    }
    message["content"] = lines.join("\n").into();
    message
}

/// Results in a row are one turn of the user.
fn join_results(messages: &mut Vec<Value>) {
    let mut joined: Vec<Value> = Vec::with_capacity(messages.len());
    let mut after_result = false;
    for mut message in messages.drain(..) {
        let is_result = message["role"] == "tool";
        if is_result {
            let mut content = match message["content"].take() {
                Value::Array(parts) => parts,
                text => vec![json!({"type": "text", "text": text})],
            };
            content.insert(0, json!({"type": "text", "text": "<tool_response>\n"}));
            content.push(json!({"type": "text", "text": "\n</tool_response>"}));
            let last = joined.last_mut().filter(|_| after_result);
            match last.and_then(|last| last["content"].as_array_mut()) {
                Some(parts) => {
                    parts.push(json!({"type": "text", "text": "\n"}));
                    parts.extend(content);
                }
                None => joined.push(json!({"role": "user", "content": content})),
            }
        } else {
            joined.push(message);
        }
        after_result = is_result;
    }
    *messages = joined;
}

/// The base model's own words about tools, behind the system message.
fn add_instructions(messages: &mut Vec<Value>, tools: &[Value]) {
    let lines: Vec<String> = tools.iter().map(Value::to_string).collect();
    let words = format!(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function \
         signatures within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\nFor each function call, return a json object \
         with function name and arguments within {OPEN}{CLOSE} XML tags:\n{OPEN}\n{{\"name\": <function-name>, \
         \"arguments\": <args-json-object>}}\n{CLOSE}",
        lines.join("\n")
    );
    match messages.first_mut().filter(|message| message["role"] == "system") {
        None => messages.insert(0, json!({"role": "system", "content": words})),
        Some(message) => match &mut message["content"] {
            Value::Array(parts) => parts.push(json!({"type": "text", "text": format!("\n\n{words}")})),
            content => *content = format!("{}\n\n{words}", content.as_str().unwrap_or_default()).into(),
        },
    }
}

/// The text of a content, and that of its parts.
fn text_of(content: &Value) -> Vec<String> {
    match content {
        Value::String(text) => vec![text.clone()],
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str().map(str::to_owned)).collect(),
        _ => Vec::new(),
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
    fn deepseeks_template_gets_arguments_as_text() {
        let own = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name + '<｜tool▁sep｜>' + \
                   c.function.arguments }}{% endfor %}{{ m.role }} {% endfor %}";
        assert!(rendered(own, None).contains("look<｜tool▁sep｜>{\"at\": 1}assistant "));
        let json = own.replace("c.function.arguments", "(c.function.arguments|tojson)");
        assert!(rendered(&json, None).contains("look<｜tool▁sep｜>{\"at\": 1}assistant "), "not a string of json");
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

    fn rendered(source: &str, tools: Option<&Value>) -> String {
        let messages = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{\"at\": 1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "A cat."},
            {"role": "tool", "tool_call_id": "2", "content": "A dog."},
        ]);
        let template = ChatTemplate::new(source.into()).unwrap();
        let conversation = Conversation::from_json(&messages).unwrap().with_tools(&template, tools);
        template
            .render(conversation.messages(), &crate::TemplateOptions { tools: tools.cloned(), ..Default::default() })
            .unwrap()
    }

    #[test]
    fn templates_without_tools_see_text() {
        let plain = "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}\
                     {% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}";
        let tools = json!([{"type": "function", "function": {"name": "look"}}]);
        let text = rendered(plain, Some(&tools));
        let call = "[assistant]<tool_call>\n{\"name\":\"look\",\"arguments\":{\"at\":1}}\n</tool_call>";
        let results = "[user]<tool_response>\nA cat.\n</tool_response>\n<tool_response>\nA dog.\n</tool_response>";
        assert!(text.starts_with("[system]Be brief.\n\n# Tools\n"), "{text}");
        assert!(text.contains("<tools>\n{\"type\":\"function\",\"function\":{\"name\":\"look\"}}\n</tools>"), "{text}");
        assert!(text.ends_with(&format!("{call}{results}")), "{text}");
        assert!(!rendered(plain, None).contains("# Tools"));
    }

    #[test]
    fn templates_with_tools_see_objects() {
        let own = "{{ tools|tojson }}{% for m in messages %}{% for c in m.tool_calls %}<tool_call>{{ c.function.arguments.at + 1 }}\
                   {% endfor %}{{ m.role }} {% endfor %}";
        assert_eq!(rendered(own, Some(&json!([]))), "[]system user <tool_call>2assistant tool tool ");
    }
}

//! Tools, earlier calls and their results in prompts, for templates that know none (`docs/spec/keye-vl-2.md` §8).

use serde_json::{Map, Value, json};

use crate::conversation::text_part;
use crate::python_json::python_json;
use crate::tool_calls::{CLOSE, OPEN, SEPARATOR};
use crate::{ChatTemplate, Conversation};

/// Around a result.
const RESULT: [&str; 2] = ["<tool_response>", "</tool_response>"];

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
        // Text stays as it was written.
        let arguments = function["arguments"].as_str().map_or_else(|| shown(&function["arguments"]), str::to_owned);
        let name = shown(&function["name"]);
        lines.push(format!("{OPEN}\n{{\"name\": {name}, \"arguments\": {arguments}}}\n{CLOSE}"));
    }
    message["content"] = lines.join("\n").into();
    message
}

/// Json as the base model's template writes it.
fn shown(value: &Value) -> String {
    python_json(value).unwrap_or_else(|_| value.to_string())
}

/// Whether a content of the user's role is results of tools, by the rule of the base model's template.
pub(crate) fn is_tool_results(content: &Value) -> bool {
    let texts = text_of(content);
    let (first, last) = (texts.first().map(String::as_str), texts.last().map(String::as_str));
    first.is_some_and(|text| text.starts_with(RESULT[0])) && last.is_some_and(|text| text.ends_with(RESULT[1]))
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
            content.insert(0, text_part(&format!("{}\n", RESULT[0])));
            content.push(text_part(&format!("\n{}", RESULT[1])));
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
    let lines: Vec<String> = tools.iter().map(shown).collect();
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
    use crate::ThinkMode;

    #[test]
    fn deepseeks_template_gets_arguments_as_text() {
        let own = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name + '<｜tool▁sep｜>' + \
                   c.function.arguments }}{% endfor %}{{ m.role }} {% endfor %}";
        assert!(rendered(own, None).contains("look<｜tool▁sep｜>{\"at\": 1}assistant "));
        let json = own.replace("c.function.arguments", "(c.function.arguments|tojson)");
        assert!(rendered(&json, None).contains("look<｜tool▁sep｜>{\"at\": 1}assistant "), "not a string of json");
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
        let call = "[assistant]<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": 1}}\n</tool_call>";
        let results = "[user]<tool_response>\nA cat.\n</tool_response>\n<tool_response>\nA dog.\n</tool_response>";
        assert!(text.starts_with("[system]Be brief.\n\n# Tools\n"), "{text}");
        assert!(
            text.contains("<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"look\"}}\n</tools>"),
            "{text}"
        );
        assert!(text.ends_with(&format!("{call}{results}")), "{text}");
        assert!(!rendered(plain, None).contains("# Tools"));
    }

    #[test]
    fn templates_with_tools_see_objects() {
        let own = "{{ tools|tojson }}{% for m in messages %}{% for c in m.tool_calls %}<tool_call>{{ c.function.arguments.at + 1 }}\
                   {% endfor %}{{ m.role }} {% endfor %}";
        assert_eq!(rendered(own, Some(&json!([]))), "[]system user <tool_call>2assistant tool tool ");
    }

    #[test]
    fn the_think_suffix_stands_behind_the_users_own_text() {
        let plain = ChatTemplate::new("{{ messages }}".into()).unwrap();
        let messages = json!([
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": "at 1"}}]},
            {"role": "tool", "content": "A cat."},
        ]);
        let conversation = Conversation::from_json(&messages).unwrap().with_tools(&plain, None);
        let asked = conversation.with_think(ThinkMode::NoThink);
        assert_eq!(asked.messages()[0]["content"], "Look./no_think");
        assert_eq!(
            asked.messages()[1]["content"],
            "<tool_call>\n{\"name\": \"look\", \"arguments\": at 1}\n</tool_call>"
        );
        assert_eq!(asked.messages()[2], conversation.messages()[2]);
        assert_eq!(asked.messages()[2]["role"], "user");
    }
}

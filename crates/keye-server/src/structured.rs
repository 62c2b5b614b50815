//! The form that an answer has to have, under the names of OpenAI, vLLM and SGLang.

use keye_engine::{Grammar, MAX_GRAMMAR_BYTES};
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::gbnf;

/// Reads them, with the name that was used; two at once contradict each other.
pub(crate) fn read(fields: &Fields) -> Result<Option<(&'static str, Grammar)>, ApiError> {
    let mut found: Vec<(&'static str, Grammar)> = Vec::new();
    if let Some(format) = fields.object("response_format")? {
        found.extend(format_grammar(format, "response_format")?.map(|grammar| ("response_format", grammar)));
    }
    for (name, kind) in [
        ("guided_json", "json"),
        ("json_schema", "json"),
        ("guided_regex", "regex"),
        ("regex", "regex"),
        ("guided_choice", "choice"),
        ("guided_grammar", "grammar"),
        ("ebnf", "grammar"),
    ] {
        if let Some(value) = fields.get(name) {
            found.push((name, of_kind(name, kind, value)?));
        }
    }
    if let Some(outputs) = fields.object("structured_outputs")? {
        let before = found.len();
        for (kind, value) in outputs.iter().filter(|(_, value)| !value.is_null() && *value != false) {
            // Settings that steer vLLM's own machinery.
            if !matches!(kind.as_str(), "disable_fallback" | "disable_any_whitespace" | "whitespace_pattern") {
                found.push(("structured_outputs", of_kind("structured_outputs", kind, value)?));
            }
        }
        if found.len() == before {
            let message =
                "structured_outputs: expected json, json_object, regex, choice or grammar, found none of them";
            return Err(ApiError::invalid("structured_outputs", message));
        }
    }
    if let [(first, _), (second, _), ..] = &found[..] {
        let message = format!("{second}: {first} already says what the answer has to look like");
        return Err(ApiError::invalid(second, message));
    }
    Ok(found.pop())
}

/// `response_format` of chats, or `text.format` of responses, where the schema stands one level higher.
pub(crate) fn format_grammar(format: &Map<String, Value>, name: &str) -> Result<Option<Grammar>, ApiError> {
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::JsonObject)),
        Some("json_schema") => {
            let holder = format.get("json_schema").and_then(Value::as_object).unwrap_or(format);
            let schema = holder.get("schema").filter(|schema| schema.is_object() || schema.is_boolean());
            let schema =
                schema.ok_or_else(|| ApiError::invalid(name, format!("{name}: expected a schema, an object")))?;
            Ok(Some(Grammar::JsonSchema(schema.clone())))
        }
        _ => Err(ApiError::invalid(name, format!("{name}.type: expected text, json_object or json_schema"))),
    }
}

fn of_kind(name: &str, kind: &str, value: &Value) -> Result<Grammar, ApiError> {
    let wrong = |expected: &str| ApiError::invalid(name, format!("{name}: expected {expected}"));
    // Whoever sends a form wants one: an answer without would be taken for one that has it.
    if is_empty(value) {
        let message = format!("{name}: it is empty; give the form that the answer should have, or leave the field out");
        return Err(ApiError::invalid(name, message));
    }
    match (kind, value) {
        (_, Value::String(text)) if text.len() > MAX_GRAMMAR_BYTES => {
            Err(wrong(&format!("at most {MAX_GRAMMAR_BYTES} bytes, found {}", text.len())))
        }
        ("json", Value::Object(_)) => Ok(Grammar::JsonSchema(value.clone())),
        ("json", Value::String(text)) => match fields::parse(text.as_bytes()) {
            Ok(schema @ Value::Object(_)) => Ok(Grammar::JsonSchema(schema)),
            _ => Err(wrong("a schema, an object or its json")),
        },
        ("json", _) => Err(wrong("a schema, an object or its json")),
        ("json_object", Value::Bool(true)) => Ok(Grammar::JsonObject),
        ("regex", Value::String(text)) => Ok(Grammar::Regex(text.clone())),
        ("regex", _) => Err(wrong("a regular expression")),
        ("choice", Value::Array(list)) => {
            let texts = list.iter().map(|text| text.as_str().filter(|text| !text.is_empty()).map(str::to_owned));
            let texts: Option<Vec<String>> = texts.collect();
            texts.filter(|texts| !texts.is_empty()).map(Grammar::Choice).ok_or_else(|| wrong("a list of texts"))
        }
        ("choice", _) => Err(wrong("a list of texts")),
        // GBNF says ::= where Lark has a colon.
        ("grammar", Value::String(text)) if text.contains("::=") => {
            let lark = gbnf::to_lark(text).map_err(|reason| ApiError::invalid(name, format!("{name}: {reason}")))?;
            Ok(Grammar::Lark(lark))
        }
        ("grammar", Value::String(text)) => Ok(Grammar::Lark(text.clone())),
        ("grammar", _) => Err(wrong("a grammar in the notation of Lark or GBNF")),
        _ => Err(wrong("json, json_object, regex, choice or grammar")),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn grammar(body: Value) -> Result<Option<Grammar>, String> {
        let fields = Fields::of(&body).unwrap();
        let found = read(&fields).map_err(|error| error.param.unwrap_or_default())?;
        Ok(found.map(|(_, grammar)| grammar))
    }

    #[test]
    fn every_name() {
        let schema = json!({"type": "object"});
        let wanted = Ok(Some(Grammar::JsonSchema(schema.clone())));
        for body in [
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
            json!({"guided_json": schema}),
            json!({"guided_json": schema.to_string()}),
            json!({"json_schema": schema.to_string()}),
            json!({"structured_outputs": {"json": schema, "regex": null}}),
        ] {
            assert_eq!(grammar(body.clone()), wanted, "{body}");
        }
        assert_eq!(grammar(json!({"response_format": {"type": "json_object"}})), Ok(Some(Grammar::JsonObject)));
        assert_eq!(grammar(json!({"regex": "a+"})), Ok(Some(Grammar::Regex("a+".into()))));
        let choice = Ok(Some(Grammar::Choice(vec!["a".into(), "b".into()])));
        assert_eq!(grammar(json!({"guided_choice": ["a", "b"]})), choice);
        assert_eq!(grammar(json!({"guided_grammar": "start: \"a\""})), Ok(Some(Grammar::Lark("start: \"a\"".into()))));
        for nothing in [json!({}), json!({"response_format": {"type": "text"}, "regex": null, "guided_json": null})] {
            assert_eq!(grammar(nothing), Ok(None));
        }
    }

    #[test]
    fn contradictions_and_nonsense() {
        for (body, param) in [
            (json!({"response_format": {"type": "json_object"}, "regex": "a"}), "regex"),
            (json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}), "structured_outputs"),
            (json!({"response_format": {"type": "yaml"}}), "response_format"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_json": format!("{{\"a\":[0{}]}}", ",0".repeat(600_000))}), "guided_json"),
            (json!({"ebnf": format!("root ::= \"{}\"", "a".repeat(2 << 20))}), "ebnf"),
            (json!({"guided_choice": [1]}), "guided_choice"),
            (json!({"guided_choice": [""]}), "guided_choice"),
            // An empty form is none, and must not pass for one.
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_regex": ""}), "guided_regex"),
            (json!({"regex": ""}), "regex"),
            (json!({"guided_json": ""}), "guided_json"),
            (json!({"json_schema": " "}), "json_schema"),
            (json!({"guided_grammar": ""}), "guided_grammar"),
            (json!({"ebnf": "\n"}), "ebnf"),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (json!({"structured_outputs": {"regex": null, "disable_fallback": true}}), "structured_outputs"),
            (json!({"structured_outputs": {"choice": []}}), "structured_outputs"),
            (json!({"structured_outputs": {"regex": ""}}), "structured_outputs"),
            (json!({"response_format": {}}), "response_format"),
            (json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}), "response_format"),
            (json!({"response_format": {"type": "json_schema", "schema": null}}), "response_format"),
            (json!({"ebnf": "root ::= \"a"}), "ebnf"),
            (json!({"structured_outputs": {"magic": 1}}), "structured_outputs"),
        ] {
            assert_eq!(grammar(body.clone()), Err(param.to_owned()), "{body}");
        }
    }
}

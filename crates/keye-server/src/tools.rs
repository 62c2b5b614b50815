//! Tools that the model may or has to call.

use keye_engine::{Grammar, spaced};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::Fields;

/// What a request says about tools.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Tools {
    /// For the template, in the shape of chats; `None` when there are none to call.
    pub definitions: Option<Value>,
    /// Their names.
    pub names: Vec<String>,
    /// When a call is demanded: of which tools.
    forced: Option<Vec<usize>>,
    /// At most one call.
    pub single: bool,
}

/// `tools`, `tool_choice`, `parallel_tool_calls`. The tools of `/v1/responses` have name and parameters one level higher.
pub(crate) fn read(fields: &Fields) -> Result<Tools, ApiError> {
    let wrong = |param: &str, expected: &str| ApiError::invalid(param, format!("{param}: expected {expected}"));
    let list = match fields.get("tools") {
        None => &[][..],
        Some(Value::Array(list)) => list,
        Some(_) => return Err(wrong("tools", "a list")),
    };
    let mut definitions = Vec::with_capacity(list.len());
    let mut names: Vec<String> = Vec::with_capacity(list.len());
    for (i, tool) in list.iter().enumerate() {
        let at = format!("tools[{i}]");
        if tool.get("type").is_some_and(|kind| kind != "function") {
            return Err(wrong("tools", &format!("functions; {at}.type is another")));
        }
        let function = tool.get("function").unwrap_or(tool).as_object().ok_or_else(|| wrong("tools", "functions"))?;
        let name = function.get("name").and_then(Value::as_str).filter(|name| is_name(name));
        let name =
            name.ok_or_else(|| wrong("tools", &format!("{at}.function.name, 1 to 64 letters, digits, -, _ or .")))?;
        if names.iter().any(|known| known == name) {
            return Err(wrong("tools", &format!("different names; {at} has that of another")));
        }
        if function.get("parameters").is_some_and(|schema| !schema.is_object() && !schema.is_null()) {
            return Err(wrong("tools", &format!("an object in {at}.function.parameters")));
        }
        let mut function = function.clone();
        function.retain(|key, value| key != "type" && !value.is_null());
        definitions.push(json!({"type": "function", "function": function}));
        names.push(name.to_owned());
    }
    let forced = match fields.get("tool_choice") {
        None => None,
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => None,
            "none" => return Ok(Tools::default()),
            "required" => Some((0..names.len()).collect()),
            _ => return Err(wrong("tool_choice", "none, auto, required or a function")),
        },
        Some(choice) => {
            let name = choice.get("function").unwrap_or(choice).get("name").and_then(Value::as_str);
            if choice["type"] != "function" || name.is_none() {
                return Err(wrong("tool_choice", "none, auto, required or a function"));
            }
            let index = names.iter().position(|known| Some(known.as_str()) == name);
            Some(vec![index.ok_or_else(|| wrong("tool_choice", "the name of one of the tools"))?])
        }
    };
    if forced.is_some() && names.is_empty() {
        return Err(wrong("tool_choice", "tools to choose from"));
    }
    let single = fields.bool("parallel_tool_calls")? == Some(false);
    let definitions = (!definitions.is_empty()).then_some(Value::Array(definitions));
    Ok(Tools { definitions, names, forced, single })
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

impl Tools {
    /// The grammar of the whole answer, given the form that its text has to have: calls where they are demanded, else that form or
    /// calls.
    pub fn grammar(&self, text: Option<Grammar>) -> Result<Option<Grammar>, ApiError> {
        let both = "response_format: together with tools only json can be asked for, and no call be demanded";
        match (&self.forced, text) {
            (None, None) => Ok(None),
            (None, text) if self.names.is_empty() => Ok(text),
            (Some(forced), None) => Ok(Some(Grammar::Lark(format!("start: {}", self.calls(forced))))),
            (None, Some(Grammar::JsonObject)) => self.or_json(&json!({"type": "object"})),
            (None, Some(Grammar::JsonSchema(schema))) => self.or_json(&schema),
            _ => Err(ApiError::invalid("response_format", both)),
        }
    }

    fn or_json(&self, schema: &Value) -> Result<Option<Grammar>, ApiError> {
        let all: Vec<usize> = (0..self.names.len()).collect();
        let schema = spaced(schema.clone());
        Ok(Some(Grammar::Lark(format!("start: text | calls\ntext: %json {schema}\ncalls: {}", self.calls(&all)))))
    }

    /// The right side of a rule, and the rules below it.
    fn calls(&self, of: &[usize]) -> String {
        let more = if self.single || of.len() == 1 && self.forced.is_some() { "" } else { " (\"\\n\" call)*" };
        let names: Vec<String> = of.iter().map(|i| format!("call_{i}")).collect();
        let mut rules =
            format!("call{more}\ncall: \"<tool_call>\\n\" body \"\\n</tool_call>\"\nbody: {}\n", names.join(" | "));
        for i in of {
            rules.push_str(&format!("call_{i}: %json {}\n", self.schema(*i)));
        }
        rules
    }

    /// The schema of a whole call.
    fn schema(&self, index: usize) -> Value {
        let tool = self.definitions.as_ref().map_or(&Value::Null, |tools| &tools[index]["function"]["parameters"]);
        let mut parameters = tool.as_object().cloned().unwrap_or_default();
        parameters.entry("type").or_insert_with(|| "object".into());
        let mut schema = Map::new();
        // References count from the root.
        for name in ["$defs", "definitions"] {
            if let Some(definitions) = parameters.remove(name) {
                schema.insert(name.into(), definitions);
            }
        }
        parameters.remove("$schema");
        schema.insert("type".into(), "object".into());
        schema.insert("properties".into(), json!({"name": {"const": self.names[index]}, "arguments": parameters}));
        schema.insert("required".into(), json!(["name", "arguments"]));
        schema.insert("additionalProperties".into(), false.into());
        spaced(Value::Object(schema))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(more: Value) -> Result<Tools, String> {
        let mut body = json!({"tools": [
            {"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": {"$ref": "#/$defs/n"}},
                                                                            "$defs": {"n": {"type": "integer"}}}}},
            {"type": "function", "name": "go", "parameters": null},
        ]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        read(&Fields::of(&body).unwrap()).map_err(|error| error.param.unwrap_or_default())
    }

    #[test]
    fn choices() {
        let auto = tools(json!({})).unwrap();
        assert_eq!(auto.names, ["look", "go"]);
        assert_eq!(auto.grammar(None), Ok(None));
        assert_eq!(auto.definitions.as_ref().unwrap()[1]["function"], json!({"name": "go"}));
        assert_eq!(tools(json!({"tool_choice": "none"})), Ok(Tools::default()));
        let every = json!({"tools": [{"function": {"name": "Az09-_."}}]});
        assert_eq!(tools(every).unwrap().names, ["Az09-_."]);
        let lark = |tools: Tools, text| match tools.grammar(text) {
            Ok(Some(Grammar::Lark(text))) => text,
            other => panic!("{other:?}"),
        };
        let required = lark(tools(json!({"tool_choice": "required"})).unwrap(), None);
        assert!(required.starts_with("start: call (\"\\n\" call)*\n") && required.contains("body: call_0 | call_1\n"));
        assert!(
            required.contains("call_0: %json {\"$defs\":{\"n\":{\"type\":\"integer\"}},\"type\":\"object\""),
            "{required}"
        );
        assert_eq!(
            required.matches("whitespace_pattern").count(),
            2,
            "an answer cannot consist of white space: {required}"
        );
        let single = json!({"tool_choice": "required", "parallel_tool_calls": false});
        assert!(lark(tools(single).unwrap(), None).starts_with("start: call\n"));
        let named = json!({"tool_choice": {"type": "function", "function": {"name": "go"}}});
        let named = lark(tools(named).unwrap(), None);
        assert!(named.contains("body: call_1\n") && !named.contains("look"), "{named}");
        let either = lark(auto, Some(Grammar::JsonObject));
        assert!(
            either.starts_with("start: text | calls\n") && either.matches("whitespace_pattern").count() == 3,
            "{either}"
        );
    }

    #[test]
    fn nonsense() {
        for (body, param) in [
            (json!({"tools": 3}), "tools"),
            (json!({"tools": [3]}), "tools"),
            (json!({"tools": [{"type": "web_search"}]}), "tools"),
            (json!({"tools": [{"function": {"name": "a b"}}]}), "tools"),
            (json!({"tools": [{"function": {"name": "a"}}, {"function": {"name": "a"}}]}), "tools"),
            (json!({"tools": [], "tool_choice": "required"}), "tool_choice"),
            (json!({"tool_choice": "maybe"}), "tool_choice"),
            (json!({"tool_choice": {"type": "function", "function": {"name": "fly"}}}), "tool_choice"),
            (json!({"tool_choice": 3}), "tool_choice"),
        ] {
            assert_eq!(tools(body.clone()), Err(param.to_owned()), "{body}");
        }
        let body = json!({"tools": [{"function": {"name": "a/b"}}]});
        let message = read(&Fields::of(&body).unwrap()).unwrap_err().message;
        assert!(message.ends_with("1 to 64 letters, digits, -, _ or ."), "{message}");
        let forced = tools(json!({"tool_choice": "required"})).unwrap();
        assert!(forced.grammar(Some(Grammar::JsonObject)).is_err());
    }
}

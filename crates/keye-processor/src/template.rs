//! The checkpoint's chat template (Jinja), rendered like transformers does.

use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::value::{Kwargs, Rest, Value as Variable, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::Value;

use crate::files::{CONFIG_BYTES, Fields, file_error};
use crate::{CheckpointFiles, ProcessorError, Variant};

/// Variables of a rendering.
#[derive(Debug, Clone, PartialEq)]
pub struct TemplateOptions {
    /// End with `<|im_start|>assistant\n`.
    pub add_generation_prompt: bool,
    /// Number pictures and videos.
    pub add_vision_id: bool,
    /// Tool definitions, for templates that take them.
    pub tools: Option<Value>,
    /// Further variables (`chat_template_kwargs`).
    pub extra: serde_json::Map<String, Value>,
}

impl Default for TemplateOptions {
    fn default() -> Self {
        Self { add_generation_prompt: true, add_vision_id: false, tools: None, extra: serde_json::Map::new() }
    }
}

/// Instructions a rendering may take; a plain turn takes about a hundred.
const FUEL: u64 = 20_000_000;
/// Ceiling of the rendered text, several times the longest context of the family.
const OUTPUT_BYTES: usize = 16 << 20;
const NAME: &str = "chat_template";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// `bos_token` and its like, as tokenizer_config.json names them.
    tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// The source of the published template (spec §8.1), which is what checkpoints without one get.
    pub fn published(variant: Variant) -> String {
        match variant {
            Variant::Preview => format!("{DEFAULT_HEAD}{DEFAULT_REST}"),
            Variant::V1_5 | Variant::V671b => format!("{DEFAULT_HEAD}{DEFAULT_SYSTEM}{DEFAULT_REST}"),
            // The base model's prompts end inside thinking (spec of 2.0, §8).
            Variant::V2 => {
                format!("{DEFAULT_HEAD}{DEFAULT_REST}").replace(GENERATION, &format!("{GENERATION}<think>\n"))
            }
        }
    }

    /// Takes the first that a checkpoint has: chat_template.json, chat_template.jinja, `chat_template` of
    /// tokenizer_config.json; else the published template, without its default system prompt for Preview (spec §8.2).
    pub fn load(from: impl Into<CheckpointFiles>, variant: Variant) -> Result<Self, ProcessorError> {
        let files = from.into();
        let config = files.read_json_if_present(TOKENIZER_CONFIG, CONFIG_BYTES)?;
        let (path, source) = source(&files, config.as_ref(), variant)?;
        let mut template = Self::new(source).map_err(|e| file_error(&path, e.to_string()))?;
        for name in ["bos_token", "eos_token", "pad_token", "unk_token"] {
            let token = config.as_ref().and_then(|config| config.get(name));
            if let Some(text) = token.and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str())) {
                template.tokens.push((name.into(), text.into()));
            }
        }
        Ok(template)
    }

    /// Compiles a template.
    pub fn new(source: String) -> Result<Self, ProcessorError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| match value.kind() {
            ValueKind::None => Ok(out.write_str("None")?),
            ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
            ValueKind::Undefined => Ok(()),
            _ => Ok(write!(out, "{value}")?),
        });
        environment.add_function("raise_exception", |message: String| -> Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment.set_fuel(Some(FUEL));
        guarded(|| environment.add_template_owned(NAME, source.clone()))?;
        Ok(Self { environment, source, tokens: Vec::new() })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt of `messages`, as [`crate::Conversation::messages`] has them, before media are expanded.
    pub fn render(&self, messages: &[Value], options: &TemplateOptions) -> Result<String, ProcessorError> {
        let mut variables: serde_json::Map<String, Value> =
            self.tokens.iter().map(|(name, text)| (name.clone(), Value::from(text.as_str()))).collect();
        variables.extend(options.extra.clone());
        variables.insert("messages".into(), Value::from(messages));
        variables.insert("tools".into(), options.tools.clone().unwrap_or(Value::Null));
        variables.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        variables.insert("add_vision_id".into(), options.add_vision_id.into());
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        let mut output = Bounded(Vec::new());
        guarded(|| template.render_captured_to(Variable::from_serialize(&variables), &mut output).map(drop))?;
        String::from_utf8(output.0).map_err(|_| ProcessorError::Template("the output is not UTF-8".into()))
    }
}

/// Templates come with checkpoints from anywhere, and the engine has panicked on some (an empty list turned round by
/// `[::-1]`, minijinja 2.24): that is an error of the template like any other.
fn guarded<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T, ProcessorError> {
    let panicked = |_| ProcessorError::Template("the template engine failed on it".into());
    catch_unwind(AssertUnwindSafe(work)).map_err(panicked)?.map_err(template_error)
}

fn source(
    files: &CheckpointFiles,
    config: Option<&Value>,
    variant: Variant,
) -> Result<(std::path::PathBuf, String), ProcessorError> {
    let path = files.path("chat_template.json");
    if let Some(file) = files.read_json_if_present("chat_template.json", CONFIG_BYTES)? {
        let fields = Fields::of(&path, &file)?;
        let text = fields.str(NAME)?.ok_or_else(|| fields.error(NAME, "missing"))?;
        return Ok((path.clone(), text.to_owned()));
    }
    let path = files.path("chat_template.jinja");
    match files.read_text("chat_template.jinja", CONFIG_BYTES) {
        Ok(text) => return Ok((path, text)),
        Err(ProcessorError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
        Err(other) => return Err(other),
    }
    if let Some(config) = config {
        let config_path = files.path(TOKENIZER_CONFIG);
        let fields = Fields::of(&config_path, config)?;
        // A list has several templates under names; "default" is the one for chat.
        let named = |list: &Vec<Value>| {
            list.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str().map(str::to_owned))
        };
        match fields.get(NAME) {
            None => {}
            Some(Value::String(text)) => return Ok((config_path.clone(), text.clone())),
            Some(Value::Array(list)) if named(list).is_some() => {
                return Ok((config_path.clone(), named(list).unwrap_or_default()));
            }
            Some(_) => return Err(fields.error(NAME, "expected a string, or a list with a template named \"default\"")),
        }
    }
    Ok((path, ChatTemplate::published(variant)))
}

// The template of spec §8.1 in three parts.
const DEFAULT_HEAD: &str = "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}\
    {% for message in messages %}";
const DEFAULT_SYSTEM: &str = "{% if loop.first and message['role'] != 'system' %}\
    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}";
const DEFAULT_REST: &str = "<|im_start|>{{ message['role'] }}\n\
    {% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}\
    {% for content in message['content'] %}\
    {% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
    {% set image_count.value = image_count.value + 1 %}\
    {% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>\
    {% elif content['type'] == 'video' or 'video' in content %}\
    {% set video_count.value = video_count.value + 1 %}\
    {% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>\
    {% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// With which the turn of the model begins.
pub(crate) const GENERATION: &str = "<|im_start|>assistant\n";
/// With which every turn ends.
pub(crate) const TURN_END: &str = "<|im_end|>";

/// The whole chain of causes in one line.
fn template_error(error: Error) -> ProcessorError {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    ProcessorError::Template(text)
}

/// Output that refuses to grow beyond [`OUTPUT_BYTES`].
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES {
            return Err(std::io::Error::other(format!("the prompt is longer than {OUTPUT_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// `tojson` as transformers defines it: Python's `json.dumps(ensure_ascii=False)`.
fn to_json(value: Variable, positional: Rest<Variable>, kwargs: Kwargs) -> Result<Variable, Error> {
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = match positional.first() {
        Some(first) => Some(usize::try_from(first.clone())?),
        None => kwargs.get("indent")?,
    };
    let (sort_keys, _ascii): (Option<bool>, Option<bool>) = (kwargs.get("sort_keys")?, kwargs.get("ensure_ascii")?);
    kwargs.assert_all_used()?;
    let mut value = serde_json::to_value(&value).map_err(failed)?;
    if sort_keys == Some(true) {
        value.sort_all_objects();
    }
    let mut out = Vec::new();
    match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)),
        Some(n) if n <= 64 => {
            let indent = vec![b' '; n];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
        Some(n) => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: indent {n} is above 64"))),
    }
    .map_err(failed)?;
    let text = String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Variable::from_safe_string(text))
}

/// One line with `", "` and `": "` between things.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: Value) -> Result<String, ProcessorError> {
        let options =
            TemplateOptions { tools: Some(json!([{"a": "<é>", "b": [1, 2.5, null]}])), ..Default::default() };
        ChatTemplate::new(source.into())?.render(messages.as_array().unwrap(), &options)
    }

    /// Found by fuzzing.
    #[test]
    fn an_empty_list_turned_round_is_no_panic() {
        let error = render("{{ messages[::-1] }}", json!([])).unwrap_err();
        assert!(error.to_string().starts_with("chat template: "), "{error}");
    }

    #[test]
    fn renders_like_python() {
        let cases = [
            ("{{ tools|tojson }}", r#"[{"a": "<é>", "b": [1, 2.5, null]}]"#),
            ("{{ tools[0].b|tojson(indent=1) }}", "[\n 1,\n 2.5,\n null\n]"),
            ("{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}", r#"{"a": 2, "b": 1}"#),
            ("{{ true }} {{ none }} {{ nothing }}|", "True None |"),
            ("{{ messages[0].content.split(' ')[-1].startswith('c') }}", "True"),
            ("{{ messages[::-1][0]['content'].strip('bc') }}", "a b "),
            ("{% set n = namespace(v=1) %}{% for i in [1,2] %}{% set n.v = n.v + i %}{% endfor %}{{ n.v }}", "4"),
            ("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc"),
            ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
            ("{% if add_generation_prompt and not add_vision_id %}x{% endif %}", "x"),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source, json!([{"role": "user", "content": "a b c"}])).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn refusals_reach_the_caller() {
        let error = render("{{ raise_exception('no tools please') }}", json!([])).unwrap_err().to_string();
        assert!(error.contains("no tools please"), "{error}");
        assert!(render("{% for %}", json!([])).is_err());
    }

    #[test]
    fn hostile_templates_end() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(render(endless, json!([])).unwrap_err().to_string().contains("fuel"));
        let long = "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}";
        assert!(render(long, json!([])).unwrap_err().to_string().contains("longer than"));
        assert!(render("{{ 'x' * 99999999999 }}", json!([])).is_err());
    }
}

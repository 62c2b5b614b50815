//! The checkpoint's chat template (Jinja), rendered like transformers does.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::machinery::{Vm, make_string_output};
use minijinja::value::Value as Variable;
use minijinja::{AutoEscape, Environment, Error};
use serde_json::Value;

use crate::files::{CONFIG_BYTES, Fields, file_error};
use crate::template_budget::{TEXT_BYTES, environment, too_long};
use crate::template_guard::compile;
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
    ///
    /// # Errors
    /// It cannot be compiled, or takes what no published template does: deep nesting, other templates, unusual filters.
    pub fn new(source: String) -> Result<Self, ProcessorError> {
        let mut environment = environment();
        environment.set_fuel(Some(FUEL));
        guarded(|| compile(NAME, &source).map(drop))?;
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
        // Compiled anew, which takes less than a millisecond: what is compiled borrows the source.
        guarded(|| {
            let (program, mut output) = (compile(NAME, &self.source)?, String::new());
            let (variables, blocks) = (Variable::from_serialize(&variables), BTreeMap::new());
            let vm = Vm::new(&self.environment);
            vm.eval(&program, variables, &blocks, &mut make_string_output(&mut output), AutoEscape::None)?;
            if output.len() > TEXT_BYTES { Err(too_long()) } else { Ok(output) }
        })
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: Value) -> Result<String, ProcessorError> {
        let options =
            TemplateOptions { tools: Some(json!([{"a": "<é>", "b": [1, 2.5, null]}])), ..Default::default() };
        ChatTemplate::new(source.into())?.render(messages.as_array().unwrap(), &options)
    }

    /// The engine panics on it; found by fuzzing.
    #[test]
    fn an_empty_list_turned_round_is_empty() {
        assert_eq!(render("{{ messages[::-1] }}{% for m in messages[::-1] %}x{% endfor %}", json!([])).unwrap(), "[]");
    }

    #[test]
    fn renders_like_python() {
        let cases = [
            ("{{ tools|tojson }}", r#"[{"a": "<é>", "b": [1, 2.5, null]}]"#),
            ("{{ tools[0].b|tojson(indent=1) }}", "[\n 1,\n 2.5,\n null\n]"),
            ("{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}", r#"{"a": 2, "b": 1}"#),
            ("{{ true }} {{ none }} {{ nothing }}|", "True None |"),
            ("{{ nothing|tojson }}{{ none|tojson }}{{ '<é'|tojson }}", "nullnull\"<é\""),
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

    /// Base models' templates take these.
    #[test]
    fn what_published_templates_use_is_there() {
        let macros = "{% macro shown(v) %}{% if v is string %}{{ v|trim }}{% else %}{% for p in v %}{{ p.text }}{% endfor %}{% endif %}\
                      {% endmacro %}{{ shown(messages[0].content) ~ '|' + shown([{'text': 'x'}]) }}";
        let cases = [
            (macros, "a b c|x"),
            ("{% for m in messages[::-1] %}{% set i = messages|length - 1 - loop.index0 %}{{ i }}{% endfor %}", "0"),
            (
                "{% set n = namespace(v=[], s='') %}{% for i in range(3) %}{% set n.v = n.v + [i] %}{% set n.s = n.s ~ i %}\
              {% endfor %}{{ n.v }}{{ n.s }}",
                "[0, 1, 2]012",
            ),
            ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list|join(';') }}", "a b c"),
            ("{{ messages[0].content.split(' ')[1:]|length }}{{ 'ab'[1:] }}{{ 'abc'[:-1] }}", "2bab"),
            (
                "{% for k, v in messages[0]|items %}{{ k }}={{ v }};{% endfor %}{{ 'role' in messages[0] }}",
                "role=user;content=a b c;True",
            ),
            ("{% for k, v in messages[0].items() %}{{ loop.index * 2 }}{% endfor %}{{ 1 < 2 < 3 }}", "24True"),
            ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}", "a b c"),
            ("{% for m in messages if m.role == 'x' %}{{ m.content }}{% else %}none{% endfor %}", "none"),
            ("{% for k, v in messages[0].items() if k not in ['role'] %}{{ k }}={{ v }}{% endfor %}", "content=a b c"),
            ("{{ [1, 2, 3]|select('gt', 1)|list|length }}{{ 2 is ge 3 }}", "2False"),
            (
                "{{ (1 + 2) * 2 }}{{ 2 * (1 + 2) }}{{ (messages|length) * 2 }}{{ [1, 2][1] * -3 }}{{ 2 * messages[0]['role']|length }}",
                "662-68",
            ),
            (
                "{% set t %}<{{ messages[0]['role'] }}>{% endset %}{{ t|upper|replace('U', 'u') }}{{ x|default('d') }}",
                "<uSER>d",
            ),
            (
                "{{ 'a' if messages[0].role == 'user' and 'b' not in 'cd' else 'e' }}{{ '{} {}'.format(1, 'x') }}",
                "a1 x",
            ),
            (
                "{{ {'a': 1}|tojson(indent=2) }}{{ [1, [2]]|string }}{{ 'a\nb'|indent(2) }}",
                "{\n  \"a\": 1\n}[1, [2]]a\n  b",
            ),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source, json!([{"role": "user", "content": "a b c"}])).unwrap(), expected, "{source}");
        }
    }

    /// In the manner of the base model's, which looks back at all messages and takes thinking out of earlier answers.
    #[test]
    fn long_conversations_fit() {
        let source = r#"{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- set ns = namespace(open=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and message.role == "user" and not(message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.open = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}{{- call.arguments | tojson }}{%- endfor %}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"#;
        let turn = [
            json!({"role": "user", "content": "word ".repeat(300)}),
            json!({"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes", "tool_calls": [{"arguments": {"a": 1}}]}),
        ];
        let messages: Vec<Value> = turn.iter().cycle().take(6000).cloned().collect();
        let begin = std::time::Instant::now();
        let text = render(source, messages.into()).unwrap();
        assert!(
            text.ends_with(
                "word <|im_end|>\n<think>\nhm\n</think>\n\nyes{\"a\": 1}<|im_end|>\n<|im_start|>assistant\n"
            )
        );
        assert_eq!(text.matches("yes{\"a\": 1}").count(), 3000);
        assert!(begin.elapsed() < std::time::Duration::from_secs(10), "{:?}", begin.elapsed());
    }

    #[test]
    fn hostile_templates_end() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(render(endless, json!([])).unwrap_err().to_string().contains("fuel"));
        let long = "{% set x = 'x' %}{% for a in range(9999) %}{{ x * 9999 }}{% endfor %}";
        assert!(render(long, json!([])).unwrap_err().to_string().contains("longer than"));
    }

    /// Each ended the process by its stack.
    #[test]
    fn templates_that_nest_without_end_are_refused_before_they_are_compiled() {
        let chain = |one: &str, more: &str| format!("{{{{ {one}{} }}}}", more.repeat(200_000 / more.len()));
        let cases = [
            format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(10_000)),
            format!("{{{{ {}1 }}}}", "not ".repeat(50_000)),
            format!("{{{{ {}1 }}}}", "-".repeat(100_000)),
            chain("1", " ~ 1"),
            chain("1", "+1"),
            chain("1", "**1"),
            chain("1", "<1"),
            chain("a", " or a"),
            chain("a", ".b"),
            chain("a", "|d"),
            chain("a", "[0]"),
            chain("1", " if 1 else 1"),
            "x".repeat(300 << 10),
            chain("", "("),
            chain("", "["),
        ];
        for source in cases {
            let error = render(&source, json!([])).unwrap_err().to_string();
            assert!(error.contains("expected at most"), "{}: {error}", &source[..30]);
        }
    }

    /// As far as the limits go, on the stack of a thread.
    #[test]
    fn templates_at_the_limits_are_compiled_and_rendered() {
        let chain = |one: &str, more: &str| format!("{{{{ {one}{} }}}}", more.repeat(250));
        let text = "x".repeat(200_000);
        for source in [
            format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(250)),
            chain("1", " ~ 1"),
            chain("1", "+1"),
            chain("a", " or a"),
            chain("a", "|d"),
            chain(&format!("'{text}'"), " ~ 1"),
            chain("1", " if 1 else 1").replacen(" if 1 else 1", "", 125),
            "\n".repeat(200_000),
            "{% set x = [1, {'a': 'b', 'c': []}] %}".repeat(5000),
        ] {
            render(&source, json!([])).unwrap_or_else(|e| panic!("{}: {e}", &source[..30]));
        }
        // The engine's own limits.
        for (open, close) in [
            ("{% if 1 %}", "{% endif %}"),
            ("{% for x in [1] %}", "{% endfor %}"),
            ("{% set x %}", "{% endset %}"),
            ("{% with %}", "{% endwith %}"),
            ("{% filter upper %}", "{% endfilter %}"),
            ("{% macro f() %}", "{% endmacro %}"),
            ("{% call f() %}", "{% endcall %}"),
        ] {
            for depth in [100, 5000] {
                let _ = render(&format!("{}{}", open.repeat(depth), close.repeat(depth)), json!([]));
            }
        }
        for endless in [
            "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
            "{% for n in [1] recursive %}{{ loop([n]) }}{% endfor %}",
        ] {
            assert!(render(endless, json!([])).unwrap_err().to_string().contains("recursion"), "{endless}");
        }
    }

    /// Each ended the process by its stack or its memory, or took minutes.
    #[test]
    fn templates_that_grow_without_end_are_errors() {
        let looped = |first: &str, step: &str| {
            format!(
                "{{% set n = namespace(v={first}) %}}{{% for i in range(99999) %}}{{% set n.v = {step} %}}{{% endfor %}}{{{{ n.v }}}}"
            )
        };
        let with = |call: &str| format!("{{% set x = 'x' %}}{{{{ {call} }}}}");
        let cases = [
            looped("[]", "[n.v]"),
            looped("{}", "{'a': n.v}"),
            looped("{}", "dict(a=n.v)"),
            looped("[1]", "[n.v, n.v]"),
            looped("[1]", "n.v + n.v"),
            looped("'x'", "n.v ~ n.v"),
            looped("'x'", "n.v + n.v"),
            looped("'x'", "n.v * 2"),
            looped("'x'", "[n.v, n.v]|join"),
            looped("'x'", "n.v.replace('x', 'xx')"),
            looped("'x'", "n.v|replace('x', 'xx')"),
            looped("'x'", "'{0}{0}'.format(n.v)"),
            looped("1", "namespace(v=n)"),
            looped("1", "n"),
            looped("1", "[n]"),
            "{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('x') }}".to_owned(),
            "{% macro f(s) %}{{ s }}{{ f([s, s]) }}{% endmacro %}{{ f('x') }}".to_owned(),
            "{% macro f(s) %}{% set t %}{{ s }}{{ s }}{% endset %}{{ f(t) }}{% endmacro %}{{ f('x') }}".to_owned(),
            format!("{{% set x %}}{{% for i in range(99999) %}}{}{{% endfor %}}{{% endset %}}", "x".repeat(10_000)),
            with("x * 99999999999"),
            with("[1] * x|length * 99999999999"),
            with("x|indent(40000000000)"),
            with("'%99999999999d'|format(1)"),
            with("'{:99999999999}'.format(1)"),
            with("[x]|batch(9999999999, 0)"),
            with("[x]|slice(9999999999)"),
            with("x.count('')"),
            with("range(100000)|join(range(100000)|join)"),
            with("('x' * 100000000) ~ ('x' * 100000000)"),
            with("[1] * 99999999999"),
            with("[1]|tojson(indent=40000000000)"),
            // Reading costs too.
            "{% set n = namespace(v='x') %}{% for i in range(23) %}{% set n.v = n.v ~ n.v %}{% endfor %}\
             {% for i in range(9999) %}{% for j in range(999) %}{% if n.v.find('y') == n.v|length %}{% endif %}{% endfor %}{% endfor %}".to_owned(),
            "{% extends 'chat_template' %}".to_owned(),
            "{% include 'chat_template' %}".to_owned(),
            "{% for x in [1] recursive %}{{ loop([[x]]) }}{% endfor %}".to_owned(),
        ];
        for source in cases {
            let begin = std::time::Instant::now();
            let error = render(&source, json!([])).expect_err(&source).to_string();
            assert!(error.starts_with("chat template: ") && error.len() < 1000, "{source}: {error}");
            assert!(begin.elapsed() < std::time::Duration::from_secs(30), "{source}");
        }
    }
}

//! The fields that chat and completions have in common: sampling, stopping, choices, streaming.

use keye_engine::{Grammar, MAX_LOGPROBS, Request, SamplingParams};
use serde_json::Value;

use crate::app::{App, random};
use crate::error::{ApiError, INVALID_GRAMMAR};
use crate::fields::Fields;
use crate::structured;

/// What was asked for besides the prompt.
#[derive(Debug, Clone)]
pub(crate) struct Common {
    pub sampling: SamplingParams,
    pub choices: usize,
    pub stream: bool,
    pub include_usage: bool,
    /// `stream_options.include_progress`; false without `stream`.
    pub include_progress: bool,
    /// What the text of the answer has to look like.
    pub grammar: Option<Grammar>,
    /// The field that says so.
    pub grammar_field: &'static str,
    pub max_reasoning_tokens: Option<usize>,
}

impl Common {
    /// Names the field that a grammar came from in an error about it.
    pub fn blame(&self, error: ApiError) -> ApiError {
        if error.code == Some(INVALID_GRAMMAR) {
            return ApiError { param: Some(self.grammar_field.to_owned()), ..error };
        }
        error
    }

    /// A request with these settings and no prompt.
    pub fn request(&self) -> Request {
        Request {
            sampling: self.sampling.clone(),
            grammar: self.grammar.clone(),
            max_reasoning_tokens: self.max_reasoning_tokens,
            ..Request::default()
        }
    }
}

/// Whether a value asks for nothing.
type Harmless = fn(&Value) -> bool;

/// Fields that would change the answer, with the values that change nothing.
const UNSUPPORTED: [(&str, Harmless); 26] = [
    // vLLM's way to set fps and the like; here they stand beside the medium, in its `preprocess_kwargs`.
    ("mm_processor_kwargs", is_empty),
    ("media_io_kwargs", is_empty),
    ("prompt_logprobs", is_off),
    ("logit_bias", is_empty),
    ("best_of", |value| value.as_f64() == Some(1.0)),
    ("suffix", is_empty),
    ("echo", is_off),
    ("modalities", |value| value.as_array().is_some_and(|list| list.iter().all(|item| item == "text"))),
    ("audio", is_empty),
    ("functions", is_empty),
    ("function_call", |value| value == "none" || value == "auto"),
    ("prediction", is_empty),
    ("web_search_options", |_| false),
    ("structural_tag", is_empty),
    ("stop_regex", is_empty),
    ("min_tokens", is_off),
    ("use_beam_search", is_off),
    ("length_penalty", |value| value.as_f64() == Some(1.0)),
    ("bad_words", is_empty),
    ("allowed_token_ids", is_empty),
    ("include_stop_str_in_output", is_off),
    ("no_stop_trim", is_off),
    ("continue_final_message", is_off),
    ("truncate_prompt_tokens", |_| false),
    ("separate_reasoning", |value| value == true),
    ("include_reasoning", |value| value == true),
];

fn is_off(value: &Value) -> bool {
    value == false || value.as_f64() == Some(0.0)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Reads them; what is absent is as the checkpoint's generation_config.json has it.
pub(crate) fn read(fields: &Fields, app: &App) -> Result<Common, ApiError> {
    // Any name is accepted, the empty one of the vendor's examples too: there is one model.
    fields.string("model")?;
    for (name, harmless) in UNSUPPORTED {
        if fields.get(name).is_some_and(|value| !harmless(value)) {
            return Err(ApiError::unsupported(name));
        }
    }
    let ceilings = &app.config.ceilings;
    let choices = fields.whole("n")?.unwrap_or(1);
    // More than there are places could never be answered, however often it is tried.
    let most = ceilings.choices.min(app.config.max_streams);
    let choices = usize::try_from(choices).ok().filter(|n| (1..=most).contains(n));
    let choices = choices.ok_or_else(|| ApiError::invalid("n", format!("n: expected 1 to {most}")))?;
    let stream = fields.bool("stream")?.unwrap_or(false);
    let (include_usage, progress) = match fields.object("stream_options")? {
        Some(options) => {
            let flag = |name| Ok::<_, ApiError>(Fields(options).bool(name)?.unwrap_or(false));
            (flag("include_usage")?, flag("include_progress")?)
        }
        None => (false, false),
    };
    let include_progress = progress && stream;
    let (grammar_field, grammar) = structured::read(fields)?.unzip();
    Ok(Common {
        sampling: sampling(fields, app)?,
        choices,
        stream,
        include_usage,
        include_progress,
        grammar,
        grammar_field: grammar_field.unwrap_or_default(),
        max_reasoning_tokens: max_reasoning_tokens(fields)?,
    })
}

fn max_reasoning_tokens(fields: &Fields) -> Result<Option<usize>, ApiError> {
    for name in ["max_reasoning_tokens", "thinking_token_budget"] {
        if let Some(n) = fields.whole(name)? {
            let n = usize::try_from(n).map_err(|_| ApiError::invalid(name, format!("{name}: expected 0 or more")));
            return n.map(Some);
        }
    }
    Ok(None)
}

/// `logprobs` (a switch) and `top_logprobs` of chats.
pub(crate) fn chat_logprobs(fields: &Fields) -> Result<Option<usize>, ApiError> {
    let on = fields.bool("logprobs")?.unwrap_or(false);
    match (on, logprobs_in_range(fields, "top_logprobs")?) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs: needs logprobs to be true")),
    }
}

/// A number of most likely tokens.
pub(crate) fn logprobs_in_range(fields: &Fields, name: &str) -> Result<Option<usize>, ApiError> {
    let message = || format!("{name}: expected 0 to {MAX_LOGPROBS}");
    let in_range = |n| usize::try_from(n).ok().filter(|n| *n <= MAX_LOGPROBS);
    let n = fields.whole(name)?;
    n.map(|n| in_range(n).ok_or_else(|| ApiError::invalid(name, message()))).transpose()
}

fn sampling(fields: &Fields, app: &App) -> Result<SamplingParams, ApiError> {
    let base = &app.defaults;
    let number = |name, otherwise: f32| Ok::<_, ApiError>(fields.number(name)?.unwrap_or(otherwise));
    let longest = app.config.ceilings.max_tokens.unwrap_or(usize::MAX).min(app.engine.max_model_len());
    let params = SamplingParams {
        temperature: number("temperature", base.temperature)?,
        top_p: number("top_p", base.top_p)?,
        top_k: top_k(fields)?.unwrap_or(base.top_k),
        min_p: number("min_p", base.min_p)?,
        repetition_penalty: number("repetition_penalty", base.repetition_penalty)?,
        presence_penalty: number("presence_penalty", base.presence_penalty)?,
        frequency_penalty: number("frequency_penalty", base.frequency_penalty)?,
        seed: fields.whole("seed")?.map_or_else(random, |seed| seed as u64),
        max_tokens: max_tokens(fields)?.unwrap_or(longest).min(longest),
        stop: fields.strings("stop")?.unwrap_or_default(),
        stop_token_ids: fields.token_ids("stop_token_ids")?.unwrap_or_default(),
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
        skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
    };
    params.validate().map_err(|reason| {
        // The reasons begin with the field, but for those about stop strings.
        let first = reason.split(' ').next().unwrap_or_default();
        let name = if fields.get(first).is_some() { first } else { "stop" };
        ApiError::invalid(name, reason.clone())
    })?;
    Ok(params)
}

/// Minus one, vLLM's and SGLang's way to switch it off, is 0 here.
fn top_k(fields: &Fields) -> Result<Option<u32>, ApiError> {
    match fields.whole("top_k")? {
        None => Ok(None),
        Some(-1) => Ok(Some(0)),
        Some(k) => {
            let message = format!("top_k is {k}, it has to be -1 or 0 (off) or larger");
            u32::try_from(k).map(Some).map_err(|_| ApiError::invalid("top_k", message))
        }
    }
}

fn max_tokens(fields: &Fields) -> Result<Option<usize>, ApiError> {
    for name in ["max_completion_tokens", "max_tokens", "max_output_tokens"] {
        if let Some(n) = fields.whole(name)? {
            let n = usize::try_from(n).ok().filter(|n| *n > 0);
            let message = format!("{name}: expected 1 or more");
            return n.map(Some).ok_or_else(|| ApiError::invalid(name, message));
        }
    }
    Ok(None)
}

//! Updates to OpenAI's answers: chunks of a stream, or one object at the end, by the same steps.

use keye_engine::{FinishReason, Usage};
use keye_processor::ThinkTag;
use serde_json::{Value, json};

use crate::app::{random, seconds_since_1970};
use crate::error::ApiError;
use crate::logprobs::{self, Logprob};
use crate::parts::{Parts, Piece};
use crate::sse::Answering;

/// Which of OpenAI's shapes an answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `/v1/chat/completions`: thinking is taken apart.
    Chat,
    /// `/v1/completions`: the text as it comes.
    Text,
}

/// What an answer looks like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Format {
    pub shape: Shape,
    pub streamed: bool,
    pub include_usage: bool,
}

/// One of the choices.
#[derive(Debug)]
struct Choice {
    parts: Parts,
    /// Collected for whole answers only.
    reasoning: String,
    content: String,
    /// Collected for whole answers only, as the answer has them.
    calls: Vec<Value>,
    called: usize,
    /// Of tokens whose text has not been sent.
    logprobs: Vec<Logprob>,
    /// Characters of the tokens whose log probabilities have been sent.
    offset: usize,
    with_logprobs: bool,
    finish: Option<FinishReason>,
}

/// An answer in the making.
#[derive(Debug)]
pub(crate) struct Answer {
    format: Format,
    id: String,
    created: u64,
    model: String,
    choices: Vec<Choice>,
    /// Choices for one prompt: its tokens count once for all of them.
    per_prompt: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
    media_tokens: usize,
    completion_tokens: usize,
    /// What the client should hear of its media.
    warnings: Vec<Value>,
}

impl Answer {
    /// `tools` are the names of those that may be called; with `form` the answer has one that was asked for.
    pub fn new(model: &str, format: Format, prompts: usize, per_prompt: usize, tools: &[String], form: bool) -> Self {
        let prefix = if format.shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
        let choice = |_| Choice {
            parts: Parts::new(tools, form),
            reasoning: String::new(),
            content: String::new(),
            calls: Vec::new(),
            called: 0,
            logprobs: Vec::new(),
            offset: 0,
            with_logprobs: false,
            finish: None,
        };
        Self {
            format,
            id: format!("{prefix}-{:016x}{:016x}", random(), random()),
            created: seconds_since_1970(),
            model: model.to_owned(),
            choices: (0..prompts * per_prompt).map(choice).collect(),
            per_prompt,
            prompt_tokens: 0,
            cached_tokens: 0,
            media_tokens: 0,
            completion_tokens: 0,
            warnings: Vec::new(),
        }
    }

    fn pieces(&mut self, index: usize, pieces: Vec<Piece>) -> Vec<Value> {
        let mut chunks = Vec::new();
        for piece in pieces {
            let choice = &mut self.choices[index];
            let delta = match piece {
                Piece::Reasoning(text) if self.format.streamed => json!({"reasoning_content": text}),
                Piece::Content(text) if self.format.streamed => json!({"content": text}),
                Piece::Reasoning(text) => {
                    choice.reasoning.push_str(&text);
                    continue;
                }
                Piece::Content(text) => {
                    choice.content.push_str(&text);
                    continue;
                }
                Piece::Call(call) => {
                    let (id, arguments) = (format!("call_{:016x}", random()), Value::from(call.arguments).to_string());
                    let number = choice.called;
                    choice.called += 1;
                    let mut head =
                        json!({"id": id, "type": "function", "function": {"name": call.name, "arguments": ""}});
                    if !self.format.streamed {
                        head["function"]["arguments"] = arguments.into();
                        choice.calls.push(head);
                        continue;
                    }
                    head["index"] = number.into();
                    chunks.push(self.chunk(index, json!({"tool_calls": [head]}), None));
                    json!({"tool_calls": [{"index": number, "function": {"arguments": arguments}}]})
                }
            };
            chunks.push(self.chunk(index, delta, None));
        }
        chunks
    }

    fn chunk(&mut self, index: usize, delta: Value, reason: Option<&str>) -> Value {
        let logprobs = self.logprobs(index);
        let choice = match self.format.shape {
            Shape::Chat => json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}),
            Shape::Text => {
                let text = delta["content"].as_str().unwrap_or_default();
                json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
            }
        };
        let mut chunk = self.head(true);
        chunk["choices"] = json!([choice]);
        if self.format.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// Those of the tokens since the last chunk, or of all tokens when nothing is streamed; null when nobody asked.
    fn logprobs(&mut self, index: usize) -> Value {
        let choice = &mut self.choices[index];
        let tokens = std::mem::take(&mut choice.logprobs);
        if tokens.is_empty() && (self.format.streamed || !choice.with_logprobs) {
            return Value::Null;
        }
        match self.format.shape {
            Shape::Chat => json!({"content": tokens.iter().map(Logprob::chat).collect::<Vec<_>>(), "refusal": null}),
            Shape::Text => {
                let start = choice.offset;
                choice.offset += tokens.iter().map(Logprob::characters).sum::<usize>();
                logprobs::completion(&tokens, start)
            }
        }
    }

    fn finish_reason(&self, index: usize) -> Option<&'static str> {
        let choice = &self.choices[index];
        choice.finish.as_ref().map(|reason| match reason {
            FinishReason::Stop if choice.called > 0 => "tool_calls",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        })
    }

    fn head(&self, chunk: bool) -> Value {
        let object = match (self.format.shape, chunk) {
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Chat, false) => "chat.completion",
            (Shape::Text, _) => "text_completion",
        };
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model})
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "media_tokens": self.media_tokens},
        })
    }
}

impl Answering for Answer {
    const NAMED: bool = false;

    fn begin(&mut self) -> Vec<Value> {
        match self.format.shape {
            Shape::Chat => (0..self.choices.len())
                .map(|index| self.chunk(index, json!({"role": "assistant", "content": ""}), None))
                .collect(),
            Shape::Text => Vec::new(),
        }
    }

    /// A chunk without choices, which clients skip as they skip the one with the usage.
    fn progress(&mut self, report: Value) -> Value {
        let mut chunk = self.head(true);
        chunk["choices"] = json!([]);
        chunk["keye"] = report;
        chunk
    }

    fn warning(&mut self, warning: Value) {
        self.warnings.push(warning);
    }

    fn thinking(&mut self, index: usize, tag: ThinkTag) {
        if let Some(choice) = self.choices.get_mut(index) {
            choice.parts.open_thinking(tag);
        }
    }

    fn token(&mut self, index: usize, text: &str, logprob: Option<Logprob>) -> Vec<Value> {
        let Some(choice) = self.choices.get_mut(index) else { return Vec::new() };
        choice.with_logprobs |= logprob.is_some();
        choice.logprobs.extend(logprob);
        let pieces = match self.format.shape {
            Shape::Chat => choice.parts.push(text),
            Shape::Text if text.is_empty() => Vec::new(),
            Shape::Text => vec![Piece::Content(text.to_owned())],
        };
        self.pieces(index, pieces)
    }

    fn finished(&mut self, index: usize, reason: FinishReason, usage: &Usage) -> Vec<Value> {
        let Some(choice) = self.choices.get_mut(index) else { return Vec::new() };
        let pieces = if self.format.shape == Shape::Chat { choice.parts.finish() } else { Vec::new() };
        choice.finish = Some(reason);
        if index.is_multiple_of(self.per_prompt) {
            self.prompt_tokens += usage.prompt_tokens;
            self.cached_tokens += usage.cached_tokens;
            self.media_tokens += usage.media_tokens;
        }
        self.completion_tokens += usage.completion_tokens;
        let mut chunks = self.pieces(index, pieces);
        if self.format.streamed {
            let reason = self.finish_reason(index);
            let mut end = self.chunk(index, json!({}), reason);
            // In a chunk that every client reads.
            if self.is_done() && !self.warnings.is_empty() {
                end["warnings"] = json!(self.warnings);
            }
            chunks.push(end);
        }
        if self.format.streamed && self.format.include_usage && self.is_done() {
            let mut last = self.head(true);
            last["choices"] = json!([]);
            last["usage"] = self.usage();
            chunks.push(last);
        }
        chunks
    }

    /// The status has been sent, so the error comes as an event, as OpenAI's clients know it.
    fn failed(&mut self, error: &ApiError) -> Value {
        error.body()
    }

    fn is_done(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    fn whole(&mut self) -> Value {
        let choices = (0..self.choices.len()).map(|index| {
            let (reason, logprobs) = (self.finish_reason(index), self.logprobs(index));
            let choice = &self.choices[index];
            if self.format.shape == Shape::Text {
                return json!({"index": index, "text": choice.content, "logprobs": logprobs, "finish_reason": reason});
            }
            let reasoning = Some(&choice.reasoning).filter(|text| !text.is_empty());
            // OpenAI's clients know an answer that only calls by its content of null.
            let content = Some(&choice.content).filter(|text| !text.is_empty() || choice.calls.is_empty());
            let mut message = json!({
                "role": "assistant", "content": content, "reasoning_content": reasoning, "refusal": null,
            });
            if !choice.calls.is_empty() {
                message["tool_calls"] = json!(choice.calls);
            }
            json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        });
        let choices: Value = choices.collect();
        let mut whole = self.head(false);
        whole["choices"] = choices;
        whole["usage"] = self.usage();
        if !self.warnings.is_empty() {
            whole["warnings"] = json!(self.warnings);
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THOUGHT: [&str; 9] =
        ["<ana", "lysis>Hard.</analysis>", "<think>", "Let me", " see\n", "</th", "ink>", "A <b", "> cat."];

    fn run(streamed: bool) -> (Answer, Vec<Value>) {
        let format = Format { shape: Shape::Chat, streamed, include_usage: true };
        let mut answer = Answer::new("m", format, 1, 2, &[], false);
        let mut chunks = answer.begin();
        for text in THOUGHT {
            chunks.extend(answer.token(0, text, None));
            chunks.extend(answer.token(1, "x", None));
        }
        let usage = Usage { prompt_tokens: 5, cached_tokens: 1, media_tokens: 2, completion_tokens: 9 };
        for index in [1, 0] {
            assert!(!answer.is_done());
            chunks.extend(answer.finished(index, FinishReason::Stop, &usage));
        }
        assert!(answer.is_done());
        (answer, chunks)
    }

    #[test]
    fn calls_streamed_and_whole() {
        let text = "<think>Hm.</think>Wait.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";
        let run = |streamed| {
            let format = Format { shape: Shape::Chat, streamed, include_usage: false };
            let mut answer = Answer::new("m", format, 1, 1, &["f".into()], false);
            let mut chunks: Vec<Value> = text.split_inclusive(' ').flat_map(|t| answer.token(0, t, None)).collect();
            chunks.extend(answer.finished(0, FinishReason::Stop, &Usage::default()));
            (chunks, answer.whole())
        };
        let whole = &run(false).1["choices"][0];
        let call = &whole["message"]["tool_calls"][0];
        assert_eq!(call["function"], json!({"name": "f", "arguments": "{\"a\":1}"}));
        assert_eq!((&whole["message"]["content"], &whole["finish_reason"]), (&json!("Wait."), &json!("tool_calls")));
        let chunks = run(true).0;
        let deltas: Vec<&Value> = chunks.iter().map(|c| &c["choices"][0]["delta"]).collect();
        let calls: Vec<&Value> = deltas.iter().map(|d| &d["tool_calls"][0]).filter(|c| !c.is_null()).collect();
        assert_eq!((&calls[0]["function"]["name"], &calls[0]["index"]), (&json!("f"), &json!(0)));
        assert!(calls[0]["id"].as_str().is_some_and(|id| id.starts_with("call_")));
        assert_eq!(calls[1]["function"]["arguments"], "{\"a\":1}");
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    }

    #[test]
    fn thinking_is_apart_streamed_and_whole() {
        let whole = run(false).0.whole();
        let message = &whole["choices"][0]["message"];
        assert_eq!(message["content"], "A <b> cat.");
        assert_eq!(message["reasoning_content"], "Hard.\n\nLet me see");
        assert_eq!(whole["choices"][1]["message"]["content"], "xxxxxxxxx");
        assert!(whole["choices"][1]["message"]["reasoning_content"].is_null());
        assert_eq!(whole["usage"]["total_tokens"], 5 + 18);

        let chunks = run(true).1;
        for (index, choice) in [0, 1].iter().zip(whole["choices"].as_array().unwrap()) {
            let of_choice = || chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == *index);
            for part in ["content", "reasoning_content"] {
                let joined: String = of_choice().filter_map(|c| c["delta"][part].as_str()).collect();
                assert_eq!(joined, choice["message"][part].as_str().unwrap_or_default());
            }
            assert_eq!(of_choice().next_back().unwrap()["finish_reason"], "stop");
            assert_eq!(of_choice().filter(|c| !c["finish_reason"].is_null()).count(), 1);
        }
        assert_eq!(chunks.last().unwrap()["usage"], whole["usage"]);
    }
}

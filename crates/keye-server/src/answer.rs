//! Updates to OpenAI's answers: chunks of a stream, or one object at the end, by the same steps.

use keye_engine::{FinishReason, Usage};
use keye_processor::{Part, ThinkSplitter};
use serde_json::{Value, json};

use crate::app::{random, seconds_since_1970};

/// Which of OpenAI's shapes an answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `/v1/chat/completions`: thinking is taken apart.
    Chat,
    /// `/v1/completions`: the text as it comes.
    Text,
}

/// One of the choices.
#[derive(Debug, Default)]
struct Choice {
    splitter: ThinkSplitter,
    /// The last part that was not the answer.
    reasoning_part: Option<Part>,
    /// Collected for whole answers only.
    reasoning: String,
    content: String,
    finish: Option<FinishReason>,
}

/// An answer in the making.
#[derive(Debug)]
pub(crate) struct Answer {
    shape: Shape,
    id: String,
    created: u64,
    model: String,
    streamed: bool,
    include_usage: bool,
    choices: Vec<Choice>,
    /// Choices for one prompt: its tokens count once for all of them.
    per_prompt: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
    media_tokens: usize,
    completion_tokens: usize,
}

impl Answer {
    pub fn new(
        model: &str,
        shape: Shape,
        prompts: usize,
        per_prompt: usize,
        streamed: bool,
        include_usage: bool,
    ) -> Self {
        let prefix = if shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            shape,
            id: format!("{prefix}-{:016x}{:016x}", random(), random()),
            created: seconds_since_1970(),
            model: model.to_owned(),
            streamed,
            include_usage,
            choices: (0..prompts * per_prompt).map(|_| Choice::default()).collect(),
            per_prompt,
            prompt_tokens: 0,
            cached_tokens: 0,
            media_tokens: 0,
            completion_tokens: 0,
        }
    }

    /// Chunks before the first token.
    pub fn begin(&self) -> Vec<Value> {
        match self.shape {
            Shape::Chat => (0..self.choices.len())
                .map(|index| self.chunk(index, json!({"role": "assistant", "content": ""}), None))
                .collect(),
            Shape::Text => Vec::new(),
        }
    }

    /// A chunk without choices, which clients skip as they skip the one with the usage.
    pub fn progress(&self, report: Value) -> Value {
        let mut chunk = self.head(true);
        chunk["choices"] = json!([]);
        chunk["keye"] = report;
        chunk
    }

    /// A token's text; gives the chunks to send.
    pub fn token(&mut self, index: usize, text: &str) -> Vec<Value> {
        let Some(choice) = self.choices.get_mut(index) else { return Vec::new() };
        let pieces = match self.shape {
            Shape::Chat => choice.splitter.push(text),
            Shape::Text if text.is_empty() => Vec::new(),
            Shape::Text => vec![(Part::Answer, text.to_owned())],
        };
        self.pieces(index, pieces)
    }

    /// The end of a choice.
    pub fn finished(&mut self, index: usize, reason: FinishReason, usage: &Usage) -> Vec<Value> {
        let Some(choice) = self.choices.get_mut(index) else { return Vec::new() };
        let pieces = if self.shape == Shape::Chat { choice.splitter.finish() } else { Vec::new() };
        choice.finish = Some(reason.clone());
        if index.is_multiple_of(self.per_prompt) {
            self.prompt_tokens += usage.prompt_tokens;
            self.cached_tokens += usage.cached_tokens;
            self.media_tokens += usage.media_tokens;
        }
        self.completion_tokens += usage.completion_tokens;
        let mut chunks = self.pieces(index, pieces);
        if self.streamed {
            chunks.push(self.chunk(index, json!({}), Some(reason)));
        }
        if self.streamed && self.include_usage && self.is_done() {
            let mut last = self.head(true);
            last["choices"] = json!([]);
            last["usage"] = self.usage();
            chunks.push(last);
        }
        chunks
    }

    /// Whether every choice has ended.
    pub fn is_done(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// The whole answer.
    pub fn whole(&self) -> Value {
        let choices = self.choices.iter().enumerate().map(|(index, choice)| {
            let reason = choice.finish.as_ref().map(finish_reason);
            match self.shape {
                Shape::Chat => {
                    let reasoning = Some(&choice.reasoning).filter(|text| !text.is_empty());
                    let message = json!({
                        "role": "assistant", "content": choice.content, "reasoning_content": reasoning, "refusal": null,
                    });
                    json!({"index": index, "message": message, "logprobs": null, "finish_reason": reason})
                }
                Shape::Text => {
                    json!({"index": index, "text": choice.content, "logprobs": null, "finish_reason": reason})
                }
            }
        });
        let choices: Value = choices.collect();
        let mut whole = self.head(false);
        whole["choices"] = choices;
        whole["usage"] = self.usage();
        whole
    }

    fn pieces(&mut self, index: usize, pieces: Vec<(Part, String)>) -> Vec<Value> {
        let mut chunks = Vec::new();
        for (part, piece) in pieces {
            let choice = &mut self.choices[index];
            let (name, text) = match part {
                Part::Answer => ("content", piece),
                Part::Analysis | Part::Thinking => {
                    // The model's choice of mode, then its thinking: both are reasoning, in paragraphs of their own.
                    let gap = choice.reasoning_part.is_some_and(|last| last != part);
                    choice.reasoning_part = Some(part);
                    ("reasoning_content", if gap { format!("\n\n{piece}") } else { piece })
                }
            };
            if self.streamed {
                let delta = match self.shape {
                    Shape::Chat => json!({name: text}),
                    Shape::Text => json!(text),
                };
                chunks.push(self.chunk(index, delta, None));
            } else if name == "content" {
                choice.content.push_str(&text);
            } else {
                choice.reasoning.push_str(&text);
            }
        }
        chunks
    }

    fn chunk(&self, index: usize, delta: Value, reason: Option<FinishReason>) -> Value {
        let reason = reason.as_ref().map(finish_reason);
        let choice = match self.shape {
            Shape::Chat => json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": reason}),
            Shape::Text => {
                let text = delta.as_str().unwrap_or_default();
                json!({"index": index, "text": text, "logprobs": null, "finish_reason": reason})
            }
        };
        let mut chunk = self.head(true);
        chunk["choices"] = json!([choice]);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn head(&self, chunk: bool) -> Value {
        let object = match (self.shape, chunk) {
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

fn finish_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THOUGHT: [&str; 9] =
        ["<ana", "lysis>Hard.</analysis>", "<think>", "Let me", " see\n", "</th", "ink>", "A <b", "> cat."];

    fn run(streamed: bool) -> (Answer, Vec<Value>) {
        let mut answer = Answer::new("m", Shape::Chat, 1, 2, streamed, true);
        let mut chunks = answer.begin();
        for text in THOUGHT {
            chunks.extend(answer.token(0, text));
            chunks.extend(answer.token(1, "x"));
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

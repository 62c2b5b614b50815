//! Updates to the items and events of `/v1/responses`.

use keye_engine::{FinishReason, Usage};
use keye_processor::{ThinkTag, ToolCall};
use serde_json::{Map, Value, json};

use crate::app::{random, seconds_since_1970};
use crate::error::ApiError;
use crate::logprobs::Logprob;
use crate::parts::{Parts, Piece};
use crate::sse::Answering;

/// What an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
}

/// The item that text is being added to.
#[derive(Debug)]
struct Open {
    kind: Kind,
    id: String,
    text: String,
    logprobs: Vec<Value>,
}

/// An answer in the making.
#[derive(Debug)]
pub(crate) struct ResponseAnswer {
    id: String,
    created: u64,
    model: String,
    streamed: bool,
    /// Fields of the request that the answer repeats.
    echo: Map<String, Value>,
    parts: Parts,
    /// Items that are over.
    output: Vec<Value>,
    open: Option<Open>,
    /// Of tokens whose text has not been settled.
    logprobs: Vec<Value>,
    sequence: u64,
    reasoning_tokens: usize,
    end: Option<(FinishReason, Usage)>,
    /// What the client should hear of its media.
    warnings: Vec<Value>,
}

impl ResponseAnswer {
    /// `tools` are the names of those that may be called; with `form` the answer has one that was asked for.
    pub fn new(model: &str, streamed: bool, tools: &[String], form: bool, echo: Map<String, Value>) -> Self {
        Self {
            id: new_id("resp"),
            created: seconds_since_1970(),
            model: model.to_owned(),
            streamed,
            echo,
            parts: Parts::new(tools, form),
            output: Vec::new(),
            open: None,
            logprobs: Vec::new(),
            sequence: 0,
            reasoning_tokens: 0,
            end: None,
            warnings: Vec::new(),
        }
    }

    fn response(&self, status: &str) -> Value {
        let mut response = json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": null,
            "incomplete_details": null, "model": self.model, "output": self.output, "usage": null,
        });
        if let Some((reason, usage)) = &self.end {
            if *reason == FinishReason::Length {
                response["incomplete_details"] = json!({"reason": "max_output_tokens"});
            }
            response["usage"] = json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "media_tokens": usage.media_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            });
        }
        if !self.warnings.is_empty() {
            response["warnings"] = json!(self.warnings);
        }
        if let Some(map) = response.as_object_mut() {
            map.extend(self.echo.clone());
        }
        response
    }

    fn status(&self) -> &'static str {
        match &self.end {
            None => "in_progress",
            Some((FinishReason::Stop, _)) => "completed",
            Some((FinishReason::Length, _)) => "incomplete",
        }
    }

    /// An event, numbered.
    fn event(&mut self, kind: &str, fields: Value) -> Value {
        let mut event = json!({"type": format!("response.{kind}"), "sequence_number": self.sequence});
        self.sequence += 1;
        if let (Some(event), Value::Object(fields)) = (event.as_object_mut(), fields) {
            event.extend(fields);
        }
        event
    }

    fn pieces(&mut self, pieces: Vec<Piece>) -> Vec<Value> {
        let mut events = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => self.text(Kind::Reasoning, text, &mut events),
                Piece::Content(text) => self.text(Kind::Message, text, &mut events),
                Piece::Call(call) => self.call(&call, &mut events),
            }
        }
        if self.streamed { events } else { Vec::new() }
    }

    fn text(&mut self, kind: Kind, text: String, events: &mut Vec<Value>) {
        if self.open.as_ref().is_none_or(|open| open.kind != kind) {
            self.close(events);
            // Of the tokens before it, such as closing tags, only the last is part of this text.
            self.logprobs.drain(..self.logprobs.len().saturating_sub(1));
            let open = Open { kind, id: new_id(kind.prefix()), text: String::new(), logprobs: Vec::new() };
            let (index, id, item) = (self.output.len(), open.id.clone(), open.item("in_progress", false));
            events.push(self.event("output_item.added", json!({"output_index": index, "item": item})));
            let at =
                json!({"item_id": id, "output_index": index, "content_index": 0, "part": open.part("", json!([]))});
            events.push(self.event("content_part.added", at));
            self.open = Some(open);
        }
        let logprobs = std::mem::take(&mut self.logprobs);
        let index = self.output.len();
        let Some(open) = &mut self.open else { return };
        open.text.push_str(&text);
        let mut delta = json!({"item_id": open.id, "output_index": index, "content_index": 0, "delta": text});
        if kind == Kind::Message {
            open.logprobs.extend(logprobs.clone());
            delta["logprobs"] = logprobs.into();
        }
        events.push(self.event(kind.delta(), delta));
    }

    /// Ends the item that is open.
    fn close(&mut self, events: &mut Vec<Value>) {
        let Some(open) = self.open.take() else { return };
        let index = self.output.len();
        let at = |more: Value| {
            let mut at = json!({"item_id": open.id, "output_index": index, "content_index": 0});
            if let (Some(at), Value::Object(more)) = (at.as_object_mut(), more) {
                at.extend(more);
            }
            at
        };
        let mut text = json!({"text": open.text});
        if open.kind == Kind::Message {
            text["logprobs"] = open.logprobs.clone().into();
        }
        events.push(self.event(open.kind.done(), at(text)));
        let part = open.part(&open.text, open.logprobs.clone().into());
        events.push(self.event("content_part.done", at(json!({"part": part}))));
        let status = match &self.end {
            Some((FinishReason::Length, _)) => "incomplete",
            _ => "completed",
        };
        let item = open.item(status, true);
        events.push(self.event("output_item.done", json!({"output_index": index, "item": item})));
        self.output.push(item);
    }

    fn call(&mut self, call: &ToolCall, events: &mut Vec<Value>) {
        self.close(events);
        self.logprobs.clear();
        let (id, index) = (new_id("fc"), self.output.len());
        let arguments = Value::from(call.arguments.clone()).to_string();
        let mut item = json!({
            "type": "function_call", "id": id, "call_id": new_id("call"), "name": call.name, "arguments": "",
            "status": "in_progress",
        });
        events.push(self.event("output_item.added", json!({"output_index": index, "item": item})));
        let delta = json!({"item_id": id, "output_index": index, "delta": arguments});
        events.push(self.event("function_call_arguments.delta", delta));
        let done = json!({"item_id": id, "output_index": index, "name": call.name, "arguments": arguments});
        events.push(self.event("function_call_arguments.done", done));
        item["arguments"] = arguments.into();
        item["status"] = "completed".into();
        events.push(self.event("output_item.done", json!({"output_index": index, "item": item})));
        self.output.push(item);
    }
}

impl Answering for ResponseAnswer {
    const NAMED: bool = true;

    fn begin(&mut self) -> Vec<Value> {
        let response = json!({"response": self.response("in_progress")});
        vec![self.event("created", response.clone()), self.event("in_progress", response)]
    }

    fn progress(&mut self, report: Value) -> Value {
        self.event("keye.progress", json!({"keye": report}))
    }

    fn warning(&mut self, warning: Value) {
        self.warnings.push(warning);
    }

    fn thinking(&mut self, _choice: usize, tag: ThinkTag) {
        self.parts.open_thinking(tag);
    }

    fn token(&mut self, _choice: usize, text: &str, logprob: Option<Logprob>) -> Vec<Value> {
        self.logprobs.extend(logprob.map(|logprob| logprob.chat()));
        let pieces = self.parts.push(text);
        if matches!(pieces.last(), Some(Piece::Reasoning(_))) {
            self.reasoning_tokens += 1;
        }
        self.pieces(pieces)
    }

    fn finished(&mut self, _choice: usize, reason: FinishReason, usage: &Usage) -> Vec<Value> {
        let pieces = self.parts.finish();
        let mut events = self.pieces(pieces);
        self.end = Some((reason, *usage));
        self.close(&mut events);
        let status = self.status();
        let response = json!({"response": self.response(status)});
        events.push(self.event(status, response));
        if self.streamed { events } else { Vec::new() }
    }

    fn failed(&mut self, error: &ApiError) -> Value {
        let mut response = self.response("failed");
        response["error"] = json!({"code": error.code.unwrap_or("server_error"), "message": error.message});
        self.event("failed", json!({"response": response}))
    }

    fn is_done(&self) -> bool {
        self.end.is_some()
    }

    fn whole(&mut self) -> Value {
        self.response(self.status())
    }
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Reasoning => "rs",
            Self::Message => "msg",
        }
    }

    fn delta(self) -> &'static str {
        match self {
            Self::Reasoning => "reasoning_text.delta",
            Self::Message => "output_text.delta",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Self::Reasoning => "reasoning_text.done",
            Self::Message => "output_text.done",
        }
    }
}

impl Open {
    fn part(&self, text: &str, logprobs: Value) -> Value {
        match self.kind {
            Kind::Reasoning => json!({"type": "reasoning_text", "text": text}),
            Kind::Message => json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}),
        }
    }

    fn item(&self, status: &str, with_content: bool) -> Value {
        let part = self.part(&self.text, self.logprobs.clone().into());
        let content = if with_content { vec![part] } else { Vec::new() };
        match self.kind {
            Kind::Reasoning => {
                json!({"type": "reasoning", "id": self.id, "summary": [], "content": content, "status": status})
            }
            Kind::Message => json!({
                "type": "message", "id": self.id, "role": "assistant", "content": content, "status": status,
            }),
        }
    }
}

fn new_id(prefix: &str) -> String {
    format!("{prefix}_{:016x}{:016x}", random(), random())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "<think>Hm, well.</think>Wait a moment. <tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";

    fn run(streamed: bool) -> (Vec<Value>, Value) {
        let mut answer = ResponseAnswer::new("m", streamed, &["f".into()], false, Map::new());
        let mut events = answer.begin();
        for text in TEXT.split_inclusive(' ') {
            events.extend(answer.token(0, text, None));
        }
        events.extend(answer.finished(0, FinishReason::Stop, &Usage::default()));
        (events, answer.whole())
    }

    #[test]
    fn items_and_events() {
        let whole = run(false).1;
        let kinds: Vec<&str> = whole["output"].as_array().unwrap().iter().filter_map(|i| i["type"].as_str()).collect();
        assert_eq!(kinds, ["reasoning", "message", "function_call"]);
        assert_eq!(whole["output"][0]["content"][0]["text"], "Hm, well.");
        assert_eq!(whole["output"][1]["content"][0]["text"], "Wait a moment.");
        assert_eq!((&whole["output"][2]["arguments"], &whole["status"]), (&json!("{\"a\":1}"), &json!("completed")));

        let events = run(true).0;
        let of = |kind: &str| -> String {
            events.iter().filter(|e| e["type"] == kind).filter_map(|e| e["delta"].as_str()).collect()
        };
        assert_eq!(of("response.output_text.delta"), "Wait a moment.");
        assert_eq!(of("response.reasoning_text.delta"), "Hm, well.");
        assert_eq!(of("response.function_call_arguments.delta"), "{\"a\":1}");
        let numbers: Vec<u64> = events.iter().filter_map(|e| e["sequence_number"].as_u64()).collect();
        assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
        for (index, item) in whole["output"].as_array().unwrap().iter().enumerate() {
            let done = events.iter().find(|e| e["type"] == "response.output_item.done" && e["output_index"] == index);
            assert_eq!(done.unwrap()["item"]["type"], item["type"]);
        }
        let last = events.last().unwrap();
        assert_eq!(
            (&last["type"], &last["response"]["output"][1]["content"]),
            (&json!("response.completed"), &whole["output"][1]["content"])
        );
    }
}

//! What a sequence may say next: free thinking, then an answer of a given form.
//!
//! Thinking (spec §9) stands in `<analysis>` and `<think>` before the answer. With a grammar the beginning of an answer is
//! either one of these tags or the grammar's; inside a tag everything but an end token is allowed; after it the grammar
//! holds. A budget closes a tag by force.

use keye_processor::{ThinkMode, ThinkTag, Thinking, Tokenizer};
use llguidance::Matcher;

use crate::EngineError;

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// This tag has begun; these tokens of it follow by force.
    Open { tag: ThinkTag, forced: Vec<u32> },
    /// Inside this tag.
    Inside { tag: ThinkTag },
    /// The closing tag is being forced.
    Closing { tag: ThinkTag, forced: Vec<u32> },
    /// At the beginning of an answer, where one of these tags may open instead.
    Start(&'static [ThinkTag]),
    /// In the answer.
    Answer,
}

/// The rule for one sequence.
#[derive(Clone)]
pub(crate) struct Constraint {
    tokenizer: Tokenizer,
    matcher: Option<Matcher>,
    end_tokens: std::sync::Arc<[u32]>,
    state: State,
    /// The last bytes inside a tag or of an answer that may begin with one.
    tail: Vec<u8>,
    /// Tokens inside of tags so far, and how many may be.
    thought: usize,
    max_thought: Option<usize>,
}

impl Constraint {
    /// A constraint for an answer to `prompt`, the end of which may have opened or closed a tag already.
    pub fn new(
        tokenizer: Tokenizer,
        matcher: Option<Matcher>,
        end_tokens: std::sync::Arc<[u32]>,
        think: ThinkMode,
        prompt: &str,
        max_thought: Option<usize>,
    ) -> Self {
        let state = match Thinking::of(prompt) {
            Thinking::Inside(tag) => State::Inside { tag },
            Thinking::Over => State::Answer,
            Thinking::Ahead if think == ThinkMode::NoThink && matcher.is_some() => State::Answer,
            Thinking::Ahead => State::Start(&ThinkTag::ALL),
        };
        Self { tokenizer, matcher, end_tokens, state, tail: Vec::new(), thought: 0, max_thought }
    }

    /// Whether the answer has a form that was asked for.
    pub fn has_form(&self) -> bool {
        self.matcher.is_some()
    }

    /// Takes the logits of tokens that must not come now to minus infinity.
    pub fn restrict(&mut self, logits: &mut [f32]) -> Result<(), EngineError> {
        if let State::Inside { tag } = self.state
            && self.max_thought.is_some_and(|max| self.thought >= max)
        {
            let mut forced = self.tokenizer.encode(tag.close())?;
            forced.reverse();
            self.state = State::Closing { tag, forced };
        }
        match &self.state {
            State::Open { forced, .. } | State::Closing { forced, .. } => {
                if let Some(token) = forced.last() {
                    only(logits, *token);
                }
            }
            State::Inside { .. } if self.matcher.is_some() => {
                for token in self.end_tokens.iter() {
                    forbid(logits, *token);
                }
            }
            State::Inside { .. } => {}
            State::Start(_) | State::Answer => {
                let Some(matcher) = &mut self.matcher else { return Ok(()) };
                let mask = matcher.compute_mask().map_err(|error| EngineError::Grammar(brief(&error)))?;
                let tags = self.first_tokens()?;
                for (id, logit) in (0u32..).zip(logits.iter_mut()) {
                    let allowed = (id as usize) < mask.len() && mask.is_allowed(id);
                    if !allowed && !tags.iter().any(|(_, first)| *first == id) {
                        *logit = f32::NEG_INFINITY;
                    } else if logit.is_nan() || *logit == f32::NEG_INFINITY {
                        // It may be the only way on.
                        *logit = f32::MIN;
                    }
                }
                if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
                    return Err(EngineError::Grammar("nothing may follow: the grammar admits no text here".into()));
                }
            }
        }
        Ok(())
    }

    /// False for a token that closes a tag and begins the answer with text that no mask has seen.
    pub fn accepts(&self, token: u32) -> bool {
        let (State::Inside { tag }, Some(_)) = (&self.state, &self.matcher) else { return true };
        let mut tail = self.tail.clone();
        tail.extend(self.tokenizer.token_bytes(token));
        match find(&tail, tag.close().as_bytes()) {
            Some(end) => tail[end..].iter().all(u8::is_ascii_whitespace),
            None => true,
        }
    }

    /// Takes a token. True when nothing may follow.
    pub fn push(&mut self, token: u32) -> Result<bool, EngineError> {
        match &mut self.state {
            State::Open { tag, forced } => {
                forced.pop();
                if forced.is_empty() {
                    self.state = State::Inside { tag: *tag };
                    self.tail.clear();
                }
            }
            State::Closing { forced, tag } => {
                forced.pop();
                if forced.is_empty() {
                    let tag = *tag;
                    self.close(tag);
                }
            }
            State::Inside { tag } => {
                self.thought += 1;
                let tag = *tag;
                self.tail.extend(self.tokenizer.token_bytes(token));
                let close = tag.close().as_bytes();
                if find(&self.tail, close).is_some() {
                    self.close(tag);
                } else {
                    self.tail.drain(..self.tail.len().saturating_sub(close.len() - 1));
                }
            }
            State::Start(tags) => {
                let tags = *tags;
                return self.begin(token, tags);
            }
            State::Answer => return self.consume(token),
        }
        Ok(false)
    }

    /// The first token of an answer, or of a tag in its place.
    fn begin(&mut self, token: u32, tags: &[ThinkTag]) -> Result<bool, EngineError> {
        if let Some(matcher) = &mut self.matcher {
            let mask = matcher.compute_mask().map_err(|error| EngineError::Grammar(brief(&error)))?;
            let allowed = (token as usize) < mask.len() && mask.is_allowed(token);
            if !allowed && let Some((tag, _)) = self.first_tokens()?.into_iter().find(|(_, first)| *first == token) {
                let mut forced = self.tokenizer.encode(tag.open())?;
                forced.reverse();
                forced.pop();
                self.state = if forced.is_empty() { State::Inside { tag } } else { State::Open { tag, forced } };
                return Ok(false);
            }
            self.state = State::Answer;
            return self.consume(token);
        }
        // Without a grammar the text tells whether a tag opens; white space may stand before it.
        self.tail.extend(self.tokenizer.token_bytes(token));
        let text = self.tail.trim_ascii_start();
        if let Some((tag, inside)) = ThinkTag::leads(text).filter(|(tag, _)| tags.contains(tag)) {
            self.tail = inside.to_vec();
            self.state = State::Inside { tag };
        } else if !tags.iter().any(|tag| tag.open().as_bytes().starts_with(text)) {
            self.state = State::Answer;
        }
        Ok(false)
    }

    fn consume(&mut self, token: u32) -> Result<bool, EngineError> {
        let Some(matcher) = &mut self.matcher else { return Ok(false) };
        matcher.consume_token(token).map_err(|error| EngineError::Grammar(brief(&error)))?;
        Ok(matcher.is_stopped())
    }

    /// After analysis comes thinking or the answer; after thinking the answer. A second tag of a kind would be taken for a
    /// part of the answer.
    fn close(&mut self, tag: ThinkTag) {
        self.tail.clear();
        self.state = match tag {
            ThinkTag::Think => State::Answer,
            ThinkTag::Analysis => State::Start(&[ThinkTag::Think]),
        };
    }

    /// The tags that may open, with the first token of each.
    fn first_tokens(&self) -> Result<Vec<(ThinkTag, u32)>, EngineError> {
        let mut tokens = Vec::new();
        let State::Start(tags) = self.state else { return Ok(tokens) };
        for tag in tags {
            tokens.extend(self.tokenizer.encode(tag.open())?.first().map(|first| (*tag, *first)));
        }
        Ok(tokens)
    }
}

/// The place after the first `needle`.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle).map(|at| at + needle.len())
}

/// Only `token` can be chosen.
fn only(logits: &mut [f32], token: u32) {
    logits.fill(f32::NEG_INFINITY);
    if let Some(logit) = logits.get_mut(token as usize) {
        *logit = 0.0;
    }
}

pub(crate) fn forbid(logits: &mut [f32], token: u32) {
    if let Some(logit) = logits.get_mut(token as usize) {
        *logit = f32::NEG_INFINITY;
    }
}

/// The first line: the rest shows the parser's insides. Of a regular expression the reason stands in the last.
pub(crate) fn brief(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    let cut = |line: &str| line.chars().take(500).collect::<String>();
    let mut lines = text.lines();
    let first = lines.next().unwrap_or_default();
    let reason = lines.find_map(|line| line.strip_prefix("error: "));
    match reason.filter(|_| first.ends_with("regex parse error:")) {
        Some(reason) => format!("{} {}", cut(first), cut(reason)),
        None => cut(first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever reads the answer takes a second analysis for a part of it, in which a form would not hold.
    #[test]
    fn a_tag_opens_once() {
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/keye-1_5-tiny/model");
        let tokenizer = Tokenizer::load(std::path::Path::new(fixture)).expect("a fixture");
        for (text, state) in [
            ("<analysis>a", State::Inside { tag: ThinkTag::Analysis }),
            ("<analysis>a</analysis><think>b", State::Inside { tag: ThinkTag::Think }),
            ("<analysis>a</analysis>\n<analysis>b", State::Answer),
            ("<think>a</think><think>b", State::Answer),
        ] {
            let end_tokens = std::sync::Arc::from([0]);
            let mut constraint = Constraint::new(tokenizer.clone(), None, end_tokens, ThinkMode::Auto, "", Some(99));
            for token in tokenizer.encode(text).expect("text") {
                constraint.push(token).expect("allowed");
            }
            assert_eq!(constraint.state, state, "{text}");
        }
    }

    #[test]
    fn the_reason_of_an_expression_is_kept() {
        let text = "at 1(8): invalid regex \"(\" (in regex): regex parse error:\n    (\n    ^\nerror: unclosed group";
        let told = "at 1(8): invalid regex \"(\" (in regex): regex parse error: unclosed group";
        assert_eq!(brief(&text), told);
        assert_eq!(brief(&"unknown name: \"x\"\nerror: inside"), "unknown name: \"x\"");
        let long = format!("invalid regex \"{}\": regex parse error:\nerror: unclosed group", "(".repeat(9000));
        assert!(brief(&long).ends_with("( unclosed group") && brief(&long).len() < 600, "{}", brief(&long));
    }
}

//! What the pieces of an answer are: thinking, the answer proper, calls of tools.

use keye_processor::{Part, ThinkSplitter, ThinkTag, ToolCall, ToolCallSplitter, ToolPiece};

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Piece {
    /// Thinking.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A whole call.
    Call(ToolCall),
}

/// Takes an answer apart while it comes.
#[derive(Debug)]
pub(crate) struct Parts {
    splitter: ThinkSplitter,
    /// Only with tools.
    calls: Option<ToolCallSplitter>,
    /// The last part that was not the answer.
    reasoning_part: Option<Part>,
    /// The answer proper has a form that was asked for, and has not begun.
    form_ahead: bool,
}

impl Parts {
    /// `tools` are the names of those that may be called; with `form` the answer has one that was asked for.
    pub fn new(tools: &[String], form: bool) -> Self {
        let calls = (!tools.is_empty()).then(|| ToolCallSplitter::new(tools.to_vec()));
        let splitter = splitter(ThinkSplitter::new(), form);
        Self { splitter, calls, reasoning_part: None, form_ahead: form }
    }

    /// The text begins inside this tag. Before the first.
    pub fn open_thinking(&mut self, tag: ThinkTag) {
        self.splitter = splitter(ThinkSplitter::opened(tag), self.form_ahead);
    }

    /// Takes the next text; returns what is settled, in order.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        let pieces = self.splitter.push(text);
        self.sort(pieces)
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> Vec<Piece> {
        let rest = self.splitter.finish();
        let mut pieces = self.sort(rest);
        pieces.extend(self.calls.iter_mut().flat_map(ToolCallSplitter::finish).map(Piece::from));
        pieces
    }

    fn sort(&mut self, pieces: Vec<(Part, String)>) -> Vec<Piece> {
        let mut sorted = Vec::new();
        for (part, text) in pieces {
            if part == Part::Answer && std::mem::take(&mut self.form_ahead) && !text.trim_start().starts_with('<') {
                // A call begins with a tag, other forms may quote one.
                self.calls = None;
            }
            match part {
                Part::Answer => match &mut self.calls {
                    Some(calls) => sorted.extend(calls.push(&text).into_iter().map(Piece::from)),
                    None => sorted.push(Piece::Content(text)),
                },
                Part::Analysis | Part::Thinking => {
                    // The model's choice of mode, then its thinking: both are reasoning, in paragraphs of their own.
                    let gap = self.reasoning_part.is_some_and(|last| last != part);
                    self.reasoning_part = Some(part);
                    sorted.push(Piece::Reasoning(if gap { format!("\n\n{text}") } else { text }));
                }
            }
        }
        sorted
    }
}

/// With `form` for an answer that has one.
fn splitter(splitter: ThinkSplitter, form: bool) -> ThinkSplitter {
    if form { splitter.before_form() } else { splitter }
}

impl From<ToolPiece> for Piece {
    fn from(piece: ToolPiece) -> Self {
        match piece {
            ToolPiece::Text(text) => Self::Content(text),
            ToolPiece::Call(call) => Self::Call(call),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces of a text that comes in parts of `size` characters: thinking and answer.
    fn parts(text: &str, size: usize, form: bool) -> (String, String) {
        let mut parts = Parts::new(&["f".into()], form);
        let chars: Vec<char> = text.chars().collect();
        let mut pieces: Vec<Piece> =
            chars.chunks(size).flat_map(|part| parts.push(&part.iter().collect::<String>())).collect();
        pieces.extend(parts.finish());
        let (mut thinking, mut answer) = (String::new(), String::new());
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => thinking.push_str(&text),
                Piece::Content(text) => answer.push_str(&text),
                Piece::Call(call) => answer.push_str(&format!("[{}]", call.name)),
            }
        }
        (thinking, answer)
    }

    #[test]
    fn texts_inside_a_form_are_left_alone() {
        let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
        let quoting = format!("{{\"a\": \"<think>x</think> </answer>{call}\"}} ");
        let thinking = "<analysis>Hard.</analysis>\n<think>1 < 2, {\"a\"}</think>\n\n";
        let cases = [
            (quoting.clone(), "", &*quoting),
            (format!("{thinking}{quoting}"), "Hard.\n\n1 < 2, {\"a\"}", &quoting),
            (format!("<think>Hm.</think>{call}"), "Hm.", "[f]"),
            (" yes ".to_owned(), "", " yes "),
            ("<b> and <think>".to_owned(), "", "<b> and <think>"),
            ("<think>cut </thi".to_owned(), "cut </thi", ""),
            ("<thi".to_owned(), "", "<thi"),
            (String::new(), "", ""),
        ];
        for (text, thinking, answer) in cases {
            for size in [1, 2, 3, 7, 1000] {
                assert_eq!(parts(&text, size, true), (thinking.into(), answer.into()), "{text} by {size}");
            }
        }
        // The same tags in front of an answer without a form.
        assert_eq!(parts("<think>Hm.</think> yes", 3, false), ("Hm.".into(), "yes".into()));
    }

    #[test]
    fn an_answer_can_begin_inside_thinking() {
        for form in [false, true] {
            let mut parts = Parts::new(&["f".into()], form);
            parts.open_thinking(ThinkTag::Think);
            let mut pieces =
                parts.push("hm\n</think>\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>");
            pieces.extend(parts.finish());
            let call = ToolCall { name: "f".into(), arguments: serde_json::Map::new() };
            assert_eq!(pieces, [Piece::Reasoning("hm".into()), Piece::Call(call)], "{form}");
        }
    }
}

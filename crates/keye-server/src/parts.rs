//! What the pieces of an answer are: thinking, the answer proper, calls of tools.

use keye_processor::{Part, ThinkSplitter, ToolCall, ToolCallSplitter, ToolPiece};

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
}

impl Parts {
    /// `tools` are the names of those that may be called.
    pub fn new(tools: &[String]) -> Self {
        let calls = (!tools.is_empty()).then(|| ToolCallSplitter::new(tools.to_vec()));
        Self { splitter: ThinkSplitter::new(), calls, reasoning_part: None }
    }

    /// Takes the next text; returns what is settled, in order.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        let pieces = self.splitter.push(text);
        self.sort(pieces)
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> Vec<Piece> {
        let pieces = self.splitter.finish();
        let mut pieces = self.sort(pieces);
        pieces.extend(self.calls.iter_mut().flat_map(ToolCallSplitter::finish).map(Piece::from));
        pieces
    }

    fn sort(&mut self, pieces: Vec<(Part, String)>) -> Vec<Piece> {
        let mut sorted = Vec::new();
        for (part, text) in pieces {
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

impl From<ToolPiece> for Piece {
    fn from(piece: ToolPiece) -> Self {
        match piece {
            ToolPiece::Text(text) => Self::Content(text),
            ToolPiece::Call(call) => Self::Call(call),
        }
    }
}

//! Answers taken apart while they come.

use crate::think_tag::ThinkTag;

/// Where a piece of streamed text belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Inside `<analysis>`.
    Analysis,
    /// Inside `<think>`.
    Thinking,
    /// Everything else, `<answer>` or not.
    Answer,
}

/// Takes an answer apart while it comes.
///
/// An opening tag counts where it leads: at the beginning, or behind a part that is closed. Behind `</think>` only
/// `<answer>` does. Elsewhere tags are words of the text. Those that count are removed and never shown in halves; so is white
/// space around a part. For well-formed answers the pieces of each part, joined, equal what [`crate::parse_answer`] gives. Analysis
/// and thinking end with their first closing tag.
#[derive(Debug, Clone)]
pub struct ThinkSplitter {
    part: Part,
    form: Form,
    /// The last of the parts before the answer that is over.
    closed: Option<ThinkTag>,
    wrap: Wrap,
    /// Text that may be the beginning of a tag.
    pending: String,
    /// White space that is shown only if more text of its part follows.
    space: String,
    /// Something of this part has been shown.
    begun: bool,
}

/// Whether the answer proper has a form that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// It has none.
    Free,
    /// It has, and has not begun. White space behind thinking is no part of it.
    Ahead { thought: bool },
    /// It has begun, and what comes is as it is.
    Begun,
}

/// How far the answer proper has got with `<answer>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrap {
    /// Not inside.
    Outside,
    /// Inside.
    Inside,
    /// It was closed, and nothing has come since.
    Closed,
}

/// A tag that counts, and what it does.
type Tag = (&'static str, Step);

#[derive(Debug, Clone, Copy)]
enum Step {
    Open(ThinkTag),
    Close(ThinkTag),
    OpenAnswer,
    CloseAnswer,
}

impl Default for ThinkSplitter {
    fn default() -> Self {
        Self {
            part: Part::Answer,
            form: Form::Free,
            closed: None,
            wrap: Wrap::Outside,
            pending: String::new(),
            space: String::new(),
            begun: false,
        }
    }
}

impl ThinkSplitter {
    /// A splitter for a new answer.
    pub fn new() -> Self {
        Self::default()
    }

    /// A splitter for an answer whose prompt has opened a [`tag`](crate::Thinking::tag).
    pub fn opened(tag: ThinkTag) -> Self {
        Self { part: tag.part(), ..Self::default() }
    }

    /// The same for an answer with a form that was asked for: tags count before it only, since its texts may quote them,
    /// and it keeps its white space.
    pub fn before_form(self) -> Self {
        Self { form: Form::Ahead { thought: self.part != Part::Answer }, ..self }
    }

    /// Takes the next piece of text; returns what is settled, in order.
    pub fn push(&mut self, text: &str) -> Vec<(Part, String)> {
        self.pending.push_str(text);
        let mut pieces = Vec::new();
        let buffer = std::mem::take(&mut self.pending);
        let mut rest = &buffer[..];
        loop {
            if self.form != Form::Free && self.part == Part::Answer {
                match self.lead(rest, &mut pieces) {
                    Some(inside) => rest = inside,
                    None => return pieces,
                }
            }
            let Some(at) = rest.find('<') else { break };
            let (before, tail) = rest.split_at(at);
            self.emit(before, &mut pieces);
            let tags = self.tags();
            if let Some((tag, step)) = tags.iter().find(|(tag, _)| tail.starts_with(tag)) {
                self.take(*step);
                rest = &tail[tag.len()..];
            } else if tags.iter().any(|(tag, _)| tag.starts_with(tail)) {
                self.pending = tail.to_owned();
                return pieces;
            } else {
                self.emit("<", &mut pieces);
                rest = &tail[1..];
            }
        }
        self.emit(rest, &mut pieces);
        pieces
    }

    /// Where a form or thinking in its place begins: returns what follows a tag, unless all of the text is dealt with.
    fn lead<'a>(&mut self, rest: &'a str, pieces: &mut Vec<(Part, String)>) -> Option<&'a str> {
        let Form::Ahead { thought } = self.form else {
            pieces.extend((!rest.is_empty()).then(|| (Part::Answer, rest.to_owned())));
            return None;
        };
        if let Some((tag, inside)) = ThinkTag::leads(rest.as_bytes()).filter(|(tag, _)| self.may_open(*tag)) {
            self.take(Step::Open(tag));
            self.form = Form::Ahead { thought: true };
            return Some(&rest[rest.len() - inside.len()..]);
        }
        let begins = |tag: &ThinkTag| self.may_open(*tag) && tag.open().starts_with(rest.trim_ascii_start());
        if rest.trim_ascii_start().is_empty() || ThinkTag::ALL.iter().any(begins) {
            rest.clone_into(&mut self.pending);
        } else {
            self.form = Form::Begun;
            let text = if thought { rest.trim_start() } else { rest };
            pieces.extend((!text.is_empty()).then(|| (Part::Answer, text.to_owned())));
        }
        None
    }

    /// What is left at the end: the beginning of a tag that never came.
    pub fn finish(&mut self) -> Vec<(Part, String)> {
        let rest = std::mem::take(&mut self.pending);
        let mut pieces = Vec::new();
        self.emit(&rest, &mut pieces);
        pieces
    }

    /// Whether the part of this tag can still come.
    fn may_open(&self, tag: ThinkTag) -> bool {
        match tag {
            ThinkTag::Analysis => self.closed.is_none(),
            ThinkTag::Think => self.closed != Some(ThinkTag::Think),
        }
    }

    /// The tags that count where the text has got to.
    fn tags(&self) -> Vec<Tag> {
        const OPEN: Tag = ("<answer>", Step::OpenAnswer);
        const CLOSE: Tag = ("</answer>", Step::CloseAnswer);
        match (self.part, self.wrap) {
            (Part::Analysis, _) => vec![(ThinkTag::Analysis.close(), Step::Close(ThinkTag::Analysis))],
            (Part::Thinking, _) => vec![(ThinkTag::Think.close(), Step::Close(ThinkTag::Think))],
            (Part::Answer, Wrap::Inside) if self.begun => vec![CLOSE],
            (Part::Answer, Wrap::Inside) => vec![OPEN, CLOSE],
            (Part::Answer, Wrap::Closed) => vec![OPEN],
            (Part::Answer, Wrap::Outside) if self.begun => Vec::new(),
            (Part::Answer, Wrap::Outside) => {
                // One that was opened unseen can be closed here.
                let open = ThinkTag::ALL.into_iter().filter(|tag| self.may_open(*tag));
                open.flat_map(|tag| [(tag.open(), Step::Open(tag)), (tag.close(), Step::Close(tag))])
                    .chain([OPEN])
                    .collect()
            }
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Open(tag) => self.part = tag.part(),
            Step::Close(tag) => (self.part, self.closed) = (Part::Answer, Some(tag)),
            // White space between two of them is that of one text.
            Step::OpenAnswer | Step::CloseAnswer => {
                self.wrap = if matches!(step, Step::OpenAnswer) { Wrap::Inside } else { Wrap::Closed };
                return;
            }
        }
        self.begun = false;
        self.space.clear();
    }

    fn emit(&mut self, text: &str, pieces: &mut Vec<(Part, String)>) {
        let text = if self.begun { text } else { text.trim_start() };
        let shown = text.trim_end();
        if shown.is_empty() {
            self.space.push_str(text);
            return;
        }
        let mut piece = std::mem::take(&mut self.space);
        piece.push_str(shown);
        self.space.push_str(&text[shown.len()..]);
        self.begun = true;
        if self.part == Part::Answer && self.wrap == Wrap::Closed {
            self.wrap = Wrap::Outside;
        }
        match pieces.last_mut() {
            Some((part, last)) if *part == self.part => last.push_str(&piece),
            _ => pieces.push((self.part, piece)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::tests::{WELL_FORMED, answer};
    use crate::{parse_answer, parse_formed_answer, parse_opened_answer};

    /// The parts of a text that comes in chunks of `size` characters: analysis, thinking, answer.
    fn split(mut splitter: ThinkSplitter, text: &str, size: usize) -> [String; 3] {
        let chars: Vec<char> = text.chars().collect();
        let mut pieces: Vec<(Part, String)> =
            chars.chunks(size).flat_map(|chunk| splitter.push(&chunk.iter().collect::<String>())).collect();
        pieces.extend(splitter.finish());
        assert!(pieces.iter().all(|(_, piece)| !piece.is_empty()), "{pieces:?}");
        let mut parts = [String::new(), String::new(), String::new()];
        pieces.iter().for_each(|(part, piece)| parts[*part as usize].push_str(piece));
        parts
    }

    #[test]
    fn an_answer_can_begin_inside_thinking() {
        let cases = [
            ("hm</think>\n<answer>A</answer>", answer(None, Some("hm"), "A", None)),
            ("cut in the midd", answer(None, Some("cut in the midd"), "", None)),
            ("</think>A", answer(None, Some(""), "A", None)),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_opened_answer(ThinkTag::Think, text), expected, "{text}");
            let [_, thinking, shown] = split(ThinkSplitter::opened(ThinkTag::Think), text, 1000);
            assert_eq!((Some(thinking), shown), (expected.thinking, expected.answer), "{text}");
        }
        let expected = answer(Some("Easy."), None, "A", None);
        assert_eq!(parse_opened_answer(ThinkTag::Analysis, "Easy.</analysis>A"), expected);
        let parts = split(ThinkSplitter::opened(ThinkTag::Analysis), "Easy.</analysis>A", 1);
        assert_eq!(parts, ["Easy.", "", "A"]);
    }

    #[test]
    fn texts_inside_a_form_are_left_alone() {
        let quoting = "{\"a\": \"<think>x</think> </answer>\"} ";
        let thinking = "<analysis>Hard.</analysis>\n<think>1 < 2, {\"a\"}</think>\n\n";
        let thought = [Some("Hard."), Some("1 < 2, {\"a\"}")];
        let cases = [
            (quoting.to_owned(), [None; 2], quoting),
            (format!("{thinking}{quoting}"), thought, quoting),
            (" yes\n".to_owned(), [None; 2], " yes\n"),
            ("<b> and <think>".to_owned(), [None; 2], "<b> and <think>"),
            ("<think>cut </thi".to_owned(), [None, Some("cut </thi")], ""),
            ("<thi".to_owned(), [None; 2], "<thi"),
            (String::new(), [None; 2], ""),
        ];
        for (text, [analysis, thinking], proper) in cases {
            assert_eq!(parse_formed_answer(None, &text), answer(analysis, thinking, proper, None), "{text}");
            let expected = [analysis.unwrap_or_default(), thinking.unwrap_or_default(), proper];
            for size in [1, 2, 3, 7, 1000] {
                assert_eq!(split(ThinkSplitter::new().before_form(), &text, size), expected, "{text} by {size}");
            }
        }
        let expected = answer(None, Some("hm"), "{\"</think>\"}", None);
        assert_eq!(parse_formed_answer(Some(ThinkTag::Think), "hm\n</think>\n{\"</think>\"}"), expected);
    }

    #[test]
    fn splitting_a_stream_gives_the_parts_whatever_the_chunks() {
        for text in WELL_FORMED {
            let whole = parse_answer(text);
            let bounds: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
            for width in 1..=bounds.len() {
                let mut splitter = ThinkSplitter::new();
                let mut parts = [String::new(), String::new(), String::new()];
                let mut take = |pieces: Vec<(Part, String)>| {
                    for (part, piece) in pieces {
                        assert!(!piece.is_empty());
                        parts[part as usize].push_str(&piece);
                    }
                };
                for chunk in bounds.chunks(width) {
                    let end = chunk[chunk.len() - 1];
                    let start = bounds.iter().position(|b| *b == chunk[0]).map_or(0, |i| bounds[i.saturating_sub(1)]);
                    take(splitter.push(&text[start..end]));
                }
                take(splitter.finish());
                let expected = [
                    whole.analysis.clone().unwrap_or_default(),
                    whole.thinking.clone().unwrap_or_default(),
                    whole.answer.clone(),
                ];
                assert_eq!(parts, expected, "{text:?} in chunks of {width}");
            }
        }
    }

    #[test]
    fn tags_that_are_only_mentioned_are_words() {
        for (text, expected) in [
            ("The <answer> is 4", ["", "", "The <answer> is 4"]),
            ("Use the <think> tag to reason.", ["", "", "Use the <think> tag to reason."]),
            ("<think>a</think>Text with </analysis> quoted", ["", "a", "Text with </analysis> quoted"]),
            ("<think>a</think><answer>x <think> y</answer>", ["", "a", "x <think> y"]),
            ("<think>a</think><think> is a tag", ["", "a", "<think> is a tag"]),
            ("<analysis>a</analysis> <analysis> b", ["a", "", "<analysis> b"]),
            ("Close with </answer> or </think>.", ["", "", "Close with </answer> or </think>."]),
            ("<answer>1</answer>\n\n<answer>2</answer> bye", ["", "", "1\n\n2 bye"]),
            ("</think> x", ["", "", "x"]),
        ] {
            for size in [1, 2, 3, 7, 1000] {
                assert_eq!(split(ThinkSplitter::new(), text, size), expected, "{text} by {size}");
            }
        }
        for text in ["The <answer> is 4", "Use the <think> tag to reason.", "Close with </answer>."] {
            assert_eq!(parse_answer(text), answer(None, None, text, None));
        }
        let text = "<think>a</think><answer>x <think> y</answer>";
        assert_eq!(parse_answer(text), answer(None, Some("a"), "x <think> y", None));
    }

    /// Whatever is mentioned where, and wherever it is cut: opening tags anywhere, closing ones where they belong.
    #[test]
    fn streamed_and_whole_answers_agree() {
        let words = ["a", " ", "\n", "<think>", "<analysis>", "<answer>", "<", "b c ", "</", "\u{e9}", "<thin", "> "];
        let mut state = 7u64;
        let mut next = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        for _ in 0..20_000 {
            let mut text = |first: &str| {
                let more: String = (0..next(6)).map(|_| words[next(words.len())]).collect();
                format!("{first}{more}")
            };
            let (analysis, thinking, proper) = (text(""), text(""), text("w"));
            let mut whole = String::new();
            if next(2) == 0 {
                whole += &format!("<analysis>{analysis}</analysis>{}", ["", "\n"][next(2)]);
            }
            if next(2) == 0 {
                whole += &format!("{}<think>{thinking}</think>{}", ["", " "][next(2)], ["", "\n\n"][next(2)]);
            }
            // A second <answer> inside of one is the evaluator's to choose.
            whole += &match next(2) {
                0 => proper,
                _ => format!("<answer>{}</answer>", proper.replace("<answer>", "")),
            };
            let cut = next(4) * next(whole.len() + 1);
            let end = (0..=whole.len() - cut.min(whole.len())).rev().find(|at| whole.is_char_boundary(*at)).unwrap();
            let text = &whole[..end];
            let parsed = parse_answer(text);
            let expected = [parsed.analysis.unwrap_or_default(), parsed.thinking.unwrap_or_default(), parsed.answer];
            for size in [1 + next(5), 1000] {
                assert_eq!(split(ThinkSplitter::new(), text, size), expected, "{text:?} by {size}");
            }
        }
    }

    #[test]
    fn text_is_shown_as_soon_as_it_cannot_be_a_tag() {
        let mut splitter = ThinkSplitter::new();
        assert_eq!(splitter.push(" <thi"), []);
        assert_eq!(splitter.push("s <thi"), [(Part::Answer, "<this <thi".into())]);
        let mut splitter = ThinkSplitter::new();
        assert_eq!(splitter.push("\n<thi"), []);
        assert_eq!(splitter.push("nk>b\n"), [(Part::Thinking, "b".into())]);
        assert_eq!(splitter.push("c</think>d</th"), [(Part::Thinking, "\nc".into()), (Part::Answer, "d</th".into())]);
        assert_eq!(splitter.push("<answer>"), [(Part::Answer, "<answer>".into())]);
        assert_eq!(splitter.finish(), []);
        let mut splitter = ThinkSplitter::opened(ThinkTag::Think);
        assert_eq!(splitter.push("d</th"), [(Part::Thinking, "d".into())]);
        assert_eq!(splitter.finish(), [(Part::Thinking, "</th".into())]);
    }
}

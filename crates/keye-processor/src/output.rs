//! The parts of an answer (spec §9).

use crate::think_tag::ThinkTag;

/// Thinking mode, chosen by a suffix on the last user text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ThinkMode {
    /// No suffix: the model decides.
    #[default]
    Auto,
    /// `/think`.
    Think,
    /// `/no_think`.
    NoThink,
}

impl ThinkMode {
    /// What is put behind the last user text.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Auto => "",
            Self::Think => "/think",
            Self::NoThink => "/no_think",
        }
    }
}

/// An answer taken apart. All parts are slices of the text without their tags, trimmed.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Answer {
    /// Inside `<analysis>`: the model's choice of mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub analysis: Option<String>,
    /// Inside `<think>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thinking: Option<String>,
    /// The answer proper.
    pub answer: String,
    /// Inside the last `\boxed{}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boxed: Option<String>,
}

/// Takes a whole answer apart as the vendor's evaluator does: what follows the last `</analysis>`, then the last
/// `</think>`, then inside the last `<answer>`. A part that is still open (the answer was cut short) takes all that
/// follows its tag.
pub fn parse_answer(text: &str) -> Answer {
    let (analysis, rest) = leading_part(text, ThinkTag::Analysis);
    let (thinking, rest) = leading_part(rest, ThinkTag::Think);
    let answer = match rest.rsplit_once("</answer>") {
        Some((before, _)) if before.contains("<answer>") => before.rsplit_once("<answer>").map_or(before, |(_, a)| a),
        Some((before, _)) => before,
        None => rest.rsplit_once("<answer>").map_or(rest, |(_, open)| open),
    };
    Answer { analysis, thinking, answer: answer.trim().to_owned(), boxed: boxed(answer) }
}

/// As [`parse_answer`], of an answer whose prompt has opened a [`tag`](crate::Thinking::tag).
pub fn parse_opened_answer(tag: ThinkTag, text: &str) -> Answer {
    parse_answer(&format!("{}{text}", tag.open()))
}

/// Takes an answer apart whose proper part has a form that was asked for: tags count before it only, since its texts may
/// quote them, and it is left as it is, not trimmed.
pub fn parse_formed_answer(opened: Option<ThinkTag>, text: &str) -> Answer {
    let mut splitter = opened.map_or_else(ThinkSplitter::new, ThinkSplitter::opened).before_form();
    let mut answer = Answer::default();
    let mut pieces = splitter.push(text);
    pieces.extend(splitter.finish());
    for (part, piece) in pieces {
        match part {
            Part::Analysis => answer.analysis.get_or_insert_default().push_str(&piece),
            Part::Thinking => answer.thinking.get_or_insert_default().push_str(&piece),
            Part::Answer => answer.answer.push_str(&piece),
        }
    }
    answer.boxed = boxed(&answer.answer);
    answer
}

/// Splits off the part up to the last closing tag, or, when the part is open, all from its tag on.
fn leading_part(text: &str, tag: ThinkTag) -> (Option<String>, &str) {
    let (open, close) = (tag.open(), tag.close());
    let (closed, rest) = match text.rsplit_once(close) {
        Some((before, after)) => (Some(before.split_once(open).map_or(before, |(_, inside)| inside)), after),
        None => (None, text),
    };
    let (rest, opened) = match rest.split_once(open) {
        Some((before, inside)) => (before, Some(inside)),
        None => (rest, None),
    };
    let part = match (closed, opened) {
        (None, None) => None,
        (Some(part), None) | (None, Some(part)) => Some(part.trim().to_owned()),
        (Some(first), Some(second)) => Some(format!("{}\n{}", first.trim(), second.trim())),
    };
    (part, rest)
}

/// The inside of the last `\boxed{}` whose braces balance; `\{` and `\}` are characters, not braces.
fn boxed(text: &str) -> Option<String> {
    const OPEN: &str = "\\boxed{";
    // Where the braces that are open begin inside, and which of them are boxes.
    let (mut open, mut last) = (Vec::new(), None::<(usize, usize)>);
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        match c {
            _ if text[at..].starts_with(OPEN) => {
                at += OPEN.len();
                open.push((at, true));
                continue;
            }
            '\\' if !text[at + 1..].starts_with(OPEN) => at += text[at + 1..].chars().next().map_or(0, char::len_utf8),
            '{' => open.push((at + 1, false)),
            '}' => {
                if let Some((begin, true)) = open.pop() {
                    last = last.max(Some((begin, at)));
                }
            }
            _ => {}
        }
        at += c.len_utf8();
    }
    last.map(|(begin, end)| text[begin..end].trim().to_owned())
}

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
/// Tags are removed and never shown in halves; white space around a part is removed. For well-formed answers the pieces of
/// each part, joined, equal what [`parse_answer`] gives. Analysis and thinking end with their first closing tag.
#[derive(Debug, Clone)]
pub struct ThinkSplitter {
    part: Part,
    form: Form,
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
    /// It has none: tags count wherever they stand.
    Free,
    /// It has, and has not begun. White space behind thinking is no part of it.
    Ahead { thought: bool },
    /// It has begun, and what comes is as it is.
    Begun,
}

impl Default for ThinkSplitter {
    fn default() -> Self {
        Self { part: Part::Answer, form: Form::Free, pending: String::new(), space: String::new(), begun: false }
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
            let tags = self.tags();
            let Some(at) = rest.find('<') else { break };
            let (before, tail) = rest.split_at(at);
            self.emit(before, &mut pieces);
            if let Some((tag, next)) = tags.iter().find(|(tag, _)| tail.starts_with(tag)) {
                self.enter(*next);
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
        if let Some((tag, inside)) = ThinkTag::leads(rest.as_bytes()) {
            self.enter(tag.part());
            self.form = Form::Ahead { thought: true };
            return Some(&rest[rest.len() - inside.len()..]);
        }
        if ThinkTag::may_lead(rest.as_bytes()) {
            rest.clone_into(&mut self.pending);
        } else {
            self.form = Form::Begun;
            let text = if thought { rest.trim_start() } else { rest };
            pieces.push((Part::Answer, text.to_owned()));
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

    /// The tags that count in this part, and the part behind each.
    fn tags(&self) -> &'static [(&'static str, Part)] {
        const INSIDE: [(&str, Part); 2] =
            [(ThinkTag::Analysis.close(), Part::Answer), (ThinkTag::Think.close(), Part::Answer)];
        const OUTSIDE: [(&str, Part); 6] = [
            (ThinkTag::Analysis.open(), Part::Analysis),
            (ThinkTag::Analysis.close(), Part::Answer),
            (ThinkTag::Think.open(), Part::Thinking),
            (ThinkTag::Think.close(), Part::Answer),
            ("<answer>", Part::Answer),
            ("</answer>", Part::Answer),
        ];
        match self.part {
            Part::Analysis => &INSIDE[..1],
            Part::Thinking => &INSIDE[1..],
            Part::Answer => &OUTSIDE,
        }
    }

    fn enter(&mut self, part: Part) {
        self.part = part;
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
        match pieces.last_mut() {
            Some((part, last)) if *part == self.part => last.push_str(&piece),
            _ => pieces.push((self.part, piece)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(analysis: Option<&str>, thinking: Option<&str>, answer: &str, boxed: Option<&str>) -> Answer {
        Answer {
            analysis: analysis.map(Into::into),
            thinking: thinking.map(Into::into),
            answer: answer.into(),
            boxed: boxed.map(Into::into),
        }
    }

    const WELL_FORMED: [&str; 9] = [
        "A cat.",
        "  a < b and c <d> e\n\n",
        "<think>\nhm, 1 < 2 \n</think>\n<answer>\nThe answer is \\boxed{A}.</answer>",
        "<analysis>Easy. Therefore, /no_think mode is more appropriate.</analysis>A cat.",
        "<analysis>Hard.</analysis><think>Let me <answer> see</think><answer>\\boxed{\\frac{1}{2}}</answer>",
        "<think>cut in the midd",
        "<analysis>cut in the midd",
        "<think>x</think><answer>cut in the mid",
        "",
    ];

    #[test]
    fn takes_answers_apart() {
        let expected = [
            answer(None, None, "A cat.", None),
            answer(None, None, "a < b and c <d> e", None),
            answer(None, Some("hm, 1 < 2"), "The answer is \\boxed{A}.", Some("A")),
            answer(Some("Easy. Therefore, /no_think mode is more appropriate."), None, "A cat.", None),
            answer(Some("Hard."), Some("Let me <answer> see"), "\\boxed{\\frac{1}{2}}", Some("\\frac{1}{2}")),
            answer(None, Some("cut in the midd"), "", None),
            answer(Some("cut in the midd"), None, "", None),
            answer(None, Some("x"), "cut in the mid", None),
            answer(None, None, "", None),
        ];
        for (text, expected) in WELL_FORMED.iter().zip(expected) {
            assert_eq!(parse_answer(text), expected, "{text}");
        }
    }

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
    fn the_last_tags_count() {
        let cases = [
            ("no opening tag</think> x", answer(None, Some("no opening tag"), "x", None)),
            ("<think>a</think>b</think>c", answer(None, Some("a</think>b"), "c", None)),
            ("<answer>1</answer><answer>2</answer> bye", answer(None, None, "2", None)),
            ("\\\\boxed{1} \\boxed{2 \\boxed{3", answer(None, None, "\\\\boxed{1} \\boxed{2 \\boxed{3", Some("1"))),
            ("\\boxed{1 \\boxed{2}}", answer(None, None, "\\boxed{1 \\boxed{2}}", Some("2"))),
            ("\\boxed{1} or \\boxed{2 \\} {x}} \\boxed{3", {
                answer(None, None, "\\boxed{1} or \\boxed{2 \\} {x}} \\boxed{3", Some("2 \\} {x}"))
            }),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_answer(text), expected, "{text}");
        }
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
    fn text_is_shown_as_soon_as_it_cannot_be_a_tag() {
        let mut splitter = ThinkSplitter::new();
        assert_eq!(splitter.push("a <thi"), [(Part::Answer, "a".into())]);
        assert_eq!(splitter.push("s"), [(Part::Answer, " <this".into())]);
        assert_eq!(splitter.push("<think>b\n"), [(Part::Thinking, "b".into())]);
        assert_eq!(splitter.push("c</think>d</th"), [(Part::Thinking, "\nc".into()), (Part::Answer, "d".into())]);
        assert_eq!(splitter.finish(), [(Part::Answer, "</th".into())]);
    }
}

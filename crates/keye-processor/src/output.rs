//! The parts of an answer (spec §9).

use crate::think_splitter::{Part, ThinkSplitter};
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
/// follows its tag, which has to lead: further back it is only mentioned.
pub fn parse_answer(text: &str) -> Answer {
    let (analysis, rest) = leading_part(text, ThinkTag::Analysis);
    let (thinking, rest) = leading_part(rest, ThinkTag::Think);
    let closed = rest.rsplit_once("</answer>").and_then(|(before, _)| before.rsplit_once("<answer>"));
    let answer = closed.map_or_else(|| leading(rest, "<answer>").unwrap_or(rest), |(_, inside)| inside);
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
    let (part, rest) = match text.rsplit_once(close) {
        Some((before, after)) => (before.split_once(open).map_or(before, |(_, inside)| inside), after),
        None => match leading(text, open) {
            Some(inside) => (inside, ""),
            None => return (None, text),
        },
    };
    (Some(part.trim().to_owned()), rest)
}

/// What follows `tag`, when the text begins with it.
fn leading<'a>(text: &'a str, tag: &str) -> Option<&'a str> {
    text.trim_start().strip_prefix(tag)
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn answer(analysis: Option<&str>, thinking: Option<&str>, answer: &str, boxed: Option<&str>) -> Answer {
        Answer {
            analysis: analysis.map(Into::into),
            thinking: thinking.map(Into::into),
            answer: answer.into(),
            boxed: boxed.map(Into::into),
        }
    }

    pub(crate) const WELL_FORMED: [&str; 9] = [
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
}

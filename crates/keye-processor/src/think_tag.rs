//! The tags of thinking, and how far a prompt has got with them.

use crate::Part;
use crate::template::{GENERATION, TURN_END};

/// A tag around thinking, which comes before the answer proper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThinkTag {
    /// `<think>`.
    Think,
    /// `<analysis>`: the model's choice of mode, before it thinks.
    Analysis,
}

impl ThinkTag {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Think, Self::Analysis];

    /// The tag that opens it.
    pub const fn open(self) -> &'static str {
        match self {
            Self::Think => "<think>",
            Self::Analysis => "<analysis>",
        }
    }

    /// The tag that closes it.
    pub const fn close(self) -> &'static str {
        match self {
            Self::Think => "</think>",
            Self::Analysis => "</analysis>",
        }
    }

    /// The one with which `text` begins, white space before it aside, and what follows.
    pub fn leads(text: &[u8]) -> Option<(Self, &[u8])> {
        let text = text.trim_ascii_start();
        Self::ALL.iter().find_map(|tag| text.strip_prefix(tag.open().as_bytes()).map(|rest| (*tag, rest)))
    }

    pub(crate) const fn part(self) -> Part {
        match self {
            Self::Think => Part::Thinking,
            Self::Analysis => Part::Analysis,
        }
    }
}

/// How far a rendered prompt has got with the thinking of the answer that follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thinking {
    /// Nothing of it is there.
    Ahead,
    /// The answer begins inside this tag, without it.
    Inside(ThinkTag),
    /// It is over: the answer proper comes next.
    Over,
}

impl Thinking {
    /// Looks at the model's turn, when the prompt ends with one that is not over, and at the prompt's very end. Tags that
    /// others wrote further ahead say nothing about the answer.
    pub fn of(prompt: &str) -> Self {
        let turn = prompt.rsplit_once(GENERATION).map(|(_, turn)| turn).filter(|turn| !turn.contains(TURN_END));
        let (mut rest, mut begun) = (turn.unwrap_or_default(), Self::Ahead);
        while let Some((tag, inside)) = ThinkTag::leads(rest.as_bytes()) {
            let Some((_, behind)) = rest[rest.len() - inside.len()..].split_once(tag.close()) else {
                return Self::Inside(tag);
            };
            rest = behind;
            if tag == ThinkTag::Think {
                begun = Self::Over;
            }
        }
        let end = prompt.trim_end();
        match ThinkTag::ALL.into_iter().find(|tag| end.ends_with(tag.open())) {
            Some(tag) => Self::Inside(tag),
            None if end.ends_with(ThinkTag::Think.close()) => Self::Over,
            None => begun,
        }
    }

    /// The tag that the prompt has opened.
    pub fn tag(self) -> Option<ThinkTag> {
        match self {
            Self::Inside(tag) => Some(tag),
            Self::Ahead | Self::Over => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_can_begin_the_thinking() {
        let turn = |begun: &str| format!("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{begun}");
        for (prompt, begun) in [
            (turn(""), Thinking::Ahead),
            (turn("<think>\n"), Thinking::Inside(ThinkTag::Think)),
            (turn("<think>\nSo far 1 < 2"), Thinking::Inside(ThinkTag::Think)),
            (turn("<analysis>Easy"), Thinking::Inside(ThinkTag::Analysis)),
            (turn("<analysis>Hard</analysis>\n<think>Hm"), Thinking::Inside(ThinkTag::Think)),
            (turn("<analysis>Hard</analysis>"), Thinking::Ahead),
            (turn("<think>\n\n</think>\n\n"), Thinking::Over),
            (turn("<think>a</think>It <think>"), Thinking::Inside(ThinkTag::Think)),
            (turn("Tags like <think> are"), Thinking::Ahead),
            // What others wrote, in their turns or in a text as it is.
            (turn("<think>a<|im_end|>\n"), Thinking::Ahead),
            ("<|im_start|>user\nas an assistant, <think> aloud<|im_end|>\n".into(), Thinking::Ahead),
            ("An assistant says <think> or <analysis> to".into(), Thinking::Ahead),
            ("Go on: <think>".into(), Thinking::Inside(ThinkTag::Think)),
            ("<think>\n\n</think>\n\n".into(), Thinking::Over),
            (String::new(), Thinking::Ahead),
        ] {
            assert_eq!(Thinking::of(&prompt), begun, "{prompt:?}");
        }
    }
}

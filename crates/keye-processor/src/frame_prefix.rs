//! What is written before each frame of a clip, as a template (spec of 2.0, §4.3, ambiguity A1).

use std::fmt::Write as _;

use crate::ProcessorError;

/// Literal text around at most one place for the time stamp: `<|frame|>{ts:.1f}`.
///
/// `{ts:.Nf}` stands for the seconds with N decimals, 0 to 6; there is no way to write a brace. Without a time stamp only the
/// `<|frame|>` of the template is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FramePrefix {
    before: String,
    /// Decimals, and the text behind the time stamp.
    stamp: Option<(usize, String)>,
}

/// The token that begins a frame.
const FRAME: &str = "<|frame|>";

impl FramePrefix {
    /// Reads a template.
    pub fn parse(template: &str) -> Result<Self, ProcessorError> {
        let error = |reason: &str| {
            let expected = "expected text with at most one {ts:.Nf}, N from 0 to 6";
            Err(ProcessorError::Prompt(format!("frame prefix {template:?}: {reason}; {expected}")))
        };
        let Some((before, rest)) = template.split_once('{') else {
            return match template.contains('}') {
                true => error("found } without {"),
                false => Ok(Self { before: template.into(), stamp: None }),
            };
        };
        let Some((field, after)) = rest.split_once('}') else { return error("found { without }") };
        let decimals = field.strip_prefix("ts:.").and_then(|field| field.strip_suffix('f')).map(str::as_bytes);
        match decimals {
            _ if before.contains('}') || after.contains(['{', '}']) => error("found a brace too many"),
            Some([digit @ b'0'..=b'6']) => {
                Ok(Self { before: before.into(), stamp: Some((usize::from(digit - b'0'), after.into())) })
            }
            _ => error(&format!("found {{{field}}}")),
        }
    }

    /// 2.0's, as far as is known: 1.5's.
    pub fn published() -> Self {
        Self { before: FRAME.into(), stamp: Some((1, String::new())) }
    }

    /// The text before a frame at `seconds`, rounded from the exact binary value as Python does.
    pub fn text(&self, seconds: Option<f32>) -> String {
        let Some(seconds) = seconds else {
            let marked = self.before.contains(FRAME) || self.stamp.iter().any(|(_, after)| after.contains(FRAME));
            return if marked { FRAME.into() } else { String::new() };
        };
        let mut text = self.before.clone();
        if let Some((decimals, after)) = &self.stamp {
            // Writing to a string cannot fail.
            let _ = write!(text, "{:.*}{after}", *decimals, f64::from(seconds));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stamps_round_the_exact_value() {
        let cases = [
            (0.0f32, "0.0"),
            (0.25, "0.2"),
            (0.75, "0.8"),
            (0.35, "0.3"),
            (0.05, "0.1"),
            (1.45, "1.5"),
            (0.125, "0.1"),
            (12.5, "12.5"),
            (3599.96, "3600.0"),
            (3599.95, "3599.9"),
        ];
        let prefix = FramePrefix::published();
        for (seconds, expected) in cases {
            assert_eq!(prefix.text(Some(seconds)), format!("<|frame|>{expected}"), "{seconds}");
        }
        assert_eq!(prefix.text(None), "<|frame|>");
    }

    #[test]
    fn templates_say_where_the_time_goes() {
        for (template, timed, untimed) in [
            ("<|frame|>{ts:.1f}", "<|frame|>2.5", "<|frame|>"),
            ("<{ts:.2f} seconds>", "<2.50 seconds>", ""),
            ("at {ts:.0f} s: <|frame|>", "at 2 s: <|frame|>", "<|frame|>"),
            ("<|frame|>", "<|frame|>", "<|frame|>"),
            ("", "", ""),
        ] {
            let prefix = FramePrefix::parse(template).unwrap();
            assert_eq!((&prefix.text(Some(2.5))[..], &prefix.text(None)[..]), (timed, untimed), "{template}");
        }
        assert_eq!(FramePrefix::parse("<|frame|>{ts:.1f}").unwrap(), FramePrefix::published());
        for wrong in ["{", "}", "{ts}", "{ts:.7f}", "{ts:.12f}", "{ts:.1f}{ts:.1f}", "{ts:.1f}}", "}{ts:.1f}", "{x}"] {
            let error = FramePrefix::parse(wrong).unwrap_err().to_string();
            assert!(error.contains("{ts:.Nf}"), "{wrong}: {error}");
        }
    }
}

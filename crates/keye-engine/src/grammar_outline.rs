//! What a Lark grammar consists of, seen before it is compiled: the compiler's own limits come too late for many
//! alternatives, and for definitions that lead to one another its messages grow with every step back.

use std::collections::HashMap;

use crate::EngineError;

/// Most alternatives in all: ten times what the parser takes of one rule.
const MOST_ALTERNATIVES: usize = 30_000;
/// Most definitions that lead to one another. A thousand with an error at the end take seconds, five thousand minutes.
const MOST_CHAINED: usize = 500;

/// Refuses what would be compiled for minutes.
///
/// # Errors
/// [`EngineError::Grammar`] with what there is too much of.
pub(crate) fn check(source: &str) -> Result<(), EngineError> {
    let outline = Outline::of(source);
    let refused = |message: String| Err(EngineError::Grammar(message));
    if outline.alternatives > MOST_ALTERNATIVES {
        return refused(format!(
            "it has {} alternatives, at most {MOST_ALTERNATIVES} are allowed; fixed texts can be asked for as a choice",
            outline.alternatives
        ));
    }
    let depth = outline.depth();
    if depth > MOST_CHAINED {
        return refused(format!(
            "its rules or terminals lead to one another {depth} deep, at most {MOST_CHAINED} are allowed; write some of \
             them where they are used"
        ));
    }
    Ok(())
}

#[derive(Default)]
struct Outline<'a> {
    alternatives: usize,
    /// Definitions by name, and for each the names in it, in order.
    numbers: HashMap<&'a str, usize>,
    names: Vec<Vec<&'a str>>,
}

impl<'a> Outline<'a> {
    /// Texts, expressions and comments are passed over; of what is no grammar, something.
    fn of(source: &'a str) -> Self {
        let mut outline = Self::default();
        let bytes = source.as_bytes();
        let (mut at, mut line_begins) = (0, true);
        while at < bytes.len() {
            let byte = bytes[at];
            match byte {
                b'"' => at = literal_end(bytes, at),
                b'/' if bytes.get(at + 1) == Some(&b'/') => at = line_end(bytes, at),
                b'#' => at = line_end(bytes, at),
                b'/' => at = literal_end(bytes, at),
                b'|' => {
                    outline.alternatives += 1;
                    at += 1;
                }
                b'\n' => at += 1,
                _ if is_name(byte) => {
                    let from = at;
                    while at < bytes.len() && (is_name(bytes[at]) || bytes[at].is_ascii_digit()) {
                        at += 1;
                    }
                    outline.name(&source[from..at], line_begins && defines(&bytes[at..]));
                }
                // `?rule` and `!rule` are definitions too.
                _ => at += 1,
            }
            line_begins = byte == b'\n' || (line_begins && matches!(byte, b' ' | b'\t' | b'\r' | b'?' | b'!'));
        }
        outline
    }

    fn name(&mut self, name: &'a str, defines: bool) {
        if defines {
            self.numbers.insert(name, self.names.len());
            self.names.push(Vec::new());
        } else if let Some(names) = self.names.last_mut() {
            names.push(name);
        }
    }

    /// Most definitions that are open at a time when each is compiled where it is first met, from `start` on.
    fn depth(&self) -> usize {
        let (mut met, mut deepest) = (vec![false; self.names.len()], 0);
        for first in self.numbers.get("start").copied().into_iter().chain(0..self.names.len()) {
            // Those that are open, each with how many of its names have been looked at.
            let mut open = Vec::new();
            if !std::mem::replace(&mut met[first], true) {
                open.push((first, 0));
            }
            while let Some((definition, looked)) = open.last_mut() {
                let next = self.names[*definition].get(*looked);
                *looked += 1;
                match next.map(|name| self.numbers.get(name)) {
                    None => _ = open.pop(),
                    Some(Some(&inner)) if !std::mem::replace(&mut met[inner], true) => open.push((inner, 0)),
                    Some(_) => {}
                }
                deepest = deepest.max(open.len());
            }
        }
        deepest
    }
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_'
}

/// Whether a name with this after it is being defined: a colon, before which may be a priority, attributes or parameters.
fn defines(after: &[u8]) -> bool {
    let line = after.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let mut inside = 0usize;
    for byte in line {
        match byte {
            b'[' | b'{' | b'(' => inside += 1,
            b']' | b'}' | b')' => inside = inside.saturating_sub(1),
            b':' if inside == 0 => return true,
            b'"' | b'/' | b'|' if inside == 0 => return false,
            _ => {}
        }
    }
    false
}

/// The place after the text or expression that begins at `at`; neither goes over the end of a line.
fn literal_end(bytes: &[u8], at: usize) -> usize {
    let mut end = at + 1;
    while end < bytes.len() && bytes[end] != b'\n' {
        match bytes[end] {
            b'\\' => end += 2,
            byte if byte == bytes[at] => return end + 1,
            _ => end += 1,
        }
    }
    end.min(bytes.len())
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |length| at + length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_expressions_and_comments_are_no_structure() {
        let source = "// a | b\nstart: \"x|\\\"|\" other | /a|\\/|b/ TERM # |\n  | [other] (TERM | TERM)\nother[lazy]: TERM+\n\
                      ?more.2: other\nTERM: \"\u{e4}|\" \"";
        let outline = Outline::of(source);
        assert_eq!(outline.alternatives, 3);
        let names: Vec<_> = ["start", "other", "more", "TERM"].iter().map(|name| outline.numbers[name]).collect();
        assert_eq!(names, [0, 1, 2, 3]);
        assert_eq!((outline.names[0].len(), outline.depth()), (5, 3), "start, other, TERM");
        for odd in ["", ":", "\"", "/", "a:\\", "\"\\", "a: b\u{e4}\nb: a"] {
            assert!(check(odd).is_ok(), "{odd:?}");
        }
    }

    #[test]
    fn hostile_forms_are_refused_by_name() {
        let chain = |n: usize, prefix: &str| {
            let links: Vec<String> = (0..n).map(|i| format!("{prefix}{i}: {prefix}{} | \"q{i}\"", i + 1)).collect();
            format!("start: {prefix}0\n{}\n{prefix}{n}: \"x\"", links.join("\n"))
        };
        for prefix in ["A", "a"] {
            assert!(check(&chain(MOST_CHAINED - 10, prefix)).is_ok());
            let deep = chain(9_000, prefix);
            let reversed: Vec<&str> = deep.lines().rev().collect();
            for source in [reversed.join("\n"), deep] {
                let error = check(&source).expect_err("deep").to_string();
                assert!(error.contains("9002 deep, at most 500 are allowed"), "{error}");
            }
        }
        // As many that do not lead to one another are no chain.
        let wide: Vec<String> = (0..9_000).map(|i| format!("A{i}: \"q{i}\"")).collect();
        assert!(check(&format!("start: A0 A1\n{}", wide.join("\n"))).is_ok());
        let many = vec!["\"a\""; 90_000].join(" | ");
        let error = check(&format!("start: {many}")).expect_err("many").to_string();
        assert!(error.contains("89999 alternatives, at most 30000 are allowed"), "{error}");
    }
}

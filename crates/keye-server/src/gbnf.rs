//! Grammars in GBNF (`root ::= "yes" | "no"`), as clients of vLLM and SGLang send them, to Lark.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::str::CharIndices;

/// The same grammar in Lark's notation; the reason why not.
///
/// Rules get new names, since theirs may have dashes and capitals, which Lark reads otherwise. What names lead nowhere is
/// told by who compiles the result.
pub(crate) fn to_lark(source: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut names = BTreeMap::from([("root".to_owned(), "start".to_owned())]);
    let mut chars = source.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '#' => while chars.next_if(|(_, c)| *c != '\n').is_some() {},
            '"' => out.push_str(&literal(enclosed(&mut chars, source, at, '"')?)),
            '[' => out.push_str(&format!("/{}/", enclosed(&mut chars, source, at, ']')?.replace('/', "\\/"))),
            '.' => out.push_str("/./"),
            '(' | ')' | '|' | '*' | '+' | '?' => out.push(c),
            '{' => out.push_str(enclosed(&mut chars, source, at, '}')?),
            c if c.is_whitespace() => out.push(' '),
            c if c.is_ascii_alphabetic() || c == '_' => {
                let mut end = at + 1;
                while let Some((at, _)) = chars.next_if(|(_, c)| c.is_ascii_alphanumeric() || "_-".contains(*c)) {
                    end = at + 1;
                }
                let count = names.len();
                let name = names.entry(source[at..end].to_owned()).or_insert_with(|| format!("rule_{count}"));
                if source[end..].trim_start().starts_with("::=") {
                    out.push_str(&format!("\n{name}: "));
                    while chars.next().is_some_and(|(_, c)| c != '=') {}
                } else {
                    out.push_str(name);
                }
            }
            _ => return Err(format!("{c:?} at byte {at} is no part of a grammar")),
        }
    }
    Ok(out)
}

/// The text from `at` on through the closing character, escaped ones left out.
fn enclosed<'a>(chars: &mut Peekable<CharIndices>, source: &'a str, at: usize, close: char) -> Result<&'a str, String> {
    while let Some((end, c)) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '\n' => break,
            c if c == close => return Ok(&source[at..end + c.len_utf8()]),
            _ => {}
        }
    }
    Err(format!("what begins at byte {at} is not closed by {close:?} on its line"))
}

/// Lark's escapes are those of JSON, which has no `\x41`.
fn literal(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(c);
        if c == '\\' {
            match chars.next() {
                Some('x') => out.push_str("u00"),
                Some(c) => out.push(c),
                None => {}
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_get_names_that_lark_knows() {
        let source = "root ::= Answer-1 (\",\" [a-z/]+)* # all\nAnswer-1 ::= \"y\\x65s\" |\n  \"\\\"[\" . {2,3}\n";
        let lark = to_lark(source).unwrap();
        assert_eq!(
            lark.split_whitespace().collect::<Vec<_>>().join(" "),
            r#"start: rule_1 ("," /[a-z\/]/+)* rule_1: "y\u0065s" | "\"[" /./ {2,3}"#
        );
        for wrong in ["root ::= \"open", "root ::= [a\n]", "root ::= <b>", "root ::= {1"] {
            assert!(to_lark(wrong).is_err(), "{wrong}");
        }
        assert_eq!(to_lark("").unwrap(), "");
    }
}

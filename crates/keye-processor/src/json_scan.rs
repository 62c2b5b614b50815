//! Where a json object ends in a text that comes in pieces.

/// Reads a json object once, however often more of it comes. Words and numbers are taken as they are written: whoever needs the
/// value parses it when it is whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct JsonScan {
    /// Bytes that were read.
    at: usize,
    /// Open brackets.
    open: Vec<u8>,
    expected: Expected,
}

/// What a text turned out to be.
#[derive(Debug, PartialEq)]
pub(crate) enum Scanned {
    /// It begins with an object, white space before it aside, that ends here.
    Whole(usize),
    /// It could go on as one.
    Open,
    /// It is none.
    Broken,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Expected {
    /// The object's bracket.
    #[default]
    Begin,
    Value,
    /// A value, or the end of a list that has none.
    ValueOrEnd,
    Key,
    /// A key, or the end of an object that has none.
    KeyOrEnd,
    Colon,
    CommaOrEnd,
    /// More of a string, which is a key or a value.
    String {
        key: bool,
    },
    /// What a backslash stands before.
    Escaped {
        key: bool,
    },
    /// More of a number or of `true`, `false`, `null`.
    Word,
    Nothing,
}

impl JsonScan {
    /// Reads on in `text`, which begins with what was read before.
    pub fn read(&mut self, text: &[u8]) -> Scanned {
        use Expected as E;
        while let Some(&byte) = text.get(self.at) {
            self.expected = match (self.expected, byte) {
                (E::Nothing, _) => return Scanned::Whole(self.at),
                (E::String { key }, b'"') => {
                    if key {
                        E::Colon
                    } else {
                        E::CommaOrEnd
                    }
                }
                (E::String { key }, b'\\') => E::Escaped { key },
                // Json writes them as escapes.
                (E::String { .. } | E::Escaped { .. }, 0..0x20) => return Scanned::Broken,
                (E::String { key } | E::Escaped { key }, _) => E::String { key },
                (E::Word, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'+' | b'-' | b'E') => E::Word,
                (E::Word, _) => {
                    self.expected = E::CommaOrEnd;
                    continue;
                }
                (expected, b' ' | b'\t' | b'\n' | b'\r') => expected,
                (E::Begin | E::Value | E::ValueOrEnd, b'{') => {
                    self.open.push(b'}');
                    E::KeyOrEnd
                }
                (E::Value | E::ValueOrEnd, b'[') => {
                    self.open.push(b']');
                    E::ValueOrEnd
                }
                (E::Value | E::ValueOrEnd, b'"') => E::String { key: false },
                (E::Value | E::ValueOrEnd, b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => E::Word,
                (E::Key | E::KeyOrEnd, b'"') => E::String { key: true },
                (E::Colon, b':') => E::Value,
                (E::CommaOrEnd, b',') => {
                    if self.open.last() == Some(&b'}') {
                        E::Key
                    } else {
                        E::Value
                    }
                }
                (E::CommaOrEnd | E::KeyOrEnd | E::ValueOrEnd, b'}' | b']') => {
                    if self.open.pop() != Some(byte) {
                        return Scanned::Broken;
                    }
                    if self.open.is_empty() { E::Nothing } else { E::CommaOrEnd }
                }
                _ => return Scanned::Broken,
            };
            self.at += 1;
        }
        if self.expected == E::Nothing { Scanned::Whole(self.at) } else { Scanned::Open }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_end_where_json_says() {
        for whole in [
            r#"{}"#,
            r#" {"a": [1, -2.5e+3, {"b": null}, [], "x\"]}\\", true], "c": ""}"#,
            r#"{"a":{"b":{}},"c":[[[]]]}"#,
        ] {
            serde_json::from_str::<serde_json::Value>(whole).unwrap();
            for behind in ["", "}", " x"] {
                let text = format!("{whole}{behind}");
                let mut scan = JsonScan::default();
                for end in 0..whole.len() {
                    assert_eq!(scan.read(&text.as_bytes()[..end]), Scanned::Open, "{}", &text[..end]);
                }
                assert_eq!(scan.read(text.as_bytes()), Scanned::Whole(whole.len()), "{text}");
            }
        }
        for broken in
            ["[", "x", "{x", "{,", r#"{"a" 1"#, r#"{"a":,"#, r#"{"a":1]"#, r#"{"a":[1}"#, "{\"a\n", r#"{"a":1,}"#]
        {
            assert_eq!(JsonScan::default().read(broken.as_bytes()), Scanned::Broken, "{broken}");
        }
    }
}

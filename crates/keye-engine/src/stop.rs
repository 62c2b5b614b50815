//! Stop strings in streamed text.

/// Lets text through that cannot be part of a stop string. Whatever the pieces in which the text comes, the answer ends
/// before the stop string that is completed first (of several that end at the same place, the longest).
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// Seen but not let through: the longest beginning of a stop string that the text ends with.
    held: String,
}

impl StopMatcher {
    /// Empty stop strings are refused earlier ([`crate::SamplingParams::validate`]).
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes new text; returns what may be shown, and whether a stop string is complete.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start)))
            .min();
        if let Some((_, start)) = first {
            let mut shown = std::mem::take(&mut self.held);
            shown.truncate(start);
            return (shown, true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, held), false)
    }

    /// The text is over: what was held back is text after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|len| {
            text.is_char_boundary(text.len() - len) && stop.as_bytes().starts_with(&text.as_bytes()[text.len() - len..])
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(&stops.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        let mut shown = Vec::new();
        for piece in pieces {
            let (text, stopped) = matcher.push(piece);
            shown.push(text);
            if stopped {
                return (shown, true);
            }
        }
        shown.push(matcher.finish());
        (shown, false)
    }

    #[test]
    fn holds_back_what_may_become_a_stop_string() {
        assert_eq!(run(&["END"], &["aE", "N", "x"]), (vec!["a".into(), "".into(), "ENx".into(), "".into()], false));
        assert_eq!(run(&["END"], &["aE", "N", "D more"]), (vec!["a".into(), "".into(), "".into()], true));
        assert_eq!(run(&["END"], &["aEN"]), (vec!["a".into(), "EN".into()], false));
        assert_eq!(run(&[], &["a"]), (vec!["a".into(), "".into()], false));
    }

    #[test]
    fn a_failed_match_may_contain_the_start_of_the_next() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "b!"]).0.concat(), "a");
        assert_eq!(run(&["\n\nQ"], &["x\n", "\n", "\nQ"]).0.concat(), "x\n");
    }

    #[test]
    fn every_way_to_cut_a_text_gives_the_same_answer() {
        for (stops, text, expected) in [
            (vec!["abcd", "bc"], "xabcd", "xa"),
            (vec!["bc", "abc"], "xabcd", "x"),
            (vec!["é結"], "caféé結果", "café"),
            (vec!["🙂🙂"], "a🙂b🙂🙂", "a🙂b"),
            (vec!["zz"], "caféé結果", "caféé結果"),
        ] {
            let chars: Vec<char> = text.chars().collect();
            for cuts in 0..1u32 << (chars.len() - 1) {
                let mut pieces = vec![String::new()];
                for (index, c) in chars.iter().enumerate() {
                    if index > 0 && cuts >> (index - 1) & 1 == 1 {
                        pieces.push(String::new());
                    }
                    pieces.last_mut().expect("one at least").push(*c);
                }
                let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
                let (shown, stopped) = run(&stops, &pieces);
                assert_eq!(shown.concat(), expected, "{stops:?} {pieces:?}");
                assert_eq!(stopped, expected != text);
            }
        }
    }
}

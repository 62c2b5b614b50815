//! Log probabilities of tokens in OpenAI's shapes.

use keye_engine::TokenLogprob;
use keye_processor::Tokenizer;
use serde_json::{Map, Value, json};

/// A token and how likely it was.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Likely {
    bytes: Vec<u8>,
    logprob: f32,
}

/// A generated token with those that could have been.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Logprob {
    chosen: Likely,
    top: Vec<Likely>,
}

/// OpenAI's smallest value: json has no minus infinity.
const LOWEST: f32 = -9999.0;

impl Logprob {
    pub fn new(tokenizer: &Tokenizer, id: u32, found: &TokenLogprob) -> Self {
        let likely = |id, logprob: f32| Likely {
            bytes: tokenizer.token_bytes(id),
            // Not a number compares as smaller here.
            logprob: logprob.max(LOWEST),
        };
        let top = found.top.iter().map(|(id, logprob)| likely(*id, *logprob)).collect();
        Self { chosen: likely(id, found.logprob), top }
    }

    /// Characters of its text.
    pub fn characters(&self) -> usize {
        self.chosen.text().chars().count()
    }

    /// An entry of `choices[].logprobs.content`.
    pub fn chat(&self) -> Value {
        let mut entry = self.chosen.chat();
        entry["top_logprobs"] = self.top.iter().map(Likely::chat).collect();
        entry
    }
}

impl Likely {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    fn chat(&self) -> Value {
        json!({"token": self.text(), "logprob": self.logprob, "bytes": self.bytes})
    }
}

/// `choices[].logprobs` of a completion; `offset` is that of the first token in the text, in characters.
pub(crate) fn completion(tokens: &[Logprob], mut offset: usize) -> Value {
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(offset);
        offset += token.characters();
    }
    let top = tokens.iter().map(|token| {
        let mut map = Map::new();
        // Broken characters look alike: the likeliest counts. The chosen token is always there, as OpenAI has it.
        for likely in token.top.iter().chain([&token.chosen]) {
            map.entry(likely.text()).or_insert_with(|| likely.logprob.into());
        }
        map
    });
    json!({
        "tokens": tokens.iter().map(|token| token.chosen.text()).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.chosen.logprob).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let of = |bytes: &[u8], logprob| Likely { bytes: bytes.to_vec(), logprob };
        let token = Logprob { chosen: of(b" a", -0.5), top: vec![of(b"\xe7", -0.25), of(b"\xe8", -0.75)] };
        let entry = json!({"token": " a", "logprob": -0.5, "bytes": [32, 97], "top_logprobs": [
            {"token": "\u{fffd}", "logprob": -0.25, "bytes": [231]},
            {"token": "\u{fffd}", "logprob": -0.75, "bytes": [232]}]});
        assert_eq!(token.chat(), entry);
        let top = json!({" a": -0.5, "\u{fffd}": -0.25});
        let both = json!({"tokens": [" a", " a"], "token_logprobs": [-0.5, -0.5], "text_offset": [3, 5],
                          "top_logprobs": [top, top]});
        assert_eq!(completion(&[token.clone(), token], 3), both);
    }
}

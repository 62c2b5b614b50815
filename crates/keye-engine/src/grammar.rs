//! Grammars to matchers that say which tokens may come next.

use std::sync::{Arc, OnceLock};

use keye_processor::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, earley::SlicedBiasComputer};
use serde_json::{Value, json};

use crate::constraint::brief;
use crate::{EngineError, Grammar, grammar_depth};

/// Longest grammar, in bytes of its source.
pub const MAX_GRAMMAR_BYTES: usize = 1 << 20;
/// White space between the parts of JSON: enough to be indented, and an answer cannot consist of it.
const JSON_SPACE: &str = r"[ \n]{0,24}";

/// Compiles grammars over one vocabulary. Its tree of tokens is built when the first grammar comes (up to two
/// seconds for 150,000 tokens).
pub(crate) struct GrammarCompiler {
    tokenizer: Tokenizer,
    end_tokens: Arc<[u32]>,
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl GrammarCompiler {
    pub fn new(tokenizer: Tokenizer, end_tokens: Arc<[u32]>) -> Self {
        Self { tokenizer, end_tokens, factory: OnceLock::new() }
    }

    /// A matcher at the beginning of the grammar.
    pub fn compile(&self, grammar: &Grammar) -> Result<Matcher, EngineError> {
        let factory = self.factory.get_or_init(|| factory(&self.tokenizer, &self.end_tokens));
        let factory = factory.as_ref().map_err(|error| EngineError::Grammar(error.clone()))?;
        let top_level = top_level(grammar)?;
        let compile = || {
            let mut matcher = Matcher::new(factory.create_parser(top_level));
            // What cannot even begin is told now.
            matcher.compute_mask().map_err(|error| EngineError::Grammar(beginning(&error)))?;
            Ok(matcher)
        };
        let thread = std::thread::Builder::new().name("keye-grammar".into()).stack_size(grammar_depth::stack(grammar)?);
        std::thread::scope(|scope| {
            let thread = thread.spawn_scoped(scope, compile);
            let thread = thread.map_err(|error| EngineError::Internal(format!("no thread for a grammar: {error}")))?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Why a grammar cannot begin.
fn beginning(error: &impl std::fmt::Display) -> String {
    match brief(error) {
        // What the compiler says when there is nothing to begin with.
        reason if reason.contains("NoExtensionBias") => {
            "no text satisfies it; a schema may refer to itself only with an object or array in between, a rule only with \
             text in between"
                .into()
        }
        reason => reason,
    }
}

fn factory(tokenizer: &Tokenizer, end_tokens: &[u32]) -> Result<ParserFactory, String> {
    // Added tokens such as <|im_end|> are no text: the marker keeps a grammar from spelling them.
    let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32)
        .map(|id| match tokenizer.is_special(id) || end_tokens.contains(&id) {
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], tokenizer.token_bytes(id).as_slice()].concat(),
            false => tokenizer.token_bytes(id),
        })
        .collect();
    let Some(end) = end_tokens.first() else {
        return Err("the checkpoint names no end token, so no answer of a given form can end".into());
    };
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, *end), &words).with_eos_tokens(end_tokens);
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::general_slices();
    let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
    let mut factory = factory.map_err(|error| brief(&error))?;
    factory.quiet();
    factory.limits_mut().verbose_errors = false;
    Ok(factory)
}

fn top_level(grammar: &Grammar) -> Result<TopLevelGrammar, EngineError> {
    let size = match grammar {
        Grammar::JsonObject => 0,
        Grammar::JsonSchema(schema) => schema.to_string().len(),
        Grammar::Regex(source) | Grammar::Lark(source) => source.len(),
        Grammar::Choice(choices) => choices.iter().map(String::len).sum(),
    };
    if size > MAX_GRAMMAR_BYTES {
        return Err(EngineError::Grammar(format!(
            "its source has {size} bytes, at most {MAX_GRAMMAR_BYTES} are allowed"
        )));
    }
    Ok(match grammar {
        Grammar::JsonObject => TopLevelGrammar::from_json_schema(spaced(json!({"type": "object"}))),
        Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(spaced(schema.clone())),
        Grammar::Regex(source) => TopLevelGrammar::from_regex(source),
        Grammar::Choice(choices) if choices.is_empty() || choices.iter().any(String::is_empty) => {
            return Err(EngineError::Grammar("a choice needs at least one text, and none may be empty".into()));
        }
        Grammar::Choice(choices) => {
            let choices: Vec<String> = choices.iter().map(|choice| Value::from(choice.as_str()).to_string()).collect();
            TopLevelGrammar::from_lark(format!("start: {}", choices.join(" | ")))
        }
        Grammar::Lark(source) => TopLevelGrammar::from_lark(source.clone()),
    })
}

/// A schema for `%json` of a Lark grammar, or by itself, whose white space is bounded unless it says otherwise itself.
pub fn spaced(mut schema: Value) -> Value {
    if let Value::Object(fields) = &mut schema {
        fields.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_SPACE}));
    }
    schema
}

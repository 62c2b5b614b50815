//! Grammars to matchers that say which tokens may come next.

use std::sync::{Arc, OnceLock};
use std::thread::Builder;
use std::time::Duration;

use keye_processor::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, earley::SlicedBiasComputer};
use serde_json::{Value, json};

use crate::constraint::brief;
use crate::detached::{Detached, Unfinished};
use crate::{EngineError, Grammar, grammar_depth, grammar_outline};

/// Longest grammar, in bytes of its source.
pub const MAX_GRAMMAR_BYTES: usize = 1 << 20;
/// Most texts of a choice. So many with a common beginning are compiled in about a second.
const MOST_CHOICES: usize = 50_000;
/// How long a grammar may be compiled: the largest that are of use take two or three seconds on a busy machine, and others'
/// grammars wait meanwhile.
const COMPILE_TIME: Duration = Duration::from_secs(10);
/// Grammars whose compiling goes on after it was given up, since nothing can stop it: each takes a processor core from the
/// model.
const MOST_ABANDONED: usize = 3;
/// White space between the parts of JSON: enough to be indented, and an answer cannot consist of it.
const JSON_SPACE: &str = r"[ \n]{0,24}";

/// Compiles grammars over one vocabulary. Its tree of tokens is built when the first grammar comes (up to two
/// seconds for 150,000 tokens).
pub(crate) struct GrammarCompiler {
    tokenizer: Tokenizer,
    end_tokens: Arc<[u32]>,
    factory: OnceLock<Result<Arc<ParserFactory>, String>>,
    threads: Detached,
}

impl GrammarCompiler {
    pub fn new(tokenizer: Tokenizer, end_tokens: Arc<[u32]>) -> Self {
        Self { tokenizer, end_tokens, factory: OnceLock::new(), threads: Detached::new(MOST_ABANDONED, COMPILE_TIME) }
    }

    #[cfg(test)]
    pub fn within(self, time: Duration) -> Self {
        Self { threads: Detached::new(MOST_ABANDONED, time), ..self }
    }

    /// A matcher at the beginning of the grammar. `give_up` is asked from time to time.
    ///
    /// # Errors
    /// [`EngineError::Grammar`] for what cannot be compiled, or not in time; [`EngineError::GrammarsBusy`];
    /// [`EngineError::Cancelled`] when given up.
    pub fn compile(&self, grammar: &Grammar, give_up: &dyn Fn() -> bool) -> Result<Matcher, EngineError> {
        let top_level = top_level(grammar)?;
        let stack = grammar_depth::stack(grammar)?;
        if give_up() {
            return Err(EngineError::Cancelled);
        }
        let factory = self.factory.get_or_init(|| factory(&self.tokenizer, &self.end_tokens).map(Arc::new));
        let factory = Arc::clone(factory.as_ref().map_err(|error| EngineError::Grammar(error.clone()))?);
        let end_tokens = Arc::clone(&self.end_tokens);
        let thread = Builder::new().name("keye-grammar".into()).stack_size(stack);
        match self.threads.run(thread, give_up, move || begin(&factory, top_level, &end_tokens)) {
            Ok(matcher) => matcher,
            Err(Unfinished::Late(time)) => Err(EngineError::Grammar(format!(
                "it was not compiled within {} s; give it fewer rules, properties or alternatives",
                time.as_secs_f64()
            ))),
            Err(Unfinished::GivenUp) => Err(EngineError::Cancelled),
            Err(Unfinished::Full(left)) => Err(EngineError::GrammarsBusy(left)),
            Err(Unfinished::NoThread(error)) => Err(EngineError::Internal(format!("no thread for a grammar: {error}"))),
        }
    }
}

fn begin(factory: &ParserFactory, top_level: TopLevelGrammar, end_tokens: &[u32]) -> Result<Matcher, EngineError> {
    let wrong = |error| EngineError::Grammar(beginning(&error));
    let mut matcher = Matcher::new(factory.create_parser(top_level));
    // What cannot even begin is told now. The parser counts what it may begin with only when it takes a token, which a copy
    // does here: an answer may think for long before it gets there.
    let mask = matcher.compute_mask().map_err(wrong)?;
    let first = (0..mask.len() as u32).find(|id| mask.is_allowed(*id) && !end_tokens.contains(id));
    if let Some(first) = first {
        matcher.clone().consume_token(first).map_err(wrong)?;
    }
    Ok(matcher)
}

/// Why a grammar cannot begin.
fn beginning(error: &impl std::fmt::Display) -> String {
    match brief(error) {
        reason if reason.contains("lexer precomputation failed") => {
            "its texts and expressions are too many or too long; give fewer or shorter ones".into()
        }
        reason if reason.starts_with("panic: ") => {
            "it is too large for the compiler; give it fewer rules, properties or alternatives".into()
        }
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
        Grammar::Choice(choices) if choices.len() > MOST_CHOICES => {
            let (found, most) = (choices.len(), MOST_CHOICES);
            return Err(EngineError::Grammar(format!("the choice has {found} texts, at most {most} are allowed")));
        }
        Grammar::Choice(choices) => {
            let choices: Vec<String> = choices.iter().map(|choice| Value::from(choice.as_str()).to_string()).collect();
            // One terminal: the parser takes no rule with thousands of alternatives.
            TopLevelGrammar::from_lark(format!("start: CHOICE\nCHOICE: {}", choices.join(" | ")))
        }
        Grammar::Lark(source) => {
            grammar_outline::check(source)?;
            TopLevelGrammar::from_lark(source.clone())
        }
    })
}

/// A schema for `%json` of a Lark grammar, or by itself, whose white space is bounded unless it says otherwise itself.
pub fn spaced(mut schema: Value) -> Value {
    if let Value::Object(fields) = &mut schema {
        fields.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_SPACE}));
    }
    schema
}

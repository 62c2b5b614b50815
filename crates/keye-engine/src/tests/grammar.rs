//! Answers of a given form, from logits that are noise.

use keye_processor::ThinkMode;
use serde_json::{Value, json};

use super::handle::{engine, processor, request};
use crate::constraint::Constraint;
use crate::fake::FakeRunner;
use crate::random::philox;
use crate::{Engine, EngineError, EngineOptions, Event, FinishReason, Grammar, Request, SamplingParams};

fn noisy(max_running: usize) -> Engine {
    let runner = FakeRunner::new(500, 64).with_vocabulary(processor().tokenizer.vocab_size());
    engine(runner, EngineOptions { max_running, speculation: 4, ..EngineOptions::default() })
}

fn ask(grammar: Grammar, seed: u64, max_tokens: usize) -> Request {
    let mut asked = request(vec![], "Hello", max_tokens);
    asked.sampling.ignore_eos = false;
    asked.sampling.temperature = 1.0;
    asked.sampling.seed = seed;
    Request { grammar: Some(grammar), think: ThinkMode::NoThink, ..asked }
}

/// The text and why it ended.
fn answer(engine: &Engine, asked: Request) -> Result<(String, FinishReason), EngineError> {
    for event in engine.submit(asked)? {
        match event {
            Event::Finished { text, reason, .. } => return Ok((text, reason)),
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
    panic!("a stream without an end");
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: usize) -> usize {
        self.0 += 1;
        philox([self.0 as u32, (self.0 >> 32) as u32, 0, 0], [8, 8])[0] as usize % n
    }
}

/// A schema that most answers get to the end of, and at most `depth` deep.
fn schema(dice: &mut Dice, depth: usize) -> Value {
    match dice.roll(if depth == 0 { 5 } else { 7 }) {
        0 => json!({"type": "integer", "minimum": -50, "maximum": 99}),
        1 => json!({"type": "boolean"}),
        2 => json!({"enum": ["red", "green \"x\"", 7, null]}),
        3 => json!({"type": "string", "maxLength": 6}),
        4 => json!({"const": "fixed"}),
        5 => {
            let least = dice.roll(3);
            json!({"type": "array", "items": schema(dice, depth - 1), "minItems": least, "maxItems": least + 2})
        }
        _ => {
            let names = ["a", "b c", "long_name"];
            let properties: serde_json::Map<String, Value> =
                names[..1 + dice.roll(3)].iter().map(|name| ((*name).into(), schema(dice, depth - 1))).collect();
            let required: Vec<&String> = properties.keys().collect();
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        }
    }
}

/// The rules of [`schema`].
fn satisfies(value: &Value, schema: &Value) -> bool {
    if let Some(expected) = schema.get("const") {
        return value == expected;
    }
    if let Some(allowed) = schema["enum"].as_array() {
        return allowed.contains(value);
    }
    match schema["type"].as_str() {
        // "-0" is read as a float.
        Some("integer") => value.as_f64().is_some_and(|v| v.fract() == 0.0 && (-50.0..=99.0).contains(&v)),
        Some("boolean") => value.is_boolean(),
        Some("string") => value.as_str().is_some_and(|v| v.chars().count() <= 6),
        Some("array") => value.as_array().is_some_and(|items| {
            let (least, most) = (schema["minItems"].as_u64(), schema["maxItems"].as_u64());
            least <= Some(items.len() as u64)
                && Some(items.len() as u64) <= most
                && items.iter().all(|item| satisfies(item, &schema["items"]))
        }),
        Some("object") => value.as_object().is_some_and(|fields| {
            let properties = schema["properties"].as_object().expect("a schema from here");
            fields.len() == properties.len()
                && properties.iter().all(|(name, schema)| fields.get(name).is_some_and(|v| satisfies(v, schema)))
        }),
        _ => false,
    }
}

#[test]
fn every_answer_that_ends_satisfies_its_schema() {
    let engine = noisy(8);
    let mut dice = Dice(1);
    let asked: Vec<(Value, u64)> = (0..400u64).map(|seed| (schema(&mut dice, 2), seed)).collect();
    let mut finished = 0;
    for group in asked.chunks(16) {
        let streams: Vec<_> = group
            .iter()
            .map(|(schema, seed)| engine.submit(ask(Grammar::JsonSchema(schema.clone()), *seed, 120)).expect("room"))
            .collect();
        for ((schema, _), stream) in group.iter().zip(streams) {
            for event in stream {
                match event {
                    Event::Finished { text, reason: FinishReason::Stop, .. } => {
                        let value =
                            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text:?} for {schema}"));
                        assert!(satisfies(&value, schema), "{text:?} for {schema}");
                        finished += 1;
                    }
                    Event::Failed(error) => panic!("{error} for {schema}"),
                    _ => {}
                }
            }
        }
    }
    assert!(finished > 200, "{finished} of 400 ended");
}

#[test]
fn expressions_choices_and_grammars_hold() {
    let engine = noisy(1);
    for seed in 0..60 {
        let (text, reason) = answer(&engine, ask(Grammar::Regex("[0-9]{2,5}(s|ms)".into()), seed, 30)).expect("fits");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_lowercase());
        assert_eq!(reason, FinishReason::Stop);
        assert!((2..=5).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit()), "{text:?}");
        assert!(["s", "ms"].contains(&&text[digits.len()..]), "{text:?}");
        let choices = ["yes".to_owned(), "no \"maybe\"".to_owned(), "ja \u{e4}\n".to_owned()];
        let (text, _) = answer(&engine, ask(Grammar::Choice(choices.to_vec()), seed, 30)).expect("fits");
        assert!(choices.contains(&text), "{text:?}");
        let lark = "start: \"<\" inner \">\"\ninner: /[ab]{1,3}/".to_owned();
        let (text, _) = answer(&engine, ask(Grammar::Lark(lark), seed, 30)).expect("fits");
        assert!(text.starts_with('<') && text.ends_with('>') && (3..=5).contains(&text.len()), "{text:?}");
    }
}

#[test]
fn a_grammar_that_cannot_be_is_refused() {
    let engine = noisy(1);
    for grammar in [
        Grammar::Regex("(".into()),
        Grammar::Choice(vec![]),
        Grammar::Lark("start: nothing".into()),
        Grammar::JsonSchema(json!({"type": "no such type"})),
        Grammar::Regex("x".repeat(2 << 20)),
    ] {
        let error = answer(&engine, ask(grammar.clone(), 1, 5)).expect_err("it cannot be compiled");
        assert!(matches!(error, EngineError::Grammar(_)), "{grammar:?}: {error}");
    }
    assert!(answer(&engine, ask(Grammar::JsonObject, 1, 5)).is_ok());
}

/// Rules and references that lead to one another would take the process with them, or a thread for hours.
#[test]
fn deep_grammars_are_compiled_or_refused() {
    let engine = noisy(1);
    let rules = |n: usize| {
        let links: Vec<String> = (0..n).map(|i| format!("a{i}: a{}", i + 1)).collect();
        Grammar::Lark(format!("start: a0\n{}\na{n}: \"x\"", links.join("\n")))
    };
    let references = |n: usize, around: usize| {
        let mut defs = serde_json::Map::new();
        for i in 0..n {
            let mut link = json!({"$ref": format!("#/$defs/a{}", i + 1)});
            for _ in 0..around {
                link = json!({"type": "object", "properties": {"x": link}, "required": ["x"]});
            }
            defs.insert(format!("a{i}"), link);
        }
        defs.insert(format!("a{n}"), json!({"const": "x"}));
        Grammar::JsonSchema(json!({"$ref": "#/$defs/a0", "$defs": defs}))
    };
    assert_eq!(answer(&engine, ask(rules(490), 1, 5)).expect("compiled").0, "x");
    assert_eq!(answer(&engine, ask(references(2_000, 0), 1, 5)).expect("compiled").0, "\"x\"");
    assert!(answer(&engine, ask(references(300, 20), 1, 5)).is_ok());
    let patterns: serde_json::Map<_, _> = (0..300).map(|i| (format!("^a{i}$"), json!(true))).collect();
    let patterns = json!({"type": "object", "patternProperties": patterns});
    let inside = Grammar::Lark(format!("start: call\ncall: %json {patterns}\n"));
    let patterns = Grammar::JsonSchema(patterns);
    for grammar in [rules(20_000), references(9_000, 0), references(1_000, 20), patterns, inside] {
        let error = answer(&engine, ask(grammar, 1, 5)).expect_err("refused");
        assert!(matches!(&error, EngineError::Grammar(reason) if reason.contains("at most")), "{error}");
    }
}

/// `n` texts with a common beginning, the second of which begins as the first is.
fn texts(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("text {i} \"{}\"/\n", i * 7919 % n)).chain(["te".into(), "tea".into()]).collect()
}

#[test]
fn a_choice_may_have_thousands_of_texts() {
    let engine = noisy(1);
    let choices = texts(20_000);
    for seed in 0..5 {
        let (text, reason) = answer(&engine, ask(Grammar::Choice(choices.clone()), seed, 60)).expect("fits");
        assert!(choices.contains(&text) && reason == FinishReason::Stop, "{text:?}");
    }
    let asked = Request { max_reasoning_tokens: Some(3), ..ask(Grammar::Choice(choices.clone()), 1, 90) };
    let (text, _) = answer(&engine, Request { think: ThinkMode::Auto, ..asked }).expect("fits");
    let parts = keye_processor::parse_answer(&text);
    assert!(choices.contains(&text) || choices.iter().any(|text| text.trim() == parts.answer), "{text:?}");
    let many = (0..90_000).map(|i| i.to_string()).collect();
    let error = answer(&engine, ask(Grammar::Choice(many), 1, 5)).expect_err("too many").to_string();
    assert!(error.contains("the choice has 90000 texts, at most 50000 are allowed"), "{error}");
}

/// What the parser cannot take is told when the request comes, not where the answer begins after its thinking.
#[test]
fn a_rule_with_too_many_alternatives_is_refused_before_the_first_token() {
    let engine = noisy(1);
    let alternatives: Vec<String> = (0..3_000).map(|i| format!("\"q{i}\"")).collect();
    let rule = Grammar::Lark(format!("start: {}", alternatives.join(" | ")));
    let mut opened = ask(rule, 1, 50);
    opened.raw_prompt = Some("<|im_start|>assistant\n<think>\n".into());
    let events: Vec<Event> = engine.submit(opened).expect("room").collect();
    let told = matches!(events.last(), Some(Event::Failed(EngineError::Grammar(why))) if why.contains("3001 items"));
    assert!(told && !events.iter().any(|event| matches!(event, Event::Token { .. })), "{events:?}");
    let terminal = Grammar::Lark(format!("start: Q\nQ: {}", alternatives.join(" | ")));
    assert!(answer(&engine, ask(terminal, 1, 50)).expect("fits").0.starts_with('q'));
}

/// A schema that takes about a second to compile, several on a busy machine.
fn slow() -> Grammar {
    let properties: serde_json::Map<_, _> = (0..3_000).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
    Grammar::JsonSchema(json!({"type": "object", "properties": properties}))
}

#[test]
fn compiling_ends_when_its_time_is_over_or_nobody_waits() {
    let processor = processor();
    let end_tokens: std::sync::Arc<[u32]> = processor.generation.eos_token_id.iter().copied().collect();
    let compiler = crate::grammar::GrammarCompiler::new(processor.tokenizer.clone(), end_tokens);
    let compiler = compiler.within(std::time::Duration::from_millis(30));
    let small = Grammar::Choice(vec!["a".into()]);
    // A busy machine may take its time with this, too.
    assert!((0..50).any(|_| compiler.compile(&small, &|| false).is_ok()));
    let begun = std::time::Instant::now();
    let late = compiler.compile(&slow(), &|| false).err().map(|error| error.to_string());
    assert_eq!(late.as_deref().map(|why| why.contains("not compiled within 0.03 s")), Some(true), "{late:?}");
    assert!(matches!(compiler.compile(&slow(), &|| true), Err(EngineError::Cancelled)));
    let errors: Vec<EngineError> = (0..4).filter_map(|_| compiler.compile(&slow(), &|| false).err()).collect();
    assert!(matches!(errors.last(), Some(EngineError::GrammarsBusy(3))), "{errors:?} in {:?}", begun.elapsed());
    let cut = begun.elapsed();
    while compiler.compile(&small, &|| false).is_err() {
        assert!(begun.elapsed().as_secs() < 300, "never free again, given up after {cut:?}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_slow_grammar_holds_up_neither_others_nor_the_end() {
    let engine = noisy(4);
    let stream = engine.submit(ask(slow(), 1, 5)).expect("room");
    let begun = std::time::Instant::now();
    assert_eq!(answer(&engine, ask(Grammar::Choice(vec!["a".into()]), 1, 5)).expect("compiled").0, "a");
    assert_eq!(engine.stats().waiting, 1, "the slow one is still being compiled");
    drop(stream);
    super::handle::wait_for(|| engine.stats().waiting == 0);
    let freed = begun.elapsed();
    let _slow = [1, 2].map(|seed| engine.submit(ask(slow(), seed, 5)).expect("room"));
    std::thread::sleep(std::time::Duration::from_millis(30));
    let begun = std::time::Instant::now();
    drop(engine);
    let dropped = begun.elapsed();
    // What these take alone.
    let processor = processor();
    let end_tokens: std::sync::Arc<[u32]> = processor.generation.eos_token_id.iter().copied().collect();
    let compiler = crate::grammar::GrammarCompiler::new(processor.tokenizer.clone(), end_tokens);
    let compiler = compiler.within(std::time::Duration::from_secs(300));
    let begun = std::time::Instant::now();
    let error = compiler.compile(&slow(), &|| false).err().map(|error| error.to_string());
    assert!(error.as_ref().is_some_and(|why| why.contains("items")), "{error:?}");
    let alone = begun.elapsed();
    assert!(freed < alone && dropped < alone / 2, "{freed:?}, {dropped:?} of {alone:?}");
}

#[test]
fn the_grammar_begins_after_the_thinking_and_a_budget_closes_that() {
    let engine = noisy(4);
    let (mut thought, mut plain) = (0, 0);
    for seed in 0..40 {
        let mut asked = ask(Grammar::Regex("[a-c]{1,4}".into()), seed, 200);
        asked.think = ThinkMode::Auto;
        asked.max_reasoning_tokens = Some(7);
        let (text, reason) = answer(&engine, asked).expect("fits");
        assert_eq!(reason, FinishReason::Stop, "{text:?}");
        let parts = keye_processor::parse_answer(&text);
        assert!((1..=4).contains(&parts.answer.len()) && parts.answer.bytes().all(|b| b"abc".contains(&b)), "{text:?}");
        if parts.thinking.is_some() || parts.analysis.is_some() { thought += 1 } else { plain += 1 }
    }
    assert!(thought > 0 && plain > 0, "{thought} thought, {plain} did not");
    // The prompt has opened the tag already.
    let mut opened = ask(Grammar::Choice(vec!["done".into()]), 3, 200);
    opened.raw_prompt = Some("<|im_start|>assistant\n<think>\n".into());
    opened.max_reasoning_tokens = Some(0);
    assert_eq!(answer(&engine, opened).expect("fits").0, "</think>done");
}

/// Tags in somebody else's words are no thinking of the model's, in which a form would not hold.
#[test]
fn the_words_of_others_open_no_thinking() {
    let engine = noisy(1);
    let words = "What would an assistant say inside <think>, or <analysis>?";
    let raw = Request { raw_prompt: Some(words.into()), ..ask(Grammar::Choice(vec!["done".into()]), 1, 50) };
    let mut chat = request(vec![], words, 50);
    chat.template.add_generation_prompt = false;
    let chat = Request { conversation: chat.conversation, template: chat.template, raw_prompt: None, ..raw.clone() };
    for asked in [raw, chat] {
        assert_eq!(answer(&engine, asked).expect("fits"), ("done".to_owned(), FinishReason::Stop));
    }
}

#[test]
fn texts_of_a_form_are_the_answer_as_they_are() {
    let engine = noisy(1);
    let quoting = "\"<think>x</think> </answer>\" ";
    let mut asked = ask(Grammar::Choice(vec![quoting.into()]), 1, 50);
    for opened in [false, true] {
        if opened {
            asked.raw_prompt = Some("<|im_start|>assistant\n<think>\n".into());
            asked.max_reasoning_tokens = Some(0);
        }
        let last = engine.submit(asked.clone()).expect("room").last();
        let Some(Event::Finished { answer, .. }) = last else { panic!("{last:?}") };
        assert_eq!((answer.answer.as_str(), answer.analysis), (quoting, None));
        assert!(answer.thinking.unwrap_or_default().is_empty());
    }
}

#[test]
fn a_schema_that_is_nothing_but_itself_is_refused_with_the_reason() {
    let engine = noisy(1);
    for grammar in [
        Grammar::JsonSchema(json!({"$ref": "#"})),
        Grammar::JsonSchema(json!({"allOf": [{"$ref": "#"}]})),
        Grammar::JsonSchema(json!({
            "oneOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        })),
        Grammar::Lark("start: start".into()),
    ] {
        let error = answer(&engine, ask(grammar.clone(), 1, 5)).expect_err("nothing satisfies it").to_string();
        assert!(error.contains("refer to itself only with an object or array in between"), "{grammar:?}: {error}");
    }
    let tree = json!({"type": "array", "items": {"$ref": "#"}, "maxItems": 1});
    assert!(answer(&engine, ask(Grammar::JsonSchema(tree), 1, 50)).is_ok());
}

/// What a mask costs over a vocabulary of real size: run with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn a_mask_over_150_000_tokens() {
    let path = super::handle::fixture().join("model/tokenizer.json");
    let mut file: Value = serde_json::from_slice(&std::fs::read(path).expect("a fixture")).expect("json");
    let mut dice = Dice(5);
    let vocabulary = file["model"]["vocab"].as_object_mut().expect("a vocabulary");
    let mut next = 1000;
    while vocabulary.len() < 151_000 {
        let word: String = (0..1 + dice.roll(9)).map(|_| char::from(b'!' + dice.roll(94) as u8)).collect();
        let space = ["", "\u{120}", "\u{120}\u{120}", "\u{10a}"][dice.roll(4)];
        vocabulary.entry(format!("{space}{word}")).or_insert_with(|| {
            next += 1;
            next.into()
        });
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).expect("written");
    let tokenizer = keye_processor::Tokenizer::load(folder.path()).expect("a tokenizer");
    let end = tokenizer.token_to_id("<|im_end|>").expect("a fixture's");
    let compiler = crate::grammar::GrammarCompiler::new(tokenizer.clone(), std::sync::Arc::new([end]));
    let schema = json!({"type": "object", "properties": {
        "title": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}},
        "score": {"type": "number"}, "kind": {"enum": ["clip", "photo"]}
    }, "required": ["title", "tags", "score", "kind"]});
    for (name, grammar) in [
        ("first grammar", Grammar::Choice(vec!["yes".into(), "no".into()])),
        ("json object", Grammar::JsonObject),
        ("json schema", Grammar::JsonSchema(schema)),
        ("expression", Grammar::Regex("[A-Za-z ]{3,200}[.]".into())),
    ] {
        let start = std::time::Instant::now();
        let mut matcher = compiler.compile(&grammar, &|| false).expect("a grammar");
        let compiled = start.elapsed();
        let (mut times, mut tokens) = (Vec::new(), 0);
        while !matcher.is_stopped() && tokens < 200 {
            let start = std::time::Instant::now();
            let mask = matcher.compute_mask().expect("no error");
            times.push(start.elapsed());
            let allowed: Vec<u32> = (0..mask.len() as u32).filter(|id| mask.is_allowed(*id)).collect();
            matcher.consume_token(allowed[dice.roll(allowed.len())]).expect("allowed");
            tokens += 1;
        }
        let (count, median, worst) = spread(times);
        println!("{name}: compiled in {compiled:?}; {count} masks, median {median:?}, worst {worst:?}");
        // All that a token costs the step's thread, beside the same without a grammar.
        let matcher = compiler.compile(&grammar, &|| false).expect("a grammar");
        let end_tokens = std::sync::Arc::from([end]);
        let mut constraint =
            Constraint::new(tokenizer.clone(), Some(matcher), end_tokens, ThinkMode::NoThink, "", None);
        let params = SamplingParams { temperature: 1.0, top_k: 20, top_p: 0.9, ..SamplingParams::default() };
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for step in 0..200 {
            let mut logits: Vec<f32> = (0..tokenizer.vocab_size()).map(|_| dice.roll(1000) as f32 / 100.0).collect();
            let mut free = logits.clone();
            let start = std::time::Instant::now();
            crate::sample(&mut free, &params, &[], &[], step);
            without.push(start.elapsed());
            let start = std::time::Instant::now();
            constraint.restrict(&mut logits).expect("a way on");
            let token = crate::sample(&mut logits.clone(), &params, &[], &[], step);
            let over = constraint.push(token).expect("allowed");
            with.push(start.elapsed());
            if over {
                break;
            }
        }
        let ((count, median, worst), (_, free, _)) = (spread(with), spread(without));
        println!("{name}: {count} tokens, median {median:?}, worst {worst:?}; without a grammar median {free:?}");
    }
}

/// Number, median and largest.
fn spread(mut times: Vec<std::time::Duration>) -> (usize, std::time::Duration, std::time::Duration) {
    times.sort();
    (times.len(), times[times.len() / 2], times[times.len() - 1])
}

//! How deep compiling a grammar may call itself, told before it is compiled: the compiler's own limits do not see rules
//! and references that lead to one another, and a stack that overflows takes the whole process with it.

use std::collections::HashSet;

use serde_json::Value;

use crate::{EngineError, Grammar};

/// Most levels: a thousand definitions that lead to one another, each thirty deep.
const MOST_LEVELS: usize = 30_000;
/// Most patterns of `patternProperties` in all. The compiler compares every two, and each comparison copies all.
const MOST_PATTERNS: usize = 128;
/// Stack of a level: twice what the deepest of rules, tokens, groups, references and nested objects took.
const LEVEL_STACK: usize = 8 << 10;
/// Stack that any grammar gets.
const LEAST_STACK: usize = 4 << 20;

/// Bytes of stack with which the grammar can be compiled.
///
/// # Errors
/// [`EngineError::Grammar`] for more levels or patterns than any sensible grammar has.
pub(crate) fn stack(grammar: &Grammar) -> Result<usize, EngineError> {
    let levels = match grammar {
        Grammar::JsonObject | Grammar::Regex(_) | Grammar::Choice(_) => 0,
        Grammar::JsonSchema(schema) => levels_of_schema(schema)?,
        // Rules, and what is in brackets; the schemas of `%json` have a colon for every reference.
        Grammar::Lark(source) => {
            for (at, tag) in source.match_indices("%json") {
                let mut schemas = serde_json::Deserializer::from_str(&source[at + tag.len()..]).into_iter::<Value>();
                if let Some(Ok(schema)) = schemas.next() {
                    levels_of_schema(&schema)?;
                }
            }
            source.bytes().filter(|byte| b":([{".contains(byte)).count()
        }
    };
    if levels > MOST_LEVELS {
        let message =
            format!("its rules or references can lead to one another {levels} deep, at most {MOST_LEVELS} are allowed");
        return Err(EngineError::Grammar(message));
    }
    Ok(LEAST_STACK + levels * LEVEL_STACK)
}

/// Every reference is followed once, as deep as the schema is nested.
fn levels_of_schema(schema: &Value) -> Result<usize, EngineError> {
    let (mut references, mut patterns, mut deepest) = (HashSet::new(), 0, 0);
    let mut left = vec![(schema, 1)];
    while let Some((value, depth)) = left.pop() {
        deepest = deepest.max(depth);
        match value {
            Value::Array(list) => left.extend(list.iter().map(|value| (value, depth + 1))),
            Value::Object(fields) => {
                for (name, value) in fields {
                    match (name.as_str(), value) {
                        ("$ref" | "$dynamicRef", Value::String(target)) => _ = references.insert(target),
                        ("patternProperties", Value::Object(properties)) => patterns += properties.len(),
                        _ => {}
                    }
                    left.push((value, depth + 1));
                }
            }
            _ => {}
        }
    }
    if patterns > MOST_PATTERNS {
        let message = format!("the schema has {patterns} patternProperties, at most {MOST_PATTERNS} are allowed");
        return Err(EngineError::Grammar(message));
    }
    Ok((references.len() + 1) * deepest)
}

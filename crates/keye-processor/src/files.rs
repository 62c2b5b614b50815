//! The fields of small json files, with errors that name file and field.

use std::path::Path;

use serde_json::{Map, Value};

use crate::ProcessorError;

/// Ceiling for configuration files; published ones have a few kilobytes.
pub(crate) const CONFIG_BYTES: u64 = 4 << 20;
/// Ceiling for vocabularies; Qwen3's tokenizer.json has 11 MB.
pub(crate) const VOCABULARY_BYTES: u64 = 256 << 20;

/// A damaged file: `reason` says field, expected and found.
pub(crate) fn file_error(path: &Path, reason: impl Into<String>) -> ProcessorError {
    ProcessorError::File { path: path.to_owned(), reason: reason.into() }
}

/// What a json value is, for messages: its type, and the value itself when it is short.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(v) => v.to_string(),
        Value::Number(v) => v.to_string(),
        Value::String(v) if v.chars().count() <= 40 => format!("{v:?}"),
        Value::String(_) => "a string".into(),
        Value::Array(v) => format!("a list of {}", v.len()),
        Value::Object(_) => "an object".into(),
    }
}

/// The fields of a json object in a file. A field that is null counts as absent.
#[derive(Clone)]
pub(crate) struct Fields<'a> {
    path: &'a Path,
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The whole file.
    pub(crate) fn of(path: &'a Path, value: &'a Value) -> Result<Self, ProcessorError> {
        match value {
            Value::Object(map) => Ok(Self { path, prefix: String::new(), map }),
            other => Err(file_error(path, format!("expected an object, found {}", describe(other)))),
        }
    }

    /// An error about field `name`.
    pub(crate) fn error(&self, name: &str, reason: impl std::fmt::Display) -> ProcessorError {
        file_error(self.path, format!("{}{name}: {reason}", self.prefix))
    }

    /// The field, if it is there.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    fn wrong(&self, name: &str, expected: &str, found: &Value) -> ProcessorError {
        self.error(name, format_args!("expected {expected}, found {}", describe(found)))
    }

    fn typed<T>(
        &self,
        name: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ProcessorError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| self.wrong(name, expected, value)),
        }
    }

    /// A nested object.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ProcessorError> {
        let map = self.typed(name, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields { path: self.path, prefix: format!("{}{name}.", self.prefix), map }))
    }

    /// True or false.
    pub(crate) fn bool(&self, name: &str) -> Result<Option<bool>, ProcessorError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// Text.
    pub(crate) fn str(&self, name: &str) -> Result<Option<&'a str>, ProcessorError> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A list.
    pub(crate) fn list(&self, name: &str) -> Result<Option<&'a Vec<Value>>, ProcessorError> {
        self.typed(name, "a list", Value::as_array)
    }

    /// A whole number in `range`; `2.0` counts as one.
    pub(crate) fn uint(&self, name: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>, ProcessorError> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.typed(name, &expected, |v| whole(v).filter(|n| range.contains(n)))
    }

    /// [`Self::uint`] that must be there unless there is a default.
    pub(crate) fn size(&self, name: &str, max: usize, default: Option<usize>) -> Result<usize, ProcessorError> {
        let found = self.uint(name, 1..=max as u64)?.map(|n| n as usize);
        found.or(default).ok_or_else(|| self.error(name, "missing"))
    }

    /// A finite number in `range`.
    pub(crate) fn number(
        &self,
        name: &str,
        range: std::ops::RangeInclusive<f64>,
    ) -> Result<Option<f64>, ProcessorError> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.typed(name, &expected, |v| v.as_f64().filter(|n| range.contains(n)))
    }

    /// Token ids below `vocab`: one, or a list of them. Empty when absent.
    pub(crate) fn tokens(&self, name: &str, vocab: u64) -> Result<Vec<u32>, ProcessorError> {
        let expected = format!("a token id below {vocab}, or a list of them");
        let id = |v: &Value| whole(v).filter(|n| *n < vocab).and_then(|n| u32::try_from(n).ok());
        let ids = self.typed(name, &expected, |v| match v {
            Value::Array(list) if list.len() <= 64 => list.iter().map(id).collect::<Option<Vec<_>>>(),
            one => id(one).map(|n| vec![n]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}

/// A json number that is a whole, not negative number.
pub(crate) fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        // Above 2^53 a double no longer says which whole number was meant.
        value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..=9.0e15).contains(f)).map(|f| f as u64)
    })
}

//! Fields of a json body, read by name. Null is as good as absent; errors name the field.

use serde_json::{Map, Value};

use crate::error::ApiError;

pub(crate) struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The body itself.
    pub fn of(value: &'a Value) -> Result<Self, ApiError> {
        let map = value.as_object().ok_or_else(|| ApiError::invalid("body", "the body has to be a json object"))?;
        Ok(Self(map))
    }

    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(ApiError::invalid(name, format!("{name}: expected {expected}, found {}", kind(value)))),
            },
        }
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", Value::as_bool)
    }

    pub fn number(&self, name: &str) -> Result<Option<f32>, ApiError> {
        self.read(name, "a number", |value| value.as_f64().map(|n| n as f32))
    }

    /// Clients of Python send `1.0` where 1 is meant.
    pub fn whole(&self, name: &str) -> Result<Option<i64>, ApiError> {
        self.read(name, "a whole number", whole)
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.read(name, "a string", Value::as_str)
    }

    pub fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.read(name, "an object", Value::as_object)
    }

    /// One string or a list of them.
    pub fn strings(&self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        self.read(name, "a string or a list of strings", |value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(list) => list.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
            _ => None,
        })
    }

    pub fn token_ids(&self, name: &str) -> Result<Option<Vec<u32>>, ApiError> {
        self.read(name, "a list of token ids", token_ids)
    }
}

/// A list of token ids.
pub(crate) fn token_ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| u32::try_from(whole(id)?).ok()).collect()
}

fn whole(value: &Value) -> Option<i64> {
    // Above 2^53 a float is no longer one whole number.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    value.as_i64().or_else(|| value.as_u64().map(|n| n as i64)).or_else(|| {
        let n = value.as_f64()?;
        (n.fract() == 0.0 && n.abs() <= EXACT).then_some(n as i64)
    })
}

/// What a value is, without its content.
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "a boolean".into(),
        Value::Number(n) => n.to_string(),
        Value::String(_) => "a string".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// Reads json that a stranger sent. The number of values is counted before they are built: a body of `[[],[],...` would take
/// thirty times its size in memory.
pub(crate) fn parse(body: &[u8]) -> Result<Value, ApiError> {
    const MOST_VALUES: usize = 1_000_000;
    let (mut values, mut in_string, mut escaped) = (0usize, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    if values > MOST_VALUES {
        let message = format!("the body has more than {MOST_VALUES} json values");
        return Err(ApiError::invalid("body", message));
    }
    serde_json::from_slice(body).map_err(|error| ApiError::invalid("body", format!("the body is not json: {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_by_name() {
        let body = json!({"a": 1.0, "b": "x", "c": null, "d": ["x", "y"], "e": [1.0, 2], "f": true, "g": 1.5, "h": -1});
        let fields = Fields::of(&body).unwrap();
        assert_eq!((fields.whole("a").unwrap(), fields.whole("h").unwrap()), (Some(1), Some(-1)));
        assert_eq!(fields.strings("b").unwrap(), Some(vec!["x".to_owned()]));
        assert_eq!(fields.bool("c").unwrap(), None);
        assert_eq!(fields.strings("d").unwrap().unwrap().len(), 2);
        assert_eq!(fields.token_ids("e").unwrap(), Some(vec![1, 2]));
        assert_eq!(fields.number("g").unwrap(), Some(1.5));
        for error in [
            fields.whole("g").unwrap_err(),
            fields.string("g").unwrap_err(),
            fields.token_ids("g").unwrap_err(),
            fields.object("g").unwrap_err(),
        ] {
            assert_eq!((error.param.as_deref(), error.status.as_u16()), (Some("g"), 400));
        }
    }

    #[test]
    fn json_bombs() {
        let wide = format!("[{}]", vec!["[]"; 600_000].join(","));
        assert!(parse(wide.as_bytes()).unwrap_err().message.contains("json values"));
        let deep = "[".repeat(100_000);
        assert!(parse(deep.as_bytes()).unwrap_err().message.contains("not json"));
        let text = format!("{{\"a\": \"{}\\\"\"}}", ",[{".repeat(500_000));
        assert!(parse(text.as_bytes()).is_ok(), "commas in strings are text");
    }
}

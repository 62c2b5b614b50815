//! What a rendering may take, and all that a chat template can call, each charging what it will take before it begins.
//!
//! A unit is about a byte made, or sixteen read. Filters, tests and functions that no published chat template uses are not
//! there: what is not there needs no bound.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, filters, functions, tests};

use crate::python_json::python_json;

// The checks before instructions; no template can call names like these.
pub(crate) const ADD: &str = "check +";
pub(crate) const MULTIPLY: &str = "check *";
pub(crate) const CONCAT: &str = "check ~";
pub(crate) const COMPARE: &str = "check ==";
pub(crate) const CONTAINS: &str = "check in";
pub(crate) const ITEM: &str = "check [i]";
pub(crate) const SET: &str = "check set";
pub(crate) const SLICE: &str = "check [:]";
pub(crate) const ROW: &str = "check row";
pub(crate) const KEPT: &str = "check kept";

/// Ceiling of the rendered text, several times the longest context of the family, and of every text on the way to it.
pub(crate) const TEXT_BYTES: usize = 16 << 20;
/// What one rendering may take: a gigabyte would fit no answer's share of a machine.
const UNITS: u64 = 512 << 20;
/// All text put out, with what macros collect and put out again.
const EMITTED_BYTES: u64 = 4 * TEXT_BYTES as u64;
/// Most things in one list that a template makes.
const LIST_ITEMS: usize = 1 << 20;
/// Deepest value that a template makes or prints; json of a request is at most 128 deep.
const DEPTH: usize = 200;
/// Widest indentation of json.
const INDENT: usize = 64;
/// Bytes of a value in a list.
const ITEM_BYTES: usize = 24;

fn refused(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// What is left of a rendering's units.
#[derive(Debug)]
struct Budget {
    left: AtomicU64,
    emitted: AtomicU64,
}

impl Object for Budget {}

fn budget(state: &State) -> Arc<Budget> {
    let new = || Budget { left: AtomicU64::new(UNITS), emitted: AtomicU64::new(0) };
    state.get_or_set_temp_object("budget", new)
}

fn charge(state: &State, units: usize) -> Result<(), Error> {
    let spent = budget(state).left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        left.checked_sub(units as u64).and_then(|left| left.checked_sub(1))
    });
    spent
        .map(drop)
        .map_err(|_| Error::new(ErrorKind::OutOfFuel, "the template makes or reads more than any prompt needs"))
}

fn emit(state: &State, bytes: usize) -> Result<(), Error> {
    charge(state, bytes)?;
    if budget(state).emitted.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64 > EMITTED_BYTES {
        return Err(too_long());
    }
    Ok(())
}

/// The error of a rendering that does not end.
pub(crate) fn too_long() -> Error {
    refused(format!("the prompt is longer than {TEXT_BYTES} bytes"))
}

/// A value written out.
#[derive(Default)]
struct Size {
    bytes: usize,
    /// Spaces in front of its parts, were each level one deeper.
    indents: usize,
}

/// Measures a value with all that is in it, as often as it is in it.
fn size(state: &State, value: &Value) -> Result<Size, Error> {
    fn walk(state: &State, value: &Value, depth: usize, size: &mut Size) -> Result<(), Error> {
        let text = value.as_str().map_or(0, str::len);
        charge(state, 4 + text / 16)?;
        size.bytes += text + 8;
        size.indents += depth;
        if size.bytes > TEXT_BYTES {
            return Err(refused(format!("a value is longer than {TEXT_BYTES} bytes")));
        }
        let Some(object) = value.as_object() else { return Ok(()) };
        if depth == DEPTH {
            return Err(refused(format!("a value is nested deeper than {DEPTH}")));
        }
        if is_namespace(value) {
            return Err(refused("a namespace cannot be put into a value or printed"));
        }
        match object.repr() {
            ObjectRepr::Seq | ObjectRepr::Iterable => {
                for item in object.try_iter().into_iter().flatten() {
                    walk(state, &item, depth + 1, size)?;
                }
            }
            ObjectRepr::Map => {
                for (key, item) in object.try_iter_pairs().into_iter().flatten() {
                    walk(state, &key, depth + 1, size)?;
                    walk(state, &item, depth + 1, size)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
    let mut found = Size::default();
    walk(state, value, 0, &mut found)?;
    Ok(found)
}

/// The engine's own: a namespace inside of itself would never be freed.
fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// Things in a list, or in what is like one.
fn items(value: &Value) -> Result<usize, Error> {
    let count = match value.len() {
        Some(count) => count,
        None => value.try_iter()?.take(LIST_ITEMS + 1).count(),
    };
    if count > LIST_ITEMS {
        return Err(refused(format!("a list has more than {LIST_ITEMS} items")));
    }
    Ok(count)
}

/// Bytes of a text or of a list itself, without what is in it.
fn shallow(value: &Value) -> Result<usize, Error> {
    match value.as_str() {
        Some(text) => Ok(text.len()),
        None if value.as_object().is_some_and(|o| !matches!(o.repr(), ObjectRepr::Plain)) => {
            Ok(items(value)? * ITEM_BYTES)
        }
        None => Ok(8),
    }
}

/// Lists that are made as they are read become lists: they would nest, and be made again whenever they are read.
fn row(state: &State, value: Value) -> Result<Value, Error> {
    match value.as_object().map(|object| object.repr()) {
        Some(ObjectRepr::Iterable) => {
            charge(state, items(&value)? * ITEM_BYTES)?;
            Ok(Value::from(value.try_iter()?.collect::<Vec<_>>()))
        }
        _ => Ok(value),
    }
}

/// A text that would have `bytes`.
fn text(state: &State, bytes: usize) -> Result<(), Error> {
    if bytes > TEXT_BYTES {
        return Err(refused(format!("a text is longer than {TEXT_BYTES} bytes")));
    }
    charge(state, bytes)
}

fn shown(state: &State, value: &Value) -> Result<usize, Error> {
    match value.as_str() {
        Some(text) => Ok(text.len()),
        None => size(state, value).map(|size| size.bytes),
    }
}

fn add(state: &State, a: &Value, b: &Value) -> Result<(), Error> {
    match (a.as_str(), b.as_str()) {
        (Some(a), Some(b)) => text(state, a.len().saturating_add(b.len())),
        _ if a.as_object().is_some() && b.as_object().is_some() => {
            let count = items(a)? + items(b)?;
            if count > LIST_ITEMS {
                return Err(refused(format!("a list has more than {LIST_ITEMS} items")));
            }
            charge(state, count)
        }
        _ => charge(state, 1),
    }
}

fn multiply(state: &State, a: &Value, b: &Value) -> Result<(), Error> {
    for (many, times) in [(a, b), (b, a)] {
        let times = times.as_usize().unwrap_or(0);
        if let Some(repeated) = many.as_str() {
            text(state, repeated.len().saturating_mul(times))?;
        } else if many.as_object().is_some() && items(many)?.max(1).saturating_mul(times) > LIST_ITEMS {
            return Err(refused(format!("a list has more than {LIST_ITEMS} items")));
        }
    }
    charge(state, 1)
}

fn compare(state: &State, a: &Value, b: &Value) -> Result<(), Error> {
    match (a.as_str(), b.as_str()) {
        (Some(a), Some(b)) => charge(state, a.len().min(b.len()) / 16),
        _ if a.as_object().is_some() && b.as_object().is_some() => {
            size(state, a)?;
            size(state, b).map(drop)
        }
        _ => charge(state, 1),
    }
}

fn contains(state: &State, needle: &Value, all: &Value) -> Result<(), Error> {
    if let Some(all) = all.as_str() {
        return charge(state, all.len() / 16 + shown(state, needle)?);
    }
    match all.as_object().map(|object| object.repr()) {
        Some(ObjectRepr::Seq | ObjectRepr::Iterable) if needle.as_object().is_some() => size(state, all).map(drop),
        Some(ObjectRepr::Seq | ObjectRepr::Iterable) => {
            let each = 1 + needle.as_str().map_or(0, str::len) / 16;
            charge(state, items(all)?.saturating_mul(each))
        }
        _ => charge(state, shallow(needle)? / 16),
    }
}

fn item(state: &State, from: &Value, _: &Value) -> Result<(), Error> {
    charge(state, from.as_str().map_or(0, str::len) / 16)
}

fn set(state: &State, value: &Value, _: &Value) -> Result<(), Error> {
    match value.as_object() {
        Some(_) => size(state, value).map(drop),
        None => charge(state, 1),
    }
}

/// What a filter or a method may take, by its operands.
fn charge_call(state: &State, name: &str, args: &[Value]) -> Result<(), Error> {
    let Some((first, rest)) = args.split_first() else { return charge(state, 1) };
    let argument = |i: usize| rest.get(i).and_then(Value::as_str).map_or(0, str::len);
    match name {
        "length" | "count" | "first" | "last" | "default" | "d" | "int" | "float" | "abs" | "round" | "bool"
        | "safe" | "attr" | "get" | "startswith" | "endswith" | "find" | "rfind" => {
            charge(state, first.as_str().map_or(0, str::len) / 16 + argument(0) / 16)
        }
        "replace" => {
            let from = first.as_str().map_or(0, str::len);
            text(state, (from / argument(0).max(1) + 1).saturating_mul(argument(1)).saturating_add(from))
        }
        "join" => {
            // The method has the text between on the left.
            let (list, between) = match first.as_str() {
                Some(between) if !rest.is_empty() && rest[0].as_str().is_none() => (&rest[0], between.len()),
                _ => (first, argument(0)),
            };
            let between = items(list)?.saturating_mul(between);
            text(state, size(state, list)?.bytes.saturating_add(between))
        }
        "list" | "split" | "splitlines" => charge(state, shallow(first)?.saturating_mul(ITEM_BYTES)),
        "tojson" | "string" | "sort" | "unique" | "min" | "max" | "dictsort" | "map" | "select" | "reject"
        | "selectattr" | "rejectattr" => {
            for value in args.iter().filter(|value| !value.is_kwargs()) {
                charge(state, shown(state, value)?)?;
            }
            Ok(())
        }
        // Letters may become three.
        _ => {
            for value in args {
                charge(state, shallow(value)?.saturating_mul(3))?;
            }
            Ok(())
        }
    }
}

/// Python's methods of texts, lists and maps.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let refused = |why: &str| Err(refused(format!("{name}: {why}")));
    match (name, value.as_str()) {
        ("count", Some(_)) if args.first().and_then(Value::as_str) == Some("") => {
            return refused("expected a text that is not empty");
        }
        ("format", Some(pattern)) => {
            if pattern.as_bytes().windows(4).any(|four| four.iter().all(u8::is_ascii_digit)) {
                return refused("expected widths below 1000, found another");
            }
            let mut each = 1000;
            for arg in args {
                each += size(state, arg)?.bytes;
            }
            text(state, (pattern.matches('{').count() + 1).saturating_mul(each).saturating_add(pattern.len()))?;
        }
        _ => {}
    }
    let all: Vec<Value> = [value.clone()].into_iter().chain(args.iter().cloned()).collect();
    charge_call(state, name, &all)?;
    row(state, minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)?)
}

fn format(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => Ok(out.write_str("None")?),
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::Undefined => Ok(()),
        _ => {
            emit(state, shown(state, value)?)?;
            Ok(write!(out, "{value}")?)
        }
    }
}

/// `tojson` as transformers defines it.
fn to_json(state: &State, value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = match positional.first() {
        Some(first) if first.is_none() => None,
        Some(first) => Some(usize::try_from(first.clone())?),
        None => kwargs.get("indent")?,
    };
    let (sort_keys, _ascii): (Option<bool>, Option<bool>) = (kwargs.get("sort_keys")?, kwargs.get("ensure_ascii")?);
    kwargs.assert_all_used()?;
    let found = size(state, value)?;
    // A control character becomes six; a node of json has several times its text.
    charge(state, found.bytes.saturating_mul(8).saturating_add(found.indents.saturating_mul(indent.unwrap_or(0))))?;
    let mut json = serde_json::to_value(value).map_err(failed)?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let text = match indent {
        None => python_json(&json).map_err(failed)?,
        Some(n) if n <= INDENT => {
            let indent = vec![b' '; n];
            let mut out = Vec::new();
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&indent);
            serde::Serialize::serialize(&json, &mut serde_json::Serializer::with_formatter(&mut out, pretty))
                .map_err(failed)?;
            String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?
        }
        Some(n) => return Err(refused(format!("tojson: indent {n} is above {INDENT}"))),
    };
    Ok(Value::from_safe_string(text))
}

fn indent(state: &State, value: &str, width: Option<usize>, first: Option<bool>) -> Result<String, Error> {
    let width = width.unwrap_or(4);
    if width > INDENT {
        return Err(refused(format!("indent: {width} is above {INDENT}")));
    }
    text(state, value.len().saturating_add((value.matches('\n').count() + 1).saturating_mul(width)))?;
    let space = " ".repeat(width);
    let mut out = String::new();
    for (i, line) in value.split('\n').enumerate() {
        out.push_str(if i == 0 { "" } else { "\n" });
        if !line.is_empty() && (i > 0 || first == Some(true)) {
            out.push_str(&space);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Everything that a template can reach.
pub(crate) fn environment() -> Environment<'static> {
    let mut environment = Environment::empty();
    environment.set_unknown_method_callback(method);
    environment.set_formatter(format);
    environment.add_function("raise_exception", |message: String| -> Result<(), Error> { Err(refused(message)) });
    environment.add_function("range", functions::range);
    add_made(&mut environment, "namespace", Value::from_function(functions::namespace));
    add_made(&mut environment, "dict", Value::from_function(functions::dict));

    add_check(&mut environment, ADD, add);
    add_check(&mut environment, MULTIPLY, multiply);
    add_check(&mut environment, CONCAT, |state, a, b| text(state, shown(state, a)?.saturating_add(shown(state, b)?)));
    add_check(&mut environment, COMPARE, compare);
    add_check(&mut environment, CONTAINS, contains);
    add_check(&mut environment, ITEM, item);
    add_check(&mut environment, SET, set);
    let slice = |state: &State, from: Value, start: Value, stop: Value, step: Value| -> Result<Value, Error> {
        charge(state, shallow(&from)?)?;
        // The engine fails on an empty list that is turned round, and makes an empty list of nothing.
        let from = if from.len() == Some(0) && from.as_str().is_none() { Value::UNDEFINED } else { from };
        Ok(Value::from(vec![step, stop, start, from]))
    };
    environment.add_function(SLICE, slice);
    environment.add_function(ROW, row);
    environment.add_function(KEPT, |state: &State, value: Value| size(state, &value).map(|_| value));

    for (name, filter) in [
        ("abs", Value::from_function(filters::abs)),
        ("attr", Value::from_function(filters::attr)),
        ("bool", Value::from_function(filters::bool)),
        ("capitalize", Value::from_function(filters::capitalize)),
        ("count", Value::from_function(filters::length)),
        ("d", Value::from_function(filters::default)),
        ("default", Value::from_function(filters::default)),
        ("dictsort", Value::from_function(filters::dictsort)),
        ("first", Value::from_function(filters::first)),
        ("float", Value::from_function(filters::float)),
        ("int", Value::from_function(filters::int)),
        ("items", Value::from_function(filters::items)),
        ("join", Value::from_function(filters::join)),
        ("last", Value::from_function(filters::last)),
        ("length", Value::from_function(filters::length)),
        ("list", Value::from_function(filters::list)),
        ("lower", Value::from_function(filters::lower)),
        ("map", Value::from_function(filters::map)),
        ("max", Value::from_function(filters::max)),
        ("min", Value::from_function(filters::min)),
        ("reject", Value::from_function(filters::reject)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
        ("replace", Value::from_function(filters::replace)),
        ("reverse", Value::from_function(filters::reverse)),
        ("round", Value::from_function(filters::round)),
        ("safe", Value::from_function(filters::safe)),
        ("select", Value::from_function(filters::select)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("sort", Value::from_function(filters::sort)),
        ("string", Value::from_function(filters::string)),
        ("title", Value::from_function(filters::title)),
        ("trim", Value::from_function(filters::trim)),
        ("unique", Value::from_function(filters::unique)),
        ("upper", Value::from_function(filters::upper)),
    ] {
        environment.add_filter(name, move |state: &State, args: Rest<Value>| -> Result<Value, Error> {
            charge_call(state, name, &args)?;
            row(state, filter.call(state, &args)?)
        });
    }
    environment.add_filter("tojson", to_json);
    environment.add_filter("indent", indent);
    add_tests(&mut environment);
    environment
}

fn add_check(
    environment: &mut Environment,
    name: &'static str,
    check: impl Fn(&State, &Value, &Value) -> Result<(), Error> + Send + Sync + 'static,
) {
    environment.add_function(name, move |state: &State, a: Value, b: Value| -> Result<Value, Error> {
        check(state, &a, &b)?;
        // Unpacked, the first comes to lie on top.
        Ok(Value::from(vec![b, a]))
    });
}

/// A function that makes a value of its arguments.
fn add_made(environment: &mut Environment, name: &'static str, function: Value) {
    environment.add_function(name, move |state: &State, args: Rest<Value>| -> Result<Value, Error> {
        args.iter().try_for_each(|arg| size(state, arg).map(drop))?;
        function.call(state, &args)
    });
}

fn add_tests(environment: &mut Environment) {
    environment.add_test("undefined", tests::is_undefined);
    environment.add_test("defined", tests::is_defined);
    environment.add_test("none", tests::is_none);
    environment.add_test("boolean", tests::is_boolean);
    environment.add_test("odd", tests::is_odd);
    environment.add_test("even", tests::is_even);
    environment.add_test("divisibleby", tests::is_divisibleby);
    environment.add_test("number", tests::is_number);
    environment.add_test("integer", tests::is_integer);
    environment.add_test("float", tests::is_float);
    environment.add_test("string", tests::is_string);
    environment.add_test("sequence", tests::is_sequence);
    environment.add_test("iterable", tests::is_iterable);
    environment.add_test("mapping", tests::is_mapping);
    environment.add_test("true", tests::is_true);
    environment.add_test("false", tests::is_false);
    let equal = |state: &State, a: &Value, b: &Value| compare(state, a, b).map(|()| a == b);
    let unequal = |state: &State, a: &Value, b: &Value| compare(state, a, b).map(|()| a != b);
    for name in ["eq", "equalto", "==", "sameas"] {
        environment.add_test(name, equal);
    }
    for name in ["ne", "!="] {
        environment.add_test(name, unequal);
    }
    type Order = fn(&Value, &Value) -> bool;
    for (names, order) in [
        (["gt", "greaterthan", ">"], (|a, b| a > b) as Order),
        (["ge", "gte", ">="], |a, b| a >= b),
        (["lt", "lessthan", "<"], |a, b| a < b),
        (["le", "lte", "<="], |a, b| a <= b),
    ] {
        for name in names {
            environment
                .add_test(name, move |state: &State, a: &Value, b: &Value| compare(state, a, b).map(|()| order(a, b)));
        }
    }
    environment.add_test("in", |state: &State, value: &Value, all: &Value| {
        contains(state, value, all)?;
        tests::is_in(state, value, all)
    });
}

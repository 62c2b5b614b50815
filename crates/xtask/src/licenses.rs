//! Licences, sources and documentation of dependencies.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Licences under which a dependency may be used.
const ALLOWED: [&str; 13] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "NCSA",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
    // The list of certificate authorities, which is data.
    "CDLA-Permissive-2.0",
];
/// Packages that may have a further licence, and why.
const EXCEPTIONS: [(&str, &str); 1] = [
    // Used unchanged, which is all that MPL-2.0 asks for; a dependency of `dirs`.
    ("option-ext", "MPL-2.0"),
];
/// System libraries, C code and second HTTP stacks that must not come in unnoticed.
const BANNED: [&str; 6] = ["native-tls", "onig", "onig_sys", "openssl", "openssl-sys", "reqwest"];
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

pub fn check(root: &Path) -> Result<Vec<String>, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let metadata =
        crate::output(Command::new(cargo).args(["metadata", "--format-version", "1", "--locked"]).current_dir(root))?;
    let metadata: Value = serde_json::from_slice(&metadata).map_err(|e| format!("cargo metadata: {e}"))?;
    let page = root.join("docs/dependencies.md");
    let page = std::fs::read_to_string(&page).map_err(|e| format!("{}: {e}", page.display()))?;
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    if packages.is_empty() {
        return Err("cargo metadata lists no packages".into());
    }
    let mut complaints = Vec::new();
    let mut direct = BTreeSet::new();
    for package in packages {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        let (name, version) = (text("name"), text("version"));
        let Some(source) = package["source"].as_str() else {
            // A member of the workspace.
            let dependencies = package["dependencies"].as_array().map(Vec::as_slice).unwrap_or_default();
            let others = dependencies.iter().filter(|dependency| !dependency["source"].is_null());
            direct.extend(others.filter_map(|dependency| dependency["name"].as_str()));
            continue;
        };
        if source != CRATES_IO {
            complaints.push(format!("{name} {version}: expected to come from crates.io, comes from {source}"));
        }
        if BANNED.contains(&name) {
            complaints.push(format!("{name} {version} is banned; `cargo tree -i {name}` says who wants it"));
        }
        let allowed = |license: &str| ALLOWED.contains(&license) || EXCEPTIONS.contains(&(name, license));
        if satisfiable(text("license"), &allowed) != Ok(true) {
            complaints.push(format!("{name} {version}: licence {:?} is not one that we may use", text("license")));
        }
    }
    let rows: BTreeSet<&str> = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    for name in direct.difference(&rows) {
        complaints.push(format!("docs/dependencies.md: no row for {name}"));
    }
    for name in rows.difference(&direct) {
        complaints.push(format!("docs/dependencies.md: {name} has a row but is no direct dependency"));
    }
    Ok(complaints)
}

/// Whether the SPDX expression can be satisfied with allowed licences; `A/B` is the old form of `A OR B`.
fn satisfiable(expression: &str, allowed: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let result = any(&mut words, allowed)?;
    match words.next() {
        None => Ok(result),
        Some(word) => Err(format!("unexpected {word}")),
    }
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words<'_>, allowed: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let mut result = all(words, allowed)?;
    while words.next_if_eq(&"OR").is_some() {
        result |= all(words, allowed)?;
    }
    Ok(result)
}

fn all(words: &mut Words<'_>, allowed: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let mut result = one(words, allowed)?;
    while words.next_if_eq(&"AND").is_some() {
        result &= one(words, allowed)?;
    }
    Ok(result)
}

fn one(words: &mut Words<'_>, allowed: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    match words.next() {
        Some("(") => {
            let result = any(words, allowed)?;
            words.next_if_eq(&")").ok_or("expected )")?;
            Ok(result)
        }
        None | Some("OR" | "AND" | "WITH" | ")") => Err("expected a licence".into()),
        Some(license) => {
            // An exception only grants more.
            if words.next_if_eq(&"WITH").is_some() {
                words.next().ok_or("expected an exception")?;
            }
            Ok(allowed(license))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        let found = |expression| satisfiable(expression, &|license| ["MIT", "ISC"].contains(&license));
        for expression in
            ["MIT", "GPL-3.0 OR MIT", "GPL-3.0/MIT", "MIT AND ISC", "(GPL-3.0 OR MIT) AND ISC", "MIT WITH X"]
        {
            assert_eq!(found(expression), Ok(true), "{expression}");
        }
        for expression in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND GPL-3.0", "GPL-3.0 OR MIT AND GPL-2.0"] {
            assert_eq!(found(expression), Ok(false), "{expression}");
        }
        for expression in ["", "MIT OR", "(MIT", "MIT ISC", "AND MIT", "MIT)"] {
            assert!(found(expression).is_err(), "{expression}");
        }
    }
}

//! README.md tells what the program takes from its environment, and how it exits.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::support::keye;

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        match entry.extension() {
            _ if entry.is_dir() => sources(&entry, found),
            Some(extension) if extension == "rs" => found.push(entry),
            _ => {}
        }
    }
}

#[test]
fn every_variable_is_in_the_readme() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let mut files = Vec::new();
    for crate_dir in std::fs::read_dir(root.join("crates")).unwrap() {
        let source = crate_dir.unwrap().path().join("src");
        if source.is_dir() {
            sources(&source, &mut files);
        }
    }
    let mut names = BTreeSet::new();
    for text in files.iter().map(|path| std::fs::read_to_string(path).unwrap()) {
        // Names stand alone between quotes.
        let words = text.split('"').filter(|word| ["KEYE_", "HF_", "OTEL_"].iter().any(|head| word.starts_with(head)));
        let whole = |word: &&str| word.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
        names.extend(words.filter(whole).map(str::to_owned));
    }
    assert!(names.contains("KEYE_ISA") && names.contains("HF_HUB_CACHE") && names.len() > 9, "{names:?}");
    let missing: Vec<_> = names.iter().filter(|name| !readme.contains(&format!("`{name}"))).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let help = keye(&["--help"]).ok().stdout;
    for (code, meaning) in [(0, "done"), (3, "the model cannot be loaded"), (130, "interrupted")] {
        assert!(readme.contains(&format!("| {code} | {meaning}")), "{code}");
        assert!(help.lines().any(|line| line.trim() == format!("{code:<4} {meaning}")), "{help}");
    }
    assert!(help.contains("KEYE_FFMPEG") && help.contains("README.md"), "{help}");
}

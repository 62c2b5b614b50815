//! What is tracked: its size, and that nothing in it points out of it.

use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// Bytes of all tracked files.
const TOTAL_BYTES: u64 = 36_000_000;
/// Bytes of `fixtures/`.
const FIXTURE_BYTES: u64 = 16_000_000;

pub fn check(root: &Path) -> Result<Vec<String>, String> {
    let files = crate::output(Command::new("git").args(["ls-files", "-z"]).current_dir(root))?;
    let files = String::from_utf8(files).map_err(|_| "git ls-files: a name is not UTF-8")?;
    let here = root.to_string_lossy();
    let (mut total, mut fixtures, mut complaints) = (0, 0, Vec::new());
    for name in files.split_terminator('\0') {
        let path = root.join(name);
        let Ok(metadata) = path.symlink_metadata() else {
            complaints.push(format!("{name}: tracked but not there"));
            continue;
        };
        if metadata.is_symlink() {
            let target = std::fs::read_link(&path).map_err(|e| format!("{name}: {e}"))?;
            if inside(Path::new(name), &target).is_none() {
                complaints.push(format!("{name}: links to {}, outside the repository", target.display()));
            }
            continue;
        }
        total += metadata.len();
        fixtures += if name.starts_with("fixtures/") { metadata.len() } else { 0 };
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        if text.contains(&*here) {
            complaints.push(format!("{name}: names {here}, where the repository lies on this machine"));
        }
        if name.ends_with(".md") {
            for target in links(&text) {
                if !inside(Path::new(name), Path::new(target)).is_some_and(|target| root.join(target).exists()) {
                    complaints.push(format!("{name}: links to {target}, which is not in the repository"));
                }
            }
        }
    }
    for (what, bytes, limit) in [("tracked files", total, TOTAL_BYTES), ("fixtures", fixtures, FIXTURE_BYTES)] {
        println!("{what}: {:.1} of {:.0} MB", bytes as f64 / 1e6, limit as f64 / 1e6);
        if bytes > limit {
            complaints.push(format!("{what}: expected at most {limit} bytes, found {bytes}"));
        }
    }
    Ok(complaints)
}

/// `target`, as seen from `file`, relative to the root; `None` if that is outside.
fn inside(file: &Path, target: &Path) -> Option<PathBuf> {
    let mut path = file.parent()?.to_owned();
    for component in target.components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::ParentDir if path.pop() => {}
            _ => return None,
        }
    }
    Some(path)
}

/// Targets of Markdown links to files, without anchors and titles.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let mut code = false;
    let lines = text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    });
    let targets = lines.flat_map(|line| line.split("](").skip(1)).filter_map(|rest| rest.split([')', ' ', '#']).next());
    targets.filter(|target| !target.is_empty() && !target.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside() {
        let from = |target| inside(Path::new("docs/a.md"), Path::new(target));
        assert_eq!(from("spec/b.md"), Some("docs/spec/b.md".into()));
        assert_eq!(from("../README.md"), Some("README.md".into()));
        assert_eq!(from("../../x"), None);
        assert_eq!(from("/x"), None);
    }

    #[test]
    fn links_of_a_page() {
        let page = "[a](b.md#c) and [d](https://e) [f](#g)\n```\n[h](i)\n```\n![j](k.png \"l\")";
        assert_eq!(links(page).collect::<Vec<_>>(), ["b.md", "k.png"]);
    }
}

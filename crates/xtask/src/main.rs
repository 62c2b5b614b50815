//! Checks of the repository itself: `cargo run --release -q -p xtask -- licenses`, and `tree`.

mod licenses;
mod tree;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let check = std::env::args().nth(1);
    let complaints = match check.as_deref() {
        Some("licenses") => licenses::check(&root()),
        Some("tree") => tree::check(&root()),
        _ => Err("usage: xtask licenses|tree".into()),
    };
    let complaints = complaints.unwrap_or_else(|error| vec![error]);
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    if complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// What a command prints.
fn output(command: &mut Command) -> Result<Vec<u8>, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

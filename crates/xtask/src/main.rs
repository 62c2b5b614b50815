//! Checks of the repository itself: `cargo run --release -q -p xtask -- licenses`, `tree`, and `kernels`.

mod kernels;
mod licenses;
mod tree;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let complaints = match args.first().map(String::as_str) {
        Some("licenses") => licenses::check(&root()),
        Some("kernels") => kernels::check(&root(), &args[1..]),
        Some("tree") => tree::check(&root()),
        _ => Err("usage: xtask licenses|tree|kernels".into()),
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

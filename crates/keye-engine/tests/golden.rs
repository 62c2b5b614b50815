//! The engine against recorded data and a real checkpoint's files.

#[path = "golden/company.rs"]
mod company;
#[path = "golden/sampling.rs"]
mod sampling;

use std::path::PathBuf;

/// `fixtures/` of the repository.
fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

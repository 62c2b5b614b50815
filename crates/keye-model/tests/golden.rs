//! The models against the golden data, patches fed from the files: `fixtures/README.md`.

#[path = "golden/cases.rs"]
mod cases;
#[path = "golden/invariance.rs"]
mod invariance;
#[path = "golden/support.rs"]
mod support;

//! The models against the golden data, patches fed from the files: `fixtures/README.md`.

#[path = "golden/cases.rs"]
mod cases;
#[path = "golden/invariance.rs"]
mod invariance;
#[path = "golden/keye_2.rs"]
mod keye_2;
#[path = "golden/support.rs"]
mod support;

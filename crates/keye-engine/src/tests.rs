//! Tests of the whole engine with a fake model.

mod grammar;
mod handle;
mod harness;
mod random;
mod worker;

//! Tests of the whole engine with a fake model.

mod grammar;
mod handle;
mod random;
mod worker;

//! Tests of the whole engine with a fake model.

mod handle;
mod worker;

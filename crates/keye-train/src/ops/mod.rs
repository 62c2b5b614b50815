//! The operations of the models and their reverses, on plain rows of f32.
//!
//! Every sum has an order that depends on shapes alone, so results do not depend on the number of threads.

pub(crate) mod attention;
pub(crate) mod heads;
pub(crate) mod kernels;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod rows;

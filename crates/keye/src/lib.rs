//! Keye-VL.

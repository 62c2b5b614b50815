//! Three-axis positions of a prompt (spec §6.2).

//! Numbers as people read them.

/// Bytes in the unit that suits them: `2.5 MB`, `17.35 GB`.
pub fn bytes_text(bytes: u64) -> String {
    match bytes as f64 {
        b if b < 1e3 => format!("{b:.0} B"),
        b if b < 1e6 => format!("{:.1} kB", b / 1e3),
        b if b < 1e9 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.2} GB", b / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_sizes_are_not_zero_of_a_large_unit() {
        assert_eq!([7, 1500, 2_500_000, 17_350_000_000].map(bytes_text), ["7 B", "1.5 kB", "2.5 MB", "17.35 GB"]);
    }
}

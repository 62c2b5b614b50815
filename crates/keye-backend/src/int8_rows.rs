//! Rows of the cache in eight bits: `value = code * scale`, a scale for each head's key and value of a token.

/// The scale of a row, and the factor of its values that gives their codes.
pub(crate) fn scale(row: &[f32]) -> (f32, f32) {
    let largest = row.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    let scale = largest / 127.0;
    (scale, if scale > 0.0 { 1.0 / scale } else { 0.0 })
}

/// The code of a value; what is too large takes the largest.
pub(crate) fn code(value: f32, factor: f32) -> i8 {
    (value * factor).round_ties_even() as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_off_by_half_a_step_at_most() {
        let rows: [&[f32]; 4] = [&[0.0; 4], &[1.0, -0.5, 0.3, -1.0], &[1e-30, -3e-31], &[3e38, -1e38, 2e37]];
        for row in rows {
            let (scale, factor) = scale(row);
            for value in row {
                let found = f32::from(code(*value, factor)) * scale;
                assert!((found - value).abs() <= 0.5001 * scale, "{row:?}: {found} for {value}");
            }
        }
    }
}

//! Rotary angles. Both towers rotate the halves of a head; they differ only in which position turns which frequency, so
//! each makes a table of angles per row and the backend applies it.

/// `theta^(-2j/width)` for `j < width/2`.
fn frequencies(theta: f64, width: usize) -> Vec<f32> {
    (0..width / 2).map(|j| theta.powf(-2.0 * j as f64 / width as f64) as f32).collect()
}

/// Cosines and sines per row `[rows, 2 * frequencies]`, angle j of a row being `positions[axis[j]] * frequency[j]`.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    frequency: Vec<f32>,
    axis: Vec<usize>,
}

impl Rope {
    /// The vision tower's (spec §4.3): row positions turn the first half of the frequencies, columns the second.
    pub(crate) fn vision(theta: f64, head_dim: usize) -> Self {
        let half = frequencies(theta, head_dim / 2);
        let axis = (0..2).flat_map(|axis| std::iter::repeat_n(axis, half.len())).collect();
        Self { frequency: [half.clone(), half].concat(), axis }
    }

    /// The decoder's (spec §6.1): contiguous sections of frequencies turn by time, row and column.
    pub(crate) fn decoder(theta: f64, head_dim: usize, mrope_section: [usize; 3]) -> Self {
        let axis = (0..3).flat_map(|axis| std::iter::repeat_n(axis, mrope_section[axis])).collect();
        Self { frequency: frequencies(theta, head_dim), axis }
    }

    /// Appends a row of the table: cosines, then sines.
    pub(crate) fn push(&self, positions: &[u32], table: &mut Vec<f32>) {
        let angle = |(f, axis): (&f32, &usize)| positions[*axis] as f32 * f;
        table.extend(self.frequency.iter().zip(&self.axis).map(|f| angle(f).cos()));
        table.extend(self.frequency.iter().zip(&self.axis).map(|f| angle(f).sin()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_follow_their_axis() {
        let rope = Rope::decoder(1e6, 128, [16, 24, 24]);
        assert_eq!((rope.axis[15], rope.axis[16], rope.axis[39], rope.axis[40], rope.axis[63]), (0, 1, 1, 2, 2));
        assert_eq!(rope.axis.len(), 64);
        let mut table = Vec::new();
        rope.push(&[7, 0, 0], &mut table);
        assert_eq!(table.len(), 128);
        assert_eq!((table[0], table[64]), (7f32.cos(), 7f32.sin()));
        assert_eq!((table[20], table[84]), (1.0, 0.0));
    }

    #[test]
    fn rows_turn_the_first_half_and_columns_the_second() {
        let rope = Rope::vision(1e4, 72);
        let mut table = Vec::new();
        rope.push(&[3, 0], &mut table);
        assert_eq!(table.len(), 72);
        assert_eq!(table[0], 3f32.cos());
        assert!(table[18..36].iter().all(|cos| *cos == 1.0));
        assert_eq!(rope.frequency[18], 1.0);
    }
}

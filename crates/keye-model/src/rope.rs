//! Rotary angles. Both towers rotate the halves of a head; they differ only in which position turns which frequency, so
//! each makes a table of angles per row and the backend applies it.

use keye_processor::YarnConfig;

/// `theta^(-2j/width)` for `j < width/2`.
fn frequencies(theta: f64, width: usize) -> Vec<f32> {
    (0..width / 2).map(|j| theta.powf(-2.0 * j as f64 / width as f64) as f32).collect()
}

/// Cosines and sines per row `[rows, 2 * frequencies]`, angle j of a row being `positions[axis[j]] * frequency[j]`.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    frequency: Vec<f32>,
    axis: Vec<usize>,
    /// Factor of cosines and sines.
    length: f32,
}

/// YaRN's `m(s, c) = 0.1 c ln(s) + 1` (spec of 671B, §4).
pub(crate) fn yarn_length(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

impl Rope {
    /// The vision tower's (spec §4.3): row positions turn the first half of the frequencies, columns the second.
    pub(crate) fn vision(theta: f64, head_dim: usize) -> Self {
        let half = frequencies(theta, head_dim / 2);
        let axis = (0..2).flat_map(|axis| std::iter::repeat_n(axis, half.len())).collect();
        Self { frequency: [half.clone(), half].concat(), axis, length: 1.0 }
    }

    /// The decoder's (spec §6.1): contiguous sections of frequencies turn by time, row and column.
    pub(crate) fn decoder(theta: f64, head_dim: usize, mrope_section: [usize; 3]) -> Self {
        let axis = (0..3).flat_map(|axis| std::iter::repeat_n(axis, mrope_section[axis])).collect();
        Self { frequency: frequencies(theta, head_dim), axis, length: 1.0 }
    }

    /// Latent attention's (spec of 671B, §4), `width` columns: YaRN, along one axis.
    pub(crate) fn yarn(theta: f64, width: usize, yarn: &YarnConfig) -> Self {
        let length = yarn.original_max_position_embeddings as f64;
        // The frequency that makes so many turns over the original length.
        let place = |turns: f64| width as f64 * (length / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
        let last = (width - 1) as f64;
        let low = place(yarn.beta_fast).floor().clamp(0.0, last);
        let high = place(yarn.beta_slow).ceil().clamp(0.0, last);
        let high = if low == high { high + 0.001 } else { high };
        let frequency = |i: usize| {
            let f = theta.powf(-2.0 * i as f64 / width as f64);
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            (f / yarn.factor * ramp + f * (1.0 - ramp)) as f32
        };
        let length = yarn_length(yarn.factor, yarn.mscale) / yarn_length(yarn.factor, yarn.mscale_all_dim);
        Self { frequency: (0..width / 2).map(frequency).collect(), axis: vec![0; width / 2], length: length as f32 }
    }

    /// Appends a row of the table: cosines, then sines.
    pub(crate) fn push(&self, positions: &[u32], table: &mut Vec<f32>) {
        let angle = |(f, axis): (&f32, &usize)| positions[*axis] as f32 * f;
        table.extend(self.frequency.iter().zip(&self.axis).map(|f| angle(f).cos() * self.length));
        table.extend(self.frequency.iter().zip(&self.axis).map(|f| angle(f).sin() * self.length));
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

    /// The figures of DeepSeek-V3's config: 23 is the first frequency that is wholly slowed down, 10 the last that stays.
    #[test]
    fn yarn_slows_down_what_turns_slowly() {
        let yarn = YarnConfig {
            factor: 40.0,
            original_max_position_embeddings: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: 1.0,
            mscale_all_dim: 1.0,
        };
        let rope = Rope::yarn(1e4, 64, &yarn);
        let plain = frequencies(1e4, 64);
        assert_eq!(rope.frequency[..=10], plain[..=10]);
        assert!(rope.frequency[11] < plain[11] && rope.frequency[22] > plain[22] / 40.0);
        for (slow, plain) in rope.frequency[23..].iter().zip(&plain[23..]) {
            assert!((slow * 40.0 / plain - 1.0).abs() < 1e-6, "{slow} of {plain}");
        }
        assert_eq!(rope.length, 1.0);
        let long = Rope::yarn(1e4, 64, &YarnConfig { mscale_all_dim: 0.0, ..yarn });
        assert!((f64::from(long.length) - (0.1 * 40f64.ln() + 1.0)).abs() < 1e-6);
        let unscaled = Rope::yarn(1e4, 64, &YarnConfig { factor: 1.0, ..yarn });
        assert_eq!((unscaled.frequency, unscaled.length), (plain, 1.0));
    }
}

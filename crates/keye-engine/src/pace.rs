//! How much of other work fits between two steps of running streams.

use std::time::Duration;

/// Prompt tokens that a step may always have: so few cost little beside reading the weights.
const MIN_PREFILL: usize = 16;
/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;

/// Measured speeds. They decide how work is cut, which changes no value.
#[derive(Debug)]
pub(crate) struct Pace {
    /// What prompts and media get, in times a decode step takes.
    share: f64,
    /// Seconds of a step that only generates; per prompt token; per operation of encoding.
    decode: Option<f64>,
    per_token: Option<f64>,
    per_flop: Option<f64>,
}

impl Pace {
    pub fn new(share: f64) -> Self {
        Self { share: share.max(0.0), decode: None, per_token: None, per_flop: None }
    }

    /// Prompt tokens for the next step; when media are being encoded these get the other half of the time.
    pub fn prefill_tokens(&self, encoding: bool) -> usize {
        let (Some(decode), Some(per_token)) = (self.decode, self.per_token) else { return MIN_PREFILL };
        let seconds = decode * self.share * if encoding { 0.5 } else { 1.0 };
        // A quotient out of range saturates.
        ((seconds / per_token.max(1e-12)) as usize).max(MIN_PREFILL)
    }

    /// Operations of encoding between two steps.
    pub fn encode_flops(&self) -> f64 {
        match (self.decode, self.per_flop) {
            (Some(decode), Some(per_flop)) => decode * self.share * 0.5 / per_flop.max(1e-18),
            _ => 0.0,
        }
    }

    /// A step took `time`, with so many prompt tokens.
    pub fn stepped(&mut self, time: Duration, generating: bool, prompt_tokens: usize) {
        let seconds = time.as_secs_f64();
        if prompt_tokens == 0 {
            if generating {
                average(&mut self.decode, seconds);
            }
            return;
        }
        let rest = if generating { seconds - self.decode.unwrap_or(0.0) } else { seconds };
        average(&mut self.per_token, rest.max(seconds * 0.1) / prompt_tokens as f64);
    }

    /// Encoding took `time` for `flops` operations.
    pub fn encoded(&mut self, time: Duration, flops: f64) {
        average(&mut self.per_flop, time.as_secs_f64() / flops.max(1.0));
    }
}

fn average(value: &mut Option<f64>, newest: f64) {
    *value = Some(value.map_or(newest, |old| old + (newest - old) * NEWEST));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_get_their_share_of_a_steps_time() {
        let mut pace = Pace::new(2.0);
        assert_eq!((pace.prefill_tokens(false), pace.encode_flops()), (MIN_PREFILL, 0.0), "nothing is known yet");
        for _ in 0..40 {
            pace.stepped(Duration::from_millis(100), true, 0);
            pace.stepped(Duration::from_millis(300), true, 400);
            pace.encoded(Duration::from_millis(600), 6e10);
        }
        assert!((380..=420).contains(&pace.prefill_tokens(false)), "{pace:?}");
        assert!((190..=210).contains(&pace.prefill_tokens(true)), "{pace:?}");
        assert!((pace.encode_flops() / 1e10 - 1.0).abs() < 0.1, "{pace:?}");
        let none = Pace::new(0.0);
        assert_eq!(none.prefill_tokens(false), MIN_PREFILL, "always some");
    }
}

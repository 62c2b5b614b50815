//! Speculation by prompt look-up: an answer often repeats what stands in the prompt or in itself.

/// Longest and shortest run of tokens that is looked up.
const RUNS: [usize; 3] = [4, 3, 2];
/// Tokens of history that are searched, from the end.
const HISTORY: usize = 1 << 15;
/// Steps without guesses after guesses that did not pay, at first and at most.
const PAUSES: (usize, usize) = (8, 256);

/// Guesses the next tokens of one sequence and learns how far to go.
///
/// A guess is what followed the last earlier occurrence of the last few tokens. All guesses are checked by one step, which
/// costs about as much as a step without as long as reading the weights is what takes time; so the number of guesses
/// doubles while all are right, halves when some are wrong, and when none is right for some rounds there is a pause, each
/// twice as long as the last.
#[derive(Debug)]
pub(crate) struct Guesser {
    wanted: usize,
    /// Steps to go without guesses.
    pause: usize,
    next_pause: usize,
    /// Rounds in a row of which nothing was right.
    misses: usize,
}

impl Default for Guesser {
    fn default() -> Self {
        Self { wanted: 2, pause: 0, next_pause: PAUSES.0, misses: 0 }
    }
}

impl Guesser {
    /// At most `max` tokens that may follow `prompt` and `answer`.
    pub fn guess(&mut self, prompt: &[u32], answer: &[u32], max: usize) -> Vec<u32> {
        let wanted = self.wanted.min(max);
        if wanted == 0 {
            return Vec::new();
        }
        if self.pause > 0 {
            self.pause -= 1;
            return Vec::new();
        }
        let total = prompt.len() + answer.len();
        let at = |index: usize| if index < prompt.len() { prompt[index] } else { answer[index - prompt.len()] };
        for run in RUNS {
            if total <= run {
                continue;
            }
            let oldest = total.saturating_sub(HISTORY);
            let same = |end: &usize| (0..run).all(|back| at(end - 1 - back) == at(total - 1 - back));
            if let Some(end) = (oldest + run..total).rev().find(same) {
                return (end..total.min(end + wanted)).map(at).collect();
            }
        }
        Vec::new()
    }

    /// Of `proposed` guesses the first `accepted` were right.
    pub fn learn(&mut self, proposed: usize, accepted: usize) {
        if accepted == proposed {
            self.wanted = (self.wanted * 2).min(64);
        } else {
            self.wanted = (self.wanted / 2).max(accepted).max(1);
        }
        if accepted > 0 {
            (self.misses, self.next_pause) = (0, PAUSES.0);
            return;
        }
        self.misses += 1;
        if self.misses >= 2 {
            self.misses = 0;
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(PAUSES.1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_last_occurrence_is_guessed() {
        let mut guesser = Guesser::default();
        assert_eq!(guesser.guess(&[1, 2, 3, 9, 9, 1, 2, 7, 8, 5], &[1, 2], 10), [7, 8]);
        assert_eq!(guesser.guess(&[1, 2, 3, 1], &[2], 1), [3]);
        assert_eq!(guesser.guess(&[1, 1], &[1], 10), [1], "the run itself is history too");
        assert!(guesser.guess(&[1, 2, 3], &[4], 10).is_empty());
        assert!(guesser.guess(&[], &[], 10).is_empty());
        assert!(guesser.guess(&[1, 2, 1, 2], &[1, 2], 0).is_empty());
    }

    #[test]
    fn more_is_tried_while_it_pays_and_nothing_while_it_does_not() {
        let mut guesser = Guesser::default();
        let history = [5; 100];
        assert_eq!(guesser.guess(&history, &[], 64).len(), 1, "the run ends one before the end");
        let varied: Vec<u32> = (0..50).chain(0..10).collect();
        for expected in [2, 4, 8, 16] {
            let guess = guesser.guess(&varied, &[], 64);
            assert_eq!(guess, (10..10 + expected).collect::<Vec<_>>());
            guesser.learn(guess.len(), guess.len());
        }
        let mut rounds = 0;
        for _ in 0..1000 {
            let guess = guesser.guess(&varied, &[], 64);
            if !guess.is_empty() {
                rounds += 1;
                guesser.learn(guess.len(), 0);
            }
        }
        assert!((4..30).contains(&rounds), "{rounds} rounds of wrong guesses in 1000 steps");
    }
}

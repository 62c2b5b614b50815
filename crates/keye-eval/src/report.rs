//! What came out.

use keye_world::{Split, Task};
use serde::{Deserialize, Serialize};

/// One kind of question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was asked.
    pub task: Task,
    /// How often.
    pub count: usize,
    /// Tells questions and their truth from others: 16 digits.
    pub questions: String,
    /// Answers that were ended by a limit; they are scored as far as they go.
    pub cut: usize,
    /// Part of the answers that was wholly right, 0 to 1.
    pub exact: f64,
    /// Mean score of guessing without looking; for times, of naming the whole clip.
    pub chance: f64,
    /// The score of every question, 0 to 1, in the order of their numbers.
    pub scores: Vec<f64>,
}

impl Row {
    /// Mean score, 0 to 1.
    pub fn score(&self) -> f64 {
        self.scores.iter().sum::<f64>() / self.scores.len().max(1) as f64
    }

    /// Standard error of the score: the scores' deviation over `sqrt(n)`, with one right and one wrong answer thought added,
    /// as it would be 0 where all were right. For `k` right answers of `n`: `sqrt(p (1 - p) / (n + 2))` with
    /// `p = (k + 1) / (n + 2)`.
    pub fn error(&self) -> f64 {
        let scores: Vec<f64> = self.scores.iter().copied().chain([0.0, 1.0]).collect();
        standard_error(&scores)
    }
}

/// Of the mean: the deviation over `sqrt(n)`.
pub(crate) fn standard_error(values: &[f64]) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
    (variance / n).sqrt()
}

/// Scores by kind of question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Part of the world that was asked about.
    pub split: Split,
    /// [`SCORING`](crate::SCORING) of the program that scored it.
    pub scoring: u32,
    /// In the order of [`Task::ALL`].
    #[serde(rename = "tasks")]
    pub rows: Vec<Row>,
}

impl Report {
    /// Mean score over the kinds of questions, each counting the same.
    pub fn mean(&self) -> f64 {
        self.rows.iter().map(Row::score).sum::<f64>() / self.rows.len().max(1) as f64
    }

    /// Standard error of the mean over the kinds of questions.
    pub fn error(&self) -> f64 {
        self.rows.iter().map(|row| row.error().powi(2)).sum::<f64>().sqrt() / self.rows.len().max(1) as f64
    }

    /// Answers that were ended by a limit.
    pub fn cut(&self) -> usize {
        self.rows.iter().map(|row| row.cut).sum()
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let percent = |part: f64| format!("{:.1}", 100.0 * part);
        let mut text =
            format!("{:<14} {:>6} {:>7} {:>6} {:>7} {:>7}\n", "task", "asked", "score", "+-", "exact", "chance");
        for row in &self.rows {
            let chance = if row.chance > 0.0 { percent(row.chance) } else { "-".into() };
            let (score, error, exact) = (percent(row.score()), percent(row.error()), percent(row.exact));
            text += &format!("{:<14} {:>6} {score:>7} {error:>6} {exact:>7} {chance:>7}\n", row.task.name(), row.count);
        }
        let asked: usize = self.rows.iter().map(|row| row.count).sum();
        let (mean, error) = (percent(self.mean()), percent(self.error()));
        text += &format!("{:<14} {asked:>6} {mean:>7} {error:>6}\n", "mean of tasks");
        if self.cut() > 0 {
            let of: Vec<String> =
                self.rows.iter().filter(|row| row.cut > 0).map(|row| format!("{} {}", row.cut, row.task)).collect();
            text += &format!("{} answers were cut by the limit of tokens: {}\n", self.cut(), of.join(", "));
        }
        text
    }
}

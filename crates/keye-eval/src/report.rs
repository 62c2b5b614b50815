//! What came out.

use keye_world::Task;
use serde::Serialize;

/// One kind of question.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was asked.
    pub task: Task,
    /// How often.
    pub count: usize,
    /// Mean score, 0 to 1.
    pub score: f64,
    /// Part of the answers that was wholly right, 0 to 1.
    pub exact: f64,
    /// Mean score of guessing without looking; for times, of naming the whole clip.
    pub chance: f64,
}

/// Scores by kind of question.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// In the order of [`Task::ALL`].
    pub rows: Vec<Row>,
}

impl Report {
    /// Mean score over the kinds of questions, each counting the same.
    pub fn mean(&self) -> f64 {
        self.rows.iter().map(|row| row.score).sum::<f64>() / self.rows.len().max(1) as f64
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let percent = |part: f64| format!("{:.1}", 100.0 * part);
        let mut text = format!("{:<14} {:>6} {:>7} {:>7} {:>7}\n", "task", "asked", "score", "exact", "chance");
        for row in &self.rows {
            let chance = if row.chance > 0.0 { percent(row.chance) } else { "-".into() };
            let (score, exact) = (percent(row.score), percent(row.exact));
            text += &format!("{:<14} {:>6} {score:>7} {exact:>7} {chance:>7}\n", row.task.name(), row.count);
        }
        let asked: usize = self.rows.iter().map(|row| row.count).sum();
        text + &format!("{:<14} {asked:>6} {:>7}\n", "mean of tasks", percent(self.mean()))
    }
}

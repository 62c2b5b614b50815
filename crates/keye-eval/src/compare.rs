//! Reports beside one another.

use keye_world::Task;

use crate::report::{Report, Row, standard_error};

/// A report with a name.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// Stands above it.
    pub name: String,
    /// What was measured.
    pub report: Report,
}

/// Why reports cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// Different questions.
    #[error(
        "{name}: expected the questions of {first} ({expected}), found {found}; run it with the same --tasks and --count"
    )]
    Questions {
        /// The report.
        name: String,
        /// The one it is compared with.
        first: String,
        /// Kinds and number of questions.
        expected: String,
        /// Kinds and number of questions.
        found: String,
    },
}

fn questions(report: &Report) -> String {
    let rows: Vec<String> = report.rows.iter().map(|row| format!("{} {}", row.scores.len(), row.task.name())).collect();
    rows.join(", ")
}

/// A Markdown table: a line for every kind of question, a column for every report, scores in percent with their standard
/// error. The last line tells how much less or more than the first report each one has; as both were asked the same questions,
/// its standard error is that of the differences, question by question.
///
/// # Errors
/// Reports of different questions.
pub fn markdown(columns: &[Column]) -> Result<String, CompareError> {
    let Some(first) = columns.first() else { return Ok(String::new()) };
    for column in columns {
        let (expected, found) = (questions(&first.report), questions(&column.report));
        if expected != found {
            let (name, first) = (column.name.clone(), first.name.clone());
            return Err(CompareError::Questions { name, first, expected, found });
        }
    }
    let cell = |score: f64, error: f64| format!(" {:.1} ± {:.1} |", 100.0 * score, 100.0 * error);
    let mut text = "| task | asked | chance |".to_owned();
    columns.iter().for_each(|column| text += &format!(" {} |", column.name));
    text += &format!("\n|---|---|---|{}\n", "---|".repeat(columns.len()));
    for row in &first.report.rows {
        let chance = if row.chance > 0.0 { format!("{:.1}", 100.0 * row.chance) } else { "-".into() };
        text += &format!("| {} | {} | {chance} |", row.task.name(), row.scores.len());
        let of = |column: &Column| {
            of_task(&column.report, row.task).map_or_else(String::new, |row| cell(row.score(), row.error()))
        };
        columns.iter().for_each(|column| text += &of(column));
        text += "\n";
    }
    let asked: usize = first.report.rows.iter().map(|row| row.scores.len()).sum();
    text += &format!("| mean of tasks | {asked} | |");
    columns.iter().for_each(|column| text += &cell(column.report.mean(), column.report.error()));
    text += "\n";
    if columns.len() > 1 {
        text += &format!("| against {} | | | |", first.name);
        for column in &columns[1..] {
            let (mean, error) = difference(&first.report, &column.report);
            text += &format!(" {:+.1} ± {:.1} |", 100.0 * mean, 100.0 * error);
        }
        text += "\n";
    }
    Ok(text)
}

fn of_task(report: &Report, task: Task) -> Option<&Row> {
    report.rows.iter().find(|row| row.task == task)
}

/// Mean over the kinds of questions of `other` less `first`, and its standard error, question by question. Both are reports of
/// the same questions.
pub fn difference(first: &Report, other: &Report) -> (f64, f64) {
    let errors = first.rows.iter().zip(&other.rows).map(|(a, b)| {
        let differences: Vec<f64> = a.scores.iter().zip(&b.scores).map(|(a, b)| b - a).collect();
        standard_error(&differences).powi(2)
    });
    (other.mean() - first.mean(), errors.sum::<f64>().sqrt() / first.rows.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, scores: &[f64]) -> Column {
        let row = |task| Row { task, count: scores.len(), exact: 0.5, chance: 0.25, scores: scores.to_vec() };
        Column { name: name.into(), report: Report { rows: vec![row(Task::Choice), row(Task::Reading)] } }
    }

    /// By hand: of 2 right and 2 wrong answers, with one of each added, `sqrt(0.25 / 6)`; a difference in one of four questions
    /// has a deviation of `sqrt(3)/4` and an error of `sqrt(3)/8` a task, `sqrt(6)/16` over two.
    #[test]
    fn errors_are_those_of_the_formulas() {
        let (a, b) = (column("a", &[1.0, 0.0, 1.0, 0.0]), column("b", &[1.0, 0.0, 1.0, 1.0]));
        assert!((a.report.rows[0].error() - (0.25f64 / 6.0).sqrt()).abs() < 1e-12);
        assert!(column("c", &[1.0; 4]).report.rows[0].error() > 0.1);
        let (mean, error) = difference(&a.report, &b.report);
        assert!((mean - 0.25).abs() < 1e-12 && (error - 6f64.sqrt() / 16.0).abs() < 1e-12, "{mean} {error}");
        assert_eq!(difference(&a.report, &a.report), (0.0, 0.0));
    }

    #[test]
    fn a_table_has_a_column_a_report_and_refuses_other_questions() {
        let columns = [column("a", &[1.0, 0.0]), column("b", &[1.0, 1.0])];
        let lines: Vec<String> = markdown(&columns).unwrap().lines().map(str::to_owned).collect();
        assert_eq!(lines[0], "| task | asked | chance | a | b |");
        assert_eq!(lines[2], "| choice | 2 | 25.0 | 50.0 ± 25.0 | 100.0 ± 21.7 |");
        assert_eq!(lines[5], "| against a | | | | +50.0 ± 25.0 |");
        assert!(lines.iter().skip(1).all(|line| line.matches('|').count() == 6), "{lines:?}");
        let error = markdown(&[columns[0].clone(), column("c", &[1.0])]).unwrap_err().to_string();
        assert!(error.contains("c: ") && error.contains("1 choice"), "{error}");
    }
}

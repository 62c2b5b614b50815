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
    /// They tell of different things.
    #[error("{name}: expected {reason}")]
    Differs {
        /// The report.
        name: String,
        /// What another one has, what this one has, and what helps.
        reason: String,
    },
}

fn questions(report: &Report) -> String {
    let rows: Vec<String> = report.rows.iter().map(|row| format!("{} {}", row.scores.len(), row.task)).collect();
    rows.join(", ")
}

/// Why two reports cannot be compared, if they cannot: what was expected, what was found, what helps.
fn difference_in_kind(first: &Column, other: &Report) -> Option<String> {
    let (name, first) = (&first.name, &first.report);
    if first.split != other.split {
        let (expected, found) = (first.split, other.split);
        return Some(format!(
            "the split of {name} ({expected}), found {found}; measure it again with the same --split"
        ));
    }
    let (expected, found) = (questions(first), questions(other));
    if expected != found {
        let remedy = "measure it again with the same --tasks and --count";
        return Some(format!("the questions of {name} ({expected}), found {found}; {remedy}"));
    }
    if first.scoring != other.scoring {
        let (expected, found) = (first.scoring, other.scoring);
        let remedy = "measure the one with the lower number again";
        return Some(format!("the rules of scoring of {name} ({expected}), found {found}; {remedy}"));
    }
    let changed = first.rows.iter().zip(&other.rows).filter(|(a, b)| a.questions != b.questions);
    let changed: Vec<&str> = changed.map(|(row, _)| row.task.name()).collect();
    let remedy = "measure both again with one version of this program";
    (!changed.is_empty())
        .then(|| format!("the questions and answers of {name}, found other ones of {}; {remedy}", changed.join(", ")))
}

/// A Markdown table: a line for every kind of question, a column for every report, scores in percent with their standard
/// error. The last line tells how much less or more than the first report each one has; as both were asked the same questions,
/// its standard error is that of the differences, question by question. Answers that were cut have a line where there are any.
///
/// # Errors
/// Reports of different questions, truths or rules.
pub fn markdown(columns: &[Column]) -> Result<String, CompareError> {
    let Some(first) = columns.first() else { return Ok(String::new()) };
    for column in columns {
        if let Some(reason) = difference_in_kind(first, &column.report) {
            return Err(CompareError::Differs { name: column.name.clone(), reason });
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
    if columns.iter().any(|column| column.report.cut() > 0) {
        text += "| answers cut | | |";
        columns.iter().for_each(|column| text += &format!(" {} |", column.report.cut()));
        text += "\n";
    }
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
    use keye_world::Split;

    use super::*;

    fn column(name: &str, scores: &[f64]) -> Column {
        let (questions, scores) = ("0123456789abcdef".to_owned(), scores.to_vec());
        let row = Row { task: Task::Choice, count: scores.len(), questions, cut: 0, exact: 0.5, chance: 0.25, scores };
        let rows = vec![row.clone(), Row { task: Task::Reading, ..row }];
        Column { name: name.into(), report: Report { split: Split::Test, scoring: 2, rows } }
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
        let mut cut = columns.clone();
        cut[1].report.rows[0].cut = 3;
        assert!(markdown(&cut).unwrap().contains("\n| answers cut | | | 0 | 3 |\n"));
    }

    #[test]
    fn what_reports_differ_in_is_told() {
        let first = column("a", &[1.0, 0.0]);
        let refused = |change: fn(&mut Report), words: [&str; 3]| {
            let mut other = column("c", &[1.0, 1.0]);
            change(&mut other.report);
            let error = markdown(&[first.clone(), other]).unwrap_err().to_string();
            assert!(error.starts_with("c: expected ") && words.iter().all(|word| error.contains(word)), "{error}");
        };
        refused(|report| report.rows[0].scores = vec![1.0], ["(2 choice, 2 reading)", "found 1 choice", "--count"]);
        refused(|report| drop(report.rows.pop()), ["(2 choice, 2 reading)", "found 2 choice;", "--tasks"]);
        refused(|report| report.split = Split::Validation, ["a (test)", "found validation", "--split"]);
        refused(|report| report.scoring = 1, ["scoring of a (2)", "found 1", "the lower number"]);
        refused(|report| report.rows[1].questions = "77".into(), ["answers of a", "other ones of reading;", "both"]);
    }
}

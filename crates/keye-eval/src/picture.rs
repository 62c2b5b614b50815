//! Scores as a picture.

use std::fmt::Write as _;

use crate::compare::Column;

const LEFT: f64 = 104.0;
const WIDTH: f64 = 720.0;
const TOP: f64 = 34.0;
const BAR: f64 = 7.0;
const COLOURS: [&str; 8] = ["#1f5f99", "#e08e2b", "#4b9b5f", "#b0413e", "#7a5aa6", "#8c6d46", "#5fa8b8", "#999999"];

/// An SVG picture: for every kind of question a bar a report, its standard error, and a stroke where guessing stands.
/// Reports beyond the eighth take the colours again.
pub fn accuracy_svg(columns: &[Column]) -> String {
    let rows = columns.first().map_or(&[][..], |column| &column.report.rows);
    let band = BAR * columns.len() as f64 + 8.0;
    let height = TOP + band * rows.len() as f64 + 22.0;
    let x = |part: f64| LEFT + part.clamp(0.0, 1.0) * (WIDTH - LEFT - 16.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    for tenths in (0..=10).step_by(2) {
        let at = x(f64::from(tenths) / 10.0);
        let bottom = height - 20.0;
        let _ = writeln!(svg, "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/>");
        let _ =
            writeln!(svg, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{} %</text>", height - 6.0, tenths * 10);
    }
    let share = (WIDTH - LEFT) / columns.len().max(1) as f64;
    for (i, column) in columns.iter().enumerate() {
        let (at, colour) = (LEFT + share * i as f64, COLOURS[i % COLOURS.len()]);
        let _ = writeln!(svg, "<rect x=\"{at:.1}\" y=\"12\" width=\"10\" height=\"10\" fill=\"{colour}\"/>");
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"21\">{}</text>", at + 14.0, escape(&column.name));
    }
    for (number, row) in rows.iter().enumerate() {
        let top = TOP + 4.0 + band * number as f64;
        let middle = top + (band - 8.0) / 2.0 + 4.0;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            row.task.name()
        );
        for (i, column) in columns.iter().enumerate() {
            let Some(row) = column.report.rows.get(number) else { continue };
            let (y, score, error) = (top + BAR * i as f64, row.score(), row.error());
            let colour = COLOURS[i % COLOURS.len()];
            let _ = writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/>",
                x(score) - LEFT,
                BAR - 1.0
            );
            let (low, high, line) = (x(score - error), x(score + error), y + (BAR - 1.0) / 2.0);
            let _ = writeln!(svg, "<path d=\"M{low:.1} {line:.1}H{high:.1}\" stroke=\"#222\"/>");
        }
        if row.chance > 0.0 {
            let (at, bottom) = (x(row.chance), top + band - 8.0);
            let _ = writeln!(svg, "<path d=\"M{at:.1} {top:.1}V{bottom:.1}\" stroke=\"#000\" stroke-width=\"2\"/>");
        }
    }
    svg + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use keye_world::{Split, Task};

    use super::*;
    use crate::report::{Report, Row};

    #[test]
    fn bars_are_as_long_as_scores() {
        let column = |name: &str, scores: &[f64]| {
            let (questions, scores) = (String::new(), scores.to_vec());
            let row = Row { task: Task::Count, count: 2, questions, cut: 0, exact: 0.0, chance: 0.5, scores };
            Column { name: name.into(), report: Report { split: Split::Test, scoring: 2, rows: vec![row] } }
        };
        let svg = accuracy_svg(&[column("a<b", &[1.0, 1.0]), column("c", &[0.5, 0.5])]);
        assert!(svg.contains("a&lt;b") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("width=\"600.0\" height=\"6\"") && svg.contains("width=\"300.0\" height=\"6\""), "{svg}");
        assert_eq!(svg.matches("stroke-width=\"2\"").count(), 1);
        assert!(accuracy_svg(&[]).ends_with("</svg>\n"));
    }
}

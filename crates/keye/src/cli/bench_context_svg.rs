//! The context curve as a picture: decode and prefill side by side, both axes logarithmic.

use std::fmt::Write as _;

use super::bench_context::{Cost, Curve};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 360.0;
/// Of a panel: its plot is this far from the left, and so wide and high.
const LEFT: f64 = 62.0;
const TOP: f64 = 34.0;
const PLOT: [f64; 2] = [352.0, 268.0];

/// Name, colour and microseconds of a line.
type Line = (&'static str, &'static str, fn(&Cost) -> Option<f64>);
const LINES: [Line; 3] = [
    ("dense", "#b23a48", |cost| Some(cost.dense)),
    ("sparse, indexer included", "#1f5f99", |cost| Some(cost.index? + cost.sparse?)),
    ("sparse, chosen keys alone", "#7fb069", |cost| cost.sparse),
];

/// Microseconds that attention costs a token and layer, by the number of tokens before it.
pub fn svg(curve: &Curve) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    let costs = |point: &super::bench_context::Point| [point.decode, point.prefill];
    let all = curve.points.iter().flat_map(costs).flat_map(|cost| LINES.map(|(_, _, value)| value(&cost)));
    let (low, high) = all.flatten().fold((f64::INFINITY, 0.0f64), |(low, high), v| (low.min(v), high.max(v)));
    // Whole decades around all values.
    let decades = match high > 0.0 {
        true => [(low * 1e6).log10().floor() as i32, (high * 1e6).log10().ceil() as i32],
        false => [0, 1],
    };
    let x_range =
        [curve.points.first(), curve.points.last()].map(|point| (point.map_or(1, |p| p.context) as f64).log2());
    for (panel, title) in ["decode", "prefill, 64 tokens at a time"].into_iter().enumerate() {
        let left = LEFT + panel as f64 * (PLOT[0] + LEFT + 8.0);
        let x = |context: usize| {
            left + ((context as f64).log2() - x_range[0]) / (x_range[1] - x_range[0]).max(1.0) * PLOT[0]
        };
        let y = |micros: f64| {
            let [from, to] = decades.map(f64::from);
            TOP + PLOT[1] - (micros.log10() - from) / (to - from).max(1.0) * PLOT[1]
        };
        let _ = writeln!(
            out,
            "<text x=\"{left}\" y=\"18\" font-weight=\"bold\">{title}: microseconds a token and layer</text>"
        );
        for decade in decades[0]..=decades[1] {
            let at = y(10f64.powi(decade));
            let _ = writeln!(out, "<path d=\"M{left} {at:.1}h{}\" stroke=\"#ddd\"/>", PLOT[0]);
            let value = if decade < 0 {
                format!("0.{:0>1$}", 1, -decade as usize)
            } else {
                format!("1{}", "0".repeat(decade as usize))
            };
            let _ =
                writeln!(out, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>", left - 6.0, at + 4.0);
        }
        for point in &curve.points {
            let (at, label) = (x(point.context), format!("{}K", point.context / 1024));
            let _ = writeln!(
                out,
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                TOP + PLOT[1] + 18.0
            );
        }
        for (number, (name, colour, value)) in LINES.into_iter().enumerate() {
            let points: Vec<(f64, f64)> = (curve.points.iter())
                .filter_map(|point| Some((x(point.context), y(value(&costs(point)[panel])? * 1e6))))
                .collect();
            if points.is_empty() {
                continue;
            }
            let path = points.iter().fold(String::new(), |mut path, (x, y)| {
                let _ = write!(path, "{x:.1},{y:.1} ");
                path
            });
            let path = path.trim_end();
            let _ = writeln!(out, "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{path}\"/>");
            let at = TOP + 14.0 + 16.0 * number as f64;
            let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{at}\" fill=\"{colour}\">{name}</text>", left + 10.0);
        }
    }
    let layers = curve.layers;
    let topk = curve.topk.map_or(String::new(), |topk| format!(", {topk} keys chosen"));
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#666\">tokens before; one of {layers} layers{topk}; {}</text>",
        HEIGHT - 10.0,
        escape(&curve.device)
    );
    out + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::bench_context::Point;
    use super::*;

    #[test]
    fn lines_are_where_their_values_are() {
        let cost = |dense: f64, sparse: Option<[f64; 2]>| Cost {
            dense: dense * 1e-6,
            index: sparse.map(|[index, _]| index * 1e-6),
            sparse: sparse.map(|[_, sparse]| sparse * 1e-6),
        };
        let points = vec![
            Point { context: 1024, decode: cost(10.0, None), prefill: cost(10.0, None) },
            Point { context: 4096, decode: cost(100.0, Some([90.0, 10.0])), prefill: cost(1000.0, None) },
        ];
        let svg = svg(&Curve { device: "a < b".into(), layers: 48, topk: Some(2048), points });
        // Two decades, 10 to 1000, over 268 pixels from 34 on.
        assert!(svg.contains("points=\"62.0,302.0 414.0,168.0\""), "{svg}");
        assert!(svg.contains("points=\"414.0,302.0\"") && svg.contains("points=\"414.0,168.0\""), "{svg}");
        assert!(svg.contains("a &lt; b") && svg.contains(">1K<") && svg.contains(">1000<"), "{svg}");
        assert_eq!(svg.matches("<polyline").count(), 4);
    }
}

//! What a run tells: a line of JSON a step, and the loss as a picture.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::TrainError;
use crate::checkpoint_dir::{io, partial};

/// A step, as it stands in metrics.jsonl.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Its number, from 1 on.
    pub step: u64,
    /// Mean over the step's targets (or over its packs, for images and texts), before the step.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    #[serde(deserialize_with = "number")]
    pub gradient_norm: f64,
    /// Tokens in the packs.
    pub tokens: u64,
    /// Tokens that carry loss.
    pub targets: u64,
    /// Patches in the packs.
    pub patches: u64,
    /// Seconds the step took, waiting for data included.
    pub seconds: f64,
    /// Seconds of these waiting for data.
    pub waiting: f64,
    /// Loss on held-out data after the step, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
    /// Floating-point operations of the step by formula, per second, in 10^9.
    pub gflops: f64,
}

/// JSON has null for what is no finite number.
fn number<'de, D: Deserializer<'de>>(value: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or(f64::NAN))
}

/// `metrics.jsonl` and `loss.svg` of a stage.
pub(crate) struct Metrics {
    folder: PathBuf,
    file: File,
    lines: Vec<StepMetrics>,
}

impl Metrics {
    /// Opens the file of a run that stands at `step`; lines of later steps, which are done again, are dropped.
    pub(crate) fn open(folder: &Path, step: u64) -> Result<Self, TrainError> {
        let path = folder.join("metrics.jsonl");
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(&path)(error)),
            text => text.unwrap_or_default(),
        };
        let lines: Vec<StepMetrics> = (text.lines())
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|line: &StepMetrics| line.step <= step)
            .collect();
        let temporary = partial(&path);
        let text: String = lines.iter().map(json_line).collect();
        fs::write(&temporary, text).map_err(io(&temporary))?;
        fs::rename(&temporary, &path).map_err(io(&path))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(io(&path))?;
        Ok(Self { folder: folder.to_owned(), file, lines })
    }

    pub(crate) fn add(&mut self, line: StepMetrics) -> Result<(), TrainError> {
        self.lines.push(line);
        self.file.write_all(json_line(&line).as_bytes()).map_err(io(&self.folder.join("metrics.jsonl")))
    }

    pub(crate) fn draw(&self) -> Result<(), TrainError> {
        let path = self.folder.join("loss.svg");
        fs::write(&path, loss_svg(&self.lines)).map_err(io(&path))
    }
}

fn json_line(line: &StepMetrics) -> String {
    // Numbers and plain names always serialise.
    serde_json::to_string(line).unwrap_or_default() + "\n"
}

/// The loss over steps: every step, a running mean over a fiftieth of them, and the loss on held-out data.
pub fn loss_svg(lines: &[StepMetrics]) -> String {
    const W: f64 = 720.0;
    const H: f64 = 360.0;
    const LEFT: f64 = 56.0;
    const BOTTOM: f64 = 36.0;
    let points: Vec<(f64, f64)> =
        lines.iter().filter(|l| l.loss.is_finite()).map(|l| (l.step as f64, l.loss)).collect();
    let held_out: Vec<(f64, f64)> =
        lines.iter().filter_map(|l| Some((l.step as f64, l.held_out.filter(|loss| loss.is_finite())?))).collect();
    let last = points.last().map_or(1.0, |p| p.0).max(1.0);
    let top = points.iter().chain(&held_out).map(|p| p.1).fold(0.0, f64::max).max(1e-9);
    let at = |(step, loss): (f64, f64)| {
        (LEFT + step / last * (W - LEFT - 12.0), H - BOTTOM - loss / top * (H - BOTTOM - 12.0))
    };
    let width = (points.len() / 50).max(1);
    let smooth: Vec<(f64, f64)> = (points.chunks(width))
        .map(|c| (c[c.len() / 2].0, c.iter().map(|p| p.1).sum::<f64>() / c.len() as f64))
        .collect();
    // As many points as pixels are enough.
    let sparse: Vec<(f64, f64)> = points.iter().copied().step_by((points.len() / 700).max(1)).collect();
    let path = |points: &[(f64, f64)]| {
        points.iter().fold(String::new(), |mut text, point| {
            let (x, y) = at(*point);
            let _ = write!(text, "{x:.1},{y:.1} ");
            text
        })
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {W} {H}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{W}\" height=\"{H}\" fill=\"#fff\"/>\n"
    );
    for i in 0..=4 {
        let (value, step) = (top * f64::from(i) / 4.0, last * f64::from(i) / 4.0);
        let ((_, y), (x, _)) = (at((0.0, value)), at((step, 0.0)));
        let _ = writeln!(svg, "<path d=\"M{LEFT} {y:.1}H{}\" stroke=\"#ddd\"/>", W - 12.0);
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value:.2}</text>", LEFT - 6.0, y + 4.0);
        let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{step:.0}</text>", H - 14.0);
    }
    let _ = writeln!(svg, "<polyline fill=\"none\" stroke=\"#9cc3e6\" points=\"{}\"/>", path(&sparse));
    let _ =
        writeln!(svg, "<polyline fill=\"none\" stroke=\"#1f5f99\" stroke-width=\"2\" points=\"{}\"/>", path(&smooth));
    if !held_out.is_empty() {
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"#e08e2b\" stroke-width=\"2\" points=\"{}\"/>",
            path(&held_out)
        );
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run that goes on has the steps that went wrong as well.
    #[test]
    fn steps_without_a_finite_loss_are_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let line = |step, loss, gradient_norm| StepMetrics {
            step,
            loss,
            lr: 1e-3,
            gradient_norm,
            tokens: 8,
            targets: 4,
            patches: 0,
            seconds: 1.0,
            waiting: 0.0,
            held_out: None,
            gflops: 1.0,
        };
        let lines = [line(1, 2.0, 3.0), line(2, f64::NAN, f64::INFINITY), line(3, 1.5, 2.5), line(4, 1.0, 2.0)];
        let mut metrics = Metrics::open(dir.path(), 0).unwrap();
        lines.iter().for_each(|line| metrics.add(*line).unwrap());
        let read = || Metrics::open(dir.path(), 3).unwrap().lines;
        for lines in [read(), read()] {
            assert_eq!(lines.iter().map(|line| line.step).collect::<Vec<_>>(), [1, 2, 3]);
            assert!(lines[1].loss.is_nan() && lines[1].gradient_norm.is_nan() && lines[2].loss == 1.5);
        }
    }
}

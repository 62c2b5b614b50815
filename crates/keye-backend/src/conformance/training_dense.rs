//! Products and attention of training against plain formulas in f64.

use std::ops::Range;

use super::{Check, Random};
use crate::matmul::Old;
use crate::training::{AttentionShape, Device, Precision, Span, View, ViewMut};
use crate::{BackendError, f32_to_bf16};

fn record(checks: &mut Vec<Check>, name: String, found: &[f32], expected: &[f64], tolerance: f32) {
    let rms = (expected.iter().map(|v| v * v).sum::<f64>() / expected.len().max(1) as f64).sqrt();
    let mut error = if found.len() == expected.len() { 0.0f32 } else { f32::INFINITY };
    for (a, b) in found.iter().zip(expected) {
        let difference = ((f64::from(*a) - b).abs() / rms.max(1e-20)) as f32;
        error = if difference.is_nan() { f32::INFINITY } else { error.max(difference) };
    }
    checks.push(Check { name, error, tolerance });
}

fn record_equal(checks: &mut Vec<Check>, name: String, found: &[f32], expected: &[f32]) {
    let same = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
    checks.push(Check { name, error: if same { 0.0 } else { 1.0 }, tolerance: 0.0 });
}

/// A matrix somewhere in a larger array, which is NaN around it.
struct Place {
    rows: usize,
    cols: usize,
    start: usize,
    values: Vec<f32>,
}

impl Place {
    fn random(random: &mut Random, rows: usize, cols: usize, start: usize) -> Self {
        let mut values = vec![f32::NAN; start + rows * cols + 5];
        values[start..start + rows * cols].copy_from_slice(&random.values(rows * cols, 1.0));
        Self { rows, cols, start, values }
    }

    fn view<'a, A>(&self, array: &'a A) -> View<'a, A> {
        View { array, start: self.start, rows: self.rows, cols: self.cols }
    }

    fn range(&self) -> Range<usize> {
        self.start..self.start + self.rows * self.cols
    }

    fn get(&self, row: usize, col: usize, precision: Precision) -> f64 {
        let value = self.values[self.start + row * self.cols + col];
        f64::from(match precision {
            Precision::F32 => value,
            Precision::Bf16 => f32::from_bits(u32::from(f32_to_bf16(value)) << 16),
        })
    }
}

/// Products of matrices that lie in larger arrays, whose other elements have to stay.
pub(super) fn products<D: Device>(
    device: &D,
    tolerance: f32,
    small: bool,
    checks: &mut Vec<Check>,
) -> Result<(), BackendError> {
    let mut random = Random(17);
    // One has many inputs for a small result, as the gradients of weights.
    let shapes: &[[usize; 3]] = match small {
        false => &[
            [1, 1, 1],
            [7, 5, 3],
            [65, 33, 130],
            [200, 96, 70],
            [64, 64, 64],
            [132, 40, 136],
            [33, 1100, 52],
            [600, 9, 70],
        ],
        true => &[[7, 5, 3], [68, 40, 72], [4, 520, 8]],
    };
    for &[m, k, n] in shapes {
        for form in 0..4 {
            let turned = [form & 1 != 0, form & 2 != 0];
            // Starts that allow loads of several elements, and such that do not.
            let starts = if form == 1 || m * n < 64 { [3, 1, 5] } else { [8, 4, 2] };
            let [a_shape, b_shape] = [if turned[0] { [k, m] } else { [m, k] }, if turned[1] { [n, k] } else { [k, n] }];
            let a = Place::random(&mut random, a_shape[0], a_shape[1], starts[0]);
            let b = Place::random(&mut random, b_shape[0], b_shape[1], starts[1]);
            let c = Place::random(&mut random, m, n, starts[2]);
            for precision in [Precision::F32, Precision::Bf16] {
                let old = if (form % 2 == 0) == (precision == Precision::F32) { Old::Keep } else { Old::Replace };
                let name =
                    format!("product {m}x{k}x{n} {precision:?} {old:?}, transposed {turned:?}, starts {starts:?}");
                let compute = || {
                    let [a_array, b_array] = [&a, &b].map(|place| device.array(place.values.clone()));
                    let (a_array, b_array, mut out) = (a_array?, b_array?, device.array(c.values.clone())?);
                    let [mut left, mut right] = [a.view(&a_array).plain(), b.view(&b_array).plain()];
                    (left.transposed, right.transposed) = (turned[0], turned[1]);
                    let to = ViewMut { array: &mut out, start: c.start, rows: m, cols: n };
                    device.product(precision, left, right, to, old)?;
                    Ok::<_, BackendError>(device.values(View::of(&out, 1, c.values.len()))?.into_owned())
                };
                let found = compute()?;
                let mut expected = Vec::with_capacity(m * n);
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let at = |place: &Place, turned: bool, row: usize, col: usize| match turned {
                        true => place.get(col, row, precision),
                        false => place.get(row, col, precision),
                    };
                    let sum: f64 = (0..k).map(|x| at(&a, turned[0], i, x) * at(&b, turned[1], x, j)).sum();
                    expected.push(sum + if old == Old::Keep { c.get(i, j, Precision::F32) } else { 0.0 });
                }
                let range = c.range();
                record(checks, name.clone(), &found[range.clone()], &expected, tolerance);
                let around = |values: &[f32]| [&values[..range.start], &values[range.end..]].concat();
                record_equal(checks, format!("{name}: nothing else"), &around(&found), &around(&c.values));
                record_equal(checks, format!("{name}: again"), &compute()?, &found);
            }
        }
    }
    Ok(())
}

/// An attention and what it is to give.
struct Case {
    shape: AttentionShape,
    spans: Vec<Span>,
    nq: usize,
    nk: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

/// Result, logarithms of sums, gradients of q, k, v.
struct Results<T> {
    out: Vec<T>,
    lse: Vec<T>,
    gradients: [Vec<T>; 3],
}

impl Case {
    fn random(random: &mut Random, shape: AttentionShape, spans: Vec<Span>, nk: usize) -> Self {
        let nq = spans.iter().map(|span| span.queries.end).max().unwrap_or(0);
        let (queries, keys) = (shape.heads * nq * shape.d, shape.kv_heads * nk * shape.d);
        let [q, k, v, dout] = [queries, keys, keys, queries].map(|len| random.values(len, 1.0));
        Self { shape, spans, nq, nk, q, k, v, dout }
    }

    fn compute<D: Device>(&self, device: &D) -> Result<Results<f32>, BackendError> {
        let array = |values: &[f32]| device.array(values.to_vec());
        let (q, k, v, dout) = (array(&self.q)?, array(&self.k)?, array(&self.v)?, array(&self.dout)?);
        let spans = device.spans(self.spans.clone())?;
        let (out, lse) = device.attention(self.shape, &q, &k, &v, &spans)?;
        let gradients = device.attention_backward(self.shape, &q, &k, &v, &spans, &out, &lse, &dout)?;
        let values = |x: &D::Array| Ok::<_, BackendError>(device.values(View::of(x, 1, device.len(x)))?.into_owned());
        let [dq, dk, dv] = gradients;
        Ok(Results { out: values(&out)?, lse: values(&lse)?, gradients: [values(&dq)?, values(&dk)?, values(&dv)?] })
    }

    /// One query of one head after the other.
    fn expected(&self) -> Results<f64> {
        let AttentionShape { heads, kv_heads, d, causal } = self.shape;
        let scale = (d as f64).powf(-0.5);
        let mut out = vec![0.0; self.q.len()];
        let mut lse = vec![0.0; heads * self.nq];
        let [mut dq, mut dk, mut dv] = [&self.q, &self.k, &self.v].map(|x| vec![0.0; x.len()]);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        for head in 0..heads {
            let kv_head = head * kv_heads / heads;
            for span in &self.spans {
                for (i, query) in span.queries.clone().enumerate() {
                    let row = head * self.nq + query;
                    let mine = row * d..(row + 1) * d;
                    let (q, dout) = (&self.q[mine.clone()], &self.dout[mine.clone()]);
                    let end = if causal { span.keys.start + i + 1 } else { span.keys.end };
                    let place = |key: usize| (kv_head * self.nk + key) * d..(kv_head * self.nk + key + 1) * d;
                    let keys = span.keys.start..end;
                    let scores: Vec<f64> = keys.clone().map(|key| dot(q, &self.k[place(key)]) * scale).collect();
                    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    lse[row] = most + scores.iter().map(|score| (score - most).exp()).sum::<f64>().ln();
                    let weights: Vec<f64> = scores.iter().map(|score| (score - lse[row]).exp()).collect();
                    let changes: Vec<f64> = keys.clone().map(|key| dot(dout, &self.v[place(key)])).collect();
                    let mean: f64 = weights.iter().zip(&changes).map(|(weight, change)| weight * change).sum();
                    for ((key, weight), change) in keys.zip(weights).zip(changes) {
                        let score = weight * (change - mean) * scale;
                        for (column, at) in place(key).enumerate() {
                            out[mine.start + column] += weight * f64::from(self.v[at]);
                            dv[at] += weight * f64::from(dout[column]);
                            dk[at] += score * f64::from(q[column]);
                            dq[mine.start + column] += score * f64::from(self.k[at]);
                        }
                    }
                }
            }
        }
        Results { out, lse, gradients: [dq, dk, dv] }
    }

    fn check<D: Device>(
        &self,
        device: &D,
        tolerance: f32,
        what: &str,
        checks: &mut Vec<Check>,
    ) -> Result<(), BackendError> {
        let AttentionShape { heads, kv_heads, d, causal } = self.shape;
        let seen = if causal { "causal" } else { "all" };
        let name = format!("attention {heads}/{kv_heads} heads of {d}, {seen}, {what}");
        let (found, again, expected) = (self.compute(device)?, self.compute(device)?, self.expected());
        let parts = |results: &Results<f32>| {
            let [dq, dk, dv] = results.gradients.clone();
            [results.out.clone(), results.lse.clone(), dq, dk, dv]
        };
        let [dq, dk, dv] = expected.gradients;
        let expected = [expected.out, expected.lse, dq, dk, dv];
        let names = ["", ": sums", ": gradient of q", ": gradient of k", ": gradient of v"];
        for ((part, found), expected) in names.into_iter().zip(parts(&found)).zip(expected) {
            record(checks, format!("{name}{part}"), &found, &expected, tolerance);
        }
        record_equal(checks, format!("{name}: again"), &parts(&again).concat(), &parts(&found).concat());
        Ok(())
    }
}

/// Spans of these lengths, one behind the other, each with its own rows as keys.
fn packed(lengths: &[usize]) -> (Vec<Span>, usize) {
    let mut end = 0;
    let span = |length: &usize| {
        let rows = end..end + length;
        end = rows.end;
        Span { queries: rows.clone(), keys: rows }
    };
    (lengths.iter().map(span).collect(), end)
}

/// Attention and its reverse: packed spans; one query a span with keys of its own; keys that several spans share, or none has.
pub(super) fn attentions<D: Device>(
    device: &D,
    tolerance: f32,
    small: bool,
    checks: &mut Vec<Check>,
) -> Result<(), BackendError> {
    let mut random = Random(18);
    let lengths: &[usize] = if small { &[1, 67] } else { &[1, 3, 64, 65, 150] };
    let widths: &[usize] = if small { &[7, 40, 72, 128] } else { &[7, 16, 32, 40, 72, 128] };
    let (spans, rows) = packed(lengths);
    for (i, &d) in widths.iter().enumerate() {
        for causal in [true, false] {
            if small && causal != (i % 2 == 0) {
                continue;
            }
            let (heads, kv_heads) = match (small, causal == (i % 2 == 0)) {
                (true, _) => (2, 1),
                (false, true) => (4, 2),
                (false, false) => (4, 1),
            };
            let shape = AttentionShape { heads, kv_heads, d, causal };
            let case = Case::random(&mut random, shape, spans.clone(), rows);
            case.check(device, tolerance, &format!("spans of {lengths:?}"), checks)?;
        }
    }
    let single = |query: usize, keys: Range<usize>| Span { queries: query..query + 1, keys };
    let pooled: Vec<Span> = match small {
        false => [0..4, 4..5, 5..75, 75..139, 139..142].into_iter().enumerate().map(|(i, k)| single(i, k)).collect(),
        true => vec![single(0, 0..3), single(1, 3..70)],
    };
    let shape = AttentionShape { heads: 2, kv_heads: 2, d: 72, causal: false };
    let keys = pooled.last().map_or(0, |span| span.keys.end);
    Case::random(&mut random, shape, pooled, keys).check(device, tolerance, "one query a span", checks)?;
    let shared = vec![single(0, 4..20), Span { queries: 1..4, keys: 0..90 }, single(4, 95..97)];
    let shape = AttentionShape { heads: 4, kv_heads: 2, d: 20, causal: false };
    Case::random(&mut random, shape, shared, 101).check(device, tolerance, "shared keys", checks)?;
    Ok(())
}

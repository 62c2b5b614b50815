//! One suite for every backend: each operation against [`Reference`], and row invariance bit for bit.
//!
//! Inputs come from a fixed seed and have shapes that are not multiples of anything, besides those of the models.

mod latent;
mod sparse;
pub mod training;
mod training_dense;

use std::ops::Range;

use crate::{
    Activation, AttentionShape, Backend, BackendError, BlockScales, CacheSpec, Dtype, KvDtype, QkNorm, Reference,
    SequenceRows, Span, WeightSource, packed,
};

/// One comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Check {
    /// Operation and shape.
    pub name: String,
    /// Largest difference, relative to the root mean square of the expected values; 0 or 1 for bitwise checks.
    pub error: f32,
    /// What is allowed.
    pub tolerance: f32,
}

impl Check {
    /// Within the tolerance.
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// A seeded stream of numbers, about normal.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        let mut sum = 0.0;
        for _ in 0..4 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sum += (self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        }
        sum * 1.732
    }

    fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.next() * scale).collect()
    }
}

fn source(rows: usize, cols: usize, values: &[f32], dtype: Dtype) -> WeightSource {
    let f32s = WeightSource::from_f32("random", rows, cols, values);
    match dtype {
        Dtype::F32 => f32s,
        Dtype::Bf16 => WeightSource {
            dtype,
            bytes: values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect::<Vec<u8>>().into(),
            ..f32s
        },
        // Halves of small magnitude: one decimal of exponent is enough for a load test.
        Dtype::F16 => WeightSource {
            dtype,
            bytes: values
                .iter()
                .flat_map(|v| (0x3800u16 | (v.to_bits() >> 13) as u16 & 0x3ff).to_le_bytes())
                .collect::<Vec<u8>>()
                .into(),
            ..f32s
        },
        // Any finite number will do, and scales that differ from block to block.
        Dtype::F8E4M3 => {
            let block = [128, 128];
            let scales = (0..rows.div_ceil(block[0]) * cols.div_ceil(block[1])).map(|i| (1 + i % 5) as f32 * 2e-3);
            let scales = scales.flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into();
            let finite = |v: &f32| ((v.to_bits() >> 16) as u8 % 0x7f) | ((v.to_bits() >> 24) as u8 & 0x80);
            WeightSource {
                dtype,
                bytes: values.iter().map(finite).collect::<Vec<u8>>().into(),
                scales: Some(BlockScales { bytes: scales, block, first_row: 0 }),
                ..f32s
            }
        }
        Dtype::Int12 | Dtype::Int10 | Dtype::Int8 | Dtype::Int4 => {
            let mut bytes = vec![0; dtype.stored_bytes(rows, cols).expect("small")];
            packed::pack_rows(dtype, rows, cols, values, &mut bytes).expect("finite");
            WeightSource { dtype, bytes: bytes.into(), ..f32s }
        }
    }
}

/// Runs the operation on the backend and on the reference.
struct Suite<'a, B: Backend> {
    backend: &'a B,
    random: Random,
    tolerance: f32,
    checks: Vec<Check>,
    /// Each kernel once or twice, for devices under a tool that slows them down.
    small: bool,
    /// The comparison under way, for errors.
    now: String,
}

/// Runs `$body` once with the backend under test and once with the reference, and compares what it yields.
macro_rules! compare {
    ($suite:ident, $name:expr, |$b:ident| $body:block) => {{
        $suite.now = $name;
        let found: Vec<f32> = {
            let $b = $suite.backend;
            $body
        };
        let expected: Vec<f32> = {
            let $b = &Reference;
            $body
        };
        $suite.record($suite.now.clone(), &found, &expected);
    }};
}

impl<B: Backend> Suite<'_, B> {
    fn record(&mut self, name: String, found: &[f32], expected: &[f32]) {
        let rms = (expected.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / expected.len().max(1) as f64).sqrt();
        let mut error = if found.len() == expected.len() { 0.0f32 } else { f32::INFINITY };
        for (a, b) in found.iter().zip(expected) {
            let difference = ((a - b).abs() as f64 / rms.max(1e-20)) as f32;
            error = if difference.is_nan() { f32::INFINITY } else { error.max(difference) };
        }
        self.checks.push(Check { name, error, tolerance: self.tolerance });
    }

    fn equal(&mut self, name: String, found: &[f32], expected: &[f32]) {
        let same = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
        self.checks.push(Check { name, error: if same { 0.0 } else { 1.0 }, tolerance: 0.0 });
    }

    fn products(&mut self, dtypes: &[Dtype]) -> Result<(), BackendError> {
        let (shapes, activations): (&[_], &[_]) = match self.small {
            false => (
                &[(1, 64, 960), (3, 72, 7), (5, 588, 64), (37, 4304, 25), (530, 150, 31), (1, 4096, 100)],
                &[Activation::None, Activation::GeluTanh, Activation::GeluErf],
            ),
            true => (&[(1, 64, 20), (5, 150, 33), (37, 72, 7), (130, 200, 70)], &[Activation::GeluErf]),
        };
        // Stored as another of the list once they are loaded.
        let twin = |dtype: &&Dtype| self.small && matches!(dtype, Dtype::F16 | Dtype::Int10);
        let dtypes: Vec<Dtype> = dtypes.iter().filter(|dtype| !twin(dtype)).copied().collect();
        for dtype in dtypes {
            for &(m, k, n) in shapes {
                let x = self.random.values(m * k, 1.0);
                let w = source(n, k, &self.random.values(n * k, 1.0), dtype);
                let up = source(n, k, &self.random.values(n * k, 0.05), dtype);
                let bias = source(1, n, &self.random.values(n, 1.0), Dtype::F32);
                let y = self.random.values(m * n, 1.0);
                for &activation in activations {
                    compare!(self, format!("linear {m}x{k}x{n} {dtype:?} {activation:?}"), |b| {
                        let (w, bias) = (b.load(&w)?, b.load(&bias)?);
                        b.download(&b.linear(&b.upload(m, k, &x)?, &w, Some(&bias), activation)?)?
                    });
                }
                compare!(self, format!("linear_add {m}x{k}x{n} {dtype:?}"), |b| {
                    let mut y = b.upload(m, n, &y)?;
                    b.linear_add(&b.upload(m, k, &x)?, &b.load(&w)?, None, &mut y)?;
                    b.download(&y)?
                });
                compare!(self, format!("gated {m}x{k}x{n} {dtype:?}"), |b| {
                    b.download(&b.gated(&b.upload(m, k, &x)?, &b.load(&w)?, &b.load(&up)?)?)?
                });
                if self.small {
                    continue;
                }
                let b = self.backend;
                let (w, bias) = (b.load(&w)?, b.load(&bias)?);
                let all = b.download(&b.linear(&b.upload(m, k, &x)?, &w, Some(&bias), Activation::GeluTanh)?)?;
                let mut one_by_one = Vec::new();
                for row in x.chunks_exact(k) {
                    let row = b.upload(1, k, row)?;
                    one_by_one.extend(b.download(&b.linear(&row, &w, Some(&bias), Activation::GeluTanh)?)?);
                }
                self.equal(format!("linear {m}x{k}x{n} {dtype:?}: rows together = one by one"), &all, &one_by_one);
            }
        }
        Ok(())
    }

    fn rows(&mut self) -> Result<(), BackendError> {
        for (m, n) in [(1, 64), (5, 72), (33, 1152), (3, 4100)] {
            let x = self.random.values(m * n, 3.0);
            let gamma = source(1, n, &self.random.values(n, 1.0), Dtype::Bf16);
            let beta = source(1, n, &self.random.values(n, 1.0), Dtype::F32);
            compare!(self, format!("layer_norm {m}x{n}"), |b| {
                b.download(&b.layer_norm(&b.upload(m, n, &x)?, &b.load(&gamma)?, &b.load(&beta)?, 1e-6)?)?
            });
            compare!(self, format!("rms_norm {m}x{n}"), |b| {
                b.download(&b.rms_norm(&b.upload(m, n, &x)?, &b.load(&gamma)?, 1e-6)?)?
            });
        }
        let (m, heads, hd) = (9, 3, 72);
        let (x, angles) = (self.random.values(m * heads * hd, 1.0), self.random.values(m * hd, 1.0));
        compare!(self, format!("rope {m} rows, {heads} heads of {hd}"), |b| {
            let mut x = b.upload(m, heads * hd, &x)?;
            b.rope(&mut x, heads, &b.upload(m, hd, &angles)?)?;
            b.download(&x)?
        });
        let (rows, cols) = (50, 20);
        let table = source(rows, cols, &self.random.values(rows * cols, 1.0), Dtype::Bf16);
        let x = self.random.values(7 * cols, 1.0);
        let weights = self.random.values(7 * 4, 1.0);
        let index: Vec<u32> = (0..28).map(|i| i * 37 % 50).collect();
        compare!(self, "add_weighted_rows".into(), |b| {
            let mut x = b.upload(7, cols, &x)?;
            b.add_weighted_rows(&mut x, &b.load(&table)?, &b.upload_index(&index)?, &b.upload(7, 4, &weights)?)?;
            b.download(&x)?
        });
        compare!(self, "embed".into(), |b| { b.download(&b.embed(&b.load(&table)?, &b.upload_index(&index)?)?)? });
        compare!(self, "gather_rows by 4".into(), |b| {
            let index: Vec<u32> = index.iter().map(|i| i % 7).collect();
            b.download(&b.gather_rows(&b.upload(7, cols, &x)?, &b.upload_index(&index)?, 4)?)?
        });
        compare!(self, "slice_rows and copy_rows".into(), |b| {
            let x = b.upload(7, cols, &x)?;
            let mut y = b.zeros(5, cols)?;
            b.copy_rows(&b.slice_rows(&x, 2..6)?, 1..3, &mut y, 3)?;
            b.download(&y)?
        });
        compare!(self, "upload_u8".into(), |b| { b.download(&b.upload_u8(2, 3, &[0, 1, 127, 128, 254, 255])?)? });
        Ok(())
    }

    fn vision_attention(&mut self) -> Result<(), BackendError> {
        for (heads, hd, spans) in [
            (4, 16, vec![(0..60, 0..60)]),
            (2, 72, vec![(0..1, 0..1), (1..64, 1..64), (64..200, 64..200)]),
            (2, 72, vec![(10..30, 0..150)]),
            (1, 72, vec![(0..700, 0..700)]),
        ] {
            let rows = spans.iter().map(|(_, keys): &(_, Range<usize>)| keys.end).max().unwrap_or(0);
            if self.small && rows > 200 {
                continue;
            }
            let width = heads * hd;
            let [q, k, v] = [2.0, 2.0, 1.0].map(|scale| self.random.values(rows * width, scale));
            let shape = AttentionShape { heads, kv_heads: heads, head_dim: hd, scale: (hd as f32).powf(-0.5) };
            let spans: Vec<Span> = spans.into_iter().map(|(queries, keys)| Span { queries, keys }).collect();
            compare!(self, format!("attention {heads} heads of {hd}, spans {spans:?}"), |b| {
                let [q, k, v] = [&q, &k, &v].map(|x| b.upload(rows, width, x));
                b.download(&b.attention(&q?, &k?, &v?, shape, &spans)?)?
            });
            let b = self.backend;
            let [q, k, v] = [&q, &k, &v].map(|x| b.upload(rows, width, x));
            let (q, k, v) = (q?, k?, v?);
            let all = b.download(&b.attention(&q, &k, &v, shape, &spans)?)?;
            let mut pieces = vec![0.0; rows * width];
            for span in &spans {
                for first in span.queries.clone().step_by(13) {
                    let queries = first..span.queries.end.min(first + 13);
                    let span = Span { queries: queries.clone(), keys: span.keys.clone() };
                    let part = b.download(&b.attention(&q, &k, &v, shape, &[span])?)?;
                    let values = queries.start * width..queries.end * width;
                    pieces[values.clone()].copy_from_slice(&part[values]);
                }
            }
            self.equal(format!("attention {heads} heads of {hd}: whole = query rows in pieces"), &all, &pieces);
        }
        Ok(())
    }

    /// Lists of the highest elements are whole from their lowest on.
    fn highest(&mut self) -> Result<(), BackendError> {
        for (rows, cols, count) in [(3, 5003, 1), (2, 5003, 20), (1, 5003, 128), (2, 100, 1), (1, 40, 64)] {
            let mut x = self.random.values(rows * cols, 1.0);
            // Equals of the highest, and what is never chosen.
            for row in x.chunks_exact_mut(cols) {
                let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                (row[7], row[cols - 1], row[11]) = (highest, highest, f32::NEG_INFINITY);
            }
            let Some(found) = self.backend.highest(&self.backend.upload(rows, cols, &x)?, count)? else {
                return Ok(());
            };
            let right = |(row, found): (&[f32], &Vec<(u32, f32)>)| {
                let lowest = found.iter().map(|(_, value)| *value).fold(f32::INFINITY, f32::min);
                let mut found = found.clone();
                found.sort_unstable_by_key(|(column, _)| *column);
                let whole = (0..).zip(row.iter().copied()).filter(|(_, value)| *value >= lowest);
                found.len() >= count.min(cols) && whole.eq(found)
            };
            let right = found.len() == rows && x.chunks_exact(cols).zip(&found).all(right);
            let name = format!("highest {count} of {rows}x{cols}");
            self.checks.push(Check { name, error: f32::from(u8::from(!right)), tolerance: 0.0 });
        }
        // A NaN does not hide behind what is cut; equals without end are all there, or none.
        let broken: Vec<f32> = (0..1000).map(|i| if i == 700 { f32::NAN } else { i as f32 }).collect();
        let equal = vec![-0.5; 1000];
        let x = self.backend.upload(2, 1000, &[broken, equal].concat())?;
        let found = self.backend.highest(&x, 3)?.unwrap_or_default();
        let told = |found: &Vec<(u32, f32)>| found.iter().any(|(column, value)| *column == 700 && value.is_nan());
        let right = found.len() == 2 && (found[0].is_empty() || told(&found[0])) && matches!(found[1].len(), 0 | 1000);
        let name = "highest of a row with a NaN, and of equals".into();
        self.checks.push(Check { name, error: f32::from(u8::from(!right)), tolerance: 0.0 });
        Ok(())
    }

    /// Sequences that grow by chunks, side by side in one batch or alone, must see the same.
    fn paged_attention(&mut self) -> Result<(), BackendError> {
        for (heads, kv_heads, hd, dtype, tokens) in [
            (4, 2, 32, KvDtype::F32, 200),
            (4, 1, 128, KvDtype::F32, 200),
            (3, 3, 16, KvDtype::F32, 200),
            (4, 2, 32, KvDtype::Bf16, 200),
            // As wide as a config may ask for; few tokens, since without fused products the rounding of so long a sum shows.
            (1, 1, 1024, KvDtype::F32, 7),
        ] {
            let case = Case::random(&mut self.random, [heads, kv_heads, hd], dtype, tokens);
            let blocks = vec![5, 0, 3, 1];
            let whole = [(0..tokens, blocks.clone())];
            compare!(
                self,
                format!("paged_attention {heads}/{kv_heads} heads of {hd}, {dtype:?}, {tokens} tokens"),
                |b| { case.run(b, std::slice::from_ref(&whole))? }
            );
            let found = case.run(self.backend, std::slice::from_ref(&whole))?;
            // The same tokens in chunks, each beside another sequence that starts anew every time.
            let mut steps = Vec::new();
            let mut at = 0;
            for len in [1, 62, 1, 1, 70, 30, 35].into_iter().cycle() {
                let end = tokens.min(at + len);
                steps.push([(at..end, blocks.clone()), (0..7, vec![2])]);
                at = end;
                if at == tokens {
                    break;
                }
            }
            let chunked = case.run(self.backend, &steps)?;
            let name =
                format!("paged_attention {heads}/{kv_heads} heads of {hd}, {dtype:?}: whole = chunks in a batch");
            self.equal(name, &found, &chunked);
        }
        Ok(())
    }

    /// What an earlier owner left in the slots of a sequence's blocks does not reach it, even where that is no number.
    fn stale_slots(&mut self) -> Result<(), BackendError> {
        if self.small {
            return Ok(());
        }
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
            let mut case = Case::random(&mut self.random, [4, 2, 32], dtype, STALE.end);
            for values in [&mut case.k, &mut case.v] {
                spoil(values);
            }
            let steps = STALE_STEPS.map(|tokens| [(tokens, vec![5, 2])]);
            let clean = case.run(self.backend, &steps)?;
            let after = [&[[(STALE, vec![0, 0, 5, 2])]][..], &steps].concat();
            let found = case.run(self.backend, &after)?.split_off(STALE.len() * 4 * 32);
            self.equal(format!("paged_attention, {dtype:?}: blocks with NaN of others = fresh blocks"), &found, &clean);
        }
        self.stale_sparse()
    }
}

/// Tokens that an earlier owner of the blocks wrote, of a sequence of its own.
const STALE: Range<usize> = 128..256;
/// Steps of the sequence that has the blocks now: single tokens and chunks, in a block's beginning and behind it.
const STALE_STEPS: [Range<usize>; 6] = [0..1, 1..18, 18..19, 19..64, 64..65, 65..70];

/// Makes the [`STALE`] half of values of a case NaN and infinities.
fn spoil(values: &mut [f32]) {
    let half = values.len() / 2;
    for (i, value) in values[half..].iter_mut().enumerate() {
        *value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i / 7 % 3];
    }
}

/// Keys, values and queries of one sequence.
struct Case {
    spec: CacheSpec,
    shape: AttentionShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    angles: Vec<f32>,
    gammas: [WeightSource; 2],
}

impl Case {
    fn random(random: &mut Random, [heads, kv_heads, hd]: [usize; 3], dtype: KvDtype, tokens: usize) -> Self {
        let width = (heads * hd, kv_heads * hd);
        Self {
            spec: CacheSpec { layers: 2, kv_heads, head_dim: hd, dtype, index_dim: 0, latent_dim: 0 },
            shape: AttentionShape { heads, kv_heads, head_dim: hd, scale: (hd as f32).powf(-0.5) },
            q: random.values(tokens * width.0, 2.0),
            k: random.values(tokens * width.1, 2.0),
            v: random.values(tokens * width.1, 1.0),
            angles: random.values(tokens * hd, 1.0),
            gammas: [(); 2].map(|()| source(1, hd, &random.values(hd, 1.0), Dtype::F32)),
        }
    }

    /// Runs steps of token ranges on block tables; returns the results of the first sequence, one after the other.
    fn run<B: Backend, const N: usize>(
        &self,
        b: &B,
        steps: &[[(Range<usize>, Vec<u32>); N]],
    ) -> Result<Vec<f32>, BackendError> {
        let mut cache = b.cache(&self.spec, 6)?;
        let (q_norm, k_norm) = (b.load(&self.gammas[0])?, b.load(&self.gammas[1])?);
        let mut out = Vec::new();
        for step in steps {
            let mut sequences = Vec::new();
            let [mut q, mut k, mut v, mut angles] = [const { Vec::new() }; 4];
            let mut row = 0;
            for (tokens, block_table) in step {
                let rows = row..row + tokens.len();
                row = rows.end;
                sequences.push(SequenceRows { rows, start: tokens.start, block_table: block_table.clone() });
                let part = |all: &[f32], to: &mut Vec<f32>| {
                    let width = all.len() / (self.angles.len() / self.spec.head_dim);
                    to.extend_from_slice(&all[tokens.start * width..tokens.end * width]);
                };
                part(&self.q, &mut q);
                part(&self.k, &mut k);
                part(&self.v, &mut v);
                part(&self.angles, &mut angles);
            }
            let width = self.shape.heads * self.shape.head_dim;
            let kv_width = self.shape.kv_heads * self.shape.head_dim;
            let plan = b.plan(&sequences)?;
            let mut q = b.upload(row, width, &q)?;
            let norm = QkNorm { q: &q_norm, k: &k_norm, eps: 1e-6 };
            let (k, v) = (b.upload(row, kv_width, &k)?, b.upload(row, kv_width, &v)?);
            let angles = b.upload(row, self.shape.head_dim, &angles)?;
            b.norm_rope_write(&mut q, k, v, Some(norm), &angles, &mut cache, 1, &plan)?;
            let attended = b.download(&b.paged_attention(&q, &cache, 1, &plan, self.shape)?)?;
            out.extend_from_slice(&attended[..step[0].0.len() * width]);
        }
        Ok(out)
    }
}

impl<'a, B: Backend> Suite<'a, B> {
    fn new(backend: &'a B, tolerance: f32, seed: u64, small: bool) -> Self {
        Self { backend, random: Random(seed), tolerance, checks: Vec::new(), small, now: "the first".into() }
    }

    /// Its checks after `body`; an error of the device says how far it came.
    fn finish(mut self, body: impl FnOnce(&mut Self) -> Result<(), BackendError>) -> Result<Vec<Check>, BackendError> {
        match body(&mut self) {
            Ok(()) => Ok(self.checks),
            Err(BackendError::Device { what, reason }) => {
                let reason = format!("{reason} (after {} checks; the last begun: {})", self.checks.len(), self.now);
                Err(BackendError::Device { what, reason })
            }
            Err(error) => Err(error),
        }
    }

    fn everything(&mut self) -> Result<(), BackendError> {
        self.products(&[Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::Int8, Dtype::Int4])?;
        self.rows()?;
        self.vision_attention()?;
        self.paged_attention()?;
        self.experts()?;
        self.sparse_attention()?;
        // Last, so that the checks above keep their numbers: a key on the edge between two bf16 values may fall either way.
        self.products(&[Dtype::Int10, Dtype::Int12])?;
        self.highest()?;
        self.fp8_rows()?;
        self.stale_slots()
    }
}

/// Runs the whole suite; `tolerance` is relative to the root mean square of what is expected.
pub fn run<B: Backend>(backend: &B, tolerance: f32) -> Result<Vec<Check>, BackendError> {
    Suite::new(backend, tolerance, 1, false).finish(Suite::everything)
}

/// As [`run`] and [`run_fp8`] with few and small products: every operation, for devices that a tool slows down.
pub fn run_small<B: Backend>(backend: &B, tolerance: f32) -> Result<Vec<Check>, BackendError> {
    Suite::new(backend, tolerance, 1, true).finish(|suite| {
        suite.everything()?;
        suite.products(&[Dtype::F8E4M3])
    })
}

/// As [`run`], for products with weights of 8-bit floats alone.
pub fn run_fp8<B: Backend>(backend: &B, tolerance: f32) -> Result<Vec<Check>, BackendError> {
    Suite::new(backend, tolerance, 2, false).finish(|suite| suite.products(&[Dtype::F8E4M3]))
}

/// As [`run`], for the operations of latent attention and for weights of 8-bit floats.
pub fn run_latent<B: Backend>(backend: &B, tolerance: f32) -> Result<Vec<Check>, BackendError> {
    Suite::new(backend, tolerance, 2, false).finish(|suite| {
        suite.products(&[Dtype::F8E4M3])?;
        suite.latent()
    })
}

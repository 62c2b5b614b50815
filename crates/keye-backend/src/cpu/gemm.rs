//! Products `x w^T` with weights as they lie in the checkpoint, `[out, in]`.
//!
//! Both operands run along k, so an output is a dot product in vector lanes: lane l takes the elements k = l (mod lanes)
//! of a block of [`K_BLOCK`], lanes are summed in a fixed order, blocks from left to right. That order depends on k alone,
//! which is what makes rows invariant; tiles of several rows and outputs only share loads. Panels of bf16 weights are
//! widened once when more than one tile of rows uses them, which changes no value.

#![allow(clippy::needless_range_loop, reason = "a tile indexes several arrays by the same row or column")]

use std::ops::Range;

use super::isa::{Element, Simd, dispatch};
use super::pool::{Pool, SyncPtr};
use super::{Isa, quantized, rows, wide};
use crate::coded_rows::{NarrowRows, WideRows};
use crate::host::{Elements, HostTensor, HostWeight};
use crate::{Activation, Dtype};

/// Elements of k that are summed before lanes are added up: a tile of x of this depth stays in the first-level cache.
const K_BLOCK: usize = 2048;
/// Rows of x in a tile.
const MR: usize = 4;
/// Outputs in a tile where there are 32 registers, or where one row leaves room in 16.
const NR_WIDE: usize = 6;
/// Outputs in a tile of several rows in 16 registers.
const NR: usize = 3;
/// Outputs of a task.
const PANEL: usize = 24;
/// Rows of x of a task.
const ROWS: usize = 512;

/// What is done with the sums.
pub(crate) enum Finish<'a> {
    /// `out = act(z)`
    Store(Activation),
    /// `out += z`
    Add,
    /// `out = silu(z) * (x up^T)`
    Gate(&'a HostWeight),
}

/// Activations as the weight is multiplied with.
enum PackedRows {
    /// In eight bits.
    Narrow(NarrowRows),
    /// In fourteen.
    Wide(WideRows),
    /// As they are.
    None,
}

/// `out [rows, weight.rows] = finish(x weight^T + bias)`.
pub(crate) fn product(
    pool: &Pool,
    isa: Isa,
    x: &HostTensor,
    weight: &HostWeight,
    bias: Option<&HostWeight>,
    finish: &Finish<'_>,
    out: &mut HostTensor,
) {
    assert_eq!(x.cols, weight.cols, "input features");
    assert_eq!((out.rows, out.cols), (x.rows, weight.rows), "result");
    if x.rows == 0 || weight.rows == 0 {
        return;
    }
    products(pool, isa, x, &[Job { rows: 0..x.rows, weight, bias: bias.map(HostWeight::vector), finish }], out);
}

/// A product of some rows of x.
pub(crate) struct Job<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) weight: &'a HostWeight,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) finish: &'a Finish<'a>,
}

/// Products of disjoint rows of `x` with weights of one shape and form, in one launch: `out [rows, outputs]`.
pub(crate) fn products(pool: &Pool, isa: Isa, x: &HostTensor, jobs: &[Job<'_>], out: &mut HostTensor) {
    let outputs = out.cols;
    let packed = jobs.first().and_then(|job| job.weight.packed());
    let form = |weight: &HostWeight| weight.packed().and_then(Dtype::activation_bits);
    let weights = |job: &Job<'_>| match job.finish {
        Finish::Gate(up) => [form(job.weight), form(up)],
        Finish::Store(_) | Finish::Add => [form(job.weight); 2],
    };
    let expected = [packed.and_then(Dtype::activation_bits); 2];
    assert!(jobs.iter().all(|job| (job.weight.rows, job.weight.cols) == (outputs, x.cols)), "weights of one shape");
    assert!(jobs.iter().all(|job| weights(job) == expected), "weights of one form");
    assert!(jobs.is_sorted_by(|a, b| a.rows.end <= b.rows.start), "disjoint rows");
    assert!(out.rows == x.rows && jobs.last().is_none_or(|job| job.rows.end <= x.rows), "rows");
    let activations = match packed {
        Some(dtype) if dtype.high_bits().is_some() => PackedRows::Wide(quantized::rows(pool, isa, x)),
        Some(_) => PackedRows::Narrow(quantized::rows(pool, isa, x)),
        None => PackedRows::None,
    };
    let width = if packed.is_some() { quantized::PANEL } else { PANEL };
    let panels = outputs.div_ceil(width);
    // Tasks of job j begin at starts[j].
    let mut starts = Vec::with_capacity(jobs.len());
    let mut tasks = 0;
    for job in jobs {
        starts.push(tasks);
        tasks += panels * job.rows.len().div_ceil(ROWS);
    }
    let target = SyncPtr(out.data.as_mut_ptr());
    let work = jobs.iter().map(|job| job.rows.len()).sum::<usize>() * x.cols * outputs;
    pool.run(tasks, work, |task, scratch| {
        let number = starts.partition_point(|start| *start <= task) - 1;
        let (task, Job { rows, weight, bias, finish }) = (task - starts[number], &jobs[number]);
        let m0 = rows.start + task / panels * ROWS;
        let n0 = in_streams(task % panels, panels, pool.threads()) * width;
        let m = ROWS.min(rows.end - m0);
        let n = width.min(outputs - n0);
        let x = &x.data[m0 * x.cols..(m0 + m) * x.cols];
        let (sums, rest) = scratch.split(m * width, if matches!(finish, Finish::Gate(_)) { m * width } else { 0 });
        let multiply =
            |weight: &HostWeight, sums: &mut [f32], widened: &mut Vec<f32>| match (&activations, weight.elements()) {
                (PackedRows::Narrow(x), Elements::Packed(dtype, bytes)) => {
                    quantized::panel(quantized::kernel(isa), x, m0, m, dtype, bytes, n0, n, sums)
                }
                (PackedRows::Wide(x), Elements::Packed(dtype, bytes)) => {
                    wide::panel(isa, x, m0, m, dtype, bytes, n0, n, sums, widened)
                }
                _ => panel(isa, x, m, weight, n0, n, sums, widened),
            };
        multiply(weight, sums, rest.1);
        if let Finish::Gate(up) = finish {
            multiply(up, rest.0, rest.1);
        }
        for r in 0..m {
            let sums = &mut sums[r * width..r * width + n];
            // SAFETY: tasks own disjoint rectangles of out, this one rows m0..m0+m and columns n0..n0+n.
            let out = unsafe { std::slice::from_raw_parts_mut(target.get().add((m0 + r) * weight.rows + n0), n) };
            if let Some(bias) = bias {
                for (sum, bias) in sums.iter_mut().zip(&bias[n0..n0 + n]) {
                    *sum += bias;
                }
            }
            match finish {
                Finish::Store(activation) => {
                    rows::activate(isa, sums, *activation);
                    out.copy_from_slice(sums);
                }
                Finish::Add => {
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out += *sum;
                    }
                }
                Finish::Gate(_) => {
                    rows::silu_mul(isa, sums, &rest.0[r * width..r * width + n]);
                    out.copy_from_slice(sums);
                }
            }
        }
    });
}

/// Which of `count` panels comes as number `i` to `threads` threads that take turns: each reads its own part of the weights
/// from end to end, as memory likes it.
fn in_streams(i: usize, count: usize, threads: usize) -> usize {
    let each = count / threads;
    if i < each * threads { i % threads * each + i / threads } else { i }
}

/// Each head's leading columns times its own weight, the others passed on behind: `x [rows, heads*stride]`, weights
/// `[out, in]`, result `[rows, heads*(out + stride - in)]`.
pub(crate) fn heads(pool: &Pool, isa: Isa, x: &HostTensor, weights: &[HostWeight]) -> HostTensor {
    let (stride, rows) = (x.cols / weights.len(), x.rows);
    let (outputs, k) = (weights[0].rows, weights[0].cols);
    assert!(x.cols == stride * weights.len() && k <= stride, "columns of a head");
    assert!(weights.iter().all(|w| (w.rows, w.cols) == (outputs, k)), "weights of one shape");
    let width = outputs + stride - k;
    let mut out = HostTensor::zeros(rows, weights.len() * width);
    let columns = out.cols;
    let target = SyncPtr(out.data.as_mut_ptr());
    let row_chunks = rows.div_ceil(ROWS);
    pool.run(weights.len() * row_chunks, rows * weights.len() * outputs * k, |task, scratch| {
        let (head, m0) = (task % weights.len(), task / weights.len() * ROWS);
        let (m, weight) = (ROWS.min(rows - m0), &weights[head]);
        let (gathered, (sums, widened)) = scratch.split(m * k, m * PANEL);
        let part = |r: usize| &x.row(m0 + r)[head * stride..(head + 1) * stride];
        for (r, to) in gathered.chunks_exact_mut(k.max(1)).enumerate() {
            to.copy_from_slice(&part(r)[..k]);
        }
        // SAFETY: each task has its own rows and head of out.
        let out = |r: usize, at: usize, len: usize| unsafe {
            std::slice::from_raw_parts_mut(target.get().add((m0 + r) * columns + head * width + at), len)
        };
        (0..m).for_each(|r| out(r, outputs, stride - k).copy_from_slice(&part(r)[k..]));
        for n0 in (0..outputs).step_by(PANEL) {
            let n = PANEL.min(outputs - n0);
            panel(isa, gathered, m, weight, n0, n, sums, widened);
            for (r, sums) in sums.chunks_exact(PANEL).enumerate() {
                out(r, n0, n).copy_from_slice(&sums[..n]);
            }
        }
    });
    out
}

/// `sums [m, PANEL] = x [m, k] * rows n0..n0+n of the weight`; `widened` is scratch.
#[allow(clippy::too_many_arguments, reason = "operands of one tile loop")]
fn panel(
    isa: Isa,
    x: &[f32],
    m: usize,
    weight: &HostWeight,
    n0: usize,
    n: usize,
    sums: &mut [f32],
    widened: &mut Vec<f32>,
) {
    let k = weight.cols;
    sums.fill(0.0);
    for k0 in (0..k).step_by(K_BLOCK) {
        let kb = K_BLOCK.min(k - k0);
        match weight.elements() {
            Elements::F32(w) => block_f32(isa, &x[k0..], m, k, &w[n0 * k + k0..], k, n, kb, sums),
            Elements::Bf16(w) if m <= MR => block_bf16(isa, &x[k0..], m, k, &w[n0 * k + k0..], k, n, kb, sums),
            Elements::Bf16(w) => {
                widened.resize(PANEL * K_BLOCK, 0.0);
                for r in 0..n {
                    let at = (n0 + r) * k + k0;
                    rows::widen(isa, &w[at..at + kb], &mut widened[r * kb..(r + 1) * kb]);
                }
                block_f32(isa, &x[k0..], m, k, widened, kb, n, kb, sums);
            }
            Elements::Fp8(w) => {
                widened.resize(PANEL * K_BLOCK, 0.0);
                for r in 0..n {
                    w.widen_into(isa, n0 + r, k0..k0 + kb, &mut widened[r * kb..(r + 1) * kb]);
                }
                block_f32(isa, &x[k0..], m, k, widened, kb, n, kb, sums);
            }
            Elements::InputMajor(w) => {
                widened.resize(PANEL * K_BLOCK, 0.0);
                w.widen_rows(n0, k0..k0 + kb, &mut widened[..n * kb]);
                block_f32(isa, &x[k0..], m, k, widened, kb, n, kb, sums);
            }
            Elements::Packed(..) => unreachable!("packed weights have a product of their own"),
        }
    }
}

dispatch! {
    /// Adds the products over one block of k; rows of x and w are `ldx` and `ldw` apart, those of sums `PANEL`.
    fn block_f32(x: &[f32], m: usize, ldx: usize, w: &[f32], ldw: usize, n: usize, k: usize, sums: &mut [f32]) = block_of_f32
}
dispatch! {
    /// The same with bf16 weights, widened as they are loaded.
    fn block_bf16(x: &[f32], m: usize, ldx: usize, w: &[u16], ldw: usize, n: usize, k: usize, sums: &mut [f32]) = block_of_bf16
}

#[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
#[inline(always)]
unsafe fn block_of_f32<S: Simd>(
    x: &[f32],
    m: usize,
    ldx: usize,
    w: &[f32],
    ldw: usize,
    n: usize,
    k: usize,
    sums: &mut [f32],
) {
    // SAFETY: passed on to the caller.
    unsafe { block::<S, f32>(x, m, ldx, w, ldw, n, k, sums) }
}

#[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
#[inline(always)]
unsafe fn block_of_bf16<S: Simd>(
    x: &[f32],
    m: usize,
    ldx: usize,
    w: &[u16],
    ldw: usize,
    n: usize,
    k: usize,
    sums: &mut [f32],
) {
    // SAFETY: passed on to the caller.
    unsafe { block::<S, u16>(x, m, ldx, w, ldw, n, k, sums) }
}

#[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
#[inline(always)]
unsafe fn block<S: Simd, E: Element>(
    x: &[f32],
    m: usize,
    ldx: usize,
    w: &[E],
    ldw: usize,
    n: usize,
    k: usize,
    sums: &mut [f32],
) {
    assert!(x.len() >= (m - 1) * ldx + k && w.len() >= (n - 1) * ldw + k && sums.len() >= m * PANEL && n <= PANEL);
    let mut r = 0;
    while r < m {
        let rows = MR.min(m - r);
        let mut c = 0;
        while c < n {
            let nr = if S::LANES == 16 || rows == 1 { NR_WIDE } else { NR };
            let cols = if n - c >= nr { nr } else { 1 };
            // SAFETY: rows r..r+rows of x and c..c+cols of w have k elements, by the assertion above.
            unsafe {
                let (x, w) = (x.as_ptr().add(r * ldx), w.as_ptr().add(c * ldw));
                let sums = sums.as_mut_ptr().add(r * PANEL + c);
                match cols {
                    NR_WIDE => rows_tile::<S, E, NR_WIDE>(rows, x, ldx, w, ldw, k, sums),
                    NR => rows_tile::<S, E, NR>(rows, x, ldx, w, ldw, k, sums),
                    _ => rows_tile::<S, E, 1>(rows, x, ldx, w, ldw, k, sums),
                }
            }
            c += cols;
        }
        r += rows;
    }
}

#[inline(always)]
unsafe fn rows_tile<S: Simd, E: Element, const N: usize>(
    rows: usize,
    x: *const f32,
    ldx: usize,
    w: *const E,
    ldw: usize,
    k: usize,
    sums: *mut f32,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        match rows {
            MR => tile::<S, E, MR, N>(x, ldx, w, ldw, k, sums),
            3 => tile::<S, E, 3, N>(x, ldx, w, ldw, k, sums),
            2 => tile::<S, E, 2, N>(x, ldx, w, ldw, k, sums),
            _ => tile::<S, E, 1, N>(x, ldx, w, ldw, k, sums),
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, E: Element, const M: usize, const N: usize>(
    x: *const f32,
    ldx: usize,
    w: *const E,
    ldw: usize,
    k: usize,
    sums: *mut f32,
) {
    // SAFETY: the caller guarantees k elements behind each of the M and N rows and the instruction set.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; M];
        let mut i = 0;
        while i + S::LANES <= k {
            let mut wv = [S::splat(0.0); N];
            for n in 0..N {
                wv[n] = E::load::<S>(w.add(n * ldw + i));
            }
            for m in 0..M {
                let xv = S::load(x.add(m * ldx + i));
                for n in 0..N {
                    acc[m][n] = S::fma(xv, wv[n], acc[m][n]);
                }
            }
            i += S::LANES;
        }
        if i < k {
            for n in 0..N {
                let wv = E::load_first::<S>(w.add(n * ldw + i), k - i);
                for m in 0..M {
                    acc[m][n] = S::fma(S::load_first(x.add(m * ldx + i), k - i), wv, acc[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                *sums.add(m * PANEL + n) += S::sum(acc[m][n]);
            }
        }
    }
}

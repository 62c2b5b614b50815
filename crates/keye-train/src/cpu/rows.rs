//! Work on the rows of matrices, on all threads.

use rayon::prelude::*;

/// Rows of a task: enough that handing it out costs nothing.
const ROWS: usize = 32;
/// Columns of a task where all rows are summed.
const COLS: usize = 64;

/// Calls `f(row number, row)` for all rows.
pub(super) fn each_row(x: &mut [f32], cols: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    x.par_chunks_mut(ROWS * cols).enumerate().for_each(|(task, rows)| {
        rows.chunks_exact_mut(cols).enumerate().for_each(|(r, row)| f(task * ROWS + r, row));
    });
}

/// Calls `f(part of a, part of b)` for equal parts of both.
pub(super) fn each_pair(a: &mut [f32], b: &mut [f32], f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync) {
    const PART: usize = 1 << 13;
    let parts = a.par_chunks_mut(PART).zip(b.par_chunks_mut(PART)).enumerate();
    parts.for_each(|(i, (a, b))| f(i * PART, a, b));
}

/// Calls `f(offset, part of a)`.
pub(super) fn each_part(a: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
    const PART: usize = 1 << 13;
    a.par_chunks_mut(PART).enumerate().for_each(|(i, a)| f(i * PART, a));
}

/// `out[c] += sum over rows of term(row, columns)`: `f(row, columns, out part)` adds a row's part, rows in order.
pub(super) fn each_column(rows: usize, out: &mut [f32], f: impl Fn(usize, std::ops::Range<usize>, &mut [f32]) + Sync) {
    out.par_chunks_mut(COLS).enumerate().for_each(|(i, out)| {
        let columns = i * COLS..i * COLS + out.len();
        (0..rows).for_each(|row| f(row, columns.clone(), out));
    });
}

//! Muon: a matrix's momentum is made orthogonal before it becomes a step, so that all directions of the matrix move alike.
//!
//! Steps are scaled to the size that AdamW's have (`0.2 sqrt(max(rows, cols))`), so both take the same learning rate and decay.

use keye_backend::Isa;
use keye_backend::matmul::{Matrix, Old, par_matmul_bf16};

const MOMENTUM: f32 = 0.95;
/// Of the root mean square of a step.
const SIZE: f32 = 0.2;
const ITERATIONS: usize = 5;
/// `a x + b x^3 + c x^5` takes singular values from (0, 1] to near 1 within [`ITERATIONS`].
const POLYNOMIAL: [f32; 3] = [3.4445, -4.775, 2.0315];
const EPS: f32 = 1e-7;

/// One step of a matrix of `rows` rows; `g` is scaled by `clip` first.
#[expect(clippy::too_many_arguments, reason = "a step and its operands")]
pub(crate) fn step(isa: Isa, rows: usize, p: &mut [f32], g: &[f32], m: &mut [f32], clip: f32, lr: f32, decay: f32) {
    let cols = p.len() / rows;
    let mut x: Vec<f32> = (m.iter_mut().zip(g))
        .map(|(m, g)| {
            *m = MOMENTUM * *m + clip * g;
            MOMENTUM * *m + clip * g
        })
        .collect();
    if rows > cols {
        x = transposed(&x, rows, cols);
        orthogonalise(isa, &mut x, cols, rows);
        x = transposed(&x, cols, rows);
    } else {
        orthogonalise(isa, &mut x, rows, cols);
    }
    let size = SIZE * (rows.max(cols) as f32).sqrt();
    p.iter_mut().zip(&x).for_each(|(p, x)| *p -= lr * (size * x + decay * *p));
}

/// Brings all singular values of a matrix with no more rows than columns near 1 (Newton and Schulz).
fn orthogonalise(isa: Isa, x: &mut Vec<f32>, rows: usize, cols: usize) {
    let norm = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
    x.iter_mut().for_each(|x| *x /= norm + EPS);
    let [a, b, c] = POLYNOMIAL;
    let mut gram = vec![0.0; rows * rows];
    let mut square = gram.clone();
    for _ in 0..ITERATIONS {
        let whole = Matrix::new(x, rows, cols);
        par_matmul_bf16(isa, whole, whole.t(), &mut gram, Old::Replace);
        let grams = Matrix::new(&gram, rows, rows);
        par_matmul_bf16(isa, grams, grams, &mut square, Old::Replace);
        square.iter_mut().zip(&gram).for_each(|(square, gram)| *square = b * gram + c * *square);
        let mut next: Vec<f32> = x.iter().map(|x| a * x).collect();
        par_matmul_bf16(isa, Matrix::new(&square, rows, rows), whole, &mut next, Old::Keep);
        *x = next;
    }
}

fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| x[r * cols + c])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_moves_every_direction_alike() {
        // Different singular values, tall and wide.
        for (rows, cols) in [(3, 5), (5, 3)] {
            let mut g = vec![0.0; 15];
            for (i, value) in [1.0, 0.3, 0.1].into_iter().enumerate() {
                g[i * cols + i] = value;
            }
            let (mut p, mut m) = (vec![0.0; 15], vec![0.0; 15]);
            step(Isa::detect(), rows, &mut p, &g, &mut m, 2.0, 0.1, 0.0);
            let size = 0.1 * 0.2 * 5f32.sqrt();
            for i in 0..3 {
                let ratio = -p[i * cols + i] / size;
                assert!((0.65..1.25).contains(&ratio), "{i}: {ratio}");
            }
            assert_eq!(m[0], 2.0);
            assert!(p.iter().enumerate().all(|(i, p)| i % (cols + 1) == 0 || p.abs() < 1e-3));
        }
        // Decay alone.
        let (mut p, mut m) = (vec![1.0; 4], vec![0.0; 4]);
        step(Isa::detect(), 2, &mut p, &[0.0; 4], &mut m, 1.0, 0.1, 0.5);
        assert!(p.iter().all(|p| (p - 0.95).abs() < 1e-6));
    }
}

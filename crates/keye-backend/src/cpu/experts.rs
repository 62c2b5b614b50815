//! Mixtures of experts: the rows of an expert go through it together, so a prompt makes few large products and a decoded
//! token reads only the chosen experts.

use super::Cpu;
use crate::host::{HostTensor, HostWeight};
use crate::{Activation, Backend, BackendError, Expert};

/// `y[i] += sum over t of weights[i, t] * expert[chosen[i, t]](x[i])`, summed from left to right.
pub(super) fn add(
    cpu: &Cpu,
    x: &HostTensor,
    experts: &[Expert<HostWeight>],
    chosen: &[u32],
    weights: &HostTensor,
    y: &mut HostTensor,
) -> Result<(), BackendError> {
    let per_row = weights.cols;
    assert_eq!(chosen.len(), x.rows * per_row, "experts of every row");
    let mut slots: Vec<Vec<usize>> = vec![Vec::new(); experts.len()];
    for (slot, expert) in chosen.iter().enumerate() {
        slots[*expert as usize].push(slot);
    }
    let mut results = HostTensor::zeros(chosen.len(), y.cols);
    for (expert, slots) in experts.iter().zip(&slots).filter(|(_, slots)| !slots.is_empty()) {
        let rows: Vec<u32> = slots.iter().map(|slot| (slot / per_row) as u32).collect();
        let h = cpu.gated(&x.gather_rows(&rows, 1), &expert.gate, &expert.up)?;
        let out = cpu.linear(&h, &expert.down, None, Activation::None)?;
        for (i, slot) in slots.iter().enumerate() {
            results.row_mut(*slot).copy_from_slice(out.row(i));
        }
    }
    let cols = y.cols;
    cpu.each_row(y, 2 * per_row * cols, |i, row| {
        let mut sum = vec![0.0f32; cols];
        for (t, weight) in weights.row(i).iter().enumerate() {
            for (sum, value) in sum.iter_mut().zip(results.row(i * per_row + t)) {
                *sum += weight * value;
            }
        }
        for (value, sum) in row.iter_mut().zip(&sum) {
            *value += sum;
        }
    });
    Ok(())
}

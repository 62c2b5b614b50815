//! Mixtures of experts: the rows of an expert go through it together, so a prompt makes few large products and a decoded
//! token reads only the chosen experts' bytes. All experts of a layer are two launches.

use std::ops::Range;

use super::Cpu;
use super::gemm::{Finish, Job, products};
use crate::host::{HostTensor, HostWeight};
use crate::{Activation, Expert, UNSELECTED};

/// `y[i] += sum over t of weights[i, t] * expert[chosen[i, t]](x[i])`, summed from left to right, without the unselected.
pub(super) fn add(
    cpu: &Cpu,
    x: &HostTensor,
    experts: &[Expert<HostWeight>],
    chosen: &[u32],
    weights: &HostTensor,
    y: &mut HostTensor,
) {
    let per_row = weights.cols;
    assert_eq!(chosen.len(), x.rows * per_row, "experts of every row");
    // Slots in the order of their experts, so that each expert's rows lie together.
    let mut slots: Vec<usize> = (0..chosen.len()).filter(|slot| chosen[*slot] != UNSELECTED).collect();
    slots.sort_by_key(|slot| chosen[*slot]);
    let mut groups: Vec<(&Expert<HostWeight>, Range<usize>)> = Vec::new();
    let mut end = 0;
    for group in slots.chunk_by(|a, b| chosen[*a] == chosen[*b]) {
        groups.push((&experts[chosen[group[0]] as usize], end..end + group.len()));
        end += group.len();
    }
    let Some((first, _)) = groups.first() else { return };

    let mut h = HostTensor::zeros(slots.len(), first.gate.rows);
    let sent: Vec<u32> = slots.iter().map(|slot| (slot / per_row) as u32).collect();
    let gates: Vec<Finish<'_>> = groups.iter().map(|(expert, _)| Finish::Gate(&expert.up)).collect();
    let mut jobs = Vec::with_capacity(groups.len());
    for ((expert, rows), finish) in groups.iter().zip(&gates) {
        jobs.push(Job { rows: rows.clone(), weight: &expert.gate, bias: None, finish });
    }
    products(&cpu.pool, cpu.isa, &x.gather_rows(&sent, 1), &jobs, &mut h);

    let mut results = HostTensor::zeros(slots.len(), y.cols);
    let finish = &Finish::Store(Activation::None);
    let mut jobs = Vec::with_capacity(groups.len());
    for (expert, rows) in &groups {
        jobs.push(Job { rows: rows.clone(), weight: &expert.down, bias: None, finish });
    }
    products(&cpu.pool, cpu.isa, &h, &jobs, &mut results);

    let mut place = vec![None; chosen.len()];
    slots.iter().enumerate().for_each(|(at, slot)| place[*slot] = Some(at));
    let cols = y.cols;
    cpu.each_row(y, 2 * per_row * cols, |i, row| {
        let mut sum = vec![0.0f32; cols];
        for (t, weight) in weights.row(i).iter().enumerate() {
            let Some(at) = place[i * per_row + t] else { continue };
            for (sum, value) in sum.iter_mut().zip(results.row(at)) {
                *sum += weight * value;
            }
        }
        for (value, sum) in row.iter_mut().zip(&sum) {
            *value += sum;
        }
    });
}

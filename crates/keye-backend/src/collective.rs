//! What devices that share a model tell each other.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::host::HostTensor;
use crate::{Backend, BackendError};

/// One of several ranks, each a device with a part of a model, that go through the same operations in the same order.
///
/// An operation returns when all ranks have come to it, or fails on all of them when one has given up; tensors that were
/// handed over are then lost.
pub trait Collective<B: Backend>: Send + Sync {
    /// This rank's number.
    fn rank(&self) -> usize;
    /// How many there are.
    fn ranks(&self) -> usize;
    /// `x` becomes the sum of all ranks' `x`, added in the order of the ranks: every rank has the same bits, and a row's
    /// do not depend on other rows.
    fn all_reduce_sum(&self, backend: &B, x: &mut B::Tensor) -> Result<(), BackendError>;
    /// Rank 0 gets the columns of all ranks side by side, in the order of the ranks; the others get nothing.
    fn gather_columns(&self, backend: &B, x: B::Tensor) -> Result<Option<B::Tensor>, BackendError>;
    /// Rank 0's rows for every rank; the others bring nothing.
    fn broadcast(&self, backend: &B, x: Option<B::Tensor>) -> Result<B::Tensor, BackendError>;
    /// This rank gives up: all operations fail with `reason` until [`Collective::recover`].
    fn abort(&self, reason: &str);
    /// Begins anew after an [`Collective::abort`]; no rank may be in an operation.
    fn recover(&self);
}

/// Looks at the round before a rank sleeps: some tens of microseconds, as the other ranks need for what they still do.
const SPINS: usize = 1500;

/// Ranks of one process whose tensors are in host memory.
pub struct SharedMemory {
    rank: usize,
    meeting: Arc<Meeting>,
}

/// Where ranks bring their tensors.
struct Meeting {
    ranks: usize,
    /// Operations that are complete.
    round: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What ranks have brought to the operation under way.
    brought: Vec<Option<HostTensor>>,
    /// All ranks' tensors of the last operation that is complete.
    all: Arc<Vec<HostTensor>>,
    /// Who gave up, and why.
    failed: Option<(usize, String)>,
}

impl SharedMemory {
    /// The members of a group of `ranks`, in order.
    pub fn group(ranks: usize) -> Vec<Self> {
        let state = State { brought: vec![None; ranks], ..State::default() };
        let meeting = Meeting { ranks, round: AtomicU64::new(0), state: Mutex::new(state), changed: Condvar::new() };
        let meeting = Arc::new(meeting);
        (0..ranks).map(|rank| Self { rank, meeting: Arc::clone(&meeting) }).collect()
    }

    /// Brings a tensor and waits for the other ranks'.
    fn exchange(&self, tensor: HostTensor) -> Result<Arc<Vec<HostTensor>>, BackendError> {
        let meeting = &*self.meeting;
        let mut state = meeting.lock();
        if let Some((rank, reason)) = &state.failed {
            return Err(self.error(*rank, reason));
        }
        let round = meeting.round.load(SeqCst);
        state.brought[self.rank] = Some(tensor);
        if state.brought.iter().all(Option::is_some) {
            state.all = Arc::new(state.brought.iter_mut().filter_map(Option::take).collect());
            meeting.round.store(round + 1, SeqCst);
            meeting.changed.notify_all();
            return Ok(Arc::clone(&state.all));
        }
        drop(state);
        for _ in 0..SPINS {
            if meeting.round.load(SeqCst) != round {
                break;
            }
            spin_loop();
        }
        let mut state = meeting.lock();
        loop {
            // The next round cannot be complete without this rank, so this is still the one that was waited for.
            if meeting.round.load(SeqCst) != round {
                return Ok(Arc::clone(&state.all));
            }
            if let Some((rank, reason)) = &state.failed {
                return Err(self.error(*rank, reason));
            }
            state = meeting.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn error(&self, rank: usize, reason: &str) -> BackendError {
        BackendError::Rank { rank, ranks: self.meeting.ranks, reason: reason.to_owned() }
    }
}

impl Meeting {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Backend<Tensor = HostTensor>> Collective<B> for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.meeting.ranks
    }

    fn all_reduce_sum(&self, _backend: &B, x: &mut HostTensor) -> Result<(), BackendError> {
        let (rows, cols) = (x.rows, x.cols);
        let all = self.exchange(std::mem::replace(x, HostTensor::zeros(0, 0)))?;
        let (first, others) = all.split_first().expect("a group has ranks");
        let mut sum = first.clone();
        for other in others {
            assert_eq!((other.rows, other.cols), (rows, cols), "the ranks' tensors have one shape");
            for (sum, value) in sum.data.iter_mut().zip(&other.data) {
                *sum += value;
            }
        }
        *x = sum;
        Ok(())
    }

    fn gather_columns(&self, _backend: &B, x: HostTensor) -> Result<Option<HostTensor>, BackendError> {
        let rows = x.rows;
        let all = self.exchange(x)?;
        if self.rank != 0 {
            return Ok(None);
        }
        assert!(all.iter().all(|part| part.rows == rows), "the ranks' tensors have the same rows");
        let cols = all.iter().map(|part| part.cols).sum();
        let data = (0..rows).flat_map(|row| all.iter().flat_map(move |part| part.row(row))).copied().collect();
        Ok(Some(HostTensor { rows, cols, data }))
    }

    fn broadcast(&self, _backend: &B, x: Option<HostTensor>) -> Result<HostTensor, BackendError> {
        let all = self.exchange(x.unwrap_or_else(|| HostTensor::zeros(0, 0)))?;
        Ok(all[0].clone())
    }

    fn abort(&self, reason: &str) {
        let mut state = self.meeting.lock();
        state.failed.get_or_insert_with(|| (self.rank, reason.to_owned()));
        self.meeting.changed.notify_all();
    }

    fn recover(&self) {
        let mut state = self.meeting.lock();
        state.failed = None;
        state.brought.fill(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reference;

    /// Runs every rank on a thread of its own.
    fn on_all<T: Send>(ranks: usize, work: impl Fn(&dyn Collective<Reference>) -> T + Sync) -> Vec<T> {
        let group = SharedMemory::group(ranks);
        std::thread::scope(|scope| {
            let threads: Vec<_> = group.iter().map(|member| scope.spawn(|| work(member))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn tensor(rank: usize, round: usize) -> HostTensor {
        let values: Vec<f32> = (0..15).map(|i| ((rank * 31 + round * 7 + i) as f32).sin() * 1e3).collect();
        HostTensor::from_f32(3, 5, &values)
    }

    #[test]
    fn sums_are_in_the_order_of_the_ranks_on_every_rank() {
        for ranks in [1, 2, 3, 8] {
            let rounds = 300;
            let sums = on_all(ranks, |member| -> Vec<Vec<f32>> {
                let sum = |round| {
                    let mut x = tensor(member.rank(), round);
                    member.all_reduce_sum(&Reference, &mut x).unwrap();
                    x.data.clone()
                };
                (0..rounds).map(sum).collect()
            });
            for round in 0..rounds {
                let add = |sum: Vec<f32>, rank: usize| {
                    sum.iter().zip(&tensor(rank, round).data).map(|(a, b)| a + b).collect::<Vec<f32>>()
                };
                let expected = (1..ranks).fold(tensor(0, round).data.clone(), add);
                assert!(sums.iter().all(|found| found[round] == expected), "{ranks} ranks, round {round}");
            }
        }
    }

    #[test]
    fn the_first_rank_gets_the_columns_and_gives_its_rows() {
        let found = on_all(3, |member| {
            let rank = member.rank();
            let part = HostTensor::from_f32(2, rank + 1, &vec![rank as f32; 2 * (rank + 1)]);
            let gathered = member.gather_columns(&Reference, part).unwrap();
            let rows = (rank == 0).then(|| tensor(7, 7));
            (gathered.map(|g| (g.cols, g.data.clone())), member.broadcast(&Reference, rows).unwrap())
        });
        let row = [0.0, 1.0, 1.0, 2.0, 2.0, 2.0];
        assert_eq!(found[0].0, Some((6, [row, row].concat())));
        assert!(found[1].0.is_none() && found[2].0.is_none());
        assert!(found.iter().all(|(_, rows)| *rows == tensor(7, 7)));
    }

    #[test]
    fn nobody_waits_for_a_rank_that_gave_up_and_the_group_can_go_on() {
        let group = SharedMemory::group(3);
        let members: Vec<&dyn Collective<Reference>> = group.iter().map(|member| member as _).collect();
        for round in 0..50 {
            let sum = |member: &dyn Collective<Reference>| {
                let mut x = tensor(member.rank(), round);
                member.all_reduce_sum(&Reference, &mut x)
            };
            std::thread::scope(|scope| {
                let waiting: Vec<_> = members[..2].iter().map(|member| scope.spawn(|| sum(*member))).collect();
                if round % 2 == 0 {
                    members[2].abort("out of memory");
                } else {
                    sum(members[2]).unwrap();
                }
                for waiting in waiting {
                    match waiting.join().unwrap() {
                        Ok(()) => assert_eq!(round % 2, 1),
                        Err(error) => assert_eq!(error.to_string(), "rank 2 of 3: out of memory"),
                    }
                }
            });
            members[0].recover();
        }
    }
}

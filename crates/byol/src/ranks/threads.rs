//! Ranks as threads of one process, which communicate through memory: for several devices of one
//! machine, and for tests.

use std::sync::{Arc, Barrier, Mutex};

use super::{CommStats, Communicator};

/// One rank.
pub struct Thread {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    world_size: usize,
    /// Operands of a sum, by rank.
    operands: Mutex<Vec<Vec<f64>>>,
    /// Bytes of a broadcast.
    bytes: Mutex<Vec<u8>>,
    barrier: Barrier,
}

/// Creates `n` ranks, one per thread.
pub fn ranks(n: usize) -> Vec<Thread> {
    let operands = Mutex::new(vec![Vec::new(); n]);
    let shared = Arc::new(Shared { world_size: n, operands, bytes: Mutex::default(), barrier: Barrier::new(n) });
    (0..n).map(|rank| Thread { rank, shared: shared.clone() }).collect()
}

/// Locks a mutex, ignoring poison: if a thread panics, the others wait at the barrier and never see
/// a partially written value.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Communicator for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.shared.world_size
    }

    fn all_reduce_sum(&self, values: &mut [f32]) {
        let mut wide: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        self.all_reduce_sum_f64(&mut wide);
        values.iter_mut().zip(wide).for_each(|(v, w)| *v = w as f32);
    }

    fn all_reduce_sum_f64(&self, values: &mut [f64]) {
        lock(&self.shared.operands)[self.rank] = values.to_vec();
        self.shared.barrier.wait();
        let sums = {
            let operands = lock(&self.shared.operands);
            // In rank order, so that all ranks get the same bits.
            (0..values.len()).map(|i| operands.iter().map(|own| own[i]).sum()).collect::<Vec<f64>>()
        };
        values.copy_from_slice(&sums);
        // The operands are overwritten only after all ranks have read them.
        self.shared.barrier.wait();
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        if self.rank == 0 {
            lock(&self.shared.bytes).clone_from(bytes);
        }
        self.shared.barrier.wait();
        bytes.clone_from(&lock(&self.shared.bytes));
        self.shared.barrier.wait();
    }

    /// Zero: there is no network to measure.
    fn comm_stats(&self) -> CommStats {
        CommStats::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::Ranks;

    #[test]
    fn collectives_give_the_same_result_on_all_ranks() {
        let results: Vec<_> = std::thread::scope(|scope| {
            let work = |thread: Thread| {
                scope.spawn(move || {
                    let rank = thread.rank();
                    let ranks = Ranks::new(Box::leak(Box::new(thread)));
                    let mut values = vec![rank as f64, 1.0];
                    ranks.all_reduce_sum(&mut values);
                    let bytes = ranks.broadcast(vec![rank as u8; 3]);
                    (
                        values,
                        bytes,
                        ranks.first_mismatch(b"same"),
                        ranks.first_mismatch(&[u8::from(rank == 2)]),
                        ranks.is_root(),
                    )
                })
            };
            let started: Vec<_> = ranks(4).into_iter().map(work).collect();
            started.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for (rank, result) in results.into_iter().enumerate() {
            assert_eq!(result, (vec![6.0, 4.0], vec![0; 3], None, Some(2), rank == 0));
        }
        let mut values = [3.0];
        Ranks::SINGLE.all_reduce_sum(&mut values);
        assert_eq!((values, Ranks::SINGLE.world_size(), Ranks::SINGLE.first_mismatch(b"x")), ([3.0], 1, None));
    }
}

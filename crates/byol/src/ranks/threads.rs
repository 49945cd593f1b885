//! Ranks that are threads of one process: they add up through memory. For several devices of one machine, and for tests.

use std::sync::{Arc, Barrier, Mutex};

use super::{Communicator, Spent};

/// One of them.
pub struct Thread {
    rank: usize,
    all: Arc<All>,
}

struct All {
    ranks: usize,
    /// What each rank has brought.
    brought: Mutex<Vec<Vec<f64>>>,
    bytes: Mutex<Vec<u8>>,
    barrier: Barrier,
}

/// As many ranks, one for each thread.
pub fn ranks(n: usize) -> Vec<Thread> {
    let brought = Mutex::new(vec![Vec::new(); n]);
    let all = Arc::new(All { ranks: n, brought, bytes: Mutex::default(), barrier: Barrier::new(n) });
    (0..n).map(|rank| Thread { rank, all: all.clone() }).collect()
}

/// A thread that has panicked leaves the others waiting at the barrier; none of them sees a half-written value.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Ranks of one process have no network to measure.
impl Communicator for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.all.ranks
    }

    fn sum(&self, values: &mut [f32]) {
        let mut wide: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        self.sum_f64(&mut wide);
        values.iter_mut().zip(wide).for_each(|(v, w)| *v = w as f32);
    }

    fn sum_f64(&self, values: &mut [f64]) {
        locked(&self.all.brought)[self.rank] = values.to_vec();
        self.all.barrier.wait();
        let sums = {
            let brought = locked(&self.all.brought);
            // In the order of ranks, so that all get the same bits.
            (0..values.len()).map(|i| brought.iter().map(|b| b[i]).sum()).collect::<Vec<f64>>()
        };
        values.copy_from_slice(&sums);
        // Nobody brings the next before all have read this.
        self.all.barrier.wait();
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        if self.rank == 0 {
            locked(&self.all.bytes).clone_from(bytes);
        }
        self.all.barrier.wait();
        bytes.clone_from(&locked(&self.all.bytes));
        self.all.barrier.wait();
    }

    fn spent(&self) -> Spent {
        Spent::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::Ranks;

    #[test]
    fn all_ranks_get_the_same_sums_and_what_the_first_has() {
        let results: Vec<_> = std::thread::scope(|scope| {
            let work = |thread: Thread| {
                scope.spawn(move || {
                    let rank = thread.rank();
                    let ranks = Ranks::new(Box::leak(Box::new(thread)));
                    let mut values = vec![rank as f64, 1.0];
                    ranks.sum(&mut values);
                    let bytes = ranks.broadcast(vec![rank as u8; 3]);
                    (values, bytes, ranks.differs(b"same"), ranks.differs(&[u8::from(rank == 2)]), ranks.leads())
                })
            };
            let started: Vec<_> = ranks(4).into_iter().map(work).collect();
            started.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for (rank, result) in results.into_iter().enumerate() {
            assert_eq!(result, (vec![6.0, 4.0], vec![0; 3], None, Some(2), rank == 0));
        }
        let mut values = [3.0];
        Ranks::ALONE.sum(&mut values);
        assert_eq!((values, Ranks::ALONE.count(), Ranks::ALONE.differs(b"x")), ([3.0], 1, None));
    }
}

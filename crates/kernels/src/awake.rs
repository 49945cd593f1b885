//! Threads that stay awake between the layers of a step.
//!
//! A layer is a handful of parallel loops of a millisecond or less. A worker that finds nothing to do goes to sleep within microseconds, and
//! waking it takes some tens of them; with hundreds of loops a step that is a part of the time. While an [`Awake`] lives, the workers of
//! the pool ask for work over and over instead, and give way to other threads in between.

use std::{
    hint,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use rayon::Yield;

/// How long to wait for the workers to come. They are idle when a step begins; where they are not, the step goes without.
const PATIENCE: Duration = Duration::from_millis(1);

/// How long a worker stays without work. It may attend where it waits for a part of another caller's loop, and the caller that keeps it
/// awake may wait for that other one (ranks that are threads do, at each sum): without an end they would wait for each other.
const LULL: Duration = Duration::from_millis(20);

/// Turns of a waiting loop between two looks.
const TURNS: usize = 64;

/// Whether there is one: a worker that kept awake for two callers would begin the one within the other, deeper and deeper.
static TAKEN: AtomicBool = AtomicBool::new(false);

#[derive(Debug, Default)]
struct State {
    /// Who comes now comes too late: perhaps inside the caller's own work, which it would hold up.
    closed: AtomicBool,
    over: AtomicBool,
    here: AtomicUsize,
}

/// Keeps the workers of the calling thread's pool awake until it is dropped, or until there has been nothing to do for a while. There is one
/// at a time; others do nothing.
#[derive(Debug)]
pub struct Awake(Option<Arc<State>>);

impl Awake {
    /// Asks the workers to come, and waits for them a millisecond at most.
    pub fn new() -> Awake {
        // The calling thread may be a worker itself.
        let others = rayon::current_num_threads() - usize::from(rayon::current_thread_index().is_some());
        if others == 0 || TAKEN.swap(true, SeqCst) {
            return Awake(None);
        }
        let state = Arc::new(State::default());
        for _ in 0..others {
            let state = state.clone();
            rayon::spawn(move || state.attend());
        }
        let began = Instant::now();
        // Not by waiting for the pool: the calling thread would attend itself, and never come back.
        while state.here.load(SeqCst) < others && began.elapsed() < PATIENCE {
            thread::yield_now();
        }
        state.closed.store(true, SeqCst);
        Awake(Some(state))
    }
}

impl State {
    fn attend(&self) {
        self.here.fetch_add(1, SeqCst);
        // Counted first: who is counted before the door closes is waited for at the end.
        if !self.closed.load(SeqCst) {
            let mut worked = Instant::now();
            while !self.over.load(SeqCst) && worked.elapsed() < LULL {
                if rayon::yield_now() == Some(Yield::Executed) {
                    worked = Instant::now();
                } else {
                    (0..TURNS).for_each(|_| hint::spin_loop());
                    thread::yield_now();
                }
            }
        }
        self.here.fetch_sub(1, SeqCst);
    }
}

impl Default for Awake {
    fn default() -> Self {
        Awake::new()
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        let Some(state) = &self.0 else { return };
        state.over.store(true, SeqCst);
        // Nobody is inside when the next one begins.
        while state.here.load(SeqCst) > 0 {
            hint::spin_loop();
        }
        TAKEN.store(false, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn work_is_done_as_without_and_one_is_enough() {
        let sum = || (0..100_000u64).into_par_iter().sum::<u64>();
        let awake = Awake::new();
        assert!(Awake::new().0.is_none() || awake.0.is_none());
        assert_eq!(sum(), 4_999_950_000);
        drop(awake);
        for _ in 0..200 {
            let _awake = Awake::new();
            assert_eq!(sum(), 4_999_950_000);
        }
    }

    #[test]
    fn a_caller_that_waits_for_another_holds_it_up_for_a_moment_alone() {
        // The other one's loops are cut at any place, also where a worker waits for a part of them and could attend there for good.
        let (sums, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    (0..64u64).into_par_iter().for_each(|_| (0..200).for_each(|_| hint::spin_loop()));
                    sums.fetch_add(1, SeqCst);
                }
            });
            for _ in 0..200 {
                let _awake = Awake::new();
                let (before, began) = (sums.load(SeqCst), Instant::now());
                while sums.load(SeqCst) < before + 2 {
                    thread::sleep(Duration::from_micros(100));
                    if began.elapsed() > Duration::from_secs(20) {
                        stop.store(true, SeqCst);
                        panic!("held up");
                    }
                }
            }
            stop.store(true, SeqCst);
        });
    }

    #[test]
    fn a_caller_inside_the_pool_comes_back() {
        let sums: Vec<u64> = (0..64u64)
            .into_par_iter()
            .map(|i| {
                let _awake = Awake::new();
                (0..1000u64).into_par_iter().map(|j| i + j).sum()
            })
            .collect();
        assert_eq!(sums[1], 500_500);
    }
}

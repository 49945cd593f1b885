//! Workers that stay awake between the layers of a step.
//!
//! A layer is a handful of parallel loops of a millisecond or less. A worker without work falls
//! asleep within microseconds, and waking it takes some tens of microseconds. With hundreds of
//! loops per step that is a measurable share of the time (2 to 4 %). While a [`KeepAwake`] lives,
//! the workers of the pool spin instead: they ask for work over and over, and yield to other
//! threads in between.

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

/// Longest wait for the workers to enter their loop. They are idle when a step begins; if they are
/// not, the step runs without them.
const ENTRY_TIMEOUT: Duration = Duration::from_millis(1);

/// Longest time that a worker spins without work. A worker may enter its loop while it waits for a
/// part of another caller's parallel loop, and the caller that keeps it awake may wait for that
/// other caller (ranks that are threads do, at each all-reduce). Without a limit they would
/// deadlock.
const IDLE_TIMEOUT: Duration = Duration::from_millis(20);

/// Spin-loop hints between two requests for work.
const SPINS: usize = 64;

/// Set while a [`KeepAwake`] lives. With two of them, a worker would enter the loop of one within
/// that of the other, deeper and deeper.
static ACTIVE: AtomicBool = AtomicBool::new(false);

#[derive(Debug, Default)]
struct State {
    /// Workers may no longer enter: one that enters late may do so within the caller's own work and
    /// would hold it up.
    closed: AtomicBool,
    /// Workers leave.
    stopped: AtomicBool,
    /// Number of workers in the loop.
    inside: AtomicUsize,
}

/// Guard that keeps the workers of the calling thread's pool awake until it is dropped, or until
/// there has been no work for 20 ms. Only one is active at a time; others do nothing.
#[derive(Debug)]
pub struct KeepAwake(Option<Arc<State>>);

impl KeepAwake {
    /// Asks the workers to spin, and waits at most 1 ms for them to begin.
    pub fn new() -> KeepAwake {
        // The calling thread may be a worker itself.
        let others = rayon::current_num_threads() - usize::from(rayon::current_thread_index().is_some());
        if others == 0 || ACTIVE.swap(true, SeqCst) {
            return KeepAwake(None);
        }
        let state = Arc::new(State::default());
        for _ in 0..others {
            let state = state.clone();
            rayon::spawn(move || state.spin());
        }
        let start = Instant::now();
        // Not by waiting through the pool: the calling thread would run `spin` itself, and not
        // return.
        while state.inside.load(SeqCst) < others && start.elapsed() < ENTRY_TIMEOUT {
            thread::yield_now();
        }
        state.closed.store(true, SeqCst);
        KeepAwake(Some(state))
    }
}

impl State {
    /// Body of a worker: asks for work until stopped or idle for too long.
    fn spin(&self) {
        self.inside.fetch_add(1, SeqCst);
        // Counted before the check: `drop` waits for every worker that has passed it.
        if !self.closed.load(SeqCst) {
            let mut last_work = Instant::now();
            while !self.stopped.load(SeqCst) && last_work.elapsed() < IDLE_TIMEOUT {
                if rayon::yield_now() == Some(Yield::Executed) {
                    last_work = Instant::now();
                } else {
                    (0..SPINS).for_each(|_| hint::spin_loop());
                    thread::yield_now();
                }
            }
        }
        self.inside.fetch_sub(1, SeqCst);
    }
}

impl Default for KeepAwake {
    fn default() -> Self {
        KeepAwake::new()
    }
}

impl Drop for KeepAwake {
    fn drop(&mut self) {
        let Some(state) = &self.0 else { return };
        state.stopped.store(true, SeqCst);
        // No worker is inside when the next guard begins.
        while state.inside.load(SeqCst) > 0 {
            hint::spin_loop();
        }
        ACTIVE.store(false, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn parallel_work_completes_and_nested_guards_do_nothing() {
        let sum = || (0..100_000u64).into_par_iter().sum::<u64>();
        let awake = KeepAwake::new();
        assert!(KeepAwake::new().0.is_none() || awake.0.is_none());
        assert_eq!(sum(), 4_999_950_000);
        drop(awake);
        for _ in 0..200 {
            let _awake = KeepAwake::new();
            assert_eq!(sum(), 4_999_950_000);
        }
    }

    #[test]
    fn does_not_deadlock_with_a_caller_in_another_thread() {
        // The guard begins at any point of the other caller's loops, also where a worker waits for
        // a part of them and could spin there forever.
        let (sums, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    (0..64u64).into_par_iter().for_each(|_| (0..200).for_each(|_| hint::spin_loop()));
                    sums.fetch_add(1, SeqCst);
                }
            });
            for _ in 0..200 {
                let _awake = KeepAwake::new();
                let (before, start) = (sums.load(SeqCst), Instant::now());
                while sums.load(SeqCst) < before + 2 {
                    thread::sleep(Duration::from_micros(100));
                    if start.elapsed() > Duration::from_secs(20) {
                        stop.store(true, SeqCst);
                        panic!("the other caller makes no progress");
                    }
                }
            }
            stop.store(true, SeqCst);
        });
    }

    #[test]
    fn works_inside_the_pool() {
        let sums: Vec<u64> = (0..64u64)
            .into_par_iter()
            .map(|i| {
                let _awake = KeepAwake::new();
                (0..1000u64).into_par_iter().map(|j| i + j).sum()
            })
            .collect();
        assert_eq!(sums[1], 500_500);
    }
}

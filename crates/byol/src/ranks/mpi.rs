//! Ranks as processes, started by `mpirun` or a similar launcher, which communicate through an MPI
//! library.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mpi::{
    Threading,
    collective::SystemOperation,
    environment::Universe,
    topology::{Communicator as _, SimpleCommunicator},
    traits::{CommunicatorCollectives as _, Equivalence, Root as _},
};

use super::{CommStats, Communicator, Ranks};

/// An initialized MPI library. Finalized when dropped.
pub struct Session {
    /// All ranks.
    pub ranks: Ranks,
    /// Index of this rank among those of the same machine, and their number.
    pub local: [usize; 2],
    mpi: &'static Mpi,
    _universe: Universe,
}

/// Maximum bytes per message: MPI counts in 32 bits.
const MESSAGE_BYTES: usize = 1 << 30;

struct Mpi {
    rank: usize,
    world_size: usize,
    /// Communication so far. Also serializes calls from different threads, which MPI was promised
    /// (`Threading::Serialized`).
    stats: Mutex<CommStats>,
    start: Instant,
    /// Milliseconds from `start` to the start of the current collective operation; 0 outside of
    /// one.
    waiting_since: AtomicU64,
}

impl Session {
    /// Initializes MPI. `None` if it has been initialized before, or does not support threads.
    pub fn start() -> Option<Session> {
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)?;
        if threading < Threading::Serialized {
            return None;
        }
        let world = universe.world();
        let count = |n: i32| usize::try_from(n).expect("MPI counts from 0");
        let machine = world.split_shared(world.rank());
        let mpi: &'static Mpi = Box::leak(Box::new(Mpi {
            rank: count(world.rank()),
            world_size: count(world.size()),
            stats: Mutex::default(),
            start: Instant::now(),
            waiting_since: AtomicU64::new(0),
        }));
        let local = [count(machine.rank()), count(machine.size())];
        Some(Session { ranks: Ranks::new(mpi), local, mpi, _universe: universe })
    }

    /// Returns a probe for the time that this rank has been waiting for the others, `None` while it
    /// is not waiting. The probe outlives the session.
    pub fn waiting(&self) -> impl Fn() -> Option<Duration> + Send + Sync + 'static {
        let mpi = self.mpi;
        move || mpi.waiting()
    }

    /// Calls `on_timeout` once this rank has been waiting for the others for `limit`: one of them
    /// hangs, or has died unnoticed.
    pub fn watch(&self, limit: Duration, on_timeout: impl Fn(Duration) + Send + 'static) {
        let mpi = self.mpi;
        thread::spawn(move || {
            loop {
                thread::sleep((limit / 10).min(Duration::from_secs(5)));
                if let Some(waited) = mpi.waiting().filter(|waited| *waited >= limit) {
                    return on_timeout(waited);
                }
            }
        });
    }
}

/// Terminates all ranks, since the others would wait for this one. Only after [`Session::start`].
pub fn abort(code: i32) -> ! {
    SimpleCommunicator::world().abort(code)
}

impl Mpi {
    /// Time since the start of the current collective operation.
    fn waiting(&self) -> Option<Duration> {
        match self.waiting_since.load(Ordering::Relaxed) {
            0 => None,
            since => Some(self.start.elapsed().saturating_sub(Duration::from_millis(since))),
        }
    }

    /// Runs a collective operation that sends `bytes`, and records it.
    fn collective(&self, bytes: usize, operation: impl FnOnce(&SimpleCommunicator)) {
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now();
        self.waiting_since.store(self.start.elapsed().as_millis().max(1) as u64, Ordering::Relaxed);
        operation(&SimpleCommunicator::world());
        self.waiting_since.store(0, Ordering::Relaxed);
        *stats = CommStats {
            messages: stats.messages + 1,
            bytes: stats.bytes + bytes as u64,
            seconds: stats.seconds + start.elapsed().as_secs_f64(),
        };
    }

    fn sum<T: Equivalence + Copy>(&self, values: &mut [T]) {
        let own = values.to_vec();
        let len = MESSAGE_BYTES / size_of::<T>();
        self.collective(size_of_val(values), |world| {
            for (own, sums) in own.chunks(len).zip(values.chunks_mut(len)) {
                world.all_reduce_into(own, sums, SystemOperation::sum());
            }
        });
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_sum(&self, values: &mut [f32]) {
        self.sum(values);
    }

    fn all_reduce_sum_f64(&self, values: &mut [f64]) {
        self.sum(values);
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let mut length = bytes.len() as u64;
        self.collective(size_of::<u64>() + bytes.len(), |world| {
            let root = world.process_at_rank(0);
            root.broadcast_into(&mut length);
            bytes.resize(length as usize, 0);
            bytes.chunks_mut(MESSAGE_BYTES).for_each(|part| root.broadcast_into(part));
        });
    }

    fn comm_stats(&self) -> CommStats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Ranks that are processes, started by `mpirun` or the like: they add up through an MPI library.

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

use super::{Communicator, Ranks, Spent};

/// MPI, from its start until it is dropped.
pub struct Session {
    /// Who shares the work.
    pub ranks: Ranks,
    /// Which of the ranks of this machine, and how many they are.
    pub local: [usize; 2],
    of: &'static Mpi,
    _universe: Universe,
}

/// Bytes a message: MPI counts in 32 bits.
const MOST: usize = 1 << 30;

struct Mpi {
    rank: usize,
    ranks: usize,
    /// MPI is told that no two threads call it at once.
    alone: Mutex<Spent>,
    began: Instant,
    /// Milliseconds from `began` to when this rank began to wait for others; 0: it does not wait.
    waits_since: AtomicU64,
}

impl Session {
    /// Starts MPI; none where it has been started before, or cannot be used from threads.
    pub fn start() -> Option<Session> {
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)?;
        if threading < Threading::Serialized {
            return None;
        }
        let world = universe.world();
        let count = |n: i32| usize::try_from(n).expect("MPI counts from 0");
        let here = world.split_shared(world.rank());
        let of: &'static Mpi = Box::leak(Box::new(Mpi {
            rank: count(world.rank()),
            ranks: count(world.size()),
            alone: Mutex::default(),
            began: Instant::now(),
            waits_since: AtomicU64::new(0),
        }));
        let local = [count(here.rank()), count(here.size())];
        Some(Session { ranks: Ranks::new(of), local, of, _universe: universe })
    }

    /// Looks on whether this rank waits for the others; the look outlives the session.
    pub fn waiting(&self) -> impl Fn() -> Option<Duration> + Send + Sync + 'static {
        let of = self.of;
        move || of.waits()
    }

    /// Calls `tell` once this rank has waited so long for the others: one of them hangs, or has died unseen.
    pub fn watch(&self, limit: Duration, tell: impl Fn(Duration) + Send + 'static) {
        let of = self.of;
        thread::spawn(move || {
            loop {
                thread::sleep((limit / 10).min(Duration::from_secs(5)));
                if let Some(waited) = of.waits().filter(|waited| *waited >= limit) {
                    return tell(waited);
                }
            }
        });
    }
}

/// Ends all ranks at once: the others would wait for this one. After [`Session::start`] alone.
pub fn abort(code: i32) -> ! {
    SimpleCommunicator::world().abort(code)
}

impl Mpi {
    fn waits(&self) -> Option<Duration> {
        match self.waits_since.load(Ordering::Relaxed) {
            0 => None,
            since => Some(self.began.elapsed().saturating_sub(Duration::from_millis(since))),
        }
    }

    fn together(&self, bytes: usize, what: impl FnOnce(&SimpleCommunicator)) {
        let mut spent = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        self.waits_since.store(self.began.elapsed().as_millis().max(1) as u64, Ordering::Relaxed);
        what(&SimpleCommunicator::world());
        self.waits_since.store(0, Ordering::Relaxed);
        *spent = Spent {
            messages: spent.messages + 1,
            bytes: spent.bytes + bytes as u64,
            seconds: spent.seconds + began.elapsed().as_secs_f64(),
        };
    }

    fn add_up<T: Equivalence + Copy>(&self, values: &mut [T]) {
        let own = values.to_vec();
        let most = MOST / size_of::<T>();
        self.together(size_of_val(values), |world| {
            for (own, all) in own.chunks(most).zip(values.chunks_mut(most)) {
                world.all_reduce_into(own, all, SystemOperation::sum());
            }
        });
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn sum(&self, values: &mut [f32]) {
        self.add_up(values);
    }

    fn sum_f64(&self, values: &mut [f64]) {
        self.add_up(values);
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let mut length = bytes.len() as u64;
        self.together(size_of::<u64>() + bytes.len(), |world| {
            let root = world.process_at_rank(0);
            root.broadcast_into(&mut length);
            bytes.resize(length as usize, 0);
            bytes.chunks_mut(MOST).for_each(|part| root.broadcast_into(part));
        });
    }

    fn spent(&self) -> Spent {
        *self.alone.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

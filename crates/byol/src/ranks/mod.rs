//! RANKS: data-parallel processes (or threads), each with a part of every batch and, if there are
//! several, a device of its own.
//!
//! All ranks hold the same weights. They exchange only sums: of gradients, and of batch norm's
//! statistics, forward and backward. So training on N ranks with batches of B / N is equivalent to
//! one rank with a batch of B, up to rounding.

#[cfg(feature = "mpi")]
#[doc(hidden)]
pub mod mpi;
pub mod threads;

use std::fmt;

use serde::{Serialize, de::DeserializeOwned};

/// Collective operations. All ranks call the same operations in the same order. Sums have the same
/// bits on all ranks.
pub trait Communicator: Sync {
    /// Index of this rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Sums over all ranks, in place.
    fn all_reduce_sum(&self, values: &mut [f32]);

    /// Sums over all ranks in double precision, in place.
    fn all_reduce_sum_f64(&self, values: &mut [f64]);

    /// Replaces `bytes` on all ranks with those of rank 0.
    fn broadcast(&self, bytes: &mut Vec<u8>);

    /// Communication of this rank so far.
    fn comm_stats(&self) -> CommStats;
}

/// Communication statistics of one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CommStats {
    /// Number of collective operations.
    pub messages: u64,
    /// Bytes sent by this rank.
    pub bytes: u64,
    /// Seconds, including the time spent waiting for slower ranks.
    pub seconds: f64,
}

/// Handle to all data-parallel ranks, as seen by one of them.
#[derive(Clone, Copy)]
pub struct Ranks(Option<&'static dyn Communicator>);

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.world_size())
    }
}

/// Equal if rank and world size are.
impl PartialEq for Ranks {
    fn eq(&self, other: &Self) -> bool {
        (self.rank(), self.world_size()) == (other.rank(), other.world_size())
    }
}

impl Eq for Ranks {}

/// Maximum values per message: large enough for full bandwidth, small enough for the buffers of
/// network cards.
const MESSAGE_LEN: usize = 1 << 22;

impl Ranks {
    /// A single rank, which does not communicate.
    pub const SINGLE: Ranks = Ranks(None);

    /// The ranks of a communicator.
    pub fn new(communicator: &'static dyn Communicator) -> Ranks {
        Ranks((communicator.world_size() > 1).then_some(communicator))
    }

    /// Index of this rank, from 0.
    pub fn rank(self) -> usize {
        self.0.map_or(0, Communicator::rank)
    }

    /// Number of ranks.
    pub fn world_size(self) -> usize {
        self.0.map_or(1, Communicator::world_size)
    }

    /// Returns `true` on rank 0, the one that reads and writes files and prints.
    pub fn is_root(self) -> bool {
        self.rank() == 0
    }

    /// Communication of this rank so far.
    pub fn comm_stats(self) -> CommStats {
        self.0.map_or(CommStats::default(), Communicator::comm_stats)
    }

    /// Sums over all ranks, in place.
    pub fn all_reduce_sum(self, values: &mut [f64]) {
        if let Some(communicator) = self.0 {
            communicator.all_reduce_sum_f64(values);
        }
    }

    /// Returns the bytes of rank 0 on all ranks.
    pub fn broadcast(self, mut bytes: Vec<u8>) -> Vec<u8> {
        if let Some(communicator) = self.0 {
            communicator.broadcast(&mut bytes);
        }
        bytes
    }

    /// Averages over all ranks, in place. Sends few large messages, since a message of few values
    /// takes as long as one of thousands.
    pub fn all_reduce_mean(self, values: &mut [f32]) {
        let Some(communicator) = self.0 else { return };
        let share = 1.0 / communicator.world_size() as f32;
        for message in values.chunks_mut(MESSAGE_LEN) {
            communicator.all_reduce_sum(message);
            message.iter_mut().for_each(|v| *v *= share);
        }
    }

    /// Returns the bytes of every rank, in rank order, on all ranks. For small data: each byte is
    /// sent as an f64.
    pub fn all_gather(self, own: &[u8]) -> Vec<Vec<u8>> {
        let mut lengths = vec![0.0; self.world_size()];
        lengths[self.rank()] = own.len() as f64;
        self.all_reduce_sum(&mut lengths);
        let lengths: Vec<usize> = lengths.into_iter().map(|n| n as usize).collect();
        let mut all = vec![0.0; lengths.iter().sum()];
        let from = lengths[..self.rank()].iter().sum::<usize>();
        all[from..from + own.len()].iter_mut().zip(own).for_each(|(to, byte)| *to = f64::from(*byte));
        self.all_reduce_sum(&mut all);
        let mut rest = all.into_iter().map(|byte| byte as u8);
        lengths.into_iter().map(|n| rest.by_ref().take(n).collect()).collect()
    }

    /// Returns the value of rank 0 on all ranks.
    ///
    /// # Panics
    /// If the value cannot be serialized as JSON.
    pub fn broadcast_value<T: Serialize + DeserializeOwned>(self, own: T) -> T {
        if self == Ranks::SINGLE {
            return own;
        }
        let bytes = if self.is_root() { serde_json::to_vec(&own).expect("serializable data") } else { Vec::new() };
        serde_json::from_slice(&self.broadcast(bytes)).expect("sent by rank 0")
    }

    /// Returns `true` if the condition holds on any rank.
    pub fn any(self, condition: bool) -> bool {
        let mut count = [f64::from(u8::from(condition))];
        self.all_reduce_sum(&mut count);
        count[0] > 0.0
    }

    /// Returns the first rank whose bytes differ from those of rank 0, if any; the same on all
    /// ranks.
    pub fn first_mismatch(self, bytes: &[u8]) -> Option<usize> {
        let expected = self.broadcast(bytes.to_vec());
        let mut mismatches = vec![0.0; self.world_size()];
        mismatches[self.rank()] = f64::from(u8::from(expected != bytes));
        self.all_reduce_sum(&mut mismatches);
        mismatches.iter().position(|m| *m > 0.0)
    }
}

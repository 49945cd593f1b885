//! RANKS: the processes (or threads) that share every batch, each with a part of it and, where there are several, a device of its own. All
//! hold the same weights; what they must agree on are sums: of gradients, and of batch norm's statistics, forward and backward. So N
//! ranks with batches of B / N walk as one rank with a batch of B does, but for rounding.

#[cfg(feature = "mpi")]
pub mod mpi;
pub mod threads;

use std::fmt;

use burn::tensor::Tensor;
use serde::{Serialize, de::DeserializeOwned};

use crate::nn::{Tree, tree::host};

/// What ranks need of each other. All ranks call the same, in the same order. Sums have the same bits on all ranks.
pub trait Communicator: Sync {
    /// Which of them this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn ranks(&self) -> usize;

    /// Adds up over all ranks, in place.
    fn sum(&self, values: &mut [f32]);

    /// The same in double precision.
    fn sum_f64(&self, values: &mut [f64]);

    /// Gives all ranks what rank 0 has.
    fn broadcast(&self, bytes: &mut Vec<u8>);

    /// What all of it has taken so far.
    fn spent(&self) -> Spent;
}

/// What ranks have said to each other, as one of them counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Spent {
    /// How often.
    pub messages: u64,
    /// Bytes that this rank has brought.
    pub bytes: u64,
    /// Seconds, with the waiting for slower ranks.
    pub seconds: f64,
}

/// The ranks as one of them sees them.
#[derive(Clone, Copy)]
pub struct Ranks(Option<&'static dyn Communicator>);

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.count())
    }
}

/// Equal where they sum over the same ranks.
impl PartialEq for Ranks {
    fn eq(&self, other: &Self) -> bool {
        (self.rank(), self.count()) == (other.rank(), other.count())
    }
}

impl Eq for Ranks {}

/// Numbers a message: large enough for the bandwidth, small enough for a network card's buffers.
const MESSAGE: usize = 1 << 22;

impl Ranks {
    /// One that shares with nobody.
    pub const ALONE: Ranks = Ranks(None);

    /// Those of a communicator.
    pub fn new(of: &'static dyn Communicator) -> Ranks {
        Ranks((of.ranks() > 1).then_some(of))
    }

    /// Which this is, from 0.
    pub fn rank(self) -> usize {
        self.0.map_or(0, Communicator::rank)
    }

    /// How many there are.
    pub fn count(self) -> usize {
        self.0.map_or(1, Communicator::ranks)
    }

    /// Whether this is the one that writes and tells.
    pub fn leads(self) -> bool {
        self.rank() == 0
    }

    /// What they have said to each other.
    pub fn spent(self) -> Spent {
        self.0.map_or(Spent::default(), Communicator::spent)
    }

    /// Adds up over all ranks, in place.
    pub fn sum(self, values: &mut [f64]) {
        if let Some(all) = self.0 {
            all.sum_f64(values);
        }
    }

    /// Gives all ranks what rank 0 has.
    pub fn broadcast(self, mut bytes: Vec<u8>) -> Vec<u8> {
        if let Some(all) = self.0 {
            all.broadcast(&mut bytes);
        }
        bytes
    }

    /// The mean over all ranks, leaf by leaf; in few large messages, as a message of few numbers costs as much as one of thousands.
    pub fn mean(self, tree: Tree) -> Tree {
        let Some(all) = self.0 else { return tree };
        let mut values = host(Tensor::cat(tree.iter().map(|(_, leaf)| leaf.value.clone()).collect(), 0));
        let share = 1.0 / all.ranks() as f32;
        for message in values.chunks_mut(MESSAGE) {
            all.sum(message);
            message.iter_mut().for_each(|v| *v *= share);
        }
        tree.with_values(&values)
    }

    /// What each rank has, in their order, on all ranks. For little: it goes as numbers.
    pub fn gather(self, own: &[u8]) -> Vec<Vec<u8>> {
        let mut lengths = vec![0.0; self.count()];
        lengths[self.rank()] = own.len() as f64;
        self.sum(&mut lengths);
        let lengths: Vec<usize> = lengths.into_iter().map(|n| n as usize).collect();
        let mut all = vec![0.0; lengths.iter().sum()];
        let from = lengths[..self.rank()].iter().sum::<usize>();
        all[from..from + own.len()].iter_mut().zip(own).for_each(|(to, byte)| *to = f64::from(*byte));
        self.sum(&mut all);
        let mut rest = all.into_iter().map(|byte| byte as u8);
        lengths.into_iter().map(|n| rest.by_ref().take(n).collect()).collect()
    }

    /// What rank 0 has found, on all ranks.
    ///
    /// # Panics
    /// If it is nothing that JSON can hold.
    pub fn agree<T: Serialize + DeserializeOwned>(self, own: T) -> T {
        if self == Ranks::ALONE {
            return own;
        }
        let bytes = if self.leads() { serde_json::to_vec(&own).expect("plain data") } else { Vec::new() };
        serde_json::from_slice(&self.broadcast(bytes)).expect("rank 0 has sent it")
    }

    /// Whether it is so on any rank.
    pub fn any(self, so: bool) -> bool {
        let mut how_often = [f64::from(u8::from(so))];
        self.sum(&mut how_often);
        how_often[0] > 0.0
    }

    /// The first rank that says something else than rank 0, if any; all ranks learn of the same.
    pub fn differs(self, what: &[u8]) -> Option<usize> {
        let of_first = self.broadcast(what.to_vec());
        let mut differ = vec![0.0; self.count()];
        differ[self.rank()] = f64::from(u8::from(of_first != what));
        self.sum(&mut differ);
        differ.iter().position(|d| *d > 0.0)
    }
}

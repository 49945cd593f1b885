//! Epilogues: operations on the result of a convolution while it is in the cache.

use crate::{
    isa::Isa,
    loops::block::{BlockEpilogue, BlockValues},
    norm::{self, GradSums, Moments, NormBackward, ReluMask},
    storage::Storage,
};

/// Operation on the f32 result of a convolution, before it is stored as `T`.
pub trait Epilogue<T: Storage>: Sync {
    /// Value computed from a part of the pixels.
    type Part: Send;

    /// Processes whole pixels, from value `at` of the map on.
    fn apply(&self, isa: &Isa, at: usize, values: &mut [f32]) -> Self::Part;

    /// The epilogue for a matrix unit, which applies it block by block.
    #[doc(hidden)]
    fn block_kind(&self) -> BlockKind<'_, T>;

    /// Result of a part from the totals of its blocks.
    #[doc(hidden)]
    fn part(&self, totals: Totals) -> Self::Part;
}

/// Epilogue for a matrix unit, with the maps and vectors of all pixels and channels.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub enum BlockKind<'a, T> {
    None,
    Moments,
    Add(&'a [T]),
    ShiftAct(ShiftAct<'a, T>),
    NormGrads(&'a [T], &'a NormBackward),
}

/// Two sums by channel over a part of the pixels.
#[doc(hidden)]
#[derive(Debug)]
pub struct Totals {
    pub(crate) pixels: usize,
    /// Value of the first pixel, `[c]`.
    pub(crate) origin: Vec<f32>,
    /// `[c]` each.
    pub(crate) sums: [Vec<f64>; 2],
}

/// Does nothing.
#[derive(Debug, Clone, Copy)]
pub struct NoEpilogue;

impl<T: Storage> Epilogue<T> for NoEpilogue {
    type Part = ();

    fn apply(&self, _: &Isa, _: usize, _: &mut [f32]) {}

    fn block_kind(&self) -> BlockKind<'_, T> {
        BlockKind::None
    }

    fn part(&self, _: Totals) {}
}

/// Computes the moments of the result, before it is rounded.
#[derive(Debug, Clone, Copy)]
pub struct TakeMoments {
    /// Number of channels.
    pub c: usize,
}

impl<T: Storage> Epilogue<T> for TakeMoments {
    type Part = Moments;

    fn apply(&self, isa: &Isa, _: usize, values: &mut [f32]) -> Moments {
        Moments::compute(isa, values, self.c)
    }

    fn block_kind(&self) -> BlockKind<'_, T> {
        BlockKind::Moments
    }

    fn part(&self, Totals { pixels, origin, sums: [sums, squares] }: Totals) -> Moments {
        Moments::from_deviations(pixels, &origin, &sums, &squares)
    }
}

/// Adds a map: y + map.
#[derive(Debug, Clone, Copy)]
pub struct AddMap<'a, T>(pub &'a [T]);

impl<T: Storage> Epilogue<T> for AddMap<'_, T> {
    type Part = ();

    fn apply(&self, isa: &Isa, at: usize, values: &mut [f32]) {
        let mut buffer = Vec::new();
        let map = T::load(isa, &self.0[at..at + values.len()], &mut buffer);
        values.iter_mut().zip(map).for_each(|(value, other)| *value += other);
    }

    fn block_kind(&self) -> BlockKind<'_, T> {
        BlockKind::Add(self.0)
    }

    fn part(&self, _: Totals) {}
}

/// Computes y + shift (+ skip), then max(·, 0) if `relu`.
#[derive(Debug, Clone, Copy)]
pub struct ShiftAct<'a, T> {
    /// One value per channel.
    pub shift: &'a [f32],
    /// A map.
    pub skip: Option<&'a [T]>,
    /// True if a ReLU follows.
    pub relu: bool,
}

impl<T: Storage> Epilogue<T> for ShiftAct<'_, T> {
    type Part = ();

    fn apply(&self, isa: &Isa, at: usize, values: &mut [f32]) {
        let mut buffer = Vec::new();
        let skip = self.skip.map(|skip| T::load(isa, &skip[at..at + values.len()], &mut buffer));
        norm::shift_act(isa, values, self.shift, skip, self.relu);
    }

    fn block_kind(&self) -> BlockKind<'_, T> {
        BlockKind::ShiftAct(*self)
    }

    fn part(&self, _: Totals) {}
}

/// Computes the sums for the backward pass of a norm, where the result is the gradient of
/// relu(norm(y)).
#[derive(Debug, Clone, Copy)]
pub struct SumNormGrads<'a, T> {
    /// The norm.
    pub norm: &'a NormBackward,
    /// Its input.
    pub y: &'a [T],
}

impl<T: Storage> Epilogue<T> for SumNormGrads<'_, T> {
    type Part = GradSums;

    fn apply(&self, isa: &Isa, at: usize, values: &mut [f32]) -> GradSums {
        let mut buffer = Vec::new();
        let y = T::load(isa, &self.y[at..at + values.len()], &mut buffer);
        self.norm.grad_sums(isa, values, y, ReluMask::FromNorm, None)
    }

    fn block_kind(&self) -> BlockKind<'_, T> {
        BlockKind::NormGrads(self.y, self.norm)
    }

    fn part(&self, totals: Totals) -> GradSums {
        let [gamma, beta] = totals.sums;
        GradSums { gamma, beta }
    }
}

impl<T> BlockKind<'_, T> {
    /// Sets the vectors of a block: `n` channels from `first` on. `y` begins with its first pixel.
    pub(super) fn set(&self, values: &mut BlockValues, [first, n]: [usize; 2], y: &[f32]) {
        let mut copy = |i: usize, from: &[f32]| values.vectors[i][..n].copy_from_slice(&from[..n]);
        match self {
            BlockKind::None | BlockKind::Add(_) => {}
            BlockKind::Moments => copy(0, y),
            BlockKind::ShiftAct(by) => copy(0, &by.shift[first..]),
            BlockKind::NormGrads(_, norm) => {
                norm.vectors().into_iter().enumerate().for_each(|(i, from)| copy(i, &from[first..]));
            }
        }
    }

    /// Returns the epilogue for the kernel, which finds the map at `map`.
    pub(super) fn epilogue(&self, map: *const T) -> BlockEpilogue<T> {
        match self {
            BlockKind::None => BlockEpilogue::None,
            BlockKind::Moments => BlockEpilogue::Moments,
            BlockKind::Add(_) => BlockEpilogue::Add(map),
            BlockKind::ShiftAct(by) => BlockEpilogue::ShiftAct {
                skip: by.skip.map(|_| map),
                low: if by.relu { 0.0 } else { f32::NEG_INFINITY },
            },
            BlockKind::NormGrads(..) => BlockEpilogue::NormGrads { y: map },
        }
    }

    /// Returns the map that is read, if there is one.
    pub(super) fn map(&self) -> Option<&[T]> {
        match self {
            BlockKind::None | BlockKind::Moments => None,
            BlockKind::Add(map) | BlockKind::NormGrads(map, _) => Some(map),
            BlockKind::ShiftAct(by) => by.skip,
        }
    }
}

impl Totals {
    /// Moves the totals of a block here: `n` channels from `first` on.
    pub(super) fn add(&mut self, [first, n]: [usize; 2], block: &mut BlockValues) {
        self.origin[first..][..n].copy_from_slice(&block.vectors[0][..n]);
        for (sums, totals) in self.sums.iter_mut().zip(&mut block.totals) {
            sums[first..][..n].iter_mut().zip(totals.iter()).for_each(|(sum, total)| *sum += f64::from(*total));
            totals.fill(0.0);
        }
    }
}

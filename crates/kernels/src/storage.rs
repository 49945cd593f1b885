//! Storage types of maps: f32, or bf16 for half the memory. Arithmetic is in f32.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::{
    isa::{Isa, MatrixLoops},
    loops::{
        block::FinishFn,
        norm::{AffineRows, BackwardRows, NormGradCoefficients},
        pool::PoolShape,
    },
    memory::{Plain, as_uninit, assume_init_vec, uninit_vec},
    simd::Bf16,
};

/// Number of values that a thread converts at a time.
const PART: usize = 1 << 15;

/// Values of a map.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// As f32.
    F32(&'a [f32]),
    /// As bf16.
    Bf16(&'a [Bf16]),
}

impl Values<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::Bf16(values) => values.len(),
        }
    }

    /// Returns `true` if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Storage type of a map: f32 or [`Bf16`].
pub trait Storage: Plain + Default {
    /// Returns values as f32. Those of another type are converted into `buffer`.
    fn load<'a>(isa: &Isa, values: &'a [Self], buffer: &'a mut Vec<f32>) -> &'a [f32];

    /// Converts f32 values into `to`, on the calling thread.
    fn narrow(isa: &Isa, values: &[f32], to: &mut [MaybeUninit<Self>]);

    /// Converts f32 values.
    fn from_f32(isa: &Isa, values: Vec<f32>) -> Vec<Self>;

    /// Returns the values with their type.
    fn values(values: &[Self]) -> Values<'_>;

    /// The loops of [`norm`](crate::norm) and [`pool`](crate::pool) for this type.
    #[doc(hidden)]
    fn loops(isa: &Isa) -> MapLoops<Self>;

    /// The loop that applies an epilogue to the sums of a matrix unit and stores them.
    #[doc(hidden)]
    #[allow(private_interfaces, reason = "internal")]
    fn finish(loops: &MatrixLoops) -> FinishFn<Self>;
}

/// Compiled loops over maps of one type.
#[doc(hidden)]
#[allow(missing_debug_implementations, missing_docs, clippy::type_complexity, reason = "internal")]
pub struct MapLoops<T> {
    pub(crate) affine_act: unsafe fn(AffineRows<T>, &mut [MaybeUninit<T>]),
    pub(crate) grad_sums: unsafe fn(BackwardRows<T>, &mut [f32], &mut [f32], Option<&mut [MaybeUninit<T>]>),
    pub(crate) input_grad: unsafe fn(BackwardRows<T>, NormGradCoefficients, &mut [MaybeUninit<T>]),
    pub(crate) max_pool_row: unsafe fn(&PoolShape, &[T], usize, &mut [MaybeUninit<T>]),
    pub(crate) max_pool_backward: unsafe fn(&PoolShape, &[T], &[T], &[f32], &mut [f32]),
}

impl Storage for f32 {
    fn load<'a>(_: &Isa, values: &'a [f32], _: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }

    fn narrow(_: &Isa, values: &[f32], to: &mut [MaybeUninit<f32>]) {
        to.write_copy_of_slice(values);
    }

    fn from_f32(_: &Isa, values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn values(values: &[f32]) -> Values<'_> {
        Values::F32(values)
    }

    fn loops(isa: &Isa) -> MapLoops<f32> {
        MapLoops {
            affine_act: isa.affine_act,
            grad_sums: isa.norm_grad_sums,
            input_grad: isa.norm_input_grad,
            max_pool_row: isa.max_pool_row,
            max_pool_backward: isa.max_pool_backward,
        }
    }

    #[allow(private_interfaces, reason = "internal")]
    fn finish(loops: &MatrixLoops) -> FinishFn<f32> {
        loops.finish
    }
}

impl Storage for Bf16 {
    fn load<'a>(isa: &Isa, values: &'a [Bf16], buffer: &'a mut Vec<f32>) -> &'a [f32] {
        buffer.resize(values.len().max(buffer.len()), 0.0);
        let buffer = &mut buffer[..values.len()];
        // SAFETY: the loop writes numbers only; an `Isa` exists only for an instruction set of this
        // processor.
        unsafe { (isa.widen)(values, as_uninit(buffer)) };
        buffer
    }

    fn narrow(isa: &Isa, values: &[f32], to: &mut [MaybeUninit<Bf16>]) {
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (isa.narrow)(values, to) };
    }

    fn from_f32(isa: &Isa, values: Vec<f32>) -> Vec<Bf16> {
        let mut out = uninit_vec(values.len());
        let parts = out.par_chunks_mut(PART).zip(values.par_chunks(PART));
        parts.for_each(|(out, values)| Bf16::narrow(isa, values, out));
        // SAFETY: the loop has written every value.
        unsafe { assume_init_vec(out) }
    }

    fn values(values: &[Bf16]) -> Values<'_> {
        Values::Bf16(values)
    }

    fn loops(isa: &Isa) -> MapLoops<Bf16> {
        MapLoops {
            affine_act: isa.affine_act_bf16,
            grad_sums: isa.norm_grad_sums_bf16,
            input_grad: isa.norm_input_grad_bf16,
            max_pool_row: isa.max_pool_row_bf16,
            max_pool_backward: isa.max_pool_backward_bf16,
        }
    }

    #[allow(private_interfaces, reason = "internal")]
    fn finish(loops: &MatrixLoops) -> FinishFn<Bf16> {
        loops.finish_bf16
    }
}

/// Converts bf16 values to f32, on all threads.
pub(crate) fn to_f32(isa: &Isa, values: &[Bf16]) -> Vec<f32> {
    let mut out = uninit_vec(values.len());
    out.par_chunks_mut(PART).zip(values.par_chunks(PART)).for_each(|(out, values)| {
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (isa.widen)(values, out) };
    });
    // SAFETY: the loop has written every value.
    unsafe { assume_init_vec(out) }
}

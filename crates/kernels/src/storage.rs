//! Storage types of maps: f32, or bf16 for half the memory. Arithmetic is in f32.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::{
    isa::Isa,
    loops::{
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

    /// Stores what `f` writes: `f` gets room for as many f32 values as `out` has. `buffer` holds
    /// those of another type.
    ///
    /// # Safety
    ///
    /// * `f` writes every value, and only numbers.
    #[doc(hidden)]
    unsafe fn store<R>(
        isa: &Isa,
        out: &mut [MaybeUninit<Self>],
        buffer: &mut Vec<f32>,
        f: impl FnOnce(&mut [MaybeUninit<f32>]) -> R,
    ) -> R;

    /// Converts f32 values.
    fn from_f32(isa: &Isa, values: Vec<f32>) -> Vec<Self>;

    /// Returns the values with their type.
    fn values(values: &[Self]) -> Values<'_>;

    /// The loops of [`norm`](crate::norm) and [`pool`](crate::pool) for this type.
    #[doc(hidden)]
    fn loops(isa: &Isa) -> MapLoops<Self>;
}

/// Compiled loops over maps of one type.
#[doc(hidden)]
#[allow(missing_debug_implementations, missing_docs, clippy::type_complexity, reason = "internal")]
pub struct MapLoops<T> {
    pub(crate) affine_act: unsafe fn(AffineRows<T>, &mut [MaybeUninit<T>]),
    pub(crate) grad_sums: unsafe fn(BackwardRows<f32, T>, &mut [f32], &mut [f32], Option<&mut [MaybeUninit<f32>]>),
    /// With the gradient of the output in f32.
    pub(crate) input_grad: unsafe fn(BackwardRows<f32, T>, NormGradCoefficients, &mut [MaybeUninit<T>]),
    /// With the gradient of the output in the type of the map.
    pub(crate) stored_input_grad: unsafe fn(BackwardRows<T, T>, NormGradCoefficients, &mut [MaybeUninit<T>]),
    pub(crate) max_pool_row: unsafe fn(&PoolShape, &[T], usize, &mut [MaybeUninit<T>]),
    pub(crate) max_pool_backward: unsafe fn(&PoolShape, &[T], &[T], &[f32], &mut [f32]),
}

impl Storage for f32 {
    fn load<'a>(_: &Isa, values: &'a [f32], _: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }

    unsafe fn store<R>(
        _: &Isa,
        out: &mut [MaybeUninit<f32>],
        _: &mut Vec<f32>,
        f: impl FnOnce(&mut [MaybeUninit<f32>]) -> R,
    ) -> R {
        f(out)
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
            stored_input_grad: isa.norm_input_grad,
            max_pool_row: isa.max_pool_row,
            max_pool_backward: isa.max_pool_backward,
        }
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

    unsafe fn store<R>(
        isa: &Isa,
        out: &mut [MaybeUninit<Bf16>],
        buffer: &mut Vec<f32>,
        f: impl FnOnce(&mut [MaybeUninit<f32>]) -> R,
    ) -> R {
        buffer.resize(out.len().max(buffer.len()), 0.0);
        let buffer = &mut buffer[..out.len()];
        // SAFETY: `f` writes numbers only by the contract.
        let result = f(unsafe { as_uninit(buffer) });
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (isa.narrow)(buffer, out) };
        result
    }

    fn from_f32(isa: &Isa, values: Vec<f32>) -> Vec<Bf16> {
        let mut out = uninit_vec(values.len());
        out.par_chunks_mut(PART).zip(values.par_chunks(PART)).for_each(|(out, values)| {
            // SAFETY: an `Isa` exists only for an instruction set of this processor.
            unsafe { (isa.narrow)(values, out) };
        });
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
            input_grad: isa.norm_input_grad_mixed,
            stored_input_grad: isa.norm_input_grad_bf16,
            max_pool_row: isa.max_pool_row_bf16,
            max_pool_backward: isa.max_pool_backward_bf16,
        }
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

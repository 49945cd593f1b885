//! The loops of batch norm: statistics, normalization, and the two passes of the gradient.
//!
//! Data are `[m, c]`, channels last: `m` pixels of `c` channels. With s = γ/σ (*scale*) and
//! t = β − μ s (*shift*), the forward pass is one FMA per value plus what follows the norm:
//!
//! ```text
//! out = max(y · s + t + skip, low)        # low = 0 with a ReLU, else −∞; no skip: nothing added
//! ```
//!
//! # Rows
//!
//! `c` may be 3 or 2048, and a register holds 4 to 16 values. So that one loop is fast for all of
//! them, the caller repeats the per-channel vectors (scale, shift, mean, …) until they are at least
//! 256 values long and still a multiple of `c`. Such a *row* lines up with any whole number of
//! pixels. All loops then have the same form, which compilers vectorize without a remainder loop
//! per pixel:
//!
//! ```text
//! for each row of the data (the last may be shorter):
//!     for i in 0..row:
//!         out[i] = f(y[i], scale[i], shift[i], …)        # all slices walked in step
//! ```
//!
//! Sums by channel are accumulated in a row too: position i collects every (row / c)-th pixel of
//! channel i mod c. The caller folds the row into `c` sums in f64 after a few rows, which bounds
//! the rounding error of the f32 sums and fixes the order of summation.
//!
//! # Gradient
//!
//! Let g be the gradient behind the ReLU mask. Batch norm's backward pass (Ioffe and Szegedy 2015)
//! needs two sums over all pixels before it can compute any value:
//!
//! ```text
//! pass 1:  Σ g and Σ g (y − μ)                           # grad_sums
//! between: dβ = Σ g;  dγ = Σ g (y − μ) / σ
//! pass 2:  dy = s (g − mean(g) − ŷ mean(g ŷ))            # input_grad
//!             = scale · g + slope · (y − μ) + offset
//! ```
//!
//! The second form of pass 2 has three coefficients per channel ([`NormGradCoefficients`]) and two
//! FMAs per value. Where the norm is followed by a ReLU alone, both passes recompute the mask from
//! y, which is cheaper than reading the output from memory.

use std::mem::MaybeUninit;

use crate::simd::{Maps, Scalar, Value};

/// Mask that a gradient passes on its way back to the norm: the derivative of the operations that
/// follow it.
#[derive(Debug, Clone, Copy)]
pub enum ReluMask<'a, T = f32> {
    /// Nothing follows the norm: every gradient passes.
    None,
    /// A ReLU follows: gradients pass where scale · y + shift > 0.
    FromNorm,
    /// The sum with a skip and a ReLU follow: gradients pass where this output is positive.
    FromOutput(&'a [T]),
    /// The sum with a skip follows, without a ReLU: every gradient passes, to the skip too.
    NoneWithSkip,
}

impl<'a, T> ReluMask<'a, T> {
    /// The mask of a range of values.
    pub(crate) fn slice(self, range: std::ops::Range<usize>) -> ReluMask<'a, T> {
        match self {
            ReluMask::FromOutput(out) => ReluMask::FromOutput(&out[range]),
            ReluMask::None => ReluMask::None,
            ReluMask::FromNorm => ReluMask::FromNorm,
            ReluMask::NoneWithSkip => ReluMask::NoneWithSkip,
        }
    }
}

/// Arguments of [`affine_act`]. `scale` and `shift` are rows.
pub(crate) struct AffineRows<'a, T> {
    pub y: &'a [T],
    pub skip: Option<&'a [T]>,
    pub scale: &'a [f32],
    pub shift: &'a [f32],
    pub relu: bool,
}

/// Arguments of the backward loops. `scale`, `shift` and `mean` are rows.
#[derive(Clone, Copy)]
pub(crate) struct BackwardRows<'a, T> {
    /// Gradient of the output; unused by [`input_grad_in_place`].
    pub dout: &'a [T],
    /// Input of the norm.
    pub y: &'a [T],
    pub mask: ReluMask<'a, T>,
    pub scale: &'a [f32],
    pub shift: &'a [f32],
    pub mean: &'a [f32],
}

/// Coefficients of dy = scale · g + slope · (y − mean) + offset; each a row.
#[derive(Clone, Copy)]
pub(crate) struct NormGradCoefficients<'a> {
    pub scale: &'a [f32],
    pub slope: &'a [f32],
    pub offset: &'a [f32],
}

/// Lower bound of the output.
#[inline(always)]
fn lower_bound(relu: bool) -> f32 {
    if relu { 0.0 } else { f32::NEG_INFINITY }
}

/// Adds `y − origin` to `sums` and its square to `squares`.
///
/// Deviations are taken from `origin`, a value near the mean, because the difference of two large
/// sums of squares would lose the variance in f32.
#[inline(always)]
pub(crate) fn moments(y: &[f32], origin: &[f32], sums: &mut [f32], squares: &mut [f32]) {
    for y in y.chunks(origin.len()) {
        for (((y, o), s), q) in y.iter().zip(origin).zip(sums.iter_mut()).zip(squares.iter_mut()) {
            let d = y - o;
            *s += d;
            *q += d * d;
        }
    }
}

/// Writes scale · y + shift (+ skip), then max(·, 0) if `relu`, to every value of `out`.
#[inline(always)]
pub(crate) fn affine_act<T: Value>(rows: AffineRows<T>, out: &mut [MaybeUninit<T>]) {
    let (low, row) = (lower_bound(rows.relu), rows.scale.len());
    for (i, out) in out.chunks_mut(row).enumerate() {
        let range = i * row..i * row + out.len();
        let values = out.iter_mut().zip(&rows.y[range.clone()]).zip(rows.scale).zip(rows.shift);
        match rows.skip {
            Some(skip) => {
                for ((((o, y), s), b), skip) in values.zip(&skip[range]) {
                    o.write(T::narrow((y.widen() * s + b + skip.widen()).max(low)));
                }
            }
            None => {
                for (((o, y), s), b) in values {
                    o.write(T::narrow((y.widen() * s + b).max(low)));
                }
            }
        }
    }
}

/// Replaces y by y + shift (+ skip), then max(·, 0) if `relu`.
#[inline(always)]
pub(crate) fn shift_act(shift: &[f32], skip: Option<&[f32]>, relu: bool, y: &mut [f32]) {
    let (low, row) = (lower_bound(relu), shift.len());
    for (i, y) in y.chunks_mut(row).enumerate() {
        let range = i * row..i * row + y.len();
        let values = y.iter_mut().zip(shift);
        match skip {
            Some(skip) => {
                for ((y, b), skip) in values.zip(&skip[range]) {
                    *y = (*y + b + skip).max(low);
                }
            }
            None => {
                for (y, b) in values {
                    *y = (*y + b).max(low);
                }
            }
        }
    }
}

/// Adds g (y − mean) to `gamma_sums` and g to `beta_sums`, and writes g to every value of
/// `masked_grad` if there is one.
///
/// The vector operations are explicit: the compiler cannot prove that this many slices are disjoint
/// and leaves a plain loop scalar.
///
/// # Safety
///
/// * The processor has the instruction set of `V`.
///
/// # Panics
///
/// If lengths do not match, or if the mask is [`ReluMask::FromOutput`] and there is no
/// `masked_grad`: the gradient of a skip is always kept.
#[inline(always)]
pub(crate) unsafe fn grad_sums<V: Maps, T: Value>(
    rows: BackwardRows<T>,
    gamma_sums: &mut [f32],
    beta_sums: &mut [f32],
    masked_grad: Option<&mut [MaybeUninit<T>]>,
) {
    let (row, n) = (rows.scale.len(), rows.dout.len());
    let kept = match (rows.mask, &masked_grad) {
        (ReluMask::FromOutput(_), None) => unreachable!("the gradient of a skip is always kept"),
        (ReluMask::FromOutput(out), _) => {
            assert_eq!(out.len(), n, "an output has the shape of its gradient");
            masked_grad
        }
        (ReluMask::NoneWithSkip | ReluMask::None, _) => {
            if let Some(kept) = masked_grad {
                kept.write_copy_of_slice(rows.dout);
            }
            None
        }
        (ReluMask::FromNorm, _) => None,
    };
    // The bounds of every pointer below.
    assert!(rows.y.len() == n && kept.as_ref().is_none_or(|kept| kept.len() == n), "maps have the same shape");
    assert!(
        [rows.shift.len(), rows.mean.len(), gamma_sums.len(), beta_sums.len()] == [row; 4],
        "rows are equally long"
    );
    let kept = kept.map_or(std::ptr::null_mut(), |kept| kept.as_mut_ptr().cast::<T>());
    let pointers =
        GradPointers { rows: &rows, gamma_sums: gamma_sums.as_mut_ptr(), beta_sums: beta_sums.as_mut_ptr(), kept };
    for first in (0..n).step_by(row.max(1)) {
        let length = row.min(n - first);
        let whole = length / V::LANES * V::LANES;
        // SAFETY: positions lie within a row and within the maps, whose lengths are asserted above.
        unsafe {
            for i in (0..whole).step_by(V::LANES) {
                add_grads::<V, T>(&pointers, i, first + i);
            }
            for i in whole..length {
                add_grads::<Scalar, T>(&pointers, i, first + i);
            }
        }
    }
}

/// Inputs and outputs of [`grad_sums`].
struct GradPointers<'a, T> {
    rows: &'a BackwardRows<'a, T>,
    gamma_sums: *mut f32,
    beta_sums: *mut f32,
    /// Null if the gradient is not kept.
    kept: *mut T,
}

/// [`grad_sums`] of a register: values from `i` on of a row, and from `at` on of the maps.
///
/// # Safety
///
/// * The processor has the instruction set of `V`.
/// * Rows and maps hold `LANES` values from there on.
#[inline(always)]
unsafe fn add_grads<V: Maps, T: Value>(p: &GradPointers<T>, i: usize, at: usize) {
    // SAFETY: the offsets are those of the contract.
    unsafe {
        let (mut g, y) = (T::load::<V>(p.rows.dout.as_ptr().add(at)), T::load::<V>(p.rows.y.as_ptr().add(at)));
        match p.rows.mask {
            ReluMask::FromNorm => {
                let (scale, shift) = (V::load(p.rows.scale.as_ptr().add(i)), V::load(p.rows.shift.as_ptr().add(i)));
                g = V::where_positive(V::add(V::mul(y, scale), shift), g);
            }
            ReluMask::FromOutput(out) => {
                g = V::where_positive(T::load::<V>(out.as_ptr().add(at)), g);
                T::store::<V>(p.kept.add(at), g);
            }
            ReluMask::None | ReluMask::NoneWithSkip => {}
        }
        let (gamma, beta) = (p.gamma_sums.add(i), p.beta_sums.add(i));
        V::store(gamma, V::fma(g, V::sub(y, V::load(p.rows.mean.as_ptr().add(i))), V::load(gamma)));
        V::store(beta, V::add(V::load(beta), g));
    }
}

/// Writes dy to every value. Masks other than [`ReluMask::FromNorm`] must have been applied to
/// `dout` already.
#[inline(always)]
pub(crate) fn input_grad<T: Value>(rows: BackwardRows<T>, by: NormGradCoefficients, dy: &mut [MaybeUninit<T>]) {
    let row = rows.scale.len();
    for (i, dy) in dy.chunks_mut(row).enumerate() {
        let range = i * row..i * row + dy.len();
        let values = dy.iter_mut().zip(&rows.dout[range.clone()]).zip(&rows.y[range]).zip(rows.mean);
        let values = values.zip(by.scale).zip(by.slope).zip(by.offset);
        if let ReluMask::FromNorm = rows.mask {
            for ((((((((dy, g), y), mean), a), b), d), scale), shift) in values.zip(rows.scale).zip(rows.shift) {
                let (g, y) = (g.widen(), y.widen());
                let g = if y * scale + shift > 0.0 { g } else { 0.0 };
                dy.write(T::narrow(a * g + b * (y - mean) + d));
            }
        } else {
            for ((((((dy, g), y), mean), a), b), d) in values {
                dy.write(T::narrow(a * g.widen() + b * (y.widen() - mean) + d));
            }
        }
    }
}

/// Replaces the output gradient by dy, for a norm that is followed by a ReLU alone.
#[inline(always)]
pub(crate) fn input_grad_in_place(rows: BackwardRows<f32>, by: NormGradCoefficients, grad: &mut [f32]) {
    let row = rows.scale.len();
    for (i, grad) in grad.chunks_mut(row).enumerate() {
        let range = i * row..i * row + grad.len();
        let values = grad.iter_mut().zip(&rows.y[range]).zip(rows.mean).zip(by.scale).zip(by.slope).zip(by.offset);
        for (((((((g, y), mean), a), b), d), scale), shift) in values.zip(rows.scale).zip(rows.shift) {
            let masked = if y * scale + shift > 0.0 { *g } else { 0.0 };
            *g = a * masked + b * (y - mean) + d;
        }
    }
}

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

use crate::simd::Value;

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
pub(crate) struct BackwardRows<'a, D, T> {
    /// Gradient of the output; unused by [`input_grad_in_place`].
    pub dout: &'a [D],
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
/// # Panics
///
/// If the mask is [`ReluMask::FromOutput`] and there is no `masked_grad`: the gradient of a skip is
/// always kept.
#[inline(always)]
pub(crate) fn grad_sums<T: Value>(
    rows: BackwardRows<f32, T>,
    gamma_sums: &mut [f32],
    beta_sums: &mut [f32],
    mut masked_grad: Option<&mut [MaybeUninit<f32>]>,
) {
    let row = rows.scale.len();
    for (i, dout) in rows.dout.chunks(row).enumerate() {
        let range = i * row..i * row + dout.len();
        let y = &rows.y[range.clone()];
        let values = dout.iter().zip(y).zip(rows.mean).zip(gamma_sums.iter_mut().zip(beta_sums.iter_mut()));
        match (rows.mask, &mut masked_grad) {
            (ReluMask::FromNorm, _) => {
                for (((((d, y), mean), (gamma_sum, beta_sum)), scale), shift) in values.zip(rows.scale).zip(rows.shift)
                {
                    let y = y.widen();
                    let g = if y * scale + shift > 0.0 { *d } else { 0.0 };
                    *gamma_sum += g * (y - mean);
                    *beta_sum += g;
                }
            }
            (ReluMask::FromOutput(out), Some(kept)) => {
                for (((((d, y), mean), (gamma_sum, beta_sum)), out), kept) in
                    values.zip(&out[range.clone()]).zip(&mut kept[range])
                {
                    let g = if out.widen() > 0.0 { *d } else { 0.0 };
                    *gamma_sum += g * (y.widen() - mean);
                    *beta_sum += g;
                    kept.write(g);
                }
            }
            (ReluMask::FromOutput(_), None) => unreachable!("the gradient of a skip is always kept"),
            (ReluMask::None | ReluMask::NoneWithSkip, kept) => {
                for (((g, y), mean), (gamma_sum, beta_sum)) in values {
                    *gamma_sum += g * (y.widen() - mean);
                    *beta_sum += g;
                }
                if let Some(kept) = kept {
                    kept[range].write_copy_of_slice(dout);
                }
            }
        }
    }
}

/// Writes dy to every value. Masks other than [`ReluMask::FromNorm`] must have been applied to
/// `dout` already.
#[inline(always)]
pub(crate) fn input_grad<D: Value, T: Value>(
    rows: BackwardRows<D, T>,
    by: NormGradCoefficients,
    dy: &mut [MaybeUninit<T>],
) {
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
pub(crate) fn input_grad_in_place(rows: BackwardRows<f32, f32>, by: NormGradCoefficients, grad: &mut [f32]) {
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

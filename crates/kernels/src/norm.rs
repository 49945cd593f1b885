//! Batch norm with the operations that follow it (skip, ReLU), forward and backward, in as few
//! passes over memory as possible. Data are `[m, c]`, channels last.
//!
//! Per-channel vectors are repeated to *rows* of at least 256 values, which all loops walk in step
//! with the data (see `loops::norm`).

use std::mem::MaybeUninit;

use rayon::prelude::*;

pub use crate::loops::norm::ReluMask;
use crate::{
    isa::Isa,
    loops::norm::{AffineRows, BackwardRows, NormGradCoefficients},
    memory::{assume_init_vec, uninit_vec},
    storage::Storage,
};

/// Number of values in a task: a task and its neighbors fit into a second-level cache.
const TASK_LEN: usize = 1 << 15;

/// Least number of values in a row.
const MIN_ROW_LEN: usize = 256;

/// Number of rows that are summed in f32 before the sums are added in f64.
const F32_ROWS: usize = 32;

/// Length of a row: the least multiple of `c` that is not below [`MIN_ROW_LEN`].
fn row_len(c: usize) -> usize {
    c * MIN_ROW_LEN.div_ceil(c.max(1))
}

/// Repeats a per-channel vector to a row.
fn repeat_to_row(values: &[f32]) -> Vec<f32> {
    values.iter().copied().cycle().take(row_len(values.len())).collect()
}

/// Adds a row to sums by channel.
fn fold_row(sums: &mut [f64], row: &[f32]) {
    for pixel in row.chunks_exact(sums.len().max(1)) {
        sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += f64::from(*value));
    }
}

/// Number of values in a task with `c` channels: whole rows, at least one.
fn task_len(c: usize) -> usize {
    row_len(c) * (TASK_LEN / row_len(c)).max(1)
}

/// Mean and sum of squared deviations by channel, with the number of pixels they are taken over.
#[derive(Debug, Clone)]
pub struct Moments {
    n: f64,
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl Moments {
    /// Computes the moments of `y`, `[m, c]`, in one pass. Deviations are taken from the first
    /// pixel, which is near enough to the mean for f32.
    pub fn compute(isa: &Isa, y: &[f32], c: usize) -> Moments {
        let row = row_len(c);
        let origin = repeat_to_row(&y[..c.min(y.len())]);
        let (mut row_sums, mut row_squares) = (vec![0.0f32; row], vec![0.0f32; row]);
        let (mut sums, mut squares) = (vec![0.0f64; c], vec![0.0f64; c]);
        for rows in y.chunks(row * F32_ROWS) {
            row_sums.fill(0.0);
            row_squares.fill(0.0);
            // SAFETY: an `Isa` exists only for an instruction set of this processor.
            unsafe { (isa.norm_moments)(rows, &origin, &mut row_sums, &mut row_squares) };
            fold_row(&mut sums, &row_sums);
            fold_row(&mut squares, &row_squares);
        }
        Moments::from_deviations(y.len() / c.max(1), &origin, &sums, &squares)
    }

    /// Creates the moments of `n` pixels from Σ (y − origin) and Σ (y − origin)² by channel.
    pub(crate) fn from_deviations(n: usize, origin: &[f32], sums: &[f64], squares: &[f64]) -> Moments {
        let c = sums.len();
        let mut all = Moments { n: n as f64, mean: vec![0.0; c], squares: vec![0.0; c] };
        if n > 0 {
            for k in 0..c {
                let mean = sums[k] / all.n;
                all.mean[k] = f64::from(origin[k]) + mean;
                all.squares[k] = (squares[k] - all.n * mean * mean).max(0.0);
            }
        }
        all
    }

    /// Merges the moments of all parts, in order (Chan et al. 1983).
    pub fn merge(parts: &[Moments], c: usize) -> Moments {
        let mut all = Moments { n: 0.0, mean: vec![0.0; c], squares: vec![0.0; c] };
        for part in parts.iter().filter(|p| p.n > 0.0) {
            let n = all.n + part.n;
            for k in 0..c {
                let difference = part.mean[k] - all.mean[k];
                all.mean[k] += difference * part.n / n;
                all.squares[k] += part.squares[k] + difference * difference * all.n * part.n / n;
            }
            all.n = n;
        }
        all
    }

    /// Converts to sums that can be all-reduced over ranks: number of pixels, Σ y, Σ y²;
    /// `[1 + 2c]`. f64 is precise enough for the variance of f32 values to survive the difference
    /// of the two sums.
    pub fn to_sums(&self) -> Vec<f64> {
        let sums = self.mean.iter().map(|m| m * self.n);
        let squares = self.mean.iter().zip(&self.squares).map(|(m, s)| s + m * m * self.n);
        std::iter::once(self.n).chain(sums).chain(squares).collect()
    }

    /// Converts back from the sums of [`to_sums`](Moments::to_sums).
    pub fn from_sums(sums: &[f64]) -> Moments {
        let (n, c) = (sums[0], sums.len() / 2);
        let mean: Vec<f64> = sums[1..=c].iter().map(|s| s / n.max(1.0)).collect();
        let squares = mean.iter().zip(&sums[1 + c..]).map(|(m, s)| (s - m * m * n).max(0.0)).collect();
        Moments { n, mean, squares }
    }

    /// Returns mean and biased variance, each `[c]`.
    pub fn mean_variance(&self) -> (Vec<f32>, Vec<f32>) {
        let variance = self.squares.iter().map(|s| (s / self.n.max(1.0)) as f32);
        (self.mean.iter().map(|m| *m as f32).collect(), variance.collect())
    }
}

/// Computes mean and biased variance by channel of `y`, `[m, c]`, on all threads.
pub fn moments(isa: &Isa, y: &[f32], c: usize) -> (Vec<f32>, Vec<f32>) {
    let parts: Vec<Moments> = y.par_chunks(task_len(c)).map(|y| Moments::compute(isa, y, c)).collect();
    Moments::merge(&parts, c).mean_variance()
}

/// Computes 1 / √(variance + eps).
pub fn inverse_std(variance: &[f32], eps: f64) -> Vec<f32> {
    variance.iter().map(|v| (1.0 / (f64::from(*v) + eps).sqrt()) as f32).collect()
}

/// Computes scale γ/σ and shift β − μ γ/σ of a norm, each `[c]`.
pub fn scale_shift(gamma: &[f32], beta: &[f32], mean: &[f32], inverse_std: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let scale: Vec<f32> = gamma.iter().zip(inverse_std).map(|(g, i)| g * i).collect();
    let shift = beta.iter().zip(mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
    (scale, shift)
}

/// Computes scale · y + shift (+ `skip`), then max(·, 0) if `relu`. `y`, `skip`: `[m, c]`; `scale`,
/// `shift`: `[c]`.
///
/// # Panics
///
/// If the lengths do not match.
pub fn affine_act<T: Storage>(
    isa: &Isa,
    y: &[T],
    scale: &[f32],
    shift: &[f32],
    skip: Option<&[T]>,
    relu: bool,
) -> Vec<T> {
    assert_eq!(scale.len(), shift.len(), "scale and shift have one value per channel");
    assert!(skip.is_none_or(|skip| skip.len() == y.len()), "a skip has the shape of its summand");
    let n = task_len(scale.len());
    let (scale, shift) = (repeat_to_row(scale), repeat_to_row(shift));
    let mut out = uninit_vec(y.len());
    out.par_chunks_mut(n).zip(y.par_chunks(n)).enumerate().for_each(|(i, (out, y))| {
        let skip = skip.map(|skip| &skip[i * n..][..y.len()]);
        let rows = AffineRows { y, skip, scale: &scale, shift: &shift, relu };
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (T::loops(isa).affine_act)(rows, out) };
    });
    // SAFETY: the loop has written every value of each task.
    unsafe { assume_init_vec(out) }
}

/// Computes [`affine_act`] in place with a scale of 1, on the calling thread: what remains of a
/// batch norm that is folded into the weights. `y`, `skip`: `[m, c]`; `shift`: `[c]`.
///
/// # Panics
///
/// If `skip` and `y` differ in length.
pub fn shift_act(isa: &Isa, y: &mut [f32], shift: &[f32], skip: Option<&[f32]>, relu: bool) {
    assert!(skip.is_none_or(|skip| skip.len() == y.len()), "a skip has the shape of its summand");
    let shift = repeat_to_row(shift);
    // SAFETY: an `Isa` exists only for an instruction set of this processor.
    unsafe { (isa.shift_act)(&shift, skip, relu, y) };
}

/// A norm and ReLU that the reader of y applies: max(scale · y + shift, 0), or without the ReLU.
///
/// It saves writing the normalized map to memory and reading it again.
#[derive(Debug, Clone)]
pub struct DeferredNorm {
    /// A row.
    scale: Vec<f32>,
    /// A row.
    shift: Vec<f32>,
    relu: bool,
}

impl DeferredNorm {
    /// Creates it from scale and shift, each `[c]`.
    pub fn new(scale: &[f32], shift: &[f32], relu: bool) -> DeferredNorm {
        DeferredNorm { scale: repeat_to_row(scale), shift: repeat_to_row(shift), relu }
    }

    /// Applies it to whole pixels. Writes every value of `to`.
    pub(crate) fn apply<T: Storage>(&self, isa: &Isa, y: &[T], to: &mut [MaybeUninit<T>]) {
        let rows = AffineRows { y, skip: None, scale: &self.scale, shift: &self.shift, relu: self.relu };
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (T::loops(isa).affine_act)(rows, to) };
    }
}

/// Parameters and statistics of a batch norm, prepared for its backward pass.
///
/// [`backward`] runs all of it. Where another pass over the data can compute the sums on the way,
/// its steps are called one by one: [`grad_sums`](NormBackward::grad_sums) on parts,
/// [`grad_totals`](NormBackward::grad_totals), then [`input_grad`](NormBackward::input_grad) or
/// [`input_grad_in_place`](NormBackward::input_grad_in_place).
#[derive(Debug, Clone)]
pub struct NormBackward {
    c: usize,
    /// `[c]`.
    inverse_std: Vec<f32>,
    /// A row.
    scale: Vec<f32>,
    /// A row.
    shift: Vec<f32>,
    /// A row.
    mean: Vec<f32>,
}

/// Sums over a part of the pixels, by channel. g is the gradient behind the ReLU mask.
#[derive(Debug, Clone)]
pub struct GradSums {
    /// Σ g (y − mean), `[c]`.
    pub(crate) gamma: Vec<f64>,
    /// Σ g, `[c]`.
    pub(crate) beta: Vec<f64>,
}

/// Gradients of γ and β, and the coefficients of the input gradient.
#[derive(Debug, Clone)]
pub struct GradTotals {
    /// Gradient of γ, `[c]`.
    pub dgamma: Vec<f32>,
    /// Gradient of β, `[c]`.
    pub dbeta: Vec<f32>,
    /// A row.
    slope: Vec<f32>,
    /// A row.
    offset: Vec<f32>,
}

impl NormBackward {
    /// Prepares the backward pass from γ, β, and the batch's mean and 1 / √(variance + ε), each
    /// `[c]`.
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    pub fn new(gamma: &[f32], beta: &[f32], mean: &[f32], inverse_std: &[f32]) -> NormBackward {
        let lengths = [beta.len(), mean.len(), inverse_std.len()];
        assert_eq!(lengths, [gamma.len(); 3], "parameters and statistics have one value per channel");
        let (scale, shift) = scale_shift(gamma, beta, mean, inverse_std);
        let (scale, shift, mean) = (repeat_to_row(&scale), repeat_to_row(&shift), repeat_to_row(mean));
        NormBackward { c: gamma.len(), inverse_std: inverse_std.to_vec(), scale, shift, mean }
    }

    /// Scale, shift and mean, each `[c]`.
    pub(crate) fn vectors(&self) -> [&[f32]; 3] {
        [&self.scale, &self.shift, &self.mean].map(|row| &row[..self.c])
    }

    fn rows<'a, T>(&'a self, dout: &'a [T], y: &'a [T], mask: ReluMask<'a, T>) -> BackwardRows<'a, T> {
        BackwardRows { dout, y, mask, scale: &self.scale, shift: &self.shift, mean: &self.mean }
    }

    /// Computes the sums of some pixels, on the calling thread. The gradient behind the mask is
    /// written to every value of `masked_grad` if there is one.
    ///
    /// # Panics
    ///
    /// If lengths differ, or if the mask is [`ReluMask::FromOutput`] without a `masked_grad`.
    pub fn grad_sums<T: Storage>(
        &self,
        isa: &Isa,
        dout: &[T],
        y: &[T],
        mask: ReluMask<T>,
        mut masked_grad: Option<&mut [MaybeUninit<T>]>,
    ) -> GradSums {
        assert_eq!(dout.len(), y.len(), "a gradient has the shape of its map");
        let c = self.c;
        let mut sums = GradSums { gamma: vec![0.0; c], beta: vec![0.0; c] };
        let (mut gamma_row, mut beta_row) = (vec![0.0f32; row_len(c)], vec![0.0f32; row_len(c)]);
        let part = row_len(c) * F32_ROWS;
        for from in (0..dout.len()).step_by(part) {
            let range = from..(from + part).min(dout.len());
            let rows = self.rows(&dout[range.clone()], &y[range.clone()], mask.slice(range.clone()));
            gamma_row.fill(0.0);
            beta_row.fill(0.0);
            let kept = masked_grad.as_deref_mut().map(|kept| &mut kept[range]);
            // SAFETY: an `Isa` exists only for an instruction set of this processor.
            unsafe { (T::loops(isa).grad_sums)(rows, &mut gamma_row, &mut beta_row, kept) };
            fold_row(&mut sums.gamma, &gamma_row);
            fold_row(&mut sums.beta, &beta_row);
        }
        sums
    }

    /// Adds the sums of all parts, in order, which together have `m` pixels.
    ///
    /// `all_reduce` gets Σ g (y − mean), Σ g and `m`, `[2c + 1]`, and adds the values of the other
    /// ranks that share the statistics. The totals over all ranks enter dy; dγ and dβ are those of
    /// this rank.
    pub fn grad_totals(&self, parts: &[GradSums], m: usize, all_reduce: impl FnOnce(&mut [f64])) -> GradTotals {
        let c = self.c;
        let gammas = (0..c).map(|k| parts.iter().map(|part| part.gamma[k]).sum::<f64>());
        let betas = (0..c).map(|k| parts.iter().map(|part| part.beta[k]).sum::<f64>());
        let mut sums: Vec<f64> = gammas.chain(betas).collect();
        sums.push(m as f64);
        let scaled = |k: usize, scale: f32| (sums[k] * f64::from(scale)) as f32;
        let dgamma = (0..c).map(|k| scaled(k, self.inverse_std[k])).collect();
        let dbeta = (0..c).map(|k| scaled(c + k, 1.0)).collect();
        all_reduce(&mut sums);
        let m = sums[2 * c].max(1.0);
        // dy = γ/σ (g − mean(g) − ŷ mean(g ŷ)) = scale · g + slope · (y − mean) + offset
        let (scale, inverse) = (|k: usize| f64::from(self.scale[k]), |k: usize| f64::from(self.inverse_std[k]));
        let slope = |k: usize| (-scale(k) * (sums[k] * inverse(k)) * inverse(k) / m) as f32;
        let offset = |k: usize| (-scale(k) * sums[c + k] / m) as f32;
        let (slope, offset) = ((0..c).map(slope).collect::<Vec<_>>(), (0..c).map(offset).collect::<Vec<_>>());
        GradTotals { dgamma, dbeta, slope: repeat_to_row(&slope), offset: repeat_to_row(&offset) }
    }

    fn coefficients<'a>(&'a self, totals: &'a GradTotals) -> NormGradCoefficients<'a> {
        NormGradCoefficients { scale: &self.scale, slope: &totals.slope, offset: &totals.offset }
    }

    /// Computes the gradient of y, `[m, c]`. A mask other than [`ReluMask::FromNorm`] must have
    /// been applied to `dout` already.
    ///
    /// # Panics
    ///
    /// If `dout` and `y` differ in length.
    pub fn input_grad<T: Storage>(
        &self,
        isa: &Isa,
        totals: &GradTotals,
        dout: &[T],
        y: &[T],
        mask: ReluMask<T>,
    ) -> Vec<T> {
        assert_eq!(dout.len(), y.len(), "a gradient has the shape of its map");
        let n = task_len(self.c);
        let mut dy = uninit_vec(y.len());
        let tasks = dy.par_chunks_mut(n).zip(dout.par_chunks(n)).zip(y.par_chunks(n)).enumerate();
        tasks.for_each(|(i, ((dy, dout), y))| {
            let rows = self.rows(dout, y, mask.slice(i * n..i * n + y.len()));
            // SAFETY: an `Isa` exists only for an instruction set of this processor.
            unsafe { (T::loops(isa).input_grad)(rows, self.coefficients(totals), dy) };
        });
        // SAFETY: the loop has written every value of each task.
        unsafe { assume_init_vec(dy) }
    }

    /// Replaces the output gradient `grad` by the gradient of y, for a norm that is followed by a
    /// ReLU alone ([`ReluMask::FromNorm`]).
    ///
    /// # Panics
    ///
    /// If `grad` and `y` differ in length.
    pub fn input_grad_in_place(&self, isa: &Isa, totals: &GradTotals, grad: &mut [f32], y: &[f32]) {
        assert_eq!(grad.len(), y.len(), "a gradient has the shape of its map");
        let n = task_len(self.c);
        grad.par_chunks_mut(n).zip(y.par_chunks(n)).for_each(|(grad, y)| {
            let rows = self.rows(&[], y, ReluMask::FromNorm);
            // SAFETY: an `Isa` exists only for an instruction set of this processor.
            unsafe { (isa.norm_input_grad_in_place)(rows, self.coefficients(totals), grad) };
        });
    }
}

/// Gradients of act(norm(y) (+ skip)) with batch statistics.
#[derive(Debug, Clone)]
pub struct Gradients<T> {
    /// Gradient of y, `[m, c]`.
    pub dy: Vec<T>,
    /// Gradient of the skip, `[m, c]`: the output gradient behind the ReLU mask. `None` without a
    /// skip.
    pub dskip: Option<Vec<T>>,
    /// Gradient of γ, `[c]`.
    pub dgamma: Vec<f32>,
    /// Gradient of β, `[c]`.
    pub dbeta: Vec<f32>,
}

/// Computes the gradients of [`affine_act`] with batch statistics, given those of its output.
/// `all_reduce` as in [`NormBackward::grad_totals`].
pub fn backward<T: Storage>(
    isa: &Isa,
    dout: &[T],
    mask: ReluMask<T>,
    norm: &NormBackward,
    y: &[T],
    all_reduce: impl FnOnce(&mut [f64]),
) -> Gradients<T> {
    let n = task_len(norm.c);
    let with_skip = matches!(mask, ReluMask::FromOutput(_) | ReluMask::NoneWithSkip);
    let mut dskip = uninit_vec(if with_skip { y.len() } else { 0 });
    let task = |i: usize, masked_grad: Option<&mut [MaybeUninit<T>]>| {
        let range = i * n..(i * n + n).min(y.len());
        norm.grad_sums(isa, &dout[range.clone()], &y[range.clone()], mask.slice(range), masked_grad)
    };
    let parts: Vec<GradSums> = if with_skip {
        dskip.par_chunks_mut(n).enumerate().map(|(i, masked_grad)| task(i, Some(masked_grad))).collect()
    } else {
        (0..y.len().div_ceil(n)).into_par_iter().map(|i| task(i, None)).collect()
    };
    // SAFETY: the loop has written every value of each task; without a skip there are none.
    let dskip = unsafe { assume_init_vec(dskip) };
    let totals = norm.grad_totals(&parts, y.len() / norm.c, all_reduce);
    // The mask has been applied to a gradient that is kept for the skip.
    let (dout, mask) = if with_skip { (&dskip[..], ReluMask::None) } else { (dout, mask) };
    let dy = norm.input_grad(isa, &totals, dout, y, mask);
    Gradients { dy, dskip: with_skip.then_some(dskip), dgamma: totals.dgamma, dbeta: totals.dbeta }
}

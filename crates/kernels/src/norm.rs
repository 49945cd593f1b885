//! Batch norm with what follows it (skip, ReLU), forward and backward, in the fewest passes. `[m, c]`, channels last.
//!
//! Per-channel values are repeated until a row is long enough for any register; a loop then runs over such wide rows.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::{
    isa::Isa,
    memory::{unwritten, written},
};

/// Values a task: fits a second-level cache with its neighbours.
const TASK: usize = 1 << 15;

/// Values of a wide row, at least.
const WIDE: usize = 256;

/// Wide rows whose sums are in f32; above, in f64.
const ROWS: usize = 32;

fn width(c: usize) -> usize {
    c * WIDE.div_ceil(c.max(1))
}

/// `values` repeated to a wide row.
fn widened(values: &[f32]) -> Vec<f32> {
    values.iter().copied().cycle().take(width(values.len())).collect()
}

/// Adds a wide row to sums by channel.
fn add_narrow(sums: &mut [f64], wide: &[f32]) {
    for row in wide.chunks_exact(sums.len().max(1)) {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
    }
}

/// Wide rows of a task: whole rows, at least one.
fn task(c: usize) -> usize {
    width(c) * (TASK / width(c)).max(1)
}

/// Mean and sum of squared deviations by channel of some rows.
#[derive(Debug, Clone)]
pub struct Moments {
    n: f64,
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl Moments {
    /// Of `y`, `[m, c]`. One pass: deviations are from the first row, near enough to the mean for f32.
    pub fn of(isa: &Isa, y: &[f32], c: usize) -> Moments {
        let mut all = Moments { n: 0.0, mean: vec![0.0; c], squares: vec![0.0; c] };
        let wide = width(c);
        let origin = widened(&y[..c.min(y.len())]);
        let (mut sum, mut squares) = (vec![0.0f32; wide], vec![0.0f32; wide]);
        let (mut total, mut total_squares) = (vec![0.0f64; c], vec![0.0f64; c]);
        for rows in y.chunks(wide * ROWS) {
            sum.fill(0.0);
            squares.fill(0.0);
            // SAFETY: the processor has this instruction set, or it would not be in the table.
            unsafe { (isa.moments)(rows, &origin, &mut sum, &mut squares) };
            add_narrow(&mut total, &sum);
            add_narrow(&mut total_squares, &squares);
        }
        let n = (y.len() / c.max(1)) as f64;
        if n > 0.0 {
            all.n = n;
            for k in 0..c {
                let mean = total[k] / n;
                all.mean[k] = f64::from(origin[k]) + mean;
                all.squares[k] = (total_squares[k] - n * mean * mean).max(0.0);
            }
        }
        all
    }

    /// Of all parts together, in their order (Chan et al. 1983).
    pub fn together(parts: &[Moments], c: usize) -> Moments {
        let mut all = Moments { n: 0.0, mean: vec![0.0; c], squares: vec![0.0; c] };
        for part in parts.iter().filter(|p| p.n > 0.0) {
            let n = all.n + part.n;
            for k in 0..c {
                let apart = part.mean[k] - all.mean[k];
                all.mean[k] += apart * part.n / n;
                all.squares[k] += part.squares[k] + apart * apart * all.n * part.n / n;
            }
            all.n = n;
        }
        all
    }

    /// As numbers that add up over rows that are elsewhere: rows, Σ y, Σ y². `[1 + 2c]`. In f64 the deviations of f32 values survive it.
    pub fn sums(&self) -> Vec<f64> {
        let sum = self.mean.iter().map(|m| m * self.n);
        let squares = self.mean.iter().zip(&self.squares).map(|(m, s)| s + m * m * self.n);
        std::iter::once(self.n).chain(sum).chain(squares).collect()
    }

    /// The way back.
    pub fn of_sums(sums: &[f64]) -> Moments {
        let (n, c) = (sums[0], sums.len() / 2);
        let mean: Vec<f64> = sums[1..=c].iter().map(|s| s / n.max(1.0)).collect();
        let squares = mean.iter().zip(&sums[1 + c..]).map(|(m, s)| (s - m * m * n).max(0.0)).collect();
        Moments { n, mean, squares }
    }

    /// Mean and biased variance.
    pub fn mean_variance(&self) -> (Vec<f32>, Vec<f32>) {
        let variance = self.squares.iter().map(|s| (s / self.n.max(1.0)) as f32);
        (self.mean.iter().map(|m| *m as f32).collect(), variance.collect())
    }
}

/// Mean and biased variance by channel.
pub fn moments(isa: &Isa, y: &[f32], c: usize) -> (Vec<f32>, Vec<f32>) {
    let parts: Vec<Moments> = y.par_chunks(task(c)).map(|y| Moments::of(isa, y, c)).collect();
    Moments::together(&parts, c).mean_variance()
}

#[inline(always)]
pub(crate) fn moments_loop(y: &[f32], origin: &[f32], sum: &mut [f32], squares: &mut [f32]) {
    for y in y.chunks(origin.len()) {
        for (((y, o), s), q) in y.iter().zip(origin).zip(sum.iter_mut()).zip(squares.iter_mut()) {
            let d = y - o;
            *s += d;
            *q += d * d;
        }
    }
}

/// 1 / √(var + eps).
pub fn inverse_deviation(var: &[f32], eps: f64) -> Vec<f32> {
    var.iter().map(|v| (1.0 / (f64::from(*v) + eps).sqrt()) as f32).collect()
}

/// scale and shift of a normalisation with these statistics.
pub fn scale_shift(gamma: &[f32], beta: &[f32], mean: &[f32], inverse: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let scale: Vec<f32> = gamma.iter().zip(inverse).map(|(g, i)| g * i).collect();
    let shift = beta.iter().zip(mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
    (scale, shift)
}

/// Some rows of [`affine_act`], wide.
pub(crate) struct Affine<'a> {
    y: &'a [f32],
    skip: Option<&'a [f32]>,
    scale: &'a [f32],
    shift: &'a [f32],
    relu: bool,
}

/// scale · y + shift, plus `skip` where there is one, then max(·, 0) where `relu`. `scale`, `shift`: `[c]`.
///
/// # Panics
/// If lengths do not go together.
pub fn affine_act(isa: &Isa, y: &[f32], scale: &[f32], shift: &[f32], skip: Option<&[f32]>, relu: bool) -> Vec<f32> {
    assert_eq!(scale.len(), shift.len(), "one of each a channel");
    assert!(skip.is_none_or(|skip| skip.len() == y.len()), "a skip has the shape of what it is added to");
    let n = task(scale.len());
    let (scale, shift) = (widened(scale), widened(shift));
    let mut out = unwritten(y.len());
    out.par_chunks_mut(n).zip(y.par_chunks(n)).enumerate().for_each(|(i, (out, y))| {
        let skip = skip.map(|skip| &skip[i * n..][..y.len()]);
        let rows = Affine { y, skip, scale: &scale, shift: &shift, relu };
        // SAFETY: the processor has this instruction set, or it would not be in the table.
        unsafe { (isa.affine_act)(rows, out) };
    });
    // SAFETY: the loop writes every value of its part.
    unsafe { written(out) }
}

/// [`affine_act`] in place and with a scale of 1, on the calling thread: what is left of batch norm once it is folded into the weights.
pub fn shift_act(isa: &Isa, y: &mut [f32], shift: &[f32], skip: Option<&[f32]>, relu: bool) {
    assert!(skip.is_none_or(|skip| skip.len() == y.len()), "a skip has the shape of what it is added to");
    let shift = widened(shift);
    // SAFETY: the processor has this instruction set, or it would not be in the table.
    unsafe { (isa.shift_act)(&shift, skip, relu, y) };
}

/// Lower bound of a value.
fn low(relu: bool) -> f32 {
    if relu { 0.0 } else { f32::NEG_INFINITY }
}

/// Writes every value of `out`.
#[inline(always)]
pub(crate) fn affine_act_loop(a: Affine, out: &mut [MaybeUninit<f32>]) {
    let (low, wide) = (low(a.relu), a.scale.len());
    for (i, out) in out.chunks_mut(wide).enumerate() {
        let at = i * wide..i * wide + out.len();
        let rows = out.iter_mut().zip(&a.y[at.clone()]).zip(a.scale).zip(a.shift);
        match a.skip {
            Some(skip) => {
                for ((((o, y), s), b), skip) in rows.zip(&skip[at]) {
                    o.write((y * s + b + skip).max(low));
                }
            }
            None => {
                for (((o, y), s), b) in rows {
                    o.write((y * s + b).max(low));
                }
            }
        }
    }
}

#[inline(always)]
pub(crate) fn shift_act_loop(shift: &[f32], skip: Option<&[f32]>, relu: bool, y: &mut [f32]) {
    let (low, wide) = (low(relu), shift.len());
    for (i, y) in y.chunks_mut(wide).enumerate() {
        let at = i * wide..i * wide + y.len();
        let rows = y.iter_mut().zip(shift);
        match skip {
            Some(skip) => {
                for ((y, b), skip) in rows.zip(&skip[at]) {
                    *y = (*y + b + skip).max(low);
                }
            }
            None => {
                for (y, b) in rows {
                    *y = (*y + b).max(low);
                }
            }
        }
    }
}

/// A norm and what follows it, still to be done: max(scale · y + shift, 0), or without the ReLU. Who reads y does it on the way, which
/// saves writing and reading the result.
#[derive(Debug, Clone)]
pub struct Pending {
    scale: Vec<f32>,
    shift: Vec<f32>,
    relu: bool,
}

impl Pending {
    /// From scale and shift by channel.
    pub fn new(scale: &[f32], shift: &[f32], relu: bool) -> Pending {
        Pending { scale: widened(scale), shift: widened(shift), relu }
    }

    /// Of whole pixels. Writes every value of `to`.
    pub(crate) fn apply(&self, isa: &Isa, y: &[f32], to: &mut [MaybeUninit<f32>]) {
        let rows = Affine { y, skip: None, scale: &self.scale, shift: &self.shift, relu: self.relu };
        // SAFETY: the processor has this instruction set, or it would not be in the table.
        unsafe { (isa.affine_act)(rows, to) };
    }
}

/// What a gradient passes on its way back to the normalised value.
#[derive(Debug, Clone, Copy)]
pub enum Gate<'a> {
    /// Nothing.
    Open,
    /// A ReLU of the normalised value alone: open where scale · y + shift > 0.
    Relu,
    /// A ReLU of the sum with a skip: open where this output is positive.
    AddRelu(&'a [f32]),
    /// A sum with a skip.
    Add,
}

impl<'a> Gate<'a> {
    fn part(self, at: std::ops::Range<usize>) -> Gate<'a> {
        match self {
            Gate::AddRelu(out) => Gate::AddRelu(&out[at]),
            other => other,
        }
    }
}

/// Some rows of the backward pass; per-channel values wide.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    dout: &'a [f32],
    y: &'a [f32],
    gate: Gate<'a>,
    scale: &'a [f32],
    shift: &'a [f32],
    mean: &'a [f32],
}

/// dy = a g + b (y − mean) + d.
#[derive(Clone, Copy)]
pub(crate) struct Slope<'a> {
    a: &'a [f32],
    b: &'a [f32],
    d: &'a [f32],
}

/// A batch norm as its backward pass needs it.
#[derive(Debug, Clone)]
pub struct Norm {
    c: usize,
    inverse: Vec<f32>,
    /// Wide.
    scale: Vec<f32>,
    shift: Vec<f32>,
    mean: Vec<f32>,
}

/// Σ g (y − mean) and Σ g by channel, of some rows.
#[derive(Debug, Clone)]
pub struct Sums(Vec<f64>, Vec<f64>);

/// The sums of all rows.
#[derive(Debug, Clone)]
pub struct Totals {
    /// The gradient by γ, `[c]`.
    pub dgamma: Vec<f32>,
    /// The gradient by β, `[c]`.
    pub dbeta: Vec<f32>,
    /// Wide.
    b: Vec<f32>,
    d: Vec<f32>,
}

impl Norm {
    /// From γ, β, and the batch's mean and 1 / √(variance + ε), each `[c]`.
    ///
    /// # Panics
    /// If they are not of as many channels.
    pub fn new(gamma: &[f32], beta: &[f32], mean: &[f32], inverse: &[f32]) -> Norm {
        assert_eq!([beta.len(), mean.len(), inverse.len()], [gamma.len(); 3], "one of each a channel");
        let (scale, shift) = scale_shift(gamma, beta, mean, inverse);
        let (scale, shift, mean) = (widened(&scale), widened(&shift), widened(mean));
        Norm { c: gamma.len(), inverse: inverse.to_vec(), scale, shift, mean }
    }

    fn pass<'a>(&'a self, dout: &'a [f32], y: &'a [f32], gate: Gate<'a>) -> Pass<'a> {
        Pass { dout, y, gate, scale: &self.scale, shift: &self.shift, mean: &self.mean }
    }

    /// The sums of some rows, on the calling thread; what passed the gate goes into `g`, every value, where there is one.
    pub fn sums(&self, isa: &Isa, dout: &[f32], y: &[f32], gate: Gate, mut g: Option<&mut [MaybeUninit<f32>]>) -> Sums {
        assert_eq!(dout.len(), y.len(), "a gradient has the shape of what it is of");
        let c = self.c;
        let mut sums = Sums(vec![0.0; c], vec![0.0; c]);
        let (mut gammas, mut betas) = (vec![0.0f32; width(c)], vec![0.0f32; width(c)]);
        let part = width(c) * ROWS;
        for from in (0..dout.len()).step_by(part) {
            let at = from..(from + part).min(dout.len());
            let pass = self.pass(&dout[at.clone()], &y[at.clone()], gate.part(at.clone()));
            gammas.fill(0.0);
            betas.fill(0.0);
            // SAFETY: the processor has this instruction set, or it would not be in the table.
            unsafe { (isa.sums)(pass, &mut gammas, &mut betas, g.as_deref_mut().map(|g| &mut g[at])) };
            add_narrow(&mut sums.0, &gammas);
            add_narrow(&mut sums.1, &betas);
        }
        sums
    }

    /// The sums of all `m` rows from those of their parts, in order. `elsewhere` adds those of rows that are elsewhere and share the
    /// statistics to Σ g (y − mean), Σ g and `m`, `[2c + 1]`: they count for dy, while dγ and dβ are of the rows here.
    pub fn totals(&self, parts: &[Sums], m: usize, elsewhere: impl FnOnce(&mut [f64])) -> Totals {
        let c = self.c;
        let total = |of: fn(&Sums) -> &Vec<f64>, k: usize| parts.iter().map(|p| of(p)[k]).sum::<f64>();
        let mut sums: Vec<f64> = (0..c).map(|k| total(|p| &p.0, k)).chain((0..c).map(|k| total(|p| &p.1, k))).collect();
        sums.push(m as f64);
        let narrow = |k: usize, scale: f32| (sums[k] * f64::from(scale)) as f32;
        let dgamma = (0..c).map(|k| narrow(k, self.inverse[k])).collect();
        let dbeta = (0..c).map(|k| narrow(c + k, 1.0)).collect();
        elsewhere(&mut sums);
        let m = sums[2 * c].max(1.0);
        // dy = γ/σ (g − mean(g) − ŷ mean(g ŷ)) = a g + b (y − mean) + d
        let (scale, inverse) = (|k: usize| f64::from(self.scale[k]), |k: usize| f64::from(self.inverse[k]));
        let b = |k: usize| (-scale(k) * (sums[k] * inverse(k)) * inverse(k) / m) as f32;
        let d = |k: usize| (-scale(k) * sums[c + k] / m) as f32;
        let (b, d) = ((0..c).map(b).collect::<Vec<_>>(), (0..c).map(d).collect::<Vec<_>>());
        Totals { dgamma, dbeta, b: widened(&b), d: widened(&d) }
    }

    fn slope<'a>(&'a self, totals: &'a Totals) -> Slope<'a> {
        Slope { a: &self.scale, b: &totals.b, d: &totals.d }
    }

    /// The gradient by y.
    pub fn by_y(&self, isa: &Isa, totals: &Totals, dout: &[f32], y: &[f32], gate: Gate) -> Vec<f32> {
        assert_eq!(dout.len(), y.len(), "a gradient has the shape of what it is of");
        let n = task(self.c);
        let mut dy = unwritten(y.len());
        let parts = dy.par_chunks_mut(n).zip(dout.par_chunks(n)).zip(y.par_chunks(n)).enumerate();
        parts.for_each(|(i, ((dy, dout), y))| {
            let pass = self.pass(dout, y, gate.part(i * n..i * n + y.len()));
            // SAFETY: the processor has this instruction set, or it would not be in the table.
            unsafe { (isa.by_y)(pass, self.slope(totals), dy) };
        });
        // SAFETY: the loop writes every value of its part.
        unsafe { written(dy) }
    }

    /// The gradient by y, in place of the gradient that comes in through a ReLU.
    pub fn by_y_in_place(&self, isa: &Isa, totals: &Totals, g: &mut [f32], y: &[f32]) {
        assert_eq!(g.len(), y.len(), "a gradient has the shape of what it is of");
        let n = task(self.c);
        g.par_chunks_mut(n).zip(y.par_chunks(n)).for_each(|(g, y)| {
            // SAFETY: the processor has this instruction set, or it would not be in the table.
            unsafe { (isa.by_y_in_place)(self.pass(&[], y, Gate::Relu), self.slope(totals), g) };
        });
    }
}

/// Gradients of `relu(norm(y) + skip)` with batch statistics.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// By y, `[m, c]`.
    pub dy: Vec<f32>,
    /// By the skip, `[m, c]`: the gradient that passed the ReLU. None without a skip.
    pub dskip: Option<Vec<f32>>,
    /// By γ, `[c]`.
    pub dgamma: Vec<f32>,
    /// By β, `[c]`.
    pub dbeta: Vec<f32>,
}

/// Backward of [`affine_act`] with the batch's statistics. `elsewhere` as in [`Norm::totals`].
pub fn backward(
    isa: &Isa,
    dout: &[f32],
    gate: Gate,
    norm: &Norm,
    y: &[f32],
    elsewhere: impl FnOnce(&mut [f64]),
) -> Gradients {
    let n = task(norm.c);
    let with_skip = matches!(gate, Gate::AddRelu(_) | Gate::Add);
    let mut dskip = unwritten(if with_skip { y.len() } else { 0 });
    let part = |i: usize, g: Option<&mut [MaybeUninit<f32>]>| {
        let at = i * n..(i * n + n).min(y.len());
        norm.sums(isa, &dout[at.clone()], &y[at.clone()], gate.part(at), g)
    };
    let parts: Vec<Sums> = if with_skip {
        dskip.par_chunks_mut(n).enumerate().map(|(i, g)| part(i, Some(g))).collect()
    } else {
        (0..y.len().div_ceil(n)).into_par_iter().map(|i| part(i, None)).collect()
    };
    // SAFETY: the loop writes every value of its part where it is given one.
    let dskip = unsafe { written(dskip) };
    let totals = norm.totals(&parts, y.len() / norm.c, elsewhere);
    // A gradient kept for the skip is behind the gate already.
    let (passed, gate) = if with_skip { (&dskip[..], Gate::Open) } else { (dout, gate) };
    let dy = norm.by_y(isa, &totals, passed, y, gate);
    Gradients { dy, dskip: with_skip.then_some(dskip), dgamma: totals.dgamma, dbeta: totals.dbeta }
}

/// Adds Σ g (y − mean) and Σ g, and writes g, every value, where it is wanted.
#[inline(always)]
pub(crate) fn sums_loop(p: Pass, of_gamma: &mut [f32], of_beta: &mut [f32], mut g: Option<&mut [MaybeUninit<f32>]>) {
    let wide = p.scale.len();
    for (i, dout) in p.dout.chunks(wide).enumerate() {
        let at = i * wide..i * wide + dout.len();
        let y = &p.y[at.clone()];
        let rows = dout.iter().zip(y).zip(p.mean).zip(of_gamma.iter_mut().zip(of_beta.iter_mut()));
        match (p.gate, &mut g) {
            (Gate::Relu, _) => {
                for (((((d, y), mean), (of_gamma, of_beta)), scale), shift) in rows.zip(p.scale).zip(p.shift) {
                    let g = if y * scale + shift > 0.0 { *d } else { 0.0 };
                    *of_gamma += g * (y - mean);
                    *of_beta += g;
                }
            }
            (Gate::AddRelu(out), Some(kept)) => {
                for (((((d, y), mean), (of_gamma, of_beta)), out), kept) in
                    rows.zip(&out[at.clone()]).zip(&mut kept[at])
                {
                    let g = if *out > 0.0 { *d } else { 0.0 };
                    *of_gamma += g * (y - mean);
                    *of_beta += g;
                    kept.write(g);
                }
            }
            (Gate::AddRelu(_), None) => unreachable!("the gradient of a skip is always kept"),
            (Gate::Open | Gate::Add, kept) => {
                for (((g, y), mean), (of_gamma, of_beta)) in rows {
                    *of_gamma += g * (y - mean);
                    *of_beta += g;
                }
                if let Some(kept) = kept {
                    kept[at].write_copy_of_slice(dout);
                }
            }
        }
    }
}

/// dy by [`Slope`], every value; what went into a skip has passed its gate before.
#[inline(always)]
pub(crate) fn by_y_loop(p: Pass, s: Slope, dy: &mut [MaybeUninit<f32>]) {
    let wide = p.scale.len();
    for (i, dy) in dy.chunks_mut(wide).enumerate() {
        let at = i * wide..i * wide + dy.len();
        let rows = dy.iter_mut().zip(&p.dout[at.clone()]).zip(&p.y[at]).zip(p.mean).zip(s.a).zip(s.b).zip(s.d);
        if let Gate::Relu = p.gate {
            for ((((((((dy, g), y), mean), a), b), d), scale), shift) in rows.zip(p.scale).zip(p.shift) {
                let g = if y * scale + shift > 0.0 { *g } else { 0.0 };
                dy.write(a * g + b * (y - mean) + d);
            }
        } else {
            for ((((((dy, g), y), mean), a), b), d) in rows {
                dy.write(a * g + b * (y - mean) + d);
            }
        }
    }
}

/// dy by [`Slope`] in place of g, which comes in through a ReLU.
#[inline(always)]
pub(crate) fn by_y_in_place_loop(p: Pass, s: Slope, g: &mut [f32]) {
    let wide = p.scale.len();
    for (i, g) in g.chunks_mut(wide).enumerate() {
        let at = i * wide..i * wide + g.len();
        let rows = g.iter_mut().zip(&p.y[at]).zip(p.mean).zip(s.a).zip(s.b).zip(s.d).zip(p.scale).zip(p.shift);
        for (((((((g, y), mean), a), b), d), scale), shift) in rows {
            let passed = if y * scale + shift > 0.0 { *g } else { 0.0 };
            *g = a * passed + b * (y - mean) + d;
        }
    }
}

//! How weights move: LARS, SGD and AdamW with the moving average that follows the weights, in one sweep over each tensor. A sweep reads and
//! writes every value once; of its own operations each of them would be a pass through memory.
//!
//! LARS needs two norms first, which is one more pass of reading.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::{
    isa::Isa,
    memory::{unwritten, written, written_slice},
};

/// Values a task: what it reads and writes stays in a second-level cache.
const TASK: usize = 1 << 14;

/// Values whose squares are summed in f32; above, in f64.
const RUN: usize = 1 << 10;

/// Sums side by side: more than any register holds.
const SUMS: usize = 32;

/// One tensor with what belongs to it, all of the same length.
#[derive(Debug, Clone, Copy)]
pub struct Tensors<'a> {
    /// The weights, θ.
    pub w: &'a [f32],
    /// Their gradient.
    pub g: &'a [f32],
    /// First moment: the momentum.
    pub m: &'a [f32],
    /// The average that follows, ξ; none for weights that nothing follows.
    pub xi: Option<&'a [f32]>,
}

/// A tensor after a sweep.
#[derive(Debug, Clone, PartialEq)]
pub struct Moved {
    /// θ.
    pub w: Vec<f32>,
    /// First moment.
    pub m: Vec<f32>,
    /// Second moment, of Adam.
    pub v: Option<Vec<f32>>,
    /// ξ.
    pub xi: Option<Vec<f32>>,
}

/// u = ratio · (g + decay · w); m ← momentum · m + u; w ← w − eta · (nesterov: u + momentum · m; else m); ξ ← ξ + follow · (w − ξ).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Momentum {
    /// LARS's adaptive rate, [`lars_ratio`]; 1 for SGD.
    pub ratio: f32,
    /// Weight decay.
    pub decay: f32,
    /// Share of the momentum that stays.
    pub momentum: f32,
    /// Look ahead.
    pub nesterov: bool,
    /// Learning rate.
    pub eta: f32,
    /// 1 − τ.
    pub follow: f32,
}

/// m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²; w ← keep · w − eta · (m / c₁) / (√(v / c₂) + eps); ξ ← ξ + follow · (w − ξ).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// β₁, β₂.
    pub beta: [f32; 2],
    /// 1 − β₁, 1 − β₂, rounded once.
    pub rest: [f32; 2],
    /// c₁, c₂: 1 − βᵗ at update t.
    pub correction: [f32; 2],
    /// ε.
    pub eps: f32,
    /// 1 − eta · weight decay.
    pub keep: f32,
    /// Learning rate.
    pub eta: f32,
    /// 1 − τ.
    pub follow: f32,
}

/// LARS's adaptive rate: trust · ‖w‖ / ‖g + decay · w‖, 1 where either norm is 0; with `cap` at most that, as a share of it.
pub fn lars_ratio(isa: &Isa, w: &[f32], g: &[f32], decay: f64, trust: f64, cap: Option<f64>) -> f32 {
    assert_eq!(w.len(), g.len(), "a gradient has the shape of its weights");
    let part = |(w, g): (&[f32], &[f32])| {
        let mut total = [0.0f64; 2];
        for (w, g) in w.chunks(RUN).zip(g.chunks(RUN)) {
            // SAFETY: the processor has this instruction set, or it would not be in the table.
            let squares = unsafe { (isa.squares)(w, g, decay as f32) };
            total.iter_mut().zip(squares).for_each(|(t, s)| *t += f64::from(s));
        }
        total
    };
    // The parts are fixed, and added in their order.
    let parts: Vec<[f64; 2]> = if w.len() <= TASK {
        vec![part((w, g))]
    } else {
        w.par_chunks(TASK).zip(g.par_chunks(TASK)).map(part).collect()
    };
    let [w, u] = parts.iter().fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]).map(f64::sqrt);
    let ratio = if w == 0.0 || u == 0.0 { 1.0 } else { trust * w / u };
    cap.map_or(ratio, |cap| (ratio / cap).min(1.0)) as f32
}

/// Σ w² and Σ (g + decay · w)².
#[inline(always)]
pub(crate) fn squares_loop(w: &[f32], g: &[f32], decay: f32) -> [f32; 2] {
    let (mut of_w, mut of_u) = ([0.0f32; SUMS], [0.0f32; SUMS]);
    let (w, w_rest) = w.as_chunks::<SUMS>();
    let (g, g_rest) = g.as_chunks::<SUMS>();
    for (w, g) in w.iter().zip(g) {
        for k in 0..SUMS {
            let u = g[k] + decay * w[k];
            of_w[k] += w[k] * w[k];
            of_u[k] += u * u;
        }
    }
    for (k, (w, g)) in w_rest.iter().zip(g_rest).enumerate() {
        let u = g + decay * w;
        of_w[k] += w * w;
        of_u[k] += u * u;
    }
    [of_w.iter().sum(), of_u.iter().sum()]
}

/// A part of a sweep: what it reads, and where it writes.
pub(crate) struct Part<'a> {
    from: Tensors<'a>,
    v: &'a [f32],
    w: &'a mut [MaybeUninit<f32>],
    m: &'a mut [MaybeUninit<f32>],
    to_v: &'a mut [MaybeUninit<f32>],
    xi: &'a mut [MaybeUninit<f32>],
}

/// Cuts a sweep into parts and goes through them; `run` writes every value of a part.
fn sweep(t: Tensors, v: Option<&[f32]>, run: impl Fn(Part) + Sync + Send) -> Moved {
    let n = t.w.len();
    let same = [t.g.len(), t.m.len(), t.xi.map_or(n, <[f32]>::len), v.map_or(n, <[f32]>::len)];
    assert_eq!(same, [n; 4], "gradient, moments and average have the shape of the weights");
    let (mut w, mut m) = (unwritten(n), unwritten(n));
    let (mut to_v, mut xi) =
        (unwritten(if v.is_some() { n } else { 0 }), unwritten(if t.xi.is_some() { n } else { 0 }));
    let mut parts = Vec::with_capacity(n.div_ceil(TASK));
    let mut rest = [&mut w[..], &mut m[..], &mut to_v[..], &mut xi[..]];
    for first in (0..n).step_by(TASK) {
        let at = first..(first + TASK).min(n);
        let [w, m, to_v, xi] = rest.each_mut().map(|rest| {
            let all = std::mem::take(rest);
            let (part, after) = all.split_at_mut(at.len().min(all.len()));
            *rest = after;
            part
        });
        let from = Tensors {
            w: &t.w[at.clone()],
            g: &t.g[at.clone()],
            m: &t.m[at.clone()],
            xi: t.xi.map(|xi| &xi[at.clone()]),
        };
        parts.push(Part { from, v: v.map_or(&[], |v| &v[at]), w, m, to_v, xi });
    }
    if parts.len() == 1 {
        parts.into_iter().for_each(run)
    } else {
        parts.into_par_iter().for_each(&run)
    }
    // SAFETY: `run` wrote every value of every part, and the parts are all of it.
    unsafe { Moved { w: written(w), m: written(m), v: v.map(|_| written(to_v)), xi: t.xi.map(|_| written(xi)) } }
}

/// [`Momentum`] over one tensor.
pub fn momentum(isa: &Isa, t: Tensors, by: Momentum) -> Moved {
    // SAFETY: the processor has this instruction set, or it would not be in the table.
    sweep(t, None, |part| unsafe { (isa.momentum)(part, by) })
}

/// [`Adam`] over one tensor with its second moment.
pub fn adam(isa: &Isa, t: Tensors, v: &[f32], by: Adam) -> Moved {
    // SAFETY: the processor has this instruction set, or it would not be in the table.
    sweep(t, Some(v), |part| unsafe { (isa.adam)(part, by) })
}

#[inline(always)]
pub(crate) fn momentum_loop(p: Part, by: Momentum) {
    let n = p.w.len();
    let Tensors { w, g, m, xi } = p.from;
    let (w, g, m) = (&w[..n], &g[..n], &m[..n]);
    let (to_w, to_m) = (&mut p.w[..n], &mut p.m[..n]);
    // One loop for both: what of u, and what of the momentum, the step takes.
    let [of_u, of_m] = if by.nesterov { [1.0, by.momentum] } else { [0.0, 1.0] };
    for i in 0..n {
        let u = by.ratio * (g[i] + by.decay * w[i]);
        let m = by.momentum * m[i] + u;
        to_m[i].write(m);
        to_w[i].write(w[i] - by.eta * (of_u * u + of_m * m));
    }
    // SAFETY: written just now.
    follow(xi, unsafe { written_slice(to_w) }, by.follow, p.xi);
}

#[inline(always)]
pub(crate) fn adam_loop(p: Part, by: Adam) {
    let n = p.w.len();
    let Tensors { w, g, m, xi } = p.from;
    let (w, g, m, v) = (&w[..n], &g[..n], &m[..n], &p.v[..n]);
    let (to_w, to_m, to_v) = (&mut p.w[..n], &mut p.m[..n], &mut p.to_v[..n]);
    for i in 0..n {
        let m = by.beta[0] * m[i] + by.rest[0] * g[i];
        let v = by.beta[1] * v[i] + by.rest[1] * (g[i] * g[i]);
        to_m[i].write(m);
        to_v[i].write(v);
        let step = (m / by.correction[0]) / ((v / by.correction[1]).sqrt() + by.eps);
        to_w[i].write(by.keep * w[i] - by.eta * step);
    }
    // SAFETY: written just now.
    follow(xi, unsafe { written_slice(to_w) }, by.follow, p.xi);
}

/// The average after the weights, while those are in the cache. Writes every value of `to`.
#[inline(always)]
fn follow(xi: Option<&[f32]>, w: &[f32], share: f32, to: &mut [MaybeUninit<f32>]) {
    if let Some(xi) = xi {
        for ((to, xi), w) in to.iter_mut().zip(xi).zip(w) {
            to.write(xi + share * (w - xi));
        }
    }
}

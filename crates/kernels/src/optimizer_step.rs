//! Optimizer steps (LARS, SGD and AdamW) and the moving average of the target network.
//!
//! Each is one sweep over a tensor that reads and writes every value once. Written as separate
//! tensor operations, each of them would be a pass through memory. LARS needs two norms first,
//! which is one more pass of reading.

use rayon::prelude::*;

pub use crate::loops::optimizer_step::{Adam, Momentum, ParamTensors};
use crate::{
    isa::Isa,
    loops::optimizer_step::StepPart,
    memory::{assume_init_vec, uninit_vec},
};

/// Number of values in a task: all that it reads and writes stays in a second-level cache.
const TASK_LEN: usize = 1 << 14;

/// Number of values whose squares are summed in f32 before the sums are added in f64.
const F32_LEN: usize = 1 << 10;

/// A tensor and its state after a step.
#[derive(Debug, Clone, PartialEq)]
pub struct UpdatedTensors {
    /// Weights θ.
    pub w: Vec<f32>,
    /// First moment.
    pub m: Vec<f32>,
    /// Second moment, for Adam.
    pub v: Option<Vec<f32>>,
}

/// Computes LARS's layer-wise rate, trust_coefficient · ‖w‖ / ‖g + weight_decay · w‖; 1 where
/// either norm is 0.
///
/// With a `cap` (the learning rate, for LARC's clipping) the rate is at most the cap, and is
/// returned as a fraction of it.
///
/// # Panics
///
/// If `w` and `g` differ in length.
pub fn trust_ratio(
    isa: &Isa,
    w: &[f32],
    g: &[f32],
    weight_decay: f64,
    trust_coefficient: f64,
    cap: Option<f64>,
) -> f32 {
    assert_eq!(w.len(), g.len(), "a gradient has the shape of its weights");
    let task = |(w, g): (&[f32], &[f32])| {
        let mut total = [0.0f64; 2];
        for (w, g) in w.chunks(F32_LEN).zip(g.chunks(F32_LEN)) {
            // SAFETY: an `Isa` exists only for an instruction set of this processor.
            let squares = unsafe { (isa.squared_norms)(w, g, weight_decay as f32) };
            total.iter_mut().zip(squares).for_each(|(t, s)| *t += f64::from(s));
        }
        total
    };
    // The tasks depend on the length alone, and their sums are added in order.
    let parts: Vec<[f64; 2]> = if w.len() <= TASK_LEN {
        vec![task((w, g))]
    } else {
        w.par_chunks(TASK_LEN).zip(g.par_chunks(TASK_LEN)).map(task).collect()
    };
    let [w, u] = parts.iter().fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]).map(f64::sqrt);
    let ratio = if w == 0.0 || u == 0.0 { 1.0 } else { trust_coefficient * w / u };
    cap.map_or(ratio, |cap| (ratio / cap).min(1.0)) as f32
}

/// Splits a sweep into parts and runs them on all threads. `step` writes every value of a part.
fn sweep(t: ParamTensors, v: Option<&[f32]>, step: impl Fn(StepPart) + Sync + Send) -> UpdatedTensors {
    let n = t.w.len();
    let lengths = [t.g.len(), t.m.len(), v.map_or(n, <[f32]>::len)];
    assert_eq!(lengths, [n; 3], "gradient and moments have the shape of the weights");
    let (mut w, mut m) = (uninit_vec(n), uninit_vec(n));
    let mut to_v = uninit_vec(if v.is_some() { n } else { 0 });
    let mut parts = Vec::with_capacity(n.div_ceil(TASK_LEN));
    let mut rest = [&mut w[..], &mut m[..], &mut to_v[..]];
    for first in (0..n).step_by(TASK_LEN) {
        let range = first..(first + TASK_LEN).min(n);
        let [to_w, to_m, to_v] = rest.each_mut().map(|rest| {
            let all = std::mem::take(rest);
            let (part, after) = all.split_at_mut(range.len().min(all.len()));
            *rest = after;
            part
        });
        let from = ParamTensors { w: &t.w[range.clone()], g: &t.g[range.clone()], m: &t.m[range.clone()] };
        parts.push(StepPart { from, v: v.map_or(&[], |v| &v[range]), to_w, to_m, to_v });
    }
    if parts.len() == 1 {
        parts.into_iter().for_each(step)
    } else {
        parts.into_par_iter().for_each(&step)
    }
    // SAFETY: `step` has written every value of each part, and the parts cover the tensors.
    unsafe { UpdatedTensors { w: assume_init_vec(w), m: assume_init_vec(m), v: v.map(|_| assume_init_vec(to_v)) } }
}

/// Applies a [`Momentum`] step to one tensor.
///
/// # Panics
///
/// If the tensors differ in length.
pub fn momentum(isa: &Isa, t: ParamTensors, by: Momentum) -> UpdatedTensors {
    // SAFETY: an `Isa` exists only for an instruction set of this processor.
    sweep(t, None, |part| unsafe { (isa.momentum_step)(part, by) })
}

/// Applies an [`Adam`] step to one tensor with its second moment `v`.
///
/// # Panics
///
/// If the tensors differ in length.
pub fn adam(isa: &Isa, t: ParamTensors, v: &[f32], by: Adam) -> UpdatedTensors {
    // SAFETY: an `Isa` exists only for an instruction set of this processor.
    sweep(t, Some(v), |part| unsafe { (isa.adam_step)(part, by) })
}

/// Moves the target weights ξ towards the online weights θ: ξ + rate · (θ − ξ), with rate 1 − τ.
///
/// # Panics
///
/// If `xi` and `theta` differ in length.
pub fn ema(isa: &Isa, xi: &[f32], theta: &[f32], rate: f32) -> Vec<f32> {
    assert_eq!(xi.len(), theta.len(), "online and target weights have the same shape");
    let mut out = uninit_vec(xi.len());
    // SAFETY: an `Isa` exists only for an instruction set of this processor.
    let task = |((to, xi), theta): ((&mut [_], &[f32]), &[f32])| unsafe { (isa.ema)(xi, theta, rate, to) };
    if xi.len() <= TASK_LEN {
        task(((&mut out[..], xi), theta));
    } else {
        out.par_chunks_mut(TASK_LEN).zip(xi.par_chunks(TASK_LEN)).zip(theta.par_chunks(TASK_LEN)).for_each(task);
    }
    // SAFETY: the tasks have written every value of `out`.
    unsafe { assume_init_vec(out) }
}

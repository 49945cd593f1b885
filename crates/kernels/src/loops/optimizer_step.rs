//! The loops of the optimizer steps and of the target network's moving average: one sweep over a
//! tensor, which reads and writes each value once.

use std::mem::MaybeUninit;

/// A parameter tensor with its gradient and state, all of the same length.
#[derive(Debug, Clone, Copy)]
pub struct ParamTensors<'a> {
    /// Weights θ.
    pub w: &'a [f32],
    /// Gradient of the weights.
    pub g: &'a [f32],
    /// First moment (momentum).
    pub m: &'a [f32],
}

/// SGD with momentum, or LARS:
///
/// u = trust_ratio · (g + weight_decay · w),
/// m ← momentum · m + u,
/// w ← w − eta · (u + momentum · m if nesterov, else m).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Momentum {
    /// LARS's layer-wise rate ([`trust_ratio`](crate::optimizer_step::trust_ratio)); 1 for SGD.
    pub trust_ratio: f32,
    /// Weight decay.
    pub weight_decay: f32,
    /// Momentum, in [0, 1).
    pub momentum: f32,
    /// Use Nesterov's momentum.
    pub nesterov: bool,
    /// Learning rate η.
    pub eta: f32,
}

/// AdamW:
///
/// m ← β₁ m + (1 − β₁) g,
/// v ← β₂ v + (1 − β₂) g²,
/// w ← decay_factor · w − eta · (m / c₁) / (√(v / c₂) + eps).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// β₁ and β₂.
    pub beta: [f32; 2],
    /// 1 − β₁ and 1 − β₂, each rounded once.
    pub one_minus_beta: [f32; 2],
    /// Bias corrections c₁ and c₂: 1 − βᵗ at update t.
    pub bias_correction: [f32; 2],
    /// ε.
    pub eps: f32,
    /// 1 − eta · weight decay.
    pub decay_factor: f32,
    /// Learning rate η.
    pub eta: f32,
}

/// A part of a sweep: the slices it reads and the slices it writes.
pub(crate) struct StepPart<'a> {
    pub from: ParamTensors<'a>,
    /// Second moment; empty for [`momentum`].
    pub v: &'a [f32],
    pub to_w: &'a mut [MaybeUninit<f32>],
    pub to_m: &'a mut [MaybeUninit<f32>],
    /// Empty for [`momentum`].
    pub to_v: &'a mut [MaybeUninit<f32>],
}

/// Number of partial sums in [`squared_norms`]: more than any register has lanes, so that several
/// chains of FMAs run at once.
const PARTIAL_SUMS: usize = 32;

/// Returns Σ w² and Σ (g + weight_decay · w)².
#[inline(always)]
pub(crate) fn squared_norms(w: &[f32], g: &[f32], weight_decay: f32) -> [f32; 2] {
    let (mut w_sums, mut u_sums) = ([0.0f32; PARTIAL_SUMS], [0.0f32; PARTIAL_SUMS]);
    let (w, w_rest) = w.as_chunks::<PARTIAL_SUMS>();
    let (g, g_rest) = g.as_chunks::<PARTIAL_SUMS>();
    for (w, g) in w.iter().zip(g) {
        for k in 0..PARTIAL_SUMS {
            let u = g[k] + weight_decay * w[k];
            w_sums[k] += w[k] * w[k];
            u_sums[k] += u * u;
        }
    }
    for (k, (w, g)) in w_rest.iter().zip(g_rest).enumerate() {
        let u = g + weight_decay * w;
        w_sums[k] += w * w;
        u_sums[k] += u * u;
    }
    [w_sums.iter().sum(), u_sums.iter().sum()]
}

/// Applies [`Momentum`] to one part. Writes every value of `to_w` and `to_m`.
#[inline(always)]
pub(crate) fn momentum(p: StepPart, by: Momentum) {
    let n = p.to_w.len();
    let ParamTensors { w, g, m } = p.from;
    let (w, g, m) = (&w[..n], &g[..n], &m[..n]);
    let (to_w, to_m) = (&mut p.to_w[..n], &mut p.to_m[..n]);
    // One loop for both: the step is a combination of u and m.
    let [u_factor, m_factor] = if by.nesterov { [1.0, by.momentum] } else { [0.0, 1.0] };
    for i in 0..n {
        let u = by.trust_ratio * (g[i] + by.weight_decay * w[i]);
        let m = by.momentum * m[i] + u;
        to_m[i].write(m);
        to_w[i].write(w[i] - by.eta * (u_factor * u + m_factor * m));
    }
}

/// Applies [`Adam`] to one part. Writes every value of `to_w`, `to_m` and `to_v`.
#[inline(always)]
pub(crate) fn adam(p: StepPart, by: Adam) {
    let n = p.to_w.len();
    let ParamTensors { w, g, m } = p.from;
    let (w, g, m, v) = (&w[..n], &g[..n], &m[..n], &p.v[..n]);
    let (to_w, to_m, to_v) = (&mut p.to_w[..n], &mut p.to_m[..n], &mut p.to_v[..n]);
    for i in 0..n {
        let m = by.beta[0] * m[i] + by.one_minus_beta[0] * g[i];
        let v = by.beta[1] * v[i] + by.one_minus_beta[1] * (g[i] * g[i]);
        to_m[i].write(m);
        to_v[i].write(v);
        let step = (m / by.bias_correction[0]) / ((v / by.bias_correction[1]).sqrt() + by.eps);
        to_w[i].write(by.decay_factor * w[i] - by.eta * step);
    }
}

/// Writes ξ + rate · (θ − ξ) to every value of `to`.
#[inline(always)]
pub(crate) fn ema(xi: &[f32], theta: &[f32], rate: f32, to: &mut [MaybeUninit<f32>]) {
    for ((to, xi), theta) in to.iter_mut().zip(xi).zip(theta) {
        to.write(xi + rate * (theta - xi));
    }
}

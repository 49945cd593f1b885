//! THE METHOD: Bootstrap Your Own Latent, Grill et al. 2020, arXiv:2006.07733, §3.1, in the paper's letters.
//!
//! θ: online weights (f, g, q); ξ: target weights (f, g); v, v′: two views of the same images; z′: target projection of v′;
//! q: online prediction; η: learning rate; τ: target decay; k of K: step.
//! Order of a step: loss and gradient at (θ, ξ), then θ by the optimiser, then ξ towards the new θ.
//! Both networks run in training mode, each view in a pass of its own, so each is normalised by its own batch.

use burn::tensor::{Bool, Device, Tensor, activation::log_softmax};
use serde::{Deserialize, Serialize};

use crate::{
    device,
    nn::{Mode, Network, Pass, Tree, Weights},
    optim::{LossScale, Optimizer, Schedule},
    ranks::Ranks,
};

/// The two networks, the optimiser with its momenta, and the step counter: all that a run is.
#[derive(Debug, Clone)]
pub struct Byol {
    /// f, g, q.
    pub network: Network,
    /// What is minimised.
    pub objective: Objective,
    /// θ
    pub online: Weights,
    /// ξ
    pub target: Weights,
    /// How θ moves.
    pub optimizer: Optimizer,
    /// η and τ by step.
    pub schedule: Schedule,
    /// Steps done: the index of the next step, from 0.
    pub k: u64,
    /// Who shares each batch.
    pub ranks: Ranks,
    /// Of gradients in f16; none where their range is that of f32.
    pub scale: Option<LossScale>,
}

/// What is minimised. The default is BYOL; the rest are the paper's ablations of it (§5, appendix F.4).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// Predict with q; without it the prediction is the projection itself. true.
    pub predictor: bool,
    /// Predict ξ's projections, which no gradient enters. Without it they are θ's own, and the gradient goes through both sides. true.
    pub stop_gradient: bool,
    /// β: weight of the other images of the batch as negatives. 0 is BYOL; 1 with neither predictor nor stop_gradient is SimCLR. 0.
    pub beta: f64,
    /// α: temperature of the negatives, above 0. 0.1.
    pub alpha: f64,
}

impl Default for Objective {
    fn default() -> Self {
        Objective { predictor: true, stop_gradient: true, beta: 0.0, alpha: 0.1 }
    }
}

/// What a step reports.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Mean over the batch of both directions' losses, in [0, 8] and about 4 for unrelated directions; with negatives (β > 0) of another range.
    pub loss: f64,
    /// η of this step.
    pub eta: f64,
    /// τ of this step.
    pub tau: f64,
    /// Whether θ and ξ stayed as they were, as the gradient was beyond the range of f16.
    pub skipped: bool,
}

/// The parts of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for views.
    Data,
    /// Both networks, both views, the loss.
    Forward,
    /// ∇θ.
    Backward,
    /// The mean of ∇θ over all ranks.
    Exchange,
    /// θ, ξ.
    Update,
}

/// Loss and gradient of one micro-batch.
#[derive(Debug)]
pub struct Gradient {
    /// As in [`Report`].
    pub loss: f64,
    /// ∇θ L by parameter name.
    pub grads: Tree,
}

/// ‖q̄ − z̄′‖² by row, q̄ and z̄′ of unit length: 2 − 2 cos, in [0, 4] (eq. 2).
///
/// # Shapes
/// `q`, `z`: `[N, D]`; returns `[N]`.
pub fn distance(q: Tensor<2>, z: Tensor<2>) -> Tensor<1> {
    (unit(q) - unit(z)).square().sum_dim(1).squeeze_dim(1)
}

/// 2α ln( Σ_{j≠i} exp(cos(qᵢ, zⱼ) / α) + Σⱼ exp(cos(qᵢ, z′ⱼ) / α) ) by row i: what β adds to the distance of q from z′ (appendix F.4).
///
/// # Shapes
/// `q`, and the projections of the same view `z` and of the other `z2`: `[N, D]`; returns `[N]`.
pub fn negatives(q: Tensor<2>, z: Tensor<2>, z2: Tensor<2>, alpha: f64) -> Tensor<1> {
    let (n, q) = (q.dims()[0], unit(q));
    let own = Tensor::<2, Bool>::diag_mask([n, n], 0, &q.device()).bool_not();
    let same = q.clone().matmul(unit(z).transpose()).div_scalar(alpha).mask_fill(own, f32::MIN / 4.0);
    let all = Tensor::cat(vec![same, q.matmul(unit(z2).transpose()).div_scalar(alpha)], 1);
    // ln Σ exp = x − ln softmax(x), of any x: the last is never masked.
    let last = all.clone().narrow(1, 2 * n - 1, 1);
    let share = log_softmax(all, 1).narrow(1, 2 * n - 1, 1);
    (last - share).squeeze_dim::<1>(1).mul_scalar(2.0 * alpha)
}

/// x / √max(‖x‖², 1e-12) by row.
pub fn unit(x: Tensor<2>) -> Tensor<2> {
    x.clone() / x.square().sum_dim(1).clamp_min(1e-12).sqrt()
}

impl Byol {
    /// L = ‖q̄ − z̄′‖² + the same with the views swapped, and ∇θ L. `v`, `v2`: `[N, H, W, C]` in 0..1. Running statistics move.
    pub fn gradient(&mut self, v: Tensor<4>, v2: Tensor<4>, mut done: impl FnMut(Phase)) -> Gradient {
        let (net, o) = (&self.network, self.objective);
        let (norm, precision) = (&net.norm, net.precision);

        let targets = o.stop_gradient.then(|| {
            let mode = Mode::Train(&mut self.target.statistics, net.ranks);
            let mut xi = Pass { params: &self.target.params, norm, precision, mode };
            [net.project(&mut xi, v.clone()), net.project(&mut xi, v2.clone())] //          zξ, z′ξ
        });

        let theta = self.online.params.tracked();
        let mode = Mode::Train(&mut self.online.statistics, net.ranks);
        let mut online = Pass { params: &theta, norm, precision, mode };
        let z = [v, v2].map(|v| net.project(&mut online, v.autodiff())); //                 zθ, z′θ
        let [q, q2] = if o.predictor { z.clone().map(|z| net.predict(&mut online, z)) } else { z.clone() }; // qθ(zθ)
        let [z, z2] = targets.map_or(z, |targets| targets.map(Tensor::autodiff)); //        sg(zξ)

        let mut l = (distance(q.clone(), z2.clone()) + distance(q2.clone(), z.clone())).mean(); // L + L̃
        if o.beta != 0.0 {
            let both = negatives(q, z.clone(), z2.clone(), o.alpha) + negatives(q2, z2, z, o.alpha);
            l = l + both.mean().mul_scalar(o.beta);
        }
        let loss = f64::from(l.clone().without_autodiff().into_scalar::<f32>());
        done(Phase::Forward);
        let s = self.scale.map_or(1.0, |scale| scale.factor);
        let scaled = if s == 1.0 { l } else { l.mul_scalar(s) };
        let grads = theta.gradients(&mut scaled.backward()); //                             ∇θ
        let grads = if s == 1.0 { grads } else { grads.map(|_, g| g.div_scalar(s)) };
        done(Phase::Backward);
        Gradient { loss, grads }
    }

    /// θ ← optimizer(θ, ∇θ L, η), then ξ ← τ ξ + (1 − τ) θ, then k ← k + 1.
    pub fn update(&mut self, gradient: &Gradient) -> Report {
        let (eta, tau) = (self.schedule.eta(self.k), self.schedule.tau(self.k));
        self.k += 1;
        let finite = self.scale.is_none() || gradient.grads.norm().is_finite();
        self.scale = self.scale.map(|scale| scale.after(finite));
        if finite {
            let (theta, xi) = (&self.online.params, &self.target.params);
            (self.online.params, self.target.params) = self.optimizer.step(theta, xi, &gradient.grads, eta, tau);
        }
        Report { loss: gradient.loss, eta, tau, skipped: !finite }
    }

    /// One step from `n` micro-batches of one batch: the mean of their gradients, one update. With `n` = 1 the paper's step;
    /// above it the paper's batch-size study, where only the batch-norm statistics see the smaller batch. `views` gives the
    /// micro-batches in turn; `done` hears of each phase's end, for whoever keeps the time.
    ///
    /// # Errors
    /// What `views` says; then nothing has moved but running statistics.
    pub fn step<E>(
        &mut self,
        n: usize,
        mut views: impl FnMut() -> Result<(Tensor<4>, Tensor<4>), E>,
        mut done: impl FnMut(Phase),
    ) -> Result<Report, E> {
        let mut sum: Option<Gradient> = None;
        for _ in 0..n {
            let (v, v2) = views()?;
            done(Phase::Data);
            let _at_work = device::at_work(&v.device());
            let one = self.gradient(v, v2, &mut done);
            sum = Some(match sum {
                None => one,
                Some(sum) => Gradient { loss: sum.loss + one.loss, grads: sum.grads.zip(&one.grads, |_, a, b| a + b) },
            });
        }
        let mut mean = sum.expect("a step has at least one micro-batch");
        if n > 1 {
            mean.loss /= n as f64;
            mean.grads = mean.grads.map(|_, g| g.div_scalar(n as f64));
        }
        if self.ranks != Ranks::ALONE {
            mean = self.of_all_ranks(mean);
            done(Phase::Exchange);
        }
        let _at_work = device::at_work(&self.device());
        let report = self.update(&mean);
        done(Phase::Update);
        Ok(report)
    }

    /// The mean over all ranks, each with its part of the batch.
    fn of_all_ranks(&self, own: Gradient) -> Gradient {
        let mut loss = [own.loss / self.ranks.count() as f64];
        self.ranks.sum(&mut loss);
        Gradient { loss: loss[0], grads: self.ranks.mean(own.grads) }
    }

    /// Where the weights live.
    pub fn device(&self) -> Device {
        let first = self.online.params.iter().next();
        first.map(|(_, leaf)| leaf.value.device()).expect("a network has parameters")
    }
}

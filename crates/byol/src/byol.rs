//! THE METHOD: Bootstrap Your Own Latent, Grill et al. 2020, arXiv:2006.07733, §3.1, in the paper's letters.
//!
//! θ: online weights (f, g, q); ξ: target weights (f, g); v, v′: two views of the same images; z′: target projection of v′;
//! q: online prediction; η: learning rate; τ: target decay; k of K: step.
//! Order of a step: loss and gradient at (θ, ξ), then θ by the optimiser, then ξ towards the new θ.
//! Both networks run in training mode, each view in a pass of its own, so each is normalised by its own batch.

use burn::tensor::{Device, Tensor};

use crate::{
    nn::{Mode, Network, Pass, Tree, Weights},
    optim::{Optimizer, Schedule},
};

/// The two networks, the optimiser with its momenta, and the step counter: all that a run is.
#[derive(Debug, Clone)]
pub struct Byol {
    /// f, g, q.
    pub network: Network,
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
}

/// What a step reports.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Mean over the batch of both directions' losses, in [0, 8]; about 4 for unrelated directions.
    pub loss: f64,
    /// η of this step.
    pub eta: f64,
    /// τ of this step.
    pub tau: f64,
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
/// `q`, `z`: `[N, D]`; returns `[N]`. `z` is a constant: no gradient reaches it.
pub fn distance(q: Tensor<2>, z: Tensor<2>) -> Tensor<1> {
    let z = if q.is_autodiff() { z.without_autodiff().autodiff() } else { z };
    (unit(q) - unit(z)).square().sum_dim(1).squeeze_dim(1)
}

/// x / √max(‖x‖², 1e-12) by row.
pub fn unit(x: Tensor<2>) -> Tensor<2> {
    x.clone() / x.square().sum_dim(1).clamp_min(1e-12).sqrt()
}

impl Byol {
    /// L = ‖q̄ − z̄′‖² + the same with the views swapped, and ∇θ L. `v`, `v2`: `[N, H, W, C]` in 0..1. Running statistics move.
    pub fn gradient(&mut self, v: Tensor<4>, v2: Tensor<4>, mut done: impl FnMut(Phase)) -> Gradient {
        let net = &self.network;
        let (norm, statistics) = (&net.norm, &mut self.target.statistics);
        let mut xi = Pass { params: &self.target.params, norm, mode: Mode::Train(statistics) };
        let z = net.project(&mut xi, v.clone()); //                                         z ξ
        let z2 = net.project(&mut xi, v2.clone()); //                                       z′ξ

        let theta = self.online.params.tracked();
        let mut online = Pass { params: &theta, norm, mode: Mode::Train(&mut self.online.statistics) };
        let q = net.predict(&mut online, v.autodiff()); //                                  qθ(zθ)
        let q2 = net.predict(&mut online, v2.autodiff()); //                                qθ(z′θ)

        let l = (distance(q, z2) + distance(q2, z)).mean(); //                              L + L̃
        let loss = f64::from(l.clone().without_autodiff().into_scalar::<f32>());
        done(Phase::Forward);
        let grads = theta.gradients(&mut l.backward()); //                                  ∇θ
        done(Phase::Backward);
        Gradient { loss, grads }
    }

    /// θ ← optimizer(θ, ∇θ L, η), then ξ ← τ ξ + (1 − τ) θ, then k ← k + 1.
    pub fn update(&mut self, gradient: &Gradient) -> Report {
        let (eta, tau) = (self.schedule.eta(self.k), self.schedule.tau(self.k));
        let (theta, xi) = (&self.online.params, &self.target.params);
        (self.online.params, self.target.params) = self.optimizer.step(theta, xi, &gradient.grads, eta, tau);
        self.k += 1;
        Report { loss: gradient.loss, eta, tau }
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
        let report = self.update(&mean);
        done(Phase::Update);
        Ok(report)
    }

    /// Where the weights live.
    pub fn device(&self) -> Device {
        let first = self.online.params.iter().next();
        first.map(|(_, leaf)| leaf.value.device()).expect("a network has parameters")
    }
}

//! One training step of a batch in parts: micro-batches in sequence, ranks in parallel, and the
//! loss scale of f16. The method itself is [`Byol::step`].

use burn::tensor::Tensor;

use crate::{
    byol::{Byol, StepStats},
    device,
    nn::Tree,
    objective::Objective,
    optim::LossScale,
    ranks::Ranks,
};

/// Parts of a step, for timing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for views.
    Data,
    /// Both networks, both views, the loss.
    Forward,
    /// ∇θ L.
    Backward,
    /// All-reduce of loss and gradient.
    Exchange,
    /// Optimizer and moving average.
    Update,
}

/// Splits batches over micro-batches and ranks.
#[derive(Debug, Clone)]
pub struct Stepper {
    /// BYOL's loss, or an ablation of it.
    pub objective: Objective,
    /// Micro-batches per step. 1 is the paper's step; more reproduce its batch-size study, in which
    /// only batch norm sees the smaller batch.
    pub micro_batches: usize,
    /// Ranks that share every batch.
    pub ranks: Ranks,
    /// Loss scale; `None` unless gradients are f16.
    pub loss_scale: Option<LossScale>,
}

/// Reasons for a step without an update.
enum Interrupt<E> {
    /// The next views are not available.
    Views(E),
    /// The gradient exceeds the range of f16.
    Overflow { loss: f64 },
}

impl Default for Stepper {
    /// BYOL on whole batches, on one rank, in f32.
    fn default() -> Self {
        Stepper { objective: Objective::default(), micro_batches: 1, ranks: Ranks::SINGLE, loss_scale: None }
    }
}

impl Stepper {
    /// One step on `micro_batches` pairs of views, with the mean of their gradients over all ranks.
    /// Also returns whether the update was skipped because the gradient exceeds the range of f16;
    /// the step counts, but θ and ξ are unchanged. `on_phase` is called after each phase.
    ///
    /// # Errors
    /// Those of `next_views`; then only running statistics have changed.
    pub fn step<E>(
        &mut self,
        byol: &mut Byol,
        next_views: impl FnMut() -> Result<(Tensor<4>, Tensor<4>), E>,
        mut on_phase: impl FnMut(Phase),
    ) -> Result<(StepStats, bool), E> {
        let (eta, tau) = (byol.schedule.eta(byol.k), byol.schedule.tau(byol.k));
        let mut active = None;
        let outcome = byol.step(|byol| {
            let (loss, grads) = self.mean_gradient(byol, next_views, &mut on_phase).map_err(Interrupt::Views)?;
            active = Some(device::keep_awake(&byol.device()));
            match self.is_finite(&grads) {
                true => Ok((loss, grads)),
                false => Err(Interrupt::Overflow { loss }),
            }
        });
        let (stats, skipped) = match outcome {
            Ok(stats) => (stats, false),
            Err(Interrupt::Views(e)) => return Err(e),
            Err(Interrupt::Overflow { loss }) => {
                byol.k += 1;
                (StepStats { loss, eta, tau }, true)
            }
        };
        on_phase(Phase::Update);
        Ok((stats, skipped))
    }

    /// Mean loss and gradient over micro-batches and ranks.
    fn mean_gradient<E>(
        &self,
        byol: &mut Byol,
        mut next_views: impl FnMut() -> Result<(Tensor<4>, Tensor<4>), E>,
        on_phase: &mut impl FnMut(Phase),
    ) -> Result<(f64, Tree), E> {
        let scale = self.loss_scale.map_or(1.0, |scale| scale.factor);
        let mut sum: Option<(f64, Tree)> = None;
        for _ in 0..self.micro_batches {
            let (v, v2) = next_views()?;
            on_phase(Phase::Data);
            let _active = device::keep_awake(&v.device());
            let loss = self.objective.loss(byol, v, v2);
            let value = loss.to_f64();
            on_phase(Phase::Forward);
            let grads = loss.gradient(scale);
            on_phase(Phase::Backward);
            sum = Some(match sum {
                None => (value, grads),
                Some((total, sum)) => (total + value, sum.add(&grads)),
            });
        }
        let (mut loss, mut grads) = sum.expect("a step has at least one micro-batch");
        if self.micro_batches > 1 {
            let n = self.micro_batches as f64;
            (loss, grads) = (loss / n, grads.div(n));
        }
        if self.ranks != Ranks::SINGLE {
            let mut mean = [loss / self.ranks.world_size() as f64];
            self.ranks.all_reduce_sum(&mut mean);
            (loss, grads) = (mean[0], grads.all_reduce_mean(self.ranks));
            on_phase(Phase::Exchange);
        }
        Ok((loss, grads))
    }

    /// Returns true if the gradient is within the range of f16. Adapts the loss scale.
    fn is_finite(&mut self, grads: &Tree) -> bool {
        let finite = self.loss_scale.is_none() || grads.norm().is_finite();
        self.loss_scale = self.loss_scale.map(|scale| scale.after(finite));
        finite
    }
}

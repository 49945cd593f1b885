//! THE METHOD: Bootstrap Your Own Latent (Grill et al. 2020, arXiv:2006.07733, §3.1), in the
//! paper's notation.
//!
//! - θ: online weights of encoder f, projector g and predictor q; ξ: target weights of f and g
//! - v, v′: two views of the same images
//! - z = g(f(v)): projection; q = q(z): prediction
//! - η: learning rate; τ: target decay; k of K: step
//!
//! Code writes v′ as `v2`, z′ as `z2`, q′ as `q2`. Both networks run in training mode, and every
//! view is a forward pass of its own, normalized by its own batch statistics.
//!
//! The paper's ablations of the loss are in [`objective`](crate::objective); micro-batches, ranks
//! and the loss scale of f16 in [`train::step`](crate::train::step).

use burn::tensor::{Device, Tensor};

use crate::{
    nn::{Network, Tree, Weights},
    optim::{Optimizer, Rule, Schedule, target},
};

/// The complete training state: both networks, the optimizer with its state, and the step counter.
///
/// # Examples
///
/// Three steps on random views:
///
/// ```
/// use std::convert::Infallible;
///
/// use burn::tensor::{Distribution, Tensor};
/// use byol::{Byol, DeviceChoice, device, nn, optim};
///
/// let device = device::open(DeviceChoice::Cpu)?.device;
/// let encoder = nn::ResNet::new(nn::Architecture::Resnet18, 0.0625, nn::Stem::Cifar, 3);
/// let network = nn::Network::new(encoder, 32, 16);
/// let rule = optim::Rule::Sgd(optim::Sgd { momentum: 0.9, weight_decay: 1e-4, nesterov: false });
/// let schedule = optim::Schedule { peak: 0.1, warmup: 0, total: 3, tau_base: 0.99, constant_tau: false };
/// let mut byol = Byol::new(network, rule, schedule, 0, &device);
///
/// let views = || Tensor::<4>::random([8, 16, 16, 3], Distribution::Uniform(0.0, 1.0), &device);
/// while byol.k < 3 {
///     let (v, v2) = (views(), views());
///     let stats = byol.step(|byol| Ok::<_, Infallible>(byol.loss_and_gradient(v, v2)))?;
///     assert!(0.0 < stats.loss && stats.loss < 8.0);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Byol {
    /// f, g and q.
    pub network: Network,
    /// θ
    pub online: Weights,
    /// ξ
    pub target: Weights,
    /// Update rule of θ with its state.
    pub optimizer: Optimizer,
    /// η and τ by step.
    pub schedule: Schedule,
    /// Completed steps, which is the index of the next step.
    pub k: u64,
}

/// Statistics of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepStats {
    /// Mean loss over the batch, in [0, 8] and about 4 for uncorrelated projections. With negatives
    /// (β > 0) the range differs.
    pub loss: f64,
    /// η
    pub eta: f64,
    /// τ
    pub tau: f64,
}

/// Loss of one batch, with the graph that differentiates it.
#[derive(Debug)]
pub struct Loss {
    /// L, `[1]`.
    pub value: Tensor<1>,
    /// θ as tracked by the graph.
    pub theta: Tree,
}

impl Loss {
    /// Value of the loss. Waits for the device.
    pub fn to_f64(&self) -> f64 {
        f64::from(self.value.clone().without_autodiff().into_scalar::<f32>())
    }

    /// ∇θ L by parameter name. With f16 the graph is differentiated at `scale` × L, and the
    /// gradient divided by it.
    pub fn gradient(self, scale: f64) -> Tree {
        if scale == 1.0 {
            return self.theta.gradients(&mut self.value.backward());
        }
        let scaled = self.theta.gradients(&mut self.value.mul_scalar(scale).backward());
        scaled.map(|_, g| g.div_scalar(scale))
    }
}

/// ‖q̄ − z̄′‖² per row, with q̄ and z̄′ of unit length: 2 − 2 cos(q, z′), in [0, 4] (eq. 2).
///
/// # Shapes
/// `q`, `z2`: `[N, D]`; returns `[N]`.
pub fn regression_loss(q: Tensor<2>, z2: Tensor<2>) -> Tensor<1> {
    (l2_normalize(q) - l2_normalize(z2)).square().sum_dim(1).squeeze_dim(1)
}

/// x / √max(‖x‖², 1e-12) per row.
pub(crate) fn l2_normalize(x: Tensor<2>) -> Tensor<2> {
    x.clone() / x.square().sum_dim(1).clamp_min(1e-12).sqrt()
}

impl Byol {
    /// One step (§3.1, appendix J). `evaluate` returns L and ∇θ L of one batch at (θ, ξ):
    /// [`Byol::loss_and_gradient`], or [`train::step`](crate::train::step) for a batch in parts.
    ///
    /// # Errors
    /// Those of `evaluate`; then θ, ξ and k are unchanged.
    pub fn step<E>(&mut self, evaluate: impl FnOnce(&mut Byol) -> Result<(f64, Tree), E>) -> Result<StepStats, E> {
        let (eta, tau) = (self.schedule.eta(self.k), self.schedule.tau(self.k));

        // Loss and gradient: the online network predicts the target network's projections (eq. 2).
        let (loss, grads) = evaluate(self)?;

        // Online network: θ ← optimizer(θ, ∇θ L, η).
        let theta = self.optimizer.step(&self.online.params, &grads, eta);

        // Target network: ξ ← τ ξ + (1 − τ) θ (eq. 1).
        let xi = target::ema(&self.target.params, &theta, tau);

        (self.online.params, self.target.params, self.k) = (theta, xi, self.k + 1);
        Ok(StepStats { loss, eta, tau })
    }

    /// L and ∇θ L of one batch. See [`Byol::loss`].
    pub fn loss_and_gradient(&mut self, v: Tensor<4>, v2: Tensor<4>) -> (f64, Tree) {
        let loss = self.loss(v, v2);
        (loss.to_f64(), loss.gradient(1.0))
    }

    /// L = ‖q̄ − z̄′‖², symmetrized: both views pass through both networks. Updates the running
    /// statistics of batch norm.
    ///
    /// # Shapes
    /// `v`, `v2`: `[N, H, W, C]` in 0..1.
    pub fn loss(&mut self, v: Tensor<4>, v2: Tensor<4>) -> Loss {
        let net = &self.network;

        // Target projections zξ, z′ξ: no gradient.
        let mut target_pass = net.training(&self.target.params, &mut self.target.statistics);
        let [z, z2] = [&v, &v2].map(|view| net.project(&mut target_pass, view.clone()).autodiff());

        // Online predictions q = qθ(zθ), q′ = qθ(z′θ).
        let theta = self.online.params.tracked();
        let mut online_pass = net.training(&theta, &mut self.online.statistics);
        let projections = [v, v2].map(|view| net.project(&mut online_pass, view.autodiff()));
        let [q, q2] = projections.map(|projection| net.predict(&mut online_pass, projection));

        let value = (regression_loss(q, z2) + regression_loss(q2, z)).mean();
        Loss { value, theta }
    }

    /// State before the first step: random θ, of which ξ is a copy.
    pub fn new(network: Network, rule: Rule, schedule: Schedule, seed: u64, device: &Device) -> Byol {
        let online = network.init(seed, "online", true, device);
        let Weights { params, statistics } = network.init(seed, "target", false, device);
        let target = Weights { params: params.zip(&online.params, |_, _, theta| theta), statistics };
        Byol { optimizer: Optimizer::new(rule, &online.params), network, online, target, schedule, k: 0 }
    }

    /// Device of the weights.
    pub fn device(&self) -> Device {
        let first = self.online.params.iter().next();
        first.map(|(_, leaf)| leaf.value.device()).expect("a network has parameters")
    }
}

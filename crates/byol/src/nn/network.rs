//! The pretraining network: encoder f, projector g and predictor q.

use std::{fmt, sync::Arc};

use burn::tensor::{Device, Tensor};

use super::{
    encoder::{Normalization, Weights},
    forward_context::{ForwardContext, Mode, NormConfig, Statistics},
    mlp::Mlp,
    resnet::ResNet,
    tree::Tree,
};
use crate::{device::Precision, ranks::Ranks};

/// An encoder f: any network that maps images to representations.
///
/// [`ResNet`] implements it, and the training loop ([`Run`](crate::train::Run)) and the encoder
/// files are for ResNets. Other encoders train with [`Byol::step`](crate::byol::Byol::step) in a
/// custom loop: see `examples/own_encoder.rs`.
///
/// A network is a description without weights. Weights are a [`Tree`] by name, which
/// [`ForwardContext::params`] holds in a forward pass.
pub trait Backbone: fmt::Debug + Send + Sync {
    /// Draws initial weights. `role` (`online` or `target`) selects the random streams.
    fn init(&self, seed: u64, role: &str, device: &Device) -> Tree;

    /// Initial running statistics of batch norm, by layer; empty without batch norm.
    fn statistics(&self, device: &Device) -> Statistics;

    /// Dimension F of a representation.
    fn features(&self) -> usize;

    /// Representations `[N, F]` of normalized images `[N, H, W, C]`.
    fn forward(&self, ctx: &mut ForwardContext, x: Tensor<4>) -> Tensor<2>;
}

impl Backbone for ResNet {
    fn init(&self, seed: u64, role: &str, device: &Device) -> Tree {
        ResNet::init(self, seed, role, device)
    }

    fn statistics(&self, device: &Device) -> Statistics {
        ResNet::statistics(self, device)
    }

    fn features(&self) -> usize {
        ResNet::features(self)
    }

    fn forward(&self, ctx: &mut ForwardContext, x: Tensor<4>) -> Tensor<2> {
        ResNet::forward(self, ctx, x)
    }
}

/// f, g and q of the paper: a single description, for which θ and ξ are two sets of weights.
#[derive(Debug, Clone)]
pub struct Network {
    /// f: `[N, H, W, C]` → representation y `[N, F]`.
    pub encoder: Arc<dyn Backbone>,
    /// g: y → projection z `[N, 256]`.
    pub projector: Mlp,
    /// q: z → prediction `[N, 256]`. Part of θ only.
    pub predictor: Mlp,
    /// Input normalization.
    pub normalization: Normalization,
    /// Settings of batch norm.
    pub norm: NormConfig,
    /// Compute precision in training.
    pub precision: Precision,
    /// Ranks over which batch norm computes its statistics in training.
    pub ranks: Ranks,
}

impl Network {
    /// Draws initial weights for f and g, and for q if `predictor` is true. `role` (`online` or
    /// `target`) selects the random streams.
    pub fn init(&self, seed: u64, role: &str, predictor: bool, device: &Device) -> Weights {
        let mut params = self.encoder.init(seed, role, device);
        let mut statistics = self.encoder.statistics(device);
        let heads = [&self.projector, &self.predictor];
        for mlp in &heads[..if predictor { 2 } else { 1 }] {
            params.extend("", &mlp.init(seed, role, device));
            for (name, stats) in mlp.statistics(device).iter() {
                statistics.insert(name, stats.clone());
            }
        }
        Weights { params, statistics }
    }

    /// Context of a forward pass in training mode, which updates `statistics`.
    pub fn training<'a>(&'a self, params: &'a Tree, statistics: &'a mut Statistics) -> ForwardContext<'a> {
        let mode = Mode::Train(statistics, self.ranks);
        ForwardContext { params, norm: &self.norm, precision: self.precision, mode }
    }

    /// y = f(v): representations, `[N, F]`. `v`: `[N, H, W, C]` in 0..1.
    pub fn encode(&self, ctx: &mut ForwardContext, v: Tensor<4>) -> Tensor<2> {
        self.encoder.forward(ctx, self.normalization.forward(v))
    }

    /// z = g(f(v)): projections, `[N, 256]`.
    pub fn project(&self, ctx: &mut ForwardContext, v: Tensor<4>) -> Tensor<2> {
        let y = self.encode(ctx, v);
        self.projector.forward(ctx, y)
    }

    /// q(z): predictions, `[N, 256]`.
    pub fn predict(&self, ctx: &mut ForwardContext, z: Tensor<2>) -> Tensor<2> {
        self.predictor.forward(ctx, z)
    }
}

//! The pretraining network: encoder f, projector g and predictor q.

use std::{fmt, sync::Arc};

use burn::tensor::{Device, Tensor};

use super::{
    encoder::{Normalization, Weights},
    forward_context::{ForwardContext, Mode, NormConfig, Statistics},
    init::Init,
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
///
/// # Examples
///
/// The mean color, batch-normalized:
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use byol::nn::{Backbone, ForwardContext, Leaf, Statistics, Tree};
///
/// #[derive(Debug)]
/// struct MeanColor;
///
/// impl Backbone for MeanColor {
///     fn init(&self, _seed: u64, _role: &str, device: &Device) -> Tree {
///         let mut tree = Tree::new();
///         tree.insert("bn.weight", Leaf::new(vec![1.0; 3], &[3], device));
///         tree.insert("bn.bias", Leaf::new(vec![0.0; 3], &[3], device));
///         tree
///     }
///
///     fn statistics(&self, device: &Device) -> Statistics {
///         Statistics::new([("bn", 3)], device)
///     }
///
///     fn features(&self) -> usize {
///         3
///     }
///
///     fn forward(&self, ctx: &mut ForwardContext, x: Tensor<4>) -> Tensor<2> {
///         let [n, ..] = x.dims();
///         let color: Tensor<2> = x.mean_dim(1).mean_dim(2).reshape([n, 3]);
///         ctx.batch_norm("bn", color)
///     }
/// }
/// ```
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
    /// `encoder` with a projector and a predictor of `hidden` units and `projection` outputs (4096
    /// and 256 in the paper), in f32 on one rank, with the default normalization.
    pub fn new(encoder: impl Backbone + 'static, hidden: usize, projection: usize) -> Network {
        let mlp = |name, d_in| Mlp { name, d_in, hidden, d_out: projection, init: Init::Reference };
        Network {
            projector: mlp("projector", encoder.features()),
            predictor: mlp("predictor", projection),
            encoder: Arc::new(encoder),
            normalization: Normalization::default(),
            norm: NormConfig::default(),
            precision: Precision::F32,
            ranks: Ranks::SINGLE,
        }
    }

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

    /// Context of forward passes in training mode, which update `statistics`, and of at most one
    /// backward pass.
    pub fn training<'a>(&'a self, params: &'a Tree, statistics: &'a mut Statistics) -> ForwardContext<'a> {
        let mode = Mode::Train(statistics, self.ranks);
        ForwardContext::new(params, &self.norm, self.precision, mode)
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

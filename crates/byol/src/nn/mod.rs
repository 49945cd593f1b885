//! NETWORKS: the encoder f, the projector g and the predictor q, as descriptions that act on a [`Tree`] of weights.

pub mod conv_norm_act;
pub mod foreign;
mod fused;
pub mod init;
pub mod mlp;
mod norm;
pub mod pass;
pub mod pool;
pub mod resnet;
pub mod tree;
pub mod weights;

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

pub use crate::device::Precision;
use crate::ranks::Ranks;
pub use mlp::Mlp;
pub use pass::{Mode, NormConfig, Pass, Running, Statistics};
pub use resnet::{Architecture, ResNet, Stem};
pub use tree::{Leaf, Tree};

/// Whose initial weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// The reference's: truncated normal, 1/√fan_in.
    #[default]
    Reference,
    /// torchvision's and PyTorch's: He's normal by fan-out for convolutions, uniform ±1/√fan_in for linear layers.
    Torch,
}

/// Channel means and deviations that an encoder expects its input to be normalised with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalization {
    /// One mean a channel, on the scale 0..1.
    pub mean: Vec<f32>,
    /// One deviation a channel, above 0.
    pub std: Vec<f32>,
}

impl Default for Normalization {
    /// ImageNet's, as in the reference.
    fn default() -> Self {
        Normalization { mean: vec![0.485, 0.456, 0.406], std: vec![0.229, 0.224, 0.225] }
    }
}

impl Normalization {
    /// (x − mean) / std by channel. `x`: `[N, H, W, C]` in 0..1.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let (device, c) = (x.device(), self.mean.len());
        let row = |values: Vec<f32>| Tensor::<4>::from_data(TensorData::new(values, [1, 1, 1, c]), &device);
        let inverse = self.std.iter().map(|s| 1.0 / s).collect();
        (x - row(self.mean.clone())) * row(inverse)
    }
}

/// Everything about an encoder but its weights; written into the encoder file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderSpec {
    /// Which ResNet.
    pub architecture: Architecture,
    /// Multiplies every channel count; above 0.
    pub width: f64,
    /// What stands before the first group.
    pub stem: Stem,
    /// Side of the square views that evaluation takes, in pixels.
    pub size: usize,
    /// Evaluation takes the centre square of this share of an image's shorter side, in (0, 1].
    #[serde(default = "reference_center")]
    pub center: f64,
    /// Channels of the images.
    pub channels: usize,
    /// What its input is normalised with.
    pub normalization: Normalization,
    /// What every norm adds to the variance; above 0.
    #[serde(default = "reference_eps")]
    pub eps: f64,
}

/// The reference's [`EncoderSpec::eps`], torchvision's too, and that of files which do not name it.
pub fn reference_eps() -> f64 {
    NormConfig::default().eps
}

/// The reference's [`EncoderSpec::center`], and that of files which do not name it.
pub fn reference_center() -> f64 {
    0.875
}

impl EncoderSpec {
    /// The network without weights.
    pub fn resnet(&self) -> ResNet {
        ResNet::new(self.architecture, self.width, self.stem, self.channels)
    }

    /// The settings of its norms, for whoever evaluates it or trains it on.
    pub fn norm(&self) -> NormConfig {
        NormConfig { eps: self.eps, ..NormConfig::default() }
    }
}

/// A set of weights with the running statistics that belong to it: θ or ξ.
#[derive(Debug, Clone)]
pub struct Weights {
    /// What the loss is differentiated by, or what is averaged.
    pub params: Tree,
    /// Batch norm's state; neither differentiated nor averaged.
    pub statistics: Statistics,
}

/// A frozen encoder: what evaluation and use work with.
#[derive(Debug, Clone)]
pub struct Encoder {
    /// What it is.
    pub spec: EncoderSpec,
    /// What it has learned.
    pub weights: Weights,
    resnet: ResNet,
}

impl Encoder {
    /// An encoder from its parts. The weights must be those of `spec` (see [`weights::load`], which checks).
    pub fn new(spec: EncoderSpec, weights: Weights) -> Self {
        Encoder { resnet: spec.resnet(), spec, weights }
    }

    /// An encoder of this kind that has learned nothing: the baseline of every evaluation. `seed` names its weights.
    pub fn random(spec: EncoderSpec, seed: u64, device: &Device) -> Self {
        let resnet = spec.resnet();
        let weights = Weights { params: resnet.init(seed, "online", device), statistics: resnet.statistics(device) };
        Encoder { spec, weights, resnet }
    }

    /// Where its weights live.
    pub fn device(&self) -> Device {
        let first = self.weights.params.iter().next();
        first.map(|(_, leaf)| leaf.value.device()).expect("an encoder has weights")
    }

    /// Length of the representation.
    pub fn features(&self) -> usize {
        self.resnet.features()
    }

    /// Representations by the running statistics; nothing in the encoder changes.
    ///
    /// # Shapes
    /// `x`: `[N, H, W, C]` in 0..1, not normalised; returns `[N, F]`.
    pub fn embed(&self, x: Tensor<4>) -> Tensor<2> {
        let norm = self.spec.norm();
        let mode = Mode::Eval(&self.weights.statistics);
        self.represent(&mut Pass { params: &self.weights.params, norm: &norm, precision: Precision::F32, mode }, x)
    }

    /// The representation of one view: `spec.size`² pixels, row-major with interleaved channels, in 0..1. Returns `[F]`.
    ///
    /// # Panics
    /// If it is not as many values.
    pub fn embed_one(&self, view: &[f32]) -> Vec<f32> {
        let shape = [1, self.spec.size, self.spec.size, self.spec.channels];
        tree::host(self.embed(Tensor::from_data(TensorData::new(view.to_vec(), shape), &self.device())))
    }

    /// The same weights for dense prediction: [`ResNet::dilated`].
    pub fn dilated(self) -> Encoder {
        Encoder { resnet: self.resnet.dilated(), ..self }
    }

    /// The map that the representation is the mean of, by these or other weights of the same network, in any mode.
    ///
    /// # Shapes
    /// `x`: `[N, H, W, C]` in 0..1, not normalised; returns `[N, H', W', F]`.
    pub fn map(&self, pass: &mut Pass, x: Tensor<4>) -> Tensor<4> {
        self.resnet.map(pass, self.spec.normalization.forward(x))
    }

    /// Representations by other weights of the same network, in any mode: for whoever trains it on.
    pub fn represent(&self, pass: &mut Pass, x: Tensor<4>) -> Tensor<2> {
        self.resnet.forward(pass, self.spec.normalization.forward(x))
    }
}

/// f, g and q of the paper: one network description; θ and ξ are two sets of weights for it.
#[derive(Debug, Clone)]
pub struct Network {
    /// f: `[N, H, W, C]` → representation y `[N, F]`.
    pub encoder: ResNet,
    /// g: y → projection z `[N, 256]`.
    pub projector: Mlp,
    /// q: z → prediction `[N, 256]`. Part of θ only.
    pub predictor: Mlp,
    /// Of the input.
    pub normalization: Normalization,
    /// Of every batch norm.
    pub norm: NormConfig,
    /// Of all products in training.
    pub precision: Precision,
    /// Whose batches every batch norm sees in training.
    pub ranks: Ranks,
}

impl Network {
    /// Fresh weights for f and g, and for q where `predictor` is true. `who` names the random draw.
    pub fn init(&self, seed: u64, who: &str, predictor: bool, device: &Device) -> Weights {
        let mut params = self.encoder.init(seed, who, device);
        let mut statistics = self.encoder.statistics(device);
        let heads = [&self.projector, &self.predictor];
        for mlp in &heads[..if predictor { 2 } else { 1 }] {
            params.extend("", &mlp.init(seed, who, device));
            for (name, running) in mlp.statistics(device).iter() {
                statistics.insert(name, running.clone());
            }
        }
        Weights { params, statistics }
    }

    /// y = f(v).
    pub fn represent(&self, pass: &mut Pass, v: Tensor<4>) -> Tensor<2> {
        self.encoder.forward(pass, self.normalization.forward(v))
    }

    /// z = g(f(v)).
    pub fn project(&self, pass: &mut Pass, v: Tensor<4>) -> Tensor<2> {
        let y = self.represent(pass, v);
        self.projector.forward(pass, y)
    }

    /// q(z).
    pub fn predict(&self, pass: &mut Pass, z: Tensor<2>) -> Tensor<2> {
        self.predictor.forward(pass, z)
    }
}

//! The frozen encoder: description, weights and inference.

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    cpu,
    forward_context::{ForwardContext, Mode, NormConfig, Statistics},
    resnet::{Architecture, ResNet, Stem},
    tree::{self, Leaf, Tree},
};
use crate::{
    data::{
        Levels,
        decode::{log_mel, sound},
        levels::{Channels, Sound},
    },
    device::{Precision, has_kernels},
    image::{CHANNELS, Image, MAX_CHANNELS},
    views::{Policy, View, evaluation_view, resize::center_antialiased, spectrogram_view},
};

/// Per-channel mean and standard deviation that normalize the input of an encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalization {
    /// Mean per channel, in 0..1.
    pub mean: Vec<f32>,
    /// Standard deviation per channel, above 0.
    pub std: Vec<f32>,
}

impl Default for Normalization {
    /// ImageNet's, as in the reference.
    fn default() -> Self {
        Normalization { mean: vec![0.485, 0.456, 0.406], std: vec![0.229, 0.224, 0.225] }
    }
}

impl Normalization {
    /// Computes (x − mean) / std per channel. `x`: `[N, H, W, C]` in 0..1.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        if has_kernels(&x.device()) {
            let shape = x.dims();
            return cpu::apply(x, self.clone(), shape);
        }
        let (device, c) = (x.device(), self.mean.len());
        let per_channel = |values: Vec<f32>| Tensor::<4>::from_data(TensorData::new(values, [1, 1, 1, c]), &device);
        let inverse = self.std.iter().map(|s| 1.0 / s).collect();
        (x - per_channel(self.mean.clone())) * per_channel(inverse)
    }
}

impl cpu::Function for Normalization {
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let inverse: Vec<f32> = self.std.iter().map(|s| 1.0 / s).collect();
        by_pixel(x, self.mean.len(), |i, x| (x - self.mean[i]) * inverse[i])
    }

    fn backward(&self, dy: &[f32]) -> Vec<f32> {
        let inverse: Vec<f32> = self.std.iter().map(|s| 1.0 / s).collect();
        by_pixel(dy, self.mean.len(), |i, dy| dy * inverse[i])
    }
}

/// Applies `f(channel, value)` to the values of pixels of `c` channels.
fn by_pixel(values: &[f32], c: usize, f: impl Fn(usize, f32) -> f32 + Sync) -> Vec<f32> {
    /// Pixels per task.
    const BLOCK: usize = 1 << 12;
    let mut out = vec![0.0; values.len()];
    out.par_chunks_mut(BLOCK * c).zip(values.par_chunks(BLOCK * c)).for_each(|(out, values)| {
        for (out, values) in out.chunks_exact_mut(c).zip(values.chunks_exact(c)) {
            for (i, (out, value)) in out.iter_mut().zip(values).enumerate() {
                *out = f(i, *value);
            }
        }
    });
    out
}

/// Description of an encoder: everything but its weights. Stored in the encoder file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderSpec {
    /// ResNet architecture.
    pub architecture: Architecture,
    /// Multiplier of every channel count, in (0, 64].
    pub width: f64,
    /// Layers before the first group.
    pub stem: Stem,
    /// Side of the square evaluation views, in pixels.
    pub size: usize,
    /// Side of the center crop for evaluation, as a fraction of an image's shorter side, in (0, 1].
    #[serde(default = "reference_center")]
    pub center: f64,
    /// Evaluation views are those of torchvision's `Resize` and `CenterCrop` of a PIL image, which
    /// antialias.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub antialias: bool,
    /// Channels of the images.
    pub channels: usize,
    /// Input normalization.
    pub normalization: Normalization,
    /// ε of every norm, above 0.
    #[serde(default = "reference_eps")]
    pub eps: f64,
    /// Mapping of file values to pixels, as in pretraining.
    #[serde(default = "Levels::legacy", skip_serializing_if = "Levels::is_legacy")]
    pub levels: Levels,
}

/// Default of [`EncoderSpec::eps`]: the reference's and torchvision's, 1e-5.
pub(crate) fn reference_eps() -> f64 {
    NormConfig::default().eps
}

/// Default of [`EncoderSpec::center`]: the reference's, 0.875.
pub(crate) fn reference_center() -> f64 {
    0.875
}

impl EncoderSpec {
    /// The network, without weights.
    pub fn resnet(&self) -> ResNet {
        ResNet::new(self.architecture, self.width, self.stem, self.channels)
    }

    /// The evaluation view of an image: the center square, or all of a spectrogram, resized to the
    /// input size.
    pub fn evaluation_view(&self, image: &Image) -> View {
        match self.antialias {
            _ if self.levels.sound.is_some() => spectrogram_view(image, self.size),
            true => center_antialiased(image, self.size, self.center),
            false => evaluation_view(image, self.size, self.center),
        }
    }

    /// Description of its inputs: `RGB`, `13 channels`, `log-mel spectrogram`.
    #[doc(hidden)]
    pub fn input(&self) -> String {
        match (self.levels.sound, self.channels) {
            (Some(_), _) => "log-mel spectrogram".into(),
            (None, CHANNELS) if self.levels.channels.is_none() => "RGB".into(),
            (None, 1) => "1 channel".into(),
            (None, n) => format!("{n} channels"),
        }
    }

    /// Views of images of its kind, where those of its training are not known.
    #[doc(hidden)]
    pub fn default_policies(&self) -> [Policy; 2] {
        let Normalization { mean, std } = &self.normalization;
        match self.levels.sound {
            Some(_) => [(); 2].map(|()| Policy::spectrogram().with_statistics(mean, std)),
            None => [Policy::default(), Policy::second()],
        }
    }

    /// Settings of its norms, for evaluation and finetuning.
    pub fn norm(&self) -> NormConfig {
        NormConfig { eps: self.eps, ..NormConfig::default() }
    }

    /// Validates a description from a file.
    ///
    /// # Errors
    /// The reason why it is invalid.
    pub fn check(&self) -> Result<(), String> {
        let n = &self.normalization;
        if !(self.width > 0.0 && self.width <= 64.0) {
            return Err(format!("width {} is not in (0, 64]", self.width));
        }
        if self.size == 0 || self.size > 8192 || !(1..=MAX_CHANNELS).contains(&self.channels) {
            return Err(format!("an input of {} px and {} channels is out of range", self.size, self.channels));
        }
        if let Some(Sound { rate }) = self.levels.sound
            && (self.channels != 1 || !(*sound::RATES.start()..=log_mel::RATE).contains(&rate))
        {
            return Err(format!("{} channels of sounds at {rate} Hz are out of range", self.channels));
        }
        if let Some(Channels { select, ranges, .. }) = &self.levels.channels {
            let is_range = |[low, high]: &[f32; 2]| low.is_finite() && high.is_finite() && low < high;
            let is_complete = ranges.len() == self.channels && (select.is_empty() || select.len() == self.channels);
            if !is_complete || !ranges.iter().all(is_range) || select.contains(&0) {
                return Err(format!("the channels of its files do not match an input of {} channels", self.channels));
            }
        }
        if !(self.center > 0.0 && self.center <= 1.0) {
            return Err(format!("center crop {} is not in (0, 1]", self.center));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(format!("eps {} is not above 0", self.eps));
        }
        if n.mean.len() != self.channels
            || n.std.len() != self.channels
            || n.std.iter().any(|s| s.is_nan() || *s <= 0.0)
        {
            return Err(format!("the normalization does not have {} channels with std above 0", self.channels));
        }
        Ok(())
    }
}

/// A set of weights and the running statistics that belong to it: θ or ξ.
#[derive(Debug, Clone)]
pub struct Weights {
    /// Parameters: differentiated in θ, averaged in ξ.
    pub params: Tree,
    /// State of batch norm; neither differentiated nor averaged.
    pub statistics: Statistics,
}

/// A frozen encoder, for evaluation and inference.
#[derive(Debug, Clone)]
pub struct Encoder {
    /// Description.
    pub spec: EncoderSpec,
    /// Learned weights.
    pub weights: Weights,
    resnet: ResNet,
}

impl Encoder {
    /// Assembles an encoder. `weights` must match `spec`; [`weights::load`](super::weights::load)
    /// checks it.
    pub fn new(spec: EncoderSpec, weights: Weights) -> Self {
        Encoder { resnet: spec.resnet(), spec, weights }
    }

    /// Creates a randomly initialized encoder, the untrained baseline of every evaluation.
    pub fn random(spec: EncoderSpec, seed: u64, device: &Device) -> Self {
        let resnet = spec.resnet();
        let weights = Weights { params: resnet.init(seed, "online", device), statistics: resnet.statistics(device) };
        Encoder { spec, weights, resnet }
    }

    /// Returns the encoder with a stem for `channels` channels, as timm's `adapt_input_conv` does:
    /// for one channel the weights are summed over the input channels; for others they are repeated
    /// in turn and scaled by the ratio of the channels, which keeps the scale of the output.
    pub(crate) fn with_channels(mut self, channels: usize) -> Encoder {
        const STEM: &str = "conv1.weight";
        let from = self.spec.channels;
        if from == channels {
            return self;
        }
        let Some(leaf) = self.weights.params.leaf(STEM) else { return self };
        let (device, shape) = (self.device(), leaf.shape.clone());
        let (c_out, taps) = (shape[0], shape[2] * shape[3]);
        let (values, scale) = (tree::host(leaf.value.clone()), from as f32 / channels as f32);
        let mut adapted = Vec::with_capacity(c_out * channels * taps);
        for filter in values.chunks_exact(from * taps) {
            for c in 0..channels {
                let tap = |i: usize| match channels {
                    1 => (0..from).map(|k| filter[k * taps + i]).sum(),
                    _ => filter[c % from * taps + i] * scale,
                };
                adapted.extend((0..taps).map(tap));
            }
        }
        self.weights.params.insert(STEM, Leaf::new(adapted, &[c_out, channels, shape[2], shape[3]], &device));
        self.spec.channels = channels;
        self.resnet = self.spec.resnet();
        self
    }

    /// Device of the weights.
    pub fn device(&self) -> Device {
        let first = self.weights.params.iter().next();
        first.map(|(_, leaf)| leaf.value.device()).expect("an encoder has weights")
    }

    /// Length of the representation.
    pub fn features(&self) -> usize {
        self.resnet.features()
    }

    /// Computes representations in evaluation mode.
    ///
    /// # Shapes
    /// `x`: `[N, H, W, C]` in 0..1, not normalized; returns `[N, F]`.
    pub fn embed(&self, x: Tensor<4>) -> Tensor<2> {
        let norm = self.spec.norm();
        let mode = Mode::Eval(&self.weights.statistics);
        let params = &self.weights.params;
        self.forward(&mut ForwardContext::new(params, &norm, Precision::F32, mode), x)
    }

    /// Computes the representation of one view: `spec.size`² pixels, row-major with interleaved
    /// channels, in 0..1. Returns `[F]`.
    ///
    /// # Panics
    /// If the view has another number of values.
    pub fn embed_view(&self, view: &[f32]) -> Vec<f32> {
        let shape = [1, self.spec.size, self.spec.size, self.spec.channels];
        tree::host(self.embed(Tensor::from_data(TensorData::new(view.to_vec(), shape), &self.device())))
    }

    /// Dilates the last group of the network, for dense prediction: [`ResNet::dilated`].
    pub fn dilated(self) -> Encoder {
        Encoder { resnet: self.resnet.dilated(), ..self }
    }

    /// Computes the last feature map, whose mean is the representation. Takes its weights from
    /// `ctx`, in any mode.
    ///
    /// # Shapes
    /// `x`: `[N, H, W, C]` in 0..1, not normalized; returns `[N, H', W', F]`.
    pub(crate) fn feature_map(&self, ctx: &mut ForwardContext, x: Tensor<4>) -> Tensor<4> {
        self.resnet.feature_map(ctx, self.spec.normalization.forward(x))
    }

    /// Computes representations with the weights of `ctx`, in any mode: for finetuning.
    ///
    /// # Shapes
    /// As for [`Encoder::embed`].
    pub fn forward(&self, ctx: &mut ForwardContext, x: Tensor<4>) -> Tensor<2> {
        self.resnet.forward(ctx, self.spec.normalization.forward(x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stems_are_adapted_to_other_channels() {
        let spec = EncoderSpec {
            architecture: Architecture::Resnet18,
            width: 0.0625,
            stem: Stem::Cifar,
            size: 16,
            center: 1.0,
            antialias: false,
            channels: 3,
            normalization: Normalization::default(),
            eps: reference_eps(),
            levels: Levels::default(),
        };
        let rgb = Encoder::random(spec, 0, &Device::flex());
        let stem = |encoder: &Encoder| encoder.weights.params.leaf("conv1.weight").unwrap().to_vec();
        let (filters, taps) = (stem(&rgb), 9);
        let one = stem(&rgb.clone().with_channels(1));
        let four = stem(&rgb.clone().with_channels(4));
        for (f, filter) in filters.chunks_exact(3 * taps).enumerate() {
            for i in 0..taps {
                let [r, g, b] = [0, 1, 2].map(|c| filter[c * taps + i]);
                assert!((one[f * taps + i] - (r + g + b)).abs() < 1e-6);
                let adapted = [0, 1, 2, 3].map(|c| four[(f * 4 + c) * taps + i]);
                assert_eq!(adapted, [r, g, b, r].map(|w| w * 0.75));
            }
        }
    }
}

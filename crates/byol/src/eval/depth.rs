//! Monocular depth estimation (appendix E; Laina et al. 2016, arXiv:1606.00373): four up-projection
//! blocks of 512, 256, 128 and 64 channels on the encoder's feature map, a 1x1 convolution to one
//! value, and the reverse Huber loss.
//!
//! An up-projection doubles the resolution by inserting zeros, then adds two branches: a 5x5
//! convolution, ReLU and a 3x3 convolution, and a single 5x5 convolution; ReLU follows the sum.
//! Every convolution but the last has batch norm.

use burn::tensor::{Tensor, TensorData};

use super::{
    dense_heads::{self, Head, OutputLayer, Sample, Trained},
    metrics,
};
use crate::{
    data::dense_labels::{DepthMap, DepthPair},
    device::has_kernels,
    image::Image,
    nn::{
        Encoder, ForwardContext,
        conv_norm_act::{ConvNorm, Epilogue, conv_norm_act, up_conv_norm_act},
        cpu,
        tree::host,
    },
};

pub use super::dense_heads::Protocol;

/// Channels of the up-projection blocks.
const BLOCKS: [usize; 4] = [512, 256, 128, 64];

/// Smallest predicted depth, in meters; the relative metrics need depths above 0.
const MIN_DEPTH: f32 = 1e-3;

/// Head of up-projection blocks.
#[derive(Debug)]
struct UpProjectionHead {
    /// Convolutions of each block: first and second of the long branch, then the short branch.
    blocks: Vec<[ConvNorm; 3]>,
    /// Mean depth of the training images in meters, the head's initial output.
    mean: f64,
}

impl UpProjectionHead {
    fn new(features: usize, mean: f64) -> UpProjectionHead {
        let mut c_in = features;
        let block = |(i, c_out): (usize, usize)| {
            let conv = |name: &str, c_in: usize, kernel: usize| ConvNorm {
                conv: format!("head.{i}.conv{name}"),
                norm: format!("head.{i}.bn{name}"),
                c_in,
                c_out,
                kernel,
                stride: 1,
                dilation: 1,
            };
            let convs = [conv("1", c_in, 5), conv("2", c_out, 3), conv("3", c_in, 5)];
            c_in = c_out;
            convs
        };
        UpProjectionHead { blocks: BLOCKS.into_iter().enumerate().map(block).collect(), mean }
    }
}

impl Head for UpProjectionHead {
    /// Depth in meters; 0 if unknown.
    type Label = f32;

    const RATE_DROPS: [(f64, f64); 2] = [(0.4, 0.2), (2.0 / 3.0, 0.02)];
    const WEIGHT_DECAY: f64 = 5e-4;
    /// Crops keep their scale, which depth depends on.
    const CROP_SCALES: [f64; 2] = [1.0, 1.0];

    fn convs(&self) -> Vec<&ConvNorm> {
        self.blocks.iter().flatten().collect()
    }

    fn output_layer(&self) -> OutputLayer {
        OutputLayer { name: "head.depth", inputs: BLOCKS[3], outputs: 1 }
    }

    fn forward(&self, context: &mut ForwardContext, map: Tensor<4>) -> Tensor<4> {
        let up_project = |context: &mut ForwardContext, x: Tensor<4>, [first, second, short]: &[ConvNorm; 3]| {
            let skip = up_conv_norm_act(context, short, x.clone(), false);
            let y = up_conv_norm_act(context, first, x, true);
            conv_norm_act(context, second, y, Epilogue::AddRelu(skip)).into_tensor()
        };
        let y = self.blocks.iter().fold(map, |x, block| up_project(context, x, block));
        self.output_layer().forward(context, y).add_scalar(self.mean)
    }

    fn loss(depth: Tensor<4>, truth: &[f32]) -> Tensor<1> {
        reverse_huber(depth, truth)
    }
}

/// Encoder with a depth head.
#[derive(Debug)]
pub struct DepthNet(Trained<UpProjectionHead>);

impl DepthNet {
    /// Trains a head on a copy of `encoder`. The learning rate drops to a fifth after 40 % of the
    /// steps and to a fiftieth after two thirds. `on_step` receives the loss of each update.
    ///
    /// # Panics
    /// If `pairs` is empty.
    pub fn train(encoder: &Encoder, pairs: &[DepthPair], p: &Protocol, on_step: impl FnMut(f64)) -> DepthNet {
        let known = pairs.iter().flat_map(|pair| &pair.depth.meters).filter(|m| **m > 0.0).map(|m| f64::from(*m));
        let head = UpProjectionHead::new(encoder.features(), metrics::mean(known));
        let samples: Vec<Sample<UpProjectionHead>> =
            pairs.iter().map(|pair| (&pair.image, &pair.depth.meters[..])).collect();
        DepthNet(dense_heads::train(encoder.clone(), head, &samples, p, on_step))
    }

    /// Predicts the depth of every pixel of `image`.
    pub fn predict(&self, image: &Image) -> DepthMap {
        let meters = host(self.0.predict(image)).into_iter().map(|m| m.max(MIN_DEPTH)).collect();
        DepthMap { height: image.height, width: image.width, meters }
    }
}

/// Reverse Huber loss, averaged over the pixels of known depth: |e| up to c, (e² + c²) / 2c above,
/// where c is a fifth of the largest |e|. `depth`: `[N, H, W, 1]`, tracked.
fn reverse_huber(depth: Tensor<4>, truth: &[f32]) -> Tensor<1> {
    if !has_kernels(&depth.device()) {
        return composed_reverse_huber(depth, truth);
    }
    let error = |(d, t): (f32, &f32)| if *t > 0.0 { f64::from(d - t) } else { 0.0 };
    let errors: Vec<f64> = host(depth.clone()).into_iter().zip(truth).map(error).collect();
    let pixels = truth.iter().filter(|t| **t > 0.0).count().max(1) as f64;
    // `max` ignores NaN; the sum does not.
    let c = 0.2 * errors.iter().fold(0.0, |max: f64, e| max.max(e.abs())).max(1e-6);
    let term = |e: &f64| if e.abs() > c { (e * e + c * c) / (2.0 * c) } else { e.abs() };
    let slope = |e: &f64| if e.abs() > c || *e == 0.0 { e / c } else { e.signum() };
    let gradient = errors.iter().map(|e| (slope(e) / pixels) as f32).collect();
    cpu::loss(depth, errors.iter().map(term).sum::<f64>() / pixels, gradient)
}

/// [`reverse_huber`] composed of Burn's operations.
fn composed_reverse_huber(depth: Tensor<4>, truth: &[f32]) -> Tensor<1> {
    let (shape, device) = (depth.dims(), depth.device());
    let constant = |values: Vec<f32>| {
        let t = Tensor::<4>::from_data(TensorData::new(values, shape), &device);
        if t.is_autodiff() { t } else { t.autodiff() }
    };
    let known: Vec<f32> = truth.iter().map(|t| f32::from(u8::from(*t > 0.0))).collect();
    let pixels = known.iter().sum::<f32>().max(1.0);
    let e = ((depth - constant(truth.to_vec())) * constant(known)).abs();
    let c = 0.2 * f64::from(e.clone().without_autodiff().max().into_scalar::<f32>()).max(1e-6);
    let quadratic = (e.clone().square() + c * c).div_scalar(2.0 * c);
    let is_large = e.clone().greater_elem(c);
    e.mask_where(is_large, quadratic).sum().div_scalar(f64::from(pixels))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{
        data::synthetic,
        nn::{Architecture, EncoderSpec, Normalization, Stem, encoder::reference_eps},
    };

    #[test]
    fn head_learns_more_than_the_mean_depth() {
        let spec = EncoderSpec {
            architecture: Architecture::Resnet18,
            width: 0.125,
            stem: Stem::Imagenet,
            size: 32,
            center: 1.0,
            antialias: false,
            channels: 3,
            normalization: Normalization::default(),
            eps: reference_eps(),
            levels: crate::data::Levels::default(),
        };
        let pair = |i: u64| {
            let (image, meters) = synthetic::scene(1, i, 32, 32);
            DepthPair { path: "scene".into(), image, depth: DepthMap { height: 32, width: 32, meters } }
        };
        let pairs: Vec<DepthPair> = (0..12).map(pair).collect();
        let p = Protocol { steps: 120, batch: 4, crop: 32, rate: 0.05, frozen: false, seed: 0 };
        let net = DepthNet::train(&Encoder::random(spec, 1, &Device::flex()), &pairs, &p, |_| ());
        let mean = metrics::mean(pairs.iter().flat_map(|p| &p.depth.meters).map(|m| f64::from(*m))) as f32;
        let (mut learned, mut constant) = (metrics::DepthErrors::default(), metrics::DepthErrors::default());
        for pair in &pairs {
            learned.add(&net.predict(&pair.image).meters, &pair.depth.meters);
            constant.add(&vec![mean; 32 * 32], &pair.depth.meters);
        }
        assert!(learned.rms() < 0.9 * constant.rms(), "rms {}, of the mean depth {}", learned.rms(), constant.rms());
    }

    #[test]
    fn reverse_huber_is_linear_for_small_and_quadratic_for_large_errors() {
        let device = Device::flex();
        // Errors 0.1, 1 and one unknown: c = 0.2, losses 0.1 and (1 + 0.04) / 0.4 = 2.6.
        let depth = Tensor::<4>::from_data(TensorData::new(vec![1.1f32, 3.0, 7.0], [1, 1, 3, 1]), &device).autodiff();
        let depth = depth.require_grad();
        for loss in [reverse_huber, composed_reverse_huber] {
            let loss = loss(depth.clone(), &[1.0, 2.0, 0.0]);
            let value = f64::from(loss.clone().without_autodiff().into_scalar::<f32>());
            assert!((value - (0.1 + 2.6) / 2.0).abs() < 1e-5, "{value}");
            let gradient = host(depth.grad_remove(&mut loss.backward()).unwrap());
            let difference = gradient.iter().zip([0.5f32, 2.5, 0.0]).map(|(a, b)| (a - b).abs());
            assert!(difference.fold(0.0, f32::max) < 1e-5, "{gradient:?}");
        }
    }
}

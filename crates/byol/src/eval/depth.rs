//! Depth from one image (appendix E; Laina et al. 2016, arXiv:1606.00373): four up-projection blocks of 512, 256, 128 and 64 channels on the
//! encoder's map, a 1x1 convolution to one value, and the reverse Huber loss.
//!
//! An up-projection doubles the side with zeros between; a branch of 5x5 convolution, ReLU, 3x3 convolution and a branch of a 5x5
//! convolution are added, with ReLU. Every convolution but the last has a norm.

use burn::tensor::{Tensor, TensorData};

use super::{
    dense::{self, Head, Protocol, Task, Trained, crops, enlarge},
    metrics,
};
use crate::{
    data::{
        Image,
        dense::{DepthMap, DepthPair},
    },
    nn::{
        Encoder, Pass,
        conv_norm_act::{ConvNorm, Then, conv_norm_act, up_conv_norm_act},
        tree::host,
    },
};

/// Channels of the blocks.
const BLOCKS: [usize; 4] = [512, 256, 128, 64];

/// The name of the last layer.
const LAST: &str = "head.depth";

/// Nearer than this is predicted as this, in metres: ratios want depths above 0.
const NEAREST: f32 = 1e-3;

#[derive(Debug)]
struct UpProjections {
    /// First and second of the long branch, the short branch.
    blocks: Vec<[ConvNorm; 3]>,
    /// Mean depth of the training images: where the head begins.
    mean: f64,
}

impl UpProjections {
    fn new(features: usize, mean: f64) -> UpProjections {
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
            let all = [conv("1", c_in, 5), conv("2", c_out, 3), conv("3", c_in, 5)];
            c_in = c_out;
            all
        };
        UpProjections { blocks: BLOCKS.into_iter().enumerate().map(block).collect(), mean }
    }
}

impl Head for UpProjections {
    fn convs(&self) -> Vec<&ConvNorm> {
        self.blocks.iter().flatten().collect()
    }

    fn last(&self) -> (&'static str, [usize; 2], usize) {
        (LAST, [1, BLOCKS[3]], 1)
    }

    fn forward(&self, pass: &mut Pass, map: Tensor<4>) -> Tensor<4> {
        let up = |pass: &mut Pass, x: Tensor<4>, [first, second, short]: &[ConvNorm; 3]| {
            let skip = up_conv_norm_act(pass, short, x.clone(), false).done();
            let y = up_conv_norm_act(pass, first, x, true);
            conv_norm_act(pass, second, y, Then::AddRelu(skip)).done()
        };
        let y = self.blocks.iter().fold(map, |x, block| up(pass, x, block));
        let [n, h, w, c] = y.dims();
        let weight = pass.params.get::<4>(&format!("{LAST}.weight")).reshape([1, c]).transpose();
        let bias = pass.params.get::<1>(&format!("{LAST}.bias")).reshape([1, 1]);
        (y.reshape([n * h * w, c]).matmul(weight) + bias).reshape([n, h, w, 1]).add_scalar(self.mean)
    }
}

/// An encoder with a depth head.
#[derive(Debug)]
pub struct DepthNet(Trained<UpProjections>);

impl DepthNet {
    /// Trains a head on a copy of the encoder; the rate falls to a fifth after 40 % of the steps, to a fiftieth after two thirds. `done` hears of each update's loss.
    ///
    /// # Panics
    /// If there is no pair.
    pub fn train(start: &Encoder, pairs: &[DepthPair], p: &Protocol, done: impl FnMut(f64)) -> DepthNet {
        let device = start.device();
        let task = Task { drops: [(0.4, 0.2), (2.0 / 3.0, 0.02)], weight_decay: 5e-4 };
        let known = pairs.iter().flat_map(|pair| &pair.depth.metres).filter(|m| **m > 0.0).map(|m| f64::from(*m));
        let head = UpProjections::new(start.features(), metrics::mean(known));
        let pair = |i: usize| (&pairs[i].image, &pairs[i].depth.metres[..]);
        // Their scale stays, because depth goes with it.
        let views = |some: &[(u64, usize)]| crops(some, p, [1.0, 1.0], pair, &device);
        let loss = |depth: Tensor<4>, truth: &Vec<f32>| reverse_huber(enlarge(depth, p.crop, p.crop), truth);
        DepthNet(dense::train(start.clone(), head, p, task, pairs.len(), views, loss, done))
    }

    /// The depth of every pixel of an image, at its own size.
    pub fn predict(&self, image: &Image) -> DepthMap {
        let metres = host(enlarge(self.0.predict(image), image.height, image.width));
        let metres = metres.into_iter().map(|m| m.max(NEAREST)).collect();
        DepthMap { height: image.height, width: image.width, metres }
    }
}

/// Mean over the pixels with a truth of |e| up to c, (e² + c²) / 2c above, with c a fifth of the largest |e|. `depth`: `[N, H, W, 1]`, tracked.
fn reverse_huber(depth: Tensor<4>, truth: &[f32]) -> Tensor<1> {
    let (shape, device) = (depth.dims(), depth.device());
    let constant = |values: Vec<f32>| {
        let t = Tensor::<4>::from_data(TensorData::new(values, shape), &device);
        if t.is_autodiff() { t } else { t.autodiff() }
    };
    let known: Vec<f32> = truth.iter().map(|t| f32::from(u8::from(*t > 0.0))).collect();
    let pixels = known.iter().sum::<f32>().max(1.0);
    let e = ((depth - constant(truth.to_vec())) * constant(known)).abs();
    let c = 0.2 * f64::from(e.clone().without_autodiff().max().into_scalar::<f32>()).max(1e-6);
    let square = (e.clone().square() + c * c).div_scalar(2.0 * c);
    let large = e.clone().greater_elem(c);
    e.mask_where(large, square).sum().div_scalar(f64::from(pixels))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{
        data::synthetic,
        nn::{Architecture, EncoderSpec, Normalization, Stem, reference_eps},
    };

    #[test]
    fn a_head_learns_more_than_the_mean_depth() {
        let spec = EncoderSpec {
            architecture: Architecture::Resnet18,
            width: 0.125,
            stem: Stem::Imagenet,
            size: 32,
            center: 1.0,
            channels: 3,
            normalization: Normalization::default(),
            eps: reference_eps(),
        };
        let pair = |i: u64| {
            let (image, metres) = synthetic::scene(1, i, 32, 32);
            DepthPair { path: "scene".into(), image, depth: DepthMap { height: 32, width: 32, metres } }
        };
        let pairs: Vec<DepthPair> = (0..12).map(pair).collect();
        let p = Protocol { steps: 120, batch: 4, crop: 32, rate: 0.05, frozen: false, seed: 0 };
        let net = DepthNet::train(&Encoder::random(spec, 1, &Device::flex()), &pairs, &p, |_| ());
        let middle = metrics::mean(pairs.iter().flat_map(|p| &p.depth.metres).map(|m| f64::from(*m))) as f32;
        let (mut learned, mut constant) = (metrics::Depth::default(), metrics::Depth::default());
        for pair in &pairs {
            learned.add(&net.predict(&pair.image).metres, &pair.depth.metres);
            constant.add(&vec![middle; 32 * 32], &pair.depth.metres);
        }
        assert!(learned.rms() < 0.9 * constant.rms(), "{} against {} of the mean", learned.rms(), constant.rms());
    }

    #[test]
    fn the_loss_is_linear_for_small_errors_and_square_for_large_ones() {
        let device = Device::flex();
        // Errors 0.1, 1 and, without a truth, none: c = 0.2; 0.1, and (1 + 0.04) / 0.4 = 2.6.
        let depth = Tensor::<4>::from_data(TensorData::new(vec![1.1f32, 3.0, 7.0], [1, 1, 3, 1]), &device).autodiff();
        let loss = f64::from(reverse_huber(depth, &[1.0, 2.0, 0.0]).without_autodiff().into_scalar::<f32>());
        assert!((loss - (0.1 + 2.6) / 2.0).abs() < 1e-5, "{loss}");
    }
}

//! Semantic segmentation by a fully convolutional head (appendix E): the last group of the encoder dilated instead of strided, two 3x3
//! convolutions of 256 channels with dilation 6, each with norm and ReLU, a 1x1 convolution to the classes, and bilinear enlargement.

use burn::tensor::{Device, Tensor, TensorData, activation::log_softmax};
use rayon::prelude::*;

use super::{
    dense::{self, Head, Settings, Trained, enlarge},
    metrics::Confusion,
};
use crate::{
    data::{
        CHANNELS, Image,
        dense::{Mask, NO_CLASS, Pair},
    },
    nn::{
        Encoder, Pass,
        conv_norm_act::{ConvNorm, Then, conv_norm_act},
        tree::host,
    },
    random::{self, Domain},
    views::{Window, flip, resize},
};

/// How to train the head.
#[derive(Debug, Clone, PartialEq)]
pub struct Protocol {
    /// Updates. The rate falls to a tenth after 70 % of them, and again after 90 %.
    pub steps: usize,
    /// Crops an update. 16 as in the paper.
    pub batch: usize,
    /// Side of the square crops, in pixels.
    pub crop: usize,
    /// Learning rate.
    pub rate: f64,
    /// Leave the encoder as it is, with its running statistics.
    pub frozen: bool,
    /// Names order, crops and the head's initial weights.
    pub seed: u64,
}

/// Channels of the head.
const INNER: usize = 256;

/// The name of the last layer.
const LAST: &str = "head.classifier";

#[derive(Debug)]
struct Fcn {
    convs: [ConvNorm; 2],
    classes: usize,
}

impl Fcn {
    fn new(features: usize, classes: usize) -> Fcn {
        let conv = |i: usize, c_in: usize| ConvNorm {
            conv: format!("head.conv{i}"),
            norm: format!("head.bn{i}"),
            c_in,
            c_out: INNER,
            kernel: 3,
            stride: 1,
            dilation: 6,
        };
        Fcn { convs: [conv(1, features), conv(2, INNER)], classes }
    }
}

impl Head for Fcn {
    fn convs(&self) -> Vec<&ConvNorm> {
        self.convs.iter().collect()
    }

    fn last(&self) -> (&'static str, [usize; 2], usize) {
        (LAST, [self.classes, INNER], 1)
    }

    fn forward(&self, pass: &mut Pass, map: Tensor<4>) -> Tensor<4> {
        let [n, h, w, _] = map.dims();
        let y = self.convs.iter().fold(map, |y, conv| conv_norm_act(pass, conv, y, Then::Relu).done());
        let weight = pass.params.get::<4>(&format!("{LAST}.weight")).reshape([self.classes, INNER]).transpose();
        let bias = pass.params.get::<1>(&format!("{LAST}.bias")).reshape([1, self.classes]);
        (y.reshape([n * h * w, INNER]).matmul(weight) + bias).reshape([n, h, w, self.classes])
    }
}

/// An encoder with a segmentation head.
#[derive(Debug)]
pub struct Segmenter(Trained<Fcn>);

impl Segmenter {
    /// Trains a head on a copy of the encoder. `done` hears of each update's loss.
    ///
    /// # Panics
    /// If there is no pair, or a mask has a class of `classes` or above.
    pub fn train(start: &Encoder, pairs: &[Pair], classes: usize, p: &Protocol, done: impl FnMut(f64)) -> Segmenter {
        let device = start.device();
        let settings = Settings {
            steps: p.steps,
            batch: p.batch,
            rate: p.rate,
            drops: [(0.7, 0.1), (0.9, 0.01)],
            weight_decay: 1e-4,
            frozen: p.frozen,
            seed: p.seed,
        };
        let views = |some: &[(u64, usize)]| crops(pairs, some, p, &device);
        let loss = |scores: Tensor<4>, labels: &Vec<u8>| cross_entropy(enlarge(scores, p.crop, p.crop), labels);
        let head = Fcn::new(start.features(), classes);
        Segmenter(dense::train(start.clone().dilated(), head, settings, pairs.len(), views, loss, done))
    }

    /// The class of every pixel of an image, at its own size.
    pub fn predict(&self, image: &Image) -> Mask {
        let scores = host(enlarge(self.0.predict(image), image.height, image.width));
        let best = |row: &[f32]| {
            let larger = |best: (usize, f32), (c, s): (usize, &f32)| if *s > best.1 { (c, *s) } else { best };
            row.iter().enumerate().fold((0, f32::NEG_INFINITY), larger).0 as u8
        };
        let classes = scores.chunks_exact(self.0.head.classes).map(best).collect();
        Mask { height: image.height, width: image.width, classes }
    }
}

/// Confusion of each image: what mean IoU and its interval are of.
pub fn confusions(predicted: &[Mask], pairs: &[Pair], classes: usize) -> Vec<Confusion> {
    let of = |(predicted, pair): (&Mask, &Pair)| {
        let mut one = Confusion::new(classes);
        one.add(&predicted.classes, &pair.mask.classes);
        one
    };
    predicted.iter().zip(pairs).map(of).collect()
}

/// Mean cross-entropy of the pixels that have a class. `scores`: `[N, H, W, classes]`, tracked.
fn cross_entropy(scores: Tensor<4>, labels: &[u8]) -> Tensor<1> {
    let [n, h, w, k] = scores.dims();
    let mut one_hot = vec![0.0f32; labels.len() * k];
    for (row, label) in one_hot.chunks_exact_mut(k).zip(labels).filter(|(_, l)| **l != NO_CLASS) {
        row[usize::from(*label)] = 1.0;
    }
    let pixels = labels.iter().filter(|l| **l != NO_CLASS).count().max(1);
    let one_hot = Tensor::<2>::from_data(TensorData::new(one_hot, [n * h * w, k]), &scores.device());
    let one_hot = if one_hot.is_autodiff() { one_hot } else { one_hot.autodiff() };
    (log_softmax(scores.reshape([n * h * w, k]), 1) * one_hot).sum().div_scalar(-(pixels as f64))
}

/// Square crops at a scale from 0.5 to 2, flipped by chance: images `[n, crop, crop, C]` in 0..1, and their pixels' classes. A crop is never
/// larger than its image.
fn crops(pairs: &[Pair], some: &[(u64, usize)], p: &Protocol, device: &Device) -> (Tensor<4>, Vec<u8>) {
    let one = |(epoch, i): &(u64, usize)| {
        let pair = &pairs[*i];
        let mut rng = random::stream(&[Domain::View as u64, p.seed, *epoch, *i as u64, super::CROP]);
        let scale = random::uniform_in(&mut rng, 0.5, 2.0);
        let side = ((p.crop as f64 / scale).round() as usize).clamp(1, pair.image.height.min(pair.image.width));
        let top = random::below(&mut rng, pair.image.height - side + 1);
        let left = random::below(&mut rng, pair.image.width - side + 1);
        let flips = random::uniform(&mut rng) < 0.5;
        let window = Window { top, left, height: side, width: side };
        let mut view = resize::crop_resize(&pair.image, window, p.crop, p.crop);
        if flips {
            flip::left_right(&mut view);
        }
        // The class of the nearest pixel.
        let near = |i: usize| (2 * i + 1) * side / (2 * p.crop);
        let at = |y: usize, x: usize| {
            let x = if flips { p.crop - 1 - x } else { x };
            pair.mask.classes[(top + near(y)) * pair.mask.width + left + near(x)]
        };
        let classes: Vec<u8> = (0..p.crop * p.crop).map(|i| at(i / p.crop, i % p.crop)).collect();
        (view.interleaved(), classes)
    };
    let all: Vec<(Vec<f32>, Vec<u8>)> = some.par_iter().map(one).collect();
    let (pixels, classes): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    let shape = [some.len(), p.crop, p.crop, CHANNELS];
    (Tensor::from_data(TensorData::new(pixels.concat(), shape), device), classes.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pixel_without_class_counts_nothing() {
        let device = Device::flex();
        let scores = vec![1.0f32, 0.0, 9.0, 0.0];
        let scores = Tensor::<4>::from_data(TensorData::new(scores, [1, 1, 2, 2]), &device).autodiff();
        let loss = f64::from(cross_entropy(scores, &[0, NO_CLASS]).without_autodiff().into_scalar::<f32>());
        assert!((loss - (1.0 + (-1.0f64).exp()).ln()).abs() < 1e-6, "{loss}");
    }
}

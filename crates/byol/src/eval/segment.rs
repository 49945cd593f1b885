//! Semantic segmentation by a fully convolutional head (appendix E): the last group of the encoder dilated instead of strided, two 3x3
//! convolutions of 256 channels with dilation 6, each with norm and ReLU, a 1x1 convolution to the classes, and bilinear enlargement.

use burn::tensor::Tensor;

use super::{
    cross_entropy,
    dense::{self, Head, Protocol, Task, Trained, crops, enlarge},
};
use crate::{
    data::{
        Image,
        dense::{Mask, NO_CLASS, Pair},
    },
    nn::{
        Encoder, Pass,
        conv_norm_act::{ConvNorm, Then, conv_norm_act},
        tree::host,
    },
};

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
    /// Trains a head on a copy of the encoder; the rate falls to a tenth after 70 % of the steps, and again after 90 %. `done` hears of each update's loss.
    ///
    /// # Panics
    /// If there is no pair, or a mask has a class of `classes` or above.
    pub fn train(start: &Encoder, pairs: &[Pair], classes: usize, p: &Protocol, done: impl FnMut(f64)) -> Segmenter {
        let device = start.device();
        let task = Task { drops: [(0.7, 0.1), (0.9, 0.01)], weight_decay: 1e-4 };
        let pair = |i: usize| (&pairs[i].image, &pairs[i].mask.classes[..]);
        let views = |some: &[(u64, usize)]| crops(some, p, [0.5, 2.0], pair, &device);
        let loss = |scores: Tensor<4>, labels: &Vec<u8>| loss_of(enlarge(scores, p.crop, p.crop), labels);
        let head = Fcn::new(start.features(), classes);
        Segmenter(dense::train(start.clone().dilated(), head, p, task, pairs.len(), views, loss, done))
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

/// Mean cross-entropy of the pixels that have a class. `scores`: `[N, H, W, classes]`, tracked.
fn loss_of(scores: Tensor<4>, labels: &[u8]) -> Tensor<1> {
    let [n, h, w, k] = scores.dims();
    let class = |l: &u8| (*l != NO_CLASS).then_some(usize::from(*l));
    cross_entropy(scores.reshape([n * h * w, k]), labels.iter().map(class))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn a_pixel_without_class_counts_nothing() {
        let device = Device::flex();
        let scores = vec![1.0f32, 0.0, 9.0, 0.0];
        let scores = Tensor::<4>::from_data(TensorData::new(scores, [1, 1, 2, 2]), &device).autodiff();
        let loss = f64::from(loss_of(scores, &[0, NO_CLASS]).without_autodiff().into_scalar::<f32>());
        assert!((loss - (1.0 + (-1.0f64).exp()).ln()).abs() < 1e-6, "{loss}");
    }
}

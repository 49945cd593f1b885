//! Semantic segmentation with a fully convolutional head (appendix E): the encoder's last group is
//! dilated instead of strided; the head has two 3x3 convolutions of 256 channels with dilation 6,
//! each with norm and ReLU, a 1x1 convolution to the classes, and bilinear upsampling.

use burn::tensor::Tensor;

use super::{
    cross_entropy,
    dense_heads::{self, Head, OutputLayer, Sample, Trained},
};
use crate::{
    data::dense_labels::{Mask, MaskPair, NO_CLASS},
    image::Image,
    nn::{
        Encoder, ForwardContext,
        conv_norm_act::{ConvNorm, Epilogue, conv_norm_act},
        tree::host,
    },
};

pub use super::dense_heads::Protocol;

/// Channels of the head's convolutions.
const CHANNELS: usize = 256;

/// Fully convolutional head.
#[derive(Debug)]
struct FcnHead {
    convs: [ConvNorm; 2],
    classes: usize,
}

impl FcnHead {
    fn new(features: usize, classes: usize) -> FcnHead {
        let conv = |i: usize, c_in: usize| ConvNorm {
            conv: format!("head.conv{i}"),
            norm: format!("head.bn{i}"),
            c_in,
            c_out: CHANNELS,
            kernel: 3,
            stride: 1,
            dilation: 6,
        };
        FcnHead { convs: [conv(1, features), conv(2, CHANNELS)], classes }
    }
}

impl Head for FcnHead {
    type Label = u8;

    const RATE_DROPS: [(f64, f64); 2] = [(0.7, 0.1), (0.9, 0.01)];
    const WEIGHT_DECAY: f64 = 1e-4;
    const CROP_SCALES: [f64; 2] = [0.5, 2.0];

    fn convs(&self) -> Vec<&ConvNorm> {
        self.convs.iter().collect()
    }

    fn output_layer(&self) -> OutputLayer {
        OutputLayer { name: "head.classifier", inputs: CHANNELS, outputs: self.classes }
    }

    fn forward(&self, context: &mut ForwardContext, map: Tensor<4>) -> Tensor<4> {
        let y = self.convs.iter().fold(map, |y, conv| conv_norm_act(context, conv, y, Epilogue::Relu).into_tensor());
        self.output_layer().forward(context, y)
    }

    /// Mean cross-entropy over the labeled pixels.
    fn loss(scores: Tensor<4>, labels: &[u8]) -> Tensor<1> {
        let [n, h, w, classes] = scores.dims();
        let class = |label: &u8| (*label != NO_CLASS).then_some(usize::from(*label));
        cross_entropy(scores.reshape([n * h * w, classes]), labels.iter().map(class))
    }
}

/// Encoder with a segmentation head.
#[derive(Debug)]
pub struct Segmenter(Trained<FcnHead>);

impl Segmenter {
    /// Trains a head on a copy of `encoder`. The learning rate drops to a tenth after 70 % of the
    /// steps and to a hundredth after 90 %. `on_step` receives the loss of each update.
    ///
    /// # Panics
    /// If `pairs` is empty, or a mask has a class outside 0..`classes`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use byol::{
    ///     Encoder,
    ///     data::{dense_labels, levels::Levels},
    ///     eval::segment::{Protocol, Segmenter},
    /// };
    ///
    /// let encoder = Encoder::open("byol-runs/streets")?;
    /// let data = dense_labels::segmentation("streets".as_ref(), 0, Levels::default())?;
    /// let protocol = Protocol { steps: 1000, batch: 16, crop: 224, rate: 0.02, frozen: false, seed: 0 };
    /// let segmenter = Segmenter::train(&encoder, &data.train, data.classes.len(), &protocol, |_| ());
    /// let mask = segmenter.predict(&data.test[0].image);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn train(
        encoder: &Encoder,
        pairs: &[MaskPair],
        classes: usize,
        p: &Protocol,
        on_step: impl FnMut(f64),
    ) -> Segmenter {
        let head = FcnHead::new(encoder.features(), classes);
        let samples: Vec<Sample<FcnHead>> = pairs.iter().map(|pair| (&pair.image, &pair.mask.classes[..])).collect();
        Segmenter(dense_heads::train(encoder.clone().dilated(), head, &samples, p, on_step))
    }

    /// Predicts the class of every pixel of `image`.
    pub fn predict(&self, image: &Image) -> Mask {
        let scores = host(self.0.predict(image));
        let argmax = |row: &[f32]| {
            let larger = |best: (usize, f32), (c, s): (usize, &f32)| if *s > best.1 { (c, *s) } else { best };
            row.iter().enumerate().fold((0, f32::NEG_INFINITY), larger).0 as u8
        };
        let classes = scores.chunks_exact(self.0.head.classes).map(argmax).collect();
        Mask { height: image.height, width: image.width, classes }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn loss_ignores_unlabeled_pixels() {
        let device = Device::flex();
        let scores = vec![1.0f32, 0.0, 9.0, 0.0];
        let scores = Tensor::<4>::from_data(TensorData::new(scores, [1, 1, 2, 2]), &device).autodiff();
        let loss = f64::from(FcnHead::loss(scores, &[0, NO_CLASS]).without_autodiff().into_scalar::<f32>());
        assert!((loss - (1.0 + (-1.0f64).exp()).ln()).abs() < 1e-6, "{loss}");
    }
}

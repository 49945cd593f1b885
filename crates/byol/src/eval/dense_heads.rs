//! Shared parts of the dense evaluations: training a head on the encoder's feature map, training
//! crops with per-pixel labels, and bilinear upsampling.

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use super::CROP_VIEW;
use crate::{
    device::has_kernels,
    image::{CHANNELS, Image},
    nn::{
        Encoder, ForwardContext, Leaf, Mode, Precision, Statistics, Tree,
        conv_norm_act::ConvNorm,
        cpu::{self, ConvOptions},
        init,
    },
    optim::{Optimizer, Rule, Sgd},
    random::{self, Domain},
    ranks::Ranks,
    views::{Window, flip, resize},
};

/// Head of a dense task, with the loss and the settings the paper trains it with. Its parameters
/// are named `head.*`.
pub(super) trait Head: std::fmt::Debug {
    /// Label of a pixel.
    type Label: Copy + Send + Sync;

    /// Learning rate drops, as (fraction of the steps, factor on the initial rate).
    const RATE_DROPS: [(f64, f64); 2];

    /// Weight decay; biases and norms are excluded.
    const WEIGHT_DECAY: f64;

    /// Range of the random enlargement of training crops.
    const CROP_SCALES: [f64; 2];

    /// Convolutions followed by batch norm.
    fn convs(&self) -> Vec<&ConvNorm>;

    /// Output layer.
    fn output_layer(&self) -> OutputLayer;

    /// Maps the encoder's feature map, `[N, h, w, F]`, to `[N, h′, w′, outputs]`.
    fn forward(&self, context: &mut ForwardContext, map: Tensor<4>) -> Tensor<4>;

    /// Loss of `output`, `[N, H, W, outputs]` and tracked, against the labels of the same pixels.
    fn loss(output: Tensor<4>, labels: &[Self::Label]) -> Tensor<1>;
}

/// Last layer of a head: a 1x1 convolution with bias.
#[derive(Debug, Clone, Copy)]
pub(super) struct OutputLayer {
    /// Prefix of the parameter names.
    pub name: &'static str,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
}

impl OutputLayer {
    /// Maps `[N, H, W, inputs]` to `[N, H, W, outputs]`.
    pub fn forward(&self, context: &mut ForwardContext, x: Tensor<4>) -> Tensor<4> {
        let ([n, h, w, _], OutputLayer { name, inputs, outputs }) = (x.dims(), *self);
        let bias = context.params.get::<1>(&format!("{name}.bias")).reshape([1, 1, 1, outputs]);
        let y = if has_kernels(&x.device()) {
            cpu::conv(x.into(), context.weight(name), ConvOptions::new(context))
        } else {
            let weight = context.params.get::<4>(&format!("{name}.weight")).reshape([outputs, inputs]).transpose();
            x.reshape([n * h * w, inputs]).matmul(weight).reshape([n, h, w, outputs])
        };
        y + bias
    }
}

/// Training protocol of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct Protocol {
    /// Number of updates.
    pub steps: usize,
    /// Crops per update. 16 as in the paper's segmentation.
    pub batch: usize,
    /// Side of the square crops, in pixels.
    pub crop: usize,
    /// Initial learning rate.
    pub rate: f64,
    /// True to keep the encoder's weights and running statistics fixed.
    pub frozen: bool,
    /// Seed of the image order, the crops and the head's initial weights.
    pub seed: u64,
}

/// Encoder with a trained head.
#[derive(Debug)]
pub(super) struct Trained<H> {
    pub encoder: Encoder,
    pub head: H,
    params: Tree,
    statistics: Statistics,
}

/// Initializes the head: He normal by fan-out for convolutions, 1 and 0 for norms, small weights
/// for the output layer.
fn init_head(head: &impl Head, seed: u64, params: &mut Tree, statistics: &mut Statistics, device: &Device) {
    for c in head.convs() {
        let shape = [c.c_out, c.c_in, c.kernel, c.kernel];
        let mut rng = random::named_stream(Domain::Weights, seed, &c.conv);
        let n = shape.iter().product();
        let values = init::he_normal_fan_out(&mut rng, n, c.c_out * c.kernel * c.kernel);
        params.insert(format!("{}.weight", c.conv), Leaf::new(values, &shape, device));
        params.insert(format!("{}.weight", c.norm), Leaf::new(vec![1.0; c.c_out], &[c.c_out], device));
        params.insert(format!("{}.bias", c.norm), Leaf::new(vec![0.0; c.c_out], &[c.c_out], device));
        let fresh = Statistics::new([(c.norm.as_str(), c.c_out)], device);
        statistics.insert(c.norm.clone(), fresh.get(&c.norm).clone());
    }
    let OutputLayer { name, inputs, outputs } = head.output_layer();
    let mut rng = random::named_stream(Domain::Weights, seed, name);
    let values = (0..outputs * inputs).map(|_| 0.01 * random::normal(&mut rng) as f32).collect();
    params.insert(format!("{name}.weight"), Leaf::new(values, &[outputs, inputs, 1, 1], device));
    params.insert(format!("{name}.bias"), Leaf::new(vec![0.0; outputs], &[outputs], device));
}

/// Adds the encoder's weights and statistics.
fn add_encoder(encoder: &Encoder, params: &mut Tree, statistics: &mut Statistics) {
    params.extend("", &encoder.weights.params);
    for (name, running) in encoder.weights.statistics.iter() {
        statistics.insert(name, running.clone());
    }
}

/// Image with a label per pixel.
pub(super) type Sample<'a, H> = (&'a Image, &'a [<H as Head>::Label]);

/// Trains a head on `encoder`, and the encoder too unless frozen. `on_step` receives the loss of
/// each update.
pub(super) fn train<H: Head>(
    encoder: Encoder,
    head: H,
    samples: &[Sample<H>],
    p: &Protocol,
    mut on_step: impl FnMut(f64),
) -> Trained<H> {
    let device = encoder.device();
    let (mut params, mut statistics) = (Tree::new(), Statistics::default());
    if !p.frozen {
        add_encoder(&encoder, &mut params, &mut statistics);
    }
    init_head(&head, p.seed, &mut params, &mut statistics, &device);
    let rule = Rule::Sgd(Sgd { momentum: 0.9, weight_decay: H::WEIGHT_DECAY, nesterov: false });
    let (mut optimizer, norm) = (Optimizer::new(rule, &params), encoder.spec.norm());
    let mut order = random::endless(Domain::Order, p.seed, samples.len());
    for step in 0..p.steps {
        let draws: Vec<(u64, usize)> = order.by_ref().take(p.batch).collect();
        let (x, labels) = crops::<H>(samples, &draws, p, &device);
        let theta = params.tracked();
        let frozen_map = p.frozen.then(|| {
            let mut context = ForwardContext::new(
                &encoder.weights.params,
                &norm,
                Precision::F32,
                Mode::Eval(&encoder.weights.statistics),
            );
            encoder.feature_map(&mut context, x.clone()).autodiff()
        });
        let mut context =
            ForwardContext::new(&theta, &norm, Precision::F32, Mode::Train(&mut statistics, Ranks::SINGLE));
        let map = frozen_map.unwrap_or_else(|| encoder.feature_map(&mut context, x.autodiff()));
        let output = head.forward(&mut context, map);
        let loss = H::loss(upsample(output, p.crop, p.crop), &labels);
        on_step(f64::from(loss.clone().without_autodiff().into_scalar::<f32>()));
        let grads = theta.gradients(&mut loss.backward());
        let progress = step as f64 / p.steps as f64;
        let factor = H::RATE_DROPS.iter().rev().find(|(from, _)| progress >= *from).map_or(1.0, |(_, factor)| *factor);
        params = optimizer.step(&params, &grads, p.rate * factor);
    }
    if p.frozen {
        add_encoder(&encoder, &mut params, &mut statistics);
    }
    Trained { encoder, head, params, statistics }
}

impl<H: Head> Trained<H> {
    /// Head output for every pixel of an image, `[1, height, width, outputs]`.
    pub fn predict(&self, image: &Image) -> Tensor<4> {
        let (h, w) = (image.height, image.width);
        let whole = Window { top: 0, left: 0, height: h, width: w };
        let pixels = resize::crop_resize(image, whole, h, w).interleaved();
        let x = Tensor::from_data(TensorData::new(pixels, [1, h, w, image.channels]), &self.encoder.device());
        let norm = self.encoder.spec.norm();
        let mut context = ForwardContext::new(&self.params, &norm, Precision::F32, Mode::Eval(&self.statistics));
        let map = self.encoder.feature_map(&mut context, x);
        upsample(self.head.forward(&mut context, map), h, w)
    }
}

/// Random square crops of each `(epoch, sample)`, flipped with probability 1/2:
/// `[n, crop, crop, C]` in 0..1, with the labels of the nearest pixels. A crop is never larger than
/// its image.
fn crops<H: Head>(
    samples: &[Sample<H>],
    draws: &[(u64, usize)],
    p: &Protocol,
    device: &Device,
) -> (Tensor<4>, Vec<H::Label>) {
    let crop = |(epoch, i): &(u64, usize)| {
        let (image, labels) = samples[*i];
        let mut rng = random::stream(&[Domain::View as u64, p.seed, *epoch, *i as u64, CROP_VIEW]);
        let scale = random::uniform_in(&mut rng, H::CROP_SCALES[0], H::CROP_SCALES[1]);
        let side = ((p.crop as f64 / scale).round() as usize).clamp(1, image.height.min(image.width));
        let top = random::below(&mut rng, image.height - side + 1);
        let left = random::below(&mut rng, image.width - side + 1);
        let flipped = random::uniform(&mut rng) < 0.5;
        let mut view = resize::crop_resize(image, Window { top, left, height: side, width: side }, p.crop, p.crop);
        if flipped {
            flip::left_right(&mut view);
        }
        let nearest = |i: usize| (2 * i + 1) * side / (2 * p.crop);
        let label_at = |y: usize, x: usize| {
            let x = if flipped { p.crop - 1 - x } else { x };
            labels[(top + nearest(y)) * image.width + left + nearest(x)]
        };
        let labels: Vec<H::Label> = (0..p.crop * p.crop).map(|i| label_at(i / p.crop, i % p.crop)).collect();
        (view.interleaved(), labels)
    };
    let (pixels, labels): (Vec<_>, Vec<_>) = draws.par_iter().map(crop).unzip();
    let channels = samples.first().map_or(CHANNELS, |(image, _)| image.channels);
    let shape = [draws.len(), p.crop, p.crop, channels];
    (Tensor::from_data(TensorData::new(pixels.concat(), shape), device), labels.concat())
}

/// Source positions of bilinear interpolation with half-pixel centers.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Position {
    lower: usize,
    upper: usize,
    /// Weight of `upper`.
    fraction: f32,
}

/// Positions of `to` values in `n`.
fn positions(n: usize, to: usize) -> Vec<Position> {
    let position = |i: usize| {
        let position = ((i as f64 + 0.5) * n as f64 / to as f64 - 0.5).clamp(0.0, (n - 1) as f64);
        let lower = position.floor() as usize;
        Position { lower, upper: (lower + 1).min(n - 1), fraction: position.fract() as f32 }
    };
    (0..to).map(position).collect()
}

/// Resizes `[N, h, w, K]` to `[N, height, width, K]` by bilinear interpolation.
fn upsample(x: Tensor<4>, height: usize, width: usize) -> Tensor<4> {
    let ([n, h, w, k], device) = (x.dims(), x.device());
    let (rows, columns) = (positions(h, height), positions(w, width));
    if has_kernels(&device) {
        return cpu::apply(x, Bilinear { shape: [h, w, k], rows, columns }, [n, height, width, k]);
    }
    let tracked = x.is_autodiff();
    let matrix = |positions: &[Position], n: usize| {
        let mut weights = vec![0.0f32; positions.len() * n];
        for (row, p) in weights.chunks_exact_mut(n).zip(positions) {
            row[p.lower] += 1.0 - p.fraction;
            row[p.upper] += p.fraction;
        }
        let matrix = Tensor::<3>::from_data(TensorData::new(weights, [1, positions.len(), n]), &device);
        if tracked { matrix.autodiff() } else { matrix }
    };
    let x = matrix(&rows, h).matmul(x.reshape([n, h, w * k]));
    let x = matrix(&columns, w).matmul(x.reshape([n * height, w, k]));
    x.reshape([n, height, width, k])
}

/// [`upsample`] on slices.
#[derive(Debug)]
struct Bilinear {
    /// Height, width and channels of a map.
    shape: [usize; 3],
    rows: Vec<Position>,
    columns: Vec<Position>,
}

impl cpu::Function for Bilinear {
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let [h, w, k] = self.shape;
        let (height, width) = (self.rows.len(), self.columns.len());
        let mut out = vec![0.0; x.len() / (h * w) * height * width];
        out.par_chunks_exact_mut(width * k).enumerate().for_each(|(row, out)| {
            let (map, r) = (&x[row / height * h * w * k..], self.rows[row % height]);
            let (lower, upper) = (&map[r.lower * w * k..][..w * k], &map[r.upper * w * k..][..w * k]);
            let mix = |(a, b): (&f32, &f32)| (1.0 - r.fraction) * a + r.fraction * b;
            let mixed: Vec<f32> = lower.iter().zip(upper).map(mix).collect();
            for (out, c) in out.chunks_exact_mut(k).zip(&self.columns) {
                let (lower, upper) = (&mixed[c.lower * k..][..k], &mixed[c.upper * k..][..k]);
                for ((out, a), b) in out.iter_mut().zip(lower).zip(upper) {
                    *out = (1.0 - c.fraction) * a + c.fraction * b;
                }
            }
        });
        out
    }

    fn backward(&self, dy: &[f32]) -> Vec<f32> {
        let [h, w, k] = self.shape;
        let (height, width) = (self.rows.len(), self.columns.len());
        let mut dx = vec![0.0; dy.len() / (height * width) * h * w];
        let maps = dx.par_chunks_exact_mut(h * w * k).zip(dy.par_chunks_exact(height * width * k));
        maps.for_each(|(dx, dy)| {
            let mut mixed = vec![0.0; w * k];
            for (dy, r) in dy.chunks_exact(width * k).zip(&self.rows) {
                mixed.fill(0.0);
                for (dy, c) in dy.chunks_exact(k).zip(&self.columns) {
                    add_scaled(&mut mixed[c.lower * k..][..k], dy, 1.0 - c.fraction);
                    add_scaled(&mut mixed[c.upper * k..][..k], dy, c.fraction);
                }
                add_scaled(&mut dx[r.lower * w * k..][..w * k], &mixed, 1.0 - r.fraction);
                add_scaled(&mut dx[r.upper * w * k..][..w * k], &mixed, r.fraction);
            }
        });
        dx
    }
}

/// sum += factor · x.
fn add_scaled(sum: &mut [f32], x: &[f32], factor: f32) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += factor * x);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{cpu::Function, tree::host};

    #[test]
    fn upsample_preserves_constants_and_interpolates() {
        let device = Device::flex();
        let x = Tensor::<4>::from_data(TensorData::new(vec![0.0f32, 4.0], [1, 1, 2, 1]), &device);
        assert_eq!(host(upsample(x.clone(), 1, 4)), [0.0, 1.0, 3.0, 4.0]);
        assert_eq!(host(upsample(x.ones_like(), 5, 7)), [1.0; 35]);
    }

    #[test]
    fn gradient_of_bilinear_interpolation_is_its_transpose() {
        let (shape, n) = ([3, 4, 2], 2);
        let f = Bilinear { shape, rows: positions(3, 7), columns: positions(4, 5) };
        let mut rng = random::stream(&[3]);
        let mut draw = |len: usize| (0..len).map(|_| random::normal(&mut rng) as f32).collect::<Vec<f32>>();
        let (x, dy) = (draw(n * 24), draw(n * 7 * 5 * 2));
        let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let (forward, backward) = (product(&f.forward(&x), &dy), product(&x, &f.backward(&dy)));
        assert!((forward - backward).abs() < 1e-4, "{forward} and {backward}");
    }
}

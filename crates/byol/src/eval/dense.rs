//! What the dense evaluations share: a head on the map of an encoder, trained with it or on top of it, and what enlarges its output.

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use crate::{
    data::{CHANNELS, Image},
    nn::{Encoder, Leaf, Mode, Pass, Precision, Statistics, Tree, conv_norm_act::ConvNorm, init},
    optim::{Optimizer, Rule, Sgd},
    random::{self, Domain},
    ranks::Ranks,
    views::{Window, flip, resize},
};

/// Layers on top of a map. Their parameters are called `head.…`.
pub(super) trait Head: std::fmt::Debug {
    /// The convolutions that a norm follows.
    fn convs(&self) -> Vec<&ConvNorm>;
    /// The last convolution, with a bias and no norm: its name, `[outputs, inputs]` and kernel.
    fn last(&self) -> (&'static str, [usize; 2], usize);
    /// `[N, h, w, F]` to `[N, h′, w′, outputs]`.
    fn forward(&self, pass: &mut Pass, map: Tensor<4>) -> Tensor<4>;
}

/// How to train a head.
#[derive(Debug, Clone, PartialEq)]
pub struct Protocol {
    /// Updates.
    pub steps: usize,
    /// Crops an update. 16 as in the paper's segmentation.
    pub batch: usize,
    /// Side of the square crops, in pixels.
    pub crop: usize,
    /// Learning rate at the start.
    pub rate: f64,
    /// Leave the encoder as it is, with its running statistics.
    pub frozen: bool,
    /// Names order, crops and the head's initial weights.
    pub seed: u64,
}

/// What a task fixes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task {
    /// From which part of the steps on the rate is multiplied by what.
    pub drops: [(f64, f64); 2],
    /// Weight decay; not for biases and norms.
    pub weight_decay: f64,
}

/// An encoder with a head that has been trained.
#[derive(Debug)]
pub(super) struct Trained<H> {
    pub encoder: Encoder,
    pub head: H,
    params: Tree,
    statistics: Statistics,
}

/// He's normal by fan-out; norms 1 and 0; the last layer small.
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
    let (name, [outputs, inputs], kernel) = head.last();
    let mut rng = random::named_stream(Domain::Weights, seed, name);
    let shape = [outputs, inputs, kernel, kernel];
    let values = (0..shape.iter().product()).map(|_| 0.01 * random::normal(&mut rng) as f32).collect();
    params.insert(format!("{name}.weight"), Leaf::new(values, &shape, device));
    params.insert(format!("{name}.bias"), Leaf::new(vec![0.0; outputs], &[outputs], device));
}

/// All of the encoder's weights and statistics beside those that are there.
fn add_encoder(encoder: &Encoder, params: &mut Tree, statistics: &mut Statistics) {
    params.extend("", &encoder.weights.params);
    for (name, running) in encoder.weights.statistics.iter() {
        statistics.insert(name, running.clone());
    }
}

/// Trains a head on a copy of the encoder, and the copy too unless frozen. `views` makes the images of `(epoch, position)` of `n` and what they
/// should become, `loss` compares; `done` hears of each loss.
#[allow(clippy::too_many_arguments, reason = "the one place where a dense task's parts meet")]
pub(super) fn train<H: Head, T>(
    encoder: Encoder,
    head: H,
    p: &Protocol,
    task: Task,
    n: usize,
    views: impl Fn(&[(u64, usize)]) -> (Tensor<4>, T),
    loss: impl Fn(Tensor<4>, &T) -> Tensor<1>,
    mut done: impl FnMut(f64),
) -> Trained<H> {
    let device = encoder.device();
    let (mut params, mut statistics) = (Tree::new(), Statistics::default());
    if !p.frozen {
        add_encoder(&encoder, &mut params, &mut statistics);
    }
    init_head(&head, p.seed, &mut params, &mut statistics, &device);
    let rule = Rule::Sgd(Sgd { momentum: 0.9, weight_decay: task.weight_decay, nesterov: false });
    let (mut optimizer, norm) = (Optimizer::new(rule, &params), encoder.spec.norm());
    let mut order = random::endless(Domain::Order, p.seed, n);
    for step in 0..p.steps {
        let some: Vec<(u64, usize)> = order.by_ref().take(p.batch).collect();
        let (x, wanted) = views(&some);
        let theta = params.tracked();
        let still = p.frozen.then(|| {
            let mode = Mode::Eval(&encoder.weights.statistics);
            encoder
                .map(
                    &mut Pass { params: &encoder.weights.params, norm: &norm, precision: Precision::F32, mode },
                    x.clone(),
                )
                .autodiff()
        });
        let mut pass = Pass {
            params: &theta,
            norm: &norm,
            precision: Precision::F32,
            mode: Mode::Train(&mut statistics, Ranks::ALONE),
        };
        let map = still.unwrap_or_else(|| encoder.map(&mut pass, x.autodiff()));
        let l = loss(head.forward(&mut pass, map), &wanted);
        done(f64::from(l.clone().without_autodiff().into_scalar::<f32>()));
        let grads = theta.gradients(&mut l.backward());
        let part = step as f64 / p.steps as f64;
        let factor = task.drops.iter().rev().find(|(from, _)| part >= *from).map_or(1.0, |(_, factor)| *factor);
        (params, _) = optimizer.step(&params, &Tree::new(), &grads, p.rate * factor, 1.0);
    }
    if p.frozen {
        add_encoder(&encoder, &mut params, &mut statistics);
    }
    Trained { encoder, head, params, statistics }
}

impl<H: Head> Trained<H> {
    /// What the head says of a whole image, `[1, h, w, outputs]`.
    pub fn predict(&self, image: &Image) -> Tensor<4> {
        let (h, w) = (image.height, image.width);
        let whole = Window { top: 0, left: 0, height: h, width: w };
        let pixels = resize::crop_resize(image, whole, h, w).interleaved();
        let x = Tensor::from_data(TensorData::new(pixels, [1, h, w, CHANNELS]), &self.encoder.device());
        let norm = self.encoder.spec.norm();
        let mut pass =
            Pass { params: &self.params, norm: &norm, precision: Precision::F32, mode: Mode::Eval(&self.statistics) };
        let map = self.encoder.map(&mut pass, x);
        self.head.forward(&mut pass, map)
    }
}

/// Square crops of some images with a value a pixel, flipped by chance: `[n, crop, crop, C]` in 0..1, and the values of the nearest pixels. `scales`
/// are the least and greatest enlargement; a crop is never larger than its image.
pub(super) fn crops<'a, V: Copy + Send + Sync + 'a>(
    some: &[(u64, usize)],
    p: &Protocol,
    scales: [f64; 2],
    pair: impl Fn(usize) -> (&'a Image, &'a [V]) + Sync,
    device: &Device,
) -> (Tensor<4>, Vec<V>) {
    let one = |(epoch, i): &(u64, usize)| {
        let (image, values) = pair(*i);
        let mut rng = random::stream(&[Domain::View as u64, p.seed, *epoch, *i as u64, super::CROP]);
        let scale = random::uniform_in(&mut rng, scales[0], scales[1]);
        let side = ((p.crop as f64 / scale).round() as usize).clamp(1, image.height.min(image.width));
        let top = random::below(&mut rng, image.height - side + 1);
        let left = random::below(&mut rng, image.width - side + 1);
        let flips = random::uniform(&mut rng) < 0.5;
        let mut view = resize::crop_resize(image, Window { top, left, height: side, width: side }, p.crop, p.crop);
        if flips {
            flip::left_right(&mut view);
        }
        let near = |i: usize| (2 * i + 1) * side / (2 * p.crop);
        let at = |y: usize, x: usize| {
            let x = if flips { p.crop - 1 - x } else { x };
            values[(top + near(y)) * image.width + left + near(x)]
        };
        let values: Vec<V> = (0..p.crop * p.crop).map(|i| at(i / p.crop, i % p.crop)).collect();
        (view.interleaved(), values)
    };
    let (pixels, values): (Vec<_>, Vec<_>) = some.par_iter().map(one).unzip();
    let shape = [some.len(), p.crop, p.crop, CHANNELS];
    (Tensor::from_data(TensorData::new(pixels.concat(), shape), device), values.concat())
}

/// Bilinear weights from `n` positions to `to`, half-pixel centres: `[to, n]`.
fn enlarging(n: usize, to: usize, device: &Device) -> Tensor<2> {
    let mut weights = vec![0.0f32; to * n];
    for (i, row) in weights.chunks_exact_mut(n).enumerate() {
        let at = ((i as f64 + 0.5) * n as f64 / to as f64 - 0.5).clamp(0.0, (n - 1) as f64);
        let (first, part) = (at.floor() as usize, at.fract() as f32);
        row[first] += 1.0 - part;
        row[(first + 1).min(n - 1)] += part;
    }
    Tensor::from_data(TensorData::new(weights, [to, n]), device)
}

/// `[N, h, w, K]` to `[N, height, width, K]`, bilinear.
pub(super) fn enlarge(x: Tensor<4>, height: usize, width: usize) -> Tensor<4> {
    let ([n, h, w, k], device) = (x.dims(), x.device());
    let tracked = x.is_autodiff();
    let constant = |t: Tensor<2>| if tracked { t.autodiff() } else { t };
    let (rows, columns) = (constant(enlarging(h, height, &device)), constant(enlarging(w, width, &device)));
    let x = rows.reshape([1, height, h]).matmul(x.reshape([n, h, w * k]));
    let x = columns.reshape([1, width, w]).matmul(x.reshape([n * height, w, k]));
    x.reshape([n, height, width, k])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::tree::host;

    #[test]
    fn enlarging_keeps_what_is_constant_and_interpolates_between() {
        let device = Device::flex();
        let x = Tensor::<4>::from_data(TensorData::new(vec![0.0f32, 4.0], [1, 1, 2, 1]), &device);
        assert_eq!(host(enlarge(x.clone(), 1, 4)), [0.0, 1.0, 3.0, 4.0]);
        assert_eq!(host(enlarge(x.ones_like(), 5, 7)), [1.0; 35]);
    }
}

//! EVALUATION: one file per evaluation. All take a frozen [`Encoder`] and leave it unchanged.
//!
//! # Examples
//!
//! ```no_run
//! use byol::{Dataset, Encoder, eval, eval::knn};
//!
//! let encoder = Encoder::open("byol-runs/cifar10")?;
//! let data = Dataset::open("cifar-10")?;
//! let test = data.test.as_ref().expect("a test split");
//! let [bank, queries] = [eval::embed(&encoder, &data.train, |_| ())?, eval::embed(&encoder, test, |_| ())?];
//! let [bank_labels, labels] = [&data.train, test].map(|images| images.labels().expect("labels"));
//! let result = knn::classify(&bank, bank_labels, &queries, labels, data.classes.len(), 200, 0.07);
//! println!("{:.1} %", 100.0 * result.accuracy);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod alignment_uniformity;
#[doc(hidden)]
pub mod dense_heads;
pub mod depth;
pub mod effective_rank;
mod features;
pub mod finetune;
pub mod knn;
pub mod label_free;
pub mod linear;
#[doc(hidden)]
pub mod logistic;
pub mod metrics;
#[doc(hidden)]
pub mod protocol;
#[doc(hidden)]
pub mod results;
pub mod segment;
#[doc(hidden)]
pub mod split;
pub mod transfer;

use burn::tensor::{Device, Tensor, TensorData, activation::log_softmax};
use rayon::prelude::*;

use crate::{
    data::{Error, Images, prefetch},
    device::has_kernels,
    nn::{Encoder, EncoderSpec, cpu::loss, tree::host},
    views::Policy,
};

pub use features::Features;
pub(crate) use features::dot;

/// Images per evaluation batch for views of `size` pixels: large enough to keep a device busy,
/// small enough for its memory.
#[doc(hidden)]
pub fn batch_size(size: usize) -> usize {
    (256 * 32 * 32 / (size * size)).clamp(32, 256)
}

/// View number of the evaluations' random crops in the random stream of an image; pretraining uses
/// 0 and 1.
const CROP_VIEW: u64 = 2;

/// A view to render: image index, name of its random stream, augmentation policy.
type ViewRequest<'a> = (usize, [u64; 4], &'a Policy);

/// Random crops of each `(epoch, image)`, flipped with probability 1/2: `[n, size, size, C]` in
/// 0..1.
///
/// # Errors
/// [`Error::Image`] for an image that can no longer be decoded.
fn random_crops(
    images: &Images,
    draws: &[(u64, usize)],
    spec: &EncoderSpec,
    seed: u64,
    device: &Device,
) -> Result<Tensor<4>, Error> {
    let policy = match images.is_sound() {
        true => Policy::spectrogram_crop().with_statistics(&spec.normalization.mean, &spec.normalization.std),
        false => Policy::crop_and_flip(),
    };
    let requests: Vec<ViewRequest> =
        draws.iter().map(|(epoch, i)| (*i, [seed, *epoch, *i as u64, CROP_VIEW], &policy)).collect();
    render_views(images, &requests, spec.size, device)
}

/// Renders views: `[n, size, size, C]` in 0..1.
fn render_views(images: &Images, requests: &[ViewRequest], size: usize, device: &Device) -> Result<Tensor<4>, Error> {
    let channels = images.n_channels();
    let render = |(i, stream, policy): &ViewRequest| {
        let image = images.get(*i)?;
        Ok(prefetch::draw(images, *i, policy, &image, *stream)?.apply(&image, size).interleaved())
    };
    let views: Vec<Vec<f32>> = requests.par_iter().map(render).collect::<Result<_, Error>>()?;
    Ok(Tensor::from_data(TensorData::new(views.concat(), [requests.len(), size, size, channels]), device))
}

/// Mean softmax cross-entropy over the labeled rows of `logits`, `[N, classes]`.
fn cross_entropy(logits: Tensor<2>, labels: impl Iterator<Item = Option<usize>>) -> Tensor<1> {
    let [n, classes] = logits.dims();
    let labels: Vec<Option<usize>> = labels.collect();
    assert_eq!(labels.len(), n, "one label for each row of logits");
    let labeled = labels.iter().flatten().count().max(1) as f64;
    if has_kernels(&logits.device()) {
        let mut gradient = host(logits.clone());
        let rows = gradient.par_chunks_exact_mut(classes).zip(&labels);
        let losses: Vec<f64> = rows.map(|(row, label)| row_cross_entropy(row, *label, 1.0 / labeled)).collect();
        return loss(logits, losses.iter().sum::<f64>() / labeled, gradient);
    }
    let mut one_hot = vec![0.0f32; n * classes];
    for (row, label) in one_hot.chunks_exact_mut(classes).zip(labels) {
        if let Some(label) = label {
            row[label] = 1.0;
        }
    }
    let one_hot = Tensor::<2>::from_data(TensorData::new(one_hot, [n, classes]), &logits.device());
    let one_hot = if logits.is_autodiff() && !one_hot.is_autodiff() { one_hot.autodiff() } else { one_hot };
    (log_softmax(logits, 1) * one_hot).sum().div_scalar(-labeled)
}

/// Cross-entropy of one row of logits; 0 without a label. Replaces the logits with their gradient,
/// times `weight`.
fn row_cross_entropy(row: &mut [f32], label: Option<usize>, weight: f64) -> f64 {
    let Some(label) = label else {
        row.fill(0.0);
        return 0.0;
    };
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |x: f32| f64::from(x - max).exp();
    let (own, sum) = (f64::from(row[label] - max), row.iter().map(|x| exp(*x)).sum::<f64>());
    for (class, x) in row.iter_mut().enumerate() {
        *x = (weight * (exp(*x) / sum - f64::from(u8::from(class == label)))) as f32;
    }
    sum.ln() - own
}

/// Calls `f` with the evaluation views of `images`, batch by batch: `[n, size, size, C]` in 0..1.
///
/// # Errors
/// [`Error::Image`] for an image that cannot be decoded.
pub(crate) fn for_each_batch(
    images: &Images,
    spec: &EncoderSpec,
    device: &Device,
    mut f: impl FnMut(Tensor<4>),
) -> Result<(), Error> {
    images.ensure_input(spec.channels, &spec.levels)?;
    let size = spec.size;
    let indices: Vec<usize> = (0..images.len()).collect();
    for batch in indices.chunks(batch_size(size)) {
        let views: Vec<Vec<f32>> = batch
            .par_iter()
            .map(|i| Ok(spec.evaluation_view(&*images.get(*i)?).interleaved()))
            .collect::<Result<_, Error>>()?;
        f(Tensor::from_data(TensorData::new(views.concat(), [batch.len(), size, size, spec.channels]), device));
    }
    Ok(())
}

/// Returns the representations of the images' evaluation views, with batch norm in evaluation mode.
/// `on_progress` receives the size of each finished batch.
///
/// # Errors
/// [`Error::Image`] for an image that cannot be decoded.
pub fn embed(encoder: &Encoder, images: &Images, mut on_progress: impl FnMut(usize)) -> Result<Features, Error> {
    let device = encoder.device();
    let mut values = Vec::with_capacity(images.len() * encoder.features());
    for_each_batch(images, &encoder.spec, &device, |x| {
        let [n, ..] = x.dims();
        values.extend(host(encoder.embed(x)));
        on_progress(n);
    })?;
    Ok(Features { n: images.len(), dim: encoder.features(), values })
}

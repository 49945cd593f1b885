//! EVALUATION: each one file; all work on a frozen [`Encoder`] and change nothing in it.

pub mod card;
pub mod dense;
pub mod depth;
pub mod finetune;
pub mod knn;
pub mod linear;
pub mod logistic;
pub mod measure;
pub mod metrics;
pub mod rows;
pub mod segment;
pub mod spectrum;
pub mod sphere;
pub mod transfer;

use burn::tensor::{Tensor, TensorData, activation::log_softmax};
use rayon::prelude::*;

use crate::{
    data::{CHANNELS, Error, Images},
    nn::{Encoder, EncoderSpec},
    views::{Policy, evaluation_view, view},
};

/// Representations of all images, row by row: `[N, F]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    /// N.
    pub n: usize,
    /// F.
    pub dim: usize,
    /// Row-major.
    pub values: Vec<f32>,
}

impl Features {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.dim..(i + 1) * self.dim]
    }

    /// The rows at these positions, in this order.
    pub fn subset(&self, positions: &[usize]) -> Features {
        let values = positions.iter().flat_map(|i| self.row(*i).iter().copied()).collect();
        Features { n: positions.len(), dim: self.dim, values }
    }

    /// Whether all values are numbers.
    pub fn is_finite(&self) -> bool {
        self.values.iter().all(|v| v.is_finite())
    }

    /// The same rows scaled to unit length; a row of zeros stays.
    pub fn unit(&self) -> Features {
        let mut values = self.values.clone();
        for row in values.chunks_exact_mut(self.dim) {
            let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().max(1e-12).sqrt();
            row.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
        }
        Features { values, ..*self }
    }
}

/// Images a batch in evaluation: enough to fill a device, little enough for any memory.
pub(crate) fn batch_for(size: usize) -> usize {
    (256 * 32 * 32 / (size * size)).clamp(32, 256)
}

/// The number of the evaluations' crop among an image's views: 0 and 1 are those of pretraining.
const CROP: u64 = 2;

/// Random crops, flipped by chance, of `(epoch, image)`: `[n, size, size, C]` in 0..1. `which` is the view's number.
///
/// # Errors
/// [`Error::Image`].
fn crops(
    images: &Images,
    some: &[(u64, usize)],
    size: usize,
    seed: u64,
    which: u64,
    device: &burn::tensor::Device,
) -> Result<Tensor<4>, Error> {
    let policy = Policy::crop_and_flip();
    let named: Vec<_> = some.iter().map(|(epoch, i)| (*i, [seed, *epoch, *i as u64, which], &policy)).collect();
    named_views(images, &named, size, device)
}

/// The views of these images by these names and policies: `[n, size, size, C]` in 0..1.
fn named_views(
    images: &Images,
    some: &[(usize, [u64; 4], &Policy)],
    size: usize,
    device: &burn::tensor::Device,
) -> Result<Tensor<4>, Error> {
    let one =
        |(i, name, policy): &(usize, [u64; 4], &Policy)| Ok(view(policy, &*images.get(*i)?, size, *name).interleaved());
    let views: Vec<Vec<f32>> = some.par_iter().map(one).collect::<Result<_, Error>>()?;
    Ok(Tensor::from_data(TensorData::new(views.concat(), [some.len(), size, size, CHANNELS]), device))
}

/// Mean softmax cross-entropy of the rows that have a label. `logits`: `[N, classes]`.
fn cross_entropy(logits: Tensor<2>, labels: impl Iterator<Item = Option<usize>>) -> Tensor<1> {
    let [n, classes] = logits.dims();
    let (mut one_hot, mut labelled) = (vec![0.0f32; n * classes], 0usize);
    for (row, label) in one_hot.chunks_exact_mut(classes).zip(labels) {
        if let Some(label) = label {
            row[label] = 1.0;
            labelled += 1;
        }
    }
    let one_hot = Tensor::<2>::from_data(TensorData::new(one_hot, [n, classes]), &logits.device());
    let one_hot = if logits.is_autodiff() && !one_hot.is_autodiff() { one_hot.autodiff() } else { one_hot };
    (log_softmax(logits, 1) * one_hot).sum().div_scalar(-(labelled.max(1) as f64))
}

/// Calls `f` with the images' evaluation views for such an encoder, batch by batch: `[n, size, size, C]` in 0..1.
///
/// # Errors
/// [`Error::Image`] for an image that cannot be decoded.
pub fn for_batches(
    images: &Images,
    spec: &EncoderSpec,
    device: &burn::tensor::Device,
    mut f: impl FnMut(Tensor<4>),
) -> Result<(), Error> {
    let (size, center) = (spec.size, spec.center);
    let all: Vec<usize> = (0..images.len()).collect();
    for chunk in all.chunks(batch_for(size)) {
        let views: Vec<Vec<f32>> = chunk
            .par_iter()
            .map(|i| Ok(evaluation_view(&*images.get(*i)?, size, center).interleaved()))
            .collect::<Result<_, Error>>()?;
        f(Tensor::from_data(TensorData::new(views.concat(), [chunk.len(), size, size, CHANNELS]), device));
    }
    Ok(())
}

/// Representations of the images' evaluation views, by the running statistics.
///
/// # Errors
/// [`Error::Image`].
pub fn embed(encoder: &Encoder, images: &Images, mut done: impl FnMut(usize)) -> Result<Features, Error> {
    let device = encoder.device();
    let mut values = Vec::with_capacity(images.len() * encoder.features());
    for_batches(images, &encoder.spec, &device, |x| {
        let [n, ..] = x.dims();
        values.extend(crate::nn::tree::host(encoder.embed(x)));
        done(n);
    })?;
    Ok(Features { n: images.len(), dim: encoder.features(), values })
}

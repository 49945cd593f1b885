//! Evaluations of frozen encoders.

use std::{
    ops::ControlFlow::{self, Break, Continue},
    sync::atomic::{AtomicBool, Ordering},
};

use byol::{
    data::{self as byol_data, Dataset as ByolDataset, Images},
    device,
    eval::{
        self, Features, knn as nearest_neighbors, label_free as without_labels, linear as probe, logistic, results,
        split::{self, LabeledSplit},
    },
    train::data::cache_bytes,
};
use pyo3::prelude::*;

use crate::{
    data::Dataset,
    encoder::{Encoder, embed_images},
    errors,
    interrupt::interruptible,
};

/// Value and 95 % interval.
type Estimate = (f64, f64, f64);

/// Accuracy with its interval, the predicted classes, and the true ones.
type Classified = (Estimate, Vec<usize>, Vec<usize>);

/// Ends the reading of images once `stop` is set.
fn on_image(stop: &AtomicBool) -> impl Fn() -> ControlFlow<()> + Sync {
    || if stop.load(Ordering::Relaxed) { Break(()) } else { Continue(()) }
}

/// Training and test images with labels, as in `byol eval`, and the number of classes.
fn labeled(dataset: &ByolDataset, limit: usize, stop: &AtomicBool) -> PyResult<(Images, Images, usize)> {
    let root = dataset.root.clone();
    let split = || -> Result<LabeledSplit, split::Error> {
        let dataset = split::train_and_test(dataset.clone(), limit, &mut |_| ())?;
        let split = LabeledSplit::checked(dataset.check(cache_bytes(device::machine().free_mb), &on_image(stop))?)?;
        split.ensure_single_labels(&root)?;
        Ok(split)
    };
    let split = split().map_err(errors::data)?;
    Ok((split.train, split.test, split.classes.len()))
}

fn labels(images: &Images) -> &[usize] {
    images.labels().expect("checked by `labeled`")
}

fn finite(encoder: &Encoder, images: &Images, stop: &AtomicBool) -> PyResult<Features> {
    let features = embed_images(&encoder.inner, images, None, stop)?;
    match features.is_finite() {
        true => Ok(features),
        false => Err(errors::encoder("the encoder outputs NaN or infinity: its training has diverged")),
    }
}

fn classified(seed: u64, predicted: Vec<usize>, labels: &[usize]) -> Classified {
    let row = results::ResultRow::accuracy("accuracy", seed, &predicted, labels);
    let [low, high] = row.interval.unwrap_or([f64::NAN; 2]);
    ((row.value, low, high), predicted, labels.to_vec())
}

/// Weighted nearest-neighbor classification.
#[pyfunction]
pub fn knn(
    py: Python,
    encoder: &Encoder,
    dataset: &Dataset,
    k: usize,
    temperature: f64,
    limit: usize,
    seed: u64,
) -> PyResult<Classified> {
    if k == 0 || temperature.is_nan() || temperature < 0.01 {
        return Err(errors::byol("`k` must be at least 1 and `temperature` at least 0.01"));
    }
    interruptible(py, |stop| {
        let (train, test, classes) = labeled(&dataset.inner, limit, stop)?;
        let (bank, queries) = (finite(encoder, &train, stop)?, finite(encoder, &test, stop)?);
        let result =
            nearest_neighbors::classify(&bank, labels(&train), &queries, labels(&test), classes, k, temperature);
        Ok(classified(seed, result.predicted, labels(&test)))
    })
}

/// Logistic regression on the features, with the L2 strength selected on held-out images.
#[pyfunction]
pub fn linear(py: Python, encoder: &Encoder, dataset: &Dataset, limit: usize, seed: u64) -> PyResult<Classified> {
    interruptible(py, |stop| {
        let (train, test, classes) = labeled(&dataset.inner, limit, stop)?;
        let (features, queries) = (finite(encoder, &train, stop)?, finite(encoder, &test, stop)?);
        let held_out = probe::held_out_mask(labels(&train), seed);
        let (strengths, stopped) = (logistic::strengths(), || stop.load(Ordering::Relaxed));
        let fit = logistic::fit_best_unless(&features, labels(&train), classes, &strengths, &held_out, &stopped)
            .ok_or_else(|| errors::data(split::Error::from(byol_data::Error::Stopped)))?;
        if !fit.classifier.is_finite() {
            return Err(errors::byol("the classifier has diverged: its weights contain NaN or infinity"));
        }
        let scores = fit.classifier.scores(&queries);
        Ok(classified(seed, eval::metrics::argmax(&scores, classes), labels(&test)))
    })
}

/// Images below which the metrics without labels mean nothing.
const MIN_IMAGES: usize = 16;

/// Metrics without labels, as JSON.
#[pyfunction]
pub fn label_free(
    py: Python,
    encoder: &Encoder,
    dataset: &Dataset,
    split: &str,
    limit: usize,
    seed: u64,
) -> PyResult<String> {
    let images = dataset.split(split)?;
    interruptible(py, |stop| {
        let images = if limit == 0 { images.clone() } else { images.sample_random(limit) };
        let (images, _) = images.readable(&on_image(stop)).map_err(errors::data)?;
        if images.len() < MIN_IMAGES {
            return Err(errors::data_text(format!(
                "too few images: {} (at least {MIN_IMAGES} are needed)",
                images.len()
            )));
        }
        let representations = finite(encoder, &images, stop)?;
        let (policies, size) = match &encoder.plan {
            Some(plan) => (plan.recipe.policies(), plan.recipe.views.size),
            None => (encoder.inner.spec.default_policies(), encoder.inner.spec.size),
        };
        let config = without_labels::ViewConfig { policies: [&policies[0], &policies[1]], size, seed };
        let measured = without_labels::measure_per_image(&encoder.inner, &images, &representations, config);
        let (metrics, _) = measured.map_err(errors::data)?;
        Ok(serde_json::to_string(&metrics).expect("metrics are plain data"))
    })
}

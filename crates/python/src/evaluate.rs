//! Evaluations of frozen encoders.

use std::collections::BTreeSet;

use byol::{
    data::{Dataset as ByolDataset, Images},
    device,
    eval::{
        self, Features, knn as nearest_neighbors, label_free as without_labels, linear as probe, logistic, results,
    },
    train::data::cache_bytes,
    views::Policy,
};
use pyo3::prelude::*;

use crate::{
    data::Dataset,
    encoder::{Encoder, embed_images},
    errors::{self, detached},
};

/// Value and 95 % interval.
type Estimate = (f64, f64, f64);

/// Accuracy with its interval, the predicted classes, and the true ones.
type Classified = (Estimate, Vec<usize>, Vec<usize>);

/// Training and test images with labels, as in `byol eval`: unreadable images are left out, a
/// validation split is for training if there is a test split, and without a test split, one image
/// in five is for testing.
fn labeled(dataset: &ByolDataset, limit: usize) -> PyResult<(Images, Images, usize)> {
    let labeled = dataset.clone().labeled();
    if dataset.train.labeled().is_none() {
        return Err(errors::data(dataset.unlabeled(&dataset.train)));
    }
    let train = labeled.train.clone();
    let (train, test) = match (&dataset.test, labeled.test, labeled.held_out) {
        (None, _, _) if train.len() < 2 => {
            return Err(errors::data("too few images for training and testing (at least 2 are needed)"));
        }
        (None, _, _) => train.split_off_test(5),
        // Test labels are often hidden.
        (Some(test), None, None) => return Err(errors::data(dataset.unlabeled(test))),
        (Some(_), None, Some(val)) => (train, val),
        (Some(_), Some(test), Some(val)) if !val.is_same(&test) && train.has_same_label_kind(&val) => {
            (train.concat(&val).unwrap_or(train), test)
        }
        (Some(_), Some(test), _) => (train, test),
    };
    let split = ByolDataset { train, test: Some(test), held_out: None, ..dataset.clone() }.limit(limit);
    let split = split.check(cache_bytes(device::machine().free_mb), &|| ()).map_err(errors::data)?;
    let test = split.test.ok_or_else(|| errors::data("none of the test images can be used"))?;
    let (Some(train_labels), Some(test_labels)) = (split.train.labels(), test.labels()) else {
        return Err(errors::data("the images have several classes each\nhint: use `byol eval transfer`"));
    };
    let classes: BTreeSet<usize> = train_labels.iter().copied().collect();
    if let Some(class) = test_labels.iter().find(|class| !classes.contains(class)) {
        let name = &split.classes[*class];
        return Err(errors::data(format!("class `{name}` has test images but no training images")));
    }
    if classes.len() < 2 {
        return Err(errors::data("all training images have the same class (at least 2 are needed)"));
    }
    Ok((split.train, test, split.classes.len()))
}

fn labels(images: &Images) -> &[usize] {
    images.labels().expect("checked by `labeled`")
}

fn finite(encoder: &Encoder, images: &Images) -> PyResult<Features> {
    let features = embed_images(&encoder.inner, images, None)?;
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
    detached(py, || {
        let (train, test, classes) = labeled(&dataset.inner, limit)?;
        let (bank, queries) = (finite(encoder, &train)?, finite(encoder, &test)?);
        let result =
            nearest_neighbors::classify(&bank, labels(&train), &queries, labels(&test), classes, k, temperature);
        Ok(classified(seed, result.predicted, labels(&test)))
    })
}

/// Logistic regression on the features, with the L2 strength selected on held-out images.
#[pyfunction]
pub fn linear(py: Python, encoder: &Encoder, dataset: &Dataset, limit: usize, seed: u64) -> PyResult<Classified> {
    detached(py, || {
        let (train, test, classes) = labeled(&dataset.inner, limit)?;
        let (features, queries) = (finite(encoder, &train)?, finite(encoder, &test)?);
        let held_out = probe::held_out_mask(labels(&train), seed);
        let fit = logistic::fit_best(&features, labels(&train), classes, &logistic::strengths(), &held_out);
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
    detached(py, || {
        let images = if limit == 0 { images.clone() } else { images.sample_random(limit) };
        let (images, _) = images.readable().map_err(errors::data)?;
        if images.len() < MIN_IMAGES {
            return Err(errors::data(format!("too few images: {} (at least {MIN_IMAGES} are needed)", images.len())));
        }
        let representations = finite(encoder, &images)?;
        let (policies, size) = match &encoder.plan {
            Some(plan) => ([plan.recipe.views.first.clone(), plan.recipe.views.second.clone()], plan.recipe.views.size),
            None => ([Policy::default(), Policy::second()], encoder.inner.spec.size),
        };
        let config = without_labels::ViewConfig { policies: [&policies[0], &policies[1]], size, seed };
        let measured = without_labels::measure_per_image(&encoder.inner, &images, &representations, config);
        let (metrics, _) = measured.map_err(errors::data)?;
        Ok(serde_json::to_string(&metrics).expect("metrics are plain data"))
    })
}

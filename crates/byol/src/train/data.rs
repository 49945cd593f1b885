//! Data prepared for a run: the training images, and the monitoring images set aside.

use std::{
    ops::ControlFlow::{self, Continue},
    path::PathBuf,
};

use super::{
    Error, Plan,
    health::Monitor,
    recipe::{HealthConfig, Recipe, is_built_in},
};
use crate::{
    data::{Dataset, Images, Levels},
    nn::Normalization,
    views::{self, Window},
};
use rayon::prelude::*;

/// Images whose statistics normalize inputs that are not RGB.
const STATISTICS_IMAGES: usize = 512;

/// Least standard deviation of a channel, for one that is nearly constant.
const MIN_STD: f64 = 1e-3;

/// Images of a run.
#[derive(Debug, Clone)]
pub struct TrainingData {
    /// Path as given by the user.
    pub root: PathBuf,
    /// Description of the format.
    pub kind: String,
    /// Class names; empty without labels.
    pub classes: Vec<String>,
    /// Training images.
    pub train: Images,
    /// Monitoring images; `None` if health checks are off.
    pub held_out: Option<Images>,
    /// Image column of Parquet files, if chosen.
    pub column: Option<String>,
    /// Mapping of file values to pixels.
    pub levels: Levels,
    /// Skipped images, each as `path: reason`.
    pub skipped: Vec<String>,
    /// Images and files that are not part of the data, each as `name (count): reason`.
    pub unused: Vec<String>,
}

/// Options of [`TrainingData::prepare`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrepareOptions {
    /// Training images to use, sampled evenly over the data; 0: all.
    pub limit: usize,
    /// Monitoring images to set aside: of the `val` or `test` split, else at most a tenth of the
    /// training images. 0: none.
    pub monitoring_images: usize,
    /// Bytes of decoded images to keep in memory.
    pub cache_bytes: usize,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        PrepareOptions { limit: 0, monitoring_images: HealthConfig::default().images, cache_bytes: 0 }
    }
}

impl From<&Recipe> for PrepareOptions {
    fn from(recipe: &Recipe) -> Self {
        PrepareOptions { limit: recipe.train.limit, monitoring_images: recipe.health.images, cache_bytes: 0 }
    }
}

impl TrainingData {
    /// Selects the training and monitoring images, decodes each once and skips unreadable ones.
    /// `on_progress` is called per decoded image with the total number.
    ///
    /// # Errors
    /// [`Error::Data`].
    pub fn prepare(
        dataset: Dataset,
        options: PrepareOptions,
        on_progress: &(dyn Fn(usize) + Sync),
    ) -> Result<TrainingData, Error> {
        TrainingData::prepare_unless_stopped(dataset, options, &|total| {
            on_progress(total);
            Continue(())
        })
    }

    /// [`TrainingData::prepare`] that `on_image` may stop.
    ///
    /// # Errors
    /// [`Error::Data`].
    pub(crate) fn prepare_unless_stopped(
        dataset: Dataset,
        options: PrepareOptions,
        on_image: &(dyn Fn(usize) -> ControlFlow<()> + Sync),
    ) -> Result<TrainingData, Error> {
        let monitoring_images = options.monitoring_images;
        let dataset = dataset.limit(options.limit);
        // A single image has no meaningful metrics.
        let held_out = dataset.held_out.as_ref().filter(|images| monitoring_images > 0 && images.len() > 1);
        let held_out = held_out.map(|images| images.sample_random(monitoring_images));
        let dataset = Dataset { held_out, test: None, ..dataset };
        let (total, levels) = (dataset.n_images(), dataset.train.levels_of_files());
        let Dataset { root, kind, classes, train, held_out, mut skipped, unused, column, .. } =
            dataset.check_for_training(options.cache_bytes, &|| on_image(total))?;
        let (train, held_out) = match held_out {
            Some(images) => (train, Some(images)),
            None => match monitoring_images.min(train.len() / 10) {
                0 | 1 => (train, None),
                n => {
                    let (rest, held_out) = train.split_off(n);
                    let (held_out, unusable) = held_out.readable(&|| Continue(()))?;
                    skipped.extend(unusable);
                    (rest, (held_out.len() > 1).then_some(held_out))
                }
            },
        };
        let skipped = skipped.into_iter().map(|image| image.to_string()).collect();
        let unused = unused.into_iter().map(|group| group.to_string()).collect();
        Ok(TrainingData { root, kind, classes, train, held_out, column, levels, skipped, unused })
    }

    /// Monitoring setup of a run with this plan; `None` without monitoring images.
    ///
    /// # Errors
    /// [`Error::Data`].
    pub fn monitor(&self, plan: &Plan) -> Result<Option<Monitor>, Error> {
        let Some(held_out) = self.held_out.clone() else { return Ok(None) };
        let config = plan.recipe.health.clone();
        let has_labels = held_out.labeled().is_some_and(|held_out| held_out.labels().is_some());
        let labeled = self.train.labeled().filter(|train| train.labels().is_some() && has_labels);
        let bank = labeled.map(|train| train.sample(config.bank)).transpose()?;
        Ok(Some(Monitor {
            bank,
            classes: self.classes.len(),
            config,
            spec: plan.encoder.clone(),
            policies: plan.recipe.policies(),
            size: plan.recipe.views.size,
            seed: plan.recipe.seed,
            // A training image costs four forward and two backward passes, a monitoring image four
            // forward passes.
            label_free_images: (self.train.len() / 48).clamp(16, 128).min(held_out.len()),
            held_out,
        }))
    }
}

impl Recipe {
    /// Measures the input normalization if these images are not RGB photos and the recipe has that
    /// of a built-in recipe.
    ///
    /// # Errors
    /// [`Error::Data`].
    #[doc(hidden)]
    pub fn measure_normalization(&mut self, images: &Images) -> Result<(), Error> {
        if !images.is_rgb() && is_built_in(&self.normalize) {
            self.normalize = normalization(images)?;
        }
        Ok(())
    }
}

/// Mean and standard deviation of each channel over a sample of images.
///
/// # Errors
/// [`Error::Data`].
fn normalization(images: &Images) -> Result<Normalization, Error> {
    let sample = images.sample_random(STATISTICS_IMAGES.min(images.len()));
    let channels = images.n_channels();
    let moments = |i: usize| -> Result<[Vec<f64>; 2], Error> {
        let image = sample.get_or_next(i)?;
        let view = match sample.is_sound() {
            true => views::spectrogram_view(&image, 64),
            false => views::resize::crop_resize(&image, Window::center(image.height, image.width, 1.0), 64, 64),
        };
        let planes = || view.pixels.chunks_exact(64 * 64);
        let mean =
            |plane: &[f32], f: fn(f64) -> f64| plane.iter().map(|v| f(f64::from(*v))).sum::<f64>() / plane.len() as f64;
        Ok([planes().map(|p| mean(p, |v| v)).collect(), planes().map(|p| mean(p, |v| v * v)).collect()])
    };
    let moments = (0..sample.len()).into_par_iter().map(moments).collect::<Result<Vec<_>, Error>>()?;
    let mean = |k: usize, c: usize| moments.iter().map(|m| m[k][c]).sum::<f64>() / moments.len().max(1) as f64;
    let std = |c: usize| (mean(1, c) - mean(0, c).powi(2)).max(0.0).sqrt().max(MIN_STD);
    Ok(Normalization {
        mean: (0..channels).map(|c| mean(0, c) as f32).collect(),
        std: (0..channels).map(|c| std(c) as f32).collect(),
    })
}

/// Bytes of decoded images to keep in memory: a quarter of the free memory, at most 8 GiB.
pub fn cache_bytes(free_mb: u64) -> usize {
    usize::try_from((free_mb << 20) / 4).unwrap_or(usize::MAX).min(8 << 30)
}

//! The metric each labeled data set is conventionally scored by (appendix E and table 3 of the
//! paper).

use super::metrics::{accuracy, argmax, average_precision_11, mean, mean_per_class};
use crate::data::Images;

/// Metric of a labeled data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// Top-1 accuracy.
    Top1,
    /// Accuracy within each class, averaged over classes.
    MeanPerClass,
    /// VOC 2007's 11-point average precision, averaged over classes; for multi-label data.
    Map11,
}

impl MetricKind {
    /// Returns the conventional metric of a data set by name: mean per class for Aircraft, Pets,
    /// Caltech-101 and Flowers, 11-point mAP for multi-label data, top-1 otherwise.
    pub fn for_dataset(name: &str, multi_label: bool) -> MetricKind {
        let name = name.to_lowercase();
        let contains = |pattern: &&str| name.contains(*pattern);
        // `OxfordIIITPet` and `oxford_pets` match, `carpets` does not.
        let is_pets = |word: &str| {
            let word = word.strip_suffix('s').unwrap_or(word);
            word == "pet" || word.ends_with("iiitpet") || word == "oxfordpet"
        };
        let per_class = ["aircraft", "flowers", "caltech101", "caltech-101", "caltech_101"].iter().any(contains)
            || name.split(|c: char| !c.is_alphanumeric()).any(is_pets);
        match multi_label {
            true => MetricKind::Map11,
            false if per_class => MetricKind::MeanPerClass,
            false => MetricKind::Top1,
        }
    }

    /// Display name.
    pub fn name(self) -> &'static str {
        match self {
            MetricKind::Top1 => "top-1",
            MetricKind::MeanPerClass => "mean per class",
            MetricKind::Map11 => "11-point mAP",
        }
    }
}

/// Class labels of a set of images.
#[derive(Debug, Clone, Copy)]
pub enum Labels<'a> {
    /// One class per image.
    Single(&'a [usize]),
    /// Any number of classes per image.
    Multi(&'a [Vec<usize>]),
}

impl<'a> Labels<'a> {
    /// Returns the labels of `images`, or `None` if they are unlabeled.
    pub fn from_images(images: &'a Images) -> Option<Labels<'a>> {
        images.labels().map(Labels::Single).or_else(|| images.tags().map(Labels::Multi))
    }

    /// Classes of image `i`.
    pub fn classes(&self, i: usize) -> &'a [usize] {
        match self {
            Labels::Single(labels) => std::slice::from_ref(&labels[i]),
            Labels::Multi(labels) => &labels[i],
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        match self {
            Labels::Single(labels) => labels.len(),
            Labels::Multi(labels) => labels.len(),
        }
    }

    /// Returns true if there are no images.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Classifier scores paired with the true labels and the metric to compute from them.
#[derive(Debug)]
pub struct ScoredPredictions<'a> {
    metric: MetricKind,
    scores: &'a [f64],
    labels: Labels<'a>,
    classes: usize,
    predicted: Vec<usize>,
}

impl<'a> ScoredPredictions<'a> {
    /// Pairs `scores`, `[N, classes]`, with the labels of the same N images.
    ///
    /// # Panics
    /// If the metric does not apply to the labels: [`MetricKind::Map11`] needs multi-label data,
    /// the others need one class per image.
    pub fn new(metric: MetricKind, scores: &'a [f64], labels: Labels<'a>, classes: usize) -> ScoredPredictions<'a> {
        let multi_label = matches!(labels, Labels::Multi(_));
        assert_eq!(metric == MetricKind::Map11, multi_label, "{} does not apply to these labels", metric.name());
        ScoredPredictions { metric, scores, labels, classes, predicted: argmax(scores, classes) }
    }

    /// Metric over the images at `indices`, which may repeat.
    pub fn metric_at(&self, indices: &[usize]) -> f64 {
        match self.labels {
            Labels::Multi(labels) => {
                let average_precision = |class: usize| {
                    let scores: Vec<f64> = indices.iter().map(|i| self.scores[i * self.classes + class]).collect();
                    let positive: Vec<bool> = indices.iter().map(|i| labels[*i].contains(&class)).collect();
                    average_precision_11(&scores, &positive)
                };
                mean((0..self.classes).filter_map(average_precision))
            }
            Labels::Single(labels) => {
                let labels: Vec<usize> = indices.iter().map(|i| labels[*i]).collect();
                let predicted: Vec<usize> = indices.iter().map(|i| self.predicted[*i]).collect();
                match self.metric {
                    MetricKind::MeanPerClass => mean_per_class(&predicted, &labels, self.classes),
                    _ => accuracy(&predicted, &labels),
                }
            }
        }
    }

    /// Metric over all images.
    pub fn metric(&self) -> f64 {
        self.metric_at(&(0..self.labels.len()).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dataset_metrics_match_the_paper() {
        for name in [
            "FGVC-Aircraft",
            "FGVCAircraft",
            "pets",
            "oxford-iiit-pet",
            "OxfordIIITPet",
            "oxford_pets",
            "caltech101",
            "Caltech-101",
            "flowers_102",
            "102flowers",
        ] {
            assert_eq!(MetricKind::for_dataset(name, false), MetricKind::MeanPerClass, "{name}");
        }
        for name in ["cifar10", "carpets", "petrol", "food", "caltech_birds2011"] {
            assert_eq!(MetricKind::for_dataset(name, false), MetricKind::Top1, "{name}");
        }
        assert_eq!(MetricKind::for_dataset("voc2007", true), MetricKind::Map11);
    }

    #[test]
    fn metric_at_uses_only_the_given_indices() {
        // Predictions 0, 0, 1; labels 0, 1, 1.
        let scores = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0];
        let predictions = |metric| ScoredPredictions::new(metric, &scores, Labels::Single(&[0, 1, 1]), 2);
        assert_eq!(predictions(MetricKind::Top1).metric(), 2.0 / 3.0);
        assert_eq!(predictions(MetricKind::MeanPerClass).metric(), 0.75);
        assert_eq!(predictions(MetricKind::Top1).metric_at(&[1, 1, 0]), 1.0 / 3.0);
        let labels = [vec![0], vec![0, 1], vec![1]];
        let multi = ScoredPredictions::new(MetricKind::Map11, &scores, Labels::Multi(&labels), 2);
        assert_eq!(multi.metric_at(&[0, 2]), 1.0);
    }
}

//! Metrics: pure functions of predictions and labels, with the conventions of the paper's
//! evaluations (§4, appendices D to G).
//!
//! # Examples
//!
//! ```
//! use byol::eval::metrics::{ConfusionMatrix, accuracy};
//!
//! assert_eq!(accuracy(&[0, 1, 1], &[0, 1, 0]), 2.0 / 3.0);
//! let pixels = ConfusionMatrix::from_image(&[0, 1, 1, 1], &[0, 0, 1, 1], 2);
//! assert_eq!(pixels.iou(), [Some(0.5), Some(2.0 / 3.0)]);
//! ```

/// Fraction of correct predictions, in [0, 1]; 0 for empty input.
pub fn accuracy(predicted: &[usize], labels: &[usize]) -> f64 {
    let correct = predicted.iter().zip(labels).filter(|(p, l)| p == l).count();
    correct as f64 / labels.len().max(1) as f64
}

/// Accuracy within each class, averaged over the classes that occur: the convention for Aircraft,
/// Pets, Caltech-101 and Flowers.
pub fn mean_per_class(predicted: &[usize], labels: &[usize], classes: usize) -> f64 {
    let (mut correct, mut total) = (vec![0usize; classes], vec![0usize; classes]);
    for (p, l) in predicted.iter().zip(labels) {
        total[*l] += 1;
        correct[*l] += usize::from(p == l);
    }
    mean(correct.iter().zip(&total).filter(|(_, n)| **n > 0).map(|(c, n)| *c as f64 / *n as f64))
}

/// For each row of `scores`, `[N, classes]`, returns whether its label is among the `k` largest
/// scores. Ties go to the lower class.
pub fn top_k_hits(scores: &[f64], labels: &[usize], classes: usize, k: usize) -> Vec<bool> {
    let rank = |(row, label): (&[f64], &usize)| {
        let own = row[*label];
        row.iter().enumerate().filter(|(c, s)| **s > own || (**s == own && c < label)).count()
    };
    scores.chunks_exact(classes).zip(labels).map(|pair| rank(pair) < k).collect()
}

/// Class with the largest score of each row of `scores`, `[N, classes]`. Ties go to the lower
/// class.
pub fn argmax(scores: &[f64], classes: usize) -> Vec<usize> {
    let argmax_row = |row: &[f64]| {
        row.iter().enumerate().fold((0, f64::NEG_INFINITY), |best, (c, s)| if *s > best.1 { (c, *s) } else { best }).0
    };
    scores.chunks_exact(classes).map(argmax_row).collect()
}

/// VOC 2007's 11-point average precision: the mean over recalls 0, 0.1, …, 1 of the largest
/// precision at that recall or higher. `None` without positives. Ties in score keep the input
/// order.
pub fn average_precision_11(scores: &[f64], positive: &[bool]) -> Option<f64> {
    let ranked = sort_by_score(scores, positive);
    let positives = positive.iter().filter(|p| **p).count();
    if positives == 0 {
        return None;
    }
    // (true positives, precision) at each rank; the reverse pass makes the precision the largest
    // from that rank on.
    let mut true_positives = 0;
    let mut curve: Vec<(usize, f64)> = Vec::with_capacity(ranked.len());
    for (i, is_positive) in ranked.iter().enumerate() {
        true_positives += usize::from(*is_positive);
        curve.push((true_positives, true_positives as f64 / (i + 1) as f64));
    }
    let mut best = 0.0f64;
    for (_, precision) in curve.iter_mut().rev() {
        best = best.max(*precision);
        *precision = best;
    }
    let precision_at_recall = |tenths: usize| {
        let rank = curve.partition_point(|(found, _)| found * 10 < tenths * positives);
        curve.get(rank).map_or(0.0, |(_, precision)| *precision)
    };
    Some((0..=10).map(precision_at_recall).sum::<f64>() / 11.0)
}

/// `positive`, sorted by descending score.
fn sort_by_score(scores: &[f64], positive: &[bool]) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.into_iter().map(|i| positive[i]).collect()
}

/// Confusion matrix of a segmentation: pixel counts by label and prediction, summed over images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfusionMatrix {
    classes: usize,
    /// `[label, prediction]`, row-major.
    pub counts: Vec<u64>,
}

impl ConfusionMatrix {
    /// Creates a matrix of zeros.
    pub fn new(classes: usize) -> ConfusionMatrix {
        ConfusionMatrix { classes, counts: vec![0; classes * classes] }
    }

    /// Counts the pixels of one image.
    pub fn from_image(predicted: &[u8], labels: &[u8], classes: usize) -> ConfusionMatrix {
        let mut matrix = ConfusionMatrix::new(classes);
        matrix.add(predicted, labels);
        matrix
    }

    /// Adds the pixels of one image; labels outside 0..classes are ignored.
    pub fn add(&mut self, predicted: &[u8], labels: &[u8]) {
        for (p, l) in predicted.iter().zip(labels) {
            if usize::from(*l) < self.classes {
                self.counts[usize::from(*l) * self.classes + usize::from(*p)] += 1;
            }
        }
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &ConfusionMatrix) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
    }

    /// Intersection over union by class; `None` for a class that is neither labeled nor predicted.
    pub fn iou(&self) -> Vec<Option<f64>> {
        let n = self.classes;
        let class_iou = |c: usize| {
            let intersection = self.counts[c * n + c];
            let labeled: u64 = self.counts[c * n..(c + 1) * n].iter().sum();
            let predicted: u64 = (0..n).map(|l| self.counts[l * n + c]).sum();
            let union = labeled + predicted - intersection;
            (union > 0).then(|| intersection as f64 / union as f64)
        };
        (0..n).map(class_iou).collect()
    }

    /// Mean of [`ConfusionMatrix::iou`] over the classes that occur.
    pub fn mean_iou(&self) -> f64 {
        mean(self.iou().into_iter().flatten())
    }

    /// Fraction of correctly classified pixels.
    pub fn pixel_accuracy(&self) -> f64 {
        let correct: u64 = (0..self.classes).map(|c| self.counts[c * self.classes + c]).sum();
        correct as f64 / self.counts.iter().sum::<u64>().max(1) as f64
    }
}

/// Depth errors over pixels, kept as sums so that images can be merged. All metrics are NaN without
/// pixels.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DepthErrors {
    pixels: f64,
    within: [f64; 3],
    squared: f64,
    relative: f64,
}

impl DepthErrors {
    /// Adds pixels; those with a true depth of 0 are ignored. Predictions must be above 0.
    pub fn add(&mut self, predicted: &[f32], truth: &[f32]) {
        for (p, t) in predicted.iter().zip(truth).map(|(p, t)| (f64::from(*p), f64::from(*t))) {
            if t > 0.0 {
                let ratio = (p / t).max(t / p);
                self.pixels += 1.0;
                for (k, within) in self.within.iter_mut().enumerate() {
                    *within += f64::from(u8::from(ratio < 1.25f64.powi(k as i32 + 1)));
                }
                self.squared += (p - t).powi(2);
                self.relative += (p - t).abs() / t;
            }
        }
    }

    /// Adds the pixels of `other`.
    pub fn merge(&mut self, other: &DepthErrors) {
        self.pixels += other.pixels;
        self.within.iter_mut().zip(other.within).for_each(|(a, b)| *a += b);
        self.squared += other.squared;
        self.relative += other.relative;
    }

    /// Threshold accuracies: fraction of pixels with max(p / t, t / p) < 1.25ᵏ, for k = 1, 2, 3.
    pub fn threshold_accuracies(&self) -> [f64; 3] {
        self.within.map(|n| n / self.pixels)
    }

    /// Root mean squared error, in the unit of the depths.
    pub fn rms(&self) -> f64 {
        (self.squared / self.pixels).sqrt()
    }

    /// Mean relative error, |p − t| / t.
    pub fn mean_relative(&self) -> f64 {
        self.relative / self.pixels
    }
}

/// Mean; 0 for empty input.
pub fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), v| (sum + v, n + 1));
    if n == 0 { 0.0 } else { sum / f64::from(n) }
}

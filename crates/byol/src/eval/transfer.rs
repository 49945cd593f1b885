//! Linear transfer (appendix E): logistic regression by L-BFGS on frozen features of evaluation
//! views. The L2 strength is selected among 45 by the data set's metric on held-out training
//! images, then the classifier is fitted to all of them.

use super::{
    Features, finetune, linear,
    logistic::{self, NEVER, fit_best_by},
    metrics::{average_precision_11, mean},
    protocol::{Labels, MetricKind, ScoredPredictions},
};

/// Scores of a linear transfer.
#[derive(Debug, Clone, PartialEq)]
pub struct TransferScores {
    /// Scores of the test images, `[N, classes]`.
    pub scores: Vec<f64>,
    /// Selected L2 strengths: one, or one per class for multi-label data.
    pub l2: Vec<f64>,
}

/// Fits classifiers to the training features and scores the test features.
///
/// # Panics
/// If `labels` does not have one entry per training row, or `metric` does not apply to them.
pub fn linear(
    train: &Features,
    labels: Labels,
    test: &Features,
    classes: usize,
    metric: MetricKind,
    seed: u64,
) -> TransferScores {
    let strengths = logistic::strengths();
    match labels {
        Labels::Single(labels) => {
            let held_out = linear::held_out_mask(labels, seed);
            let score = |scores: &[f64], labels: &[usize]| {
                ScoredPredictions::new(metric, scores, Labels::Single(labels), classes).metric()
            };
            let fit = fit_best_by(train, labels, classes, &strengths, &held_out, score, NEVER).expect("never stopped");
            TransferScores { scores: fit.classifier.scores(test), l2: vec![fit.l2] }
        }
        Labels::Multi(labels) => {
            // One binary classifier per class.
            let (mut scores, mut l2) = (vec![0.0; test.n * classes], Vec::new());
            for class in 0..classes {
                let is_class: Vec<usize> = labels.iter().map(|l| usize::from(l.contains(&class))).collect();
                // Stratified, so that a rare class has held-out positives.
                let held_out = finetune::held_out_mask(&is_class, 10, seed);
                let fit = fit_best_by(train, &is_class, 2, &strengths, &held_out, binary_score, NEVER)
                    .expect("never stopped");
                for (i, margin) in margins(&fit.classifier.scores(test)).into_iter().enumerate() {
                    scores[i * classes + class] = margin;
                }
                l2.push(fit.l2);
            }
            TransferScores { scores, l2 }
        }
    }
}

/// Average precision of `[N, 2]` scores; without positives, where it is undefined, the mean
/// log-likelihood.
fn binary_score(scores: &[f64], labels: &[usize]) -> f64 {
    let (margins, positive) = (margins(scores), labels.iter().map(|l| *l == 1).collect::<Vec<_>>());
    // ln σ(−m) = −max(m, 0) − ln(1 + exp(−|m|)).
    let log_negative = |m: &f64| -m.max(0.0) - (-m.abs()).exp().ln_1p();
    average_precision_11(&margins, &positive).unwrap_or_else(|| mean(margins.iter().map(log_negative)))
}

/// Positive minus negative score of each row of `scores`, `[N, 2]`.
fn margins(scores: &[f64]) -> Vec<f64> {
    scores.chunks_exact(2).map(|row| row[1] - row[0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learns_multi_label_classes_independently() {
        // Class 0 if the first value is positive, class 1 if the second is, class 2 for two images
        // only; class 3 does not occur.
        let n = 200;
        let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 9) % 2000) as f32 / 1000.0 - 1.0;
        let x = Features { n, dim: 2, values: (0..2 * n).map(value).collect() };
        let mut labels: Vec<Vec<usize>> = (0..n).map(|i| (0..2).filter(|c| x.row(i)[*c] > 0.0).collect()).collect();
        let extremes: Vec<usize> = {
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| x.row(*b)[0].total_cmp(&x.row(*a)[0]));
            order[..2].to_vec()
        };
        extremes.iter().for_each(|i| labels[*i].push(2));
        let transfer = linear(&x, Labels::Multi(&labels), &x, 4, MetricKind::Map11, 0);
        let map = ScoredPredictions::new(MetricKind::Map11, &transfer.scores, Labels::Multi(&labels), 4).metric();
        assert!(map > 0.95, "{map}");
        assert_eq!(transfer.l2.len(), 4);
    }

    #[test]
    fn holds_out_positives_and_negatives() {
        let labels: Vec<usize> = (0..30).map(|i| usize::from(i < 2)).collect();
        let mask = finetune::held_out_mask(&labels, 10, 0);
        let count = |class: usize| (0..30).filter(|i| mask[*i] && labels[*i] == class).count();
        assert_eq!([count(0), count(1)], [2, 1]);
    }
}

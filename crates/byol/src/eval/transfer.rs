//! Linear transfer (appendix E): frozen features of evaluation views, logistic regression by L-BFGS, its strength chosen among 45 on a held-out
//! part of the training images by the measure that counts, then fitted to all of them.

use super::{
    Features, finetune, linear, logistic,
    measure::{Judged, Measure, Truth},
    metrics::{average_precision_11, mean},
};

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Transferred {
    /// Of the test rows, `[N, classes]`.
    pub scores: Vec<f64>,
    /// The strengths that were chosen: one, or one a class where an image may be of several.
    pub l2: Vec<f64>,
}

/// Classifiers fitted to the training rows, asked about the test rows.
///
/// # Panics
/// If the truth has not one entry a row, or the measure is not for such a truth.
pub fn linear(
    train: &Features,
    truth: Truth,
    test: &Features,
    classes: usize,
    measure: Measure,
    seed: u64,
) -> Transferred {
    let strengths = logistic::strengths();
    match truth {
        Truth::One(labels) => {
            let out = linear::held_out(labels, seed);
            let judge =
                |scores: &[f64], labels: &[usize]| Judged::new(measure, scores, Truth::One(labels), classes).of_all();
            let found = logistic::fit_best_by(train, labels, classes, &strengths, &out, judge);
            Transferred { scores: found.classifier.scores(test), l2: vec![found.l2] }
        }
        Truth::Several(tags) => {
            // A classifier a class: is the image of it?
            let (mut scores, mut l2) = (vec![0.0; test.n * classes], Vec::new());
            for class in 0..classes {
                let labels: Vec<usize> = tags.iter().map(|of| usize::from(of.contains(&class))).collect();
                // Of both sides: a rare class is not left without a row to choose by.
                let out = finetune::held_out(&labels, 10, seed);
                let found = logistic::fit_best_by(train, &labels, 2, &strengths, &out, precision);
                for (i, margin) in margins(&found.classifier.scores(test)).into_iter().enumerate() {
                    scores[i * classes + class] = margin;
                }
                l2.push(found.l2);
            }
            Transferred { scores, l2 }
        }
    }
}

/// Average precision of `[N, 2]` scores; where no row is positive, which has none, the mean log-likelihood.
fn precision(scores: &[f64], labels: &[usize]) -> f64 {
    let (margins, positive) = (margins(scores), labels.iter().map(|l| *l == 1).collect::<Vec<_>>());
    // ln σ(−m) = −max(m, 0) − ln(1 + exp(−|m|)).
    let log_no = |m: &f64| -m.max(0.0) - (-m.abs()).exp().ln_1p();
    average_precision_11(&margins, &positive).unwrap_or_else(|| mean(margins.iter().map(log_no)))
}

/// How much more yes than no, of `[N, 2]` scores.
fn margins(scores: &[f64]) -> Vec<f64> {
    scores.chunks_exact(2).map(|row| row[1] - row[0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_classes_an_image_are_learned_one_by_one() {
        // Class 0 where the first value is positive, class 1 where the second is, class 2 of two images alone; a fourth that no image has.
        let n = 200;
        let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 9) % 2000) as f32 / 1000.0 - 1.0;
        let x = Features { n, dim: 2, values: (0..2 * n).map(value).collect() };
        let mut tags: Vec<Vec<usize>> = (0..n).map(|i| (0..2).filter(|c| x.row(i)[*c] > 0.0).collect()).collect();
        let far: Vec<usize> = {
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| x.row(*b)[0].total_cmp(&x.row(*a)[0]));
            order[..2].to_vec()
        };
        far.iter().for_each(|i| tags[*i].push(2));
        let found = linear(&x, Truth::Several(&tags), &x, 4, Measure::Map11, 0);
        let map = Judged::new(Measure::Map11, &found.scores, Truth::Several(&tags), 4).of_all();
        assert!(map > 0.95, "{map}");
        assert_eq!(found.l2.len(), 4);
    }

    #[test]
    fn both_sides_have_rows_to_choose_by() {
        let labels: Vec<usize> = (0..30).map(|i| usize::from(i < 2)).collect();
        let out = finetune::held_out(&labels, 10, 0);
        let of = |side: usize| (0..30).filter(|i| out[*i] && labels[*i] == side).count();
        assert_eq!([of(0), of(1)], [2, 1]);
    }
}

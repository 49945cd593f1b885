//! Linear transfer (appendix E): frozen features of evaluation views, logistic regression by L-BFGS, its strength chosen among 45 on a held-out
//! part of the training images, then fitted to all of them. Each data set is scored as is its custom.

use super::{
    Features, linear, logistic,
    metrics::{average_precision_11, mean, mean_per_class, winners},
};

/// How a data set is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Share of right predictions.
    Top1,
    /// Mean over classes of the share within the class.
    MeanPerClass,
    /// Mean over classes of VOC 2007's average precision, for images of several classes.
    Map11,
}

/// Data sets that are scored by the mean over their classes.
const PER_CLASS: [&str; 5] = ["aircraft", "pet", "caltech101", "caltech-101", "flowers"];

impl Measure {
    /// The custom for a data set of this name.
    pub fn of(name: &str, several: bool) -> Measure {
        let name = name.to_lowercase();
        match several {
            true => Measure::Map11,
            false if PER_CLASS.iter().any(|n| name.contains(n)) => Measure::MeanPerClass,
            false => Measure::Top1,
        }
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Measure::Top1 => "top-1",
            Measure::MeanPerClass => "mean per class",
            Measure::Map11 => "11-point mAP",
        }
    }
}

/// The classes of some images: one each, or several.
#[derive(Debug, Clone, Copy)]
pub enum Truth<'a> {
    /// One each.
    One(&'a [usize]),
    /// Any number.
    Several(&'a [Vec<usize>]),
}

/// Scores of the test rows, `[N, classes]`, by classifiers fitted to the training rows.
///
/// # Panics
/// If the truth has not one entry a row.
pub fn scores(train: &Features, truth: Truth, test: &Features, classes: usize, seed: u64) -> Vec<f64> {
    let (out, strengths) = (linear::held_out(train.n, seed), logistic::strengths());
    match truth {
        Truth::One(labels) => logistic::fit_best(train, labels, classes, &strengths, &out).classifier.scores(test),
        Truth::Several(tags) => {
            // A classifier a class: is the image of it? Chosen by the measure that counts.
            let mut all = vec![0.0; test.n * classes];
            for class in 0..classes {
                let labels: Vec<usize> = tags.iter().map(|of| usize::from(of.contains(&class))).collect();
                let judge = |scores: &[f64], labels: &[usize]| {
                    let positive: Vec<bool> = labels.iter().map(|l| *l == 1).collect();
                    average_precision_11(&margins(scores), &positive).unwrap_or(0.0)
                };
                let found = logistic::fit_best_by(train, &labels, 2, &strengths, &out, judge);
                for (i, margin) in margins(&found.classifier.scores(test)).into_iter().enumerate() {
                    all[i * classes + class] = margin;
                }
            }
            all
        }
    }
}

/// How much more yes than no, of `[N, 2]` scores.
fn margins(scores: &[f64]) -> Vec<f64> {
    scores.chunks_exact(2).map(|row| row[1] - row[0]).collect()
}

/// The measure of the rows at these positions.
///
/// # Panics
/// If the measure is not for such a truth.
pub fn value(measure: Measure, scores: &[f64], truth: Truth, classes: usize, at: &[usize]) -> f64 {
    let rows: Vec<f64> = at.iter().flat_map(|i| scores[i * classes..(i + 1) * classes].iter().copied()).collect();
    match (measure, truth) {
        (Measure::Map11, Truth::Several(tags)) => {
            let of_class = |class: usize| {
                let scores: Vec<f64> = rows.iter().skip(class).step_by(classes).copied().collect();
                let positive: Vec<bool> = at.iter().map(|i| tags[*i].contains(&class)).collect();
                average_precision_11(&scores, &positive)
            };
            mean((0..classes).filter_map(of_class))
        }
        (Measure::Top1 | Measure::MeanPerClass, Truth::One(labels)) => {
            let labels: Vec<usize> = at.iter().map(|i| labels[*i]).collect();
            let predicted = winners(&rows, classes);
            match measure {
                Measure::MeanPerClass => mean_per_class(&predicted, &labels, classes),
                _ => super::metrics::accuracy(&predicted, &labels),
            }
        }
        _ => panic!(
            "{} is not for images of {}",
            measure.name(),
            if matches!(truth, Truth::One(_)) { "one class" } else { "several classes" }
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn customs() {
        assert_eq!(Measure::of("FGVC-Aircraft", false), Measure::MeanPerClass);
        assert_eq!(Measure::of("cifar10", false), Measure::Top1);
        assert_eq!(Measure::of("voc2007", true), Measure::Map11);
    }

    #[test]
    fn several_classes_an_image_are_learned_one_by_one() {
        // Class 0 where the first value is positive, class 1 where the second is; a third that no image has.
        let n = 200;
        let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 9) % 2000) as f32 / 1000.0 - 1.0;
        let x = Features { n, dim: 2, values: (0..2 * n).map(value).collect() };
        let tags: Vec<Vec<usize>> = (0..n).map(|i| (0..2).filter(|c| x.row(i)[*c] > 0.0).collect()).collect();
        let scores = scores(&x, Truth::Several(&tags), &x, 3, 0);
        let all: Vec<usize> = (0..n).collect();
        let map = super::value(Measure::Map11, &scores, Truth::Several(&tags), 3, &all);
        assert!(map > 0.95, "{map}");
    }
}

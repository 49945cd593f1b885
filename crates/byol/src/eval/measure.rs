//! How a labelled data set is scored: as is its custom (appendix E, table 3 of the paper).

use super::metrics::{accuracy, average_precision_11, mean, mean_per_class, winners};
use crate::data::Images;

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

impl Measure {
    /// The custom for a data set of this name: Aircraft, Pets, Caltech and Flowers are scored by the mean over their classes.
    pub fn of(name: &str, several: bool) -> Measure {
        let name = name.to_lowercase();
        let part = |part: &&str| name.contains(*part);
        // `OxfordIIITPet`, `oxford_pets`; but carpets are no pets.
        let pets = |word: &str| {
            let word = word.strip_suffix('s').unwrap_or(word);
            word == "pet" || word.ends_with("iiitpet") || word == "oxfordpet"
        };
        let per_class = ["aircraft", "flowers", "caltech101", "caltech-101", "caltech_101"].iter().any(part)
            || name.split(|c: char| !c.is_alphanumeric()).any(pets);
        match several {
            true => Measure::Map11,
            false if per_class => Measure::MeanPerClass,
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

impl<'a> Truth<'a> {
    /// What is known of images, if anything.
    pub fn of(images: &'a Images) -> Option<Truth<'a>> {
        images.labels().map(Truth::One).or_else(|| images.tags().map(Truth::Several))
    }

    /// The classes of image `i`.
    pub fn classes(&self, i: usize) -> &'a [usize] {
        match self {
            Truth::One(labels) => std::slice::from_ref(&labels[i]),
            Truth::Several(tags) => &tags[i],
        }
    }

    /// How many images.
    pub fn len(&self) -> usize {
        match self {
            Truth::One(labels) => labels.len(),
            Truth::Several(tags) => tags.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Scores of some images beside what is true of them.
#[derive(Debug)]
pub struct Judged<'a> {
    measure: Measure,
    scores: &'a [f64],
    truth: Truth<'a>,
    classes: usize,
    predicted: Vec<usize>,
}

impl<'a> Judged<'a> {
    /// `scores`: `[N, classes]`.
    ///
    /// # Panics
    /// If the measure is not for such a truth.
    pub fn new(measure: Measure, scores: &'a [f64], truth: Truth<'a>, classes: usize) -> Judged<'a> {
        let several = matches!(truth, Truth::Several(_));
        assert_eq!(measure == Measure::Map11, several, "{} is for images of other kinds", measure.name());
        Judged { measure, scores, truth, classes, predicted: winners(scores, classes) }
    }

    /// The measure of the images at these positions.
    pub fn value(&self, at: &[usize]) -> f64 {
        match self.truth {
            Truth::Several(tags) => {
                let of_class = |class: usize| {
                    let scores: Vec<f64> = at.iter().map(|i| self.scores[i * self.classes + class]).collect();
                    let positive: Vec<bool> = at.iter().map(|i| tags[*i].contains(&class)).collect();
                    average_precision_11(&scores, &positive)
                };
                mean((0..self.classes).filter_map(of_class))
            }
            Truth::One(labels) => {
                let labels: Vec<usize> = at.iter().map(|i| labels[*i]).collect();
                let predicted: Vec<usize> = at.iter().map(|i| self.predicted[*i]).collect();
                match self.measure {
                    Measure::MeanPerClass => mean_per_class(&predicted, &labels, self.classes),
                    _ => accuracy(&predicted, &labels),
                }
            }
        }
    }

    /// Of all of them.
    pub fn of_all(&self) -> f64 {
        self.value(&(0..self.truth.len()).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn customs() {
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
            assert_eq!(Measure::of(name, false), Measure::MeanPerClass, "{name}");
        }
        for name in ["cifar10", "carpets", "petrol", "food", "caltech_birds2011"] {
            assert_eq!(Measure::of(name, false), Measure::Top1, "{name}");
        }
        assert_eq!(Measure::of("voc2007", true), Measure::Map11);
    }

    #[test]
    fn each_measure_is_of_the_positions_asked_for() {
        // Predictions 0, 0, 1; true are 0, 1, 1.
        let scores = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0];
        let judged = |measure| Judged::new(measure, &scores, Truth::One(&[0, 1, 1]), 2);
        assert_eq!(judged(Measure::Top1).of_all(), 2.0 / 3.0);
        assert_eq!(judged(Measure::MeanPerClass).of_all(), 0.75);
        assert_eq!(judged(Measure::Top1).value(&[1, 1, 0]), 1.0 / 3.0);
        let tags = [vec![0], vec![0, 1], vec![1]];
        assert_eq!(Judged::new(Measure::Map11, &scores, Truth::Several(&tags), 2).value(&[0, 2]), 1.0);
    }
}

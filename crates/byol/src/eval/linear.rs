//! Linear evaluation (§4.1, appendix D.1): a linear classifier on the frozen encoder, with batch
//! norm in evaluation mode. Random crops and flips, SGD with Nesterov momentum 0.9, cosine learning
//! rate without warm-up, no weight decay; the learning rate is selected on held-out training
//! images.
//!
//! A head is small compared to the encoder, so all learning rates are trained at once on the same
//! features. Each rate has two heads: one is trained without the held-out images and selects the
//! rate, the other is trained on all training images and is reported. The test set is not used.

use rayon::prelude::*;

use super::{
    Features, batch_size, embed, finetune,
    logistic::{Classifier, LogisticObjective},
    metrics, random_crops,
};
use crate::{
    data::{Error, Images},
    nn::{Encoder, tree::host},
    optim::Schedule,
    random::{self, Domain},
};

/// The paper's base learning rates, for batch size 256.
pub const RATES: [f64; 5] = [0.4, 0.3, 0.2, 0.1, 0.05];

/// Training protocol of the linear classifier.
#[derive(Debug, Clone, PartialEq)]
pub struct Protocol {
    /// Epochs. 80 as in the reference.
    pub epochs: usize,
    /// Maximum batch size. 1024 as in the paper; small data sets use an eighth of their images, so
    /// that an epoch has at least eight updates.
    pub batch: usize,
    /// Base learning rates to select from; the peak rate is base × batch / 256.
    pub rates: Vec<f64>,
    /// Seed of the image order, the crops and the held-out images.
    pub seed: u64,
}

impl Default for Protocol {
    fn default() -> Self {
        Protocol { epochs: 80, batch: 1024, rates: RATES.to_vec(), seed: 0 }
    }
}

/// Linear classifier with the selected learning rate.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearProbe {
    /// Classifier trained on all training images.
    pub classifier: Classifier,
    /// Selected base learning rate.
    pub rate: f64,
    /// Accuracy on the held-out images at that rate, of the head trained without them.
    pub held_out_accuracy: f64,
}

/// Marks the training images held out for selecting hyperparameters: a tenth of every class with at
/// least two images, and at least one image overall. Without stratification a small held-out set
/// could favor classifiers that never predict a rare class.
pub fn held_out_mask(labels: &[usize], seed: u64) -> Vec<bool> {
    let mut mask = finetune::held_out_mask(labels, 10, seed);
    if !mask.contains(&true) {
        mask.iter_mut().take(1).for_each(|held_out| *held_out = true);
    }
    mask
}

/// Classifier in training.
struct Head {
    theta: Vec<f64>,
    momentum: Vec<f64>,
}

const MOMENTUM: f64 = 0.9;

impl Head {
    fn new(n: usize) -> Head {
        Head { theta: vec![0.0; n], momentum: vec![0.0; n] }
    }

    fn step(&mut self, x: &Features, labels: &[usize], classes: usize, eta: f64) {
        let (_, gradient) = LogisticObjective::new(x, labels, classes, 0.0).value_and_gradient(&self.theta);
        for ((w, m), g) in self.theta.iter_mut().zip(&mut self.momentum).zip(gradient) {
            *m = MOMENTUM * *m + g;
            *w -= eta * (g + MOMENTUM * *m);
        }
    }
}

/// Trains a classifier for every learning rate and returns the one with the best held-out accuracy.
/// `on_progress` receives the number of images encoded.
///
/// # Errors
/// [`Error::Image`] for an image that can no longer be decoded.
///
/// # Panics
/// If the images have no labels below `classes`, or a field of `p` is 0 or empty.
///
/// # Examples
///
/// ```no_run
/// use byol::{Dataset, Encoder, eval::linear};
///
/// let encoder = Encoder::open("byol-runs/cifar10")?;
/// let data = Dataset::open("cifar-10")?;
/// let protocol = linear::Protocol { epochs: 10, ..Default::default() };
/// let probe = linear::train(&encoder, &data.train, data.classes.len(), &protocol, |_| ())?;
/// println!("base rate {}, held-out accuracy {:.3}", probe.rate, probe.held_out_accuracy);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn train(
    encoder: &Encoder,
    images: &Images,
    classes: usize,
    p: &Protocol,
    mut on_progress: impl FnMut(usize),
) -> Result<LinearProbe, Error> {
    images.ensure_input(encoder.spec.channels, &encoder.spec.levels)?;
    let labels = images.labels().expect("linear evaluation needs labels");
    let (n, batch) = (images.len(), finetune::batch_size(images.len(), p.batch));
    let held_out = held_out_mask(labels, p.seed);
    let head_len = classes * (encoder.features() + 1);
    // For each rate the selection head and the final head.
    let mut heads: Vec<[Head; 2]> = p.rates.iter().map(|_| [Head::new(head_len), Head::new(head_len)]).collect();
    let steps = (p.epochs * n / batch).max(1);
    let mut order = random::endless(Domain::Order, p.seed, n);
    for step in 0..steps {
        let draws: Vec<(u64, usize)> = order.by_ref().take(batch).collect();
        let x = embed_crops(encoder, images, &draws, p.seed)?;
        on_progress(draws.len());
        let batch_labels: Vec<usize> = draws.iter().map(|(_, i)| labels[*i]).collect();
        let kept: Vec<usize> = (0..draws.len()).filter(|i| !held_out[draws[*i].1]).collect();
        let (x_kept, labels_kept) = (x.subset(&kept), kept.iter().map(|i| batch_labels[*i]).collect::<Vec<_>>());
        heads.par_iter_mut().zip(&p.rates).for_each(|([selection, full], rate)| {
            let eta = Schedule::cosine(rate * batch as f64 / 256.0, steps as u64).eta(step as u64);
            if !kept.is_empty() {
                selection.step(&x_kept, &labels_kept, classes, eta);
            }
            full.step(&x, &batch_labels, classes, eta);
        });
    }
    let held_out: Vec<usize> = (0..n).filter(|i| held_out[*i]).collect();
    let validation = images.subset(&held_out);
    let x = embed(encoder, &validation, &mut on_progress)?;
    let validation_labels = validation.labels().expect("a subset of labeled images is labeled");
    let mut best: Option<(f64, usize)> = None;
    for (i, [selection, _]) in heads.iter().enumerate() {
        let classifier = Classifier::new(&selection.theta, classes);
        // A diverged head predicts class 0 throughout; it is selected only if all heads have
        // diverged.
        let accuracy = match classifier.is_finite() {
            true => metrics::accuracy(&metrics::argmax(&classifier.scores(&x), classes), validation_labels),
            false => -1.0,
        };
        if best.is_none_or(|(best_accuracy, _)| accuracy > best_accuracy) {
            best = Some((accuracy, i));
        }
    }
    let (held_out_accuracy, i) = best.expect("at least one learning rate");
    let classifier = Classifier::new(&heads[i][1].theta, classes);
    Ok(LinearProbe { classifier, rate: p.rates[i], held_out_accuracy })
}

/// Number of images [`train`] encodes, for a progress bar.
pub fn images_seen(n: usize, p: &Protocol) -> usize {
    let batch = finetune::batch_size(n.max(1), p.batch);
    (p.epochs * n / batch).max(1) * batch + n.div_ceil(10)
}

/// Representations of a random crop of each `(epoch, image)`.
fn embed_crops(encoder: &Encoder, images: &Images, draws: &[(u64, usize)], seed: u64) -> Result<Features, Error> {
    let (size, device) = (encoder.spec.size, encoder.device());
    let mut values = Vec::with_capacity(draws.len() * encoder.features());
    for batch in draws.chunks(batch_size(size)) {
        values.extend(host(encoder.embed(random_crops(images, batch, &encoder.spec, seed, &device)?)));
    }
    Ok(Features { n: draws.len(), dim: encoder.features(), values })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_out_images_of_rare_classes() {
        let labels: Vec<usize> = (0..203).map(|i| usize::from(i >= 200)).collect();
        for seed in 0..20 {
            let mask = held_out_mask(&labels, seed);
            let count = |class: usize| (0..203).filter(|i| mask[*i] && labels[*i] == class).count();
            assert_eq!((count(0), count(1)), (20, 1), "seed {seed}");
        }
        assert_eq!(held_out_mask(&[0], 0), [true], "a single image is held out, so that a rate can be selected");
    }
}

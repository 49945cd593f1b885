//! Linear evaluation (§4.1, appendix D.1): a linear classifier on the frozen encoder, with its running statistics. Random crop and flip,
//! SGD with Nesterov momentum 0.9, cosine learning rate without warm-up, no decay; the learning rate is chosen on a held-out part of the
//! training images.
//!
//! A head is small beside the encoder, so all rates are trained at once on the same features: for each rate one head that never sees the
//! held-out part, by which the rate is chosen, and one that sees all training images, which is reported. The test set has no part in it.

use rayon::prelude::*;

use super::{
    CROP, Features, batch_for, crops, embed, finetune,
    logistic::{Classifier, Problem},
    metrics,
};
use crate::{
    data::{Error, Images},
    nn::{Encoder, tree::host},
    optim::Schedule,
    random::{self, Domain},
};

/// The paper's base rates, for batch 256.
pub const RATES: [f64; 5] = [0.4, 0.3, 0.2, 0.1, 0.05];

/// How to train the head.
#[derive(Debug, Clone, PartialEq)]
pub struct Protocol {
    /// Passes over the training images. 80 as in the reference.
    pub epochs: usize,
    /// Images an update, at most. 1024 as in the paper; with few images an eighth of them, so that an epoch has eight updates.
    pub batch: usize,
    /// Base rates to choose from; the peak is rate × batch / 256.
    pub rates: Vec<f64>,
    /// Names the order, the crops and the held-out part.
    pub seed: u64,
}

impl Default for Protocol {
    fn default() -> Self {
        Protocol { epochs: 80, batch: 1024, rates: RATES.to_vec(), seed: 0 }
    }
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// Fitted to all training images.
    pub classifier: Classifier,
    /// The base rate.
    pub rate: f64,
    /// Accuracy with it on the held-out part, of a head that did not see it.
    pub held_out: f64,
}

/// Which training images are held out to choose by: a tenth of each class that has several, at least one. Without regard to the classes a small
/// part of a set with a rare one could favour whoever never says it.
pub fn held_out(labels: &[usize], seed: u64) -> Vec<bool> {
    let mut out = finetune::held_out(labels, 10, seed);
    if !out.contains(&true) {
        out.iter_mut().take(1).for_each(|out| *out = true);
    }
    out
}

/// A classifier on its way.
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
        let (_, gradient) = Problem::new(x, labels, classes, 0.0).at(&self.theta);
        for ((w, m), g) in self.theta.iter_mut().zip(&mut self.momentum).zip(gradient) {
            *m = MOMENTUM * *m + g;
            *w -= eta * (g + MOMENTUM * *m);
        }
    }
}

/// Trains the heads and chooses among them. `done` hears of images that have gone through the encoder.
///
/// # Errors
/// [`Error::Image`] for an image that cannot be decoded any more.
///
/// # Panics
/// If the images have no labels below `classes`, or a field of `p` is 0 or empty.
pub fn train(
    encoder: &Encoder,
    images: &Images,
    classes: usize,
    p: &Protocol,
    mut done: impl FnMut(usize),
) -> Result<Chosen, Error> {
    let labels = images.labels().expect("a linear evaluation has labels");
    let (n, batch) = (images.len(), finetune::batch_for(images.len(), p.batch));
    let out = held_out(labels, p.seed);
    let length = classes * (encoder.features() + 1);
    let mut heads: Vec<[Head; 2]> = p.rates.iter().map(|_| [Head::new(length), Head::new(length)]).collect();
    let steps = (p.epochs * n / batch).max(1);
    let mut order = random::endless(Domain::Order, p.seed, n);
    for step in 0..steps {
        let some: Vec<(u64, usize)> = order.by_ref().take(batch).collect();
        let x = embed_crops(encoder, images, &some, p.seed)?;
        done(some.len());
        let of: Vec<usize> = some.iter().map(|(_, i)| labels[*i]).collect();
        let seen: Vec<usize> = (0..some.len()).filter(|i| !out[some[*i].1]).collect();
        let (x_seen, of_seen) = (x.subset(&seen), seen.iter().map(|i| of[*i]).collect::<Vec<_>>());
        heads.par_iter_mut().zip(&p.rates).for_each(|([tried, all], rate)| {
            let eta = Schedule::cosine(rate * batch as f64 / 256.0, steps as u64).eta(step as u64);
            if !seen.is_empty() {
                tried.step(&x_seen, &of_seen, classes, eta);
            }
            all.step(&x, &of, classes, eta);
        });
    }
    let out: Vec<usize> = (0..n).filter(|i| out[*i]).collect();
    let test = images.subset(&out);
    let x = embed(encoder, &test, &mut done)?;
    let test_labels = test.labels().expect("a part has the labels of the whole");
    let mut best: Option<(f64, usize)> = None;
    for (i, [tried, _]) in heads.iter().enumerate() {
        let classifier = Classifier::new(&tried.theta, classes);
        // One that has broken says class 0 of everything, and is chosen only where all have.
        let accuracy = match classifier.is_finite() {
            true => metrics::accuracy(&metrics::winners(&classifier.scores(&x), classes), test_labels),
            false => -1.0,
        };
        if best.is_none_or(|(most, _)| accuracy > most) {
            best = Some((accuracy, i));
        }
    }
    let (held_out, i) = best.expect("there is a rate to choose");
    Ok(Chosen { classifier: Classifier::new(&heads[i][1].theta, classes), rate: p.rates[i], held_out })
}

/// How many images [`train`] takes through the encoder.
pub fn images_seen(n: usize, p: &Protocol) -> usize {
    let batch = finetune::batch_for(n.max(1), p.batch);
    (p.epochs * n / batch).max(1) * batch + n.div_ceil(10)
}

/// Representations of a random crop of each `(epoch, image)`.
fn embed_crops(encoder: &Encoder, images: &Images, some: &[(u64, usize)], seed: u64) -> Result<Features, Error> {
    let (size, device) = (encoder.spec.size, encoder.device());
    let mut values = Vec::with_capacity(some.len() * encoder.features());
    for some in some.chunks(batch_for(size)) {
        values.extend(host(encoder.embed(crops(images, some, size, seed, CROP, &device)?)));
    }
    Ok(Features { n: some.len(), dim: encoder.features(), values })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_out_images_of_rare_classes() {
        let labels: Vec<usize> = (0..203).map(|i| usize::from(i >= 200)).collect();
        for seed in 0..20 {
            let held_out = held_out(&labels, seed);
            let of_class = |class: usize| (0..203).filter(|i| held_out[*i] && labels[*i] == class).count();
            assert_eq!((of_class(0), of_class(1)), (20, 1), "seed {seed}");
        }
        assert_eq!(held_out(&[0], 0), [true], "a single image is held out, so there is something to choose by");
    }
}

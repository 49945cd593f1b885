//! Semi-supervised fine-tuning (§4.2, appendix D.2): encoder and a new linear layer, trained on a part of the labels. Random crop and flip,
//! SGD with Nesterov momentum 0.9, cosine learning rate, no decay; learning rate and epochs are chosen on a held-out fifth of that part.

use super::{CROP, crops, cross_entropy, embed, logistic::Classifier, metrics};
use crate::{
    data::{Error, Images},
    nn::{Encoder, Leaf, Mode, NormConfig, Pass, Precision, Tree, Weights},
    optim::{Optimizer, Rule, Schedule, Sgd},
    random::{self, Domain},
    ranks::Ranks,
};

/// The paper's base rates.
pub const RATES: [f64; 5] = [0.005, 0.01, 0.02, 0.05, 0.1];

/// How to fine-tune.
#[derive(Debug, Clone, PartialEq)]
pub struct Protocol {
    /// Passes over the images, to choose from. The paper: 30 and 50.
    pub epochs: Vec<usize>,
    /// Images an update, at most. 1024 in the paper; with few images an eighth of them, so that an epoch has eight updates.
    pub batch: usize,
    /// Base rates to choose from; the peak is rate × batch / 256.
    pub rates: Vec<f64>,
    /// Names the order, the crops and the held-out part.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct Tuned {
    /// The encoder, no longer that of the file.
    pub encoder: Encoder,
    /// On its representations.
    pub classifier: Classifier,
    /// Base rate.
    pub rate: f64,
    /// Passes over the images.
    pub epochs: usize,
    /// Accuracy with them on the held-out part, by one that did not see it.
    pub held_out: f64,
}

/// The positions of a part of the labels: of every class as many, at least one, at random, in their own order. A smaller part with the same
/// seed is a part of a larger one.
pub fn part(labels: &[usize], classes: usize, share: f64, seed: u64) -> Vec<usize> {
    let each = (share * labels.len() as f64 / classes.max(1) as f64).round().max(1.0) as usize;
    let mut chosen = Vec::new();
    for class in 0..classes {
        let mut of: Vec<usize> = (0..labels.len()).filter(|i| labels[*i] == class).collect();
        random::shuffle(&mut random::stream(&[Domain::Split as u64, seed, class as u64]), &mut of);
        of.truncate(if share >= 1.0 { of.len() } else { each });
        chosen.extend(of);
    }
    chosen.sort_unstable();
    chosen
}

/// Which of some labelled images are held out to choose by: a fifth of each class that has several, at random.
fn held_out(labels: &[usize], classes: usize, seed: u64) -> Vec<bool> {
    let mut out = vec![false; labels.len()];
    for class in 0..classes {
        let mut of: Vec<usize> = (0..labels.len()).filter(|i| labels[*i] == class).collect();
        random::shuffle(&mut random::stream(&[Domain::Split as u64, seed, class as u64, 1]), &mut of);
        let n = (of.len() / 5).max(usize::from(of.len() > 1));
        of[..n].iter().for_each(|i| out[*i] = true);
    }
    out
}

/// Images an update of `n` in all: eight updates an epoch, and at most `most` images, but 16 where there are so many.
pub fn batch_for(n: usize, most: usize) -> usize {
    most.min((n / 8).max(16)).min(n)
}

/// Training images that [`choose`] goes through, for a bar: `n` images in all.
pub fn images_seen(n: usize, p: &Protocol) -> usize {
    let fits = p.rates.len() * p.epochs.len();
    let sweep: usize = p.epochs.iter().map(|e| p.rates.len() * e * (n - n / 5)).sum();
    let last = p.epochs.iter().max().copied().unwrap_or(0) * n;
    if fits > 1 { sweep + last } else { last }
}

/// Fine-tunes `start` on the images: tries every rate and number of epochs, then trains on all with the best. `done` hears of images.
///
/// # Errors
/// [`Error::Image`] for an image that cannot be decoded any more.
///
/// # Panics
/// If the images have no labels below `classes`, or there is nothing to choose from.
pub fn choose(
    start: &Encoder,
    images: &Images,
    classes: usize,
    p: &Protocol,
    mut done: impl FnMut(usize),
) -> Result<Tuned, Error> {
    let labels = images.labels().expect("fine-tuning has labels");
    let out = held_out(labels, classes, p.seed);
    let rows = |of: bool| images.subset(&(0..images.len()).filter(|i| out[*i] == of).collect::<Vec<_>>());
    let (rest, test) = (rows(false), rows(true));
    let mut best: Option<(f64, f64, usize)> = None;
    let settings: Vec<(f64, usize)> = p.epochs.iter().flat_map(|e| p.rates.iter().map(move |r| (*r, *e))).collect();
    // With one setting, or no image to choose by, there is nothing to try.
    if settings.len() > 1 && !test.is_empty() {
        for (rate, epochs) in &settings {
            let (encoder, classifier) = train(start, &rest, classes, p, *rate, *epochs, &mut done)?;
            let accuracy = {
                let scores = classifier.scores(&embed(&encoder, &test, |_| ())?);
                metrics::accuracy(&metrics::winners(&scores, classes), test.labels().expect("as the images"))
            };
            if best.is_none_or(|(most, ..)| accuracy > most) {
                best = Some((accuracy, *rate, *epochs));
            }
        }
    }
    // With nothing to choose by, the middle rate.
    let (held_out, rate, epochs) = best.unwrap_or((f64::NAN, p.rates[p.rates.len() / 2], p.epochs[0]));
    let (encoder, classifier) = train(start, images, classes, p, rate, epochs, &mut done)?;
    Ok(Tuned { encoder, classifier, rate, epochs, held_out })
}

/// One fit.
fn train(
    start: &Encoder,
    images: &Images,
    classes: usize,
    p: &Protocol,
    rate: f64,
    epochs: usize,
    done: &mut impl FnMut(usize),
) -> Result<(Encoder, Classifier), Error> {
    let (n, labels) = (images.len(), images.labels().expect("fine-tuning has labels"));
    let (batch, device) = (batch_for(n, p.batch), start.device());
    let steps = (epochs * n / batch).max(1);
    let schedule = Schedule::cosine(rate * batch as f64 / 256.0, steps as u64);
    let features = start.features();
    let (mut params, mut statistics) = (start.weights.params.clone(), start.weights.statistics.clone());
    params.insert(HEAD[0], Leaf::new(vec![0.0; classes * features], &[classes, features], &device));
    params.insert(HEAD[1], Leaf::new(vec![0.0; classes], &[classes], &device));
    let rule = Rule::Sgd(Sgd { momentum: 0.9, weight_decay: 0.0, nesterov: true });
    let (mut optimizer, norm) = (Optimizer::new(rule, &params), NormConfig::default());
    let mut order = random::endless(Domain::Order, p.seed, n);
    for step in 0..steps {
        let some: Vec<(u64, usize)> = order.by_ref().take(batch).collect();
        let x = crops(images, &some, start.spec.size, p.seed, CROP, &device)?;
        let of: Vec<usize> = some.iter().map(|(_, i)| labels[*i]).collect();
        let theta = params.tracked();
        let mut pass = Pass {
            params: &theta,
            norm: &norm,
            precision: Precision::F32,
            mode: Mode::Train(&mut statistics, Ranks::ALONE),
        };
        let y = start.represent(&mut pass, x.autodiff());
        let logits = y.matmul(theta.get::<2>(HEAD[0]).transpose()) + theta.get::<1>(HEAD[1]).reshape([1, classes]);
        let loss = cross_entropy(logits, of.into_iter().map(Some));
        let grads = theta.gradients(&mut loss.backward());
        (params, _) = optimizer.step(&params, &Tree::new(), &grads, schedule.eta(step as u64), 1.0);
        done(some.len());
    }
    let mut theta: Vec<f64> = Vec::new();
    for name in HEAD {
        theta.extend(params.leaf(name).expect("put in above").to_vec().iter().map(|v| f64::from(*v)));
    }
    let mut of_encoder = Tree::new();
    for (name, leaf) in params.iter().filter(|(name, _)| !HEAD.contains(name)) {
        of_encoder.insert(name, leaf.clone());
    }
    let encoder = Encoder::new(start.spec.clone(), Weights { params: of_encoder, statistics });
    Ok((encoder, Classifier::new(&theta, classes)))
}

/// The linear layer, by torchvision's names.
const HEAD: [&str; 2] = ["fc.weight", "fc.bias"];

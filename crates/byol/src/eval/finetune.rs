//! Fine-tuning, semi-supervised (§4.2, appendix D.2) and for transfer: encoder and a new linear layer, trained on labels or a part of them.
//! Random crop and flip, SGD with Nesterov momentum 0.9, cosine learning rate, no decay; learning rate and epochs are chosen on a held-out fifth of that part.

use burn::tensor::Tensor;

use super::{
    CROP, crops, cross_entropy, embed,
    logistic::Classifier,
    measure::{Judged, Measure, Truth},
};
use crate::{
    data::{Error, Images},
    nn::{Encoder, Leaf, Mode, Pass, Precision, Tree, Weights},
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
    /// The measure with them on the held-out part, by one that did not see it.
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

/// What an image counts to where some of each class are held out: its class, of several the first, of none one of their own.
fn first_classes(truth: Truth, classes: usize) -> Vec<usize> {
    (0..truth.len()).map(|i| truth.classes(i).first().copied().unwrap_or(classes)).collect()
}

/// Which images are held out to choose by: one of `of` of each class that has several, at least one, at random.
pub(super) fn held_out(labels: &[usize], of: usize, seed: u64) -> Vec<bool> {
    let mut out = vec![false; labels.len()];
    for class in 0..=labels.iter().copied().max().unwrap_or(0) {
        let mut all: Vec<usize> = (0..labels.len()).filter(|i| labels[*i] == class).collect();
        random::shuffle(&mut random::stream(&[Domain::Split as u64, seed, class as u64, 1]), &mut all);
        let n = (all.len() / of).max(usize::from(all.len() > 1));
        all[..n].iter().for_each(|i| out[*i] = true);
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

/// Fine-tunes `start` on the images: tries every rate and number of epochs, then trains on all with the best by `measure`. `done` hears of images.
///
/// # Errors
/// [`Error::Image`] for an image that cannot be decoded any more.
///
/// # Panics
/// If the images have no labels below `classes`, the measure is not for them, or there is nothing to choose from.
pub fn choose(
    start: &Encoder,
    images: &Images,
    classes: usize,
    measure: Measure,
    p: &Protocol,
    mut done: impl FnMut(usize),
) -> Result<Tuned, Error> {
    let out = held_out(&first_classes(truth_of(images), classes), 5, p.seed);
    let rows = |of: bool| images.subset(&(0..images.len()).filter(|i| out[*i] == of).collect::<Vec<_>>());
    let (rest, test) = (rows(false), rows(true));
    let mut best: Option<(f64, f64, usize)> = None;
    let settings: Vec<(f64, usize)> = p.epochs.iter().flat_map(|e| p.rates.iter().map(move |r| (*r, *e))).collect();
    // With one setting, or no image to choose by, there is nothing to try.
    if settings.len() > 1 && !test.is_empty() {
        for (rate, epochs) in &settings {
            let (encoder, classifier) = train(start, &rest, classes, p, *rate, *epochs, &mut done)?;
            let scores = classifier.scores(&embed(&encoder, &test, |_| ())?);
            // One that has broken is chosen only where all have.
            let value = match classifier.is_finite() && scores.iter().all(|s| s.is_finite()) {
                true => Judged::new(measure, &scores, truth_of(&test), classes).of_all(),
                false => -1.0,
            };
            if best.is_none_or(|(most, ..)| value > most) {
                best = Some((value, *rate, *epochs));
            }
        }
    }
    // With nothing to choose by, the middle rate.
    let (held_out, rate, epochs) = best.unwrap_or((f64::NAN, p.rates[p.rates.len() / 2], p.epochs[0]));
    let (encoder, classifier) = train(start, images, classes, p, rate, epochs, &mut done)?;
    Ok(Tuned { encoder, classifier, rate, epochs, held_out })
}

/// Of images that were checked to have labels.
fn truth_of(images: &Images) -> Truth<'_> {
    Truth::of(images).expect("fine-tuning has labels")
}

/// Mean over the images of the sum over the classes of the binary cross-entropy: is the image of it? `logits`: `[N, classes]`, tracked.
fn each_class_by_itself(logits: Tensor<2>, tags: &[&[usize]]) -> Tensor<1> {
    let [n, classes] = logits.dims();
    // No against yes: the softmax of two has its slope everywhere, also at 0, where every logit begins.
    let yes = logits.reshape([n * classes, 1]);
    let both = Tensor::cat(vec![yes.zeros_like(), yes], 1);
    let is_of = tags.iter().flat_map(|tags| (0..classes).map(move |class| Some(usize::from(tags.contains(&class)))));
    cross_entropy(both, is_of).mul_scalar(classes as f64)
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
    let (n, truth) = (images.len(), truth_of(images));
    let (batch, device) = (batch_for(n, p.batch), start.device());
    let steps = (epochs * n / batch).max(1);
    let schedule = Schedule::cosine(rate * batch as f64 / 256.0, steps as u64);
    let features = start.features();
    let (mut params, mut statistics) = (start.weights.params.clone(), start.weights.statistics.clone());
    params.insert(HEAD[0], Leaf::new(vec![0.0; classes * features], &[classes, features], &device));
    params.insert(HEAD[1], Leaf::new(vec![0.0; classes], &[classes], &device));
    let rule = Rule::Sgd(Sgd { momentum: 0.9, weight_decay: 0.0, nesterov: true });
    let (mut optimizer, norm) = (Optimizer::new(rule, &params), start.spec.norm());
    let mut order = random::endless(Domain::Order, p.seed, n);
    for step in 0..steps {
        let some: Vec<(u64, usize)> = order.by_ref().take(batch).collect();
        let x = crops(images, &some, start.spec.size, p.seed, CROP, &device)?;
        let of: Vec<&[usize]> = some.iter().map(|(_, i)| truth.classes(*i)).collect();
        let theta = params.tracked();
        let mut pass = Pass {
            params: &theta,
            norm: &norm,
            precision: Precision::F32,
            mode: Mode::Train(&mut statistics, Ranks::ALONE),
        };
        let y = start.represent(&mut pass, x.autodiff());
        let logits = y.matmul(theta.get::<2>(HEAD[0]).transpose()) + theta.get::<1>(HEAD[1]).reshape([1, classes]);
        let loss = match truth {
            Truth::One(_) => cross_entropy(logits, of.into_iter().map(|one| one.first().copied())),
            Truth::Several(_) => each_class_by_itself(logits, &of),
        };
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

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::{
        data::synthetic,
        nn::{Architecture, EncoderSpec, Normalization, Stem, reference_eps, tree::host},
    };

    #[test]
    fn a_part_of_the_labels_is_balanced_and_grows() {
        let labels: Vec<usize> = (0..200).map(|i| if i < 150 { 0 } else { 1 + i % 2 }).collect();
        let part = |share, seed| part(&labels, 3, share, seed);
        let few = part(0.15, 7);
        let of = |part: &[usize], class: usize| part.iter().filter(|i| labels[**i] == class).count();
        assert_eq!([0, 1, 2].map(|class| of(&few, class)), [10; 3], "as many of every class, however many there are");
        let more = part(0.3, 7);
        assert!(few.iter().all(|i| more.contains(i)), "a larger part has the smaller one in it");
        assert_eq!(few, part(0.15, 7));
        assert_ne!(few, part(0.15, 8));
        assert_eq!(part(1.0, 7).len(), 200);
        assert_eq!(part(0.0001, 7).len(), 3, "at least one of each");
    }

    #[test]
    fn what_is_held_out_is_of_every_class() {
        let labels: Vec<usize> = (0..21).map(|i| if i == 0 { 2 } else { i % 2 }).collect();
        let out = held_out(&labels, 5, 0);
        let of = |class: usize| (0..21).filter(|i| out[*i] && labels[*i] == class).count();
        assert_eq!([of(0), of(1), of(2)], [2, 2, 0], "of a class with one image that stays to be learned from");
        let tags: Vec<Vec<usize>> = (0..20).map(|i| if i < 10 { vec![] } else { vec![1, 0] }).collect();
        let out = held_out(&first_classes(Truth::Several(&tags), 3), 5, 0);
        assert_eq!([0..10, 10..20].map(|of| of.filter(|i| out[*i]).count()), [2, 2]);
    }

    #[test]
    fn each_class_has_a_cross_entropy_of_its_own() {
        let logits =
            Tensor::<2>::from_data(TensorData::new(vec![0.0f32, 2.0, -1000.0, 1000.0], [2, 2]), &Device::flex());
        let logits = logits.autodiff().require_grad();
        let loss = each_class_by_itself(logits.clone(), &[&[1], &[1]]);
        let wanted = 0.5 * (2.0f64.ln() + (1.0 + (-2.0f64).exp()).ln());
        assert!((f64::from(host(loss.clone())[0]) - wanted).abs() < 1e-6, "{wanted}");
        // (σ(x) − y) / N, at 0 too.
        let slope = host(logits.grad_remove(&mut loss.backward()).unwrap());
        let sigma = 1.0 / (1.0 + (-2.0f32).exp());
        let wanted = [0.25, 0.5 * (sigma - 1.0), 0.0, 0.0];
        assert!(slope.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6), "{slope:?} {wanted:?}");
    }

    #[test]
    fn the_encoder_and_its_statistics_move_and_learn() {
        let spec = EncoderSpec {
            architecture: Architecture::Resnet18,
            width: 0.125,
            stem: Stem::Cifar,
            size: 32,
            center: 1.0,
            channels: 3,
            normalization: Normalization::default(),
            eps: reference_eps(),
        };
        let start = Encoder::random(spec, 1, &Device::flex());
        let images = synthetic::dataset(1, 96, 0).train;
        let p = Protocol { epochs: vec![12], batch: 16, rates: vec![0.5], seed: 0 };
        let before: Vec<Vec<f32>> = start.weights.params.iter().map(|(_, l)| l.to_vec()).collect();
        let tuned = choose(&start, &images, synthetic::PATTERNS.len(), Measure::Top1, &p, |_| ()).unwrap();
        let moved = tuned.encoder.weights.params.iter().zip(&before).filter(|((_, l), b)| l.to_vec() != **b).count();
        assert_eq!(moved, before.len(), "every tensor of the encoder is trained");
        let mean = |encoder: &Encoder| host(encoder.weights.statistics.get("bn1").mean.clone());
        assert_ne!(mean(&tuned.encoder), mean(&start));
        let unmoved = start.weights.params.iter().zip(&before).all(|((_, l), b)| l.to_vec() == *b);
        assert!(unmoved, "the encoder that it began with stays as it is");
        let scores = tuned.classifier.scores(&embed(&tuned.encoder, &images, |_| ()).unwrap());
        let right = Judged::new(Measure::Top1, &scores, truth_of(&images), synthetic::PATTERNS.len()).of_all();
        assert!(right > 0.33, "six classes are told apart on what was trained on: {right}");
    }
}

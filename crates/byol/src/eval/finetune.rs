//! Fine-tuning, semi-supervised (§4.2, appendix D.2) and for transfer: the encoder and a new linear
//! layer are trained on all labels or a subset. Random crops and flips, SGD with Nesterov momentum
//! 0.9, cosine learning rate, no weight decay; the learning rate and the number of epochs are
//! selected on a held-out fifth of the training images.

use burn::tensor::Tensor;

use super::{
    cross_entropy, embed,
    logistic::Classifier,
    protocol::{Labels, MetricKind, ScoredPredictions},
    random_crops,
};
use crate::{
    data::{Error, Images},
    nn::{Encoder, ForwardContext, Leaf, Mode, Precision, Tree, Weights},
    optim::{Optimizer, Rule, Schedule, Sgd},
    random::{self, Domain},
    ranks::Ranks,
};

/// The paper's base learning rates, for batch size 256.
pub const RATES: [f64; 5] = [0.005, 0.01, 0.02, 0.05, 0.1];

/// Fine-tuning protocol.
#[derive(Debug, Clone, PartialEq)]
pub struct Protocol {
    /// Numbers of epochs to select from. The paper: 30 and 50.
    pub epochs: Vec<usize>,
    /// Maximum batch size. 1024 in the paper; small data sets use an eighth of their images, so
    /// that an epoch has at least eight updates.
    pub batch: usize,
    /// Base learning rates to select from; the peak rate is base × batch / 256.
    pub rates: Vec<f64>,
    /// Seed of the image order, the crops and the held-out images.
    pub seed: u64,
}

/// Fine-tuned encoder and classifier with the selected hyperparameters.
#[derive(Debug)]
pub struct FineTuned {
    /// Fine-tuned encoder.
    pub encoder: Encoder,
    /// Classifier on the encoder's representations.
    pub classifier: Classifier,
    /// Selected base learning rate.
    pub rate: f64,
    /// Selected number of epochs.
    pub epochs: usize,
    /// Metric on the held-out images at that setting, of a model trained without them; NaN if there
    /// was nothing to select.
    pub held_out_metric: f64,
}

/// Returns the sorted indices of a class-balanced random subset of the labels: the same number from
/// every class, at least one. With the same seed, a smaller `fraction` gives a subset of a larger
/// one.
///
/// # Examples
///
/// ```
/// use byol::eval::finetune::label_subset;
///
/// let labels = [0, 0, 0, 0, 1, 1, 1, 1];
/// let half = label_subset(&labels, 2, 0.5, 7);
/// assert_eq!(half.iter().filter(|i| labels[**i] == 0).count(), 2);
/// assert_eq!(half.len(), 4);
/// ```
pub fn label_subset(labels: &[usize], classes: usize, fraction: f64, seed: u64) -> Vec<usize> {
    let per_class = (fraction * labels.len() as f64 / classes.max(1) as f64).round().max(1.0) as usize;
    let mut subset = Vec::new();
    for class in 0..classes {
        let mut members: Vec<usize> = (0..labels.len()).filter(|i| labels[*i] == class).collect();
        random::shuffle(&mut random::stream(&[Domain::Split as u64, seed, class as u64]), &mut members);
        members.truncate(if fraction >= 1.0 { members.len() } else { per_class });
        subset.extend(members);
    }
    subset.sort_unstable();
    subset
}

/// Class of each image for stratification: the first of several labels, `classes` for an image
/// without one.
fn strata(labels: Labels, classes: usize) -> Vec<usize> {
    (0..labels.len()).map(|i| labels.classes(i).first().copied().unwrap_or(classes)).collect()
}

/// Marks the images held out for selecting hyperparameters: a random 1 / `fold` of every class with
/// at least two images, at least one per class.
pub(super) fn held_out_mask(labels: &[usize], fold: usize, seed: u64) -> Vec<bool> {
    let mut mask = vec![false; labels.len()];
    for class in 0..=labels.iter().copied().max().unwrap_or(0) {
        let mut members: Vec<usize> = (0..labels.len()).filter(|i| labels[*i] == class).collect();
        random::shuffle(&mut random::stream(&[Domain::Split as u64, seed, class as u64, 1]), &mut members);
        let n = (members.len() / fold).max(usize::from(members.len() > 1));
        members[..n].iter().for_each(|i| mask[*i] = true);
    }
    mask
}

/// Batch size for `n` training images: an eighth of them, at least 16 if there are that many, at
/// most `max`.
pub fn batch_size(n: usize, max: usize) -> usize {
    max.min((n / 8).max(16)).min(n)
}

/// Number of training images [`train`] processes for `n` images, for a progress bar.
pub fn images_seen(n: usize, p: &Protocol) -> usize {
    let settings = p.rates.len() * p.epochs.len();
    let sweep: usize = p.epochs.iter().map(|e| p.rates.len() * e * (n - n / 5)).sum();
    let last = p.epochs.iter().max().copied().unwrap_or(0) * n;
    if settings > 1 { sweep + last } else { last }
}

/// Fine-tunes a copy of `start`: trains with every combination of learning rate and epochs without
/// the held-out images, then on all images with the combination that has the best held-out
/// `metric`. `on_progress` receives the number of training images processed.
///
/// # Errors
/// [`Error::Image`] for an image that can no longer be decoded.
///
/// # Panics
/// If the images have no labels below `classes`, the metric does not apply to them, or `p` has no
/// rates or epochs.
pub fn train(
    start: &Encoder,
    images: &Images,
    classes: usize,
    metric: MetricKind,
    p: &Protocol,
    mut on_progress: impl FnMut(usize),
) -> Result<FineTuned, Error> {
    images.ensure_input(start.spec.channels, &start.spec.levels)?;
    let mask = held_out_mask(&strata(require_labels(images), classes), 5, p.seed);
    let select =
        |held_out: bool| images.subset(&(0..images.len()).filter(|i| mask[*i] == held_out).collect::<Vec<_>>());
    let (kept, validation) = (select(false), select(true));
    let mut best: Option<(f64, f64, usize)> = None;
    let settings: Vec<(f64, usize)> = p.epochs.iter().flat_map(|e| p.rates.iter().map(move |r| (*r, *e))).collect();
    if settings.len() > 1 && !validation.is_empty() {
        for (rate, epochs) in &settings {
            let (encoder, classifier) = fit(start, &kept, classes, p, *rate, *epochs, &mut on_progress)?;
            let scores = classifier.scores(&embed(&encoder, &validation, |_| ())?);
            // A diverged model is selected only if all have diverged.
            let value = match classifier.is_finite() && scores.iter().all(|s| s.is_finite()) {
                true => ScoredPredictions::new(metric, &scores, require_labels(&validation), classes).metric(),
                false => -1.0,
            };
            if best.is_none_or(|(best_value, ..)| value > best_value) {
                best = Some((value, *rate, *epochs));
            }
        }
    }
    // With a single setting or no held-out image: the middle rate.
    let (held_out_metric, rate, epochs) = best.unwrap_or((f64::NAN, p.rates[p.rates.len() / 2], p.epochs[0]));
    let (encoder, classifier) = fit(start, images, classes, p, rate, epochs, &mut on_progress)?;
    Ok(FineTuned { encoder, classifier, rate, epochs, held_out_metric })
}

/// Labels of images that are known to be labeled.
fn require_labels(images: &Images) -> Labels<'_> {
    Labels::from_images(images).expect("fine-tuning needs labels")
}

/// Multi-label loss: binary cross-entropy summed over classes, averaged over images. `logits`:
/// `[N, classes]`, tracked.
fn binary_cross_entropy(logits: Tensor<2>, labels: &[&[usize]]) -> Tensor<1> {
    let [n, classes] = logits.dims();
    // A two-way softmax of 0 and the logit: its gradient is exact everywhere, including at 0, where
    // all logits start.
    let positive = logits.reshape([n * classes, 1]);
    let both = Tensor::cat(vec![positive.zeros_like(), positive], 1);
    let targets =
        labels.iter().flat_map(|labels| (0..classes).map(move |class| Some(usize::from(labels.contains(&class)))));
    cross_entropy(both, targets).mul_scalar(classes as f64)
}

/// Trains a copy of `start` with a new linear layer at one learning rate.
fn fit(
    start: &Encoder,
    images: &Images,
    classes: usize,
    p: &Protocol,
    rate: f64,
    epochs: usize,
    on_progress: &mut impl FnMut(usize),
) -> Result<(Encoder, Classifier), Error> {
    let (n, labels) = (images.len(), require_labels(images));
    let (batch, device) = (batch_size(n, p.batch), start.device());
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
        let draws: Vec<(u64, usize)> = order.by_ref().take(batch).collect();
        let x = random_crops(images, &draws, &start.spec, p.seed, &device)?;
        let batch_labels: Vec<&[usize]> = draws.iter().map(|(_, i)| labels.classes(*i)).collect();
        let theta = params.tracked();
        let mut context =
            ForwardContext::new(&theta, &norm, Precision::F32, Mode::Train(&mut statistics, Ranks::SINGLE));
        let y = start.forward(&mut context, x.autodiff());
        let logits = y.matmul(theta.get::<2>(HEAD[0]).transpose()) + theta.get::<1>(HEAD[1]).reshape([1, classes]);
        let loss = match labels {
            Labels::Single(_) => cross_entropy(logits, batch_labels.into_iter().map(|label| label.first().copied())),
            Labels::Multi(_) => binary_cross_entropy(logits, &batch_labels),
        };
        let grads = theta.gradients(&mut loss.backward());
        params = optimizer.step(&params, &grads, schedule.eta(step as u64));
        on_progress(draws.len());
    }
    let mut theta: Vec<f64> = Vec::new();
    for name in HEAD {
        theta.extend(params.leaf(name).expect("inserted above").to_vec().iter().map(|v| f64::from(*v)));
    }
    let mut encoder_params = Tree::new();
    for (name, leaf) in params.iter().filter(|(name, _)| !HEAD.contains(name)) {
        encoder_params.insert(name, leaf.clone());
    }
    let encoder = Encoder::new(start.spec.clone(), Weights { params: encoder_params, statistics });
    Ok((encoder, Classifier::new(&theta, classes)))
}

/// Parameters of the linear layer, with torchvision's names.
const HEAD: [&str; 2] = ["fc.weight", "fc.bias"];

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::{
        data::synthetic,
        nn::{Architecture, EncoderSpec, Normalization, Stem, encoder::reference_eps, tree::host},
    };

    #[test]
    fn label_subset_is_balanced_and_nested() {
        let labels: Vec<usize> = (0..200).map(|i| if i < 150 { 0 } else { 1 + i % 2 }).collect();
        let subset = |fraction, seed| label_subset(&labels, 3, fraction, seed);
        let small = subset(0.15, 7);
        let count = |subset: &[usize], class: usize| subset.iter().filter(|i| labels[**i] == class).count();
        assert_eq!([0, 1, 2].map(|class| count(&small, class)), [10; 3], "every class contributes equally");
        let large = subset(0.3, 7);
        assert!(small.iter().all(|i| large.contains(i)), "a larger subset contains the smaller one");
        assert_eq!(small, subset(0.15, 7));
        assert_ne!(small, subset(0.15, 8));
        assert_eq!(subset(1.0, 7).len(), 200);
        assert_eq!(subset(0.0001, 7).len(), 3, "at least one per class");
    }

    #[test]
    fn held_out_mask_is_stratified() {
        let labels: Vec<usize> = (0..21).map(|i| if i == 0 { 2 } else { i % 2 }).collect();
        let mask = held_out_mask(&labels, 5, 0);
        let count = |class: usize| (0..21).filter(|i| mask[*i] && labels[*i] == class).count();
        assert_eq!([count(0), count(1), count(2)], [2, 2, 0], "the only image of a class is trained on");
        let labels: Vec<Vec<usize>> = (0..20).map(|i| if i < 10 { vec![] } else { vec![1, 0] }).collect();
        let mask = held_out_mask(&strata(Labels::Multi(&labels), 3), 5, 0);
        assert_eq!([0..10, 10..20].map(|stratum| stratum.filter(|i| mask[*i]).count()), [2, 2]);
    }

    #[test]
    fn binary_cross_entropy_and_its_gradient_match_the_closed_form() {
        let logits =
            Tensor::<2>::from_data(TensorData::new(vec![0.0f32, 2.0, -1000.0, 1000.0], [2, 2]), &Device::flex());
        let logits = logits.autodiff().require_grad();
        let loss = binary_cross_entropy(logits.clone(), &[&[1], &[1]]);
        let expected = 0.5 * (2.0f64.ln() + (1.0 + (-2.0f64).exp()).ln());
        assert!((f64::from(host(loss.clone())[0]) - expected).abs() < 1e-6, "{expected}");
        // (σ(x) − y) / N, also at 0.
        let gradient = host(logits.grad_remove(&mut loss.backward()).unwrap());
        let sigma = 1.0 / (1.0 + (-2.0f32).exp());
        let expected = [0.25, 0.5 * (sigma - 1.0), 0.0, 0.0];
        assert!(gradient.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{gradient:?} {expected:?}");
    }

    #[test]
    fn trains_every_encoder_tensor_and_fits_the_training_images() {
        let spec = EncoderSpec {
            architecture: Architecture::Resnet18,
            width: 0.125,
            stem: Stem::Cifar,
            size: 32,
            center: 1.0,
            antialias: false,
            channels: 3,
            normalization: Normalization::default(),
            eps: reference_eps(),
            levels: crate::data::Levels::default(),
        };
        let start = Encoder::random(spec, 1, &Device::flex());
        let images = synthetic::dataset(1, 96, 0).train;
        let p = Protocol { epochs: vec![12], batch: 16, rates: vec![0.5], seed: 0 };
        let before: Vec<Vec<f32>> = start.weights.params.iter().map(|(_, l)| l.to_vec()).collect();
        let tuned = train(&start, &images, synthetic::PATTERNS.len(), MetricKind::Top1, &p, |_| ()).unwrap();
        let changed = tuned.encoder.weights.params.iter().zip(&before).filter(|((_, l), b)| l.to_vec() != **b).count();
        assert_eq!(changed, before.len(), "every tensor of the encoder is trained");
        let mean = |encoder: &Encoder| host(encoder.weights.statistics.get("bn1").mean.clone());
        assert_ne!(mean(&tuned.encoder), mean(&start));
        let unchanged = start.weights.params.iter().zip(&before).all(|((_, l), b)| l.to_vec() == *b);
        assert!(unchanged, "the original encoder is unchanged");
        let scores = tuned.classifier.scores(&embed(&tuned.encoder, &images, |_| ()).unwrap());
        let predictions =
            ScoredPredictions::new(MetricKind::Top1, &scores, require_labels(&images), synthetic::PATTERNS.len());
        assert!(predictions.metric() > 0.33, "six classes are fitted: {}", predictions.metric());
    }
}

//! Health checks: metrics of the online network on the monitoring images at the end of every epoch,
//! and the failures that they reveal.
//!
//! The network runs in evaluation mode and is not modified.

use std::{fmt, time::Instant};

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    byol::{Byol, l2_normalize},
    data::{Error, Images},
    eval::{
        self, Features, effective_rank, knn,
        label_free::{self, Comparison, LabelFreeMetrics},
    },
    nn::{Encoder, EncoderSpec, ForwardContext, Mode, Precision, tree::host},
    views::Policy,
};

use super::recipe::HealthConfig;

/// Setup of the health checks.
#[derive(Debug, Clone)]
pub struct Monitor {
    /// Monitoring images.
    pub held_out: Images,
    /// Training images of the kNN classifier; `None` unless both sides have labels.
    pub bank: Option<Images>,
    /// Number of classes.
    pub classes: usize,
    /// k and temperature of the kNN classifier.
    pub config: HealthConfig,
    /// Augmentations T and T′.
    pub policies: [Policy; 2],
    /// Side of training views in pixels.
    pub size: usize,
    /// Seed of the views of the label-free metrics.
    pub seed: u64,
    /// Images of the label-free metrics: few enough to cost below 1 % of an epoch.
    pub label_free_images: usize,
    /// Encoder, which determines the evaluation views.
    pub spec: EncoderSpec,
}

/// Metrics of a network on the monitoring images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Monitoring images; 0 in files of older versions.
    #[serde(default)]
    pub images: usize,
    /// Standard deviation of the L2-normalized projections, averaged over channels. Near 1/√D for
    /// uniformly distributed, near 0 for constant projections.
    pub projection_std: f64,
    /// 1/√D, the value for a uniform distribution.
    pub projection_std_ideal: f64,
    /// Mean cosine similarity of the projections of different images. Near 0 for uniformly
    /// distributed, near 1 for constant projections.
    pub projection_cosine: f64,
    /// RankMe of the representations, in [1, min(N, F)].
    pub rankme: f64,
    /// RankMe of the L2-normalized representations, which unlike RankMe is robust
    /// to a single representation of large norm. NaN in files of older versions.
    #[serde(default = "effective_rank::not_recorded")]
    pub directions: f64,
    /// Label-free metrics, of some of the monitoring images.
    #[serde(default, skip_serializing_if = "Option::is_none", alias = "card")]
    pub label_free: Option<LabelFreeMetrics>,
    /// Weighted kNN accuracy in [0, 1]; `None` without labels.
    pub knn: Option<f64>,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// All images have the same projection: the trivial solution of the paper (§3.2).
    Constant,
    /// The representations span few dimensions.
    Dimensional,
    /// The loss is above chance level, or NaN.
    Diverged,
    /// Predictions are barely better than chance: the predictor lags behind.
    PredictorLag,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            FailureKind::Constant => "constant collapse",
            FailureKind::Dimensional => "dimensional collapse",
            FailureKind::Diverged => "divergence",
            FailureKind::PredictorLag => "predictor lag",
        })
    }
}

/// A detected failure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// Kind of failure.
    pub kind: FailureKind,
    /// Evidence, in words.
    pub why: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.why)
    }
}

/// Steps before the checks against fixed thresholds: at random initialization all images have
/// nearly the same projection.
pub(super) const SETTLING_STEPS: u64 = 200;

/// Images that a collapse check needs: fewer span few directions for any network.
pub const MIN_IMAGES: usize = 16;

/// Steps after which the predictor must predict better than chance.
const PREDICTOR_STEPS: u64 = 500;

/// Threshold of constant collapse, as a fraction of the std of uniformly distributed projections.
/// The healthy runs of the tests have 0.6 or more.
const MIN_STD_RATIO: f64 = 0.25;

/// Thresholds of constant collapse in the first steps: std as a fraction of the initial one, and
/// dimensions of the representations.
const EARLY_STD_RATIO: f64 = 0.1;
const EARLY_DIRECTIONS: f64 = 1.2;

/// Threshold of constant collapse, as mean cosine similarity of the projections of different
/// images. Healthy runs have 0.5 or less.
const MAX_COSINE: f64 = 0.75;

/// Loss of uncorrelated projections.
const CHANCE_LOSS: f64 = 4.0;

impl Health {
    /// Metrics of a network with non-finite outputs. `dim` is the dimension of a projection.
    fn non_finite(images: usize, dim: usize) -> Health {
        Health {
            images,
            projection_std: f64::NAN,
            projection_std_ideal: 1.0 / (dim as f64).sqrt(),
            projection_cosine: f64::NAN,
            rankme: f64::NAN,
            directions: f64::NAN,
            label_free: None,
            knn: None,
        }
    }

    /// Returns the failure at `step`, if any. `initial` are the metrics before the first step;
    /// `loss` is BYOL's mean loss of the epoch, `None` for another objective.
    pub fn failure(&self, initial: Option<&Health>, loss: Option<f64>, step: u64) -> Option<Failure> {
        let failure = |kind, why: String| Some(Failure { kind, why });
        if !(self.projection_std.is_finite() && self.rankme.is_finite()) {
            return failure(FailureKind::Diverged, "the projections contain NaN or infinity".into());
        }
        if step < SETTLING_STEPS {
            return initial.filter(|_| self.images >= MIN_IMAGES).and_then(|initial| self.early_collapse(initial));
        }
        if let Some(loss) = loss.filter(|loss| *loss > 1.1 * CHANCE_LOSS) {
            return failure(
                FailureKind::Diverged,
                format!("loss {loss:.2} is above the chance level of {CHANCE_LOSS}"),
            );
        }
        if self.images >= MIN_IMAGES
            && let Some(collapse) = self.collapse(initial)
        {
            return Some(collapse);
        }
        if let Some(loss) = loss.filter(|loss| step > PREDICTOR_STEPS && *loss > 0.8 * CHANCE_LOSS) {
            let why = format!("loss {loss:.2} after {step} steps is near the chance level of {CHANCE_LOSS}");
            return failure(FailureKind::PredictorLag, why);
        }
        None
    }

    /// Collapse within the first steps. The initial projections are nearly constant too, and those
    /// of tiny runs pass through small spreads, so the representations must agree.
    fn early_collapse(&self, initial: &Health) -> Option<Failure> {
        let (std, before) = (self.projection_std, initial.projection_std);
        let one_dimension = self.directions < EARLY_DIRECTIONS && self.directions < initial.directions / 4.0;
        (std < EARLY_STD_RATIO * before && one_dimension).then(|| Failure {
            kind: FailureKind::Constant,
            why: format!("all images have nearly the same projection (std {std:.1e}, {before:.1e} at the start)"),
        })
    }

    /// Constant collapse of the projections, or dimensional collapse of the representations.
    fn collapse(&self, initial: Option<&Health>) -> Option<Failure> {
        let failure = |kind, why: String| Some(Failure { kind, why });
        if self.projection_std < MIN_STD_RATIO * self.projection_std_ideal {
            let (std, ideal) = (self.projection_std, self.projection_std_ideal);
            let why = format!("all images have nearly the same projection (std {std:.4}; uniform: {ideal:.4})");
            return failure(FailureKind::Constant, why);
        }
        if self.projection_cosine > MAX_COSINE {
            let why = format!("projections of different images have cosine similarity {:.3}", self.projection_cosine);
            return failure(FailureKind::Constant, why);
        }
        let min = initial.map_or(2.0, |initial| (initial.directions / 4.0).max(2.0));
        if self.directions < min {
            let why = format!(
                "the representations span {:.1} dimensions, fewer than 2 or a quarter of the initial number",
                self.directions
            );
            return failure(FailureKind::Dimensional, why);
        }
        None
    }
}

/// Comparison of a run's last epoch with the weights it began with.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The comparison.
    pub comparison: Comparison,
    /// The comparison in words, with the values.
    pub text: String,
}

impl Verdict {
    /// Compares by kNN accuracy if there are labels, else by the label-free metrics. `baseline` is
    /// how the text calls the initial weights. `None` if neither was recorded, or for fewer than
    /// [`MIN_IMAGES`] images.
    pub fn new(initial: &Health, last: &Health, baseline: &str) -> Option<Verdict> {
        if last.images < MIN_IMAGES {
            return None;
        }
        let (Some(before), Some(after)) = (initial.knn, last.knn) else {
            let (before, after) = (initial.label_free?, last.label_free?);
            let text = after.verdict(&before, baseline);
            return Some(Verdict { comparison: after.compare(&before), text });
        };
        let variance = |p: f64| p * (1.0 - p) / initial.images.max(1) as f64;
        let noise = 2.0 * (variance(before) + variance(after)).sqrt();
        let (comparison, result) = match after - before {
            gain if gain > noise => (Comparison::Better, "better than"),
            gain if gain < -noise => (Comparison::Worse, "worse than"),
            _ => (Comparison::Same, "within the sampling error of"),
        };
        let (images, before, after) = (initial.images, 100.0 * before, 100.0 * after);
        let text = format!(
            "{result} {baseline}: kNN accuracy {after:.1} % against {before:.1} % on {images} monitoring images"
        );
        Some(Verdict { comparison, text })
    }
}

/// Cost of a health check, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct HealthSeconds {
    /// All metrics, including kNN.
    pub health: f64,
    /// Label-free metrics.
    pub label_free: f64,
}

/// Evaluates the metrics. Also returns their cost.
///
/// # Errors
/// [`Error::Image`] if an image is no longer readable.
pub fn evaluate(byol: &Byol, monitor: &Monitor, device: &Device) -> Result<(Health, HealthSeconds), Error> {
    let began = Instant::now();
    let (representations, projections) = forward(byol, &monitor.held_out, &monitor.spec, device)?;
    if !(representations.is_finite() && projections.is_finite()) {
        let cost = HealthSeconds { health: began.elapsed().as_secs_f64(), label_free: 0.0 };
        return Ok((Health::non_finite(projections.n, projections.dim), cost));
    }
    // Images without labels count for the other metrics only.
    let held_out = &monitor.held_out;
    let (labeled, labels): (Vec<usize>, Vec<usize>) =
        (0..held_out.len()).filter_map(|i| Some((i, held_out.label(i)?))).unzip();
    let knn = match &monitor.bank {
        Some(bank) if !labels.is_empty() => {
            let (bank_features, _) = forward(byol, bank, &monitor.spec, device)?;
            let bank_labels = bank.labels().expect("a bank has labels");
            let queries = representations.subset(&labeled);
            let HealthConfig { k, temperature, .. } = monitor.config;
            Some(
                knn::classify(&bank_features, bank_labels, &queries, &labels, monitor.classes, k, temperature).accuracy,
            )
        }
        _ => None,
    };
    let all = summarize(&representations, &projections, knn);
    let before = Instant::now();
    let health = Health { label_free: label_free_metrics(byol, monitor, &representations)?, ..all };
    Ok((health, HealthSeconds { health: began.elapsed().as_secs_f64(), label_free: before.elapsed().as_secs_f64() }))
}

/// Label-free metrics of evenly sampled monitoring images.
fn label_free_metrics(
    byol: &Byol,
    monitor: &Monitor,
    representations: &Features,
) -> Result<Option<LabelFreeMetrics>, Error> {
    let (all, n) = (monitor.held_out.len(), monitor.label_free_images.min(monitor.held_out.len()));
    if n < 2 {
        return Ok(None);
    }
    let sample: Vec<usize> = (0..n).map(|i| i * all / n).collect();
    // θ's tensors are shared, not copied.
    let encoder = Encoder::new(monitor.spec.clone(), byol.online.clone());
    let views = label_free::ViewConfig {
        policies: [&monitor.policies[0], &monitor.policies[1]],
        size: monitor.size,
        seed: monitor.seed,
    };
    label_free::measure(&encoder, &monitor.held_out.subset(&sample), &representations.subset(&sample), views).map(Some)
}

/// Metrics of representations and L2-normalized projections.
pub(crate) fn summarize(representations: &Features, projections: &Features, knn: Option<f64>) -> Health {
    let (n, d) = (projections.n as f64, projections.dim);
    let mut sum = vec![0.0f64; d];
    let mut squares = vec![0.0f64; d];
    for i in 0..projections.n {
        for ((s, q), v) in sum.iter_mut().zip(&mut squares).zip(projections.row(i)) {
            *s += f64::from(*v);
            *q += f64::from(*v).powi(2);
        }
    }
    let std = |(s, q): (&f64, &f64)| (q / n - (s / n).powi(2)).max(0.0).sqrt();
    let projection_std = sum.iter().zip(&squares).map(std).sum::<f64>() / d as f64;
    Health {
        images: projections.n,
        projection_std,
        projection_std_ideal: 1.0 / (d as f64).sqrt(),
        projection_cosine: label_free::mean_cosine(projections),
        rankme: effective_rank::rankme(representations),
        directions: effective_rank::rankme_normalized(representations),
        label_free: None,
        knn,
    }
}

/// Representations and L2-normalized projections of the evaluation views.
fn forward(byol: &Byol, images: &Images, spec: &EncoderSpec, device: &Device) -> Result<(Features, Features), Error> {
    let net = &byol.network;
    let (mut y_all, mut z_all) = (Vec::new(), Vec::new());
    eval::for_each_batch(images, spec, device, |x: Tensor<4>| {
        let mode = Mode::Eval(&byol.online.statistics);
        let mut context = ForwardContext::new(&byol.online.params, &net.norm, Precision::F32, mode);
        let y = net.encode(&mut context, x);
        z_all.extend(host(l2_normalize(net.projector.forward(&mut context, y.clone()))));
        y_all.extend(host(y));
    })?;
    let features = |values: Vec<f32>| Features { n: images.len(), dim: values.len() / images.len().max(1), values };
    Ok((features(y_all), features(z_all)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[[f32; 2]]) -> Features {
        Features { n: rows.len(), dim: 2, values: rows.concat() }
    }

    #[test]
    fn verdict_compares_the_last_epoch_with_the_first() {
        let spread = rows(&[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]].repeat(128));
        let health = |knn| summarize(&spread, &spread, knn);
        let verdict = |before, after| Verdict::new(&health(Some(before)), &health(Some(after)), "the start").unwrap();
        assert_eq!(verdict(0.352, 0.5).comparison, Comparison::Better);
        assert_eq!(verdict(0.352, 0.37).comparison, Comparison::Same, "within chance");
        let worse = verdict(0.352, 0.282);
        assert_eq!(worse.comparison, Comparison::Worse);
        let text = "worse than the start: kNN accuracy 28.2 % against 35.2 % on 512 monitoring images";
        assert_eq!(worse.text, text);
        assert_eq!(Verdict::new(&health(None), &health(None), "the start"), None, "nothing to compare");
    }

    #[test]
    fn detects_each_kind_of_failure() {
        let constant = rows(&[[1.0, 0.0]; 16]);
        let spread = rows(&[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]].repeat(4));
        let bad = summarize(&constant, &constant, None);
        assert!((bad.projection_cosine - 1.0).abs() < 1e-9 && bad.projection_std < 1e-9);
        assert_eq!(bad.failure(None, None, 1000).map(|f| f.kind), Some(FailureKind::Constant));
        assert_eq!(bad.failure(None, None, 10), None, "random initialization looks the same");
        let early = bad.failure(Some(&Health { directions: 8.0, ..summarize(&spread, &spread, None) }), None, 10);
        assert_eq!(early.map(|f| f.kind), Some(FailureKind::Constant), "much less than at the start");
        let few = Health { images: MIN_IMAGES - 1, ..bad.clone() };
        assert_eq!(few.failure(None, Some(1.0), 1000), None, "too few images to judge");
        assert_eq!(
            few.failure(None, Some(4.5), 1000).map(|f| f.kind),
            Some(FailureKind::Diverged),
            "the loss is still judged"
        );
        let good = summarize(&spread, &spread, None);
        assert!((good.projection_std - good.projection_std_ideal).abs() < 1e-9);
        assert!((good.rankme - 2.0).abs() < 1e-3);
        assert!(good.projection_cosine < 0.0);
        let good = Health { directions: 4.0, ..good };
        let kind = |loss: f64, start: Option<&Health>| good.failure(start, Some(loss), 1000).map(|f| f.kind);
        assert_eq!(kind(1.0, None), None);
        assert_eq!(kind(3.5, None), Some(FailureKind::PredictorLag));
        assert_eq!(kind(4.5, None), Some(FailureKind::Diverged));
        let wide = Health { directions: 20.0, ..good.clone() };
        assert_eq!(kind(1.0, Some(&wide)), Some(FailureKind::Dimensional));
        let broken = Health::non_finite(64, 2);
        assert_eq!(broken.failure(None, None, 1).map(|f| f.kind), Some(FailureKind::Diverged));
    }

    #[test]
    fn a_single_large_norm_is_not_a_collapse() {
        let row = |i: usize| (0..32).map(move |j| if i % 32 == j { if i == 0 { 3e3 } else { 1.0 } } else { 0.1 });
        let long = Features { n: 64, dim: 32, values: (0..64).flat_map(row).collect() };
        let (start, now) = (
            summarize(&long.l2_normalized(), &long.l2_normalized(), None),
            summarize(&long, &long.l2_normalized(), None),
        );
        assert!(now.rankme < start.rankme / 4.0, "{} of {}", now.rankme, start.rankme);
        assert_eq!(now.failure(Some(&start), Some(1.0), 1000), None);
        let metrics: LabelFreeMetrics = serde_json::from_value(serde_json::json!({
            "rankme": 1.5, "lidar": 9.0, "alpha_req": 1.0, "uniformity": -1.0, "alignment": 0.5, "retrieval": 0.5,
            "consistency": 0.5, "cosine": 0.5, "directions": now.directions,
        }))
        .unwrap();
        assert!(metrics.score() > 0.0);
    }
}

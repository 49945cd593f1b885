//! Label-free metrics: representation quality without labels.
//!
//! They are compared with those of a randomly initialized network, which scores high on some of
//! them.

use serde::{Deserialize, Serialize};

use super::{
    Features,
    alignment_uniformity::{alignments, top1_self, uniformity},
    batch_size, effective_rank, knn,
    metrics::mean,
    render_views,
};
use crate::{
    data::{Error, Images},
    nn::{Encoder, tree::host},
    views::Policy,
};

/// Label-free metrics of one encoder on a set of images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LabelFreeMetrics {
    /// RankMe of the representations, from 1 to min(N, F): effective number of dimensions.
    pub rankme: f64,
    /// RankMe of the L2-normalized representations; NaN in files written before it was recorded.
    #[serde(default = "effective_rank::not_recorded")]
    pub directions: f64,
    /// LiDAR, at least 1: effective number of directions in which images differ more than the views
    /// of one image do.
    pub lidar: f64,
    /// α-ReQ, the decay exponent of the spectrum; about 1 is best, larger values mean few effective
    /// directions. `None` if there is a single eigenvalue.
    pub alpha_req: Option<f64>,
    /// Uniformity: ln of the mean of exp(−2 d²) over pairs, at most 0. Lower is more evenly spread.
    pub uniformity: f64,
    /// Alignment: mean squared distance between two views of an image, in [0, 4].
    pub alignment: f64,
    /// View retrieval: fraction of views whose nearest image among all N is their own.
    pub retrieval: f64,
    /// Neighbor preservation: fraction of an image's ten nearest neighbors that its view has too.
    pub consistency: f64,
    /// Mean cosine between different images.
    pub cosine: f64,
    /// Number of images; 0 in files written before it was recorded.
    #[serde(default)]
    pub images: usize,
    /// Standard errors of `retrieval` and `consistency` over images; 0 in files written before they
    /// were recorded.
    #[serde(default, rename = "errors")]
    pub standard_errors: [f64; 2],
}

const RETRIEVAL: &str = "view retrieval";
const CONSISTENCY: &str = "neighbor preservation";
const ALIGNMENT: &str = "alignment";

/// Per-image values of the metrics that are means over images, for confidence intervals.
#[derive(Debug, Clone, PartialEq)]
pub struct PerImageMetrics {
    /// Values of [`LabelFreeMetrics::alignment`].
    pub alignment: Vec<f64>,
    /// Values of [`LabelFreeMetrics::retrieval`].
    pub retrieval: Vec<f64>,
    /// Values of [`LabelFreeMetrics::consistency`].
    pub consistency: Vec<f64>,
}

impl PerImageMetrics {
    /// Returns the values of a metric by its name in [`LabelFreeMetrics::named_values`]; `None` if
    /// it is not a mean over images.
    pub fn get(&self, metric: &str) -> Option<&[f64]> {
        match metric {
            ALIGNMENT => Some(&self.alignment),
            RETRIEVAL => Some(&self.retrieval),
            CONSISTENCY => Some(&self.consistency),
            _ => None,
        }
    }
}

/// Augmented views the metrics are computed on.
#[derive(Debug, Clone, Copy)]
pub struct ViewConfig<'a> {
    /// Augmentation policies T and T′.
    pub policies: [&'a Policy; 2],
    /// Side in pixels.
    pub size: usize,
    /// Random seed.
    pub seed: u64,
}

/// Views per image.
const VIEWS: usize = 4;

/// Neighbors compared per image; fewer than 40 images use a quarter of their number.
const NEIGHBORS: usize = 10;

/// First view number in the random stream of an image, above those of pretraining and the other
/// evaluations.
const FIRST_VIEW: u64 = 16;

/// Computes the label-free metrics. `representations` are those of the images' evaluation views
/// ([`super::embed`]).
///
/// # Errors
/// [`Error::Image`] for an image that can no longer be decoded.
///
/// # Examples
///
/// ```no_run
/// use byol::{Dataset, Encoder, Recipe, eval::{self, label_free}};
///
/// let encoder = Encoder::open("byol-runs/photos")?;
/// let images = Dataset::open("photos")?.train.sample_random(512);
/// let recipe = Recipe::named("imagenette")?.check()?;
/// let config = label_free::ViewConfig { policies: [&recipe.views.first, &recipe.views.second], size: 128, seed: 0 };
/// let metrics = label_free::measure(&encoder, &images, &eval::embed(&encoder, &images, |_| ())?, config)?;
/// println!("RankMe {:.1}, score {:.3}", metrics.rankme, metrics.score());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn measure(
    encoder: &Encoder,
    images: &Images,
    representations: &Features,
    config: ViewConfig,
) -> Result<LabelFreeMetrics, Error> {
    Ok(measure_per_image(encoder, images, representations, config)?.0)
}

/// [`measure`], with the per-image values.
///
/// # Errors
/// See [`measure`].
pub fn measure_per_image(
    encoder: &Encoder,
    images: &Images,
    representations: &Features,
    config: ViewConfig,
) -> Result<(LabelFreeMetrics, PerImageMetrics), Error> {
    let views = embed_views(encoder, images, config)?;
    let nth_views = |k: usize| views.subset(&(0..images.len()).map(|i| i * VIEWS + k).collect::<Vec<_>>());
    let (first, second) = (nth_views(0), nth_views(1));
    let retrieved = top1_self(&first, representations).into_iter().map(|hit| f64::from(u8::from(hit)));
    let per_image = PerImageMetrics {
        alignment: alignments(&first, &second),
        retrieval: retrieved.collect(),
        consistency: neighbor_preservation(&first, representations),
    };
    let mean = |values: &[f64]| mean(values.iter().copied());
    let metrics = LabelFreeMetrics {
        rankme: effective_rank::rankme(representations),
        directions: effective_rank::rankme_normalized(representations),
        lidar: if images.len() > 1 { effective_rank::lidar(&views, VIEWS) } else { 1.0 },
        alpha_req: effective_rank::alpha_req(representations, 1, representations.n.min(representations.dim)),
        uniformity: uniformity(representations),
        alignment: mean(&per_image.alignment),
        retrieval: mean(&per_image.retrieval),
        consistency: mean(&per_image.consistency),
        cosine: mean_cosine(representations),
        images: representations.n,
        standard_errors: [standard_error(&per_image.retrieval), standard_error(&per_image.consistency)],
    };
    Ok((metrics, per_image))
}

/// Standard error of the mean.
fn standard_error(values: &[f64]) -> f64 {
    let (n, average) = (values.len() as f64, mean(values.iter().copied()));
    if n < 2.0 { 0.0 } else { (mean(values.iter().map(|v| (v - average).powi(2))) / (n - 1.0)).sqrt() }
}

/// Representations of [`VIEWS`] views per image in adjacent rows, T and T′ alternating.
fn embed_views(encoder: &Encoder, images: &Images, config: ViewConfig) -> Result<Features, Error> {
    let (size, device) = (config.size, encoder.device());
    let stream = |i: usize, k: usize| [config.seed, 0, i as u64, FIRST_VIEW + k as u64];
    let image_views = |i: usize| (0..VIEWS).map(move |k| (i, stream(i, k), config.policies[k % 2]));
    let requests: Vec<_> = (0..images.len()).flat_map(image_views).collect();
    let mut values = Vec::with_capacity(requests.len() * encoder.features());
    for batch in requests.chunks(batch_size(size)) {
        values.extend(host(encoder.embed(render_views(images, batch, size, &device)?)));
    }
    Ok(Features { n: requests.len(), dim: encoder.features(), values })
}

/// For each image, the fraction of its nearest neighbors that its view has too; the image itself is
/// excluded from both.
fn neighbor_preservation(views: &Features, images: &Features) -> Vec<f64> {
    let (views, images) = (views.l2_normalized(), images.l2_normalized());
    let k = NEIGHBORS.min((images.n / 4).max(1));
    let neighbors = |queries: &Features| -> Vec<Vec<usize>> {
        let nearest = knn::nearest(&images, queries, k + 1);
        let others = |(i, nearest): (usize, Vec<(usize, f32)>)| {
            nearest.into_iter().map(|(j, _)| j).filter(|j| *j != i).take(k).collect()
        };
        nearest.into_iter().enumerate().map(others).collect()
    };
    let overlap =
        |(a, b): (Vec<usize>, Vec<usize>)| a.iter().filter(|j| b.contains(j)).count() as f64 / a.len().max(1) as f64;
    neighbors(&images).into_iter().zip(neighbors(&views)).map(overlap).collect()
}

/// Mean cosine over pairs of different rows.
pub(crate) fn mean_cosine(x: &Features) -> f64 {
    let (x, mut sum) = (x.l2_normalized(), vec![0.0f64; x.dim]);
    let mut squares = 0.0;
    for i in 0..x.n {
        for (s, v) in sum.iter_mut().zip(x.row(i)) {
            *s += f64::from(*v);
            squares += f64::from(*v).powi(2);
        }
    }
    // Σ over all pairs i ≠ j of xᵢ·xⱼ is |Σ xᵢ|² − Σ |xᵢ|².
    let sum_squared: f64 = sum.iter().map(|s| s * s).sum();
    let n = x.n as f64;
    if x.n > 1 { (sum_squared - squares) / (n * (n - 1.0)) } else { 0.0 }
}

/// Comparison of an encoder with another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// All images have nearly the same representation.
    Collapsed,
    /// Better.
    Better,
    /// The difference is within chance, or too small to matter.
    Same,
    /// Worse.
    Worse,
    /// Better in one metric, worse in another.
    Mixed,
}

/// Relative differences of `retrieval` and `consistency` that are too small to matter even when
/// they are significant.
const MIN_RELATIVE_DIFFERENCE: [f64; 2] = [0.25, 0.1];

impl LabelFreeMetrics {
    /// Metrics with their display names, as (name, value, is a fraction).
    pub fn named_values(&self) -> [(&'static str, f64, bool); 8] {
        [
            (RETRIEVAL, self.retrieval, true),
            (CONSISTENCY, self.consistency, true),
            ("LiDAR", self.lidar, false),
            ("RankMe", self.rankme, false),
            ("α-ReQ", self.alpha_req.unwrap_or(f64::NAN), false),
            (ALIGNMENT, self.alignment, false),
            ("uniformity", self.uniformity, false),
            ("cosine of different images", self.cosine, false),
        ]
    }

    /// Score for comparing encoders, higher is better: the neighbor preservation, or 0 for a
    /// collapsed encoder, to which all images are equal neighbors. Of all label-free metrics it
    /// agrees best with labels on the seven encoders of docs/log/cifar10.md, and no worse than the
    /// others over the epochs of a run.
    pub fn score(&self) -> f64 {
        if self.is_collapsed() { 0.0 } else { self.consistency }
    }

    /// Returns true if the encoder maps all images to nearly the same direction.
    fn is_collapsed(&self) -> bool {
        self.cosine > 0.98 || self.directions < 2.0
    }

    /// Compares view retrieval and neighbor preservation with those of another encoder.
    pub fn compare(&self, baseline: &LabelFreeMetrics) -> Comparison {
        if self.is_collapsed() {
            return Comparison::Collapsed;
        }
        let pairs = [(self.retrieval, baseline.retrieval), (self.consistency, baseline.consistency)];
        // Sign of each difference that matters, and whether it is significant: beyond two standard
        // errors. These are added as if the images were independent samples, which is conservative.
        let differences: [(f64, bool); 2] = std::array::from_fn(|i| {
            let (own, other) = pairs[i];
            let relative = own / other.max(1e-9) - 1.0;
            let sign = if relative.abs() > MIN_RELATIVE_DIFFERENCE[i] { relative.signum() } else { 0.0 };
            let noise = 2.0 * self.standard_errors[i].hypot(baseline.standard_errors[i]);
            (sign, (own - other).abs() > noise)
        });
        // A verdict must not contradict the other metric, even where that is not significant.
        let has = |sign: f64| differences.iter().any(|(other, _)| *other == sign);
        let is_significant = |sign: f64| differences.contains(&(sign, true));
        match (is_significant(1.0), is_significant(-1.0)) {
            (false, false) => Comparison::Same,
            (true, _) if has(-1.0) => Comparison::Mixed,
            (_, true) if has(1.0) => Comparison::Mixed,
            (true, _) => Comparison::Better,
            (false, true) => Comparison::Worse,
        }
    }

    /// Compares these metrics with those of another encoder in one sentence. `baseline_name` is how
    /// the sentence calls the other encoder.
    pub fn verdict(&self, baseline: &LabelFreeMetrics, baseline_name: &str) -> String {
        let values = format!(
            "{RETRIEVAL} {:.1} % against {:.1} %, {CONSISTENCY} {:.1} % against {:.1} %",
            100.0 * self.retrieval,
            100.0 * baseline.retrieval,
            100.0 * self.consistency,
            100.0 * baseline.consistency
        );
        let sample = if self.images > 0 { format!(" on {} images", self.images) } else { String::new() };
        match self.compare(baseline) {
            Comparison::Collapsed => format!(
                "collapsed: all images have nearly the same representation (mean cosine {:.3}, {:.1} dimensions)",
                self.cosine, self.directions
            ),
            Comparison::Same => format!("no better than {baseline_name}{sample}: {values}"),
            Comparison::Better => format!("better than {baseline_name}{sample}: {values}"),
            Comparison::Worse => format!("worse than {baseline_name}{sample}: {values}"),
            Comparison::Mixed => {
                format!("better than {baseline_name} in one metric, worse in the other{sample}: {values}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(retrieval: f64, consistency: f64) -> LabelFreeMetrics {
        LabelFreeMetrics {
            rankme: 20.0,
            directions: 25.0,
            lidar: 30.0,
            alpha_req: Some(1.0),
            uniformity: -2.0,
            alignment: 0.5,
            retrieval,
            consistency,
            cosine: 0.2,
            images: 512,
            standard_errors: [0.02, 0.01],
        }
    }

    #[test]
    fn verdict_covers_every_outcome() {
        let baseline = metrics(0.2, 0.3);
        let starts_with = |metrics: LabelFreeMetrics, prefix: &str| {
            let verdict = metrics.verdict(&baseline, "random initialization");
            assert!(verdict.starts_with(prefix), "{verdict}");
        };
        starts_with(metrics(0.2, 0.31), "no better than random initialization");
        starts_with(metrics(0.6, 0.5), "better than random initialization on 512 images:");
        starts_with(metrics(0.1, 0.3), "worse than random initialization");
        starts_with(metrics(0.6, 0.2), "better than random initialization in one metric");
        // The lower retrieval is not significant.
        let wide = LabelFreeMetrics { standard_errors: [0.03, 0.01], ..metrics(0.14, 0.4) };
        starts_with(wide, "better than random initialization in one metric, worse in the other");
        starts_with(LabelFreeMetrics { cosine: 0.99, ..metrics(0.9, 0.9) }, "collapsed");
        starts_with(
            LabelFreeMetrics { images: 16, standard_errors: [0.12, 0.06], ..metrics(0.3, 0.4) },
            "no better than random initialization on 16 images",
        );
        assert_eq!(
            LabelFreeMetrics { directions: 1.0, ..metrics(1.0, 1.0) }.score(),
            0.0,
            "a collapsed network preserves all neighbors"
        );
    }

    #[test]
    fn standard_error_is_that_of_the_mean() {
        let values: Vec<f64> = (0..10).map(|i| f64::from(i % 2)).collect();
        assert!((standard_error(&values) - (0.25f64 / 9.0).sqrt()).abs() < 1e-12);
        assert_eq!(standard_error(&[3.0]), 0.0);
    }

    #[test]
    fn mean_cosine_excludes_self_pairs_and_identical_views_preserve_neighbors() {
        let cross = Features { n: 4, dim: 2, values: vec![1.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0, -1.0] };
        assert!((mean_cosine(&cross) + 1.0 / 3.0).abs() < 1e-6);
        assert_eq!(neighbor_preservation(&cross, &cross), vec![1.0; cross.n]);
    }
}

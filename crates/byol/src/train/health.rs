//! Is it working? Figures on a fixed held-out set of images, at the end of every epoch, and what they mean in words.
//!
//! They use the online network in evaluation mode and change nothing in it.

use std::{fmt, time::Instant};

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    byol::{Byol, unit},
    data::{Error, Images},
    eval::{
        self, Features,
        card::{self, Card},
        knn, spectrum,
    },
    nn::{Encoder, EncoderSpec, Mode, Pass, Precision, tree::host},
    views::Policy,
};

use super::recipe::HealthConfig;

/// What is watched.
#[derive(Debug, Clone)]
pub struct Watch {
    /// The held-out images.
    pub held_out: Images,
    /// Training images that the kNN votes among; only with labels on both sides.
    pub bank: Option<Images>,
    /// How many classes.
    pub classes: usize,
    /// k and T.
    pub config: HealthConfig,
    /// T and T′.
    pub policies: [Policy; 2],
    /// Side of the views in training.
    pub size: usize,
    /// Names the views of the report card.
    pub seed: u64,
    /// Images of the report card: so few that it costs less than a hundredth of an epoch.
    pub card: usize,
    /// What the evaluation views are for.
    pub spec: EncoderSpec,
}

/// Figures of one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Images they are of; 0 where an older file does not say.
    #[serde(default)]
    pub images: usize,
    /// Mean over channels of the deviation of the L2-normalised projections. Near 1/√D: spread out; near 0: constant.
    pub projection_std: f64,
    /// 1/√D, what independent directions give.
    pub projection_std_ideal: f64,
    /// Mean cosine of the projections of different images. Near 0: spread out; near 1: constant.
    pub projection_cosine: f64,
    /// RankMe of the representations, from 1 to min(N, F).
    pub rankme: f64,
    /// [`spectrum::directions`] of the representations, which one image of great length does not make small; no number where an older file
    /// does not say.
    #[serde(default = "spectrum::unsaid")]
    pub directions: f64,
    /// The report card, of some of the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub card: Option<Card>,
    /// Weighted kNN accuracy in [0, 1], where there are labels.
    pub knn: Option<f64>,
}

/// What can go wrong in learning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// All images get the same projection: the trivial solution that the paper speaks of (§3.2).
    Constant,
    /// The representations fill few dimensions.
    Dimensional,
    /// The loss is above chance or no number.
    Diverged,
    /// The predictions agree with their targets hardly better than chance: the predictor does not follow.
    PredictorLag,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Kind::Constant => "constant collapse",
            Kind::Dimensional => "dimensional collapse",
            Kind::Diverged => "divergence",
            Kind::PredictorLag => "predictor lag",
        })
    }
}

/// A failure, named, with its reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// Which.
    pub kind: Kind,
    /// The figures that say so, in words.
    pub why: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.why)
    }
}

/// Steps before which figures are still those of the start: networks with random weights give all images nearly the same projection.
pub(super) const SETTLING: u64 = 200;

/// Fewer images say nothing of a collapse: they fill few directions whatever the network is.
pub const FEWEST: usize = 16;

/// Steps after which a predictor should have begun to predict.
const FOLLOWING: u64 = 500;

/// Share of the deviation of spread-out projections below which they are called alike. The healthy runs of `tests/guard.rs` have 0.6 and more.
const LEAST_SPREAD: f64 = 0.25;

/// Mean cosine of different images' projections above which they are called alike. Healthy runs have 0.5 and less.
const MOST_COSINE: f64 = 0.75;

/// The loss of unrelated directions.
const CHANCE: f64 = 4.0;

impl Health {
    /// Of outputs that are not numbers; `dim` is the length of a projection.
    fn of_a_broken_network(images: usize, dim: usize) -> Health {
        Health {
            images,
            projection_std: f64::NAN,
            projection_std_ideal: 1.0 / (dim as f64).sqrt(),
            projection_cosine: f64::NAN,
            rankme: f64::NAN,
            directions: f64::NAN,
            card: None,
            knn: None,
        }
    }

    /// What has gone wrong by `step`, if anything. `start` are the figures before the first step; `loss` is BYOL's mean loss of the epoch, none
    /// where another one is minimised.
    pub fn failure(&self, start: Option<&Health>, loss: Option<f64>, step: u64) -> Option<Failure> {
        let failure = |kind, why: String| Some(Failure { kind, why });
        if !(self.projection_std.is_finite() && self.rankme.is_finite()) {
            return failure(Kind::Diverged, "the projections are not numbers any more".into());
        }
        if step < SETTLING {
            return None;
        }
        if let Some(loss) = loss.filter(|loss| *loss > 1.1 * CHANCE) {
            return failure(Kind::Diverged, format!("the loss is {loss:.2}, and unrelated directions have {CHANCE}"));
        }
        if self.images >= FEWEST
            && let Some(collapse) = self.collapse(start)
        {
            return Some(collapse);
        }
        if let Some(loss) = loss.filter(|loss| step > FOLLOWING && *loss > 0.8 * CHANCE) {
            let why = format!("after {step} steps the loss is {loss:.2}, and unrelated directions have {CHANCE}");
            return failure(Kind::PredictorLag, why);
        }
        None
    }

    /// Whether images look alike, to the projector or to the encoder.
    fn collapse(&self, start: Option<&Health>) -> Option<Failure> {
        let failure = |kind, why: String| Some(Failure { kind, why });
        if self.projection_std < LEAST_SPREAD * self.projection_std_ideal {
            let (std, ideal) = (self.projection_std, self.projection_std_ideal);
            let why = format!(
                "all images get nearly the same projection (deviation {std:.4}, spread out would be {ideal:.4})"
            );
            return failure(Kind::Constant, why);
        }
        if self.projection_cosine > MOST_COSINE {
            let why = format!("projections of different images have cosine {:.3}", self.projection_cosine);
            return failure(Kind::Constant, why);
        }
        let least = start.map_or(2.0, |start| (start.directions / 4.0).max(2.0));
        if self.directions < least {
            let why = format!(
                "the representations fill {:.1} dimensions, a quarter of the start's or fewer than 2",
                self.directions
            );
            return failure(Kind::Dimensional, why);
        }
        None
    }
}

/// Seconds that the figures of one moment took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Cost {
    /// All of them, kNN included.
    pub health: f64,
    /// The report card.
    pub card: f64,
}

/// Takes the figures, and says what they cost. `byol` stays as it is.
///
/// # Errors
/// [`Error::Image`] if an image that could be decoded no longer can.
pub fn measure(byol: &Byol, watch: &Watch, device: &Device) -> Result<(Health, Cost), Error> {
    let began = Instant::now();
    let (representations, projections) = forward(byol, &watch.held_out, &watch.spec, device)?;
    if !(representations.is_finite() && projections.is_finite()) {
        let cost = Cost { health: began.elapsed().as_secs_f64(), card: 0.0 };
        return Ok((Health::of_a_broken_network(projections.n, projections.dim), cost));
    }
    let knn = match (&watch.bank, watch.held_out.labels()) {
        (Some(bank), Some(labels)) => {
            let (of_bank, _) = forward(byol, bank, &watch.spec, device)?;
            let bank_labels = bank.labels().expect("a bank has labels");
            let HealthConfig { k, temperature, .. } = watch.config;
            Some(knn::classify(&of_bank, bank_labels, &representations, labels, watch.classes, k, temperature).accuracy)
        }
        _ => None,
    };
    let of_all = figures(&representations, &projections, knn);
    let before_card = Instant::now();
    let health = Health { card: card(byol, watch, &representations)?, ..of_all };
    Ok((health, Cost { health: began.elapsed().as_secs_f64(), card: before_card.elapsed().as_secs_f64() }))
}

/// The report card of evenly spread ones of the watched images.
fn card(byol: &Byol, watch: &Watch, representations: &Features) -> Result<Option<Card>, Error> {
    let (all, n) = (watch.held_out.len(), watch.card.min(watch.held_out.len()));
    if n < 2 {
        return Ok(None);
    }
    let at: Vec<usize> = (0..n).map(|i| i * all / n).collect();
    // θ's tensors are shared, not copied.
    let encoder = Encoder::new(watch.spec.clone(), byol.online.clone());
    let how = card::Views { policies: [&watch.policies[0], &watch.policies[1]], size: watch.size, seed: watch.seed };
    card::measure(&encoder, &watch.held_out.subset(&at), &representations.subset(&at), how).map(Some)
}

/// The figures of representations and L2-normalised projections.
pub fn figures(representations: &Features, projections: &Features, knn: Option<f64>) -> Health {
    let (n, d) = (projections.n as f64, projections.dim);
    let mut sum = vec![0.0f64; d];
    let mut squares = vec![0.0f64; d];
    for i in 0..projections.n {
        for ((s, q), v) in sum.iter_mut().zip(&mut squares).zip(projections.row(i)) {
            *s += f64::from(*v);
            *q += f64::from(*v).powi(2);
        }
    }
    let deviation = |(s, q): (&f64, &f64)| (q / n - (s / n).powi(2)).max(0.0).sqrt();
    let projection_std = sum.iter().zip(&squares).map(deviation).sum::<f64>() / d as f64;
    Health {
        images: projections.n,
        projection_std,
        projection_std_ideal: 1.0 / (d as f64).sqrt(),
        projection_cosine: card::mean_cosine(projections),
        rankme: spectrum::rankme(representations),
        directions: spectrum::directions(representations),
        card: None,
        knn,
    }
}

/// Representations, and L2-normalised projections, of the evaluation views.
fn forward(byol: &Byol, images: &Images, spec: &EncoderSpec, device: &Device) -> Result<(Features, Features), Error> {
    let net = &byol.network;
    let (mut y_all, mut z_all) = (Vec::new(), Vec::new());
    eval::for_batches(images, spec, device, |x: Tensor<4>| {
        let mode = Mode::Eval(&byol.online.statistics);
        let mut pass = Pass { params: &byol.online.params, norm: &net.norm, precision: Precision::F32, mode };
        let y = net.represent(&mut pass, x);
        z_all.extend(host(unit(net.projector.forward(&mut pass, y.clone()))));
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
    fn a_constant_projection_is_a_collapse_and_a_spread_one_is_not() {
        let constant = rows(&[[1.0, 0.0]; 16]);
        let spread = rows(&[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]].repeat(4));
        let bad = figures(&constant, &constant, None);
        assert!((bad.projection_cosine - 1.0).abs() < 1e-9 && bad.projection_std < 1e-9);
        assert_eq!(bad.failure(None, None, 1000).map(|f| f.kind), Some(Kind::Constant));
        assert_eq!(bad.failure(None, None, 10), None, "so does a network that has learned nothing yet");
        let few = Health { images: FEWEST - 1, ..bad.clone() };
        assert_eq!(few.failure(None, Some(1.0), 1000), None, "a few images say nothing of a collapse");
        assert_eq!(few.failure(None, Some(4.5), 1000).map(|f| f.kind), Some(Kind::Diverged), "the loss still does");
        let good = figures(&spread, &spread, None);
        assert!((good.projection_std - good.projection_std_ideal).abs() < 1e-9);
        assert!((good.rankme - 2.0).abs() < 1e-3);
        assert!(good.projection_cosine < 0.0);
        let good = Health { directions: 4.0, ..good };
        let kind = |loss: f64, start: Option<&Health>| good.failure(start, Some(loss), 1000).map(|f| f.kind);
        assert_eq!(kind(1.0, None), None);
        assert_eq!(kind(3.5, None), Some(Kind::PredictorLag));
        assert_eq!(kind(4.5, None), Some(Kind::Diverged));
        let wide = Health { directions: 20.0, ..good.clone() };
        assert_eq!(kind(1.0, Some(&wide)), Some(Kind::Dimensional));
        let broken = Health::of_a_broken_network(64, 2);
        assert_eq!(broken.failure(None, None, 1).map(|f| f.kind), Some(Kind::Diverged));
    }

    #[test]
    fn one_image_of_great_length_is_no_collapse() {
        let row = |i: usize| (0..32).map(move |j| if i % 32 == j { if i == 0 { 3e3 } else { 1.0 } } else { 0.1 });
        let long = Features { n: 64, dim: 32, values: (0..64).flat_map(row).collect() };
        let (start, now) = (figures(&long.unit(), &long.unit(), None), figures(&long, &long.unit(), None));
        assert!(now.rankme < start.rankme / 4.0, "{} of {}", now.rankme, start.rankme);
        assert_eq!(now.failure(Some(&start), Some(1.0), 1000), None);
        let card: Card = serde_json::from_value(serde_json::json!({
            "rankme": 1.5, "lidar": 9.0, "alpha_req": 1.0, "uniformity": -1.0, "alignment": 0.5, "retrieval": 0.5,
            "consistency": 0.5, "cosine": 0.5, "directions": now.directions,
        }))
        .unwrap();
        assert!(card.score() > 0.0);
    }
}

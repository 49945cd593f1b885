//! The report card: what can be said of an encoder without labels.
//!
//! The same figures of a network with random weights are the measure: some of them are high for it as well.

use serde::{Deserialize, Serialize};

use super::{
    Features, batch_for, knn,
    metrics::mean,
    named_views, spectrum,
    sphere::{alignments, finds_its_own, uniformity},
};
use crate::{
    data::{Error, Images},
    nn::{Encoder, tree::host},
    views::Policy,
};

/// Figures of one encoder on some images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// RankMe of the representations, from 1 to min(N, F): how many directions they fill.
    pub rankme: f64,
    /// [`spectrum::directions`] of the representations; no number where an older file does not say.
    #[serde(default = "spectrum::unsaid")]
    pub directions: f64,
    /// LiDAR, from 1: in how many directions images differ more than the views of one image do.
    pub lidar: f64,
    /// α-ReQ: how fast the spectrum falls; about 1 is best, much above means few directions. None of a spectrum of one value.
    pub alpha_req: Option<f64>,
    /// ln of the mean of exp(−2 d²) over pairs, at most 0: lower is more evenly spread.
    pub uniformity: f64,
    /// Mean squared distance of two views of an image, in [0, 4].
    pub alignment: f64,
    /// Share of views that find their own image among N.
    pub retrieval: f64,
    /// Share of an image's ten nearest neighbours that its view has too.
    pub consistency: f64,
    /// Mean cosine of different images.
    pub cosine: f64,
    /// Images that were measured; 0 where an older file does not say.
    #[serde(default)]
    pub images: usize,
    /// Standard errors of `retrieval` and `consistency`, as means over the images; 0 where an older file does not say.
    #[serde(default)]
    pub errors: [f64; 2],
}

const RETRIEVAL: &str = "finds its own image";
const CONSISTENCY: &str = "keeps its neighbours";
const ALIGNMENT: &str = "alignment";

/// Those of the figures that are means over images, image by image: what their intervals are drawn from.
#[derive(Debug, Clone, PartialEq)]
pub struct ByImage {
    /// [`Card::alignment`]
    pub alignment: Vec<f64>,
    /// [`Card::retrieval`]
    pub retrieval: Vec<f64>,
    /// [`Card::consistency`]
    pub consistency: Vec<f64>,
}

impl ByImage {
    /// Of the figure that [`Card::figures`] calls so, if it is such a mean.
    pub fn of(&self, figure: &str) -> Option<&[f64]> {
        match figure {
            ALIGNMENT => Some(&self.alignment),
            RETRIEVAL => Some(&self.retrieval),
            CONSISTENCY => Some(&self.consistency),
            _ => None,
        }
    }
}

/// How views are made.
#[derive(Debug, Clone, Copy)]
pub struct Views<'a> {
    /// T and T′.
    pub policies: [&'a Policy; 2],
    /// Side in pixels.
    pub size: usize,
    /// Names the draws.
    pub seed: u64,
}

/// Views of an image.
const VIEWS: usize = 4;

/// Neighbours that are compared, at most; of few images a quarter.
const NEIGHBOURS: usize = 10;

/// Numbers of the card's views among an image's: above those of pretraining and of the other evaluations.
const FIRST_VIEW: u64 = 16;

/// Takes the figures. `still` are the representations of the images' evaluation views ([`super::embed`]).
///
/// # Errors
/// [`Error::Image`] for an image that cannot be decoded any more.
pub fn measure(encoder: &Encoder, images: &Images, still: &Features, how: Views) -> Result<Card, Error> {
    Ok(measure_each(encoder, images, still, how)?.0)
}

/// The same, with the figures by image.
///
/// # Errors
/// As [`measure`].
pub fn measure_each(
    encoder: &Encoder,
    images: &Images,
    still: &Features,
    how: Views,
) -> Result<(Card, ByImage), Error> {
    let moved = views(encoder, images, how)?;
    let of_view = |k: usize| moved.subset(&(0..images.len()).map(|i| i * VIEWS + k).collect::<Vec<_>>());
    let (first, second) = (of_view(0), of_view(1));
    let finds = finds_its_own(&first, still).into_iter().map(|found| f64::from(u8::from(found)));
    let by_image = ByImage {
        alignment: alignments(&first, &second),
        retrieval: finds.collect(),
        consistency: consistencies(&first, still),
    };
    let of = |values: &[f64]| mean(values.iter().copied());
    let card = Card {
        rankme: spectrum::rankme(still),
        directions: spectrum::directions(still),
        lidar: if images.len() > 1 { spectrum::lidar(&moved, VIEWS) } else { 1.0 },
        alpha_req: spectrum::alpha_req(still, 1, still.n.min(still.dim)),
        uniformity: uniformity(still),
        alignment: of(&by_image.alignment),
        retrieval: of(&by_image.retrieval),
        consistency: of(&by_image.consistency),
        cosine: mean_cosine(still),
        images: still.n,
        errors: [standard_error(&by_image.retrieval), standard_error(&by_image.consistency)],
    };
    Ok((card, by_image))
}

/// Of the mean of values.
fn standard_error(values: &[f64]) -> f64 {
    let (n, middle) = (values.len() as f64, mean(values.iter().copied()));
    if n < 2.0 { 0.0 } else { (mean(values.iter().map(|v| (v - middle).powi(2))) / (n - 1.0)).sqrt() }
}

/// Representations of [`VIEWS`] views of each image, side by side, T and T′ in turn.
fn views(encoder: &Encoder, images: &Images, how: Views) -> Result<Features, Error> {
    let (size, device) = (how.size, encoder.device());
    let name = |i: usize, k: usize| [how.seed, 0, i as u64, FIRST_VIEW + k as u64];
    let of_image = |i: usize| (0..VIEWS).map(move |k| (i, name(i, k), how.policies[k % 2]));
    let all: Vec<_> = (0..images.len()).flat_map(of_image).collect();
    let mut values = Vec::with_capacity(all.len() * encoder.features());
    for some in all.chunks(batch_for(size)) {
        values.extend(host(encoder.embed(named_views(images, some, size, &device)?)));
    }
    Ok(Features { n: all.len(), dim: encoder.features(), values })
}

/// Share of the neighbours of each row of `still` that its row of `moved` has too; neither counts the image itself.
fn consistencies(moved: &Features, still: &Features) -> Vec<f64> {
    let (moved, still) = (moved.unit(), still.unit());
    let k = NEIGHBOURS.min((still.n / 4).max(1));
    let neighbours = |of: &Features| -> Vec<Vec<usize>> {
        let near = knn::nearest(&still, of, k + 1);
        let others = |(i, near): (usize, Vec<(usize, f32)>)| {
            near.into_iter().map(|(j, _)| j).filter(|j| *j != i).take(k).collect()
        };
        near.into_iter().enumerate().map(others).collect()
    };
    let shared =
        |(a, b): (Vec<usize>, Vec<usize>)| a.iter().filter(|j| b.contains(j)).count() as f64 / a.len().max(1) as f64;
    neighbours(&still).into_iter().zip(neighbours(&moved)).map(shared).collect()
}

/// Mean cosine of different rows.
pub fn mean_cosine(x: &Features) -> f64 {
    let (x, mut sum) = (x.unit(), vec![0.0f64; x.dim]);
    let mut own = 0.0;
    for i in 0..x.n {
        for (s, v) in sum.iter_mut().zip(x.row(i)) {
            *s += f64::from(*v);
            own += f64::from(*v).powi(2);
        }
    }
    // Σ over all pairs i ≠ j of xᵢ·xⱼ is |Σ xᵢ|² − Σ |xᵢ|².
    let all: f64 = sum.iter().map(|s| s * s).sum();
    let n = x.n as f64;
    if x.n > 1 { (all - own) / (n * (n - 1.0)) } else { 0.0 }
}

/// By how much of themselves the shares of views that find their image, and of neighbours that are kept, have to differ to count, beside being
/// beyond chance.
const CLEARLY: [f64; 2] = [0.25, 0.1];

impl Card {
    /// The figures with their names, and which of them are shares.
    pub fn figures(&self) -> [(&'static str, f64, bool); 8] {
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

    /// One number to compare encoders by, higher is better: how many neighbours a view keeps. Of all figures it agrees best with labels on
    /// the seven encoders of docs/results.md, and no worse than others on the epochs of its runs. 0 of a collapsed encoder, to which all images are neighbours alike.
    pub fn score(&self) -> f64 {
        if self.is_collapsed() { 0.0 } else { self.consistency }
    }

    /// Whether all images look alike to the encoder.
    fn is_collapsed(&self) -> bool {
        self.cosine > 0.98 || self.directions < 2.0
    }

    /// What the figures say beside those of another encoder, in plain words; `other` names it.
    pub fn verdict(&self, than: &Card, other: &str) -> String {
        if self.is_collapsed() {
            return format!(
                "collapsed: all images look alike to it (mean cosine {:.3}, {:.1} dimensions)",
                self.cosine, self.directions
            );
        }
        let signs = [(self.retrieval, than.retrieval), (self.consistency, than.consistency)];
        // Within two standard errors a difference is chance. They are added as if the images were others, which is careful.
        let by: [f64; 2] = std::array::from_fn(|i| {
            let (own, other) = signs[i];
            let chance = 2.0 * self.errors[i].hypot(than.errors[i]);
            if (own - other).abs() > chance { own / other.max(1e-9) - 1.0 } else { 0.0 }
        });
        let better = by.iter().zip(CLEARLY).filter(|(by, clearly)| *by > clearly).count();
        let worse = by.iter().zip(CLEARLY).filter(|(by, clearly)| **by < -clearly).count();
        let figures = format!(
            "a view finds its own image {:.1} % of the time against {:.1} %, and keeps {:.1} % of its neighbours against {:.1} %",
            100.0 * self.retrieval,
            100.0 * than.retrieval,
            100.0 * self.consistency,
            100.0 * than.consistency
        );
        match (better, worse) {
            (0, 0) if self.images > 0 => {
                format!("no better than {other}, as far as {} images can tell: {figures}", self.images)
            }
            (0, 0) => format!("no better than {other}: {figures}"),
            (_, 0) => format!("better than {other}: {figures}"),
            (0, _) => format!("worse than {other}: {figures}"),
            _ => format!("better than {other} in some ways and worse in others: {figures}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(retrieval: f64, consistency: f64) -> Card {
        Card {
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
            errors: [0.02, 0.01],
        }
    }

    #[test]
    fn a_verdict_can_say_all_of_it() {
        let than = card(0.2, 0.3);
        let starts = |card: Card, words: &str| {
            let verdict = card.verdict(&than, "random weights");
            assert!(verdict.starts_with(words), "{verdict}");
        };
        starts(card(0.2, 0.31), "no better than random weights");
        starts(card(0.6, 0.5), "better than random weights:");
        starts(card(0.1, 0.3), "worse than random weights");
        starts(card(0.6, 0.2), "better than random weights in some ways");
        starts(Card { cosine: 0.99, ..card(0.9, 0.9) }, "collapsed");
        starts(
            Card { images: 16, errors: [0.12, 0.06], ..card(0.3, 0.4) },
            "no better than random weights, as far as 16",
        );
        assert_eq!(
            Card { directions: 1.0, ..card(1.0, 1.0) }.score(),
            0.0,
            "of a dead network all neighbours are kept"
        );
    }

    #[test]
    fn a_standard_error_is_that_of_the_mean() {
        let values: Vec<f64> = (0..10).map(|i| f64::from(i % 2)).collect();
        assert!((standard_error(&values) - (0.25f64 / 9.0).sqrt()).abs() < 1e-12);
        assert_eq!(standard_error(&[3.0]), 0.0);
    }

    #[test]
    fn cosines_and_neighbours() {
        let cross = Features { n: 4, dim: 2, values: vec![1.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0, -1.0] };
        assert!((mean_cosine(&cross) + 1.0 / 3.0).abs() < 1e-6);
        assert_eq!(consistencies(&cross, &cross), vec![1.0; cross.n]);
    }
}

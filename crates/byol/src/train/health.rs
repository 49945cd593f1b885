//! Is it working? Figures on a fixed held-out set of images, at the end of every epoch, and what they mean in words.
//!
//! They use the online network in evaluation mode and change nothing in it.

use burn::tensor::{Device, Tensor};
use serde::Serialize;

use crate::{
    byol::{Byol, unit},
    data::{Error, Images},
    eval::{self, Features, knn, spectrum},
    nn::{EncoderSpec, Mode, Pass, tree::host},
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
    /// What the evaluation views are for.
    pub spec: EncoderSpec,
}

/// Figures of one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Health {
    /// Mean over channels of the deviation of the L2-normalised projections. Near 1/√D: spread out; near 0: constant.
    pub projection_std: f64,
    /// 1/√D, what independent directions give.
    pub projection_std_ideal: f64,
    /// Mean cosine of the projections of different images. Near 0: spread out; near 1: constant.
    pub projection_cosine: f64,
    /// RankMe of the representations, from 1 to min(N, F).
    pub rankme: f64,
    /// Weighted kNN accuracy in [0, 1], where there are labels.
    pub knn: Option<f64>,
}

impl Health {
    /// Why this looks like a collapse, in words; none if it does not. The first two are the constant representation that the paper
    /// speaks of (§3.2), the third its dimensional form.
    pub fn collapse(&self) -> Option<String> {
        if !(self.projection_std.is_finite() && self.rankme.is_finite()) {
            return Some("the projections are not numbers any more".into());
        }
        if self.projection_std < 0.1 * self.projection_std_ideal {
            return Some(format!(
                "all images get nearly the same projection (deviation {:.4}, spread out would be {:.4})",
                self.projection_std, self.projection_std_ideal
            ));
        }
        if self.projection_cosine > 0.98 {
            return Some(format!("projections of different images have cosine {:.3}", self.projection_cosine));
        }
        if self.rankme < 2.0 {
            return Some(format!("the representations fill {:.1} dimensions", self.rankme));
        }
        None
    }
}

/// Takes the figures. `byol` stays as it is.
///
/// # Errors
/// [`Error::Image`] if an image that could be decoded no longer can.
pub fn measure(byol: &Byol, watch: &Watch, device: &Device) -> Result<Health, Error> {
    let (representations, projections) = forward(byol, &watch.held_out, &watch.spec, device)?;
    let knn = match (&watch.bank, watch.held_out.labels()) {
        (Some(bank), Some(labels)) => {
            let (of_bank, _) = forward(byol, bank, &watch.spec, device)?;
            let bank_labels = bank.labels().expect("a bank has labels");
            let HealthConfig { k, temperature, .. } = watch.config;
            Some(knn::classify(&of_bank, bank_labels, &representations, labels, watch.classes, k, temperature).accuracy)
        }
        _ => None,
    };
    Ok(figures(&representations, &projections, knn))
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
    // Σ over all pairs i ≠ j of zᵢ·zⱼ is |Σ zᵢ|² − Σ |zᵢ|².
    let all: f64 = sum.iter().map(|s| s * s).sum();
    let own: f64 = squares.iter().sum();
    Health {
        projection_std,
        projection_std_ideal: 1.0 / (d as f64).sqrt(),
        projection_cosine: if n > 1.0 { (all - own) / (n * (n - 1.0)) } else { 0.0 },
        rankme: spectrum::rankme(representations),
        knn,
    }
}

/// Representations, and L2-normalised projections, of the evaluation views.
fn forward(byol: &Byol, images: &Images, spec: &EncoderSpec, device: &Device) -> Result<(Features, Features), Error> {
    let net = &byol.network;
    let (mut y_all, mut z_all) = (Vec::new(), Vec::new());
    eval::for_batches(images, spec, device, |x: Tensor<4>| {
        let mode = Mode::Eval(&byol.online.statistics);
        let mut pass = Pass { params: &byol.online.params, norm: &net.norm, mode };
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
        let constant = rows(&[[1.0, 0.0]; 8]);
        let spread = rows(&[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]);
        let bad = figures(&constant, &constant, None);
        assert!((bad.projection_cosine - 1.0).abs() < 1e-9 && bad.projection_std < 1e-9);
        assert!(bad.collapse().is_some());
        let good = figures(&spread, &spread, None);
        assert!((good.projection_std - good.projection_std_ideal).abs() < 1e-9);
        assert!((good.rankme - 2.0).abs() < 1e-3);
        assert!(good.projection_cosine < 0.0);
    }
}

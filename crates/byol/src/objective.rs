//! The paper's ablations of the loss (§5, table 5b, appendix F.4): no predictor, no target network,
//! and negatives, up to SimCLR's InfoNCE.

use burn::tensor::{Bool, Tensor, activation::log_softmax};
use serde::{Deserialize, Serialize};

use crate::byol::{Byol, Loss, l2_normalize, regression_loss};

/// The loss to minimize. The default is BYOL.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// Use the predictor q; without it the prediction is the projection itself. Default: true.
    pub predictor: bool,
    /// Predict ξ's projections, without gradient; without it the targets are θ's own projections,
    /// and the gradient flows through both sides. Default: true.
    pub stop_gradient: bool,
    /// β: weight of the other images of the batch as negatives. 0 is BYOL; 1 without predictor and
    /// without stop_gradient is SimCLR. Default: 0.
    pub beta: f64,
    /// α: temperature of the negatives, above 0. Default: 0.1.
    pub alpha: f64,
}

impl Default for Objective {
    fn default() -> Self {
        Objective { predictor: true, stop_gradient: true, beta: 0.0, alpha: 0.1 }
    }
}

impl Objective {
    /// Loss of one batch: [`Byol::loss`], or an ablation of it.
    ///
    /// # Shapes
    /// `v`, `v2`: `[N, H, W, C]` in 0..1.
    pub fn loss(&self, byol: &mut Byol, v: Tensor<4>, v2: Tensor<4>) -> Loss {
        if *self == Objective::default() {
            return byol.loss(v, v2);
        }
        let net = &byol.network;

        let targets = self.stop_gradient.then(|| {
            let mut target = net.training(&byol.target.params, &mut byol.target.statistics);
            [&v, &v2].map(|v| net.project(&mut target, v.clone()).autodiff())
        });

        let theta = byol.online.params.tracked();
        let mut online = net.training(&theta, &mut byol.online.statistics);
        let projections = [v, v2].map(|v| net.project(&mut online, v.autodiff()));
        let [q, q2] = match self.predictor {
            true => projections.clone().map(|z| net.predict(&mut online, z)),
            false => projections.clone(),
        };
        let [z, z2] = targets.unwrap_or(projections);

        let mut value = (regression_loss(q.clone(), z2.clone()) + regression_loss(q2.clone(), z.clone())).mean();
        if self.beta != 0.0 {
            let both = negatives(q, z.clone(), z2.clone(), self.alpha) + negatives(q2, z2, z, self.alpha);
            value = value + both.mean().mul_scalar(self.beta);
        }
        Loss { value, theta }
    }
}

/// 2α ln( Σ_{j≠i} exp(cos(qᵢ, zⱼ) / α) + Σⱼ exp(cos(qᵢ, z′ⱼ) / α) ) per row i: the term that β adds
/// to the distance of q from z′ (appendix F.4).
///
/// # Shapes
/// `q`, and the projections `z` of the same view and `z2` of the other: `[N, D]`; returns `[N]`.
pub fn negatives(q: Tensor<2>, z: Tensor<2>, z2: Tensor<2>, alpha: f64) -> Tensor<1> {
    let (n, q) = (q.dims()[0], l2_normalize(q));
    let diagonal = Tensor::<2, Bool>::diag_mask([n, n], 0, &q.device()).bool_not();
    let same_view = q.clone().matmul(l2_normalize(z).transpose()).div_scalar(alpha);
    let same_view = same_view.mask_fill(diagonal, f32::MIN / 4.0);
    let other_view = q.matmul(l2_normalize(z2).transpose()).div_scalar(alpha);
    let logits = Tensor::cat(vec![same_view, other_view], 1);
    // ln Σ exp = x − ln softmax(x), for any x. The last column is never masked.
    let last = logits.clone().narrow(1, 2 * n - 1, 1);
    let log_share = log_softmax(logits, 1).narrow(1, 2 * n - 1, 1);
    (last - log_share).squeeze_dim::<1>(1).mul_scalar(2.0 * alpha)
}

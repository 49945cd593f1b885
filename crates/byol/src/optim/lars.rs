//! LARS (You et al. 2017, arXiv:1708.03888), as in deepmind-research `byol`.
//!
//! For a tensor w with gradient g: u = g + decay·w; u ← u · trust_coefficient·‖w‖/‖u‖ if both norms
//! are above 0; m ← momentum·m + u; w ← w − η·m. Excluded tensors skip decay and adaptation.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Settings of LARS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lars {
    /// Momentum, in [0, 1). 0.9 in the reference.
    pub momentum: f64,
    /// Weight decay, at least 0. 1.5e-6 in the reference, for 1000 epochs.
    pub weight_decay: f64,
    /// Trust coefficient, above 0. 1e-3 in the reference.
    #[serde(alias = "trust")]
    pub trust_coefficient: f64,
    /// Clip the adaptive rate (LARC): ratio ← min(ratio / η, 1), so that no tensor moves by more
    /// than its gradient times η. On in solo-learn's CIFAR recipe, off in the reference.
    pub clip_lr: bool,
}

impl Lars {
    /// Performs one update. Returns the new weights and momentum.
    pub fn step(
        &self,
        w: Tensor<1>,
        g: Tensor<1>,
        momentum: Tensor<1>,
        eta: f64,
        excluded: bool,
    ) -> (Tensor<1>, Vec<Tensor<1>>) {
        let u = if excluded { g } else { self.adapt(&w, g, eta) };
        let m = momentum.mul_scalar(self.momentum) + u;
        (w - m.clone().mul_scalar(eta), vec![m])
    }

    /// Applies weight decay and the trust ratio. The ratio stays on the device: reading it back
    /// would stall every step.
    fn adapt(&self, w: &Tensor<1>, g: Tensor<1>, eta: f64) -> Tensor<1> {
        let u = g + w.clone().mul_scalar(self.weight_decay);
        let (w_norm, u_norm) = (norm(w.clone()), norm(u.clone()));
        let is_zero = (w_norm.clone().equal_elem(0.0)).bool_or(u_norm.clone().equal_elem(0.0));
        // If either norm is 0 the ratio is 1, not 0/0.
        let mut ratio = w_norm.mul_scalar(self.trust_coefficient) / u_norm.mask_fill(is_zero.clone(), 1.0);
        ratio = ratio.mask_fill(is_zero, 1.0);
        if self.clip_lr {
            ratio = ratio.div_scalar(eta.max(1e-12)).clamp_max(1.0);
        }
        u * ratio
    }
}

/// ‖x‖₂ as `[1]`.
fn norm(x: Tensor<1>) -> Tensor<1> {
    x.square().sum().sqrt()
}

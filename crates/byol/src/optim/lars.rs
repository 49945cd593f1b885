//! LARS (You et al. 2017, arXiv:1708.03888) as deepmind-research `byol` has it.
//!
//! For a tensor w with gradient g: u = g + decay·w; u ← u · trust·‖w‖/‖u‖ where both norms are above 0;
//! m ← momentum·m + u; w ← w − η·m. Excluded tensors skip decay and adaptation.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Settings of LARS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lars {
    /// Share of the momentum buffer that stays, in [0, 1). 0.9 as in the reference.
    pub momentum: f64,
    /// Weight decay, at least 0. 1.5e-6 for 1000 epochs as in the reference.
    pub weight_decay: f64,
    /// Trust coefficient, above 0. 1e-3 as in the reference.
    pub trust: f64,
    /// Cap the adaptive rate: ratio ← min(ratio / η, 1), so that no tensor moves by more than its gradient times η. As in
    /// solo-learn's CIFAR recipe; off in the reference.
    pub clip_lr: bool,
}

impl Lars {
    /// One update: the new weight and the new momentum.
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

    /// The ratio stays on the device, so that no step waits for a value to be read back.
    fn adapt(&self, w: &Tensor<1>, g: Tensor<1>, eta: f64) -> Tensor<1> {
        let u = g + w.clone().mul_scalar(self.weight_decay);
        let (w_norm, u_norm) = (norm(w.clone()), norm(u.clone()));
        let neither = (w_norm.clone().equal_elem(0.0)).bool_or(u_norm.clone().equal_elem(0.0));
        // A zero norm would give 0/0; the ratio there is 1, the plain step.
        let mut ratio = w_norm.mul_scalar(self.trust) / u_norm.mask_fill(neither.clone(), 1.0);
        ratio = ratio.mask_fill(neither, 1.0);
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

//! Stochastic gradient descent with momentum: g ← g + decay·w (except for excluded tensors);
//! m ← momentum·m + g; w ← w − η·m, or with Nesterov w − η·(g + momentum·m). No dampening.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Settings of SGD.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sgd {
    /// Momentum, in [0, 1).
    pub momentum: f64,
    /// Weight decay, at least 0, added to the gradient.
    pub weight_decay: f64,
    /// Use Nesterov's momentum.
    pub nesterov: bool,
}

impl Sgd {
    /// Performs one update. Returns the new weights and momentum.
    pub fn step(
        &self,
        w: Tensor<1>,
        g: Tensor<1>,
        momentum: Tensor<1>,
        eta: f64,
        excluded: bool,
    ) -> (Tensor<1>, Vec<Tensor<1>>) {
        let g = if excluded { g } else { g + w.clone().mul_scalar(self.weight_decay) };
        let m = momentum.mul_scalar(self.momentum) + g.clone();
        let update = if self.nesterov { g + m.clone().mul_scalar(self.momentum) } else { m.clone() };
        (w - update.mul_scalar(eta), vec![m])
    }
}

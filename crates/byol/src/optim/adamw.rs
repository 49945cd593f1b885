//! AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101). Weight decay is decoupled from the
//! gradient and multiplied by η; excluded tensors have none.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Settings of AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamW {
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// ε, added to the root of the second moment.
    pub eps: f64,
    /// Weight decay, at least 0.
    pub weight_decay: f64,
}

impl AdamW {
    /// Performs update `t` (from 1). Returns the new weights and moments.
    pub fn step(
        &self,
        w: Tensor<1>,
        g: Tensor<1>,
        [m, v]: [Tensor<1>; 2],
        t: u64,
        eta: f64,
        excluded: bool,
    ) -> (Tensor<1>, Vec<Tensor<1>>) {
        let m = m.mul_scalar(self.beta1) + g.clone().mul_scalar(1.0 - self.beta1);
        let v = v.mul_scalar(self.beta2) + g.square().mul_scalar(1.0 - self.beta2);
        let m_hat = m.clone().div_scalar(1.0 - self.beta1.powf(t as f64));
        let v_hat = v.clone().div_scalar(1.0 - self.beta2.powf(t as f64));
        let decay = if excluded { 0.0 } else { self.weight_decay };
        let w = w.mul_scalar(1.0 - eta * decay) - (m_hat / v_hat.sqrt().add_scalar(self.eps)).mul_scalar(eta);
        (w, vec![m, v])
    }
}

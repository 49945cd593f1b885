//! Update rules, composed of Burn's tensor operations, for every device.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::{adamw::AdamW, lars::Lars, sgd::Sgd};

/// Update rule with its settings. The learning rate comes from the [`Schedule`](super::Schedule).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Rule {
    /// Layer-wise adaptive rates; the paper's.
    Lars(Lars),
    /// Stochastic gradient descent with momentum.
    Sgd(Sgd),
    /// Adam with decoupled weight decay.
    Adamw(AdamW),
}

/// One update of a tensor.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Index of the update, from 1.
    pub t: u64,
    /// Learning rate η.
    pub eta: f64,
    /// Skip weight decay and layer-wise adaptation.
    pub excluded: bool,
}

impl Rule {
    /// Names of the state tensors ("slots") of a parameter. Each has the parameter's shape and
    /// starts at 0.
    pub fn slots(&self) -> &'static [&'static str] {
        match self {
            Rule::Lars(_) | Rule::Sgd(_) => &["momentum"],
            Rule::Adamw(_) => &["m", "v"],
        }
    }

    /// Updates one tensor `w` with gradient `g`. Returns the new weights and slots.
    pub fn step(&self, w: Tensor<1>, g: Tensor<1>, slots: &[Tensor<1>], update: Update) -> (Tensor<1>, Vec<Tensor<1>>) {
        let Update { t, eta, excluded } = update;
        let slot = |i: usize| slots[i].clone();
        match self {
            Rule::Lars(rule) => rule.step(w, g, slot(0), eta, excluded),
            Rule::Sgd(rule) => rule.step(w, g, slot(0), eta, excluded),
            Rule::Adamw(rule) => rule.step(w, g, [slot(0), slot(1)], t, eta, excluded),
        }
    }
}

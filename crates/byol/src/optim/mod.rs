//! UPDATE: how θ and ξ move. An optimiser is a pure function of one tensor's (weight, gradient, state); the tree says which
//! tensors are excluded from decay and adaptation.

pub mod adamw;
pub mod exclusion;
pub mod lars;
pub mod schedule;
pub mod sgd;
pub mod target;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

pub use adamw::AdamW;
pub use lars::Lars;
pub use schedule::Schedule;
pub use sgd::Sgd;

use crate::nn::{Leaf, Tree};

/// Which optimiser, with its settings. The learning rate comes from the [`Schedule`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Rule {
    /// Layer-wise adaptive rates; the paper's.
    Lars(Lars),
    /// Gradient descent with momentum.
    Sgd(Sgd),
    /// Adam with decoupled decay.
    Adamw(AdamW),
}

impl Rule {
    /// Names of the state tensors it keeps for each parameter, each of the parameter's shape, starting at 0.
    pub fn slots(&self) -> &'static [&'static str] {
        match self {
            Rule::Lars(_) | Rule::Sgd(_) => &["momentum"],
            Rule::Adamw(_) => &["m", "v"],
        }
    }
}

/// A rule with its state.
#[derive(Debug, Clone)]
pub struct Optimizer {
    /// How a tensor moves.
    pub rule: Rule,
    /// One tree a slot of the rule, parallel to the parameters.
    pub state: Vec<Tree>,
    /// Updates done.
    pub t: u64,
}

impl Optimizer {
    /// State 0 for these parameters.
    pub fn new(rule: Rule, params: &Tree) -> Self {
        let state = rule.slots().iter().map(|_| params.map(|_, w| w.zeros_like())).collect();
        Optimizer { rule, state, t: 0 }
    }

    /// The parameters after one update with learning rate `eta`. Decay and adaptation pass over excluded tensors
    /// ([`exclusion::is_excluded`]).
    pub fn step(&mut self, params: &Tree, grads: &Tree, eta: f64) -> Tree {
        self.t += 1;
        let mut next = Tree::new();
        for (name, leaf) in params.iter() {
            let w = leaf.value.clone();
            let g = grads.leaf(name).unwrap_or_else(|| panic!("no gradient for {name}")).value.clone();
            let excluded = exclusion::is_excluded(name);
            let (w, slots): (Tensor<1>, Vec<Tensor<1>>) = match &self.rule {
                Rule::Lars(rule) => rule.step(w, g, self.flat(0, name), eta, excluded),
                Rule::Sgd(rule) => rule.step(w, g, self.flat(0, name), eta, excluded),
                Rule::Adamw(rule) => rule.step(w, g, [self.flat(0, name), self.flat(1, name)], self.t, eta, excluded),
            };
            for (tree, value) in self.state.iter_mut().zip(slots) {
                tree.insert(name, Leaf { shape: leaf.shape.clone(), value });
            }
            next.insert(name, Leaf { shape: leaf.shape.clone(), value: w });
        }
        next
    }

    fn flat(&self, slot: usize, name: &str) -> Tensor<1> {
        self.state[slot].leaf(name).unwrap_or_else(|| panic!("no state for {name}")).value.clone()
    }
}

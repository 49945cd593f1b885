//! UPDATE: how θ and ξ move. An optimiser is a pure function of one tensor's (weight, gradient, state); the tree says which
//! tensors are excluded from decay and adaptation. On the CPU one sweep over a tensor does all of it (`sweep.rs`); a test holds it equal to
//! the formulas of the rules' files.

pub mod adamw;
pub mod exclusion;
pub mod lars;
pub mod scale;
pub mod schedule;
pub mod sgd;
mod sweep;
pub mod target;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

pub use adamw::AdamW;
pub use lars::Lars;
pub use scale::LossScale;
pub use schedule::Schedule;
pub use sgd::Sgd;

use crate::{
    device::has_kernels,
    nn::{Leaf, Tree},
};

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

    /// θ after one update with learning rate `eta`, then ξ moved towards it ([`target`]): ξ has no predictor, so what only θ has is
    /// followed by nothing. Decay and adaptation pass over excluded tensors ([`exclusion::is_excluded`]).
    pub fn step(&mut self, theta: &Tree, xi: &Tree, grads: &Tree, eta: f64, tau: f64) -> (Tree, Tree) {
        self.t += 1;
        let (mut next, mut follows) = (Tree::new(), Tree::new());
        for (name, leaf) in theta.iter() {
            let w = leaf.value.clone();
            let g = grads.leaf(name).unwrap_or_else(|| panic!("no gradient for {name}")).value.clone();
            let slots: Vec<Tensor<1>> = self.state.iter().map(|tree| flat(tree, name)).collect();
            let xi = xi.leaf(name).map(|leaf| leaf.value.clone());
            let moves = Moves { t: self.t, eta, tau, excluded: exclusion::is_excluded(name) };
            let by = if has_kernels(&w.device()) { sweep::step } else { composed };
            let (w, slots, xi) = by(&self.rule, w, g, &slots, xi, moves);
            let leaf = |value| Leaf { shape: leaf.shape.clone(), value };
            for (tree, value) in self.state.iter_mut().zip(slots) {
                tree.insert(name, leaf(value));
            }
            if let Some(xi) = xi {
                follows.insert(name, leaf(xi));
            }
            next.insert(name, leaf(w));
        }
        (next, follows)
    }
}

fn flat(tree: &Tree, name: &str) -> Tensor<1> {
    tree.leaf(name).unwrap_or_else(|| panic!("no state for {name}")).value.clone()
}

/// What an update needs to know besides the tensors.
#[derive(Debug, Clone, Copy)]
struct Moves {
    /// Which update, from 1.
    t: u64,
    eta: f64,
    tau: f64,
    excluded: bool,
}

/// One tensor by Burn's own operations, for every device: (w, the rule's slots, ξ).
fn composed(
    rule: &Rule,
    w: Tensor<1>,
    g: Tensor<1>,
    slots: &[Tensor<1>],
    xi: Option<Tensor<1>>,
    Moves { t, eta, tau, excluded }: Moves,
) -> (Tensor<1>, Vec<Tensor<1>>, Option<Tensor<1>>) {
    let slot = |i: usize| slots[i].clone();
    let (w, slots) = match rule {
        Rule::Lars(rule) => rule.step(w, g, slot(0), eta, excluded),
        Rule::Sgd(rule) => rule.step(w, g, slot(0), eta, excluded),
        Rule::Adamw(rule) => rule.step(w, g, [slot(0), slot(1)], t, eta, excluded),
    };
    let xi = xi.map(|xi| target::towards(xi, w.clone(), tau));
    (w, slots, xi)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::nn::tree::host;

    /// Values without a pattern, in -1..1.
    fn noise(n: usize, salt: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| (i.wrapping_add(salt).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
            .collect()
    }

    #[test]
    fn a_sweep_is_the_rule_and_the_average() {
        let device = Device::flex();
        let of = |n: usize, salt: u32| Leaf::new(noise(n, salt), &[n], &device).value;
        let lars = |trust, clip_lr| Rule::Lars(Lars { momentum: 0.9, weight_decay: 1e-2, trust, clip_lr });
        let sgd = |nesterov| Rule::Sgd(Sgd { momentum: 0.9, weight_decay: 1e-2, nesterov });
        let adamw = Rule::Adamw(AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 1e-2 });
        for rule in [lars(0.02, true), lars(0.02, false), lars(50.0, true), sgd(false), sgd(true), adamw] {
            for n in [1, 7, 40, 1 << 14, 70_001] {
                for (excluded, followed) in [(false, true), (true, true), (false, false)] {
                    let slots: Vec<_> = (0..2).map(|i| of(n, 31 + i).square()).collect();
                    let moves = Moves { t: 3, eta: 0.3, tau: 0.9, excluded };
                    let xi = followed.then(|| of(n, 5));
                    let all = [composed, sweep::step].map(|step| {
                        let (w, slots, xi) = step(&rule, of(n, 1), of(n, 2), &slots, xi.clone(), moves);
                        assert_eq!(xi.is_some(), followed);
                        [vec![w], slots, xi.into_iter().collect()].concat()
                    });
                    assert_eq!(all[0].len(), all[1].len());
                    for (a, b) in all[0].iter().zip(&all[1]) {
                        let apart = (a.clone() - b.clone()).abs().max().into_scalar::<f32>();
                        assert!(apart < 2e-5, "{rule:?}, {n} values, excluded {excluded}: {apart} apart");
                    }
                }
            }
        }
    }

    #[test]
    fn weights_of_zero_take_the_plain_step() {
        let device = Device::flex();
        let zeros = || Leaf::new(vec![0.0; 5], &[5], &device).value;
        let ones = || Leaf::new(vec![1.0; 5], &[5], &device).value;
        let rule = Rule::Lars(Lars { momentum: 0.9, weight_decay: 0.1, trust: 0.5, clip_lr: false });
        let moves = Moves { t: 1, eta: 0.25, tau: 1.0, excluded: false };
        for step in [composed, sweep::step] {
            let (w, _, xi) = step(&rule, zeros(), ones(), &[zeros()], Some(ones()), moves);
            assert_eq!(host(w), [-0.25; 5]);
            assert_eq!(host(xi.unwrap()), [1.0; 5], "with τ = 1 the target stays");
        }
    }
}

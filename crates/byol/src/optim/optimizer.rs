//! The optimizer: an update rule with its state for every parameter.

use burn::tensor::Tensor;

use super::{
    exclusion, fused_cpu,
    rule::{Rule, Update},
};
use crate::{
    device::has_kernels,
    nn::{Leaf, Tree},
};

/// An update rule with its state.
#[derive(Debug, Clone)]
pub struct Optimizer {
    /// Update rule.
    pub rule: Rule,
    /// One tree per slot of the rule, parallel to the parameters.
    pub state: Vec<Tree>,
    /// Number of updates done.
    pub t: u64,
}

impl Optimizer {
    /// Creates the initial state, 0, for these parameters.
    pub fn new(rule: Rule, params: &Tree) -> Self {
        let state = rule.slots().iter().map(|_| params.map(|_, w| w.zeros_like())).collect();
        Optimizer { rule, state, t: 0 }
    }

    /// Returns θ after one update with learning rate `eta`. Weight decay and layer-wise adaptation
    /// skip [excluded](exclusion) tensors.
    ///
    /// # Panics
    /// If a parameter has no gradient or no state.
    pub fn step(&mut self, theta: &Tree, grads: &Tree, eta: f64) -> Tree {
        self.t += 1;
        let t = self.t;
        theta.zip(grads, |name, w, g| {
            let slots: Vec<Tensor<1>> = self.state.iter().map(|tree| slot(tree, name).value.clone()).collect();
            let step = if has_kernels(&w.device()) { fused_cpu::step } else { Rule::step };
            let (w, slots) = step(&self.rule, w, g, &slots, Update { t, eta, excluded: exclusion::is_excluded(name) });
            for (tree, value) in self.state.iter_mut().zip(slots) {
                let shape = slot(tree, name).shape.clone();
                tree.insert(name, Leaf { shape, value });
            }
            w
        })
    }
}

fn slot<'a>(tree: &'a Tree, name: &str) -> &'a Leaf {
    tree.leaf(name).unwrap_or_else(|| panic!("no optimizer state for {name}"))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{
        nn::tree::host,
        optim::{AdamW, Lars, Sgd},
    };

    /// Pseudorandom values in -1..1.
    fn noise(n: usize, salt: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| (i.wrapping_add(salt).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
            .collect()
    }

    #[test]
    fn fused_step_matches_rule() {
        let device = Device::flex();
        let tensor = |n: usize, salt: u32| Leaf::new(noise(n, salt), &[n], &device).value;
        let lars = |trust_coefficient, clip_lr| {
            Rule::Lars(Lars { momentum: 0.9, weight_decay: 1e-2, trust_coefficient, clip_lr })
        };
        let sgd = |nesterov| Rule::Sgd(Sgd { momentum: 0.9, weight_decay: 1e-2, nesterov });
        let adamw = Rule::Adamw(AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 1e-2 });
        for rule in [lars(0.02, true), lars(0.02, false), lars(50.0, true), sgd(false), sgd(true), adamw] {
            for n in [1, 7, 40, 1 << 14, 70_001] {
                for excluded in [false, true] {
                    let slots: Vec<_> = (0..2).map(|i| tensor(n, 31 + i).square()).collect();
                    let update = Update { t: 3, eta: 0.3, excluded };
                    let [composed, fused] = [Rule::step, fused_cpu::step].map(|step| {
                        let (w, slots) = step(&rule, tensor(n, 1), tensor(n, 2), &slots, update);
                        [vec![w], slots].concat()
                    });
                    assert_eq!(composed.len(), fused.len());
                    for (a, b) in composed.iter().zip(&fused) {
                        let difference = (a.clone() - b.clone()).abs().max().into_scalar::<f32>();
                        assert!(difference < 2e-5, "{rule:?}, {n} values, excluded {excluded}: {difference}");
                    }
                }
            }
        }
    }

    #[test]
    fn lars_ratio_of_zero_weights_is_one() {
        let device = Device::flex();
        let constant = |value: f32| Leaf::new(vec![value; 5], &[5], &device).value;
        let rule = Rule::Lars(Lars { momentum: 0.9, weight_decay: 0.1, trust_coefficient: 0.5, clip_lr: false });
        let update = Update { t: 1, eta: 0.25, excluded: false };
        for step in [Rule::step, fused_cpu::step] {
            let (w, _) = step(&rule, constant(0.0), constant(1.0), &[constant(0.0)], update);
            assert_eq!(host(w), [-0.25; 5]);
        }
    }
}

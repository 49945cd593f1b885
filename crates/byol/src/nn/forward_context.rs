//! The inputs of a forward pass besides the images: weights, compute precision, and the state of
//! batch norm.

use std::collections::HashMap;

use burn::tensor::{Device, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::{
    batch_norm,
    readers::Weight,
    tree::{Leaf, Tree},
};
use crate::{device::Precision, ranks::Ranks};

/// Settings of batch norm.
///
/// Normalization uses the biased variance (divided by n). Source: deepmind-research `byol`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormConfig {
    /// Decay of the running averages, in [0, 1). Default: 0.9, as in the reference.
    pub decay: f64,
    /// Added to the variance. Default: 1e-5, as in the reference.
    pub eps: f64,
    /// Divide the running average by 1 − decayᵗ after t updates, which removes the bias of its
    /// initial value. Default: true, as in the reference; PyTorch does not.
    pub debias: bool,
}

impl Default for NormConfig {
    fn default() -> Self {
        NormConfig { decay: 0.9, eps: 1e-5, debias: true }
    }
}

impl NormConfig {
    /// Weight of the batch in update `t` of the running average, with t from 1.
    ///
    /// The debiased average (1 − d) Σ dᵗ⁻ⁱ xᵢ / (1 − dᵗ) satisfies aₜ = aₜ₋₁ + m (xₜ − aₜ₋₁) with
    /// m = (1 − d) / (1 − dᵗ), so one value per channel is enough.
    pub fn momentum(&self, t: u64) -> f64 {
        if self.debias { (1.0 - self.decay) / (1.0 - self.decay.powf(t as f64)) } else { 1.0 - self.decay }
    }
}

/// Running statistics of one norm layer. They receive no gradient.
#[derive(Debug, Clone)]
pub struct RunningStats {
    /// `[C]`
    pub mean: Tensor<1>,
    /// `[C]`, biased.
    pub var: Tensor<1>,
    /// Number of batches averaged.
    pub batches: u64,
}

/// Running statistics of all norm layers of a network, by layer name (`layer1.0.bn1`).
#[derive(Debug, Clone, Default)]
pub struct Statistics(IndexMap<String, RunningStats>);

impl Statistics {
    /// Initial statistics (mean 0, variance 1, no batches) for each `(name, channels)`.
    pub fn new<'a>(layers: impl IntoIterator<Item = (&'a str, usize)>, device: &Device) -> Self {
        let initial = |(name, c): (&str, usize)| {
            let (mean, var) = (Tensor::zeros([c], device), Tensor::ones([c], device));
            (name.to_owned(), RunningStats { mean, var, batches: 0 })
        };
        Statistics(layers.into_iter().map(initial).collect())
    }

    /// Iterates over the layers in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &RunningStats)> {
        self.0.iter().map(|(name, stats)| (name.as_str(), stats))
    }

    /// Returns the statistics of a layer.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn get(&self, name: &str) -> &RunningStats {
        self.0.get(name).unwrap_or_else(|| panic!("no norm layer named {name}"))
    }

    /// Adds or replaces a layer.
    pub fn insert(&mut self, name: impl Into<String>, stats: RunningStats) {
        self.0.insert(name.into(), stats);
    }

    /// Converts to named tensors, `NAME.running_mean` and `NAME.running_var`.
    pub fn to_tree(&self) -> Tree {
        let mut tree = Tree::new();
        for (name, stats) in self.iter() {
            for (suffix, value) in [("running_mean", &stats.mean), ("running_var", &stats.var)] {
                tree.insert(format!("{name}.{suffix}"), Leaf { shape: value.dims().to_vec(), value: value.clone() });
            }
        }
        tree
    }

    /// Moves the running averages of a layer towards the statistics of a batch.
    fn update(&mut self, name: &str, norm: &NormConfig, mean: Tensor<1>, var: Tensor<1>) {
        let stats = self.0.get_mut(name).unwrap_or_else(|| panic!("no norm layer named {name}"));
        stats.batches += 1;
        let m = norm.momentum(stats.batches);
        stats.mean = stats.mean.clone() + (mean - stats.mean.clone()).mul_scalar(m);
        stats.var = stats.var.clone() + (var - stats.var.clone()).mul_scalar(m);
    }
}

/// Source of the statistics of batch norm.
#[derive(Debug)]
pub enum Mode<'a> {
    /// The batch, over all of these ranks. Updates the running statistics.
    Train(&'a mut Statistics, Ranks),
    /// The running statistics, unchanged.
    Eval(&'a Statistics),
}

/// The inputs of a forward pass besides the images.
#[derive(Debug)]
pub struct ForwardContext<'a> {
    /// The weights, with or without autodiff.
    pub params: &'a Tree,
    /// Settings of batch norm.
    pub norm: &'a NormConfig,
    /// Compute precision.
    pub precision: Precision,
    /// Training or evaluation.
    pub mode: Mode<'a>,
    /// Weights of layers by name, shared by all passes of the context.
    weights: HashMap<String, Weight>,
}

impl<'a> ForwardContext<'a> {
    /// Context of forward passes with the same weights, such as both views of a step, and of at
    /// most one backward pass through all of them.
    pub fn new(params: &'a Tree, norm: &'a NormConfig, precision: Precision, mode: Mode<'a>) -> Self {
        ForwardContext { params, norm, precision, mode, weights: HashMap::new() }
    }

    /// Weight `NAME.weight` of a convolution or linear layer, `[C_out, C_in, K, K]`. All passes of
    /// the context share it.
    pub(crate) fn weight(&mut self, name: &str) -> Weight {
        if let Some(weight) = self.weights.get(name) {
            return weight.clone();
        }
        let leaf = self.params.leaf(&format!("{name}.weight")).unwrap_or_else(|| panic!("no weight of {name}"));
        let side = |axis: usize| leaf.shape.get(axis).copied().unwrap_or(1);
        let weight = Weight::from(leaf.value.clone().reshape([side(0), side(1), side(2), side(3)]));
        self.weights.insert(name.to_owned(), weight.clone());
        weight
    }

    /// Ranks over which batch norm computes its statistics.
    pub(super) fn ranks(&self) -> Ranks {
        match self.mode {
            Mode::Train(_, ranks) => ranks,
            Mode::Eval(_) => Ranks::SINGLE,
        }
    }

    /// Moves the running statistics of a layer towards those of a batch; no effect in evaluation.
    pub(super) fn update_running_stats(&mut self, name: &str, mean: Tensor<1>, var: Tensor<1>) {
        if let Mode::Train(statistics, _) = &mut self.mode {
            statistics.update(name, self.norm, mean.without_autodiff(), var.without_autodiff());
        }
    }

    /// Casts an operand of a convolution or linear layer to the compute precision.
    pub(super) fn to_compute_precision<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        x.cast(self.precision.dtype())
    }

    /// Batch norm over all axes but axis 1. In training it computes in f32 whatever the precision
    /// of `x`, over all ranks.
    ///
    /// # Shapes
    /// `x`: `[N, C, …]`; returns the same. Weight and bias `NAME.weight`, `NAME.bias`: `[C]`.
    pub fn batch_norm<const D: usize>(&mut self, name: &str, x: Tensor<D>) -> Tensor<D> {
        let gamma = self.params.get::<1>(&format!("{name}.weight"));
        let beta = self.params.get::<1>(&format!("{name}.bias"));
        match &mut self.mode {
            Mode::Train(statistics, ranks) => {
                let (y, mean, var) = batch_norm::batch_norm(x, gamma, beta, self.norm.eps, *ranks);
                statistics.update(name, self.norm, mean.without_autodiff(), var.without_autodiff());
                y
            }
            Mode::Eval(statistics) => {
                let stats = statistics.get(name);
                // Constants, but on the autodiff backend if the weights are.
                let constant = |t: &Tensor<1>| if gamma.is_autodiff() { t.clone().autodiff() } else { t.clone() };
                let (mean, var) = (constant(&stats.mean), constant(&stats.var));
                burn::tensor::module::batch_norm(x, gamma, beta, mean, var, self.norm.eps)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debiased_momentum_decreases_from_one_to_one_minus_decay() {
        let norm = NormConfig::default();
        assert!((norm.momentum(1) - 1.0).abs() < 1e-12);
        assert!((norm.momentum(1000) - 0.1).abs() < 1e-12);
    }
}

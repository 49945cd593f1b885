//! What a forward pass needs beside its input: the weights, and what batch norm does with its statistics.

use burn::tensor::{Device, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::{
    norm,
    tree::{Leaf, Tree},
};
use crate::{device::Precision, ranks::Ranks};

/// Batch norm's settings.
///
/// Normalisation uses the biased variance (divided by n). Source: deepmind-research `byol`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormConfig {
    /// Share of the running average that stays at an update, in [0, 1). 0.9 as in the reference.
    pub decay: f64,
    /// Added to the variance. 1e-5 as in the reference.
    pub eps: f64,
    /// Divide the running average by 1 − decayᵗ after t updates, so that it does not remember where it started. The
    /// reference does (true); PyTorch does not (false).
    pub debias: bool,
}

impl Default for NormConfig {
    fn default() -> Self {
        NormConfig { decay: 0.9, eps: 1e-5, debias: true }
    }
}

impl NormConfig {
    /// The weight of the batch in the `t`-th update of the running average, t from 1.
    ///
    /// The debiased average (1 − d) Σ dᵗ⁻ⁱ xᵢ / (1 − dᵗ) obeys aₜ = aₜ₋₁ + m (xₜ − aₜ₋₁) with m = (1 − d) / (1 − dᵗ), so one number
    /// a channel is enough.
    pub fn momentum(&self, t: u64) -> f64 {
        if self.debias { (1.0 - self.decay) / (1.0 - self.decay.powf(t as f64)) } else { 1.0 - self.decay }
    }
}

/// Running statistics of one norm layer. No gradient reaches them.
#[derive(Debug, Clone)]
pub struct Running {
    /// `[C]`
    pub mean: Tensor<1>,
    /// `[C]`, biased.
    pub var: Tensor<1>,
    /// How many batches they have seen.
    pub batches: u64,
}

/// Running statistics of all norm layers of a network, by the layer's name (`layer1.0.bn1`).
#[derive(Debug, Clone, Default)]
pub struct Statistics(IndexMap<String, Running>);

impl Statistics {
    /// Mean 0, variance 1, nothing seen, for each `(name, channels)`.
    pub fn new<'a>(layers: impl IntoIterator<Item = (&'a str, usize)>, device: &Device) -> Self {
        let fresh = |(name, c): (&str, usize)| {
            (name.to_owned(), Running { mean: Tensor::zeros([c], device), var: Tensor::ones([c], device), batches: 0 })
        };
        Statistics(layers.into_iter().map(fresh).collect())
    }

    /// Layers in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Running)> {
        self.0.iter().map(|(name, running)| (name.as_str(), running))
    }

    /// The layer of that name.
    pub fn get(&self, name: &str) -> &Running {
        self.0.get(name).unwrap_or_else(|| panic!("no norm layer named {name}"))
    }

    /// Adds or replaces a layer.
    pub fn insert(&mut self, name: impl Into<String>, running: Running) {
        self.0.insert(name.into(), running);
    }

    /// The layers whose names begin with `prefix`, with the prefix cut off.
    pub fn under(&self, prefix: &str) -> Statistics {
        let cut = |(name, r): (&String, &Running)| Some((name.strip_prefix(prefix)?.to_owned(), r.clone()));
        Statistics(self.0.iter().filter_map(cut).collect())
    }

    /// As named tensors, `NAME.running_mean` and `NAME.running_var`.
    pub fn to_tree(&self) -> Tree {
        let mut tree = Tree::new();
        for (name, r) in self.iter() {
            for (what, value) in [("running_mean", &r.mean), ("running_var", &r.var)] {
                tree.insert(format!("{name}.{what}"), Leaf { shape: value.dims().to_vec(), value: value.clone() });
            }
        }
        tree
    }

    fn update(&mut self, name: &str, norm: &NormConfig, mean: Tensor<1>, var: Tensor<1>) {
        let r = self.0.get_mut(name).unwrap_or_else(|| panic!("no norm layer named {name}"));
        r.batches += 1;
        let m = norm.momentum(r.batches);
        r.mean = r.mean.clone() + (mean - r.mean.clone()).mul_scalar(m);
        r.var = r.var.clone() + (var - r.var.clone()).mul_scalar(m);
    }
}

/// Where batch norm takes its statistics from.
#[derive(Debug)]
pub enum Mode<'a> {
    /// The batch of these ranks together; the running statistics move.
    Train(&'a mut Statistics, Ranks),
    /// The running statistics, which stay as they are.
    Eval(&'a Statistics),
}

/// One forward pass: weights, norm settings, precision, mode.
#[derive(Debug)]
pub struct Pass<'a> {
    /// The weights, tracked by autodiff or not.
    pub params: &'a Tree,
    /// Batch norm's settings.
    pub norm: &'a NormConfig,
    /// Of the products.
    pub precision: Precision,
    /// Training or evaluation.
    pub mode: Mode<'a>,
}

impl Pass<'_> {
    /// Whether batch norm uses the batch's statistics.
    pub fn trains(&self) -> bool {
        matches!(self.mode, Mode::Train(..))
    }

    /// Whose batches batch norm sees.
    pub(super) fn ranks(&self) -> Ranks {
        match self.mode {
            Mode::Train(_, ranks) => ranks,
            Mode::Eval(_) => Ranks::ALONE,
        }
    }

    /// Takes a batch's statistics into the running ones; in evaluation they stay as they are.
    pub(super) fn saw(&mut self, name: &str, mean: Tensor<1>, var: Tensor<1>) {
        if let Mode::Train(statistics, _) = &mut self.mode {
            statistics.update(name, self.norm, mean.without_autodiff(), var.without_autodiff());
        }
    }

    /// What convolutions and linear layers of Burn's operations multiply: `x` in this pass's precision.
    pub(super) fn operand<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        x.cast(self.precision.dtype())
    }

    /// Batch norm over all axes but axis 1; in training in f32, whatever `x` is of, over all ranks.
    ///
    /// # Shapes
    /// `x`: `[N, C, …]`; returns the same. Weight and bias `NAME.weight`, `NAME.bias`: `[C]`.
    pub fn batch_norm<const D: usize>(&mut self, name: &str, x: Tensor<D>) -> Tensor<D> {
        let gamma = self.params.get::<1>(&format!("{name}.weight"));
        let beta = self.params.get::<1>(&format!("{name}.bias"));
        match &mut self.mode {
            Mode::Train(statistics, ranks) => {
                let (y, mean, variance) = norm::batch_norm(x, gamma, beta, self.norm.eps, *ranks);
                statistics.update(name, self.norm, mean.without_autodiff(), variance.without_autodiff());
                y
            }
            Mode::Eval(statistics) => {
                let r = statistics.get(name);
                // The statistics are constants; they join the graph of the weights where there is one.
                let join = |t: &Tensor<1>| if gamma.is_autodiff() { t.clone().autodiff() } else { t.clone() };
                let (mean, var) = (join(&r.mean), join(&r.var));
                burn::tensor::module::batch_norm(x, gamma, beta, mean, var, self.norm.eps)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debiased_momentum_starts_at_one_and_falls_to_the_decay() {
        let norm = NormConfig::default();
        assert!((norm.momentum(1) - 1.0).abs() < 1e-12);
        assert!((norm.momentum(1000) - 0.1).abs() < 1e-12);
    }
}

//! Weight initialization.
//!
//! Source: deepmind-research `byol` on Haiku. Convolution and linear weights are drawn from a
//! normal distribution truncated at two standard deviations, with scale parameter 1/√fan_in (the
//! resulting std is about 0.88 of it). Biases are 0, norm scales 1 and shifts 0. Every tensor has a
//! random stream of its own, derived from its name, so adding a layer does not change the others.

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::random::{self, uniform};

/// Initialization scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// The reference's: truncated normal, 1/√fan_in.
    #[default]
    Reference,
    /// torchvision's and PyTorch's: He normal by fan-out for convolutions, uniform ±1/√fan_in for
    /// linear layers.
    Torch,
}

/// Draws `n` values of a normal distribution of std 1/√fan_in, truncated at two standard
/// deviations.
pub fn truncated_normal(rng: &mut ChaCha8Rng, n: usize, fan_in: usize) -> Vec<f32> {
    let scale = 1.0 / (fan_in as f64).sqrt();
    (0..n).map(|_| (random::truncated_normal(rng) * scale) as f32).collect()
}

/// Draws `n` values of He's normal distribution by fan-out, of std √(2 / fan_out): torchvision's
/// initialization of convolutions.
pub(crate) fn he_normal_fan_out(rng: &mut ChaCha8Rng, n: usize, fan_out: usize) -> Vec<f32> {
    let scale = (2.0 / fan_out as f64).sqrt();
    (0..n).map(|_| (random::normal(rng) * scale) as f32).collect()
}

/// Draws `n` uniform values in ±1/√fan_in: PyTorch's default for linear layers.
pub(crate) fn torch_linear(rng: &mut ChaCha8Rng, n: usize, fan_in: usize) -> Vec<f32> {
    let scale = 1.0 / (fan_in as f64).sqrt();
    (0..n).map(|_| ((2.0 * uniform(rng) - 1.0) * scale) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_normal_has_the_documented_std_and_bounds() {
        let mut rng = random::stream(&[random::Domain::Weights as u64, 1]);
        let x = truncated_normal(&mut rng, 40_000, 100);
        let var = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
        assert!((var.sqrt() - 0.8796 * 0.1).abs() < 1e-3, "std {}", var.sqrt());
        assert!(x.iter().all(|v| v.abs() <= 0.2 + 1e-6));
    }
}

//! Moving average of the online weights, which defines the target network:
//! ξ ← τ ξ + (1 − τ) θ (arXiv:2006.07733, §3.1, eq. 1).
//!
//! Computed as ξ + (1 − τ)(θ − ξ), as in deepmind-research `byol`, so that τ = 1 preserves the bits
//! of ξ. The running statistics of batch norm are not averaged; ξ has its own.

use burn::tensor::Tensor;

use super::fused_cpu;
use crate::{device::has_kernels, nn::Tree};

/// Moves ξ towards θ with target decay τ in [0, 1]. Parameters that only θ has, those of the
/// predictor, are ignored.
///
/// # Panics
/// If θ lacks a parameter of ξ.
pub fn ema(xi: &Tree, theta: &Tree, tau: f64) -> Tree {
    xi.zip(theta, |_, xi, theta| match has_kernels(&xi.device()) {
        true => fused_cpu::ema(xi, theta, tau),
        false => composed(xi, theta, tau),
    })
}

/// The moving average of one tensor composed of Burn's operations, for every device.
fn composed(xi: Tensor<1>, theta: Tensor<1>, tau: f64) -> Tensor<1> {
    xi.clone() + (theta - xi).mul_scalar(1.0 - tau)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::nn::{Leaf, tree::host};

    fn leaf(n: usize, salt: f32) -> Leaf {
        let values = (0..n).map(|i| (i as f32 * 0.37 + salt).sin()).collect();
        Leaf::new(values, &[n], &Device::flex())
    }

    #[test]
    fn fused_ema_matches_composed() {
        for n in [1, 7, 40, 1 << 14, 70_001] {
            let (xi, theta) = (leaf(n, 0.5).value, leaf(n, 2.0).value);
            let [a, b] = [composed, fused_cpu::ema].map(|ema| ema(xi.clone(), theta.clone(), 0.9));
            let difference = (a - b).abs().max().into_scalar::<f32>();
            assert!(difference < 2e-5, "{n} values differ by {difference}");
        }
    }

    #[test]
    fn tau_one_preserves_the_target() {
        for ema in [composed, fused_cpu::ema] {
            let xi = leaf(40, 0.5).value;
            assert_eq!(host(ema(xi.clone(), leaf(40, 2.0).value, 1.0)), host(xi));
        }
    }

    #[test]
    fn target_has_no_predictor() {
        let (mut xi, mut theta) = (Tree::new(), Tree::new());
        xi.insert("w", leaf(3, 0.0));
        theta.insert("predictor.w", leaf(5, 1.0));
        theta.insert("w", leaf(3, 1.0));
        let moved = ema(&xi, &theta, 0.0);
        assert_eq!(moved.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["w"]);
        let difference = (moved.get::<1>("w") - theta.get::<1>("w")).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-6);
    }
}

//! Moving average of the online parameters: ξ ← τ ξ + (1 − τ) θ (arXiv:2006.07733, §3.1, eq. 1).
//!
//! Written ξ + (1 − τ)(θ − ξ), as in deepmind-research `byol`, so that τ = 1 leaves ξ's bits as they are. ξ has no predictor: names
//! that only θ has are passed over. Batch norm's running statistics are not averaged; ξ has its own.

use crate::nn::Tree;

/// ξ moved towards θ. τ in [0, 1].
pub fn towards(xi: &Tree, theta: &Tree, tau: f64) -> Tree {
    xi.zip(theta, |_, xi, theta| xi.clone() + (theta - xi).mul_scalar(1.0 - tau))
}

//! Moving average of the online parameters: ξ ← τ ξ + (1 − τ) θ (arXiv:2006.07733, §3.1, eq. 1).
//!
//! Written ξ + (1 − τ)(θ − ξ), as in deepmind-research `byol`, so that τ = 1 leaves ξ's bits as they are. ξ has no predictor: names
//! that only θ has are passed over. Batch norm's running statistics are not averaged; ξ has its own.

use burn::tensor::Tensor;

/// One tensor of ξ moved towards θ's. τ in [0, 1].
pub fn towards(xi: Tensor<1>, theta: Tensor<1>, tau: f64) -> Tensor<1> {
    xi.clone() + (theta - xi).mul_scalar(1.0 - tau)
}

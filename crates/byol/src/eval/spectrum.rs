//! What the singular values of the representations say, without labels.

use nalgebra::DMatrix;

use super::Features;

/// RankMe (Garrido et al. 2023, arXiv:2210.02885): exp of the entropy of the singular values, scaled to sum 1. From 1 (all rows on a
/// line) to min(N, F).
pub fn rankme(features: &Features) -> f64 {
    let values = singular_values(features);
    let sum: f64 = values.iter().sum();
    if sum <= 0.0 {
        return 1.0; // all zero: as collapsed as can be
    }
    let entropy: f64 = values.iter().map(|s| s / sum + 1e-7).map(|p| -p * p.ln()).sum();
    entropy.exp()
}

/// By way of the eigenvalues of the smaller Gram matrix, in f64. The square root of one is good to 1e-8 of the largest, below the 1e-7
/// that RankMe adds.
pub fn singular_values(features: &Features) -> Vec<f64> {
    let x = DMatrix::from_row_iterator(features.n, features.dim, features.values.iter().map(|v| f64::from(*v)));
    let gram = if features.n < features.dim { &x * x.transpose() } else { x.tr_mul(&x) };
    let mut values: Vec<f64> = gram.symmetric_eigenvalues().iter().map(|e| e.max(0.0).sqrt()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

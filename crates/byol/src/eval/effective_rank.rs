//! Label-free metrics of the spectrum: RankMe, LiDAR and α-ReQ.

use nalgebra::{DMatrix, DVector};

use super::Features;

/// exp of the entropy of `values` normalized to sum 1, with `eps` added to each.
fn effective_rank(values: &[f64], eps: f64) -> f64 {
    let sum: f64 = values.iter().sum();
    if sum <= 0.0 {
        return 1.0; // all zero: fully collapsed
    }
    let entropy: f64 = values.iter().map(|s| s / sum + eps).map(|p| -p * p.ln()).sum();
    entropy.exp()
}

/// RankMe (Garrido et al. 2023, arXiv:2210.02885): exp of the entropy of the singular values
/// normalized to sum 1. From 1 (all rows on a line) to min(N, F).
///
/// # Examples
///
/// ```
/// use byol::eval::{Features, effective_rank::rankme};
///
/// // All rows on one line: rank 1.
/// let line = Features { n: 3, dim: 2, values: vec![1.0, 2.0, 2.0, 4.0, 3.0, 6.0] };
/// assert!((rankme(&line) - 1.0).abs() < 0.01);
/// ```
pub fn rankme(features: &Features) -> f64 {
    effective_rank(&singular_values(features), 1e-7)
}

/// RankMe of the L2-normalized rows. With batch norm's running statistics a single representation
/// can be fifty times longer than the others and dominate [`rankme`]; here every image has equal
/// weight.
pub(crate) fn rankme_normalized(features: &Features) -> f64 {
    rankme(&features.l2_normalized())
}

/// Default of [`rankme_normalized`] when reading files written before it was recorded.
pub(crate) fn not_recorded() -> f64 {
    f64::NAN
}

/// Singular values in f64, largest first, as square roots of the eigenvalues of the smaller Gram
/// matrix. Accurate to 1e-8 of the largest, below the 1e-7 that RankMe adds.
pub(crate) fn singular_values(features: &Features) -> Vec<f64> {
    let x = to_matrix(features);
    let gram = if features.n < features.dim { &x * x.transpose() } else { x.tr_mul(&x) };
    descending(gram.symmetric_eigenvalues().iter().map(|e| e.max(0.0).sqrt()).collect())
}

/// Eigenvalues of the covariance matrix (normalized by N), largest first.
pub fn covariance_eigenvalues(features: &Features) -> Vec<f64> {
    let x = centered(to_matrix(features));
    let gram = if features.n < features.dim { &x * x.transpose() } else { x.tr_mul(&x) };
    let n = features.n.max(1) as f64;
    descending(gram.symmetric_eigenvalues().iter().map(|e| (e / n).max(0.0)).collect())
}

/// α-ReQ (Agrawal et al. 2022, NeurIPS): decay exponent of the covariance eigenvalues, λⱼ ∝ j^−α,
/// by least squares of ln λⱼ on ln j over j = `first` ..= `last`, counted from 1. About 1 is best;
/// larger values mean few effective directions. `None` if fewer than two eigenvalues exceed
/// rounding error.
pub fn alpha_req(features: &Features, first: usize, last: usize) -> Option<f64> {
    let eigenvalues = covariance_eigenvalues(features);
    let threshold = eigenvalues.first()? * 1e-12;
    let points: Vec<(f64, f64)> = (first..=last.min(eigenvalues.len()))
        .filter(|j| eigenvalues[j - 1] > threshold)
        .map(|j| ((j as f64).ln(), eigenvalues[j - 1].ln()))
        .collect();
    let n = points.len() as f64;
    let (x_mean, y_mean) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let xy: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let xx: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
    (points.len() > 1 && xx > 0.0).then(|| -xy / xx)
}

/// LiDAR (Thilak et al. 2024, arXiv:2312.04000): effective number of directions in which images
/// differ more than the views of one image do. From 1 to min(images − 1, F).
///
/// # Shapes
/// `views`: `[images · q, F]`, the `q` views of an image in adjacent rows.
///
/// # Panics
/// If there are fewer than two images or two views per image.
pub fn lidar(views: &Features, q: usize) -> f64 {
    const DELTA: f64 = 1e-4;
    let n = views.n / q;
    assert!(n > 1 && q > 1, "LiDAR needs at least 2 images and 2 views, got {n} and {q}");
    let x = reduce_columns(to_matrix(views));
    let d = x.ncols();
    let mut means = DMatrix::zeros(n, d);
    let mut residuals = DMatrix::zeros(n * q, d);
    for image in 0..n {
        let mean = x.rows(image * q, q).row_mean();
        for view in 0..q {
            residuals.set_row(image * q + view, &(x.row(image * q + view) - &mean));
        }
        means.set_row(image, &mean);
    }
    let means = centered(means);
    let between = means.tr_mul(&means) / (n - 1) as f64;
    let within = residuals.tr_mul(&residuals) / (n * (q - 1)) as f64 + DMatrix::identity(d, d) * DELTA;
    let within = within.symmetric_eigen();
    let scales = DMatrix::from_diagonal(&DVector::from_iterator(d, within.eigenvalues.iter().map(|e| e.powf(-0.5))));
    let whitening = &within.eigenvectors * scales * within.eigenvectors.transpose();
    let eigenvalues: Vec<f64> =
        (&whitening * between * &whitening).symmetric_eigenvalues().iter().map(|e| e.max(0.0)).collect();
    effective_rank(&eigenvalues, 1e-8)
}

/// Rotates the rows into at most N coordinates. Distances, angles and the nonzero eigenvalues are
/// preserved; an eigenvalue problem of 2048 features would take minutes.
fn reduce_columns(x: DMatrix<f64>) -> DMatrix<f64> {
    if x.ncols() <= x.nrows() {
        return x;
    }
    let gram = (&x * x.transpose()).symmetric_eigen();
    let lengths = gram.eigenvalues.map(|e| e.max(0.0).sqrt());
    gram.eigenvectors * DMatrix::from_diagonal(&lengths)
}

fn to_matrix(features: &Features) -> DMatrix<f64> {
    DMatrix::from_row_iterator(features.n, features.dim, features.values.iter().map(|v| f64::from(*v)))
}

/// Subtracts the mean of each column.
fn centered(mut x: DMatrix<f64>) -> DMatrix<f64> {
    let mean = x.row_mean();
    x.row_iter_mut().for_each(|mut row| row -= &mean);
    x
}

fn descending(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lidar_is_invariant_to_rotation_into_more_dimensions() {
        // 8 images of 3 views with 5 features, and the same rotated into 40 dimensions.
        let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 11) % 1000) as f32 / 500.0 - 1.0;
        let narrow = Features { n: 24, dim: 5, values: (0..120).map(|i| value(i) + (i / 15) as f32).collect() };
        // Columns of a Hadamard matrix of order 8, repeated five times: orthogonal, of length √40.
        let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        let rotate = |row: &[f32]| -> Vec<f32> {
            (0..40).map(|i| (0..5).map(|j| row[j] * sign(i % 8, j + 1)).sum::<f32>() / 40f32.sqrt()).collect()
        };
        let wide = Features { n: 24, dim: 40, values: (0..24).flat_map(|i| rotate(narrow.row(i))).collect() };
        assert!(
            (lidar(&narrow, 3) / lidar(&wide, 3) - 1.0).abs() < 1e-3,
            "{} and {}",
            lidar(&narrow, 3),
            lidar(&wide, 3)
        );
    }
}

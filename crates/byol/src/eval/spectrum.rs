//! What the spectrum of the representations says, without labels.

use nalgebra::{DMatrix, DVector};

use super::Features;

/// exp of the entropy of values scaled to sum 1, with `eps` added to each: how many of them count.
fn effective_rank(values: &[f64], eps: f64) -> f64 {
    let sum: f64 = values.iter().sum();
    if sum <= 0.0 {
        return 1.0; // all zero: as collapsed as can be
    }
    let entropy: f64 = values.iter().map(|s| s / sum + eps).map(|p| -p * p.ln()).sum();
    entropy.exp()
}

/// RankMe (Garrido et al. 2023, arXiv:2210.02885): exp of the entropy of the singular values, scaled to sum 1. From 1 (all rows on a
/// line) to min(N, F).
pub fn rankme(features: &Features) -> f64 {
    effective_rank(&singular_values(features), 1e-7)
}

/// RankMe of the L2-normalised rows. Batch norm's running statistics can give a single image fifty times the length of the others, and its
/// direction is then nearly all that RankMe itself counts; here each image counts once.
pub fn directions(features: &Features) -> f64 {
    rankme(&features.unit())
}

/// What stands for [`directions`] where nobody wrote it down.
pub(crate) fn unsaid() -> f64 {
    f64::NAN
}

/// By way of the eigenvalues of the smaller Gram matrix, in f64. The square root of one is good to 1e-8 of the largest, below the 1e-7
/// that RankMe adds.
pub fn singular_values(features: &Features) -> Vec<f64> {
    let x = matrix(features);
    let gram = if features.n < features.dim { &x * x.transpose() } else { x.tr_mul(&x) };
    descending(gram.symmetric_eigenvalues().iter().map(|e| e.max(0.0).sqrt()).collect())
}

/// Eigenvalues of the covariance (divided by N), largest first.
pub fn covariance_eigenvalues(features: &Features) -> Vec<f64> {
    let x = centred(matrix(features));
    let gram = if features.n < features.dim { &x * x.transpose() } else { x.tr_mul(&x) };
    let n = features.n.max(1) as f64;
    descending(gram.symmetric_eigenvalues().iter().map(|e| (e / n).max(0.0)).collect())
}

/// α-ReQ (Agrawal et al. 2022, NeurIPS): how fast the eigenvalues of the covariance fall, λⱼ ∝ j^−α, by least squares of ln λⱼ on ln j
/// over j = `first` ..= `last`, from 1. About 1 is best; much above, few directions count. None where fewer than two eigenvalues are above
/// rounding.
pub fn alpha_req(features: &Features, first: usize, last: usize) -> Option<f64> {
    let values = covariance_eigenvalues(features);
    let least = values.first()? * 1e-12;
    let points: Vec<(f64, f64)> = (first..=last.min(values.len()))
        .filter(|j| values[j - 1] > least)
        .map(|j| ((j as f64).ln(), values[j - 1].ln()))
        .collect();
    let n = points.len() as f64;
    let (x_mean, y_mean) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let xy: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let xx: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
    (points.len() > 1 && xx > 0.0).then(|| -xy / xx)
}

/// LiDAR (Thilak et al. 2024, arXiv:2312.04000): in how many directions objects differ more than the views of one object do. `views`:
/// `[objects · q, F]`, the `q` views of an object side by side. From 1 to min(objects − 1, F).
///
/// # Panics
/// If there are fewer than two objects or two views.
pub fn lidar(views: &Features, q: usize) -> f64 {
    const DELTA: f64 = 1e-4;
    let n = views.n / q;
    assert!(n > 1 && q > 1, "LiDAR compares objects and views: {n} objects of {q} views are too few");
    let x = coordinates(matrix(views));
    let d = x.ncols();
    let mut means = DMatrix::zeros(n, d);
    let mut apart = DMatrix::zeros(n * q, d);
    for object in 0..n {
        let mean = x.rows(object * q, q).row_mean();
        for view in 0..q {
            apart.set_row(object * q + view, &(x.row(object * q + view) - &mean));
        }
        means.set_row(object, &mean);
    }
    let means = centred(means);
    let between = means.tr_mul(&means) / (n - 1) as f64;
    let within = apart.tr_mul(&apart) / (n * (q - 1)) as f64 + DMatrix::identity(d, d) * DELTA;
    let within = within.symmetric_eigen();
    let whiten = DMatrix::from_diagonal(&DVector::from_iterator(d, within.eigenvalues.iter().map(|e| e.powf(-0.5))));
    let half = &within.eigenvectors * whiten * within.eigenvectors.transpose();
    let values: Vec<f64> = (&half * between * &half).symmetric_eigenvalues().iter().map(|e| e.max(0.0)).collect();
    effective_rank(&values, 1e-8)
}

/// The same rows in as many coordinates as there are rows, where that is fewer: distances and angles stay, and so do the eigenvalues of what
/// they span; an eigenvalue problem of 2048 features would take minutes.
fn coordinates(x: DMatrix<f64>) -> DMatrix<f64> {
    if x.ncols() <= x.nrows() {
        return x;
    }
    let gram = (&x * x.transpose()).symmetric_eigen();
    let lengths = gram.eigenvalues.map(|e| e.max(0.0).sqrt());
    gram.eigenvectors * DMatrix::from_diagonal(&lengths)
}

fn matrix(features: &Features) -> DMatrix<f64> {
    DMatrix::from_row_iterator(features.n, features.dim, features.values.iter().map(|v| f64::from(*v)))
}

/// Less the mean of each column.
fn centred(mut x: DMatrix<f64>) -> DMatrix<f64> {
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
    fn lidar_of_many_features_is_that_of_their_span() {
        // 8 objects of 3 views with 5 features, and the same turned into 40.
        let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 11) % 1000) as f32 / 500.0 - 1.0;
        let few = Features { n: 24, dim: 5, values: (0..120).map(|i| value(i) + (i / 15) as f32).collect() };
        // Columns of a Hadamard matrix of order 8, five times: orthogonal, and of length √40.
        let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        let turned = |row: &[f32]| -> Vec<f32> {
            (0..40).map(|i| (0..5).map(|j| row[j] * sign(i % 8, j + 1)).sum::<f32>() / 40f32.sqrt()).collect()
        };
        let many = Features { n: 24, dim: 40, values: (0..24).flat_map(|i| turned(few.row(i))).collect() };
        assert!((lidar(&few, 3) / lidar(&many, 3) - 1.0).abs() < 1e-3, "{} and {}", lidar(&few, 3), lidar(&many, 3));
    }
}

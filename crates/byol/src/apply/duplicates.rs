//! Near-duplicates. No fixed cosine threshold works: an encoder with little spread gives unrelated
//! images 0.99, and in a dense region, such as sunsets, all images are close. So two images are
//! near-duplicates if they are far closer to each other than to their neighborhoods. Distances are
//! 1 − cosine of whitened rows: directions in which all images vary carry little information about
//! a pair.

use byol_kernels::{isa, matmul};
use nalgebra::DMatrix;

use super::{neighbors, search::Index};
use crate::eval::Features;

/// Pair of near-duplicate rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// Lower row, or row of the first set.
    pub a: usize,
    /// Higher row, or row of the second set.
    pub b: usize,
    /// Distance relative to the distance to the tenth neighbor (the geometric mean of both rows';
    /// across two sets that of `b` in the first set): 0 is identical, 1 is as far as the
    /// neighborhood.
    pub relative_distance: f32,
}

/// Default threshold on [`Pair::relative_distance`] (chosen in docs/log/near-duplicates.md).
pub const THRESHOLD: f32 = 0.5;

/// Rank of the neighbor that measures the local density.
const NEIGHBORS: usize = 10;

/// Whitened cosine from which rows are always near-duplicates: with many copies, the tenth neighbor
/// is a copy too.
const IDENTICAL_COSINE: f32 = 0.99;

/// Shrinkage of the second moments towards a multiple of the identity before whitening, as a
/// fraction of the mean variance; scaled up if there are few rows. Chosen on planted copies
/// (docs/log).
const SHRINKAGE: f64 = 0.3;

/// Maximum number of rows the second moments are computed from.
const MAX_MOMENT_ROWS: usize = 1 << 16;

/// Finds all pairs within a set with a relative distance of at most `threshold` (below 1), each
/// once, sorted by row. `on_progress` receives the fraction done, up to 1.
pub fn within(index: &Index, threshold: f32, on_progress: impl FnMut(f64)) -> Vec<Pair> {
    let rows = whiten(index.rows(), &whitening_matrix(index.rows()));
    let nearest = neighbors::nearest(&rows, &rows, NEIGHBORS + 1, on_progress);
    let others = |i: usize| nearest[i].iter().filter(move |(j, _)| *j != i).take(NEIGHBORS);
    let radius: Vec<f32> = (0..rows.n).map(|i| others(i).last().map_or(0.0, |(_, c)| distance(*c))).collect();
    // With a threshold below 1, one row of each pair is among the ten nearest of the other.
    let mut pairs: Vec<Pair> = (0..rows.n)
        .flat_map(|i| others(i).map(move |(j, c)| (i.min(*j), i.max(*j), *c)))
        .filter_map(|(a, b, c)| near_duplicate(a, b, c, (radius[a] * radius[b]).sqrt(), threshold))
        .collect();
    pairs.sort_by_key(|p| (p.a, p.b));
    pairs.dedup_by_key(|p| (p.a, p.b));
    pairs
}

/// Finds all pairs of a row of `index` and a row of `other` with a relative distance of at most
/// `threshold`, nearest first. `other` must be transformed by [`Index::transform`]. `on_progress`
/// receives the fraction done, up to 1.
pub fn across(index: &Index, other: &Features, threshold: f32, on_progress: impl FnMut(f64)) -> Vec<Pair> {
    let whitening = whitening_matrix(index.rows());
    let (rows, other) = (whiten(index.rows(), &whitening), whiten(other, &whitening));
    let nearest = neighbors::nearest(&rows, &other, NEIGHBORS, on_progress);
    let row_pairs = |(b, nearest): (usize, &Vec<(usize, f32)>)| -> Vec<Pair> {
        let radius = nearest.last().map_or(0.0, |(_, c)| distance(*c));
        nearest.iter().filter_map(|(a, c)| near_duplicate(*a, b, *c, radius, threshold)).collect()
    };
    let mut pairs: Vec<Pair> = nearest.iter().enumerate().flat_map(row_pairs).collect();
    pairs.sort_by(|p, q| p.relative_distance.total_cmp(&q.relative_distance).then((p.b, p.a).cmp(&(q.b, q.a))));
    pairs
}

fn distance(cosine: f32) -> f32 {
    (1.0 - cosine).max(0.0)
}

/// Returns the pair if its rows are near-duplicates.
fn near_duplicate(a: usize, b: usize, cosine: f32, radius: f32, threshold: f32) -> Option<Pair> {
    // Identical rows can have a radius of 0, to which no distance is relative.
    let is_identical = cosine >= IDENTICAL_COSINE;
    let relative_distance =
        if is_identical { distance(cosine) } else { distance(cosine) / radius.max(f32::MIN_POSITIVE) };
    (relative_distance <= threshold || is_identical).then_some(Pair { a, b, relative_distance })
}

/// Inverse Cholesky factor of the rows' shrunk second moments, `[F, F]`: whitened rows have equal
/// variances.
fn whitening_matrix(rows: &Features) -> Vec<f32> {
    let dim = rows.dim;
    let step = rows.n.div_ceil(MAX_MOMENT_ROWS).max(1);
    let sample = rows.subset(&(0..rows.n).step_by(step).collect::<Vec<_>>());
    let moments = matmul::tn(isa::current(), &sample.values, &sample.values, [sample.n, dim, dim]);
    let mut moments = DMatrix::from_fn(dim, dim, |i, j| f64::from(moments[i * dim + j]) / sample.n.max(1) as f64);
    let ridge = moments.trace() / dim as f64 * SHRINKAGE * (1.0 + dim as f64 / sample.n.max(1) as f64);
    (0..dim).for_each(|i| moments[(i, i)] += ridge.max(1e-12));
    let factor = moments.cholesky().expect("second moments plus a positive diagonal are positive definite").l();
    let inverse = factor.solve_lower_triangular(&DMatrix::identity(dim, dim)).expect("the diagonal is positive");
    // nalgebra is column-major, the kernels are row-major.
    inverse.transpose().iter().map(|v| *v as f32).collect()
}

fn whiten(rows: &Features, whitening: &[f32]) -> Features {
    let values = matmul::nt(isa::current(), &rows.values, whitening, [rows.n, rows.dim, rows.dim]);
    Features { values, ..*rows }.l2_normalized()
}

/// Groups rows connected by pairs. Groups have at least two rows, are sorted, and are ordered by
/// their first row.
pub fn groups(n: usize, pairs: &[Pair]) -> Vec<Vec<usize>> {
    // Union-find whose roots are the lowest rows.
    let mut parent: Vec<usize> = (0..n).collect();
    fn root(parent: &mut [usize], mut i: usize) -> usize {
        while parent[i] != i {
            parent[i] = parent[parent[i]];
            i = parent[i];
        }
        i
    }
    for pair in pairs {
        let (a, b) = (root(&mut parent, pair.a), root(&mut parent, pair.b));
        parent[a.max(b)] = a.min(b);
    }
    let mut members: std::collections::BTreeMap<usize, Vec<usize>> = std::collections::BTreeMap::new();
    for i in 0..n {
        let root = root(&mut parent, i);
        members.entry(root).or_default().push(i);
    }
    members.into_values().filter(|group| group.len() > 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    /// Random rows whose first coordinates vary far more than the last.
    fn random_rows(n: usize, dim: usize) -> Features {
        let mut rng = random::stream(&[3]);
        let value = |i: usize| (random::uniform(&mut rng) as f32 - 0.4) * 0.9f32.powi((i % dim) as i32);
        Features { n, dim, values: (0..n * dim).map(value).collect() }
    }

    fn row_pairs(pairs: &[Pair]) -> Vec<(usize, usize)> {
        pairs.iter().map(|p| (p.a, p.b)).collect()
    }

    #[test]
    fn finds_exactly_the_planted_copies() {
        let (n, dim) = (400, 40);
        let mut features = random_rows(n, dim);
        // Rows 300..330 are scaled and perturbed copies of rows 0..30.
        for i in 0..30 {
            let copy: Vec<f32> =
                features.row(i).iter().enumerate().map(|(j, v)| 1.3 * v + 0.01 * (j % 3) as f32).collect();
            features.values[(300 + i) * dim..(301 + i) * dim].copy_from_slice(&copy);
        }
        let planted: Vec<(usize, usize)> = (0..30).map(|i| (i, 300 + i)).collect();
        let index = Index::new(features.clone());
        let mut last = 0.0;
        // In so few dimensions, unrelated rows are near each other.
        let pairs = within(&index, 0.3, |fraction| last = fraction);
        assert_eq!((row_pairs(&pairs), last), (planted, 1.0));
        assert!(pairs.iter().all(|p| p.relative_distance >= 0.0 && p.relative_distance <= 0.3));
        // Across two sets.
        let first = Index::new(features.subset(&(0..300).collect::<Vec<_>>()));
        let second = first.transform(features.subset(&(290..330).collect::<Vec<_>>()));
        let mut across = row_pairs(&across(&first, &second, 0.3, |_| ()));
        across.sort_unstable();
        let identical = (290..300).map(|i| (i, i - 290));
        assert_eq!(across, (0..30).map(|i| (i, i + 10)).chain(identical).collect::<Vec<_>>());
    }

    #[test]
    fn more_copies_than_neighbors_form_one_group() {
        let mut features = random_rows(200, 12);
        for i in 0..25 {
            let copy = features.row(0).to_vec();
            features.values[(100 + i) * 12..(101 + i) * 12].copy_from_slice(&copy);
        }
        let index = Index::new(features);
        let groups = groups(200, &within(&index, 0.1, |_| ()));
        assert_eq!(groups, [std::iter::once(0).chain(100..125).collect::<Vec<_>>()]);
    }

    #[test]
    fn tiny_and_constant_sets_are_compared() {
        let index = |rows: &[[f32; 3]]| Index::new(Features { n: rows.len(), dim: 3, values: rows.concat() });
        let count = |index: &Index| within(index, THRESHOLD, |_| ()).len();
        assert_eq!(count(&index(&[[1.0, 2.0, 3.0]; 2])), 1);
        assert_eq!(count(&index(&[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])), 0);
        assert_eq!(count(&index(&[[1.0, 2.0, 3.0]; 5])), 10);
        assert_eq!(count(&index(&[[1.0, 2.0, 3.0]])), 0);
    }

    #[test]
    fn groups_are_connected_components() {
        let pair = |a, b| Pair { a, b, relative_distance: 0.1 };
        assert_eq!(groups(8, &[pair(5, 6), pair(1, 2), pair(6, 1), pair(3, 7)]), [vec![1, 2, 5, 6], vec![3, 7]]);
    }
}

//! Search, outliers, clusters and diverse subsets of embeddings, by cosine after subtracting the
//! mean of the set: what all images share does not distinguish them.

use rayon::prelude::*;

use super::neighbors;
use crate::eval::{Features, dot, knn};

/// Searchable set of embeddings.
///
/// # Examples
///
/// ```
/// use byol::{apply::search::Index, eval::Features};
///
/// let values = vec![1.0, 0.0, 0.9, 0.1, 0.0, 1.0, -1.0, 0.2];
/// let index = Index::new(Features { n: 4, dim: 2, values });
/// let neighbors = index.nearest(index.rows().row(0), 2);
/// assert_eq!([neighbors[0].0, neighbors[1].0], [0, 1]);
/// assert_eq!(index.select_diverse(2).len(), 2);
/// ```
#[derive(Debug, Clone)]
pub struct Index {
    mean: Vec<f32>,
    /// Centered rows of unit length.
    rows: Features,
}

impl Index {
    /// Centers and normalizes the rows of `features`.
    pub fn new(features: Features) -> Index {
        let dim = features.dim;
        let mut sums = vec![0.0f64; dim];
        for row in features.values.chunks_exact(dim) {
            sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
        }
        let mut mean: Vec<f32> = sums.iter().map(|s| (s / features.n as f64) as f32).collect();
        // Centering one, two or identical rows would leave zeros or opposites.
        let squared_norm = |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let rows = || features.values.chunks_exact(dim);
        let deviation = |row: &[f32]| row.iter().zip(&mean).map(|(v, m)| f64::from(v - m).powi(2)).sum::<f64>();
        let (variance, total) = (rows().map(deviation).sum::<f64>(), rows().map(squared_norm).sum::<f64>());
        if features.n <= 2 || variance <= 1e-9 * total {
            mean.fill(0.0);
        }
        let rows = center_and_normalize(features, &mean);
        Index { mean, rows }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.n
    }

    /// Returns true if there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.n == 0
    }

    /// Centered rows of unit length.
    pub fn rows(&self) -> &Features {
        &self.rows
    }

    /// Centers other rows by this set's mean and normalizes them.
    ///
    /// # Panics
    /// If the dimension differs.
    pub fn transform(&self, features: Features) -> Features {
        assert_eq!(features.dim, self.rows.dim, "features and index must have the same dimension");
        center_and_normalize(features, &self.mean)
    }

    /// Cosines between a transformed row and all rows.
    fn cosines(&self, query: &[f32]) -> Vec<f32> {
        let block = self.rows.n.div_ceil(4 * rayon::current_num_threads()).max(1);
        let block_cosines =
            |rows: &[f32]| rows.chunks_exact(self.rows.dim).map(|row| dot(row, query)).collect::<Vec<_>>();
        self.rows.values.par_chunks(block * self.rows.dim).flat_map_iter(block_cosines).collect()
    }

    /// Returns the `k` rows nearest to a row transformed by [`Index::transform`], as (row, cosine),
    /// nearest first. Ties go to the lower row.
    pub fn nearest(&self, query: &[f32], k: usize) -> Vec<(usize, f32)> {
        knn::top_k(&self.cosines(query), k)
    }

    /// Outlier score of each row: 1 − mean cosine with its `k` nearest other rows, in [0, 2].
    /// `on_progress` receives the fraction done, up to 1.
    pub fn outlier_scores(&self, k: usize, on_progress: impl FnMut(f64)) -> Vec<f64> {
        let k = k.min(self.rows.n.saturating_sub(1));
        let score = |(i, nearest): (usize, &Vec<(usize, f32)>)| {
            let others = nearest.iter().filter(|(j, _)| *j != i).take(k);
            1.0 - others.map(|(_, c)| f64::from(*c)).sum::<f64>() / k.max(1) as f64
        };
        neighbors::nearest(&self.rows, &self.rows, k + 1, on_progress).iter().enumerate().map(score).collect()
    }

    /// Selects `n` rows that cover the set by k-center greedy (Gonzalez 1985): first the row
    /// nearest to the mean direction, then always the row farthest from those selected. Returns
    /// each row with its largest cosine to those selected before it (−1 for the first).
    pub fn select_diverse(&self, n: usize) -> Vec<(usize, f32)> {
        self.select_diverse_if(n, |_, _| true)
    }

    /// [`Index::select_diverse`] of the rows that `accept` accepts; fewer than `n` if there are no
    /// more. `accept` receives the row and its cosines with the rows selected before it, in order.
    pub fn select_diverse_if(&self, n: usize, mut accept: impl FnMut(usize, &[f32]) -> bool) -> Vec<(usize, f32)> {
        let (total, dim) = (self.rows.n, self.rows.dim);
        let mut sum = vec![0.0f32; dim];
        for row in self.rows.values.chunks_exact(dim) {
            sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
        }
        let mut selected: Vec<(usize, f32)> = Vec::new();
        let mut max_cosines = vec![f32::NEG_INFINITY; total];
        let mut candidate = self.nearest(&sum, 1).first().map(|(i, _)| (*i, -1.0));
        let mut visited = 0;
        while let Some((row, cosine)) = candidate.filter(|_| selected.len() < n) {
            let before: Vec<f32> =
                selected.par_iter().map(|(i, _)| dot(self.rows.row(*i), self.rows.row(row))).collect();
            if accept(row, &before) {
                selected.push((row, if selected.is_empty() { -1.0 } else { cosine }));
                let cosines = self.cosines(self.rows.row(row));
                max_cosines.iter_mut().zip(&cosines).for_each(|(max, cosine)| *max = max.max(*cosine));
            }
            max_cosines[row] = f32::INFINITY;
            visited += 1;
            let farthest = || (0..total).min_by(|a, b| max_cosines[*a].total_cmp(&max_cosines[*b]));
            candidate = if visited < total { farthest().map(|row| (row, max_cosines[row])) } else { None };
        }
        selected
    }

    /// Assigns each row to one of at most `k` clusters by spherical k-means: ten iterations from
    /// the diverse rows of [`Index::select_diverse`].
    pub fn clusters(&self, k: usize) -> Vec<usize> {
        let dim = self.rows.dim;
        let mut centers: Vec<Vec<f32>> =
            self.select_diverse(k).iter().map(|(i, _)| self.rows.row(*i).to_vec()).collect();
        let mut assignment = vec![0; self.rows.n];
        for _ in 0..10 {
            let nearest_center = |row: &[f32]| {
                let cosines = centers.iter().map(|c| dot(c, row)).enumerate();
                cosines.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).map_or(0, |best| best.0)
            };
            assignment = self.rows.values.par_chunks_exact(dim).map(nearest_center).collect();
            let mut sums = vec![vec![0.0f32; dim]; centers.len()];
            for (row, cluster) in self.rows.values.chunks_exact(dim).zip(&assignment) {
                sums[*cluster].iter_mut().zip(row).for_each(|(s, v)| *s += v);
            }
            for (center, sum) in centers.iter_mut().zip(sums) {
                let norm = dot(&sum, &sum).sqrt();
                // The center of an empty cluster stays.
                if norm > 0.0 {
                    *center = sum.iter().map(|v| v / norm).collect();
                }
            }
        }
        assignment
    }
}

fn center_and_normalize(mut features: Features, mean: &[f32]) -> Features {
    for row in features.values.chunks_exact_mut(features.dim) {
        row.iter_mut().zip(mean).for_each(|(v, m)| *v -= m);
    }
    features.l2_normalized()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    fn random_rows(n: usize, dim: usize, seed: u64) -> Features {
        let mut rng = random::stream(&[seed]);
        Features { n, dim, values: (0..n * dim).map(|_| random::uniform(&mut rng) as f32 - 0.4).collect() }
    }

    #[test]
    fn nearest_matches_brute_force() {
        let mut features = random_rows(2500, 37, 1);
        // Row 2000 is a copy of row 3.
        let copy: Vec<f32> = features.row(3).to_vec();
        features.values[2000 * 37..2001 * 37].copy_from_slice(&copy);
        let index = Index::new(features);
        let cosine = |i: usize, j: usize| -> f32 {
            index.rows().row(i).iter().zip(index.rows().row(j)).map(|(a, b)| a * b).sum()
        };
        let nearest = index.nearest(index.rows().row(3), 5);
        assert_eq!((nearest[0].0, nearest[1].0), (3, 2000));
        let mut order: Vec<usize> = (0..2500).collect();
        order.sort_by(|a, b| cosine(3, *b).total_cmp(&cosine(3, *a)));
        assert_eq!(nearest[2..].iter().map(|n| n.0).collect::<Vec<_>>(), order[2..5]);
    }

    #[test]
    fn distant_row_is_the_top_outlier_and_in_the_diverse_subset() {
        let jitter = |direction: [f32; 4], i: usize| direction.map(|v| v + 0.01 * ((i * 7919) % 13) as f32);
        let clusters =
            (0..20).map(|i| jitter([1.0, 0.0, 0.0, 0.0], i)).chain((0..20).map(|i| jitter([0.0, 1.0, 0.0, 0.0], i)));
        let values = clusters.chain([[0.0, 0.0, 0.0, 5.0]]).flatten().collect();
        let index = Index::new(Features { n: 41, dim: 4, values });
        let scores = index.outlier_scores(5, |_| ());
        assert_eq!((0..41).max_by(|a, b| scores[*a].total_cmp(&scores[*b])), Some(40));
        let selected: Vec<usize> = index.select_diverse(3).iter().map(|s| s.0).collect();
        assert!(selected.contains(&40));
        assert!(selected.iter().any(|i| *i < 20) && selected.iter().any(|i| (20..40).contains(i)));
        assert_eq!(index.select_diverse(100).len(), 41);
        let odd = index.select_diverse_if(100, |row, before| {
            assert!(before.iter().all(|cosine| (-1.001..=1.001).contains(cosine)));
            row % 2 == 1
        });
        assert!(odd.len() == 20 && odd.iter().all(|(row, _)| row % 2 == 1));
        let clusters = index.clusters(3);
        assert!((0..20).all(|i| clusters[i] == clusters[0]) && (20..40).all(|i| clusters[i] == clusters[20]));
        assert!(clusters[0] != clusters[20] && clusters[40] != clusters[0] && clusters[40] != clusters[20]);
    }
}

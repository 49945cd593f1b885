//! What lies near what: exact search, outliers, clusters, and a varied selection. All by the cosine of embeddings from which the mean of the
//! set is taken away: what all images share says nothing of one.

use rayon::prelude::*;

use super::neighbours;
use crate::eval::{Features, knn};

/// Rows that can be searched.
#[derive(Debug, Clone)]
pub struct Index {
    mean: Vec<f32>,
    /// Without the mean, of unit length.
    unit: Features,
}

impl Index {
    /// Takes the mean away and scales the rows.
    pub fn new(features: Features) -> Index {
        let dim = features.dim;
        let mut sums = vec![0.0f64; dim];
        for row in features.values.chunks_exact(dim) {
            sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
        }
        let mut mean: Vec<f32> = sums.iter().map(|s| (s / features.n as f64) as f32).collect();
        // Of one or two rows, and of rows that are all the same, the mean would leave nothing or opposites.
        let square = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let rows = || features.values.chunks_exact(dim);
        let apart = |row: &[f32]| row.iter().zip(&mean).map(|(v, m)| f64::from(v - m).powi(2)).sum::<f64>();
        let (away, whole) = (rows().map(apart).sum::<f64>(), rows().map(square).sum::<f64>());
        if features.n <= 2 || away <= 1e-9 * whole {
            mean.fill(0.0);
        }
        let unit = centred(features, &mean);
        Index { mean, unit }
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.unit.n
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.unit.n == 0
    }

    /// The rows as they are compared.
    pub fn rows(&self) -> &Features {
        &self.unit
    }

    /// Other rows in the same terms.
    pub fn map(&self, other: Features) -> Features {
        assert_eq!(other.dim, self.unit.dim, "rows to compare have the same length");
        centred(other, &self.mean)
    }

    /// Cosines of one row, as [`Index::map`] gives it, with all.
    fn cosines(&self, query: &[f32]) -> Vec<f32> {
        let part = self.unit.n.div_ceil(4 * rayon::current_num_threads()).max(1);
        let of_some = |rows: &[f32]| rows.chunks_exact(self.unit.dim).map(|row| dot(row, query)).collect::<Vec<_>>();
        self.unit.values.par_chunks(part * self.unit.dim).flat_map_iter(of_some).collect()
    }

    /// The `k` rows nearest to one, nearest first; of equals the earlier.
    pub fn nearest(&self, query: &[f32], k: usize) -> Vec<(usize, f32)> {
        knn::largest(&self.cosines(query), k)
    }

    /// How far each row is from its `k` nearest others: 1 − their mean cosine, in [0, 2]. `done` is told how much is done, up to 1.
    pub fn outlier_scores(&self, k: usize, done: impl FnMut(f64)) -> Vec<f64> {
        let k = k.min(self.unit.n.saturating_sub(1));
        let score = |(i, near): (usize, &Vec<(usize, f32)>)| {
            let others = near.iter().filter(|(j, _)| *j != i).take(k);
            1.0 - others.map(|(_, c)| f64::from(*c)).sum::<f64>() / k.max(1) as f64
        };
        neighbours::nearest(&self.unit, &self.unit, k + 1, done).iter().enumerate().map(score).collect()
    }

    /// `n` rows that cover the set: each the farthest from all before it (k-center greedy, Gonzalez 1985), the first the nearest to the
    /// mean direction. With each the cosine with the nearest before it.
    pub fn varied(&self, n: usize) -> Vec<(usize, f32)> {
        let (all, dim) = (self.unit.n, self.unit.dim);
        let mut sum = vec![0.0f32; dim];
        for row in self.unit.values.chunks_exact(dim) {
            sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
        }
        let mut chosen: Vec<(usize, f32)> = self.nearest(&sum, 1).iter().map(|(i, _)| (*i, -1.0)).collect();
        let mut closest = vec![f32::NEG_INFINITY; all];
        while let Some(last) = chosen.last().filter(|_| chosen.len() < n.min(all)) {
            let cosines = self.cosines(self.unit.row(last.0));
            closest.iter_mut().zip(&cosines).for_each(|(c, new)| *c = c.max(*new));
            closest[last.0] = f32::INFINITY;
            let far = (0..all).min_by(|a, b| closest[*a].total_cmp(&closest[*b])).expect("there are rows left");
            chosen.push((far, closest[far]));
        }
        chosen.truncate(n);
        chosen
    }
}

impl Index {
    /// The cluster of each row, by k-means on the sphere: at most `k`, from rows that lie far apart, ten rounds.
    pub fn clusters(&self, k: usize) -> Vec<usize> {
        let dim = self.unit.dim;
        let mut centres: Vec<Vec<f32>> = self.varied(k).iter().map(|(i, _)| self.unit.row(*i).to_vec()).collect();
        let mut of_row = vec![0; self.unit.n];
        for _ in 0..10 {
            let nearest = |row: &[f32]| {
                let cosines = centres.iter().map(|c| dot(c, row)).enumerate();
                cosines.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).map_or(0, |best| best.0)
            };
            of_row = self.unit.values.par_chunks_exact(dim).map(nearest).collect();
            let mut sums = vec![vec![0.0f32; dim]; centres.len()];
            for (row, cluster) in self.unit.values.chunks_exact(dim).zip(&of_row) {
                sums[*cluster].iter_mut().zip(row).for_each(|(s, v)| *s += v);
            }
            for (centre, sum) in centres.iter_mut().zip(sums) {
                let length = dot(&sum, &sum).sqrt();
                // A centre that no row is nearest to stays.
                if length > 0.0 {
                    *centre = sum.iter().map(|v| v / length).collect();
                }
            }
        }
        of_row
    }
}

fn centred(features: Features, mean: &[f32]) -> Features {
    let mut features = features;
    for row in features.values.chunks_exact_mut(features.dim) {
        row.iter_mut().zip(mean).for_each(|(v, m)| *v -= m);
    }
    features.unit()
}

/// a · b, in an order of sums that suits registers.
#[multiversion::multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 32];
    let (whole, rest) = a.as_chunks::<32>();
    let (other, other_rest) = b.as_chunks::<32>();
    for (a, b) in whole.iter().zip(other) {
        for i in 0..32 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + rest.iter().zip(other_rest).map(|(a, b)| a * b).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    fn rows(n: usize, dim: usize, salt: u64) -> Features {
        let mut rng = random::stream(&[salt]);
        Features { n, dim, values: (0..n * dim).map(|_| random::uniform(&mut rng) as f32 - 0.4).collect() }
    }

    #[test]
    fn the_search_is_a_plain_search() {
        let mut features = rows(2500, 37, 1);
        // Row 2000 is row 3.
        let copy: Vec<f32> = features.row(3).to_vec();
        features.values[2000 * 37..2001 * 37].copy_from_slice(&copy);
        let index = Index::new(features);
        let cosine = |i: usize, j: usize| -> f32 {
            index.rows().row(i).iter().zip(index.rows().row(j)).map(|(a, b)| a * b).sum()
        };
        let found = index.nearest(index.rows().row(3), 5);
        assert_eq!((found[0].0, found[1].0), (3, 2000));
        let mut all: Vec<usize> = (0..2500).collect();
        all.sort_by(|a, b| cosine(3, *b).total_cmp(&cosine(3, *a)));
        assert_eq!(found[2..].iter().map(|f| f.0).collect::<Vec<_>>(), all[2..5]);
    }

    #[test]
    fn one_far_row_is_the_outlier_and_a_selection_takes_it_early() {
        let mut features = rows(1, 4, 0);
        let like = |direction: [f32; 4], i: usize| direction.map(|v| v + 0.01 * ((i * 7919) % 13) as f32);
        let many = (0..20).map(|i| like([1.0, 0.0, 0.0, 0.0], i)).chain((0..20).map(|i| like([0.0, 1.0, 0.0, 0.0], i)));
        features.values = many.chain([[0.0, 0.0, 0.0, 5.0]]).flatten().collect();
        features.n = 41;
        let index = Index::new(features);
        let scores = index.outlier_scores(5, |_| ());
        assert_eq!((0..41).max_by(|a, b| scores[*a].total_cmp(&scores[*b])), Some(40));
        let chosen: Vec<usize> = index.varied(3).iter().map(|c| c.0).collect();
        assert!(chosen.contains(&40) && chosen.iter().any(|i| *i < 20) && chosen.iter().any(|i| (20..40).contains(i)));
        assert_eq!(index.varied(100).len(), 41);
        let clusters = index.clusters(3);
        assert!((0..20).all(|i| clusters[i] == clusters[0]) && (20..40).all(|i| clusters[i] == clusters[20]));
        assert!(clusters[0] != clusters[20] && clusters[40] != clusters[0] && clusters[40] != clusters[20]);
    }
}

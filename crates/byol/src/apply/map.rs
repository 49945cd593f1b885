//! Maps: a position in the plane for each image, with similar images close together. Computed by
//! principal component analysis, or by t-SNE (van der Maaten 2014, with the interpolation of
//! Linderman et al. 2019; crate `bhtsne`) from exact nearest neighbors.

use bhtsne::{Neighbor, tSNE};
use byol_kernels::{isa, matmul};
use rayon::prelude::*;

use super::search::Index;
use crate::{
    eval::{Features, knn},
    random,
};

/// Dimensionality reduction to two dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The first two principal components. Fast; distances on the map are meaningful.
    Pca,
    /// t-SNE. Preserves neighborhoods; distances between groups carry little meaning.
    Tsne,
}

impl Method {
    /// Returns the name used on the command line and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Method::Pca => "pca",
            Method::Tsne => "tsne",
        }
    }
}

/// Nearest neighbors per row for t-SNE: three times the perplexity.
const NEIGHBORS: usize = 60;

/// Gradient steps of t-SNE.
const STEPS: usize = 750;

/// Rows per neighbor search.
const CHUNK: usize = 2048;

/// Returns the position of each row in [-1, 1]². `progress` receives the work done and its total.
pub fn layout(index: &Index, method: Method, progress: &mut dyn FnMut(u64, u64)) -> Vec<[f32; 2]> {
    let components = pca(index.rows());
    // t-SNE is meaningless on a handful of rows.
    if method == Method::Pca || index.len() < 8 {
        return fit_to_square(components);
    }
    let n = index.len();
    let k = NEIGHBORS.min(n - 1);
    // A gradient step counts as much as the neighbor search of a twentieth of the rows.
    let total = (n + STEPS * n / 20) as u64;
    let mut neighbors = Vec::with_capacity(n);
    for start in (0..n).step_by(CHUNK) {
        let rows: Vec<usize> = (start..(start + CHUNK).min(n)).collect();
        let nearest = knn::nearest(index.rows(), &index.rows().subset(&rows), k + 1);
        neighbors.par_extend(nearest.into_par_iter().zip(rows).map(|(nearest, i)| {
            // On the unit sphere the squared distance is 2 − 2 cos.
            let neighbor = |(j, c): (usize, f32)| Neighbor { index: j, distance: (2.0 - 2.0 * c).max(0.0).sqrt() };
            let mut others: Vec<_> = nearest.into_iter().filter(|(j, _)| *j != i).map(neighbor).collect();
            others.truncate(k);
            others
        }));
        progress(neighbors.len() as u64, total);
    }
    // t-SNE starts from a small copy of the principal components, as is usual.
    let start = components.iter().flat_map(|p| p.map(|v| 1e-4 * v)).collect::<Vec<f32>>();
    let items = vec![(); n];
    let mut tsne: tSNE<f32, ()> = tSNE::new(&items);
    tsne.perplexity((k as f32 / 3.0).max(1.0)).epochs(STEPS).initial_embedding(start);
    tsne.epoch_callback(|step, _| progress((n + (step + 1) * n / 20) as u64, total));
    tsne.fit_sne_with_neighbors(&neighbors);
    let flat = tsne.embedding();
    drop(tsne);
    fit_to_square(flat.as_chunks::<2>().0.to_vec())
}

/// Returns the first two principal components of each row, centered, with a standard deviation of 1
/// along the first.
pub fn pca(rows: &Features) -> Vec<[f32; 2]> {
    let (n, dim) = (rows.n, rows.dim);
    if dim < 2 {
        return (0..n).map(|i| [rows.row(i).first().copied().unwrap_or(0.0), 0.0]).collect();
    }
    let mut sum = vec![0.0f64; dim];
    for row in rows.values.chunks_exact(dim) {
        sum.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
    }
    let mean: Vec<f64> = sum.iter().map(|s| s / n as f64).collect();
    // Second moments, Σ x xᵀ.
    let moments = matmul::tn(isa::current(), &rows.values, &rows.values, [n, dim, dim]);
    let covariance = |i: usize, j: usize| f64::from(moments[i * dim + j]) / n as f64 - mean[i] * mean[j];
    // Orthogonal iteration; more directions than needed make it converge faster.
    let mut rng = random::stream(&[17]);
    let directions = 6.min(dim);
    let mut basis: Vec<Vec<f64>> =
        (0..directions).map(|_| (0..dim).map(|_| random::uniform(&mut rng) - 0.5).collect()).collect();
    for _ in 0..60 {
        let products: Vec<Vec<f64>> = basis
            .par_iter()
            .map(|v| (0..dim).map(|i| (0..dim).map(|j| covariance(i, j) * v[j]).sum()).collect())
            .collect();
        basis = orthonormalize(products);
    }
    let component =
        |v: &[f64], row: &[f32]| row.iter().zip(&mean).zip(v).map(|((x, m), v)| (f64::from(*x) - m) * v).sum();
    let mut components: Vec<[f64; 2]> =
        rows.values.par_chunks_exact(dim).map(|row| [component(&basis[0], row), component(&basis[1], row)]).collect();
    let std = (components.iter().map(|p| p[0] * p[0]).sum::<f64>() / n.max(1) as f64).sqrt().max(1e-12);
    // The sign of a direction is arbitrary: its largest coefficient is made positive.
    for axis in 0..2 {
        let largest = basis[axis].iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(1.0);
        components.iter_mut().for_each(|p| p[axis] *= largest.signum() / std);
    }
    components.iter().map(|p| p.map(|v| v as f32)).collect()
}

/// Gram–Schmidt orthonormalization.
fn orthonormalize(vectors: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let mut basis: Vec<Vec<f64>> = Vec::new();
    for mut v in vectors {
        for other in &basis {
            let dot: f64 = v.iter().zip(other).map(|(a, b)| a * b).sum();
            v.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
        }
        let norm = v.iter().map(|a| a * a).sum::<f64>().sqrt();
        // A direction without variance becomes the zero vector.
        v.iter_mut().for_each(|a| *a = if norm > 1e-30 { *a / norm } else { 0.0 });
        basis.push(v);
    }
    basis
}

/// Centers and scales positions into [-1, 1]², with the same scale on both axes.
fn fit_to_square(mut positions: Vec<[f32; 2]>) -> Vec<[f32; 2]> {
    let range = |axis: usize| {
        let values = positions.iter().map(|p| p[axis]);
        values.fold([f32::INFINITY, f32::NEG_INFINITY], |[low, high], v| [low.min(v), high.max(v)])
    };
    let [x, y] = [range(0), range(1)];
    let half_range = ((x[1] - x[0]).max(y[1] - y[0]) / 2.0).max(1e-12);
    let center = [(x[0] + x[1]) / 2.0, (y[0] + y[1]) / 2.0];
    for p in &mut positions {
        *p = [0, 1].map(|axis| (p[axis] - center[axis]) / half_range);
    }
    positions
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three clusters in 20 dimensions; row `i` belongs to cluster `i % 3`.
    fn clusters(n: usize) -> Features {
        let mut rng = random::stream(&[3]);
        let row = |i: usize, rng: &mut _| -> Vec<f32> {
            (0..20).map(|d| if d == i % 3 { 3.0 } else { 0.0 } + random::uniform(rng) as f32 * 0.5).collect()
        };
        Features { n, dim: 20, values: (0..n).flat_map(|i| row(i, &mut rng)).collect() }
    }

    #[test]
    fn both_methods_keep_clusters_apart() {
        let index = Index::new(clusters(300));
        for method in [Method::Pca, Method::Tsne] {
            let mut last = (0, 0);
            let positions = layout(&index, method, &mut |done, total| last = (done, total));
            assert!(positions.iter().flatten().all(|v| (-1.0..=1.0).contains(v)));
            let distance =
                |a: usize, b: usize| (positions[a][0] - positions[b][0]).hypot(positions[a][1] - positions[b][1]);
            // The nearest neighbor of each point belongs to its cluster.
            for i in 0..300 {
                let nearest = (0..300).filter(|j| *j != i).min_by(|a, b| distance(i, *a).total_cmp(&distance(i, *b)));
                assert_eq!(nearest.unwrap() % 3, i % 3, "{method:?} {i}");
            }
            assert_eq!(last.0, last.1, "{method:?}: progress ends at its total");
        }
    }

    #[test]
    fn first_component_follows_the_longest_axis() {
        let mut rng = random::stream(&[5]);
        let mut values = Vec::new();
        for _ in 0..500 {
            let (a, b) = (random::uniform(&mut rng) as f32 * 10.0, random::uniform(&mut rng) as f32);
            values.extend([a + 7.0, a * 0.5 + b, 3.0, b]);
        }
        let components = pca(&Features { n: 500, dim: 4, values: values.clone() });
        let first: Vec<f32> = values.chunks(4).map(|r| r[0]).collect();
        let correlation = |x: &[f32], y: &[f32]| {
            let mean = |v: &[f32]| v.iter().sum::<f32>() / v.len() as f32;
            let (mx, my) = (mean(x), mean(y));
            let sum = |f: &dyn Fn(usize) -> f32| (0..x.len()).map(f).sum::<f32>();
            sum(&|i| (x[i] - mx) * (y[i] - my)) / (sum(&|i| (x[i] - mx).powi(2)) * sum(&|i| (y[i] - my).powi(2))).sqrt()
        };
        assert!(correlation(&first, &components.iter().map(|p| p[0]).collect::<Vec<_>>()) > 0.99);
    }

    #[test]
    fn tiny_and_constant_sets_get_a_position_per_row() {
        for (n, dim) in [(1, 5), (2, 3), (9, 1), (20, 4)] {
            let index = Index::new(Features { n, dim, values: vec![1.0; n * dim] });
            for method in [Method::Pca, Method::Tsne] {
                let positions = layout(&index, method, &mut |_, _| ());
                assert!(
                    positions.len() == n && positions.iter().flatten().all(|v| v.is_finite()),
                    "{n} {dim} {method:?}"
                );
            }
        }
    }
}

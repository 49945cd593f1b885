//! Maps: a place in the plane for each image, so that like images lie together. By principal components, or by t-SNE (van der Maaten 2014,
//! with the interpolation of Linderman et al. 2019, by the crate `bhtsne`) from exact neighbours.

use bhtsne::{Neighbor, tSNE};
use byol_kernels::{
    conv::{self, Shape},
    isa,
};
use rayon::prelude::*;

use super::search::Index;
use crate::{
    eval::{Features, knn},
    random,
};

/// How places are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The two directions in which the rows differ most. Quick, and distances mean what they seem to.
    Pca,
    /// Neighbours stay neighbours; distances between groups mean little.
    Tsne,
}

impl Method {
    /// As it is called.
    pub fn name(self) -> &'static str {
        match self {
            Method::Pca => "pca",
            Method::Tsne => "tsne",
        }
    }
}

/// Neighbours that count for t-SNE, about a third of which are felt.
const NEIGHBOURS: usize = 60;

/// Steps of t-SNE.
const STEPS: usize = 750;

/// Rows whose neighbours are looked for at a time.
const SOME: usize = 2048;

/// A place for each row, in [-1, 1]². `progress` gets what is done of how much.
pub fn places(index: &Index, method: Method, progress: &mut dyn FnMut(u64, u64)) -> Vec<[f32; 2]> {
    let first = pca(index.rows());
    // Fewer rows have not so many neighbours.
    if method == Method::Pca || index.len() < 8 {
        return fitted(first);
    }
    let n = index.len();
    let k = NEIGHBOURS.min(n - 1);
    let all = (n + STEPS * n / 20) as u64;
    let mut near = Vec::with_capacity(n);
    for start in (0..n).step_by(SOME) {
        let some: Vec<usize> = (start..(start + SOME).min(n)).collect();
        let found = knn::nearest(index.rows(), &index.rows().subset(&some), k + 1);
        near.par_extend(found.into_par_iter().zip(some).map(|(found, i)| {
            // On the unit sphere the squared distance is 2 − 2 cos.
            let of = |(j, c): (usize, f32)| Neighbor { index: j, distance: (2.0 - 2.0 * c).max(0.0).sqrt() };
            let mut others: Vec<_> = found.into_iter().filter(|(j, _)| *j != i).map(of).collect();
            others.truncate(k);
            others
        }));
        progress(near.len() as u64, all);
    }
    // A small start, as is usual: t-SNE spreads it.
    let small = first.iter().flat_map(|p| p.map(|v| 1e-4 * v)).collect::<Vec<f32>>();
    let nothing = vec![(); n];
    let mut tsne: tSNE<f32, ()> = tSNE::new(&nothing);
    tsne.perplexity((k as f32 / 3.0).max(1.0)).epochs(STEPS).initial_embedding(small);
    tsne.epoch_callback(|step, _| progress((n + (step + 1) * n / 20) as u64, all));
    tsne.fit_sne_with_neighbors(&near);
    let flat = tsne.embedding();
    drop(tsne);
    fitted(flat.as_chunks::<2>().0.to_vec())
}

/// The coordinates along the two directions of largest variance, of rows without a mean; deviation 1 along the first.
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
    // Σ xxᵀ is the gradient by the weights of a linear layer: x for x.
    let s = Shape { n, h: 1, w: 1, c_in: dim, c_out: dim, kernel: 1, stride: 1, padding: 0, dilation: 1 };
    let moments = conv::backward_weight(isa::chosen(), &s, rows.values[..].into(), &rows.values);
    let covariance = |i: usize, j: usize| f64::from(moments[i * dim + j]) / n as f64 - mean[i] * mean[j];
    // Orthogonal iteration; more directions than wanted, so that it converges fast.
    let mut rng = random::stream(&[17]);
    let directions = 6.min(dim);
    let mut basis: Vec<Vec<f64>> =
        (0..directions).map(|_| (0..dim).map(|_| random::uniform(&mut rng) - 0.5).collect()).collect();
    for _ in 0..60 {
        let turned: Vec<Vec<f64>> = basis
            .par_iter()
            .map(|v| (0..dim).map(|i| (0..dim).map(|j| covariance(i, j) * v[j]).sum()).collect())
            .collect();
        basis = orthogonal(turned);
    }
    let along = |v: &[f64], row: &[f32]| row.iter().zip(&mean).zip(v).map(|((x, m), v)| (f64::from(*x) - m) * v).sum();
    let mut places: Vec<[f64; 2]> =
        rows.values.par_chunks_exact(dim).map(|row| [along(&basis[0], row), along(&basis[1], row)]).collect();
    let deviation = (places.iter().map(|p| p[0] * p[0]).sum::<f64>() / n.max(1) as f64).sqrt().max(1e-12);
    // Which way a direction points is chance; the largest component is taken as positive.
    for axis in 0..2 {
        let largest = basis[axis].iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(1.0);
        places.iter_mut().for_each(|p| p[axis] *= largest.signum() / deviation);
    }
    places.iter().map(|p| p.map(|v| v as f32)).collect()
}

/// Gram and Schmidt.
fn orthogonal(vectors: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let mut done: Vec<Vec<f64>> = Vec::new();
    for mut v in vectors {
        for other in &done {
            let share: f64 = v.iter().zip(other).map(|(a, b)| a * b).sum();
            v.iter_mut().zip(other).for_each(|(a, b)| *a -= share * b);
        }
        let length = v.iter().map(|a| a * a).sum::<f64>().sqrt();
        // A direction without variance stays what it is: nothing.
        v.iter_mut().for_each(|a| *a = if length > 1e-30 { *a / length } else { 0.0 });
        done.push(v);
    }
    done
}

/// Moved and scaled into [-1, 1]², both axes alike.
fn fitted(mut places: Vec<[f32; 2]>) -> Vec<[f32; 2]> {
    let range = |axis: usize| {
        let of = places.iter().map(|p| p[axis]);
        of.fold([f32::INFINITY, f32::NEG_INFINITY], |[low, high], v| [low.min(v), high.max(v)])
    };
    let [x, y] = [range(0), range(1)];
    let half = ((x[1] - x[0]).max(y[1] - y[0]) / 2.0).max(1e-12);
    let middle = [(x[0] + x[1]) / 2.0, (y[0] + y[1]) / 2.0];
    for p in &mut places {
        *p = [0, 1].map(|axis| (p[axis] - middle[axis]) / half);
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three clouds in 20 dimensions.
    fn clouds(n: usize) -> Features {
        let mut rng = random::stream(&[3]);
        let row = |i: usize, rng: &mut _| -> Vec<f32> {
            (0..20).map(|d| if d == i % 3 { 3.0 } else { 0.0 } + random::uniform(rng) as f32 * 0.5).collect()
        };
        Features { n, dim: 20, values: (0..n).flat_map(|i| row(i, &mut rng)).collect() }
    }

    #[test]
    fn both_maps_keep_clouds_apart() {
        let index = Index::new(clouds(300));
        for method in [Method::Pca, Method::Tsne] {
            let mut last = (0, 0);
            let places = places(&index, method, &mut |done, all| last = (done, all));
            assert!(places.iter().flatten().all(|v| (-1.0..=1.0).contains(v)));
            let apart = |a: usize, b: usize| (places[a][0] - places[b][0]).hypot(places[a][1] - places[b][1]);
            // Each point's nearest is of its own cloud.
            for i in 0..300 {
                let near = (0..300).filter(|j| *j != i).min_by(|a, b| apart(i, *a).total_cmp(&apart(i, *b)));
                assert_eq!(near.unwrap() % 3, i % 3, "{method:?} {i}");
            }
            assert_eq!(last.0, last.1, "{method:?}");
        }
    }

    #[test]
    fn the_first_component_is_the_longest_axis() {
        let mut rng = random::stream(&[5]);
        let mut values = Vec::new();
        for _ in 0..500 {
            let (a, b) = (random::uniform(&mut rng) as f32 * 10.0, random::uniform(&mut rng) as f32);
            values.extend([a + 7.0, a * 0.5 + b, 3.0, b]);
        }
        let places = pca(&Features { n: 500, dim: 4, values: values.clone() });
        let first: Vec<f32> = values.chunks(4).map(|r| r[0]).collect();
        let correlation = |x: &[f32], y: &[f32]| {
            let mean = |v: &[f32]| v.iter().sum::<f32>() / v.len() as f32;
            let (mx, my) = (mean(x), mean(y));
            let sum = |f: &dyn Fn(usize) -> f32| (0..x.len()).map(f).sum::<f32>();
            sum(&|i| (x[i] - mx) * (y[i] - my)) / (sum(&|i| (x[i] - mx).powi(2)) * sum(&|i| (y[i] - my).powi(2))).sqrt()
        };
        assert!(correlation(&first, &places.iter().map(|p| p[0]).collect::<Vec<_>>()) > 0.99);
    }

    #[test]
    fn tiny_and_uniform_sets_have_a_place_for_each_row() {
        for (n, dim) in [(1, 5), (2, 3), (9, 1), (20, 4)] {
            let index = Index::new(Features { n, dim, values: vec![1.0; n * dim] });
            for method in [Method::Pca, Method::Tsne] {
                let places = places(&index, method, &mut |_, _| ());
                assert!(places.len() == n && places.iter().flatten().all(|v| v.is_finite()), "{n} {dim} {method:?}");
            }
        }
    }
}

//! Nearest neighbors of many rows at once: by brute force, or beyond 10¹² comparisons with an HNSW
//! graph (Malkov and Yashunin 2016, arXiv:1603.09320), which is far faster and finds nearly all of
//! them.

use hnsw_rs::{anndists::dist::Distance, prelude::Hnsw};
use rayon::prelude::*;

use crate::eval::{Features, dot, knn};

/// Comparisons above which HNSW is used: those of a million rows with themselves
/// (docs/decisions/0003).
const MAX_COMPARISONS: usize = 1_000_000_000_000;

/// Rows between two calls of `on_progress`.
const BLOCK: usize = 4096;

/// Returns true if [`nearest`] uses HNSW, which may miss some neighbors.
pub fn is_approximate(bank: usize, queries: usize) -> bool {
    bank.saturating_mul(queries) > MAX_COMPARISONS
}

/// Returns the `k` nearest rows of `bank` for each query, as (row, cosine), nearest first. Rows of
/// both must have unit length. `on_progress` receives the fraction done, up to 1.
pub fn nearest(bank: &Features, queries: &Features, k: usize, on_progress: impl FnMut(f64)) -> Vec<Vec<(usize, f32)>> {
    match is_approximate(bank.n, queries.n) {
        true => nearest_hnsw(bank, queries, k, on_progress),
        false => nearest_exact(bank, queries, k, on_progress),
    }
}

fn nearest_exact(
    bank: &Features,
    queries: &Features,
    k: usize,
    mut on_progress: impl FnMut(f64),
) -> Vec<Vec<(usize, f32)>> {
    let mut results = Vec::with_capacity(queries.n);
    for values in queries.values.chunks(BLOCK * queries.dim) {
        let block = Features { n: values.len() / queries.dim, dim: queries.dim, values: values.to_vec() };
        results.extend(knn::nearest(bank, &block, k));
        on_progress(results.len() as f64 / queries.n as f64);
    }
    results
}

/// Distance of the graph, which stores row numbers instead of rows: those of `bank`, then those of
/// `queries`.
struct CosineDistance<'a> {
    bank: &'a Features,
    queries: &'a Features,
}

impl CosineDistance<'_> {
    fn row(&self, id: u32) -> &[f32] {
        let id = id as usize;
        if id < self.bank.n { self.bank.row(id) } else { self.queries.row(id - self.bank.n) }
    }
}

impl Distance<u32> for CosineDistance<'_> {
    fn eval(&self, a: &[u32], b: &[u32]) -> f32 {
        // Rounding can make it negative, which the graph does not accept.
        (1.0 - dot(self.row(a[0]), self.row(b[0]))).max(0.0)
    }
}

fn nearest_hnsw(
    bank: &Features,
    queries: &Features,
    k: usize,
    mut on_progress: impl FnMut(f64),
) -> Vec<Vec<(usize, f32)>> {
    // The paper's parameters for hundreds of dimensions: links per row, and candidates per
    // insertion.
    const LINKS: usize = 24;
    const CANDIDATES: usize = 200;
    const LAYERS: usize = 16;
    assert_eq!(bank.dim, queries.dim, "bank and queries must have the same dimension");
    let ids: Vec<u32> = (0..u32::try_from(bank.n + queries.n).expect("fewer than 2^32 rows")).collect();
    let graph = Hnsw::new(LINKS, bank.n, LAYERS, CANDIDATES, CosineDistance { bank, queries });
    let total = (bank.n + queries.n) as f64;
    // The first row is inserted alone: threads that start with an empty graph would each create an
    // entry point.
    let (first, others) = ids[..bank.n].split_at(bank.n.min(1));
    first.iter().for_each(|id| graph.insert((std::slice::from_ref(id), 0)));
    for block in others.chunks(BLOCK) {
        block.par_iter().for_each(|id| graph.insert((std::slice::from_ref(id), *id as usize)));
        on_progress(f64::from(block[block.len() - 1]) / total);
    }
    let mut results = Vec::with_capacity(queries.n);
    for block in ids[bank.n..].chunks(BLOCK) {
        let search = |id: &u32| {
            let neighbors = graph.search(std::slice::from_ref(id), k, (2 * k).max(CANDIDATES / 2));
            neighbors.iter().map(|n| (n.d_id, 1.0 - n.distance)).collect::<Vec<_>>()
        };
        results.par_extend(block.par_iter().map(search));
        on_progress((bank.n + results.len()) as f64 / total);
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    #[test]
    fn hnsw_finds_nearly_all_exact_neighbors() {
        let mut rng = random::stream(&[5]);
        let mut draw = |spread: f64| (random::uniform(&mut rng) - 0.5) * spread;
        // 40 rows around each of 50 centers.
        let centers: Vec<Vec<f64>> = (0..50).map(|_| (0..24).map(|_| draw(2.0)).collect()).collect();
        let values: Vec<f32> = (0..2000)
            .flat_map(|i| centers[i % 50].iter().map(|c| *c as f32).collect::<Vec<_>>())
            .map(|c| c + draw(0.8) as f32)
            .collect();
        let bank = Features { n: 2000, dim: 24, values }.l2_normalized();
        let queries = bank.subset(&(0..300).map(|i| 5 * i).collect::<Vec<_>>());
        let (mut calls, mut last) = (0, 0.0);
        let exact = nearest_exact(&bank, &queries, 10, |_| calls += 1);
        let approximate = nearest_hnsw(&bank, &queries, 10, |fraction| last = fraction);
        assert!(calls == 1 && last == 1.0);
        let mut matches = 0;
        for (i, (exact, approximate)) in exact.iter().zip(&approximate).enumerate() {
            assert_eq!(approximate.len(), 10);
            assert_eq!(approximate[0].0, 5 * i, "a row is nearest to itself");
            assert!(approximate.windows(2).all(|w| w[0].1 >= w[1].1));
            let is_match = |a: &&(usize, f32)| exact.iter().any(|e| e.0 == a.0 && (e.1 - a.1).abs() < 1e-4);
            matches += approximate.iter().filter(is_match).count();
        }
        assert!(matches > 2900, "{matches} of 3000");
        assert!(!is_approximate(1_000_000, 1_000_000) && is_approximate(1_000_001, 1_000_000));
    }

    #[test]
    fn hnsw_handles_empty_and_identical_rows() {
        let identical = Features { n: 30, dim: 2, values: [0.6, 0.8].repeat(30) };
        let empty = Features { n: 0, dim: 2, values: Vec::new() };
        assert_eq!(nearest_hnsw(&empty, &identical, 3, |_| ()), vec![Vec::new(); 30]);
        assert!(nearest_hnsw(&identical, &empty, 3, |_| ()).is_empty());
        let results = nearest_hnsw(&identical, &identical, 3, |_| ());
        assert!(results.iter().all(|neighbors| neighbors.iter().all(|n| n.1 > 0.999)));
    }
}

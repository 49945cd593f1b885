//! The nearest rows of many at once: all compared with all, or beyond a million through a graph (HNSW, Malkov and Yashunin 2016,
//! arXiv:1603.09320), which finds nearly all of them in far less time.

use hnsw_rs::{anndists::dist::Distance, prelude::Hnsw};
use rayon::prelude::*;

use super::search::dot;
use crate::eval::{Features, knn};

/// Comparisons from which the graph is faster: those of a million rows with themselves ([docs/decisions/0003]).
const MOST_COMPARISONS: usize = 1_000_000_000_000;

/// Rows between two calls of `done`.
const BLOCK: usize = 4096;

/// Whether [`nearest`] will go by the graph, and may miss some.
pub fn approximate(bank: usize, queries: usize) -> bool {
    bank.saturating_mul(queries) > MOST_COMPARISONS
}

/// The `k` rows of `bank` nearest to each query by cosine, nearest first. Both of unit rows. `done` is told how much is done, up to 1.
pub fn nearest(bank: &Features, queries: &Features, k: usize, done: impl FnMut(f64)) -> Vec<Vec<(usize, f32)>> {
    match approximate(bank.n, queries.n) {
        true => by_graph(bank, queries, k, done),
        false => exactly(bank, queries, k, done),
    }
}

fn exactly(bank: &Features, queries: &Features, k: usize, mut done: impl FnMut(f64)) -> Vec<Vec<(usize, f32)>> {
    let mut all = Vec::with_capacity(queries.n);
    for values in queries.values.chunks(BLOCK * queries.dim) {
        let some = Features { n: values.len() / queries.dim, dim: queries.dim, values: values.to_vec() };
        all.extend(knn::nearest(bank, &some, k));
        done(all.len() as f64 / queries.n as f64);
    }
    all
}

/// The graph holds numbers of rows, not rows: those of `bank`, then those of `queries`.
struct Cosine<'a> {
    bank: &'a Features,
    queries: &'a Features,
}

impl Cosine<'_> {
    fn row(&self, id: u32) -> &[f32] {
        let id = id as usize;
        if id < self.bank.n { self.bank.row(id) } else { self.queries.row(id - self.bank.n) }
    }
}

impl Distance<u32> for Cosine<'_> {
    fn eval(&self, a: &[u32], b: &[u32]) -> f32 {
        // The graph wants no negative distance, which rounding could give.
        (1.0 - dot(self.row(a[0]), self.row(b[0]))).max(0.0)
    }
}

fn by_graph(bank: &Features, queries: &Features, k: usize, mut done: impl FnMut(f64)) -> Vec<Vec<(usize, f32)>> {
    // Neighbours kept of each row, and rows looked at for each that is put in: as the paper has them for hundreds of dimensions.
    const KEPT: usize = 24;
    const LOOKED_AT: usize = 200;
    const LAYERS: usize = 16;
    assert_eq!(bank.dim, queries.dim, "rows to compare have the same length");
    let ids: Vec<u32> = (0..u32::try_from(bank.n + queries.n).expect("less than 2^32 rows")).collect();
    let graph = Hnsw::new(KEPT, bank.n, LAYERS, LOOKED_AT, Cosine { bank, queries });
    let steps = (bank.n + queries.n) as f64;
    // Threads that begin with an empty graph would all begin one.
    let (first, others) = ids[..bank.n].split_at(bank.n.min(1));
    first.iter().for_each(|id| graph.insert((std::slice::from_ref(id), 0)));
    for some in others.chunks(BLOCK) {
        some.par_iter().for_each(|id| graph.insert((std::slice::from_ref(id), *id as usize)));
        done(f64::from(some[some.len() - 1]) / steps);
    }
    let mut all = Vec::with_capacity(queries.n);
    for some in ids[bank.n..].chunks(BLOCK) {
        let near = |id: &u32| {
            let near = graph.search(std::slice::from_ref(id), k, (2 * k).max(LOOKED_AT / 2));
            near.iter().map(|n| (n.d_id, 1.0 - n.distance)).collect::<Vec<_>>()
        };
        all.par_extend(some.par_iter().map(near));
        done((bank.n + all.len()) as f64 / steps);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    #[test]
    fn the_graph_finds_nearly_all_that_the_comparison_of_all_finds() {
        let mut rng = random::stream(&[5]);
        let mut draw = |spread: f64| (random::uniform(&mut rng) - 0.5) * spread;
        // Clouds of 40 around 50 centres.
        let centres: Vec<Vec<f64>> = (0..50).map(|_| (0..24).map(|_| draw(2.0)).collect()).collect();
        let values: Vec<f32> = (0..2000)
            .flat_map(|i| centres[i % 50].iter().map(|c| *c as f32).collect::<Vec<_>>())
            .map(|c| c + draw(0.8) as f32)
            .collect();
        let bank = Features { n: 2000, dim: 24, values }.unit();
        let queries = bank.subset(&(0..300).map(|i| 5 * i).collect::<Vec<_>>());
        let (mut told, mut last) = (0, 0.0);
        let exact = exactly(&bank, &queries, 10, |_| told += 1);
        let graph = by_graph(&bank, &queries, 10, |share| last = share);
        assert!(told == 1 && last == 1.0);
        let mut found = 0;
        for (i, (exact, graph)) in exact.iter().zip(&graph).enumerate() {
            assert_eq!(graph.len(), 10);
            assert_eq!(graph[0].0, 5 * i, "a row is nearest to itself");
            assert!(graph.windows(2).all(|w| w[0].1 >= w[1].1));
            found += graph.iter().filter(|g| exact.iter().any(|e| e.0 == g.0 && (e.1 - g.1).abs() < 1e-4)).count();
        }
        assert!(found > 2900, "{found} of 3000");
        assert!(!approximate(1_000_000, 1_000_000) && approximate(1_000_001, 1_000_000));
    }

    #[test]
    fn few_rows_and_equal_rows_make_a_graph_too() {
        let equal = Features { n: 30, dim: 2, values: [0.6, 0.8].repeat(30) };
        let none = Features { n: 0, dim: 2, values: Vec::new() };
        assert_eq!(by_graph(&none, &equal, 3, |_| ()), vec![Vec::new(); 30]);
        assert!(by_graph(&equal, &none, 3, |_| ()).is_empty());
        assert!(by_graph(&equal, &equal, 3, |_| ()).iter().all(|near| near.iter().all(|n| n.1 > 0.999)));
    }
}

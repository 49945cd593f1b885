//! Weighted k-nearest-neighbor classification (Wu et al. 2018, arXiv:1805.01978): cosine
//! similarity; each of the k nearest neighbors votes for its class with weight exp(cos / T).

use byol_kernels::{isa, matmul};
use rayon::prelude::*;

use super::{Features, metrics};

/// kNN predictions for a set of queries.
#[derive(Debug, Clone, PartialEq)]
pub struct KnnPredictions {
    /// Fraction of correctly classified queries, in [0, 1].
    pub accuracy: f64,
    /// Vote weights, `[N, classes]`.
    pub votes: Vec<f64>,
    /// Predicted class of each query.
    pub predicted: Vec<usize>,
}

/// Maximum number of cosines held in memory: 256 MiB. Every product packs the whole bank again, so
/// few large ones are faster.
const MAX_COSINES: usize = 1 << 26;

/// Returns the `k` nearest rows of `bank` for each query, as (row, cosine), nearest first. Ties go
/// to the lower row. Rows of both must have unit length.
pub fn nearest(bank: &Features, queries: &Features, k: usize) -> Vec<Vec<(usize, f32)>> {
    nearest_in_blocks(bank, queries, k, (MAX_COSINES / bank.n.max(1)).clamp(32, 2048))
}

/// [`nearest`], `block` queries at a time.
fn nearest_in_blocks(bank: &Features, queries: &Features, k: usize, block: usize) -> Vec<Vec<(usize, f32)>> {
    assert_eq!(bank.dim, queries.dim, "bank and queries must have the same dimension");
    if bank.n == 0 || queries.n == 0 {
        return vec![Vec::new(); queries.n];
    }
    let search_block = |values: &[f32]| -> Vec<Vec<(usize, f32)>> {
        let n = values.len() / bank.dim;
        let cosines = matmul::nt(isa::current(), values, &bank.values, [n, bank.n, bank.dim]);
        cosines.par_chunks(bank.n).map(|row| top_k(row, k)).collect()
    };
    queries.values.chunks(block * bank.dim).flat_map(search_block).collect()
}

/// Returns the `k` largest values as (index, value), largest first. Ties go to the lower index.
pub(crate) fn top_k(values: &[f32], k: usize) -> Vec<(usize, f32)> {
    let order = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let k = k.min(values.len());
    let mut candidates: Vec<(usize, f32)> = Vec::with_capacity(2 * k + 1);
    // The k-th largest so far; a value that is not above it cannot be among the k largest.
    let mut threshold = f32::NEG_INFINITY;
    for (i, v) in values.iter().enumerate() {
        if *v > threshold || candidates.len() < k {
            candidates.push((i, *v));
            if candidates.len() == 2 * k {
                candidates.sort_unstable_by(order);
                candidates.truncate(k);
                threshold = candidates.last().map_or(threshold, |(_, v)| *v);
            }
        }
    }
    candidates.sort_unstable_by(order);
    candidates.truncate(k);
    candidates
}

/// Classifies `queries` by their `k` nearest neighbors in `bank`. Labels are in 0..`classes`;
/// `labels` are those of the queries.
///
/// # Examples
///
/// ```
/// use byol::eval::{Features, knn};
///
/// let bank = Features { n: 3, dim: 2, values: vec![1.0, 0.0, 0.9, 0.1, 0.0, 1.0] };
/// let queries = Features { n: 2, dim: 2, values: vec![0.8, 0.2, 0.1, 0.9] };
/// let result = knn::classify(&bank, &[0, 0, 1], &queries, &[0, 1], 2, 1, 0.07);
/// assert_eq!(result.predicted, [0, 1]);
/// assert_eq!(result.accuracy, 1.0);
/// ```
pub fn classify(
    bank: &Features,
    bank_labels: &[usize],
    queries: &Features,
    labels: &[usize],
    classes: usize,
    k: usize,
    temperature: f64,
) -> KnnPredictions {
    let mut predictions = classify_with_ks(bank, bank_labels, queries, labels, classes, &[k], temperature);
    predictions.pop().expect("one result per k")
}

/// [`classify`] for several values of `k` with a single neighbor search.
pub fn classify_with_ks(
    bank: &Features,
    bank_labels: &[usize],
    queries: &Features,
    labels: &[usize],
    classes: usize,
    ks: &[usize],
    temperature: f64,
) -> Vec<KnnPredictions> {
    let (bank, queries) = (bank.l2_normalized(), queries.l2_normalized());
    let max_k = ks.iter().copied().max().unwrap_or(0);
    let vote = |neighbors: &Vec<(usize, f32)>| -> Vec<Vec<f64>> {
        let votes_at = |k: &usize| {
            let mut votes = vec![0.0; classes];
            for (i, cosine) in neighbors.iter().take(*k) {
                votes[bank_labels[*i]] += (f64::from(*cosine) / temperature).exp();
            }
            votes
        };
        ks.iter().map(votes_at).collect()
    };
    // `[query][k][class]`
    let votes: Vec<Vec<Vec<f64>>> = nearest(&bank, &queries, max_k).par_iter().map(vote).collect();
    let predict = |i: usize| {
        let votes: Vec<f64> = votes.iter().flat_map(|query| query[i].iter().copied()).collect();
        let predicted = metrics::argmax(&votes, classes);
        KnnPredictions { accuracy: metrics::accuracy(&predicted, labels), votes, predicted }
    };
    (0..ks.len()).map(predict).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_matches_brute_force() {
        let rows = |n: usize, salt: usize| {
            let value =
                |i: usize| ((i.wrapping_add(salt).wrapping_mul(2_654_435_761) >> 9) % 2000) as f32 / 1000.0 - 1.0;
            Features { n, dim: 7, values: (0..7 * n).map(value).collect() }.l2_normalized()
        };
        let (mut bank, queries) = (rows(700, 1), rows(256 + 3, 5));
        // Equal rows: the lower comes first.
        bank.values.copy_within(0..70, 700);
        for k in [1, 3, 20, 699, 1000] {
            let results = nearest_in_blocks(&bank, &queries, k, 256);
            assert_eq!(results.len(), queries.n);
            for (q, neighbors) in results.iter().enumerate() {
                let cosine = |i: usize| bank.row(i).iter().zip(queries.row(q)).map(|(a, b)| a * b).sum::<f32>();
                assert_eq!(neighbors.len(), k.min(700));
                for (i, c) in neighbors {
                    assert!((cosine(*i) - c).abs() < 1e-5);
                }
                assert!(neighbors.windows(2).all(|w| w[0].1 > w[1].1 || (w[0].1 == w[1].1 && w[0].0 < w[1].0)));
                let threshold = neighbors.last().unwrap().1;
                let above = |i: &usize| cosine(*i) > threshold + 1e-5;
                assert_eq!(
                    (0..700).filter(above).count().min(k),
                    (0..700).filter(above).filter(|i| neighbors.iter().any(|(j, _)| j == i)).count()
                );
            }
        }
    }
}

//! Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978): cosine similarity; each of the k nearest votes for its
//! class with exp(cos / T).

use byol_kernels::{
    conv::{self, Shape},
    isa,
};
use rayon::prelude::*;

use super::{Features, metrics};

/// The outcome for some queries.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Share of queries whose class won, in [0, 1].
    pub accuracy: f64,
    /// Votes by query and class, `[N, classes]`.
    pub votes: Vec<f64>,
    /// The winner of each query.
    pub predicted: Vec<usize>,
}

/// Cosines that are held at once: 256 MiB. Each product lays out the whole bank anew, so few large ones are faster.
const AT_ONCE: usize = 1 << 26;

/// The `k` rows of `bank` nearest to each query by cosine, nearest first; of equals the earlier row. Both of unit rows.
pub fn nearest(bank: &Features, queries: &Features, k: usize) -> Vec<Vec<(usize, f32)>> {
    nearest_of(bank, queries, k, (AT_ONCE / bank.n.max(1)).clamp(32, 2048))
}

/// The same, for so many queries together.
fn nearest_of(bank: &Features, queries: &Features, k: usize, together: usize) -> Vec<Vec<(usize, f32)>> {
    assert_eq!(bank.dim, queries.dim, "rows to compare have the same length");
    if bank.n == 0 || queries.n == 0 {
        return vec![Vec::new(); queries.n];
    }
    let of_some = |values: &[f32]| -> Vec<Vec<(usize, f32)>> {
        // Cosines of unit rows are a matrix product: a convolution of maps of one pixel, with a channel for each row of the bank.
        let n = values.len() / bank.dim;
        let s = Shape { n, h: 1, w: 1, c_in: bank.dim, c_out: bank.n, kernel: 1, stride: 1, padding: 0, dilation: 1 };
        let cosines = conv::forward(isa::chosen(), &s, values, &bank.values);
        cosines.par_chunks(bank.n).map(|row| largest(row, k)).collect()
    };
    queries.values.chunks(together * bank.dim).flat_map(of_some).collect()
}

/// The `k` largest with their positions, largest first; of equals the earlier.
pub(crate) fn largest(values: &[f32], k: usize) -> Vec<(usize, f32)> {
    let order = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let k = k.min(values.len());
    let mut best: Vec<(usize, f32)> = Vec::with_capacity(2 * k + 1);
    // What is not above the k-th of those seen so far can be none of them.
    let mut least = f32::NEG_INFINITY;
    for (i, v) in values.iter().enumerate() {
        if *v > least || best.len() < k {
            best.push((i, *v));
            if best.len() == 2 * k {
                best.sort_unstable_by(order);
                best.truncate(k);
                least = best.last().map_or(least, |(_, v)| *v);
            }
        }
    }
    best.sort_unstable_by(order);
    best.truncate(k);
    best
}

/// Classifies `queries` by the `k` nearest of `bank`. Labels are in 0..`classes`.
pub fn classify(
    bank: &Features,
    bank_labels: &[usize],
    queries: &Features,
    labels: &[usize],
    classes: usize,
    k: usize,
    temperature: f64,
) -> Outcome {
    let mut all = classify_each(bank, bank_labels, queries, labels, classes, &[k], temperature);
    all.pop().expect("one outcome a k")
}

/// The same for several `k`, of one search.
pub fn classify_each(
    bank: &Features,
    bank_labels: &[usize],
    queries: &Features,
    labels: &[usize],
    classes: usize,
    ks: &[usize],
    temperature: f64,
) -> Vec<Outcome> {
    let (bank, queries) = (bank.unit(), queries.unit());
    let most = ks.iter().copied().max().unwrap_or(0);
    // Neighbour after neighbour, nearest first, so that the votes of a smaller k are on the way to those of a larger one.
    let vote = |near: &Vec<(usize, f32)>| -> Vec<Vec<f64>> {
        let of = |k: &usize| {
            let mut votes = vec![0.0; classes];
            for (i, cosine) in near.iter().take(*k) {
                votes[bank_labels[*i]] += (f64::from(*cosine) / temperature).exp();
            }
            votes
        };
        ks.iter().map(of).collect()
    };
    let votes: Vec<Vec<Vec<f64>>> = nearest(&bank, &queries, most).par_iter().map(vote).collect();
    let outcome = |i: usize| {
        let votes: Vec<f64> = votes.iter().flat_map(|of_query| of_query[i].iter().copied()).collect();
        let predicted = metrics::winners(&votes, classes);
        Outcome { accuracy: metrics::accuracy(&predicted, labels), votes, predicted }
    };
    (0..ks.len()).map(outcome).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_are_those_of_a_plain_search() {
        let rows = |n: usize, salt: usize| {
            let value =
                |i: usize| ((i.wrapping_add(salt).wrapping_mul(2_654_435_761) >> 9) % 2000) as f32 / 1000.0 - 1.0;
            Features { n, dim: 7, values: (0..7 * n).map(value).collect() }.unit()
        };
        let (mut bank, queries) = (rows(700, 1), rows(256 + 3, 5));
        // Twins: the earlier comes first.
        bank.values.copy_within(0..70, 700);
        for k in [1, 3, 20, 699, 1000] {
            let found = nearest_of(&bank, &queries, k, 256);
            assert_eq!(found.len(), queries.n);
            for (q, found) in found.iter().enumerate() {
                let cosine = |i: usize| bank.row(i).iter().zip(queries.row(q)).map(|(a, b)| a * b).sum::<f32>();
                assert_eq!(found.len(), k.min(700));
                for (i, c) in found {
                    assert!((cosine(*i) - c).abs() < 1e-5);
                }
                assert!(found.windows(2).all(|w| w[0].1 > w[1].1 || (w[0].1 == w[1].1 && w[0].0 < w[1].0)));
                let least = found.last().unwrap().1;
                assert_eq!(
                    (0..700).filter(|i| cosine(*i) > least + 1e-5).count().min(k),
                    (0..700).filter(|i| cosine(*i) > least + 1e-5 && found.iter().any(|(f, _)| f == i)).count()
                );
            }
        }
    }
}

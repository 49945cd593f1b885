//! Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978): cosine similarity; each of the k nearest votes for its
//! class with exp(cos / T).

use rayon::prelude::*;

use super::Features;

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

impl Outcome {
    /// Half the width of the 95 % interval of the accuracy, by the normal approximation.
    pub fn interval(&self) -> f64 {
        1.96 * (self.accuracy * (1.0 - self.accuracy) / self.predicted.len().max(1) as f64).sqrt()
    }
}

/// The `k` rows of `bank` nearest to `query` by cosine, nearest first; of equals the earlier row. Both of unit rows.
pub fn nearest(bank: &Features, query: &[f32], k: usize) -> Vec<(usize, f32)> {
    let mut all: Vec<(usize, f32)> =
        (0..bank.n).map(|i| (i, bank.row(i).iter().zip(query).map(|(a, b)| a * b).sum())).collect();
    let k = k.min(all.len());
    let by_similarity = |a: &(usize, f32), b: &(usize, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if k < all.len() {
        all.select_nth_unstable_by(k, by_similarity);
        all.truncate(k);
    }
    all.sort_unstable_by(by_similarity);
    all
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
    let (bank, queries) = (bank.unit(), queries.unit());
    let vote = |q: usize| -> Vec<f64> {
        let mut votes = vec![0.0; classes];
        for (i, cosine) in nearest(&bank, queries.row(q), k) {
            votes[bank_labels[i]] += (f64::from(cosine) / temperature).exp();
        }
        votes
    };
    let votes: Vec<Vec<f64>> = (0..queries.n).into_par_iter().map(vote).collect();
    let winner = |votes: &Vec<f64>| {
        // The first of equals, as argmax does.
        votes.iter().enumerate().fold((0, f64::NEG_INFINITY), |best, (c, v)| if *v > best.1 { (c, *v) } else { best }).0
    };
    let predicted: Vec<usize> = votes.iter().map(winner).collect();
    let right = predicted.iter().zip(labels).filter(|(p, l)| p == l).count();
    Outcome { accuracy: right as f64 / queries.n.max(1) as f64, votes: votes.concat(), predicted }
}

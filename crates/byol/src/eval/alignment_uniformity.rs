//! Alignment and uniformity of representations on the unit sphere (Wang and Isola 2020,
//! arXiv:2005.10242), and view retrieval.

use rayon::prelude::*;

use super::{Features, metrics::mean};

/// Alignment: mean squared distance between the L2-normalized rows of `a` and `b`, pair by pair, in
/// [0, 4] (α = 2). 0 if the two views of every image have the same representation.
pub fn alignment(a: &Features, b: &Features) -> f64 {
    mean(alignments(a, b).into_iter())
}

/// [`alignment`] of each pair of rows.
pub(crate) fn alignments(a: &Features, b: &Features) -> Vec<f64> {
    let (a, b) = (a.l2_normalized(), b.l2_normalized());
    (0..a.n).map(|i| squared_distance(a.row(i), b.row(i))).collect()
}

/// Uniformity: ln of the mean over pairs of exp(−2 ‖x − y‖²) of L2-normalized rows (t = 2). At most
/// 0; lower means more evenly spread. 0 for fewer than two rows.
pub fn uniformity(x: &Features) -> f64 {
    let x = x.l2_normalized();
    if x.n < 2 {
        return 0.0;
    }
    let row_sum = |i: usize| (i + 1..x.n).map(|j| (-2.0 * squared_distance(x.row(i), x.row(j))).exp()).sum::<f64>();
    // Summed per row, then in row order: the result does not depend on the number of threads.
    let row_sums: Vec<f64> = (0..x.n).into_par_iter().map(row_sum).collect();
    (row_sums.iter().sum::<f64>() / (x.n as f64 * (x.n as f64 - 1.0) / 2.0)).ln()
}

/// View retrieval: for each row `i` of `a`, returns whether row `i` is its nearest row of `b` by
/// cosine.
pub(crate) fn top1_self(a: &Features, b: &Features) -> Vec<bool> {
    let (a, b) = (a.l2_normalized(), b.l2_normalized());
    let is_top1 = |i: usize| {
        let cosine = |j: usize| a.row(i).iter().zip(b.row(j)).map(|(x, y)| x * y).sum::<f32>();
        let own = cosine(i);
        // Ties go to the lower row, so a constant representation retrieves a single image.
        (0..b.n).all(|j| j == i || cosine(j) < own || (cosine(j) == own && j > i))
    };
    (0..a.n).into_par_iter().map(is_top1).collect()
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[[f32; 2]]) -> Features {
        Features { n: rows.len(), dim: 2, values: rows.concat() }
    }

    #[test]
    fn distinct_views_retrieve_their_image_and_constant_ones_do_not() {
        let cross = rows(&[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]);
        let rotated = rows(&[[0.9, 0.1], [-0.1, 0.9], [-0.9, -0.1], [0.1, -0.9]]);
        assert_eq!(top1_self(&cross, &rotated), [true; 4]);
        let constant = rows(&[[1.0, 0.0]; 4]);
        assert_eq!(top1_self(&constant, &constant), [true, false, false, false]);
        assert!((uniformity(&constant)).abs() < 1e-12 && uniformity(&cross) < -2.0);
        assert!(alignment(&cross, &rotated) < 0.05);
    }
}

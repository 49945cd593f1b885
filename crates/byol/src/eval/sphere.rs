//! Where views lie on the unit sphere: whether those of one image are near, and images far apart.

use rayon::prelude::*;

use super::{Features, metrics::mean};

/// Mean squared distance of the unit rows of `a` from those of `b`, pair by pair, in [0, 4]: 0 where an image's two views agree (Wang and
/// Isola 2020, arXiv:2005.10242, α = 2).
pub fn alignment(a: &Features, b: &Features) -> f64 {
    mean(alignments(a, b).into_iter())
}

/// The same row by row.
pub fn alignments(a: &Features, b: &Features) -> Vec<f64> {
    let (a, b) = (a.unit(), b.unit());
    (0..a.n).map(|i| squared_distance(a.row(i), b.row(i))).collect()
}

/// ln of the mean over pairs of exp(−2 ‖x − y‖²) of unit rows, at most 0: lower is more evenly spread (Wang and Isola 2020, t = 2). 0 of
/// fewer than two rows.
pub fn uniformity(x: &Features) -> f64 {
    let x = x.unit();
    if x.n < 2 {
        return 0.0;
    }
    let of_row = |i: usize| (i + 1..x.n).map(|j| (-2.0 * squared_distance(x.row(i), x.row(j))).exp()).sum::<f64>();
    // Sums by row, then in the rows' order: the same for any number of threads.
    let rows: Vec<f64> = (0..x.n).into_par_iter().map(of_row).collect();
    (rows.iter().sum::<f64>() / (x.n as f64 * (x.n as f64 - 1.0) / 2.0)).ln()
}

/// For each row of `a`, whether the nearest row of `b` by cosine is its own: does a view find its image among N?
pub fn finds_its_own(a: &Features, b: &Features) -> Vec<bool> {
    let (a, b) = (a.unit(), b.unit());
    let finds = |i: usize| {
        let dot = |j: usize| a.row(i).iter().zip(b.row(j)).map(|(x, y)| x * y).sum::<f32>();
        let own = dot(i);
        // Of equals the earlier wins; a constant representation so finds one image alone.
        (0..b.n).all(|j| j == i || dot(j) < own || (dot(j) == own && j > i))
    };
    (0..a.n).into_par_iter().map(finds).collect()
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
    fn a_view_finds_its_own_image_unless_all_are_alike() {
        let cross = rows(&[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]);
        let turned = rows(&[[0.9, 0.1], [-0.1, 0.9], [-0.9, -0.1], [0.1, -0.9]]);
        assert_eq!(finds_its_own(&cross, &turned), [true; 4]);
        let constant = rows(&[[1.0, 0.0]; 4]);
        assert_eq!(finds_its_own(&constant, &constant), [true, false, false, false]);
        assert!((uniformity(&constant)).abs() < 1e-12 && uniformity(&cross) < -2.0);
        assert!(alignment(&cross, &turned) < 0.05);
    }
}

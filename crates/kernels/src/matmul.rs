//! Matrix products of row-major f32 matrices.
//!
//! A 1x1 convolution of maps of one pixel is a matrix product, so these are the direct convolution
//! and its weight gradient: they use the same micro-kernels and have the same determinism.

use crate::{
    conv::{self, Shape},
    isa::Isa,
    storage::Values,
};

/// Shape of the equivalent convolution: `n` maps of one pixel with `c_in` and `c_out` channels.
fn shape(n: usize, c_in: usize, c_out: usize) -> Shape {
    Shape { n, h: 1, w: 1, c_in, c_out, kernel: 1, stride: 1, padding: 0, dilation: 1 }
}

/// Computes A · Bᵀ, `[n, m]`, where `a` is `[n, k]` and `b` is `[m, k]`: the dot products of all
/// rows of A with all rows of B.
///
/// # Panics
///
/// If the length of a slice does not match `[n, m, k]`.
pub fn nt(isa: &Isa, a: &[f32], b: &[f32], [n, m, k]: [usize; 3]) -> Vec<f32> {
    assert_eq!([a.len(), b.len()], [n * k, m * k], "A is [{n}, {k}] and B is [{m}, {k}]");
    if n == 0 || m == 0 || k == 0 {
        return vec![0.0; n * m];
    }
    conv::forward(isa, &shape(n, k, m), a, b)
}

/// Computes Aᵀ · B, `[m, k]`, where `a` is `[n, m]` and `b` is `[n, k]`: the sum of the outer
/// products of the rows of A and B.
///
/// # Panics
///
/// If the length of a slice does not match `[n, m, k]`.
pub fn tn(isa: &Isa, a: &[f32], b: &[f32], [n, m, k]: [usize; 3]) -> Vec<f32> {
    assert_eq!([a.len(), b.len()], [n * m, n * k], "A is [{n}, {m}] and B is [{n}, {k}]");
    if n == 0 || m == 0 || k == 0 {
        return vec![0.0; m * k];
    }
    conv::backward_weight(isa, &shape(n, k, m), b.into(), Values::F32(a))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa;

    /// Small integers, whose products and sums are exact.
    fn matrix(rows: usize, cols: usize, seed: usize) -> Vec<f32> {
        (0..rows * cols).map(|i| ((i * 7 + seed * 13) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn products_match_the_definition() {
        for [n, m, k] in [[1, 1, 1], [5, 3, 4], [70, 33, 17], [300, 40, 64], [0, 3, 4], [3, 0, 4], [3, 4, 0]] {
            let (a, b) = (matrix(n, k, 1), matrix(m, k, 2));
            let dot = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum::<f32>() + 0.0;
            let nt_expected: Vec<f32> = (0..n * m).map(|i| dot(i / m, i % m)).collect();
            let (at, bt) = (matrix(n, m, 3), matrix(n, k, 4));
            let outer = |i: usize, j: usize| (0..n).map(|l| at[l * m + i] * bt[l * k + j]).sum::<f32>() + 0.0;
            let tn_expected: Vec<f32> = (0..m * k).map(|i| outer(i / k, i % k)).collect();
            for isa in isa::available() {
                assert_eq!(nt(isa, &a, &b, [n, m, k]), nt_expected, "{isa:?} {n} {m} {k}");
                assert_eq!(tn(isa, &at, &bt, [n, m, k]), tn_expected, "{isa:?} {n} {m} {k}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "A is [2, 3] and B is [4, 3]")]
    fn rejects_lengths_that_do_not_match() {
        nt(isa::available()[0], &[0.0; 6], &[0.0; 11], [2, 4, 3]);
    }
}

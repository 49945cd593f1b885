//! Feature matrices: one representation per image.

/// Representations of `n` images, one row each: `[N, F]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    /// Number of rows, N.
    pub n: usize,
    /// Feature dimension, F.
    pub dim: usize,
    /// Values in row-major order.
    pub values: Vec<f32>,
}

impl Features {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.dim..(i + 1) * self.dim]
    }

    /// Copies the rows at `indices`, in that order.
    pub fn subset(&self, indices: &[usize]) -> Features {
        let values = indices.iter().flat_map(|i| self.row(*i).iter().copied()).collect();
        Features { n: indices.len(), dim: self.dim, values }
    }

    /// Returns true if no value is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        self.values.iter().all(|v| v.is_finite())
    }

    /// Scales every row to unit length; rows of zeros stay zero.
    pub fn l2_normalized(&self) -> Features {
        let mut values = self.values.clone();
        for row in values.chunks_exact_mut(self.dim) {
            let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().max(1e-12).sqrt();
            row.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
        }
        Features { values, ..*self }
    }
}

/// Dot product, summed in 32 lanes so that it vectorizes.
#[multiversion::multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 32];
    let (a_blocks, a_tail) = a.as_chunks::<32>();
    let (b_blocks, b_tail) = b.as_chunks::<32>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for i in 0..32 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f32>() + a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum::<f32>()
}

//! Batch norm with what follows it (skip, ReLU) in one pass, forward and backward. `[m, c]`, channels last.

use rayon::prelude::*;

/// Rows a task; sums within a task are in f32, across tasks in f64.
const ROWS: usize = 256;

/// Mean and biased variance by channel, in two passes.
pub fn moments(y: &[f32], c: usize) -> (Vec<f32>, Vec<f32>) {
    let m = (y.len() / c).max(1) as f64;
    let mean: Vec<f32> = sums(y, c, |row, sum| {
        for (s, v) in sum.iter_mut().zip(row) {
            *s += v;
        }
    })
    .iter()
    .map(|s| (s / m) as f32)
    .collect();
    let var = sums(y, c, |row, sum| {
        for ((s, v), mean) in sum.iter_mut().zip(row).zip(&mean) {
            *s += (v - mean) * (v - mean);
        }
    });
    (mean.clone(), var.iter().map(|s| (s / m) as f32).collect())
}

fn sums(y: &[f32], c: usize, add: impl Fn(&[f32], &mut [f32]) + Sync) -> Vec<f64> {
    let partial: Vec<Vec<f32>> = y
        .par_chunks(ROWS * c)
        .map(|rows| {
            let mut sum = vec![0.0f32; c];
            rows.chunks_exact(c).for_each(|row| add(row, &mut sum));
            sum
        })
        .collect();
    total(&partial, c)
}

fn total(partial: &[Vec<f32>], c: usize) -> Vec<f64> {
    let mut all = vec![0.0f64; c];
    for part in partial {
        for (a, p) in all.iter_mut().zip(part) {
            *a += f64::from(*p);
        }
    }
    all
}

/// 1 / √(var + eps).
pub fn inverse_deviation(var: &[f32], eps: f64) -> Vec<f32> {
    var.iter().map(|v| (1.0 / (f64::from(*v) + eps).sqrt()) as f32).collect()
}

/// scale · y + shift, plus `skip` where there is one, then max(·, 0) where `relu`. `scale`, `shift`: `[c]`.
pub fn affine_act(y: &[f32], scale: &[f32], shift: &[f32], skip: Option<&[f32]>, relu: bool) -> Vec<f32> {
    let c = scale.len();
    let low = if relu { 0.0 } else { f32::NEG_INFINITY };
    let mut out = vec![0.0f32; y.len()];
    out.par_chunks_mut(ROWS * c).zip(y.par_chunks(ROWS * c)).enumerate().for_each(|(i, (out, y))| {
        for (r, (out, y)) in out.chunks_exact_mut(c).zip(y.chunks_exact(c)).enumerate() {
            for (((o, y), a), b) in out.iter_mut().zip(y).zip(scale).zip(shift) {
                *o = y * a + b;
            }
            if let Some(skip) = skip {
                let from = (i * ROWS + r) * c;
                for (o, s) in out.iter_mut().zip(&skip[from..from + c]) {
                    *o += s;
                }
            }
            out.iter_mut().for_each(|o| *o = o.max(low));
        }
    });
    out
}

/// scale and shift of a normalisation with these statistics.
pub fn scale_shift(gamma: &[f32], beta: &[f32], mean: &[f32], inverse: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let scale: Vec<f32> = gamma.iter().zip(inverse).map(|(g, i)| g * i).collect();
    let shift = beta.iter().zip(mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
    (scale, shift)
}

/// Gradients of `relu(norm(y) + skip)` with batch statistics.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// By y, `[m, c]`.
    pub dy: Vec<f32>,
    /// By the skip, `[m, c]`: the gradient that passed the ReLU.
    pub dskip: Vec<f32>,
    /// By γ, `[c]`.
    pub dgamma: Vec<f32>,
    /// By β, `[c]`.
    pub dbeta: Vec<f32>,
}

/// Backward of [`affine_act`] with the batch's statistics. `out` is the forward's result: where it is 0, a ReLU let nothing pass.
pub fn backward(
    dout: &[f32],
    out: &[f32],
    y: &[f32],
    gamma: &[f32],
    mean: &[f32],
    inverse: &[f32],
    relu: bool,
) -> Gradients {
    let c = gamma.len();
    let m = (y.len() / c).max(1) as f32;
    let mut g = dout.to_vec();
    let partial: Vec<(Vec<f32>, Vec<f32>)> = g
        .par_chunks_mut(ROWS * c)
        .zip(out.par_chunks(ROWS * c))
        .zip(y.par_chunks(ROWS * c))
        .map(|((g, out), y)| {
            let (mut dgamma, mut dbeta) = (vec![0.0f32; c], vec![0.0f32; c]);
            for ((g, out), y) in g.chunks_exact_mut(c).zip(out.chunks_exact(c)).zip(y.chunks_exact(c)) {
                if relu {
                    for (g, o) in g.iter_mut().zip(out) {
                        *g = if *o > 0.0 { *g } else { 0.0 };
                    }
                }
                for (((g, y), mean), sum) in g.iter().zip(y).zip(mean).zip(&mut dgamma) {
                    *sum += g * (y - mean);
                }
                for (g, sum) in g.iter().zip(&mut dbeta) {
                    *sum += g;
                }
            }
            (dgamma, dbeta)
        })
        .collect();
    let (of_gamma, of_beta): (Vec<_>, Vec<_>) = partial.into_iter().unzip();
    let dbeta: Vec<f32> = total(&of_beta, c).iter().map(|s| *s as f32).collect();
    let dgamma: Vec<f32> = total(&of_gamma, c).iter().zip(inverse).map(|(s, i)| (s * f64::from(*i)) as f32).collect();
    // dy = γ/σ (g − mean(g) − ŷ mean(g ŷ)) = a g + b (y − mean) + d
    let a: Vec<f32> = gamma.iter().zip(inverse).map(|(g, i)| g * i).collect();
    let b: Vec<f32> = (0..c).map(|k| -a[k] * dgamma[k] * inverse[k] / m).collect();
    let d: Vec<f32> = (0..c).map(|k| -a[k] * dbeta[k] / m).collect();
    let mut dy = vec![0.0f32; y.len()];
    dy.par_chunks_mut(ROWS * c).zip(g.par_chunks(ROWS * c)).zip(y.par_chunks(ROWS * c)).for_each(|((dy, g), y)| {
        for ((dy, g), y) in dy.chunks_exact_mut(c).zip(g.chunks_exact(c)).zip(y.chunks_exact(c)) {
            for k in 0..c {
                dy[k] = a[k] * g[k] + b[k] * (y[k] - mean[k]) + d[k];
            }
        }
    });
    Gradients { dy, dskip: g, dgamma, dbeta }
}

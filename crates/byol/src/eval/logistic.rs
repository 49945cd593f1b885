//! Multinomial logistic regression with L2 regularization, fitted by L-BFGS on fixed features: the
//! paper's linear transfer (appendix E) and the fast linear evaluation.
//!
//! L(W, b) = mean cross-entropy of softmax(x Wᵀ + b) + l2 / 2 · ‖W‖². The bias is not regularized.

use byol_kernels::{isa, matmul};
use rayon::prelude::*;

use super::{Features, metrics};

/// The paper's L2 strengths: 45 values from 1e-6 to 1e5, evenly spaced in their logarithm.
/// Strongest first, so that each fit can start from the smoother one before it.
pub fn strengths() -> Vec<f64> {
    (0..45).rev().map(|i| 10f64.powf(-6.0 + 11.0 * f64::from(i) / 44.0)).collect()
}

/// Number of (step, gradient change) pairs in the L-BFGS history.
const HISTORY: usize = 10;

/// Maximum iterations and gradient tolerance of a trial fit.
const TRIAL: (usize, f64) = (40, 1e-4);

/// Stride of the coarse search over strengths; the strengths around the best one are tried next.
const STRIDE: usize = 4;

/// Number of consecutive worse trials that ends the coarse search: still weaker regularization only
/// overfits.
const PATIENCE: usize = 2;

/// Maximum iterations of the final fit.
const FINAL_ITERATIONS: usize = 1000;

/// Maximum number of multiplications per pass computed in f64; larger problems use the f32 kernels.
const MAX_F64_PRODUCTS: usize = 1 << 22;

/// Rows per parallel task.
const BLOCK_ROWS: usize = 256;

/// Linear classifier.
#[derive(Debug, Clone, PartialEq)]
pub struct Classifier {
    /// Weights, `[classes, F]`.
    pub w: Vec<f64>,
    /// Biases, `[classes]`.
    pub b: Vec<f64>,
    classes: usize,
}

/// Classifier at the minimum of L.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The classifier.
    pub classifier: Classifier,
    /// Value of L.
    pub objective: f64,
    /// Largest absolute component of ∇L.
    pub max_gradient: f64,
}

impl Classifier {
    /// Splits `theta`, W followed by b.
    pub(super) fn new(theta: &[f64], classes: usize) -> Classifier {
        let (w, b) = theta.split_at(theta.len() - classes);
        Classifier { w: w.to_vec(), b: b.to_vec(), classes }
    }

    /// Returns true if no weight is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        self.w.iter().chain(&self.b).all(|w| w.is_finite())
    }

    /// Logits x Wᵀ + b, `[N, classes]`.
    pub fn scores(&self, x: &Features) -> Vec<f64> {
        let theta = [&self.w[..], &self.b].concat();
        LogisticObjective { x, labels: &[], classes: self.classes, l2: 0.0 }.logits(&theta)
    }
}

/// Minimizes L for one L2 strength.
///
/// # Panics
/// If there is not one label per row, each below `classes`.
pub fn fit(x: &Features, labels: &[usize], classes: usize, l2: f64) -> Fit {
    let objective = LogisticObjective::new(x, labels, classes, l2);
    // Small problems are cheap enough to run to full precision.
    let iterations = if objective.is_f64() { 20 * FINAL_ITERATIONS } else { FINAL_ITERATIONS };
    let theta = lbfgs(vec![0.0; classes * (x.dim + 1)], iterations, 1e-11, |t| objective.value_and_gradient(t), NEVER);
    let (value, gradient) = objective.value_and_gradient(&theta);
    let (w, b) = theta.split_at(classes * x.dim);
    // L depends only on differences of biases; their mean is set to 0.
    let mean_bias = metrics::mean(b.iter().copied());
    let classifier = Classifier { w: w.to_vec(), b: b.iter().map(|b| b - mean_bias).collect(), classes };
    Fit { classifier, objective: value, max_gradient: max_abs(&gradient) }
}

/// Classifier with the selected L2 strength.
#[derive(Debug, Clone, PartialEq)]
pub struct SelectedFit {
    /// Classifier fitted to all training rows.
    pub classifier: Classifier,
    /// Selected L2 strength, for features scaled to mean square 1.
    pub l2: f64,
    /// Score on the held-out rows at that strength.
    pub held_out_score: f64,
}

/// `fit_best_by` with accuracy as the score.
pub fn fit_best(x: &Features, labels: &[usize], classes: usize, strengths: &[f64], held_out: &[bool]) -> SelectedFit {
    fit_best_unless(x, labels, classes, strengths, held_out, NEVER).expect("never stopped")
}

/// [`fit_best`], or `None` soon after `stop` has returned true.
#[doc(hidden)]
pub fn fit_best_unless(
    x: &Features,
    labels: &[usize],
    classes: usize,
    strengths: &[f64],
    held_out: &[bool],
    stop: Stop,
) -> Option<SelectedFit> {
    let accuracy = |scores: &[f64], labels: &[usize]| metrics::accuracy(&metrics::argmax(scores, classes), labels);
    fit_best_by(x, labels, classes, strengths, held_out, accuracy, stop)
}

/// Called once per iteration; true ends the fit.
type Stop<'a> = &'a dyn Fn() -> bool;

/// Lets a fit run to its end.
pub(super) const NEVER: Stop = &|| false;

/// Selects among `strengths` by `score`, a function of the logits and labels of the rows marked in
/// `held_out`, with classifiers fitted to the other rows; then fits to all rows. Ties go to the
/// lower held-out loss, for example among classifiers that all predict the largest class.
///
/// `strengths` must be in descending order. Every fourth is tried first, then those around the
/// best. Features are centered and divided by their root mean square first, which changes the scale
/// of the strengths but not the set of classifiers.
///
/// Returns `None` soon after `stop` has returned true.
///
/// # Panics
/// See [`fit`].
pub(crate) fn fit_best_by(
    x: &Features,
    labels: &[usize],
    classes: usize,
    strengths: &[f64],
    held_out: &[bool],
    score: impl Fn(&[f64], &[usize]) -> f64,
    stop: Stop,
) -> Option<SelectedFit> {
    let (scaled, mean, scale) = standardize(x);
    let select = |held_out_rows: bool| {
        let rows: Vec<usize> = (0..x.n).filter(|i| held_out[*i] == held_out_rows).collect();
        (scaled.subset(&rows), rows.iter().map(|i| labels[*i]).collect::<Vec<_>>())
    };
    let ((train, train_labels), (validation, validation_labels)) = (select(false), select(true));
    // Sorted from strong to weak; each fit starts at the minimum of its stronger neighbor.
    let mut trials: Vec<Trial> = Vec::new();
    let run_trial = |trials: &mut Vec<Trial>, index: usize| {
        let position = trials.partition_point(|t| t.index < index);
        let start =
            position.checked_sub(1).map_or_else(|| vec![0.0; classes * (x.dim + 1)], |p| trials[p].theta.clone());
        let objective = LogisticObjective::new(&train, &train_labels, classes, strengths[index]);
        let theta = lbfgs(start, TRIAL.0, TRIAL.1, |t| objective.value_and_gradient(t), stop);
        let held_out = LogisticObjective::new(&validation, &validation_labels, classes, 0.0);
        let (score, loss) =
            (score(&held_out.logits(&theta), &validation_labels), held_out.value_and_gradient(&theta).0);
        trials.insert(position, Trial { index, score, loss, theta });
    };
    for index in (0..strengths.len()).step_by(STRIDE) {
        run_trial(&mut trials, index);
        if stop() {
            return None;
        }
        let best = trials[best_trial(&trials)].score;
        // Equal scores do not count as worse.
        if trials.iter().rev().take_while(|trial| trial.score < best).count() >= PATIENCE {
            break;
        }
    }
    let coarse = trials[best_trial(&trials)].index;
    for index in coarse.saturating_sub(STRIDE - 1)..(coarse + STRIDE).min(strengths.len()) {
        if index != coarse {
            run_trial(&mut trials, index);
        }
        if stop() {
            return None;
        }
    }
    let Trial { index, score: held_out_score, theta: start, .. } = trials.swap_remove(best_trial(&trials));
    let l2 = strengths[index];
    let objective = LogisticObjective::new(&scaled, labels, classes, l2);
    let theta = lbfgs(start, FINAL_ITERATIONS, 1e-6, |t| objective.value_and_gradient(t), stop);
    if stop() {
        return None;
    }
    let (w, b) = theta.split_at(classes * x.dim);
    // Undo the standardization.
    let w: Vec<f64> = w.iter().map(|w| w / scale).collect();
    let b =
        w.chunks_exact(x.dim).zip(b).map(|(w, b)| b - w.iter().zip(&mean).map(|(w, m)| w * m).sum::<f64>()).collect();
    Some(SelectedFit { classifier: Classifier { w, b, classes }, l2, held_out_score })
}

/// Fit at one L2 strength.
struct Trial {
    /// Index of the strength.
    index: usize,
    /// Score on the held-out rows.
    score: f64,
    /// Loss on the held-out rows.
    loss: f64,
    theta: Vec<f64>,
}

/// Index of the trial with the highest score; ties go to the lowest loss.
fn best_trial(trials: &[Trial]) -> usize {
    let is_better = |a: &Trial, b: &Trial| a.score > b.score || (a.score == b.score && a.loss < b.loss);
    (1..trials.len()).fold(0, |best, i| if is_better(&trials[i], &trials[best]) { i } else { best })
}

/// Centers the features and divides them by their root mean square. Returns them with the means and
/// the divisor.
fn standardize(x: &Features) -> (Features, Vec<f64>, f64) {
    let mut mean = vec![0.0f64; x.dim];
    for i in 0..x.n {
        mean.iter_mut().zip(x.row(i)).for_each(|(m, v)| *m += f64::from(*v));
    }
    mean.iter_mut().for_each(|m| *m /= x.n.max(1) as f64);
    let mut values = x.values.clone();
    let mut squares = 0.0f64;
    for row in values.chunks_exact_mut(x.dim) {
        for (v, m) in row.iter_mut().zip(&mean) {
            *v = (f64::from(*v) - m) as f32;
            squares += f64::from(*v).powi(2);
        }
    }
    let scale = (squares / values.len().max(1) as f64).sqrt().max(1e-12);
    values.iter_mut().for_each(|v| *v = (f64::from(*v) / scale) as f32);
    (Features { values, ..*x }, mean, scale)
}

/// L as a function of `theta`, W followed by b.
pub(super) struct LogisticObjective<'a> {
    x: &'a Features,
    labels: &'a [usize],
    classes: usize,
    l2: f64,
}

impl<'a> LogisticObjective<'a> {
    pub fn new(x: &'a Features, labels: &'a [usize], classes: usize, l2: f64) -> Self {
        assert!(labels.len() == x.n && labels.iter().all(|l| *l < classes), "one label in 0..classes per row");
        LogisticObjective { x, labels, classes, l2 }
    }

    /// Returns true if the matrix products are computed in f64.
    fn is_f64(&self) -> bool {
        self.x.n * self.x.dim * self.classes <= MAX_F64_PRODUCTS
    }

    /// Logits, `[N, classes]`.
    fn logits(&self, theta: &[f64]) -> Vec<f64> {
        let (w, b) = theta.split_at(self.classes * self.x.dim);
        if self.x.n == 0 {
            return Vec::new();
        }
        if !self.is_f64() {
            let w: Vec<f32> = w.iter().map(|w| *w as f32).collect();
            let z = matmul::nt(isa::current(), &self.x.values, &w, [self.x.n, self.classes, self.x.dim]);
            return z.iter().zip(b.iter().cycle()).map(|(z, b)| f64::from(*z) + b).collect();
        }
        let row_logits = |x: &[f32]| -> Vec<f64> {
            let logit = |(w, b): (&[f64], &f64)| b + x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum::<f64>();
            w.chunks_exact(self.x.dim).zip(b).map(logit).collect()
        };
        self.x.values.chunks_exact(self.x.dim).flat_map(row_logits).collect()
    }

    /// L and ∇L.
    pub(crate) fn value_and_gradient(&self, theta: &[f64]) -> (f64, Vec<f64>) {
        let (n, d, k) = (self.x.n, self.x.dim, self.classes);
        let mut logit_grads = self.logits(theta);
        // Replaces the logits by the gradient of the mean cross-entropy; returns the summed loss.
        let softmax_backward = |(rows, labels): (&mut [f64], &[usize])| -> f64 {
            let mut loss = 0.0;
            for (z, label) in rows.chunks_exact_mut(k).zip(labels) {
                let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let own = z[*label] - max;
                z.iter_mut().for_each(|z| *z = (*z - max).exp());
                let sum: f64 = z.iter().sum();
                loss += sum.ln() - own;
                z.iter_mut().for_each(|z| *z /= sum * n as f64);
                z[*label] -= 1.0 / n as f64;
            }
            loss
        };
        let losses: Vec<f64> = logit_grads
            .par_chunks_mut(BLOCK_ROWS * k)
            .zip(self.labels.par_chunks(BLOCK_ROWS))
            .map(softmax_backward)
            .collect();
        let mut gradient = vec![0.0; k * (d + 1)];
        let (w_grad, b_grad) = gradient.split_at_mut(k * d);
        for row in logit_grads.chunks_exact(k) {
            b_grad.iter_mut().zip(row).for_each(|(b, g)| *b += g);
        }
        if self.is_f64() {
            for (x, row) in self.x.values.chunks_exact(d).zip(logit_grads.chunks_exact(k)) {
                for (w, g) in w_grad.chunks_exact_mut(d).zip(row) {
                    w.iter_mut().zip(x).for_each(|(w, x)| *w += g * f64::from(*x));
                }
            }
        } else {
            // The gradients are of order 1 / n: scaled up so that small ones survive f32.
            let factor = n as f64;
            let scaled: Vec<f32> = logit_grads.iter().map(|g| (g * factor) as f32).collect();
            let products = matmul::tn(isa::current(), &scaled, &self.x.values, [n, k, d]);
            w_grad.iter_mut().zip(products).for_each(|(w, product)| *w = f64::from(product) / factor);
        }
        let w = &theta[..k * d];
        w_grad.iter_mut().zip(w).for_each(|(g, w)| *g += self.l2 * w);
        let loss = losses.iter().sum::<f64>() / n as f64 + 0.5 * self.l2 * dot(w, w);
        (loss, gradient)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn max_abs(gradient: &[f64]) -> f64 {
    gradient.iter().fold(0.0, |max, g| max.max(g.abs()))
}

/// Minimizes a smooth convex function by L-BFGS (Nocedal and Wright, algorithm 7.5) with
/// backtracking line search. Stops when no component of the gradient exceeds `tolerance`, no step
/// decreases the value, the iterations are used up, or `stop` returns true.
fn lbfgs(
    mut theta: Vec<f64>,
    iterations: usize,
    tolerance: f64,
    f: impl Fn(&[f64]) -> (f64, Vec<f64>),
    stop: Stop,
) -> Vec<f64> {
    let (mut value, mut gradient) = f(&theta);
    // (s, y, 1 / sᵀy): steps, gradient changes and their inverse inner product.
    let mut history: Vec<(Vec<f64>, Vec<f64>, f64)> = Vec::new();
    for _ in 0..iterations {
        if max_abs(&gradient) <= tolerance || stop() {
            break;
        }
        let mut direction: Vec<f64> = gradient.iter().map(|g| -g).collect();
        let mut alphas = Vec::new();
        for (s, y, inverse) in history.iter().rev() {
            let alpha = inverse * dot(s, &direction);
            direction.iter_mut().zip(y).for_each(|(d, y)| *d -= alpha * y);
            alphas.push(alpha);
        }
        let scale = match history.last() {
            Some((s, y, _)) => dot(s, y) / dot(y, y),
            // Limits the first step to length 1.
            None => 1.0 / dot(&gradient, &gradient).sqrt().max(1.0),
        };
        direction.iter_mut().for_each(|d| *d *= scale);
        for ((s, y, inverse), alpha) in history.iter().zip(alphas.iter().rev()) {
            let beta = inverse * dot(y, &direction);
            direction.iter_mut().zip(s).for_each(|(d, s)| *d += (alpha - beta) * s);
        }
        let slope = dot(&gradient, &direction);
        if slope >= 0.0 {
            if history.is_empty() {
                break;
            }
            // Rounding has corrupted the history: restart with steepest descent.
            history.clear();
            continue;
        }
        let mut step = 1.0;
        let next = loop {
            let candidate: Vec<f64> = theta.iter().zip(&direction).map(|(t, d)| t + step * d).collect();
            let (v, g) = f(&candidate);
            if v <= value + 1e-4 * step * slope {
                break Some((candidate, v, g));
            }
            step *= 0.5;
            if step < 1e-10 {
                break None;
            }
        };
        let Some((candidate, v, g)) = next else {
            if history.is_empty() {
                break;
            }
            history.clear();
            continue;
        };
        let s: Vec<f64> = candidate.iter().zip(&theta).map(|(a, b)| a - b).collect();
        let y: Vec<f64> = g.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        let sy = dot(&s, &y);
        if sy > 1e-14 * dot(&y, &y) {
            if history.len() == HISTORY {
                history.remove(0);
            }
            history.push((s, y, 1.0 / sy));
        }
        (theta, value, gradient) = (candidate, v, g);
    }
    theta
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two classes separated along the first axis, far from the origin and not at unit scale.
    fn two_clusters(n: usize, dim: usize) -> (Features, Vec<usize>) {
        let noise = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 7) % 1000) as f32 / 500.0 - 1.0;
        let labels: Vec<usize> = (0..n).map(|i| i % 2).collect();
        let value =
            |i: usize, d: usize| 50.0 + 10.0 * noise(i * dim + d) + if d == 0 { 15.0 * (i % 2) as f32 } else { 0.0 };
        let values = (0..n).flat_map(|i| (0..dim).map(move |d| value(i, d))).collect();
        (Features { n, dim, values }, labels)
    }

    #[test]
    fn gradient_matches_finite_differences_and_f32_matches_f64() {
        let (x, labels) = two_clusters(400, 6);
        let small = LogisticObjective::new(&x, &labels, 2, 0.1);
        let theta: Vec<f64> = (0..14).map(|i| 0.01 * f64::from(i)).collect();
        let (value, gradient) = small.value_and_gradient(&theta);
        for i in 0..14 {
            let value_at = |offset: f64| {
                let mut theta = theta.clone();
                theta[i] += offset;
                small.value_and_gradient(&theta).0
            };
            let slope = (value_at(1e-6) - value_at(-1e-6)) / 2e-6;
            assert!((slope - gradient[i]).abs() < 1e-5 * slope.abs().max(1.0), "{i}: {slope} and {}", gradient[i]);
        }
        assert!(value.is_finite());
        // Repeated rows have the same L, computed by the f32 kernels.
        let times = MAX_F64_PRODUCTS / (400 * 6 * 2) + 1;
        let repeated = Features { n: x.n * times, dim: 6, values: x.values.repeat(times) };
        let repeated_labels = labels.repeat(times);
        let large = LogisticObjective::new(&repeated, &repeated_labels, 2, 0.1);
        assert!(small.is_f64() && !large.is_f64());
        let (v, g) = large.value_and_gradient(&theta);
        assert!((v / value - 1.0).abs() < 1e-5, "{v} and {value}");
        for (a, b) in g.iter().zip(&gradient) {
            assert!((a - b).abs() < 1e-4 * max_abs(&gradient), "{a} and {b}");
        }
    }

    #[test]
    fn selected_classifier_applies_to_the_original_features() {
        let (x, labels) = two_clusters(600, 5);
        let held_out: Vec<bool> = (0..600).map(|i| i % 5 == 0).collect();
        let fit = fit_best(&x, &labels, 2, &strengths(), &held_out);
        let accuracy = metrics::accuracy(&metrics::argmax(&fit.classifier.scores(&x), 2), &labels);
        assert!(accuracy > 0.85 && fit.held_out_score > 0.8, "{accuracy} on all, {} held out", fit.held_out_score);
        assert!(strengths().contains(&fit.l2));
    }
}

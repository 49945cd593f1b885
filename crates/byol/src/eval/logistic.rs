//! Multinomial logistic regression with L2 regularisation, by L-BFGS, on features that stay as they are: the paper's linear transfer
//! (appendix E) and the fast linear evaluation.
//!
//! L(W, b) = mean cross-entropy of softmax(x Wᵀ + b) + l2 / 2 · ‖W‖². The bias is free.

use byol_kernels::{
    conv::{self, Shape},
    isa,
};
use rayon::prelude::*;

use super::{Features, metrics};

/// The paper's strengths: 45 from 1e-6 to 1e5, evenly spaced in their logarithm; strongest first, so that each fit begins where a smoother
/// one ended.
pub fn strengths() -> Vec<f64> {
    (0..45).rev().map(|i| 10f64.powf(-6.0 + 11.0 * f64::from(i) / 44.0)).collect()
}

/// Pairs of steps and gradient changes that L-BFGS remembers.
const MEMORY: usize = 10;

/// Iterations for a strength that is only tried, and the slope at which it is near enough to its minimum.
const TRIAL: (usize, f64) = (40, 1e-4);

/// Of the strengths every so many-th is tried first; then those between its neighbours and the best of them.
const STRIDE: usize = 4;

/// After so many in a row that are worse than the best one, weaker ones are not tried: they fit the training rows alone.
const PAST: usize = 2;

/// Iterations, at most, of a final fit.
const FINAL: usize = 1000;

/// Up to so many products a pass they are taken in f64; above, by the kernels in f32.
const EXACT: usize = 1 << 22;

/// Rows of a task.
const ROWS: usize = 256;

/// A linear classifier.
#[derive(Debug, Clone, PartialEq)]
pub struct Classifier {
    /// `[classes, F]`.
    pub w: Vec<f64>,
    /// `[classes]`.
    pub b: Vec<f64>,
    classes: usize,
}

/// A classifier and how it was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    /// The classifier.
    pub classifier: Classifier,
    /// L at it.
    pub objective: f64,
    /// The largest part of ∇L at it.
    pub slope: f64,
}

impl Classifier {
    /// From W and b, one after the other.
    pub(super) fn new(theta: &[f64], classes: usize) -> Classifier {
        let (w, b) = theta.split_at(theta.len() - classes);
        Classifier { w: w.to_vec(), b: b.to_vec(), classes }
    }

    /// Whether all weights are numbers.
    pub fn is_finite(&self) -> bool {
        self.w.iter().chain(&self.b).all(|w| w.is_finite())
    }

    /// x Wᵀ + b, `[N, classes]`.
    pub fn scores(&self, x: &Features) -> Vec<f64> {
        let theta = [&self.w[..], &self.b].concat();
        Problem { x, labels: &[], classes: self.classes, l2: 0.0 }.logits(&theta)
    }
}

/// The minimum of L for one strength.
///
/// # Panics
/// If there is not one label a row, each below `classes`.
pub fn fit(x: &Features, labels: &[usize], classes: usize, l2: f64) -> Fitted {
    let problem = Problem::new(x, labels, classes, l2);
    // What costs little may take long.
    let iterations = if problem.is_exact() { 20 * FINAL } else { FINAL };
    let theta = minimise(vec![0.0; classes * (x.dim + 1)], iterations, 1e-11, |t| problem.at(t));
    let (objective, gradient) = problem.at(&theta);
    let (w, b) = theta.split_at(classes * x.dim);
    // Only differences of biases count; their mean is put to 0.
    let middle = metrics::mean(b.iter().copied());
    let classifier = Classifier { w: w.to_vec(), b: b.iter().map(|b| b - middle).collect(), classes };
    Fitted { classifier, objective, slope: largest(&gradient) }
}

/// What [`fit_best`] chose.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// Fitted to all training rows.
    pub classifier: Classifier,
    /// The strength, for features scaled to a mean square of 1.
    pub l2: f64,
    /// How good it was on the held-out part with it.
    pub held_out: f64,
}

/// As [`fit_best_by`], by the accuracy.
pub fn fit_best(x: &Features, labels: &[usize], classes: usize, strengths: &[f64], held_out: &[bool]) -> Chosen {
    let accuracy = |scores: &[f64], labels: &[usize]| metrics::accuracy(&metrics::winners(scores, classes), labels);
    fit_best_by(x, labels, classes, strengths, held_out, accuracy)
}

/// Chooses among `strengths` by what `judge` says of the scores of the rows where `held_out` and their labels, fitting to the others; then
/// fits to all rows. `strengths` go from strong to weak, and of equal ones the likelier labels win: classifiers that all say
/// the largest class are equal too. Every fourth is tried, then
/// those around the best. Features are centred and scaled by one number first, which changes the meaning of a strength but no classifier.
///
/// # Panics
/// As [`fit`].
pub fn fit_best_by(
    x: &Features,
    labels: &[usize],
    classes: usize,
    strengths: &[f64],
    held_out: &[bool],
    judge: impl Fn(&[f64], &[usize]) -> f64,
) -> Chosen {
    let (scaled, mean, scale) = scaled(x);
    let rows = |out: bool| -> Vec<usize> { (0..x.n).filter(|i| held_out[*i] == out).collect() };
    let part = |rows: &[usize]| (scaled.subset(rows), rows.iter().map(|i| labels[*i]).collect::<Vec<_>>());
    let ((fitted, fitted_labels), (test, test_labels)) = (part(&rows(false)), part(&rows(true)));
    // From the strongest to the weakest; each begins at the minimum of the one before.
    let mut trials: Vec<Trial> = Vec::new();
    let attempt = |trials: &mut Vec<Trial>, at: usize| {
        let place = trials.partition_point(|t| t.at < at);
        let start = place.checked_sub(1).map_or_else(|| vec![0.0; classes * (x.dim + 1)], |p| trials[p].theta.clone());
        let problem = Problem::new(&fitted, &fitted_labels, classes, strengths[at]);
        let theta = minimise(start, TRIAL.0, TRIAL.1, |t| problem.at(t));
        let of_test = Problem::new(&test, &test_labels, classes, 0.0);
        let (held_out, loss) = (judge(&of_test.logits(&theta), &test_labels), of_test.at(&theta).0);
        trials.insert(place, Trial { at, held_out, loss, theta });
    };
    for at in (0..strengths.len()).step_by(STRIDE) {
        attempt(&mut trials, at);
        let best = trials[best_of(&trials)].held_out;
        // Equal ones are no sign of it.
        if trials.iter().rev().take_while(|trial| trial.held_out < best).count() >= PAST {
            break;
        }
    }
    let near = trials[best_of(&trials)].at;
    for at in near.saturating_sub(STRIDE - 1)..(near + STRIDE).min(strengths.len()) {
        if at != near {
            attempt(&mut trials, at);
        }
    }
    let Trial { at, held_out, theta: start, .. } = trials.swap_remove(best_of(&trials));
    let l2 = strengths[at];
    let problem = Problem::new(&scaled, labels, classes, l2);
    let theta = minimise(start, FINAL, 1e-6, |t| problem.at(t));
    let (w, b) = theta.split_at(classes * x.dim);
    // Back to the features as they came.
    let w: Vec<f64> = w.iter().map(|w| w / scale).collect();
    let b =
        w.chunks_exact(x.dim).zip(b).map(|(w, b)| b - w.iter().zip(&mean).map(|(w, m)| w * m).sum::<f64>()).collect();
    Chosen { classifier: Classifier { w, b, classes }, l2, held_out }
}

/// A strength that was tried: its place among all, how good it is on the held-out part, the loss there, and its minimum.
struct Trial {
    at: usize,
    held_out: f64,
    loss: f64,
    theta: Vec<f64>,
}

/// Of equal ones the one with the least loss.
fn best_of(trials: &[Trial]) -> usize {
    let is_better = |a: &Trial, b: &Trial| a.held_out > b.held_out || (a.held_out == b.held_out && a.loss < b.loss);
    (1..trials.len()).fold(0, |best, i| if is_better(&trials[i], &trials[best]) { i } else { best })
}

/// Centred, and divided by the root of the mean square; with the means and the divisor.
fn scaled(x: &Features) -> (Features, Vec<f64>, f64) {
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

/// L as a function of W and b, one after the other.
pub(super) struct Problem<'a> {
    x: &'a Features,
    labels: &'a [usize],
    classes: usize,
    l2: f64,
}

impl<'a> Problem<'a> {
    pub fn new(x: &'a Features, labels: &'a [usize], classes: usize, l2: f64) -> Self {
        assert!(labels.len() == x.n && labels.iter().all(|l| *l < classes), "one label a row, each a class");
        Problem { x, labels, classes, l2 }
    }

    fn is_exact(&self) -> bool {
        self.x.n * self.x.dim * self.classes <= EXACT
    }

    fn shape(&self) -> Shape {
        let (c_in, c_out) = (self.x.dim, self.classes);
        Shape { n: self.x.n, h: 1, w: 1, c_in, c_out, kernel: 1, stride: 1, padding: 0, dilation: 1 }
    }

    /// `[N, classes]`.
    fn logits(&self, theta: &[f64]) -> Vec<f64> {
        let (w, b) = theta.split_at(self.classes * self.x.dim);
        if self.x.n == 0 {
            return Vec::new();
        }
        if !self.is_exact() {
            let w: Vec<f32> = w.iter().map(|w| *w as f32).collect();
            let z = conv::forward(isa::chosen(), &self.shape(), &self.x.values, &w);
            return z.iter().zip(b.iter().cycle()).map(|(z, b)| f64::from(*z) + b).collect();
        }
        let row = |x: &[f32]| -> Vec<f64> {
            let of = |(w, b): (&[f64], &f64)| b + x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum::<f64>();
            w.chunks_exact(self.x.dim).zip(b).map(of).collect()
        };
        self.x.values.chunks_exact(self.x.dim).flat_map(row).collect()
    }

    /// L and ∇L.
    pub fn at(&self, theta: &[f64]) -> (f64, Vec<f64>) {
        let (n, d, k) = (self.x.n, self.x.dim, self.classes);
        let mut slopes = self.logits(theta);
        let softmax = |(rows, labels): (&mut [f64], &[usize])| -> f64 {
            let mut loss = 0.0;
            for (z, label) in rows.chunks_exact_mut(k).zip(labels) {
                let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let own = z[*label] - most;
                z.iter_mut().for_each(|z| *z = (*z - most).exp());
                let sum: f64 = z.iter().sum();
                loss += sum.ln() - own;
                z.iter_mut().for_each(|z| *z /= sum * n as f64);
                z[*label] -= 1.0 / n as f64;
            }
            loss
        };
        let parts: Vec<f64> = slopes.par_chunks_mut(ROWS * k).zip(self.labels.par_chunks(ROWS)).map(softmax).collect();
        let mut gradient = vec![0.0; k * (d + 1)];
        let (of_w, of_b) = gradient.split_at_mut(k * d);
        for row in slopes.chunks_exact(k) {
            of_b.iter_mut().zip(row).for_each(|(b, s)| *b += s);
        }
        if self.is_exact() {
            for (x, row) in self.x.values.chunks_exact(d).zip(slopes.chunks_exact(k)) {
                for (w, s) in of_w.chunks_exact_mut(d).zip(row) {
                    w.iter_mut().zip(x).for_each(|(w, x)| *w += s * f64::from(*x));
                }
            }
        } else {
            // Of order 1 / n: scaled up, so that small ones are not lost.
            let up = n as f64;
            let slopes: Vec<f32> = slopes.iter().map(|s| (s * up) as f32).collect();
            let dw = conv::backward_weight(isa::chosen(), &self.shape(), self.x.values[..].into(), &slopes);
            of_w.iter_mut().zip(dw).for_each(|(to, w)| *to = f64::from(w) / up);
        }
        let w = &theta[..k * d];
        of_w.iter_mut().zip(w).for_each(|(g, w)| *g += self.l2 * w);
        let loss = parts.iter().sum::<f64>() / n as f64 + 0.5 * self.l2 * dot(w, w);
        (loss, gradient)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn largest(gradient: &[f64]) -> f64 {
    gradient.iter().fold(0.0, |most, g| most.max(g.abs()))
}

/// The minimum of a smooth convex function by L-BFGS (Nocedal and Wright, algorithm 7.5) with backtracking: until no part of the gradient
/// is above `tolerance`, no step goes down any more, or the iterations are used up.
fn minimise(mut theta: Vec<f64>, iterations: usize, tolerance: f64, f: impl Fn(&[f64]) -> (f64, Vec<f64>)) -> Vec<f64> {
    let (mut value, mut gradient) = f(&theta);
    let mut pairs: Vec<(Vec<f64>, Vec<f64>, f64)> = Vec::new();
    for _ in 0..iterations {
        if largest(&gradient) <= tolerance {
            break;
        }
        let mut direction: Vec<f64> = gradient.iter().map(|g| -g).collect();
        let mut alphas = Vec::new();
        for (s, y, inverse) in pairs.iter().rev() {
            let alpha = inverse * dot(s, &direction);
            direction.iter_mut().zip(y).for_each(|(d, y)| *d -= alpha * y);
            alphas.push(alpha);
        }
        let scale = match pairs.last() {
            Some((s, y, _)) => dot(s, y) / dot(y, y),
            // A first step of length 1 at most.
            None => 1.0 / dot(&gradient, &gradient).sqrt().max(1.0),
        };
        direction.iter_mut().for_each(|d| *d *= scale);
        for ((s, y, inverse), alpha) in pairs.iter().zip(alphas.iter().rev()) {
            let beta = inverse * dot(y, &direction);
            direction.iter_mut().zip(s).for_each(|(d, s)| *d += (alpha - beta) * s);
        }
        let slope = dot(&gradient, &direction);
        if slope >= 0.0 {
            if pairs.is_empty() {
                break;
            }
            // Rounding has spoiled the memory: once more down the gradient.
            pairs.clear();
            continue;
        }
        let mut step = 1.0;
        let next = loop {
            let trial: Vec<f64> = theta.iter().zip(&direction).map(|(t, d)| t + step * d).collect();
            let (v, g) = f(&trial);
            if v <= value + 1e-4 * step * slope {
                break Some((trial, v, g));
            }
            step *= 0.5;
            if step < 1e-10 {
                break None;
            }
        };
        let Some((trial, v, g)) = next else {
            if pairs.is_empty() {
                break;
            }
            pairs.clear();
            continue;
        };
        let s: Vec<f64> = trial.iter().zip(&theta).map(|(a, b)| a - b).collect();
        let y: Vec<f64> = g.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        let sy = dot(&s, &y);
        if sy > 1e-14 * dot(&y, &y) {
            if pairs.len() == MEMORY {
                pairs.remove(0);
            }
            pairs.push((s, y, 1.0 / sy));
        }
        (theta, value, gradient) = (trial, v, g);
    }
    theta
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two classes apart along the first axis, far from the origin and of another scale.
    fn two_clouds(n: usize, dim: usize) -> (Features, Vec<usize>) {
        let noise = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 7) % 1000) as f32 / 500.0 - 1.0;
        let labels: Vec<usize> = (0..n).map(|i| i % 2).collect();
        let value =
            |i: usize, d: usize| 50.0 + 10.0 * noise(i * dim + d) + if d == 0 { 15.0 * (i % 2) as f32 } else { 0.0 };
        let values = (0..n).flat_map(|i| (0..dim).map(move |d| value(i, d))).collect();
        (Features { n, dim, values }, labels)
    }

    #[test]
    fn both_ways_of_multiplying_find_the_same_minimum() {
        let (x, labels) = two_clouds(400, 6);
        let problem = Problem::new(&x, &labels, 2, 0.1);
        let theta: Vec<f64> = (0..14).map(|i| 0.01 * f64::from(i)).collect();
        let (value, gradient) = problem.at(&theta);
        // Against differences.
        for i in 0..14 {
            let at = |d: f64| {
                let mut theta = theta.clone();
                theta[i] += d;
                problem.at(&theta).0
            };
            let slope = (at(1e-6) - at(-1e-6)) / 2e-6;
            assert!((slope - gradient[i]).abs() < 1e-5 * slope.abs().max(1.0), "{i}: {slope} and {}", gradient[i]);
        }
        assert!(value.is_finite());
        // As many rows again and again give the same L, by the kernels.
        let times = EXACT / (400 * 6 * 2) + 1;
        let large = Features { n: x.n * times, dim: 6, values: x.values.repeat(times) };
        let large_labels = labels.repeat(times);
        let large = Problem::new(&large, &large_labels, 2, 0.1);
        assert!(problem.is_exact() && !large.is_exact());
        let (v, g) = large.at(&theta);
        assert!((v / value - 1.0).abs() < 1e-5, "{v} and {value}");
        for (a, b) in g.iter().zip(&gradient) {
            assert!((a - b).abs() < 1e-4 * largest(&gradient), "{a} and {b}");
        }
    }

    #[test]
    fn the_chosen_classifier_is_one_of_the_features_as_they_came() {
        let (x, labels) = two_clouds(600, 5);
        let held_out: Vec<bool> = (0..600).map(|i| i % 5 == 0).collect();
        let chosen = fit_best(&x, &labels, 2, &strengths(), &held_out);
        let accuracy = metrics::accuracy(&metrics::winners(&chosen.classifier.scores(&x), 2), &labels);
        assert!(accuracy > 0.85 && chosen.held_out > 0.8, "{accuracy} on all, {} held out", chosen.held_out);
        assert!(strengths().contains(&chosen.l2));
    }
}

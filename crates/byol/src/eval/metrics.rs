//! Figures of merit: pure functions of predictions and labels. Conventions are those of the paper's evaluations (§4, appendices D to G).

/// Share of right predictions, in [0, 1]; 0 of none.
pub fn accuracy(predicted: &[usize], labels: &[usize]) -> f64 {
    let right = predicted.iter().zip(labels).filter(|(p, l)| p == l).count();
    right as f64 / labels.len().max(1) as f64
}

/// Mean over the classes that occur of the accuracy within the class: Aircraft, Pets, Caltech-101 and Flowers are reported so.
pub fn mean_per_class(predicted: &[usize], labels: &[usize], classes: usize) -> f64 {
    let (mut right, mut all) = (vec![0usize; classes], vec![0usize; classes]);
    for (p, l) in predicted.iter().zip(labels) {
        all[*l] += 1;
        right[*l] += usize::from(p == l);
    }
    mean(right.iter().zip(&all).filter(|(_, n)| **n > 0).map(|(r, n)| *r as f64 / *n as f64))
}

/// Whether each row's label is among its `k` largest scores. Of equal scores the earlier class counts as larger. `scores`: `[N, classes]`.
pub fn in_top(scores: &[f64], labels: &[usize], classes: usize, k: usize) -> Vec<bool> {
    let rank = |(row, label): (&[f64], &usize)| {
        let own = row[*label];
        row.iter().enumerate().filter(|(c, s)| **s > own || (**s == own && c < label)).count()
    };
    scores.chunks_exact(classes).zip(labels).map(|pair| rank(pair) < k).collect()
}

/// The class of the largest score of each row, the first of equals. `scores`: `[N, classes]`.
pub fn winners(scores: &[f64], classes: usize) -> Vec<usize> {
    let winner = |row: &[f64]| {
        row.iter().enumerate().fold((0, f64::NEG_INFINITY), |best, (c, s)| if *s > best.1 { (c, *s) } else { best }).0
    };
    scores.chunks_exact(classes).map(winner).collect()
}

/// Average precision as VOC 2007 has it: the mean over recalls 0, 0.1, … 1 of the greatest precision at that recall or a higher one. None
/// where there is no positive. Of equal scores the earlier comes first.
pub fn average_precision_11(scores: &[f64], positive: &[bool]) -> Option<f64> {
    let hits = ranked(scores, positive);
    let all = positive.iter().filter(|p| **p).count();
    if all == 0 {
        return None;
    }
    // From the end: the greatest precision from here on, and how many positives there were up to here.
    let mut found = 0;
    let mut at: Vec<(usize, f64)> = Vec::with_capacity(hits.len());
    for (i, hit) in hits.iter().enumerate() {
        found += usize::from(*hit);
        at.push((found, found as f64 / (i + 1) as f64));
    }
    let mut best = 0.0f64;
    for (_, precision) in at.iter_mut().rev() {
        best = best.max(*precision);
        *precision = best;
    }
    let at_recall = |tenth: usize| {
        let first = at.partition_point(|(found, _)| found * 10 < tenth * all);
        at.get(first).map_or(0.0, |(_, precision)| *precision)
    };
    Some((0..=10).map(at_recall).sum::<f64>() / 11.0)
}

/// Whether each is positive, from the highest score to the lowest.
fn ranked(scores: &[f64], positive: &[bool]) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.into_iter().map(|i| positive[i]).collect()
}

/// Pixels by label and prediction, over all images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    /// `[label, prediction]`.
    pub counts: Vec<u64>,
}

impl Confusion {
    /// No pixel yet.
    pub fn new(classes: usize) -> Confusion {
        Confusion { classes, counts: vec![0; classes * classes] }
    }

    /// Of one image.
    pub fn of(predicted: &[u8], labels: &[u8], classes: usize) -> Confusion {
        let mut one = Confusion::new(classes);
        one.add(predicted, labels);
        one
    }

    /// Counts the pixels whose label is a class; labels beyond are ignored.
    pub fn add(&mut self, predicted: &[u8], labels: &[u8]) {
        for (p, l) in predicted.iter().zip(labels) {
            if usize::from(*l) < self.classes {
                self.counts[usize::from(*l) * self.classes + usize::from(*p)] += 1;
            }
        }
    }

    /// All pixels of two.
    pub fn merge(&mut self, other: &Confusion) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
    }

    /// Intersection over union by class; none where a class occurs in neither.
    pub fn iou(&self) -> Vec<Option<f64>> {
        let n = self.classes;
        let of = |c: usize| {
            let both = self.counts[c * n + c];
            let labelled: u64 = self.counts[c * n..(c + 1) * n].iter().sum();
            let predicted: u64 = (0..n).map(|l| self.counts[l * n + c]).sum();
            let union = labelled + predicted - both;
            (union > 0).then(|| both as f64 / union as f64)
        };
        (0..n).map(of).collect()
    }

    /// Mean of [`Confusion::iou`] over the classes that occur.
    pub fn mean_iou(&self) -> f64 {
        mean(self.iou().into_iter().flatten())
    }

    /// Share of pixels that are right.
    pub fn pixel_accuracy(&self) -> f64 {
        let right: u64 = (0..self.classes).map(|c| self.counts[c * self.classes + c]).sum();
        right as f64 / self.counts.iter().sum::<u64>().max(1) as f64
    }
}

/// How near depths are, over pixels; sums, so that images can be added up.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Depth {
    pixels: f64,
    near: [f64; 3],
    squares: f64,
    relative: f64,
}

impl Depth {
    /// Adds pixels; only those with a truth above 0 count. Predictions are above 0.
    pub fn add(&mut self, predicted: &[f32], truth: &[f32]) {
        for (p, t) in predicted.iter().zip(truth).map(|(p, t)| (f64::from(*p), f64::from(*t))) {
            if t > 0.0 {
                let ratio = (p / t).max(t / p);
                self.pixels += 1.0;
                for (k, near) in self.near.iter_mut().enumerate() {
                    *near += f64::from(u8::from(ratio < 1.25f64.powi(k as i32 + 1)));
                }
                self.squares += (p - t).powi(2);
                self.relative += (p - t).abs() / t;
            }
        }
    }

    /// All pixels of two.
    pub fn merge(&mut self, other: &Depth) {
        self.pixels += other.pixels;
        self.near.iter_mut().zip(other.near).for_each(|(a, b)| *a += b);
        self.squares += other.squares;
        self.relative += other.relative;
    }

    /// Share of pixels with max(p / t, t / p) < 1.25ᵏ, for k = 1, 2, 3; NaN of no pixel, as the others.
    pub fn near(&self) -> [f64; 3] {
        self.near.map(|n| n / self.pixels)
    }

    /// Root of the mean squared difference, in the truth's unit.
    pub fn rms(&self) -> f64 {
        (self.squares / self.pixels).sqrt()
    }

    /// Mean of |p − t| / t.
    pub fn relative(&self) -> f64 {
        self.relative / self.pixels
    }
}

/// Mean; 0 of nothing.
pub fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), v| (sum + v, n + 1));
    if n == 0 { 0.0 } else { sum / f64::from(n) }
}

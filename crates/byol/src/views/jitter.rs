//! Color jitter: brightness, contrast, saturation and hue in a random order, each clamped to 0..1.
//!
//! Brightness **adds** (torchvision multiplies). Contrast scales around each channel's own mean
//! over the view (torchvision: one gray mean). Saturation and hue work in HSV; for
//! images that are not RGB see `spectrum.rs`.
//!
//! Contrast needs the mean over the whole view; the other three work pixel by pixel. So the four
//! take two passes over the view, chunk by chunk: one up to contrast, one from contrast on.
//!
//! Saturation and hue use closed forms of the HSV round trip. With V = max and C = max − min of a
//! color, saturation times f maps x to V − (V − x) · min(f, V / C). A color of hue h (in sixths of
//! a turn) has x = V − C · clamp(min(k, 4 − k), 0, 1), with k = h + 5, h + 3 and h + 1 modulo 6 for
//! red, green and blue.

use multiversion::multiversion;

use super::{Chunk, View, for_each_chunk, spectrum};

/// Sampled parameters of the jitter.
#[derive(Debug, Clone, PartialEq)]
pub struct Jitter {
    /// Operations in the order they are applied: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    pub order: [usize; 4],
    /// Parameter of each operation: offset, factor, factor, offset in turns.
    pub values: [f32; 4],
}

/// Number of the contrast operation.
const CONTRAST: usize = 1;

impl Jitter {
    /// Applies the four operations in their order, then `then` to each chunk.
    pub fn apply(&self, view: &mut View, then: impl Fn(&mut Chunk)) {
        let at = self.order.iter().position(|op| *op == CONTRAST).unwrap_or(self.order.len());
        let mut sums = ChannelSums::new(view);
        for_each_chunk(view, |chunk| {
            self.order[..at].iter().for_each(|op| self.apply_pointwise(*op, chunk));
            sums.add(chunk);
        });
        let means = sums.means(view);
        for_each_chunk(view, |chunk| {
            for op in &self.order[at..] {
                match *op {
                    CONTRAST => scale_contrast(chunk, &means, self.values[CONTRAST]),
                    op => self.apply_pointwise(op, chunk),
                }
            }
            then(chunk);
        });
    }

    /// Applies brightness, saturation or hue.
    fn apply_pointwise(&self, op: usize, chunk: &mut Chunk) {
        let value = self.values[op];
        match (op, chunk) {
            (0, chunk) => chunk.iter_mut().for_each(|values| add(values, value)),
            (2, [r, g, b]) => scale_saturation(r, g, b, value),
            (3, [r, g, b]) => shift_hue(r, g, b, value),
            (2, chunk) => spectrum::scale_saturation(chunk, value),
            (_, chunk) => spectrum::shift_hue(chunk, value),
        }
    }
}

/// Sum of each channel, accumulated chunk by chunk.
struct ChannelSums(Vec<f64>);

impl ChannelSums {
    fn new(view: &View) -> ChannelSums {
        ChannelSums(vec![0.0; view.channels])
    }

    fn add(&mut self, chunk: &Chunk) {
        for (sum, values) in self.0.iter_mut().zip(chunk) {
            *sum += f64::from(sum_channel(values));
        }
    }

    fn means(self, view: &View) -> Vec<f32> {
        let n = (view.height * view.width) as f64;
        self.0.into_iter().map(|sum| (sum / n) as f32).collect()
    }
}

/// Scales each channel around its mean.
fn scale_contrast(chunk: &mut Chunk, means: &[f32], factor: f32) {
    for (values, mean) in chunk.iter_mut().zip(means) {
        scale_around(values, *mean, factor);
    }
}

/// Sums one channel in a fixed order that fills vector registers.
#[multiversion(targets("x86_64+avx2"))]
fn sum_channel(values: &[f32]) -> f32 {
    let mut sums = [0.0f32; 32];
    let mut parts = values.chunks_exact(32);
    for part in &mut parts {
        for (s, v) in sums.iter_mut().zip(part) {
            *s += v;
        }
    }
    sums.iter().chain(parts.remainder()).sum()
}

/// Computes x + delta, clamped to 0..1.
#[multiversion(targets("x86_64+avx2"))]
fn add(values: &mut [f32], delta: f32) {
    for v in values {
        *v = (*v + delta).clamp(0.0, 1.0);
    }
}

/// Computes factor · (x − mean) + mean, clamped to 0..1.
#[multiversion(targets("x86_64+avx2"))]
fn scale_around(values: &mut [f32], mean: f32, factor: f32) {
    for v in values {
        *v = (factor * (*v - mean) + mean).clamp(0.0, 1.0);
    }
}

/// Lower bound of the divisor max − min. Where max = min, the quotient is only multiplied by 0.
const MIN_RANGE: f32 = 1e-30;

/// Multiplies the HSV saturation, clamped to 0..1.
#[multiversion(targets("x86_64+avx2"))]
fn scale_saturation(r: &mut [f32], g: &mut [f32], b: &mut [f32], factor: f32) {
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        let v = r.max(*g).max(*b);
        let range = v - r.min(*g).min(*b);
        let scale = factor.min(v / range.max(MIN_RANGE));
        *r = (v - (v - *r) * scale).clamp(0.0, 1.0);
        *g = (v - (v - *g) * scale).clamp(0.0, 1.0);
        *b = (v - (v - *b) * scale).clamp(0.0, 1.0);
    }
}

/// Shifts the HSV hue by delta turns, |delta| ≤ 1/2.
#[multiversion(targets("x86_64+avx2"))]
fn shift_hue(r: &mut [f32], g: &mut [f32], b: &mut [f32], delta: f32) {
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        let v = r.max(*g).max(*b);
        let range = v - r.min(*g).min(*b);
        // Ties prefer red, then green.
        let (from, to, sixths) = if *r == v {
            (*g, *b, 0.0)
        } else if *g == v {
            (*b, *r, 2.0)
        } else {
            (*r, *g, 4.0)
        };
        let h = (from - to) / range.max(MIN_RANGE) + sixths + 6.0 * delta;
        let value = |n: f32| {
            // Between −4 and 13; reduced to 0..6.
            let k = h + n;
            let k = if k < 0.0 { k + 6.0 } else { k };
            let k = if k >= 6.0 { k - 6.0 } else { k };
            let k = if k >= 6.0 { k - 6.0 } else { k };
            (v - range * k.min(4.0 - k).clamp(0.0, 1.0)).clamp(0.0, 1.0)
        };
        (*r, *g, *b) = (value(5.0), value(3.0), value(1.0));
    }
}

/// Adds `delta`; clamps to 0..1.
pub fn brightness(view: &mut View, delta: f32) {
    add(&mut view.pixels, delta);
}

/// Scales by `factor` around each channel's mean over the view; clamps to 0..1.
pub fn contrast(view: &mut View, factor: f32) {
    let mut sums = ChannelSums::new(view);
    for_each_chunk(view, |chunk| sums.add(chunk));
    let means = sums.means(view);
    for_each_chunk(view, |chunk| scale_contrast(chunk, &means, factor));
}

/// Multiplies the HSV saturation by `factor`; clamps to 0..1.
pub fn saturation(view: &mut View, factor: f32) {
    for_each_chunk(view, |chunk| match chunk {
        [r, g, b] => scale_saturation(r, g, b, factor),
        chunk => spectrum::scale_saturation(chunk, factor),
    });
}

/// Shifts the HSV hue by `delta` turns, |delta| ≤ 1/2; clamps to 0..1.
pub fn hue(view: &mut View, delta: f32) {
    for_each_chunk(view, |chunk| match chunk {
        [r, g, b] => shift_hue(r, g, b, delta),
        chunk => spectrum::shift_hue(chunk, delta),
    });
}

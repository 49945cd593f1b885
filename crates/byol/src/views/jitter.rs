//! Colour jitter: brightness, contrast, saturation and hue in a random order, each cut to 0..1 afterwards.
//!
//! Brightness **adds** (torchvision multiplies); contrast works around each channel's own mean over the view (torchvision: one grey
//! mean); saturation and hue work in HSV. Images that are not RGB know only brightness and contrast.
//!
//! Contrast needs the whole view for its mean; the others go pixel by pixel. So the four are two walks over the view, strip by strip: up to
//! contrast, and from it on. In a strip saturation and hue use what HSV comes to: with V = max and C = max − min of a colour, a saturation
//! times f is V − (V − x) · min(f, V / C), and a colour of hue h (in sixths of a turn) has x = V − C · clamp(min(k, 4 − k), 0, 1) with k = h + 5,
//! h + 3 and h + 1 modulo 6 for red, green and blue.

use multiversion::multiversion;

use super::{Strip, View, strips};

/// What was drawn for the jitter.
#[derive(Debug, Clone, PartialEq)]
pub struct Jitter {
    /// The operation applied first, second, …: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    pub order: [usize; 4],
    /// By operation: what to add, factor, factor, turns to add.
    pub values: [f32; 4],
}

/// Which operation is contrast.
const CONTRAST: usize = 1;

impl Jitter {
    /// Applies the four in their order; `last` then gets each strip.
    pub fn apply(&self, view: &mut View, last: impl Fn(&mut Strip)) {
        let at = self.order.iter().position(|op| *op == CONTRAST).unwrap_or(self.order.len());
        let mut means = Means::new(view);
        strips(view, |strip| {
            self.order[..at].iter().for_each(|op| self.one(*op, strip));
            means.add(strip);
        });
        let means = means.of(view);
        strips(view, |strip| {
            for op in &self.order[at..] {
                match *op {
                    CONTRAST => away(strip, &means, self.values[CONTRAST]),
                    op => self.one(op, strip),
                }
            }
            last(strip);
        });
    }

    /// Brightness, saturation or hue.
    fn one(&self, op: usize, strip: &mut Strip) {
        let value = self.values[op];
        match (op, strip) {
            (0, strip) => strip.iter_mut().for_each(|values| add(values, value)),
            (2, [r, g, b]) => saturate(r, g, b, value),
            (3, [r, g, b]) => turn(r, g, b, value),
            _ => {}
        }
    }
}

/// Each channel's mean over a view, strip by strip.
struct Means(Vec<f64>);

impl Means {
    fn new(view: &View) -> Means {
        Means(vec![0.0; view.channels])
    }

    fn add(&mut self, strip: &Strip) {
        for (sum, values) in self.0.iter_mut().zip(strip) {
            *sum += f64::from(sum_of(values));
        }
    }

    fn of(self, view: &View) -> Vec<f32> {
        let n = (view.height * view.width) as f64;
        self.0.into_iter().map(|sum| (sum / n) as f32).collect()
    }
}

/// Contrast about these means.
fn away(strip: &mut Strip, means: &[f32], factor: f32) {
    for (values, mean) in strip.iter_mut().zip(means) {
        around(values, *mean, factor);
    }
}

/// Values of a channel added up, in a fixed order that fills registers.
#[multiversion(targets("x86_64+avx2"))]
fn sum_of(values: &[f32]) -> f32 {
    let mut sums = [0.0f32; 32];
    let mut parts = values.chunks_exact(32);
    for part in &mut parts {
        for (s, v) in sums.iter_mut().zip(part) {
            *s += v;
        }
    }
    sums.iter().chain(parts.remainder()).sum()
}

/// x + delta, cut.
#[multiversion(targets("x86_64+avx2"))]
fn add(values: &mut [f32], delta: f32) {
    for v in values {
        *v = (*v + delta).clamp(0.0, 1.0);
    }
}

/// factor · (x − mean) + mean, cut.
#[multiversion(targets("x86_64+avx2"))]
fn around(values: &mut [f32], mean: f32, factor: f32) {
    for v in values {
        *v = (factor * (*v - mean) + mean).clamp(0.0, 1.0);
    }
}

/// A range of values that is never 0; where it would be, what it divides is 0 too.
const LEAST_RANGE: f32 = 1e-30;

/// HSV saturation times factor, cut to 0..1.
#[multiversion(targets("x86_64+avx2"))]
fn saturate(r: &mut [f32], g: &mut [f32], b: &mut [f32], factor: f32) {
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        let v = r.max(*g).max(*b);
        let range = v - r.min(*g).min(*b);
        let by = factor.min(v / range.max(LEAST_RANGE));
        *r = (v - (v - *r) * by).clamp(0.0, 1.0);
        *g = (v - (v - *g) * by).clamp(0.0, 1.0);
        *b = (v - (v - *b) * by).clamp(0.0, 1.0);
    }
}

/// HSV hue plus delta turns, |delta| ≤ 1/2.
#[multiversion(targets("x86_64+avx2"))]
fn turn(r: &mut [f32], g: &mut [f32], b: &mut [f32], delta: f32) {
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
        let h = (from - to) / range.max(LEAST_RANGE) + sixths + 6.0 * delta;
        let value = |n: f32| {
            // From −4 to 13, into 0..6.
            let k = h + n;
            let k = if k < 0.0 { k + 6.0 } else { k };
            let k = if k >= 6.0 { k - 6.0 } else { k };
            let k = if k >= 6.0 { k - 6.0 } else { k };
            (v - range * k.min(4.0 - k).clamp(0.0, 1.0)).clamp(0.0, 1.0)
        };
        (*r, *g, *b) = (value(5.0), value(3.0), value(1.0));
    }
}

/// x + delta, cut to 0..1.
pub fn brightness(view: &mut View, delta: f32) {
    add(&mut view.pixels, delta);
}

/// factor · (x − m) + m, m the channel's mean over the view; cut to 0..1.
pub fn contrast(view: &mut View, factor: f32) {
    let mut means = Means::new(view);
    strips(view, |strip| means.add(strip));
    let means = means.of(view);
    strips(view, |strip| away(strip, &means, factor));
}

/// HSV saturation times factor; cut to 0..1.
pub fn saturation(view: &mut View, factor: f32) {
    strips(view, |strip| {
        if let [r, g, b] = strip {
            saturate(r, g, b, factor);
        }
    });
}

/// HSV hue plus delta turns, |delta| ≤ 1/2; cut to 0..1.
pub fn hue(view: &mut View, delta: f32) {
    strips(view, |strip| {
        if let [r, g, b] = strip {
            turn(r, g, b, delta);
        }
    });
}

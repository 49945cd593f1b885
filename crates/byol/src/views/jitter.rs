//! Colour jitter: brightness, contrast, saturation and hue in a random order, each cut to 0..1 afterwards.
//!
//! Brightness **adds** (torchvision multiplies); contrast works around each channel's own mean over the view (torchvision: one grey
//! mean); saturation and hue work in HSV. Images that are not RGB know only brightness and contrast.

use super::View;

/// What was drawn for the jitter.
#[derive(Debug, Clone, PartialEq)]
pub struct Jitter {
    /// The operation applied first, second, …: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    pub order: [usize; 4],
    /// By operation: what to add, factor, factor, turns to add.
    pub values: [f32; 4],
}

impl Jitter {
    /// Applies the four in their order.
    pub fn apply(&self, view: &mut View) {
        for op in self.order {
            let value = self.values[op];
            match op {
                0 => brightness(view, value),
                1 => contrast(view, value),
                2 => saturation(view, value),
                _ => hue(view, value),
            }
            view.clamp();
        }
    }
}

/// x + delta.
pub fn brightness(view: &mut View, delta: f32) {
    for v in &mut view.pixels {
        *v += delta;
    }
}

/// factor · (x − m) + m, m the channel's mean over the view.
pub fn contrast(view: &mut View, factor: f32) {
    let c = view.channels;
    let mut sums = vec![0.0f64; c];
    for p in view.pixels.chunks_exact(c) {
        for (sum, v) in sums.iter_mut().zip(p) {
            *sum += f64::from(*v);
        }
    }
    let n = (view.height * view.width) as f64;
    let means: Vec<f32> = sums.iter().map(|s| (s / n) as f32).collect();
    for p in view.pixels.chunks_exact_mut(c) {
        for (v, m) in p.iter_mut().zip(&means) {
            *v = factor * (*v - m) + m;
        }
    }
}

/// HSV saturation times factor, cut to 0..1.
pub fn saturation(view: &mut View, factor: f32) {
    in_hsv(view, |[h, s, v]| [h, (s * factor).clamp(0.0, 1.0), v]);
}

/// HSV hue plus delta turns.
pub fn hue(view: &mut View, delta: f32) {
    in_hsv(view, |[h, s, v]| [(h + delta).rem_euclid(1.0), s, v]);
}

fn in_hsv(view: &mut View, f: impl Fn([f32; 3]) -> [f32; 3]) {
    if view.channels != 3 {
        return;
    }
    for p in view.pixels.chunks_exact_mut(3) {
        p.copy_from_slice(&hsv_to_rgb(f(rgb_to_hsv([p[0], p[1], p[2]]))));
    }
}

/// v = max, s = (max − min) / max (0 for black), hue in turns in [0, 1), 0 for greys; ties prefer red, then green.
pub fn rgb_to_hsv([r, g, b]: [f32; 3]) -> [f32; 3] {
    let v = r.max(g).max(b);
    let range = v - r.min(g).min(b);
    let s = if v > 0.0 { range / v } else { 0.0 };
    if range <= 0.0 {
        return [0.0, s, v];
    }
    let k = 1.0 / (6.0 * range);
    let h = if r == v {
        k * (g - b)
    } else if g == v {
        k * (b - r) + 1.0 / 3.0
    } else {
        k * (r - g) + 2.0 / 3.0
    };
    [if h < 0.0 { h + 1.0 } else { h }, s, v]
}

/// The inverse of [`rgb_to_hsv`].
pub fn hsv_to_rgb([h, s, v]: [f32; 3]) -> [f32; 3] {
    let c = s * v;
    let m = v - c;
    let d = h.rem_euclid(1.0) * 6.0;
    let x = c * (1.0 - (d % 2.0 - 1.0).abs());
    let (r, g, b) = match d as u32 {
        0 => (c, x, 0.0),
        1 => (x, c, 0.0),
        2 => (0.0, c, x),
        3 => (0.0, x, c),
        4 => (x, 0.0, c),
        // 6 only where rounding takes h mod 1 to 1: the same colour as 0, and x is 0 there.
        _ => (c, 0.0, x),
    };
    [r + m, g + m, b + m]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hsv_and_back_is_the_same_colour(rgb in prop::array::uniform3(0.0f32..=1.0)) {
            let again = hsv_to_rgb(rgb_to_hsv(rgb));
            for (a, b) in rgb.iter().zip(again) {
                prop_assert!((a - b).abs() < 2e-6, "{rgb:?} → {again:?}");
            }
        }
    }
}

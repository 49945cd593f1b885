//! Bicubic resize of a part of an image: Keys' kernel with a = −0.5, half-pixel centres, no antialiasing even when shrinking. Taps
//! outside the part are dropped and the others renormalised: the part is resized from its own pixels alone.

use super::{View, Window};
use crate::data::Image;

/// Where an output position reads: `first..first + weights.len()` of the input, with weights of sum 1.
#[derive(Debug, Clone)]
struct Taps {
    first: usize,
    weights: [f32; 4],
    n: usize,
}

/// The part of `image` in `window` as a view of this size, values / 255, cut to 0..1.
pub fn crop_resize(image: &Image, window: Window, height: usize, width: usize) -> View {
    let mut view = resize(image, window, height, width);
    for v in &mut view.pixels {
        *v = (*v / 255.0).clamp(0.0, 1.0);
    }
    view
}

/// As [`crop_resize`], values still in 0..255 and overshoots kept.
pub fn resize(image: &Image, window: Window, height: usize, width: usize) -> View {
    let c = image.channels;
    let (rows, columns) = (taps(window.height, height), taps(window.width, width));

    // Along the rows first, for those input rows that the output will read.
    let mut wide = vec![0.0f32; window.height * width * c];
    let mut needed = vec![false; window.height];
    for t in &rows {
        needed[t.first..t.first + t.n].fill(true);
    }
    for (y, out) in wide.chunks_exact_mut(width * c).enumerate().filter(|(y, _)| needed[*y]) {
        let from = ((window.top + y) * image.width + window.left) * c;
        let source = &image.pixels[from..from + window.width * c];
        for (t, pixel) in columns.iter().zip(out.chunks_exact_mut(c)) {
            for (k, v) in pixel.iter_mut().enumerate() {
                let read = |i: usize| t.weights[i] * f32::from(source[(t.first + i) * c + k]);
                *v = (0..t.n).map(read).sum();
            }
        }
    }

    let mut pixels = vec![0.0f32; height * width * c];
    for (t, out) in rows.iter().zip(pixels.chunks_exact_mut(width * c)) {
        for i in 0..t.n {
            let row = &wide[(t.first + i) * width * c..][..width * c];
            for (o, s) in out.iter_mut().zip(row) {
                *o += t.weights[i] * s;
            }
        }
    }
    View { height, width, channels: c, pixels }
}

fn taps(n_in: usize, n_out: usize) -> Vec<Taps> {
    let tap = |o: usize| {
        let centre = (o as f64 + 0.5) * n_in as f64 / n_out as f64 - 0.5;
        let low = centre.floor() as i64;
        let inside = (low - 1).max(0)..=(low + 2).min(n_in as i64 - 1);
        let (first, n) = (*inside.start() as usize, inside.clone().count());
        let mut raw = [0.0f64; 4];
        for (w, i) in raw.iter_mut().zip(inside) {
            *w = keys(centre - i as f64);
        }
        let sum: f64 = raw.iter().sum();
        Taps { first, n, weights: raw.map(|w| (w / sum) as f32) }
    };
    (0..n_out).map(tap).collect()
}

/// Keys' cubic convolution kernel with a = −0.5.
fn keys(t: f64) -> f64 {
    const A: f64 = -0.5;
    let t = t.abs();
    if t <= 1.0 {
        ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0
    } else if t < 2.0 {
        A * (((t - 5.0) * t + 8.0) * t - 4.0)
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_at_any_size() {
        for (n_in, n_out) in [(1, 1), (1, 7), (2, 224), (5, 3), (1000, 32), (3, 3)] {
            for t in taps(n_in, n_out) {
                assert!((t.weights.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{n_in} → {n_out}");
                assert!(t.first + t.n <= n_in && t.n >= 1);
            }
        }
    }
}

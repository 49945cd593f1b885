//! Bicubic resize of a crop: Keys' kernel with a = −0.5, half-pixel centers, no antialiasing even
//! when shrinking. Taps outside the crop are dropped and the others renormalized, so only pixels of
//! the crop count.
//!
//! [`crop_resize_antialiased`] widens the kernel when it shrinks, as PIL and torchvision do.

use multiversion::multiversion;

use super::{View, Window};
use crate::image::Image;

/// Source pixels of an output position: weight `i` belongs to input `first + i`. The weights sum to
/// 1; those from `n` on are 0.
#[derive(Debug, Clone, Copy)]
struct Taps {
    first: usize,
    weights: [f32; 4],
    n: usize,
}

/// Resizes the crop `window` of `image` to a view of this size, scaled by 1 / 255 and clamped to
/// 0..1.
pub fn crop_resize(image: &Image, window: Window, height: usize, width: usize) -> View {
    let mut view = View::new(height, width, image.channels);
    crop_resize_into(image, window, &mut view, &mut Vec::new());
    view
}

/// [`crop_resize`] into an existing view; `row` is a reusable buffer.
pub(crate) fn crop_resize_into(image: &Image, window: Window, view: &mut View, row: &mut Vec<f32>) {
    crop_resize_unclamped(image, window, view, row);
    to_unit_range(&mut view.pixels);
}

/// [`crop_resize_into`] without the scaling and clamping: values on the scale 0..255, with
/// overshoots.
///
/// # Panics
/// If `view` does not have the channels of `image`.
pub fn crop_resize_unclamped(image: &Image, window: Window, view: &mut View, row: &mut Vec<f32>) {
    let (c, width) = (image.channels, view.width);
    assert_eq!(c, view.channels, "the view must have the channels of the image");
    let plane = view.height * width;
    let columns: Vec<Taps> = (0..width).map(|x| taps(x, window.width, width)).collect();
    // Up to four pixels past the row are read, with weight 0.
    row.clear();
    row.resize(window.width * c + 4 * c, 0.0);
    for y in 0..view.height {
        let t = taps(y, window.height, view.height);
        // Rows of weight 0 may lie outside the crop; the last valid row replaces them.
        let source = |i: usize| {
            let at = window.top + t.first + i.min(t.n - 1);
            &image.pixels[(at * image.width + window.left) * c..][..window.width * c]
        };
        combine_rows(&mut row[..window.width * c], [source(0), source(1), source(2), source(3)], t.weights);
        if c == 3 {
            let (r, rest) = view.pixels.split_at_mut(plane);
            let (g, b) = rest.split_at_mut(plane);
            let at = y * width..(y + 1) * width;
            resample_row_rgb(row, &columns, [&mut r[at.clone()], &mut g[at.clone()], &mut b[at]]);
        } else {
            for k in 0..c {
                let out = &mut view.pixels[k * plane + y * width..][..width];
                for (v, t) in out.iter_mut().zip(&columns) {
                    *v = (0..4).map(|i| t.weights[i] * row[(t.first + i) * c + k]).sum();
                }
            }
        }
    }
}

/// Computes the weighted sum of four rows.
#[multiversion(targets("x86_64+avx2"))]
fn combine_rows(out: &mut [f32], [a, b, c, d]: [&[u8]; 4], [wa, wb, wc, wd]: [f32; 4]) {
    for ((((o, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        *o = f32::from(*a) * wa + f32::from(*b) * wb + f32::from(*c) * wc + f32::from(*d) * wd;
    }
}

/// Resamples one row of interleaved RGB pixels into planes. Each pixel is read as four values to
/// fill a register; the fourth is ignored.
#[multiversion(targets("x86_64+avx2"))]
fn resample_row_rgb(row: &[f32], columns: &[Taps], [r, g, b]: [&mut [f32]; 3]) {
    for (((t, r), g), b) in columns.iter().zip(r).zip(g).zip(b) {
        let from = &row[3 * t.first..3 * t.first + 13];
        let mut sum = [0.0f32; 4];
        for i in 0..4 {
            for k in 0..4 {
                sum[k] += t.weights[i] * from[3 * i + k];
            }
        }
        (*r, *g, *b) = (sum[0], sum[1], sum[2]);
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn to_unit_range(values: &mut [f32]) {
    for v in values {
        *v = (*v / 255.0).clamp(0.0, 1.0);
    }
}

/// Resizes the crop `window` of `image` to a view of this size, with antialiasing: when shrinking,
/// the kernel is as many times wider as pixels get fewer, and reaches beyond the crop. This is
/// Pillow's bicubic resize of a box, without its rounding to 8 bits.
pub fn crop_resize_antialiased(image: &Image, window: Window, height: usize, width: usize) -> View {
    let c = image.channels;
    let rows = antialiased_taps(window.top, window.height, height, image.height);
    let columns = antialiased_taps(window.left, window.width, width, image.width);
    // Horizontal pass over the rows that are read, `[rows, width, c]`.
    let first_row = rows.iter().map(|(first, _)| *first).min().unwrap_or(0);
    let last_row = rows.iter().map(|(first, weights)| first + weights.len()).max().unwrap_or(0);
    let mut narrow = vec![0.0f32; (last_row - first_row) * width * c];
    for (y, out) in narrow.chunks_exact_mut(width * c).enumerate() {
        let source = &image.pixels[(first_row + y) * image.width * c..][..image.width * c];
        for (out, (first, weights)) in out.chunks_exact_mut(c).zip(&columns) {
            for (pixel, weight) in source[first * c..].chunks_exact(c).zip(weights) {
                out.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += weight * f32::from(*value));
            }
        }
    }
    let mut view = View::new(height, width, c);
    let mut sums = vec![0.0f32; width * c];
    for (y, (first, weights)) in rows.iter().enumerate() {
        sums.fill(0.0);
        for (row, weight) in narrow[(first - first_row) * width * c..].chunks_exact(width * c).zip(weights) {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += weight * value);
        }
        for (x, pixel) in sums.chunks_exact(c).enumerate() {
            for (k, value) in pixel.iter().enumerate() {
                view.pixels[(k * height + y) * width + x] = *value;
            }
        }
    }
    to_unit_range(&mut view.pixels);
    view
}

/// First source pixel and weights of each of `n_out` positions over the `n_in` pixels from `start`,
/// with antialiasing. The image has `limit` pixels.
fn antialiased_taps(start: usize, n_in: usize, n_out: usize, limit: usize) -> Vec<(usize, Vec<f32>)> {
    let scale = n_in as f64 / n_out as f64;
    let stretch = scale.max(1.0);
    let taps = |o: usize| {
        let center = start as f64 + (o as f64 + 0.5) * scale;
        let [low, high] = [-2.0 * stretch, 2.0 * stretch].map(|reach| (center + reach + 0.5).max(0.0) as usize);
        let raw: Vec<f64> = (low..high.min(limit)).map(|i| keys((i as f64 + 0.5 - center) / stretch)).collect();
        let sum: f64 = raw.iter().sum();
        (low, raw.into_iter().map(|w| (w / sum) as f32).collect())
    };
    (0..n_out).map(taps).collect()
}

/// Taps of output position `o` when resizing `n_in` pixels to `n_out`.
fn taps(o: usize, n_in: usize, n_out: usize) -> Taps {
    let center = (o as f64 + 0.5) * n_in as f64 / n_out as f64 - 0.5;
    let low = center.floor() as i64;
    let inside = (low - 1).max(0)..=(low + 2).min(n_in as i64 - 1);
    let (first, n) = (*inside.start() as usize, inside.clone().count());
    let mut raw = [0.0f64; 4];
    for (w, i) in raw.iter_mut().zip(inside) {
        *w = keys(center - i as f64);
    }
    let sum: f64 = raw.iter().sum();
    Taps { first, n, weights: raw.map(|w| (w / sum) as f32) }
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
    fn antialiased_resize_is_that_of_pil() {
        // Pillow 13.0, an image of mode F: resize((3, 2), Image.BICUBIC, box=(1, 1, 8, 6)).
        let pixels: Vec<u8> = (0..7 * 9).map(|i| (i * i * 7 % 251) as u8).collect();
        let image = Image { height: 7, width: 9, channels: 1, pixels };
        let window = Window { top: 1, left: 1, height: 5, width: 7 };
        let view = crop_resize_antialiased(&image, window, 2, 3);
        let expected = [73.2822, 119.2488, 83.7952, 84.9507, 156.9552, 121.3351];
        for (value, expected) in view.pixels.iter().zip(expected) {
            assert!((255.0 * value - expected).abs() < 1e-3, "{} instead of {expected}", 255.0 * value);
        }
        // Enlarging has nothing to smooth.
        let all = Window { top: 0, left: 0, height: 7, width: 9 };
        let plain = crop_resize(&image, all, 11, 13);
        let other = crop_resize_antialiased(&image, all, 11, 13);
        assert!(plain.pixels.iter().zip(&other.pixels).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn tap_weights_sum_to_one_for_every_size() {
        for (n_in, n_out) in [(1, 1), (1, 7), (2, 224), (5, 3), (1000, 32), (3, 3)] {
            for t in (0..n_out).map(|o| taps(o, n_in, n_out)) {
                assert!((t.weights.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{n_in} → {n_out}");
                assert!(t.first + t.n <= n_in && t.n >= 1);
                assert!(t.weights[t.n..].iter().all(|w| *w == 0.0));
            }
        }
    }
}

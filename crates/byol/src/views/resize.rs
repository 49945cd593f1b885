//! Bicubic resize of a crop: Keys' kernel with a = −0.5, half-pixel centers, no antialiasing even
//! when shrinking. Taps outside the crop are dropped and the others renormalized, so only pixels of
//! the crop count.
//!
//! [`center_antialiased`] widens the kernel when it shrinks, as Pillow and torchvision do.

use multiversion::multiversion;

use super::{View, Window};
use crate::image::{Image, Pixels};

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
    to_unit_range(&mut view.pixels, max_value(&image.pixels));
}

/// Value that stands for 1.
fn max_value(pixels: &Pixels) -> f32 {
    match pixels {
        Pixels::U8(_) => f32::from(u8::MAX),
        Pixels::U16(_) => f32::from(u16::MAX),
    }
}

/// `crop_resize` without the scaling and clamping: values on the scale of the pixels, 0..255 or
/// 0..65535, with overshoots.
///
/// # Panics
/// If `view` does not have the channels of `image`.
pub fn crop_resize_unclamped(image: &Image, window: Window, view: &mut View, row: &mut Vec<f32>) {
    match &image.pixels {
        Pixels::U8(pixels) => crop_resize_values(image, pixels, combine_rows, window, view, row),
        Pixels::U16(pixels) => crop_resize_values(image, pixels, combine_rows_u16, window, view, row),
    }
}

/// Weighted sum of four rows.
type CombineRows<T> = fn(&mut [f32], [&[T]; 4], [f32; 4]);

fn crop_resize_values<T>(
    image: &Image,
    pixels: &[T],
    combine_rows: CombineRows<T>,
    window: Window,
    view: &mut View,
    row: &mut Vec<f32>,
) {
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
            &pixels[(at * image.width + window.left) * c..][..window.width * c]
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

/// [`combine_rows`] of 16-bit values.
#[multiversion(targets("x86_64+avx2"))]
fn combine_rows_u16(out: &mut [f32], [a, b, c, d]: [&[u16]; 4], [wa, wb, wc, wd]: [f32; 4]) {
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
fn to_unit_range(values: &mut [f32], max: f32) {
    for v in values {
        *v = (*v / max).clamp(0.0, 1.0);
    }
}

/// The center of an image as torchvision's `Resize(round(size / fraction), BICUBIC)` and
/// `CenterCrop(size)` make it from a PIL image, without their rounding to 8 bits. `fraction` is in
/// (0, 1].
pub fn center_antialiased(image: &Image, size: usize, fraction: f64) -> View {
    let shorter = image.height.min(image.width);
    let resized = (size as f64 / fraction).round_ties_even().max(size as f64) as usize;
    // Origin and scale of the crop in the image, in pixels.
    let axis = |n: usize| {
        let n_resized = if n == shorter { resized } else { resized * n / shorter };
        let scale = n as f64 / n_resized as f64;
        (((n_resized - size) as f64 / 2.0).round_ties_even() * scale, scale)
    };
    let axes = [axis(image.height), axis(image.width)];
    match &image.pixels {
        Pixels::U8(pixels) => resize_antialiased(image, pixels, axes, size),
        Pixels::U16(pixels) => resize_antialiased(image, pixels, axes, size),
    }
}

/// Resizes a part of an image to a square view, with antialiasing: when shrinking, the kernel is as
/// many times wider as pixels get fewer. Each axis has its origin in the image, and the distance
/// between pixels of the view, in pixels of the image.
fn resize_antialiased<T: Copy + Into<f32>>(
    image: &Image,
    pixels: &[T],
    [vertical, horizontal]: [(f64, f64); 2],
    size: usize,
) -> View {
    let (c, height, width) = (image.channels, size, size);
    let rows = antialiased_taps(vertical, size, image.height);
    let columns = antialiased_taps(horizontal, size, image.width);
    // Horizontal pass over the rows that are read, `[rows, width, c]`.
    let first_row = rows.iter().map(|(first, _)| *first).min().unwrap_or(0);
    let last_row = rows.iter().map(|(first, weights)| first + weights.len()).max().unwrap_or(0);
    let mut narrow = vec![0.0f32; (last_row - first_row) * width * c];
    for (y, out) in narrow.chunks_exact_mut(width * c).enumerate() {
        let source = &pixels[(first_row + y) * image.width * c..][..image.width * c];
        for (out, (first, weights)) in out.chunks_exact_mut(c).zip(&columns) {
            for (pixel, weight) in source[first * c..].chunks_exact(c).zip(weights) {
                out.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += weight * (*value).into());
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
    to_unit_range(&mut view.pixels, max_value(&image.pixels));
    view
}

/// First source pixel and weights of each of `size` positions, in an image of `limit` pixels.
fn antialiased_taps((origin, scale): (f64, f64), size: usize, limit: usize) -> Vec<(usize, Vec<f32>)> {
    let stretch = scale.max(1.0);
    let taps = |o: usize| {
        let center = origin + (o as f64 + 0.5) * scale;
        let [low, high] = [-2.0 * stretch, 2.0 * stretch].map(|reach| (center + reach + 0.5).max(0.0) as usize);
        let raw: Vec<f64> = (low..high.min(limit)).map(|i| keys((i as f64 + 0.5 - center) / stretch)).collect();
        let sum: f64 = raw.iter().sum();
        (low, raw.into_iter().map(|w| (w / sum) as f32).collect())
    };
    (0..size).map(taps).collect()
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
    fn antialiased_views_are_those_of_torchvision() {
        // Pillow 13.0, an image of mode F: resize((6, 5), Image.BICUBIC).crop((2, 1, 5, 4)).
        let pixels: Vec<u8> = (0..7 * 9).map(|i| (i * i * 7 % 251) as u8).collect();
        let image = Image { height: 7, width: 9, channels: 1, pixels: pixels.clone().into() };
        let view = center_antialiased(&image, 3, 0.6);
        let expected = [77.4427, 151.6747, 55.3795, 91.5334, 168.8552, 76.6342, 125.4063, 203.0466, 103.6032];
        assert_eq!(view.pixels.len(), expected.len());
        for (value, expected) in view.pixels.iter().zip(expected) {
            assert!((255.0 * value - expected).abs() < 1e-3, "{} instead of {expected}", 255.0 * value);
        }
        // Enlarging has nothing to smooth.
        let square = Image { height: 7, width: 7, channels: 1, pixels: pixels[..49].to_vec().into() };
        let all = Window { top: 0, left: 0, height: 7, width: 7 };
        let (plain, other) = (crop_resize(&square, all, 11, 11), center_antialiased(&square, 11, 1.0));
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

//! Gaussian blur with a kernel of fixed length: radius ⌊H / 20⌋, separable, zero outside (so borders darken). At 224 px 23 taps, at
//! 32 px 3 taps, below 20 px none.

use multiversion::multiversion;

use super::View;

/// Taps on each side of the centre, for a view of this height: height / 10 / 2, cut to a whole number.
pub fn radius(height: usize) -> usize {
    height / 20
}

/// 2 r + 1 weights exp(−x² / 2 σ²), of sum 1.
pub fn taps(radius: usize, sigma: f64) -> Vec<f32> {
    let r = radius as i64;
    let raw: Vec<f64> = (-r..=r).map(|x| (-(x * x) as f64 / (2.0 * sigma * sigma)).exp()).collect();
    let sum: f64 = raw.iter().sum();
    raw.iter().map(|w| (w / sum) as f32).collect()
}

/// Weights below this share of the greatest are less than a rounding of the sum.
const LEAST: f32 = 1e-9;

/// Blurs along the rows, then along the columns.
pub fn gaussian(view: &mut View, sigma: f64) {
    with_room(view, sigma, &mut Vec::new());
}

/// The same with room to work in.
pub fn with_room(view: &mut View, sigma: f64, room: &mut Vec<f32>) {
    let r = radius(view.height);
    if r == 0 {
        return;
    }
    let all = taps(r, sigma);
    let few = all.iter().filter(|w| **w >= LEAST * all[r]).count() / 2;
    let taps = &all[r - few..=r + few];
    let (width, plane) = (view.width, view.height * view.width);
    room.clear();
    room.resize(plane + width + 2 * few, 0.0);
    let (once, padded) = room.split_at_mut(plane);
    for values in view.pixels.chunks_exact_mut(plane) {
        for (source, out) in values.chunks_exact(width).zip(once.chunks_exact_mut(width)) {
            padded[few..few + width].copy_from_slice(source);
            rows(padded, 1, taps, out);
        }
        for (y, out) in values.chunks_exact_mut(width).enumerate() {
            // Rows y − few … y + few, where they are.
            let (first, last) = (y.saturating_sub(few), (y + few).min(view.height - 1));
            let skipped = first + few - y;
            rows(&once[first * width..], width, &taps[skipped..=skipped + last - first], out);
        }
    }
}

/// out[x] = Σ over i of taps[i] · source[x + step · i], a few registers of x at a time.
#[multiversion(targets("x86_64+avx2"))]
fn rows(source: &[f32], step: usize, taps: &[f32], out: &mut [f32]) {
    const FEW: usize = 32;
    let whole = out.len() / FEW * FEW;
    for (at, out) in out[..whole].chunks_exact_mut(FEW).enumerate() {
        let mut sums = [0.0f32; FEW];
        for (i, tap) in taps.iter().enumerate() {
            for (s, v) in sums.iter_mut().zip(&source[at * FEW + step * i..][..FEW]) {
                *s += tap * v;
            }
        }
        out.copy_from_slice(&sums);
    }
    for (x, out) in out.iter_mut().enumerate().skip(whole) {
        *out = taps.iter().enumerate().map(|(i, tap)| tap * source[x + step * i]).sum();
    }
}

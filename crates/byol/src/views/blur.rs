//! Gaussian blur: a separable kernel of fixed radius ⌊H / 20⌋ with zero padding, so borders darken.
//! At 224 px it has 23 taps, at 32 px 3 taps, below 20 px it does nothing.

use multiversion::multiversion;

use super::View;

/// Taps on each side of the center for a view of this height: ⌊height / 20⌋.
pub fn radius(height: usize) -> usize {
    height / 20
}

/// The 2 r + 1 weights exp(−x² / 2 σ²), normalized to sum 1.
pub fn taps(radius: usize, sigma: f64) -> Vec<f32> {
    let r = radius as i64;
    let raw: Vec<f64> = (-r..=r).map(|x| (-(x * x) as f64 / (2.0 * sigma * sigma)).exp()).collect();
    let sum: f64 = raw.iter().sum();
    raw.iter().map(|w| (w / sum) as f32).collect()
}

/// Weights below this fraction of the largest are less than a rounding error of the sum.
const NEGLIGIBLE: f32 = 1e-9;

/// Blurs along the rows, then along the columns.
pub fn gaussian(view: &mut View, sigma: f64) {
    gaussian_with(view, sigma, &mut Vec::new());
}

/// [`gaussian`] with a reusable buffer.
pub(crate) fn gaussian_with(view: &mut View, sigma: f64, buffer: &mut Vec<f32>) {
    let r = radius(view.height);
    if r == 0 {
        return;
    }
    let all = taps(r, sigma);
    let r_used = all.iter().filter(|w| **w >= NEGLIGIBLE * all[r]).count() / 2;
    let taps = &all[r - r_used..=r + r_used];
    let (width, plane) = (view.width, view.height * view.width);
    buffer.clear();
    buffer.resize(plane + width + 2 * r_used, 0.0);
    let (blurred_rows, padded) = buffer.split_at_mut(plane);
    for values in view.pixels.chunks_exact_mut(plane) {
        for (source, out) in values.chunks_exact(width).zip(blurred_rows.chunks_exact_mut(width)) {
            padded[r_used..r_used + width].copy_from_slice(source);
            convolve(padded, 1, taps, out);
        }
        for (y, out) in values.chunks_exact_mut(width).enumerate() {
            // Rows y − r_used … y + r_used that exist; the others are zero.
            let (first, last) = (y.saturating_sub(r_used), (y + r_used).min(view.height - 1));
            let skipped = first + r_used - y;
            convolve(&blurred_rows[first * width..], width, &taps[skipped..=skipped + last - first], out);
        }
    }
}

/// Computes out\[x\] = Σᵢ taps\[i\] · source\[x + step · i\], a block of x at a time to stay in
/// registers.
#[multiversion(targets("x86_64+avx2"))]
fn convolve(source: &[f32], step: usize, taps: &[f32], out: &mut [f32]) {
    const BLOCK: usize = 32;
    let blocked = out.len() / BLOCK * BLOCK;
    for (at, out) in out[..blocked].chunks_exact_mut(BLOCK).enumerate() {
        let mut sums = [0.0f32; BLOCK];
        for (i, tap) in taps.iter().enumerate() {
            for (s, v) in sums.iter_mut().zip(&source[at * BLOCK + step * i..][..BLOCK]) {
                *s += tap * v;
            }
        }
        out.copy_from_slice(&sums);
    }
    for (x, out) in out.iter_mut().enumerate().skip(blocked) {
        *out = taps.iter().enumerate().map(|(i, tap)| tap * source[x + step * i]).sum();
    }
}

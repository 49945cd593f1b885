//! Gaussian blur with a kernel of fixed length: radius ⌊H / 20⌋, separable, zero outside (so borders darken). At 224 px 23 taps, at
//! 32 px 3 taps, below 20 px none.

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

/// Blurs along the rows, then along the columns.
pub fn gaussian(view: &mut View, sigma: f64) {
    let r = radius(view.height);
    if r == 0 {
        return;
    }
    let taps = taps(r, sigma);
    let (h, row) = (view.height, view.width * view.channels);
    let mut once = vec![0.0f32; view.pixels.len()];
    for (source, out) in view.pixels.chunks_exact(row).zip(once.chunks_exact_mut(row)) {
        convolve(source, out, &taps, r, view.channels);
    }
    view.pixels.fill(0.0);
    for y in 0..h {
        let out = &mut view.pixels[y * row..(y + 1) * row];
        for (i, tap) in taps.iter().enumerate() {
            // Row y + i − r, where there is one.
            if let Some(from) = (y + i).checked_sub(r).filter(|from| *from < h) {
                for (o, s) in out.iter_mut().zip(&once[from * row..(from + 1) * row]) {
                    *o += tap * s;
                }
            }
        }
    }
}

/// One row: out[x] = Σ taps[i] · source[x + i − r], pixels of `c` values.
fn convolve(source: &[f32], out: &mut [f32], taps: &[f32], r: usize, c: usize) {
    let n = source.len();
    for (i, tap) in taps.iter().enumerate() {
        // out[j] takes source[j + shift]; both ranges are cut to the row.
        let shift = i as isize - r as isize;
        let by = shift.unsigned_abs() * c;
        if by >= n {
            continue;
        }
        let (out, source) =
            if shift < 0 { (&mut out[by..], &source[..n - by]) } else { (&mut out[..n - by], &source[by..]) };
        for (o, s) in out.iter_mut().zip(source) {
            *o += tap * s;
        }
    }
}

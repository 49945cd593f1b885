//! Grayscale: 0.2989 R + 0.5870 G + 0.1140 B in all channels; the mean of the channels if they are
//! not RGB.

use multiversion::multiversion;

use super::{Chunk, View, for_each_chunk, spectrum};

/// Replaces each color by its luminance.
pub fn grayscale(view: &mut View) {
    for_each_chunk(view, grayscale_chunk);
}

/// [`grayscale`] of one chunk.
pub(crate) fn grayscale_chunk(chunk: &mut Chunk) {
    match chunk {
        [r, g, b] => grayscale_rgb(r, g, b),
        chunk => spectrum::grayscale(chunk),
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn grayscale_rgb(r: &mut [f32], g: &mut [f32], b: &mut [f32]) {
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        let gray = 0.2989 * *r + 0.5870 * *g + 0.1140 * *b;
        (*r, *g, *b) = (gray, gray, gray);
    }
}

//! Grayscale: 0.2989 R + 0.5870 G + 0.1140 B in all channels. Does nothing to images that are not
//! RGB.

use multiversion::multiversion;

use super::{Chunk, View, for_each_chunk};

/// Replaces each color by its luminance.
pub fn grayscale(view: &mut View) {
    for_each_chunk(view, grayscale_chunk);
}

/// [`grayscale`] of one chunk.
pub(crate) fn grayscale_chunk(chunk: &mut Chunk) {
    if let [r, g, b] = chunk {
        grayscale_rgb(r, g, b);
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn grayscale_rgb(r: &mut [f32], g: &mut [f32], b: &mut [f32]) {
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        let gray = 0.2989 * *r + 0.5870 * *g + 0.1140 * *b;
        (*r, *g, *b) = (gray, gray, gray);
    }
}

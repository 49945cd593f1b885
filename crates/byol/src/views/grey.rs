//! Greyscale: 0.2989 R + 0.5870 G + 0.1140 B in all channels. For images that are not RGB there is nothing to do.

use multiversion::multiversion;

use super::{Strip, View, strips};

/// Replaces each colour by its grey.
pub fn greyscale(view: &mut View) {
    strips(view, grey);
}

/// The same for a strip.
pub fn grey(strip: &mut Strip) {
    if let [r, g, b] = strip {
        of_rgb(r, g, b);
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn of_rgb(r: &mut [f32], g: &mut [f32], b: &mut [f32]) {
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        let grey = 0.2989 * *r + 0.5870 * *g + 0.1140 * *b;
        (*r, *g, *b) = (grey, grey, grey);
    }
}

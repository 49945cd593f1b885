//! Greyscale: 0.2989 R + 0.5870 G + 0.1140 B in all channels. For images that are not RGB there is nothing to do.

use super::View;

/// Replaces each colour by its grey.
pub fn greyscale(view: &mut View) {
    if view.channels != 3 {
        return;
    }
    for p in view.pixels.chunks_exact_mut(3) {
        p.fill(0.2989 * p[0] + 0.5870 * p[1] + 0.1140 * p[2]);
    }
}

//! Left-right flip.

use super::View;

/// Mirrors each row.
pub fn left_right(view: &mut View) {
    let (w, c) = (view.width, view.channels);
    for row in view.pixels.chunks_exact_mut(w * c) {
        for x in 0..w / 2 {
            for k in 0..c {
                row.swap(x * c + k, (w - 1 - x) * c + k);
            }
        }
    }
}

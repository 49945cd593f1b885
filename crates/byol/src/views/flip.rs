//! Horizontal flip.

use super::View;

/// Mirrors each row.
pub fn left_right(view: &mut View) {
    let width = view.width;
    view.pixels.chunks_exact_mut(width).for_each(<[f32]>::reverse);
}

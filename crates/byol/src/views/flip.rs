//! Flips, and rotations by quarter turns.

use super::View;

/// Mirrors each row.
pub fn left_right(view: &mut View) {
    let width = view.width;
    view.pixels.chunks_exact_mut(width).for_each(<[f32]>::reverse);
}

/// Mirrors each column.
pub(crate) fn upside_down(view: &mut View) {
    let (height, width) = (view.height, view.width);
    for plane in view.pixels.chunks_exact_mut(height * width) {
        let (top, bottom) = plane.split_at_mut(height / 2 * width);
        let rows = bottom.chunks_exact_mut(width).rev();
        top.chunks_exact_mut(width).zip(rows).for_each(|(upper, lower)| upper.swap_with_slice(lower));
    }
}

/// Rotates a square view counterclockwise by this number of quarter turns, 0 to 3. `values` is a
/// buffer.
///
/// # Panics
/// If the view is not square.
pub(crate) fn rotate(view: &mut View, quarter_turns: usize, values: &mut Vec<f32>) {
    if matches!(quarter_turns, 1 | 3) {
        transpose(view, values);
    }
    if matches!(quarter_turns, 1 | 2) {
        upside_down(view);
    }
    if matches!(quarter_turns, 2 | 3) {
        left_right(view);
    }
}

/// Exchanges rows and columns of a square view.
fn transpose(view: &mut View, values: &mut Vec<f32>) {
    let side = view.width;
    assert_eq!(view.height, side, "only a square view keeps its shape");
    for plane in view.pixels.chunks_exact_mut(side * side) {
        values.clear();
        values.extend_from_slice(plane);
        for (y, row) in plane.chunks_exact_mut(side).enumerate() {
            for (x, value) in row.iter_mut().enumerate() {
                *value = values[x * side + y];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        View { height: 3, width: 3, channels: 2, pixels: (0u8..18).map(f32::from).collect() }
    }

    fn first_plane(change: impl Fn(&mut View)) -> Vec<f32> {
        let mut view = view();
        change(&mut view);
        assert_eq!(view.pixels[9..].iter().zip(&view.pixels).filter(|(b, a)| *b - *a != 9.0).count(), 0);
        view.pixels[..9].to_vec()
    }

    #[test]
    fn flips_and_turns_are_those_of_numpy() {
        assert_eq!(first_plane(left_right), [2.0, 1.0, 0.0, 5.0, 4.0, 3.0, 8.0, 7.0, 6.0]);
        assert_eq!(first_plane(upside_down), [6.0, 7.0, 8.0, 3.0, 4.0, 5.0, 0.0, 1.0, 2.0]);
        let turned = |turns| first_plane(|view| rotate(view, turns, &mut Vec::new()));
        assert_eq!(turned(0), first_plane(|_| ()));
        assert_eq!(turned(1), [2.0, 5.0, 8.0, 1.0, 4.0, 7.0, 0.0, 3.0, 6.0]); // numpy.rot90(x)
        assert_eq!(turned(2), [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]);
        assert_eq!(turned(3), [6.0, 3.0, 0.0, 7.0, 4.0, 1.0, 8.0, 5.0, 2.0]);
    }
}

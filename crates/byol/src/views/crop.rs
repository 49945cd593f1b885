//! Random crop: one draw of area and aspect, each side cut to the image on its own, no retry.

use rand_chacha::ChaCha8Rng;

use crate::random::{below, uniform, uniform_in};

/// A part of an image, in whole pixels; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows, at least 1.
    pub height: usize,
    /// Columns, at least 1.
    pub width: usize,
}

impl Window {
    /// A window of a uniform share of the area and a log-uniform aspect (width / height), anywhere in the image.
    pub fn draw(
        rng: &mut ChaCha8Rng,
        image_height: usize,
        image_width: usize,
        area: [f64; 2],
        aspect: [f64; 2],
    ) -> Window {
        let share = uniform_in(rng, area[0], area[1]);
        let ratio = uniform_in(rng, aspect[0].ln(), aspect[1].ln()).exp();
        let (height, width) = sides(image_height, image_width, share, ratio);
        let mut offset = |room: usize| if room == 0 { uniform(rng) as usize } else { below(rng, room + 1) };
        let top = offset(image_height - height);
        let left = offset(image_width - width);
        Window { top, left, height, width }
    }

    /// The centre square of ⌊share · shorter side⌋ pixels, at least 1: the window for evaluation, with a share of 0.875 the reference's.
    pub fn center(image_height: usize, image_width: usize, share: f64) -> Window {
        let shorter = image_height.min(image_width);
        let side = ((share * shorter as f64) as usize).clamp(1, shorter);
        Window {
            top: (image_height - side).div_ceil(2),
            left: (image_width - side).div_ceil(2),
            height: side,
            width: side,
        }
    }
}

/// Height and width of a crop of this share of the area with this width / height. Rounded half to even; a side that a tiny image
/// would make 0 is 1.
pub fn sides(image_height: usize, image_width: usize, share: f64, ratio: f64) -> (usize, usize) {
    let area = share * image_height as f64 * image_width as f64;
    let side = |length: f64, most: usize| (length.sqrt().round_ties_even() as usize).clamp(1, most);
    (side(area / ratio, image_height), side(area * ratio, image_width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::stream;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_window_lies_in_the_image(h in 1usize..4000, w in 1usize..4000, seed in 0u64..1000) {
            for window in [Window::draw(&mut stream(&[seed]), h, w, [0.08, 1.0], [0.75, 4.0 / 3.0]), Window::center(h, w, 0.875), Window::center(h, w, 1.0)] {
                prop_assert!(window.height >= 1 && window.width >= 1);
                prop_assert!(window.top + window.height <= h && window.left + window.width <= w);
            }
        }
    }

    #[test]
    fn a_draw_uses_the_same_number_of_random_values_whatever_the_image() {
        let (mut a, mut b) = (stream(&[1]), stream(&[1]));
        Window::draw(&mut a, 1, 1, [0.08, 1.0], [0.75, 4.0 / 3.0]);
        Window::draw(&mut b, 500, 300, [0.08, 1.0], [0.75, 4.0 / 3.0]);
        assert_eq!(uniform(&mut a), uniform(&mut b));
    }
}

//! Random crop: one draw of area and aspect ratio, each side clamped to the image separately, no
//! retries.

use rand_chacha::ChaCha8Rng;

use crate::random::{below, uniform, uniform_in};

/// A crop window in whole pixels; never empty.
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
    /// Draws a window with a uniform fraction of the area and a log-uniform aspect ratio (width /
    /// height), at a uniform position.
    pub fn draw(
        rng: &mut ChaCha8Rng,
        image_height: usize,
        image_width: usize,
        area: [f64; 2],
        aspect: [f64; 2],
    ) -> Window {
        let fraction = uniform_in(rng, area[0], area[1]);
        let ratio = uniform_in(rng, aspect[0].ln(), aspect[1].ln()).exp();
        let (height, width) = crop_size(image_height, image_width, fraction, ratio);
        // A value is drawn even where there is only one position, so that every draw uses as many
        // values.
        let mut offset = |slack: usize| if slack == 0 { uniform(rng) as usize } else { below(rng, slack + 1) };
        let top = offset(image_height - height);
        let left = offset(image_width - width);
        Window { top, left, height, width }
    }

    /// The center square with side ⌊fraction · shorter side⌋, at least 1: the evaluation window.
    /// The reference uses 0.875.
    pub fn center(image_height: usize, image_width: usize, fraction: f64) -> Window {
        let shorter = image_height.min(image_width);
        let side = ((fraction * shorter as f64) as usize).clamp(1, shorter);
        Window {
            top: (image_height - side).div_ceil(2),
            left: (image_width - side).div_ceil(2),
            height: side,
            width: side,
        }
    }
}

/// Height and width of a crop with this fraction of the area and this width / height. Sides are
/// rounded half to even and clamped to 1..=the image's side.
pub fn crop_size(image_height: usize, image_width: usize, fraction: f64, ratio: f64) -> (usize, usize) {
    let area = fraction * image_height as f64 * image_width as f64;
    let side = |squared: f64, max: usize| (squared.sqrt().round_ties_even() as usize).clamp(1, max);
    (side(area / ratio, image_height), side(area * ratio, image_width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::stream;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn windows_lie_within_the_image(h in 1usize..4000, w in 1usize..4000, seed in 0u64..1000) {
            let random = Window::draw(&mut stream(&[seed]), h, w, [0.08, 1.0], [0.75, 4.0 / 3.0]);
            for window in [random, Window::center(h, w, 0.875), Window::center(h, w, 1.0)] {
                prop_assert!(window.height >= 1 && window.width >= 1);
                prop_assert!(window.top + window.height <= h && window.left + window.width <= w);
            }
        }
    }

    #[test]
    fn draws_use_the_same_number_of_random_values_for_every_image_size() {
        let (mut a, mut b) = (stream(&[1]), stream(&[1]));
        Window::draw(&mut a, 1, 1, [0.08, 1.0], [0.75, 4.0 / 3.0]);
        Window::draw(&mut b, 500, 300, [0.08, 1.0], [0.75, 4.0 / 3.0]);
        assert_eq!(uniform(&mut a), uniform(&mut b));
    }
}

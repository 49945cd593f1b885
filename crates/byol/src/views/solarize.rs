//! Solarise: values from one half up are inverted.

use super::View;

/// x < 0.5 stays, else 1 − x, value by value.
pub fn solarize(view: &mut View) {
    for v in &mut view.pixels {
        *v = if *v < 0.5 { *v } else { 1.0 - *v };
    }
}

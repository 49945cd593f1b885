//! Solarise: values from one half up are inverted.

use multiversion::multiversion;

use super::View;

/// x < 0.5 stays, else 1 − x, value by value.
pub fn solarize(view: &mut View) {
    invert(&mut view.pixels);
}

#[multiversion(targets("x86_64+avx2"))]
fn invert(values: &mut [f32]) {
    for v in values {
        *v = if *v < 0.5 { *v } else { 1.0 - *v };
    }
}

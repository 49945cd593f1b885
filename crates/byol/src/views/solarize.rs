//! Solarization: values of 0.5 and above are inverted.

use multiversion::multiversion;

use super::View;

/// Maps each value x ≥ 0.5 to 1 − x.
pub fn solarize(view: &mut View) {
    invert_bright(&mut view.pixels);
}

#[multiversion(targets("x86_64+avx2"))]
fn invert_bright(values: &mut [f32]) {
    for v in values {
        *v = if *v < 0.5 { *v } else { 1.0 - *v };
    }
}

//! Saturation, hue and grayscale of images whose channels are not RGB.
//!
//! A pixel is a vector x of C channels with mean m. Saturation f moves it to m + f (x − m). A hue
//! shift rotates x − m in the plane of the first Fourier pair over the channels, u = √(2/C)
//! cos(2πc/C) and v = √(2/C) sin(2πc/C), which is orthogonal to the axis of equal channels; the
//! rest of x − m stays. For C = 3 that plane is the whole space of x − m, and a third of a turn
//! permutes the channels, as the hue of HSV does. Two channels have no such plane, and keep their
//! hue; one channel has no saturation either.

use std::f64::consts::TAU;

use multiversion::multiversion;

use super::Chunk;

/// Mean over the channels of each pixel.
fn means(chunk: &Chunk) -> Vec<f32> {
    let mut means = vec![0.0; chunk.first().map_or(0, |values| values.len())];
    for values in chunk {
        add_scaled(&mut means, values, 1.0 / chunk.len() as f32);
    }
    means
}

/// Adds `weight` times `values`.
#[multiversion(targets("x86_64+avx2"))]
fn add_scaled(sums: &mut [f32], values: &[f32], weight: f32) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += weight * value;
    }
}

/// Scales the distance from the mean; clamps to 0..1.
#[multiversion(targets("x86_64+avx2"))]
fn scale_around(values: &mut [f32], means: &[f32], factor: f32) {
    for (value, mean) in values.iter_mut().zip(means) {
        *value = (mean + factor * (*value - mean)).clamp(0.0, 1.0);
    }
}

/// Multiplies the distance of each channel from the mean over the channels.
pub(super) fn scale_saturation(chunk: &mut Chunk, factor: f32) {
    let means = means(chunk);
    chunk.iter_mut().for_each(|values| scale_around(values, &means, factor));
}

/// Replaces each channel by the mean over the channels.
pub(super) fn grayscale(chunk: &mut Chunk) {
    let means = means(chunk);
    chunk.iter_mut().for_each(|values| values.copy_from_slice(&means));
}

/// The Fourier pair of `channels` channels, `[channels]` each; `None` without a plane.
pub(super) fn hue_plane(channels: usize) -> Option<[Vec<f32>; 2]> {
    let wave = |f: fn(f64) -> f64| {
        let value = |c: usize| (2.0 / channels as f64).sqrt() * f(TAU * c as f64 / channels as f64);
        (0..channels).map(|c| value(c) as f32).collect()
    };
    (channels > 2).then(|| [wave(f64::cos), wave(f64::sin)])
}

/// Rotates by `delta` turns; clamps to 0..1.
pub(super) fn shift_hue(chunk: &mut Chunk, delta: f32) {
    let Some([u, v]) = hue_plane(chunk.len()) else { return };
    let n = chunk.first().map_or(0, |values| values.len());
    let (mut a, mut b) = (vec![0.0; n], vec![0.0; n]);
    for ((values, u), v) in chunk.iter().zip(&u).zip(&v) {
        add_scaled(&mut a, values, *u);
        add_scaled(&mut b, values, *v);
    }
    let (sin, cos) = (TAU * f64::from(delta)).sin_cos();
    let (sin, cos) = (sin as f32, cos as f32);
    // Changes of both coordinates.
    for (a, b) in a.iter_mut().zip(&mut b) {
        (*a, *b) = (*a * (cos - 1.0) - *b * sin, *a * sin + *b * (cos - 1.0));
    }
    for ((values, u), v) in chunk.iter_mut().zip(&u).zip(&v) {
        add_scaled(values, &a, *u);
        add_scaled(values, &b, *v);
        values.iter_mut().for_each(|value| *value = value.clamp(0.0, 1.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_pixel(pixel: &[f32], f: impl Fn(&mut Chunk)) -> Vec<f32> {
        let mut planes: Vec<[f32; 1]> = pixel.iter().map(|v| [*v]).collect();
        let mut chunk: Vec<&mut [f32]> = planes.iter_mut().map(|plane| &mut plane[..]).collect();
        f(&mut chunk);
        planes.into_iter().flatten().collect()
    }

    fn assert_close(a: &[f32], b: &[f32]) {
        assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
    }

    #[test]
    fn third_of_a_turn_permutes_three_channels() {
        let shifted = with_pixel(&[0.6, 0.2, 0.1], |chunk| shift_hue(chunk, 1.0 / 3.0));
        assert_close(&shifted, &[0.1, 0.6, 0.2]);
    }

    #[test]
    fn hue_keeps_the_mean_and_what_is_outside_its_plane() {
        let pixel = [0.5, 0.6, 0.3, 0.55, 0.4];
        let there = with_pixel(&pixel, |chunk| shift_hue(chunk, 0.1));
        assert!((there.iter().sum::<f32>() - pixel.iter().sum::<f32>()).abs() < 1e-5);
        assert!((there[0] - pixel[0]).abs() > 1e-3);
        assert_close(&with_pixel(&there, |chunk| shift_hue(chunk, -0.1)), &pixel);
        // The alternating pattern is orthogonal to the plane.
        let alternating = [0.6, 0.4, 0.6, 0.4];
        assert_close(&with_pixel(&alternating, |chunk| shift_hue(chunk, 0.2)), &alternating);
    }

    #[test]
    fn saturation_scales_around_the_mean() {
        assert_close(&with_pixel(&[0.2, 0.4], |chunk| scale_saturation(chunk, 0.5)), &[0.25, 0.35]);
        assert_close(&with_pixel(&[0.2, 0.4, 0.6, 0.4], grayscale), &[0.4; 4]);
    }

    #[test]
    fn one_channel_keeps_its_values() {
        for f in [(|c| shift_hue(c, 0.3)) as fn(&mut Chunk), |c| scale_saturation(c, 1.5), grayscale] {
            assert_eq!(with_pixel(&[0.3], f), [0.3]);
        }
    }
}

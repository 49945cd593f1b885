//! Procedural images with labels, for trying the program without data: patterns in ink on paper. The class is the kind of pattern;
//! lightness, tint, scale, turn and place are chance, so that pixels alone say little about the class. Synthetic, and called so wherever
//! it is shown.
//!
//! Tints are faint on purpose. A pair of strong colours tells an image from all others and survives the views' jitter, so a short run
//! learns that short cut and nothing of the pattern: measured, and the reason why the views' jitter matters so much (paper, section 5).

use rand_chacha::ChaCha8Rng;

use super::{CHANNELS, Dataset, Image, Images};
use crate::random::{self, Domain, uniform, uniform_in};

/// Kinds of pattern: the classes.
pub const PATTERNS: [&str; 6] = ["stripes", "checks", "dots", "rings", "grid", "clouds"];

/// Side of an image in pixels.
pub const SIDE: usize = 32;

/// `n` training and `n_test` test images, classes in turn.
pub fn dataset(seed: u64, n: usize, n_test: usize) -> Dataset {
    let split = |which: u64, n: usize| {
        let label = |i: usize| i % PATTERNS.len();
        let image = |i: usize| {
            draw(&mut random::stream(&[Domain::Synthetic as u64, seed, which, i as u64]), PATTERNS[label(i)])
        };
        Images::memory((0..n).map(image).collect(), Some((0..n).map(label).collect()))
    };
    let test = split(1, n_test);
    Dataset {
        root: "synthetic images".into(),
        kind: "synthetic images".into(),
        classes: PATTERNS.map(str::to_owned).to_vec(),
        train: split(0, n),
        held_out: Some(test.clone()),
        test: Some(test),
        skipped: Vec::new(),
    }
}

fn draw(rng: &mut ChaCha8Rng, pattern: &str) -> Image {
    // Paper and ink differ in lightness; a faint tint on top.
    let ground_light = uniform(rng);
    let step = uniform_in(rng, 0.35, 0.65);
    let ink_light = if ground_light < 0.5 { ground_light + step } else { ground_light - step };
    let mut tinted = |light: f64| [0; 3].map(|_| light + uniform_in(rng, -0.06, 0.06));
    let (ground, ink) = (tinted(ground_light), tinted(ink_light));
    let (sin, cos) = uniform_in(rng, 0.0, std::f64::consts::TAU).sin_cos();
    let period = uniform_in(rng, 8.0, 12.0);
    let (cx, cy) = (uniform_in(rng, 0.0, SIDE as f64), uniform_in(rng, 0.0, SIDE as f64));
    let phases: [f64; 4] = std::array::from_fn(|_| uniform_in(rng, 0.0, std::f64::consts::TAU));

    // How much ink at a place, 0 or 1; clouds lie between.
    let ink_at = |x: f64, y: f64| {
        let (dx, dy) = (x - cx, y - cy);
        let (u, v) = ((cos * dx + sin * dy) / period, (cos * dy - sin * dx) / period);
        let band = |w: f64| w.rem_euclid(1.0) < 0.5;
        let from_middle = |w: f64| w.rem_euclid(1.0) - 0.5;
        let on = match pattern {
            "stripes" => band(u),
            "checks" => band(u) != band(v),
            "dots" => from_middle(u).hypot(from_middle(v)) < 0.3,
            "rings" => band(u.hypot(v)),
            "grid" => from_middle(u).abs() < 0.13 || from_middle(v).abs() < 0.13,
            _ => {
                let waves = (3.1 * u + phases[0]).sin()
                    + (2.7 * v + phases[1]).sin()
                    + (2.2 * (u + v) + phases[2]).sin()
                    + (2.5 * (u - v) + phases[3]).sin();
                return (0.5 + 0.25 * waves).clamp(0.0, 1.0);
            }
        };
        if on { 1.0 } else { 0.0 }
    };
    let mut pixels = Vec::with_capacity(SIDE * SIDE * CHANNELS);
    for y in 0..SIDE {
        for x in 0..SIDE {
            // Four samples a pixel soften the edges.
            let sample =
                |i: usize| ink_at(x as f64 + 0.25 + 0.5 * (i % 2) as f64, y as f64 + 0.25 + 0.5 * (i / 2) as f64);
            let share = (0..4).map(sample).sum::<f64>() / 4.0;
            for k in 0..CHANNELS {
                let value = ground[k] + share * (ink[k] - ground[k]) + 0.02 * random::normal(rng);
                pixels.push((value * 255.0).clamp(0.0, 255.0) as u8);
            }
        }
    }
    Image { height: SIDE, width: SIDE, channels: CHANNELS, pixels }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_images() {
        let (a, b) = (dataset(1, 9, 0), dataset(1, 9, 0));
        assert!((0..9).all(|i| a.train.get(i).unwrap() == b.train.get(i).unwrap()));
        assert_eq!(a.classes.len(), PATTERNS.len());
    }
}

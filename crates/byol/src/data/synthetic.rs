//! Procedural labeled images, for trying the program without data: patterns in ink on paper. The
//! class is the kind of pattern. Lightness, tint, scale, rotation and position are random, so
//! pixels alone predict the class poorly. All output calls them synthetic.
//!
//! Tints are faint on purpose. A pair of strong colors identifies an image and survives the color
//! jitter, so a short run learned that shortcut and nothing of the pattern (measured). This is why
//! color jitter matters so much (paper, section 5).

use rand_chacha::ChaCha8Rng;

use super::{CHANNELS, Dataset, Image, Images, Levels};
use crate::random::{self, Domain, uniform, uniform_in};

/// Kinds of pattern, which are the classes.
pub const PATTERNS: [&str; 6] = ["stripes", "checks", "dots", "rings", "grid", "clouds"];

/// Side of an image in pixels.
pub const SIDE: usize = 32;

/// Creates `n` training and `n_test` test images with alternating classes.
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
        column: None,
        unused: Vec::new(),
    }
}

/// `n` images of any number of channels, taken from those of several RGB images: an input for
/// comparisons of encoders with these levels.
pub fn with_channels(n: usize, channels: usize, levels: &Levels) -> Images {
    if channels == CHANNELS {
        return dataset(0, n, 0).train;
    }
    let sources = channels.div_ceil(CHANNELS);
    let image = |i: usize| {
        let rgb: Vec<Image> = (0..sources)
            .map(|k| {
                let stream = &mut random::stream(&[Domain::Synthetic as u64, 0, 0, (i * sources + k) as u64]);
                draw(stream, PATTERNS[(i + k) % PATTERNS.len()])
            })
            .collect();
        let value = |at: usize, c: usize| rgb[c / CHANNELS].pixels.to_u8()[at * CHANNELS + c % CHANNELS];
        let pixels = (0..SIDE * SIDE).flat_map(|at| (0..channels).map(move |c| (at, c)));
        Image { height: SIDE, width: SIDE, channels, pixels: pixels.map(|(at, c)| value(at, c)).collect() }
    };
    Images::memory((0..n).map(image).collect(), None).read_with(levels.clone())
}

fn draw(rng: &mut ChaCha8Rng, pattern: &str) -> Image {
    // Paper and ink differ in lightness, plus a faint tint.
    let ground_light = uniform(rng);
    let step = uniform_in(rng, 0.35, 0.65);
    let ink_light = if ground_light < 0.5 { ground_light + step } else { ground_light - step };
    let mut tinted = |light: f64| [0; 3].map(|_| light + uniform_in(rng, -0.06, 0.06));
    let (ground, ink) = (tinted(ground_light), tinted(ink_light));
    let (sin, cos) = uniform_in(rng, 0.0, std::f64::consts::TAU).sin_cos();
    let period = uniform_in(rng, 8.0, 12.0);
    let (cx, cy) = (uniform_in(rng, 0.0, SIDE as f64), uniform_in(rng, 0.0, SIDE as f64));
    let phases: [f64; 4] = std::array::from_fn(|_| uniform_in(rng, 0.0, std::f64::consts::TAU));

    // Amount of ink at a point: 0 or 1, for clouds anything between.
    let ink_at = |x: f64, y: f64| {
        let (dx, dy) = (x - cx, y - cy);
        let (u, v) = ((cos * dx + sin * dy) / period, (cos * dy - sin * dx) / period);
        let band = |w: f64| w.rem_euclid(1.0) < 0.5;
        let from_center = |w: f64| w.rem_euclid(1.0) - 0.5;
        let on = match pattern {
            "stripes" => band(u),
            "checks" => band(u) != band(v),
            "dots" => from_center(u).hypot(from_center(v)) < 0.3,
            "rings" => band(u.hypot(v)),
            "grid" => from_center(u).abs() < 0.13 || from_center(v).abs() < 0.13,
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
            // Four samples per pixel, for antialiased edges.
            let sample =
                |i: usize| ink_at(x as f64 + 0.25 + 0.5 * (i % 2) as f64, y as f64 + 0.25 + 0.5 * (i / 2) as f64);
            let ink_fraction = (0..4).map(sample).sum::<f64>() / 4.0;
            for k in 0..CHANNELS {
                let value = ground[k] + ink_fraction * (ink[k] - ground[k]) + 0.02 * random::normal(rng);
                pixels.push((value * 255.0).clamp(0.0, 255.0) as u8);
            }
        }
    }
    Image { height: SIDE, width: SIDE, channels: CHANNELS, pixels: pixels.into() }
}

/// Random domain of the scenes; 0 and 1 are the splits of the patterns.
const SCENES: u64 = 2;

/// Draws a room with balls, seen from inside. Returns the image and the depth of each pixel along
/// the optical axis in meters, `[height, width]`, row-major.
pub fn scene(seed: u64, index: u64, height: usize, width: usize) -> (Image, Vec<f32>) {
    let mut rng = random::stream(&[Domain::Synthetic as u64, seed, SCENES, index]);
    let mut uniform = |low: f64, high: f64| random::uniform_in(&mut rng, low, high);
    let (floor, ceiling, back, side) = (uniform(-1.8, -1.2), uniform(1.2, 2.0), uniform(5.0, 9.0), uniform(2.0, 3.5));
    let light = [uniform(-0.6, 0.6), 0.8, uniform(-0.8, -0.2)];
    let balls: Vec<([f64; 3], f64, [f64; 3])> = (0..6)
        .map(|_| {
            let radius = uniform(0.25, 0.8);
            let center =
                [uniform(-side + radius, side - radius), uniform(floor + radius, 0.8), uniform(2.0, back - radius)];
            (center, radius, [uniform(0.2, 1.0), uniform(0.2, 1.0), uniform(0.2, 1.0)])
        })
        .collect();
    let walls: [[f64; 3]; 3] = std::array::from_fn(|_| std::array::from_fn(|_| uniform(0.3, 0.9)));
    let tile = uniform(0.4, 0.9);
    let (mut pixels, mut depth) = (Vec::with_capacity(3 * height * width), Vec::with_capacity(height * width));
    for i in 0..height * width {
        let (x, y) = ((i % width) as f64 + 0.5, (i / width) as f64 + 0.5);
        // The field of view is 60 degrees across the longer side.
        let focal = 0.866 * height.max(width) as f64;
        let ray = [(x - width as f64 / 2.0) / focal, (height as f64 / 2.0 - y) / focal, 1.0];
        // The nearest surface so far: depth, normal, color. The ray has z = 1, so its length factor
        // is the depth.
        let mut nearest = (back, [0.0, 0.0, -1.0], walls[0]);
        let mut intersect = |z: f64, normal: [f64; 3], color: [f64; 3]| {
            if z > 0.1 && z < nearest.0 {
                nearest = (z, normal, color);
            }
        };
        let floor_z = floor / ray[1];
        let checks = ((ray[0] * floor_z / tile).floor() + (floor_z / tile).floor()) as i64;
        intersect(floor_z, [0.0, 1.0, 0.0], walls[1].map(|c| if checks % 2 == 0 { c } else { 0.4 * c }));
        intersect(ceiling / ray[1], [0.0, -1.0, 0.0], [0.9; 3]);
        intersect(side / ray[0], [-1.0, 0.0, 0.0], walls[2]);
        intersect(-side / ray[0], [1.0, 0.0, 0.0], walls[2]);
        for (center, radius, color) in &balls {
            // Solves |z ray − center|² = radius² for z.
            let dot = |a: &[f64; 3], b: &[f64; 3]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let (a, b, c) = (dot(&ray, &ray), dot(&ray, center), dot(center, center) - radius * radius);
            let discriminant = b * b - a * c;
            if discriminant > 0.0 {
                let z = (b - discriminant.sqrt()) / a;
                let normal = std::array::from_fn(|k| (z * ray[k] - center[k]) / radius);
                intersect(z, normal, *color);
            }
        }
        let (z, normal, color) = nearest;
        let cosine: f64 = normal.iter().zip(&light).map(|(n, l)| n * l).sum();
        let shade = (0.45 + 0.55 * cosine.max(0.0)) / (1.0 + 0.06 * z);
        pixels.extend(color.map(|c| (255.0 * c * shade).clamp(0.0, 255.0) as u8));
        depth.push(z as f32);
    }
    (Image { height, width, channels: CHANNELS, pixels: pixels.into() }, depth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_reproducible_from_the_seed() {
        let (a, b) = (dataset(1, 9, 0), dataset(1, 9, 0));
        assert!((0..9).all(|i| a.train.get(i).unwrap() == b.train.get(i).unwrap()));
        assert_eq!(a.classes.len(), PATTERNS.len());
    }
}

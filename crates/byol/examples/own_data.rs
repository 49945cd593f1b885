//! Pretrains on generated images with custom augmentations, in half a minute:
//! `cargo run --release -p byol --example own_data -- FOLDER`.

use std::{env::args, error::Error};

use byol::{
    Dataset, Event, Image, Pretraining, Recipe,
    random::normal,
    views::{ChaCha8Rng, Policy, View},
};

/// Stripes of any direction, width and color. Any source of pixels will do: a camera, a database, a
/// simulation.
fn stripes(i: usize) -> Image {
    let (angle, width) = (i as f64 * 0.7, 2.0 + (i % 5) as f64);
    let is_stripe = |x: usize, y: usize| ((x as f64 * angle.cos() + y as f64 * angle.sin()) / width).sin() > 0.0;
    let color = [60 + (i * 37 % 160) as u8, 60 + (i * 91 % 160) as u8, 60 + (i * 53 % 160) as u8];
    let pixel = |p: usize| if is_stripe(p % 40, p / 40) { color } else { [230; 3] };
    Image { height: 40, width: 40, channels: 3, pixels: (0..1600).flat_map(pixel).collect() }
}

/// Sensor noise, as a custom augmentation.
fn noise(view: &mut View, rng: &mut ChaCha8Rng) {
    for value in &mut view.pixels {
        *value += 0.02 * normal(rng) as f32;
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = args().nth(1).ok_or("usage: own_data FOLDER")?;
    let images = (0..512).map(stripes).collect();
    let recipe = Recipe::named("cifar10")?
        .epochs(10)
        .with("encoder.width", 0.125)?
        .with("heads.hidden", 256)?
        .with("train.batch", 64)?;
    // Color is arbitrary here, so views may change it freely. Direction is not, so views never
    // flip.
    let policy = Policy { flip: 0.0, jitter: 1.0, gray: 0.5, blur: 0.0, area: [0.3, 1.0], ..Policy::default() };
    let encoder = Pretraining::new(Dataset::from_images(images, None))
        .recipe(recipe)
        .policies(policy.clone(), policy)
        .augmentation(noise)
        .on_event(|event| {
            if let Event::Epoch { .. } = event {
                println!("{event}");
            }
        })
        .run(&folder)?;
    println!("{} features per image, saved in {folder}/encoder.safetensors", encoder.features());
    Ok(())
}

//! Loads an encoder and embeds an image: `cargo run --release --example embed -- encoder.safetensors photo.jpg`.

use std::{env::args, error::Error, path::Path};

use byol::{
    data::decode,
    device::{self, Choice},
    nn::weights,
    views::evaluation_view,
};

fn main() -> Result<(), Box<dyn Error>> {
    let (Some(encoder), Some(image)) = (args().nth(1), args().nth(2)) else {
        return Err("usage: embed ENCODER IMAGE".into());
    };
    let encoder = weights::load(Path::new(&encoder), &device::open(Choice::Auto)?.device)?;
    let view = evaluation_view(&decode::file(Path::new(&image))?, encoder.spec.size, encoder.spec.center);
    let features = encoder.embed_one(&view.interleaved());
    println!("{} numbers: {:?} …", features.len(), &features[..4.min(features.len())]);
    Ok(())
}

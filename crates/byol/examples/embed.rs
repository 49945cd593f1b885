//! Embeds an image: `cargo run --release -p byol --example embed -- ENCODER IMAGE`.

use std::{env::args, error::Error};

use byol::Encoder;

fn main() -> Result<(), Box<dyn Error>> {
    let (Some(encoder), Some(image)) = (args().nth(1), args().nth(2)) else {
        return Err("usage: embed ENCODER IMAGE".into());
    };
    let features = Encoder::open(encoder)?.embed_image(image)?;
    println!("{} features: {:?} …", features.len(), &features[..4.min(features.len())]);
    Ok(())
}

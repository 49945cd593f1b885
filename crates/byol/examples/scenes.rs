//! Generates procedural rooms with known depth, for `byol eval depth`:
//! `cargo run --release -p byol --example scenes -- FOLDER [N]`.

use std::{error::Error, fs, path::Path};

use byol::data::synthetic::scene;
use image::{ImageBuffer, Luma, RgbImage};

const HEIGHT: usize = 120;
const WIDTH: usize = 160;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("usage: scenes FOLDER [N]")?;
    let n: u64 = args.next().map_or(Ok(400), |n| n.parse())?;
    for i in 0..n {
        // Every fifth scene is a test scene.
        let split = if i % 5 == 4 { "test" } else { "train" };
        let (image, meters) = scene(0, i, HEIGHT, WIDTH);
        let rgb = RgbImage::from_raw(WIDTH as u32, HEIGHT as u32, image.pixels.into_u8()).ok_or("wrong image size")?;
        let millimeters: Vec<u16> = meters.iter().map(|m| (1000.0 * m).round() as u16).collect();
        let depth = ImageBuffer::<Luma<u16>, _>::from_raw(WIDTH as u32, HEIGHT as u32, millimeters)
            .ok_or("wrong depth map size")?;
        let path = |kind: &str| -> std::io::Result<_> {
            let folder = Path::new(&folder).join(kind).join(split);
            fs::create_dir_all(&folder)?;
            Ok(folder.join(format!("{i:04}.png")))
        };
        rgb.save(path("images")?)?;
        depth.save(path("depth")?)?;
    }
    Ok(())
}

//! Writes procedural rooms whose depth is known, for `byol eval depth`: `cargo run --release -p byol --example scenes -- FOLDER [N]`.

use std::{error::Error, fs, path::Path};

use byol::data::synthetic::scene;
use image::{ImageBuffer, Luma, RgbImage};

const HEIGHT: usize = 120;
const WIDTH: usize = 160;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("scenes FOLDER [N]: give a folder to write into")?;
    let n: u64 = args.next().map_or(Ok(400), |n| n.parse())?;
    for i in 0..n {
        // Every fifth is for tests.
        let split = if i % 5 == 4 { "test" } else { "train" };
        let (image, metres) = scene(0, i, HEIGHT, WIDTH);
        let picture = RgbImage::from_raw(WIDTH as u32, HEIGHT as u32, image.pixels).ok_or("a scene has its size")?;
        let millimetres: Vec<u16> = metres.iter().map(|m| (1000.0 * m).round() as u16).collect();
        let depth = ImageBuffer::<Luma<u16>, _>::from_raw(WIDTH as u32, HEIGHT as u32, millimetres)
            .ok_or("so has its depth")?;
        for (what, name) in [("images", format!("{i:04}.png")), ("depth", format!("{i:04}.png"))] {
            let path = Path::new(&folder).join(what).join(split);
            fs::create_dir_all(&path)?;
            if what == "images" { picture.save(path.join(name))? } else { depth.save(path.join(name))? }
        }
    }
    Ok(())
}

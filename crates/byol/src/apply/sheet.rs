//! Contact sheets: rows of tiles on white.

use image::{Rgb, RgbImage, imageops};

use crate::{data::Image, views::View};

/// Pixels between tiles.
const GAP: u32 = 8;

/// A square picture with a frame.
#[derive(Debug, Clone)]
pub struct Tile {
    pixels: RgbImage,
    frame: Option<[u8; 3]>,
}

/// The whole image, no side longer than `side` pixels.
pub fn fitted(image: &Image, side: u32) -> RgbImage {
    let whole = rgb(image.width, image.height, image.channels, |i| image.pixels[i]);
    let scale = f64::from(side) / image.width.max(image.height) as f64;
    let fit = |n: usize| ((n as f64 * scale).round() as u32).clamp(1, side);
    // Enlarged without smoothing, so that pixels stay visible.
    let filter = if scale >= 1.0 { imageops::FilterType::Nearest } else { imageops::FilterType::Triangle };
    imageops::resize(&whole, fit(image.width), fit(image.height), filter)
}

impl Tile {
    /// The whole image, fitted into a square of `side` pixels on grey.
    pub fn image(image: &Image, side: u32) -> Tile {
        let mut tile = RgbImage::from_pixel(side, side, Rgb([230; 3]));
        let small = fitted(image, side);
        imageops::replace(
            &mut tile,
            &small,
            i64::from((side - small.width()) / 2),
            i64::from((side - small.height()) / 2),
        );
        Tile { pixels: tile, frame: None }
    }

    /// A view, enlarged to `side` pixels.
    pub fn view(view: &View, side: u32) -> Tile {
        let values = view.interleaved();
        let whole = rgb(view.width, view.height, view.channels, |i| (values[i] * 255.0).round() as u8);
        Tile { pixels: imageops::resize(&whole, side, side, imageops::FilterType::Nearest), frame: None }
    }

    /// With a frame of this colour.
    pub fn framed(self, colour: [u8; 3]) -> Tile {
        Tile { frame: Some(colour), ..self }
    }
}

/// An RGB picture of interleaved values; other numbers of channels show the first as grey.
fn rgb(width: usize, height: usize, channels: usize, value: impl Fn(usize) -> u8) -> RgbImage {
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let at = (y as usize * width + x as usize) * channels;
        Rgb(if channels == 3 { [value(at), value(at + 1), value(at + 2)] } else { [value(at); 3] })
    })
}

/// The rows as one PNG file's bytes. Every tile has side `side`.
pub fn png(rows: &[Vec<Tile>], side: u32) -> Vec<u8> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let length = |n: u32| n * (side + GAP) + GAP;
    let mut sheet = RgbImage::from_pixel(length(columns), length(rows.len() as u32), Rgb([255; 3]));
    for (y, row) in rows.iter().enumerate() {
        for (x, tile) in row.iter().enumerate() {
            let (left, top) = (length(x as u32), length(y as u32));
            if let Some(colour) = tile.frame {
                let half = GAP / 2;
                let frame = RgbImage::from_pixel(side + GAP, side + GAP, Rgb(colour));
                imageops::replace(&mut sheet, &frame, i64::from(left - half), i64::from(top - half));
            }
            imageops::replace(&mut sheet, &tile.pixels, i64::from(left), i64::from(top));
        }
    }
    let mut bytes = std::io::Cursor::new(Vec::new());
    sheet.write_to(&mut bytes, image::ImageFormat::Png).expect("writing to memory does not fail");
    bytes.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sheet_has_the_size_of_its_tiles() {
        let image = Image { height: 1, width: 5, channels: 3, pixels: vec![9; 15] };
        let row = vec![Tile::image(&image, 16), Tile::image(&image, 16).framed([0, 200, 0])];
        let sheet = image::load_from_memory(&png(&[row.clone(), row, vec![]], 16)).unwrap();
        assert_eq!((sheet.width(), sheet.height()), (2 * 24 + 8, 3 * 24 + 8));
    }
}

//! Contact sheets: rows of tiles on a white background.

use image::{Rgb, RgbImage, imageops};

use crate::{image::Image, views::View};

/// Space between tiles in pixels.
const GAP: u32 = 8;

/// A square picture, optionally with a frame.
#[derive(Debug, Clone)]
pub struct Tile {
    pixels: RgbImage,
    frame: Option<[u8; 3]>,
}

/// Resizes an image so that its longer side has `side` pixels.
pub fn resize_to_fit(image: &Image, side: u32) -> RgbImage {
    let pixels = rgb(image.width, image.height, image.channels, |i| image.pixels[i]);
    let scale = f64::from(side) / image.width.max(image.height) as f64;
    let fit = |n: usize| ((n as f64 * scale).round() as u32).clamp(1, side);
    // Small images are enlarged without smoothing, so that their pixels stay visible.
    let filter = if scale >= 1.0 { imageops::FilterType::Nearest } else { imageops::FilterType::Triangle };
    imageops::resize(&pixels, fit(image.width), fit(image.height), filter)
}

impl Tile {
    /// A whole image, centered on a gray square of `side` × `side` pixels.
    pub fn image(image: &Image, side: u32) -> Tile {
        let mut tile = RgbImage::from_pixel(side, side, Rgb([230; 3]));
        let resized = resize_to_fit(image, side);
        imageops::replace(
            &mut tile,
            &resized,
            i64::from((side - resized.width()) / 2),
            i64::from((side - resized.height()) / 2),
        );
        Tile { pixels: tile, frame: None }
    }

    /// An empty place in a row.
    pub fn blank(side: u32) -> Tile {
        Tile { pixels: RgbImage::from_pixel(side, side, Rgb([255; 3])), frame: None }
    }

    /// A view, enlarged to `side` × `side` pixels.
    pub fn view(view: &View, side: u32) -> Tile {
        let values = view.interleaved();
        let pixels = rgb(view.width, view.height, view.channels, |i| (values[i] * 255.0).round() as u8);
        Tile { pixels: imageops::resize(&pixels, side, side, imageops::FilterType::Nearest), frame: None }
    }

    /// Returns the tile with a frame of an RGB color.
    pub fn framed(self, color: [u8; 3]) -> Tile {
        Tile { frame: Some(color), ..self }
    }
}

/// Builds an RGB picture from interleaved values. Unless there are three channels, only the first
/// is shown, in gray.
fn rgb(width: usize, height: usize, channels: usize, value: impl Fn(usize) -> u8) -> RgbImage {
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let i = (y as usize * width + x as usize) * channels;
        Rgb(if channels == 3 { [value(i), value(i + 1), value(i + 2)] } else { [value(i); 3] })
    })
}

/// Width and height of a picture of `rows` in pixels.
pub fn size(rows: &[Vec<Tile>], side: u32) -> [u32; 2] {
    [rows.iter().map(Vec::len).max().unwrap_or(0), rows.len()].map(|n| n as u32 * (side + GAP) + GAP)
}

/// Encodes rows of tiles, each of `side` × `side` pixels, as a PNG.
pub fn png(rows: &[Vec<Tile>], side: u32) -> Vec<u8> {
    let offset = |n: u32| n * (side + GAP) + GAP;
    let [width, height] = size(rows, side);
    let mut sheet = RgbImage::from_pixel(width, height, Rgb([255; 3]));
    for (y, row) in rows.iter().enumerate() {
        for (x, tile) in row.iter().enumerate() {
            let (left, top) = (offset(x as u32), offset(y as u32));
            if let Some(color) = tile.frame {
                let width = GAP / 2;
                let frame = RgbImage::from_pixel(side + GAP, side + GAP, Rgb(color));
                imageops::replace(&mut sheet, &frame, i64::from(left - width), i64::from(top - width));
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
    fn sheet_size_follows_from_its_tiles() {
        let image = Image { height: 1, width: 5, channels: 3, pixels: vec![9; 15] };
        let row = vec![Tile::image(&image, 16), Tile::image(&image, 16).framed([0, 200, 0])];
        let rows = [row.clone(), row, vec![]];
        let sheet = image::load_from_memory(&png(&rows, 16)).unwrap();
        assert_eq!([sheet.width(), sheet.height()], [2 * 24 + 8, 3 * 24 + 8]);
        assert_eq!(size(&rows, 16), [2 * 24 + 8, 3 * 24 + 8]);
    }
}

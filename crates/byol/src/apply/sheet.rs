//! Contact sheets: rows of tiles on a white background.

use image::{Rgb, RgbImage, imageops};

use crate::{
    image::{Image, shown_channels},
    views::View,
};

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
    let pixels = RgbImage::from_raw(image.width as u32, image.height as u32, image.to_rgb8().into_owned())
        .expect("three values per pixel");
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

    /// One channel of an image, in gray.
    pub fn channel(image: &Image, channel: usize, side: u32) -> Tile {
        let values = image.pixels.to_u8();
        let pixels = values.chunks_exact(image.channels).map(|pixel| pixel[channel]).collect();
        Tile::image(&Image { height: image.height, width: image.width, channels: 1, pixels }, side)
    }

    /// An empty place in a row.
    pub fn blank(side: u32) -> Tile {
        Tile { pixels: RgbImage::from_pixel(side, side, Rgb([255; 3])), frame: None }
    }

    /// A view, enlarged to `side` × `side` pixels.
    pub fn view(view: &View, side: u32) -> Tile {
        let rgb = shown_channels(view.channels).map(|c| &view.pixels[c * view.height * view.width..]);
        let pixels = RgbImage::from_fn(view.width as u32, view.height as u32, |x, y| {
            Rgb(rgb.map(|plane| (plane[y as usize * view.width + x as usize] * 255.0).round() as u8))
        });
        Tile { pixels: imageops::resize(&pixels, side, side, imageops::FilterType::Nearest), frame: None }
    }

    /// Returns the tile with a frame of an RGB color.
    pub fn framed(self, color: [u8; 3]) -> Tile {
        Tile { frame: Some(color), ..self }
    }
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
        let image = Image { height: 1, width: 5, channels: 3, pixels: vec![9u8; 15].into() };
        let row = vec![Tile::image(&image, 16), Tile::image(&image, 16).framed([0, 200, 0])];
        let rows = [row.clone(), row, vec![]];
        let sheet = image::load_from_memory(&png(&rows, 16)).unwrap();
        assert_eq!([sheet.width(), sheet.height()], [2 * 24 + 8, 3 * 24 + 8]);
        assert_eq!(size(&rows, 16), [2 * 24 + 8, 3 * 24 + 8]);
    }
}

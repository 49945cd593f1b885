//! Bytes to RGB. Every part of a file must decode: one that is cut off, or broken in the middle, is refused whole.
//!
//! Grey is repeated; an alpha channel is dropped, as Pillow's `convert("RGB")` drops it; CMYK and palettes are converted; 16 bits become 8 by
//! their upper half; of an animation the first frame counts; the EXIF orientation is applied.

use std::{fs, io, io::Cursor, path::Path};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, metadata::Orientation};
use zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions};
use zune_jpeg::JpegDecoder;

use super::{CHANNELS, Image};
use crate::guarded::guarded;

/// Images of more pixels are refused before anything is allocated: 2^27, about 134 million.
pub const MOST_PIXELS: usize = 1 << 27;

/// Why a file is not an image that can be used.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The file cannot be read.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// No bytes.
    #[error("the file is empty")]
    Empty,
    /// None of the formats.
    #[error("not a JPEG, PNG, WebP, BMP, GIF or TIFF file, whatever its name says")]
    NotAnImage,
    /// More than [`MOST_PIXELS`].
    #[error("{width} x {height} pixels are more than the {} million allowed", MOST_PIXELS / 1_000_000)]
    TooLarge {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// Cut off or broken.
    #[error("{format} data is cut off or broken: {reason}")]
    Broken {
        /// Which format.
        format: &'static str,
        /// What the decoder said.
        reason: String,
    },
}

/// Reads and decodes a file.
///
/// # Errors
/// Any [`DecodeError`].
pub fn file(path: &Path) -> Result<Image, DecodeError> {
    bytes(&fs::read(path)?)
}

/// Decodes a whole file's bytes; the format is taken from the content, not from a name.
///
/// # Errors
/// Any but [`DecodeError::Read`].
pub fn bytes(bytes: &[u8]) -> Result<Image, DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    // A decoder that panics at broken data says no more than that they are broken.
    guarded(|| of_format(bytes)).unwrap_or_else(|reason| Err(DecodeError::Broken { format: "image", reason }))
}

fn of_format(bytes: &[u8]) -> Result<Image, DecodeError> {
    match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => jpeg(bytes),
        Ok(ImageFormat::Png) => other(bytes, ImageFormat::Png, "PNG"),
        Ok(ImageFormat::WebP) => other(bytes, ImageFormat::WebP, "WebP"),
        Ok(ImageFormat::Bmp) => other(bytes, ImageFormat::Bmp, "BMP"),
        Ok(ImageFormat::Gif) => other(bytes, ImageFormat::Gif, "GIF"),
        Ok(ImageFormat::Tiff) => other(bytes, ImageFormat::Tiff, "TIFF"),
        _ => Err(DecodeError::NotAnImage),
    }
}

/// Whether these first bytes of a file are those of a format we read.
pub fn looks_like_an_image(head: &[u8]) -> bool {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    matches!(image::guess_format(head), Ok(Jpeg | Png | WebP | Bmp | Gif | Tiff))
}

pub(super) fn check_size(width: usize, height: usize) -> Result<(), DecodeError> {
    match width.checked_mul(height) {
        Some(pixels) if pixels <= MOST_PIXELS => Ok(()),
        _ => Err(DecodeError::TooLarge { width, height }),
    }
}

fn jpeg(bytes: &[u8]) -> Result<Image, DecodeError> {
    let broken = |reason: String| DecodeError::Broken { format: "JPEG", reason };
    // Strict: the decoder fills what is missing with grey otherwise.
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| broken(e.to_string()))?;
    let (width, height) = decoder.dimensions().ok_or_else(|| broken("no size".into()))?;
    check_size(width, height)?;
    if !ends(bytes) {
        return Err(broken("no end marker".into()));
    }
    // The decoder turns grey, YCbCr, CMYK and YCCK alike into RGB.
    decoder.set_options(options.jpeg_set_out_colorspace(ColorSpace::RGB));
    let pixels = decoder.decode().map_err(|e| broken(e.to_string()))?;
    let orientation = decoder.exif().and_then(|chunk| Orientation::from_exif_chunk(chunk));
    let rgb = image::RgbImage::from_raw(width as u32, height as u32, pixels)
        .ok_or_else(|| broken("fewer pixels than it says".into()))?;
    Ok(oriented(rgb.into(), orientation))
}

/// Whether an end-of-image marker follows the last start of a scan. Inside a scan every 0xFF is followed by 0 or a restart marker, so
/// the marker cannot appear in it by chance; a file cut off in its pixels has none, though some decoders would fill the rest.
fn ends(bytes: &[u8]) -> bool {
    let mut at = bytes.len();
    while let Some(found) = bytes[..at].iter().rposition(|b| *b == 0xFF) {
        match bytes.get(found + 1) {
            Some(0xD9) => return true,
            Some(0xDA) => return false,
            _ => at = found,
        }
    }
    false
}

fn other(bytes: &[u8], format: ImageFormat, name: &'static str) -> Result<Image, DecodeError> {
    let broken = |reason: String| DecodeError::Broken { format: name, reason };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    // Eight bytes a pixel: the deepest format, 16-bit RGBA. Some decoders need as much again for themselves.
    limits.max_alloc = Some(2 * 8 * MOST_PIXELS as u64);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|e| broken(e.to_string()))?;
    let (width, height) = decoder.dimensions();
    check_size(width as usize, height as usize)?;
    let orientation = decoder.orientation().ok();
    let image = DynamicImage::from_decoder(decoder).map_err(|e| broken(e.to_string()))?;
    Ok(oriented(image, orientation))
}

fn oriented(mut image: DynamicImage, orientation: Option<Orientation>) -> Image {
    image.apply_orientation(orientation.unwrap_or(Orientation::NoTransforms));
    let rgb = image.into_rgb8();
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    Image { height, width, channels: CHANNELS, pixels: rgb.into_raw() }
}

//! Image decoding to RGB. A file must decode completely: one that is truncated or damaged is
//! refused.
//!
//! Gray values are repeated. An alpha channel is dropped, as by Pillow's `convert("RGB")`. CMYK and
//! palettes are converted. Of 16-bit values the upper 8 bits are kept, of an animation the first
//! frame. The EXIF orientation is applied.

use std::{fs, io, io::Cursor, path::Path};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, metadata::Orientation};
use zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions};
use zune_jpeg::JpegDecoder;

use super::{CHANNELS, Image};
use crate::catch_panic::catch_panic;

/// Maximum number of pixels, checked before allocation: 2^27, about 134 million.
pub const MAX_PIXELS: usize = 1 << 27;

/// Reason that an image cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Unreadable file.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// Empty file.
    #[error("the file is empty")]
    Empty,
    /// Unknown format.
    #[error("not a JPEG, PNG, WebP, BMP, GIF or TIFF file")]
    NotAnImage,
    /// More than [`MAX_PIXELS`] pixels.
    #[error("{width} x {height} pixels exceed the limit of {} million", MAX_PIXELS / 1_000_000)]
    TooLarge {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// Truncated or damaged data.
    #[error("{format} data is truncated or damaged: {reason}")]
    Broken {
        /// Format.
        format: &'static str,
        /// Message of the decoder.
        reason: String,
    },
    /// Valid data of an unsupported kind.
    #[error("unsupported {kind}: {reason}")]
    Unsupported {
        /// Kind of label map.
        kind: &'static str,
        /// Supported kinds, or the first problem.
        reason: &'static str,
    },
}

/// Reads and decodes a file.
///
/// # Errors
/// Any [`DecodeError`].
pub fn file(path: &Path) -> Result<Image, DecodeError> {
    bytes(&fs::read(path)?)
}

/// Decodes the bytes of a file. The format is detected from the content, not from a name.
///
/// # Errors
/// Any but [`DecodeError::Read`].
pub fn bytes(bytes: &[u8]) -> Result<Image, DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    // Some decoders panic on damaged data.
    catch_panic(|| decode(bytes)).unwrap_or_else(|reason| Err(DecodeError::Broken { format: "image", reason }))
}

fn decode(bytes: &[u8]) -> Result<Image, DecodeError> {
    match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => jpeg(bytes),
        Ok(ImageFormat::Png) => with_image_crate(bytes, ImageFormat::Png, "PNG"),
        Ok(ImageFormat::WebP) => with_image_crate(bytes, ImageFormat::WebP, "WebP"),
        Ok(ImageFormat::Bmp) => with_image_crate(bytes, ImageFormat::Bmp, "BMP"),
        Ok(ImageFormat::Gif) => with_image_crate(bytes, ImageFormat::Gif, "GIF"),
        Ok(ImageFormat::Tiff) => with_image_crate(bytes, ImageFormat::Tiff, "TIFF"),
        _ => Err(DecodeError::NotAnImage),
    }
}

/// True if these first bytes of a file are those of a supported format.
pub(crate) fn is_supported(head: &[u8]) -> bool {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    matches!(image::guess_format(head), Ok(Jpeg | Png | WebP | Bmp | Gif | Tiff))
}

/// Checks the number of pixels against [`MAX_PIXELS`].
pub(super) fn check_size(width: usize, height: usize) -> Result<(), DecodeError> {
    match width.checked_mul(height) {
        Some(pixels) if pixels <= MAX_PIXELS => Ok(()),
        _ => Err(DecodeError::TooLarge { width, height }),
    }
}

fn jpeg(bytes: &[u8]) -> Result<Image, DecodeError> {
    let broken = |reason: String| DecodeError::Broken { format: "JPEG", reason };
    // Strict mode: otherwise the decoder fills missing data with gray.
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| broken(e.to_string()))?;
    let (width, height) = decoder.dimensions().ok_or_else(|| broken("missing dimensions".into()))?;
    check_size(width, height)?;
    if !has_end_marker(bytes) {
        return Err(broken("missing end marker".into()));
    }
    // The decoder converts gray, YCbCr, CMYK and YCCK to RGB.
    decoder.set_options(options.jpeg_set_out_colorspace(ColorSpace::RGB));
    let pixels = decoder.decode().map_err(|e| broken(e.to_string()))?;
    let orientation = decoder.exif().and_then(|chunk| Orientation::from_exif_chunk(chunk));
    let rgb = image::RgbImage::from_raw(width as u32, height as u32, pixels)
        .ok_or_else(|| broken("fewer pixels than declared".into()))?;
    Ok(oriented(rgb.into(), orientation))
}

/// True if an end-of-image marker follows the last start of a scan.
///
/// Inside a scan every 0xFF is followed by 0 or a restart marker, so the marker cannot appear there
/// by chance. A file truncated in its pixels has none, although some decoders would fill the rest.
fn has_end_marker(bytes: &[u8]) -> bool {
    let mut end = bytes.len();
    while let Some(marker) = bytes[..end].iter().rposition(|b| *b == 0xFF) {
        match bytes.get(marker + 1) {
            Some(0xD9) => return true,
            Some(0xDA) => return false,
            _ => end = marker,
        }
    }
    false
}

fn with_image_crate(bytes: &[u8], format: ImageFormat, name: &'static str) -> Result<Image, DecodeError> {
    let broken = |reason: String| DecodeError::Broken { format: name, reason };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    // Eight bytes per pixel for the deepest format, 16-bit RGBA, and as much again for the decoder.
    limits.max_alloc = Some(2 * 8 * MAX_PIXELS as u64);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|e| broken(e.to_string()))?;
    let (width, height) = decoder.dimensions();
    check_size(width as usize, height as usize)?;
    let orientation = decoder.orientation().ok();
    let image = DynamicImage::from_decoder(decoder).map_err(|e| broken(e.to_string()))?;
    Ok(oriented(image, orientation))
}

/// Applies the orientation and converts to RGB.
fn oriented(mut image: DynamicImage, orientation: Option<Orientation>) -> Image {
    image.apply_orientation(orientation.unwrap_or(Orientation::NoTransforms));
    let rgb = image.into_rgb8();
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    Image { height, width, channels: CHANNELS, pixels: rgb.into_raw() }
}

//! Image decoding to RGB, or with all channels of a file (`decode/channels.rs`). A file must decode
//! completely: one that is truncated or damaged is refused.
//!
//! Gray values are repeated. An alpha channel is dropped, as by Pillow's `convert("RGB")`. CMYK and
//! palettes are converted. Values of more than 8 bits are mapped from [`Levels`] to 0..=255. Of an
//! animation or of several pages the first is read. The EXIF orientation is applied.

pub(super) mod channels;
mod jpeg;
pub(crate) mod log_mel;
pub(crate) mod npy;
pub(crate) mod sound;
mod stack;
mod tiff;
mod unread;

use std::{
    fs,
    io::{self, Cursor, Read, Seek},
    path::Path,
};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, metadata::Orientation};

pub use self::sound::MAX_SAMPLES;
pub(crate) use self::unread::unread_content;
pub(crate) use self::unread::unread_format;
use super::{
    CHANNELS, Image, Levels, MAX_CHANNELS,
    file_pattern::FilePattern,
    levels::{Channels, Range, SampleKind},
};
use crate::catch_panic::catch_panic;

/// Maximum number of pixels, checked before allocation: 2^27, about 134 million.
pub const MAX_PIXELS: usize = 1 << 27;

/// Maximum number of values of all files or pages of an image.
const MAX_VALUES: usize = 4 * MAX_PIXELS;

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
    #[error("not a JPEG, PNG, WebP, BMP, GIF, TIFF or NumPy file")]
    NotAnImage,
    /// Image format that is not read.
    #[error("{} image, a format that byol does not read", unread::with_article(.0))]
    UnreadFormat(&'static str),
    /// Valid data of a kind that is not read.
    #[error("a kind of {format} that byol does not read ({reason})")]
    UnreadKind {
        /// Format.
        format: &'static str,
        /// Unread feature.
        reason: String,
    },
    /// More channels than [`MAX_CHANNELS`].
    #[error("it has {0} channels, more than {MAX_CHANNELS}\nhint: choose some with `--channels 1,2,...`")]
    TooManyChannels(usize),
    /// More channels than [`MAX_CHANNELS`] in all files or pages of an image.
    #[error("its files or pages have {0} channels, more than {MAX_CHANNELS}")]
    TooManyJoined(usize),
    /// More than 536 million values in all files or pages of an image.
    #[error("its channels have more than {} million values", MAX_VALUES / 1_000_000)]
    TooManyValues,
    /// Another number of channels than the other images.
    #[error("it has {found} channel{}, not {expected}", plural(*found))]
    WrongChannels {
        /// Channels of this image.
        found: usize,
        /// Channels of the data set or of the encoder.
        expected: usize,
    },
    /// A chosen channel that the image does not have.
    #[error("it has {found} channel{} and no channel {missing}", plural(*found))]
    MissingChannel {
        /// Channels of this image.
        found: usize,
        /// Number of the missing channel, from 1.
        missing: usize,
    },
    /// A file that does not exist, of an image that has several.
    #[error("its file {0} does not exist")]
    MissingFile(String),
    /// A file of an image that has several.
    #[error("{name}: {source}")]
    File {
        /// Name of the file.
        name: String,
        /// Reason that it cannot be decoded.
        source: Box<DecodeError>,
    },
    /// A file whose name does not have the pattern of the first file of an image.
    #[error("its name does not match `{0}`")]
    OtherName(FilePattern),
    /// NaN or infinite values.
    #[error("it contains NaN or infinite values")]
    NotFinite,
    /// A value below black or above white.
    #[error(
        "the value {value} {} {level}\nhint: choose other levels with `--levels`",
        if *is_white { "exceeds white," } else { "is below black," }
    )]
    OutsideLevels {
        /// First such value.
        value: f32,
        /// The level that it is beyond.
        level: f32,
        /// True if that level is white.
        is_white: bool,
    },
    /// Values that do not tell black and white, in an image by itself.
    #[error("cannot detect the black and white levels: {0}\nhint: choose them with `--levels`")]
    UnknownLevels(String),
    /// A sound, in a set of images.
    #[error("{} file, which is a sound", unread::with_article(.0))]
    Sound(&'static str),
    /// Not a sound, in a set of sounds.
    #[error("not a WAV, FLAC, Ogg Vorbis or MP3 file")]
    NotASound,
    /// A sound with an encoding that is not read.
    #[error("a kind of {format} file that byol does not read ({reason})\nhint: convert it to WAV or FLAC")]
    UnreadSound {
        /// Format of the file.
        format: &'static str,
        /// Unread feature.
        reason: String,
    },
    /// A sound without samples.
    #[error("the sound is empty: it has no samples")]
    NoSamples,
    /// A sound of more than [`MAX_SAMPLES`].
    #[error(
        "it has more than {} million samples per channel, 10 minutes at 48 kHz\nhint: cut it into clips",
        MAX_SAMPLES / 1_000_000
    )]
    TooLong,
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
pub fn file(path: &Path, levels: &Levels) -> Result<Image, DecodeError> {
    match &levels.channels {
        Some(channels) if !channels.files.is_empty() => {
            without_panics(|| channels::image(channels::read_files(path, channels)?, channels))
        }
        _ => bytes(&fs::read(path)?, levels),
    }
}

/// Decodes the bytes of a file. The format is detected from the content, not from a name.
///
/// `levels` apply to images of more than 8 bits. Where they are not set, those of this image alone
/// are used.
///
/// # Errors
/// Any but [`DecodeError::Read`].
pub fn bytes(bytes: &[u8], levels: &Levels) -> Result<Image, DecodeError> {
    without_panics(|| match (&levels.channels, &levels.sound) {
        (Some(channels), _) => channels::image(channels::read(bytes, channels)?, channels),
        (None, Some(sound)) => sound::decode(bytes, sound),
        (None, None) => decode(bytes)?.into_image(levels),
    })
}

/// Maps the values of a decoded image as those of a file: of all its channels, to the ranges of an
/// encoder. RGB images stay as they are.
///
/// # Errors
/// [`DecodeError::WrongChannels`], [`DecodeError::MissingChannel`], [`DecodeError::OutsideLevels`].
pub fn values(image: Image, levels: &Levels) -> Result<Image, DecodeError> {
    match &levels.channels {
        Some(channels) => stack::Stack::from(image).select(channels)?.into_image(channels),
        None => Ok(image),
    }
}

/// Some values of each channel of an image, and whether they have 8 bits.
///
/// # Errors
/// Those of [`file`].
pub(super) fn sample_channels(encoded: Encoded, channels: &Channels) -> Result<(Vec<Vec<f32>>, bool), DecodeError> {
    without_panics(|| match encoded {
        Encoded::File(path) if !channels.files.is_empty() => channels::sample(&channels::read_files(path, channels)?),
        Encoded::File(path) => channels::sample(&channels::read(&fs::read(path)?, channels)?),
        Encoded::Bytes(bytes) => channels::sample(&channels::read(bytes, channels)?),
    })
}

/// An encoded image.
pub(super) enum Encoded<'a> {
    File(&'a Path),
    Bytes(&'a [u8]),
}

/// Sample rate of a sound.
///
/// # Errors
/// Those of [`bytes`].
pub(super) fn sound_rate(bytes: &[u8]) -> Result<u32, DecodeError> {
    without_panics(|| sound::rate(bytes))
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// Range of the values of an image of more than 8 bits; `None` for other images.
///
/// # Errors
/// Those of [`bytes`].
pub(super) fn range(bytes: &[u8]) -> Result<Option<Range>, DecodeError> {
    without_panics(|| decode(bytes)?.range())
}

/// Kind of an image, if it has more than 8 bits, from its header. `None` if it is damaged.
///
/// # Errors
/// I/O errors.
pub(super) fn kind(mut reader: impl Read + Seek) -> io::Result<Option<SampleKind>> {
    let mut head = Vec::with_capacity(HEAD);
    reader.by_ref().take(HEAD as u64).read_to_end(&mut head)?;
    if head.starts_with(b"\x89PNG\r\n\x1a\n") {
        // The first chunk of a PNG has the bits per sample behind the width and the height.
        return Ok((head.get(24) == Some(&16)).then_some(SampleKind::Int16));
    }
    if npy::is_npy(&head) {
        reader.take(npy::MAX_HEADER as u64).read_to_end(&mut head)?;
        return Ok(npy::kind(&head));
    }
    if !tiff::is_tiff(&head) {
        return Ok(None);
    }
    reader.rewind()?;
    catch_panic(|| tiff::kind(reader)).unwrap_or(Ok(None))
}

/// Bytes at the start of a file that tell its format, and of a PNG its depth.
const HEAD: usize = 32;

/// Runs a decoder. Some panic on damaged data.
fn without_panics<T>(decode: impl FnOnce() -> Result<T, DecodeError>) -> Result<T, DecodeError> {
    catch_panic(decode).unwrap_or_else(|reason| Err(DecodeError::Broken { format: "image", reason }))
}

/// Format of a file that starts with these bytes, if it is read.
pub(super) fn guess_format(head: &[u8]) -> Option<ImageFormat> {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    if unread_content(&head[..head.len().min(HEAD)]).is_some() {
        return None;
    }
    // The image crate does not recognize BigTIFF.
    if tiff::is_tiff(head) {
        return Some(Tiff);
    }
    image::guess_format(head).ok().filter(|format| matches!(format, Jpeg | Png | WebP | Bmp | Gif | Tiff))
}

fn decode(bytes: &[u8]) -> Result<Raw, DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    if npy::is_npy(bytes) {
        return npy::read(bytes)?.try_into();
    }
    if let Some(format) = sound::format(bytes) {
        return Err(DecodeError::Sound(format));
    }
    match guess_format(bytes) {
        Some(ImageFormat::Jpeg) => jpeg::decode(bytes),
        Some(ImageFormat::Tiff) => tiff::decode(bytes),
        Some(ImageFormat::Png) => with_image_crate(bytes, ImageFormat::Png, "PNG"),
        Some(ImageFormat::WebP) => with_image_crate(bytes, ImageFormat::WebP, "WebP"),
        Some(ImageFormat::Bmp) => with_image_crate(bytes, ImageFormat::Bmp, "BMP"),
        Some(ImageFormat::Gif) => with_image_crate(bytes, ImageFormat::Gif, "GIF"),
        _ => {
            Err(unread_content(&bytes[..bytes.len().min(HEAD)])
                .map_or(DecodeError::NotAnImage, DecodeError::UnreadFormat))
        }
    }
}

/// True if these first bytes of a file are those of a supported format.
pub(crate) fn is_supported(head: &[u8]) -> bool {
    guess_format(head).is_some() || npy::is_image(head)
}

/// Checks the number of pixels against [`MAX_PIXELS`].
pub(super) fn check_size(width: usize, height: usize) -> Result<(), DecodeError> {
    match width.checked_mul(height) {
        Some(pixels) if pixels <= MAX_PIXELS => Ok(()),
        _ => Err(DecodeError::TooLarge { width, height }),
    }
}

fn with_image_crate(bytes: &[u8], format: ImageFormat, name: &'static str) -> Result<Raw, DecodeError> {
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
    Ok(Raw { image, white_is_zero: false, orientation })
}

/// A decoded image before it is converted to 8-bit RGB.
struct Raw {
    image: DynamicImage,
    /// True if small values are bright, in images of more than 8 bits.
    white_is_zero: bool,
    orientation: Option<Orientation>,
}

/// Values of an image of more than 8 bits, with the number of channels.
enum Deep<'a> {
    Int16(&'a [u16], usize),
    Float(&'a [f32], usize),
}

impl Raw {
    fn deep(&self) -> Option<Deep<'_>> {
        Some(match &self.image {
            DynamicImage::ImageLuma16(image) => Deep::Int16(image, 1),
            DynamicImage::ImageLumaA16(image) => Deep::Int16(image, 2),
            DynamicImage::ImageRgb16(image) => Deep::Int16(image, 3),
            DynamicImage::ImageRgba16(image) => Deep::Int16(image, 4),
            DynamicImage::ImageRgb32F(image) => Deep::Float(image, 3),
            DynamicImage::ImageRgba32F(image) => Deep::Float(image, 4),
            _ => return None,
        })
    }

    /// Range of the values, without alpha; `None` for 8 bits.
    fn range(&self) -> Result<Option<Range>, DecodeError> {
        Ok(Some(match self.deep() {
            None => return Ok(None),
            Some(Deep::Int16(values, channels)) => {
                Range::new(SampleKind::Int16, colors(values, channels).map(f32::from))
            }
            Some(Deep::Float(values, channels)) => {
                if colors(values, channels).any(|v| !v.is_finite()) {
                    return Err(DecodeError::NotFinite);
                }
                Range::new(SampleKind::Float, colors(values, channels))
            }
        }))
    }

    /// Converts to 8-bit RGB and applies the orientation.
    fn into_image(self, levels: &Levels) -> Result<Image, DecodeError> {
        let mut image = match self.deep() {
            None => self.image,
            Some(deep) => {
                let kind = if matches!(deep, Deep::Int16(..)) { SampleKind::Int16 } else { SampleKind::Float };
                // Also refuses NaN.
                let range = if kind == SampleKind::Float || levels.get(kind).is_none() { self.range()? } else { None };
                let image_levels = match (levels.get(kind), range) {
                    (Some(levels), _) => levels,
                    (None, Some(range)) => range.levels().map_err(DecodeError::UnknownLevels)?,
                    (None, None) => [0.0, 65535.0],
                };
                let mut rgb: DynamicImage = match deep {
                    // Legacy mapping, so that encoders trained before levels existed see the same
                    // pixels.
                    Deep::Int16(..) if image_levels == [0.0, 65535.0] => self.image.into_rgb8().into(),
                    Deep::Float(..) if levels.is_legacy() => self.image.into_rgb8().into(),
                    Deep::Int16(values, channels) => self.map(colors(values, channels), image_levels, 0.0)?,
                    // Half a gray level beyond is rounded to black or white.
                    Deep::Float(values, channels) => self.map(colors(values, channels), image_levels, 0.5)?,
                };
                if self.white_is_zero {
                    rgb.invert();
                }
                rgb
            }
        };
        image.apply_orientation(self.orientation.unwrap_or(Orientation::NoTransforms));
        let rgb = image.into_rgb8();
        let (width, height) = (rgb.width() as usize, rgb.height() as usize);
        Ok(Image { height, width, channels: CHANNELS, pixels: rgb.into_raw().into() })
    }

    /// Maps `[black, white]` to 0..=255. Refuses values that are more than `slack` gray levels
    /// outside.
    fn map<T: Copy + Into<f64>>(
        &self,
        colors: impl Iterator<Item = T>,
        [black, white]: [f32; 2],
        slack: f64,
    ) -> Result<DynamicImage, DecodeError> {
        let [from, to] = [black, white].map(f64::from);
        let to_byte = |value: T| {
            let value: f64 = value.into();
            let gray = (value - from) * 255.0 / (to - from);
            if gray < -slack || gray > 255.0 + slack {
                let is_white = gray > 255.0;
                return Err(DecodeError::OutsideLevels {
                    value: value as f32,
                    level: if is_white { white } else { black },
                    is_white,
                });
            }
            // Conversion to an integer saturates.
            Ok(gray.round() as u8)
        };
        let pixels = colors.map(to_byte).collect::<Result<Vec<u8>, DecodeError>>()?;
        let (width, height) = (self.image.width(), self.image.height());
        let image = match self.image.color().has_color() {
            true => image::RgbImage::from_raw(width, height, pixels).map(DynamicImage::from),
            false => image::GrayImage::from_raw(width, height, pixels).map(DynamicImage::from),
        };
        image.ok_or(DecodeError::Broken { format: "image", reason: "fewer pixels than declared".into() })
    }
}

/// Values without those of alpha, the last of 2 or 4 channels.
fn colors<T: Copy>(values: &[T], channels: usize) -> impl Iterator<Item = T> {
    let n = if channels.is_multiple_of(2) { channels - 1 } else { channels };
    values.chunks_exact(channels).flat_map(move |pixel| &pixel[..n]).copied()
}

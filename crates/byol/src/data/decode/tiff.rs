//! TIFF and BigTIFF: the first image of a file, or all of them as channels.
//!
//! The `tiff` crate reads the samples. Everything that gives them a meaning (colors, palettes, the
//! order of bits, JPEG compression) is applied here, because the crate does it for some kinds only.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
    io::{self, Cursor, Read, Seek},
};

use image::{DynamicImage, GrayImage, RgbImage, metadata::Orientation};
use tiff::{
    TiffError,
    decoder::{Decoder, DecodingResult, Limits},
    tags::Tag,
};

use super::{
    DecodeError, MAX_PIXELS, Raw, check_size, jpeg,
    stack::{Samples, Stack, check_values},
};
use crate::{data::levels::SampleKind, image::MAX_CHANNELS};

// Numbers of tags.
const SUBFILE_TYPE: u16 = 254;
const WIDTH: u16 = 256;
const HEIGHT: u16 = 257;
const BITS: u16 = 258;
const COMPRESSION: u16 = 259;
const PHOTOMETRIC: u16 = 262;
const FILL_ORDER: u16 = 266;
const STRIP_OFFSETS: u16 = 273;
const ORIENTATION: u16 = 274;
const SAMPLES: u16 = 277;
const ROWS_PER_STRIP: u16 = 278;
const STRIP_LENGTHS: u16 = 279;
const PLANAR: u16 = 284;
const COLOR_MAP: u16 = 320;
const TILE_WIDTH: u16 = 322;
const TILE_HEIGHT: u16 = 323;
const TILE_OFFSETS: u16 = 324;
const TILE_LENGTHS: u16 = 325;
const SUB_IFDS: u16 = 330;
const INK_SET: u16 = 332;
const EXTRA_SAMPLES: u16 = 338;
const JPEG_TABLES: u16 = 347;
const SUBSAMPLING: u16 = 530;
const GDAL_NO_DATA: u16 = 42113;
const DNG_VERSION: u16 = 50706;

// Bits of the subfile type.
const REDUCED: u64 = 1;
const MASK: u64 = 4;

// Values of the compression tag.
const FAX4: u64 = 4;
const JPEG: u64 = 7;

// Values of the photometric interpretation.
const WHITE_IS_ZERO: u64 = 0;
const BLACK_IS_ZERO: u64 = 1;
const RGB: u64 = 2;
const PALETTE: u64 = 3;
const CMYK: u64 = 5;
const YCBCR: u64 = 6;
const COLOR_FILTER_ARRAY: u64 = 32803;
const LINEAR_RAW: u64 = 34892;

/// True if these are the first bytes of a TIFF or BigTIFF file.
pub(super) fn is_tiff(head: &[u8]) -> bool {
    [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"].iter().any(|start| head.starts_with(*start))
}

/// Kind of the first image, if it has more than 8 bits, from its header. `None` if it is damaged.
///
/// # Errors
/// I/O errors, except for the end of the file.
pub(super) fn kind(reader: impl Read + Seek) -> io::Result<Option<SampleKind>> {
    let mut decoder = match Decoder::new(reader) {
        Ok(decoder) => decoder,
        Err(TiffError::IoError(e)) if e.kind() != io::ErrorKind::UnexpectedEof => return Err(e),
        Err(_) => return Ok(None),
    };
    let mut first = |tag: Tag, default: u64| match decoder.find_tag_unsigned_vec::<u64>(tag) {
        Ok(values) => Ok(values.and_then(|values| values.first().copied()).unwrap_or(default)),
        Err(TiffError::IoError(e)) if e.kind() != io::ErrorKind::UnexpectedEof => Err(e),
        Err(_) => Ok(default),
    };
    let is_gray_or_rgb = first(Tag::PhotometricInterpretation, BLACK_IS_ZERO)? <= RGB;
    Ok(match (first(Tag::BitsPerSample, 1)?, first(Tag::SampleFormat, 1)?) {
        _ if !is_gray_or_rgb => None,
        (..=8, 1) => None,
        (..=16, 1) => Some(SampleKind::Int16),
        _ => Some(SampleKind::Float),
    })
}

/// Decodes the first image of a file.
pub(super) fn decode(bytes: &[u8]) -> Result<Raw, DecodeError> {
    let directory = Directory::first(bytes).ok_or_else(|| broken("its directory is incomplete"))?;
    let value = |tag: u16, default: u64| directory.value(bytes, tag).unwrap_or(default);
    if let Some(raw) = directory.camera_raw(bytes) {
        return Err(DecodeError::UnreadFormat(raw));
    }
    let layout = Layout::new(bytes, &directory)?;
    let orientation = u8::try_from(value(ORIENTATION, 1)).ok().and_then(Orientation::from_exif);
    let white_is_zero = layout.photometric == WHITE_IS_ZERO;
    let samples = match layout.compression {
        JPEG => Samples::U8(jpeg_samples(bytes, &directory, &layout)?),
        _ => samples(bytes, &directory, &layout)?,
    };
    let image = layout.image(samples, || directory.values(bytes, COLOR_MAP))?;
    // Those of 8 bits are inverted already.
    let white_is_zero = white_is_zero && !matches!(image, DynamicImage::ImageLuma8(_));
    Ok(Raw { image, white_is_zero, orientation })
}

/// Maximum number of directories.
const MAX_PAGES: usize = 1024;

/// Decodes all images of a file as channels of one. Images of reduced resolution and masks are left
/// out.
pub(super) fn pages(bytes: &[u8]) -> Result<Stack, DecodeError> {
    let (mut file, mut stacks, mut seen) = (bytes.to_vec(), Vec::<Stack>::new(), HashSet::new());
    let mut values = 0;
    while let Some(start) = Directory::start(&file).filter(|start| *start > 0) {
        let directory = Directory::first(&file).ok_or_else(|| broken("a directory is incomplete"))?;
        if !seen.insert(start) || seen.len() > MAX_PAGES {
            return Err(broken("its directories form a circle, or are too many"));
        }
        let is_left_out = directory.value(&file, SUBFILE_TYPE).is_some_and(|kind| kind & (REDUCED | MASK) != 0);
        if !is_left_out {
            let stack = channels(&file)?;
            values += stack.height * stack.width * stack.channels;
            check_values(values)?;
            stacks.push(stack);
        }
        let n: usize = stacks.iter().map(|stack| stack.channels).sum();
        if n > MAX_CHANNELS {
            return Err(DecodeError::TooManyJoined(n));
        }
        // The next directory becomes the first.
        directory.make_next_first(&mut file).ok_or_else(|| broken("a directory is incomplete"))?;
    }
    if stacks.is_empty() { Err(broken("it has no images")) } else { Stack::join(stacks) }
}

/// Decodes all channels of the first image of a file.
pub(super) fn channels(bytes: &[u8]) -> Result<Stack, DecodeError> {
    let directory = Directory::first(bytes).ok_or_else(|| broken("its directory is incomplete"))?;
    if let Some(raw) = directory.camera_raw(bytes) {
        return Err(DecodeError::UnreadFormat(raw));
    }
    let layout = Layout::of_channels(bytes, &directory)?;
    if directory.value(bytes, ORIENTATION).is_some_and(|orientation| orientation > 1) {
        return Err(unread("a rotated or mirrored image with all channels"));
    }
    let samples = match layout.compression {
        JPEG => Samples::U8(jpeg_samples(bytes, &directory, &layout)?),
        _ => samples(bytes, &directory, &layout)?,
    };
    let samples = match samples {
        Samples::U8(values) => {
            Samples::U8(layout.colors(values)?.into_iter().map(|v| layout.scale_to_8_bits(v)).collect())
        }
        Samples::U16(values) => Samples::U16(layout.colors(values)?),
        Samples::F32(values) => Samples::F32(layout.colors(values)?),
    };
    let no_data: Option<f32> = directory.bytes(bytes, GDAL_NO_DATA).and_then(|(text, _)| {
        let text = std::str::from_utf8(text).ok()?;
        text.trim_end_matches('\0').trim().parse().ok()
    });
    // Values of fewer bits are scaled.
    let no_data = no_data.filter(|_| layout.bits >= 8);
    Ok(Stack { height: layout.height, width: layout.width, channels: layout.colors, samples, no_data })
}

fn broken(reason: impl ToString) -> DecodeError {
    DecodeError::Broken { format: "TIFF", reason: reason.to_string() }
}

fn unread(reason: impl Into<String>) -> DecodeError {
    DecodeError::UnreadKind { format: "TIFF", reason: reason.into() }
}

fn error(error: TiffError) -> DecodeError {
    match error {
        TiffError::UnsupportedError(e) => unread(e.to_string()),
        TiffError::LimitsExceeded => unread("more than 2 GiB of samples"),
        TiffError::FormatError(e) => broken(e),
        TiffError::IoError(e) if e.kind() == io::ErrorKind::UnexpectedEof => broken("its data end too early"),
        TiffError::IoError(e) => broken(e),
        e => broken(e),
    }
}

/// First directory of a file: its fields by tag.
struct Directory {
    fields: BTreeMap<u16, Field>,
    is_little: bool,
    is_big: bool,
}

/// A field of a directory.
struct Field {
    /// Number of the type.
    kind: u16,
    /// Number of values.
    count: u64,
    /// Position of the values, if they fit, or else of their offset.
    at: usize,
}

impl Directory {
    /// Position of the first directory.
    fn start(bytes: &[u8]) -> Option<usize> {
        let is_little = bytes.starts_with(b"II");
        let (at, size) = if integer(bytes, 2, 2, is_little)? == 43 { (8, 8) } else { (4, 4) };
        usize::try_from(integer(bytes, at, size, is_little)?).ok()
    }

    /// Parses the first directory; `None` if the file ends in it.
    fn first(bytes: &[u8]) -> Option<Directory> {
        let is_little = bytes.starts_with(b"II");
        let is_big = integer(bytes, 2, 2, is_little)? == 43;
        let integer = |at: usize, size: usize| integer(bytes, at, size, is_little);
        let (count_size, field_size) = if is_big { (8, 20) } else { (2, 12) };
        let start = Directory::start(bytes)?;
        let n = integer(start, count_size)?;
        let mut fields = BTreeMap::new();
        for i in 0..n {
            let at = usize::try_from(i).ok()?.checked_mul(field_size)?.checked_add(start)?.checked_add(count_size)?;
            let (count, header) = if is_big { (integer(at + 4, 8)?, 12) } else { (integer(at + 4, 4)?, 8) };
            bytes.get(at..at + field_size)?;
            fields.insert(integer(at, 2)? as u16, Field { kind: integer(at + 2, 2)? as u16, count, at: at + header });
        }
        Some(Directory { fields, is_little, is_big })
    }

    /// Makes the directory after the first one the first; `None` if the file ends before it.
    fn make_next_first(&self, file: &mut [u8]) -> Option<()> {
        let (at, size, count_size, field_size) = if self.is_big { (8, 8, 8, 20) } else { (4, 4, 2, 12) };
        let start = Directory::start(file)?;
        let n = usize::try_from(integer(file, start, count_size, self.is_little)?).ok()?;
        let next = n.checked_mul(field_size)?.checked_add(start)?.checked_add(count_size)?;
        let next = file.get(next..next.checked_add(size)?)?.to_vec();
        file.get_mut(at..at + size)?.copy_from_slice(&next);
        Some(())
    }

    /// Bytes of a field and the size of each of its values.
    fn bytes<'a>(&self, file: &'a [u8], tag: u16) -> Option<(&'a [u8], usize)> {
        let field = self.fields.get(&tag)?;
        let size = match field.kind {
            1 | 2 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 | 16 | 17 | 18 => 8,
            _ => return None,
        };
        let length = usize::try_from(field.count).ok()?.checked_mul(size)?;
        let inline = if self.is_big { 8 } else { 4 };
        let at = match length <= inline {
            true => field.at,
            false => usize::try_from(integer(file, field.at, inline, self.is_little)?).ok()?,
        };
        Some((file.get(at..at.checked_add(length)?)?, size))
    }

    /// Values of a field of unsigned integers; `None` if it is missing or of another type.
    fn values(&self, file: &[u8], tag: u16) -> Option<Vec<u64>> {
        if !matches!(self.fields.get(&tag)?.kind, 1 | 3 | 4 | 13 | 16 | 18) {
            return None;
        }
        let (bytes, size) = self.bytes(file, tag)?;
        (0..bytes.len() / size).map(|i| integer(bytes, i * size, size, self.is_little)).collect()
    }

    /// First value of a field of unsigned integers.
    fn value(&self, file: &[u8], tag: u16) -> Option<u64> {
        self.values(file, tag)?.first().copied()
    }

    /// Replaces a field of a single integer.
    fn set(&self, file: &mut [u8], tag: u16, value: u64) {
        let Some(field) = self.fields.get(&tag) else { return };
        let size = match field.kind {
            3 => 2,
            4 => 4,
            16 if self.is_big => 8,
            _ => return,
        };
        let Some(target) = file.get_mut(field.at..field.at + size) else { return };
        match self.is_little {
            true => target.copy_from_slice(&value.to_le_bytes()[..size]),
            false => target.copy_from_slice(&value.to_be_bytes()[8 - size..]),
        }
    }

    /// Name of the format, if this is the file of a camera's sensor: what can be read of it is a
    /// preview.
    fn camera_raw(&self, file: &[u8]) -> Option<&'static str> {
        if self.fields.contains_key(&DNG_VERSION) {
            return Some("camera raw (DNG)");
        }
        let is_sensor = self.value(file, PHOTOMETRIC).is_some_and(|p| p == COLOR_FILTER_ARRAY || p == LINEAR_RAW);
        let is_preview = self.value(file, SUBFILE_TYPE).is_some_and(|kind| kind & 1 == 1);
        (is_sensor || is_preview && self.fields.contains_key(&SUB_IFDS)).then_some("camera raw")
    }
}

/// Unsigned integer of `size` bytes at a position.
fn integer(bytes: &[u8], at: usize, size: usize, is_little: bool) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(size)?)?;
    let append = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
    Some(if is_little { bytes.iter().rev().fold(0, append) } else { bytes.iter().fold(0, append) })
}

/// Arrangement and meaning of the samples.
#[derive(Default)]
struct Layout {
    width: usize,
    height: usize,
    /// Samples per pixel.
    samples: usize,
    /// Bits per sample.
    bits: u64,
    /// True if the samples of each channel follow each other, in place of those of each pixel.
    is_planar: bool,
    compression: u64,
    photometric: u64,
    /// Samples per pixel that are colors. Further samples are alpha.
    colors: usize,
}

impl Layout {
    /// Reads the layout. Refuses kinds of TIFF that are not read.
    fn new(bytes: &[u8], directory: &Directory) -> Result<Layout, DecodeError> {
        let value = |tag: u16| directory.value(bytes, tag);
        let size = |tag: u16| value(tag).and_then(|v| usize::try_from(v).ok());
        let samples = size(SAMPLES).unwrap_or(1);
        let extra = directory.values(bytes, EXTRA_SAMPLES).unwrap_or_default();
        let compression = value(COMPRESSION).unwrap_or(1);
        if let Some(name) = unread_compression(compression) {
            return Err(unread(name));
        }
        let photometric = value(PHOTOMETRIC).ok_or_else(|| unread("without the meaning of its samples"))?;
        let is_alpha = |extra: &u64| matches!(extra, 1 | 2);
        let colors = match photometric {
            // Two channels of a microscope are not gray and alpha.
            WHITE_IS_ZERO | BLACK_IS_ZERO
                if samples == 1 || samples == 2 && extra.iter().all(is_alpha) && !extra.is_empty() =>
            {
                1
            }
            WHITE_IS_ZERO | BLACK_IS_ZERO => {
                return Err(unread(format!("{samples} channels that are not colors, which `--channels all` reads")));
            }
            PALETTE => 1,
            RGB | YCBCR => 3,
            CMYK if value(INK_SET).unwrap_or(1) == 1 => 4,
            CMYK => return Err(unread("inks other than CMYK")),
            4 => return Err(unread("a transparency mask")),
            8..=10 => return Err(unread("CIE L*a*b* colors")),
            32844 | 32845 => return Err(unread("LogLuv colors")),
            other => return Err(unread(format!("photometric interpretation {other}"))),
        };
        if samples < colors {
            return Err(broken(format!("{samples} samples per pixel for {colors} colors")));
        }
        Layout { samples, compression, photometric, colors, ..Layout::default() }.complete(bytes, directory)
    }

    /// Reads the layout of an image whose channels need not be colors.
    fn of_channels(bytes: &[u8], directory: &Directory) -> Result<Layout, DecodeError> {
        let value = |tag: u16| directory.value(bytes, tag);
        let samples = value(SAMPLES).and_then(|v| usize::try_from(v).ok()).unwrap_or(1);
        let compression = value(COMPRESSION).unwrap_or(1);
        let photometric = value(PHOTOMETRIC).unwrap_or(BLACK_IS_ZERO);
        let is_read = match photometric {
            WHITE_IS_ZERO | BLACK_IS_ZERO | RGB => true,
            YCBCR => compression == JPEG,
            _ => false,
        };
        if !is_read {
            return Err(unread("palette, CMYK or YCbCr colors with all channels"));
        }
        if samples == 0 {
            return Err(broken("no channels"));
        }
        // Writers mark a fourth band as alpha, whatever it is.
        Layout { samples, compression, photometric, colors: samples, ..Layout::default() }.complete(bytes, directory)
    }

    /// Reads what does not depend on the meaning of the channels.
    fn complete(self, bytes: &[u8], directory: &Directory) -> Result<Layout, DecodeError> {
        let value = |tag: u16| directory.value(bytes, tag);
        let size = |tag: u16| value(tag).and_then(|v| usize::try_from(v).ok());
        let (Some(width), Some(height)) = (size(WIDTH), size(HEIGHT)) else { return Err(broken("missing dimensions")) };
        check_size(width, height)?;
        let Layout { samples, compression, photometric, .. } = self;
        if let Some(name) = unread_compression(compression) {
            return Err(unread(name));
        }
        let subsampling = directory.values(bytes, SUBSAMPLING).unwrap_or_else(|| vec![2, 2]);
        if photometric == YCBCR && compression != JPEG && subsampling.iter().any(|step| *step != 1) {
            return Err(unread("chroma subsampling without JPEG compression"));
        }
        let all_bits = directory.values(bytes, BITS).unwrap_or_else(|| vec![1]);
        let bits = all_bits.first().copied().unwrap_or(1);
        if all_bits.iter().any(|other| *other != bits) || !(matches!(bits, 1..=8 | 16 | 32 | 64)) {
            let all: Vec<String> = all_bits.iter().take(samples.min(8)).map(u64::to_string).collect();
            return Err(unread(format!("{} bits per sample", all.join(", "))));
        }
        let is_planar = value(PLANAR) == Some(2) && samples > 1;
        Ok(Layout { width, height, bits, is_planar, ..self })
    }

    /// Scales a value of up to 8 bits.
    fn scale_to_8_bits(&self, value: u8) -> u8 {
        let max = (1u16 << self.bits) - 1;
        if self.bits == 8 { value } else { (u16::from(value) * 255 / max) as u8 }
    }

    /// Number of pixels.
    fn pixels(&self) -> usize {
        self.width * self.height
    }

    /// Selects the colors: `[height, width, colors]`.
    fn colors<T: Copy>(&self, samples: Vec<T>) -> Result<Vec<T>, DecodeError> {
        if samples.len() != self.pixels() * self.samples {
            return Err(broken("fewer samples than declared"));
        }
        Ok(match (self.is_planar, self.samples == self.colors) {
            (true, _) => {
                let plane = self.pixels();
                (0..plane).flat_map(|i| (0..self.colors).map(move |c| c * plane + i)).map(|i| samples[i]).collect()
            }
            (false, true) => samples,
            (false, false) => {
                samples.chunks_exact(self.samples).flat_map(|pixel| &pixel[..self.colors]).copied().collect()
            }
        })
    }

    /// Builds the image. Colors other than gray and RGB are converted to 8-bit RGB.
    fn image(&self, samples: Samples, color_map: impl Fn() -> Option<Vec<u64>>) -> Result<DynamicImage, DecodeError> {
        if self.photometric == PALETTE {
            let indices: Vec<usize> = match samples {
                Samples::U8(samples) => self.colors(samples)?.into_iter().map(usize::from).collect(),
                Samples::U16(samples) => self.colors(samples)?.into_iter().map(usize::from).collect(),
                Samples::F32(_) => return Err(unread(format!("a palette with {} bits per sample", self.bits))),
            };
            return self.expand(&indices, &color_map().ok_or_else(|| broken("its palette is missing"))?);
        }
        match samples {
            Samples::U8(samples) => {
                let values: Vec<u8> = self.colors(samples)?.into_iter().map(|v| self.scale_to_8_bits(v)).collect();
                match self.photometric {
                    WHITE_IS_ZERO => self.gray8(values.into_iter().map(|v| 255 - v).collect()),
                    BLACK_IS_ZERO => self.gray8(values),
                    CMYK => self.rgb8(values.as_chunks().0.iter().flat_map(cmyk_to_rgb).collect()),
                    // JPEG data are converted already.
                    YCBCR if self.compression != JPEG => {
                        self.rgb8(values.as_chunks().0.iter().flat_map(ycbcr_to_rgb).collect())
                    }
                    _ => self.rgb8(values),
                }
            }
            Samples::U16(samples) => {
                let values = self.colors(samples)?;
                let (width, height) = (self.width as u32, self.height as u32);
                let image = match self.photometric {
                    WHITE_IS_ZERO | BLACK_IS_ZERO => {
                        image::ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageLuma16)
                    }
                    RGB => image::ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageRgb16),
                    // Inks are relative to the whole range.
                    CMYK => {
                        let rgb = values.as_chunks().0.iter().flat_map(cmyk16_to_rgb).collect();
                        let rgb = image::ImageBuffer::from_raw(width, height, rgb).map(DynamicImage::ImageRgb16);
                        rgb.map(|rgb| rgb.into_rgb8().into())
                    }
                    _ => return Err(unread("YCbCr colors with 16 bits per sample")),
                };
                image.ok_or_else(|| broken("fewer samples than declared"))
            }
            Samples::F32(samples) => {
                let values = self.colors(samples)?;
                let rgb = match self.photometric {
                    WHITE_IS_ZERO | BLACK_IS_ZERO => values.into_iter().flat_map(|gray| [gray; 3]).collect(),
                    RGB => values,
                    _ => return Err(unread(format!("CMYK or YCbCr colors with {} bits per sample", self.bits))),
                };
                let image = image::ImageBuffer::from_raw(self.width as u32, self.height as u32, rgb);
                image.map(DynamicImage::ImageRgb32F).ok_or_else(|| broken("fewer samples than declared"))
            }
        }
    }

    fn gray8(&self, values: Vec<u8>) -> Result<DynamicImage, DecodeError> {
        let image = GrayImage::from_raw(self.width as u32, self.height as u32, values);
        image.map(DynamicImage::from).ok_or_else(|| broken("fewer samples than declared"))
    }

    fn rgb8(&self, values: Vec<u8>) -> Result<DynamicImage, DecodeError> {
        let image = RgbImage::from_raw(self.width as u32, self.height as u32, values);
        image.map(DynamicImage::from).ok_or_else(|| broken("fewer samples than declared"))
    }

    /// Replaces indices by the colors of a palette: all reds, then all greens, then all blues.
    fn expand(&self, indices: &[usize], map: &[u64]) -> Result<DynamicImage, DecodeError> {
        let n = map.len() / 3;
        // The entries have 16 bits, but some programs write 8.
        let shift = if map.iter().any(|entry| *entry > 255) { 8 } else { 0 };
        let mut rgb = Vec::with_capacity(3 * indices.len());
        for &index in indices {
            if index >= n {
                return Err(broken(format!("color {index} of a palette with {n} colors")));
            }
            rgb.extend([0, 1, 2].map(|channel| (map[channel * n + index] >> shift) as u8));
        }
        self.rgb8(rgb)
    }
}

/// Description of a compression that is not read.
fn unread_compression(number: u64) -> Option<String> {
    let name = match number {
        // None, Fax4, LZW, JPEG, deflate (two numbers), PackBits, Zstandard, WebP.
        1 | FAX4 | 5 | JPEG | 8 | 32773 | 32946 | 50000 | 50001 => return None,
        2 => "CCITT RLE",
        3 => "CCITT Group 3",
        6 => "old-style JPEG",
        9 | 10 | 34661 => "JBIG",
        32809 => "ThunderScan",
        33003 | 33005 | 34712 => "JPEG 2000",
        34676 | 34677 => "LogLuv",
        34887 => "LERC",
        34892 => "lossy JPEG of a camera raw",
        34925 => "LZMA",
        50002 | 52546 => "JPEG XL",
        other => return Some(format!("compression {other}")),
    };
    Some(format!("{name} compression"))
}

/// Reads the samples as they are stored, without the meaning of their colors.
fn samples(bytes: &[u8], directory: &Directory, layout: &Layout) -> Result<Samples, DecodeError> {
    let mut file = Cow::Borrowed(bytes);
    // As gray with several channels, the crate returns every sample unchanged.
    let is_plain_rgb = layout.photometric == RGB
        && layout.samples == 3
        && layout.bits >= 8
        && !directory.fields.contains_key(&EXTRA_SAMPLES);
    if layout.photometric != BLACK_IS_ZERO && !is_plain_rgb {
        directory.set(file.to_mut(), PHOTOMETRIC, BLACK_IS_ZERO);
    }
    // The crate takes the height of a strip of all rows literally.
    if directory.value(bytes, ROWS_PER_STRIP).is_some_and(|rows| rows > layout.height as u64) {
        directory.set(file.to_mut(), ROWS_PER_STRIP, layout.height as u64);
    }
    if directory.value(bytes, FILL_ORDER) == Some(2) {
        for (start, end) in chunks(bytes, directory)? {
            file.to_mut().get_mut(start..end).into_iter().flatten().for_each(|byte| *byte = byte.reverse_bits());
        }
    }
    let mut limits = Limits::unlimited();
    // As much as for the deepest common format, 32-bit RGBA.
    limits.decoding_buffer_size = 16 * MAX_PIXELS;
    limits.intermediate_buffer_size = 16 * MAX_PIXELS;
    let mut decoder = Decoder::new(Cursor::new(&*file)).map_err(error)?.with_limits(limits);
    let mut result = DecodingResult::U8(Vec::new());
    let expected = decoder.read_image_to_buffer(&mut result).map_err(error)?.complete_len;
    // Of a large planar image the crate reads the first plane only.
    if result.as_buffer(0).byte_len() < expected {
        return Err(error(TiffError::LimitsExceeded));
    }
    Ok(match result {
        DecodingResult::U8(values) if layout.bits < 8 => Samples::U8(unpack(&values, layout)),
        DecodingResult::U8(values) => Samples::U8(values),
        DecodingResult::U16(values) => Samples::U16(values),
        DecodingResult::U32(values) => Samples::F32(values.into_iter().map(|v| v as f32).collect()),
        DecodingResult::U64(values) => Samples::F32(values.into_iter().map(|v| v as f32).collect()),
        DecodingResult::F16(values) => Samples::F32(values.into_iter().map(f32::from).collect()),
        DecodingResult::F32(values) => Samples::F32(values),
        DecodingResult::F64(values) => Samples::F32(values.into_iter().map(|v| v as f32).collect()),
        DecodingResult::I8(_) if layout.bits < 8 => {
            return Err(unread(format!("{} bits per sample with a sign", layout.bits)));
        }
        DecodingResult::I8(values) => Samples::F32(values.into_iter().map(f32::from).collect()),
        DecodingResult::I16(values) => Samples::F32(values.into_iter().map(f32::from).collect()),
        DecodingResult::I32(values) => Samples::F32(values.into_iter().map(|v| v as f32).collect()),
        DecodingResult::I64(values) => Samples::F32(values.into_iter().map(|v| v as f32).collect()),
    })
}

/// Separates samples of fewer than 8 bits. Each row starts at a byte.
fn unpack(packed: &[u8], layout: &Layout) -> Vec<u8> {
    let bits = layout.bits as usize;
    let (per_row, rows) = match layout.is_planar {
        true => (layout.width, layout.height * layout.samples),
        false => (layout.width * layout.samples, layout.height),
    };
    let sample = |row: &[u8], i: usize| {
        let (byte, shift) = (i * bits / 8, i * bits % 8);
        let pair = u16::from(row[byte]) << 8 | u16::from(row.get(byte + 1).copied().unwrap_or(0));
        (pair << shift >> (16 - bits)) as u8
    };
    let rows = packed.chunks_exact((per_row * bits).div_ceil(8)).take(rows);
    rows.flat_map(|row| (0..per_row).map(move |i| sample(row, i))).collect()
}

/// Range of each strip or tile in the file.
fn chunks(bytes: &[u8], directory: &Directory) -> Result<Vec<(usize, usize)>, DecodeError> {
    let is_tiled = directory.fields.contains_key(&TILE_OFFSETS);
    let tags = if is_tiled { [TILE_OFFSETS, TILE_LENGTHS] } else { [STRIP_OFFSETS, STRIP_LENGTHS] };
    let [Some(offsets), Some(lengths)] = tags.map(|tag| directory.values(bytes, tag)) else {
        return Err(broken("its strips or tiles are missing"));
    };
    let range = |(offset, length): (u64, u64)| {
        let (start, end) = (usize::try_from(offset).ok()?, usize::try_from(offset.checked_add(length)?).ok()?);
        (end <= bytes.len()).then_some((start, end))
    };
    let ranges: Option<Vec<_>> = offsets.into_iter().zip(lengths).map(range).collect();
    ranges.ok_or_else(|| broken("its data end too early"))
}

/// Decodes strips or tiles that are JPEG streams: `[height, width, samples]`. The colors of YCbCr
/// are converted to RGB.
fn jpeg_samples(bytes: &[u8], directory: &Directory, layout: &Layout) -> Result<Vec<u8>, DecodeError> {
    if layout.is_planar || layout.bits != 8 {
        return Err(unread("JPEG compression of separate channels or of other than 8 bits"));
    }
    let value = |tag: u16| directory.value(bytes, tag).and_then(|v| usize::try_from(v).ok());
    let &Layout { width, height, samples, .. } = layout;
    let (chunk_width, chunk_height) = match directory.fields.contains_key(&TILE_OFFSETS) {
        true => (value(TILE_WIDTH).unwrap_or(0), value(TILE_HEIGHT).unwrap_or(0)),
        false => (width, value(ROWS_PER_STRIP).unwrap_or(height).min(height)),
    };
    if chunk_width == 0 || chunk_height == 0 {
        return Err(broken("strips or tiles without a size"));
    }
    let (across, down) = (width.div_ceil(chunk_width), height.div_ceil(chunk_height));
    let chunks = chunks(bytes, directory)?;
    if chunks.len() != across * down {
        return Err(broken(format!("{} strips or tiles instead of {}", chunks.len(), across * down)));
    }
    let output = match layout.photometric {
        YCBCR if samples == 3 => jpeg::Output::FromYCbCr,
        _ if ![1, 3, 4].contains(&samples) || layout.photometric == YCBCR => {
            return Err(unread(format!("JPEG compression of {samples} channels")));
        }
        _ => jpeg::Output::Components(samples),
    };
    let tables = directory.bytes(bytes, JPEG_TABLES).map(|(tables, _)| tables);
    let mut pixels = vec![0; width * height * samples];
    for (i, (start, end)) in chunks.into_iter().enumerate() {
        let (left, top) = (i % across * chunk_width, i / across * chunk_height);
        let (columns, rows) = (chunk_width.min(width - left), chunk_height.min(height - top));
        let stream = jpeg::stream(&with_tables(tables, &bytes[start..end]), output).map_err(|e| match e {
            DecodeError::Broken { reason, .. } => broken(reason),
            DecodeError::UnreadKind { reason, .. } => unread(format!("JPEG compression with {reason}")),
            other => other,
        })?;
        // Tiles at the edges have their whole size, and some programs round it up to whole blocks.
        let (max_width, max_height) = (chunk_width.next_multiple_of(16), chunk_height.next_multiple_of(16));
        if !(columns..=max_width).contains(&stream.width) || !(rows..=max_height).contains(&stream.height) {
            return Err(broken(format!(
                "a strip or tile of {columns} x {rows} pixels has {} x {}",
                stream.width, stream.height
            )));
        }
        let lines = stream.samples.chunks_exact(stream.width * samples).take(rows);
        for (y, line) in lines.enumerate() {
            let at = ((top + y) * width + left) * samples;
            pixels[at..at + columns * samples].copy_from_slice(&line[..columns * samples]);
        }
    }
    Ok(pixels)
}

/// Inserts tables that are shared by all strips or tiles behind the start marker of one.
fn with_tables<'a>(tables: Option<&[u8]>, stream: &'a [u8]) -> Cow<'a, [u8]> {
    let start = [0xFF, 0xD8].as_slice();
    match (tables.and_then(|tables| tables.strip_prefix(start)), stream.strip_prefix(start)) {
        (Some(tables), Some(rest)) => {
            Cow::Owned([start, tables.strip_suffix(&[0xFF, 0xD9]).unwrap_or(tables), rest].concat())
        }
        _ => Cow::Borrowed(stream),
    }
}

/// Converts inks to colors as the `image` crate does.
fn cmyk_to_rgb(cmyk: &[u8; 4]) -> [u8; 3] {
    let [c, m, y, k] = cmyk.map(f32::from);
    [c, m, y].map(|ink| ((255.0 - ink) * (1.0 - k / 255.0)) as u8)
}

/// Converts inks to colors as the `image` crate does.
fn cmyk16_to_rgb(cmyk: &[u16; 4]) -> [u16; 3] {
    let [c, m, y, k] = cmyk.map(f32::from);
    [c, m, y].map(|ink| ((65535.0 - ink) * (1.0 - k / 65535.0)) as u16)
}

/// Converts luma and chroma of the full range (ITU-R BT.601), as JPEG does.
fn ycbcr_to_rgb(ycbcr: &[u8; 3]) -> [u8; 3] {
    let [y, cb, cr] = ycbcr.map(f32::from);
    let (cb, cr) = (cb - 128.0, cr - 128.0);
    // Conversion to an integer saturates.
    [y + 1.402 * cr, y - 0.344_136 * cb - 0.714_136 * cr, y + 1.772 * cb].map(|v| v.round() as u8)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::data::{Levels, decode, levels::Channels};

    /// A TIFF of one strip, to which tests add fields.
    struct File {
        is_little: bool,
        is_big: bool,
        /// Values by tag, with the size of each.
        fields: BTreeMap<u16, (usize, Vec<u64>)>,
        strips: Vec<Vec<u8>>,
    }

    impl File {
        fn new(width: u64, height: u64, bits: u64, samples: u64, photometric: u64, data: &[u8]) -> File {
            let file = File { is_little: true, is_big: false, fields: BTreeMap::new(), strips: vec![data.to_vec()] };
            let file = file.set(WIDTH, &[width]).set(HEIGHT, &[height]).set(BITS, &vec![bits; samples as usize]);
            file.set(COMPRESSION, &[1]).set(PHOTOMETRIC, &[photometric]).set(SAMPLES, &[samples])
        }

        fn set(self, tag: u16, values: &[u64]) -> File {
            self.set_sized(tag, 2, values)
        }

        fn set_sized(mut self, tag: u16, size: usize, values: &[u64]) -> File {
            self.fields.insert(tag, (size, values.to_vec()));
            self
        }

        fn strips(self, strips: Vec<Vec<u8>>, rows: u64) -> File {
            File { strips, ..self }.set(ROWS_PER_STRIP, &[rows])
        }

        fn bytes(mut self) -> Vec<u8> {
            let (is_little, is_big) = (self.is_little, self.is_big);
            let number = |value: u64, size: usize| match is_little {
                true => value.to_le_bytes()[..size].to_vec(),
                false => value.to_be_bytes()[8 - size..].to_vec(),
            };
            let mut file: Vec<u8> = if is_little { b"II".to_vec() } else { b"MM".to_vec() };
            match is_big {
                true => file.extend([number(43, 2), number(8, 2), number(0, 2), number(0, 8)].concat()),
                false => file.extend([number(42, 2), number(0, 4)].concat()),
            }
            let offsets = self.strips.iter().map(|strip| {
                let at = file.len() as u64;
                file.extend(strip);
                at
            });
            let offsets: Vec<u64> = offsets.collect();
            let lengths: Vec<u64> = self.strips.iter().map(|strip| strip.len() as u64).collect();
            let tags = match self.fields.contains_key(&TILE_WIDTH) {
                true => [TILE_OFFSETS, TILE_LENGTHS],
                false => [STRIP_OFFSETS, STRIP_LENGTHS],
            };
            self = self.set_sized(tags[0], 4, &offsets).set_sized(tags[1], 4, &lengths);
            let (inline, count_size) = if is_big { (8, 8) } else { (4, 4) };
            let mut directory = number(self.fields.len() as u64, if is_big { 8 } else { 2 });
            for (tag, (size, values)) in &self.fields {
                let kind = [0, 1, 3, 0, 4][*size];
                let mut data: Vec<u8> = values.iter().flat_map(|v| number(*v, *size)).collect();
                if data.len() > inline {
                    let at = file.len() as u64;
                    file.extend(&data);
                    data = number(at, inline);
                }
                data.resize(inline, 0);
                let count = number(values.len() as u64, count_size);
                directory.extend([number(u64::from(*tag), 2), number(kind, 2), count, data].concat());
            }
            directory.extend(number(0, inline));
            let start = number(file.len() as u64, inline);
            let at = if is_big { 8 } else { 4 };
            file[at..at + inline].copy_from_slice(&start);
            file.extend(directory);
            file
        }

        fn pixels(self) -> Result<Vec<u8>, String> {
            let image = decode::bytes(&self.bytes(), &Levels::default()).map_err(|e| e.to_string())?;
            Ok(image.pixels.into_u8())
        }
    }

    const SAMPLE_FORMAT: u16 = 339;
    const BASELINE: &[u8] = include_bytes!("../../../tests/data/baseline.jpg");

    #[test]
    fn reads_both_byte_orders_and_bigtiff() {
        let data: Vec<u8> = (0..12).collect();
        for (is_little, is_big) in [(true, false), (false, false), (true, true), (false, true)] {
            let file = File { is_little, is_big, ..File::new(2, 2, 8, 3, RGB, &data) };
            let bytes = file.bytes();
            assert!(decode::is_supported(&bytes[..16]));
            assert_eq!(
                decode::bytes(&bytes, &Levels::default()).unwrap().pixels.to_u8()[..],
                data,
                "{is_little} {is_big}"
            );
            for n in 8..bytes.len() - 8 {
                assert!(decode::bytes(&bytes[..n], &Levels::default()).is_err(), "cut to {n} bytes");
            }
        }
    }

    #[test]
    fn reads_palettes_with_entries_of_16_and_8_bits() {
        let map = [[0, 10, 20, 30], [1, 11, 21, 31], [2, 12, 22, 32]].concat();
        let expected = [30, 31, 32, 0, 1, 2, 20, 21, 22];
        for scale in [1, 256, 257] {
            let map: Vec<u64> = map.iter().map(|v| v * scale).collect();
            let file = File::new(3, 1, 2, 1, PALETTE, &[0b11_00_10_00]).set(COLOR_MAP, &map);
            assert_eq!(file.pixels().unwrap(), expected);
            let file = File::new(3, 1, 8, 1, PALETTE, &[3, 0, 2]).set(COLOR_MAP, &map);
            assert_eq!(file.pixels().unwrap(), expected);
        }
        let error = File::new(1, 1, 8, 1, PALETTE, &[4]).set(COLOR_MAP, &map).pixels().unwrap_err();
        assert!(error.contains("damaged"), "{error}");
    }

    #[test]
    fn reads_gray_of_1_to_8_bits_with_either_end_black() {
        let gray = |bits, photometric, data: &[u8]| {
            let rgb = File::new(3, 2, bits, 1, photometric, data).pixels().unwrap();
            rgb.into_iter().step_by(3).collect::<Vec<u8>>()
        };
        assert_eq!(gray(1, BLACK_IS_ZERO, &[0b010_00000, 0b101_00000]), [0, 255, 0, 255, 0, 255]);
        assert_eq!(gray(1, WHITE_IS_ZERO, &[0b010_00000, 0b101_00000]), [255, 0, 255, 0, 255, 0]);
        assert_eq!(gray(2, BLACK_IS_ZERO, &[0b00_01_10_00, 0b11_10_01_00]), [0, 85, 170, 255, 170, 85]);
        assert_eq!(gray(4, BLACK_IS_ZERO, &[0x01, 0x20, 0xF2, 0x10]), [0, 17, 34, 255, 34, 17]);
        assert_eq!(gray(8, WHITE_IS_ZERO, &[0, 1, 2, 3, 4, 255]), [255, 254, 253, 252, 251, 0]);
        let reversed = File::new(3, 2, 1, 1, BLACK_IS_ZERO, &[0b010, 0b101]).set(FILL_ORDER, &[2]);
        assert_eq!(reversed.pixels().unwrap().into_iter().step_by(3).collect::<Vec<u8>>(), [0, 255, 0, 255, 0, 255]);
    }

    #[test]
    fn drops_alpha_with_and_without_a_predictor() {
        // The predictor stores differences to the pixel on the left.
        for (extra, predictor, data) in [
            (1, 1, [1, 2, 3, 9, 4, 5, 6, 9]),
            (2, 1, [1, 2, 3, 9, 4, 5, 6, 9]),
            (0, 1, [1, 2, 3, 9, 4, 5, 6, 9]),
            (0, 2, [1, 2, 3, 9, 3, 3, 3, 0]),
        ] {
            let file = File::new(2, 1, 8, 4, RGB, &data).set(EXTRA_SAMPLES, &[extra]).set(317, &[predictor]);
            assert_eq!(file.pixels().unwrap(), [1, 2, 3, 4, 5, 6], "{extra} {predictor}");
        }
        let gray = File::new(2, 1, 8, 2, WHITE_IS_ZERO, &[255, 9, 0, 9]).set(EXTRA_SAMPLES, &[2]);
        assert_eq!(gray.pixels().unwrap(), [0, 0, 0, 255, 255, 255]);
    }

    #[test]
    fn reads_planes_tiles_and_strips() {
        let planes = File::new(2, 1, 8, 3, RGB, &[]).set(PLANAR, &[2]);
        let planes = planes.strips(vec![vec![1, 4], vec![2, 5], vec![3, 6]], 1);
        assert_eq!(planes.pixels().unwrap(), [1, 2, 3, 4, 5, 6]);
        let strips = File::new(1, 3, 8, 1, BLACK_IS_ZERO, &[]).strips(vec![vec![1, 2], vec![3]], 2);
        assert_eq!(strips.pixels().unwrap(), [1, 1, 1, 2, 2, 2, 3, 3, 3]);
        let tile = |value: u8| vec![value; 256];
        let mut tiles = File::new(17, 16, 8, 1, BLACK_IS_ZERO, &[]).set(TILE_WIDTH, &[16]).set(TILE_HEIGHT, &[16]);
        tiles.strips = vec![tile(7), tile(8)];
        let pixels = tiles.pixels().unwrap();
        assert_eq!((pixels[0], pixels[3 * 15], pixels[3 * 16], pixels[3 * 17]), (7, 7, 8, 7));
    }

    #[test]
    fn reads_all_channels() {
        let levels = |select: &[u16], range: f32, n: usize| Levels {
            channels: Some(Channels { select: select.to_vec(), ranges: vec![[0.0, range]; n], ..Channels::default() }),
            ..Levels::default()
        };
        let decoded = |file: File, levels: &Levels| decode::bytes(&file.bytes(), levels).map_err(|e| e.to_string());
        let file = || File::new(2, 1, 8, 5, BLACK_IS_ZERO, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert!(file().pixels().unwrap_err().contains("5 channels that are not colors"));
        let all = decoded(file(), &levels(&[], 255.0, 5)).unwrap();
        assert_eq!((all.channels, &*all.pixels.to_u8()), (5, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10][..]));
        let two = decoded(file(), &levels(&[5, 1], 255.0, 2)).unwrap();
        assert_eq!((two.channels, &*two.pixels.to_u8()), (2, &[5, 1, 10, 6][..]));
        assert_eq!(decoded(file(), &levels(&[], 255.0, 4)).unwrap_err(), "it has 5 channels, not 4");

        let planes = File::new(2, 1, 16, 2, BLACK_IS_ZERO, &[]).set(PLANAR, &[2]);
        let planes = planes.strips(vec![vec![0, 0, 50, 0], vec![200, 0, 44, 1]], 1);
        let image = decoded(planes, &levels(&[], 200.0, 2)).unwrap();
        assert_eq!(image.pixels, vec![0u16, 65535, 16384, 65535].into());
        // A band that is marked as alpha.
        let extra = File::new(1, 1, 8, 4, RGB, &[1, 2, 3, 9]).set(EXTRA_SAMPLES, &[2]);
        assert_eq!(decoded(extra, &levels(&[4], 255.0, 1)).unwrap().pixels, vec![9u8].into());
        let missing = File::new(2, 1, 8, 1, BLACK_IS_ZERO, &[255, 7]);
        let missing = missing.set_sized(GDAL_NO_DATA, 1, &b"255\0".map(u64::from));
        assert_eq!(decoded(missing, &levels(&[], 255.0, 1)).unwrap().pixels, vec![0u8, 7].into());
        // The ASCII characters of -9999, the value without data.
        let data: Vec<u8> = [-9999.0f32, 5.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let missing = File::new(2, 1, 32, 1, BLACK_IS_ZERO, &data).set(SAMPLE_FORMAT, &[3]);
        let missing = missing.set_sized(GDAL_NO_DATA, 1, &b"-9999\0".map(u64::from));
        assert_eq!(decoded(missing, &levels(&[], 10.0, 1)).unwrap().pixels, vec![0u16, 32768].into());
    }

    #[test]
    fn pages_are_channels() {
        use tiff::encoder::{TiffEncoder, colortype::Gray16};
        let file = |pages: &[(u32, &[u16])]| {
            let mut bytes = Cursor::new(Vec::new());
            let mut encoder = TiffEncoder::new(&mut bytes).unwrap();
            for (width, values) in pages {
                encoder.write_image::<Gray16>(*width, 1, values).unwrap();
            }
            bytes.into_inner()
        };
        let bytes = file(&[(2, &[1, 2]), (2, &[3, 4]), (1, &[5])]);
        let stack = pages(&bytes).unwrap();
        let Samples::U16(values) = stack.samples else { panic!("16 bits") };
        assert_eq!((stack.width, stack.channels, values), (2, 3, vec![1, 3, 5, 2, 4, 5]));
        assert_eq!(channels(&bytes).unwrap().channels, 1);
        for end in 0..bytes.len() {
            assert!(pages(&bytes[..end]).is_err(), "truncated after {end} bytes");
        }
        let page: (u32, &[u16]) = (1, &[7]);
        assert!(matches!(pages(&file(&[page; 65])), Err(DecodeError::TooManyJoined(65))));
        // The directory after the first one is the first one.
        let mut circle = file(&[page]);
        let start = Directory::start(&circle).unwrap();
        let next = start + 2 + 12 * Directory::first(&circle).unwrap().fields.len();
        circle[next..next + 4].copy_from_slice(&(start as u32).to_le_bytes());
        assert!(matches!(pages(&circle), Err(DecodeError::Broken { .. })));
    }

    #[test]
    fn reads_cmyk_and_ycbcr() {
        let cmyk = File::new(2, 1, 8, 4, CMYK, &[0, 0, 0, 0, 255, 0, 0, 0]);
        assert_eq!(cmyk.pixels().unwrap(), [255, 255, 255, 0, 255, 255]);
        let ycbcr = File::new(2, 1, 8, 3, YCBCR, &[100, 128, 128, 76, 85, 255]);
        assert_eq!(ycbcr.set(SUBSAMPLING, &[1, 1]).pixels().unwrap(), [100, 100, 100, 254, 0, 0]);
    }

    #[test]
    fn reads_zstandard_deflate_and_fax() {
        // A Zstandard frame with one raw block.
        let frame = [0x28, 0xB5, 0x2F, 0xFD, 0x20, 3, 0x19, 0, 0, 1, 2, 3];
        assert_eq!(File::new(1, 1, 8, 3, RGB, &frame).set(COMPRESSION, &[50000]).pixels().unwrap(), [1, 2, 3]);
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
        zlib.write_all(&[1, 2, 3]).unwrap();
        let file = File::new(1, 1, 8, 3, RGB, &zlib.finish().unwrap()).set(COMPRESSION, &[8]);
        assert_eq!(file.pixels().unwrap(), [1, 2, 3]);
        // Two white lines (vertical mode 0) and the end of the block, in a strip of all rows.
        let fax = File::new(8, 2, 1, 1, WHITE_IS_ZERO, &[0b1100_0000, 0b0000_0100, 0, 0b0100_0000]);
        let fax = fax.set(COMPRESSION, &[FAX4]).set_sized(ROWS_PER_STRIP, 4, &[0xFFFF_FFFF]);
        assert_eq!(fax.pixels().unwrap(), [255; 48]);
    }

    #[test]
    fn reads_strips_of_jpeg_like_a_jpeg_file() {
        let whole = decode::bytes(BASELINE, &Levels::default()).unwrap();
        let (width, height) = (whole.width as u64, whole.height as u64);
        let file = || File::new(width, height, 8, 3, YCBCR, BASELINE).set(COMPRESSION, &[JPEG]);
        assert_eq!(file().pixels().unwrap(), *whole.pixels.to_u8());
        // The tables of all strips in a stream of their own.
        let frame = BASELINE.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
        let tables = [&BASELINE[..frame], &[0xFF, 0xD9]].concat();
        let strip = [&BASELINE[..2], &BASELINE[frame..]].concat();
        let shared = || {
            let tables: Vec<u64> = tables.iter().map(|b| u64::from(*b)).collect();
            let two = File::new(width, 2 * height, 8, 3, YCBCR, &[]).strips(vec![strip.clone(), strip.clone()], height);
            two.set(COMPRESSION, &[JPEG]).set_sized(JPEG_TABLES, 1, &tables)
        };
        assert_eq!(shared().pixels().unwrap(), whole.pixels.to_u8().repeat(2));
        let mut cut = shared();
        cut.strips[1].truncate(strip.len() - 20);
        let error = cut.pixels().unwrap_err();
        assert!(error.contains("TIFF data is truncated or damaged: missing end marker"), "{error}");
    }

    #[test]
    fn names_kinds_that_are_not_read_and_tells_them_from_damaged_files() {
        let rgb = || File::new(1, 1, 8, 3, RGB, &[1, 2, 3]);
        for (file, reason) in [
            (rgb().set(COMPRESSION, &[34712]), "JPEG 2000 compression"),
            (rgb().set(COMPRESSION, &[6]), "old-style JPEG compression"),
            (rgb().set(COMPRESSION, &[777]), "compression 777"),
            (rgb().set(PHOTOMETRIC, &[8]), "L*a*b*"),
            (rgb().set(PHOTOMETRIC, &[YCBCR]), "chroma subsampling"),
            (rgb().set(BITS, &[12, 12, 12]), "12, 12, 12 bits"),
            (rgb().set(BITS, &[8, 8, 16]), "8, 8, 16 bits"),
            (rgb().set(PHOTOMETRIC, &[BLACK_IS_ZERO]), "3 channels"),
        ] {
            let error = file.pixels().unwrap_err();
            assert!(error.starts_with("a kind of TIFF that byol does not read (") && error.contains(reason), "{error}");
        }
        for file in [
            rgb().set(COMPRESSION, &[5]),
            rgb().set(SAMPLES, &[2]),
            rgb().set(COMPRESSION, &[8]),
            File { strips: Vec::new(), ..rgb() },
        ] {
            let bytes = file.bytes();
            let error = decode::bytes(&bytes, &Levels::default()).unwrap_err().to_string();
            assert!(error.starts_with("TIFF data is truncated or damaged: "), "{error}");
        }
    }

    #[test]
    fn previews_of_camera_raw_files_are_not_images() {
        let preview = || File::new(1, 1, 8, 3, RGB, &[1, 2, 3]).set_sized(SUBFILE_TYPE, 4, &[1]);
        for (file, name) in [
            (preview().set_sized(DNG_VERSION, 1, &[1, 4, 0, 0]), "camera raw (DNG)"),
            (preview().set_sized(SUB_IFDS, 4, &[8]), "camera raw"),
            (File::new(1, 1, 16, 1, COLOR_FILTER_ARRAY, &[1, 2]), "camera raw"),
        ] {
            assert_eq!(file.pixels().unwrap_err(), format!("a {name} image, a format that byol does not read"));
        }
        assert_eq!(preview().pixels().unwrap(), [1, 2, 3]);
    }

    #[test]
    fn integers_of_other_types_and_floats_are_mapped_by_their_levels() {
        let int32: Vec<u8> = [0u32, 4095].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(File::new(2, 1, 32, 1, BLACK_IS_ZERO, &int32).pixels().unwrap(), [0, 0, 0, 255, 255, 255]);
        let signed: Vec<u8> = [-5i16, 100].into_iter().flat_map(i16::to_le_bytes).collect();
        let signed = File::new(2, 1, 16, 1, BLACK_IS_ZERO, &signed).set(SAMPLE_FORMAT, &[2]).bytes();
        let error = decode::bytes(&signed, &Levels::default()).unwrap_err().to_string();
        assert!(error.contains("from -5 to 100") && error.contains("`--levels`"), "{error}");
        let image = decode::bytes(&signed, &Levels::uniform(-155.0, 100.0)).unwrap();
        assert_eq!(image.pixels.to_u8()[..], [150, 150, 150, 255, 255, 255]);
        let floats = |values: [f32; 3]| {
            let data: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
            File::new(1, 1, 32, 3, RGB, &data).set(SAMPLE_FORMAT, &[3, 3, 3])
        };
        assert_eq!(floats([0.0, 0.5, 1.0]).pixels().unwrap(), [0, 128, 255]);
        assert_eq!(floats([0.0, 128.0, 255.0]).pixels().unwrap(), [0, 128, 255]);
        assert_eq!(floats([-1.0, 0.0, 1.0]).pixels().unwrap(), [0, 128, 255]);
        for value in [f32::NAN, f32::INFINITY] {
            assert_eq!(floats([0.0, value, 1.0]).pixels().unwrap_err(), "it contains NaN or infinite values");
            let legacy = decode::bytes(&floats([0.0, value, 1.0]).bytes(), &Levels::legacy());
            assert!(legacy.is_err());
        }
        // Old encoders have seen the values clamped.
        let clamped = decode::bytes(&floats([-3.0, 0.5, 200.0]).bytes(), &Levels::legacy()).unwrap();
        assert_eq!(clamped.pixels.to_u8()[..], [0, 128, 255]);
        let refused = decode::bytes(&floats([0.0, 0.5, 1.5]).bytes(), &Levels::uniform(0.0, 1.0)).unwrap_err();
        assert!(refused.to_string().starts_with("the value 1.5 exceeds white, 1\n"), "{refused}");
    }

    #[test]
    fn reads_inverted_16_bit_grayscale() {
        let data: Vec<u8> = [0u16, 4095].into_iter().flat_map(u16::to_le_bytes).collect();
        let pixels = File::new(2, 1, 16, 1, WHITE_IS_ZERO, &data).pixels().unwrap();
        assert_eq!(pixels, [255, 255, 255, 0, 0, 0]);
    }

    #[test]
    fn the_kind_of_an_image_is_known_from_its_header() {
        let kind = |file: File| decode::kind(Cursor::new(file.bytes())).unwrap();
        assert_eq!(kind(File::new(1, 1, 8, 3, RGB, &[1, 2, 3])), None);
        assert_eq!(kind(File::new(1, 1, 16, 1, BLACK_IS_ZERO, &[1, 2])), Some(SampleKind::Int16));
        assert_eq!(
            kind(File::new(1, 1, 32, 1, BLACK_IS_ZERO, &[0; 4]).set(SAMPLE_FORMAT, &[3])),
            Some(SampleKind::Float)
        );
        assert_eq!(kind(File::new(1, 1, 16, 4, CMYK, &[0; 8])), None);
    }
}

//! Values of all channels of an image, as in its file.

use image::{DynamicImage, GrayImage, ImageBuffer, RgbImage, metadata::Orientation};

use super::{DecodeError, MAX_VALUES, Raw};
use crate::{
    data::levels::Channels,
    image::{Image, MAX_CHANNELS, Pixels},
};

/// All channels of a file, `[height, width, channels]`.
pub(super) struct Stack {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub samples: Samples,
    /// Value of pixels without data.
    pub no_data: Option<f32>,
}

/// Values of an image, as in its file.
pub(super) enum Samples {
    /// Up to 8 bits, not scaled.
    U8(Vec<u8>),
    U16(Vec<u16>),
    /// All other types.
    F32(Vec<f32>),
}

impl Stack {
    /// True for pixels without data: NaN, if that is what the file declares.
    pub fn is_missing(&self, value: f32) -> bool {
        self.no_data.is_some_and(|no_data| value == no_data || no_data.is_nan() && value.is_nan())
    }

    /// Joins the channels of several files or pages of an image. Smaller ones are enlarged to the
    /// size of the largest by repeating pixels.
    ///
    /// # Errors
    /// [`DecodeError::TooManyJoined`], [`DecodeError::TooManyValues`].
    ///
    /// # Panics
    /// If there are none.
    pub fn join(mut parts: Vec<Stack>) -> Result<Stack, DecodeError> {
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let height = parts.iter().map(|part| part.height).max().expect("at least one part");
        let width = parts.iter().map(|part| part.width).max().expect("at least one part");
        let channels: usize = parts.iter().map(|part| part.channels).sum();
        if channels > MAX_CHANNELS {
            return Err(DecodeError::TooManyJoined(channels));
        }
        check_values(height.saturating_mul(width).saturating_mul(channels))?;
        let no_data = parts[0].no_data;
        let has_same_no_data = parts.iter().all(|part| part.no_data.map(f32::to_bits) == no_data.map(f32::to_bits));
        let bytes: Option<Vec<&[u8]>> = parts.iter().map(|part| part.samples.as_u8()).collect();
        let words: Option<Vec<&[u16]>> = parts.iter().map(|part| part.samples.as_u16()).collect();
        let (samples, no_data) = match (bytes, words) {
            (Some(values), _) if has_same_no_data => (Samples::U8(interleave(&parts, &values, height, width)), no_data),
            (_, Some(values)) if has_same_no_data => {
                (Samples::U16(interleave(&parts, &values, height, width)), no_data)
            }
            _ => {
                let floats: Vec<Vec<f32>> = parts.iter().map(Stack::floats).collect();
                let floats: Vec<&[f32]> = floats.iter().map(Vec::as_slice).collect();
                (Samples::F32(interleave(&parts, &floats, height, width)), Some(f32::NAN))
            }
        };
        Ok(Stack { height, width, channels, samples, no_data })
    }

    /// Values as floats, NaN where there is no data.
    fn floats(&self) -> Vec<f32> {
        let value = |v: f32| if self.is_missing(v) { f32::NAN } else { v };
        match &self.samples {
            Samples::U8(values) => values.iter().map(|v| value(f32::from(*v))).collect(),
            Samples::U16(values) => values.iter().map(|v| value(f32::from(*v))).collect(),
            Samples::F32(values) => values.iter().map(|v| value(*v)).collect(),
        }
    }

    /// Keeps the selected channels, in their order.
    pub fn select(self, channels: &Channels) -> Result<Stack, DecodeError> {
        let found = self.channels;
        if channels.select.is_empty() {
            if found > MAX_CHANNELS {
                return Err(DecodeError::TooManyChannels(found));
            }
            let expected = channels.ranges.len();
            return match expected == 0 || expected == found {
                true => Ok(self),
                false => Err(DecodeError::WrongChannels { found, expected }),
            };
        }
        let numbers: Vec<usize> = channels.select.iter().map(|n| usize::from(*n)).collect();
        if let Some(missing) = numbers.iter().find(|n| !(1..=found).contains(n)) {
            return Err(DecodeError::MissingChannel { found, missing: *missing });
        }
        fn pick<T: Copy>(values: &[T], channels: usize, numbers: &[usize]) -> Vec<T> {
            values.chunks_exact(channels).flat_map(|pixel| numbers.iter().map(|n| pixel[n - 1])).collect()
        }
        let samples = match &self.samples {
            Samples::U8(values) => Samples::U8(pick(values, found, &numbers)),
            Samples::U16(values) => Samples::U16(pick(values, found, &numbers)),
            Samples::F32(values) => Samples::F32(pick(values, found, &numbers)),
        };
        Ok(Stack { channels: numbers.len(), samples, ..self })
    }

    /// Maps the range of each channel to the whole range of the pixels. Values outside are clamped,
    /// or refused if the ranges are those of 8 bits; pixels without data become 0.
    pub fn into_image(self, channels: &Channels) -> Result<Image, DecodeError> {
        if channels.ranges.len() != self.channels {
            return Err(DecodeError::WrongChannels { found: self.channels, expected: channels.ranges.len() });
        }
        let pixels = match &self.samples {
            Samples::U8(values) if channels.has_8_bits() => {
                values.iter().map(|v| if self.is_missing(f32::from(*v)) { 0 } else { *v }).collect()
            }
            Samples::U8(values) => self.scaled(values, channels)?,
            Samples::U16(values) => self.scaled(values, channels)?,
            Samples::F32(values) => self.scaled(values, channels)?,
        };
        Ok(Image { height: self.height, width: self.width, channels: self.channels, pixels })
    }

    fn scaled<T: Copy + Into<f32>>(&self, values: &[T], channels: &Channels) -> Result<Pixels, DecodeError> {
        let max = f32::from(u16::MAX);
        let is_bounded = channels.has_8_bits();
        let scales: Vec<[f32; 2]> = channels.ranges.iter().map(|[low, high]| [*low, max / (high - low)]).collect();
        let mut out = Vec::with_capacity(values.len());
        for pixel in values.chunks_exact(self.channels) {
            for (v, [low, scale]) in pixel.iter().zip(&scales) {
                let v: f32 = (*v).into();
                if self.is_missing(v) {
                    out.push(0);
                } else if is_bounded && !(0.0..=255.0).contains(&v) && v.is_finite() {
                    let is_white = v > 255.0;
                    let level = if is_white { 255.0 } else { 0.0 };
                    return Err(DecodeError::OutsideLevels { value: v, level, is_white });
                } else if v.is_finite() {
                    // Conversion to an integer saturates.
                    out.push(((v - low) * scale).round() as u16);
                } else {
                    return Err(DecodeError::NotFinite);
                }
            }
        }
        Ok(out.into())
    }
}

/// Checks the number of values of all channels against [`MAX_VALUES`].
pub(super) fn check_values(n: usize) -> Result<(), DecodeError> {
    if n > MAX_VALUES { Err(DecodeError::TooManyValues) } else { Ok(()) }
}

impl Samples {
    fn as_u8(&self) -> Option<&[u8]> {
        if let Samples::U8(values) = self { Some(values) } else { None }
    }

    fn as_u16(&self) -> Option<&[u16]> {
        if let Samples::U16(values) = self { Some(values) } else { None }
    }
}

/// Values of all parts pixel by pixel, `[height, width, channels]`.
fn interleave<T: Copy>(parts: &[Stack], values: &[&[T]], height: usize, width: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(height * width * parts.iter().map(|part| part.channels).sum::<usize>());
    for y in 0..height {
        for x in 0..width {
            for (part, values) in parts.iter().zip(values) {
                let pixel = y * part.height / height * part.width + x * part.width / width;
                out.extend_from_slice(&values[pixel * part.channels..][..part.channels]);
            }
        }
    }
    out
}

impl From<Image> for Stack {
    fn from(image: Image) -> Stack {
        let Image { height, width, channels, pixels } = image;
        let samples = match pixels {
            Pixels::U8(values) => Samples::U8(values),
            Pixels::U16(values) => Samples::U16(values),
        };
        Stack { height, width, channels, samples, no_data: None }
    }
}

impl TryFrom<Stack> for Raw {
    type Error = DecodeError;

    /// A gray or RGB image.
    fn try_from(stack: Stack) -> Result<Raw, DecodeError> {
        let Stack { height, width, channels, samples, .. } = stack;
        let (width, height) = (width as u32, height as u32);
        let buffer_error = DecodeError::Broken { format: "image", reason: "fewer values than declared".into() };
        let image = match (samples, channels) {
            (Samples::U8(values), 1) => GrayImage::from_raw(width, height, values).map(DynamicImage::from),
            (Samples::U8(values), 3) => RgbImage::from_raw(width, height, values).map(DynamicImage::from),
            (Samples::U16(values), 1) => ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageLuma16),
            (Samples::U16(values), 3) => ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageRgb16),
            (Samples::F32(values), 3) => ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageRgb32F),
            (Samples::F32(values), 1) => {
                let rgb = values.into_iter().flat_map(|gray| [gray; 3]).collect();
                ImageBuffer::from_raw(width, height, rgb).map(DynamicImage::ImageRgb32F)
            }
            (_, channels) => {
                let reason = format!("{channels} channels that are not colors, which `--channels all` reads");
                return Err(DecodeError::UnreadKind { format: "NumPy array", reason });
            }
        };
        Ok(Raw { image: image.ok_or(buffer_error)?, white_is_zero: false, orientation: None })
    }
}

impl TryFrom<Raw> for Stack {
    type Error = DecodeError;

    /// The channels of a photo without alpha: gray or RGB.
    fn try_from(raw: Raw) -> Result<Stack, DecodeError> {
        let mut image = match raw.image {
            DynamicImage::ImageLumaA8(_) => raw.image.to_luma8().into(),
            DynamicImage::ImageLumaA16(_) => raw.image.to_luma16().into(),
            DynamicImage::ImageRgba8(_) => raw.image.to_rgb8().into(),
            DynamicImage::ImageRgba16(_) => raw.image.to_rgb16().into(),
            other => other,
        };
        image.apply_orientation(raw.orientation.unwrap_or(Orientation::NoTransforms));
        let (height, width) = (image.height() as usize, image.width() as usize);
        let channels = usize::from(image.color().channel_count());
        let samples = match image {
            DynamicImage::ImageLuma16(image) => Samples::U16(image.into_raw()),
            DynamicImage::ImageRgb16(image) => Samples::U16(image.into_raw()),
            DynamicImage::ImageLuma8(image) => Samples::U8(image.into_raw()),
            other => Samples::U8(other.into_rgb8().into_raw()),
        };
        Ok(Stack { height, width, channels, samples, no_data: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stack(samples: Samples, channels: usize, no_data: Option<f32>) -> Stack {
        Stack { height: 1, width: 2, channels, samples, no_data }
    }

    fn channels(select: &[u16], ranges: &[[f32; 2]]) -> Channels {
        Channels { select: select.to_vec(), ranges: ranges.to_vec(), ..Channels::default() }
    }

    fn image(stack: Stack, channels: &Channels) -> Result<Image, String> {
        let image = stack.select(channels).and_then(|stack| stack.into_image(channels));
        image.map_err(|e| e.to_string())
    }

    #[test]
    fn ranges_map_to_16_bits_and_clamp() {
        let samples = Samples::F32(vec![-1.0, 10.0, 0.5, 25.0]);
        let image = image(stack(samples, 2, None), &channels(&[], &[[0.0, 1.0], [10.0, 20.0]])).unwrap();
        assert_eq!(image.pixels, vec![0u16, 0, 32768, 65535].into());
    }

    #[test]
    fn channels_are_selected_in_order() {
        let samples = || Samples::U8(vec![1, 2, 3, 4, 5, 6]);
        let bytes = [[0.0, 255.0]; 2];
        let picked = image(stack(samples(), 3, None), &channels(&[3, 1], &bytes)).unwrap();
        assert_eq!((picked.channels, picked.pixels), (2, vec![3u8, 1, 6, 4].into()));
        let error = image(stack(samples(), 3, None), &channels(&[4, 1], &bytes)).unwrap_err();
        assert!(error.contains("no channel 4"), "{error}");
        let error = image(stack(samples(), 3, None), &channels(&[], &bytes)).unwrap_err();
        assert!(error.contains("3 channels, not 2"), "{error}");
    }

    #[test]
    fn parts_are_joined_at_the_size_of_the_largest() {
        let part = |width, samples, no_data| Stack { height: 1, width, channels: 1, samples, no_data };
        let large = || part(4, Samples::U16(vec![1, 2, 3, 4]), None);
        let joined = Stack::join(vec![large(), part(2, Samples::U16(vec![8, 9]), None)]).unwrap();
        assert_eq!((joined.width, joined.channels), (4, 2));
        assert_eq!(joined.samples.as_u16().unwrap(), [1, 8, 2, 8, 3, 9, 4, 9]);
        // Other types, or other values without data: floats.
        let joined = Stack::join(vec![large(), part(2, Samples::U16(vec![0, 9]), Some(0.0))]).unwrap();
        let Samples::F32(values) = &joined.samples else { panic!("floats") };
        assert_eq!(values[..2].iter().map(|v| joined.is_missing(*v)).collect::<Vec<_>>(), [false, true]);
        assert_eq!(values[4..], [3.0, 9.0, 4.0, 9.0]);
        assert!(Stack::join((0..65).map(|_| large()).collect()).is_err());
    }

    #[test]
    fn pixels_without_data_are_0_and_other_nan_are_refused() {
        let samples = || Samples::F32(vec![f32::NAN, 1.0]);
        let range = channels(&[], &[[0.0, 2.0]]);
        assert_eq!(image(stack(samples(), 1, Some(f32::NAN)), &range).unwrap().pixels, vec![0u16, 32768].into());
        assert!(image(stack(samples(), 1, None), &range).unwrap_err().contains("NaN"));
        let infinite = Samples::F32(vec![f32::INFINITY, 1.0]);
        assert!(image(stack(infinite, 1, Some(-9999.0)), &range).unwrap_err().contains("infinite"));
    }
}

//! Decoded images.

use std::borrow::Cow;

/// A decoded image, `[height, width, channels]`, row-major.
///
/// # Examples
///
/// ```
/// let gray = byol::Image { height: 2, width: 3, channels: 3, pixels: vec![128u8; 2 * 3 * 3].into() };
/// let dataset = byol::Dataset::from_images(vec![gray; 10], None);
/// assert_eq!(dataset.train.len(), 10);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Height in pixels, at least 1.
    pub height: usize,
    /// Width in pixels, at least 1.
    pub width: usize,
    /// Values per pixel, 1 to [`MAX_CHANNELS`].
    pub channels: usize,
    /// `height × width × channels` values.
    pub pixels: Pixels,
}

/// Values of an image. The whole range of the type stands for 0..1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pixels {
    /// Values in 0..=255.
    U8(Vec<u8>),
    /// Values in 0..=65535: of files with more than 8 bits that are read with all their channels.
    U16(Vec<u16>),
}

impl Pixels {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Pixels::U8(values) => values.len(),
            Pixels::U16(values) => values.len(),
        }
    }

    /// True if there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size in memory.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Pixels::U8(values) => values.len(),
            Pixels::U16(values) => 2 * values.len(),
        }
    }

    /// Values in 0..=255, without a copy if they have 8 bits.
    #[doc(hidden)]
    pub fn into_u8(self) -> Vec<u8> {
        match self {
            Pixels::U8(values) => values,
            Pixels::U16(_) => self.to_u8().into_owned(),
        }
    }

    #[cfg(test)]
    pub(crate) fn u8_mut(&mut self) -> &mut [u8] {
        match self {
            Pixels::U8(values) => values,
            Pixels::U16(_) => panic!("values of 16 bits"),
        }
    }

    /// Values in 0..=255.
    #[doc(hidden)]
    pub fn to_u8(&self) -> Cow<'_, [u8]> {
        match self {
            Pixels::U8(values) => Cow::Borrowed(values),
            // Rounded to the nearest: 65535 = 257 · 255.
            Pixels::U16(values) => values.iter().map(|v| ((u32::from(*v) + 128) / 257) as u8).collect(),
        }
    }
}

impl From<Vec<u8>> for Pixels {
    fn from(values: Vec<u8>) -> Pixels {
        Pixels::U8(values)
    }
}

impl From<Vec<u16>> for Pixels {
    fn from(values: Vec<u16>) -> Pixels {
        Pixels::U16(values)
    }
}

impl FromIterator<u8> for Pixels {
    fn from_iter<I: IntoIterator<Item = u8>>(values: I) -> Pixels {
        Pixels::U8(values.into_iter().collect())
    }
}

impl Image {
    /// Reason that the values are not an image; `None` if they are.
    pub(crate) fn problem(&self) -> Option<String> {
        let &Image { height, width, channels, .. } = self;
        if !(1..=MAX_CHANNELS).contains(&channels) || height == 0 || width == 0 {
            return Some(format!(
                "[{height}, {width}, {channels}] is not the shape of an image, [H, W, C] with C up to {MAX_CHANNELS}"
            ));
        }
        let (n, values) = (height * width * channels, self.pixels.len());
        (values != n).then(|| format!("{values} values for the shape [{height}, {width}, {channels}]"))
    }

    /// RGB values in 0..=255 for pictures and comparisons by eye, `[height, width, 3]`: false color
    /// from the last, middle and first channel of more than three, gray from one or two.
    #[doc(hidden)]
    pub fn to_rgb8(&self) -> Cow<'_, [u8]> {
        let values = self.pixels.to_u8();
        if self.channels == CHANNELS {
            return values;
        }
        let rgb = shown_channels(self.channels);
        values.chunks_exact(self.channels).flat_map(|pixel| rgb.map(|c| pixel[c])).collect()
    }
}

/// Channels shown as red, green and blue. Bands of satellites are in order of wavelength, so that
/// the last of them is red.
#[doc(hidden)]
pub fn shown_channels(channels: usize) -> [usize; 3] {
    match channels {
        1 | 2 => [0; 3],
        3 => [0, 1, 2],
        n => [n - 1, n / 2, 0],
    }
}

/// Channels of images that are read as RGB, which is the default.
pub const CHANNELS: usize = 3;

/// Largest number of channels.
pub const MAX_CHANNELS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_have_three_channels_of_8_bits() {
        let image = |channels, pixels| Image { height: 1, width: 1, channels, pixels };
        assert_eq!(*image(3, vec![1u8, 2, 3].into()).to_rgb8(), [1, 2, 3]);
        assert_eq!(*image(1, vec![65535u16].into()).to_rgb8(), [255; 3]);
        assert_eq!(*image(5, vec![0u16, 257, 514, 771, 1028].into()).to_rgb8(), [4, 2, 0]);
    }

    #[test]
    fn shapes_are_checked() {
        let image = |channels, n| Image { height: 1, width: 2, channels, pixels: vec![0u8; n].into() };
        assert_eq!(image(13, 26).problem(), None);
        assert!(image(0, 0).problem().unwrap().contains("[1, 2, 0]"));
        assert!(image(65, 130).problem().unwrap().contains("up to 64"));
        assert!(image(4, 7).problem().unwrap().contains("7 values"));
    }
}

//! Decoded images.

/// A decoded image, `[height, width, channels]`, row-major, in 0..=255.
///
/// # Examples
///
/// ```
/// let gray = byol::Image { height: 2, width: 3, channels: 3, pixels: vec![128; 2 * 3 * 3] };
/// let dataset = byol::Dataset::from_images(vec![gray; 10], None);
/// assert_eq!(dataset.train.len(), 10);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Height in pixels, at least 1.
    pub height: usize,
    /// Width in pixels, at least 1.
    pub width: usize,
    /// Values per pixel.
    pub channels: usize,
    /// `height × width × channels` values.
    pub pixels: Vec<u8>,
}

impl Image {
    /// Reason that the values are not an RGB image; `None` if they are.
    pub(crate) fn problem(&self) -> Option<String> {
        let &Image { height, width, channels, .. } = self;
        if channels != CHANNELS || height == 0 || width == 0 {
            return Some(format!("[{height}, {width}, {channels}] is not the shape of an RGB image"));
        }
        let (n, values) = (height * width * channels, self.pixels.len());
        (values != n).then(|| format!("{values} values for the shape [{height}, {width}, {channels}]"))
    }
}

/// Channels of every image: decoders convert to RGB.
pub const CHANNELS: usize = 3;

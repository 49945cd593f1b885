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

/// Channels of every image: decoders convert to RGB.
pub const CHANNELS: usize = 3;

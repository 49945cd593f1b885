//! Levels: the pixel values that mean black and white in images of more than 8 bits.
//!
//! 8-bit images have 0 and 255. In 16-bit and floating-point images the file does not say: cameras
//! store 10, 12 or 14 bits in 16, and floats are in 0..1, 0..255 or a physical unit. The levels are
//! detected once per data set, shown to the user, and stored with the encoder, so that training,
//! evaluation and embedding read the same pixels.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{decode::log_mel::BANDS, file_pattern::FilePattern};
use crate::image::{CHANNELS, MAX_CHANNELS};

/// Mapping of file values to pixels: the values of black and white in RGB images of more than 8
/// bits, or the range of each channel. What is not known yet is detected from the data.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Levels {
    /// Black and white of 16-bit images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub int16: Option<[f32; 2]>,
    /// Black and white of floating-point images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub float: Option<[f32; 2]>,
    /// The channels, if images are not read as RGB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<Channels>,
    /// Conversion of sounds, if the files are sounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sound: Option<Sound>,
}

/// Sounds, read as log-mel spectrograms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sound {
    /// Sample rate in Hz. Sounds of other rates are converted to it.
    pub rate: u32,
}

/// Images with the channels of their files in place of RGB.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Channels {
    /// Numbers of the channels in the files, from 1, in the order of the images' channels. Empty
    /// for all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub select: Vec<u16>,
    /// Patterns of the files of an image, such as `{id}_B02.tif`, whose channels follow each other.
    /// Empty for one file per image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FilePattern>,
    /// The pages of a TIFF file are channels.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pages: bool,
    /// Values that become 0 and 1, of each channel. Empty if not known yet.
    pub ranges: Vec<[f32; 2]>,
}

impl FromStr for Channels {
    type Err = String;

    /// Parses the value of the flag `--channels`, without ranges.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains("{id}") {
            let files = text.split(',').map(|pattern| pattern.trim().parse()).collect::<Result<_, _>>()?;
            return Ok(Channels { files, ..Channels::default() });
        }
        if matches!(text, "all" | "pages") {
            return Ok(Channels { pages: text == "pages", ..Channels::default() });
        }
        let numbers: Option<Vec<u16>> = text.split(',').map(|n| n.trim().parse().ok().filter(|n| *n > 0)).collect();
        let numbers = numbers.filter(|numbers| numbers.len() <= MAX_CHANNELS);
        numbers.map(|select| Channels { select, ..Channels::default() }).ok_or_else(|| {
            format!(
                "invalid channels `{text}` (expected `all`, `pages`, up to {MAX_CHANNELS} numbers from 1, e.g. \
                 `4,3,2`, or names of files with {{id}})"
            )
        })
    }
}

impl fmt::Display for Channels {
    /// Value of the flag `--channels`.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let names: Vec<String> = match self.files.is_empty() {
            true => self.select.iter().map(u16::to_string).collect(),
            false => self.files.iter().map(FilePattern::to_string).collect(),
        };
        match names.is_empty() {
            true => f.write_str(if self.pages { "pages" } else { "all" }),
            false => f.write_str(&names.join(",")),
        }
    }
}

impl Channels {
    /// Number of channel `c` in the files, from 1.
    pub fn number(&self, c: usize) -> usize {
        self.select.get(c).map_or(c + 1, |n| usize::from(*n))
    }

    /// True if both read the same channels, with whatever ranges.
    #[doc(hidden)]
    pub fn is_same_selection(&self, other: &Channels) -> bool {
        (&self.select, &self.files, self.pages) == (&other.select, &other.files, other.pages)
    }

    /// True for the ranges of 8 bits, which bound all values of the type. Other ranges clip.
    pub(super) fn has_8_bits(&self) -> bool {
        self.ranges.iter().all(|range| *range == [0.0, 255.0])
    }
}

/// Percentiles that bound the range of a channel.
pub(super) const PERCENTILES: [f64; 2] = [0.001, 0.999];

impl Levels {
    /// Levels of encoders trained before levels were stored with them.
    pub fn legacy() -> Levels {
        Levels { int16: Some([0.0, 65535.0]), float: Some([0.0, 1.0]), ..Levels::default() }
    }

    /// True for [`Levels::legacy`].
    pub(crate) fn is_legacy(&self) -> bool {
        *self == Levels::legacy()
    }

    /// One pair of levels for 16-bit and floating-point images.
    pub fn uniform(black: f32, white: f32) -> Levels {
        Levels { int16: Some([black, white]), float: Some([black, white]), ..Levels::default() }
    }

    /// These levels, completed by those of `other`.
    pub fn or(self, other: Levels) -> Levels {
        Levels {
            int16: self.int16.or(other.int16),
            float: self.float.or(other.float),
            channels: self.channels.or(other.channels),
            sound: self.sound.or(other.sound),
        }
    }

    /// Levels of all channels of the files, or of those with these numbers.
    pub fn with_channels(select: Vec<u16>) -> Levels {
        Levels { channels: Some(Channels { select, ..Channels::default() }), ..Levels::default() }
    }

    /// Patterns of the files of an image. Empty for one file per image.
    pub(crate) fn files(&self) -> &[FilePattern] {
        self.channels.as_ref().map_or(&[], |channels| &channels.files)
    }

    /// Number of channels of the images. 0 if it is not known yet.
    pub fn n_channels(&self) -> usize {
        match (&self.channels, &self.sound) {
            (Some(channels), _) => channels.ranges.len(),
            (None, Some(_)) => 1,
            (None, None) => CHANNELS,
        }
    }

    /// Levels of images of this kind.
    pub(super) fn get(&self, kind: SampleKind) -> Option<[f32; 2]> {
        match kind {
            SampleKind::Int16 => self.int16,
            SampleKind::Float => self.float,
        }
    }
}

impl fmt::Display for Levels {
    /// One sentence for a note, such as `16-bit images: black is 0, white is 4095`.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let kinds = [("16-bit", self.int16), ("floating-point", self.float)];
        let parts: Vec<String> = kinds
            .into_iter()
            .filter_map(|(kind, levels)| {
                levels.map(|[black, white]| format!("{kind} images: black is {black}, white is {white}"))
            })
            .collect();
        match self.sound {
            Some(Sound { rate }) => write!(f, "sounds at {rate} Hz: log-mel spectrograms of {BANDS} bands"),
            None => f.write_str(&parts.join("; ")),
        }
    }
}

/// Kind of images of more than 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SampleKind {
    /// Unsigned 16-bit integers.
    Int16,
    /// Floats, and integers of other types.
    Float,
}

/// Values of images of one kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Range {
    pub kind: SampleKind,
    pub min: f32,
    pub max: f32,
    /// True if all values are integers.
    pub is_whole: bool,
}

/// White of integers with 8, 10, 12, 14 and 16 bits.
const WHITES: [f32; 5] = [255.0, 1023.0, 4095.0, 16383.0, 65535.0];

/// Largest floating-point value up to which fractions are read neither as 0..1 nor as 0..255.
const MAX_AMBIGUOUS: f32 = 16.0;

impl Range {
    /// Range of values, which must not be NaN.
    pub fn new(kind: SampleKind, values: impl Iterator<Item = f32>) -> Range {
        let start = Range { kind, min: f32::INFINITY, max: f32::NEG_INFINITY, is_whole: true };
        values.fold(start, |range, v| Range {
            kind,
            min: range.min.min(v),
            max: range.max.max(v),
            is_whole: range.is_whole && v.fract() == 0.0,
        })
    }

    /// Range of the values of both.
    pub fn union(self, other: Range) -> Range {
        Range {
            kind: self.kind,
            min: self.min.min(other.min),
            max: self.max.max(other.max),
            is_whole: self.is_whole && other.is_whole,
        }
    }

    /// Black and white of images with these values.
    ///
    /// # Errors
    /// Description of the values, if they do not tell.
    pub fn levels(&self) -> Result<[f32; 2], String> {
        let Range { min, max, is_whole, .. } = *self;
        let depth = WHITES.into_iter().find(|white| max <= *white).map(|white| [0.0, white]);
        if self.kind == SampleKind::Int16 {
            return Ok(depth.unwrap_or([0.0, 65535.0]));
        }
        // Interpolation and rounding may exceed the levels by less than half a gray level.
        let is_within = |[black, white]: [f32; 2]| {
            let slack = (white - black) / 255.0 / 2.0;
            min >= black - slack && max <= white + slack
        };
        let levels = match () {
            () if is_within([0.0, 1.0]) => Some([0.0, 1.0]),
            () if is_within([-1.0, 1.0]) => Some([-1.0, 1.0]),
            () if is_within([0.0, 255.0]) && (is_whole || max > MAX_AMBIGUOUS) => Some([0.0, 255.0]),
            () if min >= 0.0 && is_whole => depth,
            () => None,
        };
        levels.ok_or_else(|| format!("values from {min} to {max}"))
    }
}

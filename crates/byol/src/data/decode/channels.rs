//! Images with all channels of their files: satellite bands, stains, 16-bit gray.

use std::{fs, path::Path};

use super::{
    DecodeError, npy,
    stack::{Samples, Stack, check_values},
    tiff,
};
use crate::{
    data::{
        file_pattern::FilePattern,
        levels::{Channels, PERCENTILES},
    },
    image::Image,
};

/// Most values per channel and image that enter the percentiles.
const SAMPLED_VALUES: usize = 1 << 14;

/// Decodes the selected channels of a file.
pub(super) fn read(bytes: &[u8], channels: &Channels) -> Result<Stack, DecodeError> {
    let stack = if npy::is_npy(bytes) {
        npy::read(bytes)?
    } else if tiff::is_tiff(bytes) {
        if channels.pages { tiff::pages(bytes)? } else { tiff::channels(bytes)? }
    } else {
        super::decode(bytes)?.try_into()?
    };
    stack.select(channels)
}

/// Decodes the channels of all files of the image whose first file is `path`.
pub(super) fn read_files(path: &Path, channels: &Channels) -> Result<Stack, DecodeError> {
    let one = |pattern: &FilePattern| {
        let file = channels.files[0].sibling(path, pattern).ok_or_else(|| DecodeError::OtherName(pattern.clone()))?;
        let name = || file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Neither a missing file nor a named pipe, which would wait for a writer.
        if !file.is_file() {
            return Err(DecodeError::MissingFile(name()));
        }
        let bytes = fs::read(&file)?;
        let whole = Channels { pages: channels.pages, ..Channels::default() };
        read(&bytes, &whole).map_err(|source| match source {
            DecodeError::Read(e) => DecodeError::Read(e),
            source => DecodeError::File { name: name(), source: Box::new(source) },
        })
    };
    let (mut stacks, mut values) = (Vec::new(), 0);
    for pattern in &channels.files {
        let stack = one(pattern)?;
        values += stack.height * stack.width * stack.channels;
        check_values(values)?;
        stacks.push(stack);
    }
    Stack::join(stacks)?.select(channels)
}

/// Maps the range of each channel to the whole range of the pixels. Ranges that are not known, as
/// for an image on its own, are its own.
pub(super) fn image(stack: Stack, channels: &Channels) -> Result<Image, DecodeError> {
    if !channels.ranges.is_empty() {
        return stack.into_image(channels);
    }
    let (sampled, has_8_bits) = sample(&stack)?;
    let of_channel = |(c, reason)| DecodeError::UnknownLevels(format!("channel {}: {reason}", channels.number(c)));
    let ranges = ranges(sampled, has_8_bits).map_err(of_channel)?;
    stack.into_image(&Channels { ranges, ..channels.clone() })
}

/// Some values of each channel, without pixels that have no data, and whether they have 8 bits.
pub(super) fn sample(stack: &Stack) -> Result<(Vec<Vec<f32>>, bool), DecodeError> {
    // Coprime to the width, so that the sample is not of a few columns.
    let mut step = (stack.height * stack.width).div_ceil(SAMPLED_VALUES);
    while step > 1 && greatest_common_divisor(step, stack.width) > 1 {
        step += 1;
    }
    let value = |i: usize| match &stack.samples {
        Samples::U8(values) => f32::from(values[i]),
        Samples::U16(values) => f32::from(values[i]),
        Samples::F32(values) => values[i],
    };
    let mut sampled = vec![Vec::new(); stack.channels];
    for pixel in (0..stack.height * stack.width).step_by(step) {
        for (c, values) in sampled.iter_mut().enumerate() {
            let v = value(pixel * stack.channels + c);
            if !stack.is_missing(v) {
                if !v.is_finite() {
                    return Err(DecodeError::NotFinite);
                }
                values.push(v);
            }
        }
    }
    Ok((sampled, matches!(stack.samples, Samples::U8(_))))
}

pub(super) fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// Ranges of channels by the percentiles of their sampled values; 0 to 255 for 8 bits.
///
/// # Errors
/// The first channel without a range, from 0, and the reason.
pub(in crate::data) fn ranges(sampled: Vec<Vec<f32>>, has_8_bits: bool) -> Result<Vec<[f32; 2]>, (usize, String)> {
    let range = |(c, mut values): (usize, Vec<f32>)| {
        if values.is_empty() {
            return Err((c, "no pixel has data".to_owned()));
        }
        values.sort_unstable_by(f32::total_cmp);
        let at = |fraction: f64| values[((values.len() - 1) as f64 * fraction).round() as usize];
        let [low, high] = PERCENTILES.map(at);
        // A channel with few bright spots may have no spread between the percentiles.
        let [low, high] = if low < high { [low, high] } else { [at(0.0), at(1.0)] };
        match low < high {
            true => Ok([low, high]),
            false => Err((c, format!("every pixel has the value {low}"))),
        }
    };
    if has_8_bits {
        return Ok(vec![[0.0, 255.0]; sampled.len()]);
    }
    sampled.into_iter().enumerate().map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_percentiles() {
        let values: Vec<f32> = (0..=1000).map(|i| i as f32).collect();
        assert_eq!(ranges(vec![values], false), Ok(vec![[1.0, 999.0]]));
        assert_eq!(ranges(vec![vec![7.0; 9]], true), Ok(vec![[0.0, 255.0]]));
        let spots: Vec<f32> = std::iter::repeat_n(0.0, 5000).chain([9.0]).collect();
        assert_eq!(ranges(vec![spots], false), Ok(vec![[0.0, 9.0]]));
        assert_eq!(ranges(vec![vec![1.0, 2.0], vec![7.0; 9]], false).unwrap_err().0, 1);
        assert!(ranges(vec![vec![]], false).unwrap_err().1.contains("no pixel has data"));
    }
}

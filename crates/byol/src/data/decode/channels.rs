//! Images with all channels of their files: satellite bands, stains, 16-bit gray.

use super::{
    DecodeError, npy,
    stack::{Samples, Stack},
    tiff,
};
use crate::{
    data::levels::{Channels, PERCENTILES},
    image::Image,
};

/// Most values per channel and image that enter the percentiles.
const SAMPLED_VALUES: usize = 1 << 14;

/// Decodes all channels.
fn read(bytes: &[u8]) -> Result<Stack, DecodeError> {
    if npy::is_npy(bytes) {
        npy::read(bytes)
    } else if tiff::is_tiff(bytes) {
        tiff::channels(bytes)
    } else {
        super::decode(bytes)?.try_into()
    }
}

/// Decodes the selected channels and maps their ranges to the whole range of the pixels.
pub(super) fn decode(bytes: &[u8], channels: &Channels) -> Result<Image, DecodeError> {
    read(bytes)?.select(channels)?.into_image(channels)
}

/// Some values of each selected channel, without pixels that have no data, and whether they have 8
/// bits.
pub(super) fn sample(bytes: &[u8], channels: &Channels) -> Result<(Vec<Vec<f32>>, bool), DecodeError> {
    let stack = read(bytes)?.select(channels)?;
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

fn greatest_common_divisor(a: usize, b: usize) -> usize {
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

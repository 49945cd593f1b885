//! NumPy arrays `[H, W, C]` as images.

use std::io::Cursor;

use npyz::{Deserialize, NpyFile, Order};

use super::{
    DecodeError, MAX_PIXELS, check_size,
    stack::{Samples, Stack},
};
use crate::data::levels::SampleKind;

const MAGIC: &[u8] = b"\x93NUMPY";

/// Longest header that is parsed.
pub(crate) const MAX_HEADER: usize = 4096;

/// Largest number of values: 2 GiB of 32-bit floats.
const MAX_VALUES: usize = 4 * MAX_PIXELS;

/// True if a file starts as an array does.
pub(crate) fn is_npy(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

/// True if these first bytes of a file are the header of an array that is an image.
pub(super) fn is_image(head: &[u8]) -> bool {
    header(head).is_ok_and(|header| header.dtype().is_some() && header.is_channels_last())
}

/// Kind of an image of more than 8 bits, from the header.
pub(super) fn kind(head: &[u8]) -> Option<SampleKind> {
    match header(head).ok()?.dtype()? {
        "u1" => None,
        "u2" => Some(SampleKind::Int16),
        _ => Some(SampleKind::Float),
    }
}

/// Header of an array.
pub(crate) struct Header {
    /// Lengths of the axes.
    pub shape: Vec<u64>,
    /// The dictionary.
    text: String,
}

/// Types of values that are read.
const DTYPES: [&str; 6] = ["u1", "u2", "i2", "i4", "f4", "f8"];

impl Header {
    /// Type of the values, if it is read.
    fn dtype(&self) -> Option<&'static str> {
        let is_type = |kind: &&&str| self.text.contains(&format!("{kind}'"));
        DTYPES.iter().find(is_type).copied()
    }

    /// True for `[H, W, C]` with few channels. In arrays of other layouts, such as `[C, H, W]` or
    /// `[N, H, W]`, the last axis is not shorter than the others.
    fn is_channels_last(&self) -> bool {
        match self.shape[..] {
            [h, w, c] => h > 0 && w > 0 && c > 0 && (c <= 4 || c < h.min(w)),
            _ => false,
        }
    }
}

/// Checks that the header is safe for the parser: short, with a single dictionary and shape. Deeply
/// nested headers would take it practically forever.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn header(start: &[u8]) -> Result<Header, String> {
    let not_npy = || "not a .npy file".to_owned();
    let rest = start.strip_prefix(MAGIC).ok_or_else(not_npy)?;
    let (header_len, offset) = match rest {
        [1, _, a, b, ..] => (usize::from(u16::from_le_bytes([*a, *b])), 10),
        [2 | 3, _, a, b, c, d, ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, 12),
        _ => return Err(not_npy()),
    };
    let text = start
        .get(offset..offset + header_len.min(MAX_HEADER))
        .ok_or("the header is truncated or longer than 4096 bytes")?;
    let count = |bytes: &[u8]| text.iter().filter(|b| bytes.contains(b)).count();
    if count(b"{") != 1 || count(b"(") != 1 || count(b"[") > 0 {
        return Err("the header does not describe an array of numbers".into());
    }
    let shape =
        text.split(|b| *b == b'(').nth(1).and_then(|rest| rest.split(|b| *b == b')').next()).unwrap_or_default();
    let shape = String::from_utf8_lossy(shape);
    let lengths = shape.split(',').map(str::trim).filter(|t| !t.is_empty());
    let lengths: Option<Vec<u64>> = lengths.map(|t| t.parse().ok()).collect();
    let lengths = lengths.filter(|lengths| {
        let product = lengths.iter().try_fold(1u64, |product, n| product.checked_mul(*n));
        product.is_some_and(|n| n <= u64::MAX / 8)
    });
    let shape = lengths.ok_or_else(|| format!("invalid shape ({shape})"))?;
    Ok(Header { shape, text: String::from_utf8_lossy(text).into_owned() })
}

/// Reads an array.
pub(super) fn read(bytes: &[u8]) -> Result<Stack, DecodeError> {
    let broken = |reason: String| DecodeError::Broken { format: "NumPy", reason };
    let unread = |reason: String| DecodeError::UnreadKind { format: "NumPy array", reason };
    let header = header(&bytes[..bytes.len().min(MAX_HEADER)]).map_err(broken)?;
    let npy = NpyFile::new(Cursor::new(bytes)).map_err(|e| broken(e.to_string()))?;
    let shape: Option<Vec<usize>> = npy.shape().iter().map(|n| usize::try_from(*n).ok()).collect();
    let (height, width, channels) = match shape.as_deref() {
        Some([h, w, c]) if header.is_channels_last() => (*h, *w, *c),
        _ => {
            let shape = npy.shape();
            return Err(unread(format!("shape {shape:?} instead of [H, W, C] with fewer channels than pixels a side")));
        }
    };
    check_size(height, width)?;
    if npy.order() != Order::C {
        return Err(unread("Fortran order instead of C order".into()));
    }
    // The header is not trusted: no more is allocated than the file can hold.
    let n = height.saturating_mul(width).saturating_mul(channels);
    if n > bytes.len() {
        return Err(broken(format!("{n} values do not fit into {} bytes", bytes.len())));
    }
    if n > MAX_VALUES {
        return Err(unread(format!("more than {MAX_VALUES} values")));
    }
    let descr = npy.dtype().descr();
    let kind = descr.trim_matches('\'').trim_start_matches(['<', '>', '|', '=']);
    fn values<T: Deserialize>(npy: NpyFile<Cursor<&[u8]>>) -> Result<Vec<T>, DecodeError> {
        let broken = |reason: String| DecodeError::Broken { format: "NumPy", reason };
        let data = npy.try_data::<T>().map_err(|npy| broken(format!("dtype {}", npy.dtype().descr())))?;
        data.collect::<std::io::Result<_>>().map_err(|_| broken("its data end too early".into()))
    }
    let samples = match kind {
        "u1" => Samples::U8(values(npy)?),
        "u2" => Samples::U16(values(npy)?),
        "i2" => Samples::F32(values::<i16>(npy)?.into_iter().map(f32::from).collect()),
        "i4" => Samples::F32(values::<i32>(npy)?.into_iter().map(|v| v as f32).collect()),
        "f4" => Samples::F32(values(npy)?),
        "f8" => Samples::F32(values::<f64>(npy)?.into_iter().map(|v| v as f32).collect()),
        _ => {
            let reason = format!("dtype {descr} instead of uint8, uint16, int16, int32, float32 or float64");
            return Err(unread(reason));
        }
    };
    Ok(Stack { height, width, channels, samples, no_data: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        text.extend(std::iter::repeat_n(' ', 117 - text.len()));
        text.push('\n');
        [b"\x93NUMPY\x01\x00", &118u16.to_le_bytes()[..], text.as_bytes(), data].concat()
    }

    #[test]
    fn arrays_are_read_by_dtype_and_shape() {
        let stack = read(&npy("<u2", "(1, 2, 2)", &[1, 0, 2, 0, 0, 1, 255, 255])).unwrap();
        assert_eq!((stack.height, stack.width, stack.channels), (1, 2, 2));
        assert!(matches!(stack.samples, Samples::U16(values) if values == [1, 2, 256, 65535]));
        let stack = read(&npy("<f4", "(1, 1, 1)", &1.5f32.to_le_bytes())).unwrap();
        assert!(matches!(stack.samples, Samples::F32(values) if values == [1.5]));
        assert_eq!(kind(&npy("<u2", "(1, 2, 2)", &[])), Some(SampleKind::Int16));
        assert_eq!(kind(&npy("|u1", "(1, 2, 2)", &[])), None);
    }

    #[test]
    fn invalid_arrays_are_refused() {
        for (descr, shape, words) in [
            ("<u2", "(1, 2, 2)", "data end too early"),
            ("<u2", "(13, 64, 64)", "shape [13, 64, 64]"),
            ("<u2", "(0, 2, 2)", "shape [0, 2, 2]"),
            ("<u2", "(9000, 9000, 60)", "do not fit"),
            ("<u2", "(8, 9)", "shape [8, 9]"),
            ("<u2", "(4,)", "instead of [H, W, C]"),
            ("<c8", "(1, 2, 2)", "dtype"),
        ] {
            let error = read(&npy(descr, shape, &[1, 0, 2, 0, 3])).err().unwrap().to_string();
            assert!(error.contains(words), "{shape}: {error}");
        }
        assert!(read(b"\x93NUMPY\x01\x00\xff").is_err());
    }

    #[test]
    fn images_are_told_from_other_arrays() {
        for (descr, shape, expected) in [
            ("<f4", "(16, 16, 13)", true),
            ("<u2", "(8, 8, 1)", true),
            ("<f4", "(800, 512)", false),
            ("|u1", "(800, 512)", false),
            ("<u2", "(13, 64, 64)", false),
            ("|u1", "(60000, 28, 28)", false),
            ("<c8", "(16, 16, 3)", false),
            ("<i8", "(800,)", false),
        ] {
            assert_eq!(is_image(&npy(descr, shape, &[])), expected, "{descr} {shape}");
        }
    }
}

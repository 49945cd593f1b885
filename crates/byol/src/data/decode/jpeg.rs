//! JPEG: the end of an image in its file, and its pixels.

use std::io::BufRead;

use image::metadata::Orientation;
use zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions};
use zune_jpeg::JpegDecoder;

use super::{DecodeError, Raw, check_size};

/// Pixels of a JPEG stream.
pub(super) struct Stream {
    pub width: usize,
    pub height: usize,
    /// Values of each pixel, `[height, width, channels]`.
    pub samples: Vec<u8>,
    orientation: Option<Orientation>,
}

/// Channels of a decoded stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    /// Red, green and blue, converted from the colors that the stream declares.
    Rgb,
    /// The stored components, which must be as many.
    Components(usize),
    /// Red, green and blue of three stored components, which are luma and chroma.
    FromYCbCr,
}

/// Position behind the end-of-image marker of the JPEG at the start of `bytes`; `None` if the data
/// end before it.
///
/// Phones append a film, cameras a second JPEG, other programs anything. It is not part of the
/// image: the markers in it neither complete an image that is cut nor damage one that is complete.
/// Segments are skipped by their length, so the thumbnail in a segment does not end the image.
pub(super) fn end(bytes: &[u8]) -> Option<usize> {
    markers(bytes).find(|(marker, _)| *marker == END).map(|(_, at)| at)
}

/// End of an image.
const END: u8 = 0xD9;

/// Markers of segments, and of the end of the image, of the JPEG at the start of `bytes`, with the
/// position behind each.
fn markers(bytes: &[u8]) -> impl Iterator<Item = (u8, usize)> {
    let mut at = if bytes.starts_with(&[0xFF, 0xD8]) { 2 } else { bytes.len() };
    let mut has_scan = false;
    std::iter::from_fn(move || {
        loop {
            // Skips the data of a scan, in which 0xFF is followed by 0 or by a restart marker.
            at += bytes.get(at..)?.skip_until(0xFF).ok()?;
            // A marker may be preceded by any number of fill bytes.
            at += bytes.get(at..)?.iter().position(|b| *b != 0xFF)?;
            let marker = bytes[at];
            at += 1;
            let behind = at;
            match marker {
                END => at = bytes.len(),
                // Another image starts: this one is cut.
                0xD8 if has_scan => return None,
                0x00 | 0x01 | 0xD0..=0xD8 => continue,
                // Reserved: damaged data or padding, for the decoder to judge.
                0x02..=0xBF if has_scan => continue,
                _ => {
                    let length = bytes.get(at..at + 2)?;
                    at += usize::from(u16::from_be_bytes([length[0], length[1]])).max(2);
                    has_scan |= marker == 0xDA;
                }
            }
            return Some((marker, behind));
        }
    })
}

/// Unsupported kind of compression, from the frame header; `None` if it is supported.
fn unread_kind(bytes: &[u8]) -> Option<String> {
    // Markers of tables and extensions share the number range of frames.
    // A hierarchical image starts with 0xDE instead of a frame.
    let is_frame = |marker: u8| matches!(marker, 0xC0..=0xCF | 0xDE) && !matches!(marker, 0xC4 | 0xC8 | 0xCC);
    let (marker, at) = markers(bytes).find(|(marker, _)| is_frame(*marker))?;
    // The length of the segment comes before the bits per sample.
    match (marker, bytes.get(at + 2)?) {
        (0xC0..=0xC2, 8) => None,
        (0xC0..=0xC2, bits) => Some(format!("{bits} bits per sample")),
        (0xC3 | 0xCB, _) => Some("lossless compression".into()),
        (0xC9 | 0xCA, _) => Some("arithmetic coding".into()),
        _ => Some("hierarchical coding".into()),
    }
}

/// Decodes the image at the start of `bytes`.
pub(super) fn decode(bytes: &[u8]) -> Result<Raw, DecodeError> {
    let Stream { width, height, samples, orientation } = stream(bytes, Output::Rgb)?;
    let rgb = image::RgbImage::from_raw(width as u32, height as u32, samples)
        .ok_or_else(|| broken("fewer pixels than declared"))?;
    Ok(Raw { image: rgb.into(), white_is_zero: false, orientation })
}

/// Decodes a stream, which may be one of many in a TIFF.
pub(super) fn stream(bytes: &[u8], output: Output) -> Result<Stream, DecodeError> {
    // Strict mode: otherwise the decoder fills missing data with gray.
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(usize::MAX).set_max_height(usize::MAX);
    if let Some(kind) = unread_kind(bytes) {
        return Err(unread(kind));
    }
    let end = end(bytes);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(&bytes[..end.unwrap_or(bytes.len())]), options);
    decoder.decode_headers().map_err(broken)?;
    let (width, height) = decoder.dimensions().ok_or_else(|| broken("missing dimensions"))?;
    check_size(width, height)?;
    if end.is_none() {
        return Err(broken("missing end marker"));
    }
    let components = decoder.info().map_or(0, |info| usize::from(info.components));
    let is_ycbcr = decoder.input_colorspace() == Some(ColorSpace::YCbCr);
    let colors = match output {
        // The decoder converts gray, YCbCr, CMYK and YCCK to RGB.
        Output::Rgb => ColorSpace::RGB,
        Output::FromYCbCr if components == 3 => ColorSpace::RGB,
        Output::Components(1) if components == 1 => ColorSpace::Luma,
        Output::Components(3) if components == 3 && is_ycbcr => ColorSpace::YCbCr,
        Output::Components(3) if components == 3 => ColorSpace::RGB,
        Output::Components(4) if components == 4 && decoder.input_colorspace() == Some(ColorSpace::CMYK) => {
            ColorSpace::CMYK
        }
        _ => return Err(unread(format!("{components} components"))),
    };
    decoder.set_options(options.jpeg_set_out_colorspace(colors));
    let samples = decoder.decode().map_err(broken)?;
    if samples.len() != width * height * colors.num_components() {
        return Err(broken("fewer pixels than declared"));
    }
    let orientation = decoder.exif().and_then(|chunk| Orientation::from_exif_chunk(chunk));
    Ok(Stream { width, height, samples, orientation })
}

fn broken(reason: impl ToString) -> DecodeError {
    DecodeError::Broken { format: "JPEG", reason: reason.to_string() }
}

fn unread(reason: String) -> DecodeError {
    DecodeError::UnreadKind { format: "JPEG", reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASELINE: &[u8] = include_bytes!("../../../tests/data/baseline.jpg");
    const PROGRESSIVE: &[u8] = include_bytes!("../../../tests/data/progressive.jpg");
    const OTHERS: [&[u8]; 2] =
        [include_bytes!("../../../tests/data/cmyk.jpg"), include_bytes!("../../../tests/data/gray.jpg")];

    fn pixels(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
        stream(bytes, Output::Rgb).map(|stream| stream.samples)
    }

    /// An Exif segment with this thumbnail.
    fn exif(thumbnail: &[u8]) -> Vec<u8> {
        let content = [b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0".as_slice(), thumbnail].concat();
        [&[0xFF, 0xE1][..], &(content.len() as u16 + 2).to_be_bytes(), &content].concat()
    }

    #[test]
    fn a_complete_file_ends_at_its_end_marker() {
        for bytes in [BASELINE, PROGRESSIVE].into_iter().chain(OTHERS) {
            assert_eq!(end(bytes), Some(bytes.len()));
        }
        assert_eq!((end(b""), end(b"\xFF"), end(b"\xFF\xD8"), end(b"\xFF\xD8\xFF")), (None, None, None, None));
    }

    #[test]
    fn a_file_cut_at_any_byte_is_refused_whatever_follows() {
        for bytes in [BASELINE, PROGRESSIVE] {
            for n in 0..bytes.len() {
                assert_eq!(end(&bytes[..n]), None, "cut to {n} of {} bytes", bytes.len());
                assert!(pixels(&bytes[..n]).is_err(), "cut to {n} of {} bytes", bytes.len());
                let zeros = [&bytes[..n], &[0; 4096]].concat();
                assert!(pixels(&zeros).is_err(), "cut to {n} bytes, zeros follow");
            }
        }
    }

    #[test]
    fn a_scan_that_is_cut_is_not_completed_by_a_second_jpeg() {
        let scan = BASELINE.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).unwrap();
        for n in scan + 14..BASELINE.len() - 2 {
            assert!(pixels(&[&BASELINE[..n], BASELINE].concat()).is_err(), "cut to {n} bytes");
        }
    }

    #[test]
    fn a_thumbnail_neither_ends_nor_completes_an_image() {
        let with_thumbnail = [&BASELINE[..2], &exif(BASELINE), &BASELINE[2..]].concat();
        assert_eq!(end(&with_thumbnail), Some(with_thumbnail.len()));
        assert_eq!(pixels(&with_thumbnail).unwrap(), pixels(BASELINE).unwrap());
        let cut = &with_thumbnail[..with_thumbnail.len() - 40];
        assert!(pixels(cut).unwrap_err().to_string().contains("missing end marker"));
    }

    #[test]
    fn a_second_jpeg_complete_or_cut_is_ignored() {
        for second in [BASELINE, &PROGRESSIVE[..PROGRESSIVE.len() / 2], &BASELINE[..3]] {
            let both = [BASELINE, second].concat();
            assert_eq!(end(&both), Some(BASELINE.len()));
            assert_eq!(pixels(&both).unwrap(), pixels(BASELINE).unwrap());
        }
    }

    #[test]
    fn fill_bytes_and_few_bytes_between_segments_are_tolerated() {
        let filled = [&BASELINE[..2], &[0xFF; 3], &BASELINE[2..]].concat();
        let padded = [&BASELINE[..BASELINE.len() - 2], &[0, 0, 0xFF, 0xFF, 0xD9]].concat();
        for bytes in [filled, padded] {
            assert_eq!(end(&bytes), Some(bytes.len()));
            assert_eq!(pixels(&bytes).unwrap(), pixels(BASELINE).unwrap());
        }
    }

    #[test]
    fn unsupported_kinds_are_not_reported_as_damaged() {
        let frame = BASELINE.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
        for (at, value, reason) in [
            (1, 0xC3, "lossless compression"),
            (1, 0xC9, "arithmetic coding"),
            (1, 0xDE, "hierarchical coding"),
            (4, 12, "12 bits per sample"),
        ] {
            let mut bytes = BASELINE.to_vec();
            bytes[frame + at] = value;
            let error = pixels(&bytes).unwrap_err().to_string();
            assert_eq!(error, format!("a kind of JPEG that byol does not read ({reason})"));
        }
    }

    proptest! {
        #[test]
        fn ignores_bytes_after_the_end(tail: Vec<u8>, progressive: bool) {
            let bytes = if progressive { PROGRESSIVE } else { BASELINE };
            let longer = [bytes, &tail].concat();
            prop_assert_eq!(end(&longer), Some(bytes.len()));
            prop_assert_eq!(pixels(&longer).unwrap(), pixels(bytes).unwrap());
        }

        #[test]
        fn image_ends_after_its_end_marker(bytes: Vec<u8>) {
            let bytes = [&[0xFF, 0xD8][..], &bytes].concat();
            if let Some(end) = end(&bytes) {
                prop_assert!(bytes[..end].ends_with(&[0xFF, 0xD9]));
            }
        }
    }
}

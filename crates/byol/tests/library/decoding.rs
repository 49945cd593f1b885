//! Image decoding: all documented formats and variants, and rejection of truncated files.

use std::io::Cursor;

use byol::data::{Dataset, DecodeError, Image, Levels, decode};
use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage, Rgba, RgbaImage};

fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn decoded(bytes: &[u8]) -> Result<Image, DecodeError> {
    decode::bytes(bytes, &Levels::default())
}

fn test_image() -> RgbImage {
    RgbImage::from_fn(7, 5, |x, y| Rgb([(x * 30) as u8, (y * 50) as u8, (x * y * 7) as u8]))
}

#[test]
fn lossless_formats_decode_to_the_exact_pixels() {
    let image = test_image();
    for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::WebP] {
        let got = decoded(&encode(&image.clone().into(), format)).unwrap();
        let expected = Image { height: 5, width: 7, channels: 3, pixels: image.as_raw().clone().into() };
        assert_eq!(got, expected, "{format:?}");
    }
    let two_colors = RgbImage::from_fn(4, 4, |x, _| if x < 2 { Rgb([255, 0, 0]) } else { Rgb([0, 0, 255]) });
    assert_eq!(
        decoded(&encode(&two_colors.clone().into(), ImageFormat::Gif)).unwrap().pixels.to_u8()[..],
        **two_colors.as_raw()
    );
}

#[test]
fn gray_alpha_and_16_bit_images_become_rgb() {
    let gray = GrayImage::from_fn(3, 2, |x, y| Luma([(x * 50 + y) as u8]));
    let got = decoded(&encode(&gray.clone().into(), ImageFormat::Png)).unwrap();
    assert_eq!(got.pixels.to_u8()[..], gray.as_raw().iter().flat_map(|g| [*g; 3]).collect::<Vec<_>>());
    let rgba = RgbaImage::from_pixel(2, 2, Rgba([10, 20, 30, 0]));
    assert_eq!(decoded(&encode(&rgba.into(), ImageFormat::Png)).unwrap().pixels.to_u8()[..3], [10, 20, 30]);
    let deep = image::ImageBuffer::from_pixel(2, 2, Rgb([0x1234u16, 0xFFFF, 0]));
    let deep = decoded(&encode(&DynamicImage::ImageRgb16(deep), ImageFormat::Png)).unwrap();
    assert_eq!(deep.pixels.to_u8()[..3], [0x12, 255, 0]);
}

#[test]
fn rejects_truncated_files_and_other_formats() {
    let image: DynamicImage =
        RgbImage::from_fn(40, 30, |x, y| Rgb([(x * y) as u8, (x * 7) as u8, (y * 5) as u8])).into();
    for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Tiff] {
        let bytes = encode(&image, format);
        for n in (0..bytes.len() * 9 / 10).step_by(97) {
            assert!(decoded(&bytes[..n]).is_err(), "{format:?} truncated to {n} of {} bytes", bytes.len());
        }
    }
    assert!(matches!(decoded(b"a text named .jpg"), Err(DecodeError::NotAnImage)));
    assert!(matches!(decoded(b""), Err(DecodeError::Empty)));
}

#[test]
fn finds_splits_and_classes_in_folders_with_unusual_names() {
    let root = tempfile::tempdir().unwrap();
    let png = encode(&test_image().into(), ImageFormat::Png);
    let put = |path: &str| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &png).unwrap();
    };
    for path in [
        "train/cat/a b'c.PNG",
        "train/dog/deep/er/x",
        "train/dog/y.png",
        "val/dog/z.png",
        "test/cat/ü.png",
        "train/.hidden.png",
    ] {
        put(path);
    }
    let data = Dataset::open(root.path()).unwrap();
    assert_eq!(data.classes, ["cat", "dog"]);
    assert_eq!((data.train.len(), data.train.labels().unwrap()), (3, &[0, 1, 1][..]));
    assert_eq!(data.held_out.unwrap().labels().unwrap(), [1], "monitoring uses val");
    assert_eq!(data.test.unwrap().labels().unwrap(), [0], "final results use test");
}

/// Reads a test image: 24 x 16, the left half red, the right half blue, four near-white rows on
/// top.
fn read_test_file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn assert_color(image: &Image, y: usize, x: usize, expected: [i32; 3]) {
    let at = (y * image.width + x) * 3;
    let color = &image.pixels.to_u8()[at..at + 3];
    for (got, want) in color.iter().zip(expected) {
        assert!((i32::from(*got) - want).abs() <= 12, "({y}, {x}): {color:?} is not {expected:?}");
    }
}

#[test]
fn decodes_all_kinds_of_jpeg_and_palette_gif() {
    for name in ["baseline.jpg", "progressive.jpg", "cmyk.jpg"] {
        let image = decoded(&read_test_file(name)).unwrap();
        assert_eq!((image.height, image.width), (16, 24), "{name}");
        assert_color(&image, 12, 3, [200, 40, 30]);
        assert_color(&image, 12, 20, [20, 60, 180]);
        assert_color(&image, 0, 3, [240, 240, 240]);
    }
    let gray = decoded(&read_test_file("gray.jpg")).unwrap();
    assert!(gray.pixels.to_u8().chunks(3).all(|p| p[0] == p[1] && p[1] == p[2]));
    let palette = decoded(&read_test_file("palette.gif")).unwrap();
    assert_color(&palette, 12, 3, [200, 40, 30]);
}

#[test]
fn applies_the_exif_orientation() {
    // Orientation 6: the top of the stored image is displayed on the right.
    let image = decoded(&read_test_file("rotated.jpg")).unwrap();
    assert_eq!((image.height, image.width), (24, 16));
    assert_color(&image, 3, 15, [240, 240, 240]);
    assert_color(&image, 3, 3, [200, 40, 30]);
    assert_color(&image, 20, 3, [20, 60, 180]);
}

#[test]
fn rejects_jpegs_truncated_at_any_byte() {
    for name in ["baseline.jpg", "progressive.jpg", "cmyk.jpg"] {
        let bytes = read_test_file(name);
        for n in 0..bytes.len() {
            assert!(decoded(&bytes[..n]).is_err(), "{name} truncated to {n} of {} bytes", bytes.len());
        }
    }
}

#[test]
fn maps_16_bit_values_from_black_and_white_to_8_bits() {
    let gray = |values: [u16; 4]| {
        let image = image::ImageBuffer::<Luma<u16>, _>::from_raw(4, 1, values.to_vec()).unwrap();
        encode(&DynamicImage::ImageLuma16(image), ImageFormat::Png)
    };
    let levels = |image: &[u8], levels: &Levels| {
        decode::bytes(image, levels).map(|image| image.pixels.into_u8().into_iter().step_by(3).collect::<Vec<u8>>())
    };
    let twelve_bits = gray([0, 100, 2048, 4095]);
    assert_eq!(levels(&twelve_bits, &Levels::default()).unwrap(), [0, 6, 128, 255]);
    assert_eq!(levels(&twelve_bits, &Levels::uniform(0.0, 8190.0)).unwrap(), [0, 3, 64, 128]);
    assert_eq!(levels(&twelve_bits, &Levels::legacy()).unwrap(), [0, 0, 8, 16]);
    let error = levels(&twelve_bits, &Levels::uniform(0.0, 1023.0)).unwrap_err().to_string();
    assert_eq!(error, "the value 2048 exceeds white, 1023\nhint: choose other levels with `--levels`");
    let error = levels(&twelve_bits, &Levels::uniform(50.0, 4095.0)).unwrap_err().to_string();
    assert!(error.starts_with("the value 0 is below black, 50\n"), "{error}");
}

#[test]
fn drops_16_bit_alpha_before_level_mapping() {
    let image = image::ImageBuffer::from_pixel(1, 1, Rgba([0u16, 2048, 4095, 65535]));
    let image = encode(&DynamicImage::ImageRgba16(image), ImageFormat::Png);
    assert_eq!(decoded(&image).unwrap().pixels.to_u8()[..], [0, 128, 255]);
}

#[test]
fn full_range_16_bit_images_are_converted_as_before() {
    let values = (0..=65535u16).step_by(13).chain([65535]).collect::<Vec<u16>>();
    let image = image::ImageBuffer::<Luma<u16>, _>::from_raw(values.len() as u32, 1, values).unwrap();
    let image = DynamicImage::ImageLuma16(image);
    let expected = image.to_rgb8().into_raw();
    let png = encode(&image, ImageFormat::Png);
    assert_eq!(decoded(&png).unwrap().pixels.into_u8(), expected);
    assert_eq!(decode::bytes(&png, &Levels::legacy()).unwrap().pixels.into_u8(), expected);
}

#[test]
fn names_the_format_of_images_that_are_not_read() {
    let error = decoded(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\0\0").unwrap_err().to_string();
    assert_eq!(error, "a HEIC image, a format that byol does not read");
    let error = decoded(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B").unwrap_err().to_string();
    assert_eq!(error, "an AVIF image, a format that byol does not read");
}

//! Every format and oddity that the docs promise, and every cut of a file refused.

use std::io::Cursor;

use byol::data::{Dataset, Image, decode};
use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage, Rgba, RgbaImage};

fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn known() -> RgbImage {
    RgbImage::from_fn(7, 5, |x, y| Rgb([(x * 30) as u8, (y * 50) as u8, (x * y * 7) as u8]))
}

#[test]
fn lossless_formats_give_the_pixels() {
    let image = known();
    for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::WebP] {
        let got = decode::bytes(&encode(&image.clone().into(), format)).unwrap();
        let want = Image { height: 5, width: 7, channels: 3, pixels: image.as_raw().clone() };
        assert_eq!(got, want, "{format:?}");
    }
    let two = RgbImage::from_fn(4, 4, |x, _| if x < 2 { Rgb([255, 0, 0]) } else { Rgb([0, 0, 255]) });
    assert_eq!(decode::bytes(&encode(&two.clone().into(), ImageFormat::Gif)).unwrap().pixels, *two.as_raw());
}

#[test]
fn grey_alpha_and_sixteen_bits_become_rgb() {
    let grey = GrayImage::from_fn(3, 2, |x, y| Luma([(x * 50 + y) as u8]));
    let got = decode::bytes(&encode(&grey.clone().into(), ImageFormat::Png)).unwrap();
    assert_eq!(got.pixels, grey.as_raw().iter().flat_map(|g| [*g; 3]).collect::<Vec<_>>());
    let rgba = RgbaImage::from_pixel(2, 2, Rgba([10, 20, 30, 0]));
    assert_eq!(decode::bytes(&encode(&rgba.into(), ImageFormat::Png)).unwrap().pixels[..3], [10, 20, 30]);
    let deep = image::ImageBuffer::from_pixel(2, 2, Rgb([0x1234u16, 0xFFFF, 0]));
    let deep = decode::bytes(&encode(&DynamicImage::ImageRgb16(deep), ImageFormat::Png)).unwrap();
    assert_eq!(deep.pixels[..3], [0x12, 255, 0]);
}

#[test]
fn every_cut_is_refused_whole() {
    let image: DynamicImage =
        RgbImage::from_fn(40, 30, |x, y| Rgb([(x * y) as u8, (x * 7) as u8, (y * 5) as u8])).into();
    for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Tiff] {
        let bytes = encode(&image, format);
        for n in (0..bytes.len() * 9 / 10).step_by(97) {
            assert!(decode::bytes(&bytes[..n]).is_err(), "{format:?} cut to {n} of {}", bytes.len());
        }
    }
    assert!(matches!(decode::bytes(b"a text named .jpg"), Err(decode::DecodeError::NotAnImage)));
    assert!(matches!(decode::bytes(b""), Err(decode::DecodeError::Empty)));
}

#[test]
fn folders_with_splits_classes_and_strange_names() {
    let root = tempfile::tempdir().unwrap();
    let png = encode(&known().into(), ImageFormat::Png);
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
    assert_eq!(data.held_out.unwrap().labels().unwrap(), [1], "a run watches val");
    assert_eq!(data.test.unwrap().labels().unwrap(), [0], "a final figure is of test");
}

/// A picture of this project: 24 x 16, the left half red, the right half blue, four rows of near-white on top.
fn jpeg(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn near(image: &Image, y: usize, x: usize, want: [i32; 3]) {
    let at = (y * image.width + x) * 3;
    for (got, want) in image.pixels[at..at + 3].iter().zip(want) {
        assert!((i32::from(*got) - want).abs() <= 12, "({y}, {x}): {:?} is not {want:?}", &image.pixels[at..at + 3]);
    }
}

#[test]
fn jpegs_of_every_kind() {
    for name in ["baseline.jpg", "progressive.jpg", "cmyk.jpg"] {
        let image = decode::bytes(&jpeg(name)).unwrap();
        assert_eq!((image.height, image.width), (16, 24), "{name}");
        near(&image, 12, 3, [200, 40, 30]);
        near(&image, 12, 20, [20, 60, 180]);
        near(&image, 0, 3, [240, 240, 240]);
    }
    let grey = decode::bytes(&jpeg("grey.jpg")).unwrap();
    assert!(grey.pixels.chunks(3).all(|p| p[0] == p[1] && p[1] == p[2]));
    let palette = decode::bytes(&jpeg("palette.gif")).unwrap();
    near(&palette, 12, 3, [200, 40, 30]);
}

#[test]
fn the_exif_orientation_is_honoured() {
    // Orientation 6: the top of the stored picture is on the right.
    let image = decode::bytes(&jpeg("turned.jpg")).unwrap();
    assert_eq!((image.height, image.width), (24, 16));
    near(&image, 3, 15, [240, 240, 240]);
    near(&image, 3, 3, [200, 40, 30]);
    near(&image, 20, 3, [20, 60, 180]);
}

#[test]
fn every_cut_of_a_jpeg_is_refused() {
    for name in ["baseline.jpg", "progressive.jpg", "cmyk.jpg"] {
        let bytes = jpeg(name);
        for n in 0..bytes.len() - 1 {
            assert!(decode::bytes(&bytes[..n]).is_err(), "{name} cut to {n} of {}", bytes.len());
        }
    }
}

//! Images with a value for every pixel: masks of classes, or maps of depth.
//!
//! `images/` and `masks/` (or `depth/`) with the same names in both, and the same splits below both (`train/`, `val/`, `test/`), or none.
//!
//! A mask is an 8-bit grey PNG whose pixels are class numbers; 255 is no class. `classes.txt` names the classes, a line each from class 0 on; one
//! that is called void, unlabelled, unlabeled or ignore is left out of training and of scores. A depth map is a 16-bit grey PNG or TIFF in
//! millimetres, or a TIFF of 32-bit floats in metres; 0 is no depth. NYUv2's own form is read too: folders of `rgb_N` beside `sync_depth_N`.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Cursor},
    path::{Path, PathBuf},
};

use image::{DynamicImage, ImageFormat, ImageReader};
use rayon::prelude::*;
use tiff::{
    ColorType, TiffError,
    decoder::{Decoder, DecodingResult},
};

use super::{
    Error, Image,
    decode::{self, DecodeError},
    list, one_of_each_stretch,
};

/// The value of a pixel without a class.
pub const NO_CLASS: u8 = 255;

/// Class numbers of an image's pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `height × width` classes, or [`NO_CLASS`].
    pub classes: Vec<u8>,
}

/// An image with its mask.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The image's file.
    pub path: PathBuf,
    /// Decoded.
    pub image: Image,
    /// Of the same size.
    pub mask: Mask,
}

/// Pairs, parted.
#[derive(Debug, Clone)]
pub struct Segmentation {
    /// To train on.
    pub train: Vec<Pair>,
    /// To test on: `test/`, else `val/`, else every fifth.
    pub test: Vec<Pair>,
    /// Names of the classes.
    pub classes: Vec<String>,
}

/// Names of classes that are none.
const VOID: [&str; 4] = ["void", "unlabelled", "unlabeled", "ignore"];

/// Distance of an image's pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct DepthMap {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `height × width` metres; 0 where it is not known.
    pub metres: Vec<f32>,
}

/// An image with its depth.
#[derive(Debug, Clone)]
pub struct DepthPair {
    /// The image's file.
    pub path: PathBuf,
    /// Decoded.
    pub image: Image,
    /// Of the same size.
    pub depth: DepthMap,
}

/// Pairs with depth, parted.
#[derive(Debug, Clone)]
pub struct DepthSet {
    /// To train on.
    pub train: Vec<DepthPair>,
    /// To test on: `test/`, else `val/`, else every fifth.
    pub test: Vec<DepthPair>,
}

/// Opens a folder of images and masks; decodes its test images and `limit` of its training images, evenly spread (0: all).
///
/// # Errors
/// [`Error::Missing`], [`Error::Read`], [`Error::Image`], [`Error::Dense`].
pub fn segmentation(root: &Path, limit: usize) -> Result<Segmentation, Error> {
    let dense = |reason: String| Error::Dense { root: root.to_owned(), reason };
    let pair = |(path, of_mask): (PathBuf, PathBuf)| {
        let (image, mask) = (image(&path)?, mask(&of_mask)?);
        same_size(root, &path, &image, [mask.height, mask.width])?;
        Ok(Pair { path, image, mask })
    };
    let [mut train, mut test] = decoded(parted(root, "masks")?, limit, pair)?;
    let named = names(root, train.iter().chain(&test).map(|p| &p.mask), &dense)?;
    // Void classes are none, so that nothing predicts them; the others move up.
    let (mut number, mut classes) = ([NO_CLASS; 256], Vec::new());
    for (class, name) in named.into_iter().enumerate().take(usize::from(NO_CLASS)) {
        if !is_void(&name) {
            number[class] = classes.len() as u8;
            classes.push(name);
        }
    }
    for pair in train.iter_mut().chain(&mut test) {
        pair.mask.classes.iter_mut().for_each(|c| *c = number[usize::from(*c)]);
    }
    match classes.len() {
        0 | 1 => Err(dense(format!("its masks have {} classes; two are needed", classes.len()))),
        _ => Ok(Segmentation { train, test, classes }),
    }
}

/// Opens a folder of images and depth maps; decodes its test images and `limit` of its training images, evenly spread (0: all).
///
/// # Errors
/// [`Error::Missing`], [`Error::Read`], [`Error::Image`], [`Error::Dense`].
pub fn depth(root: &Path, limit: usize) -> Result<DepthSet, Error> {
    let pair = |(path, of_depth): (PathBuf, PathBuf)| {
        let (image, depth) = (image(&path)?, depth_map(&of_depth)?);
        same_size(root, &path, &image, [depth.height, depth.width])?;
        Ok(DepthPair { path, image, depth })
    };
    let files = if root.is_dir() && !root.join("images").is_dir() {
        // NYUv2: scenes below splits, or without.
        let split = |name: &str| -> Result<Vec<Files>, Error> {
            let mut found = Vec::new();
            if root.join(name).is_dir() {
                beside(root, &root.join(name), &mut found)?;
            }
            Ok(found)
        };
        let (train, test) = (split("train")?, split("test")?);
        match (train.is_empty(), test.is_empty()) {
            (true, _) => match split("")? {
                none if none.is_empty() => {
                    let reason = "there are neither `images` and `depth` nor NYUv2's `rgb_N` beside `sync_depth_N`";
                    return Err(Error::Dense { root: root.to_owned(), reason: reason.into() });
                }
                all => every_fifth(root, all)?,
            },
            (false, true) => every_fifth(root, train)?,
            (false, false) => [train, test],
        }
    } else {
        parted(root, "depth")?
    };
    let [train, test] = decoded(files, limit, pair)?;
    if train.is_empty() || test.is_empty() {
        return Err(too_few(root));
    }
    for (pairs, what) in [(&train, "training"), (&test, "test")] {
        if pairs.iter().all(|pair| pair.depth.metres.iter().all(|m| *m <= 0.0)) {
            return Err(Error::Dense {
                root: root.to_owned(),
                reason: format!("no pixel of the {what} maps has a depth"),
            });
        }
    }
    Ok(DepthSet { train, test })
}

fn too_few(root: &Path) -> Error {
    Error::Dense {
        root: root.to_owned(),
        reason: "there are too few images to train on some and test on others".into(),
    }
}

/// An image and its partner.
type Files = (PathBuf, PathBuf);

/// Training pairs, `limit` of them, and test pairs.
fn decoded<T: Send>(
    [mut train, test]: [Vec<Files>; 2],
    limit: usize,
    pair: impl Fn(Files) -> Result<T, Error> + Sync,
) -> Result<[Vec<T>; 2], Error> {
    let n = train.len();
    if limit > 0 && limit < n {
        train = one_of_each_stretch(n, limit).into_iter().map(|i| train[i].clone()).collect();
    }
    let all = |files: Vec<Files>| files.into_par_iter().map(&pair).collect::<Result<Vec<T>, Error>>();
    Ok([all(train)?, all(test)?])
}

fn every_fifth(root: &Path, all: Vec<Files>) -> Result<[Vec<Files>; 2], Error> {
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for (i, pair) in all.into_iter().enumerate() {
        if i % 5 == 4 { test.push(pair) } else { train.push(pair) }
    }
    if test.is_empty() { Err(too_few(root)) } else { Ok([train, test]) }
}

/// Training and test pairs of `images` and another folder.
fn parted(root: &Path, other: &str) -> Result<[Vec<Files>; 2], Error> {
    if !root.exists() {
        return Err(Error::Missing(root.to_owned()));
    }
    let dense = |reason: String| Error::Dense { root: root.to_owned(), reason };
    for folder in ["images", other] {
        if !root.join(folder).is_dir() {
            return Err(dense(format!("there is no folder `{folder}`")));
        }
    }
    for split in ["train", "val", "test"] {
        if root.join(other).join(split).is_dir() && !root.join("images").join(split).is_dir() {
            return Err(dense(format!("there is `{other}/{split}` but no `images/{split}`")));
        }
    }
    let all = |split: &str| matched(root, other, split);
    let split = |name: &str| if root.join("images").join(name).is_dir() { all(name) } else { Ok(Vec::new()) };
    let (train, val, test) = (split("train")?, split("val")?, split("test")?);
    if train.is_empty() {
        return every_fifth(root, all("")?);
    }
    let test = if test.is_empty() { val } else { test };
    if test.is_empty() { every_fifth(root, train) } else { Ok([train, test]) }
}

fn is_void(name: &str) -> bool {
    VOID.iter().any(|void| name.eq_ignore_ascii_case(void))
}

/// Of `classes.txt`, else numbers up to the highest class of the masks.
fn names<'a>(
    root: &Path,
    masks: impl Iterator<Item = &'a Mask>,
    dense: &dyn Fn(String) -> Error,
) -> Result<Vec<String>, Error> {
    let highest = masks.flat_map(|m| &m.classes).filter(|c| **c != NO_CLASS).max().copied();
    let needed = highest.map_or(0, |c| usize::from(c) + 1);
    let path = root.join("classes.txt");
    let bytes = match fs::read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Ok((0..needed).map(|c| format!("class {c}")).collect());
        }
        read => read.map_err(|source| Error::Read { path, source })?,
    };
    // A line is a class, so one that is empty in between is a class without a name.
    let text = String::from_utf8_lossy(&bytes);
    let name = |(class, line): (usize, &str)| match line.trim() {
        "" => format!("class {class}"),
        name => name.to_owned(),
    };
    let classes: Vec<String> = text.trim_end().lines().enumerate().map(name).collect();
    match classes.len() < needed {
        true => Err(dense(format!("classes.txt names {} classes, but a mask has class {}", classes.len(), needed - 1))),
        false => Ok(classes),
    }
}

/// The files of a split, by name; an image without its partner, or a partner without an image, is an error.
fn matched(root: &Path, other: &str, split: &str) -> Result<Vec<Files>, Error> {
    let dense = |reason: String| Error::Dense { root: root.to_owned(), reason };
    let stems = |folder: &str| -> Result<BTreeMap<String, PathBuf>, Error> {
        let folder = root.join(folder).join(split);
        // Desktops leave files of their own: .DS_Store, Thumbs.db.
        let own = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with('.') || ["thumbs.db", "desktop.ini"].contains(&name.to_ascii_lowercase().as_str())
        };
        let mut found = BTreeMap::new();
        for path in list(&folder)?.into_iter().filter(|path| path.is_file() && !own(path)) {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(twin) = found.insert(stem, path.clone()) {
                let (a, b) = (twin.display(), path.display());
                return Err(dense(format!("{a} and {b} have the same name but for the ending")));
            }
        }
        Ok(found)
    };
    let (images, mut others) = (stems("images")?, stems(other)?);
    let mut all = Vec::with_capacity(images.len());
    for (stem, path) in images {
        let partner = others.remove(&stem).ok_or_else(|| dense(format!("{} has no {}", path.display(), one(other))))?;
        all.push((path, partner));
    }
    match others.into_values().next() {
        Some(path) => Err(dense(format!("{} has no image", path.display()))),
        None => Ok(all),
    }
}

/// What one file of a folder is.
fn one(folder: &str) -> &'static str {
    if folder == "masks" { "mask" } else { "depth map" }
}

/// `rgb_N` beside `sync_depth_N`, at any depth of folders.
fn beside(root: &Path, folder: &Path, found: &mut Vec<Files>) -> Result<(), Error> {
    let entries = list(folder)?;
    let stem = |path: &PathBuf| path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    for path in &entries {
        if path.is_dir() {
            beside(root, path, found)?;
        } else if let Some(number) = stem(path).strip_prefix("rgb_") {
            let name = format!("sync_depth_{number}");
            let partner = entries.iter().find(|other| stem(other) == name);
            let partner = partner.ok_or_else(|| Error::Dense {
                root: root.to_owned(),
                reason: format!("{} has no {name} beside it", path.display()),
            })?;
            found.push((path.clone(), partner.clone()));
        }
    }
    Ok(())
}

fn same_size(root: &Path, path: &Path, image: &Image, [height, width]: [usize; 2]) -> Result<(), Error> {
    if (height, width) == (image.height, image.width) {
        return Ok(());
    }
    let reason = format!("{} is {} x {}, its partner {width} x {height}", path.display(), image.width, image.height);
    Err(Error::Dense { root: root.to_owned(), reason })
}

fn bad(path: &Path, source: DecodeError) -> Error {
    Error::Image { what: path.display().to_string(), source }
}

fn image(path: &Path) -> Result<Image, Error> {
    decode::file(path).map_err(|source| bad(path, source))
}

/// The bytes of a file through a parser.
fn parsed<T>(path: &Path, parse: impl Fn(&[u8]) -> Result<T, DecodeError>) -> Result<T, Error> {
    let bytes = fs::read(path).map_err(|e| bad(path, e.into()))?;
    parse(&bytes).map_err(|source| bad(path, source))
}

fn depth_map(path: &Path) -> Result<DepthMap, Error> {
    parsed(path, depth_of)
}

fn mask(path: &Path) -> Result<Mask, Error> {
    parsed(path, mask_of)
}

fn broken(format: &'static str, reason: impl ToString) -> DecodeError {
    DecodeError::Broken { format, reason: reason.to_string() }
}

/// Pixels as they are, of no more than any image may have.
fn raw(bytes: &[u8]) -> Result<DynamicImage, DecodeError> {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    let (width, height) = reader.into_dimensions().map_err(|e| broken("image", e))?;
    decode::check_size(width as usize, height as usize)?;
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    reader.decode().map_err(|e| broken("image", e))
}

/// The mask in a file's bytes.
///
/// # Errors
/// Any [`DecodeError`].
pub fn mask_of(bytes: &[u8]) -> Result<Mask, DecodeError> {
    if let Some(mask) = raw_png(bytes)? {
        return Ok(mask);
    }
    if image::guess_format(bytes).ok() == Some(ImageFormat::Jpeg) {
        return Err(broken("mask", "JPEG changes the numbers of classes; write masks as PNG"));
    }
    let DynamicImage::ImageLuma8(grey) = raw(bytes)? else {
        return Err(broken("mask", "a mask is 8-bit grey or has a palette, its values the numbers of classes"));
    };
    let (height, width) = (grey.height() as usize, grey.width() as usize);
    Ok(Mask { height, width, classes: grey.into_raw() })
}

/// The mask in a PNG with a palette, as Pascal VOC has them, or of fewer than 8 bits of grey: its values as they stand are the numbers of
/// classes, and a decoder of pictures would stretch them to 0 ..= 255. None of another file.
fn raw_png(bytes: &[u8]) -> Result<Option<Mask>, DecodeError> {
    if image::guess_format(bytes).ok() != Some(ImageFormat::Png) {
        return Ok(None);
    }
    let wrong = |e: png::DecodingError| broken("PNG", e);
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(wrong)?;
    let (info, size) = (reader.info(), reader.output_buffer_size());
    let narrow = info.color_type == png::ColorType::Grayscale && (info.bit_depth as u8) < 8;
    if info.color_type != png::ColorType::Indexed && !narrow {
        return Ok(None);
    }
    let (width, height, bits) = (info.width as usize, info.height as usize, info.bit_depth as usize);
    decode::check_size(width, height)?;
    let mut rows = vec![0; size.ok_or_else(|| broken("PNG", "it is too large"))?];
    let frame = reader.next_frame(&mut rows).map_err(wrong)?;
    let at = |row: &[u8], x: usize| {
        let (byte, left) = (x * bits / 8, 8 - bits - x * bits % 8);
        (row[byte] >> left) & (0xff >> (8 - bits))
    };
    let line = frame.line_size.max(1);
    let classes = rows.chunks_exact(line).take(height).flat_map(|row| (0..width).map(move |x| at(row, x))).collect();
    Ok(Some(Mask { height, width, classes }))
}

/// The depth map in a file's bytes.
///
/// # Errors
/// Any [`DecodeError`].
pub fn depth_of(bytes: &[u8]) -> Result<DepthMap, DecodeError> {
    if let Some(depth) = float_tiff(bytes)? {
        return match depth.metres.iter().any(|m| !m.is_finite() || *m < 0.0) {
            true => Err(broken("depth", "a value is negative or no number")),
            false => Ok(depth),
        };
    }
    let DynamicImage::ImageLuma16(grey) = raw(bytes)? else {
        return Err(broken("depth", "it is neither 16-bit grey, in millimetres, nor a TIFF of floats, in metres"));
    };
    let (height, width) = (grey.height() as usize, grey.width() as usize);
    Ok(DepthMap { height, width, metres: grey.into_raw().into_iter().map(|mm| f32::from(mm) / 1000.0).collect() })
}

/// The values of a TIFF of 32-bit floats, one a pixel; none of another file.
fn float_tiff(bytes: &[u8]) -> Result<Option<DepthMap>, DecodeError> {
    if image::guess_format(bytes).ok() != Some(ImageFormat::Tiff) {
        return Ok(None);
    }
    let wrong = |e: TiffError| broken("TIFF", e);
    let mut decoder = Decoder::new(Cursor::new(bytes)).map_err(wrong)?;
    let (width, height) = decoder.dimensions().map_err(wrong)?;
    decode::check_size(width as usize, height as usize)?;
    if decoder.colortype().map_err(wrong)? != ColorType::Gray(32) {
        return Ok(None);
    }
    match decoder.read_image().map_err(wrong)? {
        DecodingResult::F32(metres) if metres.len() == width as usize * height as usize => {
            Ok(Some(DepthMap { height: height as usize, width: width as usize, metres }))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_read_from_millimetres_and_from_floats() {
        let mut bytes = Cursor::new(Vec::new());
        let grey = image::ImageBuffer::<image::Luma<u16>, _>::from_raw(2, 1, vec![1500u16, 0]).unwrap();
        DynamicImage::from(grey).write_to(&mut bytes, ImageFormat::Png).unwrap();
        let want = DepthMap { height: 1, width: 2, metres: vec![1.5, 0.0] };
        assert_eq!(depth_of(bytes.get_ref()).unwrap(), want);
        let tiff = |values: &[f32]| {
            let mut bytes = Cursor::new(Vec::new());
            let mut encoder = tiff::encoder::TiffEncoder::new(&mut bytes).unwrap();
            encoder.write_image::<tiff::encoder::colortype::Gray32Float>(2, 1, values).unwrap();
            bytes.into_inner()
        };
        assert_eq!(depth_of(&tiff(&[1.5, 0.0])).unwrap(), want);
        assert!(depth_of(&tiff(&[-1.0, 0.0])).unwrap_err().to_string().contains("negative"));
        let whole = tiff(&[1.5, 0.0]);
        assert!(depth_of(&whole[..whole.len() - 3]).is_err() && depth_of(b"").is_err());
    }

    #[test]
    fn a_mask_is_grey() {
        let png = |image: DynamicImage| {
            let mut bytes = Cursor::new(Vec::new());
            image.write_to(&mut bytes, ImageFormat::Png).unwrap();
            bytes.into_inner()
        };
        let grey = image::GrayImage::from_raw(2, 1, vec![3, 255]).unwrap();
        assert_eq!(mask_of(&png(grey.into())).unwrap(), Mask { height: 1, width: 2, classes: vec![3, NO_CLASS] });
        assert!(mask_of(&png(DynamicImage::new_rgb8(2, 1))).is_err());
        let written = |color: png::ColorType, depth: png::BitDepth, rows: &[u8]| {
            let mut bytes = Vec::new();
            let mut encoder = png::Encoder::new(&mut bytes, 3, 2);
            encoder.set_color(color);
            encoder.set_depth(depth);
            if color == png::ColorType::Indexed {
                encoder.set_palette(vec![0; 12]);
            }
            encoder.write_header().unwrap().write_image_data(rows).unwrap();
            mask_of(&bytes).unwrap().classes
        };
        let (indexed, grey) = (png::ColorType::Indexed, png::ColorType::Grayscale);
        assert_eq!(written(indexed, png::BitDepth::Eight, &[0, 1, 2, 3, 2, 1]), [0, 1, 2, 3, 2, 1]);
        for color in [indexed, grey] {
            assert_eq!(written(color, png::BitDepth::One, &[0b010_00000, 0b101_00000]), [0, 1, 0, 1, 0, 1]);
            assert_eq!(written(color, png::BitDepth::Two, &[0b00_01_10_00, 0b11_10_01_00]), [0, 1, 2, 3, 2, 1]);
            assert_eq!(written(color, png::BitDepth::Four, &[0x01, 0x20, 0x32, 0x10]), [0, 1, 2, 3, 2, 1]);
        }
    }
}

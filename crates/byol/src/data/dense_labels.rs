//! Images with a label per pixel: class masks or depth maps.
//!
//! Layout: `images/` and `masks/` (or `depth/`) with the same file names in both, and the same
//! splits below both (`train/`, `val/`, `test/`) or none.
//!
//! - A mask is an 8-bit gray PNG whose pixels are class numbers; 255 means no class. `classes.txt`
//!   names the classes, one per line from class 0 on. A class named void, unlabelled, unlabeled or
//!   ignore is excluded from training and from scores.
//! - A depth map is a 16-bit gray PNG or TIFF in millimeters, or a TIFF of 32-bit floats in meters;
//!   0 means no depth. NYUv2's own layout is read too: folders of `rgb_N` beside `sync_depth_N`.

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
    Error, Image, Images, Levels,
    decode::{self, DecodeError},
    list, stratified_positions,
};

/// The value of a pixel without a class.
pub const NO_CLASS: u8 = 255;

/// Class of each pixel of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Class or [`NO_CLASS`] of each pixel, `[height, width]`.
    pub classes: Vec<u8>,
}

/// An image with its mask.
#[derive(Debug, Clone)]
pub struct MaskPair {
    /// The image's file.
    pub path: PathBuf,
    /// Decoded image.
    pub image: Image,
    /// Mask of the same size.
    pub mask: Mask,
}

/// Segmentation data set.
#[derive(Debug, Clone)]
pub struct Segmentation {
    /// Training split.
    pub train: Vec<MaskPair>,
    /// Test split: `test/`, else `val/`, else every fifth image.
    pub test: Vec<MaskPair>,
    /// Class names.
    pub classes: Vec<String>,
}

/// Names of classes to ignore.
const VOID: [&str; 4] = ["void", "unlabelled", "unlabeled", "ignore"];

/// Depth of each pixel of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct DepthMap {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Depth of each pixel in meters, `[height, width]`; 0 if unknown.
    pub meters: Vec<f32>,
}

/// An image with its depth map.
#[derive(Debug, Clone)]
pub struct DepthPair {
    /// The image's file.
    pub path: PathBuf,
    /// Decoded image.
    pub image: Image,
    /// Depth map of the same size.
    pub depth: DepthMap,
}

/// Depth data set.
#[derive(Debug, Clone)]
pub struct DepthSet {
    /// Training split.
    pub train: Vec<DepthPair>,
    /// Test split: `test/`, else `val/`, else every fifth image.
    pub test: Vec<DepthPair>,
}

/// Opens a folder of images and masks. Decodes all test images and a stratified random sample of
/// `limit` training images (0: all). Levels that are not set are detected.
///
/// # Errors
/// [`Error::Missing`], [`Error::Read`], [`Error::Image`], [`Error::DenseLabels`],
/// [`Error::Levels`].
pub fn segmentation(root: &Path, limit: usize, levels: Levels) -> Result<Segmentation, Error> {
    ensure_one_file(root, &levels)?;
    let invalid = |reason: String| Error::DenseLabels { root: root.to_owned(), reason };
    let files = find_splits(root, "masks")?;
    let levels = complete_levels(root, levels, &files)?;
    let load_pair = |(path, mask_path): Files| {
        let (image, mask) = (load_image(&path, &levels)?, load_with(&mask_path, parse_mask)?);
        check_same_size(root, &path, &image, "mask", [mask.height, mask.width])?;
        Ok(MaskPair { path, image, mask })
    };
    let [mut train, mut test] = load_pairs(files, limit, load_pair)?;
    let names = class_names(root, train.iter().chain(&test).map(|p| &p.mask), &invalid)?;
    // Void classes are removed, so that nothing predicts them; the others are renumbered.
    let (mut new_class, mut classes) = ([NO_CLASS; 256], Vec::new());
    for (class, name) in names.into_iter().enumerate().take(usize::from(NO_CLASS)) {
        if !is_void(&name) {
            new_class[class] = classes.len() as u8;
            classes.push(name);
        }
    }
    for pair in train.iter_mut().chain(&mut test) {
        pair.mask.classes.iter_mut().for_each(|c| *c = new_class[usize::from(*c)]);
    }
    match classes.len() {
        0 | 1 => Err(invalid(format!("its masks have {} classes (expected at least 2)", classes.len()))),
        _ => Ok(Segmentation { train, test, classes }),
    }
}

/// Opens a folder of images and depth maps. Decodes all test images and a stratified random sample
/// of `limit` training images (0: all). Levels that are not set are detected.
///
/// # Errors
/// [`Error::Missing`], [`Error::Read`], [`Error::Image`], [`Error::DenseLabels`],
/// [`Error::Levels`].
pub fn depth(root: &Path, limit: usize, levels: Levels) -> Result<DepthSet, Error> {
    ensure_one_file(root, &levels)?;
    let files = if root.is_dir() && !root.join("images").is_dir() {
        // NYUv2: folders of scenes, below splits or not.
        let split = |name: &str| -> Result<Vec<Files>, Error> {
            let mut pairs = Vec::new();
            if root.join(name).is_dir() {
                find_nyu_pairs(root, &root.join(name), &mut pairs)?;
            }
            Ok(pairs)
        };
        let (train, test) = (split("train")?, split("test")?);
        match (train.is_empty(), test.is_empty()) {
            (true, _) => match split("")? {
                pairs if pairs.is_empty() => {
                    let reason = "it has neither `images` and `depth` nor NYUv2's `rgb_N` beside `sync_depth_N`";
                    return Err(Error::DenseLabels { root: root.to_owned(), reason: reason.into() });
                }
                pairs => split_off_every_fifth(root, pairs)?,
            },
            (false, true) => split_off_every_fifth(root, train)?,
            (false, false) => [train, test],
        }
    } else {
        find_splits(root, "depth")?
    };
    let levels = complete_levels(root, levels, &files)?;
    let load_pair = |(path, depth_path): Files| {
        let (image, depth) = (load_image(&path, &levels)?, load_with(&depth_path, parse_depth)?);
        check_same_size(root, &path, &image, "depth map", [depth.height, depth.width])?;
        Ok(DepthPair { path, image, depth })
    };
    let [train, test] = load_pairs(files, limit, load_pair)?;
    if train.is_empty() || test.is_empty() {
        return Err(too_few(root));
    }
    for (pairs, split) in [(&train, "training"), (&test, "test")] {
        if pairs.iter().all(|pair| pair.depth.meters.iter().all(|m| *m <= 0.0)) {
            return Err(Error::DenseLabels {
                root: root.to_owned(),
                reason: format!("no pixel of the {split} depth maps has a depth"),
            });
        }
    }
    Ok(DepthSet { train, test })
}

fn too_few(root: &Path) -> Error {
    Error::DenseLabels { root: root.to_owned(), reason: "too few images for a training and a test split".into() }
}

/// Paths of an image and of its mask or depth map.
type Files = (PathBuf, PathBuf);

/// Loads training pairs, at most `limit` if it is not 0, and test pairs.
fn load_pairs<T: Send>(
    [mut train, test]: [Vec<Files>; 2],
    limit: usize,
    load: impl Fn(Files) -> Result<T, Error> + Sync,
) -> Result<[Vec<T>; 2], Error> {
    let n = train.len();
    if limit > 0 && limit < n {
        train = stratified_positions(n, limit).into_iter().map(|i| train[i].clone()).collect();
    }
    let load_all = |files: Vec<Files>| files.into_par_iter().map(&load).collect::<Result<Vec<T>, Error>>();
    Ok([load_all(train)?, load_all(test)?])
}

/// Splits off every fifth pair for testing.
fn split_off_every_fifth(root: &Path, pairs: Vec<Files>) -> Result<[Vec<Files>; 2], Error> {
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for (i, pair) in pairs.into_iter().enumerate() {
        if i % 5 == 4 { test.push(pair) } else { train.push(pair) }
    }
    if test.is_empty() { Err(too_few(root)) } else { Ok([train, test]) }
}

/// Finds training and test pairs in `images` and the folder `labels`.
fn find_splits(root: &Path, labels: &str) -> Result<[Vec<Files>; 2], Error> {
    if !root.exists() {
        return Err(Error::Missing(root.to_owned()));
    }
    let invalid = |reason: String| Error::DenseLabels { root: root.to_owned(), reason };
    for folder in ["images", labels] {
        if !root.join(folder).is_dir() {
            return Err(invalid(format!("it has no folder `{folder}`")));
        }
    }
    for split in ["train", "val", "test"] {
        if root.join(labels).join(split).is_dir() && !root.join("images").join(split).is_dir() {
            return Err(invalid(format!("it has `{labels}/{split}` but not `images/{split}`")));
        }
    }
    let match_split = |split: &str| match_files(root, labels, split);
    let split = |name: &str| if root.join("images").join(name).is_dir() { match_split(name) } else { Ok(Vec::new()) };
    let (train, val, test) = (split("train")?, split("val")?, split("test")?);
    if train.is_empty() {
        return split_off_every_fifth(root, match_split("")?);
    }
    let test = if test.is_empty() { val } else { test };
    if test.is_empty() { split_off_every_fifth(root, train) } else { Ok([train, test]) }
}

fn is_void(name: &str) -> bool {
    VOID.iter().any(|void| name.eq_ignore_ascii_case(void))
}

/// Reads the class names from `classes.txt`; without one, numbers the classes up to the highest of
/// the masks.
fn class_names<'a>(
    root: &Path,
    masks: impl Iterator<Item = &'a Mask>,
    invalid: &dyn Fn(String) -> Error,
) -> Result<Vec<String>, Error> {
    let highest = masks.flat_map(|m| &m.classes).filter(|c| **c != NO_CLASS).max().copied();
    let n_classes = highest.map_or(0, |c| usize::from(c) + 1);
    let path = root.join("classes.txt");
    let bytes = match fs::read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Ok((0..n_classes).map(|c| format!("class {c}")).collect());
        }
        read => read.map_err(|source| Error::Read { path, source })?,
    };
    // An empty line in between is a class without a name.
    let text = String::from_utf8_lossy(&bytes);
    let name = |(class, line): (usize, &str)| match line.trim() {
        "" => format!("class {class}"),
        name => name.to_owned(),
    };
    let classes: Vec<String> = text.trim_end().lines().enumerate().map(name).collect();
    match classes.len() < n_classes {
        true => {
            Err(invalid(format!("classes.txt names {} classes, but a mask has class {}", classes.len(), n_classes - 1)))
        }
        false => Ok(classes),
    }
}

/// Checks that an image is one file, which its mask is matched with.
fn ensure_one_file(root: &Path, levels: &Levels) -> Result<(), Error> {
    match levels.files().is_empty() {
        true => Ok(()),
        false => Err(Error::Channels {
            root: root.to_owned(),
            reason: "the encoder takes several files per image, which segmentation and depth do not read".into(),
        }),
    }
}

/// Matches images and label files of a split by name. An image or label file without its partner is
/// an error.
fn match_files(root: &Path, labels: &str, split: &str) -> Result<Vec<Files>, Error> {
    let invalid = |reason: String| Error::DenseLabels { root: root.to_owned(), reason };
    let stems = |folder: &str| -> Result<BTreeMap<String, PathBuf>, Error> {
        let folder = root.join(folder).join(split);
        // Desktops add files such as .DS_Store and Thumbs.db.
        let is_desktop_file = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with('.') || ["thumbs.db", "desktop.ini"].contains(&name.to_ascii_lowercase().as_str())
        };
        let mut paths = BTreeMap::new();
        for path in list(&folder)?.into_iter().filter(|path| path.is_file() && !is_desktop_file(path)) {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(duplicate) = paths.insert(stem, path.clone()) {
                let (a, b) = (duplicate.display(), path.display());
                return Err(invalid(format!("{a} and {b} have the same name up to the extension")));
            }
        }
        Ok(paths)
    };
    let (images, mut label_files) = (stems("images")?, stems(labels)?);
    let mut pairs = Vec::with_capacity(images.len());
    for (stem, path) in images {
        let label = label_files.remove(&stem);
        let label = label.ok_or_else(|| invalid(format!("{} has no {}", path.display(), singular(labels))))?;
        pairs.push((path, label));
    }
    match label_files.into_values().next() {
        Some(path) => Err(invalid(format!("{} has no image", path.display()))),
        None => Ok(pairs),
    }
}

/// Name of a single file of a label folder.
fn singular(folder: &str) -> &'static str {
    if folder == "masks" { "mask" } else { "depth map" }
}

/// Finds pairs of `rgb_N` and `sync_depth_N` below `folder`, at any depth.
fn find_nyu_pairs(root: &Path, folder: &Path, pairs: &mut Vec<Files>) -> Result<(), Error> {
    let entries = list(folder)?;
    let stem = |path: &PathBuf| path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    for path in &entries {
        if path.is_dir() {
            find_nyu_pairs(root, path, pairs)?;
        } else if let Some(number) = stem(path).strip_prefix("rgb_") {
            let name = format!("sync_depth_{number}");
            let depth = entries.iter().find(|other| stem(other) == name);
            let depth = depth.ok_or_else(|| Error::DenseLabels {
                root: root.to_owned(),
                reason: format!("{} has no {name} beside it", path.display()),
            })?;
            pairs.push((path.clone(), depth.clone()));
        }
    }
    Ok(())
}

fn check_same_size(
    root: &Path,
    path: &Path,
    image: &Image,
    label: &str,
    [height, width]: [usize; 2],
) -> Result<(), Error> {
    if (height, width) == (image.height, image.width) {
        return Ok(());
    }
    let reason =
        format!("{} is {} x {}, but its {label} is {width} x {height}", path.display(), image.width, image.height);
    Err(Error::DenseLabels { root: root.to_owned(), reason })
}

fn unusable(path: &Path, source: DecodeError) -> Error {
    Error::Image { name: path.display().to_string(), source }
}

fn load_image(path: &Path, levels: &Levels) -> Result<Image, Error> {
    decode::file(path, levels).map_err(|source| unusable(path, source))
}

/// Completes `levels` by those of the images.
fn complete_levels(root: &Path, levels: Levels, files: &[Vec<Files>; 2]) -> Result<Levels, Error> {
    let [train, test] =
        files.each_ref().map(|pairs| Images::files(pairs.iter().map(|(image, _)| image.clone()).collect(), None));
    super::detect_levels::complete(levels, &[&train, &test], root)
}

/// Reads a file and parses its bytes.
fn load_with<T>(path: &Path, parse: impl Fn(&[u8]) -> Result<T, DecodeError>) -> Result<T, Error> {
    let bytes = fs::read(path).map_err(|e| unusable(path, e.into()))?;
    parse(&bytes).map_err(|source| unusable(path, source))
}

fn broken(format: &'static str, reason: impl ToString) -> DecodeError {
    DecodeError::Broken { format, reason: reason.to_string() }
}

fn unsupported(kind: &'static str, reason: &'static str) -> DecodeError {
    DecodeError::Unsupported { kind, reason }
}

/// Decodes pixels without conversion, after checking the image size.
fn decode_raw(bytes: &[u8]) -> Result<DynamicImage, DecodeError> {
    let format = decode::guess_format(bytes).ok_or(DecodeError::NotAnImage)?;
    let reader = || ImageReader::with_format(Cursor::new(bytes), format);
    let (width, height) = reader().into_dimensions().map_err(|e| broken("image", e))?;
    decode::check_size(width as usize, height as usize)?;
    reader().decode().map_err(|e| broken("image", e))
}

/// Parses a mask from the bytes of a file.
///
/// # Errors
/// Any [`DecodeError`].
#[doc(hidden)]
pub fn parse_mask(bytes: &[u8]) -> Result<Mask, DecodeError> {
    if let Some(mask) = parse_indexed_png(bytes)? {
        return Ok(mask);
    }
    if image::guess_format(bytes).ok() == Some(ImageFormat::Jpeg) {
        return Err(unsupported("mask", "JPEG compression changes class numbers, write masks as PNG"));
    }
    let DynamicImage::ImageLuma8(gray) = decode_raw(bytes)? else {
        return Err(unsupported("mask", "expected 8-bit gray or a palette, with class numbers as values"));
    };
    let (height, width) = (gray.height() as usize, gray.width() as usize);
    Ok(Mask { height, width, classes: gray.into_raw() })
}

/// Parses a PNG with a palette (as in Pascal VOC), or with fewer than 8 bits of gray; `None` for
/// other files.
///
/// The raw values are the class numbers; image decoders would map them to colors or scale them to
/// 0..=255.
fn parse_indexed_png(bytes: &[u8]) -> Result<Option<Mask>, DecodeError> {
    if image::guess_format(bytes).ok() != Some(ImageFormat::Png) {
        return Ok(None);
    }
    let malformed = |e: png::DecodingError| broken("PNG", e);
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(malformed)?;
    let (info, size) = (reader.info(), reader.output_buffer_size());
    let narrow = info.color_type == png::ColorType::Grayscale && (info.bit_depth as u8) < 8;
    if info.color_type != png::ColorType::Indexed && !narrow {
        return Ok(None);
    }
    let (width, height, bits) = (info.width as usize, info.height as usize, info.bit_depth as usize);
    decode::check_size(width, height)?;
    let mut rows = vec![0; size.ok_or_else(|| broken("PNG", "it is too large"))?];
    let frame = reader.next_frame(&mut rows).map_err(malformed)?;
    let at = |row: &[u8], x: usize| {
        let (byte, left) = (x * bits / 8, 8 - bits - x * bits % 8);
        (row[byte] >> left) & (0xff >> (8 - bits))
    };
    let line = frame.line_size.max(1);
    let classes = rows.chunks_exact(line).take(height).flat_map(|row| (0..width).map(move |x| at(row, x))).collect();
    Ok(Some(Mask { height, width, classes }))
}

/// Parses a depth map from the bytes of a file.
///
/// # Errors
/// Any [`DecodeError`].
#[doc(hidden)]
pub fn parse_depth(bytes: &[u8]) -> Result<DepthMap, DecodeError> {
    if let Some(depth) = parse_float_tiff(bytes)? {
        return match depth.meters.iter().any(|m| !m.is_finite() || *m < 0.0) {
            true => Err(unsupported("depth map", "a value is negative, infinite or NaN")),
            false => Ok(depth),
        };
    }
    let DynamicImage::ImageLuma16(gray) = decode_raw(bytes)? else {
        return Err(unsupported("depth map", "expected 16-bit gray in millimeters, or a TIFF of floats in meters"));
    };
    let (height, width) = (gray.height() as usize, gray.width() as usize);
    Ok(DepthMap { height, width, meters: gray.into_raw().into_iter().map(|mm| f32::from(mm) / 1000.0).collect() })
}

/// Parses a single-channel TIFF of 32-bit floats; `None` for other files.
fn parse_float_tiff(bytes: &[u8]) -> Result<Option<DepthMap>, DecodeError> {
    if decode::guess_format(bytes) != Some(ImageFormat::Tiff) {
        return Ok(None);
    }
    let malformed = |e: TiffError| broken("TIFF", e);
    let mut decoder = Decoder::new(Cursor::new(bytes)).map_err(malformed)?;
    let (width, height) = decoder.dimensions().map_err(malformed)?;
    decode::check_size(width as usize, height as usize)?;
    if decoder.colortype().map_err(malformed)? != ColorType::Gray(32) {
        return Ok(None);
    }
    match decoder.read_image().map_err(malformed)? {
        DecodingResult::F32(meters) if meters.len() == width as usize * height as usize => {
            Ok(Some(DepthMap { height: height as usize, width: width as usize, meters }))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_depth_in_millimeters_and_float_meters() {
        let mut bytes = Cursor::new(Vec::new());
        let gray = image::ImageBuffer::<image::Luma<u16>, _>::from_raw(2, 1, vec![1500u16, 0]).unwrap();
        DynamicImage::from(gray).write_to(&mut bytes, ImageFormat::Png).unwrap();
        let expected = DepthMap { height: 1, width: 2, meters: vec![1.5, 0.0] };
        assert_eq!(parse_depth(bytes.get_ref()).unwrap(), expected);
        let tiff = |values: &[f32]| {
            let mut bytes = Cursor::new(Vec::new());
            let mut encoder = tiff::encoder::TiffEncoder::new(&mut bytes).unwrap();
            encoder.write_image::<tiff::encoder::colortype::Gray32Float>(2, 1, values).unwrap();
            bytes.into_inner()
        };
        assert_eq!(parse_depth(&tiff(&[1.5, 0.0])).unwrap(), expected);
        assert!(parse_depth(&tiff(&[-1.0, 0.0])).unwrap_err().to_string().contains("negative"));
        let complete = tiff(&[1.5, 0.0]);
        assert!(parse_depth(&complete[..complete.len() - 3]).is_err() && parse_depth(b"").is_err());
    }

    #[test]
    fn parses_gray_and_indexed_masks() {
        let png = |image: DynamicImage| {
            let mut bytes = Cursor::new(Vec::new());
            image.write_to(&mut bytes, ImageFormat::Png).unwrap();
            bytes.into_inner()
        };
        let gray = image::GrayImage::from_raw(2, 1, vec![3, 255]).unwrap();
        assert_eq!(parse_mask(&png(gray.into())).unwrap(), Mask { height: 1, width: 2, classes: vec![3, NO_CLASS] });
        assert!(parse_mask(&png(DynamicImage::new_rgb8(2, 1))).is_err());
        let encode_and_parse = |color: png::ColorType, depth: png::BitDepth, rows: &[u8]| {
            let mut bytes = Vec::new();
            let mut encoder = png::Encoder::new(&mut bytes, 3, 2);
            encoder.set_color(color);
            encoder.set_depth(depth);
            if color == png::ColorType::Indexed {
                encoder.set_palette(vec![0; 12]);
            }
            encoder.write_header().unwrap().write_image_data(rows).unwrap();
            parse_mask(&bytes).unwrap().classes
        };
        let (indexed, gray) = (png::ColorType::Indexed, png::ColorType::Grayscale);
        assert_eq!(encode_and_parse(indexed, png::BitDepth::Eight, &[0, 1, 2, 3, 2, 1]), [0, 1, 2, 3, 2, 1]);
        for color in [indexed, gray] {
            assert_eq!(encode_and_parse(color, png::BitDepth::One, &[0b010_00000, 0b101_00000]), [0, 1, 0, 1, 0, 1]);
            assert_eq!(
                encode_and_parse(color, png::BitDepth::Two, &[0b00_01_10_00, 0b11_10_01_00]),
                [0, 1, 2, 3, 2, 1]
            );
            assert_eq!(encode_and_parse(color, png::BitDepth::Four, &[0x01, 0x20, 0x32, 0x10]), [0, 1, 2, 3, 2, 1]);
        }
    }
}

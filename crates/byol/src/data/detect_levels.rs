//! Detection of the levels of a data set.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufReader, Cursor},
    path::Path,
    sync::{Mutex, PoisonError},
};

use rayon::prelude::*;

use super::{
    DecodeError, Error, Images, Source,
    decode::{self, Encoded, log_mel::RATE},
    folder::Media,
    levels::{Channels, Levels, Range, SampleKind, Sound},
    stratified_positions,
};

/// Maximum number of images per split whose headers are read.
const MAX_HEADERS: usize = 4096;

/// Maximum number of images of more than 8 bits that are all decoded; beyond it, a sample is.
const MAX_DECODED: usize = 512;

/// Images in a sample.
const SAMPLE: usize = 64;

/// Completes `levels` by those of a sample of the images, or sounds. Only images of more than 8
/// bits are decoded. Unreadable ones are ignored: they are reported when they are used.
///
/// # Errors
/// [`Error::Levels`] with the values found, if they do not tell black and white; [`Error::Read`],
/// [`Error::Shard`] if the machine cannot read an image.
pub(super) fn complete(levels: Levels, splits: &[&Images], root: &Path) -> Result<Levels, Error> {
    if has_sounds(splits) || levels.sound.is_some() {
        return detect_sound(levels, splits, root);
    }
    if let Some(channels) = &levels.channels {
        return match channels.ranges.is_empty() {
            false => Ok(levels),
            true => {
                Ok(Levels { channels: Some(detect_channels(&levels, channels, splits, root)?), ..Levels::default() })
            }
        };
    }
    if levels.int16.is_some() && levels.float.is_some() {
        return Ok(levels);
    }
    let mut deep = Vec::new();
    for (i, split) in splits.iter().enumerate() {
        if !splits[..i].iter().any(|earlier| earlier.is_same(split)) {
            deep.extend(find_deep(split)?.into_iter().map(|(position, kind)| (*split, position, kind)));
        }
    }
    let detect = |kind: SampleKind| -> Result<Option<[f32; 2]>, Error> {
        let mut images: Vec<_> = deep.iter().filter(|(_, _, image_kind)| *image_kind == kind).collect();
        if images.len() > MAX_DECODED {
            images = stratified_positions(images.len(), SAMPLE).into_iter().map(|i| images[i]).collect();
        }
        let ranges: Vec<Option<Range>> =
            images.into_par_iter().map(|(split, i, _)| range(split, *i)).collect::<Result<_, _>>()?;
        // A header may be wrong about the kind.
        let ranges = ranges.into_iter().flatten().filter(|range| range.kind == kind);
        let range = ranges.reduce(Range::union);
        let invalid = |reason| Error::Levels { root: root.to_owned(), reason };
        range.map(|range| range.levels()).transpose().map_err(invalid)
    };
    let [int16, float] = [SampleKind::Int16, SampleKind::Float].map(|kind| match levels.get(kind) {
        Some(known) => Ok(Some(known)),
        None => detect(kind),
    });
    Ok(Levels { int16: int16?, float: float?, ..Levels::default() })
}

/// True if the first file is a sound. The others of a data set are of the same kind.
fn has_sounds(splits: &[&Images]) -> bool {
    splits
        .first()
        .is_some_and(|images| !images.is_empty() && images.path(0).is_some_and(|path| Media::of(path) == Media::Sounds))
}

/// Conversion of sounds: at the most common sample rate of a sample of the first split's files, at
/// most [`RATE`].
fn detect_sound(levels: Levels, splits: &[&Images], root: &Path) -> Result<Levels, Error> {
    let invalid =
        |what: &str, hint| Err(Error::OtherInput { reason: format!("{} contains {what}", root.display()), hint });
    let Some(images) = splits.first().filter(|images| !images.is_empty()) else { return Ok(levels) };
    match (has_sounds(splits), levels.sound) {
        (false, _) => return invalid("images, but the encoder was trained on sounds", "pass a folder of sounds"),
        (true, Some(_)) => return Ok(levels),
        (true, None) => {}
    }
    match &levels.channels {
        // Those of an encoder are complete.
        Some(Channels { ranges, .. }) if ranges.is_empty() => {
            return invalid("sounds, which have no channels to choose", "omit `--channels`");
        }
        None if levels == Levels::default() => {}
        _ => return invalid("sounds, not images", "pass a folder of images, or omit `--levels`"),
    }
    let rate = |i: usize| {
        let Some(bytes) = images.encoded_bytes(i) else { return Ok(None) };
        let rate = bytes.map_err(DecodeError::Read).and_then(|bytes| decode::sound_rate(&bytes));
        rate.map(Some).or_else(|e| ignore_unreadable(images, i, e))
    };
    let positions = stratified_positions(images.len(), images.len().min(SAMPLE));
    let rates: Vec<Option<u32>> = positions.into_par_iter().map(rate).collect::<Result<_, Error>>()?;
    let mut counts = BTreeMap::<u32, usize>::new();
    rates.into_iter().flatten().for_each(|rate| *counts.entry(rate.min(RATE)).or_default() += 1);
    // The highest of equally common rates.
    let rate = counts.into_iter().max_by_key(|(_, n)| *n).map_or(RATE, |(rate, _)| rate);
    Ok(Levels { sound: Some(Sound { rate }), ..Levels::default() })
}

/// Ranges of the channels, by a sample of the first split's images.
fn detect_channels(levels: &Levels, channels: &Channels, splits: &[&Images], root: &Path) -> Result<Channels, Error> {
    let invalid = |reason: String| Error::Channels { root: root.to_owned(), reason };
    let Some(images) = splits.first() else { return Ok(channels.clone()) };
    if !channels.files.is_empty() && !matches!(images.source, Source::Files(_)) {
        return Err(invalid("shards have no files of channels\nhint: pass numbers of channels".into()));
    }
    if !matches!(images.source, Source::Files(_) | Source::Shards(_)) {
        return Err(invalid("CIFAR and IDX files have no channels to choose\nhint: omit `--channels`".into()));
    }
    let positions = match &images.source {
        Source::Shards(_) => (0..images.len().min(SAMPLE)).collect(),
        _ => stratified_positions(images.len(), images.len().min(SAMPLE)),
    };
    let unreadable = Mutex::new(BTreeMap::new());
    let sample = |i: usize| {
        let sample = match images.path(i) {
            Some(path) => decode::sample_channels(Encoded::File(path), channels),
            None => {
                let Some(bytes) = images.encoded_bytes(i) else { return Ok(None) };
                let sample = |bytes: Vec<u8>| decode::sample_channels(Encoded::Bytes(&bytes), channels);
                bytes.map_err(DecodeError::Read).and_then(sample)
            }
        };
        sample.map(|sample| Some((i, sample))).or_else(|e| match e {
            // Report the first image instead of skipping every image.
            DecodeError::MissingChannel { .. } | DecodeError::TooManyChannels(_) => {
                Err(invalid(format!("{}: {}", images.name(i), e)))
            }
            e => {
                unreadable.lock().unwrap_or_else(PoisonError::into_inner).entry(i).or_insert_with(|| e.to_string());
                ignore_unreadable(images, i, e)
            }
        })
    };
    let samples: Vec<_> = positions.into_par_iter().map(sample).collect::<Result<_, Error>>()?;
    let mut samples = samples.into_iter().flatten();
    let Some((first, (mut values, has_8_bits))) = samples.next() else {
        let unreadable = unreadable.into_inner().unwrap_or_else(PoisonError::into_inner);
        let first = unreadable.iter().next().map(|(i, reason)| format!(" (first: {}: {reason})", images.name(*i)));
        return Err(invalid(format!("none of the sampled images is readable{}", first.unwrap_or_default())));
    };
    for (i, (others, other_has_8_bits)) in samples {
        if others.len() != values.len() {
            let [a, b] = [(first, values.len()), (i, others.len())].map(|(i, n)| format!("{} has {n}", images.name(i)));
            return Err(invalid(format!("the images differ in their number of channels: {a}, {b}")));
        }
        values.iter_mut().zip(others).for_each(|(all, others)| all.extend(others));
        if has_8_bits != other_has_8_bits {
            let (eight, more) = if has_8_bits { (first, i) } else { (i, first) };
            let [eight, more] = [eight, more].map(|i| images.name(i));
            return Err(invalid(format!("{eight} has 8 bits, {more} has more")));
        }
    }
    if let Some(range) = levels.int16 {
        return Ok(Channels { ranges: vec![range; values.len()], ..channels.clone() });
    }
    let ranges = decode::channels::ranges(values, has_8_bits).map_err(|(c, reason)| {
        invalid(format!("channel {}: {reason}\nhint: leave it out with `--channels`", channels.number(c)))
    })?;
    Ok(Channels { ranges, ..channels.clone() })
}

/// Positions of images of more than 8 bits in a sample of a split, with their kinds.
fn find_deep(images: &Images) -> Result<Vec<(usize, SampleKind)>, Error> {
    let positions: Vec<usize> = match &images.source {
        Source::Memory(_) | Source::Custom(_) => return Ok(Vec::new()),
        // Few shards should be opened.
        Source::Shards(_) => (0..images.len().min(SAMPLE)).collect(),
        Source::Files(paths) => {
            let all: Vec<usize> = (0..images.len()).filter(|i| may_be_deep(&paths[images.indices[*i]])).collect();
            let n = all.len().min(MAX_HEADERS);
            stratified_positions(all.len(), n).into_iter().map(|i| all[i]).collect()
        }
    };
    let kind = |i: usize| -> io::Result<Option<SampleKind>> {
        match &images.source {
            Source::Files(paths) => decode::kind(BufReader::new(fs::File::open(&paths[images.indices[i]])?)),
            _ => images.encoded_bytes(i).map_or(Ok(None), |bytes| decode::kind(Cursor::new(bytes?))),
        }
    };
    let find = |i: usize| match kind(i) {
        Ok(kind) => Ok(kind.map(|kind| (i, kind))),
        Err(e) => ignore_unreadable(images, i, DecodeError::Read(e)),
    };
    let found: Vec<Option<(usize, SampleKind)>> = positions.into_par_iter().map(find).collect::<Result<_, _>>()?;
    Ok(found.into_iter().flatten().collect())
}

/// False if files with this name have 8 bits.
fn may_be_deep(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    !["jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif"].contains(&extension.as_str())
}

/// Range of the values of image `i`; `None` if it has 8 bits or is unreadable.
fn range(images: &Images, i: usize) -> Result<Option<Range>, Error> {
    let Some(bytes) = images.encoded_bytes(i) else { return Ok(None) };
    let range = bytes.map_err(DecodeError::Read).and_then(|bytes| decode::range(&bytes));
    range.or_else(|e| ignore_unreadable(images, i, e))
}

/// Ignores an error of an image itself.
fn ignore_unreadable<T>(images: &Images, i: usize, error: DecodeError) -> Result<Option<T>, Error> {
    match images.image_error(i, error) {
        Error::Image { .. } => Ok(None),
        machine => Err(machine),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use image::{DynamicImage, ImageBuffer, ImageFormat, Luma};

    use super::*;
    use crate::data::{Dataset, OpenOptions};

    fn float_levels(values: &[f32]) -> Result<[f32; 2], String> {
        Range::new(SampleKind::Float, values.iter().copied()).levels()
    }

    #[test]
    fn white_of_16_bit_images_is_that_of_the_fewest_bits() {
        for (max, white) in [
            (0.0, 255.0),
            (255.0, 255.0),
            (256.0, 1023.0),
            (1023.0, 1023.0),
            (1024.0, 4095.0),
            (4095.0, 4095.0),
            (4096.0, 16383.0),
            (16384.0, 65535.0),
            (65535.0, 65535.0),
        ] {
            assert_eq!(Range::new(SampleKind::Int16, [0.0, max].into_iter()).levels(), Ok([0.0, white]), "{max}");
        }
    }

    #[test]
    fn levels_of_floats_follow_from_their_range_or_are_unknown() {
        for (values, levels) in [
            (&[0.0, 0.5, 1.0][..], [0.0, 1.0]),
            (&[-0.001, 1.001], [0.0, 1.0]),
            (&[0.0, 1.0], [0.0, 1.0]),
            (&[-1.0, 0.3], [-1.0, 1.0]),
            (&[0.0, 17.5], [0.0, 255.0]),
            (&[0.0, 3.0], [0.0, 255.0]),
            (&[0.5, 254.75], [0.0, 255.0]),
            (&[0.0, 4000.0], [0.0, 4095.0]),
            (&[0.0, 65535.0], [0.0, 65535.0]),
        ] {
            assert_eq!(float_levels(values), Ok(levels), "{values:?}");
        }
        for values in [&[0.0, 1.5][..], &[-3.0, 4.0], &[0.0, 300.5], &[0.0, 65536.0], &[-1.0, 2.0], &[-300.0, 0.0]] {
            let reason = float_levels(values).unwrap_err();
            assert!(reason.contains(&format!("from {} to {}", values[0], values[1])), "{reason}");
        }
    }

    fn png16(values: &[u16]) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        let image = ImageBuffer::<Luma<u16>, _>::from_raw(values.len() as u32, 1, values.to_vec()).unwrap();
        DynamicImage::from(image).write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    fn png8() -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        DynamicImage::new_rgb8(2, 2).write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    fn float_tiff(values: &[f32]) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        let mut encoder = tiff::encoder::TiffEncoder::new(&mut bytes).unwrap();
        encoder.write_image::<tiff::encoder::colortype::Gray32Float>(values.len() as u32, 1, values).unwrap();
        bytes.into_inner()
    }

    /// A folder of these files.
    fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path: PathBuf = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        root
    }

    #[test]
    fn all_images_of_a_data_set_get_the_same_levels() {
        let root = folder(&[
            ("train/a.png", png16(&[0, 100])),
            ("train/b.png", png16(&[0, 4095])),
            ("train/c.png", png8()),
            ("val/d.png", png16(&[1000, 2000])),
        ]);
        let data = Dataset::folder(root.path()).unwrap();
        assert_eq!(data.levels(), Levels { int16: Some([0.0, 4095.0]), ..Levels::default() });
        // 100 * 255 / 4095 is 6.2.
        assert_eq!(data.train.get(0).unwrap().pixels.to_u8()[..], [0, 0, 0, 6, 6, 6]);
        assert_eq!(data.train.get(1).unwrap().pixels.to_u8()[..], [0, 0, 0, 255, 255, 255]);
        assert_eq!(data.held_out.as_ref().unwrap().get(0).unwrap().pixels.to_u8()[0], 62);
        assert_eq!(data.levels().to_string(), "16-bit images: black is 0, white is 4095");
    }

    #[test]
    fn images_of_8_bits_have_no_levels() {
        let root = folder(&[("a.png", png8()), ("b.png", png8())]);
        assert_eq!(Dataset::folder(root.path()).unwrap().levels(), Levels::default());
    }

    #[test]
    fn levels_that_are_given_win_and_values_beyond_them_are_refused() {
        let root = folder(&[("a.png", png16(&[0, 5000])), ("b.png", png16(&[0, 4095]))]);
        let options = OpenOptions { levels: Levels::uniform(0.0, 4095.0), ..OpenOptions::default() };
        let data = Dataset::open_with(root.path(), &options).unwrap();
        assert_eq!(data.levels(), options.levels);
        let error = data.train.get(0).unwrap_err().to_string();
        assert!(error.contains("the value 5000 exceeds white, 4095") && error.contains("`--levels`"), "{error}");
        assert_eq!(error.matches("hint:").count(), 1, "{error}");
        assert_eq!(data.train.get(1).unwrap().pixels.to_u8()[3..], [255; 3]);
    }

    #[test]
    fn unreadable_images_are_ignored_and_unknown_levels_are_an_error() {
        let broken = float_tiff(&[1e9, 1e9])[..60].to_vec();
        let files = [("a.tif", float_tiff(&[0.0, 200.5])), ("b.tif", broken), ("c.tif", float_tiff(&[f32::NAN]))];
        let data = Dataset::folder(folder(&files).path()).unwrap();
        assert_eq!(data.levels(), Levels { float: Some([0.0, 255.0]), ..Levels::default() });
        let root = folder(&[("a.tif", float_tiff(&[-300.0, 0.0])), ("b.tif", float_tiff(&[0.0, 3000.5]))]);
        let error = Dataset::folder(root.path()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Levels { .. }), "{text}");
        assert!(text.contains("from -300 to 3000.5") && text.contains("`--levels BLACK,WHITE`"), "{text}");
    }

    #[cfg(unix)]
    #[test]
    fn an_image_that_the_machine_cannot_read_is_an_error() {
        // A folder with the name of an image is read with an error of the machine, also by root.
        let root = folder(&[("a.png", png16(&[0, 1])), ("b.png/x.txt", Vec::new())]);
        let images = Images::files(vec![root.path().join("a.png"), root.path().join("b.png")], None);
        let error = complete(Levels::default(), &[&images], root.path()).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error}");
        let images = Images::files(vec![root.path().join("a.png"), root.path().join("missing.png")], None);
        assert!(complete(Levels::default(), &[&images], root.path()).is_ok());
    }
}

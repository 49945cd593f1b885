//! Packing of a data set into tar shards in WebDataset's layout. Images keep their names and
//! classes. Training images are shuffled once, so that every shard is a sample of all classes.
//!
//! `manifest.json` lists the shards with their checksums. It is written after each shard, so an
//! interrupted packing resumes after the last complete shard.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Cursor, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use image::{DynamicImage, ImageFormat, RgbImage, codecs::jpeg::JpegEncoder, imageops::FilterType};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Dataset, Error, Image, Images, Skipped, decode};
use crate::atomic_write::{self, hex};

/// Images encoded in parallel.
const BATCH: usize = 256;

/// Quality of reencoded JPEGs.
const QUALITY: u8 = 92;

/// Packing settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packing {
    /// Short side that larger images are resized to, in pixels; `None` keeps all files byte for
    /// byte.
    pub size: Option<usize>,
    /// Shard size in bytes: a shard is closed once it has reached it.
    pub shard_bytes: u64,
    /// Seed of the order of the training images.
    pub seed: u64,
}

/// Shard in a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedShard {
    /// File name.
    pub file: String,
    /// Number of images.
    pub images: usize,
    /// Size in bytes.
    pub bytes: u64,
    /// Checksum of the file, in hexadecimal.
    pub sha256: String,
    /// Class of each image, if there are classes, so that remote shards need not be fetched for
    /// their labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<usize>,
}

/// Contents of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Fingerprint of the packed data.
    pub data: String,
    /// Settings.
    #[serde(flatten)]
    pub packing: Packing,
    /// Class names, in the order of their numbers; empty without labels.
    pub classes: Vec<String>,
    /// Completed shards, in order.
    pub shards: Vec<PackedShard>,
    /// Unreadable images, as `name: reason`.
    pub skipped: Vec<String>,
    /// Number of images in completed shards or skipped.
    pub done: usize,
    /// True once all images are done.
    pub complete: bool,
}

/// File name of the manifest in a folder of shards.
pub(crate) const MANIFEST: &str = "manifest.json";

/// Result of [`pack`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All images are packed.
    Finished(Manifest),
    /// Stopped on request, with the number of images in completed shards or skipped.
    Stopped(usize),
}

/// Encoded image for a shard.
struct Encoded {
    name: String,
    bytes: Vec<u8>,
    label: Option<usize>,
}

fn write_error(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    |source| Error::Write { path: path.to_owned(), source }
}

/// Packs `data` into the folder `out`, or resumes a packing that was stopped there. `progress` is
/// called with the number of images done and their total. Packing stops soon after `stop` is set.
///
/// # Errors
/// [`Error::Occupied`] if the folder has other contents, [`Error::Write`], [`Error::Shard`] if its
/// manifest is invalid or a completed shard has changed, [`Error::MostlyBad`] if no image is
/// readable; [`Error::Read`], [`Error::Shard`] if the machine cannot read an image.
pub fn pack(
    data: &Dataset,
    out: &Path,
    packing: Packing,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Outcome, Error> {
    let splits = splits(data, packing.seed);
    let total = splits.iter().map(|(_, images)| images.len()).sum();
    let mut manifest = load_or_create_manifest(data, out, packing, &splits)?;
    if manifest.complete {
        verify_checksums(out, &manifest)?;
        progress(total, total);
        return Ok(Outcome::Finished(manifest));
    }
    let mut first = 0;
    for (split, images) in &splits {
        let mut writer: Option<Writer> = None;
        let mut at = manifest.done.saturating_sub(first).min(images.len());
        while at < images.len() {
            if stop.load(Ordering::Relaxed) {
                remove_unfinished(writer);
                return Ok(Outcome::Stopped(manifest.done));
            }
            let batch = at..(at + BATCH).min(images.len());
            let encoded = match encode_batch(data, images, batch, packing.size) {
                Ok(encoded) => encoded,
                Err(error) => {
                    remove_unfinished(writer);
                    return Err(error);
                }
            };
            for image in encoded {
                at += 1;
                let full = match image {
                    Err(skipped) => {
                        manifest.skipped.push(skipped.to_string());
                        false
                    }
                    Ok(image) => {
                        let number = manifest.shards.iter().filter(|s| s.file.starts_with(split)).count();
                        let mut open = match writer.take() {
                            Some(open) => open,
                            None => Writer::create(out, format!("{split}-{number:06}.tar"))?,
                        };
                        open.add(image)?;
                        let full = open.tar.get_ref().bytes >= packing.shard_bytes;
                        writer = Some(open);
                        full
                    }
                };
                if full || at == images.len() {
                    if let Some(open) = writer.take() {
                        manifest.shards.push(open.finish()?);
                    }
                    manifest.done = first + at;
                    save_manifest(out, &manifest)?;
                }
                progress(first + at, total);
            }
        }
        first += images.len();
    }
    if manifest.shards.is_empty() {
        let first = manifest.skipped.first().cloned().unwrap_or_default();
        return Err(Error::MostlyBad { root: data.root.clone(), bad: manifest.skipped.len(), all: total, first });
    }
    manifest.complete = true;
    save_manifest(out, &manifest)?;
    Ok(Outcome::Finished(manifest))
}

/// Encodes the images of `batch`, or says why one is skipped.
///
/// # Errors
/// The machine cannot read the images.
fn encode_batch(
    data: &Dataset,
    images: &Images,
    batch: Range<usize>,
    size: Option<usize>,
) -> Result<Vec<Result<Encoded, Skipped>>, Error> {
    let encode = |i| match encode(&data.root, images, i, size) {
        Ok(image) => Ok(Ok(image)),
        Err(Error::Image { name, source }) => Ok(Err(Skipped::new(name, &source))),
        Err(other) => Err(other),
    };
    batch.into_par_iter().map(encode).collect()
}

/// Removes a shard that is not complete. Its images are packed again on resume.
fn remove_unfinished(writer: Option<Writer>) {
    if let Some(unfinished) = writer {
        let _ = fs::remove_file(&unfinished.temporary); // it is overwritten otherwise
    }
}

/// Verifies the checksum of every shard.
fn verify_checksums(out: &Path, manifest: &Manifest) -> Result<(), Error> {
    let verify = |shard: &PackedShard| {
        let path = out.join(&shard.file);
        let bad = |reason: String| {
            let reason = format!("{reason}\nhint: remove {} and pack again", out.join(MANIFEST).display());
            Error::Shard { path: path.clone(), reason }
        };
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        let mut file = File::open(&path).map_err(|e| bad(e.to_string()))?;
        loop {
            match io::Read::read(&mut file, &mut buffer).map_err(|e| bad(e.to_string()))? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        match hex(&hash.finalize()) == shard.sha256 {
            true => Ok(()),
            false => Err(bad("its checksum differs from the manifest".into())),
        }
    };
    manifest.shards.par_iter().try_for_each(verify)
}

/// Returns the splits with their names, in packing order.
fn splits(data: &Dataset, seed: u64) -> Vec<(&'static str, Images)> {
    // Shards are read sequentially and mixed by a large buffer.
    const BUFFER: usize = 1 << 16;
    let mut shuffled = data.train.order(seed, BUFFER);
    let order: Vec<usize> = (0..data.train.len() as u64).map(|position| shuffled.at(position).1).collect();
    let mut splits = vec![("train", data.train.subset(&order))];
    // A data set with one such split has it in both fields.
    let same = data.held_out.as_ref().zip(data.test.as_ref()).is_some_and(|(a, b)| a.fingerprint() == b.fingerprint());
    if !same {
        splits.extend(data.held_out.clone().map(|images| ("val", images)));
    }
    splits.extend(data.test.clone().map(|images| ("test", images)));
    splits
}

/// Loads the manifest of a packing with the same data and settings, or creates one in an empty
/// folder.
fn load_or_create_manifest(
    data: &Dataset,
    out: &Path,
    packing: Packing,
    splits: &[(&str, Images)],
) -> Result<Manifest, Error> {
    let fingerprint: Vec<String> =
        splits.iter().map(|(name, images)| format!("{name} {}", images.fingerprint())).collect();
    let new = Manifest {
        data: fingerprint.join(", "),
        packing,
        classes: data.classes.clone(),
        shards: Vec::new(),
        skipped: Vec::new(),
        done: 0,
        complete: false,
    };
    fs::create_dir_all(out).map_err(write_error(out))?;
    let path = out.join(MANIFEST);
    let occupied = |contents| Error::Occupied { path: out.to_owned(), contents };
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut entries = fs::read_dir(out).map_err(write_error(out))?;
            return if entries.next().is_some() {
                Err(occupied("other files"))
            } else {
                save_manifest(out, &new).map(|()| new)
            };
        }
        Err(source) => return Err(Error::Read { path, source }),
    };
    let existing: Manifest = serde_json::from_str(&text).map_err(|e| Error::Shard { path, reason: e.to_string() })?;
    if (&existing.data, existing.packing) != (&new.data, new.packing) {
        return Err(occupied("other images, or images packed with other settings"));
    }
    Ok(existing)
}

fn save_manifest(out: &Path, manifest: &Manifest) -> Result<(), Error> {
    let path = out.join(MANIFEST);
    let text = serde_json::to_string_pretty(manifest).expect("a manifest is plain data") + "\n";
    atomic_write::write_whole(&path, text.as_bytes()).map_err(write_error(&path))
}

/// Encodes image `i` for a shard.
///
/// # Errors
/// Those of [`Images::get`].
fn encode(root: &Path, images: &Images, i: usize, size: Option<usize>) -> Result<Encoded, Error> {
    let label = images.label(i);
    let stem = |path: &Path| path.with_extension("").to_string_lossy().replace('.', "_");
    let (bytes, name) = match images.encoded_bytes(i) {
        Some(bytes) => {
            let name = images.path(i).map_or_else(|| PathBuf::from(images.name(i)), Path::to_owned);
            // An archive must not contain absolute paths.
            let relative = name.strip_prefix(root).unwrap_or(&name);
            let relative: PathBuf =
                relative.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect();
            (bytes.map_err(|e| images.image_error(i, e.into()))?, stem(&relative))
        }
        None => {
            let image = images.get(i)?;
            return Ok(Encoded {
                name: format!("{i:09}.png"),
                bytes: resize_and_encode(&image, ImageFormat::Png, size),
                label,
            });
        }
    };
    // Every image is decoded, since shards are not checked before training.
    let image = decode::bytes(&bytes, &images.levels).map_err(|e| images.image_error(i, e))?;
    let is_array = decode::npy::is_npy(&bytes);
    let format = if is_array { ImageFormat::Png } else { image::guess_format(&bytes).unwrap_or(ImageFormat::Jpeg) };
    let is_converted = is_array || size.is_some_and(|size| image.height.min(image.width) > size);
    if !is_converted {
        let extension = format.extensions_str()[0];
        return Ok(Encoded { name: format!("{name}.{extension}"), bytes, label });
    }
    let target = if format == ImageFormat::Jpeg { ImageFormat::Jpeg } else { ImageFormat::Png };
    let extension = target.extensions_str()[0];
    Ok(Encoded { name: format!("{name}.{extension}"), bytes: resize_and_encode(&image, target, size), label })
}

/// Encodes an image, resized to the short side `size` if it is larger.
fn resize_and_encode(image: &Image, format: ImageFormat, size: Option<usize>) -> Vec<u8> {
    let rgb = RgbImage::from_raw(image.width as u32, image.height as u32, image.to_rgb8().into_owned());
    let mut rgb = DynamicImage::from(rgb.expect("an image has three values per pixel"));
    let short = image.height.min(image.width);
    if let Some(size) = size.filter(|size| *size < short) {
        let scaled = |side: usize| (side * size).div_ceil(short).max(1) as u32;
        rgb = rgb.resize_exact(scaled(image.width), scaled(image.height), FilterType::Lanczos3);
    }
    let mut bytes = Vec::new();
    let result = match format {
        ImageFormat::Jpeg => rgb.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, QUALITY)),
        format => rgb.write_to(&mut Cursor::new(&mut bytes), format),
    };
    result.expect("an image in memory can be encoded");
    bytes
}

/// File with a running checksum and size.
struct HashedFile {
    file: io::BufWriter<File>,
    hash: Sha256,
    bytes: u64,
}

impl Write for HashedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Shard being written, under a temporary name.
struct Writer {
    path: PathBuf,
    temporary: PathBuf,
    file: String,
    tar: tar::Builder<HashedFile>,
    images: usize,
    labels: Vec<usize>,
    /// Sample names of the images.
    keys: HashSet<String>,
}

impl Writer {
    fn create(out: &Path, file: String) -> Result<Writer, Error> {
        let path = out.join(&file);
        let temporary = atomic_write::temporary_name(&path);
        let tar = File::create(&temporary).map_err(write_error(&temporary))?;
        let tar = HashedFile { file: io::BufWriter::new(tar), hash: Sha256::new(), bytes: 0 };
        Ok(Writer {
            path,
            temporary,
            file,
            tar: tar::Builder::new(tar),
            images: 0,
            labels: Vec::new(),
            keys: HashSet::new(),
        })
    }

    fn add(&mut self, image: Encoded) -> Result<(), Error> {
        let (key, extension) = image.name.rsplit_once('.').unwrap_or((&image.name, "jpg"));
        // Images with the same name, such as `a.jpg` and `a.png`, or `a.b.jpg` and `a_b.jpg`, would
        // become one sample or overwrite each other when the shard is unpacked.
        let names = (self.images..).map(|n| format!("{key}_{n}"));
        let key = std::iter::once(key.to_owned()).chain(names).find(|name| self.keys.insert(name.clone()));
        let key = key.expect("there are more numbers than images");
        let label = image.label.map(|label| label.to_string());
        let members = [(extension, Some(&image.bytes[..])), ("cls", label.as_ref().map(|text| text.as_bytes()))];
        for (extension, bytes) in members {
            let Some(bytes) = bytes else { continue };
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            let name = format!("{key}.{extension}");
            self.tar.append_data(&mut header, name, bytes).map_err(write_error(&self.temporary))?;
        }
        self.images += 1;
        self.labels.extend(image.label);
        Ok(())
    }

    fn finish(self) -> Result<PackedShard, Error> {
        let Writer { path, temporary, file, tar, images, labels, .. } = self;
        let result = (|| {
            let HashedFile { file, hash, bytes } = tar.into_inner()?;
            file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
            fs::rename(&temporary, &path)?;
            atomic_write::sync_folder(path.parent())?;
            Ok((hash, bytes))
        })();
        let (hash, bytes) = result.map_err(write_error(&path))?;
        Ok(PackedShard { file, images, bytes, sha256: hex(&hash.finalize()), labels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packing() -> Packing {
        Packing { size: None, shard_bytes: 1 << 20, seed: 0 }
    }

    #[test]
    fn images_with_similar_names_stay_apart() {
        let folder = tempfile::tempdir().unwrap();
        let (data, out) = (folder.path().join("data"), folder.path().join("out"));
        fs::create_dir(&data).unwrap();
        let names = ["a.b.png", "a_b.png", "a.png", "a.jpg", "a_1.png", "a.1.png", "x.0.png", "x.1.png"];
        for (i, name) in names.iter().enumerate() {
            RgbImage::from_pixel(9, 9, image::Rgb([20 * i as u8; 3])).save(data.join(name)).unwrap();
        }
        let dataset = Dataset::open(&data).unwrap();
        pack(&dataset, &out, packing(), &AtomicBool::new(false), &mut |_, _| ()).unwrap();
        let packed = Dataset::open(&out).unwrap();
        let images = |data: &Dataset| {
            let mut pixels: Vec<u8> =
                (0..data.train.len()).map(|i| data.train.get(i).unwrap().pixels.to_u8()[0]).collect();
            pixels.sort_unstable();
            pixels
        };
        assert_eq!(images(&packed), images(&dataset));
        let unpacked: HashSet<String> = (0..packed.train.len()).map(|i| packed.train.name(i)).collect();
        assert_eq!(unpacked.len(), names.len());
    }

    #[cfg(unix)]
    #[test]
    fn error_of_the_machine_ends_packing() {
        let folder = tempfile::tempdir().unwrap();
        let (data, out) = (folder.path().join("data"), folder.path().join("out"));
        fs::create_dir(&data).unwrap();
        for i in 0..4 {
            RgbImage::new(9, 9).save(data.join(format!("{i}.png"))).unwrap();
        }
        let dataset = Dataset::open(&data).unwrap();
        // A link to itself cannot be read, whoever asks.
        fs::remove_file(data.join("2.png")).unwrap();
        std::os::unix::fs::symlink("2.png", data.join("2.png")).unwrap();
        let error = pack(&dataset, &out, packing(), &AtomicBool::new(false), &mut |_, _| ()).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error}");
        assert!(!out.join("train-000000.tar").exists());
    }
}

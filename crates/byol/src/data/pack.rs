//! PACKING: a data set into tar shards in WebDataset's layout, each image under its own name, with its class where it has one. Training
//! images are shuffled once, so that every shard is a sample of all classes.
//!
//! `manifest.json` lists the shards with their checksums. It is written after each shard, so that a packing that was killed goes on after the
//! last whole one.

use std::{
    fs::{self, File},
    io::{self, Cursor, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use image::{DynamicImage, ImageFormat, RgbImage, codecs::jpeg::JpegEncoder, imageops::FilterType};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Dataset, Error, Image, Images, decode};
use crate::files::{self, hex};

/// Images that are made ready at once.
const AT_ONCE: usize = 256;

/// Quality of a JPEG that is written anew.
const QUALITY: u8 = 92;

/// What is packed, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packing {
    /// The short side of larger images afterwards, in pixels; none: images stay as they are, to the byte.
    pub size: Option<usize>,
    /// A shard is full from here on, in bytes.
    pub shard_bytes: u64,
    /// Names the order of the training images.
    pub seed: u64,
}

/// One shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Its name in the folder.
    pub file: String,
    /// How many images it holds.
    pub images: usize,
    /// Its length.
    pub bytes: u64,
    /// Of the whole file, in hexadecimal.
    pub sha256: String,
    /// The class of each image, where there are classes: who reads the shards from afar need not fetch them all to know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<usize>,
}

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What the data was.
    pub data: String,
    /// How it was packed.
    #[serde(flatten)]
    pub packing: Packing,
    /// Names of the classes, in the order of their numbers; empty without labels.
    pub classes: Vec<String>,
    /// In order.
    pub shards: Vec<Shard>,
    /// Images that could not be used, with the reason.
    pub skipped: Vec<String>,
    /// Images of the data that the shards hold or that were skipped.
    pub done: usize,
    /// Whether that is all of them.
    pub complete: bool,
}

/// The manifest's name in a folder of shards.
pub const MANIFEST: &str = "manifest.json";

/// How packing ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All is there.
    Finished(Manifest),
    /// Somebody said stop; so many images are in whole shards or were skipped.
    Stopped(usize),
}

/// An image on its way into a shard.
struct Ready {
    name: String,
    bytes: Vec<u8>,
    label: Option<usize>,
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    |source| Error::Write { path: path.to_owned(), source }
}

/// Packs `data` into the folder `out`, or goes on with a packing that was stopped there. `progress` hears of images done and of all; `stop` is
/// looked at now and then.
///
/// # Errors
/// [`Error::Occupied`] if something else is in the folder, [`Error::Write`], [`Error::Shard`] if its manifest cannot be read.
pub fn pack(
    data: &Dataset,
    out: &Path,
    packing: Packing,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Outcome, Error> {
    let splits = splits(data, packing.seed);
    let all = splits.iter().map(|(_, images)| images.len()).sum();
    let mut manifest = begin(data, out, packing, &splits)?;
    if manifest.complete {
        verify(out, &manifest)?;
        progress(all, all);
        return Ok(Outcome::Finished(manifest));
    }
    let mut first = 0;
    for (split, images) in &splits {
        let from = manifest.done.saturating_sub(first).min(images.len());
        let mut writer: Option<Writer> = None;
        let mut at = from;
        while at < images.len() {
            if stop.load(Ordering::Relaxed) {
                if let Some(unfinished) = writer {
                    let _ = fs::remove_file(&unfinished.temporary); // the images are packed again
                }
                return Ok(Outcome::Stopped(manifest.done));
            }
            let some = at..(at + AT_ONCE).min(images.len());
            let ready: Vec<Result<Ready, String>> =
                some.clone().into_par_iter().map(|i| ready(&data.root, images, i, packing.size)).collect();
            for one in ready {
                at += 1;
                let full = match one {
                    Err(why) => {
                        manifest.skipped.push(why);
                        false
                    }
                    Ok(one) => {
                        let number = manifest.shards.iter().filter(|s| s.file.starts_with(split)).count();
                        let mut open = match writer.take() {
                            Some(open) => open,
                            None => Writer::create(out, format!("{split}-{number:06}.tar"))?,
                        };
                        open.add(one)?;
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
                    save(out, &manifest)?;
                }
                progress(first + at, all);
            }
        }
        first += images.len();
    }
    if manifest.shards.is_empty() {
        let first = manifest.skipped.first().cloned().unwrap_or_default();
        return Err(Error::MostlyBad { root: data.root.clone(), bad: manifest.skipped.len(), all, first });
    }
    manifest.complete = true;
    save(out, &manifest)?;
    Ok(Outcome::Finished(manifest))
}

/// Whether all shards are as the manifest has them.
fn verify(out: &Path, manifest: &Manifest) -> Result<(), Error> {
    let one = |shard: &Shard| {
        let path = out.join(&shard.file);
        let bad = |reason: String| {
            let reason = format!("{reason}; remove {} and pack again", out.join(MANIFEST).display());
            Error::Shard { path: path.clone(), reason }
        };
        let (mut hash, mut some) = (Sha256::new(), vec![0; 1 << 20]);
        let mut file = File::open(&path).map_err(|e| bad(e.to_string()))?;
        loop {
            match io::Read::read(&mut file, &mut some).map_err(|e| bad(e.to_string()))? {
                0 => break,
                n => hash.update(&some[..n]),
            }
        }
        match hex(&hash.finalize()) == shard.sha256 {
            true => Ok(()),
            false => Err(bad("it is not what was packed: its checksum differs".into())),
        }
    };
    manifest.shards.par_iter().try_for_each(one)
}

/// The splits by name, in the order in which they are packed.
fn splits(data: &Dataset, seed: u64) -> Vec<(&'static str, Images)> {
    // Shards are read from beginning to end: they are mixed through a buffer, which is large.
    const BUFFER: usize = 1 << 16;
    let mut mixed = data.train.order(seed, BUFFER);
    let order: Vec<usize> = (0..data.train.len() as u64).map(|place| mixed.at(place).1).collect();
    let mut splits = vec![("train", data.train.subset(&order))];
    // With one split beside the training images both fields hold it.
    let same = data.held_out.as_ref().zip(data.test.as_ref()).is_some_and(|(a, b)| a.fingerprint() == b.fingerprint());
    if !same {
        splits.extend(data.held_out.clone().map(|images| ("val", images)));
    }
    splits.extend(data.test.clone().map(|images| ("test", images)));
    splits
}

/// The manifest of a folder that is new or holds the same packing.
fn begin(data: &Dataset, out: &Path, packing: Packing, splits: &[(&str, Images)]) -> Result<Manifest, Error> {
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
    fs::create_dir_all(out).map_err(failed(out))?;
    let path = out.join(MANIFEST);
    let occupied = |what| Error::Occupied { path: out.to_owned(), what };
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut entries = fs::read_dir(out).map_err(failed(out))?;
            return if entries.next().is_some() {
                Err(occupied("something that is not a packing"))
            } else {
                save(out, &new).map(|()| new)
            };
        }
        Err(source) => return Err(Error::Read { path, source }),
    };
    let found: Manifest = serde_json::from_str(&text).map_err(|e| Error::Shard { path, reason: e.to_string() })?;
    if (&found.data, found.packing) != (&new.data, new.packing) {
        return Err(occupied("a packing of other images, or by other settings"));
    }
    Ok(found)
}

fn save(out: &Path, manifest: &Manifest) -> Result<(), Error> {
    let path = out.join(MANIFEST);
    let text = serde_json::to_string_pretty(manifest).expect("a manifest is plain data") + "\n";
    files::write_whole(&path, text.as_bytes()).map_err(failed(&path))
}

/// Image `i` as it goes into a shard, or why it cannot.
fn ready(root: &Path, images: &Images, i: usize, size: Option<usize>) -> Result<Ready, String> {
    let label = images.labels().map(|labels| labels[i]);
    let why = |error: &dyn std::fmt::Display| format!("{}: {error}", images.name(i));
    let stem = |path: &Path| path.with_extension("").to_string_lossy().replace('.', "_");
    let (bytes, name) = match images.file_bytes(i) {
        Some(bytes) => {
            let name = images.path(i).map_or_else(|| PathBuf::from(images.name(i)), Path::to_owned);
            // An archive holds no absolute paths.
            let inner = name.strip_prefix(root).unwrap_or(&name);
            let inner: PathBuf = inner.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect();
            (bytes.map_err(|e| why(&e))?, stem(&inner))
        }
        None => {
            let image = images.get(i).map_err(|e| e.to_string())?;
            return Ok(Ready { name: format!("{i:09}.png"), bytes: written(&image, ImageFormat::Png, size), label });
        }
    };
    // Every image is decoded: who trains on shards does not look through them first.
    let image = decode::bytes(&bytes).map_err(|e| why(&e))?;
    let format = image::guess_format(&bytes).unwrap_or(ImageFormat::Jpeg);
    let large = size.is_some_and(|size| image.height.min(image.width) > size);
    if !large {
        let extension = format.extensions_str()[0];
        return Ok(Ready { name: format!("{name}.{extension}"), bytes, label });
    }
    let to = if format == ImageFormat::Jpeg { ImageFormat::Jpeg } else { ImageFormat::Png };
    let extension = to.extensions_str()[0];
    Ok(Ready { name: format!("{name}.{extension}"), bytes: written(&image, to, size), label })
}

/// The image as a file, its short side `size` where it is larger.
fn written(image: &Image, format: ImageFormat, size: Option<usize>) -> Vec<u8> {
    let rgb = RgbImage::from_raw(image.width as u32, image.height as u32, image.pixels.clone());
    let mut rgb = DynamicImage::from(rgb.expect("an image has three values a pixel"));
    let short = image.height.min(image.width);
    if let Some(size) = size.filter(|size| *size < short) {
        let of = |side: usize| (side * size).div_ceil(short).max(1) as u32;
        rgb = rgb.resize_exact(of(image.width), of(image.height), FilterType::Lanczos3);
    }
    let mut bytes = Vec::new();
    let written = match format {
        ImageFormat::Jpeg => rgb.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, QUALITY)),
        format => rgb.write_to(&mut Cursor::new(&mut bytes), format),
    };
    written.expect("a picture in memory can be encoded");
    bytes
}

/// A file that is hashed as it is written.
struct Hashed {
    file: io::BufWriter<File>,
    hash: Sha256,
    bytes: u64,
}

impl Write for Hashed {
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

/// A shard that is being written, under a name that is never taken for a finished one.
struct Writer {
    path: PathBuf,
    temporary: PathBuf,
    file: String,
    tar: tar::Builder<Hashed>,
    images: usize,
    labels: Vec<usize>,
    /// Of the last image.
    key: String,
}

impl Writer {
    fn create(out: &Path, file: String) -> Result<Writer, Error> {
        let path = out.join(&file);
        let temporary = files::temporary_name(&path);
        let to = File::create(&temporary).map_err(failed(&temporary))?;
        let to = Hashed { file: io::BufWriter::new(to), hash: Sha256::new(), bytes: 0 };
        Ok(Writer {
            path,
            temporary,
            file,
            tar: tar::Builder::new(to),
            images: 0,
            labels: Vec::new(),
            key: String::new(),
        })
    }

    fn add(&mut self, image: Ready) -> Result<(), Error> {
        let (key, extension) = image.name.rsplit_once('.').unwrap_or((&image.name, "jpg"));
        // Two neighbours of one name would be one sample.
        let key = if key == self.key { format!("{key}_{}", self.images) } else { key.to_owned() };
        let label = image.label.map(|label| label.to_string());
        let members = [(extension, Some(&image.bytes[..])), ("cls", label.as_ref().map(|text| text.as_bytes()))];
        for (extension, bytes) in members {
            let Some(bytes) = bytes else { continue };
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            let name = format!("{key}.{extension}");
            self.tar.append_data(&mut header, name, bytes).map_err(failed(&self.temporary))?;
        }
        self.key = key;
        self.images += 1;
        self.labels.extend(image.label);
        Ok(())
    }

    fn finish(self) -> Result<Shard, Error> {
        let Writer { path, temporary, file, tar, images, labels, .. } = self;
        let done = (|| {
            let Hashed { file, hash, bytes } = tar.into_inner()?;
            file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
            fs::rename(&temporary, &path)?;
            files::sync_folder(path.parent())?;
            Ok((hash, bytes))
        })();
        let (hash, bytes) = done.map_err(failed(&path))?;
        Ok(Shard { file, images, bytes, sha256: hex(&hash.finalize()), labels })
    }
}

//! Data sources. A [`Dataset`] has a training split and, where the data provide them, splits for
//! monitoring and testing. Labels are used by evaluation only. Nothing here depends on tensors.

pub mod cifar;
pub mod decode;
pub mod dense_labels;
pub mod folder;
pub mod idx;
pub mod labels_csv;
pub mod order;
pub mod pack;
pub mod prefetch;
pub mod shards;
pub mod synthetic;

use std::{
    collections::{BTreeMap, HashSet},
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub use crate::image::{CHANNELS, Image};
use crate::{
    atomic_write::{hex, remedy},
    random::{self, Domain},
};
pub use decode::DecodeError;
pub use order::Order;
pub use prefetch::{Loader, MicroBatch};
use shards::Shards;

/// Training images in shards that are decoded before a run: enough to see that they are images at
/// all.
const CHECKED_IN_SHARDS: usize = 64;

/// Size of the leading range of shards that a sample is drawn from, as a multiple of the sample
/// size.
const SHARD_SAMPLE_FACTOR: usize = 4;

/// Error of a data source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Missing path.
    #[error("{} does not exist\nhint: pass a folder of images", .0.display())]
    Missing(PathBuf),
    /// Unreadable folder or file.
    #[error("cannot read {}: {source}\nhint: check its permissions", path.display())]
    Read {
        /// Folder or file.
        path: PathBuf,
        /// I/O error.
        source: io::Error,
    },
    /// No images to train on.
    #[error(
        "no images in {}\n\
         hint: pass a folder with JPEG, PNG, WebP, BMP, GIF or TIFF files at any depth, or with CIFAR or IDX files",
        .0.display()
    )]
    Empty(PathBuf),
    /// Unreadable image.
    #[error("cannot use {name}: {source}{}", decode_hint(source))]
    Image {
        /// Path, or file and number.
        name: String,
        /// Decoding error.
        source: DecodeError,
    },
    /// Malformed CIFAR, IDX or gzip file.
    #[error("{} is not a complete {kind} file: {reason}\nhint: download it again", path.display())]
    Malformed {
        /// File.
        path: PathBuf,
        /// Expected format.
        kind: &'static str,
        /// First problem.
        reason: String,
    },
    /// More than half of the images are unreadable.
    #[error(
        "{bad} of {all} images in {} are unreadable, more than half (first: {first})\n\
         hint: check that this is the intended folder",
        root.display()
    )]
    MostlyBad {
        /// Root of the data.
        root: PathBuf,
        /// Number of unreadable images.
        bad: usize,
        /// Number of images checked.
        all: usize,
        /// First unreadable image, with the reason.
        first: String,
    },
    /// Images without matching masks or depth maps.
    #[error(
        "{} is not a set of images with masks or depth maps: {reason}\n\
         hint: pass a folder with `images` and `masks` (or `depth`) that contain the same file names",
        root.display()
    )]
    DenseLabels {
        /// Root of the data.
        root: PathBuf,
        /// First problem.
        reason: String,
    },
    /// Invalid `labels.csv`.
    #[error(
        "invalid {}: {reason}\n\
         hint: a labels.csv has the columns `path`, `label` and, if there are splits, `split`",
        path.display()
    )]
    Labels {
        /// File.
        path: PathBuf,
        /// First problem.
        reason: String,
    },
    /// Unwritable file.
    #[error("cannot write {}: {source}\nhint: {}", path.display(), remedy(source))]
    Write {
        /// File.
        path: PathBuf,
        /// I/O error.
        source: io::Error,
    },
    /// Output folder in use.
    #[error("{} already contains {contents}\nhint: choose another folder", path.display())]
    Occupied {
        /// Folder.
        path: PathBuf,
        /// Description of the contents.
        contents: &'static str,
    },
    /// Unusable tar or Parquet file.
    #[error("cannot use {}: {reason}", path.display())]
    Shard {
        /// File, pattern or address.
        path: PathBuf,
        /// First problem.
        reason: String,
    },
    /// Missing labels where an evaluation needs them.
    #[error(
        "{} has no labels of two or more classes\n\
         hint: put the images of each class into a subfolder named after it, or write a labels.csv (in shards: \
         `.cls` files or a column `label`, with class numbers from 0 to 65535)",
        .0.display()
    )]
    Unlabeled(PathBuf),
}

/// Hint for an image that cannot be decoded; a read error may carry its own.
fn decode_hint(source: &DecodeError) -> &'static str {
    if matches!(source, DecodeError::Read(_)) { "" } else { "\nhint: replace or remove the file" }
}

/// Error message on one line.
fn one_line(message: &str) -> String {
    let message = message.replace("\nhint: ", "; ");
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Storage of the images of a split. A new kind of source is a variant here and a file of this
/// module.
#[derive(Debug, Clone)]
enum Source {
    /// One file per image.
    Files(Arc<Vec<PathBuf>>),
    /// Decoded images.
    Memory(Arc<Vec<Arc<Image>>>),
    /// Many images per file.
    Shards(Arc<Shards>),
}

/// Images in a fixed order, with or without labels.
#[derive(Debug, Clone)]
pub struct Images {
    source: Source,
    /// Index of each image in the source.
    indices: Vec<usize>,
    /// Class of each image.
    labels: Option<Vec<usize>>,
    /// Classes of each image, for multi-label data.
    tags: Option<Vec<Vec<usize>>>,
    /// Decoded images, parallel to `indices`, if they fit into memory.
    decoded: Option<Vec<Arc<Image>>>,
}

/// An unreadable image. Displays as `name: reason` on one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Path, or file and number.
    pub name: String,
    /// Reason, on one line.
    pub reason: String,
}

impl Skipped {
    fn new(name: String, error: &dyn fmt::Display) -> Skipped {
        Skipped { name, reason: one_line(&error.to_string()) }
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

/// A data set, with its splits.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Path as given by the user.
    pub root: PathBuf,
    /// Kind of source, e.g. `image folder` or `CIFAR-10`.
    pub kind: String,
    /// Class names; empty without labels.
    pub classes: Vec<String>,
    /// Training split.
    pub train: Images,
    /// Split for monitoring a run: the data's `val`, else its `test`.
    pub held_out: Option<Images>,
    /// Split for final results: the data's `test`, else its `val`.
    pub test: Option<Images>,
    /// Unreadable images.
    pub skipped: Vec<Skipped>,
}

impl Images {
    fn new(source: Source, n: usize, labels: Option<Vec<usize>>) -> Self {
        Images { source, indices: (0..n).collect(), labels, tags: None, decoded: None }
    }

    fn files(paths: Vec<PathBuf>, labels: Option<Vec<usize>>) -> Self {
        let n = paths.len();
        Images::new(Source::Files(Arc::new(paths)), n, labels)
    }

    /// Wraps decoded images.
    pub fn memory(images: Vec<Image>, labels: Option<Vec<usize>>) -> Self {
        let images: Vec<_> = images.into_iter().map(Arc::new).collect();
        let n = images.len();
        Images::new(Source::Memory(Arc::new(images)), n, labels)
    }

    fn shards(shards: Shards, labels: Option<Vec<usize>>) -> Self {
        let n = shards.len();
        Images::new(Source::Shards(Arc::new(shards)), n, labels)
    }

    /// Sets the classes of each image, for multi-label data.
    fn with_tags(self, tags: Vec<Vec<usize>>) -> Self {
        Images { tags: Some(tags), ..self }
    }

    /// Classes of each image, for multi-label data.
    pub fn tags(&self) -> Option<&[Vec<usize>]> {
        self.tags.as_deref()
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// True if there are no images.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// Class of each image.
    pub fn labels(&self) -> Option<&[usize]> {
        self.labels.as_deref()
    }

    /// Path, or number, of image `i`.
    pub fn name(&self, i: usize) -> String {
        match &self.source {
            Source::Files(paths) => paths[self.indices[i]].display().to_string(),
            Source::Memory(_) => format!("image {}", self.indices[i]),
            Source::Shards(shards) => shards.name(self.indices[i]),
        }
    }

    /// File of image `i`, if images are single files.
    pub fn path(&self, i: usize) -> Option<&Path> {
        match &self.source {
            Source::Files(paths) => Some(&paths[self.indices[i]]),
            Source::Memory(_) | Source::Shards(_) => None,
        }
    }

    /// Returns image `i`, decoded.
    ///
    /// # Errors
    /// [`Error::Image`] if it cannot be read or completely decoded.
    pub fn get(&self, i: usize) -> Result<Arc<Image>, Error> {
        if let Some(decoded) = &self.decoded {
            return Ok(decoded[i].clone());
        }
        match &self.source {
            Source::Memory(images) => Ok(images[self.indices[i]].clone()),
            Source::Files(paths) => match decode::file(&paths[self.indices[i]]) {
                Ok(image) => Ok(Arc::new(image)),
                Err(source) => Err(Error::Image { name: self.name(i), source }),
            },
            Source::Shards(shards) => {
                let image = shards.bytes(self.indices[i]).map_err(DecodeError::Read).and_then(|b| decode::bytes(&b));
                image.map(Arc::new).map_err(|source| Error::Image { name: self.name(i), source })
            }
        }
    }

    /// Returns the encoded bytes of image `i`; `None` for images in memory.
    fn encoded_bytes(&self, i: usize) -> Option<io::Result<Vec<u8>>> {
        match &self.source {
            Source::Files(paths) => Some(std::fs::read(&paths[self.indices[i]])),
            Source::Shards(shards) => Some(shards.bytes(self.indices[i])),
            Source::Memory(_) => None,
        }
    }

    /// Returns image `i`. In shards, which are not checked before a run, an unreadable image is
    /// recorded in [`Images::skipped`] and replaced by the next readable one, so training depends
    /// on the data alone.
    ///
    /// # Errors
    /// [`Error::Image`] as for [`Images::get`]. In shards, if a shard cannot be read or too many
    /// consecutive images are unreadable.
    pub fn get_or_next(&self, i: usize) -> Result<Arc<Image>, Error> {
        let Source::Shards(shards) = &self.source else { return self.get(i) };
        let mut at = i;
        loop {
            match self.get(at) {
                Err(Error::Image { name, source }) if !matches!(source, DecodeError::Read(_)) => {
                    let consecutive = (at + self.len() - i) % self.len() + 1;
                    let is_last = consecutive == self.len();
                    if is_last || !shards.skip(Skipped::new(name.clone(), &source), consecutive) {
                        return Err(Error::Image { name, source });
                    }
                    at = (at + 1) % self.len();
                }
                other => return other,
            }
        }
    }

    /// Images skipped by [`Images::get_or_next`] so far.
    pub fn skipped(&self) -> Vec<Skipped> {
        match &self.source {
            Source::Shards(shards) => shards.skipped(),
            Source::Files(_) | Source::Memory(_) => Vec::new(),
        }
    }

    /// Training order: a full shuffle, or for shards, a sequence of shards mixed by a buffer of
    /// `buffer` images.
    pub fn order(&self, seed: u64, buffer: usize) -> Order {
        match &self.source {
            Source::Shards(shards) => Order::sharded(seed, shards.unit_sizes(&self.indices), buffer),
            Source::Files(_) | Source::Memory(_) => Order::new(seed, self.len()),
        }
    }

    /// Number of images by which [`Images::prefetch`] should run ahead; 0 if prefetching does
    /// nothing.
    pub(crate) fn lookahead(&self) -> usize {
        match &self.source {
            Source::Shards(shards) => shards.lookahead(),
            Source::Files(_) | Source::Memory(_) => 0,
        }
    }

    /// Starts to fetch the remote shard of image `i`, which will be needed soon.
    pub fn prefetch(&self, i: usize) {
        if let Source::Shards(shards) = &self.source {
            shards.fetch_ahead(self.indices[i]);
        }
    }

    /// Returns the images at these positions, in this order.
    pub fn subset(&self, positions: &[usize]) -> Images {
        Images {
            source: self.source.clone(),
            indices: positions.iter().map(|p| self.indices[*p]).collect(),
            labels: self.labels.as_ref().map(|l| positions.iter().map(|p| l[*p]).collect()),
            tags: self.tags.as_ref().map(|t| positions.iter().map(|p| t[*p].clone()).collect()),
            decoded: self.decoded.as_ref().map(|k| positions.iter().map(|p| k[*p].clone()).collect()),
        }
    }

    /// True if both are the same images of the same source, not copies with equal pixels.
    pub fn is_same(&self, other: &Images) -> bool {
        let source = match (&self.source, &other.source) {
            (Source::Files(a), Source::Files(b)) => Arc::ptr_eq(a, b),
            (Source::Memory(a), Source::Memory(b)) => Arc::ptr_eq(a, b),
            (Source::Shards(a), Source::Shards(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        source && self.indices == other.indices
    }

    /// True if both have labels, both have tags, or both have neither.
    pub fn has_same_label_kind(&self, other: &Images) -> bool {
        (self.labels.is_some(), self.tags.is_some()) == (other.labels.is_some(), other.tags.is_some())
    }

    /// Returns these images followed by `other`, not decoded; `None` for shards or different kinds
    /// of source.
    pub fn concat(&self, other: &Images) -> Option<Images> {
        fn select<T: Clone>(images: &Images, items: &[T]) -> impl Iterator<Item = T> {
            images.indices.iter().map(|i| items[*i].clone())
        }
        let source = match (&self.source, &other.source) {
            (Source::Files(a), Source::Files(b)) => {
                Source::Files(Arc::new(select(self, a).chain(select(other, b)).collect()))
            }
            (Source::Memory(a), Source::Memory(b)) => {
                Source::Memory(Arc::new(select(self, a).chain(select(other, b)).collect()))
            }
            _ => return None,
        };
        let labels = self.labels.as_ref().zip(other.labels.as_ref()).map(|(a, b)| [&a[..], b].concat());
        let tags = self.tags.as_ref().zip(other.tags.as_ref()).map(|(a, b)| [&a[..], b].concat());
        let n = self.len() + other.len();
        Some(Images { tags, ..Images::new(source, n, labels) })
    }

    /// Returns a stratified random sample of `n` images: one from each of `n` equal intervals of
    /// the order. Returns all images if `n` is 0 or not smaller than their number.
    ///
    /// In a periodic order, such as alternating classes, a fixed stride could select a single
    /// class.
    pub fn sample_random(&self, n: usize) -> Images {
        let len = self.len();
        if n == 0 || n >= len { self.clone() } else { self.subset(&stratified_positions(len, n)) }
    }

    /// Returns a sample of about `n` readable images, or all if `n` is 0, for evaluation during a
    /// run. In shards, the sample comes from the first images, so that few shards are opened for
    /// it.
    pub fn sample(&self, n: usize) -> Images {
        match self.source {
            Source::Files(_) | Source::Memory(_) => self.sample_random(n),
            Source::Shards(_) => {
                let range = if n == 0 { self.len() } else { self.len().min(SHARD_SAMPLE_FACTOR * n) };
                let first: Vec<usize> = (0..range).collect();
                self.subset(&first).sample_random(n).check(0, &|| ()).0
            }
        }
    }

    /// Separates unreadable images. Decodes each image in shards; returns all others unchanged,
    /// since they have been checked before.
    pub fn readable(&self) -> (Images, Vec<Skipped>) {
        match self.source {
            Source::Shards(_) => self.check(0, &|| ()),
            Source::Files(_) | Source::Memory(_) => (self.clone(), Vec::new()),
        }
    }

    /// Splits off a stratified random sample of `n` images: `(rest, sample)`. The positions depend
    /// only on the number of images and `n`.
    pub fn split_off(&self, n: usize) -> (Images, Images) {
        // In shards, from the first images, so that few shards are opened for the sample.
        let range = matches!(self.source, Source::Shards(_)).then_some(SHARD_SAMPLE_FACTOR * n);
        let range = self.len().min(range.unwrap_or(usize::MAX));
        let sample = stratified_positions(range, n);
        let mut is_sampled = vec![false; self.len()];
        sample.iter().for_each(|p| is_sampled[*p] = true);
        let rest: Vec<usize> = (0..self.len()).filter(|p| !is_sampled[*p]).collect();
        (self.subset(&rest), self.subset(&sample))
    }

    /// Splits off about 1 / `denominator` of the images for testing: `(train, test)`. With labels,
    /// per class, and every class keeps at least one training image.
    pub fn split_off_test(&self, denominator: usize) -> (Images, Images) {
        let Some(labels) = &self.labels else { return self.split_off(self.len().div_ceil(denominator)) };
        let mut classes: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        labels.iter().enumerate().for_each(|(i, class)| classes.entry(*class).or_default().push(i));
        let mut is_test = vec![false; self.len()];
        for positions in classes.values() {
            let n = (positions.len() / denominator).max(usize::from(positions.len() > 1));
            stratified_positions(positions.len(), n).into_iter().for_each(|at| is_test[positions[at]] = true);
        }
        let select = |test: bool| self.subset(&(0..self.len()).filter(|i| is_test[*i] == test).collect::<Vec<_>>());
        (select(false), select(true))
    }

    /// Hash of names, sizes on disk and order. Equal for the same images in the same order.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for &i in &self.indices {
            match &self.source {
                Source::Files(paths) => {
                    let name = paths[i].file_name().unwrap_or_default();
                    hash.update(name.as_encoded_bytes());
                    hash.update(paths[i].metadata().map_or(0, |m| m.len()).to_le_bytes());
                }
                Source::Memory(images) => hash.update(&images[i].pixels),
                Source::Shards(_) => hash.update((i as u64).to_le_bytes()),
            }
        }
        if let Source::Shards(shards) = &self.source {
            hash.update(shards.fingerprint());
        }
        hex(&hash.finalize()[..8])
    }

    /// [`Images::check`] before training: decodes only the first images of shards.
    fn check_for_training(&self, cache_bytes: usize, on_progress: &(dyn Fn() + Sync)) -> (Images, Vec<Skipped>) {
        if !matches!(self.source, Source::Shards(_)) {
            return self.check(cache_bytes, on_progress);
        }
        let first: Vec<usize> = (0..self.n_checked_for_training()).collect();
        let (_, skipped) = self.subset(&first).check(0, on_progress);
        (self.clone(), skipped)
    }

    /// Number of images that [`Images::check_for_training`] decodes.
    fn n_checked_for_training(&self) -> usize {
        if matches!(self.source, Source::Shards(_)) { self.len().min(CHECKED_IN_SHARDS) } else { self.len() }
    }

    /// Decodes every image once. Returns the readable images, kept decoded if all of them take at
    /// most `cache_bytes`, and the unreadable ones.
    fn check(&self, cache_bytes: usize, on_progress: &(dyn Fn() + Sync)) -> (Images, Vec<Skipped>) {
        let total = AtomicUsize::new(0);
        let decode = |i: usize| -> Result<Option<Arc<Image>>, Skipped> {
            let image = self.get(i);
            on_progress();
            match image {
                Ok(image) => {
                    let so_far = total.fetch_add(image.pixels.len(), Ordering::Relaxed) + image.pixels.len();
                    Ok((so_far <= cache_bytes).then_some(image))
                }
                Err(Error::Image { name, source }) => Err(Skipped::new(name, &source)),
                Err(other) => Err(Skipped::new(self.name(i), &other)),
            }
        };
        let results: Vec<_> = (0..self.len()).into_par_iter().map(decode).collect();
        let readable: Vec<usize> = (0..self.len()).filter(|i| results[*i].is_ok()).collect();
        let (mut decoded, mut skipped) = (Vec::new(), Vec::new());
        for result in results {
            match result {
                Ok(image) => decoded.extend(image),
                Err(unreadable) => skipped.push(unreadable),
            }
        }
        let mut images = self.subset(&readable);
        let fits = decoded.len() == images.len() && !matches!(images.source, Source::Memory(_));
        images.decoded = fits.then_some(decoded);
        (images, skipped)
    }
}

impl Dataset {
    /// Opens the data at `root`: shards, a folder with `labels.csv`, CIFAR or IDX files, or a
    /// folder of images. Finds the images without decoding them.
    ///
    /// # Errors
    /// Any but [`Error::Image`], [`Error::MostlyBad`] and [`Error::Unlabeled`].
    pub fn open(root: impl AsRef<Path>) -> Result<Dataset, Error> {
        let root = root.as_ref();
        if !root.exists() && !shards::is_pattern(root) && !shards::is_remote(root) {
            return Err(Error::Missing(root.to_owned()));
        }
        // A folder that cannot be listed is an error of its own, not an empty folder.
        if root.is_dir() {
            std::fs::read_dir(root).map_err(|source| Error::Read { path: root.to_owned(), source })?;
        }
        for open in [shards::open, labels_csv::open, cifar::open, idx::open] {
            if let Some(dataset) = open(root)? {
                return Ok(dataset);
            }
        }
        folder::open(root)
    }

    /// Opens a folder of image files, at any depth, whatever else it contains. Subfolders are
    /// classes; `train`, `val` and `test` are splits. [`Dataset::open`] also recognizes other kinds
    /// of data.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Empty`], [`Error::Read`].
    pub fn folder(path: impl AsRef<Path>) -> Result<Dataset, Error> {
        let path = path.as_ref();
        if path.exists() { folder::open(path) } else { Err(Error::Missing(path.to_owned())) }
    }

    /// Creates a data set of RGB images in memory, with the class of each image if `labels` is
    /// given. All images are for training; classes are named by their numbers.
    ///
    /// # Panics
    /// If an image is not RGB or has the wrong number of pixels, or the number of labels is not
    /// that of the images.
    pub fn from_images(images: Vec<Image>, labels: Option<Vec<usize>>) -> Dataset {
        for image in &images {
            assert_eq!(image.channels, CHANNELS, "images must be RGB");
            assert_eq!(image.pixels.len(), image.height * image.width * CHANNELS, "pixels must match height and width");
            assert!(!image.pixels.is_empty(), "images must not be empty");
        }
        assert!(labels.as_ref().is_none_or(|labels| labels.len() == images.len()), "every image needs one label");
        let n_classes = labels.iter().flatten().max().map_or(0, |max| max + 1);
        Dataset {
            root: "images in memory".into(),
            kind: "images in memory".into(),
            classes: (0..n_classes).map(|class| class.to_string()).collect(),
            train: Images::memory(images, labels),
            held_out: None,
            test: None,
            skipped: Vec::new(),
        }
    }

    /// Keeps a stratified random sample of `n` training images ([`Images::sample_random`]); 0 keeps
    /// all.
    pub fn limit(self, n: usize) -> Dataset {
        Dataset { train: self.train.sample_random(n), ..self }
    }

    /// Decodes every image once and drops the unreadable ones. Small data stay decoded in memory,
    /// up to `cache_bytes` for the training images and a quarter of it for each other split.
    ///
    /// # Errors
    /// [`Error::MostlyBad`] if more than half of the training images are unreadable,
    /// [`Error::Empty`] if none is left.
    pub fn check(self, cache_bytes: usize, on_progress: &(dyn Fn() + Sync)) -> Result<Dataset, Error> {
        let (n_checked, train) = (self.train.len(), self.train.check(cache_bytes, on_progress));
        self.checked(n_checked, train, cache_bytes, on_progress)
    }

    /// [`Dataset::check`] for training, which skips unreadable images in shards as it meets them:
    /// decodes only the first training images of shards.
    ///
    /// # Errors
    /// Those of [`Dataset::check`].
    pub(crate) fn check_for_training(
        self,
        cache_bytes: usize,
        on_progress: &(dyn Fn() + Sync),
    ) -> Result<Dataset, Error> {
        let (n_checked, train) =
            (self.train.n_checked_for_training(), self.train.check_for_training(cache_bytes, on_progress));
        self.checked(n_checked, train, cache_bytes, on_progress)
    }

    /// Completes a check of which `n_checked` training images are done, with this outcome.
    fn checked(
        self,
        n_checked: usize,
        (train, mut skipped): (Images, Vec<Skipped>),
        cache_bytes: usize,
        on_progress: &(dyn Fn() + Sync),
    ) -> Result<Dataset, Error> {
        if 2 * skipped.len() > n_checked {
            let first = skipped.first().map_or(String::new(), Skipped::to_string);
            return Err(Error::MostlyBad { root: self.root, bad: skipped.len(), all: n_checked, first });
        }
        if train.is_empty() {
            return Err(Error::Empty(self.root));
        }
        let mut check = |images: Option<Images>| {
            let (images, unreadable) = images?.check(cache_bytes / 4, on_progress);
            skipped.extend(unreadable);
            (!images.is_empty()).then_some(images)
        };
        let held_out = check(self.held_out);
        let test = check(self.test);
        // `held_out` and `test` may be the same images.
        let mut names = HashSet::new();
        skipped.retain(|one| names.insert(one.name.clone()));
        Ok(Dataset { train, held_out, test, skipped, ..self })
    }

    /// Number of images in all splits, which is the number that [`Dataset::check`] decodes.
    pub fn n_images(&self) -> usize {
        let len = |images: &Option<Images>| images.as_ref().map_or(0, Images::len);
        self.train.len() + len(&self.held_out) + len(&self.test)
    }
}

/// Draws one random position from each of `n` equal intervals of 0..`len`. `n` is at most `len`.
fn stratified_positions(len: usize, n: usize) -> Vec<usize> {
    let mut rng = random::stream(&[Domain::Split as u64, len as u64, n as u64]);
    let position = |i: usize| {
        let (from, to) = (i * len / n, (i + 1) * len / n);
        from + random::below(&mut rng, to - from)
    };
    (0..n).map(position).collect()
}

/// Lists a folder's entries, sorted by name, so that the order does not depend on the file system.
fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let unreadable = |source| Error::Read { path: folder.to_owned(), source };
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        entries.push(entry.map_err(unreadable)?.path());
    }
    entries.sort();
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(n: usize) -> Images {
        let image = |i: usize| Image { height: 1, width: 1, channels: 1, pixels: vec![i as u8] };
        Images::memory((0..n).map(image).collect(), Some((0..n).collect()))
    }

    #[test]
    fn sample_takes_one_image_per_interval() {
        let sample = numbered(10).sample_random(4);
        let sample = sample.labels().unwrap();
        let intervals = [0..2, 2..5, 5..7, 7..10];
        assert!(intervals.iter().zip(sample).all(|(interval, i)| interval.contains(i)), "{sample:?}");
        assert_eq!(numbered(3).sample_random(5).len(), 3);
        assert_eq!(numbered(3).sample_random(0).len(), 3);
    }

    #[test]
    fn concat_keeps_order_and_labels() {
        let (a, b) = (numbered(10).subset(&[0, 2, 3]), numbered(10).subset(&[9, 1]));
        assert!(a.is_same(&a.clone()) && !a.is_same(&b) && !a.is_same(&numbered(3)));
        let both = b.concat(&a).unwrap();
        assert_eq!(both.labels().unwrap(), [9, 1, 0, 2, 3]);
        assert_eq!(both.get(3).unwrap().pixels, [2]);
    }

    #[test]
    fn split_off_partitions_the_images() {
        let (rest, sample) = numbered(10).split_off(3);
        let sample = sample.labels().unwrap();
        let intervals = [0..3, 3..6, 6..10];
        assert!(intervals.iter().zip(sample).all(|(interval, i)| interval.contains(i)), "one each: {sample:?}");
        let others: Vec<usize> = (0..10).filter(|i| !sample.contains(i)).collect();
        assert_eq!(rest.labels().unwrap(), others);
        assert_eq!(numbered(10).split_off(3).1.labels().unwrap(), sample);
    }

    #[test]
    fn test_split_leaves_training_images_in_every_class() {
        let labels = [vec![0; 20], vec![1; 2], vec![2; 1]].concat();
        let image = || Image { height: 1, width: 1, channels: 1, pixels: vec![0] };
        let (train, test) = Images::memory((0..23).map(|_| image()).collect(), Some(labels)).split_off_test(5);
        assert_eq!(test.labels().unwrap(), [0, 0, 0, 0, 1]);
        assert_eq!(train.len(), 18);
    }

    #[test]
    fn samples_of_alternating_classes_contain_every_class() {
        let image = || Image { height: 1, width: 1, channels: 1, pixels: vec![0] };
        let alternating = Images::memory((0..800).map(|_| image()).collect(), Some((0..800).map(|i| i % 5).collect()));
        for sample in [alternating.sample_random(160), alternating.split_off(160).1, alternating.sample_random(400)] {
            let count = |class: usize| sample.labels().unwrap().iter().filter(|l| **l == class).count();
            assert!((0..5).all(|class| count(class) > sample.len() / 8), "{:?}", [0, 1, 2, 3, 4].map(count));
        }
    }

    #[test]
    fn images_in_memory_make_a_dataset() {
        let image = |i: u8| Image { height: 1, width: 2, channels: 3, pixels: vec![i; 6] };
        let data = Dataset::from_images((0..4).map(image).collect(), Some(vec![0, 2, 0, 2]));
        assert_eq!((data.train.len(), data.classes.len()), (4, 3));
        assert!(Dataset::from_images(vec![image(0)], None).classes.is_empty());
    }

    #[test]
    fn skipped_reasons_are_on_one_line() {
        let error = Error::Missing("photos".into());
        let skipped = Skipped::new("a.png".into(), &error);
        assert_eq!(skipped.to_string(), "a.png: photos does not exist; pass a folder of images");
    }
}

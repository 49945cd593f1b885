//! Data sources. A [`Dataset`] has a training split and, where the data provide them, splits for
//! monitoring and testing. Labels are used by evaluation only. Nothing here depends on tensors.

#[doc(hidden)]
pub mod cifar;
#[doc(hidden)]
pub mod decode;
pub mod dense_labels;
mod detect_levels;
pub mod file_pattern;
#[doc(hidden)]
pub mod folder;
#[doc(hidden)]
pub mod idx;
#[doc(hidden)]
pub mod labels_csv;
pub mod levels;
#[doc(hidden)]
pub mod order;
pub mod pack;
#[doc(hidden)]
pub mod prefetch;
mod reads;
#[doc(hidden)]
pub mod shards;
mod source;
pub mod synthetic;

use std::{
    collections::{BTreeMap, HashSet},
    fmt, io,
    ops::ControlFlow::{self, Continue},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub use crate::image::{CHANNELS, Image, MAX_CHANNELS, Pixels};
use crate::{
    atomic_write::{hex, remedy},
    random::{self, Domain},
};
pub use decode::DecodeError;
pub use folder::Media;
pub use levels::Levels;
pub use order::Order;
pub use prefetch::{Loader, MicroBatch};
pub use reads::longest as longest_read;
use shards::Shards;
pub use source::ImageSource;

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
    #[error("cannot read {}: {source}{}", path.display(), read_hint(source))]
    Read {
        /// Folder or file.
        path: PathBuf,
        /// I/O error.
        source: io::Error,
    },
    /// No images to train on.
    #[error(
        "no images in {}\n\
         hint: pass a folder with JPEG, PNG, WebP, BMP, GIF or TIFF files at any depth, with sounds, or with \
         CIFAR or IDX files",
        .0.display()
    )]
    Empty(PathBuf),
    /// No images to train on, only files that are not read.
    #[error("no images in {}, only {found}\nhint: {remedy}", root.display())]
    Unread {
        /// Root of the data.
        root: PathBuf,
        /// Kinds of files, with their numbers.
        found: String,
        /// Way to use the first kind.
        remedy: &'static str,
    },
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
    /// Images with another number of channels than an encoder's.
    #[error(
        "the images have {found} channel{}, but the encoder was trained on {expected}\n\
         hint: use an encoder of {found}-channel images, or choose channels with `--channels`",
        if *found == 1 { "" } else { "s" }
    )]
    Mismatch {
        /// Channels of the images.
        found: usize,
        /// Channels of the encoder's input.
        expected: usize,
    },
    /// Images for an encoder of sounds, or the reverse, or data that are read in another way than
    /// in its training.
    #[error("{reason}\nhint: {hint}")]
    OtherInput {
        /// What differs.
        reason: String,
        /// Remedy.
        hint: &'static str,
    },
    /// The channels of the images cannot be read.
    #[error("cannot read the channels of the images in {}: {reason}", root.display())]
    Channels {
        /// Root of the data.
        root: PathBuf,
        /// Reason, with a hint.
        reason: String,
    },
    /// Levels of the images cannot be detected.
    #[error(
        "cannot detect the black and white levels of the images in {}: {reason}\n\
         hint: pass `--levels BLACK,WHITE`, the values of black and white",
        root.display()
    )]
    Levels {
        /// Root of the data.
        root: PathBuf,
        /// Values found.
        reason: String,
    },
    /// Missing labels where an evaluation needs them.
    #[error("{} has no labels of two or more classes\nhint: {LABELS_HINT}", .0.display())]
    Unlabeled(PathBuf),
    /// Missing labels in one of the splits.
    #[error("the {split} split of {} has no labels: {reason}\nhint: {LABELS_HINT}", root.display())]
    UnlabeledSplit {
        /// Root of the data.
        root: PathBuf,
        /// Name of the split.
        split: String,
        /// Missing folder, file or column.
        reason: String,
    },
    /// The caller has stopped the work.
    #[error("stopped while reading the images")]
    Stopped,
}

/// Called once per decoded image; `Break` ends the work with [`Error::Stopped`].
type OnImage<'a> = &'a (dyn Fn() -> ControlFlow<()> + Sync);

/// Ways to provide labels.
const LABELS_HINT: &str = "put the images of each class into a subfolder named after it, or write a labels.csv (in \
                           shards: `.cls` files or a column `label`, with class numbers from 0 to 65535)";

/// Hint for an image that cannot be decoded; a read error may carry its own.
fn decode_hint(source: &DecodeError) -> &'static str {
    match source {
        // These carry their own.
        DecodeError::Read(_) | DecodeError::OutsideLevels { .. } | DecodeError::UnknownLevels(_) => "",
        DecodeError::Sound(_) | DecodeError::UnreadSound { .. } | DecodeError::TooLong => "",
        DecodeError::UnreadFormat(_) | DecodeError::UnreadKind { .. } => "\nhint: convert it to PNG or JPEG",
        _ => "\nhint: replace or remove the file",
    }
}

/// Hint for a failure of the machine; the error of a program's images has none.
fn read_hint(source: &io::Error) -> &'static str {
    if source.get_ref().is_some() { "" } else { "\nhint: check its permissions" }
}

/// Error message on one line.
fn one_line(message: &str) -> String {
    let message = message.replace("\nhint: ", "; ");
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Settings of [`Dataset::open_with`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OpenOptions {
    /// Image column of Parquet files. `None` selects it by name.
    pub column: Option<String>,
    /// Mapping of file values to pixels. What is not set is detected.
    pub levels: Levels,
    /// Images or sounds. `None` reads whichever are more.
    pub media: Option<Media>,
}

impl OpenOptions {
    /// Settings for the data of an encoder with these levels.
    pub fn as_trained(levels: Levels) -> OpenOptions {
        let media = if levels.sound.is_some() { Media::Sounds } else { Media::Images };
        OpenOptions { column: None, levels, media: Some(media) }
    }
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
    /// Images of a program.
    Custom(Arc<dyn ImageSource>),
}

/// Images in a fixed order, with or without labels.
#[derive(Debug, Clone)]
pub struct Images {
    source: Source,
    /// Index of each image in the source.
    indices: Vec<usize>,
    /// Class of each image.
    labels: Option<Vec<usize>>,
    /// Class of each image that has one, if only some have.
    partial_labels: Option<Vec<Option<usize>>>,
    /// Classes of each image, for multi-label data; empty for an image without labels.
    tags: Option<Vec<Vec<usize>>>,
    /// Mapping of file values to pixels.
    levels: Levels,
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

/// Images or files of the data that are not used. Displays on one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unused {
    /// File, folder or kind of file.
    pub name: String,
    /// Number of images or files; 0 if unknown.
    pub count: usize,
    /// Reason, on one line.
    pub reason: String,
}

impl fmt::Display for Unused {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.count {
            0 => write!(f, "{}: {}", self.name, self.reason),
            n => write!(f, "{} ({n}): {}", self.name, self.reason),
        }
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
    /// Image column of Parquet files, as chosen in [`OpenOptions`].
    pub column: Option<String>,
    /// Images and files that are not part of the data set.
    pub unused: Vec<Unused>,
}

impl Images {
    fn new(source: Source, n: usize, labels: Option<Vec<usize>>) -> Self {
        let indices = (0..n).collect();
        Images { source, indices, labels, partial_labels: None, tags: None, levels: Levels::default(), decoded: None }
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

    /// `n` images that a program provides on demand.
    #[doc(hidden)]
    pub fn custom(source: Arc<dyn ImageSource>, n: usize, labels: Option<Vec<usize>>) -> Self {
        Images::new(Source::Custom(source), n, labels)
    }

    fn shards(shards: Shards, labels: Option<Vec<usize>>) -> Self {
        let n = shards.len();
        Images::new(Source::Shards(Arc::new(shards)), n, labels)
    }

    /// Sets the classes of those images that have one.
    fn with_partial_labels(self, labels: Vec<Option<usize>>) -> Self {
        if labels.iter().all(Option::is_none) {
            return Images { labels: None, partial_labels: None, ..self };
        }
        let complete: Option<Vec<usize>> = labels.iter().copied().collect();
        let partial_labels = complete.is_none().then_some(labels);
        Images { labels: complete, partial_labels, ..self }
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

    /// Class of each image, if all have one.
    pub fn labels(&self) -> Option<&[usize]> {
        self.labels.as_deref()
    }

    /// Class of image `i`.
    pub fn label(&self, i: usize) -> Option<usize> {
        match (&self.labels, &self.partial_labels) {
            (Some(labels), _) => Some(labels[i]),
            (None, Some(partial)) => partial[i],
            (None, None) => None,
        }
    }

    /// The images that have labels or tags; `None` if no image has.
    pub fn labeled(&self) -> Option<Images> {
        if self.labels.is_some() {
            return Some(self.clone());
        }
        let has_label = |i: &usize| match (&self.partial_labels, &self.tags) {
            (Some(partial), _) => partial[*i].is_some(),
            (None, Some(tags)) => !tags[*i].is_empty(),
            (None, None) => false,
        };
        let positions: Vec<usize> = (0..self.len()).filter(has_label).collect();
        (!positions.is_empty()).then(|| self.subset(&positions))
    }

    /// Channels of the images.
    pub fn n_channels(&self) -> usize {
        match &self.source {
            Source::Files(_) | Source::Shards(_) => self.levels.n_channels(),
            Source::Memory(images) => images.first().map_or(CHANNELS, |image| image.channels),
            Source::Custom(source) => source.channels(),
        }
    }

    /// The same images, which were read from files with these levels.
    #[doc(hidden)]
    pub fn read_with(self, levels: Levels) -> Images {
        Images { levels, ..self }
    }

    /// True if the images are spectrograms of sounds.
    pub(crate) fn is_sound(&self) -> bool {
        self.levels.sound.is_some()
    }

    /// True if the images are read as RGB.
    pub(crate) fn is_rgb(&self) -> bool {
        self.n_channels() == CHANNELS && self.levels.channels.is_none() && !self.is_sound()
    }

    /// Levels that read these images from files. Images of a program have none of their own.
    pub(crate) fn levels_of_files(&self) -> Levels {
        if matches!(self.source, Source::Files(_) | Source::Shards(_)) {
            return self.levels.clone();
        }
        let first = (0..self.len().min(64)).find_map(|i| self.get(i).ok());
        let white = match first.as_deref() {
            Some(Image { pixels: Pixels::U16(_), .. }) => f32::from(u16::MAX),
            _ => f32::from(u8::MAX),
        };
        match self.n_channels() {
            CHANNELS if white == f32::from(u16::MAX) => Levels { int16: Some([0.0, white]), ..self.levels.clone() },
            CHANNELS => self.levels.clone(),
            n => {
                let channels = levels::Channels { ranges: vec![[0.0, white]; n], ..levels::Channels::default() };
                Levels { channels: Some(channels), ..self.levels.clone() }
            }
        }
    }

    /// Checks that these are inputs of an encoder with `expected` channels and these levels.
    ///
    /// # Errors
    /// [`Error::Mismatch`], [`Error::OtherInput`].
    pub(crate) fn ensure_input(&self, expected: usize, levels: &Levels) -> Result<(), Error> {
        const AS_TRAINED: &str = "pass the folder or the files, which are read as in training";
        let other = |reason: String, hint| Err(Error::OtherInput { reason, hint });
        let found = self.n_channels();
        if self.is_empty() {
            return Ok(());
        }
        match (&self.levels.sound, &levels.sound) {
            (None, Some(_)) => return other("the encoder was trained on sounds, not on images".into(), "pass sounds"),
            (Some(_), None) => return other("the encoder was trained on images, not on sounds".into(), "pass images"),
            (Some(own), Some(trained)) if own != trained => {
                let reason = format!(
                    "the sounds are read at {} Hz, but the encoder was trained at {} Hz",
                    own.rate, trained.rate
                );
                return other(reason, AS_TRAINED);
            }
            _ => {}
        }
        if found != expected {
            return Err(Error::Mismatch { found, expected });
        }
        let is_read = self.levels.channels.is_some();
        let own = if is_read { self.levels.channels.clone() } else { self.levels_of_files().channels };
        if levels.channels.is_some() && own != levels.channels {
            return other("the channels are read with other ranges than in training".into(), AS_TRAINED);
        }
        Ok(())
    }

    /// Path, or number, of image `i`.
    pub fn name(&self, i: usize) -> String {
        match &self.source {
            Source::Files(paths) => paths[self.indices[i]].display().to_string(),
            Source::Memory(_) => format!("image {}", self.indices[i]),
            Source::Shards(shards) => shards.name(self.indices[i]),
            Source::Custom(source) => source.name(self.indices[i]),
        }
    }

    /// File of image `i`, if images are single files.
    pub fn path(&self, i: usize) -> Option<&Path> {
        match &self.source {
            Source::Files(paths) => Some(&paths[self.indices[i]]),
            Source::Memory(_) | Source::Shards(_) | Source::Custom(_) => None,
        }
    }

    /// Returns image `i`, decoded.
    ///
    /// # Errors
    /// [`Error::Image`] if the image itself is unusable: missing, damaged or of an unsupported
    /// kind. [`Error::Read`] if the machine cannot read it: permission, space or I/O.
    pub fn get(&self, i: usize) -> Result<Arc<Image>, Error> {
        if let Some(decoded) = &self.decoded {
            return Ok(decoded[i].clone());
        }
        let _reading = reads::start();
        let image = match &self.source {
            Source::Memory(images) => return Ok(images[self.indices[i]].clone()),
            Source::Files(paths) => decode::file(&paths[self.indices[i]], &self.levels),
            Source::Shards(shards) => {
                let bytes = shards.bytes(self.indices[i]).map_err(DecodeError::Read);
                bytes.and_then(|bytes| decode::bytes(&bytes, &self.levels))
            }
            Source::Custom(source) => source::checked(&**source, self.indices[i]).map_err(DecodeError::Read),
        };
        image.map(Arc::new).map_err(|source| self.image_error(i, source))
    }

    /// [`Images::get`] with the errors of an [`ImageSource`].
    fn get_unshared(&self, i: usize) -> io::Result<Image> {
        self.get(i).map(Arc::unwrap_or_clone).map_err(|error| match error {
            Error::Image { source, .. } => io::Error::new(io::ErrorKind::InvalidData, source.to_string()),
            Error::Read { source, .. } => source,
            other => io::Error::other(other.to_string()),
        })
    }

    /// Error of image `i`: the image's own, or the machine's.
    fn image_error(&self, i: usize, source: DecodeError) -> Error {
        match source {
            DecodeError::Read(source) if !is_image_error(&source) => match &self.source {
                Source::Shards(shards) => {
                    Error::Shard { path: shards.path(self.indices[i]).to_owned(), reason: source.to_string() }
                }
                _ => Error::Read { path: PathBuf::from(self.name(i)), source },
            },
            source => Error::Image { name: self.name(i), source },
        }
    }

    /// Returns the encoded bytes of image `i`; `None` for images that have none.
    fn encoded_bytes(&self, i: usize) -> Option<io::Result<Vec<u8>>> {
        let _reading = reads::start();
        match &self.source {
            Source::Files(paths) => Some(std::fs::read(&paths[self.indices[i]])),
            Source::Shards(shards) => Some(shards.bytes(self.indices[i])),
            Source::Memory(_) | Source::Custom(_) => None,
        }
    }

    /// Returns image `i`. In shards, which are not checked before a run, an unreadable image is
    /// recorded in [`Images::skipped`] and replaced by the next readable one, so training depends
    /// on the data alone.
    ///
    /// # Errors
    /// As for [`Images::get`]. In shards [`Error::Image`] only if too many consecutive images are
    /// unreadable.
    pub(crate) fn get_or_next(&self, i: usize) -> Result<Arc<Image>, Error> {
        let Source::Shards(shards) = &self.source else { return self.get(i) };
        let mut at = i;
        loop {
            match self.get(at) {
                Err(Error::Image { name, source }) => {
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

    /// Images skipped while reading in order, so far.
    pub fn skipped(&self) -> Vec<Skipped> {
        match &self.source {
            Source::Shards(shards) => shards.skipped(),
            Source::Files(_) | Source::Memory(_) | Source::Custom(_) => Vec::new(),
        }
    }

    /// Training order: a full shuffle, or for shards, a sequence of shards mixed by a buffer of
    /// `buffer` images.
    pub fn order(&self, seed: u64, buffer: usize) -> Order {
        match &self.source {
            Source::Shards(shards) => Order::sharded(seed, shards.unit_sizes(&self.indices), buffer),
            Source::Files(_) | Source::Memory(_) | Source::Custom(_) => Order::new(seed, self.len()),
        }
    }

    /// Number of images by which [`Images::prefetch`] should run ahead; 0 if prefetching does
    /// nothing.
    pub(crate) fn lookahead(&self) -> usize {
        match &self.source {
            Source::Shards(shards) => shards.lookahead(),
            Source::Files(_) | Source::Memory(_) | Source::Custom(_) => 0,
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
        let subset = Images {
            source: self.source.clone(),
            indices: positions.iter().map(|p| self.indices[*p]).collect(),
            labels: self.labels.as_ref().map(|l| positions.iter().map(|p| l[*p]).collect()),
            partial_labels: None,
            tags: self.tags.as_ref().map(|t| positions.iter().map(|p| t[*p].clone()).collect()),
            levels: self.levels.clone(),
            decoded: self.decoded.as_ref().map(|k| positions.iter().map(|p| k[*p].clone()).collect()),
        };
        match &self.partial_labels {
            Some(partial) => subset.with_partial_labels(positions.iter().map(|p| partial[*p]).collect()),
            None => subset,
        }
    }

    /// True if both are the same images of the same source, not copies with equal pixels.
    pub fn is_same(&self, other: &Images) -> bool {
        let source = match (&self.source, &other.source) {
            (Source::Files(a), Source::Files(b)) => Arc::ptr_eq(a, b),
            (Source::Memory(a), Source::Memory(b)) => Arc::ptr_eq(a, b),
            (Source::Shards(a), Source::Shards(b)) => Arc::ptr_eq(a, b),
            (Source::Custom(a), Source::Custom(b)) => Arc::ptr_eq(a, b),
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
            (Source::Custom(_), _) => Source::Custom(Arc::new(source::Concatenated([self.clone(), other.clone()]))),
            _ => return None,
        };
        let labels = self.labels.as_ref().zip(other.labels.as_ref()).map(|(a, b)| [&a[..], b].concat());
        let tags = self.tags.as_ref().zip(other.tags.as_ref()).map(|(a, b)| [&a[..], b].concat());
        let n = self.len() + other.len();
        let both =
            Images { tags, levels: self.levels.clone().or(other.levels.clone()), ..Images::new(source, n, labels) };
        if both.labels.is_some() || both.tags.is_some() {
            return Some(both);
        }
        let all = (0..self.len()).map(|i| self.label(i)).chain((0..other.len()).map(|i| other.label(i)));
        Some(both.with_partial_labels(all.collect()))
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
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Shard`].
    pub fn sample(&self, n: usize) -> Result<Images, Error> {
        Ok(match self.source {
            Source::Files(_) | Source::Memory(_) | Source::Custom(_) => self.sample_random(n),
            Source::Shards(_) => {
                let range = if n == 0 { self.len() } else { self.len().min(SHARD_SAMPLE_FACTOR * n) };
                let first: Vec<usize> = (0..range).collect();
                self.subset(&first).sample_random(n).check(0, &|| Continue(()))?.0
            }
        })
    }

    /// Separates unreadable images. Decodes each image of shards and programs; returns all others
    /// unchanged, since they have been checked before. `on_image` is called once per decoded image;
    /// `Break` ends the check.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Shard`], [`Error::Stopped`].
    pub fn readable(&self, on_image: OnImage) -> Result<(Images, Vec<Skipped>), Error> {
        match self.source {
            Source::Shards(_) | Source::Custom(_) if self.decoded.is_none() => self.check(0, on_image),
            _ => Ok((self.clone(), Vec::new())),
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

    /// Hash of names, sizes on disk and order. Equal for the same images in the same order. Of
    /// images that a program provides on demand, only their number and order enter it.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for &i in &self.indices {
            match &self.source {
                Source::Files(paths) => {
                    let name = paths[i].file_name().unwrap_or_default();
                    let size = |path: &Path| path.metadata().map_or(0, |m| m.len()).to_le_bytes();
                    hash.update(name.as_encoded_bytes());
                    hash.update(size(&paths[i]));
                    if let [first, others @ ..] = self.levels.files() {
                        hash.update(first.id(&paths[i]).unwrap_or_default());
                        for file in others.iter().filter_map(|other| first.sibling(&paths[i], other)) {
                            hash.update(size(&file));
                        }
                    }
                }
                Source::Memory(images) => hash_pixels(&mut hash, &images[i].pixels),
                Source::Shards(_) | Source::Custom(_) => hash.update((i as u64).to_le_bytes()),
            }
        }
        if let Source::Shards(shards) = &self.source {
            hash.update(shards.fingerprint());
        }
        hex(&hash.finalize()[..8])
    }

    /// [`Images::check`] before training: decodes only the first images of shards.
    fn check_for_training(&self, cache_bytes: usize, on_image: OnImage) -> Result<(Images, Vec<Skipped>), Error> {
        if !matches!(self.source, Source::Shards(_)) {
            return self.check(cache_bytes, on_image);
        }
        let first: Vec<usize> = (0..self.n_checked_for_training()).collect();
        let (_, skipped) = self.subset(&first).check(0, on_image)?;
        Ok((self.clone(), skipped))
    }

    /// Number of images that [`Images::check_for_training`] decodes.
    fn n_checked_for_training(&self) -> usize {
        if matches!(self.source, Source::Shards(_)) { self.len().min(CHECKED_IN_SHARDS) } else { self.len() }
    }

    /// Decodes every image once. Returns the readable images, kept decoded if all of them take at
    /// most `cache_bytes`, and the unreadable ones.
    fn check(&self, cache_bytes: usize, on_image: OnImage) -> Result<(Images, Vec<Skipped>), Error> {
        let total = AtomicUsize::new(0);
        let decode = |i: usize| -> Result<Result<Option<Arc<Image>>, Skipped>, Error> {
            let image = self.get(i);
            if on_image().is_break() {
                return Err(Error::Stopped);
            }
            match image {
                Ok(image) => {
                    let so_far = total.fetch_add(image.pixels.bytes(), Ordering::Relaxed) + image.pixels.bytes();
                    Ok(Ok((so_far <= cache_bytes).then_some(image)))
                }
                Err(Error::Image { name, source }) => Ok(Err(Skipped::new(name, &source))),
                Err(machine) => Err(machine),
            }
        };
        let results: Vec<_> = (0..self.len()).into_par_iter().map(decode).collect::<Result<_, Error>>()?;
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
        Ok((images, skipped))
    }
}

fn hash_pixels(hash: &mut Sha256, pixels: &Pixels) {
    match pixels {
        Pixels::U8(values) => hash.update(values),
        Pixels::U16(values) => values.iter().for_each(|v| hash.update(v.to_le_bytes())),
    }
}

/// True if an I/O error tells something about one image: its file is gone, or its bytes in a shard
/// are damaged. Any other, such as a full disk, would also hit the next image.
pub(crate) fn is_image_error(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
}

impl Dataset {
    /// Opens the data at `root`: shards, a folder with `labels.csv`, CIFAR or IDX files, or a
    /// folder of images. Finds the images without decoding them.
    ///
    /// ```no_run
    /// let data = byol::Dataset::open("photos")?;
    /// println!("{} training images of {} classes", data.train.len(), data.classes.len());
    /// let first = data.train.get(0)?;
    /// println!("{} × {} pixels", first.width, first.height);
    /// # Ok::<(), byol::data::Error>(())
    /// ```
    ///
    /// # Errors
    /// Any but [`Error::Image`], [`Error::MostlyBad`] and [`Error::Unlabeled`].
    pub fn open(root: impl AsRef<Path>) -> Result<Dataset, Error> {
        Dataset::open_with(root, &OpenOptions::default())
    }

    /// [`Dataset::open`] with settings. Levels that are not set are detected from a sample of the
    /// images.
    ///
    /// # Errors
    /// Those of [`Dataset::open`]; [`Error::Levels`].
    pub fn open_with(root: impl AsRef<Path>, options: &OpenOptions) -> Result<Dataset, Error> {
        let dataset = Dataset::find(root.as_ref(), options)?;
        Dataset { column: options.column.clone(), ..dataset }.with_levels(options.levels.clone())
    }

    /// Finds the images at `root`.
    fn find(root: &Path, options: &OpenOptions) -> Result<Dataset, Error> {
        if !root.exists() && !shards::is_pattern(root) && !shards::is_remote(root) {
            return Err(Error::Missing(root.to_owned()));
        }
        // A folder that cannot be listed is an error of its own, not an empty folder.
        if root.is_dir() {
            std::fs::read_dir(root).map_err(|source| Error::Read { path: root.to_owned(), source })?;
        }
        let stray = match shards::open(root, options.column.as_deref())? {
            shards::OpenResult::Shards(dataset) => return Ok(*dataset),
            shards::OpenResult::Other(stray) => stray,
        };
        match (Dataset::find_files(root, &stray.files, options), stray.error) {
            (Err(Error::Empty(_) | Error::Unread { .. }), Some(error)) => Err(error),
            (Ok(mut dataset), _) => {
                dataset.unused.extend(stray.unused);
                Ok(dataset)
            }
            (error, _) => error,
        }
    }

    /// Finds images that are not in shards. `reported` are files that need no further report.
    fn find_files(root: &Path, reported: &HashSet<PathBuf>, options: &OpenOptions) -> Result<Dataset, Error> {
        let files = options.levels.files();
        if let Some(dataset) = labels_csv::open(root, reported, files)? {
            return Ok(dataset);
        }
        for open in [cifar::open, idx::open] {
            if let Some(dataset) = open(root)? {
                return Ok(dataset);
            }
        }
        let media = match &options.levels {
            Levels { sound: Some(_), .. } => Some(Media::Sounds),
            levels if *levels == Levels::default() => options.media,
            _ => Some(Media::Images),
        };
        folder::open(root, reported, files, media)
    }

    /// Opens a folder of image files, at any depth, whatever else it contains. Subfolders are
    /// classes; `train`, `val` and `test` are splits. [`Dataset::open`] also recognizes other kinds
    /// of data.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Empty`], [`Error::Read`], [`Error::Levels`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// let data = byol::Dataset::folder("photos")?;
    /// println!("{} training images", data.train.len());
    /// # Ok::<(), byol::data::Error>(())
    /// ```
    pub fn folder(path: impl AsRef<Path>) -> Result<Dataset, Error> {
        let path = path.as_ref();
        if !path.exists() {
            return Err(Error::Missing(path.to_owned()));
        }
        folder::open(path, &HashSet::new(), &[], None)?.with_levels(Levels::default())
    }

    /// Sets the levels of all splits. Those that `levels` does not set are detected from a sample.
    fn with_levels(mut self, levels: Levels) -> Result<Dataset, Error> {
        let splits: Vec<&Images> = std::iter::once(&self.train).chain(&self.held_out).chain(&self.test).collect();
        let levels = detect_levels::complete(levels, &splits, &self.root)?;
        let splits = std::iter::once(&mut self.train).chain(&mut self.held_out).chain(&mut self.test);
        splits.for_each(|images| images.levels = levels.clone());
        Ok(self)
    }

    /// Levels of the images: what [`OpenOptions`] sets, completed by what was detected.
    pub fn levels(&self) -> Levels {
        self.train.levels.clone()
    }

    /// Keeps only the images with labels, in all splits. The training split stays as it is if none
    /// of its images has one.
    pub fn labeled(self) -> Dataset {
        let Dataset { train, held_out, test, .. } = &self;
        let (held_out, test) = (held_out.as_ref().and_then(Images::labeled), test.as_ref().and_then(Images::labeled));
        Dataset { train: train.labeled().unwrap_or_else(|| train.clone()), held_out, test, ..self }
    }

    /// Error that names the split `images`, which has no labels.
    pub fn unlabeled(&self, images: &Images) -> Error {
        let others = [Some(&self.train), self.held_out.as_ref(), self.test.as_ref()];
        if images.is_empty() || others.into_iter().flatten().all(|other| other.is_same(images)) {
            return Error::Unlabeled(self.root.clone());
        }
        let is_training = images.is_same(&self.train);
        let (mut split, reason) = match &images.source {
            Source::Files(paths) => {
                let path = &paths[images.indices[0]];
                let relative = path.strip_prefix(&self.root).unwrap_or(path);
                let folder = folder::split_folder(relative);
                let what = folder.as_ref().map_or("it".into(), |folder| format!("{folder}/"));
                (folder, format!("{what} has no class folders (first image: {})", relative.display()))
            }
            Source::Shards(shards) => {
                let name =
                    shards.path(images.indices[0]).file_name().unwrap_or_default().to_string_lossy().into_owned();
                (None, format!("{name} has no class numbers"))
            }
            Source::Memory(_) | Source::Custom(_) => (None, "there is no file of its labels".into()),
        };
        if is_training {
            split = Some("training".into());
        }
        Error::UnlabeledSplit { root: self.root.clone(), split: split.unwrap_or_else(|| "test".into()), reason }
    }

    /// Creates a data set of images in memory, with the class of each image if `labels` is given.
    /// All images are for training; classes are named by their numbers.
    ///
    /// # Panics
    /// If an image has the wrong number of values, or another number of channels than the first; or
    /// if the number of labels is not that of the images.
    ///
    /// # Examples
    ///
    /// ```
    /// use byol::{Dataset, Image};
    ///
    /// let gray = |level: u8| Image { height: 8, width: 8, channels: 3, pixels: vec![level; 8 * 8 * 3].into() };
    /// let data = Dataset::from_images(vec![gray(0), gray(128), gray(255)], Some(vec![0, 1, 1]));
    /// assert_eq!([data.train.len(), data.classes.len()], [3, 2]);
    /// ```
    pub fn from_images(images: Vec<Image>, labels: Option<Vec<usize>>) -> Dataset {
        for image in &images {
            assert_eq!(image.problem(), None, "unusable image");
            assert_eq!(image.channels, images[0].channels, "images must have equal channels");
        }
        assert!(labels.as_ref().is_none_or(|labels| labels.len() == images.len()), "every image needs one label");
        Dataset::of("images in memory", Images::memory(images, labels))
    }

    /// Creates a data set of `n` images that a program provides on demand, with the class of each
    /// image if `labels` is given. All images are for training; classes are named by their numbers.
    ///
    /// # Panics
    /// If the number of labels is not `n`.
    pub fn from_source(source: Arc<dyn ImageSource>, n: usize, labels: Option<Vec<usize>>) -> Dataset {
        assert!(labels.as_ref().is_none_or(|labels| labels.len() == n), "every image needs one label");
        Dataset::of("custom image source", Images::custom(source, n, labels))
    }

    /// Data set of these training images; classes are named by their numbers.
    fn of(kind: &str, train: Images) -> Dataset {
        let n_classes = train.labels().unwrap_or_default().iter().max().map_or(0, |max| max + 1);
        Dataset {
            root: kind.into(),
            kind: kind.into(),
            classes: (0..n_classes).map(|class| class.to_string()).collect(),
            train,
            held_out: None,
            test: None,
            skipped: Vec::new(),
            column: None,
            unused: Vec::new(),
        }
    }

    /// Keeps a stratified random sample of `n` training images ([`Images::sample_random`]); 0 keeps
    /// all.
    pub fn limit(self, n: usize) -> Dataset {
        Dataset { train: self.train.sample_random(n), ..self }
    }

    /// Decodes every image once and drops the unreadable ones. Small data stay decoded in memory,
    /// up to `cache_bytes` for the training images and a quarter of it for each other split.
    /// `on_image` is called once per image; `Break` ends the check.
    ///
    /// # Errors
    /// [`Error::MostlyBad`] if more than half of the training images are unreadable,
    /// [`Error::Empty`] if none is left; [`Error::Read`], [`Error::Shard`] if the machine cannot
    /// read an image; [`Error::Stopped`].
    pub fn check(self, cache_bytes: usize, on_image: OnImage) -> Result<Dataset, Error> {
        let (n_checked, train) = (self.train.len(), self.train.check(cache_bytes, on_image)?);
        self.checked(n_checked, train, cache_bytes, on_image)
    }

    /// [`Dataset::check`] for training, which skips unreadable images in shards as it meets them:
    /// decodes only the first training images of shards.
    ///
    /// # Errors
    /// Those of [`Dataset::check`].
    pub(crate) fn check_for_training(self, cache_bytes: usize, on_image: OnImage) -> Result<Dataset, Error> {
        let (n_checked, train) =
            (self.train.n_checked_for_training(), self.train.check_for_training(cache_bytes, on_image)?);
        self.checked(n_checked, train, cache_bytes, on_image)
    }

    /// Completes a check whose first `n_checked` training images are already decoded, with this
    /// outcome.
    fn checked(
        self,
        n_checked: usize,
        (train, mut skipped): (Images, Vec<Skipped>),
        cache_bytes: usize,
        on_image: OnImage,
    ) -> Result<Dataset, Error> {
        if 2 * skipped.len() > n_checked {
            let first = skipped.first().map_or(String::new(), Skipped::to_string);
            return Err(Error::MostlyBad { root: self.root, bad: skipped.len(), all: n_checked, first });
        }
        if train.is_empty() {
            return Err(Error::Empty(self.root));
        }
        let mut check = |images: Option<Images>| -> Result<Option<Images>, Error> {
            let Some(images) = images else { return Ok(None) };
            let (images, unreadable) = images.check(cache_bytes / 4, on_image)?;
            skipped.extend(unreadable);
            Ok((!images.is_empty()).then_some(images))
        };
        let held_out = check(self.held_out)?;
        let test = check(self.test)?;
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
        let image = |i: usize| Image { height: 1, width: 1, channels: 1, pixels: vec![i as u8].into() };
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
        assert_eq!(both.get(3).unwrap().pixels.to_u8()[..], [2]);
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
        let image = || Image { height: 1, width: 1, channels: 1, pixels: vec![0u8].into() };
        let (train, test) = Images::memory((0..23).map(|_| image()).collect(), Some(labels)).split_off_test(5);
        assert_eq!(test.labels().unwrap(), [0, 0, 0, 0, 1]);
        assert_eq!(train.len(), 18);
    }

    #[test]
    fn samples_of_alternating_classes_contain_every_class() {
        let image = || Image { height: 1, width: 1, channels: 1, pixels: vec![0u8].into() };
        let alternating = Images::memory((0..800).map(|_| image()).collect(), Some((0..800).map(|i| i % 5).collect()));
        for sample in [alternating.sample_random(160), alternating.split_off(160).1, alternating.sample_random(400)] {
            let count = |class: usize| sample.labels().unwrap().iter().filter(|l| **l == class).count();
            assert!((0..5).all(|class| count(class) > sample.len() / 8), "{:?}", [0, 1, 2, 3, 4].map(count));
        }
    }

    #[test]
    fn images_in_memory_make_a_dataset() {
        let image = |i: u8| Image { height: 1, width: 2, channels: 3, pixels: vec![i; 6].into() };
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

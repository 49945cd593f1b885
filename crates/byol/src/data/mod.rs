//! IMAGES: where they come from. A [`Dataset`] is a training split and, where the data has one, a split for read-outs. Labels serve
//! read-outs only. Nothing here knows of tensors.

pub mod cifar;
pub mod decode;
pub mod dense;
pub mod folder;
pub mod idx;
pub mod labelled;
pub mod order;
pub mod pack;
pub mod prefetch;
pub mod shards;
pub mod synthetic;

use std::{
    collections::{BTreeMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::random::{self, Domain};
pub use decode::DecodeError;
pub use order::Order;
pub use prefetch::{Loader, MicroBatch};
use shards::Shards;

/// A decoded image: `[height, width, channels]`, row-major, 0..=255.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Rows, at least 1.
    pub height: usize,
    /// Columns, at least 1.
    pub width: usize,
    /// Values a pixel.
    pub channels: usize,
    /// `height × width × channels` values.
    pub pixels: Vec<u8>,
}

/// Channels of all images: every decoder converts to RGB.
pub const CHANNELS: usize = 3;

/// How many training images of shards are looked at before a run: enough to see that they are images at all.
const LOOKED_AT: usize = 64;

/// Images of shards among which one is taken, where a few are.
const NEAR: usize = 4;

/// What can be wrong with data.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path does not exist.
    #[error("there is no {}; give a folder of images", .0.display())]
    Missing(PathBuf),
    /// The folder or file cannot be read.
    #[error("cannot read {}: {source}; check that you may read it", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing to train on.
    #[error("no images in {}; give a folder with JPEG, PNG, WebP, BMP, GIF or TIFF files at any depth, or with CIFAR or IDX files", .0.display())]
    Empty(PathBuf),
    /// One image cannot be used.
    #[error("cannot use {what}: {source}; replace or remove it")]
    Image {
        /// The path, or file and number.
        what: String,
        /// Why.
        source: DecodeError,
    },
    /// A CIFAR or IDX file is not what its name says.
    #[error("{} is not a whole {kind} file: {reason}; download it again", path.display())]
    Packed {
        /// Which file.
        path: PathBuf,
        /// CIFAR or IDX.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// More than half of the images are bad.
    #[error("{bad} of {all} images in {} cannot be used, the first is {first}; more than half are bad, so this is probably not the folder you meant", root.display())]
    MostlyBad {
        /// The data.
        root: PathBuf,
        /// How many cannot be used.
        bad: usize,
        /// How many there are.
        all: usize,
        /// The first bad one, with the reason.
        first: String,
    },
    /// Images and masks that do not go together.
    #[error("{} is no set of images with masks or depth: {reason}; give a folder with `images` and `masks` (or `depth`), the same names in both", root.display())]
    Dense {
        /// The data.
        root: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A `labels.csv` that cannot be used.
    #[error("{} cannot be used: {reason}; a labels.csv needs the columns path, label and, where there are splits, split", path.display())]
    Labels {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}; check the disk and who may write there", path.display())]
    Write {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder is taken.
    #[error("{} holds {what}; choose another folder", path.display())]
    Occupied {
        /// Which one.
        path: PathBuf,
        /// By what.
        what: &'static str,
    },
    /// A tar or Parquet file that cannot be used.
    #[error("cannot use {}: {reason}", path.display())]
    Shard {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A label where the read-out needs one.
    #[error("{} has no labels of two classes or more; put the images of each class into a subfolder named after it, or write a labels.csv (of shards: `.cls` files or a column `label`, numbers from 0 to 65535)", .0.display())]
    Unlabelled(PathBuf),
}

/// Where the images of a split come from. A new kind of source is a variant here and a file beside this one.
#[derive(Debug, Clone)]
enum Source {
    /// One file an image.
    Files(Arc<Vec<PathBuf>>),
    /// Already decoded.
    Memory(Arc<Vec<Arc<Image>>>),
    /// Many images a file.
    Shards(Arc<Shards>),
}

/// Some images in a fixed order, with or without labels.
#[derive(Debug, Clone)]
pub struct Images {
    source: Source,
    /// Numbers of the images in the source's own order.
    chosen: Vec<usize>,
    /// One class a chosen image.
    labels: Option<Vec<usize>>,
    /// Several classes a chosen image.
    tags: Option<Vec<Vec<usize>>>,
    /// Decoded images, parallel to `chosen`, where they fit into memory.
    kept: Option<Vec<Arc<Image>>>,
}

/// An image that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// The path, or file and number.
    pub what: String,
    /// Why.
    pub why: String,
}

impl Skipped {
    /// On one line, whatever the decoder says.
    fn new(what: String, why: &DecodeError) -> Skipped {
        Skipped { what, why: why.to_string().split_whitespace().collect::<Vec<_>>().join(" ") }
    }
}

/// What the data are, once every image has been looked at.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// As the user gave it.
    pub root: PathBuf,
    /// In words: `image folder`, `CIFAR-10`.
    pub kind: String,
    /// Names of the classes; empty without labels.
    pub classes: Vec<String>,
    /// To pretrain on.
    pub train: Images,
    /// The data's own split for watching a run: `val`, else `test`.
    pub held_out: Option<Images>,
    /// The data's own split for a final figure: `test`, else `val`.
    pub test: Option<Images>,
    /// What cannot be used.
    pub skipped: Vec<Skipped>,
}

impl Images {
    fn new(source: Source, n: usize, labels: Option<Vec<usize>>) -> Self {
        Images { source, chosen: (0..n).collect(), labels, tags: None, kept: None }
    }

    fn files(paths: Vec<PathBuf>, labels: Option<Vec<usize>>) -> Self {
        let n = paths.len();
        Images::new(Source::Files(Arc::new(paths)), n, labels)
    }

    /// Images that are already decoded.
    pub fn memory(images: Vec<Image>, labels: Option<Vec<usize>>) -> Self {
        let images: Vec<_> = images.into_iter().map(Arc::new).collect();
        let n = images.len();
        Images::new(Source::Memory(Arc::new(images)), n, labels)
    }

    fn shards(shards: Shards, labels: Option<Vec<usize>>) -> Self {
        let n = shards.len();
        Images::new(Source::Shards(Arc::new(shards)), n, labels)
    }

    /// The same images, each with classes of its own.
    fn tagged(self, tags: Vec<Vec<usize>>) -> Self {
        Images { tags: Some(tags), ..self }
    }

    /// The classes of each image, where an image may be of several.
    pub fn tags(&self) -> Option<&[Vec<usize>]> {
        self.tags.as_deref()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.chosen.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chosen.is_empty()
    }

    /// The class of each image.
    pub fn labels(&self) -> Option<&[usize]> {
        self.labels.as_deref()
    }

    /// Path, or number, of image `i`.
    pub fn name(&self, i: usize) -> String {
        match &self.source {
            Source::Files(paths) => paths[self.chosen[i]].display().to_string(),
            Source::Memory(_) => format!("image {}", self.chosen[i]),
            Source::Shards(shards) => shards.name(self.chosen[i]),
        }
    }

    /// The file of image `i`, where it is one.
    pub fn path(&self, i: usize) -> Option<&Path> {
        match &self.source {
            Source::Files(paths) => Some(&paths[self.chosen[i]]),
            Source::Memory(_) | Source::Shards(_) => None,
        }
    }

    /// Image `i`, decoded.
    ///
    /// # Errors
    /// [`Error::Image`] if it cannot be read or decoded whole.
    pub fn get(&self, i: usize) -> Result<Arc<Image>, Error> {
        if let Some(kept) = &self.kept {
            return Ok(kept[i].clone());
        }
        match &self.source {
            Source::Memory(images) => Ok(images[self.chosen[i]].clone()),
            Source::Files(paths) => match decode::file(&paths[self.chosen[i]]) {
                Ok(image) => Ok(Arc::new(image)),
                Err(source) => Err(Error::Image { what: self.name(i), source }),
            },
            Source::Shards(shards) => {
                let image = shards.bytes(self.chosen[i]).map_err(DecodeError::Read).and_then(|b| decode::bytes(&b));
                image.map(Arc::new).map_err(|source| Error::Image { what: self.name(i), source })
            }
        }
    }

    /// The file of image `i`, as it is; none where images are not files.
    fn file_bytes(&self, i: usize) -> Option<io::Result<Vec<u8>>> {
        match &self.source {
            Source::Files(paths) => Some(std::fs::read(&paths[self.chosen[i]])),
            Source::Shards(shards) => Some(shards.bytes(self.chosen[i])),
            Source::Memory(_) => None,
        }
    }

    /// Image `i`; of shards, which nobody has looked through before, the next one that can be used, and the others are noted
    /// ([`Images::passed_over`]). So what is trained on depends on the data alone.
    ///
    /// # Errors
    /// As [`Images::get`]; of shards if a shard cannot be read, or too many in a row cannot be used.
    pub fn get_or_next(&self, i: usize) -> Result<Arc<Image>, Error> {
        let Source::Shards(shards) = &self.source else { return self.get(i) };
        let mut at = i;
        loop {
            match self.get(at) {
                Err(Error::Image { what, source }) if !matches!(source, DecodeError::Read(_)) => {
                    let tried = (at + self.len() - i) % self.len() + 1;
                    if tried == self.len() || !shards.pass_over(Skipped::new(what.clone(), &source), tried) {
                        return Err(Error::Image { what, source });
                    }
                    at = (at + 1) % self.len();
                }
                other => return other,
            }
        }
    }

    /// What could not be used so far, of shards.
    pub fn passed_over(&self) -> Vec<Skipped> {
        match &self.source {
            Source::Shards(shards) => shards.passed_over(),
            Source::Files(_) | Source::Memory(_) => Vec::new(),
        }
    }

    /// The order in which a run takes these images: shuffled, or of shards one after the other through a buffer.
    pub fn order(&self, seed: u64, buffer: usize) -> Order {
        match &self.source {
            Source::Shards(shards) => Order::of_shards(seed, shards.runs(&self.chosen), buffer),
            Source::Files(_) | Source::Memory(_) => Order::new(seed, self.len()),
        }
    }

    /// How far ahead [`Images::coming`] wants to know, in images; 0: not at all.
    pub fn lookahead(&self) -> usize {
        match &self.source {
            Source::Shards(shards) => shards.lookahead(),
            Source::Files(_) | Source::Memory(_) => 0,
        }
    }

    /// Says that image `i` will be wanted soon: what has to be fetched for it is.
    pub fn coming(&self, i: usize) {
        if let Source::Shards(shards) = &self.source {
            shards.fetch_ahead(self.chosen[i]);
        }
    }

    /// The images at these positions, in this order.
    pub fn subset(&self, positions: &[usize]) -> Images {
        Images {
            source: self.source.clone(),
            chosen: positions.iter().map(|p| self.chosen[*p]).collect(),
            labels: self.labels.as_ref().map(|l| positions.iter().map(|p| l[*p]).collect()),
            tags: self.tags.as_ref().map(|t| positions.iter().map(|p| t[*p].clone()).collect()),
            kept: self.kept.as_ref().map(|k| positions.iter().map(|p| k[*p].clone()).collect()),
        }
    }

    /// Whether these are the same images, not others that look alike.
    pub fn is_same(&self, other: &Images) -> bool {
        let source = match (&self.source, &other.source) {
            (Source::Files(a), Source::Files(b)) => Arc::ptr_eq(a, b),
            (Source::Memory(a), Source::Memory(b)) => Arc::ptr_eq(a, b),
            (Source::Shards(a), Source::Shards(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        source && self.chosen == other.chosen
    }

    /// Whether both have labels, or tags, or neither.
    pub fn is_labelled_as(&self, other: &Images) -> bool {
        (self.labels.is_some(), self.tags.is_some()) == (other.labels.is_some(), other.tags.is_some())
    }

    /// These and then others of the same form, looked at by nobody yet; none for shards.
    pub fn and(&self, other: &Images) -> Option<Images> {
        fn of<T: Clone>(images: &Images, all: &[T]) -> impl Iterator<Item = T> {
            images.chosen.iter().map(|i| all[*i].clone())
        }
        let source = match (&self.source, &other.source) {
            (Source::Files(a), Source::Files(b)) => Source::Files(Arc::new(of(self, a).chain(of(other, b)).collect())),
            (Source::Memory(a), Source::Memory(b)) => {
                Source::Memory(Arc::new(of(self, a).chain(of(other, b)).collect()))
            }
            _ => return None,
        };
        let both = |a: &Option<Vec<usize>>, b: &Option<Vec<usize>>| Some([a.as_deref()?, b.as_deref()?].concat());
        let tags = self.tags.as_ref().zip(other.tags.as_ref()).map(|(a, b)| [&a[..], b].concat());
        let n = self.len() + other.len();
        Some(Images { tags, ..Images::new(source, n, both(&self.labels, &other.labels)) })
    }

    /// `n` images, one at random of each of as many stretches of this order; all where `n` is 0 or not fewer than there are. Of a regular order,
    /// such as classes in turn, an even spread would take one kind alone.
    pub fn some(&self, n: usize) -> Images {
        let all = self.len();
        if n == 0 || n >= all { self.clone() } else { self.subset(&one_of_each_stretch(all, n)) }
    }

    /// About `n` images that can be used, all where `n` is 0, for a read-out while a run goes on; of shards among the first, so that the others need
    /// not be opened for them.
    pub fn sample(&self, n: usize) -> Images {
        match self.source {
            Source::Files(_) | Source::Memory(_) => self.some(n),
            Source::Shards(_) => {
                let near = if n == 0 { self.len() } else { self.len().min(NEAR * n) };
                let first: Vec<usize> = (0..near).collect();
                self.subset(&first).some(n).check(0, &|| ()).0
            }
        }
    }

    /// Those of these few images that can be used, and the rest by name; all where somebody has looked at them before.
    pub fn usable(&self) -> (Images, Vec<Skipped>) {
        match self.source {
            Source::Shards(_) => self.check(0, &|| ()),
            Source::Files(_) | Source::Memory(_) => (self.clone(), Vec::new()),
        }
    }

    /// Takes `n` images out, one at random of each of as many stretches: `(the others, the n)`. The same of the same number of images.
    pub fn hold_out(&self, n: usize) -> (Images, Images) {
        // Of shards from the first of them, so that the others need not be opened for a few images.
        let near = matches!(self.source, Source::Shards(_)).then_some(NEAR * n);
        let all = self.len().min(near.unwrap_or(usize::MAX));
        let out = one_of_each_stretch(all, n);
        let mut is_out = vec![false; self.len()];
        out.iter().for_each(|p| is_out[*p] = true);
        let rest: Vec<usize> = (0..self.len()).filter(|p| !is_out[*p]).collect();
        (self.subset(&rest), self.subset(&out))
    }

    /// Takes about a share of 1 / `of` out to test on, of each class where there are labels, so that none is without images to train on:
    /// `(the others, those)`.
    pub fn hold_out_to_test(&self, of: usize) -> (Images, Images) {
        let Some(labels) = &self.labels else { return self.hold_out(self.len().div_ceil(of)) };
        let mut classes: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        labels.iter().enumerate().for_each(|(i, class)| classes.entry(*class).or_default().push(i));
        let mut is_out = vec![false; self.len()];
        for positions in classes.values() {
            let n = (positions.len() / of).max(usize::from(positions.len() > 1));
            one_of_each_stretch(positions.len(), n).into_iter().for_each(|at| is_out[positions[at]] = true);
        }
        let where_so = |so: bool| self.subset(&(0..self.len()).filter(|i| is_out[*i] == so).collect::<Vec<_>>());
        (where_so(false), where_so(true))
    }

    /// A hash of names, sizes on disk and order: the same images in the same order give the same.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for &i in &self.chosen {
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
        crate::files::hex(&hash.finalize()[..8])
    }

    /// [`Images::check`] of training images: shards are not looked through, but for their first images.
    fn check_to_train(&self, keep_bytes: usize, looked_at: &(dyn Fn() + Sync)) -> (Images, Vec<Skipped>) {
        if !matches!(self.source, Source::Shards(_)) {
            return self.check(keep_bytes, looked_at);
        }
        let (_, bad) = self.subset(&(0..self.looked_at()).collect::<Vec<_>>()).check(0, looked_at);
        (self.clone(), bad)
    }

    /// How many images [`Images::check_to_train`] looks at.
    fn looked_at(&self) -> usize {
        if matches!(self.source, Source::Shards(_)) { self.len().min(LOOKED_AT) } else { self.len() }
    }

    /// Decodes every image once: those that can be used, kept in memory where all of them take at most `keep_bytes`, and the rest by
    /// name.
    fn check(&self, keep_bytes: usize, looked_at: &(dyn Fn() + Sync)) -> (Images, Vec<Skipped>) {
        let total = AtomicUsize::new(0);
        let look = |i: usize| -> Result<Option<Arc<Image>>, Skipped> {
            let image = self.get(i);
            looked_at();
            match image {
                Ok(image) => {
                    let so_far = total.fetch_add(image.pixels.len(), Ordering::Relaxed) + image.pixels.len();
                    Ok((so_far <= keep_bytes).then_some(image))
                }
                Err(Error::Image { what, source }) => Err(Skipped::new(what, &source)),
                Err(other) => Err(Skipped { what: self.name(i), why: other.to_string() }),
            }
        };
        let looked: Vec<_> = (0..self.len()).into_par_iter().map(look).collect();
        let good: Vec<usize> = (0..self.len()).filter(|i| looked[*i].is_ok()).collect();
        let (mut kept, mut skipped) = (Vec::new(), Vec::new());
        for result in looked {
            match result {
                Ok(image) => kept.extend(image),
                Err(bad) => skipped.push(bad),
            }
        }
        let mut images = self.subset(&good);
        let fits = kept.len() == images.len() && !matches!(images.source, Source::Memory(_));
        images.kept = fits.then_some(kept);
        (images, skipped)
    }
}

impl Dataset {
    /// Finds the images of `root`, without looking into them.
    ///
    /// # Errors
    /// All but [`Error::Image`], [`Error::MostlyBad`] and [`Error::Unlabelled`].
    pub fn open(root: &Path) -> Result<Dataset, Error> {
        if !root.exists() && !shards::is_pattern(root) && !shards::is_remote(root) {
            return Err(Error::Missing(root.to_owned()));
        }
        // A folder that cannot be listed is said as such, not as empty.
        if root.is_dir() {
            std::fs::read_dir(root).map_err(|source| Error::Read { path: root.to_owned(), source })?;
        }
        if let Some(found) = shards::open(root)? {
            return Ok(found);
        }
        if let Some(found) = labelled::open(root)? {
            return Ok(found);
        }
        if let Some(found) = cifar::open(root)? {
            return Ok(found);
        }
        if let Some(found) = idx::open(root)? {
            return Ok(found);
        }
        folder::open(root)
    }

    /// Keeps `n` training images, one at random of each of as many stretches of the data's own order (0: all).
    pub fn limit(self, n: usize) -> Dataset {
        Dataset { train: self.train.some(n), ..self }
    }

    /// Decodes every image once and leaves out what cannot be used. Small data stay in memory, up to `keep_bytes` in all.
    ///
    /// # Errors
    /// [`Error::MostlyBad`] if more than half of the training images are bad, [`Error::Empty`] if none is left.
    pub fn check(self, keep_bytes: usize, looked_at: &(dyn Fn() + Sync)) -> Result<Dataset, Error> {
        let (all, found) = (self.train.len(), self.train.check(keep_bytes, looked_at));
        self.checked(all, found, keep_bytes, looked_at)
    }

    /// The same for training, which passes over what it cannot use: of training images in shards only the first are looked at.
    ///
    /// # Errors
    /// As [`Dataset::check`].
    pub fn check_to_train(self, keep_bytes: usize, looked_at: &(dyn Fn() + Sync)) -> Result<Dataset, Error> {
        let (all, found) = (self.train.looked_at(), self.train.check_to_train(keep_bytes, looked_at));
        self.checked(all, found, keep_bytes, looked_at)
    }

    /// Of `all` training images looked at, `train` and others can be used.
    fn checked(
        self,
        all: usize,
        (train, mut skipped): (Images, Vec<Skipped>),
        keep_bytes: usize,
        looked_at: &(dyn Fn() + Sync),
    ) -> Result<Dataset, Error> {
        if 2 * skipped.len() > all {
            let first = skipped.first().map_or(String::new(), |s| format!("{}: {}", s.what, s.why));
            return Err(Error::MostlyBad { root: self.root, bad: skipped.len(), all, first });
        }
        if train.is_empty() {
            return Err(Error::Empty(self.root));
        }
        let mut look = |images: Option<Images>| {
            let (images, bad) = images?.check(keep_bytes / 4, looked_at);
            skipped.extend(bad);
            (!images.is_empty()).then_some(images)
        };
        let held_out = look(self.held_out);
        let test = look(self.test);
        let mut known = HashSet::new();
        skipped.retain(|one| known.insert(one.what.clone()));
        Ok(Dataset { train, held_out, test, skipped, ..self })
    }

    /// How many images [`Dataset::check`] will look at.
    pub fn n_images(&self) -> usize {
        let len = |images: &Option<Images>| images.as_ref().map_or(0, Images::len);
        self.train.len() + len(&self.held_out) + len(&self.test)
    }
}

/// A position at random of each of `n` equal stretches of `all`, which are no fewer.
fn one_of_each_stretch(all: usize, n: usize) -> Vec<usize> {
    let mut rng = random::stream(&[Domain::Split as u64, all as u64, n as u64]);
    let one = |i: usize| {
        let (from, to) = (i * all / n, (i + 1) * all / n);
        from + random::below(&mut rng, to - from)
    };
    (0..n).map(one).collect()
}

/// A folder's entries, sorted by name, so that the order does not depend on the file system.
fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let read = |source| Error::Read { path: folder.to_owned(), source };
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read)? {
        entries.push(entry.map_err(read)?.path());
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
    fn some_are_spread_over_all() {
        let some = numbered(10).some(4);
        let some = some.labels().unwrap();
        assert!([0..2, 2..5, 5..7, 7..10].iter().zip(some).all(|(of, i)| of.contains(i)), "{some:?}");
        assert_eq!(numbered(3).some(5).len(), 3);
        assert_eq!(numbered(3).some(0).len(), 3);
    }

    #[test]
    fn two_lots_of_images_are_one() {
        let (a, b) = (numbered(10).subset(&[0, 2, 3]), numbered(10).subset(&[9, 1]));
        assert!(a.is_same(&a.clone()) && !a.is_same(&b) && !a.is_same(&numbered(3)));
        let both = b.and(&a).unwrap();
        assert_eq!(both.labels().unwrap(), [9, 1, 0, 2, 3]);
        assert_eq!(both.get(3).unwrap().pixels, [2]);
    }

    #[test]
    fn hold_out_parts_the_images() {
        let (rest, out) = numbered(10).hold_out(3);
        let out = out.labels().unwrap();
        assert!([0..3, 3..6, 6..10].iter().zip(out).all(|(of, i)| of.contains(i)), "one of each stretch: {out:?}");
        let others: Vec<usize> = (0..10).filter(|i| !out.contains(i)).collect();
        assert_eq!(rest.labels().unwrap(), others);
        assert_eq!(numbered(10).hold_out(3).1.labels().unwrap(), out);
    }

    #[test]
    fn a_class_of_few_images_has_some_to_train_on() {
        let labels = [vec![0; 20], vec![1; 2], vec![2; 1]].concat();
        let image = || Image { height: 1, width: 1, channels: 1, pixels: vec![0] };
        let (train, test) = Images::memory((0..23).map(|_| image()).collect(), Some(labels)).hold_out_to_test(5);
        assert_eq!(test.labels().unwrap(), [0, 0, 0, 0, 1]);
        assert_eq!(train.len(), 18);
    }

    #[test]
    fn classes_in_turn_are_all_among_some() {
        let image = || Image { height: 1, width: 1, channels: 1, pixels: vec![0] };
        let turns = Images::memory((0..800).map(|_| image()).collect(), Some((0..800).map(|i| i % 5).collect()));
        for some in [turns.some(160), turns.hold_out(160).1, turns.some(400)] {
            let of = |class: usize| some.labels().unwrap().iter().filter(|l| **l == class).count();
            assert!((0..5).all(|class| of(class) > some.len() / 8), "{:?}", [0, 1, 2, 3, 4].map(of));
        }
    }
}

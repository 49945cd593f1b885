//! Shards: many images in few large files. Tar files in WebDataset's layout (`000.tar` with
//! `NAME.jpg`, `NAME.cls`), and Parquet files with an image column as written by Hugging Face.
//!
//! The training order depends on numbers alone ([`super::Order`]): shards in a shuffled order,
//! mixed by a buffer. Images are therefore read shard by shard, and a unit (a tar file or a row
//! group) is opened at its first image. Images of open units stay on disk, so memory does not grow
//! with the data.

mod parquet;
#[cfg(feature = "cloud")]
mod remote;
mod tar;

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Dataset, Error, Images, Skipped,
    folder::is_image_extension,
    list,
    pack::{MANIFEST, Manifest},
};

/// Maximum number of open units, below the limit of open files per process.
const MAX_OPEN: usize = 200;

/// Maximum number of open fetched shards. An open file takes disk space even after the cache has
/// removed it.
const MAX_OPEN_REMOTE: usize = 24;

/// Maximum number of shards that are prefetched at the same time.
const MAX_PREFETCHES: usize = 2;

/// Time between two attempts to prefetch the same shard.
const PREFETCH_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of consecutive unreadable images in a run.
const MAX_CONSECUTIVE_SKIPS: usize = 32;

/// Upper bound of class numbers, exclusive; larger labels are not classes.
const MAX_CLASSES: usize = 1 << 16;

/// Maximum number of shards that a pattern expands to.
const MAX_SHARDS: usize = 1 << 20;

/// Location of an image in the file of a unit.
#[derive(Debug, Clone)]
struct Entry {
    name: Box<str>,
    /// Offset in bytes.
    offset: u64,
    len: u32,
}

/// Open unit.
#[derive(Debug)]
struct OpenUnit {
    file: File,
    entries: Vec<Entry>,
}

/// Part of a shard that is opened at once: a tar file, or a row group of a Parquet file.
#[derive(Debug, Clone)]
struct Unit {
    /// File, or address if remote.
    path: PathBuf,
    /// Row group of a Parquet file.
    group: Option<usize>,
    /// Number of images.
    images: usize,
    remote: Option<Arc<Remote>>,
}

#[cfg(feature = "cloud")]
use remote::Remote;

/// Uninhabited without the feature `cloud`.
#[cfg(not(feature = "cloud"))]
type Remote = std::convert::Infallible;

impl Unit {
    /// Returns the local file, fetched first if necessary.
    fn file(&self) -> io::Result<PathBuf> {
        match &self.remote {
            None => Ok(self.path.clone()),
            #[cfg(feature = "cloud")]
            Some(remote) => remote.file(),
            #[cfg(not(feature = "cloud"))]
            Some(never) => match **never {},
        }
    }

    /// Fetches the file if it is not local and the cache has space.
    fn fetch_ahead(&self) {
        #[cfg(feature = "cloud")]
        if let Some(remote) = &self.remote {
            remote.fetch_ahead();
        }
    }

    /// True if the file is local or cached.
    fn is_local(&self) -> bool {
        match &self.remote {
            None => true,
            #[cfg(feature = "cloud")]
            Some(remote) => remote.is_cached(),
            #[cfg(not(feature = "cloud"))]
            Some(never) => match **never {},
        }
    }

    /// Size of the file in bytes.
    fn bytes(&self) -> u64 {
        match &self.remote {
            None => self.path.metadata().map_or(0, |m| m.len()),
            #[cfg(feature = "cloud")]
            Some(remote) => remote.bytes(),
            #[cfg(not(feature = "cloud"))]
            Some(never) => match **never {},
        }
    }
}

/// Contents of one file.
struct Index {
    units: Vec<Unit>,
    /// Class of each image, if the file has labels.
    labels: Option<Vec<usize>>,
}

type Slot = Arc<Mutex<Option<Arc<OpenUnit>>>>;

/// State of prefetching remote units.
#[derive(Debug, Default)]
struct Prefetches {
    /// Number in progress.
    in_progress: usize,
    /// Time of the last attempt per unit.
    last_attempt: HashMap<usize, Instant>,
}

/// Images of several shards, numbered consecutively.
#[derive(Debug)]
pub(super) struct Shards {
    units: Vec<Unit>,
    /// Number of each unit's first image, and the total.
    starts: Vec<usize>,
    /// Open units, with the time of their last use.
    open: Mutex<HashMap<usize, (u64, Slot)>>,
    clock: AtomicU64,
    skipped: Mutex<Vec<Skipped>>,
    prefetches: Mutex<Prefetches>,
}

impl Shards {
    fn new(units: Vec<Unit>) -> Shards {
        let mut starts = vec![0];
        for unit in &units {
            starts.push(starts[starts.len() - 1] + unit.images);
        }
        Shards {
            units,
            starts,
            open: Mutex::default(),
            clock: AtomicU64::new(0),
            skipped: Mutex::default(),
            prefetches: Mutex::default(),
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.starts[self.units.len()]
    }

    /// Returns the unit of image `i`, and its index in the unit.
    fn locate(&self, i: usize) -> (usize, usize) {
        let unit = self.starts.partition_point(|start| *start <= i) - 1;
        (unit, i - self.starts[unit])
    }

    /// Returns how many of these images, in ascending order, are in each unit, without empty units.
    pub(crate) fn unit_sizes(&self, indices: &[usize]) -> Vec<usize> {
        let count_below = |start: usize| indices.partition_point(|i| *i < start);
        self.starts.windows(2).map(|pair| count_below(pair[1]) - count_below(pair[0])).filter(|n| *n > 0).collect()
    }

    /// Returns an open unit, opening it if necessary.
    fn open_unit(&self, unit: usize) -> io::Result<Arc<OpenUnit>> {
        let slot = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.clock.fetch_add(1, Ordering::Relaxed);
            let max = if self.units[unit].remote.is_some() { MAX_OPEN_REMOTE } else { MAX_OPEN };
            if open.len() >= max && !open.contains_key(&unit) {
                let oldest = open.iter().min_by_key(|(_, (used, _))| *used).map(|(unit, _)| *unit);
                oldest.map(|unit| open.remove(&unit));
            }
            let (used, slot) = open.entry(unit).or_default();
            *used = now;
            slot.clone()
        };
        // A thread waits only for the unit that it needs, not for others that are being opened.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*slot {
            return Ok(open.clone());
        }
        let Unit { group, images, remote, .. } = &self.units[unit];
        // A small cache may remove a fetched file before it is opened.
        let mut retries = if remote.is_some() { 3 } else { 0 };
        let opened = loop {
            let path = self.units[unit].file()?;
            let opened = match group {
                None => tar::open(&path),
                Some(group) => parquet::open(&path, *group),
            };
            match opened {
                Err(e) if e.kind() == io::ErrorKind::NotFound && retries > 0 => retries -= 1,
                other => break other?,
            }
        };
        if opened.entries.len() != *images {
            let reason = format!("it has changed: it had {images} images and now has {}", opened.entries.len());
            return Err(io::Error::other(reason));
        }
        let opened = Arc::new(opened);
        *slot = Some(opened.clone());
        Ok(opened)
    }

    /// Number of images by which prefetching runs ahead; 0 if all shards are local.
    pub(crate) fn lookahead(&self) -> usize {
        let remote = self.units.iter().filter(|unit| unit.remote.is_some());
        MAX_PREFETCHES * remote.map(|unit| unit.images).max().unwrap_or(0)
    }

    /// Starts to fetch the shard of image `i`, unless it is local or enough others are being
    /// fetched.
    pub(crate) fn fetch_ahead(self: &Arc<Self>, i: usize) {
        let (unit, _) = self.locate(i);
        let is_open = || self.open.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&unit);
        let mut prefetches = self.prefetches.lock().unwrap_or_else(PoisonError::into_inner);
        // Called per image: a shard that did not fit into the cache is retried after a while.
        let is_recent = prefetches.last_attempt.get(&unit).is_some_and(|at| at.elapsed() < PREFETCH_INTERVAL);
        if is_recent || prefetches.in_progress >= MAX_PREFETCHES {
            return;
        }
        prefetches.last_attempt.insert(unit, Instant::now());
        // An open shard is read even if the cache has removed it.
        if is_open() || self.units[unit].is_local() {
            return;
        }
        let shards = self.clone();
        let fetch = move || {
            shards.units[unit].fetch_ahead();
            shards.prefetches.lock().unwrap_or_else(PoisonError::into_inner).in_progress -= 1;
        };
        if std::thread::Builder::new().name("fetch".into()).spawn(fetch).is_ok() {
            prefetches.in_progress += 1;
        }
    }

    /// Reads the encoded bytes of image `i`.
    pub fn bytes(&self, i: usize) -> io::Result<Vec<u8>> {
        let (unit, k) = self.locate(i);
        let open = self.open_unit(unit)?;
        let Entry { offset, len, .. } = open.entries[k];
        let mut bytes = vec![0; len as usize];
        read_exact_at(&open.file, &mut bytes, offset)?;
        Ok(bytes)
    }

    /// Name of image `i`: shard and name in the shard.
    pub fn name(&self, i: usize) -> String {
        let (unit, k) = self.locate(i);
        let shard = self.units[unit].path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match self.open_unit(unit) {
            Ok(open) => format!("{shard}/{}", open.entries[k].name),
            Err(_) => format!("{shard}, image {k}"),
        }
    }

    /// Names, sizes and numbers of images of all units, as bytes.
    pub fn fingerprint(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for unit in &self.units {
            all.extend_from_slice(unit.path.file_name().unwrap_or_default().as_encoded_bytes());
            for number in [unit.bytes(), unit.group.unwrap_or(0) as u64, unit.images as u64] {
                all.extend_from_slice(&number.to_le_bytes());
            }
        }
        all
    }

    /// Records a skipped image. Returns false if too many consecutive images were skipped.
    pub fn skip(&self, image: Skipped, consecutive: usize) -> bool {
        let mut skipped = self.skipped.lock().unwrap_or_else(PoisonError::into_inner);
        if !skipped.iter().any(|known| known.name == image.name) {
            skipped.push(image);
        }
        consecutive < MAX_CONSECUTIVE_SKIPS
    }

    /// Images skipped so far.
    pub fn skipped(&self) -> Vec<Skipped> {
        self.skipped.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => (bytes, offset) = (&mut bytes[n..], offset + n as u64),
        }
    }
    Ok(())
}

/// True if the extension is that of a shard.
fn is_shard(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tar") || e.eq_ignore_ascii_case("parquet"))
}

/// True for a pattern such as `shards/{000..146}.tar`.
pub(crate) fn is_pattern(root: &Path) -> bool {
    root.to_str().is_some_and(|text| text.contains('{')) && !root.exists()
}

/// Reason for a pattern that cannot be expanded.
const INVALID_PATTERN: &str = "invalid braces (expected {000..146} or {a,b}, with at most a million results)";

/// Expands a brace pattern, in order: `{000..146}` is a range, zero-padded like its first number,
/// and `{a,b}` is a list. Returns `None` for an unclosed brace, an invalid range or too many
/// results.
fn expand(pattern: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = pattern.split_once('{') else { return Some(vec![pattern.to_owned()]) };
    let (inner, after) = rest.split_once('}')?;
    let inner: Vec<String> = match inner.split_once("..") {
        Some((first, last)) => {
            let (from, to) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
            let is_valid = from <= to && (to - from) as usize <= MAX_SHARDS;
            is_valid.then(|| (from..=to).map(|i| format!("{i:0width$}", width = first.len())).collect())?
        }
        None => inner.split(',').map(str::to_owned).collect(),
    };
    let after = expand(after)?;
    if inner.len().saturating_mul(after.len()) > MAX_SHARDS {
        return None;
    }
    Some(inner.iter().flat_map(|item| after.iter().map(move |rest| format!("{before}{item}{rest}"))).collect())
}

/// Opens `root` if it is a shard, a pattern of shards, or a folder with shards, directly or in
/// `train`, `val` and `test`.
///
/// # Errors
/// [`Error::Shard`], [`Error::Read`].
pub fn open(root: &Path) -> Result<Option<Dataset>, Error> {
    if is_remote(root) {
        return open_remote(root).map(Some);
    }
    let paths: Vec<PathBuf> = if is_pattern(root) {
        let invalid = || Error::Shard { path: root.to_owned(), reason: INVALID_PATTERN.into() };
        let expanded = root.to_str().and_then(expand).ok_or_else(invalid)?;
        expanded.into_iter().map(PathBuf::from).collect()
    } else if root.is_file() {
        if is_shard(root) { vec![root.to_owned()] } else { Vec::new() }
    } else {
        find_in_folder(root)?
    };
    if paths.is_empty() {
        return Ok(None);
    }
    let unusable = |path: &Path, reason: &str| Err(Error::Shard { path: path.to_owned(), reason: reason.into() });
    let mut unique = HashSet::new();
    for path in &paths {
        if !path.exists() {
            return unusable(path, "it does not exist\nhint: check the range of the pattern");
        }
        if path.is_dir() {
            return unusable(path, "it is a folder, not a tar or Parquet file");
        }
        if !unique.insert(path) {
            return unusable(path, "the pattern expands to it twice");
        }
    }
    let index = |path: &PathBuf| {
        let is_tar = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tar"));
        (path.clone(), if is_tar { tar::index(path) } else { parquet::index(path) })
    };
    dataset(root, paths.iter().map(index), &class_names(&paths)).map(Some)
}

/// True for an address such as `s3://bucket/shards/{000..146}.tar`.
pub(crate) fn is_remote(root: &Path) -> bool {
    let scheme = root.to_str().and_then(|text| text.split_once("://"));
    scheme.is_some_and(|(scheme, _)| !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric()))
}

#[cfg(not(feature = "cloud"))]
fn open_remote(root: &Path) -> Result<Dataset, Error> {
    let reason = "this build does not support object stores\nhint: build with `--features cloud`".into();
    Err(Error::Shard { path: root.to_owned(), reason })
}

#[cfg(feature = "cloud")]
fn open_remote(root: &Path) -> Result<Dataset, Error> {
    let unusable = |error: io::Error| Error::Shard { path: root.to_owned(), reason: error.to_string() };
    let invalid = |reason: &str| unusable(io::Error::other(reason));
    let text = root.to_str().ok_or_else(|| invalid("the address is not valid UTF-8"))?;
    let urls = expand(text).ok_or_else(|| invalid(INVALID_PATTERN))?;
    let remotes: Vec<Arc<Remote>> =
        remote::find(&urls, is_shard).map_err(unusable)?.into_iter().map(Arc::new).collect();
    let first = remotes.first().ok_or_else(|| invalid("it contains no .tar or .parquet files"))?;
    let manifest = remote::manifest(first);
    let index = |shard: &Arc<Remote>| -> io::Result<Index> {
        let file = Path::new(shard.url()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let listed =
            manifest.as_ref().and_then(|m| m.shards.iter().find(|s| s.file == file && s.bytes == shard.bytes()));
        let Some(listed) = listed else {
            let is_tar = file.to_ascii_lowercase().ends_with(".tar");
            return shard.index(|path| if is_tar { tar::index(path) } else { parquet::index(path) });
        };
        let unit = Unit { path: shard.url().into(), group: None, images: listed.images, remote: Some(shard.clone()) };
        let labels = (listed.labels.len() == listed.images).then(|| listed.labels.clone());
        Ok(Index { units: vec![unit], labels })
    };
    let names = manifest.as_ref().map(|m| m.classes.clone()).unwrap_or_default();
    let indexed = remotes.iter().map(|shard| (PathBuf::from(shard.url()), index(shard)));
    dataset(root, indexed, &names)
}

/// Finds the shards in a folder, in its subfolders that are named after splits, or in `data` below
/// it, as on the Hugging Face Hub.
fn find_in_folder(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = list(root)?;
    let folders = entries.iter().filter(|p| p.is_dir() && Split::from_name(&name(p)).is_some());
    let in_splits: Vec<PathBuf> = folders.map(|folder| list(folder)).collect::<Result<Vec<_>, _>>()?.concat();
    let shards: Vec<PathBuf> =
        entries.iter().chain(&in_splits).filter(|p| is_shard(p) && p.is_file()).cloned().collect();
    if let Some(first) = shards.first() {
        // Shards beside images or other folders are ambiguous.
        let image = entries.iter().find(|p| {
            let extension = p.extension().map(|e| e.to_string_lossy().into_owned()).unwrap_or_default();
            p.is_file() && is_image_extension(&extension)
        });
        let folder = || entries.iter().find(|p| p.is_dir() && Split::from_name(&name(p)).is_none() && !is_hidden(p));
        return match image.or_else(folder) {
            None => Ok(shards),
            Some(other) => Err(Error::Shard {
                path: first.clone(),
                reason: format!(
                    "its folder also contains {}\nhint: pass a folder with shards only, or with images only",
                    other.display()
                ),
            }),
        };
    }
    let data = root.join("data");
    if data.is_dir() {
        Ok(list(&data)?.into_iter().filter(|p| is_shard(p) && p.is_file()).collect())
    } else {
        Ok(shards)
    }
}

fn is_hidden(path: &Path) -> bool {
    name(path).starts_with('.')
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase()
}

/// Split of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Split {
    Train,
    Val,
    Test,
}

impl Split {
    /// Detects the split from the words of a name such as `imagenet1k-validation-00.tar`.
    fn from_name(name: &str) -> Option<Split> {
        name.split(|c: char| !c.is_ascii_alphabetic()).find_map(|word| match word {
            "train" | "training" => Some(Split::Train),
            "val" | "valid" | "validation" => Some(Split::Val),
            "test" => Some(Split::Test),
            _ => None,
        })
    }

    /// Detects the split from the name of a file, else of its folder; `Train` otherwise.
    fn from_path(path: &Path) -> Split {
        let folder = path.parent().map(name).and_then(|name| Split::from_name(&name));
        Split::from_name(&name(path)).or(folder).unwrap_or(Split::Train)
    }
}

/// Creates the data set of indexed shards. Classes without a name in `names` are named by their
/// numbers.
fn dataset(
    root: &Path,
    shards: impl Iterator<Item = (PathBuf, io::Result<Index>)>,
    names: &[String],
) -> Result<Dataset, Error> {
    let mut splits: [(Vec<Unit>, Option<Vec<usize>>); 3] = [(); 3].map(|()| (Vec::new(), Some(Vec::new())));
    for (path, index) in shards {
        let unusable = |error: io::Error| Error::Shard { path: path.clone(), reason: error.to_string() };
        let index = index.map_err(unusable)?;
        if index.units.iter().all(|unit| unit.images == 0) {
            return Err(unusable(io::Error::other("it contains no images")));
        }
        let (units, labels) = &mut splits[Split::from_path(&path) as usize];
        units.extend(index.units);
        match (&mut *labels, index.labels) {
            (Some(all), Some(more)) => all.extend(more),
            (all, _) => *all = None,
        }
    }
    let highest = splits.iter().filter_map(|(_, labels)| labels.as_ref()?.iter().max()).max();
    let n_classes = highest.map_or(0, |class| class + 1);
    let [train, val, test] = splits.map(|(units, labels)| {
        let labels = labels.filter(|_| n_classes > 1);
        (!units.is_empty()).then(|| Images::shards(Shards::new(units), labels))
    });
    let Some(train) = train else { return Err(Error::Empty(root.to_owned())) };
    Ok(Dataset {
        root: root.to_owned(),
        kind: "shards".into(),
        classes: match train.labels() {
            Some(_) => (0..n_classes).map(|c| names.get(c).cloned().unwrap_or_else(|| c.to_string())).collect(),
            None => Vec::new(),
        },
        train,
        held_out: val.clone().or(test.clone()),
        test: test.or(val),
        skipped: Vec::new(),
    })
}

/// Class names from the manifest beside the shards, if there is one.
fn class_names(paths: &[PathBuf]) -> Vec<String> {
    let manifest = paths[0].with_file_name(MANIFEST);
    let text = std::fs::read_to_string(manifest).unwrap_or_default();
    serde_json::from_str::<Manifest>(&text).map(|manifest| manifest.classes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expands_ranges_and_lists() {
        let expanded = expand("a/{008..010}.{tar,x}").unwrap();
        assert_eq!(expanded, ["a/008.tar", "a/008.x", "a/009.tar", "a/009.x", "a/010.tar", "a/010.x"]);
        assert_eq!(expand("plain"), Some(vec!["plain".into()]));
        assert_eq!((expand("{1..x}"), expand("{1..2"), expand("{3..1}")), (None, None, None));
        assert_eq!((expand("{0..999999999}"), expand("{0..9999}{0..9999}")), (None, None));
    }

    #[test]
    fn split_is_detected_from_words_of_file_and_folder_names() {
        let split = |path: &str| Split::from_path(Path::new(path));
        assert_eq!((split("d/train-00000-of-00002.parquet"), split("d/val_3.tar")), (Split::Train, Split::Val));
        assert_eq!(
            (split("validation/0.tar"), split("d/test.tar"), split("d/testimony.tar")),
            (Split::Val, Split::Test, Split::Train)
        );
        assert_eq!(
            (split("d/imagenet1k-validation-00.tar"), split("d/imagenet_test_1.tar")),
            (Split::Val, Split::Test)
        );
    }
}

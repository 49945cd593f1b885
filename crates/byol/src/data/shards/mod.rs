//! Shards: many images in few large files. Tar files in WebDataset's layout (`000.tar` with
//! `NAME.jpg`, `NAME.cls`), and Parquet files with an image column as written by Hugging Face.
//!
//! The training order depends on numbers alone ([`super::Order`]): shards in a shuffled order,
//! mixed by a buffer. Images are therefore read shard by shard, and a unit (a tar file or a row
//! group) is opened at its first image. Images of open units stay on disk, so memory does not grow
//! with the data.
//!
//! Damaged bytes of one image have an error of their own. Any other error, such as a full disk or a
//! shard that has been removed, ends the command.

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
    Dataset, Error, Images, Skipped, Unused,
    folder::{is_image, is_run, relative},
    is_image_error, labels_csv, list,
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

/// Image of a unit.
#[derive(Debug, Clone)]
struct Entry {
    name: Box<str>,
    content: Content,
}

/// Location of an image.
#[derive(Debug, Clone)]
enum Content {
    /// Bytes in the file of the unit.
    Span { offset: u64, len: u32 },
    /// File that a Parquet file names.
    File(Box<Path>),
    /// None, for this reason.
    Missing(Box<str>),
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
    /// Image column of a Parquet file.
    column: usize,
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
struct ShardIndex {
    units: Vec<Unit>,
    /// Class of each image; empty if the file has no labels.
    labels: Vec<Option<usize>>,
    /// Names of the classes; empty if unknown.
    names: Vec<String>,
    /// Contents that are not used.
    notes: Notes,
}

impl ShardIndex {
    /// Number of images.
    fn images(&self) -> usize {
        self.units.iter().map(|unit| unit.images).sum()
    }
}

/// Maximum number of kinds of contents that [`Notes`] tells apart.
const MAX_NOTES: usize = 64;

/// Contents that are not used, of one kind.
#[derive(Debug)]
struct Note {
    name: String,
    reason: String,
    count: usize,
    /// First of them; empty if unknown.
    first: String,
    kind: NoteKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NoteKind {
    /// Contents of a shard.
    Contents,
    /// Values of a column, whose name is completed by that of the split.
    Column,
    /// Files, named if there is one.
    Files,
}

/// Counts of contents that are not used, by kind.
#[derive(Debug, Default)]
struct Notes(Vec<Note>);

impl Notes {
    /// Counts one.
    fn add(&mut self, name: impl Into<String>, reason: &str, first: String) {
        let (name, reason) = (name.into(), reason.to_owned());
        self.push(Note { name, reason, count: 1, first, kind: NoteKind::Contents });
    }

    /// Counts `count` values of a column, whose name is completed by that of the split.
    fn add_to_split(&mut self, name: String, reason: &str, count: usize) {
        let (reason, first) = (reason.to_owned(), String::new());
        self.push(Note { name, reason, count, first, kind: NoteKind::Column });
    }

    fn push(&mut self, mut note: Note) {
        if self.0.len() >= MAX_NOTES {
            note = Note { name: "other files".into(), reason: "second images of samples".into(), ..note };
        }
        match self.0.iter_mut().find(|known| (&known.name, &known.reason) == (&note.name, &note.reason)) {
            Some(known) => known.count += note.count,
            None => self.0.push(note),
        }
    }

    /// Adds the counts of a shard.
    fn extend(&mut self, shard: &Path, split: Split, notes: Notes) {
        let shard = shard.file_name().unwrap_or_default().to_string_lossy();
        for mut note in notes.0 {
            if note.kind == NoteKind::Column {
                note.name = format!("{} of the {} split", note.name, split.name());
            } else {
                note.first = format!("{shard}/{}", note.first).trim_end_matches('/').to_owned();
            }
            self.push(note);
        }
    }

    fn into_unused(self) -> Vec<Unused> {
        let unused = |Note { name, reason, count, first, kind }: Note| match (kind, count) {
            (NoteKind::Files, 1) => Unused { name: first, count: 0, reason },
            _ if first.is_empty() => Unused { name, count, reason },
            _ => Unused { name, count, reason: format!("{reason} (first: {first})") },
        };
        self.0.into_iter().map(unused).collect()
    }
}

/// Error of damaged bytes.
fn damaged(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

/// Error of an intact file without images.
fn no_images(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason.into())
}

/// Error of a whole shard, which does not concern a single image.
fn shard_error(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::NotFound => io::Error::other("it does not exist any more"),
        _ if is_image_error(&error) => io::Error::other(error.to_string()),
        _ => error,
    }
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
        let Unit { group, column, images, remote, .. } = &self.units[unit];
        // A small cache may remove a fetched file before it is opened.
        let mut retries = if remote.is_some() { 3 } else { 0 };
        let opened = loop {
            let path = self.units[unit].file().map_err(shard_error)?;
            let opened = match group {
                None => tar::open(&path),
                Some(group) => parquet::open(&path, *group, *column, remote.is_none()),
            };
            match opened {
                Err(e) if e.kind() == io::ErrorKind::NotFound && retries > 0 => retries -= 1,
                other => break other.map_err(shard_error)?,
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
    ///
    /// # Errors
    /// One of [`is_image_error`] if the image is missing or damaged; any other if the shard cannot
    /// be read.
    pub fn bytes(&self, i: usize) -> io::Result<Vec<u8>> {
        let (unit, k) = self.locate(i);
        let open = self.open_unit(unit)?;
        match &open.entries[k].content {
            Content::Span { offset, len } => {
                let mut bytes = vec![0; *len as usize];
                read_exact_at(&open.file, &mut bytes, *offset).map_err(shard_error)?;
                Ok(bytes)
            }
            Content::File(path) => {
                let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot read {}: {e}", path.display()));
                std::fs::read(path).map_err(named)
            }
            Content::Missing(reason) => Err(damaged(&**reason)),
        }
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

    /// Path or address of the shard of image `i`.
    pub fn path(&self, i: usize) -> &Path {
        &self.units[self.locate(i).0].path
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
    is_tar(path) || path.extension().is_some_and(|e| e.eq_ignore_ascii_case("parquet"))
}

fn is_tar(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tar"))
}

/// Endings of compressed archives.
const COMPRESSED: [&str; 16] = [
    ".tar.gz",
    ".tgz",
    ".tar.zst",
    ".tzst",
    ".tar.bz2",
    ".tbz2",
    ".tbz",
    ".tar.xz",
    ".txz",
    ".tar.lz4",
    ".tar.lzma",
    ".tar.z",
    ".tar.br",
    ".zip",
    ".7z",
    ".rar",
];

/// Reason for a compressed archive.
const IS_COMPRESSED: &str = "it is compressed; unpack it first";

/// True if the name is that of a compressed archive.
fn is_compressed(path: &Path) -> bool {
    COMPRESSED.iter().any(|ending| name(path).ends_with(ending))
}

/// Error for a compressed archive.
fn compressed(path: &Path) -> Error {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let hint = match file.to_ascii_lowercase() {
        name if name.ends_with(".tar.gz") => {
            format!("unpack it, for example with `gunzip {file}`, and pass the tar file")
        }
        name if name.ends_with(".tar.zst") => {
            format!("unpack it, for example with `unzstd {file}`, and pass the tar file")
        }
        _ => "unpack it and pass the folder or the tar file".to_owned(),
    };
    Error::Shard { path: path.to_owned(), reason: format!("it is compressed\nhint: {hint}") }
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

/// Outcome of [`open`].
pub enum OpenResult {
    /// Data set of the shards.
    Shards(Box<Dataset>),
    /// Something else, in which shards and archives may lie.
    Other(Stray),
}

/// Shards and archives that are not the data set.
#[derive(Debug, Default)]
pub struct Stray {
    /// Description of each.
    pub unused: Vec<Unused>,
    /// Paths of those in `unused`.
    pub files: HashSet<PathBuf>,
    /// Error of the first, for the case that nothing else is usable.
    pub error: Option<Error>,
}

/// Opens `root` if it is a shard, a pattern of shards, or a folder with shards, directly or in
/// `train`, `val` and `test`.
///
/// Shards in a folder with images are only its data set if these are few in comparison
/// (`are_few`).
///
/// # Errors
/// [`Error::Shard`], [`Error::Read`].
pub fn open(root: &Path, column: Option<&str>) -> Result<OpenResult, Error> {
    if is_remote(root) {
        return open_remote(root, column).map(|dataset| OpenResult::Shards(Box::new(dataset)));
    }
    let paths: Vec<PathBuf> = if is_pattern(root) {
        let invalid = || Error::Shard { path: root.to_owned(), reason: INVALID_PATTERN.into() };
        let expanded = root.to_str().and_then(expand).ok_or_else(invalid)?;
        expanded.into_iter().map(PathBuf::from).collect()
    } else if root.is_file() {
        if is_shard(root) || is_compressed(root) { vec![root.to_owned()] } else { Vec::new() }
    } else {
        return open_folder(root, column);
    };
    if paths.is_empty() {
        return Ok(OpenResult::Other(Stray::default()));
    }
    let unusable = |path: &Path, reason: &str| Err(Error::Shard { path: path.to_owned(), reason: reason.into() });
    let mut unique = HashSet::new();
    for path in &paths {
        if is_compressed(path) {
            return Err(compressed(path));
        }
        if !path.exists() {
            return unusable(path, "it does not exist\nhint: check the range of the pattern");
        }
        if path.is_dir() {
            return unusable(path, "it is a folder, not a tar or Parquet file");
        }
        if !is_shard(path) {
            return unusable(path, "it is not a tar or Parquet file");
        }
        if !unique.insert(path) {
            return unusable(path, "the pattern expands to it twice");
        }
    }
    let indexed = paths.iter().map(|path| (path.clone(), index(path, column)));
    dataset(root, indexed, class_names(&paths), true, Notes::default())
        .map(|dataset| OpenResult::Shards(Box::new(dataset)))
}

/// Indexes a local file.
fn index(path: &Path, column: Option<&str>) -> io::Result<ShardIndex> {
    let index = if is_tar(path) { tar::index(path) } else { parquet::index(path, column) }?;
    if index.images() == 0 { Err(no_images("it contains no images")) } else { Ok(index) }
}

/// [`open`] for a folder.
fn open_folder(root: &Path, column: Option<&str>) -> Result<OpenResult, Error> {
    let (archives, paths): (Vec<PathBuf>, Vec<PathBuf>) =
        find_in_folder(root)?.into_iter().partition(|p| is_compressed(p));
    let files: HashSet<PathBuf> = archives.iter().chain(&paths).cloned().collect();
    let mut notes = Notes::default();
    archives.iter().for_each(|path| add_file(&mut notes, root, path, IS_COMPRESSED));
    if paths.is_empty() {
        let error = archives.first().map(|path| compressed(path));
        return Ok(OpenResult::Other(Stray { unused: notes.into_unused(), files, error }));
    }
    let indexed: Vec<(PathBuf, io::Result<ShardIndex>)> =
        paths.iter().map(|path| (path.clone(), index(path, column))).collect();
    let in_shards: usize = indexed.iter().filter_map(|(_, index)| Some(index.as_ref().ok()?.images())).sum();
    let others = Others::find(root, &paths)?;
    if in_shards == 0 || !are_few(others.images, in_shards) {
        // A damaged file tells more than one without images.
        let is_damaged =
            |index: &io::Result<ShardIndex>| index.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::Unsupported);
        let at = indexed.iter().position(|(_, index)| is_damaged(index)).unwrap_or(0);
        let error = |(path, index): &(PathBuf, io::Result<ShardIndex>)| {
            Some(Error::Shard { path: path.clone(), reason: index.as_ref().err()?.to_string() })
        };
        let error = error(&indexed[at]).filter(|_| in_shards == 0);
        for (path, index) in indexed {
            let reason = match index {
                Ok(_) => "an archive beside images; pass it by itself to use it".to_owned(),
                Err(error) => super::one_line(&error.to_string()),
            };
            add_file(&mut notes, root, &path, &reason);
        }
        return Ok(OpenResult::Other(Stray { unused: notes.into_unused(), files, error }));
    }
    if let Some(first) = others.first_image {
        let Others { images: count, .. } = others;
        let reason = "the data set is in shards; pass a folder without shards to use them".to_owned();
        let first = relative(&first, root);
        notes.push(Note { name: "images beside shards".into(), reason, count, first, kind: NoteKind::Files });
    }
    for shard in others.shards {
        let reason = "in another subfolder; pass that by itself to use it".to_owned();
        let (name, first) = ("shards".into(), relative(&shard, root));
        notes.push(Note { name, reason, count: 1, first, kind: NoteKind::Files });
    }
    if root.join(labels_csv::FILE).is_file() {
        add_file(&mut notes, root, &root.join(labels_csv::FILE), "shards have labels of their own");
    }
    dataset(root, indexed.into_iter(), class_names(&paths), false, notes)
        .map(|dataset| OpenResult::Shards(Box::new(dataset)))
}

/// Adds a file that is not used. Files with the same extension and reason are counted together.
fn add_file(notes: &mut Notes, root: &Path, path: &Path, reason: &str) {
    let (name, first) = (format!("{} files", extension(path)), relative(path, root));
    notes.push(Note { name, reason: reason.to_owned(), count: 1, first, kind: NoteKind::Files });
}

/// True if `images` loose images beside `in_shards` images of shards are a supplement, such as a
/// picture for a README file: at most two, or one in a hundred.
fn are_few(images: usize, in_shards: usize) -> bool {
    images * 100 <= in_shards || (images <= 2 && images < in_shards)
}

/// Images and shards below a folder that are not among its shards.
#[derive(Debug, Default)]
struct Others {
    images: usize,
    first_image: Option<PathBuf>,
    shards: Vec<PathBuf>,
}

impl Others {
    /// Searches `root`, except for hidden folders and folders of runs.
    fn find(root: &Path, own: &[PathBuf]) -> Result<Others, Error> {
        let (mut others, own) = (Others::default(), own.iter().collect());
        others.search(root, &own, &mut HashSet::new())?;
        Ok(others)
    }

    fn search(&mut self, folder: &Path, own: &HashSet<&PathBuf>, visited: &mut HashSet<PathBuf>) -> Result<(), Error> {
        // A link to a parent folder would recurse forever.
        if let Ok(real) = std::fs::canonicalize(folder)
            && !visited.insert(real)
        {
            return Ok(());
        }
        for path in list(folder)?.into_iter().filter(|path| !is_hidden(path)) {
            if path.is_dir() {
                if !is_run(&path) {
                    self.search(&path, own, visited)?;
                }
            } else if is_shard(&path) {
                if !own.contains(&path) {
                    self.shards.push(path);
                }
            } else if is_image(&path) {
                self.images += 1;
                self.first_image.get_or_insert(path);
            }
        }
        Ok(())
    }
}

/// True for an address such as `s3://bucket/shards/{000..146}.tar`.
pub(crate) fn is_remote(root: &Path) -> bool {
    let scheme = root.to_str().and_then(|text| text.split_once("://"));
    scheme.is_some_and(|(scheme, _)| !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric()))
}

#[cfg(not(feature = "cloud"))]
fn open_remote(root: &Path, _: Option<&str>) -> Result<Dataset, Error> {
    let reason = "this build does not support object stores\nhint: build with `--features cloud`".into();
    Err(Error::Shard { path: root.to_owned(), reason })
}

#[cfg(feature = "cloud")]
fn open_remote(root: &Path, column: Option<&str>) -> Result<Dataset, Error> {
    let unusable = |error: io::Error| Error::Shard { path: root.to_owned(), reason: error.to_string() };
    let invalid = |reason: &str| unusable(io::Error::other(reason));
    let text = root.to_str().ok_or_else(|| invalid("the address is not valid UTF-8"))?;
    let urls = expand(text).ok_or_else(|| invalid(INVALID_PATTERN))?;
    let found = remote::find(&urls, |path| is_shard(path) || is_compressed(path)).map_err(unusable)?;
    let (archives, remotes): (Vec<_>, Vec<_>) =
        found.into_iter().map(Arc::new).partition(|shard| is_compressed(Path::new(shard.url())));
    let mut notes = Notes::default();
    if let Some(first) = archives.first() {
        // Others than those of a listing have been asked for.
        if remotes.is_empty() || urls.len() > 1 {
            return Err(compressed(Path::new(first.url())));
        }
        archives.iter().for_each(|shard| add_file(&mut notes, root, Path::new(shard.url()), IS_COMPRESSED));
    }
    let first = remotes.first().ok_or_else(|| invalid("it contains no .tar or .parquet files"))?;
    let manifest = remote::manifest(first);
    let index = |shard: &Arc<Remote>| -> io::Result<ShardIndex> {
        let file = Path::new(shard.url()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let listed =
            manifest.as_ref().and_then(|m| m.shards.iter().find(|s| s.file == file && s.bytes == shard.bytes()));
        // The manifest does not tell which images have labels if only some have.
        let listed = listed.filter(|s| s.labels.is_empty() || s.labels.len() == s.images);
        let Some(listed) = listed else {
            return shard.index(|path| self::index(path, column));
        };
        let (path, remote) = (PathBuf::from(shard.url()), Some(shard.clone()));
        let units = vec![Unit { path, group: None, column: 0, images: listed.images, remote }];
        let labels = listed.labels.iter().copied().map(Some).collect();
        Ok(ShardIndex { units, labels, names: Vec::new(), notes: Notes::default() })
    };
    let names = manifest.as_ref().map(|m| m.classes.clone()).unwrap_or_default();
    let is_listing = urls.len() == 1 && !is_shard(Path::new(text));
    let indexed = remotes.iter().map(|shard| (PathBuf::from(shard.url()), index(shard)));
    dataset(root, indexed, names, !is_listing, notes)
}

/// Finds the shards and compressed archives in a folder, in its subfolders that are named after
/// splits, or if there are none, in `data` below it, as on the Hugging Face Hub.
fn find_in_folder(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = list(root)?;
    let folders = entries.iter().filter(|p| p.is_dir() && Split::from_name(&name(p)).is_some());
    let in_splits: Vec<PathBuf> = folders.map(|folder| list(folder)).collect::<Result<Vec<_>, _>>()?.concat();
    let is_archive = |p: &&PathBuf| !is_hidden(p) && (is_shard(p) || is_compressed(p)) && p.is_file();
    let mut found: Vec<PathBuf> = entries.iter().chain(&in_splits).filter(is_archive).cloned().collect();
    let data = root.join("data");
    if !found.iter().any(|p| is_shard(p)) && data.is_dir() {
        found.extend(list(&data)?.iter().filter(is_archive).cloned());
    }
    Ok(found)
}

/// Extension of a file, with its dot, or the whole name without one.
fn extension(path: &Path) -> String {
    path.extension().map_or_else(|| name(path), |e| format!(".{}", e.to_string_lossy()))
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

    fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Val => "val",
            Split::Test => "test",
        }
    }

    /// Detects the split from the name of a file, else of its folder; `Train` otherwise.
    fn from_path(path: &Path) -> Split {
        let folder = path.parent().map(name).and_then(|name| Split::from_name(&name));
        Split::from_name(&name(path)).or(folder).unwrap_or(Split::Train)
    }
}

/// Creates the data set of indexed shards. Classes without a name in `names`, or else in the
/// shards, are named by their numbers. A shard without images is an error if `all_required`.
fn dataset(
    root: &Path,
    shards: impl Iterator<Item = (PathBuf, io::Result<ShardIndex>)>,
    mut names: Vec<String>,
    all_required: bool,
    mut notes: Notes,
) -> Result<Dataset, Error> {
    let mut splits: [(Vec<Unit>, Vec<Option<usize>>); 3] = Default::default();
    let mut first_error = None;
    for (path, index) in shards {
        let unusable = |error: io::Error| Error::Shard { path: path.clone(), reason: error.to_string() };
        let index = match index {
            Err(error) if error.kind() == io::ErrorKind::Unsupported && !all_required => {
                add_file(&mut notes, root, &path, &super::one_line(&error.to_string()));
                first_error.get_or_insert_with(|| unusable(error));
                continue;
            }
            other => other.map_err(unusable)?,
        };
        let (split, images) = (Split::from_path(&path), index.images());
        let (units, labels) = &mut splits[split as usize];
        units.extend(index.units);
        let n = labels.len() + images;
        labels.extend(index.labels);
        labels.resize(n, None);
        notes.extend(&path, split, index.notes);
        if names.is_empty() {
            names = index.names;
        }
    }
    let n_classes = splits.iter().flat_map(|(_, labels)| labels).flatten().max().map_or(0, |class| class + 1);
    let [train, val, test] = splits.map(|(units, mut labels)| {
        if n_classes < 2 {
            labels.fill(None);
        }
        (!units.is_empty()).then(|| Images::shards(Shards::new(units), None).with_partial_labels(labels))
    });
    // Shards of a single split, such as a file `test.parquet`, are the data set.
    let (train, val, test) = match (train, val, test) {
        (None, Some(only), None) | (None, None, Some(only)) => (Some(only), None, None),
        splits => splits,
    };
    let Some(train) = train else { return Err(first_error.unwrap_or_else(|| Error::Empty(root.to_owned()))) };
    let has_labels = |images: &Images| images.labels.is_some() || images.partial_labels.is_some();
    let is_labeled = [Some(&train), val.as_ref(), test.as_ref()].into_iter().flatten().any(has_labels);
    let n_classes = if is_labeled { n_classes } else { 0 };
    Ok(Dataset {
        root: root.to_owned(),
        kind: "shards".into(),
        classes: (0..n_classes).map(|c| names.get(c).cloned().unwrap_or_else(|| c.to_string())).collect(),
        train,
        held_out: val.clone().or(test.clone()),
        test: test.or(val),
        skipped: Vec::new(),
        column: None,
        unused: notes.into_unused(),
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

    fn png(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::RgbImage::new(2, 2).save(path).unwrap();
    }

    /// Writes a tar file with `n` images, or with a text if `n` is 0.
    fn tar(path: &Path, n: usize) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut image = io::Cursor::new(Vec::new());
        image::RgbImage::new(2, 2).write_to(&mut image, image::ImageFormat::Png).unwrap();
        let mut tar = ::tar::Builder::new(File::create(path).unwrap());
        let mut add = |name: String, bytes: &[u8]| {
            let mut header = ::tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, name, bytes).unwrap();
        };
        (0..n).for_each(|i| add(format!("{i:03}.png"), image.get_ref()));
        add("notes.txt".into(), b"text");
        tar.finish().unwrap();
    }

    /// Writes a Parquet file of numbers.
    fn table(path: &Path) {
        let numbers: arrow_array::ArrayRef = Arc::new(arrow_array::Int64Array::from(vec![1, 2]));
        let batch = arrow_array::RecordBatch::try_from_iter([("width", numbers)]).unwrap();
        let file = File::create(path).unwrap();
        let mut writer = ::parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    /// Kind of data set, number of training images, and what is not used.
    fn found(root: &Path) -> (String, usize, String) {
        let data = Dataset::open(root).unwrap();
        let unused: Vec<String> = data.unused.iter().map(Unused::to_string).collect();
        (data.kind, data.train.len(), unused.join("\n"))
    }

    #[test]
    fn images_win_over_archives_and_tables_beside_them() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for i in 0..6 {
            png(&root.join(format!("{}/{i}.png", ["cat", "dog"][i % 2])));
        }
        for file in ["emb.parquet", "metadata.parquet"] {
            table(&root.join(file));
        }
        tar(&root.join("backup.tar"), 6);
        std::fs::write(root.join("old.tar"), b"no tar file").unwrap();
        std::fs::write(root.join("all.tar.gz"), b"no archive").unwrap();
        let (kind, n, unused) = found(root);
        assert_eq!((kind.as_str(), n), ("image folder", 6));
        for word in ["emb.parquet", "no image column", "backup.tar", "old.tar", "not a complete", "all.tar.gz"] {
            assert!(unused.contains(word), "`{word}` is not in {unused}");
        }
        assert_eq!(Dataset::open(root).unwrap().classes, ["cat", "dog"]);
        // img2dataset's folders of files.
        let files = tempfile::tempdir().unwrap();
        png(&files.path().join("00000/000000000.png"));
        png(&files.path().join("00000/000000001.png"));
        table(&files.path().join("00000.parquet"));
        assert_eq!(found(files.path()).1, 2);
    }

    #[test]
    fn shards_win_over_a_few_pictures_and_runs_beside_them() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        tar(&root.join("00000.tar"), 20);
        table(&root.join("00000.parquet"));
        assert_eq!(found(root).1, 20);
        tar(&root.join("00001.tar"), 0);
        png(&root.join("banner.png"));
        png(&root.join("assets/figure.png"));
        tar(&root.join("more/00002.tar"), 3);
        std::fs::write(root.join("rest.tgz"), b"no archive").unwrap();
        for i in 0..9 {
            png(&root.join(format!("runs/first/views-{i}.png")));
        }
        std::fs::create_dir(root.join("runs/first/checkpoints")).unwrap();
        std::fs::write(root.join("runs/first/plan.toml"), "").unwrap();
        let (kind, n, unused) = found(root);
        assert_eq!((kind.as_str(), n), ("shards", 20));
        for word in ["images beside shards (2)", "00000.parquet", "00001.tar", "more/00002.tar", "rest.tgz"] {
            assert!(unused.contains(word), "`{word}` is not in {unused}");
        }
        png(&root.join("c.png"));
        assert_eq!(found(root).0, "image folder", "three images of 23 are more than a few");
    }

    #[test]
    fn files_without_images_and_compressed_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let reason = |path: &Path| Dataset::open(path).unwrap_err().to_string();
        std::fs::write(folder.path().join("a.tar.gz"), b"no archive").unwrap();
        for path in [folder.path().to_owned(), folder.path().join("a.tar.gz"), folder.path().join("{a,b}.tar.gz")] {
            assert!(reason(&path).contains("a.tar.gz: it is compressed"), "{}", reason(&path));
        }
        table(&folder.path().join("b.parquet"));
        assert!(reason(folder.path()).contains("no image column"));
        // A damaged file is named before one without images.
        std::fs::write(folder.path().join("c.tar"), b"no tar file").unwrap();
        assert!(reason(folder.path()).contains("c.tar"));
        // Other data beside them are used.
        png(&folder.path().join("d.png"));
        assert_eq!(found(folder.path()).1, 1);
    }

    #[test]
    fn shards_of_a_single_split_are_the_data_set() {
        let folder = tempfile::tempdir().unwrap();
        tar(&folder.path().join("test-0.tar"), 3);
        let data = Dataset::open(folder.path().join("test-0.tar")).unwrap();
        assert_eq!((data.train.len(), data.test.is_none()), (3, true));
    }

    #[test]
    fn removed_shard_is_an_error_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        // The first shard is opened for the levels of its images, and stays open.
        tar(&folder.path().join("0.tar"), 70);
        tar(&folder.path().join("1.tar"), 3);
        let data = Dataset::open(folder.path()).unwrap();
        std::fs::remove_file(folder.path().join("1.tar")).unwrap();
        assert!(matches!(data.train.get_or_next(70), Err(Error::Shard { .. })));
    }
}

//! SHARDS: many images in few large files. Tar files as WebDataset has them (`000.tar` with `NAME.jpg`, `NAME.cls`), and Parquet files with an
//! image column as Hugging Face writes them.
//!
//! The order of the images is decided by numbers alone ([`super::Order`]): shards in a shuffled order, a buffer that mixes neighbours. So images
//! come up shard by shard, and a unit (a tar file, a row group) is opened when its first image does. Open units are files: images stay on
//! disk, and what is in memory does not grow with the data.

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
    folder::is_image_name,
    list,
    pack::{MANIFEST, Manifest},
};

/// Units that are open at once, at most: fewer than the files that a process may open.
const MOST_OPEN: usize = 200;

/// The same of fetched shards: what is open stays on the disk, in the cache or not.
const MOST_OPEN_REMOTE: usize = 24;

/// Shards that are fetched at the same time, ahead of their images.
const MOST_FETCHED: usize = 2;

/// Between two tries to fetch the same shard ahead.
const FETCHED_AGAIN: Duration = Duration::from_secs(1);

/// Images that cannot be used in a row before a run gives up.
const MOST_BAD: usize = 32;

/// Numbers of classes are below this; larger ones are of something else.
const MOST_CLASSES: usize = 1 << 16;

/// Shards that a pattern may stand for.
const MOST_SHARDS: usize = 1 << 20;

/// One image of a unit.
#[derive(Debug, Clone)]
struct Entry {
    name: Box<str>,
    /// Where its bytes begin in the unit's file.
    at: u64,
    len: u32,
}

/// A unit that is being read.
#[derive(Debug)]
struct Open {
    file: File,
    entries: Vec<Entry>,
}

/// What is opened at once: a tar file, or a row group of a Parquet file.
#[derive(Debug, Clone)]
struct Unit {
    /// Its address, where it is remote.
    path: PathBuf,
    /// Of a Parquet file.
    group: Option<usize>,
    images: usize,
    remote: Option<Arc<Remote>>,
}

#[cfg(feature = "cloud")]
use remote::Remote;

/// There is none without the feature `cloud`.
#[cfg(not(feature = "cloud"))]
type Remote = std::convert::Infallible;

impl Unit {
    /// Its file, fetched where it is not here.
    fn file(&self) -> io::Result<PathBuf> {
        match &self.remote {
            None => Ok(self.path.clone()),
            #[cfg(feature = "cloud")]
            Some(remote) => remote.file(),
            #[cfg(not(feature = "cloud"))]
            Some(never) => match **never {},
        }
    }

    /// Fetches it if it is not here and there is room.
    fn fetch_ahead(&self) {
        #[cfg(feature = "cloud")]
        if let Some(remote) = &self.remote {
            remote.fetch_ahead();
        }
    }

    /// Whether nothing has to be fetched for it.
    fn is_here(&self) -> bool {
        match &self.remote {
            None => true,
            #[cfg(feature = "cloud")]
            Some(remote) => remote.is_here(),
            #[cfg(not(feature = "cloud"))]
            Some(never) => match **never {},
        }
    }

    /// Length of its file.
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

/// What one file holds.
struct Indexed {
    units: Vec<Unit>,
    /// One an image, where the file has labels.
    labels: Option<Vec<usize>>,
}

type Slot = Arc<Mutex<Option<Arc<Open>>>>;

/// Remote units that are fetched ahead.
#[derive(Debug, Default)]
struct Fetched {
    /// How many are on their way.
    now: usize,
    /// When each was last tried.
    tried: HashMap<usize, Instant>,
}

/// The images of some shards, numbered through.
#[derive(Debug)]
pub(super) struct Shards {
    units: Vec<Unit>,
    /// The number of each unit's first image, and of all images.
    starts: Vec<usize>,
    /// Open units, with when each was last used.
    open: Mutex<HashMap<usize, (u64, Slot)>>,
    clock: AtomicU64,
    passed_over: Mutex<Vec<Skipped>>,
    /// Remote units that are being fetched ahead.
    fetched: Mutex<Fetched>,
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
            passed_over: Mutex::default(),
            fetched: Mutex::default(),
        }
    }

    /// All images.
    pub fn len(&self) -> usize {
        self.starts[self.units.len()]
    }

    /// The unit of image `i`, and its place there.
    fn place(&self, i: usize) -> (usize, usize) {
        let unit = self.starts.partition_point(|start| *start <= i) - 1;
        (unit, i - self.starts[unit])
    }

    /// How many of these images, in ascending order, each unit has, in turn.
    pub fn runs(&self, chosen: &[usize]) -> Vec<usize> {
        let upto = |start: usize| chosen.partition_point(|i| *i < start);
        self.starts.windows(2).map(|pair| upto(pair[1]) - upto(pair[0])).filter(|n| *n > 0).collect()
    }

    fn unit(&self, unit: usize) -> io::Result<Arc<Open>> {
        let slot = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.clock.fetch_add(1, Ordering::Relaxed);
            let most = if self.units[unit].remote.is_some() { MOST_OPEN_REMOTE } else { MOST_OPEN };
            if open.len() >= most && !open.contains_key(&unit) {
                let oldest = open.iter().min_by_key(|(_, (used, _))| *used).map(|(unit, _)| *unit);
                oldest.map(|unit| open.remove(&unit));
            }
            let (used, slot) = open.entry(unit).or_default();
            *used = now;
            slot.clone()
        };
        // Who asks for a unit that another thread is opening waits for that one alone.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*slot {
            return Ok(open.clone());
        }
        let Unit { group, images, remote, .. } = &self.units[unit];
        // A fetched file may leave a small cache before it is open.
        let mut again = if remote.is_some() { 3 } else { 0 };
        let opened = loop {
            let path = self.units[unit].file()?;
            let opened = match group {
                None => tar::open(&path),
                Some(group) => parquet::open(&path, *group),
            };
            match opened {
                Err(e) if e.kind() == io::ErrorKind::NotFound && again > 0 => again -= 1,
                other => break other?,
            }
        };
        if opened.entries.len() != *images {
            let why = format!("it holds {} images and held {images} when it was first read", opened.entries.len());
            return Err(io::Error::other(why));
        }
        let opened = Arc::new(opened);
        *slot = Some(opened.clone());
        Ok(opened)
    }

    /// How far ahead of an image its shard is to be fetched, in images; 0 where all shards are here.
    pub fn lookahead(&self) -> usize {
        let remote = self.units.iter().filter(|unit| unit.remote.is_some());
        MOST_FETCHED * remote.map(|unit| unit.images).max().unwrap_or(0)
    }

    /// Begins to fetch the shard of image `i`, which will be wanted soon, unless it is here or enough others are being fetched.
    pub fn fetch_ahead(self: &Arc<Self>, i: usize) {
        let (unit, _) = self.place(i);
        let known = || self.open.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&unit);
        let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        // Asked for image by image: where there was no room, there may be some a while later.
        if fetched.tried.get(&unit).is_some_and(|at| at.elapsed() < FETCHED_AGAIN) || fetched.now >= MOST_FETCHED {
            return;
        }
        fetched.tried.insert(unit, Instant::now());
        // A shard that is open is read from there, whatever the cache has done with its name.
        if known() || self.units[unit].is_here() {
            return;
        }
        let shards = self.clone();
        let fetch = move || {
            shards.units[unit].fetch_ahead();
            shards.fetched.lock().unwrap_or_else(PoisonError::into_inner).now -= 1;
        };
        if std::thread::Builder::new().name("fetch".into()).spawn(fetch).is_ok() {
            fetched.now += 1;
        }
    }

    /// The bytes of image `i`.
    pub fn bytes(&self, i: usize) -> io::Result<Vec<u8>> {
        let (unit, k) = self.place(i);
        let open = self.unit(unit)?;
        let Entry { at, len, .. } = open.entries[k];
        let mut bytes = vec![0; len as usize];
        read_exact_at(&open.file, &mut bytes, at)?;
        Ok(bytes)
    }

    /// Shard and name in it of image `i`.
    pub fn name(&self, i: usize) -> String {
        let (unit, k) = self.place(i);
        let shard = self.units[unit].path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match self.unit(unit) {
            Ok(open) => format!("{shard}/{}", open.entries[k].name),
            Err(_) => format!("{shard}, image {k}"),
        }
    }

    /// What tells these shards from others: names, sizes, numbers of images.
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

    /// Remembers that an image was passed over; false if it was one too many in a row.
    pub fn pass_over(&self, one: Skipped, in_a_row: usize) -> bool {
        let mut all = self.passed_over.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.iter().any(|known| known.what == one.what) {
            all.push(one);
        }
        in_a_row < MOST_BAD
    }

    /// What was passed over so far.
    pub fn passed_over(&self) -> Vec<Skipped> {
        self.passed_over.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, at)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => (bytes, at) = (&mut bytes[n..], at + n as u64),
        }
    }
    Ok(())
}

/// Whether this names shards rather than files.
fn is_shard(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tar") || e.eq_ignore_ascii_case("parquet"))
}

/// Whether this is a pattern, such as `shards/{000..146}.tar`.
pub fn is_pattern(root: &Path) -> bool {
    root.to_str().is_some_and(|text| text.contains('{')) && !root.exists()
}

/// All that a pattern stands for, in order: `{000..146}` counts, with the zeros of its first number; `{a,b}` lists. None if a brace has no
/// end, a range is not of numbers or falls, or there are too many.
fn expand(pattern: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = pattern.split_once('{') else { return Some(vec![pattern.to_owned()]) };
    let (inner, after) = rest.split_once('}')?;
    let inner: Vec<String> = match inner.split_once("..") {
        Some((first, last)) => {
            let (from, to) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
            let few = from <= to && (to - from) as usize <= MOST_SHARDS;
            few.then(|| (from..=to).map(|i| format!("{i:0width$}", width = first.len())).collect())?
        }
        None => inner.split(',').map(str::to_owned).collect(),
    };
    let after = expand(after)?;
    if inner.len().saturating_mul(after.len()) > MOST_SHARDS {
        return None;
    }
    Some(inner.iter().flat_map(|one| after.iter().map(move |rest| format!("{before}{one}{rest}"))).collect())
}

/// Opens `root` if it is a shard, a pattern that stands for shards, or a folder of them (or of `train`, `val` and `test` with shards).
///
/// # Errors
/// [`Error::Shard`], [`Error::Read`].
pub fn open(root: &Path) -> Result<Option<Dataset>, Error> {
    if is_remote(root) {
        return open_remote(root).map(Some);
    }
    let paths: Vec<PathBuf> = if is_pattern(root) {
        let bad = || Error::Shard {
            path: root.to_owned(),
            reason: "the braces are not of the form {000..146} or {a,b}, or stand for more than a million".into(),
        };
        let all = root.to_str().and_then(expand).ok_or_else(bad)?;
        all.into_iter().map(PathBuf::from).collect()
    } else if root.is_file() {
        if is_shard(root) { vec![root.to_owned()] } else { Vec::new() }
    } else {
        of_folder(root)?
    };
    if paths.is_empty() {
        return Ok(None);
    }
    let unusable = |path: &Path, reason: &str| Err(Error::Shard { path: path.to_owned(), reason: reason.into() });
    let mut seen = HashSet::new();
    for path in &paths {
        if !path.exists() {
            let reason = "it is not there; check the numbers of the pattern".into();
            return Err(Error::Shard { path: path.clone(), reason });
        }
        if path.is_dir() {
            return unusable(path, "it is a folder; a pattern stands for tar or Parquet files");
        }
        if !seen.insert(path) {
            return unusable(path, "the pattern stands for it twice");
        }
    }
    let index = |path: &PathBuf| {
        let is_tar = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tar"));
        (path.clone(), if is_tar { tar::index(path) } else { parquet::index(path) })
    };
    dataset(root, paths.iter().map(index), &names(&paths)).map(Some)
}

/// Whether this is an address rather than a path: `s3://bucket/shards/{000..146}.tar`.
pub fn is_remote(root: &Path) -> bool {
    let scheme = root.to_str().and_then(|text| text.split_once("://"));
    scheme.is_some_and(|(scheme, _)| !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric()))
}

#[cfg(not(feature = "cloud"))]
fn open_remote(root: &Path) -> Result<Dataset, Error> {
    let reason = "this byol was built without object stores; build it with --features cloud".into();
    Err(Error::Shard { path: root.to_owned(), reason })
}

#[cfg(feature = "cloud")]
fn open_remote(root: &Path) -> Result<Dataset, Error> {
    let bad = |error: io::Error| Error::Shard { path: root.to_owned(), reason: error.to_string() };
    let wrong = |reason: &str| bad(io::Error::other(reason));
    let text = root.to_str().ok_or_else(|| wrong("an address is plain text"))?;
    let urls = expand(text).ok_or_else(|| wrong("the braces are not of the form {000..146} or {a,b}"))?;
    let found: Vec<Arc<Remote>> = remote::find(&urls, is_shard).map_err(bad)?.into_iter().map(Arc::new).collect();
    let first = found.first().ok_or_else(|| wrong("there are no .tar or .parquet files below it"))?;
    let manifest = remote::manifest(first);
    let of = |shard: &Arc<Remote>| -> io::Result<Indexed> {
        let file = Path::new(shard.url()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let listed =
            manifest.as_ref().and_then(|m| m.shards.iter().find(|s| s.file == file && s.bytes == shard.bytes()));
        let Some(listed) = listed else {
            let is_tar = file.to_ascii_lowercase().ends_with(".tar");
            return shard.index(|path| if is_tar { tar::index(path) } else { parquet::index(path) });
        };
        let unit = Unit { path: shard.url().into(), group: None, images: listed.images, remote: Some(shard.clone()) };
        let labels = (listed.labels.len() == listed.images).then(|| listed.labels.clone());
        Ok(Indexed { units: vec![unit], labels })
    };
    let names = manifest.as_ref().map(|m| m.classes.clone()).unwrap_or_default();
    let all = found.iter().map(|shard| (PathBuf::from(shard.url()), of(shard)));
    dataset(root, all, &names)
}

/// The shards in a folder, or in folders of it that are named after splits, or in `data` below it, where the hub of Hugging Face has them.
fn of_folder(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = list(root)?;
    let folders = entries.iter().filter(|p| p.is_dir() && Split::of_name(&name(p)).is_some());
    let inner: Vec<PathBuf> = folders.map(|folder| list(folder)).collect::<Result<Vec<_>, _>>()?.concat();
    let shards: Vec<PathBuf> = entries.iter().chain(&inner).filter(|p| is_shard(p) && p.is_file()).cloned().collect();
    if let Some(first) = shards.first() {
        // What of the two is meant, nobody can tell.
        let image = entries.iter().find(|p| {
            let extension = p.extension().map(|e| e.to_string_lossy().into_owned()).unwrap_or_default();
            p.is_file() && is_image_name(&extension)
        });
        let folder = || entries.iter().find(|p| p.is_dir() && Split::of_name(&name(p)).is_none() && !hidden(p));
        return match image.or_else(folder) {
            None => Ok(shards),
            Some(other) => Err(Error::Shard {
                path: first.clone(),
                reason: format!(
                    "{} lies beside it; give a folder with shards alone, or with images alone",
                    other.display()
                ),
            }),
        };
    }
    let below = root.join("data");
    if below.is_dir() {
        Ok(list(&below)?.into_iter().filter(|p| is_shard(p) && p.is_file()).collect())
    } else {
        Ok(shards)
    }
}

fn hidden(path: &Path) -> bool {
    name(path).starts_with('.')
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase()
}

/// What a shard is for, by its name or its folder's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Split {
    Train,
    Val,
    Test,
}

impl Split {
    /// The first word of a name that says so: `imagenet1k-validation-00.tar`.
    fn of_name(name: &str) -> Option<Split> {
        name.split(|c: char| !c.is_ascii_alphabetic()).find_map(|word| match word {
            "train" | "training" => Some(Split::Train),
            "val" | "valid" | "validation" => Some(Split::Val),
            "test" => Some(Split::Test),
            _ => None,
        })
    }

    fn of(path: &Path) -> Split {
        let folder = path.parent().map(name).and_then(|name| Split::of_name(&name));
        Split::of_name(&name(path)).or(folder).unwrap_or(Split::Train)
    }
}

/// Of shards, each with what it holds, and the names of the classes, where they are known.
fn dataset(
    root: &Path,
    shards: impl Iterator<Item = (PathBuf, io::Result<Indexed>)>,
    names: &[String],
) -> Result<Dataset, Error> {
    let mut splits: [(Vec<Unit>, Option<Vec<usize>>); 3] = [(); 3].map(|()| (Vec::new(), Some(Vec::new())));
    for (path, found) in shards {
        let bad = |error: io::Error| Error::Shard { path: path.clone(), reason: error.to_string() };
        let found = found.map_err(bad)?;
        if found.units.iter().all(|unit| unit.images == 0) {
            return Err(bad(io::Error::other("there are no images in it")));
        }
        let (units, labels) = &mut splits[Split::of(&path) as usize];
        units.extend(found.units);
        match (&mut *labels, found.labels) {
            (Some(all), Some(more)) => all.extend(more),
            (all, _) => *all = None,
        }
    }
    let most = splits.iter().filter_map(|(_, labels)| labels.as_ref()?.iter().max()).max();
    let classes = most.map_or(0, |most| most + 1);
    let [train, val, test] = splits.map(|(units, labels)| {
        let labels = labels.filter(|_| classes > 1);
        (!units.is_empty()).then(|| Images::shards(Shards::new(units), labels))
    });
    let Some(train) = train else { return Err(Error::Empty(root.to_owned())) };
    Ok(Dataset {
        root: root.to_owned(),
        kind: "shards".into(),
        classes: match train.labels() {
            Some(_) => (0..classes).map(|c| names.get(c).cloned().unwrap_or_else(|| c.to_string())).collect(),
            None => Vec::new(),
        },
        train,
        held_out: val.clone().or(test.clone()),
        test: test.or(val),
        skipped: Vec::new(),
    })
}

/// Names of the classes, where a manifest beside the shards has them.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let manifest = paths[0].with_file_name(MANIFEST);
    let text = std::fs::read_to_string(manifest).unwrap_or_default();
    serde_json::from_str::<Manifest>(&text).map(|manifest| manifest.classes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_counts_and_lists() {
        let expanded = expand("a/{008..010}.{tar,x}").unwrap();
        assert_eq!(expanded, ["a/008.tar", "a/008.x", "a/009.tar", "a/009.x", "a/010.tar", "a/010.x"]);
        assert_eq!(expand("plain"), Some(vec!["plain".into()]));
        assert_eq!((expand("{1..x}"), expand("{1..2"), expand("{3..1}")), (None, None, None));
        assert_eq!((expand("{0..999999999}"), expand("{0..9999}{0..9999}")), (None, None));
    }

    #[test]
    fn a_split_is_a_word_of_a_name_or_folder() {
        let of = |path: &str| Split::of(Path::new(path));
        assert_eq!((of("d/train-00000-of-00002.parquet"), of("d/val_3.tar")), (Split::Train, Split::Val));
        assert_eq!(
            (of("validation/0.tar"), of("d/test.tar"), of("d/testimony.tar")),
            (Split::Val, Split::Test, Split::Train)
        );
        assert_eq!((of("d/imagenet1k-validation-00.tar"), of("d/imagenet_test_1.tar")), (Split::Val, Split::Test));
    }
}

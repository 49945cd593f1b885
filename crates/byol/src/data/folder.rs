//! Folders of image files or sounds, at any depth, with any names. Of both, the more numerous are
//! read.
//!
//! A folder that contains nothing but one folder with images stands for that folder. Folders named
//! after splits are splits where that makes sense (`find_splits`); otherwise they are classes like
//! any other. The class of an image is the top-level folder it is in; an image outside such folders
//! has none. Each linked folder is read once. Only regular files are opened. Image files and
//! containers of images that are not supported are counted.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::OsStr,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use super::{Dataset, Error, Images, Unused, decode, file_pattern::FilePattern, list};

const EXTENSIONS: [&str; 10] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"];

/// Names of the training folder, in order of preference.
const TRAIN: &[&str] = &["train", "training"];

/// Names of the validation folder, in order of preference.
const VAL: &[&str] = &["val", "valid", "validation", "dev", "eval"];

/// Names of the test folder, in order of preference.
const TEST: &[&str] = &["test", "testing"];

/// Names of folders of training images without labels.
const UNLABELED: &[&str] = &["unlabeled", "unlabelled", "unsup"];

/// Default parent folder of runs.
const RUNS: &str = "byol-runs";

/// Endings of archives, which may contain images.
const ARCHIVES: [&str; 11] =
    ["zip", "tar.gz", "tgz", "tar.bz2", "tbz2", "tar.xz", "txz", "tar.zst", "7z", "rar", "tar.lz4"];

/// Endings of files with many images that are read on their own, but not beside image files.
const SHARDS: [&str; 2] = ["tar", "parquet"];

/// Endings of other files with many images.
const CONTAINERS: [&str; 10] =
    ["npy", "npz", "h5", "hdf5", "tfrecord", "tfrecords", "mat", "mdb", "arrow", "safetensors"];

/// Endings of videos.
const VIDEOS: [&str; 10] = ["mp4", "mov", "avi", "mkv", "webm", "m4v", "mpg", "mpeg", "wmv", "3gp"];

/// Endings of sounds that are read.
const SOUNDS: [&str; 5] = ["wav", "flac", "ogg", "oga", "mp3"];

/// Endings of other sounds.
const UNREAD_SOUNDS: [&str; 12] =
    ["m4a", "aac", "opus", "aif", "aiff", "wma", "amr", "caf", "ape", "wv", "mid", "midi"];

/// Endings of texts, whose first letters may be those of an image format.
const TEXTS: [&str; 14] =
    ["txt", "csv", "tsv", "json", "jsonl", "xml", "md", "html", "htm", "yaml", "yml", "toml", "log", "py"];

/// Kind of files or folders that are not read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum UnreadKind {
    /// Image format.
    Format(&'static str),
    /// Archive with this ending.
    Archive(&'static str),
    /// Tar or Parquet file.
    Shard(&'static str),
    /// Other file with many images.
    Container(&'static str),
    /// Video with this ending.
    Video(&'static str),
    /// Sound with this ending.
    SoundFormat(&'static str),
    /// Sound beside images.
    Sound,
    /// Image beside sounds.
    Image,
    /// Image file that has none of the patterns of `--channels`.
    Unmatched,
    /// File of an image whose first file does not exist.
    Orphan,
    /// Image whose name starts with a dot.
    Hidden,
    /// Image in a run folder.
    Run,
    /// Link to a missing file, or to itself.
    BrokenLink,
    /// Folder that links lead to a second time.
    Repeated,
    /// Named pipe, socket or device.
    Special,
}

impl UnreadKind {
    /// Name of `n` of them.
    fn name(&self, n: usize) -> String {
        let plural = if n == 1 { "" } else { "s" };
        match self {
            UnreadKind::Format(format) => format!("{format} file{plural}"),
            UnreadKind::Archive(ending)
            | UnreadKind::Shard(ending)
            | UnreadKind::Container(ending)
            | UnreadKind::Video(ending)
            | UnreadKind::SoundFormat(ending) => {
                format!(".{ending} file{plural}")
            }
            UnreadKind::Sound => format!("sound{plural}"),
            UnreadKind::Image => format!("image{plural}"),
            UnreadKind::Unmatched => format!("image file{plural} without a pattern of `--channels`"),
            UnreadKind::Orphan => format!("image file{plural} of images without their first file"),
            UnreadKind::Hidden => format!("hidden image{plural}"),
            UnreadKind::Run => format!("image{plural} in run folders"),
            UnreadKind::BrokenLink => format!("broken link{plural}"),
            UnreadKind::Repeated => format!("linked folder{plural}"),
            UnreadKind::Special => format!("special file{plural}"),
        }
    }

    fn reason(&self) -> String {
        match self {
            UnreadKind::Format(_) => format!("unsupported format; {}", self.remedy()),
            UnreadKind::Archive(_) => format!("archives are not read; {}", self.remedy()),
            UnreadKind::Shard(_) => format!("not read beside image files; {}", self.remedy()),
            UnreadKind::Container(_) => format!("not read; {}", self.remedy()),
            UnreadKind::Video(_) => format!("videos are not read; {}", self.remedy()),
            UnreadKind::SoundFormat(_) => format!("unsupported format; {}", self.remedy()),
            UnreadKind::Sound => format!("not read beside image files; {}", self.remedy()),
            UnreadKind::Image => "not read beside sounds".into(),
            UnreadKind::Unmatched => "not a file of an image".into(),
            UnreadKind::Orphan => "the file of the first pattern of `--channels` does not exist".into(),
            UnreadKind::Hidden => "names that start with a dot are not read".into(),
            UnreadKind::Run => "run folders are excluded".into(),
            UnreadKind::BrokenLink => "the linked file does not exist".into(),
            UnreadKind::Repeated => "read already under another name".into(),
            UnreadKind::Special => "named pipes, sockets and devices are not read".into(),
        }
    }

    fn remedy(&self) -> &'static str {
        match self {
            UnreadKind::Format(_) => "convert them to JPEG or PNG",
            UnreadKind::Archive(_) => "unpack them",
            UnreadKind::Shard(_) => "pass them on their own",
            UnreadKind::Container(_) => "save the images in them as JPEG or PNG",
            UnreadKind::Video(_) => "save their frames as JPEG or PNG",
            UnreadKind::SoundFormat(_) => "convert them to WAV or FLAC",
            UnreadKind::Sound => "put them into a folder of their own",
            UnreadKind::Unmatched | UnreadKind::Orphan => {
                "compare the patterns of `--channels` with the names of the files"
            }
            UnreadKind::Hidden => "rename them",
            _ => "pass a folder with JPEG, PNG, WebP, BMP, GIF or TIFF files at any depth",
        }
    }
}

/// Kind of files of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Media {
    /// Image files.
    #[default]
    Images,
    /// Sounds.
    Sounds,
}

impl Media {
    /// Kind of a file with this name.
    pub(super) fn of(path: &Path) -> Media {
        if is_sound(path) { Media::Sounds } else { Media::Images }
    }
}

/// Files that are collected.
#[derive(Debug, Clone, Default)]
struct Wanted {
    media: Media,
    /// Patterns of the files of an image, of which the first stands for the image.
    files: Vec<FilePattern>,
}

impl Wanted {
    /// True if this image file stands for an image; false if it is another file of one.
    ///
    /// # Errors
    /// The reason why it is neither.
    fn has(&self, path: &Path) -> Result<bool, UnreadKind> {
        match FilePattern::position(&self.files, path) {
            Some(0) => Ok(true),
            None if self.files.is_empty() => Ok(true),
            None => Err(UnreadKind::Unmatched),
            Some(i) => match self.files[i].sibling(path, &self.files[0]) {
                Some(first) if first.is_file() => Ok(false),
                _ => Err(UnreadKind::Orphan),
            },
        }
    }
}

/// Contents of a folder, at any depth.
#[derive(Debug, Default)]
struct FolderScan {
    wanted: Wanted,
    /// Image files, or sounds, in the order of the walk.
    images: Vec<PathBuf>,
    /// Number of files that are not read, and the first of them.
    unread: BTreeMap<UnreadKind, (usize, PathBuf)>,
    /// Files that are reported elsewhere.
    reported: HashSet<PathBuf>,
    /// Real paths of the folders so far. A link to a parent folder would recurse forever.
    visited: HashSet<PathBuf>,
}

impl FolderScan {
    /// Walks through a folder.
    fn scan(folder: &Path, wanted: &Wanted) -> Result<FolderScan, Error> {
        let mut found = FolderScan { wanted: wanted.clone(), ..FolderScan::default() };
        found.walk(folder)?;
        Ok(found)
    }

    /// Walks through a folder for images or sounds, whichever are more unless `media` tells,
    /// without counting the files that are reported elsewhere.
    fn scan_except(
        folder: &Path,
        reported: &HashSet<PathBuf>,
        files: &[FilePattern],
        media: Option<Media>,
    ) -> Result<FolderScan, Error> {
        let scan = |media| {
            let wanted = Wanted { media, files: files.to_vec() };
            let mut found = FolderScan { wanted, reported: reported.clone(), ..FolderScan::default() };
            found.walk(folder).map(|()| found)
        };
        if let Some(media) = media {
            return scan(media);
        }
        let found = scan(Media::Images)?;
        let sounds = found.unread.get(&UnreadKind::Sound).map_or(0, |(n, _)| *n);
        if sounds > found.images.len() && files.is_empty() { scan(Media::Sounds) } else { Ok(found) }
    }

    fn walk(&mut self, folder: &Path) -> Result<(), Error> {
        if let Ok(real) = fs::canonicalize(folder)
            && !self.visited.insert(real)
        {
            self.count(UnreadKind::Repeated, 1, folder);
            return Ok(());
        }
        for path in list(folder)? {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            if name.starts_with(b".") {
                // `._NAME` are metadata of macOS.
                if !name.starts_with(b"._") && has_image_extension(&path) && path.is_file() {
                    self.count(UnreadKind::Hidden, 1, &path);
                }
                continue;
            }
            let metadata = match fs::metadata(&path) {
                Ok(metadata) => metadata,
                Err(_) if path.is_symlink() => {
                    self.count(UnreadKind::BrokenLink, 1, &path);
                    continue;
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(source) => return Err(Error::Read { path, source }),
            };
            if metadata.is_dir() {
                self.walk_unless_run(&path)?;
            } else if !metadata.is_file() {
                self.count(UnreadKind::Special, 1, &path);
            } else {
                match classify(&path) {
                    File::Image if self.wanted.media == Media::Images => match self.wanted.has(&path) {
                        Ok(true) => self.images.push(path),
                        Ok(false) => {}
                        Err(kind) => self.count(kind, 1, &path),
                    },
                    File::Unread(UnreadKind::Sound) if self.wanted.media == Media::Sounds => self.images.push(path),
                    File::Image => self.count(UnreadKind::Image, 1, &path),
                    File::Unread(kind) if !self.reported.contains(&path) => self.count(kind, 1, &path),
                    File::Unread(_) | File::Other => {}
                }
            }
        }
        Ok(())
    }

    /// Walks through a folder, or counts its images if it is a run's.
    fn walk_unless_run(&mut self, folder: &Path) -> Result<(), Error> {
        if !is_run(folder) {
            return self.walk(folder);
        }
        let inside = FolderScan::scan(folder, &self.wanted)?;
        let nested = inside.unread.get(&UnreadKind::Run).map_or(0, |(n, _)| *n);
        match inside.images.len() + nested {
            0 => {}
            n => self.count(UnreadKind::Run, n, folder),
        }
        Ok(())
    }

    fn count(&mut self, kind: UnreadKind, n: usize, path: &Path) {
        self.unread.entry(kind).or_insert_with(|| (0, path.to_owned())).0 += n;
    }

    /// Files that are not read, as groups with paths relative to `root`.
    fn unused(&self, root: &Path) -> Vec<Unused> {
        let group = |(kind, (n, first)): (&UnreadKind, &(usize, PathBuf))| {
            let first_of = if *n == 1 { "" } else { "first: " };
            let reason = format!("{} ({first_of}{})", kind.reason(), relative(first, root));
            Unused { name: kind.name(*n), count: *n, reason }
        };
        self.unread.iter().map(group).collect()
    }

    /// Error of a folder without images.
    fn empty(&self, root: &Path) -> Error {
        let Some(first) = self.unread.keys().next() else { return Error::Empty(root.to_owned()) };
        if self.wanted.media == Media::Sounds && self.unread.contains_key(&UnreadKind::Image) {
            let reason = format!("{} contains images, but the encoder was trained on sounds", root.display());
            return Error::OtherInput { reason, hint: "pass a folder of sounds" };
        }
        if self.wanted.media == Media::Images && self.unread.contains_key(&UnreadKind::Sound) {
            let reason = format!("{} contains sounds, not images", root.display());
            let hint = "pass a folder of images, or omit `--channels` and `--levels`";
            return Error::OtherInput { reason, hint };
        }
        let found: Vec<String> = self.unread.iter().map(|(kind, (n, _))| format!("{n} {}", kind.name(*n))).collect();
        Error::Unread { root: root.to_owned(), found: found.join(", "), remedy: first.remedy() }
    }
}

/// A folder below the root, with its contents.
#[derive(Debug)]
struct Part {
    folder: PathBuf,
    found: FolderScan,
}

impl Part {
    /// Names of the folders that contain the images; `None` if an image is in none.
    fn class_folders(&self) -> Option<BTreeSet<&OsStr>> {
        self.found.images.iter().map(|image| top_folder(image.strip_prefix(&self.folder).ok()?)).collect()
    }
}

/// Folders that are splits.
#[derive(Debug)]
struct Splits {
    train: Part,
    val: Option<Part>,
    test: Option<Part>,
    unlabeled: Vec<Part>,
    /// Images beside the splits.
    unused: Vec<Unused>,
}

/// Opens an image folder, or a single image as a folder of one. `reported` are files that need no
/// report. `files` are the patterns of several files per image. Images or sounds are read,
/// whichever are more unless `media` tells.
///
/// # Errors
/// [`Error::Empty`], [`Error::Unread`], [`Error::Read`].
pub fn open(
    root: &Path,
    reported: &HashSet<PathBuf>,
    files: &[FilePattern],
    media: Option<Media>,
) -> Result<Dataset, Error> {
    if root.is_file() {
        let mut found = FolderScan::default();
        match classify(root) {
            File::Image => found.images.push(root.to_owned()),
            File::Unread(UnreadKind::Sound) => {
                found.wanted.media = Media::Sounds;
                found.images.push(root.to_owned());
            }
            File::Unread(kind) => found.count(kind, 1, root),
            File::Other => {}
        }
        let train = Part { folder: root.to_owned(), found };
        return match train.found.images.is_empty() {
            true => Err(train.found.empty(root)),
            false => Ok(dataset(root, train, None, None, Vec::new(), Vec::new())),
        };
    }
    let found = FolderScan::scan_except(root, reported, files, media)?;
    if found.images.is_empty() {
        return Err(found.empty(root));
    }
    let mut unused = found.unused(root);
    let base = common_folder(root, &found.images, |folder| Ok(training_folder(folder)?.is_some()))?;
    match find_splits(root, &base, &found)? {
        Some(Splits { train, val, test, unlabeled, unused: beside }) => {
            unused.splice(0..0, beside);
            Ok(dataset(root, train, val, test, unlabeled, unused))
        }
        None => Ok(dataset(root, Part { folder: base, found }, None, None, Vec::new(), unused)),
    }
}

/// Images of a folder that has a table of labels.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Images that are not in folders of other splits, in the order of a walk.
    pub train: Vec<PathBuf>,
    /// Folders of validation and test images, with their images.
    pub held_out: Vec<(PathBuf, Vec<PathBuf>)>,
    /// Files that are not read.
    pub unused: Vec<Unused>,
}

/// Finds all images in a folder that has a table of labels.
///
/// # Errors
/// [`Error::Read`].
pub(super) fn contents(
    root: &Path,
    reported: &HashSet<PathBuf>,
    files: &[FilePattern],
    media: Media,
) -> Result<Contents, Error> {
    let found = FolderScan::scan_except(root, reported, files, Some(media))?;
    let unused = found.unused(root);
    let base = common_folder(root, &found.images, |folder| Ok(training_folder(folder)?.is_some()))?;
    let splits = match find_splits(root, &base, &found) {
        Ok(splits) => splits,
        Err(Error::Empty(_)) => None,
        Err(error) => return Err(error),
    };
    let held_out = splits.into_iter().flat_map(|splits| [splits.val, splits.test]).flatten();
    let held_out: Vec<_> = held_out.map(|part| (part.folder, part.found.images)).collect();
    let is_training = |image: &PathBuf| !held_out.iter().any(|(folder, _)| image.starts_with(folder));
    Ok(Contents { train: found.images.into_iter().filter(is_training).collect(), held_out, unused })
}

/// Image files in a folder whose images come from other files, as one group.
///
/// # Errors
/// [`Error::Read`].
pub(super) fn images_beside(root: &Path, source: &str) -> Result<Vec<Unused>, Error> {
    let found = FolderScan::scan(root, &Wanted::default())?;
    let Some(first) = found.images.first() else { return Ok(Vec::new()) };
    let reason = format!("{source} are read instead (first: {})", relative(first, root));
    Ok(vec![Unused { name: "image files".into(), count: found.images.len(), reason }])
}

/// Finds the splits in `base`, which contains `found`. There are splits if there is a training
/// folder, and
///
/// - another split beside it, or
/// - no other image beside it, or
/// - it consists of class folders, and the folders beside it do not look like further classes.
///
/// Otherwise a folder such as `train` is a class, for example of vehicles.
fn find_splits(root: &Path, base: &Path, found: &FolderScan) -> Result<Option<Splits>, Error> {
    let Some(training) = training_folder(base)? else { return Ok(None) };
    // Each on its own: links between splits are not duplicates.
    let part = |folder: PathBuf| FolderScan::scan(&folder, &found.wanted).map(|found| Part { folder, found });
    let parts = subfolders(base)?.into_iter().map(part).collect::<Result<Vec<_>, _>>()?;
    let mut parts: Vec<Part> = parts.into_iter().filter(|part| !part.found.images.is_empty()).collect();
    let mut take = |names: &[&str]| {
        let at = |name: &&str| parts.iter().position(|part| is_named(&part.folder, &[*name]));
        names.iter().find_map(at).map(|i| parts.remove(i))
    };
    let (train, val, test) = (take(TRAIN), take(VAL), take(TEST));
    let (unlabeled, rest): (Vec<Part>, Vec<Part>) =
        parts.into_iter().partition(|part| is_named(&part.folder, UNLABELED));
    let is_alone = val.is_none() && test.is_none() && unlabeled.is_empty();
    let Some(train) = train else {
        // Training on the validation images would be a mistake.
        return if val.is_none() && test.is_none() { Ok(None) } else { Err(Error::Empty(training)) };
    };
    let (doubles, others): (Vec<Part>, Vec<Part>) =
        rest.into_iter().partition(|part| [TRAIN, VAL, TEST].iter().any(|names| is_named(&part.folder, names)));
    let loose: Vec<&PathBuf> = found.images.iter().filter(|image| image.parent() == Some(base)).collect();
    let is_all = others.is_empty() && loose.is_empty();
    if is_alone && !is_all && !has_class_folders(&train, &others) {
        return Ok(None);
    }
    let name = |folder: &Path| relative(folder, root);
    let train_name = name(&train.folder);
    let mut unused = Vec::new();
    for Part { folder, found } in &doubles {
        let chosen = [(TRAIN, Some(&train)), (VAL, val.as_ref()), (TEST, test.as_ref())];
        let chosen = chosen.into_iter().find(|(names, _)| is_named(folder, names)).and_then(|(_, part)| part);
        let reason = format!(
            "a second folder for this split; {}/ is used",
            chosen.map_or(train_name.clone(), |part| name(&part.folder))
        );
        unused.push(Unused { name: name(folder), count: found.images.len(), reason });
    }
    for Part { folder, found } in &others {
        let reason = format!("not a split; images beside {train_name}/ are not read");
        unused.push(Unused { name: name(folder), count: found.images.len(), reason });
    }
    if let Some(first) = loose.first() {
        let reason = format!("not in the folder of a split (first: {})", name(first));
        unused.push(Unused { name: format!("images beside {train_name}/"), count: loose.len(), reason });
    }
    Ok(Some(Splits { train, val, test, unlabeled, unused }))
}

/// True if a training folder consists of class folders, and the folders beside it do not look like
/// further classes of that kind: at most one consists of folders too, of the same classes.
fn has_class_folders(train: &Part, others: &[Part]) -> bool {
    let Some(classes) = train.class_folders().filter(|classes| classes.len() > 1) else { return false };
    let nested: Vec<BTreeSet<&OsStr>> = others.iter().filter_map(Part::class_folders).collect();
    match &nested[..] {
        [] => true,
        [one] => !one.is_disjoint(&classes),
        _ => false,
    }
}

/// Training folder directly in `folder`, with or without images.
fn training_folder(folder: &Path) -> Result<Option<PathBuf>, Error> {
    Ok(subfolders(folder)?.into_iter().find(|path| is_named(path, TRAIN)))
}

/// Folders directly in `folder`, without hidden ones and runs.
fn subfolders(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let is_hidden = |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    Ok(list(folder)?.into_iter().filter(|path| !is_hidden(path) && path.is_dir() && !is_run(path)).collect())
}

/// True for a folder with one of these names, in upper or lower case, optionally followed by a
/// year: `train2017`.
fn is_named(folder: &Path, names: &[&str]) -> bool {
    let Some(folder) = folder.file_name() else { return false };
    let is_year = |rest: &[u8]| {
        rest.len() == 4 && (rest.starts_with(b"19") || rest.starts_with(b"20")) && rest.iter().all(u8::is_ascii_digit)
    };
    let has_year = |name: &str| {
        let split = folder.as_encoded_bytes().split_at_checked(name.len());
        split.is_some_and(|(word, rest)| word.eq_ignore_ascii_case(name.as_bytes()) && is_year(rest))
    };
    names.iter().any(|name| folder.eq_ignore_ascii_case(name) || has_year(name))
}

/// Name of the split's folder in a relative path, if there is one.
pub(super) fn split_folder(relative: &Path) -> Option<String> {
    let is_split = |folder: &&OsStr| [TRAIN, VAL, TEST].iter().any(|names| is_named(Path::new(folder), names));
    relative.parent()?.iter().find(is_split).map(|folder| folder.to_string_lossy().into_owned())
}

/// True for the folder of a run, and for the default parent folder of runs.
pub(super) fn is_run(folder: &Path) -> bool {
    folder.file_name().is_some_and(|name| name.eq_ignore_ascii_case(RUNS))
        || (folder.join("plan.toml").is_file()
            && (folder.join("checkpoints").is_dir() || folder.join("encoder.safetensors").is_file()))
}

/// Follows folders that contain nothing but one folder with images, from `root` to the first that
/// contains more or where `stop` is true.
fn common_folder(
    root: &Path,
    images: &[PathBuf],
    stop: impl Fn(&Path) -> Result<bool, Error>,
) -> Result<PathBuf, Error> {
    let mut base = root.to_owned();
    while !stop(&base)? {
        let mut only = None;
        for image in images {
            let top = image.strip_prefix(&base).ok().and_then(top_folder);
            if top.is_none() || only.is_some_and(|only| Some(only) != top) {
                return Ok(base);
            }
            only = top;
        }
        let Some(only) = only else { return Ok(base) };
        base = base.join(only);
    }
    Ok(base)
}

/// First folder of a relative path; `None` for a file in no folder.
fn top_folder(relative: &Path) -> Option<&OsStr> {
    let mut parts = relative.components();
    let first = parts.next()?;
    parts.next().map(|_| first.as_os_str())
}

/// Path relative to `root`, for messages.
pub(super) fn relative(path: &Path, root: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

fn dataset(
    root: &Path,
    train: Part,
    val: Option<Part>,
    test: Option<Part>,
    unlabeled: Vec<Part>,
    unused: Vec<Unused>,
) -> Dataset {
    let kind = if train.found.wanted.media == Media::Sounds { "sound folder" } else { "image folder" };
    let train_base = common_folder(&train.folder, &train.found.images, |_| Ok(false)).unwrap_or_default();
    let wrapper = train_base.strip_prefix(&train.folder).unwrap_or(Path::new("")).to_owned();
    // Folders of the other splits may have the same folder around the classes, or not.
    let class_of_image = |part: &Part| -> Vec<Option<String>> { class_keys(part, &wrapper) };
    let train_keys = class_of_image(&train);
    let held_out_keys = [&val, &test].map(|part| part.as_ref().map(class_of_image).unwrap_or_default());
    let names = |keys: &[Option<String>]| keys.iter().flatten().cloned().collect::<BTreeSet<String>>();
    let train_names = names(&train_keys);
    // A single class cannot be learned, whatever the other splits have.
    let is_labeled = train_names.len() > 1;
    let mut all = train_names.clone();
    // The only folder of a split, such as `val/images`, is a class only if training images have it.
    let held_out_keys = held_out_keys.map(|keys| {
        let names = names(&keys);
        let is_class = names.len() > 1 || names.is_subset(&train_names);
        all.extend(names.into_iter().filter(|_| is_class));
        if is_class { keys } else { Vec::new() }
    });
    let classes: Vec<String> = if is_labeled { all.into_iter().collect() } else { Vec::new() };
    let labels = |keys: Vec<Option<String>>, n: usize| -> Vec<Option<usize>> {
        let label = |key: Option<String>| classes.binary_search(&key?).ok();
        keys.into_iter().map(label).chain(std::iter::repeat(None)).take(n).collect()
    };
    let images = |part: Part, keys: Vec<Option<String>>| {
        let labels = labels(keys, part.found.images.len());
        Images::files(part.found.images, None).with_partial_labels(labels)
    };
    let [val_keys, test_keys] = held_out_keys;
    let (val, test) = (val.map(|part| images(part, val_keys)), test.map(|part| images(part, test_keys)));
    let mut train = train;
    train.found.images.extend(unlabeled.into_iter().flat_map(|part| part.found.images));
    let train = images(train, train_keys);
    Dataset {
        root: root.to_owned(),
        kind: kind.into(),
        train,
        held_out: val.clone().or(test.clone()),
        test: test.or(val),
        classes,
        skipped: Vec::new(),
        column: None,
        unused,
    }
}

/// Class of each image: the top-level folder it is in, below `wrapper` if it is there.
fn class_keys(part: &Part, wrapper: &Path) -> Vec<Option<String>> {
    // Folders of a pattern belong to one image.
    let n_folders = part.found.wanted.files.first().map_or(0, FilePattern::n_folders);
    let class = |image: &PathBuf| {
        let relative = image.ancestors().nth(n_folders)?.strip_prefix(&part.folder).ok()?;
        top_folder(relative.strip_prefix(wrapper).unwrap_or(relative)).map(class_name)
    };
    part.found.images.iter().map(class).collect()
}

/// Name of a class folder. Bytes that are not UTF-8 are escaped, so that different folders have
/// different names.
fn class_name(folder: &OsStr) -> String {
    match folder.to_str() {
        Some(name) => name.to_owned(),
        None => folder.as_encoded_bytes().escape_ascii().to_string(),
    }
}

/// True if files with this extension are images.
pub(super) fn is_image_extension(extension: &str) -> bool {
    EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
}

fn has_image_extension(path: &Path) -> bool {
    path.extension().and_then(OsStr::to_str).is_some_and(is_image_extension)
}

/// True if this is a regular file with an image. Other files are not opened: a named pipe would
/// wait for a writer.
pub(super) fn is_image(path: &Path) -> bool {
    path.is_file() && matches!(classify(path), File::Image)
}

/// True if a file with this name is read as a sound.
fn is_sound(path: &Path) -> bool {
    path.extension().and_then(OsStr::to_str).is_some_and(|e| SOUNDS.contains(&e.to_ascii_lowercase().as_str()))
}

/// Kind of a regular file.
enum File {
    Image,
    Unread(UnreadKind),
    Other,
}

/// Classifies a regular file by its extension, or else by its first bytes.
fn classify(path: &Path) -> File {
    if has_image_extension(path) {
        return File::Image;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    if SOUNDS.contains(&extension) {
        return File::Unread(UnreadKind::Sound);
    }
    // Before the first bytes: most raw formats look like TIFF.
    if let Some(format) = decode::unread_format(extension) {
        return File::Unread(UnreadKind::Format(format));
    }
    let has_image_content = || {
        // The header of an array has 128 bytes.
        let mut head = Vec::with_capacity(128);
        let read = fs::File::open(path).and_then(|file| file.take(128).read_to_end(&mut head));
        read.is_ok() && decode::is_supported(&head)
    };
    if extension == "npy" && has_image_content() {
        return File::Image;
    }
    let ending = |endings: &[&'static str]| {
        let has = |ending: &&&str| name.strip_suffix(**ending).is_some_and(|stem| stem.ends_with('.'));
        endings.iter().find(has).copied()
    };
    let kind = ending(&ARCHIVES).map(UnreadKind::Archive);
    let kind = kind.or_else(|| ending(&SHARDS).map(UnreadKind::Shard));
    let kind = kind.or_else(|| ending(&CONTAINERS).map(UnreadKind::Container));
    let kind = kind.or_else(|| ending(&VIDEOS).map(UnreadKind::Video));
    if let Some(kind) = kind.or_else(|| ending(&UNREAD_SOUNDS).map(UnreadKind::SoundFormat)) {
        return File::Unread(kind);
    }
    if TEXTS.contains(&extension) {
        return File::Other;
    }
    if has_image_content() { File::Image } else { File::Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(root: &Path) -> Result<Dataset, Error> {
        super::open(root, &HashSet::new(), &[], None)
    }

    /// Creates files with the first bytes of a PNG.
    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            put(root.path(), file, b"\x89PNG\r\n\x1a\n");
        }
        root
    }

    fn put(root: &Path, file: &str, bytes: &[u8]) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn opened(files: &[&str]) -> (Dataset, Vec<String>) {
        let root = tree(files);
        let data = open(root.path()).unwrap();
        let unused = data.unused.iter().map(Unused::to_string).collect();
        (data, unused)
    }

    fn labels(images: &Images) -> Vec<Option<usize>> {
        (0..images.len()).map(|i| images.label(i)).collect()
    }

    #[test]
    fn images_or_sounds_are_read_whichever_are_more() {
        let (data, unused) = opened(&["train/a/1.wav", "train/b/2.flac", "val/a/3.MP3", "cover.png"]);
        assert_eq!((data.kind.as_str(), data.train.len(), data.classes.len()), ("sound folder", 2, 2));
        assert_eq!(data.held_out.unwrap().len(), 1);
        assert_eq!(unused, ["image (1): not read beside sounds (cover.png)"]);
        let (data, unused) = opened(&["1.png", "2.png", "3.ogg"]);
        assert_eq!((data.kind.as_str(), data.train.len()), ("image folder", 2));
        assert!(unused[0].starts_with("sound (1): not read beside image files; put them into"), "{unused:?}");
        let root = tree(&["1.wav", "2.png", "3.png"]);
        let media = Some(Media::Sounds);
        assert_eq!(super::open(root.path(), &HashSet::new(), &[], media).unwrap().train.len(), 1);
    }

    #[test]
    fn a_class_may_be_named_like_a_split() {
        let (data, unused) = opened(&["bus/1.png", "car/1.png", "train/1.png", "train/2.png"]);
        assert_eq!(data.classes, ["bus", "car", "train"]);
        assert_eq!((data.train.labels(), data.test.is_none()), (Some(&[0, 1, 2, 2][..]), true));
        assert!(unused.is_empty(), "{unused:?}");
        // Classes with folders of their own.
        let (data, _) = opened(&["bus/a/1.png", "bus/b/1.png", "car/c/1.png", "train/d/1.png", "train/e/1.png"]);
        assert_eq!(data.classes, ["bus", "car", "train"]);
        let (data, _) = opened(&["control/1.png", "test/1.png"]);
        assert_eq!((data.classes, data.train.len()), (vec!["control".to_owned(), "test".into()], 2));
    }

    #[test]
    fn images_beside_splits_are_reported() {
        let (data, unused) = opened(&[
            "Train/cat/1.png",
            "Train/dog/1.png",
            "dev/cat/1.png",
            "val/dog/1.png",
            "eval/dog/1.png",
            "testing/cat/1.png",
            "extra/1.png",
            "extra/a/2.png",
            "loose.png",
        ]);
        assert_eq!((data.train.labels(), data.test.unwrap().labels()), (Some(&[0, 1][..]), Some(&[0][..])));
        assert_eq!(data.held_out.unwrap().labels(), Some(&[1][..]), "`val` comes before `dev`");
        assert_eq!(
            unused,
            [
                "dev (1): a second folder for this split; val/ is used",
                "eval (1): a second folder for this split; val/ is used",
                "extra (2): not a split; images beside Train/ are not read",
                "images beside Train/ (1): not in the folder of a split (first: loose.png)",
            ]
        );
        // Class folders make a training folder without other splits.
        let (data, unused) = opened(&["train/cat/1.png", "train/dog/1.png", "figures/1.png", "loose.png"]);
        assert_eq!((data.classes.len(), data.train.len(), unused.len()), (2, 2, 2));
        let (data, unused) = opened(&["train/cat/1.png", "train/dog/1.png", "backup/cat/1.png"]);
        assert_eq!((data.classes.len(), data.train.len(), unused.len()), (2, 2, 1));
        let (data, unused) = opened(&["train/cat/1.png", "train/dog/1.png"]);
        assert_eq!((data.classes, unused.len()), (vec!["cat".to_owned(), "dog".into()], 0));
        // Without class folders nothing is left out.
        let (data, unused) = opened(&["train/1.png", "loose.png"]);
        assert_eq!((data.train.len(), unused.len()), (2, 0));
    }

    #[test]
    fn splits_may_be_named_with_a_year() {
        let (data, unused) = opened(&["train2017/1.png", "train2017/2.png", "unlabeled2017/1.png", "val2017/1.png"]);
        assert_eq!((data.train.len(), data.test.map(|test| test.len()), data.classes.len()), (3, Some(1), 0));
        assert!(unused.is_empty(), "{unused:?}");
        let (data, unused) = opened(&["train/1.png", "train2014/1.png", "val2014/1.png", "val20145/1.png"]);
        assert_eq!((data.train.len(), data.test.map(|test| test.len())), (1, Some(1)));
        assert_eq!(
            unused,
            [
                "train2014 (1): a second folder for this split; train/ is used",
                "val20145 (1): not a split; images beside train/ are not read",
            ]
        );
    }

    #[test]
    fn an_empty_training_folder_is_an_error_beside_other_splits() {
        let root = tree(&["val/cat/1.png", "val/dog/1.png"]);
        fs::create_dir(root.path().join("train")).unwrap();
        let error = open(root.path()).unwrap_err().to_string();
        assert!(error.contains("no images in") && error.contains("train"), "{error}");
    }

    #[test]
    fn unlabeled_images_are_training_images() {
        let files = ["train/cat/2.png", "train/dog/1.png", "test/dog/1.png", "unlabeled/a/0.png", "unlabeled/1.png"];
        let (data, unused) = opened(&files);
        assert_eq!(labels(&data.train), [Some(0), Some(1), None, None]);
        assert_eq!((data.classes.len(), data.test.unwrap().labels()), (2, Some(&[1][..])));
        assert!(unused.is_empty(), "{unused:?}");
    }

    #[test]
    fn images_outside_class_folders_have_no_label() {
        let (data, unused) = opened(&["cat/1.png", "dog/1.png", "dog/deep/er/2.png", "map.png", "zebra/1.png"]);
        assert_eq!(data.classes, ["cat", "dog", "zebra"]);
        assert_eq!(labels(&data.train), [Some(0), Some(1), Some(1), None, Some(2)], "in the order of the walk");
        assert!(unused.is_empty(), "{unused:?}");
        let (data, _) = opened(&["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/stray.png"]);
        assert_eq!(labels(&data.test.unwrap()), [Some(0), None]);
    }

    #[test]
    fn a_split_without_class_folders_has_no_labels() {
        for files in [
            ["train/cat/1.png", "train/dog/1.png", "val/1.png"],
            ["train/cat/1.png", "train/dog/1.png", "val/images/1.png"],
        ] {
            let (data, _) = opened(&files);
            assert_eq!(data.classes, ["cat", "dog"]);
            let val = data.test.clone().unwrap();
            assert!(labels(&val).iter().all(Option::is_none));
            let error = data.unlabeled(&val).to_string();
            assert!(error.contains("the val split of") && error.contains("val/ has no class folders"), "{error}");
        }
    }

    #[test]
    fn a_folder_around_the_images_is_followed() {
        let root = tree(&["photos/cat/1.png", "photos/dog/1.png"]);
        put(root.path(), "notes.txt", b"BM, and no image");
        let data = open(root.path()).unwrap();
        assert_eq!((data.classes, data.train.labels()), (vec!["cat".to_owned(), "dog".into()], Some(&[0, 1][..])));
        let (data, _) = opened(&["set/train/images/cat/1.png", "set/train/images/dog/1.png", "set/test/dog/1.png"]);
        assert_eq!((data.classes.len(), data.train.labels()), (2, Some(&[0, 1][..])));
        assert_eq!(data.test.unwrap().labels(), Some(&[1][..]));
        let (data, _) = opened(&["cat/1.png", "cat/2.png"]);
        assert!(data.classes.is_empty() && data.train.label(0).is_none());
    }

    #[test]
    fn runs_are_not_classes() {
        let files = ["cat/1.png", "dog/1.png", "byol-runs/x/a.png", "my run/eval/a.png", "my run/b.png", "album/1.png"];
        let root = tree(&files);
        put(root.path(), "my run/plan.toml", b"");
        put(root.path(), "my run/encoder.safetensors", b"");
        put(root.path(), "album/plan.toml", b"");
        let data = open(root.path()).unwrap();
        assert_eq!(data.classes, ["album", "cat", "dog"]);
        assert_eq!(
            data.unused[0].to_string(),
            "images in run folders (3): run folders are excluded (first: byol-runs)"
        );
    }

    #[test]
    fn counts_files_that_are_not_read() {
        let root = tree(&["1.jpg", ".hidden.png", "._1.jpg", "no extension"]);
        for i in 0..12 {
            put(root.path(), &format!("IMG_{i:02}.HEIC"), b"\0\0\0\x18ftypheic");
        }
        for file in ["a.zip", "b.tar.gz", "c.tgz", "x/emb.parquet", "clip.MOV", "labels.txt", "boxes.json"] {
            put(root.path(), file, b"BM");
        }
        // Raw files look like TIFF.
        put(root.path(), "1.NEF", b"II*\0");
        let data = open(root.path()).unwrap();
        assert_eq!(data.train.len(), 2);
        let unused: Vec<String> = data.unused.iter().map(Unused::to_string).collect();
        assert_eq!(
            unused,
            [
                "HEIC files (12): unsupported format; convert them to JPEG or PNG (first: IMG_00.HEIC)",
                "camera raw (NEF) file (1): unsupported format; convert them to JPEG or PNG (1.NEF)",
                ".tar.gz file (1): archives are not read; unpack them (b.tar.gz)",
                ".tgz file (1): archives are not read; unpack them (c.tgz)",
                ".zip file (1): archives are not read; unpack them (a.zip)",
                ".parquet file (1): not read beside image files; pass them on their own (x/emb.parquet)",
                ".mov file (1): videos are not read; save their frames as JPEG or PNG (clip.MOV)",
                "hidden image (1): names that start with a dot are not read (.hidden.png)",
            ]
        );
    }

    #[test]
    fn names_the_files_of_a_folder_without_images() {
        let root = tree(&[]);
        put(root.path(), "a.HEIC", b"");
        put(root.path(), "b/c.heic", b"");
        put(root.path(), "d.zip", b"");
        let error = open(root.path()).unwrap_err().to_string();
        assert!(error.contains("only 2 HEIC files, 1 .zip file\nhint: convert them"), "{error}");
        assert!(matches!(open(&root.path().join("a.HEIC")), Err(Error::Unread { .. })));
        assert!(matches!(open(tree(&[]).path()), Err(Error::Empty(_))));
    }

    #[cfg(unix)]
    #[test]
    fn opens_only_regular_files_and_follows_links_once() {
        use std::os::unix::{ffi::OsStrExt, fs::symlink};
        let root = tree(&["cat/1.png", "dog/1.png"]);
        let at = |name: &str| root.path().join(name);
        // Opening a named pipe would wait for a writer.
        for pipe in ["dog/pipe.jpg", "dog/pipe"] {
            assert!(std::process::Command::new("mkfifo").arg(at(pipe)).status().unwrap().success());
        }
        let _socket = std::os::unix::net::UnixListener::bind(at("dog/socket.png")).unwrap();
        symlink(at("cat/1.png"), at("dog/2.png")).unwrap();
        symlink(at("missing.png"), at("cat/broken.png")).unwrap();
        symlink(at("cat/itself.png"), at("cat/itself.png")).unwrap();
        symlink(at("."), at("dog/parent")).unwrap();
        let data = open(root.path()).unwrap();
        assert_eq!(data.train.labels(), Some(&[0, 1, 1][..]));
        let counts: Vec<(String, usize)> = data.unused.into_iter().map(|group| (group.name, group.count)).collect();
        let expected = [("broken links", 2), ("linked folder", 1), ("special files", 3)];
        assert_eq!(counts, expected.map(|(name, n)| (name.to_owned(), n)));
        // Names that are not text stay different.
        for bytes in [b"caf\xE8", b"caf\xE9"] {
            let folder = root.path().join(OsStr::from_bytes(bytes));
            if fs::create_dir(&folder).is_err() {
                return; // this file system requires UTF-8
            }
            fs::copy(at("cat/1.png"), folder.join(OsStr::from_bytes(b"\xFF.png"))).unwrap();
        }
        assert_eq!(open(root.path()).unwrap().classes, ["caf\\xe8", "caf\\xe9", "cat", "dog"]);
    }

    #[cfg(unix)]
    #[test]
    fn splits_may_link_to_the_same_images() {
        let root = tree(&["all/cat/1.png", "all/dog/1.png"]);
        for split in ["train", "val"] {
            std::os::unix::fs::symlink(root.path().join("all"), root.path().join(split)).unwrap();
        }
        let data = open(root.path()).unwrap();
        assert_eq!((data.train.labels(), data.test.unwrap().labels()), (Some(&[0, 1][..]), Some(&[0, 1][..])));
    }
}

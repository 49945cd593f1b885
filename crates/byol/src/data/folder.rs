//! Folders of image files, at any depth, with any names.
//!
//! `train/`, `val/` (or `valid/`, `validation/`) and `test/` are splits. If every image of a split
//! is in a subfolder, its top-level subfolder is its class. Links are followed once; files that are
//! not images are ignored.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use super::{Dataset, Error, Images, decode, list};

const EXTENSIONS: [&str; 10] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"];

/// Image files of a split, with the class folder of each if all have one.
struct SplitFiles {
    paths: Vec<PathBuf>,
    classes: Option<Vec<String>>,
}

/// Opens an image folder, or a single image as a folder of one.
///
/// # Errors
/// [`Error::Empty`], [`Error::Read`].
pub fn open(root: &Path) -> Result<Dataset, Error> {
    if root.is_file() {
        let files = SplitFiles { paths: vec![root.to_owned()], classes: None };
        return if is_image(root) { Ok(dataset(root, files, None, None)) } else { Err(Error::Empty(root.to_owned())) };
    }
    let entries = list(root)?;
    let split = |names: &[&str]| {
        names.iter().find_map(|name| {
            let matches = |p: &&PathBuf| p.file_name().is_some_and(|f| f.eq_ignore_ascii_case(name)) && p.is_dir();
            entries.iter().find(matches)
        })
    };
    let dataset = match split(&["train", "training"]) {
        Some(train) => {
            let find_split = |names: &[&str]| split(names).map(|folder| find(folder)).transpose();
            dataset(root, find(train)?, find_split(&["val", "valid", "validation"])?, find_split(&["test"])?)
        }
        None => dataset(root, find(root)?, None, None),
    };
    if dataset.train.is_empty() { Err(Error::Empty(root.to_owned())) } else { Ok(dataset) }
}

fn dataset(root: &Path, train: SplitFiles, val: Option<SplitFiles>, test: Option<SplitFiles>) -> Dataset {
    // All splits share one numbering of classes. A split with images outside class folders has no
    // labels.
    let class_names = |files: &SplitFiles| -> BTreeSet<String> { files.classes.iter().flatten().cloned().collect() };
    let mut names = class_names(&train);
    let is_labeled = names.len() > 1; // a single class cannot be learned, whatever the other splits have
    [&val, &test].into_iter().flatten().for_each(|files| names.extend(class_names(files)));
    let classes: Vec<String> = if is_labeled { names.into_iter().collect() } else { Vec::new() };
    let to_images = |files: SplitFiles| {
        let labels = files.classes.and_then(|class_of_image| {
            class_of_image.iter().map(|name| classes.binary_search(name).ok()).collect::<Option<Vec<usize>>>()
        });
        Images::files(files.paths, labels.filter(|_| !classes.is_empty()))
    };
    let (val, test) =
        (val.filter(|f| !f.paths.is_empty()).map(to_images), test.filter(|f| !f.paths.is_empty()).map(to_images));
    let train = to_images(train);
    Dataset {
        root: root.to_owned(),
        kind: "image folder".into(),
        train,
        held_out: val.clone().or(test.clone()),
        test: test.or(val),
        classes,
        skipped: Vec::new(),
    }
}

/// Finds the images below `root`.
fn find(root: &Path) -> Result<SplitFiles, Error> {
    let (mut paths, mut visited) = (Vec::new(), HashSet::new());
    walk(root, &mut paths, &mut visited)?;
    let class = |path: &PathBuf| {
        let relative = path.strip_prefix(root).ok()?;
        let mut parts = relative.components();
        let first = parts.next()?.as_os_str().to_string_lossy().into_owned();
        parts.next().map(|_| first)
    };
    let classes = paths.iter().map(class).collect();
    Ok(SplitFiles { paths, classes })
}

fn walk(folder: &Path, paths: &mut Vec<PathBuf>, visited: &mut HashSet<PathBuf>) -> Result<(), Error> {
    // A link to a parent folder would recurse forever.
    if let Ok(real) = fs::canonicalize(folder)
        && !visited.insert(real)
    {
        return Ok(());
    }
    for path in list(folder)? {
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if hidden {
            continue;
        }
        if path.is_dir() {
            walk(&path, paths, visited)?;
        } else if is_image(&path) {
            paths.push(path);
        }
    }
    Ok(())
}

/// True if files with this extension are images.
pub(super) fn is_image_extension(extension: &str) -> bool {
    EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
}

/// True if the extension, or else the first bytes, are those of an image.
fn is_image(path: &Path) -> bool {
    if let Some(extension) = path.extension().and_then(|e| e.to_str())
        && is_image_extension(extension)
    {
        return true;
    }
    let mut head = [0u8; 16];
    let n = fs::File::open(path).and_then(|mut f| f.read(&mut head)).unwrap_or(0);
    decode::is_supported(&head[..n])
}

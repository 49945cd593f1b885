//! A folder of image files, at any depth, under any names.
//!
//! `train/` with `val/` (or `valid/`, `validation/`) or `test/` beside it are splits. Where every image of a split lies in a subfolder, the first
//! subfolder is its class. Links are followed once; files that are not images are passed over.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use super::{Dataset, Error, Images, decode, list};

const EXTENSIONS: [&str; 10] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"];

/// Images and, where there are classes, the class folder of each.
struct Found {
    paths: Vec<PathBuf>,
    classes: Option<Vec<String>>,
}

/// Opens an image folder, or a single image as a folder of one.
///
/// # Errors
/// [`Error::Empty`], [`Error::Read`].
pub fn open(root: &Path) -> Result<Dataset, Error> {
    if root.is_file() {
        let found = Found { paths: vec![root.to_owned()], classes: None };
        return if is_image(root) { Ok(dataset(root, found, None, None)) } else { Err(Error::Empty(root.to_owned())) };
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
            let other = |names: &[&str]| split(names).map(|folder| find(folder)).transpose();
            dataset(root, find(train)?, other(&["val", "valid", "validation"])?, other(&["test"])?)
        }
        None => dataset(root, find(root)?, None, None),
    };
    if dataset.train.is_empty() { Err(Error::Empty(root.to_owned())) } else { Ok(dataset) }
}

fn dataset(root: &Path, train: Found, val: Option<Found>, test: Option<Found>) -> Dataset {
    // One numbering of classes for all splits. A split with images outside class folders has no labels.
    let names = |of: &Found| -> BTreeSet<String> { of.classes.iter().flatten().cloned().collect() };
    let mut all = names(&train);
    let labelled = all.len() > 1; // where training images have one folder, what others have are no classes to learn
    [&val, &test].into_iter().flatten().for_each(|of| all.extend(names(of)));
    let classes: Vec<String> = if labelled { all.into_iter().collect() } else { Vec::new() };
    let number = |found: Found| {
        let labels = found.classes.and_then(|of_image| {
            of_image.iter().map(|name| classes.binary_search(name).ok()).collect::<Option<Vec<usize>>>()
        });
        Images::files(found.paths, labels.filter(|_| !classes.is_empty()))
    };
    let (val, test) =
        (val.filter(|f| !f.paths.is_empty()).map(number), test.filter(|f| !f.paths.is_empty()).map(number));
    let train = number(train);
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

fn find(root: &Path) -> Result<Found, Error> {
    let (mut paths, mut seen) = (Vec::new(), HashSet::new());
    walk(root, &mut paths, &mut seen)?;
    let class = |path: &PathBuf| {
        let inner = path.strip_prefix(root).ok()?;
        let mut parts = inner.components();
        let first = parts.next()?.as_os_str().to_string_lossy().into_owned();
        parts.next().map(|_| first)
    };
    let classes = paths.iter().map(class).collect();
    Ok(Found { paths, classes })
}

fn walk(folder: &Path, paths: &mut Vec<PathBuf>, seen: &mut HashSet<PathBuf>) -> Result<(), Error> {
    // A link back to a folder above would never end.
    if let Ok(real) = fs::canonicalize(folder)
        && !seen.insert(real)
    {
        return Ok(());
    }
    for path in list(folder)? {
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if hidden {
            continue;
        }
        if path.is_dir() {
            walk(&path, paths, seen)?;
        } else if is_image(&path) {
            paths.push(path);
        }
    }
    Ok(())
}

/// Whether files with this extension are images.
pub(super) fn is_image_name(extension: &str) -> bool {
    EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
}

/// By its extension; a file of another or no extension by its first bytes.
fn is_image(path: &Path) -> bool {
    if let Some(extension) = path.extension().and_then(|e| e.to_str())
        && is_image_name(extension)
    {
        return true;
    }
    let mut head = [0u8; 16];
    let n = fs::File::open(path).and_then(|mut f| f.read(&mut head)).unwrap_or(0);
    decode::looks_like_an_image(&head[..n])
}

//! Labels in a `labels.csv`: columns `path` (relative to the file), `label` and, if there are
//! splits, `split` (`train`, `val` or `test`). An image of several classes has a line for each.
//!
//! In a folder, the images that the file does not name are training images without labels.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    path::{Path, PathBuf},
};

use super::{
    Dataset, Error, Images, Unused,
    file_pattern::FilePattern,
    folder::{self, Media},
};

/// File name.
pub const FILE: &str = "labels.csv";

/// Split and labels of an image.
#[derive(Debug, Default)]
struct Entry {
    split: String,
    labels: BTreeSet<String>,
}

/// Opens `root` if it is a folder with a `labels.csv`, or such a file itself. The file itself
/// stands for the images that it names, the folder for all images in it. `reported` are files that
/// need no report. Of several `files` per image the table names the first.
///
/// # Errors
/// [`Error::Labels`] for an invalid file, a missing column, or a line with a missing image;
/// [`Error::Read`].
pub fn open(root: &Path, reported: &HashSet<PathBuf>, files: &[FilePattern]) -> Result<Option<Dataset>, Error> {
    let file = if root.is_dir() { root.join(FILE) } else { root.to_owned() };
    if !file.is_file() || !file.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) {
        return Ok(None);
    }
    let bytes = fs::read(&file).map_err(|source| Error::Read { path: file.clone(), source })?;
    let folder = file.parent().unwrap_or(Path::new("."));
    let dataset = parse(root, &file, &bytes, |path| folder.join(path))?;
    if root.is_dir() { with_unnamed(dataset, reported, files).map(Some) } else { Ok(Some(dataset)) }
}

/// Adds the images of the folder that are not named in its file. Those in folders of validation or
/// test images are not used: they must not become training images.
fn with_unnamed(dataset: Dataset, reported: &HashSet<PathBuf>, files: &[FilePattern]) -> Result<Dataset, Error> {
    let media = dataset.train.path(0).map_or(Media::Images, Media::of);
    let contents = folder::contents(&dataset.root, reported, files, media)?;
    let named = Named::new(&dataset);
    let mut unused = contents.unused;
    for (folder, images) in contents.held_out {
        let unnamed = named.others(images);
        if !unnamed.is_empty() {
            let name = folder.strip_prefix(&dataset.root).unwrap_or(&folder).display().to_string();
            let reason = format!("not named in {FILE}, and not in a folder of training images");
            unused.push(Unused { name, count: unnamed.len(), reason });
        }
    }
    let unnamed = named.others(contents.train);
    if unnamed.is_empty() {
        return Ok(Dataset { unused, ..dataset });
    }
    let n_named = named.paths.len();
    let kind = format!("{} ({n_named} of {} labeled)", dataset.kind, n_named + unnamed.len());
    let n = unnamed.len();
    let unnamed = Images::files(unnamed, None);
    let unnamed = if dataset.train.tags().is_some() { unnamed.with_tags(vec![Vec::new(); n]) } else { unnamed };
    let train = dataset.train.concat(&unnamed).expect("both are files");
    Ok(Dataset { kind, train, unused, ..dataset })
}

/// Images named in a file.
struct Named<'a> {
    paths: HashSet<&'a Path>,
}

impl<'a> Named<'a> {
    fn new(dataset: &'a Dataset) -> Named<'a> {
        let splits = [Some(&dataset.train), dataset.held_out.as_ref(), dataset.test.as_ref()];
        let splits = splits.into_iter().flatten();
        Named { paths: splits.flat_map(|images| (0..images.len()).filter_map(move |i| images.path(i))).collect() }
    }

    /// Those of `images` that are not named, whatever way their paths are written.
    fn others(&self, images: Vec<PathBuf>) -> Vec<PathBuf> {
        let others: Vec<PathBuf> = images.into_iter().filter(|path| !self.paths.contains(path.as_path())).collect();
        if others.is_empty() {
            return others;
        }
        let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let named: HashSet<PathBuf> = self.paths.iter().map(|path| real(path)).collect();
        others.into_iter().filter(|path| !named.contains(&real(path))).collect()
    }
}

/// Parses the bytes of `file`. `resolve` maps a path in it to a path on disk.
///
/// # Errors
/// Those of [`open`].
pub fn parse(root: &Path, file: &Path, bytes: &[u8], resolve: impl Fn(&Path) -> PathBuf) -> Result<Dataset, Error> {
    let invalid = |reason: String| Error::Labels { path: file.to_owned(), reason };
    let entries = read_entries(file, bytes, resolve)?;
    if entries.is_empty() {
        return Err(Error::Empty(root.to_owned()));
    }
    let names: BTreeSet<&String> = entries.values().flat_map(|entry| &entry.labels).collect();
    let classes: Vec<String> = names.into_iter().cloned().collect();
    let class = |name: &String| classes.binary_search(name).expect("all names were collected");
    let is_multi_label = entries.values().any(|entry| entry.labels.len() > 1);
    let split = |name: &str| -> Option<Images> {
        let is_in_split = |entry: &Entry| entry.split == name || (name == "train" && entry.split.is_empty());
        let members: Vec<_> = entries.iter().filter(|(_, entry)| is_in_split(entry)).collect();
        let tags: Vec<Vec<usize>> = members.iter().map(|(_, entry)| entry.labels.iter().map(class).collect()).collect();
        let paths = members.iter().map(|(path, _)| (*path).clone()).collect();
        let images = match is_multi_label {
            true => Images::files(paths, None).with_tags(tags),
            false => Images::files(paths, Some(tags.into_iter().flatten().collect())),
        };
        (!images.is_empty()).then_some(images)
    };
    let (val, test) = (split("val"), split("test"));
    let train = split("train").ok_or_else(|| invalid("no line belongs to the split train".into()))?;
    let media = train.path(0).map_or(Media::Images, Media::of);
    Ok(Dataset {
        root: root.to_owned(),
        kind: format!("{} with labels.csv", if media == Media::Sounds { "sounds" } else { "images" }),
        train,
        held_out: val.clone().or(test.clone()),
        test: test.or(val),
        classes,
        skipped: Vec::new(),
        column: None,
        unused: Vec::new(),
    })
}

/// Entries of the table by image path.
fn read_entries(
    file: &Path,
    bytes: &[u8],
    resolve: impl Fn(&Path) -> PathBuf,
) -> Result<BTreeMap<PathBuf, Entry>, Error> {
    let invalid = |reason: String| Error::Labels { path: file.to_owned(), reason };
    // Spreadsheets write a byte order mark.
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(bytes);
    let header = reader.headers().map_err(|e| invalid(e.to_string()))?.clone();
    let column = |name: &str| header.iter().position(|h| h.eq_ignore_ascii_case(name));
    let required = |name: &str| column(name).ok_or_else(|| invalid(format!("the header has no column `{name}`")));
    let (path_column, label_column, split_column) = (required("path")?, required("label")?, column("split"));
    let mut entries: BTreeMap<PathBuf, Entry> = BTreeMap::new();
    for record in reader.byte_records() {
        let record = record.map_err(|e| invalid(e.to_string()))?;
        let line = record.position().map_or(0, csv::Position::line);
        let cell = |i: usize| record.get(i).unwrap_or_default();
        let path = resolve(&path_from_bytes(cell(path_column)));
        if !path.is_file() {
            let problem = if path.exists() { "is not a file" } else { "does not exist" };
            return Err(invalid(format!("line {line} names {}, which {problem}", path.display())));
        }
        let text = |i: usize| {
            let text = std::str::from_utf8(cell(i));
            text.map_err(|_| invalid(format!("line {line} has a `{}` that is not UTF-8", &header[i])))
        };
        let split = split_column.map_or(Ok(""), text)?;
        if !["", "train", "val", "test"].contains(&split) {
            return Err(invalid(format!("line {line} has an invalid split `{split}` (expected train, val or test)")));
        }
        let label = text(label_column)?;
        if label.is_empty() {
            return Err(invalid(format!("line {line} has no label")));
        }
        let entry = entries.entry(path).or_default();
        if !entry.labels.is_empty() && entry.split != split {
            return Err(invalid(format!(
                "line {line} assigns an image to the split `{split}`, an earlier line to `{}`",
                entry.split
            )));
        }
        entry.split = split.to_owned();
        entry.labels.insert(label.to_owned());
    }
    Ok(entries)
}

/// Path of a cell. On Unix it may contain any bytes, as file names do.
fn path_from_bytes(bytes: &[u8]) -> Cow<'_, Path> {
    #[cfg(unix)]
    return Cow::Borrowed(Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(bytes)));
    #[cfg(not(unix))]
    Cow::Owned(PathBuf::from(String::from_utf8_lossy(bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(root: &Path) -> Result<Option<Dataset>, Error> {
        super::open(root, &HashSet::new(), &[])
    }

    fn folder(csv: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.png", "b, c.png"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        fs::write(folder.path().join(FILE), csv).unwrap();
        folder
    }

    #[test]
    fn reads_single_and_multi_label_files() {
        let single = folder("path,label,split\na.png,cat,train\n\"b, c.png\",dog,test\n");
        let data = open(single.path()).unwrap().unwrap();
        assert_eq!(
            (data.classes.len(), data.train.labels(), data.test.unwrap().labels()),
            (2, Some(&[0][..]), Some(&[1][..]))
        );
        assert_eq!(data.kind, "images with labels.csv");
        let multi = folder("Label, Path\ncat,a.png\ndog,a.png\ndog,\"b, c.png\"\n");
        let data = open(&multi.path().join(FILE)).unwrap().unwrap();
        assert_eq!(data.train.labels(), None);
        assert_eq!(data.train.tags().unwrap(), [vec![0, 1], vec![1]]);
        assert_eq!(data.train.subset(&[1]).tags().unwrap(), [vec![1]]);
    }

    #[test]
    fn errors_name_the_invalid_line() {
        for (csv, expected) in [
            ("file,label\na.png,cat\n", "no column `path`"),
            ("path,label\nz.png,cat\n", "line 2 names"),
            ("path,label,split\na.png,cat,dev\n", "line 2 has an invalid split `dev`"),
            ("path,label\na.png,\n", "line 2 has no label"),
            ("path,label,split\na.png,cat,train\na.png,dog,test\n", "line 3 assigns an image"),
        ] {
            let error = open(folder(csv).path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn unnamed_images_are_training_images_without_labels() {
        let few = folder("\u{feff}path,label\n./b, c.png,dog\n".replace("./b, c.png", "\"./b, c.png\"").as_str());
        fs::create_dir(few.path().join("more")).unwrap();
        fs::write(few.path().join("more/d.png"), "").unwrap();
        fs::write(few.path().join("e.heic"), "").unwrap();
        let data = open(few.path()).unwrap().unwrap();
        let names: Vec<_> = (0..3).map(|i| data.train.path(i).unwrap().file_name().unwrap()).collect();
        assert_eq!(names, ["b, c.png", "a.png", "d.png"], "the named ones first");
        assert_eq!([0, 1, 2].map(|i| data.train.label(i)), [Some(0), None, None]);
        assert_eq!(data.train.labeled().unwrap().labels(), Some(&[0][..]));
        assert_eq!(data.kind, "images with labels.csv (1 of 3 labeled)");
        assert_eq!(data.unused.len(), 1, "{:?}", data.unused);
        let only_named = open(&few.path().join(FILE)).unwrap().unwrap();
        assert_eq!(only_named.train.len(), 1);
        // Several labels per image.
        fs::write(few.path().join(FILE), "path,label\na.png,cat\na.png,dog\n").unwrap();
        let data = open(few.path()).unwrap().unwrap();
        assert_eq!(data.train.tags().unwrap(), [vec![0, 1], vec![], vec![]]);
    }

    #[test]
    fn unnamed_test_images_do_not_become_training_images() {
        let root = tempfile::tempdir().unwrap();
        for name in ["train/a.png", "train/b.png", "test/c.png", "test/d.png"] {
            fs::create_dir_all(root.path().join(name).parent().unwrap()).unwrap();
            fs::write(root.path().join(name), "").unwrap();
        }
        fs::write(root.path().join(FILE), "path,label,split\ntrain/a.png,cat,train\ntest/c.png,dog,test\n").unwrap();
        let data = open(root.path()).unwrap().unwrap();
        assert_eq!((data.train.len(), data.test.unwrap().len()), (2, 1));
        assert_eq!(data.unused[0].to_string().split(':').next(), Some("test (1)"));
    }

    #[cfg(unix)]
    #[test]
    fn file_names_need_not_be_text_but_labels_must() {
        use std::os::unix::ffi::OsStrExt;
        let root = tempfile::tempdir().unwrap();
        let name = std::ffi::OsStr::from_bytes(b"caf\xE9.png");
        if fs::write(root.path().join(name), "").is_err() {
            return; // this file system requires UTF-8
        }
        fs::write(root.path().join(FILE), b"path,label\ncaf\xE9.png,food\n").unwrap();
        assert_eq!(open(root.path()).unwrap().unwrap().train.labels(), Some(&[0][..]));
        fs::write(root.path().join(FILE), b"path,label\ncaf\xE9.png,caf\xE9\n").unwrap();
        let error = open(root.path()).unwrap_err().to_string();
        assert!(error.contains("line 2 has a `label` that is not UTF-8"), "{error}");
    }
}

//! Labels in a `labels.csv`: columns `path` (relative to the file), `label` and, if there are
//! splits, `split` (`train`, `val` or `test`). An image of several classes has a line for each.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use super::{Dataset, Error, Images};

/// File name.
pub const FILE: &str = "labels.csv";

/// Split and labels of an image.
#[derive(Debug, Default)]
struct Entry {
    split: String,
    labels: BTreeSet<String>,
}

/// Opens `root` if it is a folder with a `labels.csv`, or such a file itself.
///
/// # Errors
/// [`Error::Labels`] for an invalid file, a missing column, or a line with a missing image.
pub fn open(root: &Path) -> Result<Option<Dataset>, Error> {
    let file = if root.is_dir() { root.join(FILE) } else { root.to_owned() };
    if !file.is_file() || !file.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) {
        return Ok(None);
    }
    let bytes = fs::read(&file).map_err(|source| Error::Read { path: file.clone(), source })?;
    let folder = file.parent().unwrap_or(Path::new("."));
    parse(root, &file, &bytes, |path| folder.join(path)).map(Some)
}

/// Parses the bytes of `file`. `resolve` maps a path in it to a path on disk.
///
/// # Errors
/// Those of [`open`].
pub fn parse(root: &Path, file: &Path, bytes: &[u8], resolve: impl Fn(&str) -> PathBuf) -> Result<Dataset, Error> {
    let invalid = |reason: String| Error::Labels { path: file.to_owned(), reason };
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(bytes);
    let header = reader.headers().map_err(|e| invalid(e.to_string()))?.clone();
    let column = |name: &str| header.iter().position(|h| h.eq_ignore_ascii_case(name));
    let required = |name: &str| column(name).ok_or_else(|| invalid(format!("the header has no column `{name}`")));
    let (path_column, label_column, split_column) = (required("path")?, required("label")?, column("split"));
    let mut entries: BTreeMap<PathBuf, Entry> = BTreeMap::new();
    for record in reader.records() {
        let record = record.map_err(|e| invalid(e.to_string()))?;
        let line = record.position().map_or(0, csv::Position::line);
        let cell = |i: usize| record.get(i).unwrap_or_default();
        let path = resolve(cell(path_column));
        if !path.is_file() {
            return Err(invalid(format!("line {line} names {}, which does not exist", path.display())));
        }
        let split = split_column.map_or("", cell);
        if !["", "train", "val", "test"].contains(&split) {
            return Err(invalid(format!("line {line} has an invalid split `{split}` (expected train, val or test)")));
        }
        if cell(label_column).is_empty() {
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
        entry.labels.insert(cell(label_column).to_owned());
    }
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
    Ok(Dataset {
        root: root.to_owned(),
        kind: "images with labels.csv".into(),
        train,
        held_out: val.clone().or(test.clone()),
        test: test.or(val),
        classes,
        skipped: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
}

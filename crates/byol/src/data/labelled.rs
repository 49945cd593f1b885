//! A folder whose `labels.csv` says which image is of which class: columns `path` (relative to the file) and `label`, and, if there are
//! splits, `split` (`train`, `val`, `test`). An image of several classes has a line for each.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use super::{Dataset, Error, Images};

/// The name of the file.
pub const FILE: &str = "labels.csv";

/// What a line says of an image.
#[derive(Debug, Default)]
struct Said {
    split: String,
    labels: BTreeSet<String>,
}

/// Opens `root` if it is such a folder, or such a file.
///
/// # Errors
/// [`Error::Labels`] for a file that is none, a column that is missing, or a line that names no file.
pub fn open(root: &Path) -> Result<Option<Dataset>, Error> {
    let file = if root.is_dir() { root.join(FILE) } else { root.to_owned() };
    if !file.is_file() || !file.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) {
        return Ok(None);
    }
    let bytes = fs::read(&file).map_err(|source| Error::Read { path: file.clone(), source })?;
    let folder = file.parent().unwrap_or(Path::new("."));
    parse(root, &file, &bytes, |path| folder.join(path)).map(Some)
}

/// What the bytes of a `file` say; `place` gives the place of a path in it.
///
/// # Errors
/// As [`open`].
pub fn parse(root: &Path, file: &Path, bytes: &[u8], place: impl Fn(&str) -> PathBuf) -> Result<Dataset, Error> {
    let wrong = |reason: String| Error::Labels { path: file.to_owned(), reason };
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(bytes);
    let header = reader.headers().map_err(|e| wrong(e.to_string()))?.clone();
    let column = |name: &str| header.iter().position(|h| h.eq_ignore_ascii_case(name));
    let needed = |name: &str| column(name).ok_or_else(|| wrong(format!("its first line has no column `{name}`")));
    let (of_path, of_label, of_split) = (needed("path")?, needed("label")?, column("split"));
    let mut said: BTreeMap<PathBuf, Said> = BTreeMap::new();
    for record in reader.records() {
        let record = record.map_err(|e| wrong(e.to_string()))?;
        let line = record.position().map_or(0, csv::Position::line);
        let cell = |i: usize| record.get(i).unwrap_or_default();
        let path = place(cell(of_path));
        if !path.is_file() {
            return Err(wrong(format!("line {line} names {}, which is not there", path.display())));
        }
        let split = of_split.map_or("", cell);
        if !["", "train", "val", "test"].contains(&split) {
            return Err(wrong(format!("line {line} has the split `{split}`; splits are train, val and test")));
        }
        if cell(of_label).is_empty() {
            return Err(wrong(format!("line {line} has no label")));
        }
        let entry = said.entry(path).or_default();
        if !entry.labels.is_empty() && entry.split != split {
            return Err(wrong(format!(
                "line {line} puts an image into the split `{split}` that was in `{}`",
                entry.split
            )));
        }
        entry.split = split.to_owned();
        entry.labels.insert(cell(of_label).to_owned());
    }
    if said.is_empty() {
        return Err(Error::Empty(root.to_owned()));
    }
    let names: BTreeSet<&String> = said.values().flat_map(|s| &s.labels).collect();
    let classes: Vec<String> = names.into_iter().cloned().collect();
    let number = |name: &String| classes.binary_search(name).expect("all names were collected");
    let several = said.values().any(|s| s.labels.len() > 1);
    let split = |name: &str| -> Option<Images> {
        let of: Vec<_> =
            said.iter().filter(|(_, s)| s.split == name || (name == "train" && s.split.is_empty())).collect();
        let tags: Vec<Vec<usize>> = of.iter().map(|(_, s)| s.labels.iter().map(number).collect()).collect();
        let paths = of.iter().map(|(path, _)| (*path).clone()).collect();
        let images = match several {
            true => Images::files(paths, None).tagged(tags),
            false => Images::files(paths, Some(tags.into_iter().flatten().collect())),
        };
        (!images.is_empty()).then_some(images)
    };
    let (val, test) = (split("val"), split("test"));
    let train = split("train").ok_or_else(|| wrong("no line is of the split train".into()))?;
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
    fn one_label_an_image_or_several() {
        let one = folder("path,label,split\na.png,cat,train\n\"b, c.png\",dog,test\n");
        let data = open(one.path()).unwrap().unwrap();
        assert_eq!(
            (data.classes.len(), data.train.labels(), data.test.unwrap().labels()),
            (2, Some(&[0][..]), Some(&[1][..]))
        );
        let several = folder("Label, Path\ncat,a.png\ndog,a.png\ndog,\"b, c.png\"\n");
        let data = open(&several.path().join(FILE)).unwrap().unwrap();
        assert_eq!(data.train.labels(), None);
        assert_eq!(data.train.tags().unwrap(), [vec![0, 1], vec![1]]);
        assert_eq!(data.train.subset(&[1]).tags().unwrap(), [vec![1]]);
    }

    #[test]
    fn a_line_that_is_wrong_is_named() {
        for (csv, words) in [
            ("file,label\na.png,cat\n", "no column `path`"),
            ("path,label\nz.png,cat\n", "line 2 names"),
            ("path,label,split\na.png,cat,dev\n", "splits are train, val and test"),
            ("path,label\na.png,\n", "line 2 has no label"),
            ("path,label,split\na.png,cat,train\na.png,dog,test\n", "line 3 puts an image"),
        ] {
            let error = open(folder(csv).path()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}

//! Labels that a person gave to images of an embeddings file: a CSV file `path,label`, by which
//! they outlive the embeddings.

use std::{collections::HashMap, fs, io, path::Path};

use crate::atomic_write;

/// Reads the labels of the images at `paths`, as (row, label). Labels of other images are left out.
/// A missing file has no labels.
///
/// # Errors
/// The file cannot be read, or is not a table of two columns.
pub fn load(file: &Path, paths: &[String]) -> io::Result<Vec<(usize, String)>> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let rows: HashMap<&str, usize> = paths.iter().enumerate().map(|(row, path)| (path.as_str(), row)).collect();
    let mut labels = Vec::new();
    for record in csv::Reader::from_reader(&text[..]).records() {
        let record = record.map_err(io::Error::other)?;
        let (Some(path), Some(label)) = (record.get(0), record.get(1)) else {
            return Err(io::Error::other("it has fewer than two columns"));
        };
        labels.extend(rows.get(path).map(|row| (*row, label.to_owned())));
    }
    Ok(labels)
}

/// Replaces the labels of the images at `paths`. Labels of other images in the file are kept.
///
/// # Errors
/// The file cannot be read or written.
pub fn save(file: &Path, paths: &[String], labels: &[(usize, &str)]) -> io::Result<()> {
    let known: HashMap<&str, usize> = paths.iter().enumerate().map(|(row, path)| (path.as_str(), row)).collect();
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(["path", "label"]).map_err(io::Error::other)?;
    if file.exists() {
        for record in csv::Reader::from_reader(&fs::read(file)?[..]).records() {
            let record = record.map_err(io::Error::other)?;
            if record.get(0).is_some_and(|path| !known.contains_key(path)) {
                writer.write_record(&record).map_err(io::Error::other)?;
            }
        }
    }
    for (row, label) in labels {
        writer.write_record([paths[*row].as_str(), label]).map_err(io::Error::other)?;
    }
    let bytes = writer.into_inner().map_err(|error| io::Error::other(error.to_string()))?;
    atomic_write::write_whole(file, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_survive_and_those_of_other_images_stay() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("labels.csv");
        let paths: Vec<String> = ["a.png", "b, \"c\".png", "d.png"].map(str::to_owned).into();
        assert_eq!(load(&file, &paths).unwrap(), []);
        save(&file, &paths, &[(1, "good, better"), (2, "bad")]).unwrap();
        let all = vec![(1, "good, better".to_owned()), (2, "bad".to_owned())];
        assert_eq!(load(&file, &paths).unwrap(), all);
        save(&file, &paths[2..], &[(0, "best")]).unwrap();
        assert_eq!(load(&file, &paths).unwrap(), [(1, "good, better".to_owned()), (2, "best".to_owned())]);
        save(&file, &paths[2..], &[]).unwrap();
        assert_eq!(load(&file, &paths).unwrap(), all[..1]);
        fs::write(&file, "path\nx\n").unwrap();
        assert!(load(&file, &paths).is_err());
    }
}

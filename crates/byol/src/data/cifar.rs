//! Binary files of CIFAR-10 and CIFAR-100 (Krizhevsky 2009): records of one label byte (CIFAR-100:
//! two, coarse and fine) and 3072 pixel bytes, a red, a green and a blue plane of 32×32 each.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{CHANNELS, Dataset, Error, Image, Images, Unused, folder};

const SIDE: usize = 32;
const PIXELS: usize = 3 * SIDE * SIDE;

/// Opens `root` if it, or the folder of the unpacked archive in it, contains CIFAR files.
///
/// # Errors
/// [`Error::Malformed`], [`Error::Read`].
pub fn open(root: &Path) -> Result<Option<Dataset>, Error> {
    for folder in [root.to_owned(), root.join("cifar-10-batches-bin"), root.join("cifar-100-binary")] {
        let all = (1..=5).map(|i| folder.join(format!("data_batch_{i}.bin")));
        let (batches, missing): (Vec<PathBuf>, Vec<PathBuf>) = all.partition(|p| p.is_file());
        let train = folder.join("train.bin");
        let dataset = if !batches.is_empty() {
            read(root, &folder, "CIFAR-10", &batches, "test_batch.bin", "batches.meta.txt", 1)?
        } else if train.is_file() {
            read(root, &folder, "CIFAR-100", &[train], "test.bin", "fine_label_names.txt", 2)?
        } else {
            continue;
        };
        let mut unused = folder::images_beside(root, "CIFAR files")?;
        if !batches.is_empty() {
            let name = |path: &PathBuf| path.strip_prefix(root).unwrap_or(path).display().to_string();
            let reason = || "missing beside the other batches".to_owned();
            unused.extend(missing.iter().map(|path| Unused { name: name(path), count: 0, reason: reason() }));
        }
        return Ok(Some(Dataset { unused, ..dataset }));
    }
    Ok(None)
}

fn read(
    root: &Path,
    folder: &Path,
    kind: &'static str,
    train: &[PathBuf],
    test: &str,
    names: &str,
    label_bytes: usize,
) -> Result<Dataset, Error> {
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    for path in train {
        let (more_images, more_labels) = file(path, kind, label_bytes)?;
        images.extend(more_images);
        labels.extend(more_labels);
    }
    let test = folder.join(test);
    let test = if test.is_file() { Some(file(&test, kind, label_bytes)?) } else { None };
    let n_classes = labels.iter().chain(test.iter().flat_map(|t| &t.1)).max().map_or(0, |m| m + 1);
    let listed_names: Vec<String> = fs::read_to_string(folder.join(names))
        .map(|text| text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect())
        .unwrap_or_default();
    let classes = (0..n_classes.max(listed_names.len()))
        .map(|i| listed_names.get(i).cloned().unwrap_or_else(|| i.to_string()))
        .collect();
    let test = test.map(|(images, labels)| Images::memory(images, Some(labels)));
    Ok(Dataset {
        root: root.to_owned(),
        kind: kind.into(),
        classes,
        train: Images::memory(images, Some(labels)),
        held_out: test.clone(),
        test,
        skipped: Vec::new(),
        column: None,
        unused: Vec::new(),
    })
}

fn file(path: &Path, kind: &'static str, label_bytes: usize) -> Result<(Vec<Image>, Vec<usize>), Error> {
    let bytes = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    records(&bytes, label_bytes).map_err(|reason| Error::Malformed { path: path.to_owned(), kind, reason })
}

/// Parses images and labels from a file's bytes. The last label byte of a record is the class.
///
/// # Errors
/// The reason if the bytes are not complete records.
pub fn records(bytes: &[u8], label_bytes: usize) -> Result<(Vec<Image>, Vec<usize>), String> {
    let record = label_bytes + PIXELS;
    if bytes.is_empty() || !bytes.len().is_multiple_of(record) {
        return Err(format!("{} bytes are not a multiple of the record length {record}", bytes.len()));
    }
    let parse_record = |r: &[u8]| {
        let planes = &r[label_bytes..];
        let plane = SIDE * SIDE;
        let pixels = (0..plane).flat_map(|p| [planes[p], planes[plane + p], planes[2 * plane + p]]).collect();
        (Image { height: SIDE, width: SIDE, channels: CHANNELS, pixels }, usize::from(r[label_bytes - 1]))
    };
    Ok(bytes.chunks_exact(record).map(parse_record).unzip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_are_interleaved() {
        let mut bytes = vec![7u8];
        bytes.extend((0..PIXELS).map(|i| (i / (SIDE * SIDE)) as u8 * 100 + (i % 50) as u8));
        let (images, labels) = records(&bytes, 1).unwrap();
        assert_eq!(labels, [7]);
        // Plane p holds 100 p + i mod 50, with i counted over the whole record: 1024 mod 50 = 24,
        // 2048 mod 50 = 48.
        assert_eq!(images[0].pixels.to_u8()[..6], [0, 124, 248, 1, 125, 249]);
    }

    #[test]
    fn cifar_100_uses_the_fine_label() {
        let mut bytes = vec![3u8, 42];
        bytes.extend([0; PIXELS]);
        assert_eq!(records(&bytes, 2).unwrap().1, [42]);
    }

    #[test]
    fn rejects_truncated_and_empty_files() {
        assert!(records(&[0; 100], 1).is_err());
        assert!(records(&[], 1).is_err());
    }

    #[test]
    fn reports_missing_batches() {
        let folder = tempfile::tempdir().unwrap();
        for i in [1, 2, 3, 5] {
            fs::write(folder.path().join(format!("data_batch_{i}.bin")), [0; 1 + PIXELS]).unwrap();
        }
        let data = open(folder.path()).unwrap().unwrap();
        assert_eq!(data.train.len(), 4);
        assert_eq!(data.unused[0].to_string(), "data_batch_4.bin: missing beside the other batches");
    }
}

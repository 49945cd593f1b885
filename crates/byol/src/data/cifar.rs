//! CIFAR-10 and CIFAR-100 in their binary form (Krizhevsky 2009): records of one label byte (CIFAR-100: coarse, then fine) and 3072
//! bytes, red plane, green plane, blue plane, each 32×32.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{CHANNELS, Dataset, Error, Image, Images};

const SIDE: usize = 32;
const PIXELS: usize = 3 * SIDE * SIDE;

/// Opens `root` if it, or the archive's own folder in it, holds CIFAR files.
///
/// # Errors
/// [`Error::Packed`], [`Error::Read`].
pub fn open(root: &Path) -> Result<Option<Dataset>, Error> {
    for folder in [root.to_owned(), root.join("cifar-10-batches-bin"), root.join("cifar-100-binary")] {
        let ten: Vec<PathBuf> =
            (1..=5).map(|i| folder.join(format!("data_batch_{i}.bin"))).filter(|p| p.exists()).collect();
        if !ten.is_empty() {
            return read(root, &folder, "CIFAR-10", &ten, "test_batch.bin", "batches.meta.txt", 1).map(Some);
        }
        let hundred = folder.join("train.bin");
        if hundred.exists() {
            return read(root, &folder, "CIFAR-100", &[hundred], "test.bin", "fine_label_names.txt", 2).map(Some);
        }
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
        let (i, l) = file(path, kind, label_bytes)?;
        images.extend(i);
        labels.extend(l);
    }
    let test = folder.join(test);
    let test = if test.exists() { Some(file(&test, kind, label_bytes)?) } else { None };
    let most = labels.iter().chain(test.iter().flat_map(|t| &t.1)).max().map_or(0, |m| m + 1);
    let listed: Vec<String> = fs::read_to_string(folder.join(names))
        .map(|text| text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect())
        .unwrap_or_default();
    let classes =
        (0..most.max(listed.len())).map(|i| listed.get(i).cloned().unwrap_or_else(|| i.to_string())).collect();
    let test = test.map(|(images, labels)| Images::memory(images, Some(labels)));
    Ok(Dataset {
        root: root.to_owned(),
        kind: kind.into(),
        classes,
        train: Images::memory(images, Some(labels)),
        held_out: test.clone(),
        test,
        skipped: Vec::new(),
    })
}

fn file(path: &Path, kind: &'static str, label_bytes: usize) -> Result<(Vec<Image>, Vec<usize>), Error> {
    let bytes = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    records(&bytes, label_bytes).map_err(|reason| Error::Packed { path: path.to_owned(), kind, reason })
}

/// Images and labels of a file's bytes; the last label byte of a record is the class.
///
/// # Errors
/// What is wrong, if the bytes are not whole records.
pub fn records(bytes: &[u8], label_bytes: usize) -> Result<(Vec<Image>, Vec<usize>), String> {
    let record = label_bytes + PIXELS;
    if bytes.is_empty() || !bytes.len().is_multiple_of(record) {
        return Err(format!("{} bytes are not whole records of {record}", bytes.len()));
    }
    let one = |r: &[u8]| {
        let planes = &r[label_bytes..];
        let plane = SIDE * SIDE;
        let pixels = (0..plane).flat_map(|p| [planes[p], planes[plane + p], planes[2 * plane + p]]).collect();
        (Image { height: SIDE, width: SIDE, channels: CHANNELS, pixels }, usize::from(r[label_bytes - 1]))
    };
    Ok(bytes.chunks_exact(record).map(one).unzip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_become_pixels() {
        let mut bytes = vec![7u8];
        bytes.extend((0..PIXELS).map(|i| (i / (SIDE * SIDE)) as u8 * 100 + (i % 50) as u8));
        let (images, labels) = records(&bytes, 1).unwrap();
        assert_eq!(labels, [7]);
        // Plane p, position i holds 100 p + i mod 50 over the whole record: 1024 mod 50 = 24, 2048 mod 50 = 48.
        assert_eq!(images[0].pixels[..6], [0, 124, 248, 1, 125, 249]);
    }

    #[test]
    fn cifar_100_takes_the_fine_label() {
        let mut bytes = vec![3u8, 42];
        bytes.extend([0; PIXELS]);
        assert_eq!(records(&bytes, 2).unwrap().1, [42]);
    }

    #[test]
    fn a_cut_file_is_refused() {
        assert!(records(&[0; 100], 1).is_err());
        assert!(records(&[], 1).is_err());
    }
}

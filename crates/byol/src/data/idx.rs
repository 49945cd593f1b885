//! IDX files (MNIST, Fashion-MNIST, …), optionally gzipped: two zero bytes, type 8 (unsigned byte),
//! number of axes, their lengths as big-endian u32, then the values. Gray images are repeated into
//! three channels.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use flate2::read::GzDecoder;

use super::{CHANNELS, Dataset, Error, Image, Images, decode::MAX_PIXELS, folder};

/// Maximum size of a file after decompression: 2 GiB.
const MAX_BYTES: u64 = 1 << 31;

/// Folders below the root that may contain the files, as downloads leave them.
const FOLDERS: [&str; 5] = ["", "raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw"];

/// Opens `root` if it contains IDX training images, directly or in the folders of a download.
///
/// # Errors
/// [`Error::Malformed`], [`Error::Read`].
pub fn open(root: &Path) -> Result<Option<Dataset>, Error> {
    let folders: Vec<PathBuf> = FOLDERS.iter().map(|name| root.join(name)).collect();
    let Some((folder, images)) = folders.iter().find_map(|f| Some((f, find(f, "train", "images", 3)?))) else {
        return Ok(None);
    };
    let split = |images: &Path, labels: Option<PathBuf>| -> Result<Images, Error> {
        let images = read_images(images)?;
        let labels = labels.map(|path| read_labels(&path, images.len())).transpose()?;
        Ok(Images::memory(images, labels))
    };
    let train = split(&images, find(folder, "train", "labels", 1))?;
    let test = ["t10k", "test"].into_iter().find_map(|stem| Some((stem, find(folder, stem, "images", 3)?)));
    let labels = |stem: &str| {
        let others = ["t10k", "test"].into_iter().filter(|other| *other != stem);
        std::iter::once(stem).chain(others).find_map(|stem| find(folder, stem, "labels", 1))
    };
    let test = test.map(|(stem, path)| split(&path, labels(stem))).transpose()?;
    // Both splits count: a class that only test images have needs a name too.
    let labels = [Some(&train), test.as_ref()].into_iter().flatten().filter_map(Images::labels).flatten();
    let n_classes = labels.max().map_or(0, |m| m + 1);
    Ok(Some(Dataset {
        root: root.to_owned(),
        kind: "IDX files".into(),
        classes: (0..n_classes).map(|i| i.to_string()).collect(),
        train,
        held_out: test.clone(),
        test,
        skipped: Vec::new(),
        column: None,
        unused: folder::images_beside(root, "IDX files")?,
    }))
}

/// Finds a file such as `train-images-idx3-ubyte` or `train-images.idx3-ubyte`, also gzipped.
fn find(folder: &Path, stem: &str, kind: &str, axes: usize) -> Option<PathBuf> {
    let names = ["-", "."].into_iter().flat_map(|separator| {
        let name = format!("{stem}-{kind}{separator}idx{axes}");
        ["-ubyte", ".ubyte", ""].map(|suffix| format!("{name}{suffix}"))
    });
    names.flat_map(|name| [name.clone(), format!("{name}.gz")]).map(|name| folder.join(name)).find(|p| p.is_file())
}

/// Reads a file, decompressed if it is gzipped.
fn read_decompressed(path: &Path) -> Result<Vec<u8>, Error> {
    let unreadable = |source| Error::Read { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(unreadable)?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    let mut out = Vec::new();
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), kind: "gzip", reason };
    GzDecoder::new(&bytes[..]).take(MAX_BYTES + 1).read_to_end(&mut out).map_err(|e| malformed(e.to_string()))?;
    if out.len() as u64 > MAX_BYTES {
        Err(malformed(format!("it decompresses to more than {MAX_BYTES} bytes")))
    } else {
        Ok(out)
    }
}

fn read_images(path: &Path) -> Result<Vec<Image>, Error> {
    let bytes = read_decompressed(path)?;
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), kind: "IDX", reason };
    let (axes, values) = parse(&bytes).map_err(malformed)?;
    let [_, height, width] = axes[..] else { return Err(malformed(format!("{} axes instead of 3", axes.len()))) };
    if height == 0 || width == 0 || height.saturating_mul(width) > MAX_PIXELS {
        return Err(malformed(format!("invalid image size {height} x {width}")));
    }
    let image = |gray: &[u8]| Image {
        height,
        width,
        channels: CHANNELS,
        pixels: gray.iter().flat_map(|g| [*g; CHANNELS]).collect(),
    };
    Ok(values.chunks_exact(height * width).map(image).collect())
}

fn read_labels(path: &Path, n: usize) -> Result<Vec<usize>, Error> {
    let bytes = read_decompressed(path)?;
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), kind: "IDX", reason };
    let (axes, values) = parse(&bytes).map_err(malformed)?;
    if axes != [n] {
        return Err(malformed(format!("labels have shape {axes:?}, but there are {n} images")));
    }
    Ok(values.iter().map(|v| usize::from(*v)).collect())
}

/// Parses the axis lengths and values of an IDX file's bytes.
///
/// # Errors
/// The first problem.
pub fn parse(bytes: &[u8]) -> Result<(Vec<usize>, &[u8]), String> {
    let [0, 0, kind, n_axes, rest @ ..] = bytes else { return Err("missing IDX header".into()) };
    if *kind != 8 {
        return Err(format!("values of type {kind} instead of unsigned bytes"));
    }
    let n_axes = usize::from(*n_axes);
    if rest.len() < 4 * n_axes {
        return Err("the header is truncated".into());
    }
    let (lengths, values) = rest.split_at(4 * n_axes);
    let axes: Vec<usize> =
        lengths.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize).collect();
    let expected = axes.iter().try_fold(1usize, |n, a| n.checked_mul(*a)).ok_or("the axes overflow memory")?;
    if values.len() != expected {
        return Err(format!("{} values instead of the {expected} that the header declares", values.len()));
    }
    Ok((axes, values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parses_a_known_file_and_rejects_truncations() {
        let bytes = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6];
        assert_eq!(parse(&bytes).unwrap(), (vec![2, 3], &[1u8, 2, 3, 4, 5, 6][..]));
        for n in 0..bytes.len() {
            assert!(parse(&bytes[..n]).is_err(), "truncated to {n} bytes");
        }
    }

    #[test]
    fn classes_of_test_images_only_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
        for (split, labels) in [("train", [0u8, 1]), ("t10k", [0, 2])] {
            write(&format!("{split}-images-idx3-ubyte"), &[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 7, 9]);
            write(&format!("{split}-labels-idx1-ubyte"), &[&[0, 0, 8, 1, 0, 0, 0, 2], &labels[..]].concat());
        }
        assert_eq!(open(folder.path()).unwrap().unwrap().classes, ["0", "1", "2"]);
    }

    #[test]
    fn finds_dotted_and_gzipped_names_and_counts_other_images() {
        use std::io::Write;
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("MNIST/raw");
        fs::create_dir_all(&folder).unwrap();
        fs::write(root.path().join("a.png"), "").unwrap();
        let images = [0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 7, 9];
        fs::write(folder.join("train-images.idx3-ubyte"), images).unwrap();
        let labels = fs::File::create(folder.join("train-labels.idx1-ubyte.gz")).unwrap();
        let mut labels = flate2::write::GzEncoder::new(labels, flate2::Compression::default());
        labels.write_all(&[0, 0, 8, 1, 0, 0, 0, 2, 0, 1]).unwrap();
        labels.finish().unwrap();
        fs::write(folder.join("t10k-images.idx3-ubyte"), images).unwrap();
        let data = open(root.path()).unwrap().unwrap();
        assert_eq!((data.train.labels(), data.classes.len()), (Some(&[0, 1][..]), 2));
        assert_eq!(data.unused[0].to_string(), "image files (1): IDX files are read instead (first: a.png)");
        let test = data.test.as_ref().unwrap();
        let error = data.unlabeled(test).to_string();
        assert!(error.contains("the test split of") && error.contains("no file of its labels"), "{error}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes);
        }
    }
}

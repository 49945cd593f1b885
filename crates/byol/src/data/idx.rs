//! IDX files (MNIST, Fashion-MNIST, …), also gzipped: two zero bytes, type 8 (unsigned byte), number of axes, their lengths as big-endian
//! u32, then the values. Grey images are repeated into three channels.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use flate2::read::GzDecoder;

use super::{CHANNELS, Dataset, Error, Image, Images, decode::MOST_PIXELS};

/// The most bytes a file may unpack to: 2 GiB.
const MOST_BYTES: u64 = 1 << 31;

/// Opens `root` if it holds IDX training images.
///
/// # Errors
/// [`Error::Packed`], [`Error::Read`].
pub fn open(root: &Path) -> Result<Option<Dataset>, Error> {
    let find = |stem: &str, what: &str| -> Option<PathBuf> {
        ["-ubyte", ".ubyte", ""]
            .iter()
            .flat_map(|tail| [format!("{stem}-{what}{tail}"), format!("{stem}-{what}{tail}.gz")])
            .map(|n| root.join(n))
            .find(|p| p.is_file())
    };
    let Some(images) = find("train", "images-idx3") else { return Ok(None) };
    let split = |images: &Path, labels: Option<PathBuf>| -> Result<Images, Error> {
        let pixels = images_of(images)?;
        let labels = labels.map(|path| labels_of(&path, pixels.len())).transpose()?;
        Ok(Images::memory(pixels, labels))
    };
    let train = split(&images, find("train", "labels-idx1"))?;
    let test = find("t10k", "images-idx3").or_else(|| find("test", "images-idx3"));
    let test_labels = find("t10k", "labels-idx1").or_else(|| find("test", "labels-idx1"));
    let test = test.map(|path| split(&path, test_labels)).transpose()?;
    // Of both splits: a class that only test images have is named to the user too.
    let labels = [Some(&train), test.as_ref()].into_iter().flatten().filter_map(Images::labels).flatten();
    let most = labels.max().map_or(0, |m| m + 1);
    Ok(Some(Dataset {
        root: root.to_owned(),
        kind: "IDX files".into(),
        classes: (0..most).map(|i| i.to_string()).collect(),
        train,
        held_out: test.clone(),
        test,
        skipped: Vec::new(),
    }))
}

fn unpacked(path: &Path) -> Result<Vec<u8>, Error> {
    let read = |source| Error::Read { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(read)?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    let mut out = Vec::new();
    let packed = |reason: String| Error::Packed { path: path.to_owned(), kind: "gzip", reason };
    GzDecoder::new(&bytes[..]).take(MOST_BYTES + 1).read_to_end(&mut out).map_err(|e| packed(e.to_string()))?;
    if out.len() as u64 > MOST_BYTES {
        Err(packed(format!("it unpacks to more than {MOST_BYTES} bytes")))
    } else {
        Ok(out)
    }
}

fn images_of(path: &Path) -> Result<Vec<Image>, Error> {
    let bytes = unpacked(path)?;
    let wrong = |reason: String| Error::Packed { path: path.to_owned(), kind: "IDX", reason };
    let (axes, values) = parse(&bytes).map_err(wrong)?;
    let [_, height, width] = axes[..] else { return Err(wrong(format!("{} axes, not three", axes.len()))) };
    if height == 0 || width == 0 || height.saturating_mul(width) > MOST_PIXELS {
        return Err(wrong(format!("images of {height} x {width}")));
    }
    let image = |grey: &[u8]| Image {
        height,
        width,
        channels: CHANNELS,
        pixels: grey.iter().flat_map(|g| [*g; CHANNELS]).collect(),
    };
    Ok(values.chunks_exact(height * width).map(image).collect())
}

fn labels_of(path: &Path, n: usize) -> Result<Vec<usize>, Error> {
    let bytes = unpacked(path)?;
    let wrong = |reason: String| Error::Packed { path: path.to_owned(), kind: "IDX", reason };
    let (axes, values) = parse(&bytes).map_err(wrong)?;
    if axes != [n] {
        return Err(wrong(format!("labels of shape {axes:?} for {n} images")));
    }
    Ok(values.iter().map(|v| usize::from(*v)).collect())
}

/// Axes and values of an IDX file's bytes.
///
/// # Errors
/// What is wrong with them.
pub fn parse(bytes: &[u8]) -> Result<(Vec<usize>, &[u8]), String> {
    let [0, 0, kind, n_axes, rest @ ..] = bytes else { return Err("no IDX header".into()) };
    if *kind != 8 {
        return Err(format!("values of type {kind}, not unsigned bytes"));
    }
    let n_axes = usize::from(*n_axes);
    if rest.len() < 4 * n_axes {
        return Err("the header is cut off".into());
    }
    let (lengths, values) = rest.split_at(4 * n_axes);
    let axes: Vec<usize> =
        lengths.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize).collect();
    let want = axes.iter().try_fold(1usize, |n, a| n.checked_mul(*a)).ok_or("axes beyond any memory")?;
    if values.len() != want {
        return Err(format!("{} values where the header says {want}", values.len()));
    }
    Ok((axes, values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_known_file_is_read() {
        let bytes = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6];
        assert_eq!(parse(&bytes).unwrap(), (vec![2, 3], &[1u8, 2, 3, 4, 5, 6][..]));
        for n in 0..bytes.len() {
            assert!(parse(&bytes[..n]).is_err(), "cut to {n}");
        }
    }

    #[test]
    fn a_class_of_the_test_images_alone_has_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
        for (split, labels) in [("train", [0u8, 1]), ("t10k", [0, 2])] {
            write(&format!("{split}-images-idx3-ubyte"), &[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 7, 9]);
            write(&format!("{split}-labels-idx1-ubyte"), &[&[0, 0, 8, 1, 0, 0, 0, 2], &labels[..]].concat());
        }
        assert_eq!(open(folder.path()).unwrap().unwrap().classes, ["0", "1", "2"]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes);
        }
    }
}

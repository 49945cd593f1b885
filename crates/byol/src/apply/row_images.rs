//! Images behind the rows of an embeddings file: files, or images inside packed data (CIFAR, IDX,
//! shards).

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use rayon::prelude::*;

use super::{
    embed::{Items, Split},
    same_image::Signature,
};
use crate::{
    data::{self, Dataset, OpenOptions, decode, decode::DecodeError},
    image::Image,
};

/// Images by the row of their embedding.
#[derive(Debug)]
pub struct RowImages {
    paths: Vec<String>,
    root: Option<PathBuf>,
    /// Real path of `root`, if only files inside it are read.
    confined_to: Option<PathBuf>,
    options: OpenOptions,
    /// Images that are not files of their own, opened at the first such request.
    packed: OnceLock<Option<Packed>>,
}

/// Files that [`RowImages`] may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Any file that the embeddings name.
    AnyFile,
    /// Files inside the data set, not following links out of it.
    InsideData,
}

/// Images that are not files of their own.
#[derive(Debug)]
struct Packed {
    items: Items,
    /// Item of each row; `None` if it is not certain which one it is.
    rows: Vec<Option<usize>>,
}

impl Packed {
    fn open(root: &Path, options: &OpenOptions, paths: &[String]) -> Result<Option<Packed>, data::Error> {
        let dataset = match Dataset::open_with(root, options) {
            Ok(dataset) => dataset,
            Err(data::Error::Missing(_) | data::Error::Empty(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let items = Items::new(dataset, Split::All);
        let mut named: HashMap<String, Vec<usize>> = HashMap::new();
        for i in (0..items.len()).filter(|i| items.path(*i).is_none()) {
            named.entry(items.name(i)).or_default().push(i);
        }
        // Names may repeat. Their order tells them apart, unless the rows are only some of them.
        let mut wanted: HashMap<&str, Vec<usize>> = HashMap::new();
        paths.iter().enumerate().for_each(|(row, path)| wanted.entry(path).or_default().push(row));
        let mut rows = vec![None; paths.len()];
        for (path, wanted) in wanted {
            if let Some(found) = named.get(path).filter(|found| found.len() == wanted.len()) {
                wanted.iter().zip(found).for_each(|(row, item)| rows[*row] = Some(*item));
            }
        }
        Ok(Some(Packed { items, rows }))
    }
}

/// Reduced images of the rows.
#[derive(Debug)]
pub struct Signatures {
    /// Reduced image of each row; `None` if it cannot be read.
    pub rows: Vec<Option<Signature>>,
    /// First image that cannot be read, with the reason.
    pub first_unreadable: Option<String>,
}

/// Images that are read between two calls of `on_progress`.
const BLOCK: usize = 64;

impl RowImages {
    /// Images of these paths, which are those of an embeddings file. Images inside packed data are
    /// found in the data set `root`, which is opened with `options`.
    pub fn new(paths: Vec<String>, root: Option<PathBuf>, options: OpenOptions, access: Access) -> RowImages {
        let real = || root.as_ref().and_then(|root| std::fs::canonicalize(root).ok()).unwrap_or_default();
        let confined_to = (access == Access::InsideData).then(real);
        RowImages { paths, root, confined_to, options, packed: OnceLock::new() }
    }

    /// Paths of the images.
    pub fn paths(&self) -> &[String] {
        &self.paths
    }

    /// Data set of the images.
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// Loads the image of a row from its file or from packed data.
    ///
    /// # Errors
    /// [`data::Error::Image`] if it is missing or damaged; other errors concern the machine or the
    /// data set.
    pub fn get(&self, row: usize) -> Result<Arc<Image>, data::Error> {
        let name = &self.paths[row];
        let missing = || DecodeError::Read(io::ErrorKind::NotFound.into());
        let failed = |source| match source {
            DecodeError::Read(source) if !data::is_image_error(&source) => {
                data::Error::Read { path: PathBuf::from(name), source }
            }
            source => data::Error::Image { name: name.clone(), source },
        };
        match self.file(name).map_err(|e| failed(DecodeError::Read(e)))? {
            Some(file) => {
                let levels = &self.options.levels;
                // Links may lead to other names, which do not match a pattern.
                let path = if levels.files().is_empty() { file } else { PathBuf::from(name) };
                if let [first, others @ ..] = levels.files() {
                    for other in others.iter().filter_map(|other| first.sibling(&path, other)) {
                        let other = other.to_str().map_or(Ok(None), |other| self.file(other));
                        other
                            .and_then(|file| file.ok_or(io::ErrorKind::NotFound.into()))
                            .map_err(|e| failed(e.into()))?;
                    }
                }
                decode::file(&path, levels).map(Arc::new).map_err(failed)
            }
            None => {
                let packed = if is_in_packed_data(name) { self.packed()? } else { None };
                let item = packed.and_then(|packed| Some((packed, packed.rows[row]?)));
                let (packed, item) = item.ok_or_else(|| failed(missing()))?;
                packed.items.get(item)
            }
        }
    }

    /// True if the images are spectrograms of sounds.
    pub fn are_sounds(&self) -> bool {
        self.options.levels.sound.is_some()
    }

    /// Bytes of the file of a sound; `None` for images, and for a file that does not exist or may
    /// not be read.
    pub fn sound(&self, row: usize) -> Option<Vec<u8>> {
        let file = self.are_sounds().then(|| self.file(&self.paths[row]).ok().flatten())??;
        std::fs::read(file).ok()
    }

    /// Returns the file of an image, if there is one that may be read.
    fn file(&self, name: &str) -> io::Result<Option<PathBuf>> {
        let real = match std::fs::canonicalize(name) {
            Ok(real) => real,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => return Ok(None),
            Err(e) => return Err(e),
        };
        let may_be_read = match &self.confined_to {
            None => true,
            // Without a data folder, no file is inside it.
            Some(folder) => folder.is_absolute() && real.starts_with(folder),
        };
        Ok(Some(real).filter(|real| may_be_read && real.is_file()))
    }

    /// Images that are not files of their own, if there are any.
    fn packed(&self) -> Result<Option<&Packed>, data::Error> {
        if let Some(packed) = self.packed.get() {
            return Ok(packed.as_ref());
        }
        // Opened before the cell is locked: opening uses threads, which may come back here.
        let opened = match &self.root {
            Some(root) if !root.as_os_str().is_empty() => Packed::open(root, &self.options, &self.paths)?,
            _ => None,
        };
        Ok(self.packed.get_or_init(|| opened).as_ref())
    }

    /// Reduces all images for comparisons. `on_progress` receives the fraction done, up to 1.
    ///
    /// # Errors
    /// Those of [`RowImages::get`] but [`data::Error::Image`].
    pub fn signatures(&self, mut on_progress: impl FnMut(f64)) -> Result<Signatures, data::Error> {
        let n = self.paths.len();
        // Opened once here, rather than by several threads.
        if self.paths.iter().any(|name| is_in_packed_data(name)) {
            self.packed()?;
        }
        let (mut rows, mut first_unreadable) = (Vec::with_capacity(n), None);
        while rows.len() < n {
            let block = rows.len()..(rows.len() + BLOCK).min(n);
            let read = block.into_par_iter().map(|row| self.get(row).map(|image| Signature::new(&image)));
            for signature in read.collect::<Vec<_>>() {
                rows.push(match signature {
                    Ok(signature) => Some(signature),
                    Err(error @ data::Error::Image { .. }) => {
                        first_unreadable.get_or_insert_with(|| error.to_string());
                        None
                    }
                    Err(error) => return Err(error),
                });
            }
            on_progress(rows.len() as f64 / n as f64);
        }
        Ok(Signatures { rows, first_unreadable })
    }
}

/// True for the name of an image inside packed data, which is not an absolute path.
fn is_in_packed_data(name: &str) -> bool {
    !Path::new(name).is_absolute()
}

//! Data sets, and images as arrays.

use std::path::PathBuf;

use byol::{Image, data, data::Images};
use numpy::{PyArray1, PyArray3, PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;
use rayon::prelude::*;

use crate::{
    encoder::Encoder,
    errors::{self, detached},
};

/// An image: a file, or its pixels, `uint8 [H, W, 3]`.
#[derive(FromPyObject)]
pub enum Item<'py> {
    Pixels(PyReadonlyArray3<'py, u8>),
    File(PathBuf),
}

/// An image that is independent of the interpreter.
pub enum Source {
    Pixels(Image),
    File(PathBuf),
}

impl Item<'_> {
    /// Copies the pixels.
    pub fn to_source(&self) -> PyResult<Source> {
        Ok(match self {
            Item::File(path) => Source::File(path.clone()),
            Item::Pixels(array) => Source::Pixels(to_image(array)?),
        })
    }
}

/// Largest number of classes.
const MAX_CLASSES: usize = 1 << 16;

/// Decodes the images of a split.
fn read(py: Python, items: &[Item], labels: &Option<Vec<usize>>) -> PyResult<Vec<Image>> {
    if let Some(labels) = labels.as_ref().filter(|labels| labels.len() != items.len()) {
        return Err(errors::data(format!("{} labels for {} images", labels.len(), items.len())));
    }
    let sources: Vec<Source> = items.iter().map(Item::to_source).collect::<PyResult<_>>()?;
    let decode = |source: Source| source.decode(&data::Levels::default());
    detached(py, || sources.into_par_iter().map(decode).collect())
}

fn to_image(array: &PyReadonlyArray3<u8>) -> PyResult<Image> {
    let &[height, width, channels] = array.shape() else { unreachable!("the array has three dimensions") };
    if channels != 3 || height == 0 || width == 0 {
        return Err(errors::data(format!(
            "an array of shape [{height}, {width}, {channels}] is not an RGB image\nhint: pass arrays of shape [H, W, 3]"
        )));
    }
    Ok(Image { height, width, channels, pixels: array.as_array().iter().copied().collect() })
}

/// Images of a data set, with its classes and splits.
#[pyclass(frozen, module = "byol._byol")]
pub struct Dataset {
    pub inner: byol::Dataset,
}

#[pymethods]
impl Dataset {
    /// Opens a folder of images, CIFAR or IDX files, or shards; for an encoder, with the levels
    /// that it was trained with.
    #[staticmethod]
    fn open(py: Python, path: PathBuf, column: Option<String>, encoder: Option<&Encoder>) -> PyResult<Dataset> {
        let levels = encoder.map_or_else(data::Levels::default, |encoder| encoder.inner.spec.levels);
        let options = data::OpenOptions { column, levels };
        let open = || byol::Dataset::open_with(path, &options).map_err(errors::data);
        Ok(Dataset { inner: detached(py, open)? })
    }

    /// Reads images into memory: a training split and, unless it is empty, a test split.
    #[staticmethod]
    fn from_items(
        py: Python,
        train: Vec<Item>,
        labels: Option<Vec<usize>>,
        test: Vec<Item>,
        test_labels: Option<Vec<usize>>,
    ) -> PyResult<Dataset> {
        if train.is_empty() {
            return Err(errors::data("no images"));
        }
        let [train, test] = [read(py, &train, &labels)?, read(py, &test, &test_labels)?];
        let classes = labels.iter().chain(&test_labels).flatten().max().map_or(0, |max| max + 1);
        if classes > MAX_CLASSES {
            return Err(errors::data(format!(
                "label {} is out of range\nhint: number the classes from 0, up to {}",
                classes - 1,
                MAX_CLASSES - 1
            )));
        }
        let mut inner = byol::Dataset::from_images(train, labels);
        inner.test = (!test.is_empty()).then(|| Images::memory(test, test_labels));
        inner.classes = (0..classes).map(|class| class.to_string()).collect();
        Ok(Dataset { inner })
    }

    /// Generated images of six patterns, those of `byol demo`.
    #[staticmethod]
    fn synthetic(py: Python, n: usize, n_test: usize, seed: u64) -> PyResult<Dataset> {
        Ok(Dataset { inner: detached(py, || Ok(data::synthetic::dataset(seed, n, n_test)))? })
    }

    #[getter]
    fn classes(&self) -> Vec<String> {
        self.inner.classes.clone()
    }

    /// Number of images of a split; `None` if there is no such split.
    fn size(&self, split: &str) -> PyResult<Option<usize>> {
        Ok(self.find(split)?.map(Images::len))
    }

    /// Labels of a split, if it has any.
    fn labels<'py>(&self, py: Python<'py>, split: &str) -> PyResult<Option<Bound<'py, PyArray1<i64>>>> {
        let labels = self.split(split)?.labels();
        Ok(labels.map(|labels| PyArray1::from_iter(py, labels.iter().map(|label| *label as i64))))
    }

    /// Names of the images of a split.
    fn names(&self, split: &str) -> PyResult<Vec<String>> {
        let images = self.split(split)?;
        Ok((0..images.len()).map(|i| images.name(i)).collect())
    }

    /// Image `i` of a split: `uint8 [H, W, C]`.
    fn image<'py>(&self, py: Python<'py>, split: &str, i: usize) -> PyResult<Bound<'py, PyArray3<u8>>> {
        let images = self.split(split)?;
        if i >= images.len() {
            return Err(pyo3::exceptions::PyIndexError::new_err(format!(
                "image {i} of a split of {} images",
                images.len()
            )));
        }
        let image = py.detach(|| images.get(i).map_err(errors::data))?;
        let [height, width, channels] = [image.height, image.width, image.channels];
        let value = |y: usize, x: usize, c: usize| image.pixels[(y * width + x) * channels + c];
        let array = numpy::ndarray::Array3::from_shape_fn([height, width, channels], |(y, x, c)| value(y, x, c));
        Ok(PyArray3::from_owned_array(py, array))
    }
}

impl Dataset {
    fn find(&self, split: &str) -> PyResult<Option<&Images>> {
        match split {
            "train" => Ok(Some(&self.inner.train)),
            // Without a `val` split, pretraining monitors the test split.
            "val" => {
                let is_test = |val: &&Images| self.inner.test.as_ref().is_some_and(|test| val.is_same(test));
                Ok(self.inner.held_out.as_ref().filter(|val| !is_test(val)))
            }
            "test" => Ok(self.inner.test.as_ref()),
            other => Err(errors::data(format!("unknown split `{other}` (expected train, val or test)"))),
        }
    }

    /// Images of a split.
    pub fn split(&self, split: &str) -> PyResult<&Images> {
        self.find(split)?.ok_or_else(|| errors::data(format!("the data set has no {split} split")))
    }
}

impl Source {
    /// The decoded image.
    pub fn decode(self, levels: &data::Levels) -> PyResult<Image> {
        match self {
            Source::Pixels(image) => Ok(image),
            Source::File(path) => {
                let decoded = data::decode::file(&path, levels);
                decoded.map_err(|error| errors::data(format!("cannot read {}: {error}", path.display())))
            }
        }
    }
}

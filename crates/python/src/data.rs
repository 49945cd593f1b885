//! Data sets, and images as arrays.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use byol::{
    Image, Pixels,
    data::{self, ImageSource, Images, MAX_CHANNELS},
};
use numpy::{PyArray1, PyArray3, PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;
use rayon::prelude::*;

use crate::{
    encoder::Encoder,
    errors::{self, detached},
};

/// An image: a file, or its pixels, `uint8 [H, W, C]` or `uint16`.
#[derive(FromPyObject)]
pub enum Item<'py> {
    Pixels(PyReadonlyArray3<'py, u8>),
    Pixels16(PyReadonlyArray3<'py, u16>),
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
            Item::Pixels16(array) => Source::Pixels(to_image(array)?),
        })
    }
}

/// Largest number of classes.
const MAX_CLASSES: usize = 1 << 16;

/// Decodes the images of a split.
fn read(py: Python, items: &[Item], labels: &Option<Vec<usize>>) -> PyResult<Vec<Image>> {
    check_labels(items.len(), labels)?;
    let sources: Vec<Source> = items.iter().map(Item::to_source).collect::<PyResult<_>>()?;
    let decode = |source: Source| source.decode(&data::Levels::default());
    detached(py, || sources.into_par_iter().map(decode).collect())
}

fn check_labels(n: usize, labels: &Option<Vec<usize>>) -> PyResult<()> {
    match labels.as_ref().filter(|labels| labels.len() != n) {
        Some(labels) => Err(errors::data_text(format!("{} labels for {n} images", labels.len()))),
        None => Ok(()),
    }
}

/// Names of the classes: their numbers.
fn class_names(labels: &Option<Vec<usize>>, test_labels: &Option<Vec<usize>>) -> PyResult<Vec<String>> {
    let classes = labels.iter().chain(test_labels).flatten().max().map_or(0, |max| max.saturating_add(1));
    if classes > MAX_CLASSES {
        return Err(errors::data_text(format!(
            "label {} is out of range\nhint: number the classes from 0, up to {}",
            classes - 1,
            MAX_CLASSES - 1
        )));
    }
    Ok((0..classes).map(|class| class.to_string()).collect())
}

fn to_image<T: numpy::Element + Copy>(array: &PyReadonlyArray3<T>) -> PyResult<Image>
where
    Pixels: From<Vec<T>>,
{
    let &[height, width, channels] = array.shape() else { unreachable!("the array has three dimensions") };
    if !(1..=MAX_CHANNELS).contains(&channels) || height == 0 || width == 0 {
        return Err(errors::data_text(format!(
            "an array of shape [{height}, {width}, {channels}] is not an image\n\
             hint: pass arrays of shape [H, W, C] with C up to {MAX_CHANNELS}"
        )));
    }
    let values: Vec<T> = array.as_array().iter().copied().collect();
    Ok(Image { height, width, channels, pixels: values.into() })
}

/// Images of a Python object, read when they are needed.
struct OnDemand {
    /// Function of the position that returns an [`Item`].
    read: Arc<Py<PyAny>>,
    /// Channels of the first image, once they are needed.
    channels: OnceLock<usize>,
    calls: Arc<Calls>,
}

/// Channels of the first image. `None` if it cannot be read, which is an error of the command that
/// uses it.
fn first_channels(read: &Arc<Py<PyAny>>) -> Option<usize> {
    let first = |py: Python| read.bind(py).call1((0,))?.extract::<Item>()?.to_source();
    match Python::attach(first).ok()? {
        Source::Pixels(image) => Some(image.channels),
        Source::File(_) => Some(data::CHANNELS),
    }
}

/// Running calls of the Python object.
#[derive(Default)]
struct Calls {
    running: AtomicUsize,
    are_over: AtomicBool,
}

/// A call of the Python object, until it is dropped.
struct Call<'a>(&'a Calls);

impl Calls {
    /// `None` after [`Session::end`].
    fn begin(&self) -> Option<Call<'_>> {
        // First, so that the end of a session does not overlook it.
        self.running.fetch_add(1, Ordering::SeqCst);
        let call = Call(self);
        (!self.are_over.load(Ordering::SeqCst)).then_some(call)
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl fmt::Debug for OnDemand {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("OnDemand").finish_non_exhaustive()
    }
}

impl ImageSource for OnDemand {
    fn channels(&self) -> usize {
        if let Some(known) = self.channels.get() {
            return *known;
        }
        let first = self.calls.begin().and_then(|_call| first_channels(&self.read));
        first.map_or(data::CHANNELS, |first| *self.channels.get_or_init(|| first))
    }

    fn get(&self, i: usize) -> io::Result<Image> {
        let Some(_call) = self.calls.begin() else { return Err(io::Error::other("the run has ended")) };
        let read = |py: Python| self.read.bind(py).call1((i,))?.extract::<Item>()?.to_source();
        // The exception is raised again by `errors`.
        let source = Python::attach(read).map_err(io::Error::other)?;
        // Without the interpreter lock.
        match source {
            Source::Pixels(image) => {
                self.channels.get_or_init(|| image.channels);
                Ok(image)
            }
            Source::File(path) => data::decode::file(&path, &data::Levels::default()).map_err(|error| {
                let text = unreadable(&path, &error);
                match error {
                    data::DecodeError::Read(source) => io::Error::new(source.kind(), text),
                    _ => io::Error::new(io::ErrorKind::InvalidData, text),
                }
            }),
        }
    }
}

fn unreadable(path: &Path, error: &data::DecodeError) -> String {
    format!("cannot read {}: {error}", path.display())
}

/// Images of a data set, with its classes and splits.
#[pyclass(frozen, module = "byol._byol")]
pub struct Dataset {
    pub inner: byol::Dataset,
    /// Functions of the images of the training and the test split, if they are read on demand.
    on_demand: Option<[Option<Arc<Py<PyAny>>>; 2]>,
}

/// A data set whose images are read only until the session ends.
pub struct Session {
    pub dataset: byol::Dataset,
    calls: Arc<Calls>,
}

impl Session {
    /// Waits for the calls that are running, unless Ctrl-C is pressed; none begins afterwards.
    pub fn end(&self, py: Python) -> PyResult<()> {
        self.calls.are_over.store(true, Ordering::SeqCst);
        while self.calls.running.load(Ordering::SeqCst) > 0 {
            py.detach(|| thread::sleep(Duration::from_millis(5)));
            py.check_signals()?;
        }
        Ok(())
    }
}

#[pymethods]
impl Dataset {
    /// Opens a folder of images, CIFAR or IDX files, or shards; for an encoder, with the levels
    /// that it was trained with. `channels` is the value of the flag `--channels`.
    #[staticmethod]
    fn open(
        py: Python,
        path: PathBuf,
        column: Option<String>,
        encoder: Option<&Encoder>,
        channels: Option<&str>,
    ) -> PyResult<Dataset> {
        let channels = channels.map(str::parse).transpose().map_err(|e: String| errors::data_text(e))?;
        let options = match (channels, encoder) {
            (None, Some(encoder)) => data::OpenOptions::as_trained(encoder.inner.spec.levels.clone()),
            (channels, _) => data::OpenOptions {
                levels: data::Levels { channels, ..data::Levels::default() },
                ..data::OpenOptions::default()
            },
        };
        let options = data::OpenOptions { column, ..options };
        let open = || byol::Dataset::open_with(path, &options).map_err(errors::data);
        Ok(detached(py, open)?.into())
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
            return Err(errors::data_text("no images"));
        }
        let [train, test] = [read(py, &train, &labels)?, read(py, &test, &test_labels)?];
        let expected = train[0].channels;
        if let Some(other) = train.iter().chain(&test).find(|image| image.channels != expected) {
            return Err(errors::data_text(format!(
                "images of {expected} and of {} channels\nhint: pass images with the same number of channels",
                other.channels
            )));
        }
        let classes = class_names(&labels, &test_labels)?;
        let mut inner = byol::Dataset::from_images(train, labels);
        inner.test = (!test.is_empty()).then(|| Images::memory(test, test_labels));
        Ok(byol::Dataset { classes, ..inner }.into())
    }

    /// Images that are read when they are needed: a function of the position and the number of
    /// images, for the training split and, if there is one, for the test split.
    #[staticmethod]
    fn from_function(
        train: (Py<PyAny>, usize),
        labels: Option<Vec<usize>>,
        test: Option<(Py<PyAny>, usize)>,
        test_labels: Option<Vec<usize>>,
    ) -> PyResult<Dataset> {
        if train.1 == 0 {
            return Err(errors::data_text("no images"));
        }
        check_labels(train.1, &labels)?;
        check_labels(test.as_ref().map_or(0, |(_, n)| *n), &test_labels)?;
        let classes = class_names(&labels, &test_labels)?;
        let test = test.filter(|(_, n)| *n > 0);
        let (n, n_test) = (train.1, test.as_ref().map(|(_, n)| *n));
        let functions = [Some(Arc::new(train.0)), test.map(|(read, _)| Arc::new(read))];
        let source = |i: usize| {
            let read = functions[i].clone().expect("the split has a function");
            Arc::new(OnDemand { read, channels: OnceLock::new(), calls: Arc::default() })
        };
        let mut inner = byol::Dataset::from_source(source(0), n, labels);
        inner.test = n_test.map(|n| Images::custom(source(1), n, test_labels));
        Ok(Dataset { inner: byol::Dataset { classes, ..inner }, on_demand: Some(functions) })
    }

    /// Generated images of six patterns, those of `byol demo`.
    #[staticmethod]
    fn synthetic(py: Python, n: usize, n_test: usize, seed: u64) -> PyResult<Dataset> {
        Ok(detached(py, || Ok(data::synthetic::dataset(seed, n, n_test)))?.into())
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
        let image = detached(py, || images.get(i).map_err(errors::data))?;
        let [height, width, channels] = [image.height, image.width, image.channels];
        let pixels = image.pixels.to_u8();
        let value = |y: usize, x: usize, c: usize| pixels[(y * width + x) * channels + c];
        let array = numpy::ndarray::Array3::from_shape_fn([height, width, channels], |(y, x, c)| value(y, x, c));
        Ok(PyArray3::from_owned_array(py, array))
    }
}

impl From<byol::Dataset> for Dataset {
    fn from(inner: byol::Dataset) -> Dataset {
        Dataset { inner, on_demand: None }
    }
}

impl Dataset {
    /// The data set for one run. Threads that outlive the run do not call the Python
    /// object after the session has ended.
    pub fn session(&self) -> Session {
        let calls = Arc::<Calls>::default();
        let mut dataset = self.inner.clone();
        if let Some([Some(train), test]) = &self.on_demand {
            let images = |read: &Arc<Py<PyAny>>, images: &Images| {
                let source = OnDemand { read: read.clone(), channels: OnceLock::new(), calls: calls.clone() };
                Images::custom(Arc::new(source), images.len(), images.labels().map(<[usize]>::to_vec))
            };
            dataset.train = images(train, &dataset.train);
            dataset.test = test.as_ref().zip(dataset.test.as_ref()).map(|(read, test)| images(read, test));
        }
        Session { dataset, calls }
    }

    fn find(&self, split: &str) -> PyResult<Option<&Images>> {
        match split {
            "train" => Ok(Some(&self.inner.train)),
            // Without a `val` split, pretraining monitors the test split.
            "val" => {
                let is_test = |val: &&Images| self.inner.test.as_ref().is_some_and(|test| val.is_same(test));
                Ok(self.inner.held_out.as_ref().filter(|val| !is_test(val)))
            }
            "test" => Ok(self.inner.test.as_ref()),
            other => Err(errors::data_text(format!("unknown split `{other}` (expected train, val or test)"))),
        }
    }

    /// Images of a split.
    pub fn split(&self, split: &str) -> PyResult<&Images> {
        self.find(split)?.ok_or_else(|| errors::data_text(format!("the data set has no {split} split")))
    }
}

impl Source {
    /// The decoded image.
    pub fn decode(self, levels: &data::Levels) -> PyResult<Image> {
        match self {
            // As the same values in a file.
            Source::Pixels(_) if levels.sound.is_some() => {
                let reason = "the encoder was trained on sounds, not on images".into();
                Err(errors::data(data::Error::OtherInput { reason, hint: "pass the files of sounds" }))
            }
            Source::Pixels(image) => {
                let (found, selected) = (image.channels, levels.channels.as_ref());
                data::decode::values(image, levels).map_err(|error| match (error, selected) {
                    (data::DecodeError::WrongChannels { expected, .. }, Some(_)) => {
                        errors::data(data::Error::Mismatch { found, expected })
                    }
                    (error, _) => errors::data_text(error.to_string()),
                })
            }
            Source::File(path) => {
                data::decode::file(&path, levels).map_err(|error| errors::data_text(unreadable(&path, &error)))
            }
        }
    }
}

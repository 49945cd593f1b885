//! Frozen encoders.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use byol::{
    DeviceChoice, Image, OpenError,
    apply::export,
    data::{Error, Images, synthetic},
    device, eval,
    nn::weights,
    train::{Plan, run::read_plan},
};
use numpy::{PyArray1, PyArray2, PyArray3, PyArrayMethods};
use pyo3::{prelude::*, types::PyBytes};
use rayon::prelude::*;

use crate::{
    data::{Dataset, Item, Source},
    errors::{self, detached},
    interrupt::interruptible,
};

/// A frozen encoder.
#[pyclass(frozen, module = "byol._byol")]
pub struct Encoder {
    pub inner: byol::Encoder,
    /// Plan of the run that it belongs to.
    pub plan: Option<Plan>,
}

#[pymethods]
impl Encoder {
    /// Opens the encoder of a run, or an encoder file.
    #[staticmethod]
    fn open(py: Python, path: PathBuf, device: &str) -> PyResult<Encoder> {
        let device: DeviceChoice = device.parse().map_err(errors::byol)?;
        let open = || {
            byol::Encoder::open_on(&path, device).map_err(|error| match error {
                OpenError::Device(error) => errors::byol(error),
                OpenError::Weights(error) => errors::encoder(error),
            })
        };
        Ok(Encoder { inner: detached(py, open)?, plan: read_plan(&path).ok() })
    }

    /// An encoder from the bytes of a safetensors file, on the CPU.
    #[staticmethod]
    fn from_bytes(py: Python, bytes: Vec<u8>) -> PyResult<Encoder> {
        let device = device::open(DeviceChoice::Cpu).map_err(errors::byol)?.device;
        let parse = || weights::parse("bytes".as_ref(), &bytes, &device).map_err(errors::encoder);
        Ok(Encoder { inner: py.detach(parse)?, plan: None })
    }

    /// This network with random initialization.
    fn random(&self, py: Python, seed: u64) -> PyResult<Encoder> {
        let create = || Ok(byol::Encoder::random(self.inner.spec.clone(), seed, &self.inner.device()));
        Ok(Encoder { inner: detached(py, create)?, plan: self.plan.clone() })
    }

    /// Dimension of the representation.
    #[getter]
    fn features(&self) -> usize {
        self.inner.features()
    }

    /// Description of the encoder as JSON.
    #[getter]
    fn spec(&self) -> String {
        serde_json::to_string(&self.inner.spec).expect("a description is plain data")
    }

    /// Representations of a batch of images: `float32 [N, D]`.
    fn embed<'py>(&self, py: Python<'py>, items: Vec<Item>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let batch: Vec<Source> = items.iter().map(Item::to_source).collect::<PyResult<_>>()?;
        let features = detached(py, || self.embed_batch(batch))?;
        py.check_signals()?;
        to_array(py, features)
    }

    /// Representations of a split of a data set: `float32 [N, D]`.
    fn embed_split<'py>(
        &self,
        py: Python<'py>,
        dataset: &Dataset,
        split: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let images = dataset.split(split)?;
        to_array(py, interruptible(py, |stop| embed_images(&self.inner, images, progress.as_ref(), stop))?)
    }

    /// Evaluation view of an image: `float32 [C, S, S]`, values from 0 to 1.
    fn view<'py>(&self, py: Python<'py>, item: Item) -> PyResult<Bound<'py, PyArray3<f32>>> {
        let source = item.to_source()?;
        let spec = &self.inner.spec;
        // No threads, so that it works in forked processes, such as those of a DataLoader.
        let image = py.detach(|| source.decode(&spec.levels))?;
        if image.channels != spec.channels {
            return Err(errors::data(Error::Mismatch { found: image.channels, expected: spec.channels }));
        }
        let view = py.detach(|| spec.evaluation_view(&image));
        let (values, [h, w, c]) = (view.interleaved(), [view.height, view.width, view.channels]);
        let value = |(channel, y, x)| values[(y * w + x) * c + channel];
        Ok(PyArray3::from_owned_array(py, numpy::ndarray::Array3::from_shape_fn([c, h, w], value)))
    }

    /// The encoder as a safetensors file.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.inner.to_safetensors())
    }

    /// Writes the encoder as ONNX or safetensors. Returns the largest difference of a feature from
    /// this encoder's.
    fn export(&self, py: Python, path: PathBuf, normalized_input: bool) -> PyResult<f64> {
        let images = synthetic::with_channels(8, self.inner.spec.channels, &self.inner.spec.levels);
        let write = || export::write(&self.inner, &path, !normalized_input, &images).map_err(errors::byol);
        Ok(detached(py, write)?.difference)
    }
}

impl Encoder {
    fn embed_batch(&self, batch: Vec<Source>) -> PyResult<eval::Features> {
        let levels = &self.inner.spec.levels;
        let decode = |source: Source| source.decode(levels);
        let images: Vec<Image> = batch.into_par_iter().map(decode).collect::<PyResult<_>>()?;
        let expected = self.inner.spec.channels;
        if let Some(other) = images.iter().find(|image| image.channels != expected) {
            return Err(errors::data(Error::Mismatch { found: other.channels, expected }));
        }
        eval::embed(&self.inner, &Images::memory(images, None).read_with(levels.clone()), |_| ()).map_err(errors::data)
    }
}

/// Features as an array `[N, D]`.
fn to_array(py: Python, features: eval::Features) -> PyResult<Bound<PyArray2<f32>>> {
    PyArray1::from_vec(py, features.values).reshape([features.n, features.dim])
}

/// Representations of images. `progress` is called with the number of images done.
///
/// # Errors
/// Those of the images and of `progress`, and an error once `stop` is set.
pub fn embed_images(
    encoder: &byol::Encoder,
    images: &Images,
    progress: Option<&Py<PyAny>>,
    stop: &AtomicBool,
) -> PyResult<eval::Features> {
    let mut features = eval::Features { n: 0, dim: encoder.features(), values: Vec::new() };
    let all: Vec<usize> = (0..images.len()).collect();
    for batch in all.chunks(eval::batch_size(encoder.spec.size)) {
        if stop.load(Ordering::Relaxed) {
            return Err(errors::data(Error::Stopped));
        }
        let part = eval::embed(encoder, &images.subset(batch), |_| ()).map_err(errors::data)?;
        features.n += part.n;
        features.values.extend(part.values);
        if let Some(progress) = progress {
            Python::attach(|py| progress.call1(py, (features.n,)))?;
        }
    }
    Ok(features)
}

//! Search, maps and selections of embeddings.

use byol::{
    apply::{
        map::{self, Method},
        search,
    },
    eval::Features,
};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::errors::{self, detached};

/// Embeddings, centered and of unit length.
#[pyclass(frozen, module = "byol._byol")]
pub struct Index {
    inner: search::Index,
}

/// Positions `int64 [M, K]` and cosine similarities `float32 [M, K]`.
type Nearest<'py> = (Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<f32>>);

#[pymethods]
impl Index {
    #[new]
    fn new(py: Python, embeddings: PyReadonlyArray2<f32>) -> PyResult<Index> {
        let features = to_features(&embeddings)?;
        if features.n == 0 || features.dim == 0 {
            return Err(errors::data_text("no embeddings"));
        }
        Ok(Index { inner: detached(py, || Ok(search::Index::new(features)))? })
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// The `k` nearest rows of each query `[M, D]`, nearest first.
    fn nearest<'py>(&self, py: Python<'py>, queries: PyReadonlyArray2<f32>, k: usize) -> PyResult<Nearest<'py>> {
        let queries = to_features(&queries)?;
        let dim = self.inner.rows().dim;
        if queries.dim != dim {
            let text = format!("queries of dimension {} for embeddings of dimension {dim}", queries.dim);
            return Err(errors::data_text(text));
        }
        let k = k.min(self.inner.len());
        let shape = [queries.n, k];
        let found: Vec<(usize, f32)> = detached(py, || {
            let queries = self.inner.transform(queries);
            Ok((0..queries.n).flat_map(|i| self.inner.nearest(queries.row(i), k)).collect())
        })?;
        let rows = PyArray1::from_iter(py, found.iter().map(|(row, _)| *row as i64)).reshape(shape)?;
        Ok((rows, PyArray1::from_iter(py, found.iter().map(|(_, cosine)| *cosine)).reshape(shape)?))
    }

    /// Positions in the plane, `float32 [N, 2]`, by `tsne` or `pca`.
    fn map<'py>(&self, py: Python<'py>, method: &str) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let method = [Method::Tsne, Method::Pca].into_iter().find(|m| m.name() == method).ok_or_else(|| {
            pyo3::exceptions::PyValueError::new_err(format!("unknown method `{method}` (expected tsne or pca)"))
        })?;
        let points = detached(py, || Ok(map::layout(&self.inner, method, &mut |_, _| ())))?;
        PyArray1::from_vec(py, points.concat()).reshape([self.inner.len(), 2])
    }

    /// 1 minus the mean cosine similarity to the `k` nearest rows, `float64 [N]`.
    fn outlier_scores<'py>(&self, py: Python<'py>, k: usize) -> PyResult<Bound<'py, PyArray1<f64>>> {
        Ok(PyArray1::from_vec(py, detached(py, || Ok(self.inner.outlier_scores(k, |_| ())))?))
    }

    /// Up to `n` rows, each the farthest from those before it.
    fn select<'py>(&self, py: Python<'py>, n: usize) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let selected = detached(py, || Ok(self.inner.select_diverse(n)))?;
        Ok(PyArray1::from_iter(py, selected.into_iter().map(|(row, _)| row as i64)))
    }
}

fn to_features(array: &PyReadonlyArray2<f32>) -> PyResult<Features> {
    let &[n, dim] = array.shape() else { unreachable!("the array has two dimensions") };
    let values: Vec<f32> = array.as_array().iter().copied().collect();
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(Features { n, dim, values }),
        false => Err(errors::data_text("the embeddings contain NaN or infinity")),
    }
}

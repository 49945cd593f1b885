//! Errors of the library as Python exceptions, with the same messages.

use std::{
    error::Error,
    fmt::Display,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::OnceLock,
};

use byol::train;
use pyo3::{create_exception, exceptions::PyException, prelude::*};

create_exception!(byol, ByolError, PyException, "Base class of all errors of byol.");
create_exception!(byol, DataError, ByolError, "Images that cannot be read or used.");
create_exception!(byol, EncoderError, ByolError, "A file that is not a usable encoder.");
create_exception!(byol, RecipeError, ByolError, "An invalid recipe or setting.");
create_exception!(byol, RunError, ByolError, "A run that cannot be started, resumed or finished.");

pub fn add_to(module: &Bound<PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("ByolError", py.get_type::<ByolError>())?;
    module.add("DataError", py.get_type::<DataError>())?;
    module.add("EncoderError", py.get_type::<EncoderError>())?;
    module.add("RecipeError", py.get_type::<RecipeError>())?;
    module.add("RunError", py.get_type::<RunError>())
}

/// Exception of an error of images. A Python exception among its causes is returned as it is.
pub fn data(error: impl Error + 'static) -> PyErr {
    python_cause(&error).unwrap_or_else(|| data_text(error))
}

pub fn data_text(text: impl Display) -> PyErr {
    DataError::new_err(text.to_string())
}

/// The Python exception among the causes of an error.
fn python_cause(error: &(dyn Error + 'static)) -> Option<PyErr> {
    if let Some(cause) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        let raised = cause.downcast_ref::<PyErr>()?;
        return Some(Python::attach(|py| raised.clone_ref(py)));
    }
    python_cause(error.source()?)
}

pub fn encoder(error: impl Display) -> PyErr {
    EncoderError::new_err(error.to_string())
}

pub fn recipe(error: impl Display) -> PyErr {
    RecipeError::new_err(error.to_string())
}

pub fn byol(error: impl Display) -> PyErr {
    ByolError::new_err(error.to_string())
}

/// Exception of an error of a run.
pub fn run(error: &train::Error) -> PyErr {
    if let Some(raised) = python_cause(error) {
        return raised;
    }
    let text = error.to_string();
    match error {
        train::Error::Recipe(_) => RecipeError::new_err(text),
        train::Error::Data(_) | train::Error::BatchTooLarge { .. } => DataError::new_err(text),
        train::Error::Encoder(_) | train::Error::EncoderMismatch { .. } => EncoderError::new_err(text),
        _ => RunError::new_err(text),
    }
}

/// Process whose threads compute. They do not exist in a process that was forked from it.
static PROCESS: OnceLock<u32> = OnceLock::new();

/// Runs `work` without holding the interpreter lock. A panic becomes an exception.
///
/// # Errors
/// Those of `work`; [`ByolError`] in a process that was forked after its parent had computed, where
/// `work` would wait forever.
pub fn detached<T: Send>(py: Python, work: impl FnOnce() -> PyResult<T> + Send) -> PyResult<T> {
    check_process()?;
    py.detach(|| caught(work))
}

/// # Errors
/// [`ByolError`] in a process that was forked after its parent had computed.
pub fn check_process() -> PyResult<()> {
    if *PROCESS.get_or_init(std::process::id) == std::process::id() {
        return Ok(());
    }
    Err(byol(
        "byol cannot compute in a forked process after its parent has\n\
         hint: use the start method `spawn` of multiprocessing",
    ))
}

/// Runs `work`. A panic becomes an exception.
pub fn caught<T>(work: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = panic.downcast_ref::<String>().map(String::as_str);
        let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown cause");
        Err(byol(format!("internal error: {message}\nhint: this is a bug, please report it")))
    })
}

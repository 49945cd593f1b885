//! The native half of the Python package `byol`: thin classes and functions over the Rust library.
//! The package in `python/byol` adds types, documentation and conversions that are easier there.

mod data;
mod encoder;
mod errors;
mod evaluate;
mod index;
mod interrupt;
mod train;

use std::{ffi::OsString, process::ExitCode};

use pyo3::prelude::*;

/// Runs the command `byol` and returns its exit code. `args` begin with the name of the program;
/// `command` starts it as a process of its own.
#[pyfunction]
fn main(py: Python, args: Vec<OsString>, command: Vec<OsString>) -> u8 {
    byol_cli::set_program(command);
    let code = py.detach(|| byol_cli::run(args));
    (0..=u8::MAX).find(|n| ExitCode::from(*n) == code).unwrap_or(1)
}

/// Native half of the package `byol`.
#[pymodule]
fn _byol(module: &Bound<PyModule>) -> PyResult<()> {
    byol_cli::silence_caught_panics();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    errors::add_to(module)?;
    module.add_class::<data::Dataset>()?;
    module.add_class::<encoder::Encoder>()?;
    module.add_class::<index::Index>()?;
    module.add_function(wrap_pyfunction!(main, module)?)?;
    module.add_function(wrap_pyfunction!(train::pretrain, module)?)?;
    module.add_function(wrap_pyfunction!(train::resume, module)?)?;
    module.add_function(wrap_pyfunction!(train::plan, module)?)?;
    module.add_function(wrap_pyfunction!(train::verdict, module)?)?;
    module.add_function(wrap_pyfunction!(evaluate::knn, module)?)?;
    module.add_function(wrap_pyfunction!(evaluate::linear, module)?)?;
    module.add_function(wrap_pyfunction!(evaluate::label_free, module)?)?;
    Ok(())
}

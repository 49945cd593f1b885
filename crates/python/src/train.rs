//! Pretraining.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use byol::{
    DeviceChoice, Event, Pretraining,
    train::{RecipeOverrides, run},
};
use pyo3::{exceptions::PyKeyboardInterrupt, prelude::*};
use serde_json::{Map, Value, json};

use crate::{
    data::Dataset,
    errors::{self, detached},
};

/// Pretrains in the folder `out`. `settings` are recipe keys as `KEY=VALUE`; `callback` is called
/// with each event as JSON.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "called by the package with all of them")]
pub fn pretrain(
    py: Python,
    dataset: &Dataset,
    out: PathBuf,
    recipe: &str,
    epochs: Option<u64>,
    settings: Vec<String>,
    device: &str,
    threads: usize,
    tensorboard: bool,
    callback: Option<Py<PyAny>>,
) -> PyResult<()> {
    let mut overrides = RecipeOverrides::from_recipe(recipe).map_err(errors::recipe)?;
    if let Some(epochs) = epochs {
        overrides = overrides.epochs(epochs);
    }
    for text in &settings {
        overrides.set(text).map_err(errors::recipe)?;
    }
    let device: DeviceChoice = device.parse().map_err(errors::byol)?;
    // Before the images are decoded.
    run::ensure_empty(&out).map_err(|error| errors::run(&error))?;
    train(py, dataset, callback, |pretraining| {
        let pretraining = pretraining.recipe(overrides).device(device).threads(threads);
        let pretraining = if tensorboard { pretraining.tensorboard() } else { pretraining };
        pretraining.run(&out)
    })
}

/// Resumes the run in the folder `out`, on `dataset`, else on the images at `moved` or where they
/// were. With `epochs`, it gets a new schedule.
#[pyfunction]
pub fn resume(
    py: Python,
    out: PathBuf,
    dataset: Option<&Dataset>,
    moved: Option<PathBuf>,
    epochs: Option<u64>,
    threads: usize,
    callback: Option<Py<PyAny>>,
) -> PyResult<()> {
    let plan = run::read_plan(&out).map_err(|error| errors::run(&error))?;
    let opened = match dataset {
        Some(_) => None,
        None => {
            let path = moved.unwrap_or_else(|| plan.data.clone());
            let open = || byol::Dataset::open_with(&path, &plan.open_options()).map_err(errors::data);
            Some(Dataset { inner: detached(py, open)? })
        }
    };
    let dataset = dataset.or(opened.as_ref()).expect("one of the two is present");
    train(py, dataset, callback, |pretraining| {
        let pretraining = pretraining.threads(threads);
        match epochs {
            Some(epochs) => pretraining.epochs(epochs).resume(&out),
            None => pretraining.resume(&out),
        }
    })
}

/// Plan of a run as JSON.
#[pyfunction]
pub fn plan(folder: PathBuf) -> PyResult<String> {
    let plan = run::read_plan(&folder).map_err(|error| errors::run(&error))?;
    Ok(serde_json::to_string(&plan).expect("a plan is plain data"))
}

/// Trains without holding the interpreter lock. Ctrl-C and an exception of `callback` stop the run
/// at the next step, with a checkpoint.
fn train(
    py: Python,
    dataset: &Dataset,
    callback: Option<Py<PyAny>>,
    start: impl FnOnce(Pretraining) -> Result<byol::Encoder, byol::Error> + Send,
) -> PyResult<()> {
    let (stop, mut raised) = (AtomicBool::new(false), None);
    let on_event = |event: Event| {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let checked = Python::attach(|py| {
            py.check_signals()?;
            match (&callback, to_json(&event)) {
                (Some(callback), Some(event)) => callback.call1(py, (event.to_string(),)).map(|_| ()),
                _ => Ok(()),
            }
        });
        if let Err(error) = checked {
            stop.store(true, Ordering::Relaxed);
            raised.get_or_insert(error);
        }
    };
    let outcome = detached(py, || {
        let pretraining = Pretraining::new(dataset.inner.clone()).stop_flag(&stop).on_event(on_event);
        start(pretraining).map(|_| ()).map_err(|error| errors::run(&error))
    });
    match raised {
        Some(error) if error.is_instance_of::<PyKeyboardInterrupt>(py) && outcome.is_ok() => {
            Err(PyKeyboardInterrupt::new_err("stopped with a checkpoint; continue with byol.resume"))
        }
        Some(error) => {
            error.set_cause(py, outcome.err());
            Err(error)
        }
        None => outcome,
    }
}

/// An event with the keys of `metrics.jsonl`; `None` if it is for programs that hold the state.
fn to_json(event: &Event) -> Option<Value> {
    Some(match event {
        Event::Step { step, epoch, stats, skipped, seconds } => json!({
            "kind": "step", "step": step, "epoch": epoch, "loss": stats.loss, "eta": stats.eta,
            "tau": stats.tau, "skipped": skipped, "seconds": seconds,
        }),
        Event::Epoch { epoch, loss, health, collapse } => {
            let health = health.map(|health| serde_json::to_value(health).expect("metrics are plain data"));
            let mut values = match health {
                Some(Value::Object(values)) => values,
                _ => Map::new(),
            };
            values.insert("kind".into(), "epoch".into());
            values.insert("epoch".into(), (*epoch).into());
            values.insert("loss".into(), json!(loss));
            values.insert("collapse".into(), json!(collapse));
            Value::Object(values)
        }
        Event::Skipped(n, first) => json!({ "kind": "skipped", "images": n, "first": first }),
        Event::Checkpoint(path) => json!({ "kind": "checkpoint", "path": path.display().to_string() }),
        Event::Rollback { from, to, peak, why } => {
            json!({ "kind": "rollback", "from": from, "to": to, "peak": peak, "why": why.to_string() })
        }
    })
}

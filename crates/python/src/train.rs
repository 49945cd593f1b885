//! Pretraining.

use std::{
    path::PathBuf,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
};

use byol::{
    DeviceChoice, Event, Pretraining,
    eval::label_free::Comparison,
    train::{RecipeOverrides, metrics, run},
};
use pyo3::{exceptions::PyKeyboardInterrupt, prelude::*};
use serde_json::{Map, Value, json};

use crate::{
    data::Dataset,
    errors::{self, detached},
    interrupt::{POLL, StopOnDrop},
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
    augment: Option<&str>,
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
    if let Some(name) = augment {
        overrides.set_views(name).map_err(errors::recipe)?;
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
            if !path.exists() && plan.data.file_name().is_some_and(|name| IN_PROGRAM.iter().any(|kind| name == *kind)) {
                let text = "the images of this run were provided by a program\nhint: pass the same data set as `data`";
                return Err(errors::RunError::new_err(text));
            }
            let open = || byol::Dataset::open_with(&path, &plan.open_options()).map_err(errors::data);
            Some(Dataset::from(detached(py, open)?))
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

/// Verdict on a run, in one sentence, and whether that is worse than before; `None` if it was
/// not measured.
#[pyfunction]
pub fn verdict(folder: PathBuf) -> PyResult<Option<(String, bool)>> {
    let plan = run::read_plan(&folder).map_err(|error| errors::run(&error))?;
    let is_worse = |comparison| matches!(comparison, Comparison::Worse | Comparison::Collapsed);
    Ok(metrics::read_verdict(&folder, &plan).map(|verdict| (verdict.text, is_worse(verdict.comparison))))
}

/// Names of data that are not files.
const IN_PROGRAM: [&str; 2] = ["images in memory", "custom image source"];

/// Trains in another thread, without holding the interpreter lock. This thread calls `callback` and
/// waits for Ctrl-C. Either of them stops the run: before the first step at the next image, later
/// at the next step, with a checkpoint.
fn train(
    py: Python,
    dataset: &Dataset,
    callback: Option<Py<PyAny>>,
    start: impl FnOnce(Pretraining) -> Result<byol::Encoder, byol::Error> + Send,
) -> PyResult<()> {
    errors::check_process()?;
    let stop = &AtomicBool::new(false);
    let (send, mut events) = mpsc::sync_channel::<String>(0);
    let (send_done, done) = mpsc::sync_channel::<()>(0);
    // Every event waits until it has been handled: a callback sees the run as it is, and an
    // exception stops it at this step.
    let on_event = move |event: Event| {
        let sent = to_json(&event).is_some_and(|event| send.send(event.to_string()).is_ok());
        if sent {
            let _ = done.recv();
        }
    };
    let session = dataset.session();
    let images = session.dataset.clone();
    let work = move || {
        let pretraining = Pretraining::new(images).stop_flag(stop).on_event(on_event);
        start(pretraining).map(|_| ()).map_err(|error| errors::run(&error))
    };
    let mut raised: Option<PyErr> = None;
    let outcome = thread::scope(|scope| {
        // Both are dropped if anything here panics: the worker then stops instead of waiting.
        let (send_done, _stop) = (send_done, StopOnDrop(stop));
        let worker = thread::Builder::new().name("train".into()).spawn_scoped(scope, || errors::caught(work))?;
        let mut stop_with = |error: PyErr| {
            stop.store(true, Ordering::Relaxed);
            raised.get_or_insert(error);
        };
        loop {
            let event;
            (event, events) = py.detach(move || (events.recv_timeout(POLL), events));
            py.check_signals().unwrap_or_else(&mut stop_with);
            match event {
                Ok(event) => {
                    if let (Some(callback), false) = (&callback, stop.load(Ordering::Relaxed)) {
                        callback.call1(py, (event,)).map(|_| ()).unwrap_or_else(&mut stop_with);
                    }
                    let _ = send_done.send(());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        py.detach(|| worker.join()).expect("panics are caught")
    });
    session.end(py)?;
    match (raised, outcome) {
        (Some(error), Ok(())) if error.is_instance_of::<PyKeyboardInterrupt>(py) => {
            Err(PyKeyboardInterrupt::new_err("stopped with a checkpoint; byol.resume continues the run"))
        }
        (Some(error), outcome) => {
            if let Err(cause) = outcome {
                error.set_cause(py, Some(cause));
            }
            Err(error)
        }
        (None, outcome) => outcome,
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

//! Ctrl-C: only Python's main thread is told of it, so long work runs in another one.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use pyo3::prelude::*;

use crate::errors;

/// Time between two checks for signals while there is no event.
pub const POLL: Duration = Duration::from_millis(50);

/// Sets a flag when it is dropped, so that a thread that reads the flag stops if another panics.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `work` in another thread, without holding the interpreter lock. Ctrl-C sets its flag; the
/// work must then return soon.
///
/// # Errors
/// Those of `work` and of [`errors::check_process`]; the exception of a signal handler.
pub fn interruptible<T: Send>(py: Python, work: impl FnOnce(&AtomicBool) -> PyResult<T> + Send) -> PyResult<T> {
    errors::check_process()?;
    let stop = &AtomicBool::new(false);
    let (send, mut outcome) = mpsc::channel();
    thread::scope(|scope| {
        let _stop = StopOnDrop(stop);
        let run = move || drop(send.send(errors::caught(|| work(stop))));
        thread::Builder::new().name("evaluate".into()).spawn_scoped(scope, run)?;
        let mut raised: Option<PyErr> = None;
        loop {
            let received;
            (received, outcome) = py.detach(move || (outcome.recv_timeout(POLL), outcome));
            if let Err(error) = py.check_signals() {
                stop.store(true, Ordering::Relaxed);
                raised.get_or_insert(error);
            }
            match (received, raised.take()) {
                (Err(RecvTimeoutError::Timeout), error) => raised = error,
                (Err(RecvTimeoutError::Disconnected), _) => unreachable!("panics are caught"),
                (Ok(_), Some(error)) => return Err(error),
                (Ok(outcome), None) => return outcome,
            }
        }
    })
}

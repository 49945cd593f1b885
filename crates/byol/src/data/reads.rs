//! Reads of images in progress. They tell a program that was asked to stop whether it waits for an
//! image that never arrives, for example from a network drive, or computes.

use std::{
    cell::Cell,
    sync::{
        Arc, LazyLock, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

static PROGRAM_START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Start of the read of each thread, in milliseconds; 0 without one.
static STARTS: Mutex<Vec<Weak<AtomicU64>>> = Mutex::new(Vec::new());

thread_local! {
    static IS_AHEAD: Cell<bool> = const { Cell::new(false) };

    static OWN_START: Arc<AtomicU64> = {
        let start = Arc::new(AtomicU64::new(0));
        let mut starts = STARTS.lock().unwrap_or_else(PoisonError::into_inner);
        starts.retain(|start| start.strong_count() > 0); // threads that have ended
        if !IS_AHEAD.get() {
            starts.push(Arc::downgrade(&start));
        }
        start
    };
}

/// A read in progress, which ends when this is dropped.
pub(super) struct Read(Arc<AtomicU64>);

impl Drop for Read {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// Declares that this thread reads ahead, before its first read: nobody waits for a single image.
pub(super) fn read_ahead() {
    IS_AHEAD.set(true);
}

/// Starts a read of this thread.
pub(super) fn start() -> Read {
    OWN_START.with(|start| {
        start.store(now(), Ordering::Relaxed);
        Read(start.clone())
    })
}

/// Time of the longest read in progress that the program waits for: of an image, decoding included,
/// or of a micro-batch. `None` without one.
pub fn longest() -> Option<Duration> {
    let starts = STARTS.lock().unwrap_or_else(PoisonError::into_inner);
    let starts = starts.iter().filter_map(Weak::upgrade).map(|start| start.load(Ordering::Relaxed));
    let first = starts.filter(|start| *start > 0).min()?;
    Some(Duration::from_millis(now().saturating_sub(first)))
}

/// Milliseconds since the first read, from 1.
fn now() -> u64 {
    u64::try_from(PROGRAM_START.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_longest_read_in_progress() {
        let read = start();
        std::thread::sleep(Duration::from_millis(30));
        assert!(longest().is_some_and(|time| time >= Duration::from_millis(25)));
        let id = read.0.clone();
        drop(read);
        assert_eq!(id.load(Ordering::Relaxed), 0);
    }
}

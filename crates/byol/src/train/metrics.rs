//! `metrics.jsonl`: one JSON object per line, for every step and every epoch. Resuming truncates
//! the file to the checkpoint.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    path::Path,
};

use serde::Serialize;

use super::{
    Plan,
    health::{Health, HealthSeconds, SETTLING_STEPS, Verdict},
};

/// Seconds of a step, by phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct PhaseSeconds {
    /// Waiting for views.
    pub data: f64,
    /// Both networks, both views, the loss.
    pub forward: f64,
    /// Gradient.
    pub backward: f64,
    /// All-reduce of the gradient. Omitted with a single rank.
    #[serde(skip_serializing_if = "is_zero")]
    pub exchange: f64,
    /// Optimizer and moving average.
    pub update: f64,
}

fn is_zero(seconds: &f64) -> bool {
    *seconds == 0.0
}

impl PhaseSeconds {
    /// Sum of all phases.
    pub fn total(&self) -> f64 {
        self.data + self.forward + self.backward + self.exchange + self.update
    }
}

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// End of a step.
    Step {
        /// Completed steps, from 1.
        step: u64,
        /// Completed epochs, with the fraction of the current one.
        epoch: f64,
        /// Loss of the step.
        loss: f64,
        /// Learning rate.
        eta: f64,
        /// Target decay.
        tau: f64,
        /// The update was skipped because the gradient exceeds the range of f16. Omitted if false.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        skipped: bool,
        /// Training images per second.
        images_per_second: f64,
        /// Wall-clock time by phase.
        seconds: PhaseSeconds,
    },
    /// End of an epoch. Epoch 0 is before the first step.
    Epoch {
        /// Completed epochs.
        epoch: u64,
        /// Completed steps.
        step: u64,
        /// Mean loss of the epoch; null for epoch 0.
        loss: Option<f64>,
        /// Metrics on the monitoring images.
        #[serde(flatten)]
        health: Option<Health>,
        /// Failure that the health check detected, if any.
        #[serde(skip_serializing_if = "Option::is_none")]
        collapse: Option<String>,
        /// Cost of the health check.
        #[serde(skip_serializing_if = "Option::is_none")]
        seconds: Option<HealthSeconds>,
        /// Seconds since the program started.
        elapsed_s: f64,
    },
    /// The run stopped because it diverged.
    Failed {
        /// Step of the failure.
        step: u64,
        /// Cause.
        why: String,
    },
    /// Rollback to an earlier checkpoint.
    Rollback {
        /// Step of the failure.
        from: u64,
        /// Step of the checkpoint.
        to: u64,
        /// Peak learning rate from here on.
        peak: f64,
        /// Cause.
        why: String,
    },
}

/// Reads the health metrics of all epochs without failure, from epoch 0. The file may not exist
/// yet.
pub fn read_health(path: &Path) -> Vec<Health> {
    /// The part of [`Record::Epoch`] that is read back.
    #[derive(serde::Deserialize)]
    struct Epoch {
        #[serde(flatten)]
        health: Health,
        collapse: Option<String>,
    }
    let Ok(file) = File::open(path) else { return Vec::new() };
    let lines = io::BufRead::lines(io::BufReader::new(file)).map_while(Result::ok);
    let epochs = lines.filter_map(|line| serde_json::from_str::<Epoch>(&line).ok());
    epochs.filter(|epoch| epoch.collapse.is_none()).map(|epoch| epoch.health).collect()
}

/// Verdict on a run, from the records of its first and last epoch. `None` if there are fewer
/// than two, or too few monitoring images.
pub fn read_verdict(run: &Path, plan: &Plan) -> Option<Verdict> {
    match read_health(&run.join("metrics.jsonl")).as_slice() {
        [initial, .., last] => Verdict::new(initial, last, plan.baseline_name()),
        _ => None,
    }
}

/// Healthy and failed steps of a run, which determine the target of a rollback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct History {
    /// Steps of the last two healthy epochs, latest first; 0 if there is none yet.
    pub healthy: [u64; 2],
    /// Latest step that triggered a rollback.
    pub failed_at: u64,
}

impl History {
    /// Records a healthy epoch that ended at `step`. The first steps are not judged.
    pub(crate) fn healthy_at(&mut self, step: u64) {
        if step >= SETTLING_STEPS {
            self.healthy = [step, self.healthy[0]];
        }
    }

    /// Records a failure at `step`. A second failure no later than the first discredits the
    /// checkpoint in between as well.
    pub(crate) fn failed_at(&mut self, step: u64) {
        if step <= self.failed_at {
            self.healthy = [self.healthy[1]; 2];
        }
        self.failed_at = step.max(self.failed_at);
    }
}

/// Reads the [`History`] of a run. The file may not exist yet.
pub(crate) fn read_history(path: &Path) -> History {
    /// The parts of [`Record::Epoch`] and [`Record::Rollback`] that are read back.
    #[derive(serde::Deserialize)]
    struct EventLine {
        kind: String,
        step: Option<u64>,
        from: Option<u64>,
        collapse: Option<String>,
    }
    let mut history = History::default();
    let Ok(file) = File::open(path) else { return history };
    let lines = io::BufRead::lines(io::BufReader::new(file)).map_while(Result::ok);
    for event in lines.filter_map(|line| serde_json::from_str::<EventLine>(&line).ok()) {
        match (event.kind.as_str(), event.step, event.from) {
            ("epoch", Some(step), _) if event.collapse.is_none() => history.healthy_at(step),
            ("rollback", _, Some(from)) => history.failed_at(from),
            _ => {}
        }
    }
    history
}

/// Data of the training curves.
#[derive(Debug, Clone, PartialEq)]
pub struct Curves {
    /// Epoch records, as in the file.
    pub epochs: Vec<serde_json::Value>,
    /// (epoch, mean loss since the previous point), at most a few hundred points.
    pub loss: Vec<[f64; 2]>,
}

/// Reads the curves. The file may not exist yet, and its last line may be incomplete.
pub fn read_curves(path: &Path) -> Curves {
    const POINTS: usize = 400;
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let (epochs, steps): (Vec<_>, Vec<_>) =
        lines.filter(|l| l["kind"] == "epoch" || l["kind"] == "step").partition(|l| l["kind"] == "epoch");
    let every = steps.len().div_ceil(POINTS).max(1);
    let point = |chunk: &[serde_json::Value]| {
        // The loss of a diverged step is null.
        let losses: Vec<f64> = chunk.iter().filter_map(|s| s["loss"].as_f64()).collect();
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        Some([chunk.last()?["epoch"].as_f64()?, mean]).filter(|_| !losses.is_empty())
    };
    let loss = steps.chunks(every).filter_map(point).collect();
    Curves { epochs, loss }
}

/// Total training time in seconds, from the epoch records. `elapsed_s` restarts when a run is
/// resumed.
pub fn total_seconds(epochs: &[serde_json::Value]) -> f64 {
    let (mut total, mut last) = (0.0, 0.0);
    for elapsed in epochs.iter().filter_map(|epoch| epoch["elapsed_s"].as_f64()) {
        if elapsed < last {
            total += last;
        }
        last = elapsed;
    }
    total + last
}

/// Open `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsFile {
    file: File,
    bytes: u64,
}

impl MetricsFile {
    /// Opens or creates the file and truncates it to `bytes`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn open(path: &Path, bytes: u64) -> io::Result<MetricsFile> {
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        let bytes = bytes.min(file.metadata()?.len());
        file.set_len(bytes)?;
        file.seek(SeekFrom::End(0))?;
        Ok(MetricsFile { file, bytes })
    }

    /// Appends a record.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, record: &Record) -> io::Result<()> {
        let mut text = serde_json::to_vec(record).expect("metrics are plain data");
        text.push(b'\n');
        self.file.write_all(&text)?;
        self.bytes += text.len() as u64;
        Ok(())
    }

    /// Syncs the file to disk.
    ///
    /// # Errors
    /// I/O errors.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_is_restored_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = MetricsFile::open(&path, 0).unwrap();
        let mut expected = History::default();
        let epoch = |step, collapse: Option<&str>| {
            let (health, collapse) = (None, collapse.map(str::to_owned));
            Record::Epoch { epoch: 1, step, loss: None, health, collapse, seconds: None, elapsed_s: 0.0 }
        };
        let rollback = |from| Record::Rollback { from, to: 0, peak: 0.1, why: "it failed".into() };
        for step in [100, 300, 600] {
            metrics.write(&epoch(step, None)).unwrap();
            expected.healthy_at(step);
        }
        assert_eq!(expected, History { healthy: [600, 300], failed_at: 0 });
        // Rolls back to 600, is healthy at 900 and fails earlier than before: then 600 is suspect,
        // and 900 with it.
        metrics.write(&epoch(1200, Some("collapsed"))).unwrap();
        metrics.write(&rollback(1200)).unwrap();
        metrics.write(&epoch(900, None)).unwrap();
        metrics.write(&rollback(1100)).unwrap();
        expected.failed_at(1200);
        expected.healthy_at(900);
        expected.failed_at(1100);
        assert_eq!(expected, History { healthy: [600, 600], failed_at: 1200 });
        assert_eq!(read_history(&path), expected);
        assert_eq!(read_history(&folder.path().join("none")), History::default());
    }

    #[test]
    fn total_time_spans_resumed_parts() {
        let epochs = [1.0, 5.0, 2.0, 3.0, 0.5].map(|s| serde_json::json!({ "elapsed_s": s }));
        assert_eq!(total_seconds(&epochs), 5.0 + 3.0 + 0.5);
        assert_eq!(total_seconds(&[]), 0.0);
    }
}

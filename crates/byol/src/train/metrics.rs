//! `metrics.jsonl`: one object a line, a line a step and a line an epoch. Appended; cut back to the checkpoint on resume.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    path::Path,
};

use serde::Serialize;

use super::health::{Cost, Health, SETTLING};

/// Seconds spent in each part of the steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Split {
    /// Waiting for images.
    pub data: f64,
    /// Both networks, both views.
    pub forward: f64,
    /// Gradients.
    pub backward: f64,
    /// The mean of the gradients over all ranks; left out where there is one.
    #[serde(skip_serializing_if = "is_zero")]
    pub exchange: f64,
    /// θ and ξ.
    pub update: f64,
}

fn is_zero(seconds: &f64) -> bool {
    *seconds == 0.0
}

impl Split {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.data + self.forward + self.backward + self.exchange + self.update
    }
}

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Line {
    /// After a step.
    Step {
        /// Steps done, from 1.
        step: u64,
        /// Epochs done, with the part of the running one.
        epoch: f64,
        /// Of this step.
        loss: f64,
        /// Learning rate.
        eta: f64,
        /// Target decay.
        tau: f64,
        /// Whether the weights stayed, as the gradient was beyond the range of f16; left out where they moved.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        skipped: bool,
        /// Training images a second.
        images_per_second: f64,
        /// Where the time went.
        seconds: Split,
    },
    /// After an epoch. Epoch 0 is before the first step.
    Epoch {
        /// Epochs done.
        epoch: u64,
        /// Steps done.
        step: u64,
        /// Mean over the epoch's steps; none for epoch 0.
        loss: Option<f64>,
        /// Figures on the held-out images.
        #[serde(flatten)]
        health: Option<Health>,
        /// Why it looks collapsed, if it does.
        #[serde(skip_serializing_if = "Option::is_none")]
        collapse: Option<String>,
        /// What the figures cost.
        #[serde(skip_serializing_if = "Option::is_none")]
        seconds: Option<Cost>,
        /// Since the program started.
        elapsed_s: f64,
    },
    /// The run stopped where no number could be trained on any more.
    Failed {
        /// At this step.
        step: u64,
        /// What had gone wrong.
        why: String,
    },
    /// The run went back.
    Rollback {
        /// From after this step.
        from: u64,
        /// To after this one.
        to: u64,
        /// The peak of the learning rate from now on.
        peak: f64,
        /// What had gone wrong.
        why: String,
    },
}

/// The figures at the ends of the epochs so far that have not failed, from epoch 0 on, of a file that may not be there yet.
pub fn figures(path: &Path) -> Vec<Health> {
    /// As [`Line::Epoch`] writes it.
    #[derive(serde::Deserialize)]
    struct Epoch {
        #[serde(flatten)]
        health: Health,
        /// Of a failing network no figure counts.
        collapse: Option<String>,
    }
    let Ok(file) = File::open(path) else { return Vec::new() };
    let lines = io::BufRead::lines(io::BufReader::new(file)).map_while(Result::ok);
    let epochs = lines.filter_map(|line| serde_json::from_str::<Epoch>(&line).ok());
    epochs.filter(|epoch| epoch.collapse.is_none()).map(|epoch| epoch.health).collect()
}

/// Where a run was well and where it failed: what going back needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct History {
    /// The last two ends of epochs that were found healthy, the later one first; 0 where there is none yet.
    pub healthy: [u64; 2],
    /// The furthest step from which the run has gone back.
    pub failed_at: u64,
}

impl History {
    /// Nothing was wrong after this step. The first steps are not judged.
    pub fn was_well(&mut self, step: u64) {
        if step >= SETTLING {
            self.healthy = [step, self.healthy[0]];
        }
    }

    /// It failed after this step. Where the way to it has failed before, the network it began with counts as ill too.
    pub fn failed(&mut self, step: u64) {
        if step <= self.failed_at {
            self.healthy = [self.healthy[1]; 2];
        }
        self.failed_at = step.max(self.failed_at);
    }
}

/// What the lines say of it, of a file that may not be there yet.
pub fn history(path: &Path) -> History {
    /// As [`Line::Epoch`] and [`Line::Rollback`] write it.
    #[derive(serde::Deserialize)]
    struct Event {
        kind: String,
        step: Option<u64>,
        from: Option<u64>,
        collapse: Option<String>,
    }
    let mut history = History::default();
    let Ok(file) = File::open(path) else { return history };
    let lines = io::BufRead::lines(io::BufReader::new(file)).map_while(Result::ok);
    for event in lines.filter_map(|line| serde_json::from_str::<Event>(&line).ok()) {
        match (event.kind.as_str(), event.step, event.from) {
            ("epoch", Some(step), _) if event.collapse.is_none() => history.was_well(step),
            ("rollback", _, Some(from)) => history.failed(from),
            _ => {}
        }
    }
    history
}

/// What the curves of a run are drawn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Curves {
    /// The lines of the epochs, as they stand in the file.
    pub epochs: Vec<serde_json::Value>,
    /// (epoch, mean loss of the steps up to there), a few hundred points at most.
    pub loss: Vec<[f64; 2]>,
}

/// The curves so far, of a file that may not be there yet and whose last line may be half written.
pub fn curves(path: &Path) -> Curves {
    const POINTS: usize = 400;
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let (epochs, steps): (Vec<_>, Vec<_>) =
        lines.filter(|l| l["kind"] == "epoch" || l["kind"] == "step").partition(|l| l["kind"] == "epoch");
    let every = steps.len().div_ceil(POINTS).max(1);
    let point = |some: &[serde_json::Value]| {
        // Of a diverged step there is no loss.
        let losses: Vec<f64> = some.iter().filter_map(|s| s["loss"].as_f64()).collect();
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        Some([some.last()?["epoch"].as_f64()?, mean]).filter(|_| !losses.is_empty())
    };
    let loss = steps.chunks(every).filter_map(point).collect();
    Curves { epochs, loss }
}

/// Seconds that a run has taken, by its epochs' lines: the clock begins anew where it was gone on with.
pub fn seconds(epochs: &[serde_json::Value]) -> f64 {
    let (mut total, mut last) = (0.0, 0.0);
    for elapsed in epochs.iter().filter_map(|epoch| epoch["elapsed_s"].as_f64()) {
        if elapsed < last {
            total += last;
        }
        last = elapsed;
    }
    total + last
}

/// The open file.
#[derive(Debug)]
pub struct Metrics {
    file: File,
    bytes: u64,
}

impl Metrics {
    /// Opens or makes the file and cuts it to `bytes`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(path: &Path, bytes: u64) -> io::Result<Metrics> {
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        let bytes = bytes.min(file.metadata()?.len());
        file.set_len(bytes)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Metrics { file, bytes })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line).expect("metrics are plain data");
        text.push(b'\n');
        self.file.write_all(&text)?;
        self.bytes += text.len() as u64;
        Ok(())
    }

    /// Waits until all lines are on disk.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Bytes written so far, all of the run.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_say_what_going_back_needs_to_know() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, 0).unwrap();
        let mut lived = History::default();
        let epoch = |step, collapse: Option<&str>| {
            let (health, collapse) = (None, collapse.map(str::to_owned));
            Line::Epoch { epoch: 1, step, loss: None, health, collapse, seconds: None, elapsed_s: 0.0 }
        };
        let back = |from| Line::Rollback { from, to: 0, peak: 0.1, why: "it failed".into() };
        for step in [100, 300, 600] {
            metrics.write(&epoch(step, None)).unwrap();
            lived.was_well(step);
        }
        assert_eq!(lived, History { healthy: [600, 300], failed_at: 0 });
        // It goes back to 600, is well after 900 and fails earlier than before: then 600 is suspect, and 900 with it.
        metrics.write(&epoch(1200, Some("collapsed"))).unwrap();
        metrics.write(&back(1200)).unwrap();
        metrics.write(&epoch(900, None)).unwrap();
        metrics.write(&back(1100)).unwrap();
        lived.failed(1200);
        lived.was_well(900);
        lived.failed(1100);
        assert_eq!(lived, History { healthy: [600, 600], failed_at: 1200 });
        assert_eq!(history(&path), lived);
        assert_eq!(history(&folder.path().join("none")), History::default());
    }

    #[test]
    fn the_time_of_a_run_is_that_of_all_its_parts() {
        let epochs = [1.0, 5.0, 2.0, 3.0, 0.5].map(|s| serde_json::json!({ "elapsed_s": s }));
        assert_eq!(seconds(&epochs), 5.0 + 3.0 + 0.5);
        assert_eq!(seconds(&[]), 0.0);
    }
}

//! Pretraining: [`Recipe`] (settings) → [`Plan`] (settings resolved for the data) → [`Run`]
//! (training loop, metrics and checkpoints).

#[doc(hidden)]
pub mod ablations;
#[doc(hidden)]
pub mod augment_placement;
#[doc(hidden)]
pub mod auto;
pub mod batch;
#[doc(hidden)]
pub mod checkpoint;
#[doc(hidden)]
pub mod data;
#[doc(hidden)]
pub mod health;
#[doc(hidden)]
pub mod metrics;
#[doc(hidden)]
pub mod plan;
#[doc(hidden)]
pub mod precision;
pub mod recipe;
pub mod run;
#[doc(hidden)]
pub mod step;
#[doc(hidden)]
pub mod tensorboard;

pub use data::{PrepareOptions, TrainingData};
pub use plan::Plan;
pub use recipe::{Recipe, RecipeOverrides};
pub use run::{Event, Outcome, Run, RunContext};

use std::{
    io,
    path::{Path, PathBuf},
};

/// Errors of a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Invalid recipe.
    #[error(transparent)]
    Recipe(#[from] recipe::Error),
    /// Unusable data.
    #[error(transparent)]
    Data(#[from] crate::data::Error),
    /// Unusable checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// Unusable encoder file.
    #[error(transparent)]
    Encoder(#[from] crate::nn::weights::Error),
    /// Unusable device.
    #[error(transparent)]
    Device(#[from] crate::device::Error),
    /// The batch is larger than the data set.
    #[error("{}", too_few_images(*batch, *images, root))]
    BatchTooLarge {
        /// Batch size.
        batch: usize,
        /// Training images.
        images: usize,
        /// Path of the data.
        root: PathBuf,
    },
    /// A plan is a text file, which cannot hold the path.
    #[error("the path of {} is not valid UTF-8\nhint: rename the folder", .0.display())]
    NotUnicode(PathBuf),
    /// The pretrained weights are of a different network.
    #[error(
        "{} holds a {found}, but the recipe specifies a {expected}\nhint: set `--encoder`, `--width` or `encoder.stem` accordingly, or omit `--init`",
        path.display()
    )]
    EncoderMismatch {
        /// Path of the file.
        path: PathBuf,
        /// Network of the file.
        found: String,
        /// Network of the recipe.
        expected: String,
    },
    /// The output folder is not empty.
    #[error("{}", occupied(path, *run))]
    Occupied {
        /// Path of the folder.
        path: PathBuf,
        /// The folder holds a run.
        run: bool,
    },
    /// Another process has locked the run.
    #[error("{} is in use by another byol process\nhint: wait for it to finish, or stop it", .0.display())]
    Busy(PathBuf),
    /// A file of the run cannot be written. The last checkpoint is intact.
    #[error("cannot write {}: {source}\nhint: {}", path.display(), crate::atomic_write::remedy(source))]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A file of the run cannot be read.
    #[error("cannot read {}: {source}\nhint: expected the folder of a run, as made by `byol pretrain`", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The stored plan is invalid.
    #[error("invalid plan {}: {reason}\nhint: resume with the version of byol that created the run", path.display())]
    BadPlan {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        reason: String,
    },
    /// The images differ from those that the run started with.
    #[error("the images in {} have changed since the run started ({reason})\nhint: restore them, or start a new run", root.display())]
    DataChanged {
        /// Path of the data.
        root: PathBuf,
        /// Difference.
        reason: String,
    },
    /// A run cannot get fewer epochs than it has completed, or than its warm-up takes.
    #[error(
        "`--epochs {epochs}` is too low: completed epochs: {done}, warm-up epochs: {warmup}\nhint: pass a higher `--epochs`"
    )]
    Extend {
        /// Requested number of epochs.
        epochs: u64,
        /// Completed epochs.
        done: u64,
        /// Epochs of the warm-up.
        warmup: u64,
    },
    /// The ranks cannot share a batch.
    #[error("cannot train on {ranks} ranks: {reason}")]
    Ranks {
        /// World size.
        ranks: usize,
        /// Cause.
        reason: String,
    },
    /// A rank differs from rank 0.
    #[error("rank {rank} has {what} than rank 0\nhint: {remedy}")]
    OtherRank {
        /// First rank that differs.
        rank: usize,
        /// Difference.
        what: String,
        /// Remedy.
        remedy: &'static str,
    },
    /// A health check has failed.
    #[error(
        "stopped at step {step}: {failure}; {kept}\nhint: `byol resume` would fail again; start a new run with a lower `--lr`, more `--warmup-epochs`, a higher `--tau`, or `--on-collapse rollback`"
    )]
    Collapsed {
        /// Step, from 1.
        step: u64,
        /// Failed check.
        failure: health::Failure,
        /// Last healthy checkpoint, in words.
        kept: String,
    },
    /// No loss scale keeps the gradient in the range of f16.
    #[error(
        "the gradient exceeds the range of f16 at step {step}, even with loss scale {factor}; {kept}\nhint: start again with `--precision bf16` or `f32`"
    )]
    Overflow {
        /// Step, from 1.
        step: u64,
        /// Loss scale.
        factor: f64,
        /// Last healthy checkpoint, in words.
        kept: String,
    },
    /// Loss or weights are NaN or infinite.
    #[error(
        "the run has diverged: the {what} is {value} at step {step}; {kept}\nhint: `byol resume` would fail again; start a new run with a lower `--lr`, more `--warmup-epochs`, or `--on-collapse rollback`{}",
        if *f16 { ", or avoid f16 with `--precision bf16` or `f32`" } else { "" }
    )]
    Diverged {
        /// Loss, or norm of the weights.
        what: &'static str,
        /// Its value.
        value: f64,
        /// Step, from 1.
        step: u64,
        /// Compute precision was f16.
        f16: bool,
        /// Last healthy checkpoint, in words.
        kept: String,
    },
}

fn too_few_images(batch: usize, images: usize, root: &Path) -> String {
    let root = root.display();
    match images {
        0 | 1 => format!("too few training images in {root}: {images}\nhint: BYOL needs at least 2"),
        n => format!("batch size {batch} exceeds the {n} training images in {root}\nhint: use `--batch {n}` or less"),
    }
}

fn occupied(path: &Path, run: bool) -> String {
    let path = path.display();
    match run {
        true => format!("{path} already contains a run\nhint: choose another `--out`, or run `byol resume {path}`"),
        false => format!("{path} is not empty\nhint: choose another `--out`"),
    }
}

impl Error {
    /// Returns true if all ranks return this error together, so that one message is enough.
    pub fn is_collective(&self) -> bool {
        use Error::*;
        matches!(self, Collapsed { .. } | Diverged { .. } | Overflow { .. } | Ranks { .. } | OtherRank { .. })
    }
}

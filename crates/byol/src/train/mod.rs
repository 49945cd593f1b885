//! A run: [`Recipe`] (what the user asks for) → [`Plan`] (what it means, complete) → [`Run`] (the loop, its metrics, its checkpoints).

pub mod auto;
pub mod checkpoint;
pub mod feed;
pub mod health;
pub mod metrics;
pub mod plan;
pub mod recipe;
pub mod run;
pub mod studies;
pub mod tensorboard;

pub use plan::Plan;
pub use recipe::Recipe;
pub use run::{Event, Outcome, Place, Prepared, Run};

use std::{
    io,
    path::{Path, PathBuf},
};

/// What can go wrong in a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe.
    #[error(transparent)]
    Recipe(#[from] recipe::Error),
    /// The data.
    #[error(transparent)]
    Data(#[from] crate::data::Error),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The encoder file.
    #[error(transparent)]
    Encoder(#[from] crate::nn::weights::Error),
    /// The device.
    #[error(transparent)]
    Device(#[from] crate::device::Error),
    /// The batch needs more images than there are.
    #[error("{}", too_few(*batch, *images, root))]
    BatchTooLarge {
        /// Images an update.
        batch: usize,
        /// Training images.
        images: usize,
        /// The data.
        root: PathBuf,
    },
    /// The path of the data cannot be written into a plan.
    #[error("the path of {} is not Unicode, so no plan can hold it; give its folders other names", .0.display())]
    NotUnicode(PathBuf),
    /// The weights to start with are of another network.
    #[error("{} holds {found}, but the recipe asks for {wanted}; set --encoder, --width or encoder.stem to the file's, or start without --init", path.display())]
    Unlike {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
        /// What the recipe says.
        wanted: String,
    },
    /// `--out` is not empty.
    #[error("{} already holds {what}; choose another --out, or go on with it by `byol resume {}`", path.display(), path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What is in it.
        what: &'static str,
    },
    /// Another program has the run open.
    #[error("another byol is training in {}; wait for it to end, or stop it", .0.display())]
    Busy(PathBuf),
    /// A file of the run cannot be written.
    #[error("cannot write {}: {source}; {} (a checkpoint that was written before is whole)", path.display(), crate::files::remedy(source))]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the run cannot be read.
    #[error("cannot read {}: {source}; is it a run folder of byol?", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The stored plan is not one.
    #[error("{} is not a plan that this byol understands: {reason}; resume with the version that began the run", path.display())]
    BadPlan {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The images are not those the run began with.
    #[error("the images in {} are not those that the run began with ({reason}); put them back, or start a new run", root.display())]
    DataChanged {
        /// The data.
        root: PathBuf,
        /// What differs.
        reason: String,
    },
    /// The batch cannot be shared.
    #[error("{ranks} ranks cannot share each batch: {reason}")]
    Ranks {
        /// How many.
        ranks: usize,
        /// Why not.
        reason: String,
    },
    /// The ranks do not go together.
    #[error("rank {rank} has {what} than rank 0; {remedy}")]
    OtherRank {
        /// The first that differs.
        rank: usize,
        /// What differs.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Learning has failed.
    #[error(
        "stopped at step {step}, {failure}; {kept}; `byol resume` would fail again: begin a new run with a lower --lr, more --warmup-epochs or a higher --tau, or with --on-collapse rollback"
    )]
    Collapsed {
        /// The step, from 1.
        step: u64,
        /// What is wrong.
        failure: health::Failure,
        /// Where to go back to.
        kept: String,
    },
    /// No scale of the loss keeps the gradient in the range of f16.
    #[error(
        "the gradient is beyond f16 at step {step}, even of a loss scaled by {factor}; {kept}; start again with --precision bf16 or f32"
    )]
    Overflow {
        /// The step, from 1.
        step: u64,
        /// The loss's scale.
        factor: f64,
        /// Where to go back to.
        kept: String,
    },
    /// NaN or infinity.
    #[error(
        "the {what} is {value} at step {step}: the run has diverged; {kept}; `byol resume` would fail again: begin a new run with a lower --lr or more --warmup-epochs, or with --on-collapse rollback{}",
        if *f16 { "; or it is beyond the range of f16: --precision bf16 or f32" } else { "" }
    )]
    Diverged {
        /// Loss, or norm of the weights.
        what: &'static str,
        /// What it is.
        value: f64,
        /// The step, from 1.
        step: u64,
        /// Whether it was computed in f16.
        f16: bool,
        /// Where to go back to.
        kept: String,
    },
}

fn too_few(batch: usize, images: usize, root: &Path) -> String {
    let root = root.display();
    match images {
        0 | 1 => format!("{root} has too few training images ({images}); give at least two"),
        n => format!(
            "batch {batch} is larger than the data: {n} training images in {root}; use --batch {n} or less, or add images"
        ),
    }
}

impl Error {
    /// Whether all ranks have come to it together: then one need say so.
    pub fn is_of_all_ranks(&self) -> bool {
        use Error::*;
        matches!(self, Collapsed { .. } | Diverged { .. } | Overflow { .. } | Ranks { .. } | OtherRank { .. })
    }
}

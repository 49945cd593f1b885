//! `byol resume RUN`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    device::DeviceChoice,
    train::{
        Run, RunContext,
        run::{extend_plan, read_plan},
    },
};

use super::{CpuArgs, data_args, demo, load_training_data, mpi_job::MpiJob, open_nth_device, set_threads, stop_flag};
use crate::terminal::{self, Result, plural};

const EXAMPLES: &str = "\
Examples:
  byol resume byol-runs/photos               Continue a stopped run
  byol resume byol-runs/photos --epochs 200  Extend a finished run to 200 epochs";

/// Resume a run from its latest checkpoint
///
/// The result is bit-identical to that of an uninterrupted run. `--epochs` changes the length of
/// the run, even after it has finished: learning rate and tau continue from where a run of N epochs
/// with the same recipe would be at this step.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Run folder
    run: PathBuf,
    /// Folder of the images, if they were moved since the run started
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,
    /// New number of epochs, in total
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    epochs: Option<u64>,
    #[command(flatten)]
    cpu: CpuArgs,
}

pub fn run(args: &Args, job: &MpiJob) -> Result<ExitCode> {
    // Only rank 0 needs the folder.
    let read = || args.epochs.map_or_else(|| read_plan(&args.run), |epochs| extend_plan(&args.run, epochs));
    let plan = job.ranks.is_root().then(read).transpose()?;
    let plan = job.ranks.broadcast_value(plan).expect("rank 0 has read it");
    let threads = set_threads(job.threads(args.cpu.threads))?;
    let device: DeviceChoice = plan.device.parse()?;
    let opened = open_nth_device(device, job.local[0])?;
    let dataset = match (&args.data, plan.recipe_name == demo::NAME) {
        (Some(moved), _) => data_args::open_moved(moved, &plan)?,
        (None, true) => demo::dataset(),
        (None, false) => data_args::open_moved(&plan.data, &plan)?,
    };
    let data = load_training_data(dataset, &plan.recipe, job.local[1])?;
    let stop = stop_flag();
    let context = RunContext { ranks: job.ranks, ..RunContext::single_process(opened.device, threads) };
    let run = Run::resume(&args.run, plan, &data, context)?;
    let total = run.plan.schedule.total;
    terminal::note(format!("resuming at step {} of {total}", run.byol.k));
    if let Some(last) = run.plan.extended.last().filter(|last| last.step == run.byol.k) {
        terminal::note(format!(
            "new schedule: {} instead of {}; learning rate {:.4} and tau {:.4} at this step",
            plural(run.plan.recipe.train.epochs as usize, "epoch"),
            last.epochs,
            run.byol.schedule.eta(run.byol.k),
            run.byol.schedule.tau(run.byol.k)
        ));
    } else if run.byol.k == total {
        terminal::note("the run is complete; `--epochs` extends it");
    }
    super::pretrain::describe(&run.plan, &opened.info.name, threads, &args.run);
    super::train(run, args.cpu.json, &stop, job)
}

//! `byol resume RUN`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    device::DeviceChoice,
    train::{Run, RunContext, run::read_plan},
};

use super::{CpuArgs, data_args, demo, load_training_data, mpi_job::MpiJob, open_nth_device, set_threads, stop_flag};
use crate::terminal::{self, Result};

/// Resume a run from its latest checkpoint
///
/// No flag changes the run: the result is bit-identical to that of an uninterrupted run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder
    run: PathBuf,
    /// Folder of the images, if they were moved since the run started
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,
    #[command(flatten)]
    cpu: CpuArgs,
}

pub fn run(args: &Args, job: &MpiJob) -> Result<ExitCode> {
    // Only rank 0 needs the folder.
    let plan = job.ranks.is_root().then(|| read_plan(&args.run)).transpose()?;
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
    terminal::note(format!("resuming at step {} of {}", run.byol.k, run.plan.schedule.total));
    super::pretrain::describe(&run.plan, &opened.info.name, threads, &args.run);
    super::train(run, args.cpu.json, &stop, job)
}

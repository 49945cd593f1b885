//! `byol resume RUN`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    data::Dataset,
    device::Choice,
    train::{Run, run::read_plan},
};

use super::{Work, demo, open, prepare, set_threads, stop_flag};
use crate::report::{self, Result};

/// Go on with a run from its newest checkpoint
///
/// Takes no flag that would change the run: it ends with the same bits as a run that was never stopped.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of the run
    run: PathBuf,
    #[command(flatten)]
    work: Work,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let plan = read_plan(&args.run)?;
    let threads = set_threads(args.work.threads)?;
    let device: Choice = plan.device.parse()?;
    let opened = open(device)?;
    let dataset = if plan.recipe_name == demo::NAME { demo::dataset() } else { Dataset::open(&plan.data)? };
    let data = prepare(dataset, plan.recipe.train.limit, &plan.recipe.health)?;
    let stop = stop_flag();
    let run = Run::resume(&args.run, plan, &data, opened.device, threads)?;
    report::note(format!("going on after step {} of {}", run.byol.k, run.plan.schedule.total));
    super::pretrain::describe(&run.plan, &opened.found.name, threads, &args.run);
    super::train(run, args.work.json, &stop)
}

//! `byol resume RUN`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    data::Dataset,
    device::Choice,
    train::{Place, Run, run::read_plan},
};

use super::{Work, demo, open_nth, prepare, ranks::Joined, set_threads, stop_flag};
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

pub fn run(args: &Args, joined: &Joined) -> Result<ExitCode> {
    // The folder need be where the first rank is.
    let plan = joined.ranks.leads().then(|| read_plan(&args.run)).transpose()?;
    let plan = joined.ranks.agree(plan).expect("rank 0 has read it");
    let threads = set_threads(joined.threads(args.work.threads))?;
    let device: Choice = plan.device.parse()?;
    let opened = open_nth(device, joined.local[0])?;
    let dataset = if plan.recipe_name == demo::NAME { demo::dataset() } else { Dataset::open(&plan.data)? };
    let data = prepare(dataset, plan.recipe.train.limit, &plan.recipe.health, joined.local[1])?;
    let stop = stop_flag();
    let place = Place { device: opened.device, threads, ranks: joined.ranks };
    let run = Run::resume(&args.run, plan, &data, place)?;
    report::note(format!("going on after step {} of {}", run.byol.k, run.plan.schedule.total));
    super::pretrain::describe(&run.plan, &opened.found.name, threads, &args.run);
    super::train(run, args.work.json, &stop, joined)
}

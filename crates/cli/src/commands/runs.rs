//! `byol runs`

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::train::{metrics, run::read_plan};
use serde::Serialize;
use serde_json::Value;

use crate::terminal::{self, Result, display_path, out, percent};

const EXAMPLES: &str = "\
Examples:
  byol runs         List the runs in byol-runs
  byol runs --json  List them for a script";

/// List runs, with their state and results
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Folder that contains runs
    #[arg(default_value = "byol-runs")]
    folder: PathBuf,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// Summary of a run.
#[derive(Debug, Serialize)]
struct RunSummary {
    run: String,
    /// `running`, `finished`, `failed` or `stopped`.
    state: &'static str,
    /// Epochs done, and of the plan.
    epochs: [u64; 2],
    images: usize,
    encoder: String,
    /// kNN accuracy before the first step, and the last one.
    knn: [Option<f64>; 2],
    /// RankMe, the last one.
    rankme: Option<f64>,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let folder = args.folder.display();
    let entries = fs::read_dir(&args.folder)
        .map_err(|e| format!("cannot read {folder}: {e}\nhint: pass the folder that contains your runs"))?;
    let mut runs: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.join("plan.toml").exists()).collect();
    runs.sort();
    let readable = |run: &PathBuf| match summarize(run) {
        Ok(summary) => Some(summary),
        Err(error) => {
            terminal::warning(error);
            None
        }
    };
    let runs: Vec<RunSummary> = runs.iter().filter_map(readable).collect();
    if args.json {
        out!("{}", serde_json::json!({ "runs": runs }));
    } else if runs.is_empty() {
        return Err(format!("no runs in {folder}\nhint: start one with `byol pretrain DATA`").into());
    } else {
        let width = runs.iter().map(|run| run.run.chars().count()).max().unwrap_or(0).max(3);
        out!("{:<width$}  state     epochs    images  encoder          kNN", "run");
        for r in &runs {
            let epochs = format!("{}/{}", r.epochs[0], r.epochs[1]);
            let knn = match r.knn {
                [Some(before), Some(last)] => format!("{} (initial: {})", percent(last), percent(before)),
                _ => "–".into(),
            };
            out!("{:<width$}  {:<8}  {epochs:<8}  {:<6}  {:<15}  {knn}", r.run, r.state, r.images, r.encoder);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn summarize(run: &Path) -> Result<RunSummary> {
    let plan = read_plan(run)?;
    let epochs = metrics::read_curves(&run.join("metrics.jsonl")).epochs;
    let values = |key: &str| epochs.iter().filter_map(|e| e[key].as_f64()).collect::<Vec<f64>>();
    let (knn, rankme) = (values("knn"), values("rankme"));
    let done = epochs.last().and_then(|e| e["epoch"].as_u64()).unwrap_or(0);
    let has_failed = epochs.last().is_some_and(|e| !matches!(e["collapse"], Value::Null));
    let is_locked = File::open(run.join("lock")).is_ok_and(|lock| lock.try_lock_shared().is_err());
    Ok(RunSummary {
        run: display_path(run),
        state: match () {
            () if is_locked => "running",
            () if done >= plan.recipe.train.epochs => "finished",
            () if has_failed => "failed",
            () => "stopped",
        },
        epochs: [done, plan.recipe.train.epochs],
        images: plan.images,
        encoder: format!("{} ×{}", plan.encoder.architecture.name(), plan.encoder.width),
        knn: [knn.first().copied(), knn.last().copied()],
        rankme: rankme.last().copied(),
    })
}

//! `byol ablate DATA --study STUDY`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::AtomicBool,
};

use byol::{
    apply::chart::{self, Point},
    device::{OpenedDevice, Precision},
    eval::{
        effective_rank::rankme,
        linear, logistic,
        metrics::top_k_hits,
        results::{ResultRow, ResultTable},
        split::LabeledSplit,
    },
    nn::{Encoder, weights},
    train::{
        self, Outcome, Plan, Recipe, RecipeOverrides, Run, RunContext, TrainingData,
        ablations::{self, Study, Variant},
        auto,
        recipe::Placement,
        run::read_plan,
    },
};

use super::{
    EvalFlags, INTERRUPTED,
    data_args::DataFlags,
    eval, load_training_data, open_device,
    recipe_args::{LengthArgs, RecipeArgs},
    set_threads, stop_flag,
};
use crate::terminal::{self, Progress, Result, out};

const EXAMPLES: &str = "\
Examples:
  byol ablate cifar10 --study views --epochs 10  Compare sets of augmentations";

/// Repeat an ablation study of the paper on your own images
///
/// A study consists of runs that differ in a few recipe keys, each in a run folder of its own.
/// Repeat the same command to continue a stopped study. The recipe flags apply to all runs.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Labeled images: class subfolders, CIFAR or IDX files
    data: PathBuf,
    /// Study: batch-size, views, target, predictor or beta
    #[arg(
        long,
        value_parser = ["batch-size", "views", "target", "predictor", "beta"],
        hide_possible_values = true
    )]
    study: String,
    /// Output folder of the study [default: byol-runs/STUDY]
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    data_flags: DataFlags,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    length: LengthArgs,
    #[command(flatten)]
    flags: EvalFlags,
}

impl Args {
    /// Recipe keys that apply to all runs.
    fn overrides(&self) -> Result<RecipeOverrides> {
        let mut overrides = RecipeOverrides::from_recipe(&self.recipe.recipe)?;
        self.length.apply(&mut overrides)?;
        let seed = i64::try_from(self.flags.seed)
            .map_err(|_| format!("invalid `--seed` {} (expected at most {})", self.flags.seed, i64::MAX))?;
        overrides.insert("seed", seed, "--seed")?;
        self.recipe.apply_set(&mut overrides)?;
        // The failure of a run is a result of the study.
        if !overrides.contains("health.on_collapse") {
            overrides.insert("health.on_collapse", "continue", "byol ablate")?;
        }
        Ok(overrides)
    }
}

/// Inputs common to all runs of a study.
struct Context<'a> {
    args: &'a Args,
    overrides: RecipeOverrides,
    base: Recipe,
    data: TrainingData,
    labeled: LabeledSplit,
    opened: OpenedDevice,
    threads: usize,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let mut overrides = args.overrides()?;
    let threads = set_threads(args.flags.compute.threads)?;
    let opened = open_device(args.flags.compute.device)?;
    let checked = overrides.check()?;
    let dataset = args.data_flags.open(&args.data, None)?;
    let data = load_training_data(dataset.clone(), &checked, 1)?;
    let folder = args.out.clone().unwrap_or_else(|| Path::new("byol-runs").join(&args.study));
    if overrides.name == "auto" && !overrides.contains("train.precision") {
        // Measured again, the faster precision may be another one.
        if let Some(precision) = recorded_precision(&folder)? {
            overrides.insert("train.precision", precision.name(), "the first run of the study")?;
        }
    }
    let (base, _) = auto::resolve(&overrides, &data.train, &opened)?;
    let labeled = eval::labeled(dataset, base.train.limit)?;
    let study = ablations::all(base.train.batch).into_iter().find(|s| s.name == args.study).expect("clap checks names");
    if args.study == "views" && base.views.first.time[1] > 0.0 {
        return Err("the study `views` leaves out augmentations of photos, which these views do not have".into());
    }
    if args.study == "views" && base.views.first.blur == 0.0 && base.views.second.blur == 0.0 {
        terminal::warning(
            "the recipe has no blur, so `no blur` repeats `all`\n\
             hint: pass `--set views.first.blur=0.5 --set views.second.blur=0.1`",
        );
    }
    let context = Context { args, overrides, base, data, labeled, opened, threads };
    let stop = stop_flag();
    let (mut rows, mut points) = (Vec::new(), Vec::new());
    for (i, variant) in study.variants.iter().enumerate() {
        terminal::note(format!("{} of {}: {}, {}", i + 1, study.variants.len(), variant.name, variant.method));
        let Some(results) = train_variant(&context, variant, &folder.join(slug(variant)), &stop)? else {
            terminal::note("stopped; run the same command again to continue");
            return Ok(ExitCode::from(INTERRUPTED));
        };
        points.push(point(&variant.name, variant.method, &results[0]));
        let prefix = format!("{}, {}", variant.name, variant.method);
        rows.extend(results.into_iter().map(|row| ResultRow { name: format!("{prefix}: {}", row.name), ..row }));
    }
    let baseline = random_initialization(&context)?;
    points.push(point("random initialization", "untrained", &baseline[0]));
    rows.extend(
        baseline.into_iter().map(|row| ResultRow { name: format!("random initialization: {}", row.name), ..row }),
    );
    write_results(&context, &study, &folder, rows, &points)
}

/// Returns the precision of the runs in the folder of a study; `None` if it has none yet.
fn recorded_precision(folder: &Path) -> Result<Option<Precision>> {
    let Ok(entries) = folder.read_dir() else { return Ok(None) };
    let mut runs = entries.flatten().map(|entry| entry.path()).filter(|run| run.join("plan.toml").is_file());
    Ok(runs.next().map(|run| read_plan(&run)).transpose()?.map(|plan| plan.recipe.train.precision))
}

/// Point of the plot, in percent.
fn point(setting: &str, series: &str, row: &ResultRow) -> Point {
    Point {
        setting: setting.into(),
        series: series.into(),
        value: 100.0 * row.value,
        interval: row.interval.map(|interval| interval.map(|v| 100.0 * v)),
    }
}

/// Results of the untrained encoder.
fn random_initialization(context: &Context) -> Result<Vec<ResultRow>> {
    let Context { overrides, base, data, opened, .. } = context;
    let plan = Plan::new(&overrides.name, base.clone(), data, opened.info.choice)?;
    let online = plan.initial_state(&opened.device).online;
    Ok(evaluate(context, &Encoder::new(plan.encoder, online))?.0)
}

/// Trains one run to its end, or resumes it, and evaluates it. `None` if it was stopped. The first
/// row is the linear accuracy.
fn train_variant(
    context: &Context,
    variant: &Variant,
    folder: &Path,
    stop: &AtomicBool,
) -> Result<Option<Vec<ResultRow>>> {
    let run = open_run(context, variant, folder)?;
    // Evaluated if the run fails in its first epoch.
    let file = folder.join("encoder.safetensors");
    if !file.exists() {
        weights::save(&file, &run.plan.encoder, &run.byol.online)?;
    }
    let suffix = match train_run(run, stop)? {
        RunEnd::Stopped => return Ok(None),
        RunEnd::Finished => "",
        RunEnd::Failed => " (failed: its last checkpoint)",
    };
    Ok(Some(evaluate_run(context, folder, suffix)?))
}

/// Creates the run of a variant, or resumes the one in the folder.
fn open_run(context: &Context, variant: &Variant, folder: &Path) -> Result<Run> {
    let mut overrides = context.overrides.clone();
    for (key, value) in &variant.set {
        overrides.insert(key, value.clone(), context.args.study.as_str())?;
    }
    let recipe = overrides.apply_to(&context.base)?;
    let mut plan = Plan::new(&overrides.name, recipe, &context.data, context.opened.info.choice)?;
    if plan.recipe.views.placement == Placement::Auto {
        // Runs of a study differ only in the studied keys.
        plan.recipe.views.placement = Placement::Cpu;
    }
    let run_context = RunContext::single_process(context.opened.device.clone(), context.threads);
    if !folder.join("plan.toml").is_file() {
        return Ok(Run::create(folder, plan, &context.data, run_context, false)?);
    }
    let existing = read_plan(folder)?;
    if (&existing.recipe, existing.images) != (&plan.recipe, plan.images) {
        let folder = folder.display();
        return Err(format!(
            "{folder} contains a run with different settings\nhint: choose another `--out`, or remove it"
        )
        .into());
    }
    Ok(Run::resume(folder, existing, &context.data, run_context)?)
}

/// End of a run of a study.
enum RunEnd {
    /// Stopped by the user.
    Stopped,
    /// All steps are done.
    Finished,
    /// Diverged or collapsed. The result is that of its last checkpoint.
    Failed,
}

fn train_run(mut run: Run, stop: &AtomicBool) -> Result<RunEnd> {
    let mut progress = Progress::new(&run.plan, run.byol.k);
    let outcome = run.run(stop, |event| progress.show(&event));
    progress.finish();
    match outcome {
        Ok(Outcome::Stopped(_)) => Ok(RunEnd::Stopped),
        Ok(Outcome::Finished) => Ok(RunEnd::Finished),
        Err(e @ (train::Error::Diverged { .. } | train::Error::Overflow { .. } | train::Error::Collapsed { .. })) => {
            terminal::warning(terminal::split_hint(&e.to_string()).0);
            Ok(RunEnd::Failed)
        }
        Err(e) => Err(e.into()),
    }
}

/// Evaluates a run and saves the results in its folder. `suffix` is appended to the names.
fn evaluate_run(context: &Context, folder: &Path, suffix: &str) -> Result<Vec<ResultRow>> {
    let encoder = weights::load(folder, &context.opened.device)?;
    let (rows, details) = evaluate(context, &encoder)?;
    let rows: Vec<ResultRow> =
        rows.into_iter().map(|row| ResultRow { name: format!("{}{suffix}", row.name), ..row }).collect();
    let table = ResultTable {
        evaluation: "linear-fast".into(),
        encoder: "encoder.safetensors".into(),
        data: eval::absolute(&context.args.data).display().to_string(),
        seed: context.args.flags.seed,
        settings: serde_json::json!({ "study": context.args.study, "images": context.labeled.train.len() }),
        details,
        rows: rows.clone(),
    };
    table
        .save(folder)
        .map_err(|e| format!("cannot write the results into {}: {e}\nhint: free some disk space", folder.display()))?;
    Ok(rows)
}

/// Linear accuracy on frozen features and their effective rank, with the selected hyperparameters.
fn evaluate(context: &Context, encoder: &Encoder) -> Result<(Vec<ResultRow>, serde_json::Value)> {
    let (data, seed) = (&context.labeled, context.args.flags.seed);
    let train = eval::features(encoder, &data.train, "embedding training images")?;
    let test = eval::features(encoder, &data.test, "embedding test images")?;
    let (classes, labels, test_labels) = (data.classes.len(), eval::labels(&data.train), eval::labels(&data.test));
    let held_out = linear::held_out_mask(labels, seed);
    let found = logistic::fit_best(&train, labels, classes, &logistic::strengths(), &held_out);
    let hits = top_k_hits(&found.classifier.scores(&test), test_labels, classes, 1);
    let sampled = train.n.min(2048);
    let sample = train.subset(&(0..sampled).map(|i| i * train.n / sampled).collect::<Vec<_>>());
    let rows =
        vec![ResultRow::hit_rate("linear top-1", seed, &hits), ResultRow::without_interval("RankMe", rankme(&sample))];
    Ok((rows, serde_json::json!({ "l2": found.l2, "held_out": found.held_out_score })))
}

/// Writes the table and the plot, and prints the table.
fn write_results(
    context: &Context,
    study: &Study,
    folder: &Path,
    rows: Vec<ResultRow>,
    points: &[Point],
) -> Result<ExitCode> {
    let (args, recipe) = (context.args, &context.base);
    let table = ResultTable {
        evaluation: study.name.into(),
        encoder: folder.display().to_string(),
        data: args.data.display().to_string(),
        seed: args.flags.seed,
        settings: serde_json::json!({
            "study": study.title, "paper": study.paper, "epochs": recipe.train.epochs, "batch": recipe.train.batch,
            "encoder": recipe.encoder.architecture.name(), "width": recipe.encoder.width,
            "images": context.data.train.len(),
        }),
        details: serde_json::Value::Null,
        rows,
    };
    let plot = folder.join(format!("{}.svg", study.name));
    super::write_file(&plot, chart::svg(study.title, "linear top-1, %", points).as_bytes())?;
    let text = serde_json::to_string_pretty(&table).expect("a table is plain data") + "\n";
    super::write_file(&folder.join(format!("{}.json", study.name)), text.as_bytes())?;
    if args.flags.compute.json {
        out!("{}", serde_json::to_string(&table).expect("a table is plain data"));
    } else {
        out!("{}", study.title);
        eval::print(&table.rows);
        out!("paper: {}", study.paper);
    }
    terminal::note(format!("wrote {}", plot.display()));
    Ok(ExitCode::SUCCESS)
}

/// Folder name of a run: lower-case letters, digits and hyphens.
fn slug(variant: &Variant) -> String {
    let text = format!("{} {}", variant.method, variant.name).to_lowercase().replace('β', "beta");
    let kept: String = text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    kept.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

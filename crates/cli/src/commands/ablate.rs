//! `byol ablate DATA --study STUDY`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::AtomicBool,
};

use byol::{
    apply::chart::{self, Point},
    data::Dataset,
    device::Opened,
    eval::{
        linear, logistic,
        metrics::in_top,
        rows::{Row, Table},
    },
    nn::{Encoder, weights},
    train::{
        self, Outcome, Place, Plan, Prepared, Recipe, Run,
        recipe::{Draft, Finish},
        run::read_plan,
        studies::{self, Study, Variant},
    },
};

use super::{Flags, INTERRUPTED, eval, open, prepare, pretrain, set_threads, stop_flag};
use crate::report::{self, Progress, Result, out};

/// Repeat an ablation of the paper on your own images
///
/// A study is some runs that differ in a few keys of the recipe; each is a run like any other, in a folder of its own. A study that was
/// stopped goes on where it was when the same command is given again.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Labelled images: class subfolders, CIFAR or IDX files
    data: PathBuf,
    /// batch-size, views, target, predictor or beta
    #[arg(long, value_parser = ["batch-size", "views", "target", "predictor", "beta"])]
    study: String,
    /// Folder for the study [default: byol-runs/STUDY]
    #[arg(long)]
    out: Option<PathBuf>,
    /// auto, a built-in recipe or a TOML file: what all runs have in common
    #[arg(long, default_value = "auto")]
    recipe: String,
    /// Set any key of the recipe for all runs
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Passes over the images, of each run
    #[arg(long, value_name = "N")]
    epochs: Option<i64>,
    /// Take N training images, evenly spread over the data's own order
    #[arg(long, value_name = "N")]
    limit: Option<i64>,
    #[command(flatten)]
    flags: Flags,
}

impl Args {
    /// What was said for all runs.
    fn draft(&self) -> Result<Draft> {
        let mut draft = Draft::from_recipe(&self.recipe)?;
        self.epochs.map(|n| draft.say("train.epochs", n, "--epochs")).transpose()?;
        self.limit.map(|n| draft.say("train.limit", n, "--limit")).transpose()?;
        let seed = i64::try_from(self.flags.seed);
        draft.say(
            "seed",
            seed.map_err(|_| format!("--seed is {}; the largest is {}", self.flags.seed, i64::MAX))?,
            "--seed",
        )?;
        for text in &self.set {
            draft.set(text)?;
        }
        // A run that fails is a result of a study.
        if !draft.has("health.on_collapse") {
            draft.say("health.on_collapse", "go-on", "byol ablate")?;
        }
        Ok(draft)
    }
}

/// What all runs of a study share.
struct Shared<'a> {
    args: &'a Args,
    draft: Draft,
    base: Recipe,
    data: Prepared,
    labelled: eval::Labelled,
    opened: Opened,
    threads: usize,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let draft = args.draft()?;
    let threads = set_threads(args.flags.on.threads)?;
    let opened = open(args.flags.on.device)?;
    let said = pretrain::checked(&draft)?;
    let data = prepare(Dataset::open(&args.data)?, said.train.limit, &said.health, 1)?;
    let (base, _) = pretrain::resolved(&draft, said, &data, &opened)?;
    let labelled = eval::labelled(Dataset::open(&args.data)?, base.train.limit)?;
    let study =
        studies::all(base.train.batch).into_iter().find(|s| s.name == args.study).expect("clap checked the name");
    let folder = args.out.clone().unwrap_or_else(|| Path::new("byol-runs").join(study.name));
    if args.study == "views" && base.views.first.blur == 0.0 && base.views.second.blur == 0.0 {
        report::warning(
            "the recipe does not blur, so `no blur` repeats `all`; --set views.first.blur=0.5 --set views.second.blur=0.1 would",
        );
    }
    let shared = Shared { args, draft, base, data, labelled, opened, threads };
    let stop = stop_flag();
    let mut rows = Vec::new();
    let mut points = Vec::new();
    for (i, variant) in study.variants.iter().enumerate() {
        report::note(format!("{} of {}: {}, {}", i + 1, study.variants.len(), variant.name, variant.method));
        let Some(of_run) = one(&shared, variant, &folder.join(slug(variant)), &stop)? else {
            report::note(format!(
                "stopped; go on with the same command (what is done is kept in {})",
                folder.display()
            ));
            return Ok(ExitCode::from(INTERRUPTED));
        };
        let value = of_run[0].clone();
        let interval = value.interval.map(|i| i.map(|v| 100.0 * v));
        points.push(Point {
            setting: variant.name.clone(),
            series: variant.method.into(),
            value: 100.0 * value.value,
            interval,
        });
        rows.extend(
            of_run
                .into_iter()
                .map(|row| Row { name: format!("{}, {}: {}", variant.name, variant.method, row.name), ..row }),
        );
    }
    rows.extend(random(&shared)?.into_iter().map(|row| Row { name: format!("random weights: {}", row.name), ..row }));
    finish(&shared, &study, &folder, rows, &points)
}

/// What a network that has learned nothing gives: only what is above it was learned.
fn random(shared: &Shared) -> Result<Vec<Row>> {
    let plan = Plan::new(&shared.draft.name, shared.base.clone(), &shared.data, shared.opened.found.choice)?;
    let online = plan.start(&shared.opened.device).online;
    Ok(read_out(shared, &Encoder::new(plan.encoder, online))?.0)
}

/// Trains and evaluates one run, or what is left of it; none where somebody said stop. The first row is the linear accuracy.
fn one(shared: &Shared, variant: &Variant, folder: &Path, stop: &AtomicBool) -> Result<Option<Vec<Row>>> {
    let mut draft = shared.draft.clone();
    for (key, value) in &variant.set {
        draft.say(key, value.clone(), shared.args.study.as_str())?;
    }
    let recipe = draft.over(&shared.base)?;
    let mut plan = Plan::new(&draft.name, recipe, &shared.data, shared.opened.found.choice)?;
    if plan.recipe.views.finish == Finish::Auto {
        plan.recipe.views.finish = Finish::Cpu; // the runs of a study differ in what is studied alone
    }
    let device = shared.opened.device.clone();
    let run = if folder.join("plan.toml").is_file() {
        let begun = read_plan(folder)?;
        if (&begun.recipe, begun.images) != (&plan.recipe, plan.images) {
            let folder = folder.display();
            return Err(format!("{folder} holds a run with other settings; choose another --out, or remove it").into());
        }
        Run::resume(folder, begun, &shared.data, Place::alone(device, shared.threads))?
    } else {
        Run::create(folder, plan, &shared.data, Place::alone(device, shared.threads), false)?
    };
    // A run that breaks in its first epoch has what it began with.
    let file = folder.join("encoder.safetensors");
    if !file.exists() {
        weights::save(&file, &run.plan.encoder, &run.byol.online)?;
    }
    let failed = match learn(run, stop)? {
        Ended::Stopped => return Ok(None),
        Ended::Whole => "",
        Ended::Failed => " (failed: its last checkpoint)",
    };
    Ok(Some(measure(shared, folder, failed)?))
}

/// How a run of a study ended.
enum Ended {
    /// Somebody said stop.
    Stopped,
    /// All steps are done.
    Whole,
    /// It diverged or collapsed, which is a result: that of its last checkpoint.
    Failed,
}

fn learn(mut run: Run, stop: &AtomicBool) -> Result<Ended> {
    let mut progress = Progress::new(&run.plan, run.byol.k);
    let outcome = run.go(stop, |event| progress.show(&event));
    progress.finish();
    match outcome {
        Ok(Outcome::Stopped(_)) => Ok(Ended::Stopped),
        Ok(Outcome::Finished) => Ok(Ended::Whole),
        Err(e @ (train::Error::Diverged { .. } | train::Error::Overflow { .. } | train::Error::Collapsed { .. })) => {
            report::warning(&e);
            Ok(Ended::Failed)
        }
        Err(e) => Err(e.into()),
    }
}

/// The figures of a run, which are kept in its folder; `failed` is put behind their names.
fn measure(shared: &Shared, folder: &Path, failed: &str) -> Result<Vec<Row>> {
    let encoder = weights::load(folder, &shared.opened.device)?;
    let (rows, found) = read_out(shared, &encoder)?;
    let rows: Vec<Row> = rows.into_iter().map(|row| Row { name: format!("{}{failed}", row.name), ..row }).collect();
    let table = Table {
        evaluation: "linear-fast".into(),
        encoder: "encoder.safetensors".into(),
        data: eval::whole(&shared.args.data).display().to_string(),
        seed: shared.args.flags.seed,
        settings: serde_json::json!({ "study": shared.args.study, "images": shared.labelled.train.len() }),
        found,
        rows: rows.clone(),
    };
    table
        .save(folder)
        .map_err(|e| format!("cannot write the figures into {}: {e}; free some space", folder.display()))?;
    Ok(rows)
}

/// Linear accuracy on features that are computed once, and how spread out the features are; with what was chosen.
fn read_out(shared: &Shared, encoder: &Encoder) -> Result<(Vec<Row>, serde_json::Value)> {
    let (data, seed) = (&shared.labelled, shared.args.flags.seed);
    let x = eval::features(encoder, &data.train, "embedding training images")?;
    let test = eval::features(encoder, &data.test, "embedding test images")?;
    let (classes, labels) = (data.classes.len(), eval::labels(&data.test));
    let of_train = eval::labels(&data.train);
    let out = linear::held_out(of_train, seed);
    let found = logistic::fit_best(&x, of_train, classes, &logistic::strengths(), &out);
    let hits = in_top(&found.classifier.scores(&test), labels, classes, 1);
    let some = x.subset(&(0..x.n.min(2048)).map(|i| i * x.n / x.n.min(2048)).collect::<Vec<_>>());
    let rows = vec![Row::rate("linear top-1", seed, &hits), Row::plain("RankMe", byol::eval::spectrum::rankme(&some))];
    Ok((rows, serde_json::json!({ "l2": found.l2, "held_out": found.held_out })))
}

/// The table and the plot.
fn finish(shared: &Shared, study: &Study, folder: &Path, rows: Vec<Row>, points: &[Point]) -> Result<ExitCode> {
    let recipe = &shared.base;
    let table = Table {
        evaluation: study.name.into(),
        encoder: folder.display().to_string(),
        data: shared.args.data.display().to_string(),
        seed: shared.args.flags.seed,
        settings: serde_json::json!({
            "study": study.title, "paper": study.paper, "epochs": recipe.train.epochs, "batch": recipe.train.batch,
            "encoder": recipe.encoder.architecture.name(), "width": recipe.encoder.width, "images": shared.data.train.len(),
        }),
        found: serde_json::Value::Null,
        rows,
    };
    let plot = folder.join(format!("{}.svg", study.name));
    super::write_file(&plot, chart::svg(study.title, "linear top-1, %", points).as_bytes())?;
    let text = serde_json::to_string_pretty(&table).expect("a table is plain data") + "\n";
    super::write_file(&folder.join(format!("{}.json", study.name)), text.as_bytes())?;
    if shared.args.flags.on.json {
        out!("{}", serde_json::to_string(&table).expect("a table is plain data"));
    } else {
        out!("{}", study.title);
        eval::print(&table.rows);
        out!("the paper: {}", study.paper);
    }
    report::note(format!("plot: {}", plot.display()));
    Ok(ExitCode::SUCCESS)
}

/// The folder of a run: its name in letters, digits and hyphens.
fn slug(variant: &Variant) -> String {
    let text = format!("{} {}", variant.method, variant.name).to_lowercase().replace('β', "beta");
    let kept: String = text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    kept.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

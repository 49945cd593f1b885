//! `byol demo`

use std::{path::PathBuf, process::ExitCode, time::Instant};

use byol::{
    apply::sheet::{self, Tile},
    data::{Dataset, Images, synthetic},
    device::{self, Choice},
    eval::{Features, embed, knn},
    nn::{Encoder, EncoderSpec, Weights},
    train::{Event, Outcome, Place, Plan, Prepared, Recipe, Run, recipe::Draft},
};

use super::{INTERRUPTED, set_threads, stop_flag};
use crate::report::{self, Progress, Result, out, percent};

/// Pretrain on small synthetic images and show what was learned, in a few minutes
///
/// The images are procedural: patterns in ink on paper of chance lightness, scale and turn. Their six classes are used only to measure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder for the run [default: byol-runs/demo]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

/// The recipe name in the plan of a demo.
pub const NAME: &str = "demo";

const IMAGES: usize = 2000;
const TEST_IMAGES: usize = 800;
const CLASSES: usize = synthetic::PATTERNS.len();
const K: usize = 20;
const T: f64 = 0.07;

/// Small enough for two cores and five minutes.
const RECIPE: &str = include_str!("demo.toml");

pub fn run(args: &Args) -> Result<ExitCode> {
    let out = args.out.clone().unwrap_or_else(|| super::free_folder("byol-runs/demo"));
    let began = Instant::now();
    let threads = set_threads(0)?;
    let opened = device::open(Choice::Cpu)?;
    report::note(format!("{IMAGES} synthetic images of patterns, {TEST_IMAGES} more to test on"));
    let dataset = dataset();
    let test = dataset.test.clone().expect("the synthetic data have a test split");
    let recipe = Draft::from_text(NAME, RECIPE)?.over(&Recipe::default())?;
    let data = Prepared::new(dataset, 0, &recipe.health, 0, &|_| ())?;
    let plan = Plan::new(NAME, recipe, &data, opened.found.choice)?;
    super::pretrain::describe(&plan, &opened.found.name, threads, &out);

    let stop = stop_flag();
    let mut run = Run::create(&out, plan, &data, Place::alone(opened.device, threads), false)?;
    let before = measure(&run.plan.encoder, &run.byol.online, &data.train, &test)?;
    let mut progress = Progress::new(&run.plan, 0);
    let outcome = run.go(&stop, |event: Event| progress.show(&event));
    progress.finish();
    if let Outcome::Stopped(_) = outcome? {
        report::note(format!("stopped; {} holds what was learned so far", out.display()));
        return Ok(ExitCode::from(INTERRUPTED));
    }
    let after = measure(&run.plan.encoder, &run.byol.online, &data.train, &test)?;
    let picture = out.join("neighbours.png");
    super::write_file(&picture, &neighbours(&data.train, &test, &before, &after)?)?;

    let seconds = began.elapsed().as_secs_f64();
    if args.json {
        let result = serde_json::json!({
            "knn_before": before.accuracy, "knn_after": after.accuracy, "seconds": seconds,
            "run": report::shown(&out), "encoder": report::shown(&out.join("encoder.safetensors")),
            "picture": report::shown(&picture),
        });
        out!("{result}");
    } else {
        out!("kNN accuracy on {TEST_IMAGES} synthetic test images of {CLASSES} classes:");
        out!("  before, random encoder   {}", percent(before.accuracy));
        out!("  after, BYOL              {}", percent(after.accuracy));
        out!("nearest neighbours, before and after: {}", picture.display());
        out!("it took {}. Now with your own images: byol pretrain FOLDER", report::duration(seconds));
    }
    Ok(ExitCode::SUCCESS)
}

/// The demo's images; made anew each time, also for `byol resume`.
pub fn dataset() -> Dataset {
    synthetic::dataset(0, IMAGES, TEST_IMAGES)
}

struct Measured {
    accuracy: f64,
    bank: Features,
    queries: Features,
}

fn measure(spec: &EncoderSpec, weights: &Weights, train: &Images, test: &Images) -> Result<Measured> {
    let encoder = Encoder::new(spec.clone(), weights.clone());
    let (bank, queries) = (embed(&encoder, train, |_| ())?, embed(&encoder, test, |_| ())?);
    let labels = |images: &Images| images.labels().expect("the synthetic data have labels").to_vec();
    let accuracy = knn::classify(&bank, &labels(train), &queries, &labels(test), CLASSES, K, T).accuracy;
    Ok(Measured { accuracy, bank: bank.unit(), queries: queries.unit() })
}

/// A row a class: the query in a blue frame, its five nearest before, its five nearest after; green where the class is the same.
fn neighbours(train: &Images, test: &Images, before: &Measured, after: &Measured) -> Result<Vec<u8>> {
    const SIDE: u32 = 72;
    let labels = |images: &Images, i: usize| images.labels().map(|l| l[i]);
    let mut rows = Vec::new();
    let first: Vec<usize> = (0..CLASSES).collect();
    let near = [before, after].map(|side| knn::nearest(&side.bank, &side.queries.subset(&first), 5));
    for q in first {
        let mut row = vec![Tile::image(&*test.get(q)?, SIDE).framed([60, 90, 220])];
        for (i, _) in near.iter().flat_map(|side| &side[q]) {
            let same = labels(train, *i) == labels(test, q);
            let colour = if same { [40, 170, 70] } else { [210, 60, 50] };
            row.push(Tile::image(&*train.get(*i)?, SIDE).framed(colour));
        }
        rows.push(row);
    }
    Ok(sheet::png(&rows, SIDE))
}

//! `byol demo`

use std::{path::PathBuf, process::ExitCode, time::Instant};

use byol::{
    apply::sheet::{self, Tile},
    data::{Dataset, Images, synthetic},
    device::{self, DeviceChoice},
    eval::{Features, embed, knn},
    nn::{Encoder, EncoderSpec, Weights},
    train::{
        Event, Outcome, Plan, Recipe, Run, RunContext, TrainingData, data::PrepareOptions, recipe::RecipeOverrides,
    },
};

use super::{INTERRUPTED, set_threads, stop_flag};
use crate::terminal::{self, Progress, Result, display_path, out, percent};

const EXAMPLES: &str = "\
Examples:
  byol demo             Train on synthetic images in about two minutes
  byol demo --epochs 8  Train for fewer epochs";

/// Pretrain on synthetic images and show the result, in a few minutes
///
/// The images are procedural: ink patterns on paper with random lightness, scale and rotation.
/// Their six classes are used only for evaluation.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Folder for the run [default: byol-runs/demo]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Number of epochs [default: 24]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    epochs: Option<u64>,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// Recipe name in the plan of a demo.
pub const NAME: &str = "demo";

const IMAGES: usize = 2000;
const TEST_IMAGES: usize = 800;
const CLASSES: usize = synthetic::PATTERNS.len();

/// kNN neighbors and temperature.
const K: usize = 20;
const T: f64 = 0.07;

/// Recipe sized for two cores and five minutes.
const RECIPE: &str = include_str!("demo.toml");

pub fn run(args: &Args) -> Result<ExitCode> {
    let out = args.out.clone().unwrap_or_else(|| super::free_folder("byol-runs/demo"));
    let start = Instant::now();
    let threads = set_threads(0)?;
    let opened = device::open(DeviceChoice::Cpu)?;
    terminal::note(format!("synthetic patterns: {IMAGES} images for training, {TEST_IMAGES} for testing"));
    let dataset = dataset();
    let test = dataset.test.clone().expect("the synthetic data have a test split");
    let recipe = RecipeOverrides::from_text(NAME, RECIPE)?;
    let recipe = args.epochs.map_or(recipe.clone(), |epochs| recipe.epochs(epochs)).apply_to(&Recipe::default())?;
    let data = TrainingData::prepare(dataset, PrepareOptions::from(&recipe), &|_| ())?;
    let plan = Plan::new(NAME, recipe, &data, opened.info.choice)?;
    super::pretrain::describe(&plan, &opened.info.name, threads, &out);

    let stop = stop_flag();
    let mut run = Run::create(&out, plan, &data, RunContext::single_process(opened.device, threads), false)?;
    let before = evaluate(&run.plan.encoder, &run.byol.online, &data.train, &test)?;
    let mut progress = Progress::new(&run.plan, 0);
    let outcome = run.run(&stop, |event: Event| progress.show(&event));
    progress.finish();
    if let Outcome::Stopped(_) = outcome? {
        terminal::note(format!("stopped; resume with: `byol resume {}`", out.display()));
        return Ok(ExitCode::from(INTERRUPTED));
    }
    let after = evaluate(&run.plan.encoder, &run.byol.online, &data.train, &test)?;
    let picture = out.join("neighbors.png");
    super::write_file(&picture, &draw_neighbors(&data.train, &test, &before, &after)?)?;

    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let result = serde_json::json!({
            "knn_before": before.accuracy, "knn_after": after.accuracy, "seconds": seconds,
            "run": display_path(&out), "encoder": display_path(&out.join("encoder.safetensors")),
            "picture": display_path(&picture),
        });
        out!("{result}");
    } else {
        out!("kNN accuracy on {TEST_IMAGES} synthetic test images of {CLASSES} classes:");
        out!("  random initialization  {}", percent(before.accuracy));
        out!("  after pretraining      {}", percent(after.accuracy));
        out!("nearest neighbors before and after: {}", picture.display());
        out!("finished in {}; next, try your own images: `byol pretrain FOLDER`", terminal::duration(seconds));
    }
    Ok(ExitCode::SUCCESS)
}

/// The demo's images, generated anew each time; `byol resume` uses them too.
pub fn dataset() -> Dataset {
    synthetic::dataset(0, IMAGES, TEST_IMAGES)
}

/// kNN accuracy, and the unit-length features of the training and test images.
struct Evaluation {
    accuracy: f64,
    bank: Features,
    queries: Features,
}

fn evaluate(spec: &EncoderSpec, weights: &Weights, train: &Images, test: &Images) -> Result<Evaluation> {
    let encoder = Encoder::new(spec.clone(), weights.clone());
    let (bank, queries) = (embed(&encoder, train, |_| ())?, embed(&encoder, test, |_| ())?);
    let labels = |images: &Images| images.labels().expect("the synthetic data have labels").to_vec();
    let accuracy = knn::classify(&bank, &labels(train), &queries, &labels(test), CLASSES, K, T).accuracy;
    Ok(Evaluation { accuracy, bank: bank.l2_normalized(), queries: queries.l2_normalized() })
}

/// Draws one row per class: a query in a blue frame, its five nearest neighbors before pretraining
/// and, after a gap, its five after; framed green if the class matches.
fn draw_neighbors(train: &Images, test: &Images, before: &Evaluation, after: &Evaluation) -> Result<Vec<u8>> {
    const SIDE: u32 = 72;
    let label = |images: &Images, i: usize| images.labels().map(|labels| labels[i]);
    let queries: Vec<usize> = (0..CLASSES).collect();
    let nearest = [before, after].map(|side| knn::nearest(&side.bank, &side.queries.subset(&queries), 5));
    let mut rows = Vec::new();
    for query in queries {
        let mut row = vec![Tile::image(&*test.get(query)?, SIDE).framed([60, 90, 220])];
        for side in &nearest {
            row.push(Tile::blank(SIDE));
            for (i, _) in &side[query] {
                let color = if label(train, *i) == label(test, query) { [40, 170, 70] } else { [210, 60, 50] };
                row.push(Tile::image(&*train.get(*i)?, SIDE).framed(color));
            }
        }
        rows.push(row);
    }
    Ok(sheet::png(&rows, SIDE))
}

//! `byol eval transfer ENCODER DATA…`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::{
    data,
    eval::{
        finetune,
        protocol::{Labels, MetricKind, ScoredPredictions},
        results::ResultRow,
        split::{self, LabeledSplit},
        transfer,
    },
    nn::Encoder,
};
use serde_json::{Value, json};

use super::{BaselineArgs, CommonArgs, EvalFlags, NamedEncoder, absolute, features};
use crate::commands::data_args::DataFlags;
use crate::terminal::{self, Result, display_path};

const EXAMPLES: &str = "\
Examples:
  byol eval transfer byol-runs/photos flowers pets  Logistic regression on two data sets";

/// Evaluate the encoder on several labeled data sets
///
/// Follows table 3 of the paper: logistic regression by L-BFGS on frozen features and, with
/// --finetune, fine-tuning of the encoder. Data sets are scored by top-1 accuracy; Aircraft, Pets,
/// Caltech and Flowers, recognized by their folder name, by mean accuracy per class; images with
/// several classes (labels.csv) by 11-point mean average precision.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Encoder file (.safetensors) or run folder
    encoder: PathBuf,
    /// Folders of labeled images
    #[arg(required = true)]
    data: Vec<PathBuf>,
    #[command(flatten)]
    data_flags: DataFlags,
    /// Also fine-tune the encoder
    #[arg(long)]
    finetune: bool,
    /// Number of epochs of fine-tuning
    #[arg(long, value_name = "N", default_value_t = 30)]
    epochs: usize,
    #[command(flatten)]
    baseline: BaselineArgs,
    /// Number of training images per data set, sampled evenly (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
    #[command(flatten)]
    flags: EvalFlags,
}

/// A data set with its name and metric.
struct Task {
    name: String,
    data: LabeledSplit,
    metric: MetricKind,
}

/// Results of all tasks.
#[derive(Default)]
struct Results {
    rows: Vec<ResultRow>,
    /// Selected hyperparameters.
    chosen: Vec<Value>,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.epochs == 0 {
        return Err("`--epochs` must be at least 1".into());
    }
    let paths: Vec<String> = args.data.iter().map(|path| absolute(path).display().to_string()).collect();
    let common = CommonArgs {
        encoder: args.encoder.clone(),
        data: paths.join(" ").into(),
        data_flags: args.data_flags.clone(),
        flags: args.flags.clone(),
    };
    let encoders = common.encoders(&args.baseline)?;
    let mut results = Results::default();
    let mut sets = Vec::new();
    for path in &args.data {
        let task = open(args, path, &encoders[0].0)?;
        sets.push(json!({
            "data": display_path(&absolute(path)), "measure": task.metric.name(),
            "train_images": task.data.train.len(), "test_images": task.data.test.len(),
        }));
        for encoder in &encoders {
            evaluate(args, &task, encoder, &mut results)?;
        }
    }
    let settings = json!({
        "sets": sets, "finetune": args.finetune, "epochs": args.epochs, "with_random": args.baseline.with_random,
    });
    common.finish("transfer", settings, json!({ "chosen": results.chosen }), results.rows)
}

/// Opens and checks a data set.
fn open(args: &Args, path: &Path, encoder: &Encoder) -> Result<Task> {
    // Data sets with the same folder name are told apart by their paths.
    let same_name = args.data.iter().filter(|other| folder_name(other) == folder_name(path)).count();
    let name = if same_name == 1 { folder_name(path) } else { path.display().to_string() };
    let data = super::split(args.data_flags.open(path, Some(&encoder.spec.levels))?, args.limit)?;
    let (Some(train), Some(test)) = (Labels::from_images(&data.train), Labels::from_images(&data.test)) else {
        return Err(data::Error::Unlabeled(path.to_owned()).into());
    };
    super::warn_if_enlarged(encoder, &*data.train.get(0)?, path);
    split::ensure_learnable(path, classes(train), classes(test), |class| data.classes[class].clone())?;
    let metric = MetricKind::for_dataset(&folder_name(path), matches!(test, Labels::Multi(_)));
    Ok(Task { name, data, metric })
}

fn folder_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// Each class of each image.
fn classes(labels: Labels<'_>) -> impl Iterator<Item = usize> + '_ {
    (0..labels.len()).flat_map(move |i| labels.classes(i)).copied()
}

/// Evaluates one encoder on one task.
fn evaluate(args: &Args, task: &Task, (encoder, suffix): &NamedEncoder, results: &mut Results) -> Result<()> {
    let Task { name, data, metric } = task;
    let labels = |images| Labels::from_images(images).expect("`open` checks for labels");
    let (train_labels, test_labels) = (labels(&data.train), labels(&data.test));
    let (classes, seed) = (data.classes.len(), args.flags.seed);
    let row = |method: &str, scores: &[f64]| {
        let predictions = ScoredPredictions::new(*metric, scores, test_labels, classes);
        let name = format!("{name}, {method}{suffix}, {}", metric.name());
        ResultRow::fraction(name, data.test.len(), seed, |indices| predictions.metric_at(indices))
    };
    let (train, test) = (features(encoder, &data.train, name)?, features(encoder, &data.test, name)?);
    let linear = transfer::linear(&train, train_labels, &test, classes, *metric, seed);
    results.rows.push(row("linear", &linear.scores));
    results.chosen.push(json!({ "what": format!("{name}, linear{suffix}"), "l2": linear.l2 }));
    if args.finetune {
        let (scores, setting) = fine_tune(args, task, encoder)?;
        results.rows.push(row("fine-tuned", &scores));
        results.chosen.push(json!({ "what": format!("{name}, fine-tuned{suffix}"), "setting": setting }));
    }
    Ok(())
}

/// Scores of the test images after fine-tuning, and the selected hyperparameters.
fn fine_tune(args: &Args, task: &Task, encoder: &Encoder) -> Result<(Vec<f64>, Value)> {
    let Task { name, data, metric } = task;
    let protocol = finetune::Protocol {
        epochs: vec![args.epochs],
        batch: 256,
        rates: finetune::RATES.to_vec(),
        seed: args.flags.seed,
    };
    let images = finetune::images_seen(data.train.len(), &protocol) as u64;
    let bar = terminal::progress_bar(&format!("fine-tuning, {name}"), images);
    let tuned = finetune::train(encoder, &data.train, data.classes.len(), *metric, &protocol, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    super::must_be_finite(&tuned.classifier, "omit `--finetune` for this encoder")?;
    let setting = json!({ "rate": tuned.rate, "epochs": tuned.epochs, "held_out": tuned.held_out_metric });
    Ok((tuned.classifier.scores(&features(&tuned.encoder, &data.test, name)?), setting))
}

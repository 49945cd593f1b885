//! `byol eval finetune ENCODER DATA --labels FRACTION`

use std::process::ExitCode;

use byol::{
    eval::{
        finetune::{self, Protocol},
        linear,
        protocol::MetricKind,
        split::LabeledSplit,
    },
    nn::Encoder,
};
use serde_json::{Value, json};

use super::{LabeledArgs, features, labels, top_k_rows};
use crate::terminal::{self, Result, plural};

const EXAMPLES: &str = "\
Examples:
  byol eval finetune byol-runs/photos labeled --labels 10%    Fine-tune with a tenth of the labels
  byol eval finetune byol-runs/photos labeled --from-scratch  Compare with random weights";

/// Fine-tune the encoder with a classifier on a fraction of the labels
///
/// Follows the paper's semi-supervised evaluation: the same number of labeled images per class,
/// chosen by --seed; random crop and flip; SGD with Nesterov momentum, cosine schedule. Learning
/// rate and epochs are selected on a held-out fifth of these images. The encoder file stays
/// unchanged.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    labeled: LabeledArgs,
    /// Fraction of the labels, for example 1%, 10% or 100%
    #[arg(long, value_name = "FRACTION", default_value = "1%", value_parser = label_fraction)]
    labels: f64,
    /// Also train the same network from random initialization
    #[arg(long)]
    from_scratch: bool,
    /// Also train a linear classifier on the frozen encoder with the same labels, the learning
    /// rates of `byol eval linear` and the largest of --epochs
    #[arg(long)]
    frozen: bool,
    /// Numbers of epochs to select from
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [30, 50])]
    epochs: Vec<usize>,
    /// Maximum batch size
    #[arg(long, value_name = "N", default_value_t = 1024)]
    batch: usize,
    /// Base learning rates to select from, for batch size 256
    #[arg(long, value_name = "BASE,…", value_delimiter = ',', default_values_t = finetune::RATES)]
    rates: Vec<f64>,
}

/// Parses `1%`, `0.01` or `100%`.
fn label_fraction(text: &str) -> std::result::Result<f64, String> {
    let value = match text.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().map(|p| p / 100.0),
        // `1` alone could mean one percent or all labels.
        None => text.parse().map(|v| if v < 1.0 { v } else { f64::NAN }),
    };
    value
        .ok()
        .filter(|v| *v > 0.0 && *v <= 1.0)
        .ok_or_else(|| format!("invalid label fraction `{text}` (expected e.g. `1%`, `10%`, `100%`)"))
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.epochs.contains(&0) || args.batch < 2 || !args.rates.iter().all(|rate| rate.is_finite() && *rate > 0.0) {
        return Err("`--epochs` must be at least 1, `--batch` at least 2, and all `--rates` above 0".into());
    }
    let (common, seed) = (&args.labeled.common, args.labeled.common.flags.seed);
    let encoder = common.encoder()?;
    let mut data = args.labeled.open(&encoder)?;
    let classes = data.classes.len();
    data.train = data.train.subset(&finetune::label_subset(labels(&data.train), classes, args.labels, seed));
    terminal::note(format!("{} of {classes} classes", plural(data.train.len(), "labeled image")));
    if data.train.len() < 2 * classes && args.rates.len() * args.epochs.len() > 1 {
        terminal::warning(format!(
            "one label per class leaves none for validation: using the middle one of `--rates` and the first of \
             `--epochs`\nhint: increase `--labels`, which selects {} now",
            plural(data.train.len(), "label")
        ));
    }
    let mut rows = Vec::new();
    let mut chosen = Vec::new();
    let mut add = |name: &str, (scores, setting): (Vec<f64>, Value)| {
        rows.extend(top_k_rows(&scores, &data, seed, |top| format!("{name} {top}")));
        chosen.push(json!({ "what": name, "setting": setting }));
    };
    add("fine-tuned", fine_tune(args, &encoder, &data, "fine-tuning")?);
    if args.from_scratch {
        let random = common.random_initialization(&encoder);
        add("from scratch", fine_tune(args, &random, &data, "training from scratch")?);
    }
    if args.frozen {
        add("frozen", train_frozen(args, &encoder, &data)?);
    }
    let settings = json!({
        "labels": args.labels, "epochs": args.epochs, "batch": args.batch, "rates": args.rates,
        "from_scratch": args.from_scratch, "frozen": args.frozen, "train_images": data.train.len(),
        "test_images": data.test.len(), "classes": classes,
    });
    // The fraction is part of the name, so that 1 % and 10 % are saved side by side.
    let percent = (args.labels * 1e8).round() / 1e6;
    common.finish(&format!("finetune-{percent}"), settings, json!({ "chosen": chosen }), rows)
}

/// Scores of the test images after fine-tuning, and the selected hyperparameters.
fn fine_tune(args: &Args, start: &Encoder, data: &LabeledSplit, label: &str) -> Result<(Vec<f64>, Value)> {
    let Args { epochs, batch, rates, .. } = args;
    let seed = args.labeled.common.flags.seed;
    let protocol = Protocol { epochs: epochs.clone(), batch: *batch, rates: rates.clone(), seed };
    let bar = terminal::progress_bar(label, finetune::images_seen(data.train.len(), &protocol) as u64);
    let tuned = finetune::train(start, &data.train, data.classes.len(), MetricKind::Top1, &protocol, |n| {
        bar.inc(n as u64);
    })?;
    bar.finish_and_clear();
    super::must_be_finite(&tuned.classifier, super::LOWER_RATES)?;
    let test = features(&tuned.encoder, &data.test, "embedding test images")?;
    let setting = json!({ "rate": tuned.rate, "epochs": tuned.epochs, "held_out": tuned.held_out_metric });
    Ok((tuned.classifier.scores(&test), setting))
}

/// Scores of the test images by a linear classifier on the frozen encoder, and the selected
/// hyperparameters.
fn train_frozen(args: &Args, encoder: &Encoder, data: &LabeledSplit) -> Result<(Vec<f64>, Value)> {
    let epochs = args.epochs.iter().copied().max().unwrap_or(1);
    // As many updates per epoch as fine-tuning.
    let batch = finetune::batch_size(data.train.len(), args.batch);
    let seed = args.labeled.common.flags.seed;
    let protocol = linear::Protocol { epochs, batch, seed, ..linear::Protocol::default() };
    let images = linear::images_seen(data.train.len(), &protocol) as u64;
    let bar = terminal::progress_bar("training the classifier", images);
    let probe = linear::train(encoder, &data.train, data.classes.len(), &protocol, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    let test = features(encoder, &data.test, "embedding test images")?;
    let setting = json!({ "rate": probe.rate, "held_out": probe.held_out_accuracy });
    Ok((probe.classifier.scores(&test), setting))
}

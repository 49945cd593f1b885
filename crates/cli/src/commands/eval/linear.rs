//! `byol eval linear ENCODER DATA`

use std::{process::ExitCode, time::Instant};

use byol::{
    eval::{
        linear::{self, Protocol},
        logistic,
        metrics::argmax,
        split::LabeledSplit,
    },
    nn::Encoder,
};

use super::{BaselineArgs, LabeledArgs, features, labels, top_k_rows};
use crate::terminal::{self, Result};

const EXAMPLES: &str = "\
Examples:
  byol eval linear byol-runs/photos labeled         The protocol of the paper
  byol eval linear byol-runs/photos labeled --fast  Logistic regression on stored features";

/// Train a linear classifier on the frozen encoder
///
/// Follows the paper: random crop and flip, SGD with Nesterov momentum, cosine schedule. The
/// learning rate is selected on a tenth of the training images, never on test images. With --fast,
/// the features are computed once and a logistic regression is fitted to them; its regularization
/// is selected in the same way.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    labeled: LabeledArgs,
    #[command(flatten)]
    baseline: BaselineArgs,
    /// Compute the features once and fit a logistic regression by L-BFGS
    #[arg(long, conflicts_with_all = ["epochs", "batch", "rates"])]
    fast: bool,
    /// Number of epochs
    #[arg(long, value_name = "N", default_value_t = 80)]
    epochs: usize,
    /// Maximum batch size
    #[arg(long, value_name = "N", default_value_t = 1024)]
    batch: usize,
    /// Base learning rates to select from, for batch size 256
    #[arg(long, value_name = "BASE,…", value_delimiter = ',', default_values_t = linear::RATES)]
    rates: Vec<f64>,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.epochs == 0 || args.batch == 0 || !args.rates.iter().all(|rate| rate.is_finite() && *rate > 0.0) {
        return Err("`--epochs` and `--batch` must be at least 1, and all `--rates` above 0".into());
    }
    let common = &args.labeled.common;
    let encoders = common.encoders(&args.baseline)?;
    let data = args.labeled.open(&encoders[0].0)?;
    let mut rows = Vec::new();
    let (mut chosen, mut confusion) = (Vec::new(), None);
    for (encoder, suffix) in &encoders {
        let (classifier, setting) = match args.fast {
            true => fit_to_features(args, encoder, &data)?,
            false => train_on_crops(args, encoder, &data)?,
        };
        chosen.push(setting);
        let test = features(encoder, &data.test, "embedding test images")?;
        let scores = classifier.scores(&test);
        confusion = confusion.or_else(|| super::confusion(&argmax(&scores, data.classes.len()), &data));
        rows.extend(top_k_rows(&scores, &data, common.flags.seed, |top| format!("linear {top}{suffix}")));
    }
    let settings = serde_json::json!({
        "fast": args.fast, "epochs": args.epochs, "batch": args.batch, "rates": args.rates,
        "with_random": args.baseline.with_random, "train_images": data.train.len(),
        "test_images": data.test.len(), "classes": data.classes.len(),
    });
    let details = serde_json::json!({ "chosen": chosen, "confusion": confusion });
    common.finish(if args.fast { "linear-fast" } else { "linear" }, settings, details, rows)
}

/// Classifier trained by SGD on random crops, as in the paper, with its selected learning rate.
fn train_on_crops(
    args: &Args,
    encoder: &Encoder,
    data: &LabeledSplit,
) -> Result<(logistic::Classifier, serde_json::Value)> {
    let Args { epochs, batch, rates, .. } = args;
    let seed = args.labeled.common.flags.seed;
    let protocol = Protocol { epochs: *epochs, batch: *batch, rates: rates.clone(), seed };
    let images = linear::images_seen(data.train.len(), &protocol) as u64;
    let bar = terminal::progress_bar("training the classifier", images);
    let probe = linear::train(encoder, &data.train, data.classes.len(), &protocol, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    super::must_be_finite(&probe.classifier, super::LOWER_RATES)?;
    let setting = serde_json::json!({ "rate": probe.rate, "held_out": probe.held_out_accuracy });
    Ok((probe.classifier, setting))
}

/// Classifier fitted to features by L-BFGS, with its selected L2 strength.
fn fit_to_features(
    args: &Args,
    encoder: &Encoder,
    data: &LabeledSplit,
) -> Result<(logistic::Classifier, serde_json::Value)> {
    let train = features(encoder, &data.train, "embedding training images")?;
    let labels = labels(&data.train);
    let held_out = linear::held_out_mask(labels, args.labeled.common.flags.seed);
    let start = Instant::now();
    let fit = logistic::fit_best(&train, labels, data.classes.len(), &logistic::strengths(), &held_out);
    terminal::note(format!(
        "fitted a logistic regression to {} x {} features in {:.1} s (L2 strength selected on held-out images)",
        train.n,
        train.dim,
        start.elapsed().as_secs_f64()
    ));
    let setting = serde_json::json!({ "l2": fit.l2, "held_out": fit.held_out_score });
    Ok((fit.classifier, setting))
}

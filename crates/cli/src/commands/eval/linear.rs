//! `byol eval linear ENCODER DATA`

use std::{process::ExitCode, time::Instant};

use byol::{
    eval::{
        linear::{self, Protocol},
        logistic,
    },
    nn::Encoder,
};

use super::{Common, Labelled, Limit, features, labels, top_rows};
use crate::report::{self, Result};

/// Train a linear classifier on the frozen encoder
///
/// As in the paper: random crop and flip, SGD with Nesterov momentum, cosine, the learning rate chosen on a tenth of the training images and
/// never on the test images. With --fast, features are computed once and a logistic regression is fitted to them, its regularisation
/// chosen in the same way.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    limit: Limit,
    /// Measure an encoder with random weights too
    #[arg(long)]
    with_random: bool,
    /// Compute the features once and fit a logistic regression by L-BFGS
    #[arg(long, conflicts_with_all = ["epochs", "batch", "rates"])]
    fast: bool,
    /// Passes over the training images
    #[arg(long, value_name = "N", default_value_t = 80)]
    epochs: usize,
    /// Images per update, at most
    #[arg(long, value_name = "N", default_value_t = 1024)]
    batch: usize,
    /// Learning rates for batch 256 to choose from
    #[arg(long, value_name = "BASE,…", value_delimiter = ',', default_values_t = linear::RATES)]
    rates: Vec<f64>,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.epochs == 0 || args.batch == 0 || !args.rates.iter().all(|r| r.is_finite() && *r > 0.0) {
        return Err("--epochs and --batch must be at least 1 and every one of --rates above 0".into());
    }
    let common = &args.common;
    let encoders = common.encoders(args.with_random)?;
    let data = common.labelled(&args.limit, &encoders[0].0)?;
    let mut rows = Vec::new();
    let mut chosen = Vec::new();
    for (encoder, who) in &encoders {
        let (classifier, setting) = if args.fast { fast(args, encoder, &data)? } else { paper(args, encoder, &data)? };
        chosen.push(setting);
        let test = features(encoder, &data.test, "embedding test images")?;
        let scores = classifier.scores(&test);
        rows.extend(top_rows(&scores, &data, common.flags.seed, |top| format!("linear {top}{who}")));
    }
    let settings = serde_json::json!({
        "fast": args.fast, "epochs": args.epochs, "batch": args.batch, "rates": args.rates,
        "with_random": args.with_random, "train_images": data.train.len(), "test_images": data.test.len(),
        "classes": data.classes.len(),
    });
    let found = serde_json::json!({ "chosen": chosen });
    common.finish(if args.fast { "linear-fast" } else { "linear" }, settings, found, rows)
}

/// By gradient descent on crops.
fn paper(args: &Args, encoder: &Encoder, data: &Labelled) -> Result<(logistic::Classifier, serde_json::Value)> {
    let Args { epochs, batch, rates, .. } = args;
    let protocol = Protocol { epochs: *epochs, batch: *batch, rates: rates.clone(), seed: args.common.flags.seed };
    let bar = report::counter("training the classifier", linear::images_seen(data.train.len(), &protocol) as u64);
    let found = linear::train(encoder, &data.train, data.classes.len(), &protocol, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    super::must_be_finite(&found.classifier, super::LOWER_RATES)?;
    Ok((found.classifier, serde_json::json!({ "rate": found.rate, "held_out": found.held_out })))
}

/// By L-BFGS on features.
fn fast(args: &Args, encoder: &Encoder, data: &Labelled) -> Result<(logistic::Classifier, serde_json::Value)> {
    let x = features(encoder, &data.train, "embedding training images")?;
    let out = linear::held_out(labels(&data.train), args.common.flags.seed);
    let began = Instant::now();
    let found = logistic::fit_best(&x, labels(&data.train), data.classes.len(), &logistic::strengths(), &out);
    let took = began.elapsed().as_secs_f64();
    report::note(format!("logistic regression of {} x {}, its strength chosen, in {took:.1} s", x.n, x.dim));
    Ok((found.classifier, serde_json::json!({ "l2": found.l2, "held_out": found.held_out })))
}

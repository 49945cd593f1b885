//! `byol eval finetune ENCODER DATA --labels SHARE`

use std::process::ExitCode;

use byol::{
    eval::{
        finetune::{self, Protocol},
        linear,
        measure::Measure,
    },
    nn::Encoder,
};

use super::{Common, Labelled, Limit, features, labels, top_rows};
use crate::report::{self, Result};

/// Fine-tune the encoder with a classifier on a part of the labels
///
/// As in the paper's semi-supervised evaluation: the same number of labelled images of every class, chosen by --seed; random crop and flip; SGD
/// with Nesterov momentum, cosine; learning rate and epochs chosen on a held-out fifth of these images. The encoder's file stays as it is.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    limit: Limit,
    /// Part of the labels: 1%, 10%, 100%
    #[arg(long, value_name = "SHARE", default_value = "1%", value_parser = share)]
    labels: f64,
    /// Baseline: the same network from random weights
    #[arg(long)]
    from_scratch: bool,
    /// Baseline: a linear classifier on the frozen encoder, with the same labels, the rates of `byol eval linear` and the largest of --epochs
    #[arg(long)]
    frozen: bool,
    /// Passes over the images, to choose from
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [30, 50])]
    epochs: Vec<usize>,
    /// Images per update, at most
    #[arg(long, value_name = "N", default_value_t = 1024)]
    batch: usize,
    /// Learning rates for batch 256 to choose from
    #[arg(long, value_name = "BASE,…", value_delimiter = ',', default_values_t = finetune::RATES)]
    rates: Vec<f64>,
}

/// `1%`, `0.01`, `100%`.
fn share(text: &str) -> std::result::Result<f64, String> {
    let wrong =
        || format!("`{text}` is no share of the labels; give 1%, 10%, 100% or another above 0 and at most 100%");
    let value = match text.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().map(|p| p / 100.0),
        // `1` alone could be one percent or all.
        None => text.parse().map(|v| if v < 1.0 { v } else { f64::NAN }),
    };
    value.ok().filter(|v| *v > 0.0 && *v <= 1.0).ok_or_else(wrong)
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.epochs.contains(&0) || args.batch < 2 || !args.rates.iter().all(|r| r.is_finite() && *r > 0.0) {
        return Err("--epochs must be at least 1, --batch at least 2 and every one of --rates above 0".into());
    }
    let common = &args.common;
    let encoder = common.encoder()?;
    let mut data = common.labelled(&args.limit, &encoder)?;
    let classes = data.classes.len();
    let part = finetune::part(labels(&data.train), classes, args.labels, common.flags.seed);
    data.train = data.train.subset(&part);
    report::note(format!("{} labelled images of {classes} classes", data.train.len()));
    if data.train.len() < 2 * classes && args.rates.len() * args.epochs.len() > 1 {
        report::warning(format!(
            "one label a class leaves none to choose by: the middle one of --rates and the first of --epochs are taken; give more of them ({} labels in all)",
            data.train.len()
        ));
    }
    let mut rows = Vec::new();
    let mut chosen = Vec::new();
    let mut add = |name: &str, scores: Vec<f64>, setting: serde_json::Value| {
        rows.extend(top_rows(&scores, &data, common.flags.seed, |top| format!("{name} {top}")));
        chosen.push(serde_json::json!({ "what": name, "setting": setting }));
    };
    let (scores, setting) = tuned(args, &encoder, &data, "fine-tuning")?;
    add("fine-tuned", scores, setting);
    if args.from_scratch {
        let (scores, setting) = tuned(args, &common.random(&encoder), &data, "training from scratch")?;
        add("from scratch", scores, setting);
    }
    if args.frozen {
        let (scores, setting) = frozen(args, &encoder, &data)?;
        add("frozen", scores, setting);
    }
    let settings = serde_json::json!({
        "labels": args.labels, "epochs": args.epochs, "batch": args.batch, "rates": args.rates,
        "from_scratch": args.from_scratch, "frozen": args.frozen, "train_images": data.train.len(), "test_images": data.test.len(),
        "classes": classes,
    });
    // The share is part of the name, so that 1 % and 10 % stand side by side.
    let percent = (args.labels * 1e8).round() / 1e6;
    let found = serde_json::json!({ "chosen": chosen });
    common.finish(&format!("finetune-{percent}"), settings, found, rows)
}

/// Scores of the test images after fine-tuning.
fn tuned(args: &Args, start: &Encoder, data: &Labelled, what: &str) -> Result<(Vec<f64>, serde_json::Value)> {
    let Args { epochs, batch, rates, .. } = args;
    let protocol =
        Protocol { epochs: epochs.clone(), batch: *batch, rates: rates.clone(), seed: args.common.flags.seed };
    let bar = report::counter(what, finetune::images_seen(data.train.len(), &protocol) as u64);
    let found =
        finetune::choose(start, &data.train, data.classes.len(), Measure::Top1, &protocol, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    super::must_be_finite(&found.classifier, super::LOWER_RATES)?;
    let test = features(&found.encoder, &data.test, "embedding test images")?;
    let setting = serde_json::json!({ "rate": found.rate, "epochs": found.epochs, "held_out": found.held_out });
    Ok((found.classifier.scores(&test), setting))
}

/// Scores of the test images by a linear classifier on the encoder as it is.
fn frozen(args: &Args, encoder: &Encoder, data: &Labelled) -> Result<(Vec<f64>, serde_json::Value)> {
    let epochs = args.epochs.iter().copied().max().unwrap_or(1);
    // As many updates an epoch as fine-tuning has.
    let batch = finetune::batch_for(data.train.len(), args.batch);
    let protocol = linear::Protocol { epochs, batch, seed: args.common.flags.seed, ..linear::Protocol::default() };
    let bar = report::counter("training the classifier", linear::images_seen(data.train.len(), &protocol) as u64);
    let found = linear::train(encoder, &data.train, data.classes.len(), &protocol, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    let test = features(encoder, &data.test, "embedding test images")?;
    Ok((found.classifier.scores(&test), serde_json::json!({ "rate": found.rate, "held_out": found.held_out })))
}

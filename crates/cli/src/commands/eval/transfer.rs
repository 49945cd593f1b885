//! `byol eval transfer ENCODER DATA…`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::{
    data::Dataset,
    eval::{
        finetune,
        measure::{Judged, Measure, Truth},
        rows::Row,
        transfer,
    },
    nn::Encoder,
};

use serde_json::{Value, json};

use super::{Common, Flags, features};
use crate::report::{self, Result};

/// Evaluate the encoder on several labelled data sets
///
/// As in the paper's table 3: logistic regression by L-BFGS on frozen features, and with --finetune the whole encoder. Aircraft, Pets, Caltech
/// and Flowers, known by the folder's name, are scored by the mean over classes; images of several classes (labels.csv) by 11-point
/// mean average precision; others by top-1.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// An encoder.safetensors, or the folder of a run
    encoder: PathBuf,
    /// Labelled data, each a folder
    #[arg(required = true)]
    data: Vec<PathBuf>,
    /// Fine-tune the encoder too
    #[arg(long)]
    finetune: bool,
    /// Passes over the images in fine-tuning
    #[arg(long, value_name = "N", default_value_t = 30)]
    epochs: usize,
    /// Measure an encoder with random weights too
    #[arg(long)]
    with_random: bool,
    /// Take N training images of each set, evenly spread (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
    #[command(flatten)]
    flags: Flags,
}

/// Each class of each image.
fn classes_of(truth: Truth<'_>) -> impl Iterator<Item = usize> + '_ {
    (0..truth.len()).flat_map(move |i| truth.classes(i)).copied()
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.epochs == 0 {
        return Err("--epochs must be at least 1".into());
    }
    let data = args.data.iter().map(|d| super::whole(d).display().to_string()).collect::<Vec<_>>().join(" ").into();
    let common = Common { encoder: args.encoder.clone(), data, flags: args.flags.clone() };
    let encoders = common.encoders(args.with_random)?;
    let mut rows = Vec::new();
    let (mut sets, mut chosen) = (Vec::new(), Vec::new());
    let last =
        |path: &Path| path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
    for path in &args.data {
        // Two folders of one name are told apart by their paths.
        let name = match args.data.iter().filter(|other| last(other) == last(path)).count() {
            1 => last(path),
            _ => path.display().to_string(),
        };
        let data = super::parted(Dataset::open(path)?, args.limit)?;
        let (of_train, of_test) = match (Truth::of(&data.train), Truth::of(&data.test)) {
            (Some(train), Some(test)) => (train, test),
            _ => return Err(byol::data::Error::Unlabelled(path.clone()).into()),
        };
        super::fits(&encoders[0].0, &data.train, path)?;
        super::must_be_learnable(path, classes_of(of_train), classes_of(of_test), |c| data.classes[c].clone())?;
        let (classes, n) = (data.classes.len(), data.test.len());
        let measure = Measure::of(&last(path), matches!(of_test, Truth::Several(_)));
        sets.push(
            json!({ "data": report::shown(&super::whole(path)), "measure": measure.name(), "train_images": data.train.len(), "test_images": n }),
        );
        let mut add = |how: &str, scores: &[f64]| {
            let judged = Judged::new(measure, scores, of_test, classes);
            let name = format!("{name}, {how}, {}", measure.name());
            rows.push(Row::share(name, n, args.flags.seed, |at| judged.value(at)));
        };
        for (encoder, who) in &encoders {
            let (x, test) = (features(encoder, &data.train, &name)?, features(encoder, &data.test, &name)?);
            let found = transfer::linear(&x, of_train, &test, classes, measure, args.flags.seed);
            add(&format!("linear{who}"), &found.scores);
            chosen.push(json!({ "what": format!("{name}, linear{who}"), "l2": found.l2 }));
            if args.finetune {
                let (scores, setting) = tuned(args, encoder, &data, measure, &name)?;
                add(&format!("fine-tuned{who}"), &scores);
                chosen.push(json!({ "what": format!("{name}, fine-tuned{who}"), "setting": setting }));
            }
        }
    }
    let settings = json!({
        "sets": sets, "finetune": args.finetune, "epochs": args.epochs, "with_random": args.with_random,
    });
    common.finish("transfer", settings, json!({ "chosen": chosen }), rows)
}

/// Scores of the test images after fine-tuning.
fn tuned(
    args: &Args,
    encoder: &Encoder,
    data: &super::Labelled,
    measure: Measure,
    name: &str,
) -> Result<(Vec<f64>, Value)> {
    let protocol = finetune::Protocol {
        epochs: vec![args.epochs],
        batch: 256,
        rates: finetune::RATES.to_vec(),
        seed: args.flags.seed,
    };
    let bar =
        report::counter(&format!("fine-tuning, {name}"), finetune::images_seen(data.train.len(), &protocol) as u64);
    let found = finetune::choose(encoder, &data.train, data.classes.len(), measure, &protocol, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    super::must_be_finite(&found.classifier, "leave --finetune out for this encoder")?;
    let setting = json!({ "rate": found.rate, "epochs": found.epochs, "held_out": found.held_out });
    Ok((found.classifier.scores(&features(&found.encoder, &data.test, name)?), setting))
}

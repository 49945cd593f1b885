//! `byol eval knn ENCODER DATA`

use std::{process::ExitCode, time::Instant};

use byol::eval::{knn, results::ResultRow};

use super::{BaselineArgs, LabeledArgs, features, labels};
use crate::terminal::{self, Result, plural};

const EXAMPLES: &str = "\
Examples:
  byol eval knn byol-runs/photos labeled --with-random  Compare with random weights
  byol eval knn resnet18.safetensors labeled -k 1,5,20  Try three numbers of neighbors";

/// Classify test images by their nearest training images (kNN)
///
/// The nearest training images by cosine similarity vote. Without a `val` or `test` split, one
/// image in five is a query and the others vote.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    labeled: LabeledArgs,
    #[command(flatten)]
    baseline: BaselineArgs,
    /// Numbers of neighbors that vote
    #[arg(short, long, value_name = "K,…", value_delimiter = ',', default_value = "20")]
    k: Vec<usize>,
    /// Temperature of the votes
    #[arg(long, value_name = "T", default_value_t = 0.07)]
    temperature: f64,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    // Below 0.01, exp(1 / T) nears the largest float, and the nearest neighbor decides alone.
    if args.k.contains(&0) || args.temperature.is_nan() || args.temperature < 0.01 {
        return Err("`--k` must be at least 1 and `--temperature` at least 0.01\n\
                    hint: the defaults are 20 and 0.07"
            .into());
    }
    let (common, seed) = (&args.labeled.common, args.labeled.common.flags.seed);
    let encoders = common.encoders(&args.baseline)?;
    let data = args.labeled.open(&encoders[0].0)?;
    let classes = data.classes.len();
    if let Some(k) = args.k.iter().find(|k| **k > data.train.len()) {
        let images = plural(data.train.len(), "training image");
        terminal::warning(format!("k = {k} exceeds the {images}: all of them vote"));
    }
    let (bank_labels, query_labels) = (labels(&data.train), labels(&data.test));
    let (mut rows, mut confusion) = (Vec::new(), None);
    for (encoder, suffix) in &encoders {
        let bank = features(encoder, &data.train, "embedding training images")?;
        let queries = features(encoder, &data.test, "embedding test images")?;
        let start = Instant::now();
        let predictions =
            knn::classify_with_ks(&bank, bank_labels, &queries, query_labels, classes, &args.k, args.temperature);
        terminal::note(format!(
            "compared {} with {} (dimension {}) in {:.1} s",
            plural(queries.n, "test image"),
            plural(bank.n, "training image"),
            bank.dim,
            start.elapsed().as_secs_f64()
        ));
        confusion = confusion.or_else(|| super::confusion(&predictions[0].predicted, &data));
        for (k, predictions) in args.k.iter().zip(predictions) {
            let name = format!("kNN accuracy, k = {k}{suffix}");
            rows.push(ResultRow::accuracy(name, seed, &predictions.predicted, query_labels));
        }
    }
    let settings = serde_json::json!({
        "k": args.k, "temperature": args.temperature, "with_random": args.baseline.with_random,
        "train_images": data.train.len(), "test_images": data.test.len(), "classes": classes,
    });
    common.finish("knn", settings, serde_json::json!({ "confusion": confusion }), rows)
}

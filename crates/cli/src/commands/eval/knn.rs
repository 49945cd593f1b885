//! `byol eval knn ENCODER DATA`

use std::{process::ExitCode, time::Instant};

use byol::eval::{knn, rows::Row};

use super::{Common, Limit, features, labels};
use crate::report::{self, Result};

/// Classify each test image by its nearest training images
///
/// The training images vote by cosine similarity. Where the data have no `val` or `test` split, one image of five is a query and the
/// others vote.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    limit: Limit,
    /// Measure an encoder with random weights too
    #[arg(long)]
    with_random: bool,
    /// Neighbours that vote; several separated by commas
    #[arg(long, value_name = "K,…", value_delimiter = ',', default_value = "20")]
    k: Vec<usize>,
    /// Temperature of the votes
    #[arg(long, value_name = "T", default_value_t = 0.07)]
    temperature: f64,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    // Below a hundredth exp(1 / T) is near the largest number there is, and the nearest decides alone long before.
    if args.k.contains(&0) || args.temperature.is_nan() || args.temperature < 0.01 {
        return Err("--k must be at least 1 and --temperature at least 0.01; the usual values are 20 and 0.07".into());
    }
    let common = &args.common;
    let encoders = common.encoders(args.with_random)?;
    let data = common.labelled(&args.limit, &encoders[0].0)?;
    if let Some(k) = args.k.iter().find(|k| **k > data.train.len()) {
        let n = data.train.len();
        report::warning(format!("k = {k} is more than the {n} training images: all of them vote"));
    }
    let mut rows = Vec::new();
    for (encoder, who) in &encoders {
        let bank = features(encoder, &data.train, "embedding training images")?;
        let queries = features(encoder, &data.test, "embedding test images")?;
        let (of_bank, of_queries) = (labels(&data.train), labels(&data.test));
        let began = Instant::now();
        let outcomes =
            knn::classify_each(&bank, of_bank, &queries, of_queries, data.classes.len(), &args.k, args.temperature);
        let (asked, held, dim, took) = (queries.n, bank.n, bank.dim, began.elapsed().as_secs_f64());
        report::note(format!("{asked} images compared with {held}, of {dim} numbers each, in {took:.1} s"));
        for (k, outcome) in args.k.iter().zip(outcomes) {
            let name = format!("kNN accuracy, k = {k}{who}");
            rows.push(Row::accuracy(name, common.flags.seed, &outcome.predicted, of_queries));
        }
    }
    let settings = serde_json::json!({
        "k": args.k, "temperature": args.temperature, "with_random": args.with_random, "train_images": data.train.len(), "test_images": data.test.len(),
        "classes": data.classes.len(),
    });
    common.finish("knn", settings, serde_json::Value::Null, rows)
}

//! `byol eval knn ENCODER DATA`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    data::{self, Dataset, Images},
    device::{self, Choice},
    eval::{embed, knn},
    nn::weights,
    train::run::keep_bytes,
};
use clap::Subcommand;

use crate::report::{self, Result, out, percent};

/// Measure what an encoder has learned
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Classify each test image by its nearest training images
    Knn(Knn),
}

/// Classify each test image by its nearest training images
///
/// The training images vote by cosine similarity. Where the data have no `val` or `test` split, every fifth image is a query and the
/// others vote.
#[derive(Debug, clap::Args)]
struct Knn {
    /// An encoder.safetensors, or the folder of a run
    encoder: PathBuf,
    /// Labelled data: class subfolders, CIFAR or IDX files
    data: PathBuf,
    /// Neighbours that vote
    #[arg(long, value_name = "K", default_value_t = 20)]
    k: usize,
    /// Temperature of the votes
    #[arg(long, value_name = "T", default_value_t = 0.07)]
    temperature: f64,
    /// Take N training images, evenly spread (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
    /// Threads [default: one a core]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// auto, cpu, vulkan, metal, wgpu, cuda or rocm
    #[arg(long, default_value = "auto")]
    device: Choice,
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Knn(args) => run_knn(args),
    }
}

/// Bank and queries of labelled data.
pub fn bank_and_queries(dataset: Dataset, limit: usize) -> Result<(Images, Images, usize)> {
    let unlabelled = data::Error::Unlabelled(dataset.root.clone());
    let classes = dataset.classes.len();
    let bar = report::counter("checking images", 0);
    let dataset = Dataset { held_out: None, ..dataset }.limit(limit);
    bar.set_length(dataset.n_images() as u64);
    let dataset = dataset.check(keep_bytes(device::machine().free_mb), &|| bar.inc(1))?;
    bar.finish_and_clear();
    if let Some(first) = dataset.skipped.first() {
        let n = dataset.skipped.len();
        report::warning(format!("{n} images cannot be used and are skipped; the first: {}: {}", first.what, first.why));
    }
    let (bank, queries) = match dataset.test {
        Some(test) => (dataset.train, test),
        None => dataset.train.hold_out(dataset.train.len().div_ceil(5)),
    };
    if bank.labels().is_none() || queries.labels().is_none() || bank.is_empty() || queries.is_empty() {
        return Err(unlabelled.into());
    }
    Ok((bank, queries, classes))
}

fn run_knn(args: &Knn) -> Result<ExitCode> {
    if args.k == 0 || args.temperature.is_nan() || args.temperature <= 0.0 {
        return Err("--k must be at least 1 and --temperature above 0; the usual values are 20 and 0.07".into());
    }
    super::set_threads(args.threads)?;
    let opened = super::open(args.device)?;
    let encoder = weights::load(&args.encoder, &opened.device)?;
    let (bank, queries, classes) = bank_and_queries(Dataset::open(&args.data)?, args.limit)?;
    let bar = report::counter("embedding", (bank.len() + queries.len()) as u64);
    let of_bank = embed(&encoder, &bank, |n| bar.inc(n as u64))?;
    let of_queries = embed(&encoder, &queries, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    let labels = |images: &Images| images.labels().expect("checked above").to_vec();
    let outcome =
        knn::classify(&of_bank, &labels(&bank), &of_queries, &labels(&queries), classes, args.k, args.temperature);
    if args.json {
        let result = serde_json::json!({
            "knn": outcome.accuracy, "interval": outcome.interval(), "k": args.k, "temperature": args.temperature,
            "train_images": bank.len(), "test_images": queries.len(), "classes": classes,
        });
        out!("{result}");
    } else {
        out!(
            "kNN accuracy {} ± {} (95 %), k = {}, T = {}: {} test images among {} training images of {classes} classes",
            percent(outcome.accuracy),
            percent(outcome.interval()),
            args.k,
            args.temperature,
            queries.len(),
            bank.len(),
        );
    }
    Ok(ExitCode::SUCCESS)
}

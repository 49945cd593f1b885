//! `byol embed ENCODER DATA -o FILE`

use std::{path::PathBuf, process::ExitCode, str::FromStr};

use byol::{
    apply::{
        embed::{Items, Job, Outcome, Split},
        embeddings::{self, Origin},
    },
    data::Dataset,
    nn::weights,
};

use super::{INTERRUPTED, On, must_be_new};
use crate::report::{self, Result, out, shown};

/// Write one vector an image to a file
///
/// Each row has the image's path, its label if it has one, and its vector: the representation by the encoder, in the data's order
/// (training images, then val, then test). What is done is kept in FILE.partial-rows until all is there: after Ctrl-C or a crash the same
/// command goes on.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// An encoder.safetensors, or the folder of a run
    encoder: PathBuf,
    /// Images: a folder, CIFAR or IDX files, shards
    data: PathBuf,
    /// Where to: NAME.parquet, NAME.npy (with NAME.paths.txt) or NAME.csv
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// all, train or test: which of the data's splits
    #[arg(long, default_value = "all", value_parser = ["all", "train", "test"])]
    split: String,
    /// Part I of N, from 1, to share the work out among machines
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Replace FILE if it exists
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    on: On,
}

#[derive(Debug, Clone, Copy)]
struct Shard([usize; 2]);

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once('/').and_then(|(i, n)| Some([i.parse().ok()?, n.parse().ok()?]));
        parts.filter(|[i, n]| 1 <= *i && i <= n).map(Shard).ok_or("a shard is I/N with I from 1 to N, as 1/4".into())
    }
}

pub fn run(args: &Args) -> Result<ExitCode> {
    for file in embeddings::files(&args.out)? {
        must_be_new(&file, args.overwrite)?;
    }
    let encoder = args.on.encoder(&args.encoder)?;
    let split = match args.split.as_str() {
        "train" => Split::Train,
        "test" => Split::Test,
        _ => Split::All,
    };
    let absolute = |path: &PathBuf| std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    // The rows name their images wherever the file is read.
    let data = absolute(&args.data);
    let items = Items::of(Dataset::open(&data)?, split);
    if items.is_empty() {
        return Err(format!("{} has no {} images; choose another --split", args.data.display(), args.split).into());
    }
    let file = absolute(&weights::resolve(&args.encoder));
    let origin = Origin::new(&file, &data, &items, args.shard.map(|Shard(shard)| shard))?;
    let job = Job { encoder: &encoder, items: &items, origin, out: &args.out };
    let began = std::time::Instant::now();
    let mut first = None;
    let outcome = report::counted("embedding", |progress| {
        job.run(&super::stop_flag(), |done, all| {
            if *first.get_or_insert(done) == done && done > 0 {
                report::note(format!("going on after {done} of {all} images"));
            }
            progress(done as u64, all as u64);
        })
    });
    match outcome? {
        Outcome::Finished { rows, skipped } => {
            if let Some(first) = skipped.first() {
                report::warning(format!("{} images cannot be used and have no row; the first: {first}", skipped.len()));
            }
            let (dim, seconds) = (encoder.features(), began.elapsed().as_secs_f64());
            let done = rows + skipped.len() - first.unwrap_or(0);
            report::note(format!(
                "{rows} rows of {dim} numbers: {} ({:.0} images/s)",
                args.out.display(),
                done as f64 / seconds
            ));
            if args.on.json {
                let result = serde_json::json!({
                    "file": shown(&args.out), "rows": rows, "dim": dim, "skipped": skipped, "seconds": seconds,
                    "images_per_second": done as f64 / seconds,
                });
                out!("{result}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Stopped(done) => {
            report::note(format!("stopped after {done} images; the same command goes on from there"));
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

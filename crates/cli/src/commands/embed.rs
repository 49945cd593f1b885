//! `byol embed ENCODER DATA -o FILE`

use std::{path::PathBuf, process::ExitCode, str::FromStr, time::Instant};

use byol::{
    apply::{
        embed::{Items, Job, Outcome, Split},
        embeddings::{self, Origin},
    },
    nn::weights,
};

use super::{ComputeArgs, INTERRUPTED, data_args::DataFlags, must_be_new, warn_skipped};
use crate::terminal::{self, Result, display_path, out, plural};

const EXAMPLES: &str = "\
Examples:
  byol embed byol-runs/photos photos -o photos.parquet      Embed all images
  byol embed byol-runs/photos photos -o e.npy --split test  Embed the test split as a NumPy array";

/// Compute the embedding of every image
///
/// Each row of the output has the path of the image, its label if there is one, and its embedding
/// (the encoder output), in the order of the data: training, validation, test images. Finished rows
/// are kept in FILE.partial-rows: after Ctrl-C or a crash, the same command continues from there.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Encoder file (.safetensors) or run folder
    encoder: PathBuf,
    /// Images: a folder, CIFAR or IDX files, or shards
    data: PathBuf,
    /// Output file (.parquet, .csv, or .npy with NAME.paths.txt)
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Split to embed: all, train, val or test
    #[arg(long, default_value = "all", value_parser = ["all", "train", "val", "test"], hide_possible_values = true)]
    split: String,
    /// Number of images per split, sampled at random [default: all]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    limit: usize,
    /// Embed only part I of N, from 1, to distribute the work over machines
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Overwrite FILE if it exists
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    data_flags: DataFlags,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Part `i` of `n`, from 1.
#[derive(Debug, Clone, Copy)]
struct Shard([usize; 2]);

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once('/').and_then(|(i, n)| Some([i.parse().ok()?, n.parse().ok()?]));
        parts
            .filter(|[i, n]| 1 <= *i && i <= n)
            .map(Shard)
            .ok_or_else(|| format!("invalid shard `{text}` (expected I/N with I from 1 to N, e.g. `1/4`)"))
    }
}

pub fn run(args: &Args) -> Result<ExitCode> {
    for file in embeddings::output_files(&args.out)? {
        must_be_new(&file, args.overwrite)?;
    }
    let encoder = args.compute.load_encoder(&args.encoder)?;
    let split = match args.split.as_str() {
        "train" => Split::Train,
        "val" => Split::Val,
        "test" => Split::Test,
        _ => Split::All,
    };
    // Absolute, so that the paths in the file are valid from any folder.
    let absolute = |path: &PathBuf| std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    let data = absolute(&args.data);
    let items = Items::new(args.data_flags.open(&data, Some(&encoder.spec.levels))?, split).limit(args.limit);
    if items.is_empty() {
        let data = args.data.display();
        return Err(format!("{data} has no {} images\nhint: choose another `--split`", args.split).into());
    }
    let file = absolute(&weights::resolve(&args.encoder));
    let origin = Origin::new(&file, &data, &items, args.shard.map(|Shard(shard)| shard))?;
    let job = Job { encoder: &encoder, items: &items, origin, out: &args.out };
    let start = Instant::now();
    let mut resumed_at = None;
    let outcome = terminal::with_progress("embedding", |progress| {
        job.run(&super::stop_soon_flag(), |done, all| {
            if *resumed_at.get_or_insert(done) == done && done > 0 {
                terminal::note(format!("resuming at image {done} of {all}"));
            }
            progress(done as u64, all as u64);
        })
    });
    let (rows, skipped) = match outcome? {
        Outcome::Finished { rows, skipped } => (rows, skipped),
        Outcome::Stopped(done) => {
            let images = plural(done, "image");
            terminal::note(format!("stopped after {images}; run the same command again to continue"));
            return Ok(ExitCode::from(INTERRUPTED));
        }
    };
    warn_skipped(&skipped);
    let (dim, seconds) = (encoder.features(), start.elapsed().as_secs_f64());
    let images_per_second = (rows + skipped.len() - resumed_at.unwrap_or(0)) as f64 / seconds;
    terminal::note(format!(
        "wrote {} of dimension {dim} to {} ({images_per_second:.0} images/s)",
        plural(rows, "embedding"),
        args.out.display()
    ));
    if args.compute.json {
        let result = serde_json::json!({
            "file": display_path(&args.out), "rows": rows, "dim": dim, "skipped": skipped, "seconds": seconds,
            "images_per_second": images_per_second,
        });
        out!("{result}");
    }
    Ok(ExitCode::SUCCESS)
}

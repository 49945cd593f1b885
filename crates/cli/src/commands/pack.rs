//! `byol pack DATA -o FOLDER`

use std::{path::PathBuf, process::ExitCode};

use byol::data::{
    Dataset,
    pack::{self, Outcome, Packing},
};

use super::{INTERRUPTED, Work, set_threads};
use crate::report::{self, Result, out, shown};

/// Pack a data set into tar shards, to read or stream one after the other
///
/// The shards are in WebDataset's layout: NAME.jpg, and NAME.cls with the number of the class. Training images are shuffled once. Images that
/// cannot be decoded are left out and listed in manifest.json, with the checksums of all shards. After Ctrl-C or a crash the same
/// command goes on after the last whole shard.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Images: a folder, CIFAR or IDX files, or shards
    data: PathBuf,
    /// A new folder for the shards
    #[arg(short, long, value_name = "FOLDER")]
    out: PathBuf,
    /// Shrink larger images to this short side; without it files stay as they are, to the byte
    #[arg(long, value_name = "PX", value_parser = clap::value_parser!(u32).range(8..=8192))]
    size: Option<u32>,
    /// A shard is full from so many megabytes on
    #[arg(long, value_name = "MB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    shard_mb: u64,
    /// Names the order of the training images
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    work: Work,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    set_threads(args.work.threads)?;
    let data = Dataset::open(&args.data)?;
    if data.train.tags().is_some() {
        report::warning("the images have several classes each, which shards do not hold: they are packed without any");
    }
    let packing = Packing { size: args.size.map(|px| px as usize), shard_bytes: args.shard_mb << 20, seed: args.seed };
    let stop = super::stop_flag();
    let outcome = report::counted("packing", |progress| {
        pack::pack(&data, &args.out, packing, &stop, &mut |done, all| progress(done as u64, all as u64))
    });
    let manifest = match outcome? {
        Outcome::Finished(manifest) => manifest,
        Outcome::Stopped(done) => {
            report::note(format!("stopped after {done} images; the same command goes on from there"));
            return Ok(ExitCode::from(INTERRUPTED));
        }
    };
    let images: usize = manifest.shards.iter().map(|shard| shard.images).sum();
    let bytes: u64 = manifest.shards.iter().map(|shard| shard.bytes).sum();
    if let Some(first) = manifest.skipped.first() {
        report::warning(format!(
            "{} images cannot be used and were left out; the first: {first}",
            manifest.skipped.len()
        ));
    }
    let n = manifest.shards.len();
    report::note(format!(
        "{images} images in {n} shard{} of {:.1} MB in all: {}",
        if n == 1 { "" } else { "s" },
        bytes as f64 / f64::from(1 << 20),
        args.out.display()
    ));
    if args.work.json {
        let result = serde_json::json!({
            "folder": shown(&args.out), "images": images, "shards": n, "bytes": bytes, "skipped": manifest.skipped,
        });
        out!("{result}");
    }
    Ok(ExitCode::SUCCESS)
}

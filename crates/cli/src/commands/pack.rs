//! `byol pack DATA -o FOLDER`

use std::{path::PathBuf, process::ExitCode};

use byol::data::pack::{self, Outcome, Packing};

use super::{CpuArgs, INTERRUPTED, data_args::DataFlags, set_threads, warn_skipped};
use crate::terminal::{self, Result, display_path, out, plural};

const EXAMPLES: &str = "\
Examples:
  byol pack photos -o shards --size 256  Pack images, shrunk to 256 px, into shards";

/// Pack a data set into tar shards for sequential reading or streaming
///
/// The shards are in WebDataset format: NAME.jpg, and NAME.cls with the class index. Training
/// images are shuffled once. Unreadable images are left out and listed in manifest.json, next to
/// the checksums of all shards. After Ctrl-C or a crash, the same command continues after the last
/// complete shard.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES, mut_arg("channels", |channels| channels.hide(true)))]
pub struct Args {
    /// Images: a folder, CIFAR or IDX files, or shards
    data: PathBuf,
    /// New folder for the shards
    #[arg(short, long, value_name = "FOLDER")]
    out: PathBuf,
    /// Shrink larger images to this short side [default: keep every file unchanged]
    #[arg(long, value_name = "PX", value_parser = clap::value_parser!(u32).range(8..=8192))]
    size: Option<u32>,
    /// Target shard size, in MB
    #[arg(long, value_name = "MB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    shard_mb: u64,
    /// Random seed of the image order
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    data_flags: DataFlags,
    #[command(flatten)]
    cpu: CpuArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    set_threads(args.cpu.threads)?;
    let data = args.data_flags.open(&args.data, None)?;
    if data.levels().channels.is_some() {
        return Err("shards contain RGB images only\nhint: omit `--channels`".into());
    }
    if data.levels().sound.is_some() {
        return Err("shards contain images only, not sounds\nhint: train on the folder itself".into());
    }
    if data.train.tags().is_some() {
        terminal::warning("shards cannot store several classes per image: packing without labels");
    }
    let packing = Packing { size: args.size.map(|px| px as usize), shard_bytes: args.shard_mb << 20, seed: args.seed };
    let stop = super::stop_soon_flag();
    let outcome = terminal::with_progress("packing", |progress| {
        pack::pack(&data, &args.out, packing, &stop, &mut |done, all| progress(done as u64, all as u64))
    });
    let manifest = match outcome? {
        Outcome::Finished(manifest) => manifest,
        Outcome::Stopped(done) => {
            let images = plural(done, "image");
            terminal::note(format!("stopped after {images}; run the same command again to continue"));
            return Ok(ExitCode::from(INTERRUPTED));
        }
    };
    warn_skipped(&manifest.skipped);
    let images: usize = manifest.shards.iter().map(|shard| shard.images).sum();
    let bytes: u64 = manifest.shards.iter().map(|shard| shard.bytes).sum();
    let shards = manifest.shards.len();
    terminal::note(format!(
        "wrote {} in {} ({:.1} MB) to {}",
        plural(images, "image"),
        plural(shards, "shard"),
        bytes as f64 / f64::from(1 << 20),
        args.out.display()
    ));
    if args.cpu.json {
        let result = serde_json::json!({
            "folder": display_path(&args.out), "images": images, "shards": shards, "bytes": bytes,
            "skipped": manifest.skipped,
        });
        out!("{result}");
    }
    Ok(ExitCode::SUCCESS)
}

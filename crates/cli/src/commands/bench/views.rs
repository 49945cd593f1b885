//! `byol bench views DATA`

use std::{hint::black_box, path::PathBuf, time::Instant};

use byol::{
    data::{self, Images},
    views::{self, Policy},
};
use rayon::prelude::*;

use super::median;
use crate::{
    commands::{data_args::DataFlags, set_threads},
    terminal::{self, Result, out, plural},
};

const EXAMPLES: &str = "\
Examples:
  byol bench views photos  Time decoding and augmentation";

/// Benchmark decoding and augmentation
///
/// Decodes the images and makes their two views.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Folder of images
    data: PathBuf,
    /// View size in pixels
    #[arg(long, value_name = "PX", default_value_t = 224)]
    size: usize,
    /// Number of images, sampled evenly (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
    /// Number of threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    #[command(flatten)]
    data_flags: DataFlags,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// Passes over the images; the median counts.
const PASSES: usize = 3;

pub fn run(args: &Args) -> Result<()> {
    let threads = set_threads(args.threads)?;
    let dataset = args.data_flags.open(&args.data, None)?;
    let dataset = if args.limit > 0 { dataset.limit(args.limit) } else { dataset };
    let images = dataset.train;
    // As in the recipes: no blur on small views.
    let blur = |policy: Policy| if args.size <= 64 { Policy { blur: 0.0, ..policy } } else { policy };
    let policies = [blur(Policy::default()), blur(Policy::second())];

    let decode = |i: usize| -> Decoded { Ok(f32::from(images.get(i)?.pixels.to_u8()[0])) };
    let decode_and_augment = |i: usize| -> Decoded {
        let image = images.get(i)?;
        let first_pixel =
            |view: usize| views::view(&policies[view], &image, args.size, [0, 0, i as u64, view as u64]).pixels[0];
        Ok(first_pixel(0) + first_pixel(1))
    };
    time(&images, decode); // fills the page cache
    let passes: Vec<_> = (0..PASSES).map(|_| (time(&images, decode_and_augment), time(&images, decode))).collect();
    let unreadable = passes[0].0.1;
    let readable = (images.len() - unreadable) as f64;
    let rate = |seconds: Vec<f64>| readable / median(seconds);
    let complete = rate(passes.iter().map(|(complete, _)| complete.0).collect());
    let decode_only = rate(passes.iter().map(|(_, decode)| decode.0).collect());
    if args.json {
        let result = serde_json::json!({
            "what": "views", "size": args.size, "images": images.len(), "bad": unreadable, "threads": threads,
            "images_per_second": complete, "decode_only_images_per_second": decode_only,
        });
        out!("{result}");
        return Ok(());
    }
    out!(
        "decoding and two {} px views: {complete:.1} images/s with {} (decoding alone: {decode_only:.1} images/s)",
        args.size,
        plural(threads, "thread")
    );
    if unreadable > 0 {
        terminal::warning(format!("skipped {}", plural(unreadable, "unreadable image")));
    }
    Ok(())
}

/// Value computed from an image, so that the work is not optimized away.
type Decoded = std::result::Result<f32, data::Error>;

/// Seconds of `work` on all images, and the number of images it failed on.
fn time(images: &Images, work: impl Fn(usize) -> Decoded + Sync) -> (f64, usize) {
    let start = Instant::now();
    let failed = (0..images.len()).into_par_iter().filter(|i| black_box(work(*i)).is_err()).count();
    (start.elapsed().as_secs_f64(), failed)
}

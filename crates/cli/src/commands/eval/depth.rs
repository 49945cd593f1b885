//! `byol eval depth ENCODER DATA`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    apply::sheet::{self, Tile},
    data::{
        Image,
        dense::{self, DepthMap, DepthPair, DepthSet},
    },
    eval::{
        depth::{DepthNet, Protocol},
        metrics::Depth,
        rows::Row,
    },
    nn::Encoder,
};

use super::Common;
use crate::report::{self, Result};

/// Train a depth head on the encoder
///
/// DATA has `images` and `depth` with the same names (16-bit grey in millimetres, or TIFF of floats in metres), or is a folder of NYUv2
/// (`rgb_N` beside `sync_depth_N`). The head is the paper's: four up-projections, reverse Huber loss. The same head on a network of the
/// same kind with random weights stands beside it. The encoder's file stays as it is.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Take N training images, evenly spread (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
    /// Train the head alone
    #[arg(long)]
    frozen: bool,
    /// Updates
    #[arg(long, value_name = "N", default_value_t = 1000)]
    steps: usize,
    /// Crops an update
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// Side of the training crops [default: a multiple of 32 that fits into the images, at most 256]
    #[arg(long, value_name = "PX")]
    crop: Option<usize>,
    /// Learning rate
    #[arg(long, value_name = "X", default_value_t = 0.02)]
    rate: f64,
    /// Picture of predictions beside the truth [default: RUN/eval/depth.png]
    #[arg(long, value_name = "FILE.png")]
    picture: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.steps == 0
        || args.batch < 2
        || !(args.rate.is_finite() && args.rate > 0.0)
        || args.crop.is_some_and(|c| c < 32)
    {
        return Err("--steps must be at least 1, --batch at least 2, --crop at least 32 and --rate above 0".into());
    }
    let common = &args.common;
    let encoder = common.encoder()?;
    let mut data = dense::depth(&common.data)?;
    let all = data.train.len();
    if args.limit > 0 && args.limit < all {
        data.train = (0..args.limit).map(|i| data.train[i * all / args.limit].clone()).collect();
    }
    report::note(format!("{} training images, {} test images", data.train.len(), data.test.len()));
    let mut rows = Vec::new();
    let mut pictures: Vec<Vec<DepthMap>> = Vec::new();
    for (encoder, who) in [(&encoder, ""), (&common.random(&encoder), ", random encoder")] {
        let predicted = predictions(args, encoder, &data, who)?;
        let of = |(predicted, pair): (&DepthMap, &DepthPair)| {
            let mut one = Depth::default();
            one.add(&predicted.metres, &pair.depth.metres);
            one
        };
        let images: Vec<Depth> = predicted.iter().zip(&data.test).map(of).collect();
        let total = |at: &[usize]| {
            let mut sum = Depth::default();
            at.iter().for_each(|i| sum.merge(&images[*i]));
            sum
        };
        let (n, seed) = (images.len(), common.seed);
        for (k, name) in ["pct < 1.25", "pct < 1.25²", "pct < 1.25³"].into_iter().enumerate() {
            rows.push(Row::share(format!("{name}{who}"), n, seed, |at| total(at).near()[k]));
        }
        rows.push(Row::sampled(format!("rms, metres{who}"), n, seed, |at| total(at).rms()));
        rows.push(Row::sampled(format!("rel{who}"), n, seed, |at| total(at).relative()));
        pictures.push(predicted);
    }
    common.draw(args.picture.as_ref(), "depth.png", &picture(&data.test, &pictures))?;
    let settings = serde_json::json!({
        "frozen": args.frozen, "steps": args.steps, "batch": args.batch, "crop": crop(args, &data), "rate": args.rate,
        "train_images": data.train.len(), "test_images": data.test.len(),
    });
    common.finish(if args.frozen { "depth-frozen" } else { "depth" }, settings, rows)
}

/// What was said, else the largest multiple of 32 that fits into every image.
fn crop(args: &Args, data: &DepthSet) -> usize {
    let shortest = data.train.iter().map(|p| p.image.height.min(p.image.width)).min().unwrap_or(32);
    args.crop.unwrap_or((shortest / 32 * 32).clamp(32, 256))
}

/// Trains a head and predicts the test images.
fn predictions(args: &Args, encoder: &Encoder, data: &DepthSet, who: &str) -> Result<Vec<DepthMap>> {
    let protocol = Protocol {
        steps: args.steps,
        batch: args.batch,
        crop: crop(args, data),
        rate: args.rate,
        frozen: args.frozen,
        seed: args.common.seed,
    };
    let trained = super::heads(args.steps, who, |done| DepthNet::train(encoder, &data.train, &protocol, done))?;
    let bar = report::counter("predicting test images", data.test.len() as u64);
    let one = |pair: &DepthPair| {
        bar.inc(1);
        trained.predict(&pair.image)
    };
    let predicted = data.test.iter().map(one).collect();
    bar.finish_and_clear();
    Ok(predicted)
}

/// A row an image, of six that are evenly spread: image, truth, predictions; near is dark, and a row has one scale.
fn picture(pairs: &[DepthPair], predicted: &[Vec<DepthMap>]) -> Vec<u8> {
    const SIDE: u32 = 240;
    let n = pairs.len().min(6);
    let row = |k: usize| {
        let i = k * pairs.len() / n;
        let farthest = pairs[i].depth.metres.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
        let grey = |depth: &DepthMap| {
            let value = |m: &f32| [(255.0 * (m / farthest).clamp(0.0, 1.0)) as u8; 3];
            let pixels = depth.metres.iter().flat_map(value).collect();
            Tile::image(&Image { height: depth.height, width: depth.width, channels: 3, pixels }, SIDE)
        };
        let mut row = vec![Tile::image(&pairs[i].image, SIDE), grey(&pairs[i].depth)];
        row.extend(predicted.iter().map(|of| grey(&of[i])));
        row
    };
    sheet::png(&(0..n).map(row).collect::<Vec<_>>(), SIDE)
}

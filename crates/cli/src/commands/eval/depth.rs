//! `byol eval depth ENCODER DATA`

use std::process::ExitCode;

use byol::{
    data::dense_labels::{self, DepthMap, DepthPair},
    eval::{depth::DepthNet, metrics::DepthErrors, results::ResultRow},
    image::Image,
    nn::Encoder,
};

use super::heads::{self, DenseArgs, Predictions};
use crate::terminal::{self, Result};

const EXAMPLES: &str = "\
Examples:
  byol eval depth byol-runs/photos nyuv2 --picture depth.png  Train a head on images and depth";

/// Train a depth head on the encoder
///
/// DATA has folders `images` and `depth` with the same file names (16-bit grayscale in millimeters,
/// or float TIFF in meters), or is a folder of NYUv2 (`rgb_N` next to `sync_depth_N`). The head is
/// the paper's: four up-projections, trained with the reverse Huber loss. The encoder is fine-tuned
/// with the head, or kept fixed with --frozen; its file stays unchanged. The results include the
/// same head on the random initialization.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
#[command(mut_arg("data", |data| data.help("Folder with `images/` and `depth/`, or a folder of NYUv2")))]
pub struct Args {
    #[command(flatten)]
    dense: DenseArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let args = &args.dense;
    args.check()?;
    let common = &args.common;
    let encoder = common.encoder()?;
    let data = dense_labels::depth(&common.data, args.limit, encoder.spec.levels.clone())?;
    heads::ensure_channels(&encoder, &data.train[0].image)?;
    super::warn_if_enlarged(&encoder, &data.train[0].image, &common.data);
    let protocol = args.protocol(data.train.iter().map(|pair| &pair.image));
    terminal::note(heads::counts(data.train.len(), data.test.len()));

    let train =
        |encoder: &Encoder, on_step: &mut dyn FnMut(f64)| DepthNet::train(encoder, &data.train, &protocol, on_step);
    let predict = |net: &DepthNet, pair: &DepthPair| {
        let depth = net.predict(&pair.image);
        let mut errors = DepthErrors::default();
        errors.add(&depth.meters, &pair.depth.meters);
        (errors, depth)
    };
    let results = args.predict_with_baseline(&encoder, &data.test, train, predict)?;

    let rows = results.iter().flat_map(|predictions| rows(predictions, common.flags.seed)).collect();
    let picture = heads::picture(data.test.len(), |i| {
        let truth = &data.test[i].depth;
        let farthest = truth.meters.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
        let predicted = results.iter().filter_map(|predictions| predictions.drawn[i].as_ref());
        let depths = std::iter::once(truth).chain(predicted);
        std::iter::once(data.test[i].image.clone()).chain(depths.map(|depth| grayscale(depth, farthest))).collect()
    });
    let settings = args.settings(&protocol, data.train.len(), data.test.len(), serde_json::json!({}));
    let name = if args.frozen { "depth-frozen" } else { "depth" };
    common.finish_with_picture(name, settings, rows, args.picture.as_deref(), &picture)
}

/// Threshold accuracies, root mean squared error, and mean relative error.
fn rows(predictions: &Predictions<DepthErrors, DepthMap>, seed: u64) -> Vec<ResultRow> {
    let Predictions { suffix, scores, .. } = predictions;
    let total = |indices: &[usize]| {
        let mut sum = DepthErrors::default();
        indices.iter().for_each(|i| sum.merge(&scores[*i]));
        sum
    };
    let thresholds = ["pct < 1.25", "pct < 1.25²", "pct < 1.25³"].into_iter().enumerate();
    let mut rows: Vec<ResultRow> = thresholds
        .map(|(k, name)| {
            let accuracy = |indices: &[usize]| total(indices).threshold_accuracies()[k];
            ResultRow::fraction(format!("{name}{suffix}"), scores.len(), seed, accuracy)
        })
        .collect();
    let rms = |indices: &[usize]| total(indices).rms();
    rows.push(ResultRow::with_interval(format!("rms, meters{suffix}"), scores.len(), seed, rms));
    let relative = |indices: &[usize]| total(indices).mean_relative();
    rows.push(ResultRow::with_interval(format!("rel{suffix}"), scores.len(), seed, relative));
    rows
}

/// Depth as brightness: near is dark, `farthest` is white.
fn grayscale(depth: &DepthMap, farthest: f32) -> Image {
    let value = |meters: &f32| [(255.0 * (meters / farthest).clamp(0.0, 1.0)) as u8; 3];
    let pixels = depth.meters.iter().flat_map(value).collect();
    Image { height: depth.height, width: depth.width, channels: 3, pixels }
}

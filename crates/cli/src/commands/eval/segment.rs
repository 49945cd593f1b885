//! `byol eval segment ENCODER DATA`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    apply::sheet::{self, Tile},
    data::{
        Image,
        dense::{self, Mask, NO_CLASS, Pair, Segmentation},
    },
    eval::{
        metrics::Confusion,
        rows::Row,
        segment::{Protocol, Segmenter, confusions},
    },
    nn::Encoder,
};

use super::Common;
use crate::report::{self, Result};

/// Train a segmentation head on the encoder
///
/// DATA has `images` and `masks` with the same names, and the same splits below both. The head is the paper's: the encoder's last group dilated,
/// two 3x3 convolutions, one 1x1. The same head on a network of the same kind with random weights stands beside it. The encoder is
/// fine-tuned with the head, or with --frozen left as it is; its file stays as it is in any case.
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
    /// Side of the training crops [default: a multiple of 32 that fits into the images, at most 512]
    #[arg(long, value_name = "PX")]
    crop: Option<usize>,
    /// Learning rate
    #[arg(long, value_name = "X", default_value_t = 0.05)]
    rate: f64,
    /// Picture of predictions beside the truth [default: RUN/eval/segment.png]
    #[arg(long, value_name = "FILE.png")]
    picture: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.steps == 0
        || args.batch < 2
        || !(args.rate.is_finite() && args.rate > 0.0)
        || args.crop.is_some_and(|c| c < 16)
    {
        return Err("--steps must be at least 1, --batch at least 2, --crop at least 16 and --rate above 0".into());
    }
    let common = &args.common;
    let encoder = common.encoder()?;
    let mut data = dense::segmentation(&common.data)?;
    let all = data.train.len();
    if args.limit > 0 && args.limit < all {
        data.train = (0..args.limit).map(|i| data.train[i * all / args.limit].clone()).collect();
    }
    let classes = data.classes.len();
    report::note(format!("{} training images, {} test images, {classes} classes", data.train.len(), data.test.len()));
    let mut rows = Vec::new();
    let mut pictures: Vec<Vec<Mask>> = Vec::new();
    for (encoder, who) in [(&encoder, ""), (&common.random(&encoder), ", random encoder")] {
        let predicted = predictions(args, encoder, &data, who)?;
        let images = confusions(&predicted, &data.test, classes);
        let total = |at: &[usize]| {
            let mut sum = Confusion::new(classes);
            at.iter().for_each(|i| sum.merge(&images[*i]));
            sum
        };
        let n = images.len();
        rows.push(Row::share(format!("mean IoU{who}"), n, common.seed, |at| total(at).mean_iou()));
        rows.push(Row::share(format!("pixel accuracy{who}"), n, common.seed, |at| total(at).pixel_accuracy()));
        let whole = total(&(0..n).collect::<Vec<_>>());
        for (name, iou) in data.classes.iter().zip(whole.iou()) {
            // A class that no test image has and nobody predicts has no IoU.
            if let Some(value) = iou {
                rows.push(Row { share: true, ..Row::plain(format!("IoU {name}{who}"), value) });
            }
        }
        pictures.push(predicted);
    }
    common.draw(args.picture.as_ref(), "segment.png", &picture(&data.test, &pictures))?;
    let settings = serde_json::json!({
        "frozen": args.frozen, "steps": args.steps, "batch": args.batch, "crop": crop(args, &data), "rate": args.rate,
        "train_images": data.train.len(), "test_images": data.test.len(), "classes": data.classes,
    });
    common.finish(if args.frozen { "segment-frozen" } else { "segment" }, settings, rows)
}

/// What was said, else the largest multiple of 32 that fits into every image.
fn crop(args: &Args, data: &Segmentation) -> usize {
    let shortest = data.train.iter().map(|p| p.image.height.min(p.image.width)).min().unwrap_or(32);
    args.crop.unwrap_or((shortest / 32 * 32).clamp(32, 512))
}

/// Trains a head and predicts the test images.
fn predictions(args: &Args, encoder: &Encoder, data: &Segmentation, who: &str) -> Result<Vec<Mask>> {
    let protocol = Protocol {
        steps: args.steps,
        batch: args.batch,
        crop: crop(args, data),
        rate: args.rate,
        frozen: args.frozen,
        seed: args.common.seed,
    };
    let classes = data.classes.len();
    let trained =
        super::heads(args.steps, who, |done| Segmenter::train(encoder, &data.train, classes, &protocol, done))?;
    let bar = report::counter("predicting test images", data.test.len() as u64);
    let one = |pair: &Pair| {
        bar.inc(1);
        trained.predict(&pair.image)
    };
    let predicted = data.test.iter().map(one).collect();
    bar.finish_and_clear();
    Ok(predicted)
}

/// A row an image, of six that are evenly spread: image, truth, predictions.
fn picture(pairs: &[Pair], predicted: &[Vec<Mask>]) -> Vec<u8> {
    const SIDE: u32 = 240;
    let n = pairs.len().min(6);
    let row = |k: usize| {
        let i = k * pairs.len() / n;
        let mut row = vec![Tile::image(&pairs[i].image, SIDE), Tile::image(&coloured(&pairs[i].mask), SIDE)];
        row.extend(predicted.iter().map(|of| Tile::image(&coloured(&of[i]), SIDE)));
        row
    };
    sheet::png(&(0..n).map(row).collect::<Vec<_>>(), SIDE)
}

/// A colour a class; black where there is none.
fn coloured(mask: &Mask) -> Image {
    let colour = |class: u8| -> [u8; 3] {
        if class == NO_CLASS {
            return [0; 3];
        }
        // Hues a golden section apart, in two lightnesses.
        let turn = f64::from(class) * 0.618_034 % 1.0;
        let wave = |shift: f64| 0.5 + 0.5 * (std::f64::consts::TAU * (turn + shift)).cos();
        let light = if class.is_multiple_of(2) { 255.0 } else { 170.0 };
        [wave(0.0), wave(1.0 / 3.0), wave(2.0 / 3.0)].map(|v| (40.0 + (light - 40.0) * v) as u8)
    };
    let pixels = mask.classes.iter().flat_map(|c| colour(*c)).collect();
    Image { height: mask.height, width: mask.width, channels: 3, pixels }
}

//! `byol eval segment ENCODER DATA`

use std::{collections::BTreeSet, process::ExitCode};

use byol::{
    data::dense_labels::{self, Mask, MaskPair, NO_CLASS, Segmentation},
    eval::{metrics::ConfusionMatrix, results::ResultRow, segment::Segmenter, split},
    image::Image,
    nn::Encoder,
};

use super::heads::{self, DenseArgs, Predictions};
use crate::terminal::{self, Result};

const EXAMPLES: &str = "\
Examples:
  byol eval segment byol-runs/photos camvid --picture masks.png  Train a head on images and masks";

/// Train a segmentation head on the encoder
///
/// DATA has folders `images` and `masks` with the same file names and the same splits. The head is
/// the paper's: dilated last stage, two 3x3 convolutions, one 1x1 convolution. The encoder is
/// fine-tuned with the head, or kept fixed with --frozen; its file stays unchanged. The results
/// include the same head on the random initialization.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
#[command(mut_arg("data", |data| data.help("Folder with `images/` and `masks/`")))]
pub struct Args {
    #[command(flatten)]
    dense: DenseArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let args = &args.dense;
    args.check()?;
    let common = &args.common;
    let encoder = common.encoder()?;
    let data = dense_labels::segmentation(&common.data, args.limit, encoder.spec.levels.clone())?;
    heads::ensure_channels(&encoder, &data.train[0].image)?;
    super::warn_if_enlarged(&encoder, &data.train[0].image, &common.data);
    must_be_learnable(args, &data)?;
    let protocol = args.protocol(data.train.iter().map(|pair| &pair.image));
    let classes = data.classes.len();
    terminal::note(format!("{}, {classes} classes", heads::counts(data.train.len(), data.test.len())));

    let train = |encoder: &Encoder, on_step: &mut dyn FnMut(f64)| {
        Segmenter::train(encoder, &data.train, classes, &protocol, on_step)
    };
    let predict = |net: &Segmenter, pair: &MaskPair| {
        let mask = net.predict(&pair.image);
        (ConfusionMatrix::from_image(&mask.classes, &pair.mask.classes, classes), mask)
    };
    let results = args.predict_with_baseline(&encoder, &data.test, train, predict)?;

    let rows = results.iter().flat_map(|predictions| rows(predictions, &data.classes, common.flags.seed)).collect();
    let picture = heads::picture(data.test.len(), |i| {
        let predicted = results.iter().filter_map(|predictions| predictions.drawn[i].as_ref());
        let masks = std::iter::once(&data.test[i].mask).chain(predicted);
        std::iter::once(data.test[i].image.clone()).chain(masks.map(colorize)).collect()
    });
    let task = serde_json::json!({ "classes": data.classes });
    let settings = args.settings(&protocol, data.train.len(), data.test.len(), task);
    let name = if args.frozen { "segment-frozen" } else { "segment" };
    common.finish_with_picture(name, settings, rows, args.picture.as_deref(), &picture)
}

/// Refuses masks without classes, or with test classes that no training mask has.
fn must_be_learnable(args: &DenseArgs, data: &Segmentation) -> Result<()> {
    let classes = |pairs: &[MaskPair]| -> BTreeSet<usize> {
        let labeled = pairs.iter().flat_map(|pair| &pair.mask.classes).filter(|class| **class != NO_CLASS);
        labeled.map(|class| usize::from(*class)).collect()
    };
    let (train, test) = (classes(&data.train), classes(&data.test));
    let root = &args.common.data;
    if test.is_empty() {
        return Err(format!("no pixel of the test masks of {} has a class", root.display()).into());
    }
    Ok(split::ensure_learnable(root, train.into_iter(), test.into_iter(), |class| data.classes[class].clone())?)
}

/// Mean IoU, pixel accuracy, and the IoU of every class.
fn rows(predictions: &Predictions<ConfusionMatrix, Mask>, classes: &[String], seed: u64) -> Vec<ResultRow> {
    let names = ["mean IoU".to_owned(), "pixel accuracy".to_owned()];
    let names = names.into_iter().chain(classes.iter().map(|class| format!("IoU {class}")));
    let names = names.map(|name| format!("{name}{}", predictions.suffix)).collect();
    let statistics = |indices: &[usize]| {
        let mut sum = ConfusionMatrix::new(classes.len());
        indices.iter().for_each(|i| sum.merge(&predictions.scores[*i]));
        // A bootstrap sample may lack a rare class.
        let per_class = sum.iou().into_iter().map(|iou| iou.unwrap_or(f64::NAN));
        [sum.mean_iou(), sum.pixel_accuracy()].into_iter().chain(per_class).collect()
    };
    let rows = ResultRow::fractions(names, predictions.scores.len(), seed, statistics);
    // A class that is in no test mask and never predicted has no IoU.
    rows.into_iter().filter(|row| !row.value.is_nan()).collect()
}

/// One color per class; black without a class.
fn colorize(mask: &Mask) -> Image {
    let color = |class: u8| -> [u8; 3] {
        if class == NO_CLASS {
            return [0; 3];
        }
        // Hues a golden section apart, in two lightnesses.
        let hue = f64::from(class) * 0.618_034 % 1.0;
        let wave = |shift: f64| 0.5 + 0.5 * (std::f64::consts::TAU * (hue + shift)).cos();
        let lightness = if class.is_multiple_of(2) { 255.0 } else { 170.0 };
        [wave(0.0), wave(1.0 / 3.0), wave(2.0 / 3.0)].map(|v| (40.0 + (lightness - 40.0) * v) as u8)
    };
    let pixels = mask.classes.iter().flat_map(|class| color(*class)).collect();
    Image { height: mask.height, width: mask.width, channels: 3, pixels }
}

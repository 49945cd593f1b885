//! `byol eval segment ENCODER DATA`

use std::{collections::BTreeSet, process::ExitCode};

use byol::{
    data::{
        Image,
        dense::{self, Mask, NO_CLASS, Pair},
    },
    eval::{metrics::Confusion, rows::Row, segment::Segmenter},
};

use super::{
    Common,
    heads::{self, HeadArgs},
};
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
    #[command(flatten)]
    head: HeadArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    args.head.check()?;
    let common = &args.common;
    let encoder = common.encoder()?;
    let data = dense::segmentation(&common.data, args.head.limit)?;
    super::fit_of(&encoder, &data.train[0].image, &common.data);
    let of = |pairs: &[Pair]| -> BTreeSet<usize> {
        let all = pairs.iter().flat_map(|pair| &pair.mask.classes).filter(|class| **class != NO_CLASS);
        all.map(|class| usize::from(*class)).collect()
    };
    let (seen, asked) = (of(&data.train), of(&data.test));
    if asked.is_empty() {
        return Err(format!("no pixel of the test masks of {} has a class", common.data.display()).into());
    }
    super::must_be_learnable(&common.data, seen.into_iter(), asked.into_iter(), |class| data.classes[class].clone())?;
    let protocol = args.head.protocol(data.train.iter().map(|pair| &pair.image), common.flags.seed);
    let classes = data.classes.len();
    report::note(format!("{}, {classes} classes", heads::counts(data.train.len(), data.test.len())));
    let mut rows = Vec::new();
    let mut pictures: Vec<Vec<Option<Mask>>> = Vec::new();
    let drawn = heads::drawn(data.test.len());
    for (encoder, who) in [(&encoder, ""), (&common.random(&encoder), ", random encoder")] {
        let trained =
            heads::train(protocol.steps, who, |done| Segmenter::train(encoder, &data.train, classes, &protocol, done))?;
        let (images, predicted): (Vec<_>, Vec<_>) = heads::predict(&data.test, |i, pair| {
            let mask = trained.predict(&pair.image);
            let confusion = Confusion::of(&mask.classes, &pair.mask.classes, classes);
            (confusion, drawn.contains(&i).then_some(mask))
        });
        let total = |at: &[usize]| {
            let mut sum = Confusion::new(classes);
            at.iter().for_each(|i| sum.merge(&images[*i]));
            sum
        };
        let names = ["mean IoU", "pixel accuracy"].map(str::to_owned).into_iter();
        let names = names.chain(data.classes.iter().map(|class| format!("IoU {class}")));
        let figures = |at: &[usize]| {
            let sum = total(at);
            // A draw of images may have none of a rare class.
            let of_classes = sum.iou().into_iter().map(|iou| iou.unwrap_or(f64::NAN));
            [sum.mean_iou(), sum.pixel_accuracy()].into_iter().chain(of_classes).collect()
        };
        let names = names.map(|name| format!("{name}{who}")).collect();
        let all = Row::shares(names, images.len(), common.flags.seed, figures);
        // A class that no test image has and nobody predicts has no IoU.
        rows.extend(all.into_iter().filter(|row| !row.value.is_nan()));
        pictures.push(predicted);
    }
    let shown = |i: usize| {
        let masks = std::iter::once(&data.test[i].mask).chain(pictures.iter().filter_map(|of| of[i].as_ref()));
        std::iter::once(data.test[i].image.clone()).chain(masks.map(coloured)).collect()
    };
    let name = if args.head.frozen { "segment-frozen" } else { "segment" };
    let picture = heads::picture(&drawn, shown);
    let more = serde_json::json!({ "classes": data.classes });
    let settings = args.head.settings(&protocol, data.train.len(), data.test.len(), more);
    common.finish_drawn(name, settings, rows, args.head.picture.as_deref(), &picture)
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

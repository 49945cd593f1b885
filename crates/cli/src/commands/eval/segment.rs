//! `byol eval segment ENCODER DATA`

use std::{collections::BTreeSet, process::ExitCode};

use byol::{
    data::{
        Image,
        dense::{self, Mask, NO_CLASS, Pair},
    },
    eval::{
        metrics::Confusion,
        rows::Row,
        segment::{Segmenter, confusions},
    },
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
    let mut data = dense::segmentation(&common.data)?;
    data.train = args.head.limited(data.train);
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
    report::note(format!("{} training images, {} test images, {classes} classes", data.train.len(), data.test.len()));
    let mut rows = Vec::new();
    let mut pictures: Vec<Vec<Mask>> = Vec::new();
    for (encoder, who) in [(&encoder, ""), (&common.random(&encoder), ", random encoder")] {
        let trained =
            heads::train(protocol.steps, who, |done| Segmenter::train(encoder, &data.train, classes, &protocol, done))?;
        let predicted = heads::predict(&data.test, |pair| trained.predict(&pair.image));
        let images = confusions(&predicted, &data.test, classes);
        let total = |at: &[usize]| {
            let mut sum = Confusion::new(classes);
            at.iter().for_each(|i| sum.merge(&images[*i]));
            sum
        };
        let n = images.len();
        rows.push(Row::share(format!("mean IoU{who}"), n, common.flags.seed, |at| total(at).mean_iou()));
        rows.push(Row::share(format!("pixel accuracy{who}"), n, common.flags.seed, |at| total(at).pixel_accuracy()));
        let whole = total(&(0..n).collect::<Vec<_>>());
        for (name, iou) in data.classes.iter().zip(whole.iou()) {
            // A class that no test image has and nobody predicts has no IoU.
            if iou.is_some() {
                let class = data.classes.iter().position(|c| c == name).expect("its own name");
                // A draw of images may have none of a rare class.
                let of = |at: &[usize]| total(at).iou()[class].unwrap_or(f64::NAN);
                rows.push(Row::share(format!("IoU {name}{who}"), n, common.flags.seed, of));
            }
        }
        pictures.push(predicted);
    }
    let shown = |i: usize| {
        let masks = std::iter::once(&data.test[i].mask).chain(pictures.iter().map(|of| &of[i]));
        std::iter::once(data.test[i].image.clone()).chain(masks.map(coloured)).collect()
    };
    let name = if args.head.frozen { "segment-frozen" } else { "segment" };
    common.draw(args.head.picture.as_ref(), &format!("{name}.png"), &heads::picture(data.test.len(), shown))?;
    let more = serde_json::json!({ "classes": data.classes });
    let settings = args.head.settings(&protocol, data.train.len(), data.test.len(), more);
    common.finish(name, settings, rows)
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

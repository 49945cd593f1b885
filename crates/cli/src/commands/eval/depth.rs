//! `byol eval depth ENCODER DATA`

use std::process::ExitCode;

use byol::{
    data::{
        Image,
        dense::{self, DepthMap, DepthPair},
    },
    eval::{depth::DepthNet, metrics::Depth, rows::Row},
};

use super::{
    Common,
    heads::{self, HeadArgs},
};
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
    #[command(flatten)]
    head: HeadArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    args.head.check()?;
    let common = &args.common;
    let encoder = common.encoder()?;
    let mut data = dense::depth(&common.data)?;
    data.train = args.head.limited(data.train);
    let protocol = args.head.protocol(data.train.iter().map(|pair| &pair.image), common.flags.seed);
    report::note(format!("{} training images, {} test images", data.train.len(), data.test.len()));
    let mut rows = Vec::new();
    let mut pictures: Vec<Vec<DepthMap>> = Vec::new();
    for (encoder, who) in [(&encoder, ""), (&common.random(&encoder), ", random encoder")] {
        let trained = heads::train(protocol.steps, who, |done| DepthNet::train(encoder, &data.train, &protocol, done))?;
        let predicted = heads::predict(&data.test, |pair| trained.predict(&pair.image));
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
        let (n, seed) = (images.len(), common.flags.seed);
        for (k, name) in ["pct < 1.25", "pct < 1.25²", "pct < 1.25³"].into_iter().enumerate() {
            rows.push(Row::share(format!("{name}{who}"), n, seed, |at| total(at).near()[k]));
        }
        rows.push(Row::sampled(format!("rms, metres{who}"), n, seed, |at| total(at).rms()));
        rows.push(Row::sampled(format!("rel{who}"), n, seed, |at| total(at).relative()));
        pictures.push(predicted);
    }
    let shown = |i: usize| {
        let farthest = data.test[i].depth.metres.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
        let depths = std::iter::once(&data.test[i].depth).chain(pictures.iter().map(|of| &of[i]));
        std::iter::once(data.test[i].image.clone()).chain(depths.map(|depth| grey(depth, farthest))).collect()
    };
    let name = if args.head.frozen { "depth-frozen" } else { "depth" };
    common.draw(args.head.picture.as_ref(), &format!("{name}.png"), &heads::picture(data.test.len(), shown))?;
    let more = serde_json::json!({});
    let settings = args.head.settings(&protocol, data.train.len(), data.test.len(), more);
    common.finish(name, settings, rows)
}

/// Near is dark, `farthest` is white.
fn grey(depth: &DepthMap, farthest: f32) -> Image {
    let value = |m: &f32| [(255.0 * (m / farthest).clamp(0.0, 1.0)) as u8; 3];
    let pixels = depth.metres.iter().flat_map(value).collect();
    Image { height: depth.height, width: depth.width, channels: 3, pixels }
}

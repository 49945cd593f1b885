//! `byol eval depth ENCODER DATA`

use std::process::ExitCode;

use byol::{
    data::{
        Image,
        dense::{self, DepthMap},
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
    let data = dense::depth(&common.data, args.head.limit)?;
    super::fit_of(&encoder, &data.train[0].image, &common.data);
    let protocol = args.head.protocol(data.train.iter().map(|pair| &pair.image), common.flags.seed);
    report::note(heads::counts(data.train.len(), data.test.len()));
    let mut rows = Vec::new();
    let mut pictures: Vec<Vec<Option<DepthMap>>> = Vec::new();
    let drawn = heads::drawn(data.test.len());
    for (encoder, who) in [(&encoder, ""), (&common.random(&encoder), ", random encoder")] {
        let trained = heads::train(protocol.steps, who, |done| DepthNet::train(encoder, &data.train, &protocol, done))?;
        let (images, predicted): (Vec<_>, Vec<_>) = heads::predict(&data.test, |i, pair| {
            let depth = trained.predict(&pair.image);
            let mut one = Depth::default();
            one.add(&depth.metres, &pair.depth.metres);
            (one, drawn.contains(&i).then_some(depth))
        });
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
        let depths = std::iter::once(&data.test[i].depth).chain(pictures.iter().filter_map(|of| of[i].as_ref()));
        std::iter::once(data.test[i].image.clone()).chain(depths.map(|depth| grey(depth, farthest))).collect()
    };
    let name = if args.head.frozen { "depth-frozen" } else { "depth" };
    let picture = heads::picture(&drawn, shown);
    let more = serde_json::json!({});
    let settings = args.head.settings(&protocol, data.train.len(), data.test.len(), more);
    common.finish_drawn(name, settings, rows, args.head.picture.as_deref(), &picture)
}

/// Near is dark, `farthest` is white.
fn grey(depth: &DepthMap, farthest: f32) -> Image {
    let value = |m: &f32| [(255.0 * (m / farthest).clamp(0.0, 1.0)) as u8; 3];
    let pixels = depth.metres.iter().flat_map(value).collect();
    Image { height: depth.height, width: depth.width, channels: 3, pixels }
}

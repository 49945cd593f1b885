//! `byol eval report ENCODER|RUN DATA`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    data::{Dataset, Images},
    device,
    eval::{
        card::{self, Card},
        rows::Row,
    },
    nn::{Encoder, weights},
    train::run::{keep_bytes, read_plan},
    views::Policy,
};
use console::{Alignment, pad_str};

use super::{Common, features};
use crate::report::{self, Result, out};

/// Say without labels whether the encoder has learned anything
///
/// Beside each figure stands that of a network of the same kind with random weights, and of --baseline; the verdict compares them. The images
/// need no labels. Views are those of the run's recipe, or the paper's where the encoder stands alone.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Another encoder to compare with
    #[arg(long, value_name = "ENCODER")]
    baseline: Option<PathBuf>,
    /// Images to measure by, evenly spread
    #[arg(long, value_name = "N", default_value_t = 512)]
    limit: usize,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.limit < 16 {
        return Err("--limit must be at least 16: figures of fewer mean nothing".into());
    }
    let common = &args.common;
    let encoder = common.encoder()?;
    let random = common.random(&encoder);
    let baseline = args.baseline.as_ref().map(|path| weights::load(path, &encoder.device())).transpose()?;
    let images = images(args)?;
    let (policies, size) = match read_plan(&common.encoder) {
        Ok(plan) => ([plan.recipe.views.first, plan.recipe.views.second], plan.recipe.views.size),
        Err(_) => ([Policy::default(), Policy::second()], encoder.spec.size),
    };
    let measure = |encoder: &Encoder| -> Result<Card> {
        let still = features(encoder, &images, "embedding")?;
        let how = card::Views { policies: [&policies[0], &policies[1]], size, seed: common.flags.seed };
        Ok(card::measure(encoder, &images, &still, how)?)
    };
    let mut cards = vec![("this encoder", measure(&encoder)?), ("random weights", measure(&random)?)];
    if let Some(baseline) = &baseline {
        cards.push(("the baseline", measure(baseline)?));
    }
    let own = cards[0].1;
    let verdicts: Vec<String> = cards[1..].iter().map(|(name, card)| own.verdict(card, name)).collect();
    let mut rows = Vec::new();
    for (name, card) in &cards {
        for (figure, value, share) in card.figures() {
            rows.push(Row { share, ..Row::plain(format!("{figure}, {name}"), value) });
        }
    }
    if !common.flags.on.json {
        table(&cards);
        verdicts.iter().for_each(|verdict| out!("{verdict}"));
    }
    common.keep("report", serde_json::json!({ "images": images.len(), "verdicts": verdicts }), rows)
}

/// A figure a line, an encoder a column.
fn table(cards: &[(&str, Card)]) {
    let cell = |text: &str, width| pad_str(text, width, Alignment::Right, None).into_owned();
    let head: String = cards.iter().map(|(name, _)| cell(name, 16)).collect();
    out!("{}{head}", " ".repeat(28));
    for i in 0..cards[0].1.figures().len() {
        let (name, ..) = cards[0].1.figures()[i];
        let of = |(_, card): &(&str, Card)| {
            let (_, value, share) = card.figures()[i];
            cell(&Row { share, ..Row::plain("", value) }.shown(), 16)
        };
        out!("{}{}", pad_str(name, 28, Alignment::Left, None), cards.iter().map(of).collect::<String>());
    }
}

/// The data's own test images, or else some of the training images; labels or not.
fn images(args: &Args) -> Result<Images> {
    let dataset = Dataset::open(&args.common.data)?;
    let dataset = match &dataset.test {
        Some(test) => Dataset { train: test.clone(), held_out: None, test: None, ..dataset },
        None => Dataset { held_out: None, ..dataset },
    };
    let bar = report::counter("checking images", args.limit as u64);
    let dataset = dataset.limit(args.limit).check(keep_bytes(device::machine().free_mb), &|| bar.inc(1))?;
    bar.finish_and_clear();
    if dataset.train.len() < 16 {
        let root = args.common.data.display();
        return Err(format!("{root} has {} usable images; give at least 16", dataset.train.len()).into());
    }
    Ok(dataset.train)
}

//! `byol eval report ENCODER|RUN DATA`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    data::{Dataset, Images},
    device,
    eval::{
        card::{self, ByImage, Card},
        rows::Row,
    },
    nn::Encoder,
    train::{
        metrics,
        run::{keep_bytes, read_plan},
    },
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
    /// Images to measure by
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
    let baseline = args.baseline.as_ref().map(|path| common.flags.on.encoder_again(path, &encoder)).transpose()?;
    let images = images(args)?;
    super::fits(&encoder, &images, &common.data)?;
    let (policies, size) = match common.run().map(read_plan).transpose()? {
        Some(plan) => ([plan.recipe.views.first, plan.recipe.views.second], plan.recipe.views.size),
        None => ([Policy::default(), Policy::second()], encoder.spec.size),
    };
    let measure = |encoder: &Encoder| -> Result<(Card, ByImage)> {
        let still = features(encoder, &images, "embedding")?;
        let how = card::Views { policies: [&policies[0], &policies[1]], size, seed: common.flags.seed };
        Ok(card::measure_each(encoder, &images, &still, how)?)
    };
    let mut cards = vec![("this encoder", measure(&encoder)?), ("random weights", measure(&random)?)];
    if let Some(baseline) = &baseline {
        cards.push(("the baseline", measure(baseline)?));
    }
    let own = cards[0].1.0;
    let mut verdicts: Vec<String> = cards[1..].iter().map(|(name, (card, _))| own.verdict(card, name)).collect();
    let mut rows = Vec::new();
    for (name, (card, by_image)) in &cards {
        for (figure, value, share) in card.figures() {
            let called = format!("{figure}, {name}");
            rows.push(match by_image.of(figure) {
                Some(each) => {
                    let mean = |at: &[usize]| at.iter().map(|i| each[*i]).sum::<f64>() / at.len().max(1) as f64;
                    Row { share, ..Row::sampled(called, each.len(), common.flags.seed, mean) }
                }
                // Of a spectrum, or of pairs: drawing images again would count some as their own neighbours.
                None => Row { share, ..Row::plain(called, value) },
            });
        }
    }
    // An encoder has no projections; the run that made it has measured them.
    let epochs = common.run().map_or_else(Vec::new, |run| metrics::figures(&run.join("metrics.jsonl")));
    if let [first, .., last] = &epochs[..]
        && let (Some(began), Some(ended)) = (first.card, last.card)
    {
        verdicts.push(format!("in the run, {}", ended.verdict(&began, "where it began")));
    }
    let last = epochs.last();
    if let [first, ..] = &epochs[..]
        && let Some(last) = last
    {
        for (health, when) in [(last, "last healthy epoch of the run"), (first, "before the run's first step")] {
            rows.push(Row::plain(format!("deviation of projections, {when}"), health.projection_std));
            rows.push(Row::plain(format!("cosine of projections, {when}"), health.projection_cosine));
        }
        rows.push(Row::plain("deviation of projections that are spread out", last.projection_std_ideal));
    }
    if !common.flags.on.json {
        let names: Vec<&str> = cards.iter().map(|(name, _)| *name).collect();
        table(&names, cards[0].1.0.figures().map(|(name, ..)| name), &rows);
        if let (Some(h), Some(began)) = (last, epochs.first()) {
            out!(
                "projections, last healthy epoch of the run: deviation {:.4} (spread out {:.4}), cosine {:.3}; before its first step {:.4}, {:.3}",
                h.projection_std,
                h.projection_std_ideal,
                h.projection_cosine,
                began.projection_std,
                began.projection_cosine
            );
        }
        verdicts.iter().for_each(|verdict| out!("{verdict}"));
    }
    let settings = serde_json::json!({ "images": images.len(), "baseline": args.baseline.as_ref().map(|path| report::shown(&super::whole(path))) });
    common.keep("report", settings, serde_json::json!({ "verdicts": verdicts }), rows)?;
    Ok(ExitCode::SUCCESS)
}

/// A figure a line, an encoder a column; `rows` are those of one encoder after the other. Behind ± half of the 95 % interval.
fn table(encoders: &[&str], figures: [&str; 8], rows: &[Row]) {
    let cell = |text: &str| pad_str(text, 20, Alignment::Right, None).into_owned();
    out!("{}{}", " ".repeat(28), encoders.iter().map(|name| cell(name)).collect::<String>());
    for (i, figure) in figures.iter().enumerate() {
        let of = |row: &Row| match row.interval {
            Some([low, high]) => {
                let half = Row { value: (high - low) / 2.0, ..row.clone() };
                cell(&format!("{} ± {}", row.shown().trim_end_matches(" %"), half.shown()))
            }
            None => cell(&row.shown()),
        };
        let line: String = rows.iter().skip(i).step_by(figures.len()).take(encoders.len()).map(of).collect();
        out!("{}{line}", pad_str(figure, 28, Alignment::Left, None));
    }
}

/// The data's own test images, or else some of the training images; labels or not.
fn images(args: &Args) -> Result<Images> {
    let dataset = Dataset::open(&args.common.data)?;
    let dataset = match &dataset.test {
        Some(test) => Dataset { train: test.clone(), held_out: None, test: None, ..dataset },
        None => {
            report::note("no test split: these are images that pretraining on these data has seen");
            Dataset { held_out: None, ..dataset }
        }
    };
    let bar = report::counter("checking images", args.limit as u64);
    let dataset = Dataset { train: dataset.train.some(args.limit), ..dataset };
    let dataset = dataset.check(keep_bytes(device::machine().free_mb), &|| bar.inc(1))?;
    bar.finish_and_clear();
    if dataset.train.len() < 16 {
        let root = args.common.data.display();
        return Err(format!("{root} has {} usable images; give at least 16", dataset.train.len()).into());
    }
    Ok(dataset.train)
}

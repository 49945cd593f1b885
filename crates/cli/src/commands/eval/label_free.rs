//! `byol eval label-free ENCODER|RUN DATA`

use std::{ops::ControlFlow::Continue, path::PathBuf, process::ExitCode};

use byol::{
    data::{Dataset, Images, Levels},
    device,
    eval::{
        label_free::{self, LabelFreeMetrics, PerImageMetrics, ViewConfig},
        results::ResultRow,
    },
    nn::Encoder,
    train::{data::cache_bytes, health::Health, metrics, run::read_plan},
};
use console::{Alignment, pad_str};
use serde_json::json;

use super::{CommonArgs, absolute, features};
use crate::{
    commands::load_encoder,
    terminal::{self, Result, display_path, out, plural},
};

const EXAMPLES: &str = "\
Examples:
  byol eval label-free byol-runs/photos photos  Evaluate without labels";

/// Evaluate representation quality without labels
///
/// Compares every metric with that of the randomly initialized network, and of --baseline. The
/// images need no labels. Views are those of the run's recipe, or the paper's for an encoder
/// without a run.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
#[command(mut_arg("data", |data| data.help("Images, labeled or not: a folder, CIFAR or IDX files, or shards")))]
pub struct Args {
    #[command(flatten)]
    common: CommonArgs,
    /// Another encoder to compare with
    #[arg(long, value_name = "ENCODER")]
    baseline: Option<PathBuf>,
    /// Number of images
    #[arg(long, value_name = "N", default_value_t = 512)]
    limit: usize,
}

/// Images below which the metrics are meaningless.
const MIN_IMAGES: usize = 16;

/// Metrics of an encoder, with its name.
struct Measured {
    name: &'static str,
    metrics: LabelFreeMetrics,
    per_image: PerImageMetrics,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.limit < MIN_IMAGES {
        return Err(format!("`--limit` must be at least {MIN_IMAGES}: fewer images give meaningless metrics").into());
    }
    let common = &args.common;
    let encoder = common.encoder()?;
    let random = common.random_initialization(&encoder);
    let baseline = args.baseline.as_ref().map(|path| load_encoder(path, &encoder.device())).transpose()?;
    let images = images(args, &encoder.spec.levels)?;
    super::warn_if_enlarged(&encoder, &*images.get(0)?, &common.data);

    let named =
        [("this encoder", Some(&encoder)), ("random initialization", Some(&random)), ("baseline", baseline.as_ref())];
    let measured = measure(args, &images, &encoder, &named)?;
    // Projections are metrics of the run: the encoder has none.
    let history = common.run().map_or_else(Vec::new, |run| metrics::read_health(&run.join("metrics.jsonl")));
    let verdicts = verdicts(&measured, &history);
    let mut rows = metric_rows(&measured, common.flags.seed);
    if !common.flags.compute.json {
        print_table(&measured, &rows);
        print_projections(&history);
        verdicts.iter().for_each(|verdict| out!("{}", terminal::wrap(verdict)));
    }
    rows.extend(projection_rows(&history));
    let baseline = args.baseline.as_ref().map(|path| display_path(&absolute(path)));
    let settings = json!({ "images": images.len(), "baseline": baseline });
    common.save("label-free", settings, json!({ "verdicts": verdicts }), rows)?;
    Ok(ExitCode::SUCCESS)
}

/// Metrics of the given encoders. Views are those that `encoder` was trained on.
fn measure(
    args: &Args,
    images: &Images,
    encoder: &Encoder,
    named: &[(&'static str, Option<&Encoder>)],
) -> Result<Vec<Measured>> {
    let (policies, size) = match args.common.run().map(read_plan).transpose()? {
        Some(plan) => (plan.recipe.policies(), plan.recipe.views.size),
        None => (encoder.spec.default_policies(), encoder.spec.size),
    };
    let config = ViewConfig { policies: [&policies[0], &policies[1]], size, seed: args.common.flags.seed };
    let mut measured = Vec::new();
    for (name, encoder) in named {
        let Some(encoder) = encoder else { continue };
        let representations = features(encoder, images, "embedding")?;
        let (metrics, per_image) = label_free::measure_per_image(encoder, images, &representations, config)?;
        measured.push(Measured { name, metrics, per_image });
    }
    Ok(measured)
}

/// One comparison of this encoder per other encoder, and one of the run's end with its start.
fn verdicts(measured: &[Measured], history: &[Health]) -> Vec<String> {
    let own = &measured[0].metrics;
    let mut verdicts: Vec<String> = measured[1..].iter().map(|other| own.verdict(&other.metrics, other.name)).collect();
    if let [first, .., last] = history
        && let (Some(start), Some(end)) = (first.label_free, last.label_free)
    {
        verdicts.push(format!("in the run: {}", end.verdict(&start, "the initial encoder")));
    }
    verdicts
}

/// All metrics of all encoders, encoder by encoder.
fn metric_rows(measured: &[Measured], seed: u64) -> Vec<ResultRow> {
    let mut rows = Vec::new();
    for Measured { name, metrics, per_image } in measured {
        for (metric, value, is_fraction) in metrics.named_values() {
            let name = format!("{metric}, {name}");
            let row = match per_image.get(metric) {
                Some(values) => {
                    let mean = |indices: &[usize]| {
                        indices.iter().map(|i| values[*i]).sum::<f64>() / indices.len().max(1) as f64
                    };
                    ResultRow::with_interval(name, values.len(), seed, mean)
                }
                // A metric of a spectrum or of pairs: in a bootstrap sample, repeated images would
                // be their own neighbors.
                None => ResultRow::without_interval(name, value),
            };
            rows.push(ResultRow { is_fraction, ..row });
        }
    }
    rows
}

/// Projection metrics that the run recorded.
fn projection_rows(history: &[Health]) -> Vec<ResultRow> {
    let (Some(first), Some(last)) = (history.first(), history.last()) else { return Vec::new() };
    let mut rows = Vec::new();
    for (health, epoch) in [(last, "last healthy epoch"), (first, "before the first step")] {
        rows.push(ResultRow::without_interval(format!("projection std, {epoch}"), health.projection_std));
        rows.push(ResultRow::without_interval(format!("projection cosine, {epoch}"), health.projection_cosine));
    }
    rows.push(ResultRow::without_interval("projection std, uniform distribution", last.projection_std_ideal));
    rows
}

/// Prints one line per metric and one column per encoder, with half the 95 % interval after ±.
fn print_table(measured: &[Measured], rows: &[ResultRow]) {
    let cell = |text: &str| pad_str(text, 23, Alignment::Right, None).into_owned();
    out!("{}{}", " ".repeat(28), measured.iter().map(|encoder| cell(encoder.name)).collect::<String>());
    let metrics = measured[0].metrics.named_values();
    for (i, (metric, ..)) in metrics.iter().enumerate() {
        let format = |row: &ResultRow| match row.interval {
            Some([low, high]) => {
                let half = ResultRow { value: (high - low) / 2.0, ..row.clone() };
                cell(&format!("{} ± {}", row.formatted_value().trim_end_matches(" %"), half.formatted_value()))
            }
            None => cell(&row.formatted_value()),
        };
        let line: String = rows.iter().skip(i).step_by(metrics.len()).map(format).collect();
        out!("{}{line}", pad_str(metric, 28, Alignment::Left, None));
    }
}

fn print_projections(history: &[Health]) {
    if let (Some(first), Some(last)) = (history.first(), history.last()) {
        let text = format!(
            "projections in the last healthy epoch: std {:.4} (uniform: {:.4}), cosine {:.3}; before the first step: \
             std {:.4}, cosine {:.3}",
            last.projection_std,
            last.projection_std_ideal,
            last.projection_cosine,
            first.projection_std,
            first.projection_cosine
        );
        out!("{}", terminal::wrap(&text));
    }
}

/// A sample of the data's test images, or of its training images if there is no test split.
fn images(args: &Args, levels: &Levels) -> Result<Images> {
    let dataset = args.common.data_flags.open(&args.common.data, Some(levels))?;
    let images = match &dataset.test {
        Some(test) => test.clone(),
        None => {
            args.common.note_pretraining_images();
            dataset.train.clone()
        }
    };
    let bar = terminal::progress_bar("checking images", args.limit as u64);
    let dataset = Dataset { train: images.sample_random(args.limit), held_out: None, test: None, ..dataset };
    let on_image = || {
        bar.inc(1);
        Continue(())
    };
    let dataset = dataset.check(cache_bytes(device::machine().free_mb), &on_image)?;
    bar.finish_and_clear();
    if dataset.train.len() < MIN_IMAGES {
        let images = plural(dataset.train.len(), "readable image");
        return Err(format!(
            "too few images: {} has {images} (at least {MIN_IMAGES} are needed)",
            args.common.data.display()
        )
        .into());
    }
    Ok(dataset.train)
}

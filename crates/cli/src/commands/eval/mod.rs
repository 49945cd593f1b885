//! `byol eval …`: one file an evaluation. What they share is here: opening, splitting, embedding, printing, keeping.

mod depth;
mod finetune;
mod heads;
mod knn;
mod linear;
mod report_card;
mod segment;
mod transfer;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::{
    data::{self, Dataset, Images},
    device,
    eval::{
        Features, embed,
        metrics::in_top,
        rows::{Row, Table},
    },
    nn::Encoder,
    train::run::keep_bytes,
};
use clap::Subcommand;
use console::{Alignment, measure_text_width, pad_str};

use super::Flags;
use crate::report::{self, Result, out};

/// Measure what an encoder has learned
///
/// Every evaluation leaves the encoder as it is, prints its figures with 95 % intervals (bootstrap over the test images), and keeps them in
/// RUN/eval/ where the encoder is that of a run.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Classify each test image by its nearest training images
    Knn(knn::Args),
    /// Train a linear classifier on the frozen encoder
    Linear(linear::Args),
    /// Fine-tune the encoder with a classifier on a part of the labels
    Finetune(finetune::Args),
    /// Say without labels whether the encoder has learned anything
    Report(report_card::Args),
    /// Train a segmentation head on the encoder
    Segment(segment::Args),
    /// Train a depth head on the encoder
    Depth(depth::Args),
    /// Evaluate the encoder on several labelled data sets
    Transfer(transfer::Args),
}

pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Knn(args) => knn::run(args),
        What::Linear(args) => linear::run(args),
        What::Finetune(args) => finetune::run(args),
        What::Report(args) => report_card::run(args),
        What::Segment(args) => segment::run(args),
        What::Depth(args) => depth::run(args),
        What::Transfer(args) => transfer::run(args),
    }
}

/// The flags of every evaluation.
#[derive(Debug, clap::Args)]
struct Common {
    /// An encoder.safetensors, or the folder of a run
    encoder: PathBuf,
    /// Labelled images: class subfolders, labels.csv, CIFAR or IDX files, shards (of segment and depth: images with masks or depth)
    data: PathBuf,
    #[command(flatten)]
    flags: Flags,
}

/// How many training images.
#[derive(Debug, clap::Args)]
struct Limit {
    /// Take N training images, evenly spread (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
}

/// Labelled images, parted.
pub struct Labelled {
    pub train: Images,
    pub test: Images,
    pub classes: Vec<String>,
}

impl Common {
    /// The encoder, on its device.
    fn encoder(&self) -> Result<Encoder> {
        self.flags.on.encoder(&self.encoder)
    }

    /// The encoder, and a random one of its kind where it is wanted, each with what its rows are called after.
    fn encoders(&self, with_random: bool) -> Result<Vec<(Encoder, &'static str)>> {
        let encoder = self.encoder()?;
        let random = with_random.then(|| (self.random(&encoder), ", random encoder"));
        Ok(std::iter::once((encoder, "")).chain(random).collect())
    }

    /// One of the same kind that has learned nothing.
    fn random(&self, like: &Encoder) -> Encoder {
        Encoder::random(like.spec.clone(), self.flags.seed, &like.device())
    }

    /// Training and test images for such an encoder, each decoded once.
    fn labelled(&self, limit: &Limit, encoder: &Encoder) -> Result<Labelled> {
        let data = labelled(Dataset::open(&self.data)?, limit.limit)?;
        fits(encoder, &data.train, &self.data)?;
        Ok(data)
    }

    /// The run that the encoder is of: its folder, or that of a file in it.
    fn run(&self) -> Option<&Path> {
        let folder = if self.encoder.is_file() { self.encoder.parent()? } else { &self.encoder };
        folder.join("plan.toml").is_file().then_some(folder)
    }

    /// Writes a picture where it was asked for, else into the run, if the encoder is of one.
    fn draw(&self, asked: Option<&PathBuf>, name: &str, png: &[u8]) -> Result<()> {
        let in_run = self.run().map(|run| run.join("eval").join(name));
        let Some(path) = asked.cloned().or(in_run) else { return Ok(()) };
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(|e| format!("cannot make {}: {e}; choose another --picture", folder.display()))?;
        }
        super::write_file(&path, png)?;
        report::note(format!("image, truth, prediction, prediction on random weights: {}", path.display()));
        Ok(())
    }

    /// Prints the figures, and keeps them in the run.
    fn finish(&self, evaluation: &str, settings: serde_json::Value, rows: Vec<Row>) -> Result<ExitCode> {
        if !self.flags.on.json {
            print(&rows);
        }
        self.keep(evaluation, settings, rows)
    }

    /// Keeps the figures in the run; prints them as JSON where that was asked for.
    fn keep(&self, evaluation: &str, settings: serde_json::Value, rows: Vec<Row>) -> Result<ExitCode> {
        let table = Table {
            evaluation: evaluation.into(),
            encoder: self.encoder.display().to_string(),
            data: self.data.display().to_string(),
            seed: self.flags.seed,
            settings,
            rows,
        };
        if let Some(run) = self.run() {
            let path = run.join("eval");
            let kept = table.save(run).map_err(|e| {
                format!(
                    "cannot write the figures into {}: {e}; free some space or check that you may write there",
                    path.display()
                )
            });
            report::note(format!("kept in {}", kept?.display()));
        }
        if self.flags.on.json {
            out!("{}", serde_json::to_string(&table).expect("a table is plain data"));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Top-1, and top-5 where there are more than five classes, of scores of the test images; `called` names a row of `top-k`.
fn top_rows(scores: &[f64], data: &Labelled, seed: u64, called: impl Fn(&str) -> String) -> Vec<Row> {
    let classes = data.classes.len();
    let row = |(k, top): (usize, &str)| Row::rate(called(top), seed, &in_top(scores, labels(&data.test), classes, k));
    [(1, "top-1"), (5, "top-5")].into_iter().filter(|(k, _)| *k == 1 || classes > *k).map(row).collect()
}

/// Says so where images are much smaller than those that the encoder has learned from.
fn fits(encoder: &Encoder, images: &Images, data: &Path) -> Result<()> {
    let (first, size) = (images.get(0)?, encoder.spec.size);
    if 2 * first.height.min(first.width) <= size {
        report::warning(format!(
            "images of {} have {}x{} px and the encoder is for {size} px: they are enlarged, which it has not learned from",
            data.display(),
            first.width,
            first.height
        ));
    }
    Ok(())
}

/// Parts data whose images have one label each.
pub fn labelled(dataset: Dataset, limit: usize) -> Result<Labelled> {
    let root = dataset.root.clone();
    let unlabelled = data::Error::Unlabelled(root.clone());
    let parted = parted(dataset, limit)?;
    if parted.train.labels().is_none() || parted.test.labels().is_none() {
        return Err(unlabelled.into());
    }
    let (seen, asked) = (labels(&parted.train).iter().copied(), labels(&parted.test).iter().copied());
    must_be_learnable(&root, seen, asked, |class| parted.classes[class].clone())?;
    Ok(parted)
}

/// Refuses what no classifier can learn: one class, or a class that is tested and not trained on.
pub fn must_be_learnable(
    root: &Path,
    trained: impl Iterator<Item = usize>,
    mut tested: impl Iterator<Item = usize>,
    name: impl Fn(usize) -> String,
) -> Result<()> {
    let (seen, root): (BTreeSet<usize>, _) = (trained.collect(), root.display());
    if let Some(class) = tested.find(|class| !seen.contains(class)) {
        let name = name(class);
        return Err(format!(
            "class `{name}` of {root} has test images but no training image; add some, or take more by --limit"
        )
        .into());
    }
    match seen.len() {
        0 | 1 => {
            Err(format!("the training images of {root} are all of one class; two are needed to tell apart").into())
        }
        _ => Ok(()),
    }
}

/// Parts data: its own test split, else every fifth image.
fn parted(dataset: Dataset, limit: usize) -> Result<Labelled> {
    let root = dataset.root.clone();
    let bar = report::counter("checking images", 0);
    let dataset = match &dataset.test {
        Some(_) => dataset,
        None if dataset.train.len() < 2 => {
            let root = root.display();
            return Err(
                format!("{root} has too few images to train on some and test on others; give at least two").into()
            );
        }
        None => {
            report::note(
                "no test split: every fifth image is one (pretraining on these data has seen most of them, without labels)",
            );
            let (train, test) = dataset.train.hold_out(dataset.train.len().div_ceil(5));
            Dataset { train, test: Some(test), ..dataset }
        }
    };
    let dataset = Dataset { held_out: None, ..dataset }.limit(limit);
    bar.set_length(dataset.n_images() as u64);
    let dataset = dataset.check(keep_bytes(device::machine().free_mb), &|| bar.inc(1))?;
    bar.finish_and_clear();
    if let Some(first) = dataset.skipped.first() {
        let n = dataset.skipped.len();
        report::warning(format!("{n} images cannot be used and are skipped; the first: {}: {}", first.what, first.why));
    }
    let Some(test) = dataset.test else {
        return Err(format!("none of the test images of {} can be used", root.display()).into());
    };
    Ok(Labelled { train: dataset.train, test, classes: dataset.classes })
}

/// Representations with a progress bar.
pub fn features(encoder: &Encoder, images: &Images, what: &str) -> Result<Features> {
    let bar = report::counter(what, images.len() as u64);
    let features = embed(encoder, images, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    match features.is_finite() {
        true => Ok(features),
        false => Err("the encoder gives what is no number: its training has diverged; use an earlier one".into()),
    }
}

/// The labels of images that were checked to have some.
pub fn labels(images: &Images) -> &[usize] {
    images.labels().expect("labelled images were asked for")
}

/// A table of name, value, interval.
pub fn print(rows: &[Row]) {
    let width = |text: fn(&Row) -> String| rows.iter().map(|row| measure_text_width(&text(row))).max().unwrap_or(0);
    let (name, value) = (width(|row| row.name.clone()), width(Row::shown));
    for row in rows {
        let interval = match row.shown_interval() {
            none if none.is_empty() => none,
            some => format!("  ({some})"),
        };
        let cell = |text: &str, width, side| pad_str(text, width, side, None).into_owned();
        out!("{}  {}{interval}", cell(&row.name, name, Alignment::Left), cell(&row.shown(), value, Alignment::Right));
    }
}

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
    data::{self, Dataset, Image, Images},
    device,
    eval::{
        Features, embed,
        logistic::Classifier,
        metrics::in_top,
        rows::{Row, Table},
    },
    nn::Encoder,
    train::run::keep_bytes,
};
use clap::Subcommand;
use console::{Alignment, measure_text_width, pad_str};
use serde_json::Value;

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
    Knn(knn::Args),
    Linear(linear::Args),
    Finetune(finetune::Args),
    Report(report_card::Args),
    Segment(segment::Args),
    Depth(depth::Args),
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
    /// Images: of `report` any; of `segment` and `depth` a folder with `images/` and `masks/` or `depth/`; of the others labelled ones, in class
    /// subfolders, with a labels.csv, CIFAR or IDX files, or shards
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

    /// Prints the figures and keeps them in the run, if the encoder is of one. `found` is what was chosen or said besides.
    fn finish(&self, evaluation: &str, settings: Value, found: Value, rows: Vec<Row>) -> Result<ExitCode> {
        if !self.flags.on.json {
            print(&rows);
        }
        self.keep(evaluation, settings, found, rows)?;
        Ok(ExitCode::SUCCESS)
    }

    /// The same with a picture: where it was asked for, else beside the figures.
    fn finish_drawn(
        &self,
        evaluation: &str,
        settings: Value,
        rows: Vec<Row>,
        asked: Option<&Path>,
        png: &[u8],
    ) -> Result<ExitCode> {
        if !self.flags.on.json {
            print(&rows);
        }
        let kept = self.keep(evaluation, settings, Value::Null, rows)?;
        let beside = kept.map(|path| path.with_extension("png"));
        let Some(path) = asked.map(Path::to_owned).or(beside) else { return Ok(ExitCode::SUCCESS) };
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(|e| format!("cannot make {}: {e}; choose another --picture", folder.display()))?;
        }
        super::write_file(&path, png)?;
        report::note(format!("image, truth, prediction, prediction on random weights: {}", path.display()));
        Ok(ExitCode::SUCCESS)
    }

    /// Keeps the figures in the run, if the encoder is of one, and says in which file; prints them as JSON where that was asked for.
    fn keep(&self, evaluation: &str, settings: Value, found: Value, rows: Vec<Row>) -> Result<Option<PathBuf>> {
        let table = Table {
            evaluation: evaluation.into(),
            encoder: self.encoder_name(),
            data: whole(&self.data).display().to_string(),
            seed: self.flags.seed,
            settings,
            found,
            rows,
        };
        let kept = match self.run() {
            None => None,
            Some(run) => {
                let kept = table.save(run).map_err(|e| {
                    format!(
                        "cannot write the figures into {}: {e}; free some space or check that you may write there",
                        run.join("eval").display()
                    )
                })?;
                report::note(format!("kept in {}", kept.display()));
                Some(kept)
            }
        };
        if self.flags.on.json {
            out!("{}", serde_json::to_string(&table).expect("a table is plain data"));
        }
        Ok(kept)
    }

    /// The encoder's file: within its run by its name there, so that a run may be moved.
    fn encoder_name(&self) -> String {
        let file = if self.encoder.is_dir() { self.encoder.join("encoder.safetensors") } else { self.encoder.clone() };
        match (self.run(), file.file_name()) {
            (Some(_), Some(name)) => name.to_string_lossy().into_owned(),
            _ => whole(&file).display().to_string(),
        }
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
    fit_of(encoder, &*images.get(0)?, data);
    Ok(())
}

/// The same of one of them.
fn fit_of(encoder: &Encoder, first: &Image, data: &Path) {
    let size = encoder.spec.size;
    if 2 * first.height.min(first.width) <= size {
        report::warning(format!(
            "images of {} have {}x{} px and the encoder is for {size} px: they are enlarged, which it has not learned from",
            data.display(),
            first.width,
            first.height
        ));
    }
}

/// Parts data whose images have one label each.
pub fn labelled(dataset: Dataset, limit: usize) -> Result<Labelled> {
    let root = dataset.root.clone();
    let unlabelled = data::Error::Unlabelled(root.clone());
    let parted = parted(dataset, limit)?;
    if parted.train.tags().is_some() {
        let root = root.display();
        return Err(
            format!("images of {root} have several classes each; evaluate on them by `byol eval transfer`").into()
        );
    }
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

/// Parts data: its own test split, else one image of five.
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
                "no test split: one image of five is in it (pretraining on these data has seen most of them, without labels)",
            );
            let (train, test) = dataset.train.hold_out_to_test(5);
            Dataset { train, test: Some(test), ..dataset }
        }
    };
    // Whoever chooses settings holds out a part of the training images, so a split for that is one more of them.
    let train = match (&dataset.held_out, &dataset.test) {
        (Some(val), Some(test)) if !val.is_same(test) => {
            let alike = dataset.train.is_labelled_as(val);
            let both = alike.then(|| dataset.train.and(val)).flatten();
            let what = if both.is_some() { "training images too" } else { "left out" };
            report::note(format!("of `val` {} {what}", report::counted_noun(val.len(), "image")));
            both.unwrap_or_else(|| dataset.train.clone())
        }
        _ => dataset.train.clone(),
    };
    let dataset = Dataset { train, held_out: None, ..dataset }.limit(limit);
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

/// The path from the root, where there is such a file; addresses and patterns stay.
pub fn whole(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
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

/// Refuses a classifier whose training has broken; `remedy` is what to do then.
pub fn must_be_finite(classifier: &Classifier, remedy: &str) -> Result<()> {
    match classifier.is_finite() {
        true => Ok(()),
        false => Err(format!("the classifier's weights are no numbers any more; {remedy}").into()),
    }
}

/// Where rates are a flag.
pub const LOWER_RATES: &str = "all of --rates are too high, try lower ones";

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

//! `byol eval …`: one file per evaluation. Shared here: opening and splitting the data, embedding,
//! printing and saving the results.

mod depth;
mod finetune;
mod heads;
mod knn;
mod label_free;
mod linear;
mod segment;
mod transfer;

use std::{
    ops::ControlFlow::Continue,
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::{
    data::{Dataset, Images},
    device,
    eval::{
        Features, embed,
        logistic::Classifier,
        metrics::top_k_hits,
        results::{ResultRow, ResultTable},
        split::{self, LabeledSplit},
    },
    image::Image,
    nn::Encoder,
    train::{data::cache_bytes, run::read_plan},
};
use clap::Subcommand;
use console::{Alignment, measure_text_width, pad_str};
use serde_json::Value;

use super::{EvalFlags, data_args::DataFlags};
use crate::terminal::{self, Result, out};

const EXAMPLES: &str = "\
Examples:
  byol eval label-free byol-runs/photos photos          Without labels
  byol eval knn byol-runs/photos labeled --with-random  Nearest neighbors, also of random weights
  byol eval linear byol-runs/photos labeled --fast      Logistic regression";

/// Evaluate an encoder
///
/// Evaluations never change the encoder. They print metrics with 95 % confidence intervals
/// (bootstrap over the test images) and save them in RUN/eval/ if the encoder belongs to a run.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    evaluation: Evaluation,
}

#[derive(Debug, Subcommand)]
enum Evaluation {
    Knn(knn::Args),
    Linear(linear::Args),
    Finetune(finetune::Args),
    // The earlier name of the command.
    #[command(alias = "report")]
    LabelFree(label_free::Args),
    Segment(segment::Args),
    Depth(depth::Args),
    Transfer(transfer::Args),
}

pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.evaluation {
        Evaluation::Knn(args) => knn::run(args),
        Evaluation::Linear(args) => linear::run(args),
        Evaluation::Finetune(args) => finetune::run(args),
        Evaluation::LabelFree(args) => label_free::run(args),
        Evaluation::Segment(args) => segment::run(args),
        Evaluation::Depth(args) => depth::run(args),
        Evaluation::Transfer(args) => transfer::run(args),
    }
}

/// Arguments of every evaluation.
#[derive(Debug, clap::Args)]
struct CommonArgs {
    /// Encoder file (.safetensors) or run folder
    encoder: PathBuf,
    /// Images: a folder, CIFAR or IDX files, or shards
    data: PathBuf,
    #[command(flatten)]
    data_flags: DataFlags,
    #[command(flatten)]
    flags: EvalFlags,
}

/// Arguments of the evaluations on labeled images.
#[derive(Debug, clap::Args)]
#[command(mut_arg("data", |data| data.help(
    "Labeled images: class subfolders, a labels.csv, CIFAR or IDX files, or shards"
)))]
struct LabeledArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Number of training images, sampled evenly (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
}

/// Flag of the evaluations that can include the untrained baseline.
#[derive(Debug, clap::Args)]
struct BaselineArgs {
    /// Also evaluate the encoder's random initialization
    #[arg(long)]
    with_random: bool,
}

/// An encoder with the suffix of its results' names.
type NamedEncoder = (Encoder, &'static str);

/// Columns of the picture of a dense evaluation.
pub const PICTURE_COLUMNS: &str = "image, ground truth, prediction, prediction of the random initialization";

/// Suffix of the results of the untrained baseline.
const RANDOM: &str = ", random initialization";

impl CommonArgs {
    /// Loads the encoder onto its device.
    fn encoder(&self) -> Result<Encoder> {
        self.flags.compute.load_encoder(&self.encoder)
    }

    /// Loads the encoder, and makes the untrained baseline if requested.
    fn encoders(&self, baseline: &BaselineArgs) -> Result<Vec<NamedEncoder>> {
        let encoder = self.encoder()?;
        let random = baseline.with_random.then(|| (self.random_initialization(&encoder), RANDOM));
        Ok(std::iter::once((encoder, "")).chain(random).collect())
    }

    /// An untrained encoder of the same architecture.
    fn random_initialization(&self, encoder: &Encoder) -> Encoder {
        Encoder::random(encoder.spec.clone(), self.flags.seed, &encoder.device())
    }

    /// Folder of the run that the encoder belongs to, if any.
    fn run(&self) -> Option<&Path> {
        let folder = if self.encoder.is_file() { self.encoder.parent()? } else { &self.encoder };
        folder.join("plan.toml").is_file().then_some(folder)
    }

    /// Says so if the encoder was pretrained on these images.
    fn note_pretraining_images(&self) {
        let is_same = |run| read_plan(run).is_ok_and(|plan| absolute(&plan.data) == absolute(&self.data));
        if self.run().is_some_and(is_same) {
            terminal::note("the encoder was pretrained on these images, without labels");
        }
    }

    /// Prints the results and saves them in the run. `details` are selected hyperparameters or
    /// verdicts.
    fn finish(&self, evaluation: &str, settings: Value, details: Value, rows: Vec<ResultRow>) -> Result<ExitCode> {
        if !self.flags.compute.json {
            print(&rows);
        }
        self.save(evaluation, settings, details, rows)?;
        Ok(ExitCode::SUCCESS)
    }

    /// Like [`CommonArgs::finish`], with a picture: written to `picture`, or next to the results.
    fn finish_with_picture(
        &self,
        evaluation: &str,
        settings: Value,
        rows: Vec<ResultRow>,
        picture: Option<&Path>,
        png: &[u8],
    ) -> Result<ExitCode> {
        if !self.flags.compute.json {
            print(&rows);
        }
        let saved = self.save(evaluation, settings, Value::Null, rows)?;
        let default = saved.map(|path| path.with_extension("png"));
        let Some(path) = picture.map(Path::to_owned).or(default) else { return Ok(ExitCode::SUCCESS) };
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(|e| format!("cannot create {}: {e}\nhint: choose another `--picture`", folder.display()))?;
        }
        super::write_file(&path, png)?;
        terminal::note(format!("wrote {}: {PICTURE_COLUMNS}", path.display()));
        Ok(ExitCode::SUCCESS)
    }

    /// Saves the results if the encoder belongs to a run, and returns the path. Prints them as JSON
    /// if requested.
    fn save(&self, evaluation: &str, settings: Value, details: Value, rows: Vec<ResultRow>) -> Result<Option<PathBuf>> {
        let table = ResultTable {
            evaluation: evaluation.into(),
            encoder: self.encoder_name(),
            data: absolute(&self.data).display().to_string(),
            seed: self.flags.seed,
            settings,
            details,
            rows,
        };
        let mut saved = None;
        if let Some(run) = self.run() {
            let path = table.save(run).map_err(|e| {
                let folder = run.join("eval");
                format!("cannot write results into {}: {e}\nhint: check free space and permissions", folder.display())
            })?;
            terminal::note(format!("saved results to {}", path.display()));
            saved = Some(path);
        }
        if self.flags.compute.json {
            out!("{}", serde_json::to_string(&table).expect("a table is plain data"));
        }
        Ok(saved)
    }

    /// Path of the encoder file; for a run only the file name, so that the run can be moved.
    fn encoder_name(&self) -> String {
        let file = if self.encoder.is_dir() { self.encoder.join("encoder.safetensors") } else { self.encoder.clone() };
        match (self.run(), file.file_name()) {
            (Some(_), Some(name)) => name.to_string_lossy().into_owned(),
            _ => absolute(&file).display().to_string(),
        }
    }
}

impl LabeledArgs {
    /// Training and test images, each decoded once. Warns if they are too small for the encoder.
    fn open(&self, encoder: &Encoder) -> Result<LabeledSplit> {
        let path = &self.common.data;
        let dataset = self.common.data_flags.open(path, Some(&encoder.spec.levels))?;
        let has_test = dataset.test.is_some();
        let data = labeled(dataset, self.limit)?;
        if !has_test {
            self.common.note_pretraining_images();
        }
        warn_if_enlarged(encoder, &*data.train.get(0)?, path);
        Ok(data)
    }
}

/// Top-1 accuracy, and top-5 if there are more than five classes. `scores` are those of the test
/// images; `name` makes a row's name from `top-k`.
fn top_k_rows(scores: &[f64], data: &LabeledSplit, seed: u64, name: impl Fn(&str) -> String) -> Vec<ResultRow> {
    let classes = data.classes.len();
    let row = |(k, top): (usize, &str)| {
        ResultRow::hit_rate(name(top), seed, &top_k_hits(scores, labels(&data.test), classes, k))
    };
    [(1, "top-1"), (5, "top-5")].into_iter().filter(|(k, _)| *k == 1 || classes > *k).map(row).collect()
}

/// Warns if an image is much smaller than the encoder's input.
fn warn_if_enlarged(encoder: &Encoder, image: &Image, data: &Path) {
    let size = encoder.spec.size;
    // A spectrogram of a short sound has few columns.
    if encoder.spec.levels.sound.is_none() && 2 * image.height.min(image.width) <= size {
        terminal::warning(format!(
            "images of {} are {}x{} px, but the encoder expects {size} px: enlarged images lower its accuracy",
            data.display(),
            image.width,
            image.height
        ));
    }
}

/// Splits a data set with one label per image.
pub fn labeled(dataset: Dataset, limit: usize) -> Result<LabeledSplit> {
    let root = dataset.root.clone();
    let split = split(dataset, limit)?;
    split.ensure_single_labels(&root)?;
    Ok(split)
}

/// Splits a data set into training and test images and decodes each once. Without a test split, one
/// image in five is for testing.
fn split(dataset: Dataset, limit: usize) -> Result<LabeledSplit> {
    let bar = terminal::progress_bar("checking images", 0);
    let dataset = split::train_and_test(dataset, limit, &mut |note| terminal::note(note))?;
    bar.set_length(dataset.n_images() as u64);
    let on_image = || {
        bar.inc(1);
        Continue(())
    };
    let dataset = dataset.check(cache_bytes(device::machine().free_mb), &on_image)?;
    bar.finish_and_clear();
    let skipped: Vec<String> =
        dataset.skipped.iter().map(|image| format!("{}: {}", image.name, image.reason)).collect();
    super::warn_skipped(&skipped);
    Ok(LabeledSplit::checked(dataset)?)
}

/// Absolute path of an existing file; URLs and patterns are returned unchanged.
pub fn absolute(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// Computes representations with a progress bar.
pub fn features(encoder: &Encoder, images: &Images, label: &str) -> Result<Features> {
    let bar = terminal::progress_bar(label, images.len() as u64);
    let features = embed(encoder, images, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    match features.is_finite() {
        true => Ok(features),
        false => Err("the encoder outputs NaN or infinity: its training has diverged\n\
                      hint: use an earlier encoder, such as the run's best.safetensors"
            .into()),
    }
}

/// Refuses a classifier whose training has diverged.
pub fn must_be_finite(classifier: &Classifier, hint: &str) -> Result<()> {
    match classifier.is_finite() {
        true => Ok(()),
        false => Err(format!("the classifier has diverged: its weights contain NaN or infinity\nhint: {hint}").into()),
    }
}

/// Hint for a diverged classifier, where the learning rates are a flag.
pub const LOWER_RATES: &str = "use lower `--rates`";

/// Labels of images that were checked to have them.
pub fn labels(images: &Images) -> &[usize] {
    images.labels().expect("the images are labeled")
}

/// Prints a table of names, values and intervals; results of the random initialization have a
/// column of their own.
pub fn print(rows: &[ResultRow]) {
    let value_width = rows.iter().map(|row| measure_text_width(&row.formatted_value())).max().unwrap_or(0);
    let cell = |row: Option<&ResultRow>| {
        let Some(row) = row else { return String::new() };
        let value = row.formatted_value();
        let value = pad_str(&value, value_width, Alignment::Right, None);
        match row.formatted_interval() {
            none if none.is_empty() => value.into_owned(),
            interval => format!("{value}  ({interval})"),
        }
    };
    let mut table: Vec<[String; 3]> = Vec::new();
    let has_baseline = rows.iter().any(|row| row.name.ends_with(RANDOM));
    if has_baseline {
        table.push([String::new(), "this encoder".into(), "random initialization".into()]);
    }
    for (name, own, random) in side_by_side(rows, |row| &row.name) {
        table.push([name.into(), cell(own), cell(random)]);
    }
    let width = |column: usize| table.iter().map(|row| measure_text_width(&row[column])).max().unwrap_or(0);
    let widths = [width(0), width(1)];
    for [name, own, random] in &table {
        let pad = |text: &str, column: usize| pad_str(text, widths[column], Alignment::Left, None).into_owned();
        let line = format!("{}  {}  {random}", pad(name, 0), pad(own, 1));
        out!("{}", line.trim_end());
    }
}

/// Name of a result, with the rows of the encoder and of its random initialization.
type Pairing<'a, T> = (&'a str, Option<&'a T>, Option<&'a T>);

/// Pairs the results of an encoder and of its random initialization by their names.
pub fn side_by_side<'a, T>(rows: &'a [T], name: impl Fn(&'a T) -> &'a str) -> Vec<Pairing<'a, T>> {
    let mut paired: Vec<Pairing<'a, T>> = Vec::new();
    for row in rows {
        let own = name(row).strip_suffix(RANDOM);
        let key = own.unwrap_or(name(row));
        let at = paired.iter().position(|(other, ..)| *other == key).unwrap_or_else(|| {
            paired.push((key, None, None));
            paired.len() - 1
        });
        *if own.is_some() { &mut paired[at].2 } else { &mut paired[at].1 } = Some(row);
    }
    paired
}

/// Number of test images by true and by predicted class, for the record. `None` for many classes,
/// where the table would be larger than all other results.
fn confusion(predicted: &[usize], data: &LabeledSplit) -> Option<Value> {
    const MAX_CLASSES: usize = 100;
    let n = data.classes.len();
    if n > MAX_CLASSES {
        return None;
    }
    let mut counts = vec![vec![0usize; n]; n];
    predicted.iter().zip(labels(&data.test)).for_each(|(predicted, label)| counts[*label][*predicted] += 1);
    Some(serde_json::json!({ "classes": data.classes, "counts": counts }))
}

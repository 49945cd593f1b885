//! `byol pretrain DATA`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::{
    apply::sheet,
    data::{CHANNELS, Images, levels::Channels},
    device,
    nn::Normalization,
    ranks::Ranks,
    train::{
        self, Plan, RecipeOverrides, Run, RunContext, TrainingData,
        augment_placement::AugmentTiming,
        auto,
        health::MIN_IMAGES,
        precision,
        recipe::{OnCollapse, Placement},
        run::ensure_empty,
    },
};

use clap::builder::PossibleValue;

use super::{
    ComputeArgs,
    data_args::DataFlags,
    load_training_data,
    mpi_job::MpiJob,
    open_nth_device,
    recipe_args::{LengthArgs, RecipeArgs},
    set_threads, stop_flag, views,
};
use crate::terminal::{self, Result, out, plural};

const EXAMPLES: &str = "\
Examples:
  byol pretrain photos                                  Let `auto` choose all settings
  byol pretrain photos --dry-run                        Show the plan without training
  byol pretrain photos --recipe imagenette --epochs 50  Use a recipe, with fewer epochs
  byol pretrain photos --init resnet18.pth              Start from torchvision's weights";

/// Pretrain an encoder on a folder of images
///
/// DATA is a folder of images at any depth (JPEG, PNG, WebP, BMP, GIF, TIFF), of sounds (WAV, FLAC,
/// Ogg Vorbis, MP3), of CIFAR binary files, of IDX files, or of shards. Subfolders `train/` and
/// `val/` or `test/` are splits. Class subfolders are labels, used only to report kNN accuracy.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Folder of images or sounds
    data: PathBuf,
    /// Output folder of the run [default: byol-runs/NAME-OF-DATA]
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    data_flags: DataFlags,
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Encoder architecture: resnet18, resnet34, resnet50, resnet101, resnet152 or resnet200
    #[arg(long)]
    encoder: Option<String>,
    /// Initial weights: a byol encoder, or a ResNet checkpoint (.pth or .safetensors)
    #[arg(long, value_name = "FILE")]
    init: Option<String>,
    /// Width multiplier of the encoder, may be fractional
    #[arg(long)]
    width: Option<f64>,
    /// View size in pixels
    #[arg(long, value_name = "PX")]
    size: Option<i64>,
    /// Batch size
    #[arg(long, value_name = "N")]
    batch: Option<i64>,
    /// Number of micro-batches per batch (gradient accumulation), to save memory
    #[arg(long, value_name = "N")]
    accumulate: Option<i64>,
    /// Compute precision: f32, bf16 (CPUs with AMX or AVX512-BF16, CUDA, ROCm), f16 (GPUs), or auto
    /// (bf16 where it is faster)
    #[arg(long, value_parser = ["auto", "f32", "bf16", "f16"], hide_possible_values = true)]
    precision: Option<String>,
    /// Where to run augmentations after the crop: cpu, device, or auto (measured) [default: auto]
    #[arg(long, alias = "views", value_parser = ["auto", "cpu", "device"], hide_possible_values = true)]
    placement: Option<String>,
    /// Synchronize batch-norm statistics across ranks
    #[arg(long, value_name = "true|false")]
    sync_bn: Option<bool>,
    #[command(flatten)]
    length: LengthArgs,
    /// Number of warm-up epochs of the learning rate
    #[arg(long, value_name = "N")]
    warmup_epochs: Option<i64>,
    /// Optimizer: lars, sgd or adamw
    #[arg(long)]
    optimizer: Option<String>,
    /// Base learning rate; the peak learning rate is BASE * batch size / 256
    #[arg(long, value_name = "BASE")]
    lr: Option<f64>,
    /// Weight decay
    #[arg(long, value_name = "X")]
    weight_decay: Option<f64>,
    /// LARS trust coefficient
    #[arg(long, alias = "trust", value_name = "X")]
    trust_coefficient: Option<f64>,
    /// Target decay at the start, from 0 to 1
    #[arg(long, value_name = "X")]
    tau: Option<f64>,
    /// Hidden units of projector and predictor
    #[arg(long, value_name = "N")]
    hidden: Option<i64>,
    /// Output dimension of projector and predictor
    #[arg(long, value_name = "N")]
    projection: Option<i64>,
    /// Random seed
    #[arg(long, value_name = "N")]
    seed: Option<i64>,
    /// Action when a health check fails: stop, rollback (to the last healthy checkpoint, with half
    /// the learning rate) or continue
    #[arg(long, value_name = "ACTION", value_parser = on_collapse_values(), hide_possible_values = true)]
    on_collapse: Option<String>,
    /// Also write TensorBoard event files: metrics, plan and augmented views
    #[arg(long)]
    tensorboard: bool,
    /// Print the plan, with all settings of the recipe, and exit
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Values of `--on-collapse`; `go-on` is an earlier name of `continue`.
fn on_collapse_values() -> [PossibleValue; 3] {
    [PossibleValue::new("stop"), PossibleValue::new("rollback"), PossibleValue::new("continue").alias("go-on")]
}

impl Args {
    /// Recipe keys set by the flags.
    fn overrides(&self) -> Result<RecipeOverrides> {
        let mut overrides = RecipeOverrides::from_recipe(&self.recipe.recipe)?;
        self.length.apply(&mut overrides)?;
        let integers = [
            ("views.size", self.size, "--size"),
            ("train.batch", self.batch, "--batch"),
            ("train.accumulate", self.accumulate, "--accumulate"),
            ("train.warmup_epochs", self.warmup_epochs, "--warmup-epochs"),
            ("heads.hidden", self.hidden, "--hidden"),
            ("heads.projection", self.projection, "--projection"),
            ("seed", self.seed, "--seed"),
        ];
        for (key, value, flag) in integers {
            value.map(|v| overrides.insert(key, v, flag)).transpose()?;
        }
        let floats = [
            ("encoder.width", self.width, "--width"),
            ("optimizer.lr", self.lr, "--lr"),
            ("optimizer.weight_decay", self.weight_decay, "--weight-decay"),
            ("optimizer.trust_coefficient", self.trust_coefficient, "--trust-coefficient"),
            ("target.tau", self.tau, "--tau"),
        ];
        for (key, value, flag) in floats {
            value.map(|v| overrides.insert(key, v, flag)).transpose()?;
        }
        let strings = [
            ("encoder.architecture", &self.encoder, "--encoder"),
            ("encoder.from", &self.init, "--init"),
            ("optimizer.kind", &self.optimizer, "--optimizer"),
            ("health.on_collapse", &self.on_collapse, "--on-collapse"),
            ("train.precision", &self.precision.clone().filter(|p| p != "auto"), "--precision"),
            ("views.placement", &self.placement, "--placement"),
        ];
        for (key, value, flag) in strings {
            value.as_ref().map(|v| overrides.insert(key, v.as_str(), flag)).transpose()?;
        }
        self.sync_bn.map(|v| overrides.insert("train.sync_bn", v, "--sync-bn")).transpose()?;
        self.recipe.apply_set(&mut overrides)?;
        overrides.adopt_pretrained_architecture()?;
        Ok(overrides)
    }

    /// Output folder of the run.
    fn out(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| {
            let name = self.data.file_name().map_or_else(|| "run".into(), |n| n.to_string_lossy().into_owned());
            super::free_folder(&format!("byol-runs/{name}"))
        })
    }
}

pub fn run(args: &Args, job: &MpiJob) -> Result<ExitCode> {
    let overrides = args.overrides()?;
    // Everything that can be checked without the data is checked before they are read.
    let checked = overrides.check()?;
    let out = args.out();
    if job.ranks.is_root() {
        ensure_empty(&out)?;
    }
    let threads = set_threads(job.threads(args.compute.threads))?;
    let opened = open_nth_device(args.compute.device, job.local[0])?;
    let data = load_training_data(args.data_flags.open(&args.data, None)?, &checked, job.local[1])?;
    must_be_same_data(job.ranks, &data)?;
    let (mut recipe, reasons) = auto::resolve(&overrides, &data.train, &opened)?;
    if args.precision.as_deref() == Some("auto") && overrides.name != "auto" {
        recipe.train.precision = precision::fastest(&opened, &recipe);
    }
    device::check(&opened.device, recipe.train.precision).map_err(train::Error::from)?;
    reasons.iter().for_each(|reason| terminal::note(format!("  auto: {reason}")));
    // The choices of `auto` depend on the machine: all ranks use those of rank 0.
    let plan = job.ranks.broadcast_value(Plan::new(&overrides.name, recipe, &data, opened.info.choice)?);
    describe(&plan, &opened.info.name, threads, &out);
    if args.dry_run {
        if job.ranks.is_root() {
            match args.compute.json {
                true => out!("{}", serde_json::to_string(&plan).expect("a plan is plain data")),
                false => out!("{}", plan.to_toml().trim_end()),
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    let stop = stop_flag();
    let context = RunContext { ranks: job.ranks, ..RunContext::single_process(opened.device, threads) };
    if plan.recipe.views.placement == Placement::Auto {
        terminal::note("      calibrating: augmentation on the CPU or on the device");
    }
    let mut run = Run::create(&out, plan, &data, context, args.tensorboard)?;
    if args.tensorboard && job.ranks.is_root() {
        // The picture is optional.
        if let Err(error) = log_views(&mut run, &data.train) {
            terminal::warning(format!("no augmented views in TensorBoard: {error}"));
        }
    }
    if let Some(timing) = run.timing {
        describe_placement(run.plan.recipe.views.placement, timing);
    }
    super::train(run, args.compute.json, &stop, job)
}

/// Images whose views are shown in TensorBoard, and the size of their pictures in pixels.
const LOGGED_IMAGES: usize = 8;
const LOGGED_SIDE: u32 = 96;

/// Writes the picture of some images and their augmented views to TensorBoard.
fn log_views(run: &mut Run, images: &Images) -> Result<()> {
    let recipe = &run.plan.recipe;
    let rows = views::rows(recipe, &images.sample(LOGGED_IMAGES)?, recipe.seed, LOGGED_SIDE)?;
    let (size, png) = (sheet::size(&rows, LOGGED_SIDE), sheet::png(&rows, LOGGED_SIDE));
    Ok(run.log(|events, step| events.image(step, "views", size, &png))?)
}

/// Refuses data that differ between ranks.
fn must_be_same_data(ranks: Ranks, data: &TrainingData) -> Result<()> {
    let fingerprint = format!("{} {}", data.train.len(), data.train.fingerprint());
    match ranks.first_mismatch(fingerprint.as_bytes()) {
        None => Ok(()),
        Some(rank) => Err(train::Error::OtherRank {
            rank,
            what: format!("different images in {}", data.root.display()),
            remedy: "provide the same data under the same path on all machines",
        }
        .into()),
    }
}

/// Steps below which runs on CIFAR-10 ended below random initialization (docs/log/cifar10.md).
const FEW_STEPS: u64 = 1000;

/// Prints a summary of the plan.
pub fn describe(plan: &Plan, device: &str, threads: usize, out: &Path) {
    let (recipe, encoder, schedule) = (&plan.recipe, &plan.encoder, &plan.schedule);
    let micro_batches = match recipe.train.accumulate {
        1 => String::new(),
        n => format!(" in {n} micro-batches of {}", plan.micro_batch()),
    };
    let channels = match encoder.channels {
        CHANNELS => String::new(),
        n => format!("{}, ", plural(n, "channel")),
    };
    let evaluation = match encoder.size {
        size if size == recipe.views.size => String::new(),
        size => format!(" (evaluation {size} px)"),
    };
    terminal::note(format!(
        "plan: {} of width {}, {} stem, {channels}{} px views{evaluation}; heads {}-{}; batch {}{micro_batches}; \
         {} = {} ({} warm-up)",
        encoder.architecture.name(),
        encoder.width,
        encoder.stem.name(),
        recipe.views.size,
        recipe.heads.hidden,
        recipe.heads.projection,
        recipe.train.batch,
        plural(recipe.train.epochs as usize, "epoch"),
        plural(schedule.total as usize, "step"),
        schedule.warmup,
    ));
    terminal::note(format!(
        "      {}, peak learning rate {:.4}, weight decay {:e}; tau from {}; seed {}; {device}, {}; output {}",
        recipe.optimizer.kind.name(),
        schedule.peak,
        recipe.optimizer.weight_decay,
        schedule.tau_base,
        recipe.seed,
        plural(threads, "thread"),
        out.display(),
    ));
    if let Some(channels) = &encoder.levels.channels {
        terminal::note(channel_table(channels, &encoder.normalization));
    }
    if encoder.levels.sound.is_some() && recipe.views.first.time[1] == 0.0 {
        terminal::warning("the augmentations are those of photos\nhint: pass `--augment spectrogram`");
    }
    if plan.recipe_name == "auto" && schedule.total < FEW_STEPS {
        terminal::warning(format!(
            "only {}: runs of fewer than {FEW_STEPS} often end no better than random initialization\n\
             hint: increase `--epochs`",
            plural(schedule.total as usize, "step")
        ));
    }
    if (1..MIN_IMAGES).contains(&plan.held_out) && recipe.health.on_collapse != OnCollapse::Continue {
        let remedy = match recipe.health.images < MIN_IMAGES {
            true => format!("set `health.images` to at least {MIN_IMAGES}"),
            false => format!("put at least {MIN_IMAGES} images into the `val` split"),
        };
        let images = plural(plan.held_out, "monitoring image");
        terminal::warning(format!("only {images}: too few to detect a collapse\nhint: {remedy}"));
    }
}

/// Table of the channels: their range, and mean and standard deviation after scaling it to 0..1.
fn channel_table(channels: &Channels, normalization: &Normalization) -> String {
    let mut table = format!("{:>7}  {:>12}  {:>12}  {:>6}  {:>6}", "channel", "low", "high", "mean", "std");
    for (c, [low, high]) in channels.ranges.iter().enumerate() {
        let number = channels.number(c);
        let [mean, std] = [&normalization.mean, &normalization.std].map(|values| values[c]);
        table += &format!("\n{number:>7}  {low:>12}  {high:>12}  {mean:>6.3}  {std:>6.3}");
    }
    table
}

/// Prints the augmentation placement with the times it was chosen by.
fn describe_placement(placement: Placement, timing: AugmentTiming) {
    let place = if placement == Placement::Device { "device" } else { "CPU" };
    let [host, device] = timing.totals().map(|seconds| 1e3 * seconds);
    terminal::note(format!(
        "      augmentation on the {place}: {host:.0} ms per micro-batch on the CPU, {device:.0} ms on the device"
    ));
}

//! `byol pretrain DATA`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::{
    data::Dataset,
    device::{self, Choice, Opened, Precision},
    nn::{
        Normalization, Stem,
        foreign::{self, Preparation},
    },
    ranks::Ranks,
    train::{
        self, Place, Plan, Prepared, Recipe, Run,
        auto::{self, Facts},
        health::FEWEST,
        recipe::{Draft, Finish, OnCollapse},
        run::must_be_free,
    },
};

use super::{open_nth, prepare, ranks::Joined, set_threads, stop_flag};
use crate::report::{self, Result};

/// Train an encoder on the images in a folder
///
/// DATA is a folder of images at any depth (JPEG, PNG, WebP, BMP, GIF, TIFF), of CIFAR binary files or of IDX files. `train/` with `val/` or
/// `test/` beside it are splits; class subfolders are labels, used only to report kNN accuracy.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of images
    data: PathBuf,
    /// Folder for the run [default: byol-runs/NAME-OF-DATA]
    #[arg(long)]
    out: Option<PathBuf>,
    /// auto, cifar10, imagenet-1000, imagenet-300, imagenet-100, imagenette, or a TOML file
    #[arg(long, default_value = "auto")]
    recipe: String,
    /// Set any key of the recipe, for example target.tau=0.99
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// resnet18, resnet34, resnet50, resnet101, resnet152 or resnet200
    #[arg(long)]
    encoder: Option<String>,
    /// Start with these weights: an encoder of byol, or a ResNet's .pth or .safetensors
    #[arg(long, value_name = "FILE")]
    init: Option<String>,
    /// Multiplies the encoder's channels; may be fractional
    #[arg(long)]
    width: Option<f64>,
    /// Side of the views in pixels
    #[arg(long, value_name = "PX")]
    size: Option<i64>,
    /// Images per update
    #[arg(long, value_name = "N")]
    batch: Option<i64>,
    /// Split each batch into N parts to save memory
    #[arg(long, value_name = "N")]
    accumulate: Option<i64>,
    /// What is multiplied: f32; bf16 (processors with AVX512-BF16, CUDA, ROCm); f16 (GPUs); auto: bf16 where that is faster
    #[arg(long, value_name = "WHAT", value_parser = ["auto", "f32", "bf16", "f16"])]
    precision: Option<String>,
    /// Where views are finished after the crop: cpu, device, or auto: where a few first steps are faster [default: auto]
    #[arg(long, value_name = "WHERE", value_parser = ["auto", "cpu", "device"])]
    views: Option<String>,
    /// Of several ranks: whether batch norm sees the images of all
    #[arg(long, value_name = "true|false")]
    sync_bn: Option<bool>,
    /// Passes over the images
    #[arg(long, value_name = "N")]
    epochs: Option<i64>,
    /// Epochs in which the learning rate rises
    #[arg(long, value_name = "N")]
    warmup_epochs: Option<i64>,
    /// lars, sgd or adamw
    #[arg(long)]
    optimizer: Option<String>,
    /// Learning rate for batch 256; the peak is this times batch / 256
    #[arg(long, value_name = "BASE")]
    lr: Option<f64>,
    /// Weight decay
    #[arg(long, value_name = "X")]
    weight_decay: Option<f64>,
    /// Trust coefficient of LARS
    #[arg(long, value_name = "X")]
    trust: Option<f64>,
    /// Target decay at the start, from 0 to 1
    #[arg(long, value_name = "X")]
    tau: Option<f64>,
    /// Hidden length of projector and predictor
    #[arg(long, value_name = "N")]
    hidden: Option<i64>,
    /// Length of projection and prediction
    #[arg(long, value_name = "N")]
    projection: Option<i64>,
    /// Take N training images, evenly spread over the data's own order
    #[arg(long, value_name = "N")]
    limit: Option<i64>,
    /// Seed of all random draws
    #[arg(long, value_name = "N")]
    seed: Option<i64>,
    /// When learning has failed: stop, rollback (to the last healthy checkpoint, with half the learning rate) or go-on
    #[arg(long, value_name = "WHAT", value_parser = ["stop", "rollback", "go-on"])]
    on_collapse: Option<String>,
    /// Threads [default: one a core]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// auto, cpu, vulkan, metal, wgpu, cuda or rocm
    #[arg(long, default_value = "auto")]
    device: Choice,
    /// Write TensorBoard event files too
    #[arg(long)]
    tensorboard: bool,
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

impl Args {
    /// What was said, by recipe key.
    fn draft(&self) -> Result<Draft> {
        let mut draft = Draft::from_recipe(&self.recipe)?;
        let counts = [
            ("views.size", self.size, "--size"),
            ("train.batch", self.batch, "--batch"),
            ("train.accumulate", self.accumulate, "--accumulate"),
            ("train.epochs", self.epochs, "--epochs"),
            ("train.warmup_epochs", self.warmup_epochs, "--warmup-epochs"),
            ("heads.hidden", self.hidden, "--hidden"),
            ("heads.projection", self.projection, "--projection"),
            ("train.limit", self.limit, "--limit"),
            ("seed", self.seed, "--seed"),
        ];
        for (key, value, flag) in counts {
            value.map(|v| draft.say(key, v, flag)).transpose()?;
        }
        let numbers = [
            ("encoder.width", self.width, "--width"),
            ("optimizer.lr", self.lr, "--lr"),
            ("optimizer.weight_decay", self.weight_decay, "--weight-decay"),
            ("optimizer.trust", self.trust, "--trust"),
            ("target.tau", self.tau, "--tau"),
        ];
        for (key, value, flag) in numbers {
            value.map(|v| draft.say(key, v, flag)).transpose()?;
        }
        let names = [
            ("encoder.architecture", &self.encoder, "--encoder"),
            ("encoder.from", &self.init, "--init"),
            ("optimizer.kind", &self.optimizer, "--optimizer"),
            ("health.on_collapse", &self.on_collapse, "--on-collapse"),
            ("train.precision", &self.precision.clone().filter(|p| p != "auto"), "--precision"),
            ("views.finish", &self.views, "--views"),
        ];
        self.sync_bn.map(|v| draft.say("train.sync_bn", v, "--sync-bn")).transpose()?;
        for (key, value, flag) in names {
            value.as_ref().map(|v| draft.say(key, v.as_str(), flag)).transpose()?;
        }
        for text in &self.set {
            draft.set(text)?;
        }
        as_begun(&mut draft)?;
        Ok(draft)
    }
}

/// Where `auto` would choose a network and there are weights to start with, it is that of their file.
fn as_begun(draft: &mut Draft) -> Result<()> {
    let Some(from) = draft.get("encoder.from").filter(|_| draft.name == "auto") else { return Ok(()) };
    let path = Path::new(from.as_str().unwrap_or_default());
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let preparation = Preparation { size: None, normalization: Normalization::default() };
    let spec = foreign::load(path, &preparation, &burn::tensor::Device::flex()).map_err(train::Error::from)?.spec;
    let stem = if spec.stem == Stem::Cifar { "cifar" } else { "imagenet" };
    for (key, name) in [("encoder.architecture", spec.architecture.name()), ("encoder.stem", stem)] {
        if !draft.has(key) {
            draft.say(key, name, "--init")?;
        }
    }
    if !draft.has("encoder.width") {
        draft.say("encoder.width", spec.width, "--init")?;
    }
    Ok(())
}

pub fn run(args: &Args, joined: &Joined) -> Result<ExitCode> {
    let draft = args.draft()?;
    // Everything that can be refused without the data is refused before they are read.
    let mut checked = checked(&draft)?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => {
            let name = args.data.file_name().map_or_else(|| "run".into(), |n| n.to_string_lossy().into_owned());
            super::free_folder(&format!("byol-runs/{name}"))
        }
    };
    if joined.ranks.leads() {
        must_be_free(&out)?;
    }
    let threads = set_threads(joined.threads(args.threads))?;
    let opened = open_nth(args.device, joined.local[0])?;
    let data = prepare(Dataset::open(&args.data)?, checked.train.limit, &checked.health, joined.local[1])?;
    must_see_the_same(joined.ranks, &data)?;
    if args.precision.as_deref() == Some("auto") {
        checked.train.precision = if device::prefers_bf16(&opened) { Precision::Bf16 } else { Precision::F32 };
    }
    let (recipe, why) = resolved(&draft, checked, &data, &opened)?;
    device::check(&opened.device, recipe.train.precision).map_err(train::Error::from)?;
    why.iter().for_each(|reason| report::note(format!("  auto: {reason}")));
    // What `auto` chooses depends on the machine: rank 0's is for all.
    let plan = joined.ranks.agree(Plan::new(&draft.name, recipe, &data, opened.found.choice)?);
    describe(&plan, &opened.found.name, threads, &out);
    let stop = stop_flag();
    let place = Place { device: opened.device, threads, ranks: joined.ranks };
    if plan.recipe.views.finish == Finish::Auto {
        report::note("      trying a few steps, to see where views are best finished");
    }
    let run = Run::create(&out, plan, &data, place, args.tensorboard)?;
    if let Some(feed) = run.fed {
        let what = if run.plan.recipe.views.finish == Finish::Device { "on the device" } else { "by the processor" };
        let [on_host, on_device] = feed.paces().map(|seconds| 1e3 * seconds);
        report::note(format!(
            "      views are finished {what}: so many images would take {on_host:.0} ms by the processor, {on_device:.0} ms on the device"
        ));
    }
    super::train(run, args.json, &stop, joined)
}

/// Refuses data that differ from rank to rank.
fn must_see_the_same(ranks: Ranks, data: &Prepared) -> Result<()> {
    let seen = format!("{} {}", data.train.len(), data.train.fingerprint());
    match ranks.differs(seen.as_bytes()) {
        None => Ok(()),
        Some(rank) => {
            let what = format!("other images in {}", data.root.display());
            let remedy = "give all machines the same data, under the same path";
            Err(train::Error::OtherRank { rank, what, remedy }.into())
        }
    }
}

/// What was said, checked without the data.
pub fn checked(draft: &Draft) -> Result<Recipe> {
    let mut base = Recipe::default();
    if draft.name == "auto" {
        // The checks of what was said alone; the rest is chosen to fit it.
        (base.train.warmup_epochs, base.train.accumulate) = (0, 1);
    }
    Ok(draft.over(&base)?)
}

/// The whole recipe, of what was said and [`checked`]: where it is `auto`, the rest is chosen for the data and the machine, with the reasons.
pub fn resolved(draft: &Draft, checked: Recipe, data: &Prepared, opened: &Opened) -> Result<(Recipe, Vec<String>)> {
    if draft.name != "auto" {
        return Ok((checked, Vec::new()));
    }
    let facts = Facts::of(&data.train, opened, &device::machine()).map_err(train::Error::from)?;
    let (chosen, why) = auto::choose(&facts, draft);
    Ok((draft.over(&chosen)?, why))
}

/// The plan in a few lines.
pub fn describe(plan: &Plan, device: &str, threads: usize, out: &Path) {
    let (r, e, s) = (&plan.recipe, &plan.encoder, &plan.schedule);
    let parts = match r.train.accumulate {
        1 => String::new(),
        n => format!(" in {n} parts of {}", plan.micro_batch()),
    };
    let views = match r.views.size {
        size if size == e.size => format!("{size} px"),
        size => format!("{size} px (evaluation {})", e.size),
    };
    report::note(format!(
        "plan: {} of width {}, {} stem, views of {views}; heads {}-{}; batch {}{parts}; {} = {}, {} of warm-up",
        e.architecture.name(),
        e.width,
        e.stem.name(),
        r.heads.hidden,
        r.heads.projection,
        r.train.batch,
        report::counted_noun(r.train.epochs as usize, "epoch"),
        report::counted_noun(s.total as usize, "step"),
        s.warmup,
    ));
    report::note(format!(
        "      {}, peak rate {:.4}, decay {:e}; tau from {}; seed {}; {device}, {}; run in {}",
        r.optimizer.kind.name(),
        s.peak,
        r.optimizer.weight_decay,
        s.tau_base,
        r.seed,
        report::counted_noun(threads, "thread"),
        out.display(),
    ));
    if (1..FEWEST).contains(&plan.held_out) && r.health.on_collapse != OnCollapse::GoOn {
        report::warning(format!(
            "only {} images are watched: too few to tell a collapse by, so none is looked for; {}",
            plan.held_out,
            match r.health.images < FEWEST {
                true => format!("set health.images to at least {FEWEST}"),
                false => format!("put at least {FEWEST} images into `val`"),
            }
        ));
    }
}

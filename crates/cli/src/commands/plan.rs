//! `byol plan DATA [--budget TIME]`

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
    str::FromStr,
};

use byol::{
    data::{CHANNELS, Dataset},
    device,
    nn::{Architecture, ResNet, Stem},
    train::{
        auto::{self, Facts},
        recipe::Draft,
    },
};
use serde_json::{Value, json};

use super::{On, open};
use crate::report::{self, Result, duration, out};

/// Say what a pretraining will take before it begins
///
/// Counts the images, takes a few training steps of each encoder on this machine, each in a process of its own, and prints images/s, memory
/// and time. What will not fit into memory is not tried, and the largest batch that fits is named. Data loading is left out.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Images: a folder, CIFAR or IDX files, or shards
    data: PathBuf,
    /// Time to spend, as 90m, 8h or 3d: how many epochs that is
    #[arg(long, value_name = "TIME", default_value = "8h")]
    budget: Budget,
    /// Encoders to try: resnet18 … resnet200, with a width after an x
    #[arg(long, value_name = "ENCODER,…", value_delimiter = ',', default_values = ["resnet18x0.25", "resnet18", "resnet50"])]
    encoders: Vec<Which>,
    /// Batch sizes to try
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [64, 256], value_parser = clap::value_parser!(u32).range(2..))]
    batches: Vec<u32>,
    /// Side of a view in pixels [default: as `auto` chooses for the images]
    #[arg(long, value_name = "PX")]
    size: Option<usize>,
    #[command(flatten)]
    on: On,
}

/// Seconds.
#[derive(Debug, Clone, Copy)]
struct Budget(f64);

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("`{text}` is no time; write it as 90m, 8h or 3d");
        let unit = text.chars().last().ok_or_else(wrong)?;
        let seconds = match unit {
            'm' => 60.0,
            'h' => 3600.0,
            'd' => 86_400.0,
            _ => return Err(wrong()),
        };
        let n: f64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
        if n > 0.0 && n.is_finite() { Ok(Budget(n * seconds)) } else { Err(wrong()) }
    }
}

/// An encoder and its width.
#[derive(Debug, Clone, PartialEq)]
struct Which {
    architecture: Architecture,
    width: f64,
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("`{text}` is no encoder; write it as resnet50 or resnet18x0.25");
        let (name, width) = text.split_once('x').map_or((text, "1"), |(name, width)| (name, width));
        let architecture = Architecture::ALL.into_iter().find(|a| a.name() == name).ok_or_else(wrong)?;
        let width = width.parse().ok().filter(|w: &f64| (0.01..=8.0).contains(w)).ok_or_else(wrong)?;
        Ok(Which { architecture, width })
    }
}

impl std::fmt::Display for Which {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.architecture.name())?;
        if self.width == 1.0 { Ok(()) } else { write!(f, " of width {}", self.width) }
    }
}

/// Multiply-adds of the smaller of two trial steps: about a second of two cores.
const TRIAL: f64 = 1e10;

/// Memory that is left to the system and to data loading.
const SPARE: f64 = 0.9;

/// What two trial steps of an encoder say.
struct Trial {
    images_per_second: f64,
    /// In MiB, of a batch of no image, and of each image; none where the memory is the device's own.
    memory: Option<[f64; 2]>,
}

impl Trial {
    fn memory(&self, batch: u32) -> Option<f64> {
        self.memory.map(|[fixed, image]| fixed + image * f64::from(batch))
    }

    /// The largest power of two that fits.
    fn largest(&self, free: f64) -> Option<u32> {
        (1..=14).map(|power| 1 << power).take_while(|batch| self.memory(*batch).is_none_or(|m| m <= free)).last()
    }
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let machine = device::machine();
    let opened = open(args.on.device)?;
    let dataset = Dataset::open(&args.data)?;
    let images = dataset.train.len();
    let facts = Facts::of(&dataset.train, opened.found.kind, &machine)?;
    let mut draft = Draft::default();
    if let Some(size) = args.size {
        draft.set(&format!("views.size={size}"))?;
    }
    let (recipe, _) = auto::choose(&facts, &draft);
    let size = recipe.views.size;
    let free = machine.free_mb as f64 * SPARE;
    let precision = serde_json::to_value(recipe.train.precision)?.as_str().unwrap_or("f32").to_owned();
    let mut rows = Vec::new();
    for which in &args.encoders {
        let bar = report::counter("measuring", 2);
        bar.set_message(format!("{which} at {size} px"));
        let trial = trial(args, which, size, recipe.heads.hidden, &precision, opened.found.choice)?;
        bar.finish_and_clear();
        for batch in &args.batches {
            rows.push(row(which, *batch, trial.as_ref(), images, args.budget.0, free));
        }
    }
    if args.on.json {
        let table: Vec<&Value> = rows.iter().map(|(value, _)| value).collect();
        let result = json!({
            "images": images, "size": size, "device": opened.found.name, "precision": precision,
            "free_mb": machine.free_mb, "budget_seconds": args.budget.0, "rows": table,
        });
        out!("{result}");
        return Ok(ExitCode::SUCCESS);
    }
    out!("{images} training images, views of {size} px, {precision}, {}", opened.found.name);
    let head = format!("in {}", duration(args.budget.0));
    out!("{:<24} {:>6} {:>9} {:>10} {:>14}  {head}", "encoder", "batch", "images/s", "memory", "an epoch");
    for (_, line) in &rows {
        out!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

/// A row of the table, as data and as text.
fn row(which: &Which, batch: u32, trial: Option<&Trial>, images: usize, budget: f64, free: f64) -> (Value, String) {
    let name = which.to_string();
    let head = json!({ "encoder": which.architecture.name(), "width": which.width, "batch": batch });
    let with = |more: Value| {
        let mut all = head.clone();
        all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        all
    };
    let Some(trial) = trial else {
        let line = format!(
            "{name:<24} {batch:>6}  does not fit: even a trial of a few images ran out of the {} free",
            gib(free)
        );
        return (with(json!({ "fits": false })), line);
    };
    let memory = trial.memory(batch);
    if let Some(needs) = memory.filter(|needs| *needs > free) {
        let instead = match trial.largest(free).filter(|most| *most >= 2) {
            Some(most) => format!("; {most} does, with --accumulate {} for the same update", batch.div_ceil(most)),
            None => "; no batch does".into(),
        };
        let line = format!(
            "{name:<24} {batch:>6}  does not fit: it needs about {} of the {} free{instead}",
            gib(needs),
            gib(free)
        );
        return (with(json!({ "fits": false, "memory_mb": needs, "largest_batch": trial.largest(free) })), line);
    }
    let epoch = images as f64 / trial.images_per_second;
    let epochs = budget / epoch;
    let text = memory.map_or("?".into(), gib);
    let line = format!(
        "{name:<24} {batch:>6} {:>9.1} {text:>10} {:>14}  {} epochs",
        trial.images_per_second,
        duration(epoch),
        if epochs >= 10.0 { format!("{epochs:.0}") } else { format!("{epochs:.1}") }
    );
    let value = with(json!({
        "fits": true, "memory_mb": memory, "images_per_second": trial.images_per_second, "epoch_seconds": epoch, "epochs": epochs,
    }));
    (value, line)
}

fn gib(mb: f64) -> String {
    format!("{:.1} GiB", mb / 1024.0)
}

/// Steps of two small batches; the memory of any other lies on the line through theirs. None where even they do not fit.
fn trial(
    args: &Args,
    which: &Which,
    size: usize,
    hidden: usize,
    precision: &str,
    device: &str,
) -> Result<Option<Trial>> {
    let net = ResNet::new(which.architecture, which.width, Stem::for_size(size), CHANNELS);
    // Eight times forward an image of a step.
    let few = (TRIAL / (8.0 * net.products(size) as f64)).clamp(2.0, 64.0) as u32;
    let mut figures = Vec::new();
    for batch in [few, 2 * few] {
        let exe = std::env::current_exe()?;
        let output = Command::new(exe)
            .args(["bench", "--json", "--steps", "2", "--encoder", which.architecture.name()])
            .args(["--width", &which.width.to_string(), "--size", &size.to_string(), "--batch", &batch.to_string()])
            .args(["--hidden", &hidden.to_string(), "--precision", precision])
            .args(["--threads", &args.on.threads.to_string(), "--device", device])
            .output()?;
        let Ok(result) = serde_json::from_slice::<Value>(&output.stdout) else {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            // Ended by the system: out of memory.
            if output.status.code().is_none() {
                return Ok(None);
            }
            return Err(format!("a trial of {which} failed: {said}").into());
        };
        figures.push([result["images_per_second"].as_f64(), result["peak_mb"].as_f64()].map(|v| v.unwrap_or(f64::NAN)));
    }
    let [[_, small], [speed, large]] = [figures[0], figures[1]];
    let image = ((large - small) / f64::from(few)).max(0.0);
    let memory = (device == "cpu" && large.is_finite()).then_some([(small - image * f64::from(few)).max(0.0), image]);
    Ok(Some(Trial { images_per_second: speed, memory }))
}

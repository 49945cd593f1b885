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
/// Counts the images, takes training steps of two small batches of each encoder on this machine, each in a process of its own, and prints
/// images/s, memory and time for every batch and number of ranks. Of what will not fit into memory it says what would. Data loading is
/// left out; several ranks (machines or GPUs like this one, by MPI) are not tried but reckoned: see docs/performance.md.
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
    /// Numbers of ranks that share each batch, each a machine or GPU like this one
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1], value_parser = clap::value_parser!(u32).range(1..=4096))]
    ranks: Vec<u32>,
    /// Bandwidth between ranks, Gbit/s
    #[arg(long, value_name = "X", default_value_t = 10.0)]
    gbit: f64,
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

/// Length of a projection, as the paper has it.
const PROJECTION: usize = 256;

/// Seconds that a message takes beside its bytes, in a fast local network.
const LATENCY: f64 = 20e-6;

/// Bytes a second between a GPU and its host.
const HOST: f64 = 12e9;

/// What two trial steps of an encoder say.
struct Trial {
    images_per_second: f64,
    /// Of θ.
    parameters: f64,
    /// Batch norms of f and g, and of q.
    norms: [f64; 2],
    /// In MiB, of a batch of no image, and of each image; none where the memory is the device's own.
    memory: Option<[f64; 2]>,
}

impl Trial {
    fn memory(&self, batch: u32) -> Option<f64> {
        self.memory.map(|[fixed, image]| fixed + image * f64::from(batch))
    }

    /// The fewest parts of so many images that fit, each of two images or more.
    fn parts(&self, images: u32, free: f64) -> Option<u32> {
        let fits = |part: u32| part >= 2 && self.memory(part).is_none_or(|m| m <= free);
        (1..=images).filter(|parts| images.is_multiple_of(*parts)).find(|parts| fits(images / parts))
    }

    /// Seconds a step that ranks talk: the gradient in a ring, and a message for every norm of every pass.
    fn exchange(&self, ranks: u32, gbit: f64) -> f64 {
        if ranks == 1 {
            return 0.0;
        }
        let n = f64::from(ranks);
        let bytes = 2.0 * (n - 1.0) / n * 4.0 * self.parameters;
        // Forward of two views by both networks, backward by one; q belongs to one.
        let messages = 6.0 * self.norms[0] + 4.0 * self.norms[1] + 10.0;
        // From the device to the host and back.
        let copies = if self.memory.is_some() { 0.0 } else { 8.0 * self.parameters / HOST };
        8.0 * bytes / (gbit * 1e9) + messages * LATENCY * n.log2() + copies
    }
}

/// A line of the table: which, and of what.
struct Row<'a> {
    which: &'a Which,
    trial: Option<&'a Trial>,
    batch: u32,
    ranks: u32,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if !(args.gbit > 0.0 && args.gbit.is_finite()) {
        return Err("--gbit must be above 0".into());
    }
    let machine = device::machine();
    let opened = open(args.on.device)?;
    let dataset = Dataset::open(&args.data)?;
    let images = dataset.train.len();
    let facts = Facts::of(&dataset.train, &opened, &machine)?;
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
            for ranks in &args.ranks {
                let row = Row { which, trial: trial.as_ref(), batch: *batch, ranks: *ranks };
                rows.push(row.describe(args, images, free));
            }
        }
    }
    if args.on.json {
        let table: Vec<&Value> = rows.iter().map(|(value, _)| value).collect();
        let result = json!({
            "images": images, "size": size, "device": opened.found.name, "precision": precision,
            "free_mb": machine.free_mb, "budget_seconds": args.budget.0, "gbit": args.gbit, "rows": table,
        });
        out!("{result}");
        return Ok(ExitCode::SUCCESS);
    }
    out!("{images} training images, views of {size} px, {precision}, {}", opened.found.name);
    let head = format!("in {}", duration(args.budget.0));
    out!(
        "{:<24} {:>6} {:>5} {:>9} {:>10} {:>14}  {head}",
        "encoder",
        "batch",
        "ranks",
        "images/s",
        "memory",
        "an epoch"
    );
    for (_, line) in &rows {
        out!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

impl Row<'_> {
    /// As data and as text.
    fn describe(&self, args: &Args, images: usize, free: f64) -> (Value, String) {
        let &Row { which, trial, batch, ranks } = self;
        let name = which.to_string();
        let line = |rest: String| format!("{name:<24} {batch:>6} {ranks:>5} {rest}");
        let head = json!({
            "encoder": which.architecture.name(), "width": which.width, "batch": batch, "ranks": ranks,
        });
        let with = |more: Value| {
            let mut all = head.clone();
            all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            all
        };
        let refuse = |why: String| (with(json!({ "fits": false, "why": why })), line(format!("does not fit: {why}")));
        if batch as usize > images {
            return refuse(format!("there are {images} images"));
        }
        if !batch.is_multiple_of(ranks) {
            return refuse(format!("{ranks} ranks cannot share {batch} images evenly"));
        }
        let Some(trial) = trial else {
            return refuse(format!("even a trial of a few images ran out of the {} free", gib(free)));
        };
        let own = batch / ranks;
        let memory = trial.memory(own);
        if let Some(needs) = memory.filter(|needs| *needs > free) {
            let parts = trial.parts(own, free);
            let instead = match parts {
                Some(parts) => format!("--accumulate {parts} does, in parts of {}", own / parts),
                None => "no part of it does".into(),
            };
            let why = format!("it needs about {} of the {} free; {instead}", gib(needs), gib(free));
            let (mut value, line) = refuse(why);
            value["memory_mb"] = needs.into();
            value["accumulate"] = parts.into();
            return (value, line);
        }
        let step = f64::from(own) / trial.images_per_second + trial.exchange(ranks, args.gbit);
        let speed = f64::from(batch) / step;
        let epoch = images as f64 / speed;
        let epochs = args.budget.0 / epoch;
        let text = memory.map_or("?".into(), gib);
        let line = line(format!(
            "{speed:>9.1} {text:>10} {:>14}  {} epochs",
            duration(epoch),
            if epochs >= 10.0 { format!("{epochs:.0}") } else { format!("{epochs:.1}") }
        ));
        let value = with(json!({
            "fits": true, "memory_mb": memory, "images_per_second": speed, "epoch_seconds": epoch, "epochs": epochs,
        }));
        (value, line)
    }
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
    let head = |d_in: usize| (d_in + 3 + PROJECTION) * hidden;
    let encoder: usize = net.shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let parameters = (encoder + head(net.features()) + head(PROJECTION)) as f64;
    let norms = [net.shapes().iter().filter(|(_, shape)| shape.len() == 4).count() as f64 + 1.0, 1.0];
    Ok(Some(Trial { images_per_second: speed, parameters, norms, memory }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial() -> Trial {
        Trial { images_per_second: 100.0, parameters: 25e6, norms: [54.0, 1.0], memory: Some([100.0, 10.0]) }
    }

    #[test]
    fn what_does_not_fit_fits_in_parts_that_divide_it() {
        let trial = trial();
        // 90 images at most; 96 in two parts, 97 is a prime.
        assert_eq!((trial.parts(64, 1000.0), trial.parts(96, 1000.0)), (Some(1), Some(2)));
        assert_eq!((trial.parts(97, 1000.0), trial.parts(96, 50.0)), (None, None));
    }

    #[test]
    fn ranks_pay_for_what_they_say() {
        let trial = trial();
        assert_eq!(trial.exchange(1, 10.0), 0.0);
        // 100 MB of gradient at 10 Gbit/s once round the ring, and 338 messages.
        let two = 0.08 + 338.0 * LATENCY;
        assert!((trial.exchange(2, 10.0) - two).abs() < 1e-9);
        assert!(trial.exchange(8, 10.0) > two && trial.exchange(8, 100.0) < two);
        let on_gpu = Trial { memory: None, ..trial };
        assert!((on_gpu.exchange(2, 10.0) - two - 200e6 / HOST).abs() < 1e-9);
    }
}

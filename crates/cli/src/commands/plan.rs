//! `byol plan DATA [--budget TIME]`

use std::{path::PathBuf, process::ExitCode, str::FromStr};

use byol::{
    data::CHANNELS,
    device,
    nn::{Architecture, ResNet, Stem},
    train::{
        RecipeOverrides,
        auto::{self, AutoInputs},
    },
};
use serde_json::{Value, json};

use super::{ComputeArgs, data_args::DataFlags, open_device};
use crate::terminal::{self, Result, duration, out, plural};

const EXAMPLES: &str = "\
Examples:
  byol plan photos --budget 8h                        Epochs per encoder in a night
  byol plan photos --encoders resnet50 --ranks 1,4,8  Estimate training on several machines";

/// Estimate the time and memory of a pretraining run
///
/// Counts the images, runs training steps of two small batches for each encoder, each in a process
/// of its own, and prints images/s, memory and time for every batch size and number of ranks.
/// Batches that do not fit into memory are listed with the `--accumulate` that does. Data loading
/// is not included. Multi-rank times (machines or GPUs like this one, over MPI) are estimated, not
/// measured.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Images: a folder, CIFAR or IDX files, or shards
    data: PathBuf,
    #[command(flatten)]
    data_flags: DataFlags,
    /// Time budget, for example 90m, 8h or 3d; sets the number of epochs
    #[arg(long, value_name = "TIME", default_value = "8h")]
    budget: Budget,
    /// Encoders to compare: resnet18 to resnet200, optionally with a width, as in resnet18x0.25
    #[arg(
        long,
        value_name = "ENCODER,…",
        value_delimiter = ',',
        default_values = ["resnet18x0.25", "resnet18", "resnet50"]
    )]
    encoders: Vec<EncoderChoice>,
    /// Batch sizes to compare
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_values_t = [64, 256],
        value_parser = clap::value_parser!(u32).range(2..)
    )]
    batches: Vec<u32>,
    /// Numbers of data-parallel ranks to compare
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_values_t = [1],
        value_parser = clap::value_parser!(u32).range(1..=4096)
    )]
    ranks: Vec<u32>,
    /// Bandwidth between ranks, in Gbit/s
    #[arg(long, value_name = "X", default_value_t = 10.0)]
    gbit: f64,
    /// View size in pixels [default: the choice of `auto` for these images]
    #[arg(long, value_name = "PX")]
    size: Option<usize>,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Time budget in seconds.
#[derive(Debug, Clone, Copy)]
struct Budget(f64);

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let invalid = || format!("invalid duration `{text}` (expected e.g. `90m`, `8h`, `3d`)");
        let unit = text.chars().last().ok_or_else(invalid)?;
        let seconds = match unit {
            'm' => 60.0,
            'h' => 3600.0,
            'd' => 86_400.0,
            _ => return Err(invalid()),
        };
        let n: f64 = text[..text.len() - 1].parse().map_err(|_| invalid())?;
        if n > 0.0 && n.is_finite() { Ok(Budget(n * seconds)) } else { Err(invalid()) }
    }
}

/// Encoder architecture and width.
#[derive(Debug, Clone, PartialEq)]
struct EncoderChoice {
    architecture: Architecture,
    width: f64,
}

impl FromStr for EncoderChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let invalid = || format!("invalid encoder `{text}` (expected e.g. `resnet50`, `resnet18x0.25`)");
        let (name, width) = text.split_once('x').map_or((text, "1"), |(name, width)| (name, width));
        let architecture = Architecture::ALL.into_iter().find(|a| a.name() == name).ok_or_else(invalid)?;
        let width = width.parse().ok().filter(|w: &f64| (0.01..=8.0).contains(w)).ok_or_else(invalid)?;
        Ok(EncoderChoice { architecture, width })
    }
}

impl std::fmt::Display for EncoderChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.architecture.name())?;
        if self.width == 1.0 { Ok(()) } else { write!(f, " of width {}", self.width) }
    }
}

/// Multiply-adds of the smaller of two trial steps: about one second on two cores.
const TRIAL_PRODUCTS: f64 = 4e10;

/// Fraction of the free memory to use; the rest is for the system and data loading.
const USABLE_MEMORY: f64 = 0.9;

/// Dimension of a projection, as in the paper.
const PROJECTION: usize = 256;

/// Latency of a message in a fast local network, in seconds.
const LATENCY: f64 = 20e-6;

/// Bandwidth between a GPU and its host, in bytes per second.
const HOST_BANDWIDTH: f64 = 12e9;

/// Measurements of an encoder, by two trial steps.
struct Trial {
    /// Seconds of a step: fixed, such as the update of the weights, and per image of the batch.
    seconds: [f64; 2],
    /// Number of parameters of θ.
    parameters: f64,
    /// Number of batch norms in f and g, and in q.
    norms: [f64; 2],
    /// Memory in MiB: fixed, and per image of the batch. `None` on devices with memory of their
    /// own.
    memory: Option<[f64; 2]>,
}

impl Trial {
    /// Seconds of a step, without communication.
    fn step(&self, batch: u32) -> f64 {
        let [fixed, per_image] = self.seconds;
        fixed + per_image * f64::from(batch)
    }

    fn memory(&self, batch: u32) -> Option<f64> {
        self.memory.map(|[fixed, per_image]| fixed + per_image * f64::from(batch))
    }

    /// Smallest number of equal micro-batches, of at least two images each, that fit into `free`
    /// MiB.
    fn micro_batches(&self, images: u32, free: f64) -> Option<u32> {
        let fits = |size: u32| size >= 2 && self.memory(size).is_none_or(|needed| needed <= free);
        (1..=images).filter(|n| images.is_multiple_of(*n)).find(|n| fits(images / n))
    }

    /// Communication time per step, in seconds: a ring all-reduce of the gradient, and a message
    /// per batch norm and pass.
    fn communication(&self, ranks: u32, gbit: f64) -> f64 {
        if ranks == 1 {
            return 0.0;
        }
        let n = f64::from(ranks);
        let bytes = 2.0 * (n - 1.0) / n * 4.0 * self.parameters;
        // Forward of two views in both networks, backward in one; q is only in the online network.
        let messages = 6.0 * self.norms[0] + 4.0 * self.norms[1] + 10.0;
        // From the device to the host and back.
        let copies = if self.memory.is_some() { 0.0 } else { 8.0 * self.parameters / HOST_BANDWIDTH };
        8.0 * bytes / (gbit * 1e9) + messages * LATENCY * n.log2() + copies
    }
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if !(args.gbit > 0.0 && args.gbit.is_finite()) {
        return Err("`--gbit` must be above 0".into());
    }
    let machine = device::machine();
    let opened = open_device(args.compute.device)?;
    let dataset = args.data_flags.open(&args.data, None)?;
    let images = dataset.train.len();
    let inputs = AutoInputs::collect(&dataset.train, &opened, &machine)?;
    let mut overrides = RecipeOverrides::default();
    if let Some(size) = args.size {
        overrides.set(&format!("views.size={size}"))?;
    }
    let (recipe, _) = auto::choose(&inputs, &overrides);
    let size = recipe.views.size;
    let free = machine.free_mb as f64 * USABLE_MEMORY;
    let precision = serde_json::to_value(recipe.train.precision)?.as_str().unwrap_or("f32").to_owned();
    let mut rows = Vec::new();
    for encoder in &args.encoders {
        let bar = terminal::progress_bar("measuring", 2);
        bar.set_message(format!("{encoder} at {size} px"));
        let trial = run_trial(args, encoder, size, recipe.heads.hidden, &precision, opened.info.choice)?;
        bar.finish_and_clear();
        for batch in &args.batches {
            for ranks in &args.ranks {
                let row = Row { encoder, trial: trial.as_ref(), batch: *batch, ranks: *ranks };
                rows.push(row.describe(args, images, free));
            }
        }
    }
    if args.compute.json {
        let table: Vec<&Value> = rows.iter().map(|(value, _)| value).collect();
        let result = json!({
            "images": images, "size": size, "device": opened.info.name, "precision": precision,
            "free_mb": machine.free_mb, "budget_seconds": args.budget.0, "gbit": args.gbit, "rows": table,
        });
        out!("{result}");
        return Ok(ExitCode::SUCCESS);
    }
    out!("{}, {size} px views, {precision}, {}", plural(images, "training image"), opened.info.name);
    let budget = format!("in {}", duration(args.budget.0));
    out!(
        "{:<22} {:>5} {:>5} {:>8} {:>8} {:>12}  {budget}",
        "encoder",
        "batch",
        "ranks",
        "images/s",
        "memory",
        "per epoch"
    );
    for (_, line) in &rows {
        out!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Row of the table.
struct Row<'a> {
    encoder: &'a EncoderChoice,
    /// `None` if the trial ran out of memory.
    trial: Option<&'a Trial>,
    batch: u32,
    ranks: u32,
}

impl Row<'_> {
    /// The row as JSON and as text.
    fn describe(&self, args: &Args, images: usize, free: f64) -> (Value, String) {
        let &Row { trial, batch, ranks, .. } = self;
        if batch as usize > images {
            return self.does_not_fit(format!("the data set has {}", plural(images, "image")));
        }
        if !batch.is_multiple_of(ranks) {
            return self.does_not_fit(format!("batch size {batch} is not divisible by {ranks} ranks"));
        }
        let Some(trial) = trial else {
            return self.does_not_fit(format!("even a small batch exceeds the {} of free memory", gib(free)));
        };
        let per_rank = batch / ranks;
        let memory = trial.memory(per_rank);
        if let Some(needed) = memory.filter(|needed| *needed > free) {
            return self.exceeds_memory(trial, per_rank, needed, free);
        }
        let step = trial.step(per_rank) + trial.communication(ranks, args.gbit);
        let speed = f64::from(batch) / step;
        let epoch = images as f64 / speed;
        let epochs = args.budget.0 / epoch;
        let line = self.line(&format!(
            "{speed:>8.1} {:>8} {:>12}  {} epochs",
            memory.map_or("?".into(), gib),
            duration(epoch),
            if epochs >= 10.0 { format!("{epochs:.0}") } else { format!("{epochs:.1}") }
        ));
        let value = self.json(json!({
            "fits": true, "memory_mb": memory, "images_per_second": speed, "epoch_seconds": epoch, "epochs": epochs,
        }));
        (value, line)
    }

    fn exceeds_memory(&self, trial: &Trial, per_rank: u32, needed: f64, free: f64) -> (Value, String) {
        let micro_batches = trial.micro_batches(per_rank, free);
        let instead = match micro_batches {
            Some(n) => format!("fits with --accumulate {n} (micro-batches of {})", per_rank / n),
            None => "no micro-batch fits".into(),
        };
        let (mut value, line) =
            self.does_not_fit(format!("needs about {}, but only {} is free; {instead}", gib(needed), gib(free)));
        value["memory_mb"] = needed.into();
        value["accumulate"] = micro_batches.into();
        (value, line)
    }

    fn does_not_fit(&self, why: String) -> (Value, String) {
        (self.json(json!({ "fits": false, "why": why })), self.line(&format!("does not fit: {why}")))
    }

    fn line(&self, rest: &str) -> String {
        format!("{:<22} {:>5} {:>5} {rest}", self.encoder.to_string(), self.batch, self.ranks)
    }

    fn json(&self, results: Value) -> Value {
        let mut row = json!({
            "encoder": self.encoder.architecture.name(), "width": self.encoder.width,
            "batch": self.batch, "ranks": self.ranks,
        });
        let results = results.as_object().expect("an object").clone();
        row.as_object_mut().expect("an object").extend(results);
        row
    }
}

fn gib(mb: f64) -> String {
    format!("{:.1} GiB", mb / 1024.0)
}

/// Line through the values at `n` and `2 n`: its value at 0 and its slope. Noise does not make
/// either negative.
fn line([first, second]: [f64; 2], n: u32) -> [f64; 2] {
    let slope = ((second - first) / f64::from(n)).clamp(0.0, second / f64::from(2 * n));
    [(second - slope * f64::from(2 * n)).max(0.0), slope]
}

/// Measures steps of two small batches; time and memory are linear in the batch size. `None` if
/// even they run out of memory.
fn run_trial(
    args: &Args,
    encoder: &EncoderChoice,
    size: usize,
    hidden: usize,
    precision: &str,
    device: &str,
) -> Result<Option<Trial>> {
    let net = ResNet::new(encoder.architecture, encoder.width, Stem::for_size(size), CHANNELS);
    // A training step costs eight forward passes per image.
    let few = (TRIAL_PRODUCTS / (8.0 * net.multiply_adds(size) as f64)).clamp(2.0, 64.0) as u32;
    let mut measurements = Vec::new();
    for batch in [few, 2 * few] {
        let output = crate::program()?
            .args(["bench", "--json", "--steps", "3", "--encoder", encoder.architecture.name()])
            .args(["--width", &encoder.width.to_string(), "--size", &size.to_string(), "--batch", &batch.to_string()])
            .args(["--hidden", &hidden.to_string(), "--precision", precision])
            .args(["--threads", &args.compute.threads.to_string(), "--device", device])
            .output()?;
        let Ok(result) = serde_json::from_slice::<Value>(&output.stdout) else {
            // Killed by the system: out of memory.
            if output.status.code().is_none() {
                return Ok(None);
            }
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(format!("a trial of {encoder} failed: {}", stderr.trim().trim_start_matches("error: ")).into());
        };
        measurements.push([&result["images_per_second"], &result["peak_mb"]].map(|v| v.as_f64().unwrap_or(f64::NAN)));
    }
    let [[slow, small], [fast, large]] = [measurements[0], measurements[1]];
    // A step of twice the images takes at least half as long again: small steps vary.
    let times = [f64::from(few) / slow, f64::from(2 * few) / fast];
    let seconds = line([times[0].min(times[1] / 1.5), times[1]], few);
    let memory = (device == "cpu" && large.is_finite()).then_some(line([small, large], few));
    let head = |d_in: usize| (d_in + 3 + PROJECTION) * hidden;
    let weights: usize = net.shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let parameters = (weights + head(net.features()) + head(PROJECTION)) as f64;
    let norms = [net.shapes().iter().filter(|(_, shape)| shape.len() == 4).count() as f64 + 1.0, 1.0];
    Ok(Some(Trial { seconds, parameters, norms, memory }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial() -> Trial {
        Trial { seconds: [0.1, 0.01], parameters: 25e6, norms: [54.0, 1.0], memory: Some([100.0, 10.0]) }
    }

    #[test]
    fn time_and_memory_are_lines_through_two_measurements() {
        let close = |[a, b]: [f64; 2], [c, d]: [f64; 2]| (a - c).abs() < 1e-9 && (b - d).abs() < 1e-9;
        assert!(close(line([0.5, 0.8], 8), [0.2, 0.0375]));
        // Measurements that no line without negative values fits.
        assert!(close(line([0.5, 0.4], 8), [0.4, 0.0]));
        assert!(close(line([0.1, 0.4], 8), [0.0, 0.025]));
        assert!((trial().step(50) - 0.6).abs() < 1e-9);
    }

    #[test]
    fn micro_batches_divide_the_batch_and_fit() {
        let trial = trial();
        // At most 90 images fit: 96 in two micro-batches; 97 is prime.
        assert_eq!((trial.micro_batches(64, 1000.0), trial.micro_batches(96, 1000.0)), (Some(1), Some(2)));
        assert_eq!((trial.micro_batches(97, 1000.0), trial.micro_batches(96, 50.0)), (None, None));
    }

    #[test]
    fn communication_grows_with_ranks_and_shrinks_with_bandwidth() {
        let trial = trial();
        assert_eq!(trial.communication(1, 10.0), 0.0);
        // A ring all-reduce of 100 MB at 10 Gbit/s, and 338 messages.
        let two = 0.08 + 338.0 * LATENCY;
        assert!((trial.communication(2, 10.0) - two).abs() < 1e-9);
        assert!(trial.communication(8, 10.0) > two && trial.communication(8, 100.0) < two);
        let on_gpu = Trial { memory: None, ..trial };
        assert!((on_gpu.communication(2, 10.0) - two - 200e6 / HOST_BANDWIDTH).abs() < 1e-9);
    }
}

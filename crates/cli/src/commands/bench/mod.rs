//! `byol bench`: a training step, the views, the convolution kernels. One file per benchmark.

mod kernels;
mod step;
mod views;

use std::process::ExitCode;

use byol::train::{Recipe, RecipeOverrides};
use clap::Subcommand;

use crate::terminal::Result;

const EXAMPLES: &str = "\
Examples:
  byol bench --encoder resnet50 --size 224 --batch 16  Time training steps
  byol bench views photos                              Time decoding and augmentation";

/// Benchmark training on this machine
///
/// Without a subcommand: complete training steps on random images, without data loading. Close
/// other programs first, as they affect the measurements.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    benchmark: Option<Benchmark>,
    #[command(flatten)]
    step: step::StepArgs,
}

#[derive(Debug, Subcommand)]
enum Benchmark {
    Views(views::Args),
    Kernels(kernels::Args),
}

/// Flags of the benchmarks that compute with a network.
#[derive(Debug, clap::Args)]
struct NetworkArgs {
    /// Encoder architecture: resnet18, resnet34, resnet50, resnet101, resnet152 or resnet200
    #[arg(long, default_value = "resnet18")]
    encoder: String,
    /// Width multiplier of the encoder
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    width: f64,
    /// View size in pixels
    #[arg(long, value_name = "PX", default_value_t = 32)]
    size: usize,
    /// Number of threads [default: number of cores]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Compute precision: f32, bf16 (CPUs with AMX or AVX512-BF16, CUDA, ROCm) or f16 (GPUs)
    #[arg(long, value_parser = ["f32", "bf16", "f16"], default_value = "f32", hide_possible_values = true)]
    precision: String,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

impl NetworkArgs {
    /// Recipe with these flags and further `KEY=VALUE` settings.
    fn recipe(&self, settings: &[String]) -> Result<Recipe> {
        let mut overrides = RecipeOverrides::from_recipe("cifar10")?;
        let flags = [
            format!("encoder.architecture={}", self.encoder),
            format!("encoder.width={}", self.width),
            format!("views.size={}", self.size),
            format!("train.precision={}", self.precision),
        ];
        for setting in flags.iter().chain(settings) {
            overrides.set(setting)?;
        }
        Ok(overrides.apply_to(&Recipe::default())?)
    }
}

pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.benchmark {
        None => step::run(&args.step)?,
        Some(Benchmark::Views(args)) => views::run(args)?,
        Some(Benchmark::Kernels(args)) => kernels::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

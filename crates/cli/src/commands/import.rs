//! `byol import FILE -o ENCODER`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use burn::tensor::Device;
use byol::nn::{
    Normalization,
    import::{self, Preparation},
    weights,
};
use serde_json::json;

use super::must_be_new;
use crate::terminal::{self, Result, display_path, out};

const EXAMPLES: &str = "\
Examples:
  byol import resnet50.pth -o resnet50.safetensors  Import torchvision's weights";

/// Import a pretrained ResNet checkpoint
///
/// Reads PyTorch checkpoints and safetensors files with the tensor names of torchvision, timm,
/// lightly or solo-learn, and folders in the format of the Hugging Face hub. Pickles are read
/// without executing any code. Set the image preprocessing with the flags below: checkpoints do not
/// record it. For a Hugging Face folder, size and normalization are read from its config.json.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Checkpoint (.pth or .safetensors), or a folder with model.safetensors
    file: PathBuf,
    /// Output file (.safetensors)
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Input size in pixels [default: 224, or 32 for a 3x3 stem]
    #[arg(long, value_name = "PX")]
    size: Option<usize>,
    /// Channel means of the input, on a scale from 0 to 1 [default: ImageNet's]
    #[arg(long, value_name = "R,G,B", value_delimiter = ',', num_args = 1)]
    mean: Option<Vec<f32>>,
    /// Channel standard deviations of the input [default: ImageNet's]
    #[arg(long, value_name = "R,G,B", value_delimiter = ',', num_args = 1)]
    std: Option<Vec<f32>>,
    /// Overwrite FILE if it exists
    #[arg(long)]
    overwrite: bool,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    must_be_new(&args.out, args.overwrite)?;
    if args.out.extension().and_then(|e| e.to_str()) != Some("safetensors") {
        let out = args.out.display();
        return Err(format!("unsupported output file {out}\nhint: use the extension `.safetensors`").into());
    }
    if weights::load(&args.file, &Device::flex()).is_ok() {
        let file = args.file.display();
        return Err(format!("{file} is a byol encoder\nhint: use it as it is, without an import").into());
    }
    let file = weights::resolve(&args.file);
    let encoder = import::import(&file, &preparation(args, &file)?, &Device::flex())?;
    weights::save(&args.out, &encoder.spec, &encoder.weights)?;
    let spec = &encoder.spec;
    terminal::note(format!(
        "wrote {}: {} of width {}, {} stem, {} features, {} px input",
        args.out.display(),
        spec.architecture.name(),
        spec.width,
        spec.stem.name(),
        encoder.features(),
        spec.size
    ));
    if args.json {
        out!("{}", json!({ "file": display_path(&args.out), "encoder": spec, "features": encoder.features() }));
    }
    Ok(ExitCode::SUCCESS)
}

/// Input size and normalization: the flags, else those of the `config.json` beside the file.
fn preparation(args: &Args, file: &Path) -> Result<Preparation> {
    let preparation = Preparation::with_config(file, args.size, args.mean.clone(), args.std.clone());
    let Normalization { mean, std } = &preparation.normalization;
    let invalid = |flag: &str, is_given: bool, expected: &str| match is_given {
        true => format!("invalid `{flag}` (expected {expected})").into(),
        false => {
            let name = flag.trim_start_matches('-');
            format!(
                "invalid {name} in {} (expected {expected})\nhint: pass `{flag}`",
                file.with_file_name("config.json").display()
            )
            .into()
        }
    };
    let is_valid = |values: &[f32], above: f32| values.len() == 3 && values.iter().all(|v| v.is_finite() && *v > above);
    if !is_valid(mean, f32::NEG_INFINITY) {
        return Err(invalid("--mean", args.mean.is_some(), "three numbers, e.g. `0.485,0.456,0.406`"));
    }
    if !is_valid(std, 0.0) {
        return Err(invalid("--std", args.std.is_some(), "three positive numbers, e.g. `0.229,0.224,0.225`"));
    }
    if preparation.size == Some(0) {
        return Err("`--size` must be at least 1".into());
    }
    Ok(preparation)
}

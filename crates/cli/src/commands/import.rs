//! `byol import FILE -o ENCODER`

use std::{path::PathBuf, process::ExitCode};

use burn::tensor::Device;
use byol::nn::{
    Normalization,
    import::{self, Preparation},
    weights,
};
use serde_json::json;

use super::must_be_new;
use crate::terminal::{self, Result, display_path, out};

/// Import a pretrained ResNet checkpoint
///
/// Reads PyTorch checkpoints and safetensors files with the tensor names of torchvision, timm,
/// lightly or solo-learn. Pickles are read without executing any code. Checkpoints do not record
/// their image preprocessing: set it with the flags below.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Checkpoint (.pth or .safetensors)
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
    if args.size == Some(0) {
        return Err("`--size` must be at least 1".into());
    }
    if weights::load(&args.file, &Device::flex()).is_ok() {
        let file = args.file.display();
        return Err(format!("{file} is a byol encoder\nhint: use it as it is, without an import").into());
    }
    let preparation = Preparation { size: args.size, normalization: normalization(args)? };
    let encoder = import::import(&args.file, &preparation, &Device::flex())?;
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

/// Input normalization from `--mean` and `--std`.
fn normalization(args: &Args) -> Result<Normalization> {
    let default = Normalization::default();
    let mean = args.mean.clone().unwrap_or(default.mean);
    let std = args.std.clone().unwrap_or(default.std);
    let is_valid = |values: &[f32], above: f32| values.len() == 3 && values.iter().all(|v| v.is_finite() && *v > above);
    if !is_valid(&mean, f32::NEG_INFINITY) {
        return Err("invalid `--mean` (expected three numbers, e.g. `0.485,0.456,0.406`)".into());
    }
    if !is_valid(&std, 0.0) {
        return Err("invalid `--std` (expected three positive numbers, e.g. `0.229,0.224,0.225`)".into());
    }
    Ok(Normalization { mean, std })
}

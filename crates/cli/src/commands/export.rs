//! `byol export ENCODER -o FILE` and `byol import FILE -o ENCODER`

use std::{path::PathBuf, process::ExitCode};

use burn::tensor::Device;
use byol::{
    apply::export,
    data::{Dataset, Images, synthetic},
    device::{self, Choice},
    nn::{
        Normalization,
        foreign::{self, Preparation},
        weights,
    },
    train::run::read_plan,
};
use serde_json::json;

use super::must_be_new;
use crate::report::{self, Result, out, shown};

/// Write an encoder for other tools: ONNX, torchvision, timm
///
/// NAME.safetensors has the names of torchvision's ResNets, which are timm's too, and loads there with strict=True but for the classifier
/// (with the 3x3 stem for small images after conv1 and maxpool are replaced). NAME.onnx takes a batch of any size. The file is read back
/// and compared with the encoder on real images before it gets its name.
#[derive(Debug, clap::Args)]
pub struct Export {
    /// An encoder.safetensors, or the folder of a run
    encoder: PathBuf,
    /// Where to: NAME.safetensors or NAME.onnx
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// torchvision or timm: whose names the tensors have (they are the same)
    #[arg(long, value_name = "WHOSE", default_value = "torchvision", value_parser = ["torchvision", "timm"])]
    names: String,
    /// ONNX: take normalised images, instead of values from 0 to 1
    #[arg(long)]
    normalized_input: bool,
    /// Images to compare on [default: those of the run, else synthetic ones]
    #[arg(long, value_name = "DATA")]
    images: Option<PathBuf>,
    /// Replace FILE if it exists
    #[arg(long)]
    overwrite: bool,
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

/// Make an encoder of a ResNet that someone else has trained
///
/// Takes PyTorch checkpoints and safetensors with the names of torchvision, timm, lightly or solo-learn. A pickle is read without executing
/// anything. What no checkpoint says, how images are prepared, is given by the flags.
#[derive(Debug, clap::Args)]
pub struct Import {
    /// A .pth or .safetensors file
    file: PathBuf,
    /// Where to: NAME.safetensors
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Side of the views in pixels [default: 224, or 32 with a 3x3 stem]
    #[arg(long, value_name = "PX")]
    size: Option<usize>,
    /// Channel means of its input, on the scale 0 to 1 [default: ImageNet's]
    #[arg(long, value_name = "R,G,B", value_delimiter = ',', num_args = 1)]
    mean: Option<Vec<f32>>,
    /// Channel deviations of its input [default: ImageNet's]
    #[arg(long, value_name = "R,G,B", value_delimiter = ',', num_args = 1)]
    std: Option<Vec<f32>>,
    /// Replace FILE if it exists
    #[arg(long)]
    overwrite: bool,
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

/// Images that an export is compared on.
const IMAGES: usize = 8;

/// Some images, and in words which.
fn images(args: &Export) -> Result<(Images, String)> {
    let of_run = || read_plan(&args.encoder).ok().map(|plan| plan.data).filter(|data| data.exists());
    let Some(data) = args.images.clone().or_else(of_run) else {
        return Ok((synthetic::dataset(0, IMAGES, 0).train, "synthetic images".into()));
    };
    let dataset = Dataset::open(&data)?;
    let dataset = Dataset { held_out: None, test: None, ..dataset }.limit(IMAGES).check(0, &|| ())?;
    Ok((dataset.train, format!("images of {}", data.display())))
}

pub fn export(args: &Export) -> Result<ExitCode> {
    must_be_new(&args.out, args.overwrite)?;
    super::set_threads(0)?;
    let encoder = super::encoder(&args.encoder, &device::open(Choice::Cpu)?.device)?;
    let (images, which) = images(args)?;
    let check = export::write(&encoder, &args.out, !args.normalized_input, &images)?;
    report::note(format!(
        "{}: differs from the encoder by at most {:.1e} where features reach {:.2} ({} {which})",
        args.out.display(),
        check.difference,
        check.largest,
        check.images
    ));
    if args.json {
        let result = json!({
            "file": shown(&args.out), "names": args.names, "images": check.images, "largest_difference": check.difference,
            "largest_feature": check.largest, "features": encoder.features(), "size": encoder.spec.size,
        });
        out!("{result}");
    }
    Ok(ExitCode::SUCCESS)
}

pub fn import(args: &Import) -> Result<ExitCode> {
    must_be_new(&args.out, args.overwrite)?;
    if args.out.extension().and_then(|e| e.to_str()) != Some("safetensors") {
        return Err(format!("{} is not named .safetensors; name it so", args.out.display()).into());
    }
    let own = Normalization::default();
    let normalization =
        Normalization { mean: args.mean.clone().unwrap_or(own.mean), std: args.std.clone().unwrap_or(own.std) };
    let right = |values: &[f32], low: f32| values.len() == 3 && values.iter().all(|v| v.is_finite() && *v > low);
    if !right(&normalization.mean, f32::NEG_INFINITY) || !right(&normalization.std, 0.0) {
        return Err("--mean and --std are three numbers each, those of --std above 0: 0.485,0.456,0.406".into());
    }
    if args.size == Some(0) {
        return Err("--size must be at least 1".into());
    }
    let encoder = foreign::import(&args.file, &Preparation { size: args.size, normalization }, &Device::flex())?;
    weights::save(&args.out, &encoder.spec, &encoder.weights)?;
    let spec = &encoder.spec;
    report::note(format!(
        "{}: {} of width {}, {:?} stem, {} features, views of {} px",
        args.out.display(),
        spec.architecture.name(),
        spec.width,
        spec.stem,
        encoder.features(),
        spec.size
    ));
    if args.json {
        out!("{}", json!({ "file": shown(&args.out), "encoder": spec, "features": encoder.features() }));
    }
    Ok(ExitCode::SUCCESS)
}

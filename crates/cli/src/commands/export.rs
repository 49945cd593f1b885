//! `byol export ENCODER -o FILE`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    apply::export,
    data::{Dataset, Images, Levels, OpenOptions, synthetic},
    device::{self, DeviceChoice},
    train::run::read_plan,
};
use serde_json::json;

use super::must_be_new;
use crate::terminal::{self, Result, display_path, out};

/// Export an encoder to ONNX, or to safetensors for torchvision and timm
///
/// NAME.safetensors uses the tensor names of torchvision, which are also timm's, and loads there
/// with strict=True except for the classifier (with the 3x3 stem for small images, after replacing
/// conv1 and maxpool). NAME.onnx accepts any batch size. The file is read back and compared with
/// the encoder on real images before it is saved under its name.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Encoder file (.safetensors) or run folder
    encoder: PathBuf,
    /// Output file (.safetensors or .onnx)
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Naming scheme of the tensors: torchvision or timm (identical)
    #[arg(
        long,
        value_name = "SCHEME",
        default_value = "torchvision",
        value_parser = ["torchvision", "timm"],
        hide_possible_values = true
    )]
    names: String,
    /// ONNX: expect normalized images instead of pixel values from 0 to 1
    #[arg(long)]
    normalized_input: bool,
    /// Images to compare on [default: images of the run, or synthetic ones]
    #[arg(long, value_name = "DATA")]
    images: Option<PathBuf>,
    /// Overwrite FILE if it exists
    #[arg(long)]
    overwrite: bool,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// Number of images that an export is compared on.
const IMAGES: usize = 8;

pub fn run(args: &Args) -> Result<ExitCode> {
    must_be_new(&args.out, args.overwrite)?;
    super::set_threads(0)?;
    let encoder = super::load_encoder(&args.encoder, &device::open(DeviceChoice::Cpu)?.device)?;
    let (images, source) = comparison_images(args, encoder.spec.levels)?;
    let check = export::write(&encoder, &args.out, !args.normalized_input, &images)?;
    terminal::note(format!(
        "wrote {}; largest difference from the encoder {:.1e}, for features up to {:.2} ({} {source})",
        args.out.display(),
        check.difference,
        check.largest,
        check.images
    ));
    if args.json {
        let result = json!({
            "file": display_path(&args.out), "names": args.names, "images": check.images,
            "largest_difference": check.difference, "largest_feature": check.largest,
            "features": encoder.features(), "size": encoder.spec.size,
        });
        out!("{result}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Images to compare on, with a description of their source.
fn comparison_images(args: &Args, levels: Levels) -> Result<(Images, String)> {
    let run_data = || read_plan(&args.encoder).ok().map(|plan| plan.data).filter(|data| data.exists());
    let Some(data) = args.images.clone().or_else(run_data) else {
        return Ok((synthetic::dataset(0, IMAGES, 0).train, "synthetic images".into()));
    };
    let dataset = Dataset::open_with(&data, &OpenOptions { levels, ..OpenOptions::default() })?;
    let dataset = Dataset { held_out: None, test: None, ..dataset }.limit(IMAGES).check(0, &|| ())?;
    Ok((dataset.train, format!("images of {}", data.display())))
}

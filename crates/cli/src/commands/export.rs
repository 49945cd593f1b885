//! `byol export ENCODER -o FILE`

use std::{
    ops::ControlFlow::Continue,
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::{
    apply::{export, hub},
    data::{CHANNELS, Dataset, Images, OpenOptions, synthetic},
    device::{self, DeviceChoice},
    eval::results,
    nn::{Encoder, EncoderSpec},
    train::{Plan, metrics, run::read_plan},
};
use serde_json::json;

use super::must_be_new;
use crate::terminal::{self, Result, display_path, out};

const EXAMPLES: &str = "\
Examples:
  byol export byol-runs/photos -o encoder.onnx          Export for ONNX Runtime
  byol export byol-runs/photos -o encoder.safetensors   Export for torchvision and timm
  byol export byol-runs/photos -o my-model --format hf  Export for the Hugging Face hub";

/// Export an encoder to ONNX, safetensors or the Hugging Face hub
///
/// NAME.safetensors uses the tensor names of torchvision, which are also timm's, and loads there
/// with strict=True except for the classifier (with the 3x3 stem for small images, after replacing
/// conv1 and maxpool). NAME.onnx accepts any batch size. With `--format hf`, OUT is a folder with
/// config.json, model.safetensors and a model card, which timm and transformers can load (encoders
/// of width 1 with the 7x7 stem). Exports are compared with the encoder on real images before they
/// are saved under their names.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Encoder file (.safetensors) or run folder
    encoder: PathBuf,
    /// Output file (.safetensors or .onnx), or folder
    #[arg(short, long, value_name = "OUT")]
    out: PathBuf,
    /// Output format: safetensors (also torchvision, timm), onnx, or hf (a folder) [default: by the
    /// extension of OUT]
    #[arg(long, value_parser = FORMATS, hide_possible_values = true)]
    format: Option<String>,
    /// License in the model card of `--format hf`: an identifier of the Hugging Face hub, such as
    /// apache-2.0
    #[arg(long, value_name = "NAME", default_value = "unknown")]
    license: String,
    /// Naming scheme of the tensors: torchvision or timm (identical)
    #[arg(
        long,
        value_name = "SCHEME",
        default_value = "torchvision",
        value_parser = ["torchvision", "timm"],
        hide = true // both are the same
    )]
    names: String,
    /// ONNX: expect normalized images instead of pixel values from 0 to 1
    #[arg(long)]
    normalized_input: bool,
    /// Images to compare on [default: images of the run, or synthetic ones]
    #[arg(long, value_name = "DATA")]
    images: Option<PathBuf>,
    /// Overwrite OUT if it exists
    #[arg(long)]
    overwrite: bool,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// Values of `--format`. Files for torchvision and for timm are the same.
const FORMATS: [&str; 5] = ["safetensors", "torchvision", "timm", "onnx", "hf"];

/// Number of images that an export is compared on.
const IMAGES: usize = 8;

pub fn run(args: &Args) -> Result<ExitCode> {
    must_be_new(&args.out, args.overwrite)?;
    let format = match args.format.as_deref() {
        Some("torchvision" | "timm") => "safetensors",
        format => format.unwrap_or_default(),
    };
    if ["safetensors", "onnx"].contains(&format) && args.out.extension().is_none_or(|e| !e.eq_ignore_ascii_case(format))
    {
        let out = args.out.display();
        return Err(format!("the extension of {out} is not `.{format}`\nhint: change `--out` or `--format`").into());
    }
    if args.license != "unknown" && format != "hf" {
        return Err("`--license` requires `--format hf`".into());
    }
    if !args.license.chars().all(|c| c.is_ascii_alphanumeric() || "-._+".contains(c)) || args.license.is_empty() {
        return Err(format!("invalid license `{}` (expected a name such as `apache-2.0`)", args.license).into());
    }
    super::set_threads(0)?;
    let encoder = super::load_encoder(&args.encoder, &device::open(DeviceChoice::Cpu)?.device)?;
    if format == "hf" && encoder.spec.levels.sound.is_some() {
        return Err(
            "`--format hf` describes encoders of images, not of sounds\nhint: use `--format onnx` or `timm`".into()
        );
    }
    let (images, source) = comparison_images(args, &encoder.spec)?;
    let check = match format {
        "hf" => hub::write(&encoder, &args.out, &model_card(args, &encoder), &images)?,
        _ => export::write(&encoder, &args.out, !args.normalized_input, &images)?,
    };
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

/// Text of the model card: how to load the model, and what is known of its training and results.
fn model_card(args: &Args, encoder: &Encoder) -> String {
    let name = args.out.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    let (architecture, size, features) = (encoder.spec.architecture.name(), encoder.spec.size, encoder.features());
    let (plan, license) = (read_plan(&args.encoder).ok(), &args.license);
    let origin = match &plan {
        Some(plan) => {
            let start = match plan.recipe.encoder.from.is_empty() {
                true => "",
                false => ", starting from pretrained weights,",
            };
            format!(
                "Pretrained without labels{start} by [BYOL](https://arxiv.org/abs/2006.07733) with byol {}.",
                plan.version
            )
        }
        None => format!("Converted with byol {}.", env!("CARGO_PKG_VERSION")),
    };
    let input = match encoder.spec.channels {
        CHANNELS => "RGB images".to_owned(),
        n => format!("images of {n} channels"),
    };
    let mut card = format!(
        "---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\nlicense: {license}\n\
         tags:\n- timm\n- transformers\n- byol\n- self-supervised\n---\n\
         # {name}\n\nA {architecture} without classifier: {size} px {input} to {features} features. {origin}\n\n\
         ## Use\n\n```python\nimport timm\n\
         model = timm.create_model(\"local-dir:{name}\", pretrained=True).eval()   # after an upload: hf-hub:USER/{name}\n\
         config = timm.data.resolve_model_data_config(model)\n\
         transform = timm.data.create_transform(**config, is_training=False)\n\
         features = model(transform(image)[None])\n```\n\n\
         timm's transform resizes with antialiasing. byol does so only if the encoder's metadata say \
         `\"antialias\": true`; otherwise its features differ slightly.\n"
    );
    if let Some(plan) = &plan {
        card += &training_table(&args.encoder, plan);
        card += &results_table(&args.encoder);
    }
    card
}

/// Settings of a run as a Markdown section.
fn training_table(run: &Path, plan: &Plan) -> String {
    let recipe = &plan.recipe;
    let epochs = metrics::read_curves(&run.join("metrics.jsonl")).epochs;
    let done = epochs.last().and_then(|epoch| epoch["epoch"].as_u64()).unwrap_or(0);
    format!(
        "\n## Training\n\n| | |\n| --- | --- |\n| images | {} |\n| epochs | {done} of {} |\n| batch size | {} |\n\
         | views | {} px |\n| optimizer | {}, peak learning rate {}, weight decay {:e} |\n\
         | target decay | from {} |\n| seed | {} |\n",
        plan.images,
        recipe.train.epochs,
        recipe.train.batch,
        recipe.views.size,
        recipe.optimizer.kind.name(),
        plan.schedule.peak,
        recipe.optimizer.weight_decay,
        plan.schedule.tau_base,
        recipe.seed,
    )
}

/// Results of the run's last encoder as a Markdown section; empty if there are none.
fn results_table(run: &Path) -> String {
    let mut rows = String::new();
    for table in
        results::stored(run).iter().map(|(_, table)| table).filter(|table| !table.encoder.ends_with("best.safetensors"))
    {
        // The name only: paths of the machine do not belong into a published file.
        let data = Path::new(&table.data).file_name().map_or("".into(), |name| name.to_string_lossy());
        for row in &table.rows {
            let (value, interval) = (row.formatted_value(), row.formatted_interval());
            rows += &format!("| {} | {data} | {} | {value} | {interval} |\n", table.evaluation, row.name);
        }
    }
    match rows.is_empty() {
        true => rows,
        false => format!(
            "\n## Evaluation\n\nMeasured by `byol eval` with byol's evaluation view.\n\n\
             | evaluation | data | metric | value | 95 % interval |\n| --- | --- | --- | --- | --- |\n{rows}"
        ),
    }
}

/// Images to compare on, with a description of their source.
fn comparison_images(args: &Args, spec: &EncoderSpec) -> Result<(Images, String)> {
    let run_data = || read_plan(&args.encoder).ok().map(|plan| plan.data).filter(|data| data.exists());
    let Some(data) = args.images.clone().or_else(run_data) else {
        return Ok((synthetic::with_channels(IMAGES, spec.channels, &spec.levels), "synthetic images".into()));
    };
    let dataset = Dataset::open_with(&data, &OpenOptions::as_trained(spec.levels.clone()))?;
    let dataset = Dataset { held_out: None, test: None, ..dataset }.limit(IMAGES).check(0, &|| Continue(()))?;
    Ok((dataset.train, format!("images of {}", data.display())))
}

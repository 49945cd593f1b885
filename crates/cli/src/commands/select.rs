//! `byol select EMBEDDINGS -n N`

use std::process::ExitCode;

use byol::apply::search::Index;
use serde_json::json;

use super::{CpuArgs, embeddings_args::EmbeddingsArgs};
use crate::terminal::{Result, escape_control, out};

/// Select a diverse subset, for example for labeling
///
/// Each image is the one farthest from all images selected before it (k-center greedy).
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    embeddings: EmbeddingsArgs,
    /// Number of images to select
    #[arg(short, value_name = "N")]
    n: usize,
    #[command(flatten)]
    cpu: CpuArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let embeddings = args.embeddings.read(args.cpu.threads)?;
    let images = embeddings.paths.len();
    if args.n == 0 || args.n > images {
        let path = args.embeddings.path.display();
        return Err(format!("`-n` must be from 1 to {images}, the number of images in {path}").into());
    }
    let (paths, index) = (embeddings.paths, Index::new(embeddings.features));
    let selected = index.select_diverse(args.n);
    if args.cpu.json {
        let selected: Vec<_> = selected
            .iter()
            .map(|(i, cosine)| json!({ "path": paths[*i], "row": i, "nearest_before": cosine }))
            .collect();
        out!("{}", json!({ "rows": images, "selected": selected }));
    } else {
        selected.iter().for_each(|(i, _)| out!("{}", escape_control(&paths[*i])));
    }
    Ok(ExitCode::SUCCESS)
}

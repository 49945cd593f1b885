//! `byol outliers EMBEDDINGS`

use std::process::ExitCode;

use byol::apply::search::Index;
use serde_json::json;

use super::{
    CpuArgs,
    embeddings_args::{EmbeddingsArgs, note_if_approximate, with_share},
};
use crate::terminal::{Result, escape_control, out};

/// Find the images least similar to all others
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    embeddings: EmbeddingsArgs,
    /// Number of results
    #[arg(short, long = "count", value_name = "N", default_value_t = 20)]
    n: usize,
    /// Number of nearest neighbors that each image is compared with
    #[arg(short, long, value_name = "K", default_value_t = 10)]
    k: usize,
    #[command(flatten)]
    cpu: CpuArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.n == 0 || args.k == 0 {
        return Err("`-n` and `-k` must be at least 1".into());
    }
    let embeddings = args.embeddings.read(args.cpu.threads)?;
    let (paths, index) = (embeddings.paths, Index::new(embeddings.features));
    note_if_approximate(paths.len(), paths.len());
    let scores = with_share("comparing", |done| index.outlier_scores(args.k, done));
    let mut order: Vec<usize> = (0..paths.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate(args.n);
    if args.cpu.json {
        let outliers: Vec<_> =
            order.iter().map(|i| json!({ "path": paths[*i], "row": i, "score": scores[*i] })).collect();
        out!("{}", json!({ "rows": paths.len(), "k": args.k, "outliers": outliers }));
    } else {
        order.iter().for_each(|i| out!("{:.3}  {}", scores[*i], escape_control(&paths[*i])));
    }
    Ok(ExitCode::SUCCESS)
}

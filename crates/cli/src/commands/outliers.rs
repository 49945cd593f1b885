//! `byol outliers EMBEDDINGS`

use std::{path::PathBuf, process::ExitCode};

use byol::apply::{row_images::Access, search::Index};
use serde_json::json;

use super::{
    CpuArgs,
    embeddings_args::{EmbeddingsArgs, note_if_approximate, row_images, with_share},
    gallery::{GalleryArgs, Group},
};
use crate::terminal::{Result, escape_control, out, plural};

const EXAMPLES: &str = "\
Examples:
  byol outliers photos.parquet -n 50                 List the 50 most atypical images
  byol outliers photos.parquet --html outliers.html  Also write the images to an HTML page";

/// Find the images least similar to all others
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    embeddings: EmbeddingsArgs,
    /// Number of results
    #[arg(short, long = "count", value_name = "N", default_value_t = 20)]
    n: usize,
    /// Number of nearest neighbors that each image is compared with
    #[arg(short, long, value_name = "K", default_value_t = 10)]
    k: usize,
    /// Folder of the images, if they were moved since they were embedded
    #[arg(long, value_name = "DATA", requires = "html")]
    data: Option<PathBuf>,
    #[command(flatten)]
    gallery: GalleryArgs,
    #[command(flatten)]
    cpu: CpuArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.n == 0 || args.k == 0 {
        return Err("`-n` and `-k` must be at least 1".into());
    }
    args.gallery.check()?;
    let embeddings = args.embeddings.read(args.cpu.threads)?;
    let images = row_images(&embeddings, args.data.as_deref(), Access::AnyFile)?;
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
    let summary = format!("The {} most atypical of {}, most atypical first", order.len(), plural(paths.len(), "image"));
    args.gallery.write("Outliers", &summary, || {
        order.iter().map(|i| Group::single(&images, *i, format!("score {:.3}", scores[*i]))).collect()
    })?;
    Ok(ExitCode::SUCCESS)
}

//! `byol search EMBEDDINGS --image FILE`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use byol::{
    apply::{embeddings::Embeddings, search::Index},
    eval::Features,
    nn::{Encoder, weights},
};
use serde_json::json;

use super::{ComputeArgs, embeddings_args::EmbeddingsArgs, load_encoder, open_device};
use crate::terminal::{self, Result, display_path, out};

const EXAMPLES: &str = "\
Examples:
  byol search photos.parquet --image query.jpg -k 5  Find the 5 most similar images";

/// Find the images most similar to a query image
///
/// Similarity is the cosine of the mean-centered embeddings: 1 for identical images, about 0 for
/// unrelated ones.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    embeddings: EmbeddingsArgs,
    /// Query image
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// Encoder that computed the embeddings [default: the one recorded in them]
    #[arg(long, value_name = "ENCODER")]
    encoder: Option<PathBuf>,
    /// Number of results
    #[arg(short, long, value_name = "K", default_value_t = 10)]
    k: usize,
    #[command(flatten)]
    compute: ComputeArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if args.k == 0 {
        return Err("`-k` must be at least 1".into());
    }
    let embeddings = args.embeddings.read(args.compute.threads)?;
    let encoder = encoder(args, &embeddings)?;
    let query = embed(&encoder, &args.image)?;
    let Embeddings { paths, labels, features, .. } = embeddings;
    let index = Index::new(features);
    let query = index.transform(query);
    let start = Instant::now();
    let nearest = index.nearest(query.row(0), args.k);
    let search_ms = start.elapsed().as_secs_f64() * 1e3;
    let label = |i: usize| labels.as_ref().and_then(|labels| labels[i].clone());
    if args.compute.json {
        let nearest: Vec<_> = nearest
            .iter()
            .map(|(i, cosine)| json!({ "path": paths[*i], "label": label(*i), "row": i, "cosine": cosine }))
            .collect();
        let image = display_path(&args.image);
        out!("{}", json!({ "image": image, "rows": paths.len(), "search_ms": search_ms, "neighbors": nearest }));
    } else {
        for (i, cosine) in nearest {
            let label = label(i).map_or(String::new(), |label| format!("  ({label})"));
            out!("{cosine:.3}  {}{label}", terminal::escape_control(&paths[i]));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Loads the encoder that computed the embeddings.
fn encoder(args: &Args, embeddings: &Embeddings) -> Result<Encoder> {
    let path = args.embeddings.path.display();
    let origin = embeddings.origin.as_ref();
    let encoder = args.encoder.clone().or_else(|| origin.map(|origin| PathBuf::from(&origin.encoder)));
    let encoder = encoder.ok_or_else(|| format!("{path} does not name its encoder\nhint: pass it with `--encoder`"))?;
    let file = weights::resolve(&encoder);
    if origin.is_some_and(|origin| weights::sha256(&file).is_ok_and(|sha256| sha256 != origin.encoder_sha256)) {
        return Err(format!(
            "{path} was computed by another encoder than {}\n\
             hint: pass the right one with `--encoder`, or run `byol embed` again",
            file.display()
        )
        .into());
    }
    let device = open_device(args.compute.device)?.device;
    let encoder = load_encoder(&encoder, &device)
        .map_err(|e| terminal::with_hint(e, "if the encoder was moved, pass its new path with `--encoder`"))?;
    if encoder.features() != embeddings.features.dim {
        return Err(format!(
            "{path} has embeddings of dimension {}, but {} computes {}\n\
             hint: pass the encoder that computed them with `--encoder`",
            embeddings.features.dim,
            file.display(),
            encoder.features()
        )
        .into());
    }
    Ok(encoder)
}

/// Computes the embedding of an image file.
fn embed(encoder: &Encoder, image: &Path) -> Result<Features> {
    let values = encoder.embed_image(image).map_err(|e| {
        terminal::with_hint(
            format!("cannot use {}: {e}", image.display()),
            "pass an image like those that the encoder was trained on",
        )
    })?;
    Ok(Features { n: 1, dim: values.len(), values })
}

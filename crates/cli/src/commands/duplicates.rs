//! `byol duplicates EMBEDDINGS [OTHER]`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::apply::{duplicates, embeddings::Embeddings, search::Index};
use serde_json::json;

use super::{
    CpuArgs,
    embeddings_args::{EmbeddingsArgs, note_if_approximate, with_share},
};
use crate::terminal::{self, Result, escape_control, out, plural};

/// Find near-duplicate images
///
/// Prints groups of near-duplicates within one set, or pairs across two sets. With the embeddings
/// of the test set as OTHER, the pairs are test images that leaked into the training set.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    embeddings: EmbeddingsArgs,
    /// Embeddings of a second set, computed by the same encoder
    other: Option<PathBuf>,
    /// Maximum distance of two near-duplicates, relative to their distance to their tenth nearest
    /// neighbors: from 0 (identical) to below 1
    #[arg(long, value_name = "SHARE", default_value_t = duplicates::THRESHOLD, allow_negative_numbers = true)]
    threshold: f32,
    #[command(flatten)]
    cpu: CpuArgs,
}

/// Images below which the tenth nearest neighbor is not near.
const FEW_IMAGES: usize = 100;

pub fn run(args: &Args) -> Result<ExitCode> {
    if !(0.0..1.0).contains(&args.threshold) {
        return Err(format!(
            "invalid `--threshold` {} (expected at least 0 and below 1)\nhint: the default is {}",
            args.threshold,
            duplicates::THRESHOLD
        )
        .into());
    }
    let embeddings = args.embeddings.read(args.cpu.threads)?;
    match &args.other {
        None => within(args, embeddings),
        Some(other) => across(args, embeddings, other),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// Prints the groups of near-duplicates of one set.
fn within(args: &Args, embeddings: Embeddings) -> Result<()> {
    let (paths, index) = (embeddings.paths, Index::new(embeddings.features));
    if paths.len() < FEW_IMAGES {
        terminal::warning(format!(
            "only {}: the threshold is unreliable for small sets\nhint: check the results by eye",
            plural(paths.len(), "image")
        ));
    }
    note_if_approximate(paths.len(), paths.len());
    let pairs = with_share("comparing", |done| duplicates::within(&index, args.threshold, done));
    let groups = duplicates::groups(paths.len(), &pairs);
    if args.cpu.json {
        let groups: Vec<Vec<&String>> = groups.iter().map(|group| group.iter().map(|i| &paths[*i]).collect()).collect();
        out!("{}", json!({ "rows": paths.len(), "threshold": args.threshold, "pairs": pairs.len(), "groups": groups }));
        return Ok(());
    }
    for group in &groups {
        for (i, row) in group.iter().enumerate() {
            out!("{}{}", if i == 0 { "" } else { "  = " }, escape_control(&paths[*row]));
        }
    }
    let redundant: usize = groups.iter().map(|group| group.len() - 1).sum();
    terminal::note(format!(
        "{}, {} of {}",
        plural(groups.len(), "group"),
        plural(redundant, "redundant image"),
        paths.len()
    ));
    Ok(())
}

/// Prints the pairs of near-duplicates across two sets.
fn across(args: &Args, first: Embeddings, other: &Path) -> Result<()> {
    let second = Embeddings::open(other)?;
    must_be_comparable(args, &first, &second, other)?;
    let (paths, index) = (first.paths, Index::new(first.features));
    let rows = index.transform(second.features);
    note_if_approximate(paths.len(), rows.n);
    let pairs = with_share("comparing", |done| duplicates::across(&index, &rows, args.threshold, done));
    if args.cpu.json {
        let pairs: Vec<_> = pairs
            .iter()
            .map(|p| json!({ "first": paths[p.a], "second": second.paths[p.b], "share": p.relative_distance }))
            .collect();
        out!("{}", json!({ "rows": [paths.len(), second.paths.len()], "threshold": args.threshold, "pairs": pairs }));
        return Ok(());
    }
    for pair in &pairs {
        let (first, second) = (escape_control(&paths[pair.a]), escape_control(&second.paths[pair.b]));
        out!("{:.3}  {first}  =  {second}", pair.relative_distance);
    }
    let mut leaked: Vec<usize> = pairs.iter().map(|pair| pair.b).collect();
    leaked.sort_unstable();
    leaked.dedup();
    terminal::note(format!(
        "{} of {} images of the second set are also in the first",
        leaked.len(),
        second.paths.len()
    ));
    Ok(())
}

/// Refuses embeddings of different encoders.
fn must_be_comparable(args: &Args, first: &Embeddings, second: &Embeddings, other: &Path) -> Result<()> {
    let encoder = |embeddings: &Embeddings| embeddings.origin.as_ref().map(|origin| origin.encoder_sha256.clone());
    let differ = matches!((encoder(first), encoder(second)), (Some(a), Some(b)) if a != b);
    if differ || first.features.dim != second.features.dim {
        return Err(format!(
            "{} and {} were computed by different encoders\nhint: embed both sets with the same encoder",
            args.embeddings.path.display(),
            other.display()
        )
        .into());
    }
    Ok(())
}

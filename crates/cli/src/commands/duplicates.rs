//! `byol duplicates EMBEDDINGS [OTHER]`

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::apply::{
    duplicates::{self, Pair},
    embeddings::Embeddings,
    row_images::{Access, RowImages},
    search::Index,
};
use serde_json::json;

use super::{
    CpuArgs,
    embeddings_args::{EmbeddingsArgs, note_if_approximate, pair_json, read_signatures, row_images, with_share},
    gallery::{GalleryArgs, Group},
};
use crate::terminal::{self, Result, escape_control, out, plural};

const EXAMPLES: &str = "\
Examples:
  byol duplicates photos.parquet                    Find near-duplicates in one set
  byol duplicates train.parquet test.parquet        Find test images that are in the training set
  byol duplicates photos.parquet --html pairs.html  Also write the images to an HTML page";

/// Find near-duplicate images
///
/// Prints groups of near-duplicates within one set, or pairs across two sets. With the embeddings
/// of the test set as OTHER, the pairs are test images that leaked into the training set.
///
/// Near-duplicates are altered copies of one image: re-encoded, resized, cropped, mirrored,
/// brighter or darker. Embeddings and thumbnails propose pairs, which are confirmed by comparing
/// pixels. Pairs of images that cannot be read are found by their embeddings alone and marked as
/// unverified.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    embeddings: EmbeddingsArgs,
    /// Embeddings of a second set, computed by the same encoder
    other: Option<PathBuf>,
    /// Maximum distance of the embeddings of a pair, relative to their distance to their tenth
    /// nearest neighbors: from 0 (identical) to below 1 [default: no maximum, but 0.5 for images
    /// that cannot be read]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    threshold: Option<f32>,
    /// Folder of the images, if they were moved since they were embedded
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,
    /// Folder of the images of OTHER, if they were moved
    #[arg(long, value_name = "DATA", requires = "other")]
    other_data: Option<PathBuf>,
    #[command(flatten)]
    gallery: GalleryArgs,
    #[command(flatten)]
    cpu: CpuArgs,
}

/// Images below which the tenth nearest neighbor is not near.
const FEW_IMAGES: usize = 100;

pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(threshold) = args.threshold.filter(|threshold| !(0.0..1.0).contains(threshold)) {
        return Err(format!(
            "invalid `--threshold` {threshold} (expected at least 0 and below 1)\n\
             hint: leave it out to report all pairs that are confirmed by their pixels"
        )
        .into());
    }
    args.gallery.check()?;
    let embeddings = args.embeddings.read(args.cpu.threads)?;
    match &args.other {
        None => within(args, embeddings),
        Some(other) => across(args, embeddings, other),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// Warns that the embeddings of a small set decide on unverified pairs.
fn warn_if_few(images: usize, pairs: &[Pair]) {
    if images < FEW_IMAGES && pairs.iter().any(|pair| pair.evidence.is_none()) {
        terminal::warning(format!(
            "only {}: unverified pairs are unreliable in small sets\nhint: check the results by eye",
            plural(images, "image")
        ));
    }
}

/// Number of pairs found by their embeddings alone.
fn unverified(pairs: &[Pair]) -> usize {
    pairs.iter().filter(|pair| pair.evidence.is_none()).count()
}

/// Suffix of the summary line: how the pairs are verified.
pub fn how_verified(pairs: &[Pair]) -> String {
    match (unverified(pairs), pairs.len()) {
        (_, 0) => String::new(),
        (0, _) => ", verified by pixel comparison".into(),
        (n, _) => format!(", {} unverified", plural(n, "pair")),
    }
}

/// Prints the groups of near-duplicates of one set.
fn within(args: &Args, embeddings: Embeddings) -> Result<()> {
    let images = row_images(&embeddings, args.data.as_deref(), Access::AnyFile)?;
    let (paths, index) = (embeddings.paths, Index::new(embeddings.features));
    note_if_approximate(paths.len(), paths.len());
    let signatures = read_signatures(&images, "--data")?;
    let pairs = with_share("comparing", |done| duplicates::within(&index, &signatures, args.threshold, done));
    let groups = duplicates::groups(paths.len(), &pairs);
    warn_if_few(paths.len(), &pairs);
    let redundant: usize = groups.iter().map(|group| group.len() - 1).sum();
    let summary = format!(
        "{}, {} of {}{}",
        plural(groups.len(), "group"),
        plural(redundant, "redundant image"),
        paths.len(),
        how_verified(&pairs)
    );
    if args.cpu.json {
        let named: Vec<Vec<&String>> = groups.iter().map(|group| group.iter().map(|i| &paths[*i]).collect()).collect();
        let evidence: Vec<_> = pairs.iter().map(|p| pair_json(p, &paths[p.a], &paths[p.b])).collect();
        out!(
            "{}",
            json!({
                "rows": paths.len(), "threshold": args.threshold, "pairs": pairs.len(),
                "unverified": unverified(&pairs), "groups": named, "evidence": evidence,
            })
        );
    } else {
        for group in &groups {
            for (i, row) in group.iter().enumerate() {
                out!("{}{}", if i == 0 { "" } else { "  = " }, escape_control(&paths[*row]));
            }
        }
        terminal::note(&summary);
    }
    args.gallery.write("Near-duplicates", &summary, || groups_of(&images, &groups, &pairs))
}

/// Groups of one set, each with the evidence of its pairs.
fn groups_of<'a>(images: &'a RowImages, groups: &[Vec<usize>], pairs: &[Pair]) -> Vec<Group<'a>> {
    let number: HashMap<usize, usize> =
        groups.iter().enumerate().flat_map(|(n, group)| group.iter().map(move |row| (*row, n))).collect();
    let mut evidence: Vec<BTreeSet<String>> = vec![BTreeSet::new(); groups.len()];
    for pair in pairs {
        if let Some(n) = number.get(&pair.a) {
            evidence[*n].insert(describe_evidence(pair));
        }
    }
    let captions = evidence.into_iter().map(|evidence| evidence.into_iter().collect::<Vec<_>>().join("; "));
    let group = |(group, caption): (&Vec<usize>, String)| Group {
        images: group.iter().map(|row| (images, *row)).collect(),
        caption,
    };
    groups.iter().zip(captions).map(group).collect()
}

/// Evidence that two images are near-duplicates.
fn describe_evidence(pair: &Pair) -> String {
    pair.evidence.map_or("unverified".into(), |evidence| evidence.describe())
}

/// Prints the pairs of near-duplicates across two sets.
fn across(args: &Args, first: Embeddings, other: &Path) -> Result<()> {
    let second = Embeddings::open(other)?;
    must_be_comparable(args, &first, &second, other)?;
    let images = [
        row_images(&first, args.data.as_deref(), Access::AnyFile)?,
        row_images(&second, args.other_data.as_deref(), Access::AnyFile)?,
    ];
    let (paths, index) = (first.paths, Index::new(first.features));
    let rows = index.transform(second.features);
    note_if_approximate(paths.len(), rows.n);
    let signatures = [read_signatures(&images[0], "--data")?, read_signatures(&images[1], "--other-data")?];
    let pairs = with_share("comparing", |done| {
        duplicates::across(&index, &rows, [&signatures[0], &signatures[1]], args.threshold, done)
    });
    warn_if_few(paths.len(), &pairs);
    let mut leaked: Vec<usize> = pairs.iter().map(|pair| pair.b).collect();
    leaked.sort_unstable();
    leaked.dedup();
    let summary = format!(
        "{} of {} images of the second set are also in the first{}",
        leaked.len(),
        second.paths.len(),
        how_verified(&pairs)
    );
    if args.cpu.json {
        let described: Vec<_> = pairs.iter().map(|p| pair_json(p, &paths[p.a], &second.paths[p.b])).collect();
        out!(
            "{}",
            json!({
                "rows": [paths.len(), second.paths.len()], "threshold": args.threshold,
                "unverified": unverified(&pairs), "pairs": described,
            })
        );
    } else {
        for pair in &pairs {
            let (first, second) = (escape_control(&paths[pair.a]), escape_control(&second.paths[pair.b]));
            let evidence = describe_evidence(pair);
            out!("{:.3}  {first}  =  {second}  ({evidence})", pair.relative_distance);
        }
        terminal::note(&summary);
    }
    let group = |pair: &Pair| Group {
        images: vec![(&images[0], pair.a), (&images[1], pair.b)],
        caption: describe_evidence(pair),
    };
    args.gallery.write("Near-duplicates", &summary, || pairs.iter().map(group).collect())
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

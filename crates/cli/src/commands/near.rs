//! `byol search`, `byol duplicates`, `byol outliers`, `byol select`: what one does with embeddings. What they share is here.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use byol::{
    apply::{duplicates, embeddings::Embeddings, neighbours, search::Index},
    data::decode,
    eval::Features,
    nn::weights,
    views::evaluation_view,
};
use serde_json::json;

use super::{On, Work};
use crate::report::{self, Result, out, shown};

/// Find the images most like a given one
///
/// Likeness is the cosine of the embeddings, after the mean of the set is taken away: 1 is the same, 0 unrelated.
#[derive(Debug, clap::Args)]
pub struct Search {
    /// What `byol embed` wrote
    embeddings: PathBuf,
    /// The image to look for
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// The encoder that made the embeddings [default: the one that they name]
    #[arg(long, value_name = "ENCODER")]
    encoder: Option<PathBuf>,
    /// How many
    #[arg(short, value_name = "K", default_value_t = 10)]
    k: usize,
    #[command(flatten)]
    on: On,
}

/// Find images that are nearly the same
///
/// In groups of one set, or in pairs across two sets: with the embeddings of a test set as the second, what has leaked from train to test.
#[derive(Debug, clap::Args)]
pub struct Duplicates {
    /// What `byol embed` wrote
    embeddings: PathBuf,
    /// A second set, embedded by the same encoder
    other: Option<PathBuf>,
    /// How much nearer to each other than to what is around: their distance as a share of that to their tenth neighbours, from 0 (the
    /// same) to below 1
    #[arg(long, value_name = "SHARE", default_value_t = duplicates::SHARE, allow_negative_numbers = true)]
    threshold: f32,
    #[command(flatten)]
    work: Work,
}

/// Find the images that are least like all others
#[derive(Debug, clap::Args)]
pub struct Outliers {
    /// What `byol embed` wrote
    embeddings: PathBuf,
    /// How many to show
    #[arg(short, value_name = "N", default_value_t = 20)]
    n: usize,
    /// Nearest others that an image is compared with
    #[arg(short, value_name = "K", default_value_t = 10)]
    k: usize,
    #[command(flatten)]
    work: Work,
}

/// Choose a varied subset, for example to label
///
/// Each image is the one farthest from all that were chosen before it (k-center greedy).
#[derive(Debug, clap::Args)]
pub struct Select {
    /// What `byol embed` wrote
    embeddings: PathBuf,
    /// How many
    #[arg(short, value_name = "N")]
    n: usize,
    #[command(flatten)]
    work: Work,
}

fn opened(path: &Path, threads: usize) -> Result<Embeddings> {
    super::set_threads(threads)?;
    Ok(Embeddings::open(path)?)
}

pub fn search(args: &Search) -> Result<ExitCode> {
    if args.k == 0 {
        return Err("-k must be at least 1".into());
    }
    let found = opened(&args.embeddings, args.on.threads)?;
    let of = found.origin.as_ref();
    let encoder = args.encoder.clone().or_else(|| of.map(|o| PathBuf::from(&o.encoder)));
    let encoder = encoder
        .ok_or_else(|| format!("{} does not name its encoder; give it by --encoder", args.embeddings.display()))?;
    let file = weights::resolve(&encoder);
    if of.is_some_and(|of| weights::sha256(&file).is_ok_and(|sha| sha != of.encoder_sha256)) {
        return Err(format!(
            "{} was made by another encoder than {}; give the right one by --encoder, or embed the images again",
            args.embeddings.display(),
            file.display()
        )
        .into());
    }
    let opened = super::open(args.on.device)?;
    let encoder = super::encoder(&encoder, &opened.device)
        .map_err(|e| format!("{e}; or, if it has moved, say where it is by --encoder"))?;
    if encoder.features() != found.features.dim {
        return Err(format!(
            "{} holds vectors of {} numbers, but {} makes {}; give the encoder that made them by --encoder",
            args.embeddings.display(),
            found.features.dim,
            file.display(),
            encoder.features()
        )
        .into());
    }
    let image = decode::file(&args.image).map_err(|e| {
        format!("cannot use {}: {e}; give a JPEG, PNG, WebP, BMP, GIF or TIFF file", args.image.display())
    })?;
    let spec = &encoder.spec;
    let query = encoder.embed_one(&evaluation_view(&image, spec.size, spec.center).interleaved());
    let Embeddings { paths, labels, features, .. } = found;
    let index = Index::new(features);
    let query = index.map(Features { n: 1, dim: query.len(), values: query });
    let began = std::time::Instant::now();
    let near = index.nearest(query.row(0), args.k);
    let ms = began.elapsed().as_secs_f64() * 1e3;
    let label = |i: usize| labels.as_ref().map(|l| l[i].clone());
    if args.on.json {
        let near: Vec<_> =
            near.iter().map(|(i, c)| json!({ "path": paths[*i], "label": label(*i), "row": i, "cosine": c })).collect();
        out!("{}", json!({ "image": shown(&args.image), "rows": paths.len(), "search_ms": ms, "neighbours": near }));
    } else {
        for (i, cosine) in near {
            out!("{cosine:.3}  {}{}", report::plain(&paths[i]), label(i).map_or(String::new(), |l| format!("  ({l})")));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A bar for work that tells its share.
fn shared<T>(what: &str, work: impl FnOnce(&mut dyn FnMut(f64)) -> T) -> T {
    report::counted(what, |progress| work(&mut |share| progress((1000.0 * share) as u64, 1000)))
}

fn say_how(bank: usize, queries: usize) {
    if neighbours::approximate(bank, queries) {
        report::note("more than a million millions of comparisons: by a graph of neighbours, which may miss a few");
    }
}

pub fn duplicates(args: &Duplicates) -> Result<ExitCode> {
    if !(0.0..1.0).contains(&args.threshold) {
        let usual = duplicates::SHARE;
        return Err(format!(
            "--threshold is a share from 0 to below 1, not {}; the usual one is {usual}",
            args.threshold
        )
        .into());
    }
    let found = opened(&args.embeddings, args.work.threads)?;
    let Some(other) = &args.other else {
        let (paths, index) = (found.paths, Index::new(found.features));
        if paths.len() < 100 {
            report::warning(format!(
                "{} are few: the tenth neighbour, by whose distance others are called near, is hardly a neighbour; look at what is found",
                report::counted_noun(paths.len(), "image")
            ));
        }
        say_how(paths.len(), paths.len());
        let pairs = shared("comparing", |done| duplicates::within(&index, args.threshold, done));
        let groups = duplicates::groups(paths.len(), &pairs);
        if args.work.json {
            let named: Vec<Vec<&String>> = groups.iter().map(|g| g.iter().map(|i| &paths[*i]).collect()).collect();
            out!(
                "{}",
                json!({ "rows": paths.len(), "threshold": args.threshold, "pairs": pairs.len(), "groups": named })
            );
        } else {
            for group in &groups {
                for (i, row) in group.iter().enumerate() {
                    out!("{}{}", if i == 0 { "" } else { "  = " }, report::plain(&paths[*row]));
                }
            }
            let extra: usize = groups.iter().map(|g| g.len() - 1).sum();
            let groups = report::counted_noun(groups.len(), "group");
            report::note(format!("{groups}, {extra} images more than needed, of {}", paths.len()));
        }
        return Ok(ExitCode::SUCCESS);
    };
    let second = Embeddings::open(other)?;
    let names = |o: &Embeddings| o.origin.as_ref().map(|o| o.encoder_sha256.clone());
    let differ = matches!((names(&found), names(&second)), (Some(a), Some(b)) if a != b);
    if differ || found.features.dim != second.features.dim {
        return Err(format!(
            "{} and {} are of different encoders; embed both by the same",
            args.embeddings.display(),
            other.display()
        )
        .into());
    }
    let (paths, index) = (found.paths, Index::new(found.features));
    let rows = index.map(second.features);
    say_how(paths.len(), rows.n);
    let pairs = shared("comparing", |done| duplicates::across(&index, &rows, args.threshold, done));
    if args.work.json {
        let pairs: Vec<_> = pairs
            .iter()
            .map(|p| json!({ "first": paths[p.a], "second": second.paths[p.b], "share": p.share }))
            .collect();
        out!("{}", json!({ "rows": [paths.len(), second.paths.len()], "threshold": args.threshold, "pairs": pairs }));
    } else {
        for pair in &pairs {
            out!("{:.3}  {}  =  {}", pair.share, report::plain(&paths[pair.a]), report::plain(&second.paths[pair.b]));
        }
        let mut leaked: Vec<usize> = pairs.iter().map(|p| p.b).collect();
        leaked.sort_unstable();
        leaked.dedup();
        report::note(format!("{} of {} images of the second set are in the first", leaked.len(), second.paths.len()));
    }
    Ok(ExitCode::SUCCESS)
}

pub fn outliers(args: &Outliers) -> Result<ExitCode> {
    if args.n == 0 || args.k == 0 {
        return Err("-n and -k must be at least 1".into());
    }
    let found = opened(&args.embeddings, args.work.threads)?;
    let (paths, index) = (found.paths, Index::new(found.features));
    say_how(paths.len(), paths.len());
    let scores = shared("comparing", |done| index.outlier_scores(args.k, done));
    let mut order: Vec<usize> = (0..paths.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate(args.n);
    if args.work.json {
        let all: Vec<_> = order.iter().map(|i| json!({ "path": paths[*i], "row": i, "score": scores[*i] })).collect();
        out!("{}", json!({ "rows": paths.len(), "k": args.k, "outliers": all }));
    } else {
        order.iter().for_each(|i| out!("{:.3}  {}", scores[*i], report::plain(&paths[*i])));
    }
    Ok(ExitCode::SUCCESS)
}

pub fn select(args: &Select) -> Result<ExitCode> {
    let found = opened(&args.embeddings, args.work.threads)?;
    let all = found.paths.len();
    if args.n == 0 || args.n > all {
        return Err(format!("-n is from 1 to the {all} images of {}", args.embeddings.display()).into());
    }
    let (paths, index) = (found.paths, Index::new(found.features));
    let chosen = index.varied(args.n);
    if args.work.json {
        let rows: Vec<_> =
            chosen.iter().map(|(i, c)| json!({ "path": paths[*i], "row": i, "nearest_before": c })).collect();
        out!("{}", json!({ "rows": all, "selected": rows }));
    } else {
        chosen.iter().for_each(|(i, _)| out!("{}", report::plain(&paths[*i])));
    }
    Ok(ExitCode::SUCCESS)
}

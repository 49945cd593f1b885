//! `byol report RUN -o report.html`: a run as one self-contained HTML file.

use std::{
    fmt::Write,
    fs,
    ops::ControlFlow::Continue,
    path::{Path, PathBuf},
    process::ExitCode,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use byol::{
    Encoder,
    apply::{
        chart::{self, escape_html},
        duplicates::{self, Pair},
        map::{self, Method},
        same_image::Signature,
        search::Index,
        sheet::{self, Tile},
    },
    data::{self, Dataset, Images},
    device,
    eval::{
        embed,
        label_free::Comparison,
        results::{self, ResultRow},
    },
    random,
    train::{
        Plan,
        data::cache_bytes,
        health::{Health, Verdict},
        metrics::{self, Curves},
        run::read_plan,
    },
};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::{
    ComputeArgs, data_args,
    duplicates::how_verified,
    embeddings_args::with_share,
    eval::{PICTURE_COLUMNS, side_by_side},
    must_be_new, views,
};
use crate::terminal::{self, Result, display_path, duration, out, percent, plural};

const EXAMPLES: &str = "\
Examples:
  byol report byol-runs/photos -o photos.html  Write a report of a run";

/// Write an HTML report of a run
///
/// Contains a summary of the metrics, training curves, augmented views, nearest neighbors of random
/// images, near-duplicates, a map, the evaluations stored in the run folder, and the plan. One
/// self-contained file.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Run folder
    run: PathBuf,
    /// Output file (.html)
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
    /// Folder of the images, if they were moved since the run started
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,
    /// Maximum number of images to embed for neighbors and the map, sampled evenly (0: all)
    #[arg(long, value_name = "N", default_value_t = 2000)]
    limit: usize,
    /// Random seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Overwrite FILE if it exists
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Side of a tile in pixels.
const TILE_SIDE: u32 = 88;

/// Number of random images whose nearest neighbors are shown, and of neighbors per image.
const QUERIES: usize = 8;
const NEIGHBORS: usize = 9;

/// Maximum number of pairs of near-duplicates that are shown.
const PAIRS: usize = 12;

/// Frame colors of a query image and of neighbors of the same and of another class.
const BLUE: [u8; 3] = [60, 90, 220];
const GREEN: [u8; 3] = [40, 170, 70];
const RED: [u8; 3] = [210, 60, 50];

const STYLE: &str = include_str!("report.css");

pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(folder) = args.out.parent().filter(|f| !f.as_os_str().is_empty() && !f.is_dir()) {
        let folder = folder.display();
        return Err(format!("folder {folder} does not exist\nhint: create it, or choose another `--out`").into());
    }
    let plan = read_plan(&args.run)?;
    must_be_new(&args.out, args.overwrite)?;
    let encoder = args.compute.load_encoder(&args.run)?;
    let dataset = data_args::open_moved(args.data.as_ref().unwrap_or(&plan.data), &plan)?;
    let dataset = Dataset { held_out: None, test: None, ..dataset }.limit(args.limit);
    let bar = terminal::progress_bar("embedding", dataset.train.len() as u64);
    let dataset = dataset.check(cache_bytes(device::machine().free_mb), &|| Continue(()))?;
    let features = embed(&encoder, &dataset.train, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    let index = Index::new(features);

    let Curves { epochs, loss } = metrics::read_curves(&args.run.join("metrics.jsonl"));
    let epochs_done = epochs.last().and_then(|e| e["epoch"].as_u64()).unwrap_or(0);
    let mut html = head(&args.run, &plan, &encoder, epochs_done, metrics::total_seconds(&epochs));
    html += "<h2>Summary</h2>\n";
    html += &summary(&plan, &args.run, &epochs);
    html += "<h2>Training curves</h2>\n<div class=\"grid\">";
    html += &curves(loss, &epochs);
    html +=
        "</div>\n<h2>Augmented views</h2>\n<p>Each row: a training image and two pairs of its augmented views.</p>\n";
    html += &picture("training images and their augmented views", &views_sheet(&plan, &dataset.train)?);
    let images = plural(index.len(), "image");
    let frames = if dataset.classes.is_empty() {
        ""
    } else {
        " A green frame marks a neighbor of the same class, a red frame one of another class."
    };
    write!(
        html,
        "<h2>Nearest neighbors</h2>\n\
         <p>Each row: a random image (blue frame) and its nearest neighbors among {images}.{frames}</p>\n"
    )?;
    html += &picture("random images and their nearest neighbors", &neighbors_sheet(args.seed, &index, &dataset)?);
    html += "<h2>Near-duplicates</h2>\n";
    html += &near_duplicates(&index, &dataset.train)?;
    html += "<h2>Map</h2>\n<p>Each dot is an image. Similar images lie close together (t-SNE).</p>\n";
    let coordinates = terminal::with_progress("computing map", |progress| map::layout(&index, Method::Tsne, progress));
    html += &chart::scatter(&coordinates, dataset.train.labels().unwrap_or_default(), &dataset.classes);
    html += "<h2>Evaluations</h2>\n";
    html += &evaluations(&args.run);
    html += "<h2>Plan</h2>\n<p>All settings of the run. The same settings and data reproduce it.</p>\n";
    write!(
        html,
        "<details><summary>plan.toml</summary><pre>{}</pre></details>\n</body></html>\n",
        escape_html(&plan.to_toml())
    )?;
    super::write_file(&args.out, html.as_bytes())?;
    terminal::note(format!("wrote {} ({} KiB)", args.out.display(), html.len() >> 10));
    if args.compute.json {
        let file = display_path(&args.out);
        let results = json!({ "file": file, "bytes": html.len(), "images": index.len(), "epochs": epochs_done });
        out!("{results}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Start of the page: title, and a sentence on the run.
fn head(run: &Path, plan: &Plan, encoder: &Encoder, epochs_done: u64, seconds: f64) -> String {
    let name = run.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
    let spec = &encoder.spec;
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>byol: {0}</title><style>{STYLE}</style></head><body>\n<h1>{0}</h1>\n\
         <p>{1} (width {2}, {3} features), pretrained on {4} from <span class=\"dim\">{5}</span>: \
         {epochs_done} of {6} in {7} on {8}.</p>\n",
        escape_html(&name),
        spec.architecture.name(),
        spec.width,
        encoder.features(),
        plural(plan.images, "image"),
        escape_html(&plan.data.display().to_string()),
        plural(plan.recipe.train.epochs as usize, "epoch"),
        duration(seconds),
        escape_html(&plan.device)
    )
}

/// An image element that contains its PNG.
pub fn picture(alt: &str, png: &[u8]) -> String {
    format!("<img alt=\"{}\" src=\"data:image/png;base64,{}\">\n", escape_html(alt), STANDARD.encode(png))
}

/// Returns the main results as paragraphs, each with a CSS class: `good`, `bad` or none.
fn summary(plan: &Plan, run: &Path, epochs: &[Value]) -> String {
    let health = metrics::read_health(&run.join("metrics.jsonl"));
    let mut paragraphs = Vec::new();
    let failure = epochs.iter().rev().find_map(|e| Some((e["epoch"].as_u64()?, e["collapse"].as_str()?)));
    if let Some((epoch, reason)) = failure {
        paragraphs.push(("bad", format!("Health check failed in epoch {epoch}: {reason}.")));
    }
    if let [first, .., last] = health.as_slice() {
        let baseline = plan.baseline_name();
        let class = |comparison| if comparison == Comparison::Better { "good" } else { "bad" };
        if let Some(verdict) = Verdict::new(first, last, baseline) {
            paragraphs.push((class(verdict.comparison), format!("At the end of the run: {}.", verdict.text)));
        }
        if let (Some(_), Some(before), Some(after)) = (last.knn, first.label_free, last.label_free) {
            let text = format!("Label-free metrics: {}.", after.verdict(&before, baseline));
            paragraphs.push((class(after.compare(&before)), text));
        }
        paragraphs.push(("", projection_summary(last)));
    } else {
        paragraphs.push(("bad", "No metrics yet: no healthy epoch has finished.".into()));
    }
    paragraphs.iter().map(|(class, text)| format!("<p class=\"{class}\">{}</p>\n", escape_html(text))).collect()
}

fn projection_summary(last: &Health) -> String {
    format!(
        "Projections of different images have a mean cosine of {:.2} (0 if uniform, 1 if collapsed) and {:.0} % of the \
         standard deviation of a uniform distribution. The effective rank of the representations (RankMe) is {:.0}.",
        last.projection_cosine,
        100.0 * last.projection_std / last.projection_std_ideal,
        last.rankme
    )
}

fn curves(loss: Vec<[f64; 2]>, epochs: &[Value]) -> String {
    let metric = |key: &str, factor: f64| -> Vec<[f64; 2]> {
        epochs.iter().filter_map(|e| Some([e["epoch"].as_f64()?, factor * e[key].as_f64()?])).collect()
    };
    [
        ("Loss", loss),
        ("kNN accuracy (%)", metric("knn", 100.0)),
        ("RankMe", metric("rankme", 1.0)),
        ("Projection std", metric("projection_std", 1.0)),
        ("Mean cosine of projections", metric("projection_cosine", 1.0)),
    ]
    .iter()
    .filter(|(_, points)| points.len() > 1)
    .map(|(title, points)| chart::curve(title, "epoch", points))
    .collect()
}

/// A row per image: the image and the views of its first two epochs.
fn views_sheet(plan: &Plan, images: &Images) -> Result<Vec<u8>> {
    let rows = views::rows(&plan.recipe, &images.sample_random(4), plan.recipe.seed, TILE_SIDE)?;
    Ok(sheet::png(&rows, TILE_SIDE))
}

/// A row per random image: the image and its nearest neighbors, in green or red frames if there are
/// classes.
fn neighbors_sheet(seed: u64, index: &Index, dataset: &Dataset) -> Result<Vec<u8>> {
    let (images, n) = (&dataset.train, index.len());
    let mut rng = random::stream(&[seed, 29]);
    let mut rows = Vec::new();
    for _ in 0..QUERIES.min(n) {
        let query = ((random::uniform(&mut rng) * n as f64) as usize).min(n - 1);
        let mut row = vec![Tile::image(&*images.get(query)?, TILE_SIDE).framed(BLUE)];
        let nearest = index.nearest(index.rows().row(query), NEIGHBORS + 1);
        for (i, _) in nearest.into_iter().filter(|(i, _)| *i != query).take(NEIGHBORS) {
            let tile = Tile::image(&*images.get(i)?, TILE_SIDE);
            row.push(match images.labels() {
                Some(labels) if labels[i] == labels[query] => tile.framed(GREEN),
                Some(_) => tile.framed(RED),
                None => tile,
            });
        }
        rows.push(row);
    }
    Ok(sheet::png(&rows, TILE_SIDE))
}

/// Near-duplicates among the images, with the evidence of their pixels.
fn near_duplicates(index: &Index, images: &Images) -> Result<String> {
    let signature = |i: usize| match images.get(i) {
        Ok(image) => Ok(Some(Signature::new(&image))),
        Err(data::Error::Image { .. }) => Ok(None),
        Err(error) => Err(error),
    };
    let signatures = (0..images.len()).into_par_iter().map(signature).collect::<std::result::Result<Vec<_>, _>>()?;
    let pairs = with_share("finding near-duplicates", |done| duplicates::within(index, &signatures, None, done));
    let groups = duplicates::groups(index.len(), &pairs);
    if groups.is_empty() {
        return Ok(format!("<p>No near-duplicates among {}.</p>\n", plural(index.len(), "image")));
    }
    let redundant: usize = groups.iter().map(|group| group.len() - 1).sum();
    let readable = pairs.iter().filter(|pair| signatures[pair.a].is_some() && signatures[pair.b].is_some());
    let shown: Vec<&Pair> = readable.take(PAIRS).collect();
    let mut html = format!(
        "<p>{} of near-duplicates among {}{}: {}. {} of {} pairs:</p>\n<div class=\"grid\">",
        plural(groups.len(), "group"),
        plural(index.len(), "image"),
        how_verified(&pairs),
        plural(redundant, "redundant image"),
        shown.len(),
        pairs.len()
    );
    for pair in shown {
        let tiles = vec![Tile::image(&*images.get(pair.a)?, TILE_SIDE), Tile::image(&*images.get(pair.b)?, TILE_SIDE)];
        html += &format!(
            "<figure>{}<figcaption class=\"dim\">{}<br>{}<br>{}</figcaption></figure>\n",
            picture("two near-duplicates", &sheet::png(&[tiles], TILE_SIDE)),
            escape_html(&images.name(pair.a)),
            escape_html(&images.name(pair.b)),
            escape_html(&pair.evidence.map(|evidence| evidence.describe()).unwrap_or_default())
        );
    }
    Ok(html + "</div>\n")
}

/// Returns a table for each evaluation stored in the run folder.
fn evaluations(run: &Path) -> String {
    let tables = results::stored(run);
    if tables.is_empty() {
        return "<p>None yet. <code>byol eval knn RUN DATA</code> adds one.</p>\n".into();
    }
    let mut html = String::new();
    for (file, table) in tables {
        let (evaluation, data) = (escape_html(&table.evaluation), escape_html(&table.data));
        html += &format!("<h3>{evaluation}</h3><p class=\"dim\">{data}</p>\n");
        html += &result_rows(&table.rows);
        html += &classes(&table.details["confusion"]);
        if let Ok(png) = fs::read(file.with_extension("png")) {
            html += &format!("<p>Each row: {PICTURE_COLUMNS}.</p>\n");
            html += &picture("predictions on test images", &png);
        }
    }
    html
}

/// Table of results, those of the encoder beside those of its random initialization.
fn result_rows(rows: &[ResultRow]) -> String {
    let paired = side_by_side(rows, |row| &row.name);
    let cells = |row: Option<&ResultRow>| match row {
        Some(row) => {
            let (value, interval) = (row.formatted_value(), row.formatted_interval());
            format!("<td class=\"n\">{value}</td><td class=\"dim\">{interval}</td>")
        }
        None => "<td></td><td></td>".into(),
    };
    let has_baseline = paired.iter().any(|(.., random)| random.is_some());
    let mut html = String::from("<table>\n");
    if has_baseline {
        html += "<tr><th></th><th colspan=\"2\">this encoder</th><th colspan=\"2\">random initialization</th></tr>\n";
    }
    for (name, own, random) in paired {
        let random = if has_baseline { cells(random) } else { String::new() };
        html += &format!("<tr><td>{}</td>{}{random}</tr>\n", escape_html(name), cells(own));
    }
    html + "</table>\n"
}

/// Accuracy of each class, and the class that it is most often taken for.
fn classes(confusion: &Value) -> String {
    let Some(names) = confusion["classes"].as_array() else { return String::new() };
    let name = |i: usize| escape_html(names[i].as_str().unwrap_or_default());
    let mut html = String::from(
        "<details><summary>By class</summary><table>\n\
         <tr><th>class</th><th>images</th><th>accuracy</th><th>most often taken for</th></tr>\n",
    );
    for (i, counts) in confusion["counts"].as_array().into_iter().flatten().enumerate().take(names.len()) {
        let counts: Vec<u64> = counts.as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        let all: u64 = counts.iter().sum();
        let others = counts.iter().enumerate().filter(|(j, n)| *j != i && *j < names.len() && **n > 0);
        let confused = others.max_by_key(|(_, n)| **n);
        let confused = confused.map_or(String::new(), |(j, n)| format!("{} ({n})", name(j)));
        let accuracy = percent(counts.get(i).copied().unwrap_or(0) as f64 / all.max(1) as f64);
        html += &format!(
            "<tr><td>{}</td><td class=\"n\">{all}</td><td class=\"n\">{accuracy}</td><td>{confused}</td></tr>\n",
            name(i)
        );
    }
    html + "</table></details>\n"
}

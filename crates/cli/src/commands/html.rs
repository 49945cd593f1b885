//! `byol report RUN -o report.html`

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use byol::{
    apply::{
        chart::{self, escaped},
        map::{self, Method},
        search::Index,
        sheet::{self, Tile},
    },
    data::{Dataset, Images},
    device,
    eval::embed,
    random,
    train::{
        Plan,
        health::Health,
        metrics::{self, Curves},
        run::{keep_bytes, read_plan},
    },
    views,
};
use serde_json::Value;

use super::{On, must_be_new};
use crate::report::{self, Result, out, percent, shown};

/// Write what a run is and has learned into one HTML file
///
/// Plan, curves, the figures in plain words, example views, nearest neighbours of random images, a map, and all evaluations that were kept in
/// the run. The file needs nothing beside it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder of a run
    run: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "FILE.html", default_value = "report.html")]
    out: PathBuf,
    /// Images to embed for neighbours and the map, evenly spread (0: all)
    #[arg(long, value_name = "N", default_value_t = 2000)]
    limit: usize,
    /// Names the random choices
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Replace the file if it exists
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    on: On,
}

/// Side of a tile in pixels.
const SIDE: u32 = 88;

/// Random images whose neighbours are shown, and how many neighbours.
const QUERIES: usize = 8;
const NEAR: usize = 9;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2330;background:#fbfbfa}\
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d9dde3;padding-bottom:.3rem}\
img,svg{max-width:100%;height:auto}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1rem}\
table{border-collapse:collapse;font-size:.9rem}td,th{text-align:left;padding:.25rem .8rem .25rem 0;border-bottom:1px solid #e5e8ec}\
td.n{text-align:right;font-variant-numeric:tabular-nums}pre{overflow:auto;background:#f1f2f4;padding:1rem;font-size:.8rem}\
.good{color:#1c7a3a}.bad{color:#b3261e}.dim{color:#5c6675;font-size:.9rem;overflow-wrap:anywhere}\
@media(prefers-color-scheme:dark){body{color:#e7eaef;background:#14181f}pre{background:#1e242d}svg text{fill:#c9d1dc}td,th,h2{border-color:#333b47}}";

pub fn run(args: &Args) -> Result<ExitCode> {
    must_be_new(&args.out, args.overwrite)?;
    if let Some(folder) = args.out.parent().filter(|f| !f.as_os_str().is_empty() && !f.is_dir()) {
        return Err(format!("there is no folder {}; make it, or choose another -o", folder.display()).into());
    }
    let plan = read_plan(&args.run)?;
    let encoder = args.on.encoder(&args.run)?;
    let dataset = Dataset::open(&plan.data)?;
    let dataset = Dataset { held_out: None, test: None, ..dataset }.limit(args.limit);
    let bar = report::counter("embedding", dataset.train.len() as u64);
    let dataset = dataset.check(keep_bytes(device::machine().free_mb), &|| ())?;
    let features = embed(&encoder, &dataset.train, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    let index = Index::new(features);

    let Curves { epochs, loss } = metrics::curves(&args.run.join("metrics.jsonl"));
    let name = args.run.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>byol: {0}</title><style>{STYLE}</style></head><body>\n<h1>{0}</h1>\n",
        escaped(&name)
    );
    let done = epochs.last().and_then(|e| e["epoch"].as_u64()).unwrap_or(0);
    let spec = &encoder.spec;
    writeln!(
        html,
        "<p>{} of width {}, {} features, on {} images of <span class=\"dim\">{}</span>: {done} of {} epochs, {:.0} minutes on {}.</p>",
        spec.architecture.name(),
        spec.width,
        encoder.features(),
        plan.images,
        escaped(&plan.data.display().to_string()),
        plan.recipe.train.epochs,
        metrics::seconds(&epochs) / 60.0,
        escaped(&plan.device)
    )?;
    html += "<h2>In plain words</h2>\n";
    html += &words(&args.run, &epochs);
    html += "<h2>Curves</h2>\n<div class=\"grid\">";
    html += &curves(loss, &epochs);
    html += "</div>\n<h2>What it is shown</h2>\n<p>Images and their two views, twice each.</p>\n";
    html += &picture("images beside their views", &views_sheet(&plan, &dataset.train)?);
    html += "<h2>What it finds alike</h2>\n<p>Random images (blue) and their nearest neighbours";
    html += if dataset.classes.is_empty() { "." } else { "; green where the class is the same." };
    html += &format!(" Of {} images.</p>\n", index.len());
    html += &picture("nearest neighbours of random images", &neighbours(args.seed, &index, &dataset)?);
    html += "<h2>Map</h2>\n<p>Each dot is an image; like ones lie together (t-SNE).</p>\n";
    let places = report::counted("placing", |progress| map::places(&index, Method::Tsne, progress));
    html += &chart::scatter(&places, dataset.train.labels().unwrap_or_default(), &dataset.classes);
    html += "<h2>Evaluations</h2>\n";
    html += &evaluations(&args.run);
    html += "<h2>Plan</h2>\n<p>With the data, this gives the same run again.</p>\n";
    write!(
        html,
        "<details><summary>plan.toml</summary><pre>{}</pre></details>\n</body></html>\n",
        escaped(&plan.to_toml())
    )?;
    super::write_file(&args.out, html.as_bytes())?;
    report::note(format!("{} ({} KiB)", args.out.display(), html.len() >> 10));
    if args.on.json {
        out!(
            "{}",
            serde_json::json!({ "file": shown(&args.out), "bytes": html.len(), "images": index.len(), "epochs": done })
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn picture(what: &str, png: &[u8]) -> String {
    format!("<img alt=\"{}\" src=\"data:image/png;base64,{}\">\n", escaped(what), STANDARD.encode(png))
}

/// What the figures come to.
fn words(run: &Path, epochs: &[Value]) -> String {
    let figures = metrics::figures(&run.join("metrics.jsonl"));
    let mut said = Vec::new();
    let failed = epochs.iter().rev().find_map(|e| Some((e["epoch"].as_u64()?, e["collapse"].as_str()?)));
    if let Some((epoch, why)) = failed {
        said.push(("bad", format!("Learning failed in epoch {epoch}: {why}.")));
    }
    if let [first, .., last] = figures.as_slice() {
        if let (Some(before), Some(after)) = (first.knn, last.knn) {
            let kind = if after > before { "good" } else { "bad" };
            said.push((kind, format!(
                "Neighbours guess the class of an image in {} of the cases; with the random weights it began with, in {}.",
                percent(after),
                percent(before)
            )));
        }
        if let (Some(before), Some(after)) = (first.card, last.card) {
            let verdict = after.verdict(&before, "where it began");
            let kind = if verdict.starts_with("better") { "good" } else { "bad" };
            said.push((kind, format!("Without labels: {verdict}.")));
        }
        said.push(("", spread(last)));
    } else {
        said.push(("bad", "The run has no figures of two epochs yet.".into()));
    }
    said.iter().map(|(kind, text)| format!("<p class=\"{kind}\">{}</p>\n", escaped(text))).collect()
}

fn spread(last: &Health) -> String {
    format!(
        "Projections of different images have a mean cosine of {:.2} (0: spread out, 1: all the same) and {:.0} % of the spread of independent \
         directions; the representations fill {:.0} directions.",
        last.projection_cosine,
        100.0 * last.projection_std / last.projection_std_ideal,
        last.rankme
    )
}

fn curves(loss: Vec<[f64; 2]>, epochs: &[Value]) -> String {
    let of = |key: &str, factor: f64| -> Vec<[f64; 2]> {
        epochs.iter().filter_map(|e| Some([e["epoch"].as_f64()?, factor * e[key].as_f64()?])).collect()
    };
    [
        ("loss", loss),
        ("kNN accuracy, %", of("knn", 100.0)),
        ("RankMe", of("rankme", 1.0)),
        ("deviation of the projections", of("projection_std", 1.0)),
        ("cosine of different images' projections", of("projection_cosine", 1.0)),
    ]
    .iter()
    .filter(|(_, points)| points.len() > 1)
    .map(|(title, points)| chart::curve(title, "epoch", points))
    .collect()
}

fn views_sheet(plan: &Plan, images: &Images) -> Result<Vec<u8>> {
    let config = &plan.recipe.views;
    let mut rows = Vec::new();
    let some = images.some(4);
    for i in 0..some.len() {
        let image = some.get(i)?;
        let mut row = vec![Tile::image(&image, SIDE)];
        for epoch in 0..2 {
            for (which, policy) in [&config.first, &config.second].into_iter().enumerate() {
                let name = [plan.recipe.seed, epoch, i as u64, which as u64];
                row.push(Tile::view(&views::view(policy, &image, config.size, name), SIDE));
            }
        }
        rows.push(row);
    }
    Ok(sheet::png(&rows, SIDE))
}

/// A row a random image: itself in a blue frame, then its nearest; framed green or red where there are classes.
fn neighbours(seed: u64, index: &Index, dataset: &Dataset) -> Result<Vec<u8>> {
    let (images, n) = (&dataset.train, index.len());
    let mut rng = random::stream(&[seed, 29]);
    let mut rows = Vec::new();
    for _ in 0..QUERIES.min(n) {
        let q = ((random::uniform(&mut rng) * n as f64) as usize).min(n - 1);
        let mut row = vec![Tile::image(&*images.get(q)?, SIDE).framed([60, 90, 220])];
        let near = index.nearest(index.rows().row(q), NEAR + 1);
        for (i, _) in near.into_iter().filter(|(i, _)| *i != q).take(NEAR) {
            let tile = Tile::image(&*images.get(i)?, SIDE);
            row.push(match images.labels() {
                Some(labels) if labels[i] == labels[q] => tile.framed([40, 170, 70]),
                Some(_) => tile.framed([210, 60, 50]),
                None => tile,
            });
        }
        rows.push(row);
    }
    Ok(sheet::png(&rows, SIDE))
}

/// The tables that evaluations have left in the run.
fn evaluations(run: &Path) -> String {
    let Ok(folder) = fs::read_dir(run.join("eval")) else {
        return "<p>None yet: <code>byol eval knn RUN DATA</code> makes one.</p>\n".into();
    };
    let mut files: Vec<PathBuf> = folder.flatten().map(|e| e.path()).collect();
    files.sort();
    let mut html = String::new();
    for file in files.iter().filter(|f| f.extension().is_some_and(|e| e == "json")) {
        let table: Option<Value> = fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let Some(table) = table else { continue };
        let text = |v: &Value| escaped(v.as_str().unwrap_or_default());
        html +=
            &format!("<h3>{}</h3><p class=\"dim\">{}</p><table>\n", text(&table["evaluation"]), text(&table["data"]));
        for row in table["rows"].as_array().into_iter().flatten() {
            let share = row["share"].as_bool().unwrap_or(false);
            let shown = |v: &Value| match v.as_f64() {
                Some(v) if share => percent(v),
                Some(v) => format!("{v:.3}"),
                None => String::new(),
            };
            let interval = row["interval"].as_array().filter(|i| i.len() == 2);
            let interval = interval.map_or(String::new(), |i| format!("{} to {}", shown(&i[0]), shown(&i[1])));
            html += &format!(
                "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"dim\">{interval}</td></tr>\n",
                text(&row["name"]),
                shown(&row["value"])
            );
        }
        html += "</table>\n";
    }
    html
}

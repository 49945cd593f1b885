//! `byol views DATA -o SHEET.png`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    apply::sheet::{self, Tile},
    data::Dataset,
    device::{self, Choice, machine},
    train::{
        Recipe,
        auto::{self, Facts},
        recipe::Draft,
    },
    views,
};

use crate::report::{self, Result};

/// Draw images beside their two augmented views
///
/// Each row shows an image, its first view (T) and its second view (T′), two of each.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of images
    data: PathBuf,
    /// The picture to write, a PNG file
    #[arg(short, long = "out", value_name = "SHEET.png")]
    out: PathBuf,
    /// Images, evenly spread over the data
    #[arg(long, value_name = "N", default_value_t = 8)]
    count: usize,
    /// Seed of all random draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The recipe whose views to draw: a name or a TOML file
    #[arg(long, default_value = "auto")]
    recipe: String,
    /// Set any key of the recipe, for example views.first.blur=0
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Side of a tile in pixels.
const SIDE: u32 = 160;

pub fn run(args: &Args) -> Result<ExitCode> {
    let mut draft = Draft::from_recipe(&args.recipe)?;
    for text in &args.set {
        draft.set(text)?;
    }
    let base = Recipe::default();
    draft.over(&base)?;
    if args.count == 0 {
        return Err("--count must be at least 1".into());
    }
    if args.out.extension().is_none_or(|e| !e.eq_ignore_ascii_case("png")) {
        return Err(
            format!("{} is not named .png, and a PNG is what is written; name it so", args.out.display()).into()
        );
    }
    let dataset = Dataset::open(&args.data)?;
    let dataset = Dataset { held_out: None, test: None, ..dataset }.limit(args.count);
    let dataset = dataset.check(usize::MAX, &|| ())?;
    for bad in &dataset.skipped {
        report::warning(format!("skipped {}: {}", bad.what, bad.why));
    }
    let recipe = match draft.name.as_str() {
        "auto" => {
            draft.over(&auto::choose(&Facts::of(&dataset.train, &device::open(Choice::Cpu)?, &machine())?, &draft).0)?
        }
        _ => draft.over(&base)?,
    };
    let config = &recipe.views;
    let mut rows = Vec::new();
    for i in 0..dataset.train.len() {
        let image = dataset.train.get(i)?;
        let mut row = vec![Tile::image(&image, SIDE)];
        for epoch in 0..2 {
            for (which, policy) in [&config.first, &config.second].into_iter().enumerate() {
                let name = [args.seed, epoch, i as u64, which as u64];
                row.push(Tile::view(&views::view(policy, &image, config.size, name), SIDE));
            }
        }
        rows.push(row);
    }
    super::write_file(&args.out, &sheet::png(&rows, SIDE))?;
    report::note(format!(
        "{}: {} images, each beside two pairs of views of {} px",
        args.out.display(),
        rows.len(),
        config.size
    ));
    Ok(ExitCode::SUCCESS)
}

//! `byol views DATA -o SHEET.png`

use std::{ops::ControlFlow::Continue, path::PathBuf, process::ExitCode};

use byol::{
    apply::sheet::{self, Tile},
    data::{Dataset, Images, prefetch},
    device::{self, DeviceChoice},
    train::{Recipe, RecipeOverrides, auto},
};

use super::{data_args::DataFlags, must_be_new, recipe_args::RecipeArgs};
use crate::terminal::{self, Result, plural};

const EXAMPLES: &str = "\
Examples:
  byol views photos -o views.png                           Show the augmented views of 8 images
  byol views photos -o views.png --set views.first.blur=0  Try another setting
  byol views tiles --channels all --by-channel -o c.png    Check the channels";

/// Draw images next to their augmented views
///
/// Each row shows an image, then two pairs of its views T and T′.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Folder of images
    data: PathBuf,
    /// Output file (.png)
    #[arg(short, long, value_name = "SHEET.png")]
    out: PathBuf,
    /// Overwrite an existing output file
    #[arg(long)]
    overwrite: bool,
    /// Number of images to show, sampled evenly
    #[arg(short = 'n', long, value_name = "N", default_value_t = 8)]
    count: usize,
    /// Show the channels of each image in gray, after scaling to their ranges, instead of views
    #[arg(long, conflicts_with_all = ["recipe", "augment", "set", "seed"])]
    by_channel: bool,
    /// Random seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    data_flags: DataFlags,
    #[command(flatten)]
    recipe: RecipeArgs,
}

/// Tile size in pixels.
const SIDE: u32 = 160;

pub fn run(args: &Args) -> Result<ExitCode> {
    let mut overrides = RecipeOverrides::from_recipe(&args.recipe.recipe)?;
    args.recipe.apply_set(&mut overrides)?;
    overrides.check()?;
    if args.count == 0 {
        return Err("`--count` must be at least 1".into());
    }
    if args.out.extension().is_none_or(|e| !e.eq_ignore_ascii_case("png")) {
        return Err(format!("unsupported output file {}\nhint: use the extension `.png`", args.out.display()).into());
    }
    must_be_new(&args.out, args.overwrite)?;
    let dataset = args.data_flags.open(&args.data, None)?;
    let dataset = Dataset { held_out: None, test: None, ..dataset }.limit(args.count);
    let dataset = dataset.check(usize::MAX, &|| Continue(()))?;
    for image in &dataset.skipped {
        terminal::warning(format!("skipped {}: {}", image.name, image.reason));
    }
    if args.by_channel {
        let images = &dataset.train;
        let tiles = |i: usize| -> Result<Vec<Tile>> {
            let image = images.get(i)?;
            Ok((0..image.channels).map(|c| Tile::channel(&image, c, SIDE)).collect())
        };
        let rows = (0..images.len()).map(tiles).collect::<Result<Vec<_>>>()?;
        let channels = plural(rows.first().map_or(0, Vec::len), "channel");
        return write(args, &rows, &format!("each with its {channels}"));
    }
    if overrides.name == "auto" && !overrides.contains("train.precision") {
        // `auto` would measure the precisions, which do not affect the views.
        overrides.set("train.precision=f32")?;
    }
    let (mut recipe, _) = auto::resolve(&overrides, &dataset.train, &device::open(DeviceChoice::Cpu)?)?;
    recipe.measure_normalization(&dataset.train)?;
    let rows = rows(&recipe, &dataset.train, args.seed, SIDE)?;
    write(args, &rows, &format!("each with two pairs of {} px views", recipe.views.size))
}

/// Writes the sheet of one row per image.
fn write(args: &Args, rows: &[Vec<Tile>], contents: &str) -> Result<ExitCode> {
    super::write_file(&args.out, &sheet::png(rows, SIDE))?;
    terminal::note(format!("wrote {}: {}, {contents}", args.out.display(), plural(rows.len(), "image")));
    Ok(ExitCode::SUCCESS)
}

/// A row of tiles per image: the image and two pairs of its views.
pub fn rows(recipe: &Recipe, images: &Images, seed: u64, side: u32) -> Result<Vec<Vec<Tile>>> {
    let (policies, size) = (recipe.policies(), recipe.views.size);
    let row = |i: usize| {
        let image = images.get(i)?;
        let mut row = vec![Tile::image(&image, side)];
        for epoch in 0..2 {
            for (k, policy) in policies.iter().enumerate() {
                let stream = [seed, epoch, i as u64, k as u64];
                let draw = prefetch::draw(images, i, policy, &image, stream)?;
                row.push(Tile::view(&draw.apply(&image, size), side));
            }
        }
        Ok(row)
    };
    (0..images.len()).map(row).collect()
}

//! `byol select EMBEDDINGS -n N`

use std::{path::PathBuf, process::ExitCode};

use byol::{
    apply::{
        row_images::{Access, RowImages},
        same_image::{self, Signature, Thumbnail},
        search::Index,
    },
    data,
};
use rayon::prelude::*;
use serde_json::json;

use super::{
    CpuArgs,
    embeddings_args::{EmbeddingsArgs, row_images},
    gallery::{GalleryArgs, Group},
};
use crate::terminal::{self, Result, escape_control, out, plural};

const EXAMPLES: &str = "\
Examples:
  byol select photos.parquet -n 100 > to-label.txt  Choose 100 images to label";

/// Select a diverse subset, for example for labeling
///
/// Each image is the one farthest from all images selected before it (k-center greedy).
/// Near-duplicates of selected images are left out; they are confirmed by comparing pixels.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    embeddings: EmbeddingsArgs,
    /// Number of images to select
    #[arg(short, long = "count", value_name = "N")]
    n: usize,
    /// Folder of the images, if they were moved since they were embedded
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,
    #[command(flatten)]
    gallery: GalleryArgs,
    #[command(flatten)]
    cpu: CpuArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    args.gallery.check()?;
    let embeddings = args.embeddings.read(args.cpu.threads)?;
    let images = embeddings.paths.len();
    if args.n == 0 || args.n > images {
        let path = args.embeddings.path.display();
        return Err(format!("`-n` must be from 1 to {images}, the number of images in {path}").into());
    }
    let row_images = row_images(&embeddings, args.data.as_deref(), Access::AnyFile)?;
    let (paths, index) = (embeddings.paths, Index::new(embeddings.features));
    let mut seen =
        Seen { images: &row_images, selected: Vec::new(), unreadable: None, left_out: Vec::new(), error: None };
    let selected = terminal::with_progress("selecting", |progress| {
        index.select_diverse_if(args.n, |row, before| {
            progress(before.len() as u64, args.n as u64);
            // After an error the rest is not needed.
            seen.error.is_some() || seen.is_new(row, before)
        })
    });
    if let Some(error) = seen.error {
        return Err(error.into());
    }
    if let Some((first, n)) = seen.unreadable {
        terminal::warning(format!(
            "{} cannot be read, and near-duplicates of them are not left out (first: {})\n\
             hint: if the images were moved, pass their new folder with `--data`",
            plural(n, "selected image"),
            first.lines().next().unwrap_or_default()
        ));
    }
    if selected.len() < args.n {
        terminal::warning(format!(
            "selected {} only: all others are near-duplicates of these",
            plural(selected.len(), "image")
        ));
    }
    if args.cpu.json {
        let described: Vec<_> = selected
            .iter()
            .enumerate()
            .map(|(n, (i, cosine))| json!({ "path": paths[*i], "row": i, "nearest_before": (n > 0).then_some(cosine) }))
            .collect();
        let left_out: Vec<_> = seen
            .left_out
            .iter()
            .map(|(row, of)| json!({ "path": paths[*row], "row": row, "duplicate_of": paths[*of] }))
            .collect();
        out!("{}", json!({ "rows": images, "selected": described, "left_out": left_out }));
    } else {
        selected.iter().for_each(|(i, _)| out!("{}", escape_control(&paths[*i])));
    }
    let summary = format!("{} of {images}, in order of selection", plural(selected.len(), "image"));
    args.gallery.write("Selection", &summary, || {
        let group = |(n, (row, _)): (usize, &(usize, f32))| Group::single(&row_images, *row, (n + 1).to_string());
        selected.iter().enumerate().map(group).collect()
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Images selected so far.
struct Seen<'a> {
    images: &'a RowImages,
    selected: Vec<Selected>,
    /// First selected image that cannot be read, with the reason, and their number.
    unreadable: Option<(String, usize)>,
    /// Rows that are near-duplicates, with the selected row.
    left_out: Vec<(usize, usize)>,
    /// First error that is not about one image.
    error: Option<data::Error>,
}

/// A selected image, reduced if it can be read.
struct Selected {
    row: usize,
    reduced: Option<(Signature, Thumbnail)>,
}

/// Number of selected images that a candidate is compared with: the nearest by their embeddings,
/// and as many by their thumbnails.
const COMPARED: usize = 10;

impl Seen<'_> {
    /// Returns true and remembers the row unless it is a near-duplicate of a selected one. `before`
    /// has the cosine with each of those.
    fn is_new(&mut self, row: usize, before: &[f32]) -> bool {
        let reduced = match self.images.get(row) {
            Ok(image) => {
                let signature = Signature::new(&image);
                let thumbnail = Thumbnail::new(&signature);
                Some((signature, thumbnail))
            }
            Err(error @ data::Error::Image { .. }) => {
                self.unreadable.get_or_insert((error.to_string(), 0)).1 += 1;
                None
            }
            Err(error) => {
                self.error.get_or_insert(error);
                return true;
            }
        };
        if let Some((signature, thumbnail)) = &reduced
            && let Some(of) = self.copy_of(signature, thumbnail, before)
        {
            self.left_out.push((row, of));
            return false;
        }
        self.selected.push(Selected { row, reduced });
        true
    }

    /// Row of a selected image of which an image is a copy.
    fn copy_of(&self, signature: &Signature, thumbnail: &Thumbnail, before: &[f32]) -> Option<usize> {
        let readable = self.selected.iter().enumerate().filter_map(|(i, s)| Some((i, s.reduced.as_ref()?)));
        let scored: Vec<(usize, f32, f32)> =
            readable.map(|(i, (_, other))| (i, before[i], thumbnail.similarity(other))).collect();
        let mut compared = highest(scored.iter().map(|(i, cosine, _)| (*i, *cosine)));
        compared.extend(highest(scored.iter().map(|(i, _, similarity)| (*i, *similarity))));
        compared.sort_unstable();
        compared.dedup();
        let is_copy = |other: &Signature| same_image::compare(signature, other).is_some();
        let copies = compared.into_par_iter().map(|i| &self.selected[i]);
        let copies = copies.filter(|selected| selected.reduced.as_ref().is_some_and(|(other, _)| is_copy(other)));
        copies.map(|selected| selected.row).min()
    }
}

/// Returns the indices of the [`COMPARED`] highest scores.
fn highest(scores: impl Iterator<Item = (usize, f32)>) -> Vec<usize> {
    let mut scores: Vec<(usize, f32)> = scores.collect();
    scores.sort_by(|a, b| b.1.total_cmp(&a.1));
    scores.into_iter().take(COMPARED).map(|(i, _)| i).collect()
}

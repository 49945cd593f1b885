//! Flags of the commands that read a data set, and the notes on what was found in it.

use std::{path::Path, str::FromStr};

use byol::{
    data::{self, Dataset, Levels, OpenOptions, Unused, levels::Channels},
    train::Plan,
};

use crate::terminal::{self, Result};

/// Flags of the commands that read a data set.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct DataFlags {
    /// Image column of Parquet files [default: `image`, `img`, or the only one]
    #[arg(long, value_name = "NAME")]
    column: Option<String>,
    /// Values of black and white in 16-bit and floating-point images, for example `0,4095`
    /// [default: detected]
    #[arg(long, value_name = "BLACK,WHITE", allow_negative_numbers = true)]
    levels: Option<BlackAndWhite>,
    /// Channels of the files to use: `all`, their numbers from 1, for example `4,3,2`, `pages` for
    /// the pages of TIFF files, or the names of the files of an image, for example
    /// `{id}_B02.tif,{id}_B03.tif` [default: RGB; gray images are repeated]
    #[arg(long, value_name = "CHANNELS")]
    channels: Option<Channels>,
}

/// Values of black and white.
#[derive(Debug, Clone, Copy)]
struct BlackAndWhite([f32; 2]);

impl FromStr for BlackAndWhite {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once(',').and_then(|(b, w)| Some([b.trim().parse().ok()?, w.trim().parse().ok()?]));
        parts
            .filter(|[black, white]: &[f32; 2]| black.is_finite() && white.is_finite() && black < white)
            .map(BlackAndWhite)
            .ok_or_else(|| format!("invalid levels `{text}` (expected two numbers, black below white, e.g. `0,4095`)"))
    }
}

impl DataFlags {
    /// Opens a data set and prints what is not used of it: with the levels of an encoder, which the
    /// flags do not change, or with those of the flags, completed by detection.
    pub fn open(&self, root: &Path, trained: Option<&Levels>) -> Result<Dataset> {
        let column = self.column.clone();
        if let Some(levels @ Levels { channels: Some(channels), .. }) = trained {
            if self.channels.as_ref().is_some_and(|chosen| !chosen.is_same_selection(channels)) {
                return Err(
                    format!("the encoder was trained with `--channels {channels}`\nhint: omit `--channels`").into()
                );
            }
            if self.levels.is_some() {
                return Err("the encoder has a range for each channel\nhint: omit `--levels`".into());
            }
            return open(root, &OpenOptions { column, ..OpenOptions::as_trained(levels.clone()) });
        }
        if let Some(levels @ Levels { sound: Some(_), .. }) = trained {
            if self.channels.is_some() || self.levels.is_some() {
                let flag = if self.channels.is_some() { "--channels" } else { "--levels" };
                return Err(format!("the encoder was trained on sounds\nhint: omit `{flag}`").into());
            }
            return open(root, &OpenOptions { column, ..OpenOptions::as_trained(levels.clone()) });
        }
        let chosen = self.levels.map(|BlackAndWhite([black, white])| Levels::uniform(black, white));
        let channels = self.channels.clone();
        let channels = channels.map(|channels| Levels { channels: Some(channels), ..Levels::default() });
        let levels = match (chosen, channels) {
            (Some(levels), Some(channels)) => channels.or(levels),
            (chosen, channels) => channels.or(chosen).or_else(|| trained.cloned()).unwrap_or_default(),
        };
        let options = match trained {
            Some(_) => OpenOptions::as_trained(levels),
            None => OpenOptions { levels, ..OpenOptions::default() },
        };
        open(root, &OpenOptions { column, ..options })
    }
}

/// Opens a data set and prints what is not used of it, and the levels that were detected.
pub fn open(root: &Path, options: &OpenOptions) -> Result<Dataset> {
    Ok(described(Dataset::open_with(root, options)?, options))
}

/// Prints what is not used of a data set, and the levels that were detected.
fn described(dataset: Dataset, options: &OpenOptions) -> Dataset {
    warn_unused(&dataset.unused);
    let detected = dataset.levels();
    let is_set = |levels: &Levels| levels.int16.is_some() || levels.float.is_some();
    match &detected.channels {
        _ if detected == options.levels => {}
        None if detected.sound.is_some() => terminal::note(detected.to_string()),
        Some(Channels { ranges, .. }) if !is_set(&options.levels) => {
            let channels = terminal::plural(ranges.len(), "channel");
            terminal::note(format!("{channels}, with ranges detected in a sample (set one with `--levels`)"));
        }
        Some(_) => {}
        None => terminal::note(format!("{detected} (detected; set with `--levels`)")),
    }
    dataset
}

/// Maximum number of printed groups of unused files.
const MAX_UNUSED: usize = 5;

/// Warns about images and files that are not part of the data set.
fn warn_unused(unused: &[Unused]) {
    for group in unused.iter().take(MAX_UNUSED) {
        terminal::warning(format!("not used: {group}"));
    }
    if unused.len() > MAX_UNUSED {
        terminal::warning(format!("not used: {} more; a run lists them in skipped.txt", unused.len() - MAX_UNUSED));
    }
}

/// Opens the data of a run, at the place where they are now.
pub fn open_moved(root: &Path, plan: &Plan) -> Result<Dataset> {
    let options = plan.open_options();
    match Dataset::open_with(root, &options) {
        Err(data::Error::Missing(path)) if path == plan.data => Err(format!(
            "the images of the run, {}, do not exist\nhint: if they were moved, pass their new folder with `--data`",
            path.display()
        )
        .into()),
        dataset => Ok(described(dataset?, &options)),
    }
}

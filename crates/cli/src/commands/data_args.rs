//! Flags of the commands that read a data set, and the notes on what was found in it.

use std::{path::Path, str::FromStr};

use byol::{
    data::{self, Dataset, Levels, MAX_CHANNELS, OpenOptions, Unused, levels::Channels},
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
    /// Channels of the files to use: `all`, or their numbers from 1, for example `4,3,2`
    /// [default: RGB; gray images are repeated]
    #[arg(long, value_name = "NUMBERS")]
    channels: Option<Selection>,
}

/// Numbers of channels; none for all.
#[derive(Debug, Clone, PartialEq)]
struct Selection(Vec<u16>);

impl FromStr for Selection {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "all" {
            return Ok(Selection(Vec::new()));
        }
        let numbers: Option<Vec<u16>> = text.split(',').map(|n| n.trim().parse().ok().filter(|n| *n > 0)).collect();
        numbers.filter(|numbers| numbers.len() <= MAX_CHANNELS).map(Selection).ok_or_else(|| {
            format!("invalid channels `{text}` (expected `all`, or up to {MAX_CHANNELS} numbers from 1, e.g. `4,3,2`)")
        })
    }
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
    /// Opens a data set and prints what is not used of it. Levels that the flags do not set are
    /// taken from `levels`, or detected if those are unset too.
    pub fn open(&self, root: &Path, levels: Levels) -> Result<Dataset> {
        if let Some(Channels { select, .. }) = &levels.channels {
            if self.channels.as_ref().is_some_and(|Selection(numbers)| numbers != select) {
                let numbers: Vec<String> = select.iter().map(u16::to_string).collect();
                let trained = if select.is_empty() { "all".into() } else { numbers.join(",") };
                return Err(
                    format!("the encoder was trained with `--channels {trained}`\nhint: omit `--channels`").into()
                );
            }
            if self.levels.is_some() {
                return Err("the encoder has a range for each channel\nhint: omit `--levels`".into());
            }
            return open(root, &OpenOptions { column: self.column.clone(), levels });
        }
        let chosen = self.levels.map(|BlackAndWhite([black, white])| Levels::uniform(black, white));
        let channels = self.channels.as_ref().map(|Selection(numbers)| Levels::with_channels(numbers.clone()));
        let levels = match (chosen, channels) {
            (Some(levels), Some(channels)) => channels.or(levels),
            (chosen, channels) => channels.or(chosen).unwrap_or(levels),
        };
        open(root, &OpenOptions { column: self.column.clone(), levels })
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

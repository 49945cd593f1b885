//! What the dense evaluations share: their flags, the training of a head, the prediction of the test images, the picture.

use std::path::PathBuf;

use byol::{
    apply::sheet::{self, Tile},
    data::Image,
    eval::dense::Protocol,
};

use crate::report::{self, Result};

/// Flags of a head.
#[derive(Debug, clap::Args)]
pub struct HeadArgs {
    /// Take N training images, evenly spread (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub limit: usize,
    /// Train the head alone
    #[arg(long)]
    pub frozen: bool,
    /// Updates
    #[arg(long, value_name = "N", default_value_t = 1000)]
    steps: usize,
    /// Crops an update
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// Side of the training crops [default: a multiple of 32 that fits into the images, at most 256]
    #[arg(long, value_name = "PX")]
    crop: Option<usize>,
    /// Learning rate
    #[arg(long, value_name = "X", default_value_t = 0.05)]
    rate: f64,
    /// Picture of predictions beside the truth [default: in RUN/eval]
    #[arg(long, value_name = "FILE.png")]
    pub picture: Option<PathBuf>,
}

impl HeadArgs {
    /// Refuses what no data can make good.
    pub fn check(&self) -> Result<()> {
        let rate = self.rate.is_finite() && self.rate > 0.0;
        if self.steps == 0 || self.batch < 2 || !rate || self.crop.is_some_and(|c| c < 32) {
            return Err("--steps must be at least 1, --batch at least 2, --crop at least 32 and --rate above 0".into());
        }
        Ok(())
    }

    /// The protocol for such training images.
    pub fn protocol<'a>(&self, images: impl Iterator<Item = &'a Image>, seed: u64) -> Protocol {
        let shortest = images.map(|image| image.height.min(image.width)).min().unwrap_or(32);
        Protocol {
            steps: self.steps,
            batch: self.batch,
            crop: self.crop.unwrap_or((shortest / 32 * 32).clamp(32, 256)),
            rate: self.rate,
            frozen: self.frozen,
            seed,
        }
    }

    /// What was set, for the record; `more` is of the task.
    pub fn settings(&self, p: &Protocol, train: usize, test: usize, more: serde_json::Value) -> serde_json::Value {
        serde_json::json!({
            "frozen": p.frozen, "steps": p.steps, "batch": p.batch, "crop": p.crop, "rate": p.rate,
            "train_images": train, "test_images": test, "task": more,
        })
    }
}

/// How many images there are, in words.
pub fn counts(train: usize, test: usize) -> String {
    format!("{}, {}", report::counted_noun(train, "training image"), report::counted_noun(test, "test image"))
}

/// Trains a head with a progress bar. Refuses one whose loss is no number.
pub fn train<T>(steps: usize, who: &str, train: impl FnOnce(&mut dyn FnMut(f64)) -> T) -> Result<T> {
    let bar = report::counter(&format!("training the head{who}"), steps as u64);
    let mut broken = None;
    let trained = train(&mut |loss| {
        bar.inc(1);
        if !loss.is_finite() {
            broken = broken.or(Some(bar.position()));
        }
    });
    bar.finish_and_clear();
    match broken {
        Some(step) => Err(format!("the loss of the head is no number at update {step}; try a lower --rate").into()),
        None => Ok(trained),
    }
}

/// Each test image and its number through the trained network, with a progress bar.
pub fn predict<P, A, B>(pairs: &[P], one: impl Fn(usize, &P) -> (A, B)) -> (Vec<A>, Vec<B>) {
    let bar = report::counter("predicting test images", pairs.len() as u64);
    let predicted = pairs.iter().enumerate().inspect(|_| bar.inc(1)).map(|(i, pair)| one(i, pair)).unzip();
    bar.finish_and_clear();
    predicted
}

/// Which of `n` images are drawn: six, evenly spread.
pub fn drawn(n: usize) -> Vec<usize> {
    let rows = n.min(6);
    (0..rows).map(|k| k * n / rows).collect()
}

/// A row for each of these images: what `row` shows of it.
pub fn picture(drawn: &[usize], row: impl Fn(usize) -> Vec<Image>) -> Vec<u8> {
    const SIDE: u32 = 240;
    let tiles = |i: &usize| row(*i).iter().map(|image| Tile::image(image, SIDE)).collect();
    sheet::png(&drawn.iter().map(tiles).collect::<Vec<_>>(), SIDE)
}

//! Dense evaluations, segmentation and depth: their arguments, the training of a head, the
//! prediction of the test images, and the picture.

use std::{path::PathBuf, time::Instant};

use byol::{
    apply::sheet::{self, Tile},
    data,
    eval::dense_heads::Protocol,
    image::Image,
    nn::Encoder,
};

use super::{CommonArgs, RANDOM};
use crate::terminal::{self, Result, plural};

/// Steps timed after the first, to estimate the time of a training.
const TIMED_STEPS: u64 = 3;

/// Arguments of a dense evaluation.
#[derive(Debug, clap::Args)]
pub struct DenseArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Number of training images, sampled evenly (0: all)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub limit: usize,
    /// Train only the head
    #[arg(long)]
    pub frozen: bool,
    /// Number of training steps
    #[arg(long, value_name = "N", default_value_t = 1000)]
    steps: usize,
    /// Batch size, in crops
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// Size of the training crops in pixels [default: the largest multiple of 32 that fits, up to
    /// 256]
    #[arg(long, value_name = "PX")]
    crop: Option<usize>,
    /// Learning rate
    #[arg(long, value_name = "X", default_value_t = 0.05)]
    rate: f64,
    /// Picture of the predictions next to the ground truth (.png) [default: in RUN/eval]
    #[arg(long, value_name = "FILE")]
    pub picture: Option<PathBuf>,
}

/// Checks that an image has the channels of the encoder's input.
pub fn ensure_channels(encoder: &Encoder, image: &Image) -> Result<()> {
    let (found, expected) = (image.channels, encoder.spec.channels);
    if found == expected { Ok(()) } else { Err(data::Error::Mismatch { found, expected }.into()) }
}

/// Predictions on the test images by one encoder with its head.
pub struct Predictions<S, P> {
    /// Suffix of the results' names.
    pub suffix: &'static str,
    /// Comparison with the ground truth, per test image.
    pub scores: Vec<S>,
    /// Prediction, for the test images of the picture.
    pub drawn: Vec<Option<P>>,
}

impl DenseArgs {
    /// Checks the values that do not depend on the data.
    pub fn check(&self) -> Result<()> {
        let rate = self.rate.is_finite() && self.rate > 0.0;
        if self.steps == 0 || self.batch < 2 || !rate || self.crop.is_some_and(|crop| crop < 32) {
            return Err(
                "`--steps` must be at least 1, `--batch` at least 2, `--crop` at least 32, and `--rate` above 0".into(),
            );
        }
        Ok(())
    }

    /// Protocol for these training images.
    pub fn protocol<'a>(&self, images: impl Iterator<Item = &'a Image>) -> Protocol {
        let shortest = images.map(|image| image.height.min(image.width)).min().unwrap_or(32);
        Protocol {
            steps: self.steps,
            batch: self.batch,
            crop: self.crop.unwrap_or((shortest / 32 * 32).clamp(32, 256)),
            rate: self.rate,
            frozen: self.frozen,
            seed: self.common.flags.seed,
        }
    }

    /// Settings for the record; `task` is specific to the evaluation.
    pub fn settings(&self, p: &Protocol, train: usize, test: usize, task: serde_json::Value) -> serde_json::Value {
        serde_json::json!({
            "frozen": p.frozen, "steps": p.steps, "batch": p.batch, "crop": p.crop, "rate": p.rate,
            "train_images": train, "test_images": test, "task": task,
        })
    }

    /// Trains a head on the encoder and on its random initialization, and predicts the test images
    /// with both. `train` calls back with the loss of each step; `predict` returns the comparison
    /// with the ground truth, and the prediction.
    pub fn predict_with_baseline<Net, Pair, S, P>(
        &self,
        encoder: &Encoder,
        test: &[Pair],
        train: impl Fn(&Encoder, &mut dyn FnMut(f64)) -> Net,
        predict: impl Fn(&Net, &Pair) -> (S, P),
    ) -> Result<Vec<Predictions<S, P>>> {
        let random = self.common.random_initialization(encoder);
        let drawn = drawn_images(test.len());
        let mut results = Vec::new();
        for (encoder, suffix) in [(encoder, ""), (&random, RANDOM)] {
            let net = self.train(suffix, |on_step| train(encoder, on_step))?;
            let bar = terminal::progress_bar("predicting test images", test.len() as u64);
            let predict_one = |(i, pair): (usize, &Pair)| {
                let (score, prediction) = predict(&net, pair);
                bar.inc(1);
                (score, drawn.contains(&i).then_some(prediction))
            };
            let (scores, drawn) = test.iter().enumerate().map(predict_one).unzip();
            bar.finish_and_clear();
            results.push(Predictions { suffix, scores, drawn });
        }
        Ok(results)
    }

    /// Trains a head with a progress bar. Refuses one whose loss is not finite.
    fn train<Net>(&self, suffix: &str, train: impl FnOnce(&mut dyn FnMut(f64)) -> Net) -> Result<Net> {
        let bar = terminal::progress_bar(&format!("training the head{suffix}"), self.steps as u64);
        let mut diverged = None;
        let mut first_step = None;
        let net = train(&mut |loss| {
            bar.inc(1);
            let step = bar.position();
            let started = *first_step.get_or_insert_with(Instant::now);
            // The other network takes as long.
            if step == 1 + TIMED_STEPS && suffix.is_empty() && self.steps as u64 >= 4 * step {
                let seconds = started.elapsed().as_secs_f64() / TIMED_STEPS as f64;
                let left = 2 * self.steps as u64 - step;
                bar.suspend(|| {
                    terminal::note(format!(
                        "estimated time left: {} for {left} training steps of two networks (measured over steps 2 to \
                         {step})",
                        terminal::duration(seconds * left as f64)
                    ));
                });
            }
            if !loss.is_finite() {
                diverged = diverged.or(Some(bar.position()));
            }
        });
        bar.finish_and_clear();
        match diverged {
            Some(step) => Err(format!("the loss is NaN or infinite at step {step}\nhint: use a lower `--rate`").into()),
            None => Ok(net),
        }
    }
}

/// `20 training images, 5 test images`.
pub fn counts(train: usize, test: usize) -> String {
    format!("{}, {}", plural(train, "training image"), plural(test, "test image"))
}

/// Indices of the test images of the picture: up to six of `n`, evenly spaced.
pub fn drawn_images(n: usize) -> Vec<usize> {
    let rows = n.min(6);
    (0..rows).map(|k| k * n / rows).collect()
}

/// Draws one row per test image; `row` makes its tiles.
pub fn picture(n: usize, row: impl Fn(usize) -> Vec<Image>) -> Vec<u8> {
    const SIDE: u32 = 240;
    let tiles = |i: &usize| row(*i).iter().map(|image| Tile::image(image, SIDE)).collect();
    sheet::png(&drawn_images(n).iter().map(tiles).collect::<Vec<_>>(), SIDE)
}

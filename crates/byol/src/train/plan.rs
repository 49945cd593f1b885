//! A recipe resolved for a data set: every number is known. Printed before the run and stored with
//! it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    Error, TrainingData,
    recipe::{self, Placement, Recipe, TargetInit, TauSchedule},
    step::Stepper,
};
use crate::{
    byol::Byol,
    data::{Images, OpenOptions, shards},
    device::Precision,
    image::CHANNELS,
    nn::{
        EncoderSpec, Mlp, Network, Normalization, Weights,
        import::{self, Preparation},
    },
    optim::{LossScale, Optimizer, Schedule},
    ranks::Ranks,
};
use burn::tensor::Device;

/// Complete description of a run: with the same data it reproduces the same bits, unless it was
/// extended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of the program that made the plan.
    pub version: String,
    /// Name or file of the recipe.
    pub recipe_name: String,
    /// Path of the data.
    pub data: PathBuf,
    /// Image column of Parquet files, if chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// Device the run started on: `cpu`, `vulkan`, …
    pub device: String,
    /// Training images, without skipped and held-out ones.
    pub images: usize,
    /// Monitoring images.
    pub held_out: usize,
    /// Hash of names, sizes and order of the training images.
    pub fingerprint: String,
    /// Hash of the monitoring images, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_fingerprint: Option<String>,
    /// Schedules of η and τ.
    pub schedule: Schedule,
    /// Earlier plans of the run, if it was extended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extended: Vec<Extension>,
    /// Encoder of the run.
    pub encoder: EncoderSpec,
    /// Settings.
    pub recipe: Recipe,
}

/// Change of the number of epochs of a run, by [`extend_plan`](super::run::extend_plan).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extension {
    /// Completed steps at the change.
    pub step: u64,
    /// Epochs of the earlier plan.
    pub epochs: u64,
    /// Hash of the earlier plan, which the checkpoints up to `step` carry.
    pub plan: String,
}

/// Absolute path of the data. Patterns of shards and URLs stay as they are.
fn absolute(root: &Path) -> PathBuf {
    if shards::is_remote(root) {
        return root.to_owned();
    }
    std::fs::canonicalize(root).or_else(|_| std::path::absolute(root)).unwrap_or_else(|_| root.to_owned())
}

/// ⌊epochs · images / batch⌋, as in the reference: a batch may span the end of an epoch.
fn steps(epochs: u64, images: usize, batch: usize) -> u64 {
    (u128::from(epochs) * images as u128 / batch as u128) as u64
}

impl Plan {
    /// Resolves a recipe for these images.
    ///
    /// # Errors
    /// [`Error::BatchTooLarge`], [`Error::NotUnicode`], [`Error::Recipe`].
    pub fn new(recipe_name: &str, mut recipe: Recipe, data: &TrainingData, device: &str) -> Result<Plan, Error> {
        recipe.check()?;
        if absolute(&data.root).to_str().is_none() {
            return Err(Error::NotUnicode(data.root.clone()));
        }
        if device == "cpu" && recipe.views.placement == Placement::Auto {
            recipe.views.placement = Placement::Cpu; // the host is the device
        }
        let (root, train) = (&data.root, &data.train);
        let channels = train.n_channels();
        recipe.measure_normalization(train)?;
        if recipe.normalize.mean.len() != channels {
            let reason = format!("{} means (expected {channels}, one per channel)", recipe.normalize.mean.len());
            return Err(Error::Recipe(recipe::Error::Value { key: "normalize".into(), reason }));
        }
        let (n, batch) = (train.len(), recipe.train.batch);
        if batch > n {
            return Err(Error::BatchTooLarge { batch, images: n, root: root.clone() });
        }
        let steps = |epochs: u64| steps(epochs, n, batch);
        let size = recipe.views.size;
        Ok(Plan {
            version: env!("CARGO_PKG_VERSION").into(),
            recipe_name: recipe_name.into(),
            data: absolute(root),
            column: data.column.clone(),
            device: device.into(),
            images: n,
            held_out: data.held_out.as_ref().map_or(0, Images::len),
            fingerprint: train.fingerprint(),
            held_out_fingerprint: data.held_out.as_ref().map(Images::fingerprint),
            schedule: Schedule {
                peak: recipe.optimizer.lr * batch as f64 / 256.0,
                warmup: steps(recipe.train.warmup_epochs),
                total: steps(recipe.train.epochs),
                tau_base: recipe.target.tau,
                constant_tau: recipe.target.schedule == TauSchedule::Constant,
            },
            extended: Vec::new(),
            encoder: EncoderSpec {
                architecture: recipe.encoder.architecture,
                width: recipe.encoder.width,
                stem: recipe.encoder.stem(size),
                size: if recipe.views.eval_size == 0 { size } else { recipe.views.eval_size },
                center: recipe.views.center,
                antialias: recipe.views.antialias,
                channels: train.n_channels(),
                normalization: recipe.normalize.clone(),
                eps: recipe.norm.eps,
                levels: data.levels.clone(),
            },
            recipe,
        })
    }

    /// Settings that open the data as in this run.
    pub fn open_options(&self) -> OpenOptions {
        OpenOptions { column: self.column.clone(), ..OpenOptions::as_trained(self.encoder.levels.clone()) }
    }

    /// Name of the weights that the run begins with, for comparisons.
    #[doc(hidden)]
    pub fn baseline_name(&self) -> &'static str {
        if self.recipe.encoder.from.is_empty() { "random initialization" } else { "the initial weights" }
    }

    /// Images per micro-batch.
    pub fn micro_batch(&self) -> usize {
        self.recipe.train.batch / self.recipe.train.accumulate
    }

    /// Checks that the ranks can share every batch.
    ///
    /// # Errors
    /// [`Error::Ranks`].
    pub(crate) fn check_ranks(&self, ranks: Ranks) -> Result<(), Error> {
        let (n, batch) = (ranks.world_size(), self.micro_batch());
        let refuse = |reason: String| Err(Error::Ranks { ranks: n, reason });
        if !batch.is_multiple_of(n) {
            let micro = if self.recipe.train.accumulate > 1 { "micro-batch" } else { "batch" };
            return refuse(format!(
                "{micro} size {batch} is not divisible by {n}\nhint: change `--batch` or the number of ranks"
            ));
        }
        if n > 1 && !self.recipe.train.sync_bn && batch / n < 2 {
            return refuse("batch norm needs at least 2 images per rank\nhint: pass `--sync-bn true`".into());
        }
        if n > 1 && self.recipe.method.beta != 0.0 {
            return refuse("negatives (`method.beta`) need the whole batch on one rank".into());
        }
        Ok(())
    }

    /// Steps of a run of `epochs`.
    fn steps(&self, epochs: u64) -> u64 {
        steps(epochs, self.images, self.recipe.train.batch)
    }

    /// Completed epochs after `steps` steps.
    pub fn epochs_done(&self, steps: u64) -> u64 {
        if steps >= self.schedule.total {
            return self.recipe.train.epochs;
        }
        // The last epoch of a finished run ends up to a batch early, even if the run was extended.
        let is_complete = |e: &&Extension| e.step <= steps && e.step >= self.steps(e.epochs);
        let recorded = self.extended.iter().filter(is_complete).map(|e| e.epochs).max();
        (steps * self.recipe.train.batch as u64 / self.images as u64).max(recorded.unwrap_or(0))
    }

    /// Returns the plan with another number of epochs, from `step` on. η and τ take the values that
    /// they have at `step` in a run of `epochs`. `hash` is the hash of this plan.
    ///
    /// # Errors
    /// [`Error::Extend`], if `epochs` are complete at `step`; [`Error::Recipe`].
    pub(crate) fn extend(&self, epochs: u64, step: u64, hash: String) -> Result<Plan, Error> {
        let mut plan = self.clone();
        plan.schedule.total = plan.steps(epochs);
        if plan.schedule.total <= step.max(plan.schedule.warmup) {
            let warmup = self.recipe.train.warmup_epochs;
            return Err(Error::Extend { epochs, done: self.epochs_done(step), warmup });
        }
        plan.recipe.train.epochs = epochs;
        plan.recipe.check()?;
        plan.extended.push(Extension { step, epochs: self.recipe.train.epochs, plan: hash });
        Ok(plan)
    }

    /// Networks f, g and q.
    pub fn network(&self) -> Network {
        let (r, init) = (&self.recipe, self.recipe.encoder.init);
        let encoder = self.encoder.resnet().with_init(init, r.encoder.zero_init_residual);
        let (hidden, d_out) = (r.heads.hidden, r.heads.projection);
        Network {
            projector: Mlp { name: "projector", d_in: encoder.features(), hidden, d_out, init },
            predictor: Mlp { name: "predictor", d_in: d_out, hidden, d_out, init },
            encoder: Arc::new(encoder),
            normalization: r.normalize.clone(),
            norm: r.norm.clone(),
            precision: r.train.precision,
            ranks: Ranks::SINGLE,
        }
    }

    /// Splits of a step: objective, micro-batches and loss scale. Single rank.
    pub fn stepper(&self) -> Stepper {
        Stepper {
            objective: self.recipe.method,
            micro_batches: self.recipe.train.accumulate,
            ranks: Ranks::SINGLE,
            loss_scale: (self.recipe.train.precision == Precision::F16).then(LossScale::default),
        }
    }

    /// State before the first step. If `encoder.from` is set, f of θ and ξ has its weights.
    ///
    /// # Errors
    /// [`Error::Encoder`], [`Error::EncoderMismatch`].
    pub(crate) fn pretrained_state(&self, device: &Device) -> Result<Byol, Error> {
        let mut byol = self.initial_state(device);
        let from = Path::new(&self.recipe.encoder.from);
        if from.as_os_str().is_empty() {
            return Ok(byol);
        }
        let is_rgb = self.encoder.channels == CHANNELS;
        let normalization = if is_rgb { self.recipe.normalize.clone() } else { Normalization::default() };
        let encoder = import::load(from, &Preparation { size: None, normalization }, device)?;
        let from_rgb = encoder.spec.channels == CHANNELS;
        let encoder = if from_rgb { encoder.with_channels(self.encoder.channels) } else { encoder };
        let kind = |s: &EncoderSpec| (s.architecture, s.width, s.stem, s.channels);
        if kind(&encoder.spec) != kind(&self.encoder) {
            let describe = |s: &EncoderSpec| {
                let (name, stem) = (s.architecture.name(), s.stem.name());
                format!("{name} of width {} with {stem} stem for {} channels", s.width, s.channels)
            };
            let (found, expected) = (describe(&encoder.spec), describe(&self.encoder));
            return Err(Error::EncoderMismatch { path: from.to_owned(), found, expected });
        }
        for weights in [&mut byol.online, &mut byol.target] {
            weights.params.extend("", &encoder.weights.params);
            for (name, running) in encoder.weights.statistics.iter() {
                weights.statistics.insert(name, running.clone());
            }
        }
        Ok(byol)
    }

    /// State with random initialization.
    pub fn initial_state(&self, device: &Device) -> Byol {
        let (network, seed) = (self.network(), self.recipe.seed);
        let online = network.init(seed, "online", self.recipe.method.predictor, device);
        let random = network.init(seed, "target", false, device);
        let target = match self.recipe.target.init {
            TargetInit::Independent => random,
            TargetInit::Copy => Weights {
                params: random.params.zip(&online.params, |_, _, theta| theta),
                statistics: random.statistics,
            },
        };
        let optimizer = Optimizer::new(self.recipe.optimizer.rule(), &online.params);
        Byol { network, online, target, optimizer, schedule: self.schedule.clone(), k: 0 }
    }

    /// TOML of the plan.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a plan is plain data")
    }

    /// Parses `plan.toml`. `path` is for messages.
    ///
    /// # Errors
    /// [`Error::BadPlan`].
    pub fn parse(text: &str, path: &Path) -> Result<Plan, Error> {
        let bad = |reason: String| Error::BadPlan { path: path.to_owned(), reason };
        let mut plan: Plan = toml::from_str(text).map_err(|e| bad(e.message().to_owned()))?;
        // Plans of earlier versions have no `encoder.eps`.
        plan.encoder.eps = plan.recipe.norm.eps;
        plan.recipe.check()?;
        plan.encoder.check().map_err(bad)?;
        if plan.images == 0 || plan.recipe.train.batch > plan.images || plan.schedule.total == 0 {
            return Err(bad("inconsistent numbers of images, batch and steps".into()));
        }
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{data::synthetic, train::PrepareOptions};

    fn ten_images() -> TrainingData {
        let options = PrepareOptions { monitoring_images: 0, ..PrepareOptions::default() };
        TrainingData::prepare(synthetic::dataset(1, 10, 0), options, &|_| ()).unwrap()
    }

    fn plan(epochs: u64, batch: usize) -> Plan {
        let mut recipe = Recipe::default();
        (recipe.train.epochs, recipe.train.batch, recipe.train.warmup_epochs) = (epochs, batch, 0);
        Plan::new("test", recipe, &ten_images(), "cpu").unwrap()
    }

    #[test]
    fn batches_may_span_the_end_of_an_epoch() {
        let p = plan(5, 4);
        assert_eq!(p.schedule.total, 12, "⌊5 · 10 / 4⌋");
        assert_eq!((0..=12).map(|k| p.epochs_done(k)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5]);
    }

    #[test]
    fn plan_round_trips_through_its_file() {
        let p = plan(5, 4);
        assert_eq!(Plan::parse(&p.to_toml(), Path::new("plan.toml")).unwrap(), p);
    }

    #[test]
    fn extended_plan_keeps_its_earlier_ones() {
        let p = plan(5, 4);
        let longer = p.extend(10, 12, "first".into()).unwrap();
        assert_eq!((longer.schedule.total, longer.epochs_done(11), longer.epochs_done(12)), (25, 4, 5));
        assert_eq!(longer.extended, [Extension { step: 12, epochs: 5, plan: "first".into() }]);
        assert_eq!(longer.schedule.eta(12), plan(10, 4).schedule.eta(12));
        assert_eq!(Plan::parse(&longer.to_toml(), Path::new("plan.toml")).unwrap(), longer);
        assert!(matches!(p.extend(2_000_000, 12, String::new()), Err(Error::Recipe(_))));
        assert!(matches!(p.extend(5, 12, String::new()), Err(Error::Extend { epochs: 5, done: 5, warmup: 0 })));
    }

    #[test]
    fn rejects_batches_larger_than_the_data() {
        let mut recipe = Recipe::default();
        recipe.train.batch = 11;
        let refused = Plan::new("test", recipe, &ten_images(), "cpu");
        assert!(matches!(refused, Err(Error::BatchTooLarge { batch: 11, images: 10, .. })));
    }
}

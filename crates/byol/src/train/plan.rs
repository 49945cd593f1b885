//! What a recipe means for these data: every number resolved. Printed before the run and stored with it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    Error, Prepared,
    recipe::{Finish, Recipe, TargetInit, TauSchedule},
};
use crate::{
    byol::Byol,
    data::{CHANNELS, Images, shards},
    device::Precision,
    nn::{
        EncoderSpec, Mlp, Network, Weights,
        foreign::{self, Preparation},
    },
    optim::{LossScale, Optimizer, Schedule},
    ranks::Ranks,
};
use burn::tensor::Device;

/// A run, complete: with the data it gives the same bits again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Of the program that made it.
    pub version: String,
    /// Name or file of the recipe.
    pub recipe_name: String,
    /// As given.
    pub data: PathBuf,
    /// Name of the device it began on: `cpu`, `vulkan`, …
    pub device: String,
    /// Training images, after `limit`, what was skipped and what is held out.
    pub images: usize,
    /// Images that are watched.
    pub held_out: usize,
    /// A hash of the training images' names, sizes and order.
    pub fingerprint: String,
    /// The same of the images that are watched, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_fingerprint: Option<String>,
    /// η and τ.
    pub schedule: Schedule,
    /// The network that is kept.
    pub encoder: EncoderSpec,
    /// All settings.
    pub recipe: Recipe,
}

/// A path that means the same from every folder. A pattern of shards names no file, and an address no path.
fn whole(root: &Path) -> PathBuf {
    if shards::is_remote(root) {
        return root.to_owned();
    }
    std::fs::canonicalize(root).or_else(|_| std::path::absolute(root)).unwrap_or_else(|_| root.to_owned())
}

impl Plan {
    /// Resolves a recipe for these images.
    ///
    /// # Errors
    /// [`Error::BatchTooLarge`], [`Error::NotUnicode`], [`Error::Recipe`].
    pub fn new(recipe_name: &str, mut recipe: Recipe, data: &Prepared, device: &str) -> Result<Plan, Error> {
        recipe.check()?;
        if whole(&data.root).to_str().is_none() {
            return Err(Error::NotUnicode(data.root.clone()));
        }
        if device == "cpu" && recipe.views.finish == Finish::Auto {
            recipe.views.finish = Finish::Cpu; // the host's cores are the device
        }
        let (root, train) = (&data.root, &data.train);
        let (n, batch) = (train.len(), recipe.train.batch);
        if batch > n {
            return Err(Error::BatchTooLarge { batch, images: n, root: root.clone() });
        }
        // ⌊epochs · images / batch⌋, as the reference counts: a batch may reach over the end of an epoch.
        let steps = |epochs: u64| (u128::from(epochs) * n as u128 / batch as u128) as u64;
        let size = recipe.views.size;
        Ok(Plan {
            version: env!("CARGO_PKG_VERSION").into(),
            recipe_name: recipe_name.into(),
            data: whole(root),
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
                tau_stays: recipe.target.schedule == TauSchedule::Constant,
            },
            encoder: EncoderSpec {
                architecture: recipe.encoder.architecture,
                width: recipe.encoder.width,
                stem: recipe.encoder.stem(size),
                size: if recipe.views.eval_size == 0 { size } else { recipe.views.eval_size },
                center: recipe.views.center,
                channels: CHANNELS,
                normalization: recipe.normalize.clone(),
                eps: recipe.norm.eps,
            },
            recipe,
        })
    }

    /// Images a micro-batch.
    pub fn micro_batch(&self) -> usize {
        self.recipe.train.batch / self.recipe.train.accumulate
    }

    /// Whether so many ranks can share each batch.
    ///
    /// # Errors
    /// [`Error::Ranks`].
    pub fn check_ranks(&self, ranks: Ranks) -> Result<(), Error> {
        let (n, own) = (ranks.count(), self.micro_batch());
        let refuse = |reason: String| Err(Error::Ranks { ranks: n, reason });
        if !own.is_multiple_of(n) {
            let parts = if self.recipe.train.accumulate > 1 { " (a part of the batch)" } else { "" };
            return refuse(format!(
                "{own} images{parts} are no multiple of {n}; choose another --batch or number of ranks"
            ));
        }
        if n > 1 && !self.recipe.train.sync_bn && own / n < 2 {
            return refuse(
                "each has one image, of which batch norm knows no variance; let it see all by --sync-bn true".into(),
            );
        }
        if n > 1 && self.recipe.method.beta != 0.0 {
            return refuse("the negatives of method.beta are those of a whole batch; train it on one".into());
        }
        Ok(())
    }

    /// Epochs that are complete after `steps` steps.
    pub fn epochs_done(&self, steps: u64) -> u64 {
        if steps >= self.schedule.total {
            return self.recipe.train.epochs;
        }
        steps * self.recipe.train.batch as u64 / self.images as u64
    }

    /// Steps until `epochs` epochs are complete.
    pub fn steps_until(&self, epochs: u64) -> u64 {
        (epochs * self.images as u64).div_ceil(self.recipe.train.batch as u64).min(self.schedule.total)
    }

    /// f, g and q.
    pub fn network(&self) -> Network {
        let (r, init) = (&self.recipe, self.recipe.encoder.init);
        let encoder = self.encoder.resnet().with_init(init, r.encoder.zero_init_residual);
        let (hidden, d_out) = (r.heads.hidden, r.heads.projection);
        Network {
            projector: Mlp { name: "projector", d_in: encoder.features(), hidden, d_out, init },
            predictor: Mlp { name: "predictor", d_in: d_out, hidden, d_out, init },
            encoder,
            normalization: r.normalize.clone(),
            norm: r.norm.clone(),
            precision: r.train.precision,
            ranks: Ranks::ALONE,
        }
    }

    /// The networks before the first step, with the weights of `encoder.from` where it names some: f of θ and of ξ.
    ///
    /// # Errors
    /// [`Error::Encoder`], [`Error::Unlike`].
    pub fn begin(&self, device: &Device) -> Result<Byol, Error> {
        let mut byol = self.start(device);
        let from = Path::new(&self.recipe.encoder.from);
        if from.as_os_str().is_empty() {
            return Ok(byol);
        }
        let normalization = self.recipe.normalize.clone();
        let encoder = foreign::load(from, &Preparation { size: None, normalization }, device)?;
        let kind = |s: &EncoderSpec| (s.architecture, s.width, s.stem, s.channels);
        if kind(&encoder.spec) != kind(&self.encoder) {
            let said = |s: &EncoderSpec| {
                format!("a {} of width {} with the {} stem", s.architecture.name(), s.width, s.stem.name())
            };
            let (found, wanted) = (said(&encoder.spec), said(&self.encoder));
            return Err(Error::Unlike { path: from.to_owned(), found, wanted });
        }
        for weights in [&mut byol.online, &mut byol.target] {
            weights.params.extend("", &encoder.weights.params);
            for (name, running) in encoder.weights.statistics.iter() {
                weights.statistics.insert(name, running.clone());
            }
        }
        Ok(byol)
    }

    /// The networks with fresh weights.
    pub fn start(&self, device: &Device) -> Byol {
        let (network, seed) = (self.network(), self.recipe.seed);
        let online = network.init(seed, "online", self.recipe.method.predictor, device);
        let own = network.init(seed, "target", false, device);
        let target = match self.recipe.target.init {
            TargetInit::Independent => own,
            TargetInit::Copy => {
                Weights { params: own.params.zip(&online.params, |_, _, theta| theta), statistics: own.statistics }
            }
        };
        let optimizer = Optimizer::new(self.recipe.optimizer.rule(), &online.params);
        let objective = self.recipe.method;
        Byol {
            network,
            objective,
            online,
            target,
            optimizer,
            schedule: self.schedule.clone(),
            k: 0,
            ranks: Ranks::ALONE,
            scale: (self.recipe.train.precision == Precision::F16).then(LossScale::default),
        }
    }

    /// As TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a plan is plain data")
    }

    /// From `plan.toml`; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::BadPlan`].
    pub fn parse(text: &str, path: &Path) -> Result<Plan, Error> {
        let bad = |reason: String| Error::BadPlan { path: path.to_owned(), reason };
        let mut plan: Plan = toml::from_str(text).map_err(|e| bad(e.message().to_owned()))?;
        // A plan of an earlier version has the one and not the other.
        plan.encoder.eps = plan.recipe.norm.eps;
        plan.recipe.check()?;
        plan.encoder.check().map_err(bad)?;
        if plan.images == 0 || plan.recipe.train.batch > plan.images || plan.schedule.total == 0 {
            return Err(bad("its counts do not go together".into()));
        }
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{data::synthetic, train::recipe::HealthConfig};

    fn ten_images() -> Prepared {
        let none = HealthConfig { images: 0, ..HealthConfig::default() };
        Prepared::new(synthetic::dataset(1, 10, 0), 0, &none, 0, &|_| ()).unwrap()
    }

    fn plan(epochs: u64, batch: usize) -> Plan {
        let mut recipe = Recipe::default();
        (recipe.train.epochs, recipe.train.batch, recipe.train.warmup_epochs) = (epochs, batch, 0);
        Plan::new("test", recipe, &ten_images(), "cpu").unwrap()
    }

    #[test]
    fn steps_are_counted_over_the_ends_of_epochs() {
        let p = plan(5, 4);
        assert_eq!(p.schedule.total, 12, "⌊5 · 10 / 4⌋");
        assert_eq!((0..=12).map(|k| p.epochs_done(k)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5]);
        assert_eq!(p.steps_until(1), 3);
        assert_eq!(p.steps_until(5), 12);
    }

    #[test]
    fn a_plan_comes_back_from_its_file() {
        let p = plan(5, 4);
        assert_eq!(Plan::parse(&p.to_toml(), Path::new("plan.toml")).unwrap(), p);
    }

    #[test]
    fn a_batch_beyond_the_data_is_refused() {
        let mut recipe = Recipe::default();
        recipe.train.batch = 11;
        let refused = Plan::new("test", recipe, &ten_images(), "cpu");
        assert!(matches!(refused, Err(Error::BatchTooLarge { batch: 11, images: 10, .. })));
    }
}

//! What the user asks for: one TOML file, or flags, or both. A recipe is complete: no default outside it decides anything about the
//! result. Unknown keys are refused with the nearest known one named; relations are checked before any data is read.

use std::{fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    byol::Objective,
    nn::{Architecture, Init, NormConfig, Normalization, Precision, Stem, reference_center},
    optim::{AdamW, Lars, Rule, Sgd},
    views::Policy,
};

/// All settings of a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Seed of all random draws.
    pub seed: u64,
    /// The network f.
    pub encoder: EncoderConfig,
    /// g and q.
    pub heads: HeadsConfig,
    /// How long, how many at once.
    pub train: TrainConfig,
    /// How θ moves.
    pub optimizer: OptimizerConfig,
    /// How ξ moves.
    pub target: TargetConfig,
    /// What is minimised: BYOL, or an ablation of it.
    pub method: Objective,
    /// Batch norm of all networks.
    pub norm: NormConfig,
    /// Of the input.
    pub normalize: Normalization,
    /// T and T′.
    pub views: ViewsConfig,
    /// What is watched.
    pub health: HealthConfig,
    /// What is kept.
    pub checkpoint: CheckpointConfig,
}

/// The encoder f.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderConfig {
    /// resnet18, 34, 50, 101, 152 or 200. resnet50 as in the paper.
    pub architecture: Architecture,
    /// Multiplies every channel count, above 0. 1.
    pub width: f64,
    /// imagenet, cifar, or auto: cifar for views of 64 px or less.
    pub stem: StemChoice,
    /// reference or torch: whose initial weights.
    pub init: Init,
    /// Start each residual branch at zero. The paper's results did not.
    pub zero_init_residual: bool,
    /// An encoder whose weights f starts with: a file of byol, or a ResNet's weights as .pth or .safetensors. Empty: fresh weights.
    pub from: String,
}

/// Which stem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StemChoice {
    /// By the size of the views.
    Auto,
    /// 7×7 stride 2 and a max pool.
    Imagenet,
    /// 3×3 stride 1.
    Cifar,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        EncoderConfig {
            architecture: Architecture::Resnet50,
            width: 1.0,
            stem: StemChoice::Auto,
            init: Init::Reference,
            zero_init_residual: false,
            from: String::new(),
        }
    }
}

impl EncoderConfig {
    /// The stem for views of this size.
    pub fn stem(&self, size: usize) -> Stem {
        match self.stem {
            StemChoice::Auto => Stem::for_size(size),
            StemChoice::Imagenet => Stem::Imagenet,
            StemChoice::Cifar => Stem::Cifar,
        }
    }
}

/// Projector and predictor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadsConfig {
    /// Length of both hidden layers. 4096 as in the paper.
    pub hidden: usize,
    /// Length of projection and prediction. 256 as in the paper.
    pub projection: usize,
}

impl Default for HeadsConfig {
    fn default() -> Self {
        HeadsConfig { hidden: 4096, projection: 256 }
    }
}

/// How long, how many at once. A plan of an earlier version may lack a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Passes over the images. 1000 in the paper's main run.
    pub epochs: u64,
    /// Epochs of linear warm-up of the learning rate; fewer than `epochs`. 10 as in the reference.
    pub warmup_epochs: u64,
    /// Images an update. 4096 as in the paper.
    pub batch: usize,
    /// Micro-batches an update; divides `batch`. 1. More need less memory; only batch norm sees the smaller batch.
    pub accumulate: usize,
    /// f32; bf16, where the processor (AVX512-BF16) or the GPU has such numbers; or f16, on GPUs, with a loss that is scaled while it is
    /// differentiated: what convolutions and linear layers multiply. Statistics, loss, weights, momenta and target are f32 with all. f32.
    pub precision: Precision,
    /// Of several ranks: batch norm sees the images of all of them, as the reference's does; false: each rank its own. true.
    pub sync_bn: bool,
    /// Training images to take, evenly spread over the data's own order; 0: all.
    pub limit: usize,
    /// Images that the buffer mixes, of data in shards: shards are read one after the other, and each image is taken by chance from so
    /// many that come up next. 4096. Other data are shuffled as a whole.
    pub shuffle: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            epochs: 1000,
            warmup_epochs: 10,
            batch: 4096,
            accumulate: 1,
            precision: Precision::F32,
            sync_bn: true,
            limit: 0,
            shuffle: 4096,
        }
    }
}

/// The optimiser. Fields that the kind does not use are ignored by it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// lars, sgd or adamw.
    pub kind: OptimizerKind,
    /// Learning rate for batch 256; the peak is this × batch / 256. 0.2 for 1000 epochs as in the reference.
    pub lr: f64,
    /// lars, sgd: share of the momentum that stays, in [0, 1). 0.9.
    pub momentum: f64,
    /// Weight decay, at least 0. 1.5e-6 for 1000 epochs as in the reference. Biases and norms have none.
    pub weight_decay: f64,
    /// lars: trust coefficient, above 0. 0.001.
    pub trust: f64,
    /// lars: cap the adaptive rate at the learning rate, as solo-learn does. The reference does not.
    pub clip_lr: bool,
    /// sgd: look ahead.
    pub nesterov: bool,
    /// adamw: decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// adamw: decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// adamw: added to the root of the second moment.
    pub eps: f64,
}

/// Which optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// The paper's.
    Lars,
    /// With momentum.
    Sgd,
    /// Adam with decoupled decay.
    Adamw,
}

impl OptimizerKind {
    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            OptimizerKind::Lars => "LARS",
            OptimizerKind::Sgd => "SGD",
            OptimizerKind::Adamw => "AdamW",
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            kind: OptimizerKind::Lars,
            lr: 0.2,
            momentum: 0.9,
            weight_decay: 1.5e-6,
            trust: 1e-3,
            clip_lr: false,
            nesterov: false,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }
}

impl OptimizerConfig {
    /// The rule that these settings name.
    pub fn rule(&self) -> Rule {
        let &OptimizerConfig { momentum, weight_decay, trust, clip_lr, nesterov, beta1, beta2, eps, .. } = self;
        match self.kind {
            OptimizerKind::Lars => Rule::Lars(Lars { momentum, weight_decay, trust, clip_lr }),
            OptimizerKind::Sgd => Rule::Sgd(Sgd { momentum, weight_decay, nesterov }),
            OptimizerKind::Adamw => Rule::Adamw(AdamW { beta1, beta2, eps, weight_decay }),
        }
    }
}

/// The target network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// Target decay at the start, in [0, 1]. 0.996 for 1000 epochs as in the paper. 0: the target is the online network; 1: it never moves.
    pub tau: f64,
    /// cosine: τ rises to 1 at the end; constant: it stays, as in the paper's ablation.
    pub schedule: TauSchedule,
    /// independent: ξ starts from a draw of its own, as in the reference; copy: from θ, as solo-learn has it.
    pub init: TargetInit,
}

/// Where ξ starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TargetInit {
    /// A random draw of its own.
    Independent,
    /// θ.
    Copy,
}

/// How τ goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TauSchedule {
    /// Up to 1 on half a cosine.
    Cosine,
    /// Not at all.
    Constant,
}

impl Default for TargetConfig {
    fn default() -> Self {
        TargetConfig { tau: 0.996, schedule: TauSchedule::Cosine, init: TargetInit::Independent }
    }
}

/// The views.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViewsConfig {
    /// Side in pixels. 224 as in the paper.
    pub size: usize,
    /// Side of the evaluation's view in pixels; 0: as `size`. A crop enlarges what it shows, so an encoder may know larger images
    /// better than those of its training (Touvron et al. 2019, arXiv:1906.06423).
    pub eval_size: usize,
    /// Evaluation takes the centre square of this share of the shorter side, in (0, 1]. 0.875 as in the reference; 1 where images are
    /// so small that their border counts.
    pub center: f64,
    /// Where what follows the crop (flip, colour, grey, blur, solarise) is computed: cpu; device: as operations over a batch; or auto:
    /// where a batch and a step side by side are faster, by what the first ones take. auto. A plan without the key is one of the cpu.
    #[serde(default = "Finish::cpu", skip_serializing_if = "Finish::is_cpu")]
    pub finish: Finish,
    /// T.
    pub first: Policy,
    /// T′.
    pub second: Policy,
}

/// Where views are finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// By what is faster.
    #[default]
    Auto,
    /// By the threads that decode.
    Cpu,
    /// Where the networks are.
    Device,
}

impl Finish {
    fn cpu() -> Finish {
        Finish::Cpu
    }

    fn is_cpu(&self) -> bool {
        *self == Finish::Cpu
    }
}

impl Default for ViewsConfig {
    fn default() -> Self {
        ViewsConfig {
            size: 224,
            eval_size: 0,
            center: reference_center(),
            finish: Finish::Auto,
            first: Policy::default(),
            second: Policy::second(),
        }
    }
}

/// What is watched at the end of every epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthConfig {
    /// Images that are watched: of the data's own `val` or `test` split, else held out of the training images (at most a tenth of
    /// them). 0: none, and no health figures. 512.
    pub images: usize,
    /// Training images that the kNN votes among, evenly spread; 0: all. 4096.
    pub bank: usize,
    /// kNN: neighbours. 20.
    pub k: usize,
    /// kNN: temperature of the votes. 0.07.
    pub temperature: f64,
    /// What to do when learning has failed: stop; rollback: go back to the last healthy checkpoint with half the learning rate; or go-on.
    pub on_collapse: OnCollapse,
}

/// What to do when learning has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCollapse {
    /// With an error; the last healthy checkpoint is kept.
    Stop,
    /// To the last healthy checkpoint, with half the learning rate.
    Rollback,
    /// With a warning.
    GoOn,
}

impl Default for HealthConfig {
    fn default() -> Self {
        HealthConfig { images: 512, bank: 4096, k: 20, temperature: 0.07, on_collapse: OnCollapse::Stop }
    }
}

/// What is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0: at the end of every epoch.
    pub every_steps: u64,
    /// Minutes after which one is written in any case. 10.
    pub every_minutes: f64,
    /// How many are kept. 3.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every_steps: 0, every_minutes: 10.0, keep: 3 }
    }
}

/// What can be wrong with a recipe.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the recipe {}: {source}; give a TOML file or one of {}", path.display(), NAMES.join(", "))]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No recipe of that name.
    #[error("no recipe is called `{name}`; did you mean `{nearest}`? The recipes are {}, or a file NAME.toml", NAMES.join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
        /// The nearest name.
        nearest: String,
    },
    /// Not TOML.
    #[error("the recipe {} is not TOML: {reason}", path.display())]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// An unknown key.
    #[error("unknown recipe key `{key}` in {from}; did you mean `{nearest}`?")]
    Key {
        /// The key.
        key: String,
        /// File or flag.
        from: String,
        /// The nearest known key.
        nearest: String,
    },
    /// A value of the wrong type, or none of the choices.
    #[error("recipe key `{key}` {reason}")]
    Value {
        /// The key, or the section.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// Not KEY=VALUE.
    #[error("`--set {text}` is not KEY=VALUE; for example --set target.tau=0.99")]
    Set {
        /// What was typed.
        text: String,
    },
}

/// The built-in recipes.
pub const NAMES: [&str; 6] = ["auto", "cifar10", "imagenet-1000", "imagenet-300", "imagenet-100", "imagenette"];

/// The text of a built-in recipe; none for `auto`, which is made for the data.
pub fn built_in(name: &str) -> Option<&'static str> {
    Some(match name {
        "cifar10" => include_str!("../../../../recipes/cifar10.toml"),
        "imagenet-1000" => include_str!("../../../../recipes/imagenet-1000.toml"),
        "imagenet-300" => include_str!("../../../../recipes/imagenet-300.toml"),
        "imagenet-100" => include_str!("../../../../recipes/imagenet-100.toml"),
        "imagenette" => include_str!("../../../../recipes/imagenette.toml"),
        _ => return None,
    })
}

/// What the user has said so far: a part of a recipe, by key. Later words replace earlier ones.
#[derive(Debug, Clone, Default)]
pub struct Draft {
    /// The recipe's name; `auto` where nothing was said.
    pub name: String,
    said: Table,
}

impl Draft {
    /// From a built-in name, or a path to a TOML file.
    ///
    /// # Errors
    /// All but [`Error::Set`].
    pub fn from_recipe(name: &str) -> Result<Draft, Error> {
        if name == "auto" {
            return Ok(Draft { name: name.to_owned(), said: Table::new() });
        }
        let path = PathBuf::from(name);
        let text = match built_in(name) {
            Some(text) => text.to_owned(),
            None if path.extension().is_some_and(|e| e == "toml") || path.exists() => {
                fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?
            }
            None => {
                return Err(Error::Unknown { name: name.to_owned(), nearest: nearest(name, NAMES.iter().copied()) });
            }
        };
        Draft::from_text(name, &text)
    }

    /// From TOML; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Syntax`], [`Error::Key`].
    pub fn from_text(name: &str, text: &str) -> Result<Draft, Error> {
        let mut draft = Draft { name: name.to_owned(), said: Table::new() };
        let syntax = |e: toml::de::Error| Error::Syntax { path: name.into(), reason: e.message().to_owned() };
        let table: Table = text.parse().map_err(syntax)?;
        for (key, value) in flatten(&table) {
            draft.say(&key, value, name)?;
        }
        Ok(draft)
    }

    /// Sets a key; `from` is for messages.
    ///
    /// # Errors
    /// [`Error::Key`] for a key that no recipe has.
    pub fn say(&mut self, key: &str, value: impl Into<Value>, from: &str) -> Result<(), Error> {
        let known = known_keys();
        if !known.iter().any(|k| k == key) {
            let nearest = nearest(key, known.iter().map(String::as_str));
            return Err(Error::Key { key: key.to_owned(), from: from.to_owned(), nearest });
        }
        insert(&mut self.said, key, value.into());
        Ok(())
    }

    /// `KEY=VALUE` of `--set`. The value is TOML; a bare word is a string.
    ///
    /// # Errors
    /// [`Error::Set`], [`Error::Key`].
    pub fn set(&mut self, text: &str) -> Result<(), Error> {
        let wrong = || Error::Set { text: text.to_owned() };
        let (key, value) = text.split_once('=').ok_or_else(wrong)?;
        let (key, value) = (key.trim(), value.trim());
        if value.is_empty() {
            return Err(wrong());
        }
        let parsed = format!("x = {value}").parse::<Table>().ok().and_then(|mut t| t.remove("x"));
        self.say(key, parsed.unwrap_or_else(|| Value::String(value.to_owned())), "--set")
    }

    /// Whether the key has been said.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// What was said for a key.
    pub fn get(&self, key: &str) -> Option<Value> {
        flatten(&self.said).into_iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// `base` with all that was said on top, checked.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn over(&self, base: &Recipe) -> Result<Recipe, Error> {
        let mut table = to_table(base);
        for (key, value) in flatten(&self.said) {
            let old = lookup(&table, &key).cloned();
            insert(&mut table, &key, fit(old, value));
        }
        // Key by key, so that a wrong type is said with its key.
        for (key, value) in flatten(&self.said) {
            let mut one = to_table(base);
            let old = lookup(&one, &key).cloned();
            insert(&mut one, &key, fit(old, value));
            if let Err(e) = Recipe::deserialize(one) {
                return Err(Error::Value { key, reason: format!("cannot be that: {}", e.message().trim()) });
            }
        }
        let recipe = Recipe::deserialize(table)
            .map_err(|e| Error::Value { key: "recipe".into(), reason: format!("cannot be that: {}", e.message()) })?;
        recipe.check()?;
        Ok(recipe)
    }
}

/// Whole numbers stand for floats where a float is wanted.
fn fit(old: Option<Value>, new: Value) -> Value {
    match (old, new) {
        (Some(Value::Float(_)), Value::Integer(i)) => Value::Float(i as f64),
        (Some(Value::Array(old)), Value::Array(new)) if old.len() == new.len() => {
            Value::Array(old.into_iter().zip(new).map(|(o, n)| fit(Some(o), n)).collect())
        }
        (_, new) => new,
    }
}

impl Recipe {
    /// As TOML, complete.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe is plain data")
    }

    /// Whether every value is in its range and the values go together.
    ///
    /// # Errors
    /// [`Error::Value`] for the first that is not.
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |key: &str, reason: String| Err(Error::Value { key: key.to_owned(), reason });
        let at_least = |key: &'static str, value: usize, least: usize, most: usize| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                wrong(key, format!("is {value}; it must be from {least} to {most}"))
            }
        };
        at_least("train.epochs", self.train.epochs as usize, 1, 1_000_000)?;
        at_least("train.batch", self.train.batch, 2, 1 << 20)?;
        at_least("train.accumulate", self.train.accumulate, 1, self.train.batch)?;
        at_least("heads.hidden", self.heads.hidden, 1, 1 << 16)?;
        at_least("heads.projection", self.heads.projection, 1, 1 << 16)?;
        at_least("views.size", self.views.size, 4, 2048)?;
        if self.views.eval_size != 0 {
            at_least("views.eval_size", self.views.eval_size, 4, 2048)?;
        }
        at_least("health.k", self.health.k, 1, 100_000)?;
        at_least("checkpoint.keep", self.checkpoint.keep, 1, 1000)?;
        if self.train.warmup_epochs >= self.train.epochs {
            let (w, e) = (self.train.warmup_epochs, self.train.epochs);
            return wrong("train.warmup_epochs", format!("is {w}, but the run has {e} epochs; use fewer than {e}"));
        }
        let t = &self.train;
        if !t.batch.is_multiple_of(t.accumulate) || t.batch / t.accumulate < 2 {
            let reason = format!(
                "is {}, but batch {} must split into that many equal parts of at least 2 images (batch norm needs two)",
                t.accumulate, t.batch
            );
            return wrong("train.accumulate", reason);
        }
        let in_range = |key: &str, value: f64, ok: bool, range: &str| {
            if ok && value.is_finite() { Ok(()) } else { wrong(key, format!("is {value}; it must be {range}")) }
        };
        let center = self.views.center;
        in_range("views.center", center, center > 0.0 && center <= 1.0, "above 0, at most 1")?;
        let o = &self.optimizer;
        in_range(
            "encoder.width",
            self.encoder.width,
            self.encoder.width > 0.0 && self.encoder.width <= 64.0,
            "above 0, at most 64",
        )?;
        in_range("optimizer.lr", o.lr, o.lr > 0.0, "above 0")?;
        in_range("optimizer.trust", o.trust, o.trust > 0.0, "above 0")?;
        in_range("optimizer.weight_decay", o.weight_decay, o.weight_decay >= 0.0, "at least 0")?;
        in_range("optimizer.eps", o.eps, o.eps > 0.0, "above 0")?;
        for (key, v) in [
            ("optimizer.momentum", o.momentum),
            ("optimizer.beta1", o.beta1),
            ("optimizer.beta2", o.beta2),
            ("norm.decay", self.norm.decay),
        ] {
            in_range(key, v, (0.0..1.0).contains(&v), "at least 0 and below 1")?;
        }
        in_range("norm.eps", self.norm.eps, self.norm.eps > 0.0, "above 0")?;
        in_range("target.tau", self.target.tau, (0.0..=1.0).contains(&self.target.tau), "from 0 to 1")?;
        in_range("method.beta", self.method.beta, self.method.beta >= 0.0, "at least 0")?;
        in_range("method.alpha", self.method.alpha, self.method.alpha > 0.0, "above 0")?;
        // Below, every vote is beyond the range of numbers.
        in_range("health.temperature", self.health.temperature, self.health.temperature >= 0.01, "at least 0.01")?;
        in_range(
            "checkpoint.every_minutes",
            self.checkpoint.every_minutes,
            self.checkpoint.every_minutes > 0.0,
            "above 0",
        )?;
        let n = &self.normalize;
        if n.mean.len() != crate::data::CHANNELS || n.std.len() != crate::data::CHANNELS {
            return wrong(
                "normalize",
                format!(
                    "has {} means and {} deviations for {} channels",
                    n.mean.len(),
                    n.std.len(),
                    crate::data::CHANNELS
                ),
            );
        }
        if n.std.iter().any(|s| !s.is_finite() || *s <= 0.0) || n.mean.iter().any(|m| !m.is_finite()) {
            return wrong("normalize.std", "must be above 0".into());
        }
        for (name, policy) in [("first", &self.views.first), ("second", &self.views.second)] {
            if let Err((field, reason)) = policy.check() {
                return wrong(&format!("views.{name}.{field}"), reason);
            }
        }
        Ok(())
    }
}

fn to_table(recipe: &Recipe) -> Table {
    Table::try_from(recipe).expect("a recipe is a table")
}

/// Every key of a recipe, dotted, in the recipe's order.
pub fn known_keys() -> Vec<String> {
    flatten(&to_table(&Recipe::default())).into_iter().map(|(key, _)| key).collect()
}

/// Dotted keys and their values.
fn flatten(table: &Table) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => all.extend(flatten(inner).into_iter().map(|(k, v)| (format!("{key}.{k}"), v))),
            other => all.push((key.clone(), other.clone())),
        }
    }
    all
}

fn lookup<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        Some((first, rest)) => lookup(table.get(first)?.as_table()?, rest),
        None => table.get(key),
    }
}

fn insert(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        Some((first, rest)) => {
            let inner = table.entry(first).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
        None => {
            table.insert(key.to_owned(), value);
        }
    }
}

fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    // A key typed without its section is nearest to the key that ends in it.
    let distance = |k: &&str| {
        let last = k.rsplit('.').next().unwrap_or(k);
        let whole = strsim::damerau_levenshtein(word, k);
        let tail = strsim::damerau_levenshtein(word.rsplit('.').next().unwrap_or(word), last);
        (tail.min(whole), whole)
    };
    known.min_by_key(distance).unwrap_or_default().to_owned()
}

/// Reads a complete recipe, as a plan stores it.
///
/// # Errors
/// What is wrong with it.
pub fn parse_complete(text: &str) -> Result<Recipe, String> {
    let recipe: Recipe = toml::from_str(text).map_err(|e| e.message().to_owned())?;
    recipe.check().map_err(|e| e.to_string())?;
    Ok(recipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_recipe_is_valid_and_complete() {
        for name in NAMES {
            let recipe = Draft::from_recipe(name).unwrap().over(&Recipe::default()).unwrap();
            assert_eq!(parse_complete(&recipe.to_toml()).unwrap(), recipe, "{name}");
        }
    }

    #[test]
    fn the_references_presets_are_the_references() {
        let rows = [
            ("imagenet-1000", 1000, 0.2, 1.5e-6, 0.996),
            ("imagenet-300", 300, 0.3, 1e-6, 0.99),
            ("imagenet-100", 100, 0.45, 1e-6, 0.99),
        ];
        for (name, epochs, lr, decay, tau) in rows {
            let r = Draft::from_recipe(name).unwrap().over(&Recipe::default()).unwrap();
            assert_eq!(
                (r.train.epochs, r.optimizer.lr, r.optimizer.weight_decay, r.target.tau),
                (epochs, lr, decay, tau)
            );
            assert_eq!((r.train.batch, r.train.warmup_epochs, r.views.size), (4096, 10, 224));
        }
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let mut draft = Draft::from_recipe("auto").unwrap();
        for (typed, meant) in
            [("target.taw=0.9", "target.tau"), ("tau=0.9", "target.tau"), ("optimiser.lr=1", "optimizer.lr")]
        {
            let Err(Error::Key { nearest, .. }) = draft.set(typed) else { panic!("{typed} is unknown") };
            assert_eq!(nearest, meant);
        }
        assert!(matches!(Draft::from_recipe("cifar"), Err(Error::Unknown { nearest, .. }) if nearest == "cifar10"));
    }

    #[test]
    fn values_are_checked_with_their_key() {
        let bad = [
            "train.epochs=0",
            "train.batch=1",
            "target.tau=1.5",
            "views.first.flip=2",
            "encoder.architecture=resnet19",
            "train.accumulate=3",
            "train.warmup_epochs=1000",
            "optimizer.lr=-1",
            "views.first.area=[0.5,0.1]",
            "seed=x",
        ];
        for text in bad {
            let mut draft = Draft::from_recipe("auto").unwrap();
            draft.set(text).unwrap();
            let Err(Error::Value { key, .. }) = draft.over(&Recipe::default()) else { panic!("{text} passes") };
            assert_eq!(text.split('=').next().unwrap(), key, "{text}");
        }
    }

    #[test]
    fn a_whole_number_is_a_float_where_one_is_wanted() {
        let mut draft = Draft::from_recipe("auto").unwrap();
        draft.set("encoder.width=2").unwrap();
        assert_eq!(draft.over(&Recipe::default()).unwrap().encoder.width, 2.0);
    }
}

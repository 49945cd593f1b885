//! Settings of a run, from a TOML file, flags, or both.
//!
//! A recipe is complete: no default outside it affects the result. Unknown keys are rejected with
//! the nearest known key; all values are validated before any data is read.

use std::{fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    image::MAX_CHANNELS,
    nn::{Architecture, Init, NormConfig, Normalization, Precision, Stem, reference_center},
    objective::Objective,
    optim::{AdamW, Lars, Rule, Sgd},
    views::Policy,
};

/// Settings of a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Random seed.
    pub seed: u64,
    /// Encoder f.
    pub encoder: EncoderConfig,
    /// Projector g and predictor q.
    pub heads: HeadsConfig,
    /// Duration, batch size and precision.
    pub train: TrainConfig,
    /// Optimizer of θ.
    pub optimizer: OptimizerConfig,
    /// Target network ξ.
    pub target: TargetConfig,
    /// BYOL's loss, or an ablation of it.
    pub method: Objective,
    /// Batch norm of all networks.
    pub norm: NormConfig,
    /// Input normalization.
    pub normalize: Normalization,
    /// Augmentations T and T′.
    pub views: ViewsConfig,
    /// Health checks at the end of every epoch.
    pub health: HealthConfig,
    /// Checkpoint retention.
    pub checkpoint: CheckpointConfig,
}

/// Encoder f.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderConfig {
    /// resnet18, 34, 50, 101, 152 or 200. Default: resnet50, as in the paper.
    pub architecture: Architecture,
    /// Multiplier of every channel count, above 0. Default: 1.
    pub width: f64,
    /// imagenet, cifar, or auto: cifar for views of up to 64 px.
    pub stem: StemChoice,
    /// Weight initialization: reference (deepmind-research) or torch.
    pub init: Init,
    /// Initialize the last norm of each residual branch to zero. The paper's results did not.
    pub zero_init_residual: bool,
    /// Pretrained weights of f: a byol encoder, or a ResNet checkpoint (.pth or .safetensors).
    /// Empty: random initialization.
    pub from: String,
}

/// Choice of the stem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StemChoice {
    /// By view size.
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
    /// Stem for views of `size` pixels.
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
    /// Width of both hidden layers. Default: 4096, as in the paper.
    pub hidden: usize,
    /// Dimension of projection and prediction. Default: 256, as in the paper.
    pub projection: usize,
}

impl Default for HeadsConfig {
    fn default() -> Self {
        HeadsConfig { hidden: 4096, projection: 256 }
    }
}

/// Duration, batch size and precision. Plans of earlier versions may lack a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Epochs. Default: 1000, as in the paper's main run.
    pub epochs: u64,
    /// Epochs of linear learning-rate warm-up, fewer than `epochs`. Default: 10, as in the
    /// reference.
    pub warmup_epochs: u64,
    /// Batch size: images per update. Default: 4096, as in the paper.
    pub batch: usize,
    /// Micro-batches per update, a divisor of `batch`. More need less memory; only batch norm sees
    /// the smaller batch. Default: 1.
    pub accumulate: usize,
    /// Compute precision of convolutions and linear layers, and type of the encoder's maps: f32,
    /// bf16 (CPUs with AMX or AVX512-BF16, and GPUs) or f16 (GPUs; with a scaled loss). Statistics,
    /// loss, weights, optimizer state and target are always f32. Default: f32.
    pub precision: Precision,
    /// Synchronize batch-norm statistics across ranks, as the reference does. Default: true.
    pub sync_bn: bool,
    /// Number of training images, sampled evenly over the data; 0: all.
    pub limit: usize,
    /// Shuffle buffer for data in shards, in images: shards are read sequentially, and each image
    /// is drawn from the next this many. Other data are shuffled globally. Default: 4096.
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

/// Optimizer. Fields that the kind does not use are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// lars, sgd or adamw. Default: lars.
    pub kind: OptimizerKind,
    /// Learning rate for batch size 256; the peak is this × batch / 256. Default: 0.2, as in the
    /// reference for 1000 epochs.
    pub lr: f64,
    /// lars, sgd: momentum, in [0, 1). Default: 0.9.
    pub momentum: f64,
    /// Weight decay, at least 0. Not applied to biases and norms. Default: 1.5e-6, as in the
    /// reference for 1000 epochs.
    pub weight_decay: f64,
    /// lars: trust coefficient, above 0. Default: 0.001.
    #[serde(alias = "trust")]
    pub trust_coefficient: f64,
    /// lars: clip the adaptive rate at the learning rate, as solo-learn does. The reference does
    /// not.
    pub clip_lr: bool,
    /// sgd: Nesterov momentum.
    pub nesterov: bool,
    /// adamw: decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// adamw: decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// adamw: term added to the root of the second moment.
    pub eps: f64,
}

/// Kind of optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// LARS, as in the paper.
    Lars,
    /// SGD with momentum.
    Sgd,
    /// Adam with decoupled weight decay.
    Adamw,
}

impl OptimizerKind {
    /// Name for display.
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
            trust_coefficient: 1e-3,
            clip_lr: false,
            nesterov: false,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }
}

impl OptimizerConfig {
    /// Update rule with these settings.
    pub fn rule(&self) -> Rule {
        let &OptimizerConfig {
            momentum, weight_decay, trust_coefficient, clip_lr, nesterov, beta1, beta2, eps, ..
        } = self;
        match self.kind {
            OptimizerKind::Lars => Rule::Lars(Lars { momentum, weight_decay, trust_coefficient, clip_lr }),
            OptimizerKind::Sgd => Rule::Sgd(Sgd { momentum, weight_decay, nesterov }),
            OptimizerKind::Adamw => Rule::Adamw(AdamW { beta1, beta2, eps, weight_decay }),
        }
    }
}

/// Target network ξ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// Initial target decay, in [0, 1]. 0: the target is the online network; 1: it never changes.
    /// Default: 0.996, as in the paper for 1000 epochs.
    pub tau: f64,
    /// cosine: τ rises to 1 at the end of the run; constant: as in the paper's ablation.
    pub schedule: TauSchedule,
    /// independent: ξ has a random initialization of its own, as in the reference; copy: starts as
    /// θ, as in solo-learn.
    pub init: TargetInit,
}

/// Initialization of ξ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TargetInit {
    /// Random, independent of θ.
    Independent,
    /// Copy of θ.
    Copy,
}

/// Schedule of τ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TauSchedule {
    /// Half a cosine up to 1.
    Cosine,
    /// Constant.
    Constant,
}

impl Default for TargetConfig {
    fn default() -> Self {
        TargetConfig { tau: 0.996, schedule: TauSchedule::Cosine, init: TargetInit::Independent }
    }
}

/// Views and their augmentations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViewsConfig {
    /// Side of a view in pixels. Default: 224, as in the paper.
    pub size: usize,
    /// Side of evaluation views in pixels; 0: same as `size`. Random crops enlarge their content,
    /// so an encoder may perform better on larger images than it was trained on (Touvron et al.
    /// 2019, arXiv:1906.06423).
    pub eval_size: usize,
    /// Fraction of the shorter side that the center crop of evaluation keeps, in (0, 1]. Default:
    /// 0.875, as in the reference; 1 for images whose border matters.
    pub center: f64,
    /// Evaluation views as by torchvision's `Resize` and `CenterCrop` of a PIL image, which
    /// antialias. Default: false, as in the reference.
    #[serde(default)]
    pub antialias: bool,
    /// Device of the augmentations after the crop (flip, color, gray, blur, solarize): cpu; device,
    /// as operations over a batch; or auto, the faster by timing the first steps. Default: auto.
    /// Plans without the key use the CPU.
    #[serde(default = "Placement::cpu", skip_serializing_if = "Placement::is_cpu", alias = "finish")]
    pub placement: Placement,
    /// Augmentations T of the first view.
    pub first: Policy,
    /// Augmentations T′ of the second view.
    pub second: Policy,
}

/// Augmentation placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// The faster one, by timing.
    #[default]
    Auto,
    /// On the CPU threads that decode.
    Cpu,
    /// On the device of the networks.
    Device,
}

impl Placement {
    fn cpu() -> Placement {
        Placement::Cpu
    }

    fn is_cpu(&self) -> bool {
        *self == Placement::Cpu
    }
}

impl Default for ViewsConfig {
    fn default() -> Self {
        ViewsConfig {
            size: 224,
            eval_size: 0,
            center: reference_center(),
            antialias: false,
            placement: Placement::Auto,
            first: Policy::default(),
            second: Policy::second(),
        }
    }
}

/// Health checks at the end of every epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthConfig {
    /// Monitoring images: of the `val` or `test` split, else held out of the training images (at
    /// most a tenth of them). 0: none, and no health checks. Default: 512.
    pub images: usize,
    /// Training images for the kNN classifier, sampled evenly; 0: all. Default: 4096.
    pub bank: usize,
    /// kNN: number of neighbors. Default: 20.
    pub k: usize,
    /// kNN: temperature of the votes. Default: 0.07.
    pub temperature: f64,
    /// Response to a failure: stop; rollback to the last healthy checkpoint with half the learning
    /// rate; or continue. Default: stop.
    pub on_collapse: OnCollapse,
}

/// Response to a failed health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCollapse {
    /// Stop with an error. The last healthy checkpoint is kept.
    Stop,
    /// Return to the last healthy checkpoint, with half the learning rate.
    Rollback,
    /// Continue with a warning.
    #[serde(alias = "go-on")]
    Continue,
}

impl Default for HealthConfig {
    fn default() -> Self {
        HealthConfig { images: 512, bank: 4096, k: 20, temperature: 0.07, on_collapse: OnCollapse::Stop }
    }
}

/// Checkpoint interval and retention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0: at the end of every epoch.
    pub every_steps: u64,
    /// Longest time between checkpoints, in minutes. Default: 10.
    pub every_minutes: f64,
    /// Number of checkpoints to keep. Default: 3.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every_steps: 0, every_minutes: 10.0, keep: 3 }
    }
}

/// Errors of a recipe.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the recipe {}: {source}\nhint: use a TOML file, or one of {}", path.display(), NAMES.join(", "))]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// No built-in recipe has this name.
    #[error("unknown recipe `{name}`\nhint: did you mean `{nearest}`? Available recipes: {}, or a file NAME.toml", NAMES.join(", "))]
    Unknown {
        /// Requested name.
        name: String,
        /// Nearest known name.
        nearest: String,
    },
    /// No view policy has this name.
    #[error("unknown augmentations `{name}`\nhint: use one of {}", VIEW_POLICIES.join(", "))]
    UnknownViews {
        /// Requested name.
        name: String,
    },
    /// The file is not valid TOML.
    #[error("the recipe {} is not valid TOML: {reason}", path.display())]
    Syntax {
        /// Path of the file.
        path: PathBuf,
        /// Message of the parser.
        reason: String,
    },
    /// Unknown key.
    #[error("unknown recipe key `{key}` in {from}\nhint: did you mean `{nearest}`?")]
    Key {
        /// The key.
        key: String,
        /// File or flag that has it.
        from: String,
        /// Nearest known key.
        nearest: String,
    },
    /// Value of the wrong type, or out of range.
    #[error("invalid recipe key `{key}`: {reason}")]
    Value {
        /// The key, or its section.
        key: String,
        /// Cause.
        reason: String,
    },
    /// Not of the form KEY=VALUE.
    #[error("invalid `--set {text}` (expected KEY=VALUE, e.g. `--set target.tau=0.99`)")]
    Set {
        /// Argument as typed.
        text: String,
    },
}

/// Names of the built-in recipes.
pub const NAMES: [&str; 7] =
    ["auto", "cifar10", "imagenet-1000", "imagenet-300", "imagenet-100", "imagenette", "audio"];

/// TOML of a built-in recipe; `None` for `auto`, which depends on the data.
pub fn built_in(name: &str) -> Option<&'static str> {
    Some(match name {
        "cifar10" => include_str!("../../../../recipes/cifar10.toml"),
        "imagenet-1000" => include_str!("../../../../recipes/imagenet-1000.toml"),
        "imagenet-300" => include_str!("../../../../recipes/imagenet-300.toml"),
        "imagenet-100" => include_str!("../../../../recipes/imagenet-100.toml"),
        "imagenette" => include_str!("../../../../recipes/imagenette.toml"),
        "audio" => include_str!("../../../../recipes/audio.toml"),
        _ => return None,
    })
}

/// True if a built-in recipe has this input normalization.
pub(super) fn is_built_in(normalization: &Normalization) -> bool {
    let of_recipe = |name: &str| Recipe::named(name).and_then(|recipe| recipe.check()).map(|recipe| recipe.normalize);
    NAMES.iter().any(|name| of_recipe(name).is_ok_and(|other| other == *normalization))
}

/// Names of the view policies: augmentations for a kind of images.
pub const VIEW_POLICIES: [&str; 3] = ["overhead", "microscopy", "spectrogram"];

/// TOML of a view policy.
fn view_policy(name: &str) -> Option<&'static str> {
    Some(match name {
        "overhead" => include_str!("../../../../recipes/views/overhead.toml"),
        "microscopy" => include_str!("../../../../recipes/views/microscopy.toml"),
        "spectrogram" => include_str!("../../../../recipes/views/spectrogram.toml"),
        _ => return None,
    })
}

/// Keys of earlier versions, with their current names. Still accepted.
const RENAMED: [(&str, &str); 4] = [
    ("optimizer.trust", "optimizer.trust_coefficient"),
    ("views.finish", "views.placement"),
    ("views.first.grey", "views.first.gray"),
    ("views.second.grey", "views.second.gray"),
];

/// Current name of a key.
fn current_name(key: &str) -> &str {
    RENAMED.iter().find(|(old, _)| *old == key).map_or(key, |(_, new)| new)
}

/// Recipe keys set by a file and by flags. Later values replace earlier ones.
#[derive(Debug, Clone)]
pub struct RecipeOverrides {
    /// Name of the recipe.
    pub name: String,
    overrides: Table,
}

impl Default for RecipeOverrides {
    /// `auto`, without overrides.
    fn default() -> Self {
        RecipeOverrides { name: "auto".into(), overrides: Table::new() }
    }
}

impl RecipeOverrides {
    /// Loads a built-in recipe by name, or a TOML file or the recipe of a run by path: its folder
    /// or its `plan.toml`.
    ///
    /// # Errors
    /// All but [`Error::Set`].
    pub fn from_recipe(name: &str) -> Result<RecipeOverrides, Error> {
        if name == "auto" {
            return Ok(RecipeOverrides::default());
        }
        let path = match PathBuf::from(name) {
            folder if built_in(name).is_none() && folder.is_dir() => folder.join("plan.toml"),
            path => path,
        };
        let text = match built_in(name) {
            Some(text) => text.to_owned(),
            None if path.extension().is_some_and(|e| e == "toml") || path.exists() => {
                fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?
            }
            None => {
                return Err(Error::Unknown { name: name.to_owned(), nearest: nearest(name, NAMES.iter().copied()) });
            }
        };
        RecipeOverrides::from_text(name, &text)
    }

    /// Parses the TOML of a recipe, or of a plan, which contains one. `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Syntax`], [`Error::Key`].
    pub fn from_text(name: &str, text: &str) -> Result<RecipeOverrides, Error> {
        let mut parsed = RecipeOverrides { name: name.to_owned(), overrides: Table::new() };
        let syntax = |e: toml::de::Error| Error::Syntax { path: name.into(), reason: e.message().to_owned() };
        let mut table: Table = text.parse().map_err(syntax)?;
        if table.contains_key("fingerprint")
            && let Some(Value::Table(mut recipe)) = table.remove("recipe")
        {
            // A plan without a placement was made with the CPU.
            if let Some(Value::Table(views)) = recipe.get_mut("views") {
                views.entry("placement").or_insert("cpu".into());
            }
            table = recipe;
        }
        for (key, value) in flatten(&table) {
            parsed.insert(&key, value, name)?;
        }
        Ok(parsed)
    }

    /// Sets a key. `from` is for messages.
    ///
    /// # Errors
    /// [`Error::Key`] for an unknown key.
    pub fn insert(&mut self, key: &str, value: impl Into<Value>, from: &str) -> Result<(), Error> {
        let (key, known) = (current_name(key), known_keys());
        if !known.iter().any(|k| k == key) {
            let nearest = nearest(key, known.iter().map(String::as_str));
            return Err(Error::Key { key: key.to_owned(), from: from.to_owned(), nearest });
        }
        insert(&mut self.overrides, key, value.into());
        Ok(())
    }

    /// Sets the augmentations to those of a view policy, one of [`VIEW_POLICIES`].
    ///
    /// # Errors
    /// [`Error::UnknownViews`].
    pub fn set_views(&mut self, name: &str) -> Result<(), Error> {
        let text = view_policy(name).ok_or_else(|| Error::UnknownViews { name: name.to_owned() })?;
        for (key, value) in flatten(&RecipeOverrides::from_text(name, text)?.overrides) {
            self.insert(&key, value, "--augment")?;
        }
        Ok(())
    }

    /// Sets a key from `KEY=VALUE`, as in `--set`. The value is TOML; a bare word is a string.
    ///
    /// # Errors
    /// [`Error::Set`], [`Error::Key`].
    pub fn set(&mut self, text: &str) -> Result<(), Error> {
        let invalid = || Error::Set { text: text.to_owned() };
        let (key, value) = text.split_once('=').ok_or_else(invalid)?;
        let (key, value) = (key.trim(), value.trim());
        if value.is_empty() {
            return Err(invalid());
        }
        let parsed = format!("x = {value}").parse::<Table>().ok().and_then(|mut t| t.remove("x"));
        self.insert(key, parsed.unwrap_or_else(|| Value::String(value.to_owned())), "--set")
    }

    /// Sets a key. A builder-style [`RecipeOverrides::insert`].
    ///
    /// # Errors
    /// [`Error::Key`] for an unknown key.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Result<RecipeOverrides, Error> {
        self.insert(key, value, "`with`")?;
        Ok(self)
    }

    /// Sets the number of epochs, and shortens the warm-up of the recipe to a tenth of them if it
    /// would take longer.
    ///
    /// # Panics
    /// If `epochs` exceeds `i64::MAX`.
    pub fn epochs(mut self, epochs: u64) -> RecipeOverrides {
        let signed = |n: u64| Value::Integer(i64::try_from(n).expect("a number of epochs"));
        insert(&mut self.overrides, "train.epochs", signed(epochs));
        let warmup = self.get("train.warmup_epochs").and_then(|v| v.as_integer());
        let warmup = warmup.unwrap_or(Recipe::default().train.warmup_epochs as i64) as u64;
        if self.name != "auto" && warmup > epochs / 10 {
            insert(&mut self.overrides, "train.warmup_epochs", signed(epochs / 10));
        }
        self
    }

    /// Applies the overrides to the defaults, as far as that is possible without data: the recipe
    /// `auto` has not made its choices yet.
    ///
    /// # Errors
    /// [`Error::Value`].
    ///
    /// # Examples
    ///
    /// ```
    /// use byol::Recipe;
    ///
    /// let recipe = Recipe::named("cifar10")?.with("train.batch", 64)?.check()?;
    /// assert_eq!(recipe.train.batch, 64);
    /// assert!(Recipe::named("cifar10")?.with("train.batch", -1)?.check().is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn check(&self) -> Result<Recipe, Error> {
        let mut base = Recipe::default();
        if self.name == "auto" {
            // Neutral values, so that only the overrides are checked.
            (base.train.warmup_epochs, base.train.accumulate) = (0, 1);
        }
        self.apply_to(&base)
    }

    /// Returns true if the key is set.
    pub fn contains(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Value of a key, if set.
    pub fn get(&self, key: &str) -> Option<Value> {
        flatten(&self.overrides).into_iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// Applies the overrides to `base` and validates the result.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn apply_to(&self, base: &Recipe) -> Result<Recipe, Error> {
        let invalid =
            |key: &str, e: &toml::de::Error| Error::Value { key: key.into(), reason: e.message().trim().into() };
        let mut table = to_table(base);
        for (key, value) in flatten(&self.overrides) {
            let old = lookup(&table, &key).cloned();
            insert(&mut table, &key, coerce(old, value));
        }
        // One key at a time, so that a type error names its key.
        for (key, value) in flatten(&self.overrides) {
            let mut one = to_table(base);
            let old = lookup(&one, &key).cloned();
            insert(&mut one, &key, coerce(old, value));
            Recipe::deserialize(one).map_err(|e| invalid(&key, &e))?;
        }
        let recipe = Recipe::deserialize(table).map_err(|e| invalid("recipe", &e))?;
        recipe.check()?;
        Ok(recipe)
    }
}

/// Converts integers to floats where the recipe has a float.
fn coerce(old: Option<Value>, new: Value) -> Value {
    match (old, new) {
        (Some(Value::Float(_)), Value::Integer(i)) => Value::Float(i as f64),
        (Some(Value::Array(old)), Value::Array(new)) if old.len() == new.len() => {
            Value::Array(old.into_iter().zip(new).map(|(o, n)| coerce(Some(o), n)).collect())
        }
        (_, new) => new,
    }
}

impl Recipe {
    /// Policies T and T′. Those of spectrograms know the statistics that normalize them.
    #[doc(hidden)]
    pub fn policies(&self) -> [Policy; 2] {
        let Normalization { mean, std } = &self.normalize;
        [&self.views.first, &self.views.second].map(|policy| policy.clone().with_statistics(mean, std))
    }

    /// Loads a built-in recipe by name (`auto`, `cifar10`, …) or a TOML file by path, to adjust and
    /// run.
    ///
    /// ```
    /// use byol::Recipe;
    ///
    /// let overrides = Recipe::named("cifar10")?.epochs(10).with("train.batch", 64)?;
    /// assert_eq!(overrides.check()?.train.batch, 64);
    /// assert!(Recipe::named("cifar10")?.with("train.bach", 64).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Read`], [`Error::Syntax`], [`Error::Key`].
    pub fn named(name: &str) -> Result<RecipeOverrides, Error> {
        RecipeOverrides::from_recipe(name)
    }

    /// Complete TOML of the recipe.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe is plain data")
    }

    /// Validates every value, and the relations between them.
    ///
    /// # Errors
    /// [`Error::Value`] for the first invalid value.
    pub fn check(&self) -> Result<(), Error> {
        self.check_counts()?;
        self.check_ranges()?;
        self.check_batch()?;
        self.check_normalization()?;
        for (name, policy) in [("first", &self.views.first), ("second", &self.views.second)] {
            policy.check().map_err(|(field, reason)| invalid(&format!("views.{name}.{field}"), reason))?;
        }
        Ok(())
    }

    fn check_counts(&self) -> Result<(), Error> {
        let (t, v) = (&self.train, &self.views);
        for (key, value, min, max) in [
            ("train.epochs", t.epochs as usize, 1, 1_000_000),
            ("train.batch", t.batch, 2, 1 << 20),
            ("train.accumulate", t.accumulate, 1, t.batch),
            ("heads.hidden", self.heads.hidden, 1, 1 << 16),
            ("heads.projection", self.heads.projection, 1, 1 << 16),
            ("views.size", v.size, 4, 2048),
            ("views.eval_size", if v.eval_size == 0 { v.size } else { v.eval_size }, 4, 2048),
            ("health.k", self.health.k, 1, 100_000),
            ("checkpoint.keep", self.checkpoint.keep, 1, 1000),
        ] {
            if !(min..=max).contains(&value) {
                return Err(invalid(key, format!("{value} (expected {min} to {max})")));
            }
        }
        Ok(())
    }

    fn check_ranges(&self) -> Result<(), Error> {
        let (o, above_0) = (&self.optimizer, 0.0..f64::MAX);
        let excluding_0 = |value: f64, max: f64| value > 0.0 && value <= max;
        let decay = |value: f64| (0.0..1.0).contains(&value);
        for (key, value, is_valid, range) in [
            ("views.center", self.views.center, excluding_0(self.views.center, 1.0), "above 0, at most 1"),
            ("encoder.width", self.encoder.width, excluding_0(self.encoder.width, 64.0), "above 0, at most 64"),
            ("optimizer.lr", o.lr, o.lr > 0.0, "above 0"),
            ("optimizer.trust_coefficient", o.trust_coefficient, o.trust_coefficient > 0.0, "above 0"),
            ("optimizer.weight_decay", o.weight_decay, above_0.contains(&o.weight_decay), "at least 0"),
            ("optimizer.eps", o.eps, o.eps > 0.0, "above 0"),
            ("optimizer.momentum", o.momentum, decay(o.momentum), "at least 0, below 1"),
            ("optimizer.beta1", o.beta1, decay(o.beta1), "at least 0, below 1"),
            ("optimizer.beta2", o.beta2, decay(o.beta2), "at least 0, below 1"),
            ("norm.decay", self.norm.decay, decay(self.norm.decay), "at least 0, below 1"),
            ("norm.eps", self.norm.eps, self.norm.eps > 0.0, "above 0"),
            ("target.tau", self.target.tau, (0.0..=1.0).contains(&self.target.tau), "0 to 1"),
            ("method.beta", self.method.beta, self.method.beta >= 0.0, "at least 0"),
            ("method.alpha", self.method.alpha, self.method.alpha > 0.0, "above 0"),
            // Lower temperatures overflow the votes.
            ("health.temperature", self.health.temperature, self.health.temperature >= 0.01, "at least 0.01"),
            ("checkpoint.every_minutes", self.checkpoint.every_minutes, self.checkpoint.every_minutes > 0.0, "above 0"),
        ] {
            if !is_valid || !value.is_finite() {
                return Err(invalid(key, format!("{value} (expected {range})")));
            }
        }
        Ok(())
    }

    fn check_batch(&self) -> Result<(), Error> {
        let t = &self.train;
        if t.warmup_epochs >= t.epochs {
            let (warmup, epochs) = (t.warmup_epochs, t.epochs);
            let reason =
                format!("{warmup} (expected fewer than the {epochs} epochs of the run)\nhint: set `--warmup-epochs`");
            return Err(invalid("train.warmup_epochs", reason));
        }
        if !t.batch.is_multiple_of(t.accumulate) || t.batch / t.accumulate < 2 {
            let reason = format!(
                "{} (expected a divisor of batch size {} with at least 2 images per part, for batch norm)",
                t.accumulate, t.batch
            );
            return Err(invalid("train.accumulate", reason));
        }
        Ok(())
    }

    fn check_normalization(&self) -> Result<(), Error> {
        let Normalization { mean, std } = &self.normalize;
        if mean.len() != std.len() || !(1..=MAX_CHANNELS).contains(&mean.len()) {
            let reason = format!("{} means and {} stds (expected one of each per channel)", mean.len(), std.len());
            return Err(invalid("normalize", reason));
        }
        if std.iter().any(|s| !s.is_finite() || *s <= 0.0) || mean.iter().any(|m| !m.is_finite()) {
            return Err(invalid("normalize.std", "expected values above 0".into()));
        }
        Ok(())
    }
}

fn invalid(key: &str, reason: String) -> Error {
    Error::Value { key: key.to_owned(), reason }
}

fn to_table(recipe: &Recipe) -> Table {
    Table::try_from(recipe).expect("a recipe is a table")
}

/// Dotted keys of a recipe, in order.
pub fn known_keys() -> Vec<String> {
    flatten(&to_table(&Recipe::default())).into_iter().map(|(key, _)| key).collect()
}

/// Dotted keys with their values.
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
    // A key without its section is nearest to the key that ends in it.
    let distance = |k: &&str| {
        let last = k.rsplit('.').next().unwrap_or(k);
        let whole = strsim::damerau_levenshtein(word, k);
        let tail = strsim::damerau_levenshtein(word.rsplit('.').next().unwrap_or(word), last);
        (tail.min(whole), whole)
    };
    known.min_by_key(distance).unwrap_or_default().to_owned()
}

/// Parses a complete recipe, as stored in a plan.
///
/// # Errors
/// Description of the first error.
pub fn parse_complete(text: &str) -> Result<Recipe, String> {
    let recipe: Recipe = toml::from_str(text).map_err(|e| e.message().to_owned())?;
    recipe.check().map_err(|e| e.to_string())?;
    Ok(recipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_recipes_are_valid_and_complete() {
        for name in NAMES {
            let recipe = RecipeOverrides::from_recipe(name).unwrap().apply_to(&Recipe::default()).unwrap();
            assert_eq!(parse_complete(&recipe.to_toml()).unwrap(), recipe, "{name}");
        }
    }

    #[test]
    fn imagenet_recipes_match_the_reference() {
        let rows = [
            ("imagenet-1000", 1000, 0.2, 1.5e-6, 0.996),
            ("imagenet-300", 300, 0.3, 1e-6, 0.99),
            ("imagenet-100", 100, 0.45, 1e-6, 0.99),
        ];
        for (name, epochs, lr, decay, tau) in rows {
            let r = RecipeOverrides::from_recipe(name).unwrap().apply_to(&Recipe::default()).unwrap();
            assert_eq!(
                (r.train.epochs, r.optimizer.lr, r.optimizer.weight_decay, r.target.tau),
                (epochs, lr, decay, tau)
            );
            assert_eq!((r.train.batch, r.train.warmup_epochs, r.views.size), (4096, 10, 224));
        }
    }

    #[test]
    fn unknown_key_suggests_the_nearest() {
        let mut overrides = RecipeOverrides::from_recipe("auto").unwrap();
        for (typed, meant) in
            [("target.taw=0.9", "target.tau"), ("tau=0.9", "target.tau"), ("optimiser.lr=1", "optimizer.lr")]
        {
            let Err(Error::Key { nearest, .. }) = overrides.set(typed) else { panic!("{typed} is unknown") };
            assert_eq!(nearest, meant);
        }
        assert!(
            matches!(RecipeOverrides::from_recipe("cifar"), Err(Error::Unknown { nearest, .. }) if nearest == "cifar10")
        );
    }

    #[test]
    fn view_policies_are_valid_and_yield_to_settings() {
        for name in VIEW_POLICIES {
            let mut overrides = RecipeOverrides::from_recipe("cifar10").unwrap();
            overrides.set_views(name).unwrap();
            overrides.set("views.first.rotate=0.25").unwrap();
            let views = overrides.check().unwrap().views;
            assert_eq!(views.first.rotate, 0.25);
            let expected = if name == "spectrogram" { [0.0, 0.0] } else { [0.75, 0.5] };
            assert_eq!([views.second.rotate, views.second.flip_vertical], expected);
        }
        let mut overrides = RecipeOverrides::from_recipe("imagenet-300").unwrap();
        overrides.set_views("spectrogram").unwrap();
        let views = overrides.check().unwrap().views;
        assert_eq!([views.first, views.second], [Policy::spectrogram(), Policy::spectrogram()]);
        assert!(RecipeOverrides::default().set_views("over").unwrap_err().to_string().contains("overhead"));
    }

    #[test]
    fn invalid_values_name_their_key() {
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
            let mut overrides = RecipeOverrides::from_recipe("auto").unwrap();
            overrides.set(text).unwrap();
            let Err(Error::Value { key, .. }) = overrides.apply_to(&Recipe::default()) else {
                panic!("{text} is accepted")
            };
            assert_eq!(text.split('=').next().unwrap(), key, "{text}");
        }
    }

    #[test]
    fn fewer_epochs_shorten_the_warmup() {
        let recipe = Recipe::named("cifar10").unwrap().epochs(10).check().unwrap();
        assert_eq!((recipe.train.epochs, recipe.train.warmup_epochs), (10, 1));
        let recipe = Recipe::named("cifar10").unwrap().epochs(500).check().unwrap();
        assert_eq!((recipe.train.epochs, recipe.train.warmup_epochs), (500, 10));
    }

    #[test]
    fn renamed_keys_keep_their_old_spelling() {
        for (old, new) in RENAMED {
            let mut overrides = RecipeOverrides::from_recipe("auto").unwrap();
            overrides
                .insert(old, if old == "views.finish" { Value::from("cpu") } else { Value::from(0.25) }, "test")
                .unwrap();
            assert!(overrides.contains(new) && overrides.apply_to(&Recipe::default()).is_ok(), "{old}");
            let section = new.rsplit_once('.').unwrap().0;
            let [old, new] = [old, new].map(|key| key.rsplit_once('.').unwrap().1);
            // The default placement is left out of a plan; `auto` is not.
            let text = Recipe::default().to_toml();
            assert!(text.contains(&format!("\n{new} = ")), "[{section}] lacks {new}");
            let recipe = parse_complete(&text.replace(&format!("\n{new} = "), &format!("\n{old} = ")));
            assert_eq!(recipe.unwrap(), Recipe::default(), "[{section}] {old}");
        }
        let text = Recipe::default().to_toml().replace("\"stop\"", "\"go-on\"");
        assert_eq!(parse_complete(&text).unwrap().health.on_collapse, OnCollapse::Continue);
    }

    #[test]
    fn integers_are_accepted_for_floats() {
        let mut overrides = RecipeOverrides::from_recipe("auto").unwrap();
        overrides.set("encoder.width=2").unwrap();
        assert_eq!(overrides.apply_to(&Recipe::default()).unwrap().encoder.width, 2.0);
    }
}

//! The `auto` recipe: chosen from the number and size of the images and from the machine, with
//! reasons.
//!
//! Every choice is a rule: a function that sets its keys of the recipe and returns the reason.
//! Rules run in order, and later ones build on earlier ones. What the user sets stays, and the
//! rules follow it.

use std::path::PathBuf;

use burn::tensor::Device;

use crate::{
    data::{Error, Images, decode::log_mel::BANDS},
    device::{self, Kind, MachineInfo, OpenedDevice, Precision},
    nn::{
        Architecture, Normalization, Stem,
        import::{self, Preparation},
    },
    views::Policy,
};

use super::{
    precision::{self, Bf16Speed},
    recipe::{OptimizerKind, Recipe, RecipeOverrides, TargetInit},
};

/// Inputs of the choice.
#[derive(Debug, Clone)]
pub struct AutoInputs {
    /// Training images.
    pub images: usize,
    /// Median of the images' shorter sides, in pixels.
    pub shorter_side: usize,
    /// CPU or GPU.
    pub kind: Kind,
    /// Hardware threads.
    pub cores: usize,
    /// Measurement of the speed of bf16, if the device supports it.
    pub bf16: Option<Bf16Speed>,
    /// The CPU's kernels use AVX-512.
    pub avx512: bool,
    /// The images are spectrograms of sounds.
    pub sound: bool,
}

impl AutoInputs {
    /// Collects the inputs. Decodes up to 256 images, sampled evenly.
    ///
    /// # Errors
    /// [`Error::Image`] if none of them is readable.
    pub fn collect(images: &Images, opened: &OpenedDevice, machine: &MachineInfo) -> Result<AutoInputs, Error> {
        let sample = images.sample(256)?;
        let mut sides = Vec::new();
        let mut unreadable = None;
        for i in 0..sample.len() {
            match sample.get(i) {
                Ok(image) => sides.push(image.height.min(image.width)),
                Err(error) => unreadable = Some(error),
            }
        }
        if let Some(error) = unreadable.filter(|_| sides.is_empty()) {
            return Err(error);
        }
        sides.sort_unstable();
        let shorter_side = sides.get(sides.len() / 2).copied().unwrap_or(0);
        let (kind, bf16) = (opened.info.kind, precision::bf16_speed(opened));
        let avx512 = machine.isa.starts_with("avx512");
        Ok(AutoInputs {
            images: images.len(),
            shorter_side,
            kind,
            cores: machine.cores,
            bf16,
            avx512,
            sound: images.is_sound(),
        })
    }

    fn is_cpu(&self) -> bool {
        self.kind != Kind::Gpu
    }

    /// Images without border to crop away, such as CIFAR's.
    fn has_small_images(&self) -> bool {
        !self.sound && self.shorter_side <= 64
    }

    /// Largest view that trains in reasonable time.
    fn max_view(&self) -> usize {
        if self.is_cpu() { 96 } else { 224 }
    }
}

/// Images per core and hour in training with ResNet-18 of width 0.25 on 32 px views, AVX-512
/// (docs/log/cifar10.md).
const IMAGES_PER_HOUR: f64 = 7.25e5;

/// [`IMAGES_PER_HOUR`] in bf16.
const IMAGES_PER_HOUR_BF16: f64 = 8.25e5;

/// Speed without AVX-512, relative to [`IMAGES_PER_HOUR`]: 220 to 270 images/s on two cores of Zen
/// 3 (docs/log/build-time.md). It changes the estimate of the time, not the number of epochs.
const SPEED_WITHOUT_AVX512: f64 = 0.6;

/// Images to train on with a GPU.
const GPU_BUDGET: f64 = 40_000_000.0;

/// Multiply-adds of a forward pass relative to ResNet-18 (He et al. 2015, table 1).
fn relative_cost(architecture: Architecture) -> f64 {
    match architecture {
        Architecture::Resnet18 => 1.0,
        Architecture::Resnet34 => 2.0,
        Architecture::Resnet50 => 2.1,
        Architecture::Resnet101 => 4.2,
        Architecture::Resnet152 => 6.3,
        Architecture::Resnet200 => 8.3,
    }
}

/// A rule: sets keys of the recipe and returns the reason; `None` if it does not apply.
type AutoRule = fn(&AutoInputs, &RecipeOverrides, &mut Recipe) -> Option<String>;

/// The rules, in order.
const RULES: [AutoRule; 11] = [
    view_size,
    eval_size,
    encoder,
    compute_precision,
    batch,
    epochs,
    target_decay,
    optimizer,
    center,
    blur,
    spectrogram,
];

/// Chooses a recipe. Returns it with one sentence per choice.
pub fn choose(inputs: &AutoInputs, overrides: &RecipeOverrides) -> (Recipe, Vec<String>) {
    let mut recipe = Recipe::default();
    recipe.target.init = TargetInit::Copy;
    let reasons = RULES.iter().filter_map(|rule| rule(inputs, overrides, &mut recipe)).collect();
    (recipe, reasons)
}

/// Resolves the overrides of any recipe for these images. For `auto`, also returns the reasons.
///
/// # Errors
/// [`train::Error::Recipe`](super::Error::Recipe), and [`train::Error::Data`](super::Error::Data)
/// if no sampled image is readable.
pub fn resolve(
    overrides: &RecipeOverrides,
    images: &Images,
    opened: &OpenedDevice,
) -> Result<(Recipe, Vec<String>), super::Error> {
    let checked = overrides.check()?;
    if overrides.name != "auto" {
        return Ok((checked, Vec::new()));
    }
    let inputs = AutoInputs::collect(images, opened, &device::machine())?;
    let (chosen, reasons) = choose(&inputs, overrides);
    Ok((overrides.apply_to(&chosen)?, reasons))
}

impl RecipeOverrides {
    /// With initial weights (`encoder.from`) and the recipe `auto`, sets architecture, stem and
    /// width to those of the weights, unless they are set.
    ///
    /// # Errors
    /// [`train::Error::Encoder`](super::Error::Encoder).
    pub fn adopt_pretrained_architecture(&mut self) -> Result<(), super::Error> {
        let Some(from) = self.get("encoder.from").filter(|_| self.name == "auto") else { return Ok(()) };
        let path = PathBuf::from(from.as_str().unwrap_or_default());
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        let preparation = Preparation { size: None, normalization: Normalization::default() };
        let spec = import::load(&path, &preparation, &Device::flex())?.spec;
        let stem = if spec.stem == Stem::Cifar { "cifar" } else { "imagenet" };
        for (key, name) in [("encoder.architecture", spec.architecture.name()), ("encoder.stem", stem)] {
            if !self.contains(key) {
                self.insert(key, name, "encoder.from")?;
            }
        }
        if !self.contains("encoder.width") {
            self.insert("encoder.width", spec.width, "encoder.from")?;
        }
        Ok(())
    }
}

/// Integer set by the user.
fn count(overrides: &RecipeOverrides, key: &str) -> Option<usize> {
    overrides.get(key).and_then(|v| v.as_integer()).and_then(|v| usize::try_from(v).ok())
}

/// A CPU is slow at 224 px, and a view larger than the image holds no more detail.
fn view_size(inputs: &AutoInputs, overrides: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    if inputs.sound {
        r.views.size = count(overrides, "views.size").unwrap_or(BANDS);
        return Some(format!("{} px views: spectrograms have {BANDS} bands", r.views.size));
    }
    let (side, max) = (inputs.shorter_side, inputs.max_view());
    let sizes = [32, 48, 64, 96, 128, 160, 224];
    let fitting = sizes.into_iter().rfind(|size| *size <= side.min(max)).unwrap_or(32);
    r.views.size = count(overrides, "views.size").unwrap_or(fitting);
    let slow = match inputs.is_cpu() && side > max {
        true => format!(", and views above {max} px are slow on a CPU"),
        false => String::new(),
    };
    Some(format!("{} px views: the images' shorter side is about {side} px{slow}", r.views.size))
}

fn eval_size(inputs: &AutoInputs, _: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    if !(inputs.is_cpu() && inputs.has_small_images()) {
        return None;
    }
    r.views.eval_size = r.views.size * 5 / 4;
    Some(format!("evaluation at {} px: random crops enlarge objects, evaluation views do not", r.views.eval_size))
}

fn encoder(inputs: &AutoInputs, overrides: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    let by_name = |name: &str| Architecture::ALL.into_iter().find(|a| a.name() == name);
    let architecture = overrides.get("encoder.architecture").and_then(|v| by_name(v.as_str()?));
    let width = overrides.get("encoder.width").and_then(|v| v.as_float().or(v.as_integer().map(|i| i as f64)));
    let why = match (inputs.is_cpu(), architecture.is_some() || width.is_some()) {
        (_, true) => "as requested".to_owned(),
        (true, false) => format!("and heads of 1024 units: trains in reasonable time on {} cores", inputs.cores),
        (false, false) => format!("for {} images on a GPU", inputs.images),
    };
    if inputs.is_cpu() {
        (r.encoder.architecture, r.encoder.width, r.heads.hidden) = (Architecture::Resnet18, 0.25, 1024);
    } else {
        let large = inputs.images >= 100_000 && r.views.size > 64;
        r.encoder.architecture = if large { Architecture::Resnet50 } else { Architecture::Resnet18 };
    }
    r.encoder.architecture = architecture.unwrap_or(r.encoder.architecture);
    r.encoder.width = width.unwrap_or(r.encoder.width);
    Some(format!("{} of width {} {why}", r.encoder.architecture.name(), r.encoder.width))
}

/// bf16 if it is measurably faster, else f32. Later rules follow what the user sets.
fn compute_precision(inputs: &AutoInputs, overrides: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    if let Some(requested) = overrides.get("train.precision") {
        if requested.as_str() == Some("bf16") {
            r.train.precision = Precision::Bf16;
        }
        return None;
    }
    let speed = inputs.bf16?(r);
    if !precision::pays(speed) {
        return Some(format!("f32: bf16 is not faster on this CPU ({speed:.1} times the speed of f32)"));
    }
    r.train.precision = Precision::Bf16;
    Some(match inputs.is_cpu() {
        true => format!("bf16 products and maps with f32 sums: {speed:.1} times as fast as f32 on this CPU"),
        false => "bf16 compute: this GPU has units for it; use `--precision f32` for full precision".into(),
    })
}

/// At least eight updates per epoch. Batch norm needs 16 images or more.
fn batch(inputs: &AutoInputs, overrides: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    let max = if inputs.is_cpu() { 128 } else { 256 };
    let eighth = (inputs.images / 8).max(2).min(inputs.images.max(2));
    let requested = count(overrides, "train.batch");
    r.train.batch = requested.unwrap_or((1usize << eighth.ilog2()).min(max));
    Some(match requested {
        Some(batch) => format!("batch size {batch} as requested"),
        None => format!("batch size {}: at least eight updates per epoch, at most {max} images", r.train.batch),
    })
}

/// A budget of images to train on: a small data set gets many epochs, a large one few.
fn epochs(inputs: &AutoInputs, overrides: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    let budget = if inputs.is_cpu() {
        let hour = if r.train.precision == Precision::Bf16 { IMAGES_PER_HOUR_BF16 } else { IMAGES_PER_HOUR };
        hour * inputs.cores as f64 * (32.0 / r.views.size as f64).powi(2) * (0.25 / r.encoder.width).powf(1.4)
            / relative_cost(r.encoder.architecture)
    } else {
        GPU_BUDGET
    };
    let affordable = (budget / inputs.images.max(1) as f64).round() as u64;
    let affordable = affordable.clamp(if inputs.is_cpu() { 5 } else { 30 }, 400);
    r.train.epochs = count(overrides, "train.epochs").map_or(affordable, |epochs| epochs as u64);
    let tenth = (r.train.epochs / 10).min(10);
    r.train.warmup_epochs = count(overrides, "train.warmup_epochs").map_or(tenth, |epochs| epochs as u64);
    let total = r.train.epochs as f64 * inputs.images as f64;
    let images = if total < 1e5 { format!("{total:.0}") } else { format!("{:.1} million", total / 1e6) };
    let speed = if inputs.avx512 { 1.0 } else { SPEED_WITHOUT_AVX512 };
    let time = match total / budget / speed {
        hours if !inputs.is_cpu() || !hours.is_finite() => String::new(),
        ..0.02 => ", roughly a minute".into(),
        hours @ ..0.75 => format!(", roughly {:.0} minutes", (60.0 * hours).max(2.0)),
        ..1.5 => ", roughly an hour".into(),
        hours => format!(", roughly {hours:.0} hours"),
    };
    let (epochs, s) = (r.train.epochs, if r.train.epochs == 1 { "" } else { "s" });
    Some(format!("{epochs} epoch{s} ({} warm-up): {images} images{time}", r.train.warmup_epochs))
}

/// Number of steps below which a run is short: the target averages the last 1 / (1 − τ) steps.
const SHORT_RUN: u64 = 3000;

/// The reference uses 0.996 for 313 thousand steps, 0.99 for 31 to 94 thousand. In short runs the
/// target follows faster, 1 − τ = 30 / steps, up to 0.1. In runs of 13 epochs a constant 0.9 was
/// ahead of 0.99 (docs/log/ablations.md); in 468 steps no value made a difference
/// (docs/log/cifar10.md).
fn target_decay(inputs: &AutoInputs, overrides: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    if overrides.contains("target.tau") {
        return None;
    }
    let steps = r.train.epochs * inputs.images as u64 / r.train.batch.max(1) as u64;
    if steps < SHORT_RUN {
        r.target.tau = (1e3 * (1.0 - 30.0 / steps.max(1) as f64)).round().max(900.0) / 1e3;
        return Some(format!("tau starts at {}: a faster target for a run of only {steps} steps", r.target.tau));
    }
    r.target.tau = if steps >= 200_000 { 0.996 } else { 0.99 };
    Some(format!("tau starts at {}: the paper's setting closest to {steps} steps", r.target.tau))
}

fn optimizer(inputs: &AutoInputs, _: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    let o = &mut r.optimizer;
    if inputs.is_cpu() {
        (o.kind, o.lr, o.weight_decay) = (OptimizerKind::Sgd, 0.24, 5e-4);
        return Some("SGD with lr 0.24 per 256 images and weight decay 5e-4: better than LARS in short runs".into());
    }
    (o.kind, o.lr, o.weight_decay) = (OptimizerKind::Lars, 1.0, 1e-5);
    (o.trust_coefficient, o.clip_lr) = (0.02, true);
    Some(
        "LARS with lr 1.0 per 256 images, trust coefficient 0.02, clipped: solo-learn's settings for small data".into(),
    )
}

fn center(inputs: &AutoInputs, _: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    if !inputs.has_small_images() {
        return None;
    }
    r.views.center = 1.0;
    Some("evaluation without center crop: the images have no border to spare".into())
}

fn blur(inputs: &AutoInputs, _: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    if inputs.sound || r.views.size > 64 {
        return None;
    }
    for policy in [&mut r.views.first, &mut r.views.second] {
        (policy.brightness, policy.contrast, policy.saturation, policy.blur) = (0.2, 0.5, 0.6, 0.0);
    }
    Some("no blur: views of up to 64 px have no fine detail to remove; color jitter as in the recipe cifar10".into())
}

/// Augmentations of sounds.
fn spectrogram(inputs: &AutoInputs, _: &RecipeOverrides, r: &mut Recipe) -> Option<String> {
    if !inputs.sound {
        return None;
    }
    (r.views.first, r.views.second) = (Policy::spectrogram(), Policy::spectrogram());
    r.views.center = 1.0;
    Some("augmentations of BYOL for Audio: other sounds in the background, crops, linear fades".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(images: usize, side: usize, kind: Kind) -> AutoInputs {
        AutoInputs { images, shorter_side: side, kind, cores: 2, bf16: None, avx512: true, sound: false }
    }

    #[test]
    fn every_choice_is_a_valid_recipe() {
        let overrides = RecipeOverrides::from_recipe("auto").unwrap();
        for images in [16, 100, 1000, 50_000, 1_281_167] {
            for side in [1, 28, 32, 50, 160, 500, 4000] {
                for kind in [Kind::Cpu, Kind::Gpu] {
                    let (recipe, why) = choose(&inputs(images, side, kind), &overrides);
                    assert!(recipe.check().is_ok(), "{images} images of {side} px: {:?}", recipe.check());
                    assert!(recipe.train.batch <= images && why.len() >= 6);
                }
            }
        }
    }

    #[test]
    fn sounds_have_their_own_views() {
        let overrides = RecipeOverrides::from_recipe("auto").unwrap();
        let (recipe, why) = choose(&AutoInputs { sound: true, ..inputs(2000, 64, Kind::Cpu) }, &overrides);
        assert_eq!((recipe.views.size, recipe.views.eval_size), (64, 0));
        let Policy { flip, jitter, time, mixup, .. } = recipe.views.first;
        assert_eq!((flip, jitter, time, mixup), (0.0, 0.0, [0.6, 1.5], 0.4));
        assert!(why.last().unwrap().contains("BYOL for Audio"), "{why:?}");
        assert!(recipe.check().is_ok(), "{:?}", recipe.check());
    }

    #[test]
    fn overrides_shape_the_other_choices() {
        let mut overrides = RecipeOverrides::from_recipe("auto").unwrap();
        overrides.set("train.epochs=3").unwrap();
        overrides.set("views.size=64").unwrap();
        let (recipe, _) = choose(&inputs(50_000, 500, Kind::Cpu), &overrides);
        assert_eq!((recipe.train.epochs, recipe.train.warmup_epochs, recipe.views.first.blur), (3, 0, 0.0));
        overrides.set("train.warmup_epochs=1").unwrap();
        let (recipe, why) = choose(&inputs(50_000, 500, Kind::Cpu), &overrides);
        assert_eq!(recipe.train.warmup_epochs, 1);
        assert!(why.iter().any(|w| w.starts_with("3 epochs (1 warm-up)")), "{why:?}");
    }

    #[test]
    fn target_follows_faster_in_short_runs() {
        let tau = |images: usize, epochs: u64| {
            let overrides = RecipeOverrides::from_recipe("auto").unwrap().epochs(epochs);
            choose(&inputs(images, 32, Kind::Cpu), &overrides).0.target.tau
        };
        assert_eq!([tau(5000, 1), tau(5000, 12), tau(50_000, 4)], [0.9, 0.936, 0.981]);
        assert_eq!([tau(50_000, 29), tau(1_000_000, 40)], [0.99, 0.996]);
    }

    #[test]
    fn larger_networks_and_views_get_fewer_epochs() {
        let epochs = |width: f64, side: usize| {
            let mut overrides = RecipeOverrides::from_recipe("auto").unwrap();
            overrides.set(&format!("encoder.width={width}")).unwrap();
            choose(&inputs(50_000, side, Kind::Cpu), &overrides).0.train.epochs
        };
        assert_eq!(epochs(0.25, 32), 29);
        let overrides = RecipeOverrides::from_recipe("auto").unwrap();
        let (recipe, _) = choose(&AutoInputs { bf16: Some(|_| 2.0), ..inputs(50_000, 32, Kind::Cpu) }, &overrides);
        assert_eq!((recipe.train.epochs, recipe.train.precision), (33, Precision::Bf16));
        let (recipe, why) = choose(&AutoInputs { bf16: Some(|_| 0.6), ..inputs(50_000, 32, Kind::Cpu) }, &overrides);
        assert_eq!((recipe.train.epochs, recipe.train.precision), (29, Precision::F32));
        assert!(why.iter().any(|w| w == "f32: bf16 is not faster on this CPU (0.6 times the speed of f32)"), "{why:?}");
        assert!(epochs(1.0, 32) < 10 && epochs(0.25, 64) < 10);
        let mut overrides = RecipeOverrides::from_recipe("auto").unwrap();
        overrides.set("encoder.architecture=resnet50").unwrap();
        let (recipe, why) = choose(&inputs(1_000_000, 32, Kind::Cpu), &overrides);
        assert_eq!((recipe.encoder.architecture, recipe.train.epochs), (Architecture::Resnet50, 5));
        assert!(why.iter().any(|w| w == "resnet50 of width 0.25 as requested"), "{why:?}");
        assert!(why.iter().any(|w| w.ends_with("roughly 7 hours")), "{why:?}");
        let (slower, why) = choose(&AutoInputs { avx512: false, ..inputs(1_000_000, 32, Kind::Cpu) }, &overrides);
        assert!(slower == recipe && why.iter().any(|w| w.ends_with("roughly 12 hours")), "{why:?}");
    }
}

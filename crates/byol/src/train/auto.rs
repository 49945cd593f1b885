//! The recipe that chooses itself: from the number and size of the images and from the machine, with its reasons. What the user has said
//! stays as said, and the other choices follow from it.

use crate::{
    data::{Error, Images},
    device::{self, Kind, Machine, Opened, Precision},
    nn::Architecture,
};

use super::recipe::{Draft, OptimizerKind, Recipe, TargetInit};

/// What the choice rests on.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Training images.
    pub images: usize,
    /// Median of the images' shorter sides, in pixels.
    pub shorter_side: usize,
    /// Processor or GPU.
    pub kind: Kind,
    /// Threads that can run at once.
    pub cores: usize,
    /// Whether the device is faster with bf16.
    pub bf16: bool,
}

impl Facts {
    /// Looks at up to 256 images, evenly spread.
    ///
    /// # Errors
    /// [`Error::Image`] if none of them can be used.
    pub fn of(images: &Images, opened: &Opened, machine: &Machine) -> Result<Facts, Error> {
        let some = images.sample(256);
        let mut sides = Vec::new();
        let mut unusable = None;
        for i in 0..some.len() {
            match some.get(i) {
                Ok(image) => sides.push(image.height.min(image.width)),
                Err(error) => unusable = Some(error),
            }
        }
        if let Some(error) = unusable.filter(|_| sides.is_empty()) {
            return Err(error);
        }
        sides.sort_unstable();
        let shorter_side = sides.get(sides.len() / 2).copied().unwrap_or(0);
        let cores = machine.cores;
        let (kind, bf16) = (opened.found.kind, device::prefers_bf16(opened));
        Ok(Facts { images: images.len(), shorter_side, kind, cores, bf16 })
    }
}

/// Images that a core takes through training in about an hour: ResNet-18 of width 0.25, views of 32 px, AVX-512 (docs/results.md).
const HOUR: f64 = 7.25e5;

/// The same with bf16.
const HOUR_OF_BF16: f64 = 8.25e5;

/// Products of a forward pass, as a multiple of ResNet-18's (He et al. 2015, table 1).
fn products(architecture: Architecture) -> f64 {
    match architecture {
        Architecture::Resnet18 => 1.0,
        Architecture::Resnet34 => 2.0,
        Architecture::Resnet50 => 2.1,
        Architecture::Resnet101 => 4.2,
        Architecture::Resnet152 => 6.3,
        Architecture::Resnet200 => 8.3,
    }
}

/// A recipe for these facts and the reasons, a sentence each.
pub fn choose(facts: &Facts, draft: &Draft) -> (Recipe, Vec<String>) {
    let mut r = Recipe::default();
    let mut why = Vec::new();
    let cpu = facts.kind != Kind::Gpu;
    let said = |key: &str| draft.get(key);
    let said_count = |key: &str| said(key).and_then(|v| v.as_integer()).and_then(|v| usize::try_from(v).ok());

    // A processor does not get far with 224 px; a view larger than the image holds nothing more.
    let most = if cpu { 96 } else { 224 };
    r.views.size =
        [32, 48, 64, 96, 128, 160, 224].into_iter().rfind(|s| *s <= facts.shorter_side.min(most)).unwrap_or(32);
    r.views.size = said_count("views.size").unwrap_or(r.views.size);
    let small = facts.shorter_side <= 64;
    let slow = if cpu && facts.shorter_side > most {
        format!(", and more than {most} px is slow on a processor")
    } else {
        String::new()
    };
    why.push(format!(
        "views of {} px: the images' shorter side is about {} px{slow}",
        r.views.size, facts.shorter_side
    ));

    if cpu && small {
        r.views.eval_size = r.views.size * 5 / 4;
        why.push(format!(
            "evaluation at {} px: crops enlarge what they show, so the encoder knows larger images better (docs/results.md)",
            r.views.eval_size
        ));
    }

    let architecture =
        said("encoder.architecture").and_then(|v| Architecture::ALL.into_iter().find(|a| Some(a.name()) == v.as_str()));
    let width = said("encoder.width").and_then(|v| v.as_float().or(v.as_integer().map(|i| i as f64)));
    if cpu {
        r.encoder.architecture = Architecture::Resnet18;
        r.encoder.width = 0.25;
        r.heads.hidden = 1024;
    } else {
        let large = facts.images >= 100_000 && r.views.size > 64;
        r.encoder.architecture = if large { Architecture::Resnet50 } else { Architecture::Resnet18 };
    }
    let chosen = (architecture.is_none() && width.is_none()).then_some(match cpu {
        true => format!("with heads of 1024: what {} cores train in reasonable time", facts.cores),
        false => format!("for {} images on a GPU", facts.images),
    });
    r.encoder.architecture = architecture.unwrap_or(r.encoder.architecture);
    r.encoder.width = width.unwrap_or(r.encoder.width);
    why.push(format!(
        "{} of width {} {}",
        r.encoder.architecture.name(),
        r.encoder.width,
        chosen.as_deref().unwrap_or("as was said")
    ));

    let bf16_fits = said("train.precision").is_none_or(|v| v.as_str() == Some("bf16"));
    if facts.bf16 && bf16_fits {
        r.train.precision = Precision::Bf16;
        why.push(match cpu {
            true => "products of bf16 with sums of f32: this processor is a fifth to a half faster with them (docs/performance.md)".into(),
            false => "products and activations of bf16: this GPU has units for them; --precision f32 for all bits".into(),
        });
    }

    // At least eight updates an epoch; batch norm wants 16 or more.
    let most = if cpu { 128 } else { 256 };
    let few = (facts.images / 8).max(2).min(facts.images.max(2));
    let power = 1usize << few.ilog2();
    r.train.batch = power.min(most);
    let said_batch = said_count("train.batch");
    r.train.batch = said_batch.unwrap_or(r.train.batch);
    why.push(match said_batch {
        Some(batch) => format!("batch {batch} as was said"),
        None => format!("batch {}: at least eight updates an epoch, at most {most}", r.train.batch),
    });

    // A budget of images seen, so that a small folder gets many epochs and a large one few.
    let budget = if cpu {
        let hour = if r.train.precision == Precision::Bf16 { HOUR_OF_BF16 } else { HOUR };
        hour * facts.cores as f64 * (32.0 / r.views.size as f64).powi(2) * (0.25 / r.encoder.width).powf(1.4)
            / products(r.encoder.architecture)
    } else {
        40_000_000.0
    };
    let epochs = (budget / facts.images.max(1) as f64).round() as u64;
    r.train.epochs = epochs.clamp(if cpu { 5 } else { 30 }, 400);
    r.train.epochs = said_count("train.epochs").map_or(r.train.epochs, |e| e as u64);
    r.train.warmup_epochs = (r.train.epochs / 10).clamp(0, 10);
    let seen = r.train.epochs as f64 * facts.images as f64;
    why.push(format!(
        "{} epochs, {} of them warm-up: {} images seen{}",
        r.train.epochs,
        r.train.warmup_epochs,
        if seen < 1e5 { format!("{seen:.0}") } else { format!("about {:.1} million", seen / 1e6) },
        match seen / budget {
            hours if !cpu || !hours.is_finite() => String::new(),
            ..0.02 => ", about a minute".into(),
            hours @ ..0.75 => format!(", about {:.0} minutes", (60.0 * hours).max(2.0)),
            ..1.5 => ", an hour or so".into(),
            hours => format!(", about {hours:.0} hours"),
        }
    ));

    // The reference: 0.996 for 313 thousand steps, 0.99 for 31 to 94 thousand. Lower ones collapsed in short runs (docs/results.md).
    let steps = r.train.epochs * facts.images as u64 / r.train.batch.max(1) as u64;
    r.target.tau = if steps >= 200_000 { 0.996 } else { 0.99 };
    why.push(format!(
        "tau from {}: the reference's value for runs of about {steps} steps or the nearest it has",
        r.target.tau
    ));

    if cpu {
        r.optimizer.kind = OptimizerKind::Sgd;
        r.optimizer.lr = 0.24;
        r.optimizer.weight_decay = 5e-4;
        why.push("SGD with rate 0.24 per 256 images, decay 5e-4: in short runs ahead of LARS (docs/results.md)".into());
    } else {
        r.optimizer.kind = OptimizerKind::Lars;
        r.optimizer.lr = 1.0;
        r.optimizer.weight_decay = 1e-5;
        r.optimizer.trust = 0.02;
        r.optimizer.clip_lr = true;
        why.push(
            "LARS with rate 1.0 per 256 images, trust 0.02, clipped: the settings of the best public recipe for small data"
                .into(),
        );
    }
    r.target.init = TargetInit::Copy;
    if small {
        r.views.center = 1.0;
        why.push("evaluation looks at whole images: they have no border to spare".into());
    }
    if r.views.size <= 64 {
        for policy in [&mut r.views.first, &mut r.views.second] {
            (policy.brightness, policy.contrast, policy.saturation, policy.blur) = (0.2, 0.5, 0.6, 0.0);
        }
        why.push(
            "no blur: a view of 64 px or less has no fine detail to take away; jitter as in the recipe cifar10".into(),
        );
    }
    (r, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(images: usize, side: usize, kind: Kind) -> Facts {
        Facts { images, shorter_side: side, kind, cores: 2, bf16: false }
    }

    #[test]
    fn every_choice_is_a_valid_recipe() {
        let draft = Draft::from_recipe("auto").unwrap();
        for images in [16, 100, 1000, 50_000, 1_281_167] {
            for side in [1, 28, 32, 50, 160, 500, 4000] {
                for kind in [Kind::Cpu, Kind::Gpu] {
                    let (recipe, why) = choose(&facts(images, side, kind), &draft);
                    assert!(recipe.check().is_ok(), "{images} images of {side} px: {:?}", recipe.check());
                    assert!(recipe.train.batch <= images && why.len() >= 6);
                }
            }
        }
    }

    #[test]
    fn what_the_user_said_shapes_the_rest() {
        let mut draft = Draft::from_recipe("auto").unwrap();
        draft.set("train.epochs=3").unwrap();
        draft.set("views.size=64").unwrap();
        let (recipe, _) = choose(&facts(50_000, 500, Kind::Cpu), &draft);
        assert_eq!((recipe.train.epochs, recipe.train.warmup_epochs, recipe.views.first.blur), (3, 0, 0.0));
    }

    #[test]
    fn an_hour_is_fewer_images_for_larger_networks_and_views() {
        let epochs = |width: f64, side: usize| {
            let mut draft = Draft::from_recipe("auto").unwrap();
            draft.set(&format!("encoder.width={width}")).unwrap();
            choose(&facts(50_000, side, Kind::Cpu), &draft).0.train.epochs
        };
        assert_eq!(epochs(0.25, 32), 29);
        let draft = Draft::from_recipe("auto").unwrap();
        let (recipe, _) = choose(&Facts { bf16: true, ..facts(50_000, 32, Kind::Cpu) }, &draft);
        assert_eq!((recipe.train.epochs, recipe.train.precision), (33, Precision::Bf16));
        assert!(epochs(1.0, 32) < 10 && epochs(0.25, 64) < 10);
        let mut draft = Draft::from_recipe("auto").unwrap();
        draft.set("encoder.architecture=resnet50").unwrap();
        let (recipe, why) = choose(&facts(1_000_000, 32, Kind::Cpu), &draft);
        assert_eq!((recipe.encoder.architecture, recipe.train.epochs), (Architecture::Resnet50, 5));
        assert!(why.iter().any(|w| w == "resnet50 of width 0.25 as was said"), "{why:?}");
        assert!(why.iter().any(|w| w.ends_with("about 7 hours")), "{why:?}");
    }
}

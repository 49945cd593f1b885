//! Recipe flags that `byol pretrain`, `ablate` and `views` share.

use byol::train::recipe::{RecipeOverrides, VIEW_POLICIES};

use crate::terminal::Result;

/// Flags that choose a recipe.
#[derive(Debug, clap::Args)]
pub struct RecipeArgs {
    /// Recipe: auto, cifar10, imagenet-1000, imagenet-300, imagenet-100, imagenette, audio, a TOML
    /// file, or the folder or `plan.toml` of a run
    #[arg(long, default_value = "auto")]
    pub recipe: String,
    /// Augmentations for a kind of images: overhead (satellite and aerial images), microscopy or
    /// spectrogram (sounds) [default: those of the recipe]
    #[arg(long, value_name = "KIND", value_parser = VIEW_POLICIES, hide_possible_values = true)]
    pub augment: Option<String>,
    /// Override a recipe key, for example target.tau=0.99 (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl RecipeArgs {
    /// Applies `--augment` and `--set`, which takes precedence over all other flags.
    pub fn apply_set(&self, overrides: &mut RecipeOverrides) -> Result<()> {
        if let Some(name) = &self.augment {
            overrides.set_views(name)?;
        }
        for text in &self.set {
            overrides.set(text)?;
        }
        Ok(())
    }
}

/// Flags that set the length of a run.
#[derive(Debug, clap::Args)]
pub struct LengthArgs {
    /// Number of epochs. A recipe's warm-up shrinks to a tenth of them if it would take longer
    #[arg(long, value_name = "N")]
    epochs: Option<i64>,
    /// Number of training images, sampled evenly [default: all]
    #[arg(long, value_name = "N")]
    limit: Option<i64>,
}

impl LengthArgs {
    pub fn apply(&self, overrides: &mut RecipeOverrides) -> Result<()> {
        match self.epochs.map(|n| (n, u64::try_from(n))) {
            Some((_, Ok(n))) => *overrides = overrides.clone().epochs(n),
            // Out of range, which the check of the recipe explains.
            Some((n, Err(_))) => overrides.insert("train.epochs", n, "--epochs")?,
            None => {}
        }
        self.limit.map(|n| overrides.insert("train.limit", n, "--limit")).transpose()?;
        Ok(())
    }
}

//! User-defined augmentations, applied on the host after the built-in ones.

use std::fmt;

use rand_chacha::ChaCha8Rng;

use super::View;
use crate::random::{self, Domain};

/// A user-defined augmentation.
///
/// A loader applies it to both views of every training image, after the built-in augmentations
/// ([`Request::augmentation`](crate::data::prefetch::Request::augmentation)). It runs on the host,
/// so it requires the augmentation placement `cpu`. Monitoring, evaluation and `byol views` use the
/// built-in augmentations only.
///
/// Closures that take `(&mut View, &mut ChaCha8Rng)` implement it.
///
/// # Example
///
/// ```
/// use byol::{
///     random::normal,
///     views::{Augmentation, ChaCha8Rng, View},
/// };
///
/// /// Additive Gaussian noise.
/// struct Noise {
///     std: f64,
/// }
///
/// impl Augmentation for Noise {
///     fn apply(&self, view: &mut View, rng: &mut ChaCha8Rng) {
///         for value in &mut view.pixels {
///             *value += (self.std * normal(rng)) as f32;
///         }
///     }
/// }
/// ```
pub trait Augmentation: Send + Sync {
    /// Augments `view` in place. Its shape must stay; values are clamped to 0..1 afterwards.
    ///
    /// All randomness must come from `rng`, which is seeded by (seed, epoch, image, view): then
    /// runs are reproducible, whatever the number of threads, and resumed runs are bit-identical.
    fn apply(&self, view: &mut View, rng: &mut ChaCha8Rng);
}

impl<F: Fn(&mut View, &mut ChaCha8Rng) + Send + Sync> Augmentation for F {
    fn apply(&self, view: &mut View, rng: &mut ChaCha8Rng) {
        self(view, rng);
    }
}

impl fmt::Debug for dyn Augmentation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Augmentation")
    }
}

/// Applies `augmentation` with the random stream of view `[seed, epoch, image, view]`, and clamps
/// to 0..1. The stream is of a domain of its own, so the built-in augmentations draw the same
/// values with and without it.
///
/// # Panics
/// If the augmentation changes the shape of the view.
pub(super) fn apply(augmentation: &dyn Augmentation, view: &mut View, [seed, epoch, index, which]: [u64; 4]) {
    let shape = |view: &View| (view.height, view.width, view.channels, view.pixels.len());
    let before = shape(view);
    augmentation.apply(view, &mut random::stream(&[Domain::Augmentation as u64, seed, epoch, index, which]));
    assert_eq!(shape(view), before, "an augmentation must keep the shape of the view");
    view.pixels.iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
}

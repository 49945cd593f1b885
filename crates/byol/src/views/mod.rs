//! Views: from an image to an augmented view, one file per augmentation.
//!
//! ```text
//! Policy ── draw(rng) ──▶ Draw ── apply(image, size) ──▶ View
//! probabilities,          sampled parameters             pixels in 0..1
//! strengths               of one view
//! ```
//!
//! - A [`Policy`] holds every probability and strength of one of the two views, T and T′ of the
//!   paper (the recipe's `views.first` and `views.second`).
//! - [`Policy::draw`] samples a [`Draw`] from a random stream keyed by (seed, epoch, image, view).
//!   A view is a pure function of that key: neither the order of the images nor the number of
//!   threads changes it.
//! - [`Draw::apply`] crops, resizes and augments on the host. With the augmentation placement
//!   `device`, the host only crops and [`device::augment`] runs the rest as tensor operations over
//!   a batch.
//!
//! Semantics and order are those of deepmind-research `byol/utils/augmentations.py`
//! (docs/reference/augmentations.md). Except for [`device`], nothing here depends on tensors.
//!
//! # Adding an augmentation
//!
//! 1. `views/NAME.rs`: a pure function of a view and its sampled parameters.
//! 2. A field of [`Policy`] with its default, `#[serde(default)]` so that plans of earlier runs
//!    still load, and its range in [`Policy::check`]. The recipe keys `views.first.NAME` and
//!    `views.second.NAME` follow from it.
//! 3. A field of [`Draw`], sampled in [`Policy::draw`] after all others, and a call in
//!    [`Draw::apply`].
//! 4. The same operation on tensors in [`device::augment`].
//! 5. A row in docs/reference/recipe.md (compared with the code by a test) and an item in
//!    docs/reference/augmentations.md.
//!
//! A program that uses the library can add its own without any of this: see [`Augmentation`].

pub mod blur;
pub mod channel_drop;
pub mod crop;
mod custom;
pub mod device;
pub mod flip;
pub mod gray;
pub mod jitter;
pub mod resize;
pub mod solarize;
pub mod spectrogram;
mod spectrum;

use std::sync::Arc;

use rand_chacha::rand_core::Rng;
use serde::{Deserialize, Serialize};

use crate::{
    image::Image,
    random::{self, Domain, uniform, uniform_in},
};
pub use crop::Window;
pub use custom::Augmentation;
pub use rand_chacha::ChaCha8Rng;
pub use spectrogram::Spectrogram;

/// A view: planes `[channels, height, width]`, row-major, values in 0..1.
///
/// Planes let every operation fill vector registers. Networks take `[height, width, channels]`: see
/// [`View::interleave`].
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Channels.
    pub channels: usize,
    /// `channels × height × width` values.
    pub pixels: Vec<f32>,
}

/// One range of pixels in every channel.
pub type Chunk<'a> = [&'a mut [f32]];

/// Pixels per chunk: all channels of a chunk fit the L1 cache.
const CHUNK: usize = 1024;

/// Calls `f` on the view chunk by chunk.
fn for_each_chunk(view: &mut View, mut f: impl FnMut(&mut Chunk)) {
    let plane = view.height * view.width;
    for from in (0..plane).step_by(CHUNK) {
        let to = (from + CHUNK).min(plane);
        let mut chunk: Vec<&mut [f32]> = view.pixels.chunks_exact_mut(plane).map(|p| &mut p[from..to]).collect();
        f(&mut chunk);
    }
}

impl View {
    /// Creates a view of zeros.
    pub fn new(height: usize, width: usize, channels: usize) -> View {
        View { height, width, channels, pixels: vec![0.0; height * width * channels] }
    }

    /// Creates a view from interleaved values `[height, width, channels]`.
    pub fn from_interleaved(height: usize, width: usize, channels: usize, values: &[f32]) -> View {
        let mut view = View::new(height, width, channels);
        for (k, plane) in view.pixels.chunks_exact_mut(height * width).enumerate() {
            for (v, pixel) in plane.iter_mut().zip(values.chunks_exact(channels)) {
                *v = pixel[k];
            }
        }
        view
    }

    /// Returns the values interleaved, `[height, width, channels]`.
    pub fn interleaved(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.pixels.len()];
        self.interleave(&mut out);
        out
    }

    /// Writes the values interleaved, `[height, width, channels]`, to `out` of the same length.
    pub fn interleave(&self, out: &mut [f32]) {
        let plane = self.height * self.width;
        if self.channels == 3 {
            let (r, rest) = self.pixels.split_at(plane);
            let (g, b) = rest.split_at(plane);
            for (((p, r), g), b) in out.as_chunks_mut::<3>().0.iter_mut().zip(r).zip(g).zip(b) {
                *p = [*r, *g, *b];
            }
        } else {
            for (k, plane) in self.pixels.chunks_exact(plane).enumerate() {
                for (pixel, v) in out.chunks_exact_mut(self.channels).zip(plane) {
                    pixel[k] = *v;
                }
            }
        }
    }
}

/// Buffers that a worker reuses from view to view.
#[derive(Debug, Default)]
pub struct Scratch {
    view: Option<View>,
    values: Vec<f32>,
}

/// Probabilities and strengths of all augmentations of one of the two views, T or T′ in the paper.
///
/// The defaults are the reference's T, the first view.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Smallest and largest fraction of the image area that the crop covers, in (0, 1]. Default:
    /// 0.08 and 1.
    pub area: [f64; 2],
    /// Smallest and largest aspect ratio (width / height) of the crop. Default: 3/4 and 4/3.
    pub aspect: [f64; 2],
    /// Probability of the horizontal flip. Default: 0.5.
    pub flip: f64,
    /// Probability of the color jitter. Default: 0.8.
    pub jitter: f64,
    /// Brightness strength: an offset in ± this is added. Default: 0.4.
    pub brightness: f64,
    /// Contrast strength: the distance from the channel mean is scaled by 1 ± this. Default: 0.4.
    pub contrast: f64,
    /// Saturation strength: the HSV saturation is multiplied by 1 ± this. Default: 0.2.
    pub saturation: f64,
    /// Hue strength: the HSV hue is shifted by ± this, in turns. Default: 0.1.
    pub hue: f64,
    /// Probability of grayscale. Default: 0.2.
    #[serde(alias = "grey")]
    pub gray: f64,
    /// Probability of the blur. Default: 1.0 in T, 0.1 in T′.
    pub blur: f64,
    /// Smallest and largest standard deviation of the blur, in pixels of the view. Default: 0.1 and
    /// 2.0.
    pub sigma: [f64; 2],
    /// Probability of solarization. Default: 0.0 in T, 0.2 in T′.
    pub solarize: f64,
    /// Probability of the vertical flip, for images without an up. Default: 0.0.
    #[serde(default)]
    pub flip_vertical: f64,
    /// Probability of a rotation by 90°, 180° or 270°, for images without an up; 0.75 makes all
    /// four orientations equally likely. Default: 0.0.
    #[serde(default)]
    pub rotate: f64,
    /// Probability that up to half of the channels become 0, for images of many channels. Default:
    /// 0.0.
    #[serde(default)]
    pub channel_drop: f64,
    /// Smallest and largest length of the crop of a spectrogram in time, relative to the sound: up
    /// to 4. `[0, 0]`, the default, crops by `area` and `aspect` instead.
    #[serde(default)]
    pub time: [f64; 2],
    /// Smallest and largest height of the crop of a spectrogram in frequency, relative to the
    /// image; a larger one than 1 is 1. Default: `[0, 0]`, as for `time`.
    #[serde(default)]
    pub frequency: [f64; 2],
    /// Largest weight of another sound in the background of a spectrogram. Default: 0.0.
    #[serde(default)]
    pub mixup: f64,
    /// Strength of the linear fade of a spectrogram, in standard deviations of the data. Default:
    /// 0.0.
    #[serde(default)]
    pub fade: f64,
    /// Mean and standard deviation of each channel of spectrograms, in 0..1.
    #[serde(skip)]
    #[doc(hidden)]
    pub statistics: Vec<[f32; 2]>,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            area: [0.08, 1.0],
            aspect: [3.0 / 4.0, 4.0 / 3.0],
            flip: 0.5,
            jitter: 0.8,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.2,
            hue: 0.1,
            gray: 0.2,
            blur: 1.0,
            sigma: [0.1, 2.0],
            solarize: 0.0,
            flip_vertical: 0.0,
            rotate: 0.0,
            channel_drop: 0.0,
            time: [0.0; 2],
            frequency: [0.0; 2],
            mixup: 0.0,
            fade: 0.0,
            statistics: Vec::new(),
        }
    }
}

impl Policy {
    /// The reference's T′, the second view.
    pub fn second() -> Self {
        Policy { blur: 0.1, solarize: 0.2, ..Policy::default() }
    }

    /// Crop and flip only: the training view of the linear evaluation.
    pub fn crop_and_flip() -> Self {
        Policy { jitter: 0.0, gray: 0.0, blur: 0.0, solarize: 0.0, ..Policy::default() }
    }

    /// Crop of a spectrogram only: the training view of the linear evaluation of sounds.
    pub(crate) fn spectrogram_crop() -> Self {
        Policy { flip: 0.0, time: [0.6, 1.5], frequency: [0.6, 1.5], ..Policy::crop_and_flip() }
    }

    /// Views of sounds, as in `recipes/views/spectrogram.toml`.
    #[doc(hidden)]
    pub fn spectrogram() -> Self {
        Policy { mixup: 0.4, fade: 1.0, ..Policy::spectrogram_crop() }
    }

    /// Sets the mean and standard deviation of each channel, if crops are those of spectrograms.
    #[doc(hidden)]
    pub fn with_statistics(self, mean: &[f32], std: &[f32]) -> Self {
        if !self.is_for_spectrograms() {
            return self;
        }
        Policy { statistics: mean.iter().zip(std).map(|(m, s)| [*m, *s]).collect(), ..self }
    }

    /// True if crops are those of spectrograms.
    pub(crate) fn is_for_spectrograms(&self) -> bool {
        self.time[1] > 0.0
    }

    /// Checks that every field is in its range.
    ///
    /// # Errors
    /// The field, and its value with the valid range, such as `2 (expected 0 to 1)`.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let probabilities = [
            ("flip", self.flip),
            ("jitter", self.jitter),
            ("gray", self.gray),
            ("blur", self.blur),
            ("solarize", self.solarize),
            ("flip_vertical", self.flip_vertical),
            ("rotate", self.rotate),
            ("channel_drop", self.channel_drop),
        ];
        let spectrogram_keys = [("time", self.time), ("frequency", self.frequency)];
        for (name, p) in probabilities {
            if !(0.0..=1.0).contains(&p) {
                return Err((name, format!("{p} (expected a probability, 0 to 1)")));
            }
        }
        let strengths = [
            ("brightness", self.brightness, 1.0),
            ("contrast", self.contrast, 1.0),
            ("saturation", self.saturation, 1.0),
            ("hue", self.hue, 0.5),
            ("mixup", self.mixup, 1.0),
            ("fade", self.fade, 10.0),
        ];
        for (name, s, max) in strengths {
            if !(0.0..=max).contains(&s) {
                return Err((name, format!("{s} (expected 0 to {max})")));
            }
        }
        for (name, [low, high], max) in
            [("area", self.area, 1.0), ("aspect", self.aspect, 100.0), ("sigma", self.sigma, 100.0)]
        {
            if !(low > 0.0 && low <= high && high <= max) {
                return Err((name, format!("[{low}, {high}] (expected [min, max] with 0 < min ≤ max ≤ {max})")));
            }
        }
        for (name, [low, high]) in spectrogram_keys {
            let is_unset = !self.is_for_spectrograms() && [low, high] == [0.0; 2];
            if !(is_unset || low > 0.0 && low <= high && high <= 4.0) {
                return Err((name, format!("[{low}, {high}] (expected [min, max] with 0 < min ≤ max ≤ 4)")));
            }
        }
        let needs_time = [("frequency", self.frequency[1]), ("mixup", self.mixup), ("fade", self.fade)];
        match needs_time.into_iter().find(|(_, value)| *value > 0.0 && !self.is_for_spectrograms()) {
            Some((name, value)) => Err((name, format!("{value} (expected 0, since `time` is not set)"))),
            None => Ok(()),
        }
    }

    /// Samples the parameters of one view. Every parameter is sampled, applied or not, so that
    /// changing one probability leaves all other draws as they were.
    pub fn draw(&self, rng: &mut ChaCha8Rng, image_height: usize, image_width: usize) -> Draw {
        let window = Window::draw(rng, image_height, image_width, self.area, self.aspect);
        let mut chance = |p: f64| uniform(rng) < p;
        let (flip, jitters, gray, blurs, solarize) =
            (chance(self.flip), chance(self.jitter), chance(self.gray), chance(self.blur), chance(self.solarize));
        let mut order = [0, 1, 2, 3];
        random::shuffle(rng, &mut order);
        let values = [
            uniform_in(rng, -self.brightness, self.brightness),
            uniform_in(rng, 1.0 - self.contrast, 1.0 + self.contrast),
            uniform_in(rng, 1.0 - self.saturation, 1.0 + self.saturation),
            uniform_in(rng, -self.hue, self.hue),
        ]
        .map(|v| v as f32);
        let sigma = uniform_in(rng, self.sigma[0], self.sigma[1]);
        let flip_vertical = uniform(rng) < self.flip_vertical;
        let (rotates, turns) = (uniform(rng) < self.rotate, 1 + random::below(rng, 3));
        let (drops, seed) = (uniform(rng) < self.channel_drop, rng.next_u64());
        let &Policy { time, frequency, mixup, fade, ref statistics, .. } = self;
        let ranges = spectrogram::Ranges { frequency, time, mixup, fade, statistics };
        let spectrogram = self.is_for_spectrograms().then(|| Spectrogram::draw(rng, image_height, image_width, ranges));
        Draw {
            window,
            flip,
            jitter: jitters.then_some(jitter::Jitter { order, values }),
            gray,
            blur: blurs.then_some(sigma),
            solarize,
            flip_vertical,
            quarter_turns: if rotates { turns } else { 0 },
            channel_drop: drops.then_some(seed),
            spectrogram,
        }
    }
}

/// Sampled parameters of one view.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// Crop window.
    pub window: Window,
    /// Horizontal flip.
    pub flip: bool,
    /// Color jitter, if applied.
    pub jitter: Option<jitter::Jitter>,
    /// Grayscale.
    pub gray: bool,
    /// Standard deviation of the blur in pixels, if applied.
    pub blur: Option<f64>,
    /// Solarization.
    pub solarize: bool,
    /// Vertical flip.
    pub flip_vertical: bool,
    /// Counterclockwise rotation in quarter turns, 0 to 3, after the flips.
    pub quarter_turns: usize,
    /// Seed of the channel drop, if applied.
    pub channel_drop: Option<u64>,
    /// Crop, background and fade of a spectrogram, in place of `window`.
    pub spectrogram: Option<Spectrogram>,
}

impl Draw {
    /// Number that selects another image as background; `None` if there is none.
    pub(crate) fn background_seed(&self) -> Option<u64> {
        self.spectrogram.as_ref().filter(|s| s.mixup > 0.0).map(|s| s.background_seed)
    }

    /// Sets the image of the background.
    pub(crate) fn set_background(&mut self, image: Arc<Image>) {
        if let Some(spectrogram) = &mut self.spectrogram {
            spectrogram.background = Some(image);
        }
    }

    /// Makes the view with side `size`: crop, resize, clamp, flips, rotation, jitter, grayscale,
    /// blur, solarize, channel drop.
    ///
    /// Values stay in 0..1 after each step. The network normalizes them.
    pub fn apply(&self, image: &Image, size: usize) -> View {
        let mut scratch = Scratch::default();
        self.apply_in(image, size, &mut scratch);
        scratch.view.expect("apply_in sets the view")
    }

    /// Crops and resizes, clamped to 0..1.
    fn crop_in<'a>(&self, image: &Image, size: usize, scratch: &'a mut Scratch) -> (&'a mut View, &'a mut Vec<f32>) {
        let Scratch { view, values } = scratch;
        let shape = (size, size, image.channels);
        if view.as_ref().is_none_or(|v| (v.height, v.width, v.channels) != shape) {
            *view = None;
        }
        let view = view.get_or_insert_with(|| View::new(size, size, image.channels));
        match &self.spectrogram {
            Some(spectrogram) => spectrogram.apply(image, view),
            None => resize::crop_resize_into(image, self.window, view, values),
        }
        (view, values)
    }

    fn apply_in<'a>(&self, image: &Image, size: usize, scratch: &'a mut Scratch) -> &'a mut View {
        let (view, values) = self.crop_in(image, size, scratch);
        if self.flip {
            flip::left_right(view);
        }
        if self.flip_vertical {
            flip::upside_down(view);
        }
        flip::rotate(view, self.quarter_turns, values);
        match (&self.jitter, self.gray) {
            (Some(jitter), true) => jitter.apply(view, gray::grayscale_chunk),
            (Some(jitter), false) => jitter.apply(view, |_| ()),
            (None, true) => gray::grayscale(view),
            (None, false) => {}
        }
        if let Some(sigma) = self.blur {
            blur::gaussian_with(view, sigma, values);
        }
        if self.solarize {
            solarize::solarize(view);
        }
        if let Some(seed) = self.channel_drop {
            channel_drop::drop_channels(view, seed);
        }
        view
    }
}

/// Draws the parameters of [`view`].
pub(crate) fn draw_for(policy: &Policy, image: &Image, key: [u64; 4]) -> Draw {
    let [seed, epoch, index, which] = key;
    let mut rng = random::stream(&[Domain::View as u64, seed, epoch, index, which]);
    policy.draw(&mut rng, image.height, image.width)
}

/// Makes the view with key `[seed, epoch, index, which]`: view `which` (0 or 1) of image `index` in
/// `epoch`. A pure function of its arguments.
pub fn view(policy: &Policy, image: &Image, size: usize, key: [u64; 4]) -> View {
    draw_for(policy, image, key).apply(image, size)
}

/// Makes the view of a draw, followed by a user-defined augmentation if there is one, as
/// interleaved values `[size, size, channels]` in `out`. `key` is that of the draw. Does not
/// allocate once `scratch` has the right size.
///
/// # Panics
/// If the augmentation changes the shape of the view.
pub(crate) fn view_into(
    draw: &Draw,
    augmentation: Option<&dyn Augmentation>,
    image: &Image,
    size: usize,
    key: [u64; 4],
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let view = draw.apply_in(image, size, scratch);
    if let Some(augmentation) = augmentation {
        custom::apply(augmentation, view, key);
    }
    view.interleave(out);
}

/// Makes the crop of a draw as planes `[channels, size, size]` in `out`. The other parameters are
/// still to be applied.
pub(crate) fn crop_into(draw: &Draw, image: &Image, size: usize, scratch: &mut Scratch, out: &mut [f32]) {
    out.copy_from_slice(&draw.crop_in(image, size, scratch).0.pixels);
}

/// Makes the evaluation view of the reference: the center square with this fraction of the shorter
/// side, resized without antialiasing. Nothing is random. Encoders may use another view:
/// [`EncoderSpec::evaluation_view`](crate::nn::EncoderSpec::evaluation_view).
pub fn evaluation_view(image: &Image, size: usize, center: f64) -> View {
    resize::crop_resize(image, Window::center(image.height, image.width, center), size, size)
}

/// Makes the evaluation view of a spectrogram: all of it, resized to a square.
pub(crate) fn spectrogram_view(image: &Image, size: usize) -> View {
    let mut view = View::new(size, size, image.channels);
    Spectrogram::whole(image.height, image.width).apply(image, &mut view);
    view
}

//! VIEWS: from an image to an augmented view, one file an augmentation.
//!
//! Source: deepmind-research `byol/utils/augmentations.py`; semantics and order as there (docs/reference/augmentations.md). A view is
//! a pure function of (seed, epoch, image, which view): its draws come from a random stream of that name, so neither the order of
//! images nor the number of threads can change it. Nothing here knows of tensors; a view is `[H, W, C]` in 0..1.

pub mod blur;
pub mod crop;
pub mod flip;
pub mod grey;
pub mod jitter;
pub mod resize;
pub mod solarize;

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{
    data::Image,
    random::{self, Domain, uniform, uniform_in},
};
pub use crop::Window;

/// A view: one plane a channel, `[channels, height, width]`, row-major, values in 0..1 once finished. Planes, because then every operation
/// fills whole registers; [`View::interleave`] gives what networks take.
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

/// The same stretch of every channel.
pub type Strip<'a> = [&'a mut [f32]];

/// Pixels of a strip: all channels of it fit a first-level cache.
const STRIP: usize = 1024;

/// Hands `f` the view strip by strip.
fn strips(view: &mut View, mut f: impl FnMut(&mut Strip)) {
    let plane = view.height * view.width;
    for from in (0..plane).step_by(STRIP) {
        let to = (from + STRIP).min(plane);
        let mut strip: Vec<&mut [f32]> = view.pixels.chunks_exact_mut(plane).map(|p| &mut p[from..to]).collect();
        f(&mut strip);
    }
}

impl View {
    /// All 0.
    pub fn new(height: usize, width: usize, channels: usize) -> View {
        View { height, width, channels, pixels: vec![0.0; height * width * channels] }
    }

    /// From values in the order `[height, width, channels]`.
    pub fn from_interleaved(height: usize, width: usize, channels: usize, values: &[f32]) -> View {
        let mut view = View::new(height, width, channels);
        for (k, plane) in view.pixels.chunks_exact_mut(height * width).enumerate() {
            for (v, pixel) in plane.iter_mut().zip(values.chunks_exact(channels)) {
                *v = pixel[k];
            }
        }
        view
    }

    /// The values in the order `[height, width, channels]`.
    pub fn interleaved(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.pixels.len()];
        self.interleave(&mut out);
        out
    }

    /// The same into `out`, of as many values.
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

/// Room that a worker keeps from view to view.
#[derive(Debug, Default)]
pub struct Room {
    view: Option<View>,
    values: Vec<f32>,
}

/// How one of the two views is made: every probability and strength. T and T′ of the paper are two of these.
///
/// The defaults are the reference's T, the first view.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Least and greatest share of the image's area that the crop covers, in (0, 1]. 0.08 and 1.
    pub area: [f64; 2],
    /// Least and greatest width / height of the crop. 3/4 and 4/3.
    pub aspect: [f64; 2],
    /// Probability of a left-right flip. 0.5.
    pub flip: f64,
    /// Probability of the colour jitter. 0.8.
    pub jitter: f64,
    /// Brightness: a value in ± this is added. 0.4.
    pub brightness: f64,
    /// Contrast: the distance from the channel's mean is multiplied by 1 ± this. 0.4.
    pub contrast: f64,
    /// Saturation (HSV): multiplied by 1 ± this. 0.2.
    pub saturation: f64,
    /// Hue: turned by ± this, in turns. 0.1.
    pub hue: f64,
    /// Probability of greyscale. 0.2.
    pub grey: f64,
    /// Probability of the blur. 1.0 in T, 0.1 in T′.
    pub blur: f64,
    /// Least and greatest standard deviation of the blur, in pixels of the view. 0.1 and 2.0.
    pub sigma: [f64; 2],
    /// Probability of solarising. 0.0 in T, 0.2 in T′.
    pub solarize: f64,
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
            grey: 0.2,
            blur: 1.0,
            sigma: [0.1, 2.0],
            solarize: 0.0,
        }
    }
}

impl Policy {
    /// The reference's T′, the second view.
    pub fn second() -> Self {
        Policy { blur: 0.1, solarize: 0.2, ..Policy::default() }
    }

    /// Crop and flip alone: the training view of the linear evaluation.
    pub fn crop_and_flip() -> Self {
        Policy { jitter: 0.0, grey: 0.0, blur: 0.0, solarize: 0.0, ..Policy::default() }
    }

    /// Whether every field is in its range; the field and the range where not.
    ///
    /// # Errors
    /// `(field, what is wrong)`.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let probabilities = [
            ("flip", self.flip),
            ("jitter", self.jitter),
            ("grey", self.grey),
            ("blur", self.blur),
            ("solarize", self.solarize),
        ];
        for (name, p) in probabilities {
            if !(0.0..=1.0).contains(&p) {
                return Err((name, format!("is a probability, so from 0 to 1, not {p}")));
            }
        }
        let strengths = [
            ("brightness", self.brightness, 1.0),
            ("contrast", self.contrast, 1.0),
            ("saturation", self.saturation, 1.0),
            ("hue", self.hue, 0.5),
        ];
        for (name, s, most) in strengths {
            if !(0.0..=most).contains(&s) {
                return Err((name, format!("is from 0 to {most}, not {s}")));
            }
        }
        for (name, [low, high], most) in
            [("area", self.area, 1.0), ("aspect", self.aspect, 100.0), ("sigma", self.sigma, 100.0)]
        {
            if !(low > 0.0 && low <= high && high <= most) {
                return Err((
                    name,
                    format!("is [least, greatest] with 0 < least ≤ greatest ≤ {most}, not [{low}, {high}]"),
                ));
            }
        }
        Ok(())
    }

    /// Draws one view's parameters. All draws are made whatever comes of them, so that a changed probability changes nothing else.
    pub fn draw(&self, rng: &mut ChaCha8Rng, image_height: usize, image_width: usize) -> Draw {
        let window = Window::draw(rng, image_height, image_width, self.area, self.aspect);
        let mut apply = |p: f64| uniform(rng) < p;
        let (flip, jitters, grey, blurs, solarize) =
            (apply(self.flip), apply(self.jitter), apply(self.grey), apply(self.blur), apply(self.solarize));
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
        Draw {
            window,
            flip,
            jitter: jitters.then_some(jitter::Jitter { order, values }),
            grey,
            blur: blurs.then_some(sigma),
            solarize,
        }
    }
}

/// What was drawn for one view.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// Which part of the image.
    pub window: Window,
    /// Left-right flip.
    pub flip: bool,
    /// Colour jitter, if any.
    pub jitter: Option<jitter::Jitter>,
    /// Greyscale.
    pub grey: bool,
    /// Standard deviation of the blur in pixels, if any.
    pub blur: Option<f64>,
    /// Solarise.
    pub solarize: bool,
}

impl Draw {
    /// The view of side `size`: crop, resize, clamp, flip, jitter, grey, blur, solarise, with every value in 0..1 after each. Not
    /// normalised; the network does that.
    pub fn apply(&self, image: &Image, size: usize) -> View {
        let mut room = Room::default();
        self.apply_in(image, size, &mut room);
        room.view.expect("a view has been made")
    }

    /// The crop alone, resized and cut to 0..1.
    fn crop_in<'a>(&self, image: &Image, size: usize, room: &'a mut Room) -> (&'a mut View, &'a mut Vec<f32>) {
        let Room { view, values } = room;
        let shape = (size, size, image.channels);
        if view.as_ref().is_none_or(|v| (v.height, v.width, v.channels) != shape) {
            *view = None;
        }
        let view = view.get_or_insert_with(|| View::new(size, size, image.channels));
        resize::into(image, self.window, view, values);
        (view, values)
    }

    fn apply_in<'a>(&self, image: &Image, size: usize, room: &'a mut Room) -> &'a View {
        let (view, values) = self.crop_in(image, size, room);
        if self.flip {
            flip::left_right(view);
        }
        match (&self.jitter, self.grey) {
            (Some(jitter), true) => jitter.apply(view, grey::grey),
            (Some(jitter), false) => jitter.apply(view, |_| ()),
            (None, true) => grey::greyscale(view),
            (None, false) => {}
        }
        if let Some(sigma) = self.blur {
            blur::with_room(view, sigma, values);
        }
        if self.solarize {
            solarize::solarize(view);
        }
        view
    }
}

fn drawn(policy: &Policy, image: &Image, name: [u64; 4]) -> Draw {
    let [seed, epoch, index, which] = name;
    let mut rng = random::stream(&[Domain::View as u64, seed, epoch, index, which]);
    policy.draw(&mut rng, image.height, image.width)
}

/// View `which` (0 or 1) of image `index` in `epoch`, named `[seed, epoch, index, which]`: a pure function of its arguments.
pub fn view(policy: &Policy, image: &Image, size: usize, name: [u64; 4]) -> View {
    drawn(policy, image, name).apply(image, size)
}

/// [`view`] as values `[size, size, channels]` in `out`, without allocating once `room` has the right size.
pub fn view_into(policy: &Policy, image: &Image, size: usize, name: [u64; 4], room: &mut Room, out: &mut [f32]) {
    drawn(policy, image, name).apply_in(image, size, room).interleave(out);
}

/// The crop of [`view`] as planes `[channels, size, size]` in `out`, and what is still to be done with it.
pub fn crop_into(
    policy: &Policy,
    image: &Image,
    size: usize,
    name: [u64; 4],
    room: &mut Room,
    out: &mut [f32],
) -> Draw {
    let draw = drawn(policy, image, name);
    out.copy_from_slice(&draw.crop_in(image, size, room).0.pixels);
    draw
}

/// The view for evaluation: the centre square of this share of the shorter side, resized. No draw.
pub fn evaluation_view(image: &Image, size: usize, center: f64) -> View {
    resize::crop_resize(image, Window::center(image.height, image.width, center), size, size)
}

//! Views of spectrograms as in BYOL for Audio (Niizumi et al. 2021, section III; nttcslab/byol-a):
//! another sound in the background, random resize crop, random linear fade.
//!
//! All three work on normalized values (x − mean) / std, where 0 is the mean of the data set, and
//! are converted back to 0..1 at the end.

use std::sync::Arc;

use rand_chacha::{ChaCha8Rng, rand_core::Rng};

use super::View;
use crate::{
    image::{Image, Pixels},
    random::{below, uniform, uniform_in},
};

/// Crop, background and fade of a view.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrogram {
    /// First row and number of rows of the crop.
    pub rows: (usize, usize),
    /// First column and number of columns of the crop. Columns before and after the image have the
    /// value 0.
    pub columns: (isize, usize),
    /// Weight of the background, in 0..1.
    pub mixup: f32,
    /// Selects the image of the background.
    #[doc(hidden)]
    pub background_seed: u64,
    /// Image of the background. `None` is silence.
    pub background: Option<Arc<Image>>,
    /// Added to the first and the last column, linearly in between.
    pub fade: [f32; 2],
    /// Mean and standard deviation of each channel, in 0..1.
    pub statistics: Vec<[f32; 2]>,
}

/// Statistics of data without measured ones.
const STATISTICS: [f32; 2] = [0.5, 0.25];

/// Ranges of the random parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ranges<'a> {
    pub frequency: [f64; 2],
    pub time: [f64; 2],
    pub mixup: f64,
    pub fade: f64,
    pub statistics: &'a [[f32; 2]],
}

impl Spectrogram {
    /// Draws the parameters for an image. The crop has independent fractions of its rows and
    /// columns, at a uniform position; in time it may extend over the image, which is in the center
    /// of a canvas as long as the longest crop.
    pub(super) fn draw(rng: &mut ChaCha8Rng, height: usize, width: usize, ranges: Ranges) -> Spectrogram {
        let Ranges { frequency, time, mixup, fade, statistics } = ranges;
        let canvas = ((time[1].max(1.0) * width as f64) as usize).max(width);
        let length = |fraction: f64, n: usize, max: usize| ((fraction * n as f64) as usize).clamp(1, max);
        let n_rows = length(uniform_in(rng, frequency[0], frequency[1]), height, height);
        let n_columns = length(uniform_in(rng, time[0], time[1]), width, canvas);
        let (row, column) = (below(rng, height - n_rows + 1), below(rng, canvas - n_columns + 1));
        Spectrogram {
            rows: (row, n_rows),
            columns: (column as isize - ((canvas - width) / 2) as isize, n_columns),
            mixup: (mixup * uniform(rng)) as f32,
            background_seed: rng.next_u64(),
            background: None,
            fade: [(); 2].map(|()| (fade * uniform_in(rng, -1.0, 1.0)) as f32),
            statistics: statistics.to_vec(),
        }
    }

    /// A whole image.
    #[doc(hidden)]
    pub fn whole(height: usize, width: usize) -> Spectrogram {
        Spectrogram {
            rows: (0, height),
            columns: (0, width),
            mixup: 0.0,
            background_seed: 0,
            background: None,
            fade: [0.0; 2],
            statistics: Vec::new(),
        }
    }

    /// Makes the view, clamped to 0..1. A background of fewer columns is repeated.
    ///
    /// # Panics
    /// If the image, its background and the view differ in their channels, or the crop is not in
    /// the image's rows.
    pub fn apply(&self, image: &Image, view: &mut View) {
        let (c, (row, n_rows), (column, n_columns)) = (image.channels, self.rows, self.columns);
        let background = self.background.as_deref().filter(|_| self.mixup > 0.0);
        assert!(c == view.channels && background.is_none_or(|b| b.channels == c), "channels must be equal");
        assert!(row + n_rows <= image.height, "the crop must be in the image");
        let (rows, columns) = (taps(n_rows, view.height), taps(n_columns, view.width));
        let mut crop = vec![0.0f32; n_rows * n_columns];
        for (k, plane) in view.pixels.chunks_exact_mut(view.height * view.width).enumerate() {
            let [mean, std] = self.statistics.get(k).copied().unwrap_or(STATISTICS);
            let normalized =
                |image: &Image, y: usize, x: usize| (value(image, (y * image.width + x) * c + k) - mean) / std;
            for (i, v) in crop.iter_mut().enumerate() {
                let (y, x) = (row + i / n_columns, column + (i % n_columns) as isize);
                *v = match usize::try_from(x).ok().filter(|x| *x < image.width) {
                    None => 0.0,
                    Some(x) => {
                        let own = normalized(image, y, x);
                        background.map_or(own, |other| {
                            mix(own, normalized(other, y.min(other.height - 1), x % other.width), self.mixup)
                        })
                    }
                };
            }
            let [head, tail] = self.fade;
            let step = (tail - head) / view.width.saturating_sub(1).max(1) as f32;
            for (out, (first, weights)) in plane.chunks_exact_mut(view.width).zip(&rows) {
                let line: Vec<f32> = (0..n_columns)
                    .map(|x| weights.iter().enumerate().map(|(i, w)| w * crop[(first + i) * n_columns + x]).sum())
                    .collect();
                for (x, (v, (first, weights))) in out.iter_mut().zip(&columns).enumerate() {
                    let resized: f32 = weights.iter().zip(&line[*first..]).map(|(w, v)| w * v).sum();
                    *v = (mean + std * (resized + head + step * x as f32)).clamp(0.0, 1.0);
                }
            }
        }
    }
}

/// Value of a pixel, in 0..1.
fn value(image: &Image, i: usize) -> f32 {
    match &image.pixels {
        Pixels::U8(values) => f32::from(values[i]) / f32::from(u8::MAX),
        Pixels::U16(values) => f32::from(values[i]) / f32::from(u16::MAX),
    }
}

/// Log-mixup-exp (equation 2 there): ln((1 − λ) exp(a) + λ exp(b)).
fn mix(a: f32, b: f32, lambda: f32) -> f32 {
    let floor = f32::EPSILON.ln();
    // No exponent is positive: values of data that are nearly constant may be large.
    let max = a.max(b).max(floor);
    max + ((1.0 - lambda) * (a - max).exp() + lambda * (b - max).exp() + (floor - max).exp()).ln()
}

/// Inputs of each output position of a bicubic resize as PyTorch computes it: Keys' kernel with
/// a = −0.75, corners aligned, the border repeated. Weights of inputs that repeat are added.
fn taps(n_in: usize, n_out: usize) -> Vec<(usize, Vec<f32>)> {
    const A: f64 = -0.75;
    let keys = |t: f64| match t.abs() {
        t if t <= 1.0 => ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0,
        t => ((A * t - 5.0 * A) * t + 8.0 * A) * t - 4.0 * A,
    };
    let scale = if n_out > 1 { (n_in - 1) as f64 / (n_out - 1) as f64 } else { 0.0 };
    let tap = |i: usize| {
        let center = scale * i as f64;
        let base = center.floor();
        let clamped = |offset: f64| (base + offset).clamp(0.0, (n_in - 1) as f64) as usize;
        let first = clamped(-1.0);
        let mut weights = vec![0.0f32; clamped(2.0) - first + 1];
        for offset in [-1.0, 0.0, 1.0, 2.0] {
            weights[clamped(offset) - first] += keys(center - base - offset) as f32;
        }
        (first, weights)
    };
    (0..n_out).map(tap).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::stream;

    fn ramp(height: usize, width: usize) -> Image {
        let pixels: Vec<u16> = (0..height * width).map(|i| (i * 65535 / (height * width)) as u16).collect();
        Image { height, width, channels: 1, pixels: pixels.into() }
    }

    #[test]
    fn a_whole_image_of_the_size_of_the_view_stays_as_it_is() {
        let (image, mut view) = (ramp(6, 6), View::new(6, 6, 1));
        Spectrogram::whole(6, 6).apply(&image, &mut view);
        for (i, v) in view.pixels.iter().enumerate() {
            assert!((v - value(&image, i)).abs() < 1e-6);
        }
    }

    #[test]
    fn columns_outside_the_image_have_the_mean() {
        let (image, mut view) = (ramp(4, 4), View::new(4, 8, 1));
        let draw = Spectrogram { columns: (-2, 8), statistics: vec![[0.25, 0.1]], ..Spectrogram::whole(4, 4) };
        draw.apply(&image, &mut view);
        assert!(view.pixels.chunks_exact(8).all(|row| [row[0], row[1], row[6], row[7]] == [0.25; 4]));
        assert!((view.pixels[8 + 3] - value(&image, 5)).abs() < 1e-6);
    }

    #[test]
    fn crops_stay_on_the_canvas_and_use_all_of_it() {
        let ranges = Ranges { frequency: [0.6, 1.5], time: [0.6, 1.5], mixup: 0.4, fade: 1.0, statistics: &[] };
        let mut rng = stream(&[7]);
        let draws: Vec<Spectrogram> = (0..500).map(|_| Spectrogram::draw(&mut rng, 64, 96, ranges)).collect();
        assert!(draws.iter().all(|d| d.rows.0 + d.rows.1 <= 64 && d.rows.1 >= 38 && d.mixup < 0.4));
        assert!(draws.iter().all(|d| d.columns.0 >= -24 && d.columns.0 + d.columns.1 as isize <= 120));
        assert!(draws.iter().any(|d| d.columns.0 == -24) && draws.iter().any(|d| d.columns.0 > 20));
        assert!(draws.iter().filter(|d| d.rows.1 == 64).count() > 200, "longer than the image: all of it");
    }

    #[test]
    fn sounds_of_any_length_mix() {
        let (image, background) = (ramp(4, 9), Arc::new(ramp(4, 2)));
        let draw = Spectrogram { mixup: 0.4, background: Some(background), ..Spectrogram::whole(4, 9) };
        let [mut mixed, mut plain] = [View::new(4, 9, 1), View::new(4, 9, 1)];
        draw.apply(&image, &mut mixed);
        Spectrogram { background: None, ..draw }.apply(&image, &mut plain);
        assert_ne!(mixed, plain);
        assert!((mix(1.0, 1.0, 0.3) - 1.0).abs() < 1e-6);
        assert!((mix(900.0, -900.0, 0.5) - 900.0 + 2f32.ln()).abs() < 1e-3 && mix(-900.0, -900.0, 0.5) < -15.0);
    }
}

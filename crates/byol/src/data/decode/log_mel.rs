//! Log-mel spectrograms as librosa computes them, with the settings of BYOL-A (Niizumi et al. 2021,
//! section IV-A): 64 bands of 60 Hz to 7.8 kHz, windows of 64 ms every 10 ms.

use std::sync::{Arc, Mutex};

use realfft::{RealFftPlanner, RealToComplex};

/// Frequency bands.
pub const BANDS: usize = 64;

/// Sample rate of the settings, in Hz. At lower rates, windows and steps have the same duration and
/// the highest frequency is lower.
pub const RATE: u32 = 16_000;

/// Samples per window at [`RATE`].
const WINDOW: f64 = 1024.0;

/// Samples between two windows at [`RATE`].
const STEP: f64 = 160.0;

/// Lowest frequency, in Hz.
const LOWEST: f64 = 60.0;

/// Highest frequency at [`RATE`], in Hz.
const HIGHEST: f64 = 7800.0;

/// Added to each energy, so that silence has a logarithm.
pub const FLOOR: f32 = f32::EPSILON;

/// Log-mel spectrograms of sounds of one sample rate.
pub struct LogMel {
    rate: u32,
    step: usize,
    window: Vec<f32>,
    fft: Arc<dyn RealToComplex<f32>>,
    bands: Vec<Band>,
}

/// Triangular filter over bins of the spectrum.
struct Band {
    /// First bin.
    first: usize,
    /// Weights of the bins from `first`.
    weights: Vec<f32>,
}

impl LogMel {
    /// Returns the settings for a sample rate. Those used last are kept.
    ///
    /// # Panics
    /// If the rate is 0.
    pub fn at(rate: u32) -> Arc<LogMel> {
        static LAST: Mutex<Option<Arc<LogMel>>> = Mutex::new(None);
        let mut last = LAST.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*last {
            Some(log_mel) if log_mel.rate == rate => log_mel.clone(),
            _ => last.insert(Arc::new(LogMel::new(rate))).clone(),
        }
    }

    fn new(rate: u32) -> LogMel {
        assert!(rate > 0, "a sample rate is positive");
        let scale = f64::from(rate) / f64::from(RATE);
        let n = ((WINDOW * scale).round() as usize).max(2);
        // The periodic Hann window.
        let hann = |i: usize| (0.5 - 0.5 * (std::f64::consts::TAU * i as f64 / n as f64).cos()) as f32;
        let bin = f64::from(rate) / n as f64;
        LogMel {
            rate,
            step: ((STEP * scale).round() as usize).max(1),
            window: (0..n).map(hann).collect(),
            fft: RealFftPlanner::new().plan_fft_forward(n),
            bands: bands(HIGHEST * scale, bin, n / 2 + 1),
        }
    }

    /// Number of frames of a sound of `n` samples.
    pub fn frames(&self, n: usize) -> usize {
        n / self.step + 1
    }

    /// Natural logarithms of the energies of a sound, `[columns, BANDS]`, low frequencies first.
    /// Each column is the mean energy of `pool` consecutive frames, the last of the remaining ones.
    /// Frames are centered at multiples of the step; the sound is padded with zeros.
    ///
    /// # Panics
    /// If `pool` is 0.
    pub fn compute(&self, samples: &[f32], pool: usize) -> Vec<f32> {
        assert!(pool > 0, "a column has at least one frame");
        let half = self.window.len() / 2;
        let (mut frame, mut spectrum) = (self.fft.make_input_vec(), self.fft.make_output_vec());
        let mut scratch = self.fft.make_scratch_vec();
        let frames = self.frames(samples.len());
        let mut out = Vec::with_capacity(frames.div_ceil(pool) * BANDS);
        for first in (0..frames).step_by(pool) {
            let pooled = first..(first + pool).min(frames);
            let mut energies = [0.0f32; BANDS];
            for f in pooled.clone() {
                for (i, (value, weight)) in frame.iter_mut().zip(&self.window).enumerate() {
                    let at = (f * self.step + i).checked_sub(half);
                    *value = weight * at.and_then(|at| samples.get(at)).copied().unwrap_or(0.0);
                }
                let transformed = self.fft.process_with_scratch(&mut frame, &mut spectrum, &mut scratch);
                transformed.expect("the buffers have the lengths of the transform");
                for (energy, band) in energies.iter_mut().zip(&self.bands) {
                    let bins = spectrum[band.first..].iter().zip(&band.weights);
                    *energy += bins.map(|(x, w)| x.norm_sqr() * w).sum::<f32>();
                }
            }
            out.extend(energies.map(|energy| (energy / pooled.len() as f32 + FLOOR).ln()));
        }
        out
    }
}

/// Slaney's mel scale: linear below 1 kHz, logarithmic above.
fn mel(hz: f64) -> f64 {
    let linear = hz * 3.0 / 200.0;
    if hz < 1000.0 { linear } else { 15.0 + (hz / 1000.0).ln() * 27.0 / 6.4f64.ln() }
}

/// Inverse of [`mel`].
fn hertz(mel: f64) -> f64 {
    if mel < 15.0 { mel * 200.0 / 3.0 } else { 1000.0 * ((mel - 15.0) * 6.4f64.ln() / 27.0).exp() }
}

/// Triangular filters of unit area, evenly spaced in [`mel`]. `bin` is the width of a bin in Hz.
fn bands(highest: f64, bin: f64, bins: usize) -> Vec<Band> {
    let (low, high) = (mel(LOWEST), mel(highest));
    let corner = |i: usize| hertz(low + (high - low) * i as f64 / (BANDS + 1) as f64);
    let band = |b: usize| {
        let [left, center, right] = [b, b + 1, b + 2].map(corner);
        let weight = |k: usize| {
            let hz = k as f64 * bin;
            let triangle = ((hz - left) / (center - left)).min((right - hz) / (right - center)).max(0.0);
            (triangle * 2.0 / (right - left)) as f32
        };
        let first = ((left / bin).ceil() as usize).min(bins);
        let end = ((right / bin).ceil() as usize).clamp(first, bins);
        Band { first, weights: (first..end).map(weight).collect() }
    };
    (0..BANDS).map(band).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sine(hz: f32, n: usize) -> Vec<f32> {
        (0..n).map(|i| (std::f32::consts::TAU * hz * i as f32 / RATE as f32).sin()).collect()
    }

    /// Band with the most energy in column `column`.
    fn loudest(values: &[f32], column: usize) -> usize {
        let column = &values[column * BANDS..][..BANDS];
        (0..BANDS).max_by(|a, b| column[*a].total_cmp(&column[*b])).unwrap()
    }

    #[test]
    fn a_tone_is_in_the_band_of_its_frequency() {
        let log_mel = LogMel::at(RATE);
        for hz in [200.0, 1000.0, 5000.0] {
            let values = log_mel.compute(&sine(hz, 16_000), 1);
            assert_eq!(values.len(), 101 * BANDS);
            let width = (mel(HIGHEST) - mel(LOWEST)) / (BANDS + 1) as f64;
            let expected = ((mel(f64::from(hz)) - mel(LOWEST)) / width - 1.0).round() as usize;
            assert!(loudest(&values, 50).abs_diff(expected) <= 1, "{hz} Hz");
        }
    }

    /// Values of librosa (golden/sound.py).
    #[test]
    fn agrees_with_librosa() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../../../../golden/sound.json")).unwrap();
        for case in golden["log_mel"].as_array().unwrap() {
            let numbers = |key: &str| case[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let (samples, expected): (Vec<f64>, Vec<f64>) = (numbers("samples"), numbers("log_mel"));
            let samples: Vec<f32> = samples.iter().map(|s| *s as f32 / 32768.0).collect();
            let values = LogMel::at(case["rate"].as_u64().unwrap() as u32).compute(&samples, 1);
            assert_eq!(values.len(), expected.len());
            let error = values.iter().zip(&expected).map(|(v, e)| (f64::from(*v) - e).abs()).fold(0.0, f64::max);
            assert!(error < 1e-4, "{} Hz: off by {error}", case["rate"]);
        }
    }

    #[test]
    fn silence_is_the_floor_and_pooling_averages_energies() {
        let log_mel = LogMel::at(RATE);
        assert!(log_mel.compute(&[0.0; 500], 1).iter().all(|v| *v == FLOOR.ln()));
        let samples = [sine(440.0, 3000), vec![0.0; 3000]].concat();
        let (single, pooled) = (log_mel.compute(&samples, 1), log_mel.compute(&samples, 4));
        assert_eq!((single.len(), pooled.len()), (38 * BANDS, 10 * BANDS));
        let energies = |range: std::ops::Range<usize>| range.map(|f| single[f * BANDS + 9].exp()).collect::<Vec<_>>();
        for (column, range) in [(2, 8..12), (9, 36..38)] {
            let energies = energies(range);
            let mean = energies.iter().sum::<f32>() / energies.len() as f32;
            assert!((pooled[column * BANDS + 9] - mean.ln()).abs() < 1e-4, "column {column}");
        }
    }

    #[test]
    fn every_band_has_a_bin_at_common_rates() {
        for rate in [4000, 8000, 11_025, 16_000] {
            let log_mel = LogMel::new(rate);
            assert!(log_mel.bands.iter().all(|band| band.weights.iter().any(|w| *w > 0.0)), "{rate} Hz");
            assert_eq!(log_mel.frames(rate as usize) / 10, 10, "{rate} Hz");
        }
    }
}

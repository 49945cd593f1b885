//! Initial weights, as the reference draws them.
//!
//! Source: facts of deepmind-research `byol` on Haiku: convolution and linear weights from a normal distribution
//! truncated at two standard deviations, with standard-deviation parameter 1/√fan_in (so the true deviation is about
//! 0.88 of it); biases 0; norm scale 1, shift 0. Each tensor has its own random stream, named by the tensor, so adding a
//! layer does not change the others.

use rand_chacha::ChaCha8Rng;

use crate::random::{self, uniform};

/// `n` draws of a normal with deviation `1/√fan_in`, redrawn while beyond two deviations.
pub fn truncated_normal(rng: &mut ChaCha8Rng, n: usize, fan_in: usize) -> Vec<f32> {
    let scale = 1.0 / (fan_in as f64).sqrt();
    (0..n).map(|_| (random::truncated_normal(rng) * scale) as f32).collect()
}

/// `n` draws of He's normal by fan-out, deviation `√(2 / fan_out)`: what torchvision and the scripts in PyTorch start
/// their convolutions from.
pub fn he_normal_fan_out(rng: &mut ChaCha8Rng, n: usize, fan_out: usize) -> Vec<f32> {
    let scale = (2.0 / fan_out as f64).sqrt();
    (0..n).map(|_| (random::normal(rng) * scale) as f32).collect()
}

/// `n` uniform draws in ±1/√fan_in: PyTorch's default for linear layers.
pub fn torch_linear(rng: &mut ChaCha8Rng, n: usize, fan_in: usize) -> Vec<f32> {
    let scale = 1.0 / (fan_in as f64).sqrt();
    (0..n).map(|_| ((2.0 * uniform(rng) - 1.0) * scale) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_normal_has_the_stated_deviation_and_bound() {
        let mut rng = random::stream(&[random::Domain::Weights as u64, 1]);
        let x = truncated_normal(&mut rng, 40_000, 100);
        let var = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
        assert!((var.sqrt() - 0.8796 * 0.1).abs() < 1e-3, "deviation {}", var.sqrt());
        assert!(x.iter().all(|v| v.abs() <= 0.2 + 1e-6));
    }
}

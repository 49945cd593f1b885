//! Random numbers without a shared generator: a stream is named by numbers (seed, epoch, image, view), so it does not
//! matter who draws first. Order, thread count and resume cannot change a draw.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use sha2::{Digest, Sha256};

/// What a stream is for; keeps two uses of the same seed apart.
#[derive(Debug, Clone, Copy)]
pub enum Domain {
    /// Initial weights.
    Weights = 1,
    /// The order of the images in an epoch.
    Order = 2,
    /// A view of an image.
    View = 3,
    /// Procedural images.
    Synthetic = 4,
    /// Samples of test images.
    Bootstrap = 5,
    /// Which training images an evaluation takes, and in which order.
    Split = 6,
}

/// The stream with this name. Distinct names give independent streams.
pub fn stream(name: &[u64]) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    for word in name {
        hash.update(word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// A stream named by a text as well.
pub fn named_stream(domain: Domain, seed: u64, text: &str) -> ChaCha8Rng {
    let digest = Sha256::digest(text.as_bytes());
    let word = u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"));
    stream(&[domain as u64, seed, word])
}

/// Uniform in [0, 1), 53 bits.
pub fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Uniform in [low, high).
pub fn uniform_in(rng: &mut ChaCha8Rng, low: f64, high: f64) -> f64 {
    low + (high - low) * uniform(rng)
}

/// Uniform in 0..n. The bias of the multiplication is below n / 2^53.
pub fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((uniform(rng) * n as f64) as usize).min(n.saturating_sub(1))
}

/// Standard normal, by Box and Muller.
pub fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let (u, v) = (1.0 - uniform(rng), uniform(rng));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Standard normal, redrawn while beyond two deviations.
pub fn truncated_normal(rng: &mut ChaCha8Rng) -> f64 {
    loop {
        let x = normal(rng);
        if x.abs() <= 2.0 {
            return x;
        }
    }
}

/// Fisher–Yates.
pub fn shuffle<T>(rng: &mut ChaCha8Rng, items: &mut [T]) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(rng, i + 1));
    }
}

/// `(epoch, position)` without end: epoch after epoch all of 0..n, each in an order of its own.
pub fn endless(domain: Domain, seed: u64, n: usize) -> impl Iterator<Item = (u64, usize)> {
    (0..).flat_map(move |epoch| {
        let mut order: Vec<usize> = (0..n).collect();
        shuffle(&mut stream(&[domain as u64, seed, epoch]), &mut order);
        order.into_iter().map(move |i| (epoch, i))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_its_name_alone() {
        let draw = |name: &[u64]| uniform(&mut stream(name));
        assert_eq!(draw(&[1, 2]), draw(&[1, 2]));
        assert_ne!(draw(&[1, 2]), draw(&[2, 1]));
        assert_ne!(draw(&[1, 2]), draw(&[1, 2, 0]));
    }

    #[test]
    fn shuffle_is_a_permutation() {
        let mut x: Vec<usize> = (0..100).collect();
        shuffle(&mut stream(&[7]), &mut x);
        assert_ne!(x, (0..100).collect::<Vec<_>>());
        x.sort_unstable();
        assert_eq!(x, (0..100).collect::<Vec<_>>());
    }
}

//! Random numbers without a shared generator. A stream is derived from a key (seed, epoch, image,
//! view), so draws do not depend on evaluation order, thread count or resume.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use sha2::{Digest, Sha256};

/// Purpose of a stream, which separates uses of the same seed.
#[derive(Debug, Clone, Copy)]
pub enum Domain {
    /// Initial weights.
    Weights = 1,
    /// Order of the images in an epoch.
    Order = 2,
    /// Augmentation of an image.
    View = 3,
    /// Synthetic images.
    Synthetic = 4,
    /// Bootstrap samples of test images.
    Bootstrap = 5,
    /// Selection and order of the training images of an evaluation.
    Split = 6,
    /// A user-defined augmentation of a view.
    Augmentation = 7,
}

/// Creates the stream with this key. Distinct keys give independent streams.
pub fn stream(key: &[u64]) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    for word in key {
        hash.update(word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// Creates a stream whose key includes a text.
pub fn named_stream(domain: Domain, seed: u64, text: &str) -> ChaCha8Rng {
    let digest = Sha256::digest(text.as_bytes());
    let word = u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"));
    stream(&[domain as u64, seed, word])
}

/// Draws uniformly from [0, 1), with 53 bits.
pub fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws uniformly from [low, high).
pub(crate) fn uniform_in(rng: &mut ChaCha8Rng, low: f64, high: f64) -> f64 {
    low + (high - low) * uniform(rng)
}

/// Draws uniformly from 0..n. The bias of the multiplication is below n / 2^53.
pub fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((uniform(rng) * n as f64) as usize).min(n.saturating_sub(1))
}

/// Draws from the standard normal distribution (Box–Muller transform).
pub fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let (u, v) = (1.0 - uniform(rng), uniform(rng));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Draws from the standard normal distribution, truncated at two standard deviations by rejection.
pub fn truncated_normal(rng: &mut ChaCha8Rng) -> f64 {
    loop {
        let x = normal(rng);
        if x.abs() <= 2.0 {
            return x;
        }
    }
}

/// Shuffles in place (Fisher–Yates).
pub fn shuffle<T>(rng: &mut ChaCha8Rng, items: &mut [T]) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(rng, i + 1));
    }
}

/// Endless sequence of `(epoch, position)`: every epoch is a permutation of 0..n of its own.
pub(crate) fn endless(domain: Domain, seed: u64, n: usize) -> impl Iterator<Item = (u64, usize)> {
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
    fn stream_depends_on_its_key_only() {
        let draw = |key: &[u64]| uniform(&mut stream(key));
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

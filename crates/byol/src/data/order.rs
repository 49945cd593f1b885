//! Order of the training images: an endless stream of shuffled epochs, a pure function of (seed,
//! position).
//!
//! A batch may end one epoch and begin the next, so no image is left out, and the number of steps
//! is the reference's: ⌊epochs · images / batch⌋.

use crate::random::{self, Domain};

/// Order of the images for one seed.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    n: usize,
    /// Number of images per shard, and size of the shuffle buffer; `None` for a full shuffle.
    shards: Option<(Vec<usize>, usize)>,
    /// Cached permutation of the epoch used last.
    current: Option<(u64, Vec<u32>)>,
}

impl Order {
    /// Creates the full shuffle of `n` images.
    ///
    /// # Panics
    /// Unless `n` is from 1 to 2³² − 1.
    pub fn new(seed: u64, n: usize) -> Self {
        assert!(n > 0 && u32::try_from(n).is_ok(), "an order needs 1 to 2^32 - 1 images");
        Order { seed, n, shards: None, current: None }
    }

    /// Creates the order of images in shards of these sizes, numbered consecutively.
    ///
    /// Shards come in a shuffled order. Their images pass through a buffer of `buffer` images, from
    /// which the next one is drawn at random. So each shard is read once per epoch, from its
    /// beginning to its end.
    pub(crate) fn sharded(seed: u64, sizes: Vec<usize>, buffer: usize) -> Self {
        let n = sizes.iter().sum();
        Order { shards: Some((sizes, buffer.max(1))), ..Order::new(seed, n) }
    }

    /// Returns (epoch, image) at a position of the stream, all counted from 0.
    pub fn at(&mut self, position: u64) -> (u64, usize) {
        let (epoch, offset) = (position / self.n as u64, (position % self.n as u64) as usize);
        if self.current.as_ref().is_none_or(|(e, _)| *e != epoch) {
            self.current = Some((epoch, self.epoch(epoch)));
        }
        let images = &self.current.as_ref().expect("set above").1;
        (epoch, images[offset] as usize)
    }

    fn epoch(&self, epoch: u64) -> Vec<u32> {
        let mut rng = random::stream(&[Domain::Order as u64, self.seed, epoch]);
        let Some((sizes, buffer_size)) = &self.shards else {
            let mut images: Vec<u32> = (0..self.n as u32).collect();
            random::shuffle(&mut rng, &mut images);
            return images;
        };
        let mut first = 0;
        let mut shards: Vec<_> = sizes
            .iter()
            .map(|size| {
                first += *size as u32;
                first - *size as u32..first
            })
            .collect();
        random::shuffle(&mut rng, &mut shards);
        let mut incoming = shards.into_iter().flatten();
        let mut buffer: Vec<u32> = incoming.by_ref().take(*buffer_size).collect();
        let mut images = Vec::with_capacity(self.n);
        for next in incoming {
            let drawn = random::below(&mut rng, buffer.len());
            images.push(std::mem::replace(&mut buffer[drawn], next));
        }
        random::shuffle(&mut rng, &mut buffer);
        images.extend(buffer);
        images
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(order: &mut Order, e: u64) -> Vec<usize> {
        let n = order.n as u64;
        (0..n).map(|i| order.at(n * e + i).1).collect()
    }

    fn assert_different_permutations(a: Vec<usize>, b: Vec<usize>) {
        assert_ne!(a, b);
        for mut e in [a, b] {
            e.sort_unstable();
            assert_eq!(e, (0..e.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_epoch_is_a_different_permutation() {
        let mut order = Order::new(5, 30);
        let (a, b) = (epoch(&mut order, 0), epoch(&mut order, 1));
        assert_eq!(a.len(), 30);
        assert_different_permutations(a.clone(), b);
        assert_eq!(epoch(&mut order, 0), a, "an earlier epoch is reproduced");
    }

    #[test]
    fn shards_are_read_in_sequence_and_mixed_by_the_buffer() {
        let sizes = vec![40, 10, 50];
        let mut order = Order::sharded(3, sizes.clone(), 8);
        let (a, b) = (epoch(&mut order, 0), epoch(&mut order, 1));
        assert_eq!(a.len(), 100);
        assert_different_permutations(a.clone(), b);
        // The buffer holds 8 images, so position p is filled from the first p + 8 images read.
        let shard_index = |image: usize| if image < 40 { 0 } else { 1 + usize::from(image >= 50) };
        let mut sequence = Vec::new();
        a.iter().for_each(|image| {
            if !sequence.contains(&shard_index(*image)) {
                sequence.push(shard_index(*image))
            }
        });
        let mut images_before = 0;
        for shard in sequence {
            let first = a.iter().position(|image| shard_index(*image) == shard).unwrap();
            assert!(first + 8 >= images_before, "shard {shard} starts at {first}, after {images_before} other images");
            images_before += sizes[shard];
        }
        assert_ne!(a[..20], (0..20).map(|i| a[0] + i).collect::<Vec<_>>(), "images are mixed");
        assert_eq!(epoch(&mut Order::sharded(3, sizes, 8), 0), a);
    }
}

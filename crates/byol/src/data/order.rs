//! The order of the images: an endless stream of shuffled epochs, a pure function of (seed, position).
//!
//! A batch may take its first images from one epoch and its last from the next, so no image is left out, and the number of steps is the
//! reference's: ⌊epochs · images / batch⌋.

use crate::random::{self, Domain};

/// The stream for one seed.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    n: usize,
    /// Images of each shard, and how many the buffer mixes; none where all images are shuffled together.
    shards: Option<(Vec<usize>, usize)>,
    /// The permutation of the epoch last asked for.
    current: Option<(u64, Vec<u32>)>,
}

impl Order {
    /// Of `n` images, at least 1, all shuffled together.
    pub fn new(seed: u64, n: usize) -> Self {
        assert!(n > 0 && u32::try_from(n).is_ok(), "an order is of 1 to 2^32 images");
        Order { seed, n, shards: None, current: None }
    }

    /// Of images in shards of these sizes, numbered through: the shards in a shuffled order, and `buffer` of the images that come up next
    /// always at hand, of which one is taken by chance. So a shard is read from its beginning to its end, once an epoch.
    pub fn of_shards(seed: u64, sizes: Vec<usize>, buffer: usize) -> Self {
        let n = sizes.iter().sum();
        Order { shards: Some((sizes, buffer.max(1))), ..Order::new(seed, n) }
    }

    /// (epoch, image) at a position of the stream, both from 0.
    pub fn at(&mut self, position: u64) -> (u64, usize) {
        let (epoch, place) = (position / self.n as u64, (position % self.n as u64) as usize);
        if self.current.as_ref().is_none_or(|(e, _)| *e != epoch) {
            self.current = Some((epoch, self.epoch(epoch)));
        }
        let images = &self.current.as_ref().expect("set above").1;
        (epoch, images[place] as usize)
    }

    fn epoch(&self, epoch: u64) -> Vec<u32> {
        let mut random = random::stream(&[Domain::Order as u64, self.seed, epoch]);
        let Some((sizes, buffer)) = &self.shards else {
            let mut images: Vec<u32> = (0..self.n as u32).collect();
            random::shuffle(&mut random, &mut images);
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
        random::shuffle(&mut random, &mut shards);
        let mut coming = shards.into_iter().flatten();
        let mut near: Vec<u32> = coming.by_ref().take(*buffer).collect();
        let mut images = Vec::with_capacity(self.n);
        for next in coming {
            let chosen = random::below(&mut random, near.len());
            images.push(std::mem::replace(&mut near[chosen], next));
        }
        random::shuffle(&mut random, &mut near);
        images.extend(near);
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

    /// Two epochs that differ, of every image once.
    fn each_once(a: Vec<usize>, b: Vec<usize>) {
        assert_ne!(a, b);
        for mut e in [a, b] {
            e.sort_unstable();
            assert_eq!(e, (0..e.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_epoch_has_every_image_once_in_an_order_of_its_own() {
        let mut order = Order::new(5, 30);
        let (a, b) = (epoch(&mut order, 0), epoch(&mut order, 1));
        assert_eq!(a.len(), 30);
        each_once(a.clone(), b);
        assert_eq!(epoch(&mut order, 0), a, "going back gives the same");
    }

    #[test]
    fn shards_are_read_one_after_the_other_and_mixed_by_the_buffer() {
        let sizes = vec![40, 10, 50];
        let mut order = Order::of_shards(3, sizes.clone(), 8);
        let (a, b) = (epoch(&mut order, 0), epoch(&mut order, 1));
        assert_eq!(a.len(), 100);
        each_once(a.clone(), b);
        // An image is never read before the buffer can hold it: at place p no more than p + 8 have come up.
        let of = |image: usize| if image < 40 { 0 } else { 1 + usize::from(image >= 50) };
        let mut seen = Vec::new();
        a.iter().for_each(|image| {
            if !seen.contains(&of(*image)) {
                seen.push(of(*image))
            }
        });
        let mut come = 0;
        for shard in seen {
            let first = a.iter().position(|image| of(*image) == shard).unwrap();
            assert!(first + 8 >= come, "shard {shard} is first read at {first}, after {come} images of others");
            come += sizes[shard];
        }
        assert_ne!(a[..20], (0..20).map(|i| a[0] + i).collect::<Vec<_>>(), "mixed");
        assert_eq!(epoch(&mut Order::of_shards(3, sizes, 8), 0), a);
    }
}

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
    /// The permutation of the epoch last asked for.
    current: Option<(u64, Vec<u32>)>,
}

impl Order {
    /// Of `n` images, at least 1.
    pub fn new(seed: u64, n: usize) -> Self {
        assert!(n > 0 && u32::try_from(n).is_ok(), "an order is of 1 to 2^32 images");
        Order { seed, n, current: None }
    }

    /// (epoch, image) at a position of the stream, both from 0.
    pub fn at(&mut self, position: u64) -> (u64, usize) {
        let (epoch, place) = (position / self.n as u64, (position % self.n as u64) as usize);
        if self.current.as_ref().is_none_or(|(e, _)| *e != epoch) {
            let mut images: Vec<u32> = (0..self.n as u32).collect();
            random::shuffle(&mut random::stream(&[Domain::Order as u64, self.seed, epoch]), &mut images);
            self.current = Some((epoch, images));
        }
        let images = &self.current.as_ref().expect("set above").1;
        (epoch, images[place] as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_has_every_image_once_in_an_order_of_its_own() {
        let mut order = Order::new(5, 30);
        let epoch = |order: &mut Order, e: u64| (0..30).map(|i| order.at(30 * e + i).1).collect::<Vec<_>>();
        let (a, b) = (epoch(&mut order, 0), epoch(&mut order, 1));
        assert_ne!(a, b);
        for mut e in [a.clone(), b] {
            e.sort_unstable();
            assert_eq!(e, (0..30).collect::<Vec<_>>());
        }
        assert_eq!(epoch(&mut order, 0), a, "going back gives the same");
    }
}

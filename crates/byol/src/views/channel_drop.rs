//! Channel drop: some channels become 0, so that an encoder does not rely on any one of them (Wang
//! et al. 2023, arXiv:2211.07044).

use super::View;
use crate::random;

/// Sets 1 to ⌊C / 2⌋ random channels to 0. Images of one channel stay as they are.
pub fn drop_channels(view: &mut View, seed: u64) {
    let c = view.channels;
    if c < 2 {
        return;
    }
    let mut rng = random::stream(&[random::Domain::View as u64, seed]);
    let mut channels: Vec<usize> = (0..c).collect();
    let n = 1 + random::below(&mut rng, c / 2);
    random::shuffle(&mut rng, &mut channels);
    let plane = view.height * view.width;
    for channel in &channels[..n] {
        view.pixels[channel * plane..][..plane].fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn up_to_half_of_the_channels_become_0() {
        for c in [1, 2, 3, 13] {
            let mut counts = std::collections::BTreeSet::new();
            for seed in 0..200 {
                let mut view = View { height: 2, width: 2, channels: c, pixels: vec![0.5; 4 * c] };
                drop_channels(&mut view, seed);
                let planes: Vec<&[f32]> = view.pixels.chunks_exact(4).collect();
                assert!(planes.iter().all(|plane| **plane == [0.0; 4] || **plane == [0.5; 4]));
                counts.insert(planes.iter().filter(|plane| plane[0] == 0.0).count());
            }
            let expected: Vec<usize> = if c == 1 { vec![0] } else { (1..=c / 2).collect() };
            assert_eq!(counts.into_iter().collect::<Vec<_>>(), expected, "{c} channels");
        }
    }
}

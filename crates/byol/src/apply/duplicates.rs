//! Near-duplicates: altered copies of an image within a set or across two sets.
//!
//! Embeddings and thumbnails propose pairs, which are confirmed by comparing pixels
//! ([`super::same_image`]). The result therefore depends little on the encoder.
//!
//! A pair is unverified if either image cannot be read; then the embeddings alone decide. No fixed
//! cosine threshold works: an encoder with little spread gives unrelated images 0.99, and in a
//! dense region, such as sunsets, all images are close. So two images are near-duplicates if they
//! are far closer to each other than to their neighborhoods. Distances are 1 − cosine of whitened
//! rows: directions in which all images vary carry little information about a pair.

use byol_kernels::{isa, matmul};
use nalgebra::DMatrix;

use super::{
    neighbors,
    same_image::{self, Match, Signature, Thumbnails},
    search::Index,
};
use crate::eval::{Features, dot};

/// Pair of near-duplicate rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// Lower row, or row of the first set.
    pub a: usize,
    /// Higher row, or row of the second set.
    pub b: usize,
    /// Distance of the embeddings relative to the distance to the tenth neighbor (the geometric
    /// mean of both rows'; across two sets that of `b` in the first set): 0 is identical, 1 is as
    /// far as the neighborhood.
    pub relative_distance: f32,
    /// Evidence of the pixels; `None` if an image cannot be read: the pair is unverified.
    pub evidence: Option<Match>,
}

/// Default threshold on [`Pair::relative_distance`] of unverified pairs (chosen in
/// docs/log/near-duplicates.md).
pub const THRESHOLD: f32 = 0.5;

/// Rank of the neighbor that measures the local density, and number of neighbors per image that are
/// compared by their pixels.
const NEIGHBORS: usize = 10;

/// Number of images with similar thumbnails per image and form of it (whole or center, mirrored or
/// not) that are compared by their pixels.
const SIMILAR_THUMBNAILS: usize = 5;

/// Whitened cosine from which rows are always near-duplicates: with many copies, the tenth neighbor
/// is a copy too.
const IDENTICAL_COSINE: f32 = 0.99;

/// Shrinkage of the second moments towards a multiple of the identity before whitening, as a
/// fraction of the mean variance; scaled up if there are few rows. Chosen on planted copies
/// (docs/log).
const SHRINKAGE: f64 = 0.3;

/// Maximum number of rows the second moments are computed from.
const MAX_MOMENT_ROWS: usize = 1 << 16;

/// Shares of the progress: neighbors by embeddings, and by thumbnails. The rest is the comparison
/// of pixels.
const PROGRESS: [f64; 2] = [0.3, 0.1];

/// Finds near-duplicates within a set, each pair once, sorted by row. `signatures` has the reduced
/// image of each row, or `None` where it cannot be read. Pairs with a relative distance above
/// `threshold` (below 1) are left out: by default none, but [`THRESHOLD`] of unverified pairs.
/// `on_progress` receives the fraction done, up to 1.
///
/// # Panics
/// If the number of signatures differs from the number of rows.
pub fn within(
    index: &Index,
    signatures: &[Option<Signature>],
    threshold: Option<f32>,
    mut on_progress: impl FnMut(f64),
) -> Vec<Pair> {
    assert_eq!(signatures.len(), index.len(), "one signature per row");
    let [by_embedding, by_thumbnail] = PROGRESS;
    let rows = whiten(index.rows(), &whitening_matrix(index.rows()));
    let nearest = neighbors::nearest(&rows, &rows, NEIGHBORS + 1, |share| on_progress(by_embedding * share));
    let others = |i: usize| nearest[i].iter().filter(move |(j, _)| *j != i).take(NEIGHBORS);
    let radius: Vec<f32> = (0..rows.n).map(|i| others(i).last().map_or(0.0, |(_, c)| distance(*c))).collect();
    // With a threshold below 1, which unverified pairs always have, one row of each pair is among
    // the ten nearest of the other.
    let mut candidates: Vec<(usize, usize)> =
        (0..rows.n).flat_map(|i| others(i).map(move |(j, _)| (i.min(*j), i.max(*j)))).collect();
    let thumbnails = Thumbnails::new(signatures);
    let similar = similar_thumbnails(&thumbnails, &thumbnails, SIMILAR_THUMBNAILS + 1, |share| {
        on_progress(by_embedding + by_thumbnail * share);
    });
    candidates.extend(similar.into_iter().filter(|(i, j)| i != j).map(|(i, j)| (i.min(j), i.max(j))));
    candidates.sort_unstable();
    candidates.dedup();
    let score = |a: usize, b: usize| relative(dot(rows.row(a), rows.row(b)), (radius[a] * radius[b]).sqrt());
    decide(&candidates, [signatures, signatures], threshold, score, |share| {
        on_progress(by_embedding + by_thumbnail + (1.0 - by_embedding - by_thumbnail) * share);
    })
}

/// Finds near-duplicates of a row of `index` and a row of `other`, as [`within`]: unverified pairs
/// last, nearest first. `other` must be transformed by [`Index::transform`]; `signatures` are those
/// of the rows of both.
///
/// # Panics
/// If a number of signatures differs from the number of rows.
pub fn across(
    index: &Index,
    other: &Features,
    signatures: [&[Option<Signature>]; 2],
    threshold: Option<f32>,
    mut on_progress: impl FnMut(f64),
) -> Vec<Pair> {
    assert_eq!(signatures.map(<[_]>::len), [index.len(), other.n], "one signature per row");
    let [by_embedding, by_thumbnail] = PROGRESS;
    let whitening = whitening_matrix(index.rows());
    let (rows, other) = (whiten(index.rows(), &whitening), whiten(other, &whitening));
    let nearest = neighbors::nearest(&rows, &other, NEIGHBORS, |share| on_progress(by_embedding * share));
    let radius: Vec<f32> = nearest.iter().map(|n| n.last().map_or(0.0, |(_, c)| distance(*c))).collect();
    let mut candidates: Vec<(usize, usize)> =
        nearest.iter().enumerate().flat_map(|(b, nearest)| nearest.iter().map(move |(a, _)| (*a, b))).collect();
    let thumbnails = signatures.map(Thumbnails::new);
    candidates.extend(similar_thumbnails(&thumbnails[0], &thumbnails[1], SIMILAR_THUMBNAILS, |share| {
        on_progress(by_embedding + by_thumbnail * share);
    }));
    candidates.sort_unstable();
    candidates.dedup();
    let score = |a: usize, b: usize| relative(dot(rows.row(a), other.row(b)), radius[b]);
    let mut pairs = decide(&candidates, signatures, threshold, score, |share| {
        on_progress(by_embedding + by_thumbnail + (1.0 - by_embedding - by_thumbnail) * share);
    });
    pairs.sort_by(|p, q| {
        let by_distance = p.relative_distance.total_cmp(&q.relative_distance);
        p.evidence.is_none().cmp(&q.evidence.is_none()).then(by_distance).then((p.b, p.a).cmp(&(q.b, q.a)))
    });
    pairs
}

/// Pairs (row of `first`, row of `second`) with similar thumbnails: of each image in each form, the
/// `k` nearest whole images of the other set.
fn similar_thumbnails(
    first: &Thumbnails,
    second: &Thumbnails,
    k: usize,
    mut on_progress: impl FnMut(f64),
) -> Vec<(usize, usize)> {
    let is_one_set = std::ptr::eq(first, second);
    let mut pairs = Vec::new();
    let mut steps = 0.0;
    let total = if is_one_set { 4.0 } else { 7.0 };
    let mut search = |bank: &Features, queries: &Features| {
        let nearest = neighbors::nearest(bank, queries, k, |share| on_progress((steps + share) / total));
        steps += 1.0;
        // Images without a signature have the cosine 0 with all others.
        let found = nearest.into_iter().enumerate();
        found
            .flat_map(|(query, near)| near.into_iter().filter(|(_, c)| *c > 0.0).map(move |(row, _)| (row, query)))
            .collect::<Vec<_>>()
    };
    pairs.extend(search(&first.whole, &second.whole));
    for form in &second.altered {
        pairs.extend(search(&first.whole, form));
    }
    // Within one set, the other direction would give the same pairs.
    if !is_one_set {
        for form in &first.altered {
            pairs.extend(search(&second.whole, form).into_iter().map(|(b, a)| (a, b)));
        }
    }
    pairs
}

/// Keeps the candidates that are near-duplicates. `score` returns the relative distance of a pair,
/// and whether its rows are practically identical.
fn decide(
    candidates: &[(usize, usize)],
    [first, second]: [&[Option<Signature>]; 2],
    threshold: Option<f32>,
    score: impl Fn(usize, usize) -> (f32, bool),
    mut on_progress: impl FnMut(f64),
) -> Vec<Pair> {
    let evidence = same_image::compare_all(candidates, first, second, &mut on_progress);
    on_progress(1.0);
    let pair = |(&(a, b), evidence): (&(usize, usize), Option<Match>)| {
        let (relative_distance, is_identical) = score(a, b);
        let is_near = |threshold: f32| relative_distance <= threshold || is_identical;
        let is_readable = first[a].is_some() && second[b].is_some();
        let is_duplicate = match is_readable {
            true => evidence.is_some() && threshold.is_none_or(is_near),
            false => is_near(threshold.unwrap_or(THRESHOLD)),
        };
        is_duplicate.then_some(Pair { a, b, relative_distance, evidence })
    };
    candidates.iter().zip(evidence).filter_map(pair).collect()
}

fn distance(cosine: f32) -> f32 {
    (1.0 - cosine).max(0.0)
}

/// Distance relative to a radius, and whether the rows are practically identical.
fn relative(cosine: f32, radius: f32) -> (f32, bool) {
    // Identical rows can have radius 0.
    let is_identical = cosine >= IDENTICAL_COSINE;
    let radius = if is_identical { 1.0 } else { radius.max(f32::MIN_POSITIVE) };
    (distance(cosine) / radius, is_identical)
}

/// Inverse Cholesky factor of the rows' shrunk second moments, `[F, F]`: whitened rows have equal
/// variances.
fn whitening_matrix(rows: &Features) -> Vec<f32> {
    let dim = rows.dim;
    let step = rows.n.div_ceil(MAX_MOMENT_ROWS).max(1);
    let sample = rows.subset(&(0..rows.n).step_by(step).collect::<Vec<_>>());
    let moments = matmul::tn(isa::current(), &sample.values, &sample.values, [sample.n, dim, dim]);
    let mut moments = DMatrix::from_fn(dim, dim, |i, j| f64::from(moments[i * dim + j]) / sample.n.max(1) as f64);
    let ridge = moments.trace() / dim as f64 * SHRINKAGE * (1.0 + dim as f64 / sample.n.max(1) as f64);
    (0..dim).for_each(|i| moments[(i, i)] += ridge.max(1e-12));
    let factor = moments.cholesky().expect("second moments plus a positive diagonal are positive definite").l();
    let inverse = factor.solve_lower_triangular(&DMatrix::identity(dim, dim)).expect("the diagonal is positive");
    // nalgebra is column-major, the kernels are row-major.
    inverse.transpose().iter().map(|v| *v as f32).collect()
}

fn whiten(rows: &Features, whitening: &[f32]) -> Features {
    let values = matmul::nt(isa::current(), &rows.values, whitening, [rows.n, rows.dim, rows.dim]);
    Features { values, ..*rows }.l2_normalized()
}

/// Groups rows connected by pairs. Groups have at least two rows, are sorted, and are ordered by
/// their first row.
pub fn groups(n: usize, pairs: &[Pair]) -> Vec<Vec<usize>> {
    // Union-find whose roots are the lowest rows.
    let mut parent: Vec<usize> = (0..n).collect();
    fn root(parent: &mut [usize], mut i: usize) -> usize {
        while parent[i] != i {
            parent[i] = parent[parent[i]];
            i = parent[i];
        }
        i
    }
    for pair in pairs {
        let (a, b) = (root(&mut parent, pair.a), root(&mut parent, pair.b));
        parent[a.max(b)] = a.min(b);
    }
    let mut members: std::collections::BTreeMap<usize, Vec<usize>> = std::collections::BTreeMap::new();
    for i in 0..n {
        let root = root(&mut parent, i);
        members.entry(root).or_default().push(i);
    }
    members.into_values().filter(|group| group.len() > 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{image::Image, random};

    /// Random rows whose first coordinates vary far more than the last.
    fn random_rows(n: usize, dim: usize) -> Features {
        let mut rng = random::stream(&[3]);
        let value = |i: usize| (random::uniform(&mut rng) as f32 - 0.4) * 0.9f32.powi((i % dim) as i32);
        Features { n, dim, values: (0..n * dim).map(value).collect() }
    }

    /// Pairs within a table of embeddings alone.
    fn unverified(index: &Index, threshold: f32) -> Vec<Pair> {
        within(index, &vec![None; index.len()], Some(threshold), |_| ())
    }

    fn row_pairs(pairs: &[Pair]) -> Vec<(usize, usize)> {
        pairs.iter().map(|p| (p.a, p.b)).collect()
    }

    #[test]
    fn finds_exactly_the_planted_copies() {
        let (n, dim) = (400, 40);
        let mut features = random_rows(n, dim);
        // Rows 300..330 are scaled and perturbed copies of rows 0..30.
        for i in 0..30 {
            let copy: Vec<f32> =
                features.row(i).iter().enumerate().map(|(j, v)| 1.3 * v + 0.01 * (j % 3) as f32).collect();
            features.values[(300 + i) * dim..(301 + i) * dim].copy_from_slice(&copy);
        }
        let planted: Vec<(usize, usize)> = (0..30).map(|i| (i, 300 + i)).collect();
        let index = Index::new(features.clone());
        let mut last = 0.0;
        // In so few dimensions, unrelated rows are near each other.
        let pairs = within(&index, &vec![None; n], Some(0.3), |fraction| last = fraction);
        assert_eq!((row_pairs(&pairs), last), (planted, 1.0));
        assert!(pairs.iter().all(|p| p.relative_distance >= 0.0 && p.relative_distance <= 0.3));
        // Across two sets.
        let first = Index::new(features.subset(&(0..300).collect::<Vec<_>>()));
        let second = first.transform(features.subset(&(290..330).collect::<Vec<_>>()));
        let mut across = row_pairs(&across(&first, &second, [&vec![None; 300], &vec![None; 40]], Some(0.3), |_| ()));
        across.sort_unstable();
        let identical = (290..300).map(|i| (i, i - 290));
        assert_eq!(across, (0..30).map(|i| (i, i + 10)).chain(identical).collect::<Vec<_>>());
    }

    #[test]
    fn more_copies_than_neighbors_form_one_group() {
        let mut features = random_rows(200, 12);
        for i in 0..25 {
            let copy = features.row(0).to_vec();
            features.values[(100 + i) * 12..(101 + i) * 12].copy_from_slice(&copy);
        }
        let index = Index::new(features);
        let groups = groups(200, &unverified(&index, 0.1));
        assert_eq!(groups, [std::iter::once(0).chain(100..125).collect::<Vec<_>>()]);
    }

    #[test]
    fn tiny_and_constant_sets_are_compared() {
        let index = |rows: &[[f32; 3]]| Index::new(Features { n: rows.len(), dim: 3, values: rows.concat() });
        let count = |index: &Index| unverified(index, THRESHOLD).len();
        assert_eq!(count(&index(&[[1.0, 2.0, 3.0]; 2])), 1);
        assert_eq!(count(&index(&[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])), 0);
        assert_eq!(count(&index(&[[1.0, 2.0, 3.0]; 5])), 10);
        assert_eq!(count(&index(&[[1.0, 2.0, 3.0]])), 0);
    }

    #[test]
    fn groups_are_connected_components() {
        let pair = |a, b| Pair { a, b, relative_distance: 0.1, evidence: None };
        assert_eq!(groups(8, &[pair(5, 6), pair(1, 2), pair(6, 1), pair(3, 7)]), [vec![1, 2, 5, 6], vec![3, 7]]);
    }

    /// Image of random blocks.
    fn mosaic(seed: u64) -> Image {
        let mut rng = random::stream(&[7, seed]);
        let blocks: Vec<u8> = (0..100).map(|_| (255.0 * random::uniform(&mut rng)) as u8).collect();
        let value = |i: usize| blocks[i / 60 / 6 * 10 + i % 60 / 6];
        Image { height: 60, width: 60, channels: 3, pixels: (0..3600).flat_map(|i| [value(i); 3]).collect() }
    }

    /// The right 90 % of an image, mirrored.
    fn mirrored_crop(image: &Image) -> Image {
        let pixel = |i: usize| image.pixels.to_u8()[3 * (i / 54 * 60 + 59 - i % 54)];
        Image { height: 60, width: 54, channels: 3, pixels: (0..60 * 54).flat_map(|i| [pixel(i); 3]).collect() }
    }

    #[test]
    fn pairs_are_confirmed_by_their_pixels() {
        // Images 0..40, and altered copies of the first six. The embeddings are random, except that
        // rows 20 and 21 of different images are identical.
        let mut images: Vec<Image> = (0..40).map(mosaic).collect();
        images.extend((0..6).map(|i| mirrored_crop(&images[i])).collect::<Vec<_>>());
        let mut features = random_rows(46, 12);
        let twin = features.row(20).to_vec();
        features.values[21 * 12..22 * 12].copy_from_slice(&twin);
        let signatures: Vec<Option<Signature>> = images.iter().map(|image| Some(Signature::new(image))).collect();
        let index = Index::new(features.clone());
        let planted: Vec<(usize, usize)> = (0..6).map(|i| (i, 40 + i)).collect();
        let pairs = within(&index, &signatures, None, |_| ());
        assert_eq!(row_pairs(&pairs), planted);
        assert!(pairs.iter().all(|p| p.evidence.is_some_and(|e| e.mirrored && e.correlation > 0.95)));
        // The threshold leaves out what is far apart by the embeddings.
        assert!(within(&index, &signatures, Some(0.0), |_| ()).is_empty());
        // Leakage from one set to the other.
        let first = Index::new(features.subset(&(0..40).collect::<Vec<_>>()));
        let second = first.transform(features.subset(&(40..46).collect::<Vec<_>>()));
        let (known, other) = signatures.split_at(40);
        let mut leaked = row_pairs(&across(&first, &second, [known, other], None, |_| ()));
        leaked.sort_unstable();
        assert_eq!(leaked, (0..6).map(|i| (i, i)).collect::<Vec<_>>());
        // Without one of the images, a pair is unverified and the embeddings decide.
        let mut partial = signatures;
        partial[20] = None;
        let pairs = within(&index, &partial, None, |_| ());
        let unverified: Vec<Pair> = pairs.iter().filter(|p| p.evidence.is_none()).copied().collect();
        assert!(row_pairs(&unverified).contains(&(20, 21)), "{unverified:?}");
        assert!(unverified.iter().all(|p| p.a == 20 || p.b == 20), "{unverified:?}");
        assert_eq!(pairs.len() - unverified.len(), 6);
    }
}

//! Near-duplicates. A fixed cosine cannot tell them: an encoder that spreads images little gives strangers 0.99, and among sunsets all are
//! near. So two images count as the same if they lie far nearer to each other than to those around them. Distances are 1 − cosine of
//! whitened rows: directions in which all images differ say little of two.

use byol_kernels::{
    conv::{self, Input, Shape},
    isa,
};
use nalgebra::DMatrix;

use super::{neighbours, search::Index};
use crate::eval::Features;

/// Two rows that are nearly the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// The earlier row, or that of the first set.
    pub a: usize,
    /// The later row, or that of the second set.
    pub b: usize,
    /// Their distance as a share of that to their tenth neighbours (the geometric mean of both; across two sets that of `b` in the first):
    /// 0 is the same, 1 is like others around.
    pub share: f32,
}

/// Up to this share of the distance to the tenth neighbour two images count as the same (docs/results.md).
pub const SHARE: f32 = 0.5;

/// Neighbours that say how far apart images lie there.
const AROUND: usize = 10;

/// From this whitened cosine on two rows are the same, whatever is around: a tenth neighbour may be one more copy.
const SAME: f32 = 0.99;

/// Which of the equal variance in all directions is added to the variances before they are evened out. More, the fewer rows tell of them.
/// Chosen on planted copies (docs/results.md).
const SHRINKAGE: f64 = 0.3;

/// Rows that variances are taken from at most.
const MOST_ROWS: usize = 1 << 16;

/// All pairs within a set at most `share` apart, each once, in order. `done` is told how much is done, up to 1.
pub fn within(index: &Index, share: f32, done: impl FnMut(f64)) -> Vec<Pair> {
    let rows = whitened(index.rows(), &whitening(index.rows()));
    let near = neighbours::nearest(&rows, &rows, AROUND + 1, done);
    let others = |i: usize| near[i].iter().filter(move |(j, _)| *j != i).take(AROUND);
    let radius: Vec<f32> = (0..rows.n).map(|i| others(i).last().map_or(0.0, |(_, c)| distance(*c))).collect();
    // With a share below 1 one of two is among the ten nearest of the other.
    let mut pairs: Vec<Pair> = (0..rows.n)
        .flat_map(|i| others(i).map(move |(j, c)| (i.min(*j), i.max(*j), *c)))
        .filter_map(|(a, b, c)| counts(a, b, c, (radius[a] * radius[b]).sqrt(), share))
        .collect();
    pairs.sort_by_key(|p| (p.a, p.b));
    pairs.dedup_by_key(|p| (p.a, p.b));
    pairs
}

/// All pairs of a row of `index` and one of `other`, as [`Index::map`] gives it, at most `share` apart, nearest first.
pub fn across(index: &Index, other: &Features, share: f32, done: impl FnMut(f64)) -> Vec<Pair> {
    let whitening = whitening(index.rows());
    let (rows, other) = (whitened(index.rows(), &whitening), whitened(other, &whitening));
    let near = neighbours::nearest(&rows, &other, AROUND, done);
    let of_row = |(b, near): (usize, &Vec<(usize, f32)>)| -> Vec<Pair> {
        let radius = near.last().map_or(0.0, |(_, c)| distance(*c));
        near.iter().filter_map(|(a, c)| counts(*a, b, *c, radius, share)).collect()
    };
    let mut pairs: Vec<Pair> = near.iter().enumerate().flat_map(of_row).collect();
    pairs.sort_by(|p, q| p.share.total_cmp(&q.share).then((p.b, p.a).cmp(&(q.b, q.a))));
    pairs
}

fn distance(cosine: f32) -> f32 {
    (1.0 - cosine).max(0.0)
}

fn counts(a: usize, b: usize, cosine: f32, radius: f32, most: f32) -> Option<Pair> {
    // Of rows that are the same whatever is around, the share says nothing.
    let share = if cosine >= SAME { distance(cosine) } else { distance(cosine) / radius.max(f32::MIN_POSITIVE) };
    (share <= most || cosine >= SAME).then_some(Pair { a, b, share })
}

/// The inverse of the Cholesky factor of the rows' second moments, `[F, F]`: rows times it have equal variances.
fn whitening(rows: &Features) -> Vec<f32> {
    let dim = rows.dim;
    let step = rows.n.div_ceil(MOST_ROWS).max(1);
    let some = rows.subset(&(0..rows.n).step_by(step).collect::<Vec<_>>());
    let s = linear(some.n, dim);
    let moments = match some.n {
        0 => vec![0.0; dim * dim],
        _ => conv::backward_weight(isa::chosen(), &s, Input::from(&some.values[..]), &some.values),
    };
    let mut moments = DMatrix::from_fn(dim, dim, |i, j| f64::from(moments[i * dim + j]) / some.n.max(1) as f64);
    let even = moments.trace() / dim as f64 * SHRINKAGE * (1.0 + dim as f64 / some.n.max(1) as f64);
    (0..dim).for_each(|i| moments[(i, i)] += even.max(1e-12));
    let factor = moments.cholesky().expect("second moments with something on the diagonal are positive definite").l();
    let inverse = factor.solve_lower_triangular(&DMatrix::identity(dim, dim)).expect("its diagonal is positive");
    // Column-major there, an output after the other here.
    inverse.transpose().iter().map(|v| *v as f32).collect()
}

fn whitened(rows: &Features, by: &[f32]) -> Features {
    let values = match rows.n {
        0 => Vec::new(),
        _ => conv::forward(isa::chosen(), &linear(rows.n, rows.dim), &rows.values, by),
    };
    Features { values, ..*rows }.unit()
}

/// A linear layer is a convolution of maps of one pixel.
fn linear(n: usize, dim: usize) -> Shape {
    Shape { n, h: 1, w: 1, c_in: dim, c_out: dim, kernel: 1, stride: 1, padding: 0, dilation: 1 }
}

/// Groups of rows that hang together by pairs, each in order, the groups by their first row.
pub fn groups(n: usize, pairs: &[Pair]) -> Vec<Vec<usize>> {
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
        // The earlier row stands for the group.
        parent[a.max(b)] = a.min(b);
    }
    let mut members: std::collections::BTreeMap<usize, Vec<usize>> = std::collections::BTreeMap::new();
    for i in 0..n {
        let of = root(&mut parent, i);
        members.entry(of).or_default().push(i);
    }
    members.into_values().filter(|group| group.len() > 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    /// Rows of which the first coordinates vary far more than the last.
    fn rows(n: usize, dim: usize) -> Features {
        let mut rng = random::stream(&[3]);
        let value = |i: usize| (random::uniform(&mut rng) as f32 - 0.4) * 0.9f32.powi((i % dim) as i32);
        Features { n, dim, values: (0..n * dim).map(value).collect() }
    }

    fn named(pairs: &[Pair]) -> Vec<(usize, usize)> {
        pairs.iter().map(|p| (p.a, p.b)).collect()
    }

    #[test]
    fn planted_copies_are_found_and_no_others() {
        let (n, dim) = (400, 40);
        let mut features = rows(n, dim);
        // Rows 300.. are rows 0.. , larger and a little off.
        for i in 0..30 {
            let copy: Vec<f32> =
                features.row(i).iter().enumerate().map(|(j, v)| 1.3 * v + 0.01 * (j % 3) as f32).collect();
            features.values[(300 + i) * dim..(301 + i) * dim].copy_from_slice(&copy);
        }
        let planted: Vec<(usize, usize)> = (0..30).map(|i| (i, 300 + i)).collect();
        let index = Index::new(features.clone());
        let mut last = 0.0;
        // Rows of so few dimensions have strangers nearby.
        let found = within(&index, 0.3, |share| last = share);
        assert_eq!((named(&found), last), (planted, 1.0));
        assert!(found.iter().all(|p| p.share >= 0.0 && p.share <= 0.3));
        // As the second of two sets.
        let first = Index::new(features.subset(&(0..300).collect::<Vec<_>>()));
        let second = first.map(features.subset(&(290..330).collect::<Vec<_>>()));
        let mut across = named(&across(&first, &second, 0.3, |_| ()));
        across.sort_unstable();
        let same = (290..300).map(|i| (i, i - 290));
        assert_eq!(across, (0..30).map(|i| (i, i + 10)).chain(same).collect::<Vec<_>>());
    }

    #[test]
    fn a_burst_of_more_copies_than_are_looked_at_is_one_group() {
        let mut features = rows(200, 12);
        for i in 0..25 {
            let copy = features.row(0).to_vec();
            features.values[(100 + i) * 12..(101 + i) * 12].copy_from_slice(&copy);
        }
        let index = Index::new(features);
        let groups = groups(200, &within(&index, 0.1, |_| ()));
        assert_eq!(groups, [std::iter::once(0).chain(100..125).collect::<Vec<_>>()]);
    }

    #[test]
    fn two_rows_and_equal_rows_are_compared_as_they_are() {
        let of = |rows: &[[f32; 3]]| Index::new(Features { n: rows.len(), dim: 3, values: rows.concat() });
        let pairs = |index: &Index| within(index, SHARE, |_| ()).len();
        assert_eq!(pairs(&of(&[[1.0, 2.0, 3.0]; 2])), 1);
        assert_eq!(pairs(&of(&[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])), 0);
        assert_eq!(pairs(&of(&[[1.0, 2.0, 3.0]; 5])), 10);
        assert_eq!(pairs(&of(&[[1.0, 2.0, 3.0]])), 0);
    }

    #[test]
    fn pairs_that_share_a_row_are_one_group() {
        let pair = |a, b| Pair { a, b, share: 0.1 };
        assert_eq!(groups(8, &[pair(5, 6), pair(1, 2), pair(6, 1), pair(3, 7)]), [vec![1, 2, 5, 6], vec![3, 7]]);
    }
}

//! Comparison of two images by their pixels: detects altered copies (cropped, mirrored, resized,
//! re-encoded, brighter, darker or gray).
//!
//! Both images are reduced to 64 × 64 gray pixels. One is aligned with the other, mirrored or not,
//! by a search over crops at 16 × 16 pixels and by Gauss-Newton steps at 32 × 32 and 64 × 64 (Lucas
//! and Kanade 1981, with gain and offset of the brightness). A match needs both: a high correlation
//! of the aligned pixels, and a high correlation of their details, overall and in nearly every part
//! of the image. Details are the difference of two Gaussians, divided by its local strength, so
//! that an outline does not outweigh the texture inside it. Unrelated images of the same
//! composition, such as two ships on the sea, meet the first condition only. Images with few
//! details or with edges in one direction, which can be aligned with many others, match only
//! without scaling and shifting.
//!
//! Limits: color is compared only for images with few details, and a plain shape matches the same
//! shape in another size. Thresholds: docs/log/near-duplicates.md.

use std::{ops::Range, sync::LazyLock};

use image::{ImageBuffer, Luma, imageops};
use nalgebra::{SMatrix, SVector};
use rayon::prelude::*;

use crate::{
    eval::{Features, dot},
    image::{CHANNELS, Image},
};

/// Side of the reduced image.
const SIDE: usize = 64;

/// Side at which crops are searched.
const COARSE: usize = 16;

/// Side of the vectors by which similar images are found without an encoder.
const THUMBNAIL: usize = 8;

/// Minimum correlation at 16 × 16 pixels of an alignment that is refined.
const MIN_COARSE: f32 = 0.72;

/// Minimum correlation at 32 × 32 pixels of an alignment that is refined further.
const MIN_REFINED: f32 = 0.8;

/// Minimum correlation of aligned pixels.
const MIN_CORRELATION: f32 = 0.85;

/// Minimum correlation of the details.
const MIN_DETAIL: f32 = 0.8;

/// Parts per side in which the details are compared.
const PARTS: usize = 6;

/// Minimum agreement of the details in the parts: rank from the lowest, and value. A copy may have
/// a watermark in one part.
const MIN_AGREEMENT: [(usize, f32); 2] = [(1, 0.3), (4, 0.55)];

/// Strength of noise: details this weak, relative to the standard deviation, are not amplified.
const NOISE: f32 = 0.03;

/// Mean square of the details, which is about 1 in textured parts, above which a part has details.
const MIN_ENERGY: f32 = 0.3;

/// Number of parts with details below which an image counts as one without details.
const FEW_DETAILS: usize = 9;

/// Minimum ratio of the squared gradients of the two axes. Below it, the image has edges in one
/// direction only, and the alignment along them is arbitrary.
const MIN_GRADIENT_RATIO: f32 = 0.05;

/// Largest difference from the identity of an alignment of images without details, and their
/// minimum correlation.
const SAME_PLACE: (f64, f32) = (0.03, 0.98);

/// Largest difference of the mean colors of images without details that match, of 255.
const SIMILAR_COLOR: f32 = 12.0;

/// Minimum share of the sides of both images that two copies have in common.
const MIN_SHARE: f64 = 0.6;

/// Largest differences, of 255, of images that have equal pixels: root mean square over the image,
/// and mean over a part of 8 × 8 pixels.
const EQUAL_PIXELS: [f32; 2] = [2.0, 3.0];

/// Largest root mean square difference of equal pixels as a share of the standard deviation.
const EQUAL_SHARE: f32 = 0.05;

/// Standard deviation, of 255, below which an image has no pattern to align.
const FLAT: f32 = 2.0;

/// An image reduced for comparisons.
#[derive(Debug, Clone, PartialEq)]
pub struct Signature {
    /// Gray values, `[64, 64]`, between `low` (0) and `high` (255).
    pixels: Box<[u8]>,
    low: f32,
    high: f32,
    /// Mean red, green and blue.
    color: [f32; 3],
    /// Shorter side of the original.
    original_side: usize,
}

/// Evidence that two images are copies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Match {
    /// Correlation of the aligned gray pixels, up to 1.
    pub correlation: f32,
    /// Correlation of their details, up to 1.
    pub detail: f32,
    /// True if one is mirrored.
    pub mirrored: bool,
    /// Common area in each image: left, top, right and bottom as shares of width and height.
    pub areas: [[f32; 4]; 2],
}

impl Match {
    /// Share of the area of both images that is common, the smaller of the two.
    pub(crate) fn common_area(&self) -> f32 {
        let area = |[left, top, right, bottom]: [f32; 4]| (right - left) * (bottom - top);
        area(self.areas[0]).min(area(self.areas[1]))
    }

    /// Returns the evidence in words, for example `mirrored, correlation 0.98`.
    pub fn describe(&self) -> String {
        let mirrored = if self.mirrored { "mirrored, " } else { "" };
        let cropped = match self.common_area() {
            area if area < 0.96 => format!("common area {:.0} %, ", 100.0 * area),
            _ => String::new(),
        };
        // Rounded down, so that only equal pixels have 1.00.
        format!("{mirrored}{cropped}correlation {:.2}", (100.0 * self.correlation).floor() / 100.0)
    }
}

impl Signature {
    /// Reduces an image.
    pub fn new(image: &Image) -> Signature {
        let (gray, [width, height], color) = shrink(image);
        // In 0..1, because the resize clamps to it.
        let buffer: ImageBuffer<Luma<f32>, Vec<f32>> =
            ImageBuffer::from_raw(width as u32, height as u32, gray).expect("one gray value per pixel");
        let reduced = imageops::resize(&buffer, SIDE as u32, SIDE as u32, imageops::FilterType::Triangle);
        let reduced: Vec<f32> = reduced.into_raw().iter().map(|v| 255.0 * v).collect();
        let low = reduced.iter().copied().fold(f32::INFINITY, f32::min);
        let high = reduced.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let scale = if high > low { 255.0 / (high - low) } else { 0.0 };
        let pixels = reduced.iter().map(|v| ((v - low) * scale).round() as u8).collect();
        Signature { pixels, low, high, color, original_side: image.width.min(image.height) }
    }

    /// Gray values on the scale of the original, `[64, 64]`.
    fn levels(&self) -> Vec<f32> {
        let scale = (self.high - self.low) / 255.0;
        self.pixels.iter().map(|p| self.low + scale * f32::from(*p)).collect()
    }
}

/// Gray values in 0..1 of an image, its width and height, and its mean color in 0..255. Long sides
/// are averaged to 128 pixels first, which is faster than a resize.
fn shrink(image: &Image) -> (Vec<f32>, [usize; 2], [f32; 3]) {
    const SHRUNK: usize = 2 * SIDE;
    let fit = |side: usize| if side >= 2 * SHRUNK { SHRUNK } else { side };
    let (width, height, c) = (fit(image.width), fit(image.height), CHANNELS);
    let rgb = image.to_rgb8();
    let (mut gray, mut color) = (Vec::with_capacity(width * height), [0.0f64; 3]);
    let range = |i: usize, side: usize, parts: usize| i * side / parts..(i + 1) * side / parts;
    let mut sums = vec![[0u32; 3]; width];
    for y in 0..height {
        sums.fill([0; 3]);
        let rows = range(y, image.height, height);
        for row in rgb[rows.start * image.width * c..rows.end * image.width * c].chunks_exact(image.width * c) {
            for (x, sum) in sums.iter_mut().enumerate() {
                let columns = range(x, image.width, width);
                for pixel in row[columns.start * c..columns.end * c].chunks_exact(c) {
                    sum.iter_mut().zip(pixel).for_each(|(sum, v)| *sum += u32::from(*v));
                }
            }
        }
        for (x, sum) in sums.iter().enumerate() {
            let pixels = (rows.len() * range(x, image.width, width).len()) as f32;
            let [r, g, b] = sum.map(|sum| sum as f32 / pixels);
            gray.push((0.299 * r + 0.587 * g + 0.114 * b) / 255.0);
            color.iter_mut().zip(sum).for_each(|(color, sum)| *color += f64::from(*sum));
        }
    }
    let pixels = (image.width * image.height) as f64;
    (gray, [width, height], color.map(|sum| (sum / pixels) as f32))
}

/// Subtracts the mean and scales to unit length; a constant becomes 0.
fn standardize(values: &mut [f32]) {
    let mean = (values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64) as f32;
    values.iter_mut().for_each(|v| *v -= mean);
    let norm = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    let scale = if norm > 1e-3 { 1.0 / norm } else { 0.0 };
    values.iter_mut().for_each(|v| *v *= scale);
}

fn mirror(values: &[f32], width: usize) -> Vec<f32> {
    values.chunks_exact(width).flat_map(|row| row.iter().rev().copied()).collect()
}

/// Means over the pixels of an interval of a side, divided into equal parts: first input and
/// weights of each.
#[derive(Debug)]
struct Reduction(Vec<(usize, Vec<f32>)>);

impl Reduction {
    /// Divides `length` of the side from `offset` (shares of it) into `parts`.
    fn new(offset: f64, length: f64, parts: usize) -> Reduction {
        let edge = |i: usize| (offset + length * i as f64 / parts as f64) * SIDE as f64;
        let part = |i: usize| {
            let (start, end) = (edge(i), edge(i + 1).min(SIDE as f64));
            let pixels = start as usize..(end.ceil() as usize).min(SIDE);
            let covered = |j: usize| ((end.min(j as f64 + 1.0) - start.max(j as f64)) / (end - start)) as f32;
            (pixels.start, pixels.map(covered).collect())
        };
        Reduction((0..parts).map(part).collect())
    }

    /// Reduces the columns of rows of [`SIDE`] pixels.
    fn columns(&self, values: &[f32]) -> Vec<f32> {
        let rows = values.chunks_exact(SIDE);
        rows.flat_map(|row| {
            let mean = |(first, weights): &(usize, Vec<f32>)| -> f32 {
                weights.iter().zip(&row[*first..]).map(|(w, v)| w * v).sum()
            };
            self.0.iter().map(mean)
        })
        .collect()
    }

    /// Reduces [`SIDE`] rows of `width` values.
    fn rows(&self, values: &[f32], width: usize) -> Vec<f32> {
        let mut reduced = vec![0.0; self.0.len() * width];
        for ((first, weights), out) in self.0.iter().zip(reduced.chunks_exact_mut(width)) {
            for (i, weight) in weights.iter().enumerate() {
                let row = &values[(first + i) * width..][..width];
                out.iter_mut().zip(row).for_each(|(o, v)| *o += weight * v);
            }
        }
        reduced
    }
}

/// Crops of a side that are searched: offset and length as shares of it.
const CROPS: [(f64, f64); 14] = [
    (0.0, 1.0),
    (0.0, 0.92),
    (0.04, 0.92),
    (0.08, 0.92),
    (0.0, 0.84),
    (0.04, 0.84),
    (0.08, 0.84),
    (0.12, 0.84),
    (0.16, 0.84),
    (0.0, 0.76),
    (0.06, 0.76),
    (0.12, 0.76),
    (0.18, 0.76),
    (0.24, 0.76),
];

static CROP_REDUCTIONS: LazyLock<Vec<Reduction>> =
    LazyLock::new(|| CROPS.iter().map(|(offset, length)| Reduction::new(*offset, *length, COARSE)).collect());

/// The whole image and its center, as they are reduced to thumbnails.
static THUMBNAIL_REDUCTIONS: LazyLock<[Reduction; 2]> =
    LazyLock::new(|| [Reduction::new(0.0, 1.0, THUMBNAIL), Reduction::new(0.08, 0.84, THUMBNAIL)]);

/// All crops of an image at 16 × 16 pixels, standardized, `[14 × 14, 256]` (vertical, horizontal).
fn crops(levels: &[f32]) -> Vec<f32> {
    let mut all = Vec::with_capacity(CROPS.len() * CROPS.len() * COARSE * COARSE);
    for vertical in CROP_REDUCTIONS.iter() {
        let rows = vertical.rows(levels, SIDE);
        for horizontal in CROP_REDUCTIONS.iter() {
            let start = all.len();
            all.extend(horizontal.columns(&rows));
            standardize(&mut all[start..]);
        }
    }
    all
}

/// The whole image at 16 × 16 pixels, standardized.
fn coarse(levels: &[f32]) -> Vec<f32> {
    let whole = &CROP_REDUCTIONS[0];
    let mut values = whole.columns(&whole.rows(levels, SIDE));
    standardize(&mut values);
    values
}

/// Thumbnails of images as unit vectors, by which similar ones are found without an encoder. An
/// image without a signature has zeros.
pub(super) struct Thumbnails {
    /// Whole images, `[N, 64]`.
    pub whole: Features,
    /// Mirrored images, and the centers of images and of mirrored images.
    pub altered: [Features; 3],
}

impl Thumbnails {
    pub fn new(signatures: &[Option<Signature>]) -> Thumbnails {
        let dim = THUMBNAIL * THUMBNAIL;
        let forms = signatures.par_iter().map(|signature| match signature {
            None => [vec![0.0; dim], vec![0.0; dim], vec![0.0; dim], vec![0.0; dim]],
            Some(signature) => forms(signature),
        });
        let forms: Vec<[Vec<f32>; 4]> = forms.collect();
        let table = |i: usize| {
            let values = forms.iter().flat_map(|row| row[i].iter().copied()).collect();
            Features { n: forms.len(), dim, values }
        };
        Thumbnails { whole: table(0), altered: [table(1), table(2), table(3)] }
    }
}

/// Thumbnails of one image: whole, mirrored, center, mirrored center.
fn forms(signature: &Signature) -> [Vec<f32>; 4] {
    let levels = signature.levels();
    let [whole, center] = [0, 1].map(|i| {
        let reduction = &THUMBNAIL_REDUCTIONS[i];
        let mut values = reduction.columns(&reduction.rows(&levels, SIDE));
        standardize(&mut values);
        values
    });
    let mirrored = [mirror(&whole, THUMBNAIL), mirror(&center, THUMBNAIL)];
    let [mirrored_whole, mirrored_center] = mirrored;
    [whole, mirrored_whole, center, mirrored_center]
}

/// Thumbnails of one image, to compare with others.
#[derive(Debug)]
pub struct Thumbnail([Vec<f32>; 4]);

impl Thumbnail {
    /// Computes the thumbnails of an image.
    pub fn new(signature: &Signature) -> Thumbnail {
        Thumbnail(forms(signature))
    }

    /// Largest cosine of the thumbnails of two images, also mirrored or cropped to the center.
    pub fn similarity(&self, other: &Thumbnail) -> f32 {
        let (a, b) = (&self.0, &other.0);
        let cosines = a.iter().map(|form| dot(form, &b[0])).chain(b.iter().map(|form| dot(form, &a[0])));
        cosines.fold(-1.0, f32::max)
    }
}

/// Map of the sides of one image (the target) to those of another (the source), in shares of them:
/// `scale × x + offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Alignment {
    scale: [f64; 2],
    offset: [f64; 2],
}

/// Index of the horizontal and of the vertical side.
const X: usize = 0;
const Y: usize = 1;

impl Alignment {
    /// True if the map changes no point by more than `tolerance` of the side.
    fn is_identity(&self, tolerance: f64) -> bool {
        let is_near = |axis: usize| {
            let [start, end] = [self.offset[axis], self.scale[axis] + self.offset[axis] - 1.0];
            start.abs() <= tolerance && end.abs() <= tolerance
        };
        is_near(X) && is_near(Y)
    }

    /// Range of a target of `n` pixels that lies in the source.
    fn inside(&self, axis: usize, n: usize) -> Range<usize> {
        let is_inside = |i: &usize| {
            let at = self.scale[axis] * (*i as f64 + 0.5) / n as f64 + self.offset[axis];
            (0.0..=1.0).contains(&at)
        };
        let first = (0..n).find(is_inside).unwrap_or(n);
        first..(first..n).rev().find(is_inside).map_or(first, |last| last + 1)
    }

    /// Common part of a side in the target and in the source.
    fn common(&self, axis: usize) -> [[f64; 2]; 2] {
        let (scale, offset) = (self.scale[axis], self.offset[axis]);
        let target = [(-offset / scale).max(0.0), ((1.0 - offset) / scale).min(1.0)];
        [target, target.map(|at| (scale * at + offset).clamp(0.0, 1.0))]
    }

    /// Samples a square source at the pixels of a target of the same size, linearly. Pixels outside
    /// repeat the edge.
    fn sample(&self, source: &[f32], n: usize) -> Vec<f32> {
        let taps = |axis: usize| -> Vec<(usize, f32)> {
            let tap = |i: usize| {
                let share = self.scale[axis] * (i as f64 + 0.5) / n as f64 + self.offset[axis];
                let at = (share * n as f64 - 0.5).clamp(0.0, (n - 1) as f64);
                let first = (at as usize).min(n - 2);
                (first, (at - first as f64) as f32)
            };
            (0..n).map(tap).collect()
        };
        let (columns, rows) = (taps(X), taps(Y));
        let mut sampled = Vec::with_capacity(n * n);
        let mut row = vec![0.0; n];
        for (top, below) in rows {
            let (upper, lower) = (&source[top * n..][..n], &source[(top + 1) * n..][..n]);
            row.iter_mut().zip(upper).zip(lower).for_each(|((r, u), l)| *r = u + below * (l - u));
            sampled.extend(columns.iter().map(|(left, right)| row[*left] + right * (row[left + 1] - row[*left])));
        }
        sampled
    }
}

/// Values of a part of a square image.
fn window<'a>(
    values: &'a [f32],
    n: usize,
    rows: &Range<usize>,
    columns: &Range<usize>,
) -> impl Iterator<Item = f32> + 'a {
    let columns = columns.clone();
    rows.clone().flat_map(move |y| values[y * n..][columns.clone()].iter().copied())
}

/// Correlation of the values of two images in a part of them.
fn correlation(a: &[f32], b: &[f32], n: usize, rows: &Range<usize>, columns: &Range<usize>) -> f32 {
    let count = (rows.len() * columns.len()) as f64;
    let mean = |values: &[f32]| window(values, n, rows, columns).map(f64::from).sum::<f64>() / count;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let [mut aa, mut bb, mut ab] = [0.0f64; 3];
    for (a, b) in window(a, n, rows, columns).zip(window(b, n, rows, columns)) {
        let (a, b) = (f64::from(a) - mean_a, f64::from(b) - mean_b);
        (aa, bb, ab) = (aa + a * a, bb + b * b, ab + a * b);
    }
    if aa * bb > 0.0 { (ab / (aa * bb).sqrt()) as f32 } else { 0.0 }
}

/// Improves an alignment of images of `n` × `n` pixels by up to `steps` Gauss-Newton steps on the
/// squared difference after fitting gain and offset of the brightness. Returns the best one with
/// its correlation.
fn refine(target: &[f32], source: &[f32], n: usize, start: Alignment, steps: usize) -> (Alignment, f32) {
    let (mut best, mut current) = ((f32::NEG_INFINITY, start), start);
    for step in 0..=steps {
        let (rows, columns) = (current.inside(Y, n), current.inside(X, n));
        if (rows.len().min(columns.len()) as f64) < MIN_SHARE * n as f64 {
            break;
        }
        let sampled = current.sample(source, n);
        let now = correlation(target, &sampled, n, &rows, &columns);
        if now > best.0 {
            best = (now, current);
        } else if step > 2 && now < best.0 - 0.02 {
            break;
        }
        if step == steps {
            break;
        }
        let Some(change) = gauss_newton_step(target, &sampled, n, current, &rows, &columns) else { break };
        for axis in [X, Y] {
            let [scale, offset] = change[axis].map(|v| v.clamp(-0.05, 0.05));
            // The step is about the center of the target.
            current.scale[axis] = (current.scale[axis] + scale).clamp(0.65, 1.5);
            current.offset[axis] += offset - 0.5 * scale;
        }
    }
    (best.1, best.0)
}

/// Change of scale and offset, horizontal and vertical; `None` if there is no solution.
fn gauss_newton_step(
    target: &[f32],
    sampled: &[f32],
    n: usize,
    alignment: Alignment,
    rows: &Range<usize>,
    columns: &Range<usize>,
) -> Option<[[f64; 2]; 2]> {
    let (mut hessian, mut gradient) = (SMatrix::<f64, 6, 6>::zeros(), SVector::<f64, 6>::zeros());
    // Pixels at the edge have only one neighbor.
    let slope = |before: f32, after: f32, distance: usize, scale: f64| {
        f64::from(after - before) / distance as f64 * n as f64 / scale
    };
    let centered = |i: usize| (i as f64 + 0.5) / n as f64 - 0.5;
    for y in rows.clone() {
        let (above, below) = (y.saturating_sub(1), (y + 1).min(n - 1));
        for x in columns.clone() {
            let (left, right) = (x.saturating_sub(1), (x + 1).min(n - 1));
            let at = |y: usize, x: usize| sampled[y * n + x];
            let dx = slope(at(y, left), at(y, right), right - left, alignment.scale[X]);
            let dy = slope(at(above, x), at(below, x), below - above, alignment.scale[Y]);
            let row = SVector::<f64, 6>::from([dx * centered(x), dx, dy * centered(y), dy, f64::from(at(y, x)), 1.0]);
            hessian.ger(1.0, &row, &row, 1.0);
            gradient.axpy(f64::from(target[y * n + x]), &row, 1.0);
        }
    }
    for i in 0..6 {
        hessian[(i, i)] = hessian[(i, i)] * if i < 4 { 1.001 } else { 1.0 } + 1e-6;
    }
    let solution = hessian.cholesky()?.solve(&gradient);
    let gain = solution[4];
    (gain > 1e-3).then(|| [[solution[0] / gain, solution[1] / gain], [solution[2] / gain, solution[3] / gain]])
}

/// Gaussian blur of a square image of [`SIDE`] pixels. The edge is repeated.
fn blur(values: &[f32], sigma: f32) -> Vec<f32> {
    let radius = (3.0 * sigma).ceil() as usize;
    let weight = |i: usize| (-0.5 * ((i as f32 - radius as f32) / sigma).powi(2)).exp();
    let weights: Vec<f32> = (0..=2 * radius).map(weight).collect();
    let total: f32 = weights.iter().sum();
    let pass = |values: &[f32], stride: usize, other: usize| {
        let mut blurred = vec![0.0; SIDE * SIDE];
        for line in 0..SIDE {
            for i in 0..SIDE {
                let value = |(k, w): (usize, &f32)| {
                    let from = (i + k).saturating_sub(radius).min(SIDE - 1);
                    w * values[line * other + from * stride]
                };
                blurred[line * other + i * stride] = weights.iter().enumerate().map(value).sum::<f32>() / total;
            }
        }
        blurred
    };
    pass(&pass(values, 1, SIDE), SIDE, 1)
}

/// Details of an image: the difference of two Gaussian blurs, divided by its local strength.
fn details(values: &[f32], sigma: f32) -> Vec<f32> {
    let strength = std(values).max(1e-3);
    let (fine, wide) = (blur(values, sigma), blur(values, 2.5 * sigma));
    let band: Vec<f32> = fine.iter().zip(wide).map(|(fine, wide)| (fine - wide) / strength).collect();
    let energy = blur(&band.iter().map(|v| v * v).collect::<Vec<_>>(), 3.0 * sigma);
    band.iter().zip(energy).map(|(v, energy)| v / (energy.sqrt() + NOISE)).collect()
}

/// Agreement of the details of two aligned images.
#[derive(Debug)]
struct Agreement {
    /// Correlation over the common area.
    correlation: f32,
    /// Agreement of each part, in ascending order: 1 if its details are the same, 0 if they are
    /// unrelated or missing in one image.
    parts: Vec<f32>,
    /// Number of parts with details in both images.
    detailed: usize,
}

impl Agreement {
    fn new(a: &[f32], b: &[f32], rows: &Range<usize>, columns: &Range<usize>) -> Agreement {
        let part = |range: &Range<usize>, i: usize| {
            range.start + i * range.len() / PARTS..range.start + (i + 1) * range.len() / PARTS
        };
        let ([mut aa, mut bb, mut ab], mut detailed) = ([0.0f32; 3], 0);
        let mut parts = Vec::with_capacity(PARTS * PARTS);
        for y in 0..PARTS {
            for x in 0..PARTS {
                let (rows, columns) = (part(rows, y), part(columns, x));
                let pixels = (rows.len() * columns.len()).max(1) as f32;
                let [mut own_aa, mut own_bb, mut own_ab] = [0.0f32; 3];
                for (a, b) in window(a, SIDE, &rows, &columns).zip(window(b, SIDE, &rows, &columns)) {
                    (own_aa, own_bb, own_ab) = (own_aa + a * a, own_bb + b * b, own_ab + a * b);
                }
                (aa, bb, ab) = (aa + own_aa, bb + own_bb, ab + own_ab);
                detailed += usize::from(own_aa.min(own_bb) >= MIN_ENERGY * pixels);
                // Without details in both images, the part agrees.
                let energy = own_aa + own_bb;
                parts.push(1.0 - (energy - 2.0 * own_ab) / (energy + 0.1 * pixels));
            }
        }
        parts.sort_by(f32::total_cmp);
        let correlation = if aa * bb > 0.0 { ab / (aa * bb).sqrt() } else { 0.0 };
        Agreement { correlation, parts, detailed }
    }

    /// True if the details are those of copies.
    fn is_high(&self) -> bool {
        self.correlation >= MIN_DETAIL && MIN_AGREEMENT.iter().all(|(rank, minimum)| self.parts[*rank] >= *minimum)
    }
}

/// Smaller of the squared gradients of the two axes, as a share of the larger.
fn gradient_ratio(values: &[f32], rows: &Range<usize>, columns: &Range<usize>) -> f32 {
    let squares = |stride: usize| -> f32 {
        let last = |range: &Range<usize>| range.start..range.end - 1;
        let pixels = last(rows).flat_map(|y| last(columns).map(move |x| y * SIDE + x));
        pixels.map(|i| (values[i + stride] - values[i]).powi(2)).sum()
    };
    let (x, y) = (squares(1), squares(SIDE));
    x.min(y) / x.max(y).max(f32::MIN_POSITIVE)
}

/// Matches gain and offset of the darker or lower-contrast of two aligned images to the other, with
/// the same clipping.
fn match_brightness(target: &mut [f32], sampled: &mut [f32], rows: &Range<usize>, columns: &Range<usize>) {
    let clips = |v: f32| !(3.0..=252.0).contains(&v);
    let [mut n, mut sum_t, mut sum_s, mut ss, mut tt, mut ts] = [0.0f64; 6];
    let pairs = window(target, SIDE, rows, columns).zip(window(sampled, SIDE, rows, columns));
    for (t, s) in pairs.filter(|(t, s)| !clips(*t) && !clips(*s)) {
        let (t, s) = (f64::from(t), f64::from(s));
        (n, sum_t, sum_s) = (n + 1.0, sum_t + t, sum_s + s);
        (ss, tt, ts) = (ss + s * s, tt + t * t, ts + t * s);
    }
    let [covariance, variance_t, variance_s] = [ts - sum_t * sum_s / n, tt - sum_t * sum_t / n, ss - sum_s * sum_s / n];
    // Too few pixels, or no relation between them.
    if n < 16.0 || covariance <= 0.0 || variance_t <= 0.0 || variance_s <= 0.0 {
        return;
    }
    let gain = (variance_t / variance_s).sqrt();
    let (weaker, gain, offset) = match gain > 1.0 {
        true => (sampled, gain, (sum_t - gain * sum_s) / n),
        false => (target, 1.0 / gain, (sum_s - sum_t / gain) / n),
    };
    weaker.iter_mut().for_each(|v| *v = (gain as f32 * *v + offset as f32).clamp(0.0, 255.0));
}

/// Evidence that the pixels of two images are equal up to the errors of a codec, without alignment.
fn equal_pixels(a: &Signature, b: &Signature, a_levels: &[f32], b_levels: &[f32], mirrored: bool) -> Option<Match> {
    let [max_rms, max_part] = EQUAL_PIXELS;
    if !has_same_color(a, b, max_rms) {
        return None;
    }
    let squares: f32 = a_levels.iter().zip(b_levels).map(|(a, b)| (a - b).powi(2)).sum();
    let rms = (squares / a_levels.len() as f32).sqrt();
    let [deviation_a, deviation_b] = [std(a_levels), std(b_levels)];
    let are_flat = deviation_a.max(deviation_b) < FLAT;
    if rms > max_rms || !are_flat && rms > EQUAL_SHARE * deviation_a.min(deviation_b) {
        return None;
    }
    let part = SIDE / THUMBNAIL;
    let differs = |i: usize| {
        let (rows, columns) = (i / part * part..(i / part + 1) * part, i % part * part..(i % part + 1) * part);
        let pairs = window(a_levels, SIDE, &rows, &columns).zip(window(b_levels, SIDE, &rows, &columns));
        pairs.map(|(a, b)| (a - b).abs()).sum::<f32>() > max_part * (part * part) as f32
    };
    if (0..part * part).any(differs) {
        return None;
    }
    let whole = 0..SIDE;
    let correlation = if are_flat { 1.0 } else { correlation(a_levels, b_levels, SIDE, &whole, &whole) };
    Some(Match { correlation, detail: correlation, mirrored, areas: [[0.0, 0.0, 1.0, 1.0]; 2] })
}

/// True if the mean colors differ by at most `tolerance`, of 255.
fn has_same_color(a: &Signature, b: &Signature, tolerance: f32) -> bool {
    a.color.iter().zip(b.color).all(|(a, b)| (a - b).abs() <= tolerance)
}

/// Standard deviation.
fn std(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
}

/// Best crop of a source for a target at 16 × 16 pixels.
#[derive(Debug, Clone, Copy)]
struct Coarse {
    correlation: f32,
    vertical: usize,
    horizontal: usize,
    mirrored: bool,
}

/// Compares all crops of a source with a whole target and with its mirror image.
fn best_crop(source: &[f32], target: &[f32]) -> Coarse {
    let mut best = Coarse { correlation: -1.0, vertical: 0, horizontal: 0, mirrored: false };
    for (mirrored, target) in [(false, target.to_vec()), (true, mirror(target, COARSE))] {
        for (i, crop) in source.chunks_exact(COARSE * COARSE).enumerate() {
            let correlation = dot(crop, &target);
            if correlation > best.correlation {
                best = Coarse { correlation, vertical: i / CROPS.len(), horizontal: i % CROPS.len(), mirrored };
            }
        }
    }
    best
}

/// Halves the side of a square image.
fn halved(values: &[f32]) -> Vec<f32> {
    let n = SIDE / 2;
    let mean = |i: usize| {
        let first = 2 * (i / n) * SIDE + 2 * (i % n);
        (values[first] + values[first + 1] + values[first + SIDE] + values[first + SIDE + 1]) / 4.0
    };
    (0..n * n).map(mean).collect()
}

/// Compares two images. Returns the evidence if one is an altered copy of the other.
pub fn compare(a: &Signature, b: &Signature) -> Option<Match> {
    let (a_levels, b_levels) = (a.levels(), b.levels());
    let forward = best_crop(&crops(&a_levels), &coarse(&b_levels));
    let backward = best_crop(&crops(&b_levels), &coarse(&a_levels));
    decide([a, b], [&a_levels, &b_levels], [forward, backward])
}

/// Decides on two images from the best crop of each for the other.
fn decide([a, b]: [&Signature; 2], [a_levels, b_levels]: [&[f32]; 2], coarse: [Coarse; 2]) -> Option<Match> {
    let found = [(false, b_levels.to_vec()), (true, mirror(b_levels, SIDE))]
        .into_iter()
        .find_map(|(mirrored, b_levels)| equal_pixels(a, b, a_levels, &b_levels, mirrored));
    if found.is_some() || std(a_levels).min(std(b_levels)) < FLAT {
        return found;
    }
    let [forward, backward] = coarse;
    // Ties are broken by the images, so that their order does not matter.
    let by_image = || (a.original_side, &a.pixels).cmp(&(b.original_side, &b.pixels)).then(a.low.total_cmp(&b.low));
    let is_forward = forward.correlation.total_cmp(&backward.correlation).then_with(by_image).is_ge();
    let (best, source, target) =
        if is_forward { (forward, a_levels, b_levels) } else { (backward, b_levels, a_levels) };
    if best.correlation < MIN_COARSE {
        return None;
    }
    let target = if best.mirrored { mirror(target, SIDE) } else { target.to_vec() };
    let ((left, width), (top, height)) = (CROPS[best.horizontal], CROPS[best.vertical]);
    let start = Alignment { scale: [width, height], offset: [left, top] };
    let (alignment, correlation_halved) = refine(&halved(&target), &halved(source), SIDE / 2, start, 8);
    if correlation_halved < MIN_REFINED {
        return None;
    }
    let (alignment, _) = refine(&target, source, SIDE, alignment, 6);
    let is_small = |[from, to]: [f64; 2]| to - from < MIN_SHARE;
    if [X, Y].iter().any(|axis| alignment.common(*axis).into_iter().any(is_small)) {
        return None;
    }
    let (rows, columns) = (alignment.inside(Y, SIDE), alignment.inside(X, SIDE));
    let (mut target, mut sampled) = (target, alignment.sample(source, SIDE));
    match_brightness(&mut target, &mut sampled, &rows, &columns);
    let correlation = correlation(&target, &sampled, SIDE, &rows, &columns);
    // Details below the resolution of the smaller original are lost in one of the two.
    let sigma = (SIDE as f32 / 2.0 / a.original_side.min(b.original_side) as f32).clamp(1.0, 4.0);
    let margin = (2.0 * sigma).ceil() as usize;
    let inner = |range: Range<usize>| range.start + margin..range.end - margin;
    let (rows, columns) = (inner(rows), inner(columns));
    let (target_details, details) = (details(&target, sigma), details(&sampled, sigma));
    let agreement = Agreement::new(&target_details, &details, &rows, &columns);
    if correlation < MIN_CORRELATION || !agreement.is_high() {
        return None;
    }
    let has_details =
        agreement.detailed >= FEW_DETAILS && gradient_ratio(&target_details, &rows, &columns) >= MIN_GRADIENT_RATIO;
    let is_in_place = || {
        let (tolerance, minimum) = SAME_PLACE;
        alignment.is_identity(tolerance) && correlation >= minimum && has_same_color(a, b, SIMILAR_COLOR)
    };
    if !has_details && !is_in_place() {
        return None;
    }
    let ([target_x, source_x], [target_y, source_y]) = (alignment.common(X), alignment.common(Y));
    let area = |x: [f64; 2], y: [f64; 2]| [x[0], y[0], x[1], y[1]].map(|v| v as f32);
    let target_x = if best.mirrored { [1.0 - target_x[1], 1.0 - target_x[0]] } else { target_x };
    let (source, target) = (area(source_x, source_y), area(target_x, target_y));
    let areas = if is_forward { [source, target] } else { [target, source] };
    Some(Match { correlation, detail: agreement.correlation, mirrored: best.mirrored, areas })
}

/// Compares pairs of an image of `first` and an image of `second`. Pairs without a match, or
/// without a signature, get `None`. `on_progress` receives the fraction done, up to 1.
pub(super) fn compare_all(
    pairs: &[(usize, usize)],
    first: &[Option<Signature>],
    second: &[Option<Signature>],
    mut on_progress: impl FnMut(f64),
) -> Vec<Option<Match>> {
    const BLOCK: usize = 1 << 13;
    let forward = best_crops(pairs, first, second, |share| on_progress(0.3 * share));
    let swapped: Vec<(usize, usize)> = pairs.iter().map(|(a, b)| (*b, *a)).collect();
    let backward = best_crops(&swapped, second, first, |share| on_progress(0.3 + 0.3 * share));
    let mut results = Vec::with_capacity(pairs.len());
    while results.len() < pairs.len() {
        let block = results.len()..(results.len() + BLOCK).min(pairs.len());
        results.par_extend(block.into_par_iter().map(|i| {
            let (a, b) = (first[pairs[i].0].as_ref()?, second[pairs[i].1].as_ref()?);
            decide([a, b], [&a.levels(), &b.levels()], [forward[i]?, backward[i]?])
        }));
        on_progress(0.6 + 0.4 * results.len() as f64 / pairs.len() as f64);
    }
    results
}

/// Best crop of the source of each pair (source, target). The crops of a source are computed once.
fn best_crops(
    pairs: &[(usize, usize)],
    sources: &[Option<Signature>],
    targets: &[Option<Signature>],
    mut on_progress: impl FnMut(f64),
) -> Vec<Option<Coarse>> {
    const BLOCK: usize = 1 << 10;
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by_key(|i| pairs[*i]);
    let groups: Vec<&[usize]> = order.chunk_by(|i, j| pairs[*i].0 == pairs[*j].0).collect();
    let whole: Vec<Option<Vec<f32>>> =
        targets.par_iter().map(|target| target.as_ref().map(|target| coarse(&target.levels()))).collect();
    let mut results = vec![None; pairs.len()];
    for (done, block) in groups.chunks(BLOCK).enumerate() {
        let compared = block.par_iter().flat_map_iter(|group| {
            let source = sources[pairs[group[0]].0].as_ref().map(|source| crops(&source.levels()));
            let best = |i: &usize| Some(best_crop(source.as_deref()?, whole[pairs[*i].1].as_deref()?));
            group.iter().map(|i| (*i, best(i))).collect::<Vec<_>>()
        });
        compared.collect::<Vec<_>>().into_iter().for_each(|(i, best)| results[i] = best);
        on_progress(((done + 1) * BLOCK).min(groups.len()) as f64 / groups.len() as f64);
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Image of smooth random blobs and lines at a place of an endless plane.
    fn scene(seed: u32, width: usize, height: usize, place: impl Fn(f32, f32) -> (f32, f32)) -> Image {
        let hash = |a: u32, b: u32| {
            let mut h =
                (a.wrapping_mul(0x9E37_79B1) ^ b.wrapping_mul(0x85EB_CA77) ^ seed.wrapping_mul(0xC2B2_AE3D)) | 1;
            for _ in 0..3 {
                h = (h ^ (h >> 15)).wrapping_mul(0x2C1B_3C6D);
            }
            (h >> 8) as f32 / (1 << 24) as f32
        };
        // Value noise of three scales.
        let noise = |x: f32, y: f32| {
            let (i, j) = (x.floor(), y.floor());
            let (u, v) = (x - i, y - j);
            let corner = |k: u32, l: u32| hash((i as i32 as u32).wrapping_add(k), (j as i32 as u32).wrapping_add(l));
            let (top, bottom) =
                (corner(0, 0) * (1.0 - u) + corner(1, 0) * u, corner(0, 1) * (1.0 - u) + corner(1, 1) * u);
            top * (1.0 - v) + bottom * v
        };
        let mut pixels = Vec::with_capacity(3 * width * height);
        for y in 0..height {
            for x in 0..width {
                let (x, y) = place((x as f32 + 0.5) / width as f32, (y as f32 + 0.5) / height as f32);
                let value =
                    120.0 * noise(4.0 * x, 4.0 * y) + 70.0 * noise(9.0 * x, 9.0 * y) + 50.0 * noise(21.0 * x, 21.0 * y);
                pixels.extend([value as u8, (0.8 * value) as u8, (0.6 * value + 30.0) as u8]);
            }
        }
        Image { height, width, channels: 3, pixels: pixels.into() }
    }

    fn plain(seed: u32) -> Image {
        scene(seed, 120, 90, |x, y| (x, y))
    }

    fn check(a: &Image, b: &Image) -> Option<Match> {
        let (a, b) = (Signature::new(a), Signature::new(b));
        let (there, back) = (compare(&a, &b), compare(&b, &a));
        let evidence = |found: Option<Match>| found.map(|m| (m.correlation, m.detail, m.mirrored, m.common_area()));
        assert_eq!(evidence(there), evidence(back), "the evidence does not depend on the order");
        there
    }

    #[test]
    fn altered_copies_match() {
        for seed in 0..8 {
            let original = plain(seed);
            let brighter = Image {
                pixels: original.pixels.to_u8().iter().map(|v| v.saturating_add(v / 4)).collect(),
                ..original.clone()
            };
            let copies = [
                ("same", original.clone(), false),
                ("smaller", scene(seed, 50, 40, |x, y| (x, y)), false),
                ("brighter", brighter, false),
                ("cropped", scene(seed, 100, 76, |x, y| (0.08 + 0.84 * x, 0.08 + 0.84 * y)), false),
                ("cropped at one side", scene(seed, 100, 90, |x, y| (0.12 + 0.88 * x, y)), false),
                ("cropped at a corner", scene(seed, 100, 76, |x, y| (0.1 + 0.9 * x, 0.9 * y)), false),
                ("mirrored", scene(seed, 120, 90, |x, y| (1.0 - x, y)), true),
                ("mirrored and cropped", scene(seed, 99, 75, |x, y| (0.9 - 0.8 * x, 0.1 + 0.8 * y)), true),
            ];
            for (name, copy, mirrored) in copies {
                let found = check(&original, &copy).unwrap_or_else(|| panic!("{name}, seed {seed}"));
                assert_eq!(found.mirrored, mirrored, "{name}");
                assert!(found.correlation > 0.9 && found.correlation < 1.0001, "{name}: {found:?}");
            }
        }
    }

    #[test]
    fn evidence_states_the_common_area() {
        let original = plain(3);
        let cropped = scene(3, 100, 90, |x, y| (0.12 + 0.88 * x, y));
        let found = check(&original, &cropped).unwrap();
        let near = |a: [f32; 4], b: [f32; 4]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 0.02);
        assert!(near(found.areas[0], [0.12, 0.0, 1.0, 1.0]) && near(found.areas[1], [0.0, 0.0, 1.0, 1.0]), "{found:?}");
        assert!(found.describe().starts_with("common area 8"), "{}", found.describe());
        // The left side of the mirrored image is the right side of the original.
        let mirrored = scene(3, 100, 90, |x, y| (1.0 - (0.12 + 0.88 * x), y));
        let found = check(&mirrored, &original).unwrap();
        assert!(near(found.areas[1], [0.0, 0.0, 0.88, 1.0]), "{found:?}");
        assert!(found.describe().starts_with("mirrored, common area 8"), "{}", found.describe());
        let same = check(&original, &original).unwrap();
        assert_eq!((same.describe().as_str(), same.common_area()), ("correlation 1.00", 1.0));
    }

    #[test]
    fn different_images_do_not_match() {
        let images: Vec<Signature> = (0..24).map(|seed| Signature::new(&plain(seed))).collect();
        for (i, a) in images.iter().enumerate() {
            assert!(images[..i].iter().all(|b| compare(a, b).is_none()), "image {i}");
        }
        // The same composition with other details: a bright object on a gradient.
        let object = |seed: u32| {
            let texture = plain(seed);
            let pixel = |i: usize| {
                let (x, y) = ((i / 3 % 120) as f32, (i / 360) as f32);
                let is_object = (x - 60.0).abs() < 30.0 && (y - 50.0).abs() < 14.0;
                if is_object { 255 - texture.pixels.to_u8()[i] } else { 60 + y as u8 }
            };
            Image { pixels: (0..texture.pixels.len()).map(pixel).collect(), ..texture.clone() }
        };
        assert_eq!(check(&object(1), &object(2)), None);
        assert!(check(&object(1), &object(1)).is_some());
    }

    /// Gray image of 120 × 90 pixels from values in 0..1 at places in 0..1.
    fn drawn(value: impl Fn(f32, f32) -> f32) -> Image {
        let at = |i: usize| value((i % 120) as f32 / 120.0, (i / 120) as f32 / 90.0);
        Image {
            height: 90,
            width: 120,
            channels: 3,
            pixels: (0..120 * 90).flat_map(|i| [(255.0 * at(i).clamp(0.0, 1.0)) as u8; 3]).collect(),
        }
    }

    /// Texture around 0, with a standard deviation of `strength` gray levels.
    fn texture(seed: u32, strength: f32) -> impl Fn(f32, f32) -> f32 {
        let source = scene(seed, 120, 90, |x, y| (1.5 * x, 1.5 * y));
        let gray: Vec<f32> = source.pixels.to_u8().chunks_exact(3).map(|p| f32::from(p[0])).collect();
        let (mean, scale) = (gray.iter().sum::<f32>() / gray.len() as f32, strength / 255.0 / std(&gray));
        move |x, y| (gray[(90.0 * y) as usize % 90 * 120 + (120.0 * x) as usize % 120] - mean) * scale
    }

    #[test]
    fn the_same_composition_with_other_texture_does_not_match() {
        type Texture<'a> = &'a dyn Fn(f32, f32) -> f32;
        let disc = |texture: Texture| {
            drawn(|x, y| if (x - 0.5).hypot(0.75 * (y - 0.5)) < 0.3 { 0.5 + texture(x, y) } else { 0.98 })
        };
        let sea = |texture: Texture| drawn(|x, y| if y < 0.5 { 0.8 + texture(x, y) } else { 0.35 + texture(x, y) });
        let compositions: [&dyn Fn(Texture) -> Image; 2] = [&disc, &sea];
        for (i, image) in compositions.iter().enumerate() {
            let matches = |seed: &u32| {
                let [a, b] = [2 * seed, 2 * seed + 1].map(|seed| image(&texture(seed, 9.0)));
                assert!(check(&a, &a).is_some());
                check(&a, &b).is_some()
            };
            // Two textures inside a small object may be alike.
            assert!((0..12).filter(matches).count() <= 1 - i, "composition {i}");
        }
    }

    #[test]
    fn images_with_edges_in_one_direction_match_only_in_place() {
        let horizon = |at: f32| drawn(move |_, y| if y < at { 0.8 } else { 0.3 });
        let stripes = |n: f32| drawn(move |x, _| if (n * x).fract() < 0.5 { 0.7 } else { 0.2 });
        let halves = |at: f32| drawn(move |x, _| if x < at { 0.1 } else { 0.9 });
        let pairs = [[horizon(0.5), horizon(0.58)], [stripes(4.0), stripes(5.0)], [halves(0.5), halves(0.6)]];
        for (i, [a, b]) in pairs.iter().enumerate() {
            assert_eq!(check(a, b), None, "pair {i}");
            let mut brighter = a.clone();
            brighter.pixels.u8_mut().iter_mut().for_each(|v| *v = v.saturating_add(1));
            assert!(check(a, &brighter).is_some(), "pair {i}");
        }
    }

    #[test]
    fn extreme_aspect_ratios_are_compared() {
        for [width, height] in [[1, 5000], [5000, 1], [300, 2]] {
            let image = scene(1, width, height, |x, y| (x, y));
            assert!(check(&image, &image).is_some());
            assert_eq!(check(&image, &scene(9, width, height, |x, y| (x, y))), None);
        }
    }

    #[test]
    fn rejects_a_different_object_in_one_place() {
        let original = plain(5);
        let mut altered = original.clone();
        let other = plain(6);
        for y in 20..60 {
            for i in 3 * (y * 120 + 30)..3 * (y * 120 + 75) {
                altered.pixels.u8_mut()[i] = other.pixels.to_u8()[i];
            }
        }
        assert_eq!(check(&original, &altered), None);
    }

    #[test]
    fn flat_images_match_only_if_their_pixels_are_equal() {
        let flat = |rgb: [u8; 3]| Image { height: 20, width: 30, channels: 3, pixels: rgb.repeat(600).into() };
        assert!(check(&flat([200; 3]), &flat([201, 200, 199])).is_some());
        assert_eq!(check(&flat([200; 3]), &flat([150; 3])), None);
        // The same brightness in another color.
        assert_eq!(check(&flat([200, 0, 0]), &flat([0, 102, 0])), None);
        assert_eq!(check(&flat([128; 3]), &plain(1)), None);
        // Two white pages with a letter at different places.
        let page = |at: usize| {
            let mut page = flat([255; 3]);
            page.pixels.u8_mut()[at..at + 9].fill(0);
            page
        };
        assert_eq!(check(&page(900), &page(1400)), None);
        assert!(check(&page(900), &page(900)).is_some());
    }

    #[test]
    fn smooth_copies_match_by_their_pixels() {
        let gradient = |offset: f32| Image {
            height: 40,
            width: 40,
            channels: 3,
            pixels: (0..4800).map(|i| (i as f32 / 30.0 + 40.0 + offset * ((i / 3) % 2) as f32) as u8).collect(),
        };
        assert!(check(&gradient(0.0), &gradient(1.0)).is_some());
    }

    #[test]
    fn tiny_and_gray_images_are_compared() {
        let dot = Image { height: 1, width: 1, channels: 3, pixels: vec![10u8, 20, 30].into() };
        assert!(check(&dot, &dot).is_some());
        let gray = Image { height: 2, width: 3, channels: 1, pixels: vec![0u8, 50, 100, 150, 200, 250].into() };
        assert!(check(&gray, &gray).is_some());
        assert_eq!(check(&dot, &gray), None);
    }

    #[test]
    fn a_batch_has_the_verdicts_of_single_pairs() {
        let images: Vec<Option<Signature>> = (0..6)
            .map(|i| {
                (i != 4)
                    .then(|| Signature::new(&scene(i / 2, 90, 90, |x, y| (if i % 2 == 0 { x } else { 1.0 - x }, y))))
            })
            .collect();
        let pairs: Vec<(usize, usize)> = (0..6).flat_map(|a| (0..a).map(move |b| (a, b))).collect();
        let mut last = 0.0;
        let batch = compare_all(&pairs, &images, &images, |fraction| last = fraction);
        let single: Vec<Option<Match>> =
            pairs.iter().map(|(a, b)| compare(images[*a].as_ref()?, images[*b].as_ref()?)).collect();
        assert_eq!(last, 1.0);
        assert_eq!(batch, single);
        assert_eq!(batch.iter().flatten().count(), 2);
    }
}

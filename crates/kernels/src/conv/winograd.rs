//! 3x3 convolution with stride 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2015,
//! arXiv:1509.09308).
//!
//! A tile of 4 x 4 output pixels reads a window of 6 x 6 input pixels. With fixed matrices A, B and
//! G, y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A: 36 products per tile and pair of channels instead of 144.
//! Summed over channels, each of the 36 places, or *planes*, is a matrix product of its own, which
//! the micro-kernels compute. A forward pass has three stages:
//!
//! ```text
//! 1. transform the windows:   planes[k][tile, c_in]  = Bᵀ x B
//! 2. for each plane k:        sums[k][tile, c_out]   = planes[k] · weights[k]
//! 3. transform the sums:      y[tile, c_out]         = Aᵀ sums A
//! ```
//!
//! The gradient of the input is the same with the weights transposed and rotated by 180°. The
//! gradient of the weights is dw = Gᵀ [Σ over tiles of (Bᵀ x B) ⊙ (A dy Aᵀ)] G.
//!
//! # Accuracy
//!
//! The interpolation points are 0, ±3/4, ±3/2 and ∞ ([`crate::loops::winograd`]) instead of the
//! usual ±1 and ±2. With them the error is two to three times that of a plain f32 sum (a test
//! bounds it) instead of ten times.
//!
//! # Threads
//!
//! Where the transformed weights fit into a second-level cache beside the tiles, each thread takes
//! tiles of its own through all three stages (*independent* threads). Otherwise the threads go
//! through the stages together and divide the planes among them, so that the weights are read once
//! for many tiles (*cooperative* threads). Tiles, bands and groups depend on the shape alone, and
//! so does the order of sums.

use std::{
    cell::RefCell,
    mem::{MaybeUninit, take},
    ops::Range,
};

use rayon::prelude::*;

use super::{
    input::F32Input,
    operand::{Operand, grow},
    shape::{MapShape, Shape},
    tiles::{Offsets, PanelPair, Windows, blocks, pack_weights},
};
use crate::{
    isa::Isa,
    loops::{
        tile::PREFETCH_TILES,
        winograd::{Inside, PLANES, TILE, Transform, TransformFn, WINDOW},
    },
    memory::{as_uninit, assume_init_vec, uninit_vec},
    simd::{CACHE_LINE, prefetch},
};

/// Number of transformed values that an independent thread works on at once: a part of a core's
/// second-level cache.
const INDEPENDENT_VALUES: usize = 108 << 10;

/// Greatest number of transformed weights for independent threads.
const INDEPENDENT_WEIGHTS: usize = 1 << 20;

/// Greatest number of transformed weights for independent threads in the gradient of the weights,
/// where each part of the batch has sums of its own.
const INDEPENDENT_SUMS: usize = 1 << 16;

/// Number of transformed values in a group for cooperative threads: a part of the last-level cache.
const GROUP_VALUES: usize = 1 << 21;

/// Number of transformed values in a group in the gradient of the weights.
const GROUP_SUM_VALUES: usize = 1 << 19;

/// Least number of tiles in a group, so that the weights are not read for a few of them.
const MIN_GROUP_TILES: usize = 128;

/// Number of tiles in a band of the gradient of the weights with cooperative threads.
const SUM_BAND_TILES: usize = 48;

/// Number of private weight gradients of independent threads: enough for many threads.
const PARTS: usize = 32;

/// Distance of planes from a multiple of 4 KiB, in values. At a multiple, all planes would compete
/// for the same sets of a cache.
const PLANE_GAP: usize = 16;

/// Least number of channels that repays the transforms.
const MIN_CHANNELS: usize = 16;

/// Division of an output into tiles, and the windows that they read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    n: usize,
    source: MapShape,
    dest: MapShape,
    padding: usize,
    /// Rows of tiles in an image.
    rows: usize,
    /// Columns of tiles in an image.
    cols: usize,
}

/// Position of a tile.
#[derive(Debug, Clone, Copy)]
struct TilePosition {
    image: usize,
    row: usize,
    col: usize,
}

/// A range of rows of tiles, counted over all images: a contiguous part of the output.
type Band = Range<usize>;

impl Tiling {
    /// Returns the tiling of a forward pass; `None` where Winograd's algorithm does not apply or
    /// does not pay.
    pub fn for_shape(s: &Shape) -> Option<Tiling> {
        let applies = s.kernel == 3 && s.stride == 1 && s.dilation == 1 && s.padding <= 2;
        // On a map of a single tile that is mostly border, most products would be wasted.
        let pays = s.c_in.min(s.c_out) >= MIN_CHANNELS && s.h >= 3 && s.w >= 3;
        (applies && pays).then(|| Tiling::new(s.n, s.input_map(), s.output_map(), s.padding))
    }

    /// Returns the tiling of the gradient of the input.
    fn transposed(&self) -> Tiling {
        Tiling::new(self.n, self.dest, self.source, 2 - self.padding)
    }

    fn new(n: usize, source: MapShape, dest: MapShape, padding: usize) -> Tiling {
        Tiling { n, source, dest, padding, rows: dest.h.div_ceil(TILE), cols: dest.w.div_ceil(TILE) }
    }

    /// Splits the output into bands of about `tiles` tiles: rows of one image, or whole images.
    fn bands(&self, tiles: usize) -> Vec<Band> {
        let (all, image) = (self.n * self.rows, self.rows * self.cols);
        if image <= tiles {
            let rows = tiles / image * self.rows;
            return (0..all).step_by(rows).map(|r| r..(r + rows).min(all)).collect();
        }
        let rows = (tiles / self.cols).max(1);
        let band = |image: usize, r: usize| image * self.rows + r..image * self.rows + (r + rows).min(self.rows);
        (0..self.n).flat_map(|i| (0..self.rows).step_by(rows).map(move |r| band(i, r))).collect()
    }

    /// Number of bands in a group of about `tiles` tiles.
    fn group_len(&self, bands: &[Band], tiles: usize) -> usize {
        let max = bands.iter().map(|band| self.tiles(band).len()).max().unwrap_or(1);
        (tiles / max).max(1)
    }

    /// The tiles of a band, in order.
    fn tiles(&self, band: &Band) -> Range<usize> {
        band.start * self.cols..band.end * self.cols
    }

    fn position(&self, tile: usize) -> TilePosition {
        let row = tile / self.cols;
        TilePosition { image: row / self.rows, row: row % self.rows, col: tile % self.cols }
    }

    /// Range of a band's values in the output.
    fn span(&self, band: &Band) -> Range<usize> {
        let offset = |row: usize| {
            let (image, row) = (row / self.rows, row % self.rows);
            image * self.dest.len() + (TILE * row).min(self.dest.h) * self.dest.w * self.dest.c
        };
        offset(band.start)..offset(band.end)
    }

    /// Offset of a tile's first pixel in the values of a band.
    fn out_offset(&self, position: TilePosition, band: &Band) -> usize {
        let TilePosition { image, row, col } = position;
        image * self.dest.len() + TILE * (row * self.dest.w + col) * self.dest.c - self.span(band).start
    }

    /// Returns the part of `source`, maps of shape `map`, that the tiles of a band read: some rows
    /// of one image, or whole images. A tile reads a square of `side` pixels that begins `lead`
    /// pixels before it. A source with a deferred norm is normalized into `buffer`.
    fn source_region<'a>(
        &self,
        isa: &Isa,
        map: MapShape,
        [lead, side]: [usize; 2],
        source: F32Input<'a>,
        band: &Band,
        buffer: &'a mut Vec<f32>,
    ) -> SourceRegion<'a> {
        let line = map.w * map.c;
        let (first, last) = (band.start / self.rows, (band.end - 1) / self.rows);
        let (top, end) = if first == last {
            let [top, row] = [band.start, band.end - 1].map(|row| TILE * (row % self.rows));
            (top.saturating_sub(lead), (row + side - lead).min(map.h))
        } else {
            (0, map.h)
        };
        let offset = first * map.len() + top * line;
        let n = last * map.len() + end * line - offset;
        let values = match source.norm {
            None => &source.values[offset..offset + n],
            Some(_) => {
                let values = grow::<f32>(buffer, n);
                source.read_f32(isa, offset, values);
                values
            }
        };
        SourceRegion { values, offset }
    }

    /// Prefetches the lines of a band's output that `tile` writes.
    fn prefetch_out(&self, tile: usize, band: &Band, out: &[MaybeUninit<f32>]) {
        let MapShape { w, c, .. } = self.dest;
        prefetch_tile::<true, _>(out, self.out_offset(self.position(tile), band), w * c, TILE * c);
    }

    /// Transforms the sums of one tile, whose planes begin at `sums[k · plane]`, into `out`, the
    /// values of a band. `patch` is a buffer for tiles that exceed the map.
    fn write_tile(
        &self,
        isa: &Isa,
        (sums, plane): (&[f32], usize),
        tile: usize,
        band: &Band,
        patch: &mut Vec<f32>,
        out: &mut [MaybeUninit<f32>],
    ) {
        let (MapShape { h, w, c }, position) = (self.dest, self.position(tile));
        let (y, x) = (TILE * position.row, TILE * position.col);
        let offset = self.out_offset(position, band);
        let from_step = [WINDOW * plane, plane];
        let fits = y + TILE <= h && x + TILE <= w;
        patch.resize(patch.len().max(if fits { 0 } else { TILE * TILE * c }), 0.0);
        let (to, to_step) = if fits {
            (&mut out[offset..], [w * c, c])
        } else {
            // SAFETY: the transform writes numbers only.
            (unsafe { as_uninit(&mut patch[..TILE * TILE * c]) }, [TILE * c, c])
        };
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe {
            (isa.output_transform)(&mut Transform { channels: c, from: sums, from_step, inside: None, to, to_step })
        };
        if !fits {
            let cols = (w - x).min(TILE);
            for row in 0..(h - y).min(TILE) {
                let to = &mut out[offset + row * w * c..][..cols * c];
                to.write_copy_of_slice(&patch[row * TILE * c..][..cols * c]);
            }
        }
    }
}

/// Prefetches the lines of one run per row of a tile: `n` values each, `step` apart, the first at
/// `offset`. Runs that exceed `values` are cut off.
fn prefetch_tile<const WRITE: bool, T>(values: &[T], offset: usize, step: usize, n: usize) {
    for row in 0..TILE {
        let run = values.get(offset + row * step..).unwrap_or_default();
        for line in run[..run.len().min(n)].iter().step_by(CACHE_LINE) {
            prefetch::<WRITE>(std::ptr::from_ref(line));
        }
    }
}

/// The part of a source that the tiles of a band read.
struct SourceRegion<'a> {
    values: &'a [f32],
    /// Offset of the values in the source.
    offset: usize,
}

/// Buffers that a thread keeps from band to band.
#[derive(Default)]
struct Scratch {
    region: Vec<f32>,
    windows: Vec<f32>,
    sums: Vec<f32>,
    gradients: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Least length of a rayon iterator that is split: any with cooperative threads, none with
/// independent ones.
fn min_split(cooperative: bool) -> usize {
    if cooperative { 1 } else { usize::MAX }
}

/// Computes G w Gᵀ, block by block of channels: `[36, sources / DEPTH, NV · LANES, DEPTH]` each.
fn transform_weights<T: Operand>(isa: &Isa, s: &Shape, w: &[f32], transposed: bool) -> Vec<T> {
    let (sources, channels) = if transposed { (s.c_out, s.c_in) } else { (s.c_in, s.c_out) };
    // Rotated by 180°: the first tap is the last.
    let places: Vec<usize> = if transposed { (0..9).rev().collect() } else { (0..9).collect() };
    let packed = pack_weights(isa, s, &places, w, transposed);
    let mut planes = uninit_vec(PLANES * sources * channels.next_multiple_of(isa.lanes));
    let width = sources * 2 * isa.lanes;
    planes.par_chunks_mut(PLANES * width).zip(packed.par_chunks(9 * width)).for_each(|(to, from)| {
        let n = from.len() / 9;
        let (from_step, to_step) = ([3 * n, n], [WINDOW * n, n]);
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (isa.weight_transform)(&mut Transform { channels: n, from, from_step, inside: None, to, to_step }) };
    });
    // SAFETY: the transforms have written every block as a whole.
    T::convert_weights(isa, PLANES * sources, unsafe { assume_init_vec(planes) })
}

/// Transformed tiles, band by band: `[36 planes, groups of tiles, channels, tiles of a group]`
/// each, with room for as many tiles as the largest band has.
struct Planes<'a, T> {
    values: &'a [T],
    /// Distance between bands, in values.
    band_step: usize,
    /// Distance between planes, in values.
    plane_step: usize,
    channels: usize,
}

/// A transform of the tiles of a source.
#[derive(Clone, Copy)]
struct TileTransform<'a, T> {
    tiling: &'a Tiling,
    source: F32Input<'a>,
    /// Shape of the source.
    map: MapShape,
    /// Number of pixels that a tile's square begins before it.
    lead: usize,
    /// Side of a tile's square.
    side: usize,
    /// Transforms of the first and of the second tile of a group.
    transforms: [TransformFn<T>; 2],
    /// Number of tiles in a group; they are interleaved.
    group: usize,
    /// Number of channels, including missing ones up to whole registers.
    channels: usize,
}

impl<T: Operand> TileTransform<'_, T> {
    /// Transforms the tiles of `bands` into `buffer`; cooperative threads divide the bands.
    fn run<'b>(&self, isa: &Isa, bands: &[Band], cooperative: bool, buffer: &'b mut Vec<f32>) -> Planes<'b, T> {
        let max_tiles = bands.iter().map(|band| self.tiling.tiles(band).len()).max().unwrap_or(0);
        let plane_step = max_tiles.next_multiple_of(self.group) * self.channels + PLANE_GAP;
        let band_step = PLANES * plane_step;
        let values = grow::<T>(buffer, bands.len() * band_step);
        values.par_chunks_mut(band_step).with_min_len(min_split(cooperative)).zip(bands).for_each(|(to, band)| {
            let mut scratch = SCRATCH.take();
            self.transform_band(isa, band, plane_step, &mut scratch.region, to);
            SCRATCH.set(scratch);
        });
        Planes { values, band_step, plane_step, channels: self.channels }
    }

    /// Transforms the tiles of one band into `to`.
    fn transform_band(&self, isa: &Isa, band: &Band, plane_step: usize, buffer: &mut Vec<f32>, to: &mut [T]) {
        let (MapShape { h, w, c }, lead, side) = (self.map, self.lead, self.side);
        let region = self.tiling.source_region(isa, self.map, [lead, side], self.source, band, buffer);
        let all = Inside { rows: [0, side], cols: [0, side] };
        for (i, tile) in self.tiling.tiles(band).enumerate() {
            let position = self.tiling.position(tile);
            let [y, x] = [position.row, position.col].map(|place| TILE * place);
            let inside = Inside::new(side, [y, x], lead, [h, w]);
            if self.source.norm.is_none() {
                // The rows that the tile below reads and no tile has read yet. A normalized copy
                // has just been written and is in the cache.
                let below = position.image * self.map.len() + ((y + side - lead) * w + x) * c;
                prefetch_tile::<false, _>(self.source.values, below, w * c, TILE * c);
            }
            let first = (y + inside.rows[0] - lead) * w + x + inside.cols[0] - lead;
            let mut arguments = Transform {
                channels: c,
                from: &region.values[position.image * self.map.len() + first * c - region.offset..],
                from_step: [w * c, c],
                inside: (inside != all).then_some(inside),
                // SAFETY: the transform writes numbers only.
                to: unsafe { as_uninit(&mut to[i / self.group * self.group * self.channels..]) },
                to_step: [WINDOW * plane_step, plane_step],
            };
            // SAFETY: an `Isa` exists only for an instruction set of this processor; the first tile
            // of a group is transformed before the second.
            unsafe { self.transforms[i % self.group](&mut arguments) };
        }
    }
}

impl Tiling {
    /// Bᵀ x B of the tiles of x, in groups of `group` tiles.
    fn input_tiles<'a, T: Operand>(
        &'a self,
        x: F32Input<'a>,
        transforms: [TransformFn<T>; 2],
        group: usize,
    ) -> TileTransform<'a, T> {
        let (map, lead, side, channels) = (self.source, self.padding, WINDOW, self.source.c);
        TileTransform { tiling: self, source: x, map, lead, side, transforms, group, channels }
    }

    /// A dy Aᵀ of the tiles of dy, in groups of `DEPTH` tiles.
    fn output_grad_tiles<'a, T: Operand>(
        &'a self,
        isa: &Isa,
        dy: &'a [f32],
        transforms: [TransformFn<T>; 2],
    ) -> TileTransform<'a, T> {
        let (map, channels) = (self.dest, self.dest.c.next_multiple_of(isa.lanes));
        let (source, group) = (F32Input::from(dy), T::DEPTH);
        TileTransform { tiling: self, source, map, lead: 0, side: TILE, transforms, group, channels }
    }
}

/// See [`super::forward_fused`].
pub(super) fn forward<T: Operand, R: Send>(
    isa: &Isa,
    s: &Shape,
    tiling: &Tiling,
    w: &[f32],
    x: F32Input,
    epilogue: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> (Vec<f32>, Vec<R>) {
    convolve::<T, R>(isa, tiling, transform_weights(isa, s, w, false), x, epilogue)
}

/// See [`super::backward_data_fused`]. `tiling` is that of the forward pass.
pub(super) fn backward_data<T: Operand, R: Send>(
    isa: &Isa,
    s: &Shape,
    tiling: &Tiling,
    w: &[f32],
    dy: &[f32],
    epilogue: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> (Vec<f32>, Vec<R>) {
    convolve::<T, R>(isa, &tiling.transposed(), transform_weights(isa, s, w, true), dy.into(), epilogue)
}

/// Computes the output of a tiling from transformed weights.
fn convolve<T: Operand, R: Send>(
    isa: &Isa,
    t: &Tiling,
    weights: Vec<T>,
    source: F32Input,
    epilogue: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> (Vec<f32>, Vec<R>) {
    let tile_values = PLANES * (t.source.c + t.dest.c);
    let cooperative = PLANES * t.source.c * t.dest.c > INDEPENDENT_WEIGHTS;
    let bands = t.bands((INDEPENDENT_VALUES / tile_values).max(4 * isa.tile_pixels));
    let mut out = uninit_vec(t.n * t.dest.len());
    let mut rest = &mut out[..];
    let mut spans = Vec::new();
    for band in &bands {
        let (values, after) = rest.split_at_mut(t.span(band).len());
        spans.push(values);
        rest = after;
    }
    // All three stages for some bands and their outputs.
    let stages = |bands: &[Band], spans: &mut [&mut [MaybeUninit<f32>]]| -> Vec<R> {
        let (mut windows, mut sums) = SCRATCH.with_borrow_mut(|s| (take(&mut s.windows), take(&mut s.sums)));

        // Stage 1: transform the windows.
        let transforms = [T::input_transform(isa); 2];
        let planes = t.input_tiles::<T>(source, transforms, 1).run(isa, bands, cooperative, &mut windows);

        // Stage 2: a matrix product per plane, into sums `[tiles, channels]`.
        let first = t.tiles(&bands[0]).start;
        let sum_step = (t.tiles(&bands[bands.len() - 1]).end - first) * t.dest.c + PLANE_GAP;
        let plane_sums = grow::<f32>(&mut sums, PLANES * sum_step);
        multiply_planes(isa, t, bands, &planes, &weights, plane_sums, cooperative);
        let plane_sums = &*plane_sums;

        // Stage 3: transform the sums, and the epilogue of each band.
        let results = bands.par_iter().zip(spans).with_min_len(min_split(cooperative)).map(|(band, out)| {
            let mut patch = Vec::new();
            for tile in t.tiles(band) {
                t.prefetch_out(tile + PREFETCH_TILES, band, out);
                let tile_sums = &plane_sums[(tile - first) * t.dest.c..];
                t.write_tile(isa, (tile_sums, sum_step), tile, band, &mut patch, out);
            }
            // SAFETY: the tiles cover all pixels of their band.
            epilogue(t.span(band).start, unsafe { out.assume_init_mut() })
        });
        let results = results.collect();
        SCRATCH.with_borrow_mut(|s| (s.windows, s.sums) = (windows, sums));
        results
    };
    let results = if cooperative {
        let group = t.group_len(&bands, (GROUP_VALUES / tile_values).max(MIN_GROUP_TILES));
        let groups = bands.chunks(group).zip(spans.chunks_mut(group));
        groups.flat_map(|(bands, spans)| stages(bands, spans)).collect()
    } else {
        bands.par_chunks(1).zip(spans.par_chunks_mut(1)).flat_map_iter(|(band, span)| stages(band, span)).collect()
    };
    // SAFETY: the bands cover the output.
    (unsafe { assume_init_vec(out) }, results)
}

/// Stage 2 of [`convolve`]: multiplies each plane of the transformed windows of `bands` by its
/// weights, into `sums`, `[36, tiles, channels]` with a gap after each plane.
fn multiply_planes<T: Operand>(
    isa: &Isa,
    t: &Tiling,
    bands: &[Band],
    planes: &Planes<T>,
    weights: &[T],
    sums: &mut [f32],
    cooperative: bool,
) {
    let n = t.tiles(&bands[bands.len() - 1]).end - t.tiles(&bands[0]).start;
    let window_offsets: Vec<u32> = bands
        .iter()
        .enumerate()
        .flat_map(|(k, band)| {
            let Planes { band_step, channels, .. } = *planes;
            (0..t.tiles(band).len()).map(move |i| (k * band_step + i * channels) as u32)
        })
        .collect();
    let out_offsets: Vec<u32> = (0..n).map(|i| (i * t.dest.c) as u32).collect();
    let (tiles, taps) = (Offsets::from(&window_offsets[..]), Offsets::from(&[0][..]));
    let out_offsets = Offsets::from(&out_offsets[..]);
    let block = t.source.c * 2 * isa.lanes;
    let min_planes = min_split(cooperative);
    sums.par_chunks_mut(sums.len() / PLANES).with_min_len(min_planes).enumerate().for_each(|(k, sums)| {
        let source = &planes.values[k * planes.plane_step..];
        let rows = Windows { source, windows: tiles, taps, run: t.source.c, prefetch: false };
        // The last block may be narrower.
        let weights = weights.chunks(PLANES * block).map(|w| &w[k * w.len() / PLANES..(k + 1) * w.len() / PLANES]);
        // SAFETY: the product writes numbers only.
        rows.multiply(isa, t.dest.c, weights, out_offsets, unsafe { as_uninit(sums) });
    });
}

/// Computes the gradient of the weights, packed block by block of channels: `[9, c_in, NV · LANES]`
/// each.
pub(super) fn backward_weight<T: Operand>(isa: &Isa, s: &Shape, t: &Tiling, x: F32Input, dy: &[f32]) -> Vec<f32> {
    let (sources, channels) = (s.c_in, s.c_out.next_multiple_of(isa.lanes));
    let length = PLANES * sources * channels;
    let tile_values = PLANES * (sources + channels);
    let mut sum = vec![0.0f32; length];
    let [input_transforms, output_grad_transforms] = T::interleaved_transforms(isa);
    let x_tiles = t.input_tiles(x, input_transforms, T::DEPTH);
    let dy_tiles = t.output_grad_tiles(isa, dy, output_grad_transforms);
    if length <= INDEPENDENT_SUMS {
        let bands = t.bands(INDEPENDENT_VALUES / tile_values);
        let parts: Vec<Vec<f32>> = bands
            .par_chunks(bands.len().div_ceil(PARTS))
            .map(|bands| {
                let mut sum = vec![0.0f32; length];
                bands.chunks(1).for_each(|band| add_products(isa, &x_tiles, &dy_tiles, band, false, &mut sum));
                sum
            })
            .collect();
        for part in parts {
            sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
        }
    } else {
        let bands = t.bands(SUM_BAND_TILES);
        let group = t.group_len(&bands, (GROUP_SUM_VALUES / tile_values).max(MIN_GROUP_TILES));
        bands.chunks(group).for_each(|bands| add_products(isa, &x_tiles, &dy_tiles, bands, true, &mut sum));
    }
    let mut packed = uninit_vec(9 * sources * channels);
    let width = sources * 2 * isa.lanes;
    packed.par_chunks_mut(9 * width).zip(sum.par_chunks(PLANES * width)).for_each(|(to, from)| {
        let n = from.len() / PLANES;
        let (from_step, to_step) = ([WINDOW * n, n], [3 * n, n]);
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe {
            (isa.weight_grad_transform)(&mut Transform { channels: n, from, from_step, inside: None, to, to_step })
        };
    });
    // SAFETY: the transforms have written every block as a whole.
    unsafe { assume_init_vec(packed) }
}

/// Computes sum += (Bᵀ x B) ⊙ (A dy Aᵀ) over the tiles of some bands, block by block of channels:
/// `[36, c_in, NV · LANES]` each.
fn add_products<T: Operand>(
    isa: &Isa,
    x: &TileTransform<T>,
    dy: &TileTransform<T>,
    bands: &[Band],
    cooperative: bool,
    sum: &mut [f32],
) {
    let (mut x_buffer, mut dy_buffer) = SCRATCH.with_borrow_mut(|s| (take(&mut s.windows), take(&mut s.gradients)));
    let windows = x.run(isa, bands, cooperative, &mut x_buffer);
    // Missing channels hold values of earlier layers; their sums are never read.
    let gradients = dy.run(isa, bands, cooperative, &mut dy_buffer);
    let (c_in, channels) = (windows.channels, gradients.channels);
    let blocks: Vec<_> = blocks(isa, channels).collect();
    let sum_blocks = sum.par_chunks_mut(PLANES * c_in * 2 * isa.lanes).zip(blocks);
    sum_blocks.with_min_len(min_split(cooperative)).for_each(|(sum, block)| {
        let width = block.registers * isa.lanes;
        let planes = sum.par_chunks_exact_mut(c_in * width).with_min_len(min_split(cooperative));
        planes.enumerate().for_each(|(k, sum)| {
            for (i, band) in bands.iter().enumerate() {
                let groups = x.tiling.tiles(band).len().div_ceil(T::DEPTH);
                let [source_step, dy_step] = [c_in, channels].map(|values| values * T::DEPTH);
                let source = &windows.values[i * windows.band_step + k * windows.plane_step..];
                let dy = &gradients.values[i * gradients.band_step + k * gradients.plane_step..][..groups * dy_step];
                let dy = &dy[block.first * T::DEPTH..];
                for (row, sum) in (0..c_in).step_by(isa.tile_rows).zip(sum.chunks_mut(isa.tile_rows * width)) {
                    let source = &source[row * T::DEPTH..];
                    PanelPair { source, source_step, dy, dy_step, groups }.accumulate(isa, block.registers, sum);
                }
            }
        });
    });
    SCRATCH.with_borrow_mut(|s| (s.windows, s.gradients) = (x_buffer, dy_buffer));
}

//! 3x3 with stride 1 by Winograd's minimal filtering F(4x4, 3x3): Lavin and Gray 2015, arXiv:1509.09308.
//!
//! A tile of 4 x 4 output pixels reads 6 x 6 input pixels. With fixed matrices A, B, G: y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A, 36 products a
//! tile and channel pair instead of 144. Summed over channels, each of the 36 places (planes) is a matrix product of its own, which the
//! tiles of [`super::tiles`] compute. The gradient by the input is the same with the weights turned round; the gradient by the weights is
//! dw = Gᵀ [Σ over tiles of (Bᵀ x B) ⊙ (A dy Aᵀ)] G.
//!
//! The interpolation points are 0, ±3/4, ±3/2 and ∞ ([`crate::transform`]), not the usual ±1, ±2: with them the error is two to three
//! times that of a plain sum in f32 (a test bounds it) instead of ten times.
//!
//! Where the transformed weights fit into a second-level cache beside the tiles, each thread takes tiles of its own through all three stages
//! (narrow). Else the threads go through the stages together, sharing out the planes, so that the weights pass by once for many tiles
//! (wide). Tiles, parts and groups are fixed by the shape, so the order of sums is too.

use std::{cell::RefCell, mem::MaybeUninit, ops::Range};

use rayon::prelude::*;

use super::{
    Map, Shape,
    tiles::{Pixels, Slopes, blocks, pack},
};
use crate::{
    isa::Isa,
    memory::{unwritten, written, written_slice},
    transform::{PLANES, TILE, Transform, WINDOW},
};

/// Values of transformed tiles that a thread works on at once in the narrow way: a part of a core's second-level cache.
const NARROW_VALUES: usize = 96 << 10;

/// Values of transformed weights up to which the narrow way pays.
const NARROW_WEIGHTS: usize = 1 << 20;

/// The same for the gradient by the weights, where every part sums into weights of its own.
const NARROW_SUMS: usize = 1 << 16;

/// Values of transformed tiles of a group in the wide way: a part of the last-level cache.
const WIDE_VALUES: usize = 1 << 21;

/// The same for the gradient by the weights.
const WIDE_SUMS: usize = 1 << 19;

/// Tiles of a group in the wide way, at least, so that the weights do not pass by for few of them.
const WIDE_TILES: usize = 128;

/// Tiles that lie together in memory in the wide way.
const TOGETHER: usize = 48;

/// Parts that sum weight gradients of their own in the narrow way: enough for many threads.
const PARTS: usize = 32;

/// Planes begin a little apart from a multiple of 4 KiB, which would put all of them into the same sets of a cache.
const APART: usize = 16;

/// Fewer channels do not repay the transforms.
const LEAST_CHANNELS: usize = 16;

/// How an output is cut into tiles, and what they read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    n: usize,
    from: Map,
    to: Map,
    padding: usize,
    /// Tiles of an image.
    rows: usize,
    cols: usize,
}

/// A tile: image, row and column of tiles.
#[derive(Debug, Clone, Copy)]
struct Place {
    image: usize,
    row: usize,
    col: usize,
}

/// Some rows of tiles, counted over all images: a contiguous part of the output.
type Part = Range<usize>;

impl Tiling {
    /// Of the forward pass; none where the algorithm does not fit or does not pay.
    pub fn of(s: &Shape) -> Option<Tiling> {
        let fits = s.kernel == 3 && s.stride == 1 && s.dilation == 1 && s.padding <= 2;
        // A map of one tile that is mostly border would be mostly waste.
        let pays = s.c_in.min(s.c_out) >= LEAST_CHANNELS && s.h >= 3 && s.w >= 3;
        let (from, to) = (Map { h: s.h, w: s.w, c: s.c_in }, Map { h: s.h_out(), w: s.w_out(), c: s.c_out });
        (fits && pays).then(|| Tiling::new(s.n, from, to, s.padding))
    }

    /// Of the gradient by the input.
    pub fn turned(&self) -> Tiling {
        Tiling::new(self.n, self.to, self.from, 2 - self.padding)
    }

    fn new(n: usize, from: Map, to: Map, padding: usize) -> Tiling {
        Tiling { n, from, to, padding, rows: to.h.div_ceil(TILE), cols: to.w.div_ceil(TILE) }
    }

    /// Parts of about this many tiles: rows of one image, or whole images.
    fn parts(&self, tiles: usize) -> Vec<Part> {
        let (all, image) = (self.n * self.rows, self.rows * self.cols);
        if image <= tiles {
            let rows = tiles / image * self.rows;
            return (0..all).step_by(rows).map(|r| r..(r + rows).min(all)).collect();
        }
        let rows = (tiles / self.cols).max(1);
        let band = |image: usize, r: usize| image * self.rows + r..image * self.rows + (r + rows).min(self.rows);
        (0..self.n).flat_map(|i| (0..self.rows).step_by(rows).map(move |r| band(i, r))).collect()
    }

    /// The tiles of a part, in order.
    fn tiles(&self, part: &Part) -> Range<usize> {
        part.start * self.cols..part.end * self.cols
    }

    fn place(&self, tile: usize) -> Place {
        let row = tile / self.cols;
        Place { image: row / self.rows, row: row % self.rows, col: tile % self.cols }
    }

    /// Where a part lies in the output.
    fn span(&self, part: &Part) -> Range<usize> {
        let at = |row: usize| {
            let (image, row) = (row / self.rows, row % self.rows);
            image * self.to.len() + (TILE * row).min(self.to.h) * self.to.w * self.to.c
        };
        at(part.start)..at(part.end)
    }

    /// Bᵀ x B of one tile; its planes begin at `to + k · plane`. `patch` is for tiles at the border.
    fn read(&self, isa: &Isa, x: &[f32], tile: usize, patch: &mut Vec<f32>, to: &mut [MaybeUninit<f32>], plane: usize) {
        let (Map { h, w, c }, place) = (self.from, self.place(tile));
        let origin = |at: usize| (TILE * at) as isize - self.padding as isize;
        let (y, x0) = (origin(place.row), origin(place.col));
        let inside = |at: isize, size: usize| at >= 0 && at as usize + WINDOW <= size;
        let image = &x[place.image * self.from.len()..][..self.from.len()];
        let (from, step) = if inside(y, h) && inside(x0, w) {
            (&image[(y as usize * w + x0 as usize) * c..], [w * c, c])
        } else {
            (cut(image, self.from, [y, x0], WINDOW, patch), [WINDOW * c, c])
        };
        Transform { n: c, from, from_step: step, to, to_step: [WINDOW * plane, plane] }.run(isa.window);
    }

    /// A dy Aᵀ of one tile; its planes begin at `to + k · plane`.
    fn read_slopes(
        &self,
        isa: &Isa,
        dy: &[f32],
        tile: usize,
        patch: &mut Vec<f32>,
        to: &mut [MaybeUninit<f32>],
        plane: usize,
    ) {
        let (Map { h, w, c }, place) = (self.to, self.place(tile));
        let (y, x) = (TILE * place.row, TILE * place.col);
        let image = &dy[place.image * self.to.len()..][..self.to.len()];
        let (from, step) = if y + TILE <= h && x + TILE <= w {
            (&image[(y * w + x) * c..], [w * c, c])
        } else {
            (cut(image, self.to, [y as isize, x as isize], TILE, patch), [TILE * c, c])
        };
        Transform { n: c, from, from_step: step, to, to_step: [WINDOW * plane, plane] }.run(isa.slopes);
    }

    /// Aᵀ m A of one tile, whose planes begin at `m + k · plane`, into `out`, the values of `part`.
    fn write(
        &self,
        isa: &Isa,
        m: &[f32],
        plane: usize,
        tile: usize,
        part: &Part,
        patch: &mut Vec<f32>,
        out: &mut [MaybeUninit<f32>],
    ) {
        let (Map { h, w, c }, place) = (self.to, self.place(tile));
        let (y, x) = (TILE * place.row, TILE * place.col);
        let at = place.image * self.to.len() + (y * w + x) * c - self.span(part).start;
        let from_step = [WINDOW * plane, plane];
        if y + TILE <= h && x + TILE <= w {
            Transform { n: c, from: m, from_step, to: &mut out[at..], to_step: [w * c, c] }.run(isa.output);
            return;
        }
        patch.resize(patch.len().max(TILE * TILE * c), 0.0);
        let whole = as_unwritten(&mut patch[..TILE * TILE * c]);
        Transform { n: c, from: m, from_step, to: whole, to_step: [TILE * c, c] }.run(isa.output);
        let cols = (w - x).min(TILE);
        for row in 0..(h - y).min(TILE) {
            let to = &mut out[at + row * w * c..][..cols * c];
            to.write_copy_of_slice(&patch[row * TILE * c..][..cols * c]);
        }
    }
}

/// Written values as such that may be overwritten.
fn as_unwritten(values: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: the layouts are the same, and only transforms get it, which write numbers.
    unsafe { &mut *(std::ptr::from_mut(values) as *mut [MaybeUninit<f32>]) }
}

/// The square of this side from `[y, x]` on, zeros where there is no image, in `patch`.
fn cut<'a>(image: &[f32], Map { h, w, c }: Map, [y, x]: [isize; 2], side: usize, patch: &'a mut Vec<f32>) -> &'a [f32] {
    patch.clear();
    patch.resize(side * side * c, 0.0);
    let within = |at: isize, size: usize| {
        let (first, end) = (at.clamp(0, size as isize), (at + side as isize).clamp(0, size as isize));
        (first as usize, end as usize)
    };
    let ((top, bottom), (left, right)) = (within(y, h), within(x, w));
    for row in top..bottom {
        let to = ((row as isize - y) as usize * side + (left as isize - x) as usize) * c;
        patch[to..][..(right - left) * c].copy_from_slice(&image[(row * w + left) * c..(row * w + right) * c]);
    }
    &patch[..]
}

/// What a thread keeps from part to part.
#[derive(Default)]
struct Scratch {
    windows: Vec<f32>,
    sums: Vec<f32>,
    slopes: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The first `n` values of a buffer that grows as it must.
fn room(buffer: &mut Vec<f32>, n: usize) -> &mut [f32] {
    if buffer.len() < n {
        buffer.resize(n, 0.0);
    }
    &mut buffer[..n]
}

/// Whether the threads go through the stages together: rayon splits no iterator of fewer items than this.
fn least(wide: bool) -> usize {
    if wide { 1 } else { usize::MAX }
}

/// G w Gᵀ, block by block of channels, each `[36, sources, NV · LANES]`.
fn weights(isa: &Isa, s: &Shape, w: &[f32], turned: bool) -> Vec<f32> {
    let (sources, channels) = if turned { (s.c_out, s.c_in) } else { (s.c_in, s.c_out) };
    // Turned round: the first tap last.
    let places: Vec<usize> = if turned { (0..9).rev().collect() } else { (0..9).collect() };
    let packed = pack(isa, s, &places, w, turned);
    let mut planes = unwritten(PLANES * sources * channels.next_multiple_of(isa.lanes));
    let wide = sources * 2 * isa.lanes;
    planes.par_chunks_mut(PLANES * wide).zip(packed.par_chunks(9 * wide)).for_each(|(to, from)| {
        let n = from.len() / 9;
        Transform { n, from, from_step: [3 * n, n], to, to_step: [WINDOW * n, n] }.run(isa.filter);
    });
    // SAFETY: each block is transformed whole.
    unsafe { written(planes) }
}

/// Tiles that have been transformed: `[groups of TOGETHER or fewer, 36 planes, tiles, channels]`.
struct Windows<'a> {
    values: &'a [f32],
    /// Tiles of a group.
    together: usize,
    plane: usize,
    channels: usize,
}

impl Windows<'_> {
    fn size(together: usize, channels: usize) -> usize {
        PLANES * Self::plane(together, channels)
    }

    fn plane(together: usize, channels: usize) -> usize {
        together * channels + APART
    }

    /// Where each of `n` tiles begins in plane 0.
    fn bases(&self, n: usize) -> Vec<u32> {
        let at = |i: usize| i / self.together * PLANES * self.plane + i % self.together * self.channels;
        (0..n).map(|i| u32::try_from(at(i)).expect("a group has less than 2^32 values")).collect()
    }

    /// Transforms `n` tiles of `c` channels, group by group, into `buffer`; `read` transforms one.
    fn fill<'a>(
        buffer: &'a mut Vec<f32>,
        n: usize,
        channels: usize,
        together: usize,
        wide: bool,
        read: impl Fn(usize, &mut Vec<f32>, &mut [MaybeUninit<f32>], usize) + Sync,
    ) -> Windows<'a> {
        let (size, plane) = (Self::size(together, channels), Self::plane(together, channels));
        let values = room(buffer, n.div_ceil(together) * size);
        values.par_chunks_mut(size).with_min_len(least(wide)).enumerate().for_each(|(group, to)| {
            let mut patch = Vec::new();
            let to = as_unwritten(to);
            for tile in group * together..((group + 1) * together).min(n) {
                read(tile, &mut patch, &mut to[(tile - group * together) * channels..], plane);
            }
        });
        Windows { values, together, plane, channels }
    }
}

/// y = conv(source, w), or with `turned` the gradient by the input; `finish` as in [`super::forward_then`].
pub(super) fn forward<T: Send>(
    isa: &Isa,
    s: &Shape,
    t: &Tiling,
    w: &[f32],
    source: &[f32],
    turned: bool,
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    let both = PLANES * (t.from.c + t.to.c);
    let weights = weights(isa, s, w, turned);
    let wide = PLANES * t.from.c * t.to.c > NARROW_WEIGHTS;
    let parts = t.parts((NARROW_VALUES / both).max(4 * isa.pixels));
    let mut out = unwritten(t.n * t.to.len());
    let mut rest = &mut out[..];
    let mut all = Vec::new();
    for part in parts {
        let (values, after) = rest.split_at_mut(t.span(&part).len());
        all.push((part, values));
        rest = after;
    }
    let stages = |parts: &mut [(Part, &mut [MaybeUninit<f32>])]| -> Vec<T> {
        let mut scratch = SCRATCH.take();
        let tiles = t.tiles(&parts[0].0).start..t.tiles(&parts[parts.len() - 1].0).end;
        let n = tiles.len();
        let together = if wide { TOGETHER } else { n };
        let windows = Windows::fill(&mut scratch.windows, n, t.from.c, together, wide, |i, patch, to, plane| {
            t.read(isa, source, tiles.start + i, patch, to, plane);
        });
        // Sums of each plane, `[tiles, channels]`.
        let plane = n * t.to.c + APART;
        let sums = room(&mut scratch.sums, PLANES * plane);
        let base = windows.bases(n);
        let to: Vec<u32> = (0..n).map(|i| (i * t.to.c) as u32).collect();
        let block = t.from.c * 2 * isa.lanes;
        sums.par_chunks_mut(plane).with_min_len(least(wide)).enumerate().for_each(|(k, sums)| {
            let read = Pixels { source: &windows.values[k * windows.plane..], base: &base, taps: &[0], run: t.from.c };
            // The last block may be narrower.
            let of_plane = weights.chunks(PLANES * block).map(|w| &w[k * w.len() / PLANES..(k + 1) * w.len() / PLANES]);
            read.multiply(isa, t.to.c, of_plane, &to, as_unwritten(sums));
        });
        let sums = &*sums;
        let done = parts.par_iter_mut().with_min_len(least(wide)).map(|(part, out)| {
            let mut patch = Vec::new();
            for tile in t.tiles(part) {
                t.write(isa, &sums[(tile - tiles.start) * t.to.c..], plane, tile, part, &mut patch, out);
            }
            // SAFETY: the tiles of a part are all of its pixels.
            finish(t.span(part).start, unsafe { written_slice(out) })
        });
        let done = done.collect();
        SCRATCH.set(scratch);
        done
    };
    let done = if wide {
        let mut done = Vec::new();
        for group in groups(t, &mut all, (WIDE_VALUES / both).max(WIDE_TILES)) {
            done.extend(stages(group));
        }
        done
    } else {
        all.par_chunks_mut(1).flat_map_iter(stages).collect()
    };
    // SAFETY: the parts are all of it.
    (unsafe { written(out) }, done)
}

/// Neighbouring parts of about this many tiles together.
fn groups<'a, T>(t: &Tiling, parts: &'a mut [(Part, T)], tiles: usize) -> impl Iterator<Item = &'a mut [(Part, T)]> {
    let most = parts.iter().map(|(part, _)| t.tiles(part).len()).max().unwrap_or(1);
    parts.chunks_mut((tiles / most).max(1))
}

/// The gradient by the weights, block by block of channels, each `[9, c_in, NV · LANES]`.
pub(super) fn backward_weight(isa: &Isa, s: &Shape, t: &Tiling, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let (sources, channels) = (s.c_in, s.c_out.next_multiple_of(isa.lanes));
    let length = PLANES * sources * channels;
    let both = PLANES * (sources + channels);
    let all = t.n * t.rows * t.cols;
    let mut sum = vec![0.0f32; length];
    if length <= NARROW_SUMS {
        let step = NARROW_VALUES / both;
        let tasks: Vec<Range<usize>> = (0..all).step_by(step).map(|i| i..(i + step).min(all)).collect();
        let partial: Vec<Vec<f32>> = tasks
            .par_chunks(tasks.len().div_ceil(PARTS))
            .map(|tasks| {
                let mut sum = vec![0.0f32; length];
                tasks.iter().for_each(|tiles| add_products(isa, s, t, x, dy, tiles.clone(), false, &mut sum));
                sum
            })
            .collect();
        for part in partial {
            sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
        }
    } else {
        let step = (WIDE_SUMS / both).max(WIDE_TILES).next_multiple_of(TOGETHER);
        (0..all).step_by(step).for_each(|i| add_products(isa, s, t, x, dy, i..(i + step).min(all), true, &mut sum));
    }
    let mut packed = unwritten(9 * sources * channels);
    let wide = sources * 2 * isa.lanes;
    packed.par_chunks_mut(9 * wide).zip(sum.par_chunks(PLANES * wide)).for_each(|(to, from)| {
        let n = from.len() / PLANES;
        Transform { n, from, from_step: [WINDOW * n, n], to, to_step: [3 * n, n] }.run(isa.filter_slopes);
    });
    // SAFETY: each block is transformed whole.
    unsafe { written(packed) }
}

/// sum += (Bᵀ x B) ⊙ (A dy Aᵀ) over some tiles, block by block of channels, each `[36, c_in, NV · LANES]`.
#[allow(clippy::too_many_arguments)]
fn add_products(
    isa: &Isa,
    s: &Shape,
    t: &Tiling,
    x: &[f32],
    dy: &[f32],
    tiles: Range<usize>,
    wide: bool,
    sum: &mut [f32],
) {
    let mut scratch = SCRATCH.take();
    let Scratch { windows, slopes, .. } = &mut scratch;
    let (n, channels) = (tiles.len(), s.c_out.next_multiple_of(isa.lanes));
    let together = if wide { TOGETHER } else { n };
    let windows = Windows::fill(windows, n, s.c_in, together, wide, |i, patch, to, plane| {
        t.read(isa, x, tiles.start + i, patch, to, plane);
    });
    // Channels that are not there hold what earlier layers left, and go into sums that nobody reads.
    let slopes = Windows::fill(slopes, n, channels, together, wide, |i, patch, to, plane| {
        t.read_slopes(isa, dy, tiles.start + i, patch, to, plane);
    });
    let base: Vec<u32> = (0..together).map(|i| (i * s.c_in) as u32).collect();
    let blocks: Vec<_> = blocks(isa, s.c_out).collect();
    let of_blocks = sum.par_chunks_mut(PLANES * s.c_in * 2 * isa.lanes).zip(blocks);
    of_blocks.with_min_len(least(wide)).for_each(|(sum, block)| {
        let planes = sum.par_chunks_exact_mut(s.c_in * block.1 * isa.lanes).with_min_len(least(wide));
        planes.enumerate().for_each(|(k, sum)| {
            for first in (0..n).step_by(together) {
                let here = (n - first).min(together);
                let group = first / together;
                let source = &windows.values[group * PLANES * windows.plane + k * windows.plane..];
                let dy = &slopes.values[group * PLANES * slopes.plane + k * slopes.plane..][..here * channels];
                let all = Slopes { source, base: &base[..here], dy, step: channels, block: here };
                all.add(isa, 0, s.c_in, block, sum);
            }
        });
    });
    SCRATCH.set(scratch);
}

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

use std::{
    cell::RefCell,
    mem::{MaybeUninit, take},
    ops::Range,
};

use rayon::prelude::*;

use super::{
    Input, Map, Shape, as_unwritten,
    tiles::{Offsets, Pixels, Slopes, blocks, pack},
};
use crate::{
    factor::Factor,
    isa::Isa,
    memory::{unwritten, written, written_slice},
    tile::{AHEAD, LINE, fetch},
    transform::{Compiled, Inside, PLANES, TILE, Transform, WINDOW},
};

/// Values of transformed tiles that a thread works on at once in the narrow way: a part of a core's second-level cache.
const NARROW_VALUES: usize = 108 << 10;

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

/// Tiles of a part of the gradient by the weights in the wide way.
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

    /// How many neighbouring parts have about this many tiles together.
    fn together(&self, parts: &[Part], tiles: usize) -> usize {
        let most = parts.iter().map(|part| self.tiles(part).len()).max().unwrap_or(1);
        (tiles / most).max(1)
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

    /// What the tiles of a part read of `source`, maps of this size, by squares of `side` pixels, the first `lead` pixels before the map:
    /// some rows of one image, or whole images. Where `source` has to be normalised first, that is a copy in `buffer`.
    fn window<'a>(
        &self,
        isa: &Isa,
        map: Map,
        [lead, side]: [usize; 2],
        source: Input<'a>,
        part: &Part,
        buffer: &'a mut Vec<f32>,
    ) -> Window<'a> {
        let line = map.w * map.c;
        let (first, last) = (part.start / self.rows, (part.end - 1) / self.rows);
        let (top, end) = if first == last {
            let [top, row] = [part.start, part.end - 1].map(|row| TILE * (row % self.rows));
            (top.saturating_sub(lead), (row + side - lead).min(map.h))
        } else {
            (0, map.h)
        };
        let from = first * map.len() + top * line;
        let n = last * map.len() + end * line - from;
        let values = match source.pending {
            None => &source.values[from..from + n],
            Some(_) => {
                let values = room(buffer, n);
                source.copy(isa, from, values);
                values
            }
        };
        Window { values, from }
    }

    /// Asks for the lines that a later tile of a part writes.
    fn fetch(&self, tile: usize, part: &Part, out: &[MaybeUninit<f32>]) {
        let (Map { w, c, .. }, place) = (self.to, self.place(tile));
        let at = place.image * self.to.len() + TILE * (place.row * w + place.col) * c - self.span(part).start;
        fetch_tile::<true, _>(out, at, w * c, TILE * c);
    }

    /// Aᵀ m A of one tile, whose planes begin at `m + k · plane`, into `out`, the values of `part`.
    fn write(
        &self,
        isa: &Isa,
        (m, plane): (&[f32], usize),
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
            Transform { n: c, from: m, from_step, inside: None, to: &mut out[at..], to_step: [w * c, c] }
                .run(isa.output);
            return;
        }
        patch.resize(patch.len().max(TILE * TILE * c), 0.0);
        let whole = as_unwritten(&mut patch[..TILE * TILE * c]);
        Transform { n: c, from: m, from_step, inside: None, to: whole, to_step: [TILE * c, c] }.run(isa.output);
        let cols = (w - x).min(TILE);
        for row in 0..(h - y).min(TILE) {
            let to = &mut out[at + row * w * c..][..cols * c];
            to.write_copy_of_slice(&patch[row * TILE * c..][..cols * c]);
        }
    }
}

/// Asks for the lines of as many runs as a tile has rows: `n` values each, `step` apart, the first at `at`; for what there is of them.
fn fetch_tile<const WRITE: bool, T>(values: &[T], at: usize, step: usize, n: usize) {
    for row in 0..TILE {
        let run = values.get(at + row * step..).unwrap_or_default();
        for line in run[..run.len().min(n)].iter().step_by(LINE) {
            fetch::<WRITE>(std::ptr::from_ref(line));
        }
    }
}

/// What the tiles of a part read.
struct Window<'a> {
    values: &'a [f32],
    /// Where they begin in the source.
    from: usize,
}

/// What a thread keeps from part to part.
#[derive(Default)]
struct Scratch {
    window: Vec<f32>,
    tiles: Vec<f32>,
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

/// G w Gᵀ, block by block of channels, each `[36, sources / DEPTH, NV · LANES, DEPTH]`.
fn weights<F: Factor>(isa: &Isa, s: &Shape, w: &[f32], turned: bool) -> Vec<F> {
    let (sources, channels) = if turned { (s.c_out, s.c_in) } else { (s.c_in, s.c_out) };
    // Turned round: the first tap last.
    let places: Vec<usize> = if turned { (0..9).rev().collect() } else { (0..9).collect() };
    let packed = pack(isa, s, &places, w, turned);
    let mut planes = unwritten(PLANES * sources * channels.next_multiple_of(isa.lanes));
    let wide = sources * 2 * isa.lanes;
    planes.par_chunks_mut(PLANES * wide).zip(packed.par_chunks(9 * wide)).for_each(|(to, from)| {
        let n = from.len() / 9;
        Transform { n, from, from_step: [3 * n, n], inside: None, to, to_step: [WINDOW * n, n] }.run(isa.filter);
    });
    // SAFETY: each block is transformed whole.
    F::weights(isa, PLANES * sources, unsafe { written(planes) })
}

/// Tiles that have been transformed, part by part: `[36 planes, groups of tiles of the part, channels, tiles of a group]` each, with room
/// for as many tiles as the largest part has.
struct Transformed<'a, F> {
    values: &'a [F],
    /// From one part to the next.
    part: usize,
    /// From one plane to the next.
    plane: usize,
    channels: usize,
}

/// Which tiles, of what, by which map.
#[derive(Clone, Copy)]
struct Read<'a, F> {
    tiling: &'a Tiling,
    source: Input<'a>,
    /// Of the source.
    map: Map,
    /// Before the source, and side of a tile's square.
    frame: [usize; 2],
    /// Of the first and of the second tile of a group.
    by: [Compiled<F>; 2],
    /// Tiles of a group, which lie side by side.
    group: usize,
    /// Channels with those that are not there.
    channels: usize,
}

impl<'a, F: Factor> Read<'a, F> {
    /// Transforms the tiles of these parts into `buffer`; the threads share out the parts where `wide`.
    fn all<'b>(&self, isa: &Isa, parts: &[Part], wide: bool, buffer: &'b mut Vec<f32>) -> Transformed<'b, F> {
        let most = parts.iter().map(|part| self.tiling.tiles(part).len()).max().unwrap_or(0);
        let plane = most.next_multiple_of(self.group) * self.channels + APART;
        let part = PLANES * plane;
        let values = &mut F::room(room(buffer, F::room_for(parts.len() * part)))[..parts.len() * part];
        values.par_chunks_mut(part).with_min_len(least(wide)).zip(parts).for_each(|(to, part)| {
            let mut scratch = SCRATCH.take();
            let window = self.tiling.window(isa, self.map, self.frame, self.source, part, &mut scratch.window);
            let (Map { h, w, c }, [lead, side]) = (self.map, self.frame);
            let all = Inside { rows: [0, side], cols: [0, side] };
            for (i, tile) in self.tiling.tiles(part).enumerate() {
                let place = self.tiling.place(tile);
                let [y, x] = [place.row, place.col].map(|at| TILE * at);
                let inside = Inside::of(side, [y, x], lead, [h, w]);
                if self.source.pending.is_none() {
                    // What the tile below reads and no tile has read yet. A copy was just written and is near.
                    let below = place.image * self.map.len() + ((y + side - lead) * w + x) * c;
                    fetch_tile::<false, _>(self.source.values, below, w * c, TILE * c);
                }
                let first = (y + inside.rows[0] - lead) * w + x + inside.cols[0] - lead;
                Transform {
                    n: c,
                    from: &window.values[place.image * self.map.len() + first * c - window.from..],
                    from_step: [w * c, c],
                    inside: (inside != all).then_some(inside),
                    to: as_unwritten(&mut to[i / self.group * self.group * self.channels..]),
                    to_step: [WINDOW * plane, plane],
                }
                .run(self.by[i % self.group]);
            }
            SCRATCH.set(scratch);
        });
        Transformed { values, part, plane, channels: self.channels }
    }
}

impl Tiling {
    /// Bᵀ x B of tiles of x.
    fn windows<'a, F: Factor>(&'a self, source: Input<'a>, by: [Compiled<F>; 2], group: usize) -> Read<'a, F> {
        let frame = [self.padding, WINDOW];
        Read { tiling: self, source, map: self.from, frame, by, group, channels: self.from.c }
    }

    /// A dy Aᵀ of tiles of dy.
    fn slopes<'a, F: Factor>(&'a self, isa: &Isa, dy: &'a [f32], by: [Compiled<F>; 2]) -> Read<'a, F> {
        let (source, channels) = (Input::from(dy), self.to.c.next_multiple_of(isa.lanes));
        Read { tiling: self, source, map: self.to, frame: [0, TILE], by, group: F::DEPTH, channels }
    }
}

/// y = conv(source, w), or with `turned` the gradient by the input; `finish` as in [`super::forward_then`].
pub(super) fn forward<F: Factor, T: Send>(
    isa: &Isa,
    s: &Shape,
    t: &Tiling,
    w: &[f32],
    source: Input,
    turned: bool,
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    let both = PLANES * (t.from.c + t.to.c);
    let weights = weights::<F>(isa, s, w, turned);
    let wide = PLANES * t.from.c * t.to.c > NARROW_WEIGHTS;
    let parts = t.parts((NARROW_VALUES / both).max(4 * isa.pixels));
    let mut out = unwritten(t.n * t.to.len());
    let mut rest = &mut out[..];
    let mut spans = Vec::new();
    for part in &parts {
        let (values, after) = rest.split_at_mut(t.span(part).len());
        spans.push(values);
        rest = after;
    }
    let stages = |parts: &[Part], spans: &mut [&mut [MaybeUninit<f32>]]| -> Vec<T> {
        let (mut tiles, mut planes) = SCRATCH.with_borrow_mut(|s| (take(&mut s.tiles), take(&mut s.sums)));
        let read = t.windows::<F>(source, [F::window(isa); 2], 1).all(isa, parts, wide, &mut tiles);
        let first = t.tiles(&parts[0]).start;
        let n = t.tiles(&parts[parts.len() - 1]).end - first;
        let base: Vec<u32> = parts
            .iter()
            .enumerate()
            .flat_map(|(k, part)| (0..t.tiles(part).len()).map(move |i| (k * read.part + i * read.channels) as u32))
            .collect();
        // Sums of each plane, `[tiles, channels]`.
        let plane = n * t.to.c + APART;
        let sums = room(&mut planes, PLANES * plane);
        let to: Vec<u32> = (0..n).map(|i| (i * t.to.c) as u32).collect();
        let (base, to, taps) = (Offsets::from(&base[..]), Offsets::from(&to[..]), Offsets::from(&[0][..]));
        let block = t.from.c * 2 * isa.lanes;
        sums.par_chunks_mut(plane).with_min_len(least(wide)).enumerate().for_each(|(k, sums)| {
            let read = Pixels { source: &read.values[k * read.plane..], base, taps, run: t.from.c, far: false };
            // The last block may be narrower.
            let of_plane = weights.chunks(PLANES * block).map(|w| &w[k * w.len() / PLANES..(k + 1) * w.len() / PLANES]);
            read.multiply(isa, t.to.c, of_plane, to, as_unwritten(sums));
        });
        let sums = &*sums;
        let done = parts.par_iter().zip(spans).with_min_len(least(wide)).map(|(part, out)| {
            let mut patch = Vec::new();
            for tile in t.tiles(part) {
                t.fetch(tile + AHEAD, part, out);
                t.write(isa, (&sums[(tile - first) * t.to.c..], plane), tile, part, &mut patch, out);
            }
            // SAFETY: the tiles of a part are all of its pixels.
            finish(t.span(part).start, unsafe { written_slice(out) })
        });
        let done = done.collect();
        SCRATCH.with_borrow_mut(|s| (s.tiles, s.sums) = (tiles, planes));
        done
    };
    let done = if wide {
        let together = t.together(&parts, (WIDE_VALUES / both).max(WIDE_TILES));
        let groups = parts.chunks(together).zip(spans.chunks_mut(together));
        groups.flat_map(|(parts, spans)| stages(parts, spans)).collect()
    } else {
        parts.par_chunks(1).zip(spans.par_chunks_mut(1)).flat_map_iter(|(part, span)| stages(part, span)).collect()
    };
    // SAFETY: the parts are all of it.
    (unsafe { written(out) }, done)
}

/// The gradient by the weights, block by block of channels, each `[9, c_in, NV · LANES]`.
pub(super) fn backward_weight<F: Factor>(isa: &Isa, s: &Shape, t: &Tiling, x: Input, dy: &[f32]) -> Vec<f32> {
    let (sources, channels) = (s.c_in, s.c_out.next_multiple_of(isa.lanes));
    let length = PLANES * sources * channels;
    let both = PLANES * (sources + channels);
    let mut sum = vec![0.0f32; length];
    let [by_window, by_slope] = F::interleaved(isa);
    let read = [t.windows(x, by_window, F::DEPTH), t.slopes(isa, dy, by_slope)];
    if length <= NARROW_SUMS {
        let parts = t.parts(NARROW_VALUES / both);
        let partial: Vec<Vec<f32>> = parts
            .par_chunks(parts.len().div_ceil(PARTS))
            .map(|parts| {
                let mut sum = vec![0.0f32; length];
                parts.chunks(1).for_each(|part| add_products(isa, &read, part, false, &mut sum));
                sum
            })
            .collect();
        for part in partial {
            sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
        }
    } else {
        let parts = t.parts(TOGETHER);
        let together = t.together(&parts, (WIDE_SUMS / both).max(WIDE_TILES));
        parts.chunks(together).for_each(|parts| add_products(isa, &read, parts, true, &mut sum));
    }
    let mut packed = unwritten(9 * sources * channels);
    let wide = sources * 2 * isa.lanes;
    packed.par_chunks_mut(9 * wide).zip(sum.par_chunks(PLANES * wide)).for_each(|(to, from)| {
        let n = from.len() / PLANES;
        Transform { n, from, from_step: [WINDOW * n, n], inside: None, to, to_step: [3 * n, n] }.run(isa.filter_slopes);
    });
    // SAFETY: each block is transformed whole.
    unsafe { written(packed) }
}

/// sum += (Bᵀ x B) ⊙ (A dy Aᵀ) over the tiles of some parts, block by block of channels, each `[36, c_in, NV · LANES]`.
fn add_products<F: Factor>(isa: &Isa, [x, dy]: &[Read<F>; 2], parts: &[Part], wide: bool, sum: &mut [f32]) {
    let (mut tiles, mut slopes) = SCRATCH.with_borrow_mut(|s| (take(&mut s.tiles), take(&mut s.slopes)));
    let windows = x.all(isa, parts, wide, &mut tiles);
    // Channels that are not there hold what earlier layers left, and go into sums that nobody reads.
    let gradients = dy.all(isa, parts, wide, &mut slopes);
    let (c_in, channels) = (windows.channels, gradients.channels);
    let blocks: Vec<_> = blocks(isa, channels).collect();
    let of_blocks = sum.par_chunks_mut(PLANES * c_in * 2 * isa.lanes).zip(blocks);
    of_blocks.with_min_len(least(wide)).for_each(|(sum, block)| {
        let planes = sum.par_chunks_exact_mut(c_in * block.1 * isa.lanes).with_min_len(least(wide));
        planes.enumerate().for_each(|(k, sum)| {
            for (i, part) in parts.iter().enumerate() {
                let n = x.tiling.tiles(part).len().div_ceil(F::DEPTH);
                let [source_step, step] = [c_in, channels].map(|values| values * F::DEPTH);
                let source = &windows.values[i * windows.part + k * windows.plane..];
                let dy = &gradients.values[i * gradients.part + k * gradients.plane..][..n * step];
                for (row, sum) in (0..c_in).step_by(isa.rows).zip(sum.chunks_mut(isa.rows * block.1 * isa.lanes)) {
                    let (source, dy) = (&source[row * F::DEPTH..], &dy[block.0 * F::DEPTH..]);
                    let all = Slopes { source, source_step, dy, step, n };
                    all.add(isa, block.1, sum);
                }
            }
        });
    });
    SCRATCH.with_borrow_mut(|s| (s.tiles, s.slopes) = (tiles, slopes));
}

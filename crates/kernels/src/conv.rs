//! Convolution and its two gradients, channels last, without laying out windows: a tile reads them where they are.
//!
//! The forward pass and the gradient by the input are the same walk ([`Walk`]): every pixel of a destination sums taps of a source. For
//! the input's gradient the source is dy and the taps are turned round; with a stride its pixels fall into phases of stride × stride,
//! each with taps of its own. A thread copies the part of the source that its pixels read, with a margin of zeros, so that no tap asks
//! whether it lies in the image; without a margin it reads the source itself.
//!
//! Threads share out tasks: some images, or some rows of one. A task is fixed by the shape, so the order of sums is too.

use std::{cell::RefCell, ops::Range};

use rayon::prelude::*;

use crate::{
    isa::Isa,
    tile::{Tile, WeightTile},
};

/// Shapes of one convolution. Input `[n, h, w, c_in]`, weight `[c_out, c_in, kernel, kernel]`, output `[n, h_out, w_out, c_out]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Images.
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
    /// Side of the kernel.
    pub kernel: usize,
    /// Step in both directions.
    pub stride: usize,
    /// Zeros on every side.
    pub padding: usize,
    /// Distance of taps in both directions.
    pub dilation: usize,
}

/// Source values of a task: 256 KiB, a part of a core's second-level cache.
const TASK_VALUES: usize = 1 << 16;

/// Destination pixels that a task has at least, so that its last tile counts for little.
const TASK_PIXELS: usize = 256;

/// Pixels of a block of the weight gradient: its values stay in the first-level cache while all taps use them.
const BLOCK_VALUES: usize = 1 << 12;

/// Parts that sum small weight gradients of their own: enough for many threads.
const PARTS: usize = 32;

/// Values of a weight gradient from which on threads share one.
const SHARED_VALUES: usize = 1 << 16;

/// Source values of a group of images whose pixels are summed into shared weights at a time.
const GROUP_VALUES: usize = 1 << 20;

impl Shape {
    fn reach(&self) -> usize {
        self.dilation * (self.kernel - 1) + 1
    }

    /// Rows of the output.
    pub fn h_out(&self) -> usize {
        (self.h + 2 * self.padding - self.reach()) / self.stride + 1
    }

    /// Columns of the output.
    pub fn w_out(&self) -> usize {
        (self.w + 2 * self.padding - self.reach()) / self.stride + 1
    }

    /// Values of the input, the weight and the output.
    pub fn lengths(&self) -> [usize; 3] {
        let pixels_out = self.n * self.h_out() * self.w_out();
        let weight = self.c_out * self.c_in * self.kernel * self.kernel;
        [self.n * self.h * self.w * self.c_in, weight, pixels_out * self.c_out]
    }

    /// Multiply-adds of one direction.
    pub fn products(&self) -> usize {
        self.n * self.h_out() * self.w_out() * self.c_out * self.c_in * self.kernel * self.kernel
    }

    fn check(&self) {
        assert!(self.kernel > 0 && self.stride > 0 && self.dilation > 0, "{self:?}");
        assert!(self.h + 2 * self.padding >= self.reach() && self.w + 2 * self.padding >= self.reach(), "{self:?}");
    }
}

/// A map of pixels.
#[derive(Debug, Clone, Copy)]
struct Map {
    h: usize,
    w: usize,
    c: usize,
}

/// A tap in one direction: its offset in the source, and the kernel's index.
type Tap = (isize, usize);

/// Destination pixels `first + step · (j, i)` that read source pixels `source_step · (j, i) + taps`.
#[derive(Debug)]
struct Phase {
    first: [usize; 2],
    rows: Vec<Tap>,
    cols: Vec<Tap>,
}

/// Which source pixels each destination pixel reads.
#[derive(Debug)]
struct Walk {
    n: usize,
    from: Map,
    to: Map,
    /// Between destination pixels of a phase.
    step: usize,
    /// Between their windows.
    source_step: usize,
    phases: Vec<Phase>,
    /// Zeros before and after the source, rows and columns.
    margin: [[usize; 2]; 2],
}

impl Walk {
    fn new(n: usize, from: Map, to: Map, step: usize, source_step: usize, phases: Vec<Phase>) -> Walk {
        let margin = |size: usize, of: fn(&Phase) -> &Vec<Tap>, axis: usize, length: usize| {
            let mut margin = [0usize; 2];
            for phase in &phases {
                let steps = length.saturating_sub(phase.first[axis]).div_ceil(step);
                for (offset, _) in of(phase).iter().filter(|_| steps > 0) {
                    let last = (source_step * (steps - 1)) as isize + offset;
                    margin[0] = margin[0].max((-offset).max(0) as usize);
                    margin[1] = margin[1].max((last + 1 - size as isize).max(0) as usize);
                }
            }
            margin
        };
        let margin = [margin(from.h, |p| &p.rows, 0, to.h), margin(from.w, |p| &p.cols, 1, to.w)];
        Walk { n, from, to, step, source_step, phases, margin }
    }

    /// From x to y.
    fn forward(s: &Shape) -> Walk {
        let taps = || (0..s.kernel).map(|k| ((k * s.dilation) as isize - s.padding as isize, k)).collect();
        let phase = Phase { first: [0, 0], rows: taps(), cols: taps() };
        let from = Map { h: s.h, w: s.w, c: s.c_in };
        Walk::new(s.n, from, Map { h: s.h_out(), w: s.w_out(), c: s.c_out }, 1, s.stride, vec![phase])
    }

    /// From dy to dx: input row r + stride · j meets output row j + (r + padding − k · dilation) / stride where that is whole.
    fn backward(s: &Shape) -> Walk {
        let taps = |r: usize| -> Vec<Tap> {
            let reached = |k: usize| {
                let offset = (r + s.padding) as isize - (k * s.dilation) as isize;
                (offset.rem_euclid(s.stride as isize) == 0).then(|| (offset.div_euclid(s.stride as isize), k))
            };
            // Turned round, so that offsets grow.
            (0..s.kernel).rev().filter_map(reached).collect()
        };
        let phase = |i: usize| {
            let first = [i / s.stride, i % s.stride];
            Phase { first, rows: taps(first[0]), cols: taps(first[1]) }
        };
        let from = Map { h: s.h_out(), w: s.w_out(), c: s.c_out };
        let phases = (0..s.stride * s.stride).map(phase).filter(|p| !p.rows.is_empty() && !p.cols.is_empty());
        Walk::new(s.n, from, Map { h: s.h, w: s.w, c: s.c_in }, s.stride, 1, phases.collect())
    }

    fn has_margin(&self) -> bool {
        self.margin != [[0; 2]; 2]
    }

    /// Columns of a source row with its margin.
    fn width(&self) -> usize {
        self.from.w + self.margin[1][0] + self.margin[1][1]
    }

    /// What a thread works on at once.
    fn tasks(&self) -> Vec<Task> {
        let (rows, pixels) = (self.from.h + self.margin[0][0] + self.margin[0][1], self.to.h * self.to.w);
        let image = (rows * self.width() * self.from.c).max(1);
        if image <= TASK_VALUES || self.to.h <= self.step {
            let together = (TASK_VALUES / image).min(TASK_PIXELS.div_ceil(pixels.max(1))).clamp(1, self.n.max(1));
            let images = (0..self.n).step_by(together);
            return images.map(|i| Task { images: i..(i + together).min(self.n), rows: 0..self.to.h }).collect();
        }
        // Rows of one image; a multiple of the step, so that every task sees the same phases.
        let a_row = self.width() * self.from.c * self.source_step;
        let steps = (TASK_VALUES / a_row).max(TASK_PIXELS.div_ceil(self.to.w * self.step)).max(1);
        let height = steps * self.step;
        let band = |i: usize, y: usize| Task { images: i..i + 1, rows: y..(y + height).min(self.to.h) };
        (0..self.n).flat_map(|i| (0..self.to.h).step_by(height).map(move |y| band(i, y))).collect()
    }

    /// Rows of the source with its margin that a task reads: `[first, end)`.
    fn source_rows(&self, task: &Task) -> Range<usize> {
        let (mut first, mut end) = (usize::MAX, 0);
        for phase in &self.phases {
            let (from, to) = self.steps(phase, task);
            for (offset, _) in phase.rows.iter().filter(|_| from < to) {
                let at = |j: usize| ((j * self.source_step) as isize + offset + self.margin[0][0] as isize) as usize;
                first = first.min(at(from));
                end = end.max(at(to - 1) + 1);
            }
        }
        first.min(end)..end
    }

    /// The rows of a phase in a task, in steps.
    fn steps(&self, phase: &Phase, task: &Task) -> (usize, usize) {
        let upto = |row: usize| row.saturating_sub(phase.first[0]).div_ceil(self.step);
        (upto(task.rows.start), upto(task.rows.end))
    }
}

/// Some images, or some rows of one, of the destination.
#[derive(Debug, Clone)]
struct Task {
    images: Range<usize>,
    rows: Range<usize>,
}

impl Task {
    /// Where its values lie in the destination: they follow each other.
    fn span(&self, to: Map) -> Range<usize> {
        let row = |i: usize, y: usize| (i * to.h + y) * to.w * to.c;
        row(self.images.start, self.rows.start)..row(self.images.end - 1, self.rows.end)
    }
}

/// What a thread keeps from task to task.
#[derive(Default)]
struct Scratch {
    source: Vec<f32>,
    base: Vec<u32>,
    to: Vec<u32>,
    slopes: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The part of a source that a task reads.
struct Window<'a> {
    values: &'a [f32],
    /// Rows of each image in it, and the first of them counted from the margin on.
    rows: Range<usize>,
}

/// Copies what `task` reads into `buffer`, with its margin; `slack` values more may be read behind it. Without margin and slack nothing
/// is copied.
fn window<'a>(walk: &Walk, task: &Task, source: &'a [f32], buffer: &'a mut Vec<f32>, slack: usize) -> Window<'a> {
    let (rows, map) = (walk.source_rows(task), walk.from);
    let image = map.h * map.w * map.c;
    if !walk.has_margin() && slack == 0 {
        let whole = 0..map.h;
        return Window { values: &source[task.images.start * image..task.images.end * image], rows: whole };
    }
    let line = walk.width() * map.c;
    let length = task.images.len() * rows.len() * line + slack;
    if buffer.len() < length {
        buffer.resize(length, 0.0);
    }
    let [left, right] = walk.margin[1].map(|m| m * map.c);
    let lines = task.images.clone().flat_map(|i| rows.clone().map(move |y| (i, y)));
    for ((i, y), to) in lines.zip(buffer.chunks_exact_mut(line)) {
        match y.checked_sub(walk.margin[0][0]).filter(|y| *y < map.h) {
            Some(y) => {
                to[..left].fill(0.0);
                to[line - right..].fill(0.0);
                to[left..line - right].copy_from_slice(&source[i * image + y * map.w * map.c..][..map.w * map.c]);
            }
            None => to.fill(0.0),
        }
    }
    buffer[length - slack..length].fill(0.0);
    Window { values: &buffer[..length], rows }
}

/// Offsets of the pixels of a phase in a task: of their windows in `window`, and of their channels in the task's destination.
fn pixels(walk: &Walk, phase: &Phase, task: &Task, rows: &Range<usize>, base: &mut Vec<u32>, to: &mut Vec<u32>) {
    base.clear();
    to.clear();
    let (first, end) = walk.steps(phase, task);
    let columns = walk.to.w.saturating_sub(phase.first[1]).div_ceil(walk.step);
    // The first tap's offset is in the taps; here the margin alone is added.
    for image in 0..task.images.len() {
        for j in first..end {
            let source = (image * rows.len() + j * walk.source_step + walk.margin[0][0]) as isize - rows.start as isize;
            let source = (source * walk.width() as isize + walk.margin[1][0] as isize) * walk.from.c as isize;
            let row = phase.first[0] + j * walk.step - task.rows.start;
            let dest = ((image * task.rows.len() + row) * walk.to.w + phase.first[1]) * walk.to.c;
            for i in 0..columns {
                let origin = phase_origin(walk, phase);
                let at = source + (i * walk.source_step * walk.from.c) as isize + origin;
                base.push(u32::try_from(at).expect("a window begins in its buffer"));
                to.push(u32::try_from(dest + i * walk.step * walk.to.c).expect("a task has less than 2^32 values"));
            }
        }
    }
}

/// Where a window's first tap lies, from its pixel on.
fn phase_origin(walk: &Walk, phase: &Phase) -> isize {
    (phase.rows[0].0 * walk.width() as isize + phase.cols[0].0) * walk.from.c as isize
}

/// Where each run of taps begins, from the first tap on, and its length: neighbouring columns lie next to each other in memory.
fn runs(walk: &Walk, phase: &Phase) -> (Vec<u32>, usize) {
    let (row0, col0) = (phase.rows[0].0, phase.cols[0].0);
    let dense = phase.cols.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1);
    let line = |(y, _): &Tap| (y - row0) as usize * walk.width() * walk.from.c;
    if dense {
        (phase.rows.iter().map(|tap| line(tap) as u32).collect(), phase.cols.len() * walk.from.c)
    } else {
        let at = |y: &Tap, (x, _): &Tap| (line(y) + (x - col0) as usize * walk.from.c) as u32;
        let taps = phase.rows.iter().flat_map(|y| phase.cols.iter().map(move |x| at(y, x)));
        (taps.collect(), walk.from.c)
    }
}

/// Blocks of channels: first channel, registers, channels that are real.
fn blocks(isa: &Isa, channels: usize) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let lanes = isa.lanes;
    (0..channels).step_by(2 * lanes).map(move |first| {
        let cols = (channels - first).min(2 * lanes);
        (first, cols.div_ceil(lanes), cols)
    })
}

/// The weights of a phase, block by block as the tiles read them: `[taps, channels of the source, NV · LANES]`, zeros where there is no
/// channel. `w` is `[c_out, c_in, k, k]`; `turned` where the source is dy.
fn pack(isa: &Isa, s: &Shape, phase: &Phase, w: &[f32], turned: bool) -> Vec<f32> {
    let (sources, channels) = if turned { (s.c_out, s.c_in) } else { (s.c_in, s.c_out) };
    let kk = s.kernel * s.kernel;
    // From one source and from one channel to the next.
    let (by_source, by_channel) = if turned { (s.c_in * kk, kk) } else { (kk, s.c_in * kk) };
    let taps: Vec<usize> =
        phase.rows.iter().flat_map(|(_, ky)| phase.cols.iter().map(move |(_, kx)| ky * s.kernel + kx)).collect();
    let rows = taps.len() * sources;
    let mut packed = vec![0.0f32; rows * channels.next_multiple_of(isa.lanes)];
    let blocks: Vec<_> = blocks(isa, channels).collect();
    packed.par_chunks_mut(rows * 2 * isa.lanes).zip(blocks).for_each(|(packed, (first, registers, cols))| {
        let mut rows = packed.chunks_exact_mut(registers * isa.lanes);
        for tap in &taps {
            for source in 0..sources {
                let row = rows.next().expect("a row a tap and source");
                let from = tap + source * by_source + first * by_channel;
                for (to, v) in row[..cols].iter_mut().zip(w[from..].iter().step_by(by_channel)) {
                    *to = *v;
                }
            }
        }
    });
    packed
}

/// Walks over the destination, task by task; `finish` gets each finished part with its offset while it is in the cache. Pixels that
/// nothing reaches stay 0.
fn walk<T: Send>(
    isa: &Isa,
    s: &Shape,
    walk: &Walk,
    w: &[f32],
    source: &[f32],
    turned: bool,
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    let mut out = vec![0.0f32; walk.n * walk.to.h * walk.to.w * walk.to.c];
    let weights: Vec<Vec<f32>> = walk.phases.iter().map(|phase| pack(isa, s, phase, w, turned)).collect();
    let mut rest = &mut out[..];
    let mut parts = Vec::new();
    for task in walk.tasks() {
        let (part, after) = rest.split_at_mut(task.span(walk.to).len());
        parts.push((task, part));
        rest = after;
    }
    let done = parts
        .into_par_iter()
        .map(|(task, out)| {
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch { source: buffer, base, to, .. } = scratch;
                let window = window(walk, &task, source, buffer, 0);
                for (phase, weights) in walk.phases.iter().zip(&weights) {
                    pixels(walk, phase, &task, &window.rows, base, to);
                    one_phase(isa, walk, phase, weights, window.values, base, to, out);
                }
            });
            finish(task.span(walk.to).start, out)
        })
        .collect();
    (out, done)
}

/// All tiles of a phase in a task.
#[allow(clippy::too_many_arguments)]
fn one_phase(
    isa: &Isa,
    walk: &Walk,
    phase: &Phase,
    weights: &[f32],
    source: &[f32],
    base: &[u32],
    to: &[u32],
    out: &mut [f32],
) {
    let (taps, run) = runs(walk, phase);
    let (Some(most_base), Some(most_to), Some(most_tap)) = (base.iter().max(), to.iter().max(), taps.iter().max())
    else {
        return;
    };
    // The bounds of every pointer below.
    assert!(*most_base as usize + *most_tap as usize + run <= source.len(), "windows lie in the source");
    assert!(*most_to as usize + walk.to.c <= out.len() && base.len() == to.len(), "pixels lie in the destination");
    let mut at = 0;
    for (first, registers, cols) in blocks(isa, walk.to.c) {
        let length = taps.len() * run * registers * isa.lanes;
        let block = &weights[at..at + length];
        at += length;
        for from in (0..base.len()).step_by(isa.pixels) {
            let rows = (base.len() - from).min(isa.pixels);
            // A tile is always full: what is missing repeats the last pixel.
            let (mut few_base, mut few_to) = ([base[base.len() - 1]; 16], [0; 16]);
            let (tile_base, tile_to) = if rows == isa.pixels {
                (&base[from..], &to[from..])
            } else {
                few_base[..rows].copy_from_slice(&base[from..]);
                few_to[..rows].copy_from_slice(&to[from..]);
                (&few_base[..], &few_to[..])
            };
            let tile = Tile {
                x: source.as_ptr(),
                base: tile_base.as_ptr(),
                taps: taps.as_ptr(),
                n_taps: taps.len(),
                run,
                w: block.as_ptr(),
                out: out[first..].as_mut_ptr(),
                to: tile_to.as_ptr(),
                rows,
                cols,
            };
            // SAFETY: the assertions above bound windows and pixels (`first + cols` is at most the channels), `block` has the length
            // that the tile reads, and an instruction set in the table is one of this processor.
            unsafe { (isa.tile[registers - 1])(&tile) };
        }
    }
}

/// y = conv(x, w). `finish` gets each finished part of y with its offset, in whole pixels, while it is in the cache; what it returns
/// comes back in the order of the parts, which depends on the shape alone.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn forward_then<T: Send>(
    isa: &Isa,
    s: &Shape,
    x: &[f32],
    w: &[f32],
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    s.check();
    let [of_x, of_w, _] = s.lengths();
    assert_eq!((x.len(), w.len()), (of_x, of_w), "{s:?}");
    walk(isa, s, &Walk::forward(s), w, x, false, finish)
}

/// y = conv(x, w).
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn forward(isa: &Isa, s: &Shape, x: &[f32], w: &[f32]) -> Vec<f32> {
    forward_then(isa, s, x, w, |_, _| ()).0
}

/// dx from dy.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn backward_data(isa: &Isa, s: &Shape, w: &[f32], dy: &[f32]) -> Vec<f32> {
    s.check();
    let [_, of_w, of_y] = s.lengths();
    assert_eq!((w.len(), dy.len()), (of_w, of_y), "{s:?}");
    walk(isa, s, &Walk::backward(s), w, dy, true, |_, _| ()).0
}

/// dw from x and dy, in the weight's own layout.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn backward_weight(isa: &Isa, s: &Shape, x: &[f32], dy: &[f32]) -> Vec<f32> {
    s.check();
    let [of_x, _, of_y] = s.lengths();
    assert_eq!((x.len(), dy.len()), (of_x, of_y), "{s:?}");
    let walk = Walk::forward(s);
    let (taps, run) = runs(&walk, &walk.phases[0]);
    // Block by block of channels, each `[taps, run, NV · LANES]`, so that a tile never ends in the middle of a register.
    let length = taps.len() * run * s.c_out.next_multiple_of(isa.lanes);
    let sum = if length < SHARED_VALUES {
        by_parts(isa, &walk, &taps, run, length, x, dy)
    } else {
        by_blocks(isa, &walk, &taps, run, length, x, dy)
    };
    unpacked(isa, s, &sum)
}

/// Every thread sums some pixels into a gradient of its own, then all are added: for small weights.
fn by_parts(isa: &Isa, walk: &Walk, taps: &[u32], run: usize, length: usize, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let tasks = walk.tasks();
    let partial: Vec<Vec<f32>> = tasks
        .par_chunks(tasks.len().div_ceil(PARTS).max(1))
        .map(|tasks| {
            let mut dw = vec![0.0f32; length];
            SCRATCH.with_borrow_mut(|scratch| {
                for task in tasks {
                    let pixels = Pixels::new(isa, walk, task, run, x, dy, scratch);
                    for (block, dw) in blocks(isa, walk.to.c).zip(dw.chunks_mut(taps.len() * run * 2 * isa.lanes)) {
                        for (tap, dw) in taps.iter().zip(dw.chunks_exact_mut(run * block.1 * isa.lanes)) {
                            pixels.add(isa, *tap, run, block, dw);
                        }
                    }
                }
            });
            dw
        })
        .collect();
    let mut sum = vec![0.0f32; length];
    for part in partial {
        for (s, p) in sum.iter_mut().zip(part) {
            *s += p;
        }
    }
    sum
}

/// Every thread sums all pixels into some of the weights, group after group of images: for weights that are large beside the maps, where
/// sums of their own would cost more than they save.
fn by_blocks(isa: &Isa, walk: &Walk, taps: &[u32], run: usize, length: usize, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let mut dw = vec![0.0f32; length];
    let image = (walk.from.h + walk.margin[0][0] + walk.margin[0][1]) * walk.width() * walk.from.c;
    let together = (GROUP_VALUES / image.max(1)).clamp(1, walk.n.max(1));
    let mut scratch = Scratch::default();
    for first in (0..walk.n).step_by(together) {
        let task = Task { images: first..(first + together).min(walk.n), rows: 0..walk.to.h };
        let pixels = Pixels::new(isa, walk, &task, run, x, dy, &mut scratch);
        let blocks: Vec<_> = blocks(isa, walk.to.c).collect();
        dw.par_chunks_mut(taps.len() * run * 2 * isa.lanes).zip(blocks).for_each(|(dw, block)| {
            let by_tap = dw.par_chunks_exact_mut(run * block.1 * isa.lanes).zip(taps);
            by_tap.for_each(|(dw, tap)| pixels.add(isa, *tap, run, block, dw));
        });
    }
    dw
}

/// Blocks of `[k, k, c_in, NV · LANES]` → `[c_out, c_in, k, k]`.
fn unpacked(isa: &Isa, s: &Shape, packed: &[f32]) -> Vec<f32> {
    let kk = s.kernel * s.kernel;
    let mut dw = vec![0.0f32; s.c_out * s.c_in * kk];
    let (chunk, wide) = (kk * s.c_in, 2 * isa.lanes);
    let blocks: Vec<_> = blocks(isa, s.c_out).collect();
    let tasks = dw.par_chunks_mut(chunk * wide).zip(packed.par_chunks(chunk * wide)).zip(blocks);
    tasks.for_each(|((dw, packed), (_, registers, _))| {
        let cols = registers * isa.lanes;
        // A few input channels at a time stay in the first-level cache while all output channels take from them.
        for few in (0..s.c_in).step_by(16) {
            for (o, dw) in dw.chunks_exact_mut(chunk).enumerate() {
                for c in few..(few + 16).min(s.c_in) {
                    for (t, v) in dw[c * kk..(c + 1) * kk].iter_mut().enumerate() {
                        *v = packed[(t * s.c_in + c) * cols + o];
                    }
                }
            }
        }
    });
    dw
}

/// What a weight gradient sums over: some pixels of the output, their windows and their gradients.
struct Pixels<'a> {
    source: &'a [f32],
    base: &'a [u32],
    dy: &'a [f32],
    step: usize,
    /// Pixels whose values stay in the first-level cache while many rows of the weights use them.
    block: usize,
}

impl<'a> Pixels<'a> {
    fn new(
        isa: &Isa,
        walk: &Walk,
        task: &Task,
        run: usize,
        x: &'a [f32],
        dy: &'a [f32],
        scratch: &'a mut Scratch,
    ) -> Pixels<'a> {
        let Scratch { source: buffer, base, to, slopes } = scratch;
        // The last tile of a run reads rows that are not there.
        let slack = run.next_multiple_of(isa.rows) - run;
        let window = window(walk, task, x, buffer, slack);
        pixels(walk, &walk.phases[0], task, &window.rows, base, to);
        let (c, step) = (walk.to.c, walk.to.c.next_multiple_of(isa.lanes));
        let mut dy = &dy[task.span(walk.to)];
        if step != c {
            slopes.resize(base.len() * step, 0.0);
            for (to, from) in slopes.chunks_exact_mut(step).zip(dy.chunks_exact(c)) {
                to[..c].copy_from_slice(from);
                to[c..].fill(0.0);
            }
            dy = &slopes[..base.len() * step];
        }
        let block = (BLOCK_VALUES / (walk.source_step * walk.from.c + c)).max(64);
        Pixels { source: window.values, base, dy, step, block }
    }

    /// dw += Σ x · dy for one tap and one block of channels: first channel, registers, channels. `dw`: `[run, registers · LANES]`.
    fn add(&self, isa: &Isa, tap: u32, run: usize, (first, registers, _): (usize, usize, usize), dw: &mut [f32]) {
        let Some(most) = self.base.iter().max() else { return };
        let cols = registers * isa.lanes;
        // The bounds of every pointer below. A tile reads whole rows of its own, past the end of the last run.
        let end = *most as usize + tap as usize + run.next_multiple_of(isa.rows);
        assert!(end <= self.source.len(), "windows lie in the source");
        assert!(self.dy.len() == self.base.len() * self.step && first + cols <= self.step, "dy has its shape");
        assert!(dw.len() == run * cols, "dw has its shape");
        for from in (0..self.base.len()).step_by(self.block) {
            let n = (self.base.len() - from).min(self.block);
            for row in (0..run).step_by(isa.rows) {
                let tile = WeightTile {
                    x: self.source[tap as usize + row..].as_ptr(),
                    base: self.base[from..].as_ptr(),
                    dy: self.dy[from * self.step + first..].as_ptr(),
                    dy_step: self.step,
                    n,
                    dw: dw[row * cols..].as_mut_ptr(),
                    dw_step: cols,
                    rows: (run - row).min(isa.rows),
                };
                // SAFETY: the assertions above bound windows and gradients; an instruction set in the table is one of this processor.
                unsafe { (isa.weight_tile[registers - 1])(&tile) };
            }
        }
    }
}

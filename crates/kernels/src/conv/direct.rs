//! Any convolution, without laying out windows: a tile reads them where they are.
//!
//! The forward pass and the gradient by the input are the same walk ([`Walk`]): every pixel of a destination sums taps of a source. For
//! the input's gradient the source is dy and the taps are turned round; with a stride its pixels fall into phases of stride × stride,
//! each with taps of its own. A thread copies the part of the source that its pixels read, with a margin of zeros, so that no tap asks
//! whether it lies in the image; without a margin it reads the source itself.
//!
//! Threads share out tasks: some images, or some rows of one. A task is fixed by the shape, so the order of sums is too.

use std::{
    cell::RefCell,
    mem::{MaybeUninit, take},
    ops::Range,
};

use rayon::prelude::*;

use super::{
    Input, Map, Shape,
    tiles::{Offsets, Pixels, Slopes, blocks, pack},
};
use crate::{
    factor::Factor,
    isa::Isa,
    memory::{unwritten, written, written_slice},
};

/// Source values of a task: 256 KiB, a part of a core's second-level cache.
const TASK_VALUES: usize = 1 << 16;

/// Destination pixels that a task has at least, so that its last tile counts for little.
const TASK_PIXELS: usize = 256;

/// Tasks that a batch of small maps is cut into, at least.
const TASKS: usize = 8;

/// A multiple of every instruction set's pixels a tile.
const TILES: usize = 12;

/// Pixels of a task of the weight gradient: a panel of their gradients is half a first-level cache.
const SUM_PIXELS: usize = 256;

/// Pixels that are laid out at a time: as many as a first-level cache has places for, however far apart they lie.
const FEW: usize = 8;

/// Panels that a thread takes at once.
const SOME_PANELS: usize = 16;

/// Parts that sum small weight gradients of their own: enough for many threads.
const PARTS: usize = 32;

/// Values of a weight gradient from which on threads share one.
const SHARED_VALUES: usize = 1 << 16;

/// Values of the panels of a group of tasks that are summed into shared weights at a time: a part of the last-level cache.
const GROUP_VALUES: usize = 1 << 20;

/// A tap in one direction: its offset in the source, and the kernel's index.
type Tap = (isize, usize);

/// Destination pixels `first + step · (j, i)` that read source pixels `source_step · (j, i) + taps`.
#[derive(Debug)]
struct Phase {
    first: [usize; 2],
    rows: Vec<Tap>,
    cols: Vec<Tap>,
}

impl Phase {
    /// Its taps as places in a kernel of this side.
    fn places(&self, kernel: usize) -> Vec<usize> {
        self.rows.iter().flat_map(|(_, ky)| self.cols.iter().map(move |(_, kx)| ky * kernel + kx)).collect()
    }
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
        if image <= TASK_VALUES || pixels < TASK_PIXELS || self.to.h <= self.step {
            // Small maps go together, up to enough pixels for whole tiles, while some tasks are left to share out.
            let (fits, enough) = (TASK_VALUES / image, TASK_PIXELS / pixels.max(1));
            let few = self.n.div_ceil(TASKS).next_multiple_of(if pixels == 1 { TILES } else { 1 });
            let together = fits.min(enough + 1).max(enough).min(few).max(1);
            let images = (0..self.n).step_by(together);
            return images.map(|i| Task { images: i..(i + together).min(self.n), rows: 0..self.to.h }).collect();
        }
        let a_row = self.width() * self.from.c * self.source_step;
        self.bands((TASK_VALUES / a_row).max(TASK_PIXELS.div_ceil(self.to.w * self.step)).max(1))
    }

    /// Tasks of about so many pixels.
    fn tasks_of(&self, pixels: usize) -> Vec<Task> {
        let image = (self.to.h * self.to.w).max(1);
        if image > pixels {
            return self.bands((pixels / (self.to.w * self.step)).max(1));
        }
        let together = pixels / image;
        (0..self.n)
            .step_by(together)
            .map(|i| Task { images: i..(i + together).min(self.n), rows: 0..self.to.h })
            .collect()
    }

    /// Rows of one image; a multiple of the step, so that every task sees the same phases.
    fn bands(&self, steps: usize) -> Vec<Task> {
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
    /// Values before they are rounded.
    line: Vec<f32>,
    /// Panels before they are.
    panels: Vec<f32>,
    base: Vec<u32>,
    to: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The part of a source that a task reads.
struct Window<'a, F> {
    values: &'a [F],
    /// Rows of each image in it, and the first of them counted from the margin on.
    rows: Range<usize>,
}

/// Copies what `task` reads into `buffer`, with its margin. Without margin, a pending norm and rounding nothing is copied.
fn window<'a, F: Factor>(
    isa: &Isa,
    walk: &Walk,
    task: &Task,
    source: Input<'a>,
    buffer: &'a mut Vec<f32>,
    unrounded: &mut Vec<f32>,
) -> Window<'a, F> {
    let (rows, map) = (walk.source_rows(task), walk.from);
    let image = map.len();
    if let (false, None, Some(values)) = (walk.has_margin(), source.pending, F::borrow(source.values)) {
        let whole = 0..map.h;
        return Window { values: &values[task.images.start * image..task.images.end * image], rows: whole };
    }
    let line = walk.width() * map.c;
    let length = task.images.len() * rows.len() * line;
    let buffer = room::<F>(buffer, length);
    let [left, right] = walk.margin[1].map(|m| m * map.c);
    let lines = task.images.clone().flat_map(|i| rows.clone().map(move |y| (i, y)));
    for ((i, y), to) in lines.zip(buffer.chunks_exact_mut(line)) {
        match y.checked_sub(walk.margin[0][0]).filter(|y| *y < map.h) {
            Some(y) => {
                F::zero(&mut to[..left]);
                F::zero(&mut to[line - right..]);
                source.factors(isa, i * image + y * map.w * map.c, &mut to[left..line - right], unrounded);
            }
            None => F::zero(to),
        }
    }
    Window { values: buffer, rows }
}

/// The first `n` factors of a buffer that grows as it must.
fn room<F: Factor>(buffer: &mut Vec<f32>, n: usize) -> &mut [F] {
    let least = F::room_for(n);
    if buffer.len() < least {
        buffer.resize(least, 0.0);
    }
    &mut F::room(buffer)[..n]
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

/// Walks over the destination, task by task; `finish` gets each finished part with its offset while it is in the cache. Pixels that
/// nothing reaches are 0.
fn walk<F: Factor, T: Send>(
    isa: &Isa,
    s: &Shape,
    walk: &Walk,
    w: &[f32],
    source: Input,
    turned: bool,
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    let mut out = unwritten(walk.n * walk.to.len());
    let of_phase = |phase: &Phase| -> Vec<F> {
        let places = phase.places(s.kernel);
        F::weights(isa, places.len() * walk.from.c, pack(isa, s, &places, w, turned))
    };
    let weights: Vec<Vec<F>> = walk.phases.iter().map(of_phase).collect();
    let reaches_all = walk.phases.len() == walk.step * walk.step;
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
            if !reaches_all {
                out.fill(MaybeUninit::new(0.0));
            }
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch { source: buffer, line, base, to, .. } = scratch;
                let window = window::<F>(isa, walk, &task, source, buffer, line);
                for (phase, weights) in walk.phases.iter().zip(&weights) {
                    pixels(walk, phase, &task, &window.rows, base, to);
                    let (taps, run) = runs(walk, phase);
                    let blocks = weights.chunks(taps.len() * run * 2 * isa.lanes);
                    let (base, taps) = (Offsets::from(&base[..]), Offsets::from(&taps[..]));
                    let read = Pixels { source: window.values, base, taps, run, far: true };
                    read.multiply(isa, walk.to.c, blocks, Offsets::from(&to[..]), out);
                }
            });
            // SAFETY: the phases' pixels are all of the task's, or the rest was filled with 0.
            finish(task.span(walk.to).start, unsafe { written_slice(out) })
        })
        .collect();
    // SAFETY: the tasks' parts are all of it.
    (unsafe { written(out) }, done)
}

/// See [`super::forward_then`].
pub(super) fn forward<F: Factor, T: Send>(
    isa: &Isa,
    s: &Shape,
    w: &[f32],
    x: Input,
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    walk::<F, T>(isa, s, &Walk::forward(s), w, x, false, finish)
}

/// See [`super::backward_data`].
pub(super) fn backward_data<F: Factor, T: Send>(
    isa: &Isa,
    s: &Shape,
    w: &[f32],
    dy: &[f32],
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    walk::<F, T>(isa, s, &Walk::backward(s), w, dy.into(), true, finish)
}

/// The gradient by the weights, block by block of channels, each `[taps, c_in, NV · LANES]`: a matrix product over pixels. Both factors are
/// laid out in panels, as wide as a tile, so that all a tile reads lies together.
pub(super) fn backward_weight<F: Factor>(isa: &Isa, s: &Shape, x: Input, dy: &[f32]) -> Vec<f32> {
    let walk = Walk::forward(s);
    let sum = Sum::new(isa, &walk);
    let tasks = walk.tasks_of(SUM_PIXELS);
    let length = sum.taps.len() * sum.run * s.c_out.next_multiple_of(isa.lanes);
    if length < SHARED_VALUES {
        sum.by_parts::<F>(length, &tasks, x, dy)
    } else {
        sum.by_blocks::<F>(length, &tasks, x, dy)
    }
}

/// A gradient by the weights.
struct Sum<'a> {
    isa: &'a Isa,
    walk: &'a Walk,
    /// Where each run of taps begins, and its length.
    taps: Vec<u32>,
    run: usize,
    /// Panels of a run.
    panels: usize,
}

/// Some pixels' panels: of what they read, `[taps, panels, groups, rows, DEPTH]`, and of their gradients, block by block
/// `[groups, NV · LANES, DEPTH]`; a group is `DEPTH` pixels.
#[derive(Clone, Copy)]
struct Panels<'a, F> {
    groups: usize,
    source: &'a [F],
    dy: &'a [F],
}

impl<'a> Sum<'a> {
    fn new(isa: &'a Isa, walk: &'a Walk) -> Self {
        let (taps, run) = runs(walk, &walk.phases[0]);
        Sum { isa, walk, taps, run, panels: run.div_ceil(isa.rows) }
    }

    /// Values of the panels of one pixel: of what it reads, and of its gradient.
    fn pixel(&self) -> [usize; 2] {
        [self.taps.len() * self.panels * self.isa.rows, self.walk.to.c.next_multiple_of(self.isa.lanes)]
    }

    fn n(&self, task: &Task) -> usize {
        task.images.len() * task.rows.len() * self.walk.to.w
    }

    /// Values of f32 that hold the panels of any of these tasks.
    fn most<F: Factor>(&self, tasks: &[Task]) -> usize {
        let pixels = tasks.iter().map(|task| self.n(task)).max().unwrap_or(0);
        F::room_for(pixels.next_multiple_of(F::DEPTH) * self.pixel().iter().sum::<usize>())
    }

    /// Lays out the panels of a task in `to`, which has room for them.
    fn lay<'b, F: Factor>(&self, task: &Task, x: Input, dy: &[f32], to: &'b mut [f32]) -> Panels<'b, F> {
        let (n, [of_x, of_dy]) = (self.n(task), self.pixel());
        let groups = n.div_ceil(F::DEPTH);
        if F::DEPTH == 1 {
            self.lay_values(task, x, dy, to);
        } else {
            let mut values = SCRATCH.with_borrow_mut(|scratch| take(&mut scratch.panels));
            let unrounded = room::<f32>(&mut values, n * (of_x + of_dy));
            self.lay_values(task, x, dy, unrounded);
            let (source, gradients) = unrounded.split_at(n * of_x);
            let (to_source, to_gradients) = F::room(to).split_at_mut(groups * F::DEPTH * of_x);
            let panels = source.chunks_exact(n * self.isa.rows);
            for (from, to) in panels.zip(to_source.chunks_exact_mut(groups * F::DEPTH * self.isa.rows)) {
                F::interleave(self.isa, from, self.isa.rows, to);
            }
            for (first, registers, _) in blocks(self.isa, self.walk.to.c) {
                let wide = registers * self.isa.lanes;
                let to = &mut to_gradients[groups * F::DEPTH * first..][..groups * F::DEPTH * wide];
                F::interleave(self.isa, &gradients[n * first..][..n * wide], wide, to);
            }
            SCRATCH.with_borrow_mut(|scratch| scratch.panels = values);
        }
        let (source, dy) = F::room(to)[..groups * F::DEPTH * (of_x + of_dy)].split_at(groups * F::DEPTH * of_x);
        Panels { groups, source, dy }
    }

    /// The same with a pixel a group.
    fn lay_values(&self, task: &Task, x: Input, dy: &[f32], to: &mut [f32]) {
        let (isa, n) = (self.isa, self.n(task));
        let (source, gradients) = to[..n * self.pixel().iter().sum::<usize>()].split_at_mut(n * self.pixel()[0]);
        SCRATCH.with_borrow_mut(|Scratch { source: buffer, line, base, to, .. }| {
            let window = window::<f32>(isa, self.walk, task, x, buffer, line);
            pixels(self.walk, &self.walk.phases[0], task, &window.rows, base, to);
            for (tap, of_tap) in self.taps.iter().zip(source.chunks_exact_mut(n * self.panels * isa.rows)) {
                for (i, few) in base.chunks(FEW).enumerate() {
                    let at = FEW * i * isa.rows..(FEW * i + few.len()) * isa.rows;
                    for (panel, to) in of_tap.chunks_exact_mut(n * isa.rows).enumerate() {
                        let (from, to) = (*tap as usize + panel * isa.rows, &mut to[at.clone()]);
                        let real = isa.rows.min(self.run - panel * isa.rows);
                        if real == isa.rows {
                            // SAFETY: the processor has this instruction set, or it would not be in the table.
                            unsafe { (isa.lay)(window.values, few, from, to) };
                        } else {
                            let values = few.iter().map(|base| &window.values[*base as usize + from..]);
                            lay_padded(values, real, isa.rows, to);
                        }
                    }
                }
            }
        });
        let (c, dy) = (self.walk.to.c, &dy[task.span(self.walk.to)]);
        let blocks: Vec<_> = blocks(isa, c).collect();
        for (i, dy) in dy.chunks(FEW * c).enumerate() {
            for &(first, registers, cols) in &blocks {
                let (wide, few) = (registers * isa.lanes, dy.len() / c);
                let to = &mut gradients[n * first + FEW * i * wide..][..few * wide];
                if cols == wide {
                    // SAFETY: the processor has this instruction set, or it would not be in the table.
                    unsafe { (isa.lay_lines[registers - 1])(dy, c, first, to) };
                } else {
                    lay_padded(dy.chunks_exact(c).map(|dy| &dy[first..]), cols, wide, to);
                }
            }
        }
    }

    /// dw += for one block of channels, one tap, and the panels from `first` on that `dw` is of.
    fn add<F: Factor>(
        &self,
        all: Panels<F>,
        tap: usize,
        first: usize,
        (channel, registers, _): (usize, usize, usize),
        dw: &mut [f32],
    ) {
        let (isa, n) = (self.isa, all.groups);
        let [source_step, step] = [isa.rows, registers * isa.lanes].map(|values| values * F::DEPTH);
        let dy = &all.dy[n * channel * F::DEPTH..][..n * step];
        let source = &all.source[(tap * self.panels + first) * n * source_step..];
        for (source, dw) in source.chunks_exact(n * source_step).zip(dw.chunks_mut(isa.rows * registers * isa.lanes)) {
            Slopes { source, source_step, dy, step, n }.add(isa, registers, dw);
        }
    }

    /// Every thread sums some pixels into a gradient of its own, then all are added: for small weights.
    fn by_parts<F: Factor>(&self, length: usize, tasks: &[Task], x: Input, dy: &[f32]) -> Vec<f32> {
        let isa = self.isa;
        let most = self.most::<F>(tasks);
        let partial: Vec<Vec<f32>> = tasks
            .par_chunks(tasks.len().div_ceil(PARTS).max(1))
            .map(|tasks| {
                let (mut dw, mut room) = (vec![0.0f32; length], vec![0.0f32; most]);
                for task in tasks {
                    let panels = self.lay::<F>(task, x, dy, &mut room);
                    let of_blocks = dw.chunks_mut(self.taps.len() * self.run * 2 * isa.lanes);
                    for (block, dw) in blocks(isa, self.walk.to.c).zip(of_blocks) {
                        for (tap, dw) in dw.chunks_exact_mut(self.run * block.1 * isa.lanes).enumerate() {
                            self.add(panels, tap, 0, block, dw);
                        }
                    }
                }
                dw
            })
            .collect();
        let mut sum = vec![0.0f32; length];
        for part in partial {
            sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
        }
        sum
    }

    /// Every thread sums all pixels into some of the weights, group after group of tasks: for weights that are large beside the maps,
    /// where sums of their own would cost more than they save.
    fn by_blocks<F: Factor>(&self, length: usize, tasks: &[Task], x: Input, dy: &[f32]) -> Vec<f32> {
        let isa = self.isa;
        let mut dw = vec![0.0f32; length];
        let most = self.most::<F>(tasks);
        let together = (GROUP_VALUES / most.max(1)).clamp(1, tasks.len().max(1));
        let mut room = vec![0.0f32; together * most];
        for tasks in tasks.chunks(together) {
            let panels: Vec<Panels<F>> =
                room.par_chunks_mut(most).zip(tasks).map(|(room, task)| self.lay(task, x, dy, room)).collect();
            let of_blocks = dw.par_chunks_mut(self.taps.len() * self.run * 2 * isa.lanes);
            of_blocks.zip(blocks(isa, self.walk.to.c).collect::<Vec<_>>()).for_each(|(dw, block)| {
                let cols = block.1 * isa.lanes;
                dw.par_chunks_exact_mut(self.run * cols).enumerate().for_each(|(tap, dw)| {
                    let some = dw.par_chunks_mut(SOME_PANELS * isa.rows * cols).enumerate();
                    some.for_each(|(i, dw)| {
                        for panels in &panels {
                            self.add(*panels, tap, i * SOME_PANELS, block, dw);
                        }
                    });
                });
            });
        }
        dw
    }
}

/// The first `n` values of each of these side by side, each with zeros behind up to `step`.
fn lay_padded<'a>(from: impl Iterator<Item = &'a [f32]>, n: usize, step: usize, to: &mut [f32]) {
    for (from, to) in from.zip(to.chunks_exact_mut(step)) {
        to[..n].copy_from_slice(&from[..n]);
        to[n..].fill(0.0);
    }
}

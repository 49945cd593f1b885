//! Direct convolution of any shape, without im2col: tiles read windows where they are.
//!
//! The forward pass and the gradient of the input are the same operation, a [`Gather`]: every pixel
//! of a destination sums taps of a source. For the gradient of the input, the source is dy and the
//! taps are reversed; with a stride, its pixels fall into stride × stride phases, each with taps of
//! its own. A thread copies the part of the source that its pixels read, with a margin of zeros, so
//! that no tap has to check whether it lies in the image. Without a margin it reads the source
//! itself.
//!
//! The gradient of the weights is a matrix product over pixels. Both operands are first packed into
//! panels as wide as a tile, so that everything a tile reads is adjacent.
//!
//! Threads share tasks: some images, or some rows of one. Tasks depend on the shape alone, and so
//! does the order of sums.

use std::{
    cell::RefCell,
    mem::{MaybeUninit, take},
    ops::Range,
};

use rayon::prelude::*;

use super::{
    input::Input,
    operand::{Operand, grow},
    shape::{FeatureMap, Shape},
    tiles::{ChannelBlock, Offsets, PanelPair, Windows, blocks, pack_weights},
};
use crate::{
    isa::Isa,
    memory::{assume_init_vec, uninit_vec},
};

/// Number of source values in a task: 256 KiB, a part of a core's second-level cache.
const TASK_VALUES: usize = 1 << 16;

/// Least number of destination pixels in a task, so that its incomplete last tile matters little.
const TASK_PIXELS: usize = 256;

/// Least number of tasks that a batch of small maps is split into.
const MIN_TASKS: usize = 8;

/// Number of maps of one pixel that a task has a multiple of, so that its tiles are full: the tile
/// heights 4 and 6 divide it.
const TILE_MULTIPLE: usize = 12;

/// Number of pixels in a task of the weight gradient: a panel of their gradients takes half a
/// first-level cache.
const SUM_PIXELS: usize = 256;

/// Number of pixels that are packed at a time. Their rows may lie at multiples of 4 KiB, where they
/// compete for the same set of a first-level cache: 8 is its associativity.
const PACK_PIXELS: usize = 8;

/// Number of panels that a thread takes at once.
const TASK_PANELS: usize = 16;

/// Number of private weight gradients that parts of the batch are summed into, if they are small:
/// enough for many threads.
const PARTS: usize = 32;

/// Number of values from which on all threads sum into one shared weight gradient.
const SHARED_VALUES: usize = 1 << 16;

/// Number of values in the panels of a group of tasks that are summed into shared weights at a
/// time: a part of the last-level cache.
const GROUP_VALUES: usize = 1 << 20;

/// A tap in one direction.
#[derive(Debug, Clone, Copy)]
struct Tap {
    /// Offset in the source, in pixels.
    offset: isize,
    /// Index in the kernel.
    index: usize,
}

/// Destination pixels `first + dest_step · (j, i)`, which read the source pixels
/// `source_step · (j, i) + taps`.
#[derive(Debug)]
struct OutputPhase {
    first: [usize; 2],
    rows: Vec<Tap>,
    cols: Vec<Tap>,
}

impl OutputPhase {
    /// Places of the taps in a kernel of side `kernel`.
    fn places(&self, kernel: usize) -> Vec<usize> {
        self.rows.iter().flat_map(|row| self.cols.iter().map(move |col| row.index * kernel + col.index)).collect()
    }
}

/// Source pixels that each destination pixel reads.
#[derive(Debug)]
struct Gather {
    n: usize,
    source: FeatureMap,
    dest: FeatureMap,
    /// Distance between destination pixels of a phase.
    dest_step: usize,
    /// Distance between their windows.
    source_step: usize,
    phases: Vec<OutputPhase>,
    /// Zeros before and after the source, in rows and in columns.
    margin: [[usize; 2]; 2],
}

impl Gather {
    fn new(
        n: usize,
        source: FeatureMap,
        dest: FeatureMap,
        dest_step: usize,
        source_step: usize,
        phases: Vec<OutputPhase>,
    ) -> Gather {
        let margin = |source_size: usize, taps: fn(&OutputPhase) -> &Vec<Tap>, axis: usize, dest_size: usize| {
            let mut margin = [0usize; 2];
            for phase in &phases {
                let steps = dest_size.saturating_sub(phase.first[axis]).div_ceil(dest_step);
                for Tap { offset, .. } in taps(phase).iter().filter(|_| steps > 0) {
                    let last = (source_step * (steps - 1)) as isize + offset;
                    margin[0] = margin[0].max((-offset).max(0) as usize);
                    margin[1] = margin[1].max((last + 1 - source_size as isize).max(0) as usize);
                }
            }
            margin
        };
        let margin = [margin(source.h, |p| &p.rows, 0, dest.h), margin(source.w, |p| &p.cols, 1, dest.w)];
        Gather { n, source, dest, dest_step, source_step, phases, margin }
    }

    /// The forward pass, from x to y.
    fn forward(s: &Shape) -> Gather {
        let tap = |k: usize| Tap { offset: (k * s.dilation) as isize - s.padding as isize, index: k };
        let taps = || (0..s.kernel).map(tap).collect();
        let phase = OutputPhase { first: [0, 0], rows: taps(), cols: taps() };
        Gather::new(s.n, s.input_map(), s.output_map(), 1, s.stride, vec![phase])
    }

    /// The gradient of the input, from dy to dx: input row r + stride · j meets output row
    /// j + (r + padding − k · dilation) / stride where that is an integer.
    fn backward_data(s: &Shape) -> Gather {
        let taps = |r: usize| -> Vec<Tap> {
            let tap = |k: usize| {
                let offset = (r + s.padding) as isize - (k * s.dilation) as isize;
                let stride = s.stride as isize;
                (offset.rem_euclid(stride) == 0).then(|| Tap { offset: offset.div_euclid(stride), index: k })
            };
            // Reversed, so that offsets ascend.
            (0..s.kernel).rev().filter_map(tap).collect()
        };
        let phase = |i: usize| {
            let first = [i / s.stride, i % s.stride];
            OutputPhase { first, rows: taps(first[0]), cols: taps(first[1]) }
        };
        let phases = (0..s.stride * s.stride).map(phase).filter(|p| !p.rows.is_empty() && !p.cols.is_empty());
        Gather::new(s.n, s.output_map(), s.input_map(), s.stride, 1, phases.collect())
    }

    fn has_margin(&self) -> bool {
        self.margin != [[0; 2]; 2]
    }

    /// Columns of a source row with its margin.
    fn padded_width(&self) -> usize {
        self.source.w + self.margin[1][0] + self.margin[1][1]
    }

    /// Splits the destination into tasks.
    fn tasks(&self) -> Vec<Task> {
        let (rows, pixels) = (self.source.h + self.margin[0][0] + self.margin[0][1], self.dest.h * self.dest.w);
        let image = (rows * self.padded_width() * self.source.c).max(1);
        if image <= TASK_VALUES || pixels < TASK_PIXELS || self.dest.h <= self.dest_step {
            // Small maps share a task, up to enough pixels for whole tiles, as long as there remain
            // enough tasks for the threads.
            let (fits, enough) = (TASK_VALUES / image, TASK_PIXELS / pixels.max(1));
            let share = self.n.div_ceil(MIN_TASKS).next_multiple_of(if pixels == 1 { TILE_MULTIPLE } else { 1 });
            return self.image_tasks(fits.min(enough + 1).max(enough).min(share).max(1));
        }
        let row_values = self.padded_width() * self.source.c * self.source_step;
        self.band_tasks((TASK_VALUES / row_values).max(TASK_PIXELS.div_ceil(self.dest.w * self.dest_step)).max(1))
    }

    /// Splits the destination into tasks of about `pixels` pixels.
    fn tasks_of(&self, pixels: usize) -> Vec<Task> {
        let image = (self.dest.h * self.dest.w).max(1);
        if image > pixels {
            return self.band_tasks((pixels / (self.dest.w * self.dest_step)).max(1));
        }
        self.image_tasks(pixels / image)
    }

    /// Tasks of `images` whole images.
    fn image_tasks(&self, images: usize) -> Vec<Task> {
        let task = |i: usize| Task { images: i..(i + images).min(self.n), rows: 0..self.dest.h };
        (0..self.n).step_by(images).map(task).collect()
    }

    /// Tasks of `steps · dest_step` rows of one image: with a multiple of the step, all tasks see
    /// the same phases.
    fn band_tasks(&self, steps: usize) -> Vec<Task> {
        let height = steps * self.dest_step;
        let band = |i: usize, y: usize| Task { images: i..i + 1, rows: y..(y + height).min(self.dest.h) };
        (0..self.n).flat_map(|i| (0..self.dest.h).step_by(height).map(move |y| band(i, y))).collect()
    }

    /// Rows of the source, counted from its margin on, that a task reads.
    fn source_rows(&self, task: &Task) -> Range<usize> {
        let (mut first, mut end) = (usize::MAX, 0);
        for phase in &self.phases {
            let steps = self.steps(phase, task);
            for tap in phase.rows.iter().filter(|_| !steps.is_empty()) {
                let row =
                    |j: usize| ((j * self.source_step) as isize + tap.offset + self.margin[0][0] as isize) as usize;
                first = first.min(row(steps.start));
                end = end.max(row(steps.end - 1) + 1);
            }
        }
        first.min(end)..end
    }

    /// Rows of a phase in a task, in steps.
    fn steps(&self, phase: &OutputPhase, task: &Task) -> Range<usize> {
        let step = |row: usize| row.saturating_sub(phase.first[0]).div_ceil(self.dest_step);
        step(task.rows.start)..step(task.rows.end)
    }
}

/// Some images, or some rows of one, of the destination.
#[derive(Debug, Clone)]
struct Task {
    images: Range<usize>,
    rows: Range<usize>,
}

impl Task {
    /// Range of its values in the destination; they are adjacent.
    fn span(&self, dest: FeatureMap) -> Range<usize> {
        let row = |i: usize, y: usize| (i * dest.h + y) * dest.w * dest.c;
        row(self.images.start, self.rows.start)..row(self.images.end - 1, self.rows.end)
    }
}

/// Buffers that a thread keeps from task to task.
#[derive(Default)]
struct Scratch {
    source: Vec<f32>,
    /// Source values between norm and rounding.
    unrounded: Vec<f32>,
    /// Panels before rounding.
    panels: Vec<f32>,
    window_offsets: Vec<u32>,
    out_offsets: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The part of a source that a task reads.
struct SourceRegion<'a, T> {
    values: &'a [T],
    /// Rows of each image, counted from the margin on.
    rows: Range<usize>,
}

/// Copies the part of the source that `task` reads into `buffer`, with its margin. Without a
/// margin, a deferred norm and rounding, nothing is copied.
fn source_region<'a, T: Operand>(
    isa: &Isa,
    gather: &Gather,
    task: &Task,
    source: Input<'a>,
    buffer: &'a mut Vec<f32>,
    unrounded: &mut Vec<f32>,
) -> SourceRegion<'a, T> {
    let (rows, map) = (gather.source_rows(task), gather.source);
    let image = map.len();
    if let (false, None, Some(values)) = (gather.has_margin(), source.norm, T::borrow_f32(source.values)) {
        let values = &values[task.images.start * image..task.images.end * image];
        return SourceRegion { values, rows: 0..map.h };
    }
    let line = gather.padded_width() * map.c;
    let buffer = grow::<T>(buffer, task.images.len() * rows.len() * line);
    let [left, right] = gather.margin[1].map(|m| m * map.c);
    let lines = task.images.clone().flat_map(|i| rows.clone().map(move |y| (i, y)));
    for ((i, y), to) in lines.zip(buffer.chunks_exact_mut(line)) {
        match y.checked_sub(gather.margin[0][0]).filter(|y| *y < map.h) {
            Some(y) => {
                T::fill_zero(&mut to[..left]);
                T::fill_zero(&mut to[line - right..]);
                source.read_operands(isa, i * image + y * map.w * map.c, &mut to[left..line - right], unrounded);
            }
            None => T::fill_zero(to),
        }
    }
    SourceRegion { values: buffer, rows }
}

/// Computes the offsets of the pixels of a phase in a task: those of their windows in a source
/// region with these `rows`, and those of their channels in the task's destination.
fn pixel_offsets(
    gather: &Gather,
    phase: &OutputPhase,
    task: &Task,
    rows: &Range<usize>,
    window_offsets: &mut Vec<u32>,
    out_offsets: &mut Vec<u32>,
) {
    window_offsets.clear();
    out_offsets.clear();
    let (source, dest) = (gather.source, gather.dest);
    let columns = dest.w.saturating_sub(phase.first[1]).div_ceil(gather.dest_step);
    let first_tap = first_tap_offset(gather, phase);
    for image in 0..task.images.len() {
        for j in gather.steps(phase, task) {
            let row =
                (image * rows.len() + j * gather.source_step + gather.margin[0][0]) as isize - rows.start as isize;
            let window = (row * gather.padded_width() as isize + gather.margin[1][0] as isize) * source.c as isize;
            let row = phase.first[0] + j * gather.dest_step - task.rows.start;
            let out = ((image * task.rows.len() + row) * dest.w + phase.first[1]) * dest.c;
            for i in 0..columns {
                let window = window + (i * gather.source_step * source.c) as isize + first_tap;
                let out = out + i * gather.dest_step * dest.c;
                window_offsets.push(u32::try_from(window).expect("a window begins in its buffer"));
                out_offsets.push(u32::try_from(out).expect("a task has less than 2^32 values"));
            }
        }
    }
}

/// Offset of the first tap of a window from its pixel.
fn first_tap_offset(gather: &Gather, phase: &OutputPhase) -> isize {
    (phase.rows[0].offset * gather.padded_width() as isize + phase.cols[0].offset) * gather.source.c as isize
}

/// Returns the offsets of the runs of taps from the first tap on, and the length of a run. Taps of
/// neighboring columns are adjacent in memory, so a row of them is one run.
fn tap_runs(gather: &Gather, phase: &OutputPhase) -> (Vec<u32>, usize) {
    let (first_row, first_col) = (phase.rows[0].offset, phase.cols[0].offset);
    let adjacent = phase.cols.windows(2).all(|pair| pair[1].offset == pair[0].offset + 1);
    let line = |row: &Tap| (row.offset - first_row) as usize * gather.padded_width() * gather.source.c;
    if adjacent {
        (phase.rows.iter().map(|row| line(row) as u32).collect(), phase.cols.len() * gather.source.c)
    } else {
        let place = |row: &Tap, col: &Tap| (line(row) + (col.offset - first_col) as usize * gather.source.c) as u32;
        let taps = phase.rows.iter().flat_map(|row| phase.cols.iter().map(move |col| place(row, col)));
        (taps.collect(), gather.source.c)
    }
}

/// Computes the destination of a gather, task by task. Pixels that no tap reaches are 0.
fn convolve<T: Operand, R: Send>(
    isa: &Isa,
    s: &Shape,
    gather: &Gather,
    w: &[f32],
    source: Input,
    transposed: bool,
    epilogue: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> (Vec<f32>, Vec<R>) {
    let mut out = uninit_vec(gather.n * gather.dest.len());
    let phase_weights = |phase: &OutputPhase| -> Vec<T> {
        let places = phase.places(s.kernel);
        T::convert_weights(isa, places.len() * gather.source.c, pack_weights(isa, s, &places, w, transposed))
    };
    let weights: Vec<Vec<T>> = gather.phases.iter().map(phase_weights).collect();
    let reaches_all = gather.phases.len() == gather.dest_step * gather.dest_step;
    let mut rest = &mut out[..];
    let mut parts = Vec::new();
    for task in gather.tasks() {
        let (part, after) = rest.split_at_mut(task.span(gather.dest).len());
        parts.push((task, part));
        rest = after;
    }
    let results = parts
        .into_par_iter()
        .map(|(task, out)| {
            if !reaches_all {
                out.fill(MaybeUninit::new(0.0));
            }
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch { source: buffer, unrounded, window_offsets, out_offsets, .. } = scratch;
                let region = source_region::<T>(isa, gather, &task, source, buffer, unrounded);
                for (phase, weights) in gather.phases.iter().zip(&weights) {
                    pixel_offsets(gather, phase, &task, &region.rows, window_offsets, out_offsets);
                    let (taps, run) = tap_runs(gather, phase);
                    let weights = weights.chunks(taps.len() * run * 2 * isa.lanes);
                    let (windows, taps) = (Offsets::from(&window_offsets[..]), Offsets::from(&taps[..]));
                    let windows = Windows { source: region.values, windows, taps, run, prefetch: true };
                    windows.multiply(isa, gather.dest.c, weights, Offsets::from(&out_offsets[..]), out);
                }
            });
            // SAFETY: the phases cover all pixels of the task, or it has been filled with 0.
            epilogue(task.span(gather.dest).start, unsafe { out.assume_init_mut() })
        })
        .collect();
    // SAFETY: the tasks cover the destination.
    (unsafe { assume_init_vec(out) }, results)
}

/// See [`super::forward_fused`].
pub(super) fn forward<T: Operand, R: Send>(
    isa: &Isa,
    s: &Shape,
    w: &[f32],
    x: Input,
    epilogue: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> (Vec<f32>, Vec<R>) {
    convolve::<T, R>(isa, s, &Gather::forward(s), w, x, false, epilogue)
}

/// See [`super::backward_data_fused`].
pub(super) fn backward_data<T: Operand, R: Send>(
    isa: &Isa,
    s: &Shape,
    w: &[f32],
    dy: &[f32],
    epilogue: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> (Vec<f32>, Vec<R>) {
    convolve::<T, R>(isa, s, &Gather::backward_data(s), w, dy.into(), true, epilogue)
}

/// Computes the gradient of the weights, packed block by block of channels: `[taps, c_in,
/// NV · LANES]` each.
pub(super) fn backward_weight<T: Operand>(isa: &Isa, s: &Shape, x: Input, dy: &[f32]) -> Vec<f32> {
    let gather = Gather::forward(s);
    let grad = WeightGrad::new(isa, &gather);
    let tasks = gather.tasks_of(SUM_PIXELS);
    let length = grad.taps.len() * grad.run * s.c_out.next_multiple_of(isa.lanes);
    if length < SHARED_VALUES {
        grad.sum_private::<T>(length, &tasks, x, dy)
    } else {
        grad.sum_shared::<T>(length, &tasks, x, dy)
    }
}

/// A weight gradient in progress.
struct WeightGrad<'a> {
    isa: &'a Isa,
    gather: &'a Gather,
    /// Offset of each run of taps in a window.
    taps: Vec<u32>,
    /// Number of values in a run.
    run: usize,
    /// Number of panels that a run is cut into, each as high as a tile.
    panels: usize,
}

/// Packed panels of some pixels, in groups of `DEPTH` pixels.
#[derive(Clone, Copy)]
struct Panels<'a, T> {
    groups: usize,
    /// Source values, `[taps, panels, groups, rows, DEPTH]`.
    source: &'a [T],
    /// Output gradients, block by block of channels, `[groups, NV · LANES, DEPTH]` each.
    dy: &'a [T],
}

impl<'a> WeightGrad<'a> {
    fn new(isa: &'a Isa, gather: &'a Gather) -> Self {
        let (taps, run) = tap_runs(gather, &gather.phases[0]);
        WeightGrad { isa, gather, taps, run, panels: run.div_ceil(isa.tile_rows) }
    }

    /// Number of panel values per pixel: of the source, and of the output gradient.
    fn pixel_lengths(&self) -> [usize; 2] {
        let source = self.taps.len() * self.panels * self.isa.tile_rows;
        [source, self.gather.dest.c.next_multiple_of(self.isa.lanes)]
    }

    /// Number of pixels in a task.
    fn pixels(&self, task: &Task) -> usize {
        task.images.len() * task.rows.len() * self.gather.dest.w
    }

    /// Number of f32 values whose memory holds the panels of any of `tasks`.
    fn buffer_len<T: Operand>(&self, tasks: &[Task]) -> usize {
        let pixels = tasks.iter().map(|task| self.pixels(task)).max().unwrap_or(0);
        T::buffer_len(pixels.next_multiple_of(T::DEPTH) * self.pixel_lengths().iter().sum::<usize>())
    }

    /// Packs the panels of a task into `to`, of [`buffer_len`](WeightGrad::buffer_len) values.
    fn pack<'b, T: Operand>(&self, task: &Task, x: Input, dy: &[f32], to: &'b mut [f32]) -> Panels<'b, T> {
        let (n, [source_len, dy_len]) = (self.pixels(task), self.pixel_lengths());
        let (groups, rows) = (n.div_ceil(T::DEPTH), self.isa.tile_rows);
        if T::DEPTH == 1 {
            self.pack_f32(task, x, dy, to);
        } else {
            let mut values = SCRATCH.with_borrow_mut(|scratch| take(&mut scratch.panels));
            let unrounded = grow::<f32>(&mut values, n * (source_len + dy_len));
            self.pack_f32(task, x, dy, unrounded);
            let (source, gradients) = unrounded.split_at(n * source_len);
            let (to_source, to_gradients) = T::cast_buffer(to).split_at_mut(groups * T::DEPTH * source_len);
            let panels = source.chunks_exact(n * rows);
            for (from, to) in panels.zip(to_source.chunks_exact_mut(groups * T::DEPTH * rows)) {
                T::interleave(self.isa, from, rows, to);
            }
            for ChannelBlock { first, registers, .. } in blocks(self.isa, self.gather.dest.c) {
                let width = registers * self.isa.lanes;
                let to = &mut to_gradients[groups * T::DEPTH * first..][..groups * T::DEPTH * width];
                T::interleave(self.isa, &gradients[n * first..][..n * width], width, to);
            }
            SCRATCH.with_borrow_mut(|scratch| scratch.panels = values);
        }
        let all = &T::cast_buffer(to)[..groups * T::DEPTH * (source_len + dy_len)];
        let (source, dy) = all.split_at(groups * T::DEPTH * source_len);
        Panels { groups, source, dy }
    }

    /// Packs the panels of a task as f32, in groups of one pixel.
    fn pack_f32(&self, task: &Task, x: Input, dy: &[f32], to: &mut [f32]) {
        let (isa, gather, n, rows) = (self.isa, self.gather, self.pixels(task), self.isa.tile_rows);
        let [source_len, dy_len] = self.pixel_lengths();
        let (source, gradients) = to[..n * (source_len + dy_len)].split_at_mut(n * source_len);
        SCRATCH.with_borrow_mut(|Scratch { source: buffer, unrounded, window_offsets, out_offsets, .. }| {
            let region = source_region::<f32>(isa, gather, task, x, buffer, unrounded);
            pixel_offsets(gather, &gather.phases[0], task, &region.rows, window_offsets, out_offsets);
            for (tap, panels) in self.taps.iter().zip(source.chunks_exact_mut(n * self.panels * rows)) {
                for (i, windows) in window_offsets.chunks(PACK_PIXELS).enumerate() {
                    let range = PACK_PIXELS * i * rows..(PACK_PIXELS * i + windows.len()) * rows;
                    for (k, panel) in panels.chunks_exact_mut(n * rows).enumerate() {
                        let (offset, to) = (*tap as usize + k * rows, &mut panel[range.clone()]);
                        let real = rows.min(self.run - k * rows);
                        if real == rows {
                            // SAFETY: an `Isa` exists only for an instruction set of this
                            // processor.
                            unsafe { (isa.pack_windows)(region.values, windows, offset, to) };
                        } else {
                            let values = windows.iter().map(|window| &region.values[*window as usize + offset..]);
                            pack_padded(values, real, rows, to);
                        }
                    }
                }
            }
        });
        let (c, dy) = (gather.dest.c, &dy[task.span(gather.dest)]);
        let blocks: Vec<_> = blocks(isa, c).collect();
        for (i, dy) in dy.chunks(PACK_PIXELS * c).enumerate() {
            for &ChannelBlock { first, registers, channels } in &blocks {
                let (width, pixels) = (registers * isa.lanes, dy.len() / c);
                let to = &mut gradients[n * first + PACK_PIXELS * i * width..][..pixels * width];
                if channels == width {
                    let pack_rows = [isa.pack_rows_x1, isa.pack_rows_x2][registers - 1];
                    // SAFETY: an `Isa` exists only for an instruction set of this processor.
                    unsafe { pack_rows(dy, c, first, to) };
                } else {
                    pack_padded(dy.chunks_exact(c).map(|dy| &dy[first..]), channels, width, to);
                }
            }
        }
    }

    /// Adds the products of one block of channels and one tap to `dw`, whose rows are those of the
    /// panels from `first_panel` on.
    fn accumulate<T: Operand>(
        &self,
        panels: Panels<T>,
        tap: usize,
        first_panel: usize,
        block: ChannelBlock,
        dw: &mut [f32],
    ) {
        let (isa, groups) = (self.isa, panels.groups);
        let width = block.registers * isa.lanes;
        let [source_step, dy_step] = [isa.tile_rows, width].map(|values| values * T::DEPTH);
        let dy = &panels.dy[groups * block.first * T::DEPTH..][..groups * dy_step];
        let source = &panels.source[(tap * self.panels + first_panel) * groups * source_step..];
        for (source, dw) in source.chunks_exact(groups * source_step).zip(dw.chunks_mut(isa.tile_rows * width)) {
            PanelPair { source, source_step, dy, dy_step, groups }.accumulate(isa, block.registers, dw);
        }
    }

    /// Sums parts of the pixels into private gradients, which are added at the end: for small
    /// weights.
    fn sum_private<T: Operand>(&self, length: usize, tasks: &[Task], x: Input, dy: &[f32]) -> Vec<f32> {
        let isa = self.isa;
        let buffer_len = self.buffer_len::<T>(tasks);
        let parts: Vec<Vec<f32>> = tasks
            .par_chunks(tasks.len().div_ceil(PARTS).max(1))
            .map(|tasks| {
                let (mut dw, mut buffer) = (vec![0.0f32; length], vec![0.0f32; buffer_len]);
                for task in tasks {
                    let panels = self.pack::<T>(task, x, dy, &mut buffer);
                    let dw_blocks = dw.chunks_mut(self.taps.len() * self.run * 2 * isa.lanes);
                    for (block, dw) in blocks(isa, self.gather.dest.c).zip(dw_blocks) {
                        for (tap, dw) in dw.chunks_exact_mut(self.run * block.registers * isa.lanes).enumerate() {
                            self.accumulate(panels, tap, 0, block, dw);
                        }
                    }
                }
                dw
            })
            .collect();
        let mut sum = vec![0.0f32; length];
        for part in parts {
            sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
        }
        sum
    }

    /// Sums all pixels into one gradient that the threads divide among them, group after group of
    /// tasks: for weights that are large compared with the maps, where private gradients would cost
    /// more than they save.
    fn sum_shared<T: Operand>(&self, length: usize, tasks: &[Task], x: Input, dy: &[f32]) -> Vec<f32> {
        let isa = self.isa;
        let mut dw = vec![0.0f32; length];
        let buffer_len = self.buffer_len::<T>(tasks);
        let group = (GROUP_VALUES / buffer_len.max(1)).clamp(1, tasks.len().max(1));
        let mut buffers = vec![0.0f32; group * buffer_len];
        for tasks in tasks.chunks(group) {
            let panels: Vec<Panels<T>> = buffers
                .par_chunks_mut(buffer_len)
                .zip(tasks)
                .map(|(buffer, task)| self.pack(task, x, dy, buffer))
                .collect();
            let dw_blocks = dw.par_chunks_mut(self.taps.len() * self.run * 2 * isa.lanes);
            dw_blocks.zip(blocks(isa, self.gather.dest.c).collect::<Vec<_>>()).for_each(|(dw, block)| {
                let cols = block.registers * isa.lanes;
                dw.par_chunks_exact_mut(self.run * cols).enumerate().for_each(|(tap, dw)| {
                    let dw_panels = dw.par_chunks_mut(TASK_PANELS * isa.tile_rows * cols).enumerate();
                    dw_panels.for_each(|(i, dw)| {
                        for panels in &panels {
                            self.accumulate(*panels, tap, i * TASK_PANELS, block, dw);
                        }
                    });
                });
            });
        }
        dw
    }
}

/// Copies the first `n` values of each slice, followed by zeros up to `width`.
fn pack_padded<'a>(from: impl Iterator<Item = &'a [f32]>, n: usize, width: usize, to: &mut [f32]) {
    for (from, to) in from.zip(to.chunks_exact_mut(width)) {
        to[..n].copy_from_slice(&from[..n]);
        to[n..].fill(0.0);
    }
}

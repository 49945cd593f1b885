//! The source pixels that each destination pixel of a convolution reads, and the tasks that the
//! destination is split into.
//!
//! The forward pass and the gradient of the input are the same operation: every pixel of a
//! destination sums taps of a source. For the gradient of the input, the source is dy and the taps
//! are reversed; with a stride, its pixels fall into stride × stride phases, each with taps of its
//! own. Tasks depend on the shape alone.

use std::ops::Range;

use super::{
    input::ReadOperands,
    operand::{Operand, grow},
    shape::{MapShape, Shape},
};
use crate::isa::Isa;

/// Number of source values in a task: 256 KiB, a part of a core's second-level cache.
const TASK_VALUES: usize = 1 << 16;

/// Least number of destination pixels in a task, so that its incomplete last tile matters little.
const TASK_PIXELS: usize = 256;

/// Least number of tasks that a batch of small maps is split into.
const MIN_TASKS: usize = 8;

/// Number of maps of one pixel that a task has a multiple of, so that its tiles are full: the tile
/// heights 4 and 6 divide it.
const TILE_MULTIPLE: usize = 12;

/// A tap in one direction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tap {
    /// Offset in the source, in pixels.
    pub offset: isize,
    /// Index in the kernel.
    pub index: usize,
}

/// Destination pixels `first + dest_step · (j, i)`, which read the source pixels
/// `source_step · (j, i) + taps`.
#[derive(Debug)]
pub(super) struct OutputPhase {
    pub first: [usize; 2],
    pub rows: Vec<Tap>,
    pub cols: Vec<Tap>,
}

impl OutputPhase {
    /// Places of the taps in a kernel of side `kernel`.
    pub fn places(&self, kernel: usize) -> Vec<usize> {
        self.rows.iter().flat_map(|row| self.cols.iter().map(move |col| row.index * kernel + col.index)).collect()
    }
}

/// Source pixels that each destination pixel reads.
#[derive(Debug)]
pub(super) struct Gather {
    pub n: usize,
    pub source: MapShape,
    pub dest: MapShape,
    /// Distance between destination pixels of a phase.
    pub dest_step: usize,
    /// Distance between their windows.
    pub source_step: usize,
    pub phases: Vec<OutputPhase>,
    /// Zeros before and after the source, in rows and in columns.
    pub margin: [[usize; 2]; 2],
}

impl Gather {
    fn new(
        n: usize,
        source: MapShape,
        dest: MapShape,
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
    pub fn forward(s: &Shape) -> Gather {
        let tap = |k: usize| Tap { offset: (k * s.dilation) as isize - s.padding as isize, index: k };
        let taps = || (0..s.kernel).map(tap).collect();
        let phase = OutputPhase { first: [0, 0], rows: taps(), cols: taps() };
        Gather::new(s.n, s.input_map(), s.output_map(), 1, s.stride, vec![phase])
    }

    /// The gradient of the input, from dy to dx: input row r + stride · j meets output row
    /// j + (r + padding − k · dilation) / stride where that is an integer.
    pub fn backward_data(s: &Shape) -> Gather {
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

    pub fn has_margin(&self) -> bool {
        self.margin != [[0; 2]; 2]
    }

    /// Columns of a source row with its margin.
    pub fn padded_width(&self) -> usize {
        self.source.w + self.margin[1][0] + self.margin[1][1]
    }

    /// Splits the destination into tasks.
    pub fn tasks(&self) -> Vec<Task> {
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
    pub fn tasks_of(&self, pixels: usize) -> Vec<Task> {
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

    /// Returns whether every pixel of the destination has a tap.
    pub fn reaches_all(&self) -> bool {
        self.phases.len() == self.dest_step * self.dest_step
    }

    /// Splits the values of the destination by task.
    pub fn split<'a, T>(&self, tasks: Vec<Task>, mut values: &'a mut [T]) -> Vec<(Task, &'a mut [T])> {
        let mut parts = Vec::new();
        for task in tasks {
            let (part, rest) = values.split_at_mut(task.span(self.dest).len());
            parts.push((task, part));
            values = rest;
        }
        parts
    }

    /// Rows of the source, counted from its margin on, that a task reads.
    pub fn source_rows(&self, task: &Task) -> Range<usize> {
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
    pub fn steps(&self, phase: &OutputPhase, task: &Task) -> Range<usize> {
        let step = |row: usize| row.saturating_sub(phase.first[0]).div_ceil(self.dest_step);
        step(task.rows.start)..step(task.rows.end)
    }
}

/// Some images, or some rows of one, of the destination.
#[derive(Debug, Clone)]
pub(super) struct Task {
    pub images: Range<usize>,
    pub rows: Range<usize>,
}

impl Task {
    /// Range of its values in the destination; they are adjacent.
    pub fn span(&self, dest: MapShape) -> Range<usize> {
        let row = |i: usize, y: usize| (i * dest.h + y) * dest.w * dest.c;
        row(self.images.start, self.rows.start)..row(self.images.end - 1, self.rows.end)
    }
}

/// The part of a source that a task reads.
pub(super) struct SourceRegion<'a, T> {
    pub values: &'a [T],
    /// Rows of each image, counted from the margin on.
    pub rows: Range<usize>,
}

/// Copies the part of the source that `task` reads into `buffer`, with its margin. Without a
/// margin, a deferred norm and rounding, nothing is copied.
pub(super) fn source_region<'a, T: Operand>(
    isa: &Isa,
    gather: &Gather,
    task: &Task,
    source: impl ReadOperands<'a, T>,
    buffer: &'a mut Vec<f32>,
    unrounded: &mut Vec<f32>,
) -> SourceRegion<'a, T> {
    let (rows, map) = (gather.source_rows(task), gather.source);
    let image = map.len();
    if let (false, Some(values)) = (gather.has_margin(), source.borrow()) {
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
pub(super) fn pixel_offsets(
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
pub(super) fn tap_runs(gather: &Gather, phase: &OutputPhase) -> (Vec<u32>, usize) {
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

//! Direct convolution of any shape, without im2col: tiles read windows where they are.
//!
//! The forward pass and the gradient of the input are the same operation, a [`Gather`]. A thread
//! copies the part of the source that its pixels read, with a margin of zeros, so that no tap has
//! to check whether it lies in the image. Without a margin it reads the source itself.
//!
//! The gradient of the weights is a matrix product over pixels. Both operands are first packed into
//! panels as wide as a tile, so that everything a tile reads is adjacent.
//!
//! Threads share tasks: some images, or some rows of one. Tasks depend on the shape alone, and so
//! does the order of sums.

use std::{
    cell::RefCell,
    mem::{MaybeUninit, take},
};

use rayon::prelude::*;

use super::{
    gather::{Gather, OutputPhase, Task, pixel_offsets, source_region, tap_runs},
    input::F32Input,
    operand::{Operand, grow},
    shape::Shape,
    tiles::{ChannelBlock, Offsets, PanelPair, Windows, blocks, pack_weights},
};
use crate::{
    isa::Isa,
    memory::{assume_init_vec, uninit_vec},
};

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

/// Computes the destination of a gather, task by task. Pixels that no tap reaches are 0.
fn convolve<T: Operand, R: Send>(
    isa: &Isa,
    s: &Shape,
    gather: &Gather,
    w: &[f32],
    source: F32Input,
    transposed: bool,
    epilogue: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> (Vec<f32>, Vec<R>) {
    let mut out = uninit_vec(gather.n * gather.dest.len());
    let phase_weights = |phase: &OutputPhase| -> Vec<T> {
        let places = phase.places(s.kernel);
        T::convert_weights(isa, places.len() * gather.source.c, pack_weights(isa, s, &places, w, transposed))
    };
    let weights: Vec<Vec<T>> = gather.phases.iter().map(phase_weights).collect();
    let reaches_all = gather.reaches_all();
    let results = gather
        .split(gather.tasks(), &mut out)
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
    x: F32Input,
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
pub(super) fn backward_weight<T: Operand>(isa: &Isa, s: &Shape, x: F32Input, dy: &[f32]) -> Vec<f32> {
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
    fn pack<'b, T: Operand>(&self, task: &Task, x: F32Input, dy: &[f32], to: &'b mut [f32]) -> Panels<'b, T> {
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
    fn pack_f32(&self, task: &Task, x: F32Input, dy: &[f32], to: &mut [f32]) {
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
    fn sum_private<T: Operand>(&self, length: usize, tasks: &[Task], x: F32Input, dy: &[f32]) -> Vec<f32> {
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
    fn sum_shared<T: Operand>(&self, length: usize, tasks: &[Task], x: F32Input, dy: &[f32]) -> Vec<f32> {
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

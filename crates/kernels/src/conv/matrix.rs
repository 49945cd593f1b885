//! Convolution of any shape on a matrix unit: bf16 operands, f32 sums.
//!
//! The unit multiplies tiles whose rows are equally spaced in memory ([`crate::loops::matrix`]). A
//! [`Region`] puts what a task reads into that form, rounded to bf16, so that the pixels of a
//! destination are the rows of a matrix and each tap of the kernel is an offset:
//!
//! * Rows of pixels follow each other with one margin of zeros between them, which serves as the
//!   right margin of one and the left margin of the next; images likewise. The destination is
//!   computed at every place of that grid, and the places in the margins are dropped.
//! * With a stride s, the source is split into s · s planes by row and column modulo s. A tap then
//!   reads neighboring pixels of one plane, as without a stride.
//! * Sources of a few channels, such as RGB images, are gathered window by window instead (im2col):
//!   a tile would be mostly empty otherwise.
//!
//! The gradient of the weights sums over pixels: dw[tap] = dyᵀ · x[tap]. It needs dy transposed and
//! x in pairs of pixels. A tap at an odd offset needs the other pairs, so x is stored in both ways.
//!
//! Tasks, groups and the order of sums depend on the shape alone.

use std::{cell::RefCell, mem::MaybeUninit, ops::Range};

use rayon::prelude::*;

use super::{
    epilogue::{BlockKind, Epilogue, Totals},
    gather::{Gather, OutputPhase, Task, pixel_offsets, source_region, tap_runs},
    input::{Input, ReadOperands},
    shape::Shape,
};
use crate::{
    isa::{Isa, MatrixLoops},
    loops::{
        block::{BlockValues, Finish, PixelRun},
        matrix::{Accumulation, BLOCK, DEPTH, MultiplyArgs, Panels, Rows, STEP_VALUES, TILE, TILE_VALUES},
    },
    memory::{AlignedBuffer, Plain, as_uninit, assume_init_vec, uninit_vec},
    simd::Bf16,
    storage::{Storage, Values},
};

/// Number of source channels below which windows are gathered.
const MIN_CHANNELS: usize = 16;

/// Number of bytes that a task of the output reads and writes: a quarter of a core's second-level
/// cache.
const TASK_BYTES: usize = 1 << 19;

/// Number of sums that are computed before they are stored: 64 KiB.
const CHUNK_SUMS: usize = 1 << 14;

/// Least and greatest number of their rows, multiples of 32.
const CHUNK_ROWS: [usize; 2] = [32, 128];

/// Number of bytes of weights whose channels are computed together: a quarter of a core's
/// second-level cache.
const CACHED_WEIGHTS: usize = 1 << 19;

/// Least and greatest number of pixels in a task of the output.
const TASK_PIXELS: [usize; 2] = [256, 2048];

/// Least number of tasks that an output is split into, down to tasks of a block of rows.
const MIN_TASKS: usize = 8;

/// Number of values in the panels of the weight gradient that are summed at a time: 1 MiB, half of
/// a core's second-level cache.
const PANEL_VALUES: usize = 1 << 19;

/// Least and greatest number of pixels in these panels.
const PANEL_PIXELS: [usize; 2] = [512, 2048];

/// Number of tasks whose panels are summed at a time with shared sums, for the threads to pack.
const GROUP_TASKS: usize = 4;

/// Number of private weight gradients that parts of the batch are summed into, if they are small:
/// enough for many threads.
const PARTS: usize = 32;

/// Number of values from which on all threads sum into one shared weight gradient.
const SHARED_VALUES: usize = 1 << 16;

/// Buffers that a thread keeps from task to task.
#[derive(Default)]
struct Scratch {
    region: AlignedBuffer,
    sums: AlignedBuffer,
    rows: RowBuffers,
    /// Source with margins, for gathering windows.
    source: Vec<f32>,
    window_offsets: Vec<u32>,
    out_offsets: Vec<u32>,
}

/// Buffers for a row of pixels.
#[derive(Default)]
struct RowBuffers {
    /// Values between norm and rounding.
    unrounded: Vec<f32>,
    /// Pixels before they are spread.
    row: Vec<Bf16>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// Packed weights of the convolution that this thread computes.
    static WEIGHTS: RefCell<AlignedBuffer> = RefCell::default();
    /// Shared sums of the weight gradient that this thread computes.
    static SUMS: RefCell<AlignedBuffer> = RefCell::default();
    /// Panels of the weight gradient that this thread computes.
    static PANELS: RefCell<Vec<TaskPanels>> = RefCell::default();
}

/// Layout of the operands of a gather.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// Pixels in a grid, this many values apart.
    Grid { pixel: usize },
    /// Windows side by side.
    Windows,
}

impl Layout {
    fn new(gather: &Gather) -> Layout {
        match gather.source.c {
            c if c < MIN_CHANNELS => Layout::Windows,
            c if c.is_multiple_of(MIN_CHANNELS) => Layout::Grid { pixel: c },
            // Tiles of incomplete channels must not read the next pixel.
            c => Layout::Grid { pixel: c.next_multiple_of(DEPTH) },
        }
    }

    /// Returns the taps of a phase, each as the places in a kernel of side `kernel` that it sums.
    /// `merge` allows taps of neighboring columns to be one.
    fn taps(self, gather: &Gather, phase: &OutputPhase, kernel: usize, merge: bool) -> Vec<Vec<usize>> {
        let places = phase.places(kernel);
        match self {
            Layout::Windows => vec![places],
            Layout::Grid { pixel } if merge && merges(gather, phase, pixel) => {
                places.chunks(phase.cols.len()).map(<[usize]>::to_vec).collect()
            }
            Layout::Grid { .. } => places.into_iter().map(|place| vec![place]).collect(),
        }
    }
}

/// Returns whether a row of taps is one run of values, which fills the steps better than each tap
/// alone.
fn merges(gather: &Gather, phase: &OutputPhase, pixel: usize) -> bool {
    let adjacent = phase.cols.windows(2).all(|pair| pair[1].offset == pair[0].offset + 1);
    adjacent && gather.source_step == 1 && pixel == gather.source.c && !pixel.is_multiple_of(DEPTH)
}

/// A phase of a task as rows of the region.
struct View {
    /// Offset of each tap from a row, in values.
    taps: Vec<u32>,
    /// The destination pixels, in the order of their rows in the region. Offsets are those in the
    /// task's destination.
    runs: Vec<PixelRun>,
    /// Distance between neighboring pixels of a run in the destination, in values.
    out_step: usize,
}

impl View {
    /// Number of rows, from the first to the last pixel.
    fn rows(&self) -> usize {
        self.runs.last().map_or(0, |run| run.row + run.pixels)
    }

    /// Appends a run, or extends the last one by it.
    fn push(&mut self, run: PixelRun) {
        if let Some(last) = self.runs.last_mut() {
            let adjacent = last.row + last.pixels == run.row;
            if adjacent && last.at + last.pixels * self.out_step == run.at {
                last.pixels += run.pixels;
                return;
            }
        }
        self.runs.push(run);
    }

    /// Splits the rows into chunks of up to `rows` rows. Rows without a pixel may lie between them.
    fn chunks(&self, rows: usize) -> Vec<Chunk> {
        let mut chunks: Vec<Chunk> = Vec::new();
        for run in &self.runs {
            let mut done = 0;
            while done < run.pixels {
                let row = run.row + done;
                let first_row = match chunks.last() {
                    Some(chunk) if row < chunk.first_row + rows => chunk.first_row,
                    _ => {
                        chunks.push(Chunk { first_row: row, rows: 0, runs: Vec::new(), last: 0 });
                        row
                    }
                };
                let pixels = (run.pixels - done).min(first_row + rows - row);
                let at = run.at + done * self.out_step;
                let chunk = chunks.last_mut().expect("a chunk has been pushed");
                chunk.runs.push(PixelRun { row: row - first_row, pixels, at });
                chunk.rows = row + pixels - first_row;
                chunk.last = chunk.last.max(at + (pixels - 1) * self.out_step);
                done += pixels;
            }
        }
        chunks
    }
}

/// Rows of a view that are multiplied before their sums are stored.
struct Chunk {
    /// First row in the region.
    first_row: usize,
    /// Number of rows.
    rows: usize,
    /// The pixels. Rows count from the first.
    runs: Vec<PixelRun>,
    /// Greatest offset of a pixel in the task's destination.
    last: usize,
}

/// The grid of pixels of a task's source.
struct Grid {
    /// Source rows that the task reads, counted from the margin on.
    rows: Range<usize>,
    /// Rows of an image in a plane.
    image_rows: usize,
    /// Pixels in a row of a plane.
    pitch: usize,
    /// Pixels in a plane: an even number, so that pairs of pixels do not cross planes.
    plane: usize,
    /// The plane of each row and column modulo the stride, if a tap reads it.
    planes: Vec<Option<usize>>,
    /// Distance between pixels, in values.
    pixel: usize,
}

impl Grid {
    fn new(gather: &Gather, task: &Task, pixel: usize) -> Grid {
        let (step, rows) = (gather.source_step, gather.source_rows(task));
        let [[top, _], [left, right]] = gather.margin;
        let mut planes = vec![None; step * step];
        let mut count = 0;
        for phase in &gather.phases {
            let steps = gather.steps(phase, task);
            let taps = phase.rows.iter().flat_map(|row| phase.cols.iter().map(move |col| (row, col)));
            for (row, col) in taps.filter(|_| !steps.is_empty()) {
                let y = ((steps.start * step + top) as isize + row.offset) as usize - rows.start;
                let x = (left as isize + col.offset) as usize;
                let plane = &mut planes[y % step * step + x % step];
                if plane.is_none() {
                    *plane = Some(count);
                    count += 1;
                }
            }
        }
        let images = task.images.len();
        let (image_rows, pitch, total) = if step == 1 {
            let zeros_above = top.saturating_sub(rows.start);
            let zeros_below = rows.end.saturating_sub(top + gather.source.h);
            // If the padding exceeds the kernel, the output has more rows than the padded source.
            let most = gather.phases.iter().map(|phase| gather.steps(phase, task).len()).max().unwrap_or(0);
            let image_rows = (rows.len() - zeros_above.min(zeros_below)).max(most.min(rows.len()));
            // The last row of an image that shares no margin with another.
            let rest = rows.len() - image_rows;
            let columns = gather.dest.w.div_ceil(gather.dest_step);
            (image_rows, (gather.source.w + left.max(right)).max(columns), images * image_rows + rest)
        } else {
            let image_rows = rows.len().div_ceil(step);
            (image_rows, gather.padded_width().div_ceil(step), images * image_rows)
        };
        let margin = if step == 1 { left.max(right) } else { 0 };
        Grid { rows, image_rows, pitch, plane: (total * pitch + margin).next_multiple_of(2), planes, pixel }
    }

    /// Number of pixels in all planes.
    fn pixels(&self) -> usize {
        self.planes.iter().flatten().count() * self.plane
    }

    /// Returns the rows of a phase. `merge` as for [`Layout::taps`].
    fn view(&self, gather: &Gather, phase: &OutputPhase, task: &Task, merge: bool) -> View {
        let (step, steps) = (gather.source_step, gather.steps(phase, task));
        let [[top, _], [left, _]] = gather.margin;
        let cols = if merge && merges(gather, phase, self.pixel) { &phase.cols[..1] } else { &phase.cols[..] };
        let mut view = View { taps: Vec::new(), runs: Vec::new(), out_step: gather.dest_step * gather.dest.c };
        let columns = gather.dest.w.saturating_sub(phase.first[1]).div_ceil(gather.dest_step);
        if steps.is_empty() || columns == 0 {
            return view;
        }
        for (row, col) in phase.rows.iter().flat_map(|row| cols.iter().map(move |col| (row, col))) {
            let y = (steps.start * step + top) as isize + row.offset - self.rows.start as isize;
            let (y, x) = (y as usize, (left as isize + col.offset) as usize);
            let plane = self.planes[y % step * step + x % step].expect("the plane of every tap exists");
            let offset = (plane * self.plane + y / step * self.pitch + x / step) * self.pixel;
            view.taps.push(u32::try_from(offset).expect("a tap begins in its region"));
        }
        for image in 0..task.images.len() {
            for j in steps.clone() {
                let row = (image * self.image_rows + j - steps.start) * self.pitch;
                let y = phase.first[0] + j * gather.dest_step - task.rows.start;
                let at = ((image * task.rows.len() + y) * gather.dest.w + phase.first[1]) * gather.dest.c;
                view.push(PixelRun { row, pixels: columns, at });
            }
        }
        view
    }

    /// Returns whether the grid of a task is its part of the source, without margins and gaps.
    fn is_source(&self, gather: &Gather) -> bool {
        let whole = self.image_rows == gather.source.h || self.pixels() <= self.rows.len() * self.pitch + 1;
        !gather.has_margin() && self.pixel == gather.source.c && gather.source_step == 1 && whole
    }

    /// Overwrites the margins with zeros. Returns the offset from which on everything must be zero
    /// that is not read from the source.
    fn clear(&self, gather: &Gather, task: &Task, values: &mut [Bf16]) -> usize {
        let (pixel, step, map) = (self.pixel, gather.source_step, gather.source);
        if pixel != map.c || step > 1 && (gather.has_margin() || self.planes.iter().flatten().count() > 1) {
            return 0;
        }
        if step > 1 {
            // Every pixel of the only plane is read, but for one that makes it even.
            return self.pixels().saturating_sub(1) * pixel;
        }
        let ([top, _], [left, _]) = (gather.margin[0], gather.margin[1]);
        for i in 0..task.images.len() {
            for y in self.rows.clone() {
                let row = &mut values[(i * self.image_rows + y - self.rows.start) * self.pitch * pixel..];
                let row = &mut row[..self.pitch * pixel];
                if y < top || y >= top + map.h {
                    row.fill(Bf16::default());
                } else {
                    row[..left * pixel].fill(Bf16::default());
                    row[(left + map.w) * pixel..].fill(Bf16::default());
                }
            }
        }
        let rows = (task.images.len() - 1) * self.image_rows + self.rows.len();
        rows * self.pitch * pixel
    }

    /// Reads the source of a task into `to`, which holds all planes.
    fn read(
        &self,
        isa: &Isa,
        gather: &Gather,
        task: &Task,
        source: Input,
        to: &mut [Bf16],
        RowBuffers { unrounded, row: buffer }: &mut RowBuffers,
    ) {
        let (step, map, pixel) = (gather.source_step, gather.source, self.pixel);
        let (top, left, line) = (gather.margin[0][0], gather.margin[1][0], map.w * map.c);
        for (i, image) in task.images.clone().enumerate() {
            for y in self.rows.clone() {
                let Some(from) = y.checked_sub(top).filter(|y| *y < map.h) else { continue };
                let from = image * map.len() + from * line;
                let y = y - self.rows.start;
                let row = (i * self.image_rows + y / step) * self.pitch;
                if step == 1 && pixel == map.c {
                    source.read_operands(isa, from, &mut to[(row + left) * pixel..][..line], unrounded);
                    continue;
                }
                let planes = &self.planes[y % step * step..][..step];
                if planes.iter().all(Option::is_none) {
                    continue;
                }
                buffer.resize(line, Bf16::default());
                source.read_operands(isa, from, buffer, unrounded);
                for (x, values) in buffer.chunks_exact(map.c).enumerate() {
                    let x = x + left;
                    if let Some(plane) = planes[x % step] {
                        to[(plane * self.plane + row + x / step) * pixel..][..map.c].copy_from_slice(values);
                    }
                }
            }
        }
    }
}

/// The operands of a task, rounded to bf16: rows of `step` values.
struct Region<'a> {
    values: &'a [Bf16],
    step: usize,
}

/// Number of spare rows after the pixels of a region: the last tile of rows may be incomplete.
const SPARE_ROWS: usize = 2 * DEPTH;

/// Runs `f` with the operands of a task and with the rows of each phase. `merge` as for
/// [`Layout::taps`].
fn with_region<R>(
    isa: &Isa,
    gather: &Gather,
    layout: Layout,
    task: &Task,
    source: Input,
    merge: bool,
    f: impl FnOnce(&Region, Vec<View>, &mut AlignedBuffer) -> R,
) -> R {
    let mut scratch = SCRATCH.take();
    let Scratch { region: buffer, sums, rows, source: padded, window_offsets, out_offsets } = &mut scratch;
    let (region, views) = match layout {
        Layout::Grid { pixel } => {
            let grid = Grid::new(gather, task, pixel);
            let data = grid.pixels() * pixel;
            let length = data + SPARE_ROWS * pixel + STEP_VALUES;
            let views = gather.phases.iter().map(|phase| grid.view(gather, phase, task, merge)).collect();
            let in_place = if grid.is_source(gather) { source.borrow() } else { None };
            let from = task.images.start * gather.source.len() + grid.rows.start * gather.source.w * pixel;
            if let Some(values) = in_place.and_then(|values| values.get(from..from + length)) {
                (Region { values, step: pixel }, views)
            } else {
                let values = buffer.grow::<Bf16>(length);
                let end = grid.clear(gather, task, values);
                values[end..].fill(Bf16::default());
                grid.read(isa, gather, task, source, values, rows);
                (Region { values, step: pixel }, views)
            }
        }
        Layout::Windows => {
            let from = source_region::<Bf16>(isa, gather, task, source, padded, &mut rows.unrounded);
            // The windows of all phases, one phase after the other.
            let mut parts = Vec::new();
            let mut rows = 0;
            for phase in &gather.phases {
                let (runs, run) = tap_runs(gather, phase);
                pixel_offsets(gather, phase, task, &from.rows, window_offsets, out_offsets);
                parts.push((runs, run, rows, window_offsets.clone(), out_offsets.clone()));
                rows += window_offsets.len();
            }
            let longest = parts.iter().map(|(runs, run, ..)| runs.len() * run).max().unwrap_or(0);
            let step = longest.next_multiple_of(DEPTH);
            let values = buffer.grow::<Bf16>((rows + SPARE_ROWS) * step + STEP_VALUES);
            values[rows * step..].fill(Bf16::default());
            let views = parts
                .iter()
                .map(|(runs, run, first, windows, outs)| {
                    let rows = values[first * step..].chunks_exact_mut(step);
                    for (window, to_row) in windows.iter().zip(rows) {
                        for (offset, to) in runs.iter().zip((0..).step_by(*run)) {
                            copy_run(&from.values[(window + offset) as usize..], &mut to_row[to..], *run);
                        }
                        to_row[runs.len() * run..].fill(Bf16::default());
                    }
                    let out_step = gather.dest_step * gather.dest.c;
                    let mut view = View { taps: vec![(first * step) as u32], runs: Vec::new(), out_step };
                    for (row, at) in outs.iter().enumerate() {
                        view.push(PixelRun { row, pixels: 1, at: *at as usize });
                    }
                    view
                })
                .collect();
            (Region { values, step }, views)
        }
    };
    let result = f(&region, views, sums);
    SCRATCH.set(scratch);
    result
}

/// Copies `n` values, in pieces of constant length where there is room to copy more.
fn copy_run(from: &[Bf16], to: &mut [Bf16], n: usize) {
    const PIECE: usize = 16;
    let padded = n.next_multiple_of(PIECE);
    match (from.get(..padded), to.get_mut(..padded)) {
        (Some(from), Some(to)) => {
            let pieces = to.as_chunks_mut::<PIECE>().0.iter_mut().zip(from.as_chunks::<PIECE>().0);
            pieces.for_each(|(to, from)| *to = *from);
        }
        _ => to[..n].copy_from_slice(&from[..n]),
    }
}

/// Packs the weights of a phase block by block of channels: `[taps, steps, 16, 32, 2]` each, with
/// zeros in place of missing channels.
///
/// `w` is `[c_out, k · k, c_in]`, and `taps` are places in the kernel. With `transposed`, for the
/// gradient of the input, the source is dy.
fn pack_weights(loops: &MatrixLoops, s: &Shape, taps: &[Vec<usize>], w: &[Bf16], transposed: bool, to: &mut [Bf16]) {
    let (sources, channels) = if transposed { (s.c_out, s.c_in) } else { (s.c_in, s.c_out) };
    let row_len = s.kernel * s.kernel * s.c_in;
    let steps = steps(taps, sources);
    let block = taps.len() * steps * STEP_VALUES;
    assert!(to.len() == channels.div_ceil(BLOCK) * block, "packed weights have their shape");
    to.par_chunks_mut(block).enumerate().for_each(|(i, to)| {
        let first = i * BLOCK;
        let channels = BLOCK.min(channels - first);
        for (places, to) in taps.iter().zip(to.chunks_exact_mut(steps * STEP_VALUES)) {
            if let [place] = places[..] {
                let w = &w[place * s.c_in..];
                for (begin, to) in (0..sources).step_by(DEPTH).zip(to.chunks_exact_mut(STEP_VALUES)) {
                    let sources = [begin, DEPTH.min(sources - begin)];
                    pack_step(loops, w, [first, channels], sources, transposed, row_len, to);
                }
                continue;
            }
            // Places side by side, of few sources.
            to.fill(Bf16::default());
            for (j, place) in places.iter().enumerate() {
                for channel in 0..channels {
                    for source in 0..sources {
                        let [o, c] = if transposed { [source, first + channel] } else { [first + channel, source] };
                        let row = j * sources + source;
                        to[row / 2 * 2 * BLOCK + row % 2 + 2 * channel] = w[o * row_len + place * s.c_in + c];
                    }
                }
            }
        }
    });
}

/// Packs one step of the weights of a place: some channels and some sources, each given by the
/// first and their number. `w` is `[channels, sources]`, or with `transposed` the other way around,
/// in rows `row_len` values apart.
fn pack_step(
    loops: &MatrixLoops,
    w: &[Bf16],
    [channel, channels]: [usize; 2],
    [source, sources]: [usize; 2],
    transposed: bool,
    row_len: usize,
    to: &mut [Bf16],
) {
    let zeros = [Bf16::default(); BLOCK];
    assert!(to.len() == STEP_VALUES, "a step has its shape");
    if transposed {
        let rows = std::array::from_fn(|i| {
            if i < sources { w[(source + i) * row_len + channel..][..channels].as_ptr() } else { zeros.as_ptr() }
        });
        // SAFETY: each row has `channels` values, and `to` has a step's; an `Isa` exists only for
        // an instruction set of this processor.
        unsafe { (loops.interleave)(&rows, channels, to.as_mut_ptr()) };
        return;
    }
    for tile in (0..BLOCK).step_by(TILE) {
        let rows = std::array::from_fn(|i| {
            let i = tile + i;
            if i < channels { w[(channel + i) * row_len + source..][..sources].as_ptr() } else { zeros.as_ptr() }
        });
        let to = to[2 * tile..].as_mut_ptr();
        // SAFETY: each row has `sources` values, and `to` has a step's from its tile on; an `Isa`
        // exists only for an instruction set of this processor.
        unsafe { (loops.transpose_pairs)(&rows, sources, to) };
    }
}

/// Number of steps at each tap, for `c` source channels.
fn steps(taps: &[Vec<usize>], c: usize) -> usize {
    (taps[0].len() * c).div_ceil(DEPTH)
}

/// Computes rows · weights for one block of channels: some tiles of rows, from row `first` on. The
/// rows of the sums are 32 values apart.
///
/// # Panics
///
/// If a row or a weight lies outside its buffer.
fn multiply(
    Unit(loops): &Unit,
    region: &Region,
    [first, row_tiles]: [usize; 2],
    taps: &[u32],
    weights: &[Bf16],
    columns: usize,
    sums: &mut [f32],
) {
    if row_tiles == 0 || taps.is_empty() {
        return;
    }
    let steps = weights.len() / (taps.len() * STEP_VALUES);
    let column_tiles = columns.div_ceil(TILE);
    let last_row = TILE * row_tiles - 1;
    let max_tap = taps.iter().max().map_or(0, |max| *max as usize);
    // The bounds of every pointer below.
    assert!(
        (first + last_row) * region.step + max_tap + steps * DEPTH <= region.values.len(),
        "rows lie in the region"
    );
    assert!(weights.len() == taps.len() * steps * STEP_VALUES && column_tiles <= 2, "a block of weights has its shape");
    assert!(TILE * row_tiles * BLOCK <= sums.len(), "sums lie in their buffer");
    let product = MultiplyArgs {
        source: region.values[first * region.step..].as_ptr(),
        source_step: region.step,
        row_tiles,
        taps: taps.as_ptr(),
        tap_count: taps.len(),
        steps,
        weights: weights.as_ptr(),
        column_tiles,
        out: sums.as_mut_ptr(),
    };
    // SAFETY: the assertions above bound all operands, and `sums` is borrowed exclusively; an `Isa`
    // exists only for an instruction set of this processor.
    unsafe { (loops.multiply)(&product) };
}

/// The destination of a task, while it is computed.
struct Destination<'a, T> {
    values: &'a mut [MaybeUninit<T>],
    channels: usize,
    epilogue: BlockKind<'a, T>,
    /// The part of the epilogue's map that the task covers; empty without a map.
    map: &'a [T],
    totals: Totals,
}

impl<T: Storage> Destination<'_, T> {
    /// Computes one phase of the task: all channels of its pixels.
    fn multiply(&mut self, unit: &Unit, region: &Region, view: &View, weights: &[Bf16], sums: &mut AlignedBuffer) {
        let blocks = self.channels.div_ceil(BLOCK);
        let block_len = weights.len() / blocks;
        let group = (CACHED_WEIGHTS / (size_of::<Bf16>() * block_len)).clamp(1, blocks);
        let rows = (CHUNK_SUMS / (group * BLOCK) / BLOCK * BLOCK).clamp(CHUNK_ROWS[0], CHUNK_ROWS[1]);
        let chunks = view.chunks(rows);
        let sums = sums.grow::<f32>(group * rows * BLOCK);
        let mut values: Vec<_> = (0..group).map(|_| BlockValues::default()).collect();
        for (i, weights) in weights.chunks(group * block_len).enumerate() {
            let all = self.channels;
            let channels = move |block: usize| {
                let first = (i * group + block) * BLOCK;
                [first, BLOCK.min(all - first)]
            };
            let values = &mut values[..weights.len() / block_len];
            for (j, chunk) in chunks.iter().enumerate() {
                let blocks = weights.chunks_exact(block_len).zip(sums.chunks_exact_mut(rows * BLOCK));
                for (block, ((weights, sums), values)) in blocks.zip(&mut *values).enumerate() {
                    let tiles = [chunk.first_row, chunk.rows.div_ceil(TILE)];
                    multiply(unit, region, tiles, &view.taps, weights, channels(block)[1], sums);
                    if j == 0 {
                        self.epilogue.set(values, channels(block), sums);
                    }
                }
                self.finish(unit, chunk, view.out_step, i * group * BLOCK, (sums, rows * BLOCK), values);
                values.iter_mut().enumerate().for_each(|(block, values)| self.totals.add(channels(block), values));
            }
        }
    }

    /// Applies the epilogue to the sums of some blocks and stores their pixels. `first` is the
    /// first channel, `block_step` the distance between the blocks' sums.
    ///
    /// # Panics
    ///
    /// If a pixel lies outside the destination.
    fn finish(
        &mut self,
        Unit(loops): &Unit,
        chunk: &Chunk,
        step: usize,
        first: usize,
        (sums, block_step): (&[f32], usize),
        blocks: &mut [BlockValues],
    ) {
        let channels = (blocks.len() * BLOCK).min(self.channels - first);
        // The bounds of every pointer below.
        assert!(
            chunk.rows * BLOCK <= block_step && blocks.len() * block_step <= sums.len(),
            "sums lie in their buffer"
        );
        assert!(chunk.last + first + channels <= self.values.len(), "pixels lie in the destination");
        assert!([0, self.values.len()].contains(&self.map.len()), "a map has the shape of the destination");
        let block = Finish {
            sums: sums.as_ptr(),
            block_step,
            runs: &chunk.runs,
            channels,
            map: self.values[first..].as_mut_ptr().cast(),
            step,
            epilogue: self.epilogue.epilogue(self.map.as_ptr().wrapping_add(first)),
            blocks,
        };
        // SAFETY: the assertions above bound all pixels, the runs of a chunk lie within its rows,
        // and the destination is borrowed exclusively. An epilogue reads a map only if it has one.
        // An `Isa` exists only for an instruction set of this processor.
        unsafe { T::finish(loops)(block) };
    }
}

/// Rounds all weights, `[c_out, c_in, k · k]`, to `[c_out, k · k, c_in]`.
fn rounded(isa: &Isa, s: &Shape, w: &[f32]) -> Vec<Bf16> {
    const PART: usize = 1 << 16;
    let kk = s.kernel * s.kernel;
    let row = s.c_in * kk;
    let part = row * (PART / row).max(1);
    let mut to = uninit_vec(w.len());
    to.par_chunks_mut(part).zip(w.par_chunks(part)).for_each_init(Vec::new, |buffer, (to, from)| {
        if kk == 1 {
            return Bf16::narrow(isa, from, to);
        }
        buffer.resize(from.len(), Bf16::default());
        // SAFETY: the conversion writes numbers only.
        Bf16::narrow(isa, from, unsafe { as_uninit(buffer) });
        for (to, from) in to.chunks_exact_mut(row).zip(buffer.chunks_exact(row)) {
            if kk == 9 {
                transpose_places::<9>(from, to);
                continue;
            }
            for (c, from) in from.chunks_exact(kk).enumerate() {
                from.iter().enumerate().for_each(|(place, w)| _ = to[place * s.c_in + c].write(*w));
            }
        }
    });
    // SAFETY: every part has been written as a whole.
    unsafe { assume_init_vec(to) }
}

/// Transposes `[c_in, KK]` to `[KK, c_in]`. With a constant the loop over places is unrolled.
fn transpose_places<const KK: usize>(from: &[Bf16], to: &mut [MaybeUninit<Bf16>]) {
    let mut rows = to.chunks_exact_mut(from.len() / KK);
    let mut rows: [&mut [MaybeUninit<Bf16>]; KK] = std::array::from_fn(|_| rows.next().expect("a row per place"));
    for (c, from) in from.as_chunks::<KK>().0.iter().enumerate() {
        for (row, w) in rows.iter_mut().zip(from) {
            row[c].write(*w);
        }
    }
}

/// The matrix unit, in use by this thread until it is dropped. Configuring it takes as long as some
/// blocks, so it is done once a task.
struct Unit<'a>(&'a MatrixLoops);

impl Unit<'_> {
    fn new(loops: &MatrixLoops) -> Unit<'_> {
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (loops.configure)() };
        Unit(loops)
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        // SAFETY: `new` has configured it, on this thread: a reference is not `Send`.
        unsafe { (self.0.release)() };
    }
}

/// Splits the destination of a gather into tasks whose operands and sums stay in a second-level
/// cache.
fn output_tasks(gather: &Gather) -> Vec<Task> {
    let pixel = size_of::<Bf16>() * gather.source.c * gather.source_step.pow(2) + size_of::<f32>() * gather.dest.c;
    let share = (gather.n * gather.dest.h * gather.dest.w).div_ceil(MIN_TASKS).next_multiple_of(BLOCK);
    gather.tasks_of((TASK_BYTES / pixel).clamp(TASK_PIXELS[0], TASK_PIXELS[1]).min(share))
}

/// Computes the destination of a gather, task by task. Pixels that no tap reaches are 0.
fn convolve<T: Storage, E: Epilogue<T>>(
    (isa, loops): (&Isa, &MatrixLoops),
    s: &Shape,
    gather: &Gather,
    w: &[f32],
    source: Input,
    transposed: bool,
    epilogue: &E,
) -> (Vec<T>, Vec<E::Part>) {
    let layout = Layout::new(gather);
    let w = rounded(isa, s, w);
    let taps = |phase: &OutputPhase| layout.taps(gather, phase, s.kernel, true);
    let taps: Vec<_> = gather.phases.iter().map(taps).collect();
    let length = |taps: &Vec<Vec<usize>>| {
        gather.dest.c.div_ceil(BLOCK) * taps.len() * steps(taps, gather.source.c) * STEP_VALUES
    };
    let lengths: Vec<usize> = taps.iter().map(length).collect();
    let mut buffer = WEIGHTS.take();
    let mut rest = buffer.grow::<Bf16>(lengths.iter().sum());
    let mut weights = Vec::new();
    for (taps, length) in taps.iter().zip(lengths) {
        let (part, after) = rest.split_at_mut(length);
        pack_weights(loops, s, taps, &w, transposed, part);
        weights.push(&*part);
        rest = after;
    }
    let mut out = uninit_vec(gather.n * gather.dest.len());
    let (channels, kind) = (gather.dest.c, epilogue.block_kind());
    assert!(kind.map().is_none_or(|map| map.len() == out.len()), "a map has the shape of the result");
    let parts = gather
        .split(output_tasks(gather), &mut out)
        .into_par_iter()
        .map(|(task, values)| {
            let map = kind.map().map_or(&[][..], |map| &map[task.span(gather.dest)]);
            if !gather.reaches_all() {
                match kind {
                    BlockKind::Add(_) => _ = values.write_copy_of_slice(map),
                    _ => values.fill(MaybeUninit::new(T::default())),
                }
            }
            let pixels = values.len() / channels;
            let totals =
                Totals { pixels, origin: vec![0.0; channels], sums: [vec![0.0; channels], vec![0.0; channels]] };
            let mut destination = Destination { values, channels, epilogue: kind, map, totals };
            with_region(isa, gather, layout, &task, source, true, |region, views, sums| {
                let unit = Unit::new(loops);
                for (view, weights) in views.iter().zip(&weights) {
                    destination.multiply(&unit, region, view, weights, sums);
                }
            });
            epilogue.part(destination.totals)
        })
        .collect();
    WEIGHTS.set(buffer);
    // SAFETY: the tasks cover the destination. The phases cover all pixels of a task, or it has
    // been filled before.
    (unsafe { assume_init_vec(out) }, parts)
}

/// See [`super::forward_fused`].
pub(super) fn forward<T: Storage, E: Epilogue<T>>(
    isa: (&Isa, &MatrixLoops),
    s: &Shape,
    w: &[f32],
    x: Input,
    epilogue: &E,
) -> (Vec<T>, Vec<E::Part>) {
    convolve(isa, s, &Gather::forward(s), w, x, false, epilogue)
}

/// See [`super::backward_data_fused`].
pub(super) fn backward_data<T: Storage, E: Epilogue<T>>(
    isa: (&Isa, &MatrixLoops),
    s: &Shape,
    w: &[f32],
    dy: Input,
    epilogue: &E,
) -> (Vec<T>, Vec<E::Part>) {
    convolve(isa, s, &Gather::backward_data(s), w, dy, true, epilogue)
}

/// Packed operands of a task of the weight gradient.
#[derive(Default)]
struct TaskPanels {
    /// dy, transposed: `[steps, 16, 32]` for every 16 channels.
    left: AlignedBuffer,
    left_len: usize,
    /// Pairs of pixels of x that begin at even and at odd pixels, block by block of channels.
    right: [AlignedBuffer; 2],
    right_len: usize,
    /// Offset of each tap, in pixels.
    taps: Vec<usize>,
    /// Number of pixels summed, in steps.
    steps: usize,
}

/// See [`super::backward_weight`]. The result is `[c_out, c_in, k, k]`.
pub(super) fn backward_weight((isa, loops): (&Isa, &MatrixLoops), s: &Shape, x: Input, dy: Values) -> Vec<f32> {
    if s.n == 0 {
        return vec![0.0; s.c_out * s.c_in * s.kernel * s.kernel];
    }
    let gather = &Gather::forward(s);
    let layout = Layout::new(gather);
    let taps = layout.taps(gather, &gather.phases[0], s.kernel, false);
    let [rows, columns] = [s.c_out, taps[0].len() * s.c_in];
    let blocks = [rows, columns].map(|n| n.div_ceil(BLOCK));
    let length = blocks[0] * blocks[1] * taps.len() * BLOCK * BLOCK;
    let private = length < SHARED_VALUES;
    // With more than one tap, x is packed twice.
    let values = rows + columns * taps.len().min(2);
    let pixels = (PANEL_VALUES / values).clamp(PANEL_PIXELS[0], PANEL_PIXELS[1]);
    let tasks = gather.tasks_of(if private { pixels } else { pixels / GROUP_TASKS });
    let grad = WeightGrad { isa, loops, gather, layout, rows, columns, blocks, taps: taps.len(), tasks };
    if private {
        unpack_weights(s, &taps, blocks, &grad.sum_private(length, x, dy))
    } else if s.kernel == 1 && layout != Layout::Windows && rows % BLOCK + columns % BLOCK == 0 {
        grad.sum_in_place(x, dy)
    } else {
        let mut buffer = SUMS.take();
        let sums = buffer.grow::<f32>(length);
        grad.sum_shared(sums, x, dy);
        let dw = unpack_weights(s, &taps, blocks, sums);
        SUMS.set(buffer);
        dw
    }
}

/// A weight gradient in progress: `rows` x `columns` sums for each tap.
struct WeightGrad<'a> {
    isa: &'a Isa,
    loops: &'a MatrixLoops,
    gather: &'a Gather,
    layout: Layout,
    rows: usize,
    columns: usize,
    /// Number of blocks of rows and of columns.
    blocks: [usize; 2],
    taps: usize,
    tasks: Vec<Task>,
}

impl WeightGrad<'_> {
    /// Packs the operands of a task.
    fn pack(&self, task: &Task, x: Input, dy: Values, panels: &mut TaskPanels) {
        let span = task.span(self.gather.dest);
        with_region(self.isa, self.gather, self.layout, task, x, false, |region, views, _| {
            let (loops, channels) = (self.loops, self.gather.dest.c);
            match dy {
                Values::F32(dy) => panels.pack_left(loops.transpose, channels, &views[0], &dy[span]),
                Values::Bf16(dy) => panels.pack_left(loops.transpose_bf16, channels, &views[0], &dy[span]),
            }
            panels.pack_right(loops, region, &views[0], self.columns);
        });
    }

    /// Packs the tasks group by group and calls `sum` with the panels of each group, and with
    /// whether it is not the first.
    fn for_each_group(&self, x: Input, dy: Values, mut sum: impl FnMut(&[TaskPanels], bool)) {
        let mut panels = PANELS.take();
        panels.resize_with(panels.len().max(GROUP_TASKS), TaskPanels::default);
        for (i, tasks) in self.tasks.chunks(GROUP_TASKS).enumerate() {
            let panels = &mut panels[..tasks.len()];
            panels.par_iter_mut().zip(tasks).for_each(|(panels, task)| self.pack(task, x, dy, panels));
            sum(panels, i > 0);
        }
        PANELS.set(panels);
    }

    /// Sums parts of the tasks into private gradients, `[blocks, taps, 32, 32]`, which are added at
    /// the end: for small weights. Each task's panels are summed while they are in the cache.
    fn sum_private(&self, length: usize, x: Input, dy: Values) -> Vec<f32> {
        let blocks = self.blocks;
        let parts: Vec<Vec<f32>> = self
            .tasks
            .par_chunks(self.tasks.len().div_ceil(PARTS).max(1))
            .map(|tasks| {
                let mut sums = vec![0.0f32; length];
                let mut all_panels = PANELS.take();
                all_panels.resize_with(all_panels.len().max(1), TaskPanels::default);
                for (i, task) in tasks.iter().enumerate() {
                    self.pack(task, x, dy, &mut all_panels[0]);
                    let unit = Unit::new(self.loops);
                    for (block, sums) in sums.chunks_exact_mut(self.taps * BLOCK * BLOCK).enumerate() {
                        let block = [block / blocks[1], block % blocks[1]];
                        for (tap, sums) in sums.chunks_exact_mut(BLOCK * BLOCK).enumerate() {
                            // SAFETY: the sum writes numbers only.
                            let sums = unsafe { as_uninit(sums) };
                            self.sum(&unit, &all_panels[..1], block, tap, i > 0, (sums, BLOCK));
                        }
                    }
                }
                PANELS.set(all_panels);
                sums
            })
            .collect();
        let mut sum = vec![0.0f32; length];
        sum.par_chunks_mut(BLOCK * BLOCK).enumerate().for_each(|(i, sum)| {
            for part in &parts {
                sum.iter_mut().zip(&part[i * BLOCK * BLOCK..]).for_each(|(s, p)| *s += p);
            }
        });
        sum
    }

    /// Sums all tasks into one gradient, `[blocks, taps, 32, 32]`, that the threads divide among
    /// them: for large weights.
    fn sum_shared(&self, sums: &mut [f32], x: Input, dy: Values) {
        self.for_each_group(x, dy, |panels, add| {
            let blocks = sums.par_chunks_exact_mut(BLOCK * BLOCK).with_min_len(self.taps).enumerate();
            blocks.for_each_init(
                || Unit::new(self.loops),
                |unit, (i, sums)| {
                    let (tap, block) = (i % self.taps, i / self.taps);
                    let block = [block / self.blocks[1], block % self.blocks[1]];
                    // SAFETY: the sum writes numbers only.
                    self.sum(unit, panels, block, tap, add, (unsafe { as_uninit(sums) }, BLOCK));
                },
            );
        });
    }

    /// Sums all tasks of a single tap into `[rows, columns]`, both whole blocks.
    fn sum_in_place(&self, x: Input, dy: Values) -> Vec<f32> {
        let mut dw = uninit_vec(self.rows * self.columns);
        self.for_each_group(x, dy, |panels, add| {
            dw.par_chunks_exact_mut(BLOCK * self.columns).enumerate().for_each(|(row, dw)| {
                let unit = Unit::new(self.loops);
                for column in 0..self.columns / BLOCK {
                    self.sum(&unit, panels, [row, column], 0, add, (&mut dw[column * BLOCK..], self.columns));
                }
            });
        });
        // SAFETY: the blocks cover all sums, and the first group overwrites them. There are images,
        // so there is a group.
        unsafe { assume_init_vec(dw) }
    }

    /// Sums some panels for one tap of a block.
    fn sum(
        &self,
        Unit(loops): &Unit,
        panels: &[TaskPanels],
        [row, column]: [usize; 2],
        tap: usize,
        add: bool,
        (sums, sums_step): (&mut [MaybeUninit<f32>], usize),
    ) {
        let tiles = |i: usize, n: usize| (n - i * BLOCK).div_ceil(TILE).min(2);
        let (row_tiles, column_tiles) = (tiles(row, self.rows), tiles(column, self.columns));
        let panels: Vec<Panels> = panels.iter().map(|panels| panels.operands([row, column], row_tiles, tap)).collect();
        assert!((TILE * row_tiles - 1) * sums_step + TILE * column_tiles <= sums.len(), "a block has its shape");
        let sums = sums.as_mut_ptr().cast();
        let block = Accumulation { panels: &panels, row_tiles, column_tiles, sums, sums_step, add };
        // SAFETY: the assertion above and those of `operands` bound all operands, and `sums` is
        // borrowed exclusively; an `Isa` exists only for an instruction set of this processor.
        unsafe { (loops.accumulate)(&block) };
    }
}

impl TaskPanels {
    /// Packs the left operand of a task: `dy`, its gradients, of `channels` channels.
    fn pack_left<T: Plain + Default>(
        &mut self,
        transpose: unsafe fn(&Rows<T>, usize, *mut Bf16),
        channels: usize,
        view: &View,
        dy: &[T],
    ) {
        let zeros = [T::default(); TILE];
        self.steps = view.rows().div_ceil(DEPTH);
        let tile_step = self.steps * TILE_VALUES;
        self.left_len = channels.div_ceil(TILE) * tile_step;
        let left = self.left.grow::<Bf16>(self.left_len);
        let mut pixels =
            view.runs.iter().flat_map(|run| (0..run.pixels).map(|p| (run.row + p, run.at + p * view.out_step)));
        let mut next = pixels.next();
        for step in 0..self.steps {
            // Offsets of the pixels; `None` in the margins.
            let offsets: [Option<usize>; DEPTH] = std::array::from_fn(|p| {
                let (row, offset) = next?;
                (row == step * DEPTH + p).then(|| {
                    next = pixels.next();
                    offset
                })
            });
            for (tile, channel) in (0..channels).step_by(TILE).enumerate() {
                let n = TILE.min(channels - channel);
                let pixels = offsets.map(|offset| match offset {
                    Some(offset) => dy[offset + channel..][..n].as_ptr(),
                    None => zeros.as_ptr(),
                });
                let to = &mut left[tile * tile_step + step * TILE_VALUES..][..TILE_VALUES];
                // SAFETY: each pixel has `n` channels, and `to` has a tile's values; an `Isa`
                // exists only for an instruction set of this processor.
                unsafe { transpose(&pixels, n, to.as_mut_ptr()) };
            }
        }
    }

    /// Packs the right operand of a task, up to the last pixel that a tap reads. `columns` is the
    /// number of values of a row of the region that are real. After [`pack_left`](Self::pack_left).
    fn pack_right(&mut self, loops: &MatrixLoops, region: &Region, view: &View, columns: usize) {
        let pixels = self.steps * DEPTH;
        self.taps = view.taps.iter().map(|tap| *tap as usize / region.step).collect();
        let last = self.taps.iter().max().copied().unwrap_or(0);
        let groups = (pixels + last).div_ceil(DEPTH);
        self.right_len = groups * STEP_VALUES;
        for (parity, right) in self.right.iter_mut().enumerate() {
            if self.taps.iter().all(|tap| tap % 2 != parity) {
                continue;
            }
            let right = right.grow::<Bf16>(columns.div_ceil(BLOCK) * self.right_len);
            for (i, to) in right.chunks_exact_mut(STEP_VALUES).enumerate() {
                let (column, first) = (i / groups * BLOCK, i % groups * DEPTH + parity);
                let n = BLOCK.min(columns - column);
                let pixels = std::array::from_fn(|p| {
                    // Pixels after the last are multiplied by zeros.
                    let offset = ((first + p) * region.step + column).min(region.values.len() - n);
                    region.values[offset..][..n].as_ptr()
                });
                // SAFETY: each pixel has `n` values, and `to` has a step's; an `Isa` exists only
                // for an instruction set of this processor.
                unsafe { (loops.interleave)(&pixels, n, to.as_mut_ptr()) };
            }
        }
    }

    /// Returns the operands of a block for one tap.
    fn operands(&self, [row, column]: [usize; 2], row_tiles: usize, tap: usize) -> Panels {
        let (left, tap) = (self.left.get::<Bf16>(self.left_len), self.taps[tap]);
        let right = self.right[tap % 2].get::<Bf16>((column + 1) * self.right_len);
        let left_step = self.steps * TILE_VALUES;
        let left = &left[row * 2 * left_step..];
        let right = &right[column * self.right_len + tap / 2 * 2 * BLOCK..];
        // The bounds of every pointer below.
        assert!(row_tiles * left_step <= left.len(), "rows lie in their panel");
        assert!(self.steps * STEP_VALUES <= right.len(), "columns lie in their panel");
        Panels { left: left.as_ptr(), left_step, right: right.as_ptr(), steps: self.steps }
    }
}

/// Unpacks weight gradients from `[blocks, taps, 32, 32]` to `[c_out, c_in, k, k]`.
fn unpack_weights(s: &Shape, taps: &[Vec<usize>], blocks: [usize; 2], sums: &[f32]) -> Vec<f32> {
    let kk = s.kernel * s.kernel;
    let mut dw = uninit_vec(s.c_out * s.c_in * kk);
    let tap_step = BLOCK * BLOCK;
    dw.par_chunks_mut(BLOCK * s.c_in * kk).enumerate().for_each(|(row, dw)| {
        for (o, dw) in dw.chunks_exact_mut(s.c_in * kk).enumerate() {
            // The sums of all taps for a column: neighboring columns are adjacent, taps `tap_step`
            // apart.
            let sums = |column: usize| {
                let block = row * blocks[1] + column / BLOCK;
                &sums[block * taps.len() * tap_step + o * BLOCK + column % BLOCK..]
            };
            if taps.len() == kk {
                for (first, dw) in (0..).step_by(BLOCK).zip(dw.chunks_mut(BLOCK * kk)) {
                    match kk {
                        1 => interleave_places::<1>(sums(first), dw),
                        9 => interleave_places::<9>(sums(first), dw),
                        _ => {
                            for (c, dw) in dw.chunks_exact_mut(kk).enumerate() {
                                dw.iter_mut()
                                    .zip(sums(first + c).iter().step_by(tap_step))
                                    .for_each(|(dw, s)| _ = dw.write(*s));
                            }
                        }
                    }
                }
            } else {
                // One tap of all places side by side.
                for (column, (place, c)) in taps[0].iter().flat_map(|p| (0..s.c_in).map(move |c| (p, c))).enumerate() {
                    dw[c * kk + place].write(sums(column)[0]);
                }
            }
        }
    });
    // SAFETY: the taps have all places of the kernel, and each writes all channels.
    unsafe { assume_init_vec(dw) }
}

/// Interleaves the sums of `KK` places for the columns of a block. With a constant the loop over
/// places is unrolled.
fn interleave_places<const KK: usize>(sums: &[f32], dw: &mut [MaybeUninit<f32>]) {
    let places: [&[f32]; KK] = std::array::from_fn(|place| &sums[place * BLOCK * BLOCK..][..dw.len() / KK]);
    for (c, dw) in dw.as_chunks_mut::<KK>().0.iter_mut().enumerate() {
        for (dw, sums) in dw.iter_mut().zip(places) {
            dw.write(sums[c]);
        }
    }
}

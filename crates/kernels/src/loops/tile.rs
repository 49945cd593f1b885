//! The convolution micro-kernels.
//!
//! All convolutions of this crate (forward or backward, direct or Winograd) and its matrix products
//! spend their time in the two loops below. Both compute a *tile*, a block of `MR` rows by `NV`
//! registers of channels whose sums stay in registers while the loop runs over the summed
//! dimension:
//!
//! | loop | rows | summed over | operands |
//! | --- | --- | --- | --- |
//! | [`output_block`] | output pixels | taps, source channels | source in place, packed weights |
//! | [`weight_grad_tile`] | source values | output pixels | packed source, packed output gradient |
//!
//! The pseudo code of [`output_block`] (that of [`weight_grad_tile`] is the same with pixels in
//! place of taps, and it begins with the sums so far):
//!
//! ```text
//! for each tile of MR pixels:
//!     sums[0..MR][0..NV] = 0
//!     w = start of the packed weights
//!     for each tap:
//!         for i in 0..run, step DEPTH:
//!             weights[0..NV] = load(w)                          # NV registers
//!             w += NV · LANES · DEPTH
//!             for r in 0..MR:
//!                 x = broadcast(source[window(r) + tap + i])    # DEPTH values to all lanes
//!                 for v in 0..NV:
//!                     sums[r][v] += x · weights[v]              # one FMA
//!     store sums[r] at out[out_offset(r)] for each r
//! ```
//!
//! What makes it fast:
//!
//! 1. `MR · NV` sums are as many independent chains of FMAs. There must be enough of them to hide
//!    the latency of the FMA units, and with the `NV` weights and one broadcast they must fit into
//!    the registers. Each instruction set chooses its own `MR`; `NV` is 2, or 1 for the last
//!    channels.
//! 2. There is no im2col. Windows, taps and output pixels are given by offsets, so the source is
//!    read where it is, and one loop serves all strides, dilations and Winograd's planes.
//! 3. Channels are last, so the taps of neighboring columns are adjacent in memory: a row of the
//!    kernel is one `run`.
//! 4. Weights are packed in the order in which they are read. The rows of a source lie kilobytes
//!    apart instead, which no hardware prefetcher follows: the loop prefetches the next tiles'
//!    lines where the caller expects them to be in memory.
//! 5. `MR`, `NV` and `WHOLE` are constants, so that loops over a tile unroll and the sums live in
//!    registers. An incomplete last tile therefore has `MR` rows too: it repeats the last pixel and
//!    stores only what is real.
//!
//! [`Product`] decides what an operand is: one f32 per lane, or two bf16 whose products are added
//! in a single instruction (`DEPTH` 2).

#![allow(clippy::needless_range_loop, reason = "blocks of registers are plainest by index")]

use std::array::from_fn;

use crate::simd::{CACHE_LINE, Element, Product, Simd, prefetch};

/// Arguments of [`output_block`]: some output pixels × a block of channels.
pub(crate) struct OutputBlock<T> {
    /// The source, with its margins.
    pub source: *const T,
    /// Offset of each pixel's window in `source`.
    pub window_offsets: *const u32,
    /// Offset of each tap in a window.
    pub tap_offsets: *const u32,
    /// Number of taps.
    pub taps: usize,
    /// Number of adjacent values at each tap, a multiple of the depth.
    pub run: usize,
    /// Packed weights, `[taps, run / DEPTH, NV · LANES, DEPTH]`.
    pub weights: *const T,
    /// The output.
    pub out: *mut f32,
    /// Offset of each pixel's channels in `out`.
    pub out_offsets: *const u32,
    /// Number of pixels, at least 1.
    pub pixels: usize,
    /// Number of channels to store, at most `NV · LANES`.
    pub channels: usize,
    /// Prefetch the lines that later tiles write.
    pub prefetch_out: bool,
    /// Prefetch the lines that the next tile reads at its first tap.
    pub prefetch_source: bool,
}

/// Arguments of [`weight_grad_tile`]: source values × a block of channels, summed over groups of
/// `DEPTH` output pixels.
pub(crate) struct WeightGradTile<T> {
    /// Packed source `[groups, step]`, from the first row's value on. A row's `DEPTH` values are
    /// adjacent.
    pub source: *const T,
    /// Distance between groups in `source`, in values.
    pub source_step: usize,
    /// Packed output gradient `[groups, step]`, from the first channel on. A channel's `DEPTH`
    /// values are adjacent.
    pub dy: *const T,
    /// Distance between groups in `dy`, in values.
    pub dy_step: usize,
    /// Number of groups of pixels.
    pub groups: usize,
    /// Sums so far, `[rows, step]`; added to.
    pub dw: *mut f32,
    /// Distance between rows of `dw`, in values.
    pub dw_step: usize,
    /// Number of rows to store, at most `MR`. The other rows read what follows in `source`.
    pub rows: usize,
}

/// Compiled [`output_block`].
pub(crate) type OutputBlockFn<T> = unsafe fn(block: &OutputBlock<T>);

/// Compiled [`weight_grad_tile`].
pub(crate) type WeightGradTileFn<T> = unsafe fn(tile: &WeightGradTile<T>);

/// Number of tiles between the one that is stored and the one whose output lines are prefetched.
pub(crate) const PREFETCH_TILES: usize = 2;

/// Capacity of the buffer for incomplete tiles: two registers of the widest instruction set.
const WIDEST_ROW: usize = 32;

/// Computes `out[pixel, channel] = Σ source · weights` over taps and runs, in tiles of `MR` pixels.
///
/// # Safety
///
/// * The processor has `P`.
/// * `pixels` is at least 1; `window_offsets` and `out_offsets` hold `pixels` entries,
///   `tap_offsets` holds `taps`.
/// * `source` holds `window + tap + run` values for each window and tap offset.
/// * `weights` holds `taps · run · NV · LANES` values, and `run` is a multiple of `DEPTH`.
/// * `out` holds `offset + channels` values for each output offset, and nothing else accesses them.
/// * `channels` is at most `NV · LANES`, and `NV · LANES` at most [`WIDEST_ROW`].
#[inline(always)]
pub(crate) unsafe fn output_block<P: Product, const MR: usize, const NV: usize>(b: &OutputBlock<P::Operand>) {
    // SAFETY: the contract is passed on; whole tiles have `MR` pixels left.
    unsafe {
        let mut first = 0;
        while first + MR <= b.pixels {
            output_tile::<P, MR, NV, true>(b, first);
            first += MR;
        }
        if first < b.pixels {
            output_tile::<P, MR, NV, false>(b, first);
        }
    }
}

/// Computes one tile of an [`output_block`], beginning at pixel `first`.
///
/// # Safety
///
/// * As for [`output_block`].
/// * `first` is less than `pixels`, and `first + MR` at most `pixels` if `WHOLE`.
#[inline(always)]
unsafe fn output_tile<P: Product, const MR: usize, const NV: usize, const WHOLE: bool>(
    b: &OutputBlock<P::Operand>,
    first: usize,
) {
    let (lanes, depth) = (P::Sum::LANES, P::Operand::DEPTH);
    // SAFETY: every offset below is one that the contract bounds; pixel indices are clamped to
    // `pixels − 1`.
    unsafe {
        let rows = if WHOLE { MR } else { b.pixels - first };
        // Missing rows repeat the last pixel.
        let pixel: [usize; MR] = from_fn(|r| first + if WHOLE { r } else { r.min(rows - 1) });
        if b.prefetch_out {
            for r in 0..MR {
                let later = (first + PREFETCH_TILES * MR + r).min(b.pixels - 1);
                prefetch::<true>(b.out.add(*b.out_offsets.add(later) as usize).cast_const());
            }
        }
        if b.prefetch_source {
            for r in 0..MR {
                let later = (first + MR + r).min(b.pixels - 1);
                let row = b.source.add(*b.window_offsets.add(later) as usize);
                for line in (0..b.run).step_by(CACHE_LINE * size_of::<f32>() / size_of::<P::Operand>()) {
                    prefetch::<false>(row.add(line));
                }
            }
        }
        let mut sums = [[P::Sum::splat(0.0); NV]; MR];
        let window: [*const P::Operand; MR] = from_fn(|r| b.source.add(*b.window_offsets.add(pixel[r]) as usize));
        let mut w = b.weights;
        for tap in 0..b.taps {
            let from = *b.tap_offsets.add(tap) as usize;
            for i in (from..from + b.run).step_by(depth) {
                let weights: [P::Register; NV] = from_fn(|v| P::load_operands(w.add(v * lanes * depth)));
                w = w.add(NV * lanes * depth);
                for r in 0..MR {
                    let x = P::broadcast(window[r].add(i));
                    for v in 0..NV {
                        sums[r][v] = P::dot(x, weights[v], sums[r][v]);
                    }
                }
            }
        }
        // A path of its own, so that a whole tile is stored from the registers to its place.
        if WHOLE && b.channels == NV * lanes {
            for r in 0..MR {
                let to = b.out.add(*b.out_offsets.add(pixel[r]) as usize);
                for v in 0..NV {
                    P::Sum::store(to.add(v * lanes), sums[r][v]);
                }
            }
            return;
        }
        let mut row = [0.0f32; WIDEST_ROW];
        for r in 0..rows {
            for v in 0..NV {
                P::Sum::store(row.as_mut_ptr().add(v * lanes), sums[r][v]);
            }
            let to = b.out.add(*b.out_offsets.add(pixel[r]) as usize);
            std::ptr::copy_nonoverlapping(row.as_ptr(), to, b.channels);
        }
    }
}

/// Computes `dw[row, channel] += Σ source · dy` over pixels.
///
/// # Safety
///
/// * The processor has `P`.
/// * `source` holds `(groups − 1) · source_step + MR · DEPTH` values.
/// * `dy` holds `(groups − 1) · dy_step + NV · LANES · DEPTH` values.
/// * `dw` holds `(rows − 1) · dw_step + NV · LANES` values, and nothing else accesses them.
/// * `rows` is at most `MR`.
#[inline(always)]
pub(crate) unsafe fn weight_grad_tile<P: Product, const MR: usize, const NV: usize>(t: &WeightGradTile<P::Operand>) {
    let (lanes, depth) = (P::Sum::LANES, P::Operand::DEPTH);
    // SAFETY: every offset below is one that the contract bounds. `wrapping_add` steps past the
    // last group, where nothing is read.
    unsafe {
        let mut sums = [[P::Sum::splat(0.0); NV]; MR];
        for r in 0..MR {
            if r < t.rows {
                for v in 0..NV {
                    sums[r][v] = P::Sum::load(t.dw.add(r * t.dw_step + v * lanes));
                }
            }
        }
        let (mut source, mut dy) = (t.source, t.dy);
        for _ in 0..t.groups {
            let gradients: [P::Register; NV] = from_fn(|v| P::load_operands(dy.add(v * lanes * depth)));
            let row = source;
            (source, dy) = (source.wrapping_add(t.source_step), dy.wrapping_add(t.dy_step));
            for r in 0..MR {
                let x = P::broadcast(row.add(r * depth));
                for v in 0..NV {
                    sums[r][v] = P::dot(x, gradients[v], sums[r][v]);
                }
            }
        }
        for r in 0..MR {
            if r < t.rows {
                for v in 0..NV {
                    P::Sum::store(t.dw.add(r * t.dw_step + v * lanes), sums[r][v]);
                }
            }
        }
    }
}

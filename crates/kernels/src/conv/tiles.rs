//! Code that both algorithms share: blocks of channels, the layout of packed weights, and the safe
//! functions around the two micro-kernels ([`crate::loops::tile`]).

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::{operand::Operand, shape::Shape};
use crate::{
    isa::Isa,
    loops::tile::{OutputBlock, WeightGradTile},
};

/// Number of source channels that are packed or unpacked together: their cache lines stay in the
/// first-level cache.
const PACK_CHANNELS: usize = 16;

/// A block of output channels: two registers, or one at the end.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChannelBlock {
    /// First channel.
    pub first: usize,
    /// Number of registers, 1 or 2.
    pub registers: usize,
    /// Number of channels, at most `registers · LANES`.
    pub channels: usize,
}

/// Splits `channels` channels into blocks.
pub(super) fn blocks(isa: &Isa, channels: usize) -> impl Iterator<Item = ChannelBlock> + use<> {
    let lanes = isa.lanes;
    (0..channels).step_by(2 * lanes).map(move |first| {
        let channels = (channels - first).min(2 * lanes);
        ChannelBlock { first, registers: channels.div_ceil(lanes), channels }
    })
}

/// Packs weights block by block in the order in which tiles read them: `[taps, source channels,
/// NV · LANES]` each, with zeros in place of missing channels.
///
/// `w` is `[c_out, c_in, k, k]`, and `taps` are places in the kernel. With `transposed`, for the
/// gradient of the input, the source is dy.
pub(super) fn pack_weights(isa: &Isa, s: &Shape, taps: &[usize], w: &[f32], transposed: bool) -> Vec<f32> {
    let (sources, channels) = if transposed { (s.c_out, s.c_in) } else { (s.c_in, s.c_out) };
    let kk = s.kernel * s.kernel;
    // Distance between sources and between channels in `w`.
    let (source_step, channel_step) = if transposed { (s.c_in * kk, kk) } else { (kk, s.c_in * kk) };
    let rows = taps.len() * sources;
    let mut packed = vec![0.0f32; rows * channels.next_multiple_of(isa.lanes)];
    let blocks: Vec<_> = blocks(isa, channels).collect();
    packed.par_chunks_mut(rows * 2 * isa.lanes).zip(blocks).for_each(|(packed, block)| {
        let width = block.registers * isa.lanes;
        if transposed {
            // The channels of a source are adjacent.
            for source in 0..sources {
                let from = &w[source * source_step + block.first * channel_step..][..block.channels * kk];
                for (i, tap) in taps.iter().enumerate() {
                    let row = &mut packed[(i * sources + source) * width..][..block.channels];
                    row.iter_mut().zip(from[*tap..].iter().step_by(kk)).for_each(|(to, v)| *to = *v);
                }
            }
            return;
        }
        // The sources of a channel are adjacent. A few of them at a time, so that the rows written
        // for them stay in the first-level cache.
        for first in (0..sources).step_by(PACK_CHANNELS) {
            for channel in 0..block.channels {
                let n = PACK_CHANNELS.min(sources - first);
                let from = &w[first * source_step + (block.first + channel) * channel_step..][..n * kk];
                for (i, tap) in taps.iter().enumerate() {
                    let rows = packed[(i * sources + first) * width + channel..].iter_mut().step_by(width);
                    rows.zip(from[*tap..].iter().step_by(kk)).for_each(|(to, v)| *to = *v);
                }
            }
        }
    });
    packed
}

/// Unpacks weight gradients from blocks of `[k, k, c_in, NV · LANES]` to `[c_out, c_in, k, k]`.
pub(super) fn unpack_weights(isa: &Isa, s: &Shape, packed: &[f32]) -> Vec<f32> {
    let kk = s.kernel * s.kernel;
    let mut dw = vec![0.0f32; s.c_out * s.c_in * kk];
    let (chunk, width) = (kk * s.c_in, 2 * isa.lanes);
    let blocks: Vec<_> = blocks(isa, s.c_out).collect();
    let tasks = dw.par_chunks_mut(chunk * width).zip(packed.par_chunks(chunk * width)).zip(blocks);
    tasks.for_each(|((dw, packed), block)| {
        let cols = block.registers * isa.lanes;
        // A few input channels at a time, so that their rows stay in the first-level cache while
        // all output channels read from them.
        for first in (0..s.c_in).step_by(PACK_CHANNELS) {
            for (o, dw) in dw.chunks_exact_mut(chunk).enumerate() {
                for c in first..(first + PACK_CHANNELS).min(s.c_in) {
                    for (t, v) in dw[c * kk..(c + 1) * kk].iter_mut().enumerate() {
                        *v = packed[(t * s.c_in + c) * cols + o];
                    }
                }
            }
        }
    });
    dw
}

/// Offsets, and the greatest of them, which bounds the accesses behind them.
#[derive(Clone, Copy)]
pub(super) struct Offsets<'a> {
    values: &'a [u32],
    max: usize,
}

impl<'a> From<&'a [u32]> for Offsets<'a> {
    fn from(values: &'a [u32]) -> Self {
        Offsets { values, max: values.iter().max().map_or(0, |max| *max as usize) }
    }
}

/// Windows of some output pixels in a source.
#[derive(Clone, Copy)]
pub(super) struct Windows<'a, T> {
    /// The source, with its margins.
    pub source: &'a [T],
    /// Offset of each pixel's window in `source`.
    pub windows: Offsets<'a>,
    /// Offset of each run of taps in a window.
    pub taps: Offsets<'a>,
    /// Number of values in a run, a multiple of the depth.
    pub run: usize,
    /// Prefetch source and output: they are in memory, not in a cache.
    pub prefetch: bool,
}

impl<T: Operand> Windows<'_, T> {
    /// Computes out[out_offset + channel] = Σ over taps and runs of source · weight, for all
    /// channels, block by block. `weights` yields the packed weights of each block, `[taps, run /
    /// DEPTH, NV · LANES, DEPTH]`. Every value of `out` in `offset .. offset + channels` is
    /// written, for each of the output offsets, unless there are no taps.
    pub fn multiply<'w>(
        &self,
        isa: &Isa,
        channels: usize,
        weights: impl Iterator<Item = &'w [T]>,
        out_offsets: Offsets,
        out: &mut [MaybeUninit<f32>],
    ) where
        T: 'w,
    {
        let Windows { source, windows, taps, run, prefetch } = *self;
        if windows.values.is_empty() || taps.values.is_empty() {
            return;
        }
        // The bounds of every pointer below.
        assert!(windows.max + taps.max + run <= source.len(), "windows lie in the source");
        assert!(out_offsets.max + channels <= out.len(), "pixels lie in the destination");
        assert!(windows.values.len() == out_offsets.values.len(), "every pixel has a window");
        assert!(run.is_multiple_of(T::DEPTH), "a run fills whole lanes");
        for (block, weights) in blocks(isa, channels).zip(weights) {
            let length = taps.values.len() * run * block.registers * isa.lanes;
            assert!(weights.len() == length, "a block of weights has its shape");
            let arguments = OutputBlock {
                source: source.as_ptr(),
                window_offsets: windows.values.as_ptr(),
                tap_offsets: taps.values.as_ptr(),
                taps: taps.values.len(),
                run,
                weights: weights.as_ptr(),
                out: out[block.first..].as_mut_ptr().cast(),
                out_offsets: out_offsets.values.as_ptr(),
                pixels: windows.values.len(),
                channels: block.channels,
                prefetch_out: prefetch,
                // The first block brings the source into the cache for all others. With more than
                // one tap, neighboring windows overlap and most of the next one is there already.
                prefetch_source: prefetch && block.first == 0 && taps.values.len() == 1,
            };
            // SAFETY: the assertions above bound the windows, the pixels (`first + channels` of a
            // block is at most `channels`) and the weights, and there is a pixel; an `Isa` exists
            // only for an instruction set of this processor.
            unsafe { T::output_block(isa, block.registers)(&arguments) };
        }
    }
}

/// Packed operands of a weight gradient: a panel of source values and one of output gradients, over
/// groups of `DEPTH` pixels.
#[derive(Clone, Copy)]
pub(super) struct PanelPair<'a, T> {
    /// Source, `[groups, source_step]`, from the first row on. A tile reads its full height, also
    /// past the last row.
    pub source: &'a [T],
    /// Distance between groups in `source`, in values.
    pub source_step: usize,
    /// Output gradient, `[groups, dy_step]`, from the first channel on.
    pub dy: &'a [T],
    /// Distance between groups in `dy`, in values.
    pub dy_step: usize,
    /// Number of groups.
    pub groups: usize,
}

impl<T: Operand> PanelPair<'_, T> {
    /// Computes dw += Σ source · dy for at most one tile of rows and `registers` registers of
    /// channels. `dw`: `[rows, registers · LANES]`.
    pub fn accumulate(&self, isa: &Isa, registers: usize, dw: &mut [f32]) {
        let cols = registers * isa.lanes;
        let Some(last) = self.groups.checked_sub(1) else { return };
        let rows = dw.len() / cols;
        // The bounds of every pointer below.
        assert!(last * self.source_step + isa.tile_rows * T::DEPTH <= self.source.len(), "rows lie in the source");
        assert!(last * self.dy_step + cols * T::DEPTH <= self.dy.len(), "gradients lie in dy");
        assert!(dw.len() == rows * cols && rows <= isa.tile_rows, "dw has its shape");
        let arguments = WeightGradTile {
            source: self.source.as_ptr(),
            source_step: self.source_step,
            dy: self.dy.as_ptr(),
            dy_step: self.dy_step,
            groups: self.groups,
            dw: dw.as_mut_ptr(),
            dw_step: cols,
            rows,
        };
        // SAFETY: the assertions above bound source, gradients and sums; an `Isa` exists only for
        // an instruction set of this processor.
        unsafe { T::weight_grad_tile(isa, registers)(&arguments) };
    }
}

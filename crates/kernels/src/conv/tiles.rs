//! What both algorithms share: blocks of channels, the layout of packed weights, and the loops around the two innermost ones
//! ([`crate::tile`]).

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::Shape;
use crate::{
    isa::Isa,
    tile::{Tile, WeightTile},
};

/// Blocks of channels: first channel, registers, channels that are real.
pub(super) fn blocks(isa: &Isa, channels: usize) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let lanes = isa.lanes;
    (0..channels).step_by(2 * lanes).map(move |first| {
        let cols = (channels - first).min(2 * lanes);
        (first, cols.div_ceil(lanes), cols)
    })
}

/// Weights block by block as the tiles read them: `[taps, channels of the source, NV · LANES]`, zeros where there is no channel. `w` is
/// `[c_out, c_in, k, k]`, of which `taps` names places in the kernel; `turned` where the source is dy.
pub(super) fn pack(isa: &Isa, s: &Shape, taps: &[usize], w: &[f32], turned: bool) -> Vec<f32> {
    let (sources, channels) = if turned { (s.c_out, s.c_in) } else { (s.c_in, s.c_out) };
    let kk = s.kernel * s.kernel;
    // From one source and from one channel to the next.
    let (by_source, by_channel) = if turned { (s.c_in * kk, kk) } else { (kk, s.c_in * kk) };
    let rows = taps.len() * sources;
    let mut packed = vec![0.0f32; rows * channels.next_multiple_of(isa.lanes)];
    let blocks: Vec<_> = blocks(isa, channels).collect();
    packed.par_chunks_mut(rows * 2 * isa.lanes).zip(blocks).for_each(|(packed, (first, registers, cols))| {
        let mut rows = packed.chunks_exact_mut(registers * isa.lanes);
        for tap in taps {
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

/// Blocks of `[k, k, c_in, NV · LANES]` → `[c_out, c_in, k, k]`.
pub(super) fn unpacked(isa: &Isa, s: &Shape, packed: &[f32]) -> Vec<f32> {
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

/// Some pixels and what they read.
#[derive(Clone, Copy)]
pub(super) struct Pixels<'a> {
    /// Where they read.
    pub source: &'a [f32],
    /// Where in `source` each pixel's window begins.
    pub base: &'a [u32],
    /// Where in a window each run of taps begins.
    pub taps: &'a [u32],
    /// Values of a run.
    pub run: usize,
}

impl Pixels<'_> {
    /// out[to + channel] = Σ over taps and runs of source · weight, for all channels, block by block of them; `weights` gives each block's,
    /// `[taps, run, NV · LANES]`. Every value of `out` in `to .. to + channels` is written.
    pub fn multiply<'w>(
        &self,
        isa: &Isa,
        channels: usize,
        weights: impl Iterator<Item = &'w [f32]>,
        to: &[u32],
        out: &mut [MaybeUninit<f32>],
    ) {
        let Pixels { source, base, taps, run } = *self;
        let (Some(most_base), Some(most_to), Some(most_tap)) = (base.iter().max(), to.iter().max(), taps.iter().max())
        else {
            return;
        };
        // The bounds of every pointer below.
        assert!(*most_base as usize + *most_tap as usize + run <= source.len(), "windows lie in the source");
        assert!(*most_to as usize + channels <= out.len() && base.len() == to.len(), "pixels lie in the destination");
        for ((first, registers, cols), block) in blocks(isa, channels).zip(weights) {
            assert!(block.len() == taps.len() * run * registers * isa.lanes, "a block of weights has its shape");
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
                    out: out[first..].as_mut_ptr().cast(),
                    to: tile_to.as_ptr(),
                    rows,
                    cols,
                };
                // SAFETY: the assertions above bound windows, pixels (`first + cols` is at most the channels) and the block; an instruction
                // set in the table is one of this processor.
                unsafe { (isa.tile[registers - 1])(&tile) };
            }
        }
    }
}

/// What a weight gradient sums over: some pixels of the output, their windows and their gradients.
#[derive(Clone, Copy)]
pub(super) struct Slopes<'a> {
    /// What the windows read. A tile reads whole rows of its own, past the end of the last run.
    pub source: &'a [f32],
    /// Where in `source` each pixel's window begins.
    pub base: &'a [u32],
    /// Gradients, `[pixels, step]`.
    pub dy: &'a [f32],
    /// Channels, up to whole registers.
    pub step: usize,
    /// Pixels whose values stay in the first-level cache while many rows of the weights use them.
    pub block: usize,
}

impl Slopes<'_> {
    /// dw += Σ source · dy for one tap and one block of channels: first channel, registers, channels. `dw`: `[run, registers · LANES]`.
    pub fn add(&self, isa: &Isa, tap: u32, run: usize, (first, registers, _): (usize, usize, usize), dw: &mut [f32]) {
        let Some(most) = self.base.iter().max() else { return };
        let cols = registers * isa.lanes;
        // The bounds of every pointer below.
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

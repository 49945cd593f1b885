//! What both algorithms share: blocks of channels, the layout of packed weights, and the loops around the two innermost ones
//! ([`crate::tile`]).

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::Shape;
use crate::{
    factor::Factor,
    isa::Isa,
    tile::{Column, WeightTile},
};

/// Sources whose weights are packed at a time.
const FEW: usize = 16;

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
        let wide = registers * isa.lanes;
        if turned {
            // A source's channels lie side by side.
            for source in 0..sources {
                let from = &w[source * by_source + first * by_channel..][..cols * kk];
                for (i, tap) in taps.iter().enumerate() {
                    let row = &mut packed[(i * sources + source) * wide..][..cols];
                    row.iter_mut().zip(from[*tap..].iter().step_by(kk)).for_each(|(to, v)| *to = *v);
                }
            }
            return;
        }
        // A channel's sources lie side by side. A few of them at a time: what is written for them stays in the first-level cache.
        for few in (0..sources).step_by(FEW) {
            for channel in 0..cols {
                let n = FEW.min(sources - few);
                let from = &w[few * by_source + (first + channel) * by_channel..][..n * kk];
                for (i, tap) in taps.iter().enumerate() {
                    let rows = packed[(i * sources + few) * wide + channel..].iter_mut().step_by(wide);
                    rows.zip(from[*tap..].iter().step_by(kk)).for_each(|(to, v)| *to = *v);
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

/// Where something begins, and the greatest of it, which bounds what is read or written there.
#[derive(Clone, Copy)]
pub(super) struct Offsets<'a> {
    values: &'a [u32],
    most: usize,
}

impl<'a> From<&'a [u32]> for Offsets<'a> {
    fn from(values: &'a [u32]) -> Self {
        Offsets { values, most: values.iter().max().map_or(0, |most| *most as usize) }
    }
}

/// Some pixels and what they read.
#[derive(Clone, Copy)]
pub(super) struct Pixels<'a, F> {
    /// Where they read.
    pub source: &'a [F],
    /// Where in `source` each pixel's window begins.
    pub base: Offsets<'a>,
    /// Where in a window each run of taps begins.
    pub taps: Offsets<'a>,
    /// Values of a run, a multiple of the depth.
    pub run: usize,
    /// Whether source and output come from and go to memory, not a cache.
    pub far: bool,
}

impl<F: Factor> Pixels<'_, F> {
    /// out[to + channel] = Σ over taps and runs of source · weight, for all channels, block by block of them; `weights` gives each block's,
    /// `[taps, run / DEPTH, NV · LANES, DEPTH]`. Every value of `out` in `to .. to + channels` is written.
    pub fn multiply<'w>(
        &self,
        isa: &Isa,
        channels: usize,
        weights: impl Iterator<Item = &'w [F]>,
        to: Offsets,
        out: &mut [MaybeUninit<f32>],
    ) where
        F: 'w,
    {
        let Pixels { source, base, taps, run, far } = *self;
        if base.values.is_empty() || taps.values.is_empty() {
            return;
        }
        // The bounds of every pointer below.
        assert!(base.most + taps.most + run <= source.len(), "windows lie in the source");
        assert!(to.most + channels <= out.len(), "pixels lie in the destination");
        assert!(base.values.len() == to.values.len(), "every pixel has a window");
        assert!(run.is_multiple_of(F::DEPTH), "a run is of whole lanes");
        for ((first, registers, cols), block) in blocks(isa, channels).zip(weights) {
            assert!(block.len() == taps.values.len() * run * registers * isa.lanes, "a block of weights has its shape");
            let column = Column {
                x: source.as_ptr(),
                base: base.values.as_ptr(),
                taps: taps.values.as_ptr(),
                n_taps: taps.values.len(),
                run,
                w: block.as_ptr(),
                out: out[first..].as_mut_ptr().cast(),
                to: to.values.as_ptr(),
                n: base.values.len(),
                cols,
                // The first block brings what it reads into the cache for all others.
                ahead: [far, far && first == 0 && taps.values.len() == 1],
            };
            // SAFETY: the assertions above bound windows, pixels (`first + cols` is at most the channels) and the block, and there is
            // a pixel; an instruction set in the table is one of this processor.
            unsafe { F::column(isa, registers)(&column) };
        }
    }
}

/// What a weight gradient sums over: some pixels, what they read, and their gradients.
#[derive(Clone, Copy)]
pub(super) struct Slopes<'a, F> {
    /// What they read, `[groups, source_step]`, from the first row on. A tile reads whole rows of its own, past the last one.
    pub source: &'a [F],
    /// Values a group of `source`.
    pub source_step: usize,
    /// Gradients, `[groups, step]`, from the first channel on.
    pub dy: &'a [F],
    /// Values a group of `dy`.
    pub step: usize,
    /// Groups: `DEPTH` pixels.
    pub n: usize,
}

impl<F: Factor> Slopes<'_, F> {
    /// dw += Σ source · dy for the rows of one tile at most, and `registers` registers of channels. `dw`: `[rows, registers · LANES]`.
    pub fn add(&self, isa: &Isa, registers: usize, dw: &mut [f32]) {
        let cols = registers * isa.lanes;
        let Some(last) = self.n.checked_sub(1) else { return };
        let rows = dw.len() / cols;
        // The bounds of every pointer below.
        assert!(last * self.source_step + isa.rows * F::DEPTH <= self.source.len(), "windows lie in the source");
        assert!(last * self.step + cols * F::DEPTH <= self.dy.len(), "gradients lie in dy");
        assert!(dw.len() == rows * cols && rows <= isa.rows, "dw has its shape");
        let tile = WeightTile {
            x: self.source.as_ptr(),
            x_step: self.source_step,
            dy: self.dy.as_ptr(),
            dy_step: self.step,
            n: self.n,
            dw: dw.as_mut_ptr(),
            dw_step: cols,
            rows,
        };
        // SAFETY: the assertions above bound windows and gradients; an instruction set in the table is one of this processor.
        unsafe { F::weight_tile(isa, registers)(&tile) };
    }
}

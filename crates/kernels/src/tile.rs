//! The two innermost loops of convolution, written once for all instruction sets.
//!
//! Both keep a block of sums in registers, a tile: `MR` rows by `NV` registers of channels. A row is an output pixel in [`column`] and an input
//! value in [`weight_tile`]; one value a row is broadcast, one or two registers of channels are loaded, and all are multiplied. What a value
//! is, [`Product`] says: an f32, or two bf16 whose products are added at once.

#![allow(clippy::needless_range_loop, reason = "blocks of registers are plainest by index")]

use std::array::from_fn;

use crate::{
    factor::Factor,
    isa::{Product, Simd},
};

/// A column of output: some pixels × a block of channels.
pub struct Column<F> {
    /// The source, with its margins.
    pub x: *const F,
    /// Where in `x` each pixel's window begins.
    pub base: *const u32,
    /// Where in a window each tap begins.
    pub taps: *const u32,
    /// Taps.
    pub n_taps: usize,
    /// Values that follow each other at a tap, a multiple of the depth.
    pub run: usize,
    /// Weights `[n_taps, run / DEPTH, NV · LANES, DEPTH]`.
    pub w: *const F,
    /// The output.
    pub out: *mut f32,
    /// Where in `out` each pixel's channels begin.
    pub to: *const u32,
    /// Pixels, at least 1.
    pub n: usize,
    /// Channels that are real, at most `NV · LANES`.
    pub cols: usize,
    /// Ask for the lines of later tiles: of what they write, and of what they read at the first tap.
    pub ahead: [bool; 2],
}

/// A block of a weight gradient: input values × channels, summed over pixels, `DEPTH` of them at a time (a group).
pub struct WeightTile<F> {
    /// The source `[groups, step]`, from the first row's value on; a row's values of a group lie side by side.
    pub x: *const F,
    /// Values a group of `x`.
    pub x_step: usize,
    /// The output's gradient `[groups, step]`, from the first channel on; likewise.
    pub dy: *const F,
    /// Values a group of `dy`.
    pub dy_step: usize,
    /// Groups of pixels.
    pub n: usize,
    /// Sums so far, `[rows, step]`; added to.
    pub dw: *mut f32,
    /// Values a row of `dw`.
    pub dw_step: usize,
    /// Rows that are real. The others may read what follows in `x` and are not stored.
    pub rows: usize,
}

/// Values of f32 in a cache line.
pub const LINE: usize = 16;

/// Tiles from the one that is written to the one whose lines are asked for.
pub const AHEAD: usize = 2;

/// Asks for a cache line that will soon be read, or written, where the processor cannot guess it. It changes nothing but the caches.
#[inline(always)]
pub fn fetch<const WRITE: bool>(line: *const impl Sized) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every processor of this kind has the instruction, and it takes any address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
        if WRITE {
            _mm_prefetch::<_MM_HINT_ET0>(line.cast())
        } else {
            _mm_prefetch::<_MM_HINT_T0>(line.cast())
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Σ over taps and runs of x · w, tile after tile of `MR` pixels.
///
/// # Safety
/// `base`, `to` hold `n` entries, `taps` `n_taps`; `x` holds `base + tap + run` values for each, `w` `n_taps · run · NV · LANES`, `out`
/// `to + cols` for each pixel; `n ≥ 1`; `run` is a multiple of the depth; `cols ≤ NV · LANES`; the processor has `P`.
#[inline(always)]
pub unsafe fn column<P: Product, const MR: usize, const NV: usize>(t: &Column<P::Factor>) {
    // SAFETY: the offsets are those that the contract bounds.
    unsafe {
        let mut first = 0;
        while first + MR <= t.n {
            some_pixels::<P, MR, NV, true>(t, first);
            first += MR;
        }
        if first < t.n {
            some_pixels::<P, MR, NV, false>(t, first);
        }
    }
}

/// One tile of a [`column`], from the pixel `first` on; `WHOLE` where `MR` of them are left.
///
/// # Safety
/// As of [`column`]; `first < n`, and `first + MR ≤ n` if `WHOLE`.
#[inline(always)]
unsafe fn some_pixels<P: Product, const MR: usize, const NV: usize, const WHOLE: bool>(
    t: &Column<P::Factor>,
    first: usize,
) {
    let (lanes, depth) = (P::Sum::LANES, P::Factor::DEPTH);
    // SAFETY: the offsets are those that the contract bounds.
    unsafe {
        let rows = if WHOLE { MR } else { t.n - first };
        // What is missing repeats the last pixel.
        let pixel: [usize; MR] = from_fn(|r| first + if WHOLE { r } else { r.min(rows - 1) });
        if t.ahead[0] {
            for r in 0..MR {
                let later = (first + AHEAD * MR + r).min(t.n - 1);
                fetch::<true>(t.out.add(*t.to.add(later) as usize).cast_const());
            }
        }
        if t.ahead[1] {
            for r in 0..MR {
                let later = (first + MR + r).min(t.n - 1);
                let row = t.x.add(*t.base.add(later) as usize);
                for line in (0..t.run).step_by(LINE * size_of::<f32>() / size_of::<P::Factor>()) {
                    fetch::<false>(row.add(line));
                }
            }
        }
        let mut sums = [[P::Sum::splat(0.0); NV]; MR];
        let window: [*const P::Factor; MR] = from_fn(|r| t.x.add(*t.base.add(pixel[r]) as usize));
        let mut w = t.w;
        for tap in 0..t.n_taps {
            let from = *t.taps.add(tap) as usize;
            for i in (from..from + t.run).step_by(depth) {
                let weights: [P::Register; NV] = from_fn(|v| P::factors(w.add(v * lanes * depth)));
                w = w.add(NV * lanes * depth);
                for r in 0..MR {
                    let x = P::spread(window[r].add(i));
                    for v in 0..NV {
                        sums[r][v] = P::dot(x, weights[v], sums[r][v]);
                    }
                }
            }
        }
        // Apart, so that the sums of a whole tile go from their registers to where they belong.
        if WHOLE && t.cols == NV * lanes {
            for r in 0..MR {
                let to = t.out.add(*t.to.add(pixel[r]) as usize);
                for v in 0..NV {
                    P::Sum::store(to.add(v * lanes), sums[r][v]);
                }
            }
            return;
        }
        // Two registers of the widest set.
        let mut row = [0.0f32; 32];
        for r in 0..rows {
            for v in 0..NV {
                P::Sum::store(row.as_mut_ptr().add(v * lanes), sums[r][v]);
            }
            std::ptr::copy_nonoverlapping(row.as_ptr(), t.out.add(*t.to.add(pixel[r]) as usize), t.cols);
        }
    }
}

/// dw += Σ over pixels of x · dy.
///
/// # Safety
/// `x` holds `(n − 1) · x_step + MR · DEPTH` values, `dy` `(n − 1) · dy_step + NV · LANES · DEPTH`, `dw`
/// `(rows − 1) · dw_step + NV · LANES`; `rows ≤ MR`; the processor has `P`.
#[inline(always)]
pub unsafe fn weight_tile<P: Product, const MR: usize, const NV: usize>(t: &WeightTile<P::Factor>) {
    let (lanes, depth) = (P::Sum::LANES, P::Factor::DEPTH);
    // SAFETY: the offsets are those that the contract bounds.
    unsafe {
        let mut sums = [[P::Sum::splat(0.0); NV]; MR];
        for r in 0..MR {
            if r < t.rows {
                for v in 0..NV {
                    sums[r][v] = P::Sum::load(t.dw.add(r * t.dw_step + v * lanes));
                }
            }
        }
        let (mut x, mut dy) = (t.x, t.dy);
        for _ in 0..t.n {
            let slopes: [P::Register; NV] = from_fn(|v| P::factors(dy.add(v * lanes * depth)));
            let row = x;
            (x, dy) = (x.wrapping_add(t.x_step), dy.wrapping_add(t.dy_step));
            for r in 0..MR {
                let x = P::spread(row.add(r * depth));
                for v in 0..NV {
                    sums[r][v] = P::dot(x, slopes[v], sums[r][v]);
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

/// Lays the `N` values at `at` behind each base side by side: a panel, or a part of one.
#[inline(always)]
pub fn lay<const N: usize>(from: &[f32], base: &[u32], at: usize, to: &mut [f32]) {
    for (base, to) in base.iter().zip(to.as_chunks_mut::<N>().0) {
        let from = &from[*base as usize + at..];
        *to = *from.first_chunk().expect("a window lies in its source");
    }
}

/// Lays `NV` registers of `LANES` at `at` of each pixel, of `step` values, side by side.
#[inline(always)]
pub fn lay_lines<const LANES: usize, const NV: usize>(from: &[f32], step: usize, at: usize, to: &mut [f32]) {
    for (from, to) in from.chunks_exact(step).zip(to.chunks_exact_mut(LANES * NV)) {
        // Arrays have a length that the compiler knows.
        let (from, to) = (from[at..at + LANES * NV].as_chunks::<LANES>().0, to.as_chunks_mut::<LANES>().0);
        to[..NV].copy_from_slice(&from[..NV]);
    }
}

/// Chains of [`fma_chains`]: more than latency times units of any processor, fewer than the registers.
pub const CHAINS: usize = 12;

/// `n` FMAs in each of [`CHAINS`] registers, by a factor that the compiler does not know.
///
/// # Safety
/// The processor has `S`.
#[inline(always)]
pub unsafe fn fma_chains<S: Simd>(n: usize, factor: f32) -> f32 {
    // SAFETY: the contract, and a buffer of the widest register.
    unsafe {
        let (a, b) = (S::splat(factor), S::splat(0.001));
        let mut sums = [S::splat(1.0); CHAINS];
        for _ in 0..n {
            for sum in &mut sums {
                *sum = S::fma(*sum, a, b);
            }
        }
        let mut out = [0.0f32; 16];
        let mut total = 0.0;
        for sum in sums {
            S::store(out.as_mut_ptr(), sum);
            total += out[0];
        }
        total
    }
}

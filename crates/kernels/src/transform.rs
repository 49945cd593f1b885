//! The fixed linear maps of Winograd's F(4x4, 3x3), applied to the rows and then to the columns of a tile, many channels at once.
//!
//! From the interpolation points 0, ±P, ±Q and ∞ by Toom and Cook's construction: with M(x) = x (x² − P²) (x² − Q²), a row of Bᵀ holds the
//! coefficients of M(x) / (x − a) for its point a, G has aʲ / N(a) with N(a) = ∏ over the other points of (a − b), and Aᵀ has aʲ; for ∞
//! they are M(x) itself and the highest coefficient. P = 3/4 and Q = 3/2 keep all numbers of like size, and P², Q² and their product and
//! sum are exact in f32.

#![allow(clippy::needless_range_loop, reason = "blocks of registers are plainest by index")]

use std::mem::MaybeUninit;

use crate::{
    factor::Bf16,
    isa::{Round, Simd},
};

/// Side of an output tile.
pub const TILE: usize = 4;

/// Side of the window that it reads.
pub const WINDOW: usize = 6;

/// Products of a tile and channel pair.
pub const PLANES: usize = WINDOW * WINDOW;

const P: f32 = 0.75;
const Q: f32 = 1.5;
const PP: f32 = P * P;
const QQ: f32 = Q * Q;

/// 1 / N of the points 0, ±P and ±Q.
const OF_0: f32 = 1.0 / (PP * QQ);
const OF_P: f32 = 1.0 / (2.0 * PP * (PP - QQ));
const OF_Q: f32 = 1.0 / (2.0 * QQ * (QQ - PP));

/// One tile and where it goes: places `from_step · (row, column)` and `to_step · (row, column)`, `n` channels at each.
pub struct Transform<'a, T> {
    /// Channels: values that follow each other at each place.
    pub n: usize,
    /// What is transformed, from its first place on that is inside.
    pub from: &'a [f32],
    /// From a row, and from a column, to the next.
    pub from_step: [usize; 2],
    /// Which places are inside `from`, where not all are; the others are zeros.
    pub inside: Option<Inside>,
    /// Where it goes; every place is written.
    pub to: &'a mut [MaybeUninit<T>],
    /// As `from_step`.
    pub to_step: [usize; 2],
}

/// Rows and columns of a tile that lie in a map; at least one of either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inside {
    /// First row, and the row after the last.
    pub rows: [usize; 2],
    /// The same of columns.
    pub cols: [usize; 2],
}

impl Inside {
    /// Of a square of this side whose first pixel is at (`y`, `x`) of a map of `h` x `w`, both moved by `lead`.
    pub fn of(side: usize, [y, x]: [usize; 2], lead: usize, [h, w]: [usize; 2]) -> Inside {
        let range = |at: usize, n: usize| [lead.saturating_sub(at), (n + lead - at).min(side)];
        Inside { rows: range(y, h), cols: range(x, w) }
    }
}

/// A compiled [`transform`] with its sides, from and to.
#[derive(Clone, Copy)]
pub struct Compiled<T> {
    /// The loop.
    pub run: unsafe fn(&mut Transform<T>),
    /// Side of what it reads.
    pub reads: usize,
    /// Side of what it writes.
    pub writes: usize,
    /// Values that a channel takes where it is written.
    pub wide: usize,
}

impl<T> Transform<'_, T> {
    /// Applies the map.
    pub fn run(mut self, map: Compiled<T>) {
        let whole = [0, map.reads];
        let Inside { rows, cols } = self.inside.unwrap_or(Inside { rows: whole, cols: whole });
        assert!([rows, cols].iter().all(|[from, to]| from < to && *to <= map.reads), "a part of a tile is inside");
        let reach = |rows: usize, cols: usize, step: [usize; 2], n| (rows - 1) * step[0] + (cols - 1) * step[1] + n;
        let read = reach(rows[1] - rows[0], cols[1] - cols[0], self.from_step, self.n);
        assert!(read <= self.from.len(), "a tile lies in its source");
        let written = reach(map.writes, map.writes, self.to_step, self.n * map.wide);
        assert!(written <= self.to.len(), "a tile lies in its destination");
        // SAFETY: the assertions bound both; an instruction set in the table is one of this processor.
        unsafe { (map.run)(&mut self) };
    }
}

/// A linear map of a row or a column of `N` registers to `M`.
pub trait Map<const N: usize, const M: usize> {
    /// The map.
    ///
    /// # Safety
    /// The processor has `S`.
    unsafe fn map<S: Simd>(x: [S::V; N]) -> [S::V; M];
}

/// Bᵀ: a window.
pub struct Window;
/// Aᵀ: products to output.
pub struct Output;
/// A: the output's gradient.
pub struct Slopes;
/// G: weights.
pub struct Filter;
/// Gᵀ: products to the weights' gradient.
pub struct FilterSlopes;

/// a · x + y by a constant.
#[inline(always)]
unsafe fn fma<S: Simd>(a: f32, x: S::V, y: S::V) -> S::V {
    // SAFETY of this and the maps: the contract.
    unsafe { S::fma(S::splat(a), x, y) }
}

/// a · x by a constant.
#[inline(always)]
unsafe fn by<S: Simd>(a: f32, x: S::V) -> S::V {
    unsafe { S::mul(S::splat(a), x) }
}

impl Map<6, 6> for Window {
    #[inline(always)]
    unsafe fn map<S: Simd>(x: [S::V; 6]) -> [S::V; 6] {
        unsafe {
            // Even and odd parts, shared by the points of either sign.
            let (even_p, odd_p) = (fma::<S>(-QQ, x[2], x[4]), by::<S>(P, fma::<S>(-QQ, x[1], x[3])));
            let (even_q, odd_q) = (fma::<S>(-PP, x[2], x[4]), by::<S>(Q, fma::<S>(-PP, x[1], x[3])));
            [
                fma::<S>(PP * QQ, x[0], fma::<S>(-(PP + QQ), x[2], x[4])),
                S::add(even_p, odd_p),
                S::sub(even_p, odd_p),
                S::add(even_q, odd_q),
                S::sub(even_q, odd_q),
                fma::<S>(PP * QQ, x[1], fma::<S>(-(PP + QQ), x[3], x[5])),
            ]
        }
    }
}

impl Map<6, 4> for Output {
    #[inline(always)]
    unsafe fn map<S: Simd>(m: [S::V; 6]) -> [S::V; 4] {
        unsafe {
            let (sum_p, apart_p) = (S::add(m[1], m[2]), S::sub(m[1], m[2]));
            let (sum_q, apart_q) = (S::add(m[3], m[4]), S::sub(m[3], m[4]));
            [
                S::add(m[0], S::add(sum_p, sum_q)),
                fma::<S>(P, apart_p, by::<S>(Q, apart_q)),
                fma::<S>(PP, sum_p, by::<S>(QQ, sum_q)),
                fma::<S>(P * PP, apart_p, fma::<S>(Q * QQ, apart_q, m[5])),
            ]
        }
    }
}

impl Map<4, 6> for Slopes {
    #[inline(always)]
    unsafe fn map<S: Simd>(y: [S::V; 4]) -> [S::V; 6] {
        unsafe {
            let (even_p, odd_p) = (fma::<S>(PP, y[2], y[0]), by::<S>(P, fma::<S>(PP, y[3], y[1])));
            let (even_q, odd_q) = (fma::<S>(QQ, y[2], y[0]), by::<S>(Q, fma::<S>(QQ, y[3], y[1])));
            [y[0], S::add(even_p, odd_p), S::sub(even_p, odd_p), S::add(even_q, odd_q), S::sub(even_q, odd_q), y[3]]
        }
    }
}

impl Map<3, 6> for Filter {
    #[inline(always)]
    unsafe fn map<S: Simd>(w: [S::V; 3]) -> [S::V; 6] {
        unsafe {
            let (even_p, odd_p) = (by::<S>(OF_P, fma::<S>(PP, w[2], w[0])), by::<S>(OF_P * P, w[1]));
            let (even_q, odd_q) = (by::<S>(OF_Q, fma::<S>(QQ, w[2], w[0])), by::<S>(OF_Q * Q, w[1]));
            [
                by::<S>(OF_0, w[0]),
                S::add(even_p, odd_p),
                S::sub(even_p, odd_p),
                S::add(even_q, odd_q),
                S::sub(even_q, odd_q),
                w[2],
            ]
        }
    }
}

impl Map<6, 3> for FilterSlopes {
    #[inline(always)]
    unsafe fn map<S: Simd>(u: [S::V; 6]) -> [S::V; 3] {
        unsafe {
            let (sum_p, apart_p) = (S::add(u[1], u[2]), S::sub(u[1], u[2]));
            let (sum_q, apart_q) = (S::add(u[3], u[4]), S::sub(u[3], u[4]));
            [
                fma::<S>(OF_0, u[0], fma::<S>(OF_P, sum_p, by::<S>(OF_Q, sum_q))),
                fma::<S>(OF_P * P, apart_p, by::<S>(OF_Q * Q, apart_q)),
                fma::<S>(OF_P * PP, sum_p, fma::<S>(OF_Q * QQ, sum_q, u[5])),
            ]
        }
    }
}

/// How a register of channels is written.
pub(crate) trait Write<S: Simd> {
    /// A value there.
    type To;
    /// Values that a channel takes.
    const WIDE: usize;
    /// Writes `LANES · WIDE` values.
    ///
    /// # Safety
    /// They lie there; the processor has `S`.
    unsafe fn write(to: *mut Self::To, value: S::V);
}

/// As it is.
pub struct Whole;
/// Rounded.
pub struct Half;
/// Rounded, as the first of a pair; the second is 0.
pub struct First;
/// Rounded, as the second of a pair whose first is there.
pub struct Second;

// SAFETY of all: the contract.
impl<S: Simd> Write<S> for Whole {
    type To = f32;
    const WIDE: usize = 1;
    #[inline(always)]
    unsafe fn write(to: *mut f32, value: S::V) {
        unsafe { S::store(to, value) }
    }
}

impl<S: Round> Write<S> for Half {
    type To = Bf16;
    const WIDE: usize = 1;
    #[inline(always)]
    unsafe fn write(to: *mut Bf16, value: S::V) {
        unsafe { S::half(to, value) }
    }
}

impl<S: Round> Write<S> for First {
    type To = Bf16;
    const WIDE: usize = 2;
    #[inline(always)]
    unsafe fn write(to: *mut Bf16, value: S::V) {
        unsafe { S::first(to, value) }
    }
}

impl<S: Round> Write<S> for Second {
    type To = Bf16;
    const WIDE: usize = 2;
    #[inline(always)]
    unsafe fn write(to: *mut Bf16, value: S::V) {
        unsafe { S::second(to, value) }
    }
}

/// A map on the rows, then on the columns, of `[N, N]` places of `t.n` channels.
///
/// # Safety
/// `from` holds `N − 1` steps either way, or those between the places that are inside, and `n` values, `to` `M − 1` steps and `n · WIDE`
/// values; the processor has `S`.
#[inline(always)]
pub(crate) unsafe fn transform<S, W, L, const N: usize, const M: usize>(t: &mut Transform<<W as Write<S>>::To>)
where
    S: Simd,
    W: Write<S> + Write<One, To = <W as Write<S>>::To>,
    L: Map<N, M>,
{
    // SAFETY: the contract.
    unsafe {
        match t.inside {
            None => all_channels::<S, W, L, N, M>(t, None),
            inside => all_channels::<S, W, L, N, M>(t, inside),
        }
    }
}

/// [`transform`]; `inside` apart, so that a whole tile has a loop without conditions.
#[inline(always)]
unsafe fn all_channels<S, W, L, const N: usize, const M: usize>(
    t: &mut Transform<<W as Write<S>>::To>,
    inside: Option<Inside>,
) where
    S: Simd,
    W: Write<S> + Write<One, To = <W as Write<S>>::To>,
    L: Map<N, M>,
{
    // SAFETY: the contract of `transform`; a single value a register at the end.
    unsafe {
        let mut at = 0;
        while at + S::LANES <= t.n {
            channels::<S, W, L, N, M>(t, inside, at);
            at += S::LANES;
        }
        while at < t.n {
            channels::<One, W, L, N, M>(t, inside, at);
            at += 1;
        }
    }
}

/// One register of channels.
#[inline(always)]
unsafe fn channels<S: Simd, W: Write<S>, L: Map<N, M>, const N: usize, const M: usize>(
    t: &mut Transform<W::To>,
    inside: Option<Inside>,
    at: usize,
) {
    // SAFETY: the contract of `transform`, with `at` and a register inside `n`.
    unsafe {
        let from = t.from.as_ptr().add(at);
        let to = t.to.as_mut_ptr().cast::<W::To>().add(at * W::WIDE);
        // Loops, not closures: a closure knows nothing of the instruction set, and its operations would become calls.
        let mut half = [[S::splat(0.0); M]; N];
        for i in 0..N {
            let mut row = [S::splat(0.0); N];
            match inside {
                None => {
                    for j in 0..N {
                        row[j] = S::load(from.add(i * t.from_step[0] + j * t.from_step[1]));
                    }
                }
                Some(Inside { rows, cols }) => {
                    // The map of a row of zeros is zeros.
                    if i < rows[0] || i >= rows[1] {
                        continue;
                    }
                    let from = from.add((i - rows[0]) * t.from_step[0]);
                    for j in 0..N {
                        if j >= cols[0] && j < cols[1] {
                            row[j] = S::load(from.add((j - cols[0]) * t.from_step[1]));
                        }
                    }
                }
            }
            half[i] = L::map::<S>(row);
        }
        for j in 0..M {
            let mut column = [S::splat(0.0); N];
            for i in 0..N {
                column[i] = half[i][j];
            }
            let column = L::map::<S>(column);
            for i in 0..M {
                W::write(to.add(i * t.to_step[0] + j * t.to_step[1]), column[i]);
            }
        }
    }
}

/// A register of one value.
#[derive(Clone, Copy)]
pub(crate) struct One;

// SAFETY of all: plain arithmetic; the pointers hold one value by the trait's contract.
impl Simd for One {
    type V = f32;
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn splat(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> f32 {
        unsafe { *from }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: f32) {
        unsafe { *to = value }
    }

    #[inline(always)]
    unsafe fn add(a: f32, b: f32) -> f32 {
        a + b
    }

    #[inline(always)]
    unsafe fn sub(a: f32, b: f32) -> f32 {
        a - b
    }

    #[inline(always)]
    unsafe fn mul(a: f32, b: f32) -> f32 {
        a * b
    }

    #[inline(always)]
    unsafe fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

// SAFETY of all: the pointers hold one value, or a pair, by the trait's contract.
impl Round for One {
    #[inline(always)]
    unsafe fn half(to: *mut Bf16, value: f32) {
        unsafe { *to = Bf16::round(value) }
    }

    #[inline(always)]
    unsafe fn first(to: *mut Bf16, value: f32) {
        unsafe { to.cast::<[Bf16; 2]>().write([Bf16::round(value), Bf16::default()]) }
    }

    #[inline(always)]
    unsafe fn second(to: *mut Bf16, value: f32) {
        unsafe { *to.add(1) = Bf16::round(value) }
    }
}

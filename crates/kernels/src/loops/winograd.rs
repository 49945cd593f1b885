//! The linear transforms of Winograd's F(4x4, 3x3), for many channels at once.
//!
//! Winograd's minimal filtering computes a tile of 4 x 4 outputs of a 3 x 3 convolution from a
//! window of 6 x 6 inputs with 36 products instead of 144: y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A. Each of
//! the five transforms below applies one of the fixed matrices, or its transpose, to the columns
//! and to the rows of a small square of places, where a place holds the values of all channels:
//!
//! | type | matrix | from | to |
//! | --- | --- | --- | --- |
//! | [`InputTransform`] | Bᵀ | window, 6 x 6 | planes, 6 x 6 |
//! | [`OutputTransform`] | Aᵀ | planes, 6 x 6 | output tile, 4 x 4 |
//! | [`OutputGradTransform`] | A | gradient of an output tile, 4 x 4 | planes, 6 x 6 |
//! | [`WeightTransform`] | G | kernel, 3 x 3 | planes, 6 x 6 |
//! | [`WeightGradTransform`] | Gᵀ | planes, 6 x 6 | gradient of the kernel, 3 x 3 |
//!
//! The pseudo code of [`transform`] with an `M` x `N` matrix T:
//!
//! ```text
//! for each register of channels:               # LANES at a time, the remainder one by one
//!     for each row i in 0..N:
//!         row[0..N] = load the places (i, 0..N) of the source, zeros outside the map
//!         half[i] = T · row                    # M registers
//!     for each column j in 0..M:
//!         column = T · (half[0][j], …, half[N − 1][j])
//!         store column[0..M] at the places (0..M, j) of the destination
//! ```
//!
//! Each T is written out as a few additions and FMAs; points of opposite sign share their even and
//! odd parts. The places of a row are a pixel apart and the places of a column a row of the map
//! apart, both given as steps, so sources are read where they are and planes are written where the
//! products read them.
//!
//! # The matrices
//!
//! They come from the interpolation points 0, ±P, ±Q and ∞ by Toom and Cook's construction. With
//! M(x) = x (x² − P²) (x² − Q²), a row of Bᵀ holds the coefficients of M(x) / (x − a) for its point
//! a. G has aʲ / N(a), where N(a) = ∏ (a − b) over the other points b. Aᵀ has aʲ. For ∞ they are
//! M(x) itself and the highest coefficient. P = 3/4 and Q = 3/2 keep all entries of similar
//! magnitude, and P², Q², their product and their sum are exact in f32.

#![allow(clippy::needless_range_loop, reason = "blocks of registers are plainest by index")]

use std::mem::MaybeUninit;

use crate::simd::{Bf16, Scalar, Simd, StoreBf16};

/// Side of an output tile, in pixels.
pub(crate) const TILE: usize = 4;

/// Side of the window that a tile reads, in pixels.
pub(crate) const WINDOW: usize = 6;

/// Number of products per tile and pair of channels.
pub(crate) const PLANES: usize = WINDOW * WINDOW;

const P: f32 = 0.75;
const Q: f32 = 1.5;
const PP: f32 = P * P;
const QQ: f32 = Q * Q;

/// 1 / N(a) of the points 0, ±P and ±Q.
const INV_N_0: f32 = 1.0 / (PP * QQ);
const INV_N_P: f32 = 1.0 / (2.0 * PP * (PP - QQ));
const INV_N_Q: f32 = 1.0 / (2.0 * QQ * (QQ - PP));

/// Arguments of [`transform`]: a square of places in the source and in the destination, with the
/// same channels at each place.
pub(crate) struct Transform<'a, T> {
    /// Number of channels: adjacent values at each place.
    pub channels: usize,
    /// The source, from its first place inside the map on.
    pub from: &'a [f32],
    /// Distance to the next row and to the next column in `from`, in values.
    pub from_step: [usize; 2],
    /// Places inside the map; `None` if all are. Places outside count as zeros.
    pub inside: Option<Inside>,
    /// The destination; every place is written.
    pub to: &'a mut [MaybeUninit<T>],
    /// Distance to the next row and to the next column in `to`, in values.
    pub to_step: [usize; 2],
}

/// Compiled [`transform`].
pub(crate) type TransformFn<T> = unsafe fn(t: &mut Transform<T>);

/// Rows and columns of a square that lie inside a map; at least one of either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inside {
    /// First row inside, and the row after the last.
    pub rows: [usize; 2],
    /// First column inside, and the column after the last.
    pub cols: [usize; 2],
}

impl Inside {
    /// Intersects an `h` x `w` map with a square of `side` pixels. The square's first pixel is at
    /// row `y` and column `x`, both shifted up and left by `lead`.
    pub fn new(side: usize, [y, x]: [usize; 2], lead: usize, [h, w]: [usize; 2]) -> Inside {
        let range = |at: usize, n: usize| [lead.saturating_sub(at), (n + lead - at).min(side)];
        Inside { rows: range(y, h), cols: range(x, w) }
    }
}

/// A fixed `M` x `N` matrix, applied to a row or a column of registers.
pub(crate) trait Matrix<const N: usize, const M: usize> {
    /// Multiplies the matrix by `x`.
    ///
    /// # Safety
    ///
    /// * The processor has `S`.
    unsafe fn apply<S: Simd>(x: [S::V; N]) -> [S::V; M];
}

/// Bᵀ: a window to planes.
pub(crate) struct InputTransform;
/// Aᵀ: planes to an output tile.
pub(crate) struct OutputTransform;
/// A: the gradient of an output tile to planes.
pub(crate) struct OutputGradTransform;
/// G: a kernel to planes.
pub(crate) struct WeightTransform;
/// Gᵀ: planes to the gradient of a kernel.
pub(crate) struct WeightGradTransform;

// SAFETY of the two functions and of the matrices: the processor has `S` by their contract.

/// a · x + y with a constant a.
#[inline(always)]
unsafe fn fma<S: Simd>(a: f32, x: S::V, y: S::V) -> S::V {
    unsafe { S::fma(S::splat(a), x, y) }
}

/// a · x with a constant a.
#[inline(always)]
unsafe fn scale<S: Simd>(a: f32, x: S::V) -> S::V {
    unsafe { S::mul(S::splat(a), x) }
}

impl Matrix<6, 6> for InputTransform {
    #[inline(always)]
    unsafe fn apply<S: Simd>(x: [S::V; 6]) -> [S::V; 6] {
        unsafe {
            // Even and odd parts, shared by the points of opposite sign.
            let (even_p, odd_p) = (fma::<S>(-QQ, x[2], x[4]), scale::<S>(P, fma::<S>(-QQ, x[1], x[3])));
            let (even_q, odd_q) = (fma::<S>(-PP, x[2], x[4]), scale::<S>(Q, fma::<S>(-PP, x[1], x[3])));
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

impl Matrix<6, 4> for OutputTransform {
    #[inline(always)]
    unsafe fn apply<S: Simd>(m: [S::V; 6]) -> [S::V; 4] {
        unsafe {
            let (sum_p, diff_p) = (S::add(m[1], m[2]), S::sub(m[1], m[2]));
            let (sum_q, diff_q) = (S::add(m[3], m[4]), S::sub(m[3], m[4]));
            [
                S::add(m[0], S::add(sum_p, sum_q)),
                fma::<S>(P, diff_p, scale::<S>(Q, diff_q)),
                fma::<S>(PP, sum_p, scale::<S>(QQ, sum_q)),
                fma::<S>(P * PP, diff_p, fma::<S>(Q * QQ, diff_q, m[5])),
            ]
        }
    }
}

impl Matrix<4, 6> for OutputGradTransform {
    #[inline(always)]
    unsafe fn apply<S: Simd>(y: [S::V; 4]) -> [S::V; 6] {
        unsafe {
            let (even_p, odd_p) = (fma::<S>(PP, y[2], y[0]), scale::<S>(P, fma::<S>(PP, y[3], y[1])));
            let (even_q, odd_q) = (fma::<S>(QQ, y[2], y[0]), scale::<S>(Q, fma::<S>(QQ, y[3], y[1])));
            [y[0], S::add(even_p, odd_p), S::sub(even_p, odd_p), S::add(even_q, odd_q), S::sub(even_q, odd_q), y[3]]
        }
    }
}

impl Matrix<3, 6> for WeightTransform {
    #[inline(always)]
    unsafe fn apply<S: Simd>(w: [S::V; 3]) -> [S::V; 6] {
        unsafe {
            let (even_p, odd_p) = (scale::<S>(INV_N_P, fma::<S>(PP, w[2], w[0])), scale::<S>(INV_N_P * P, w[1]));
            let (even_q, odd_q) = (scale::<S>(INV_N_Q, fma::<S>(QQ, w[2], w[0])), scale::<S>(INV_N_Q * Q, w[1]));
            [
                scale::<S>(INV_N_0, w[0]),
                S::add(even_p, odd_p),
                S::sub(even_p, odd_p),
                S::add(even_q, odd_q),
                S::sub(even_q, odd_q),
                w[2],
            ]
        }
    }
}

impl Matrix<6, 3> for WeightGradTransform {
    #[inline(always)]
    unsafe fn apply<S: Simd>(u: [S::V; 6]) -> [S::V; 3] {
        unsafe {
            let (sum_p, diff_p) = (S::add(u[1], u[2]), S::sub(u[1], u[2]));
            let (sum_q, diff_q) = (S::add(u[3], u[4]), S::sub(u[3], u[4]));
            [
                fma::<S>(INV_N_0, u[0], fma::<S>(INV_N_P, sum_p, scale::<S>(INV_N_Q, sum_q))),
                fma::<S>(INV_N_P * P, diff_p, scale::<S>(INV_N_Q * Q, diff_q)),
                fma::<S>(INV_N_P * PP, sum_p, fma::<S>(INV_N_Q * QQ, sum_q, u[5])),
            ]
        }
    }
}

/// Format in which a register of channels is stored.
pub(crate) trait Store<S: Simd> {
    /// Scalar type of the destination.
    type To;
    /// Number of values that a channel takes in the destination.
    const WIDTH: usize;
    /// Stores `LANES · WIDTH` values.
    ///
    /// # Safety
    ///
    /// * The processor has `S`.
    /// * `to` points to `LANES · WIDTH` values.
    unsafe fn store(to: *mut Self::To, value: S::V);
}

/// Stores f32 unchanged.
pub(crate) struct AsF32;
/// Stores bf16 side by side.
pub(crate) struct AsBf16;
/// Stores bf16 as the first of each pair, with 0 as the second.
pub(crate) struct AsPairFirst;
/// Stores bf16 as the second of each pair, whose first is already there.
pub(crate) struct AsPairSecond;

// SAFETY of the implementations: the contract is that of the called operation.

impl<S: Simd> Store<S> for AsF32 {
    type To = f32;
    const WIDTH: usize = 1;
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: S::V) {
        unsafe { S::store(to, value) }
    }
}

impl<S: StoreBf16> Store<S> for AsBf16 {
    type To = Bf16;
    const WIDTH: usize = 1;
    #[inline(always)]
    unsafe fn store(to: *mut Bf16, value: S::V) {
        unsafe { S::store_bf16(to, value) }
    }
}

impl<S: StoreBf16> Store<S> for AsPairFirst {
    type To = Bf16;
    const WIDTH: usize = 2;
    #[inline(always)]
    unsafe fn store(to: *mut Bf16, value: S::V) {
        unsafe { S::store_pair_first(to, value) }
    }
}

impl<S: StoreBf16> Store<S> for AsPairSecond {
    type To = Bf16;
    const WIDTH: usize = 2;
    #[inline(always)]
    unsafe fn store(to: *mut Bf16, value: S::V) {
        unsafe { S::store_pair_second(to, value) }
    }
}

/// Number of values from the first to the last of a square of `rows` x `cols` places, where a place
/// has `n` values.
#[inline(always)]
fn extent(rows: usize, cols: usize, step: [usize; 2], n: usize) -> usize {
    (rows - 1) * step[0] + (cols - 1) * step[1] + n
}

/// Applies the `M` x `N` matrix `T` to the rows and then to the columns of a square of places.
///
/// # Safety
///
/// * The processor has `S`.
/// * If `F` is [`AsPairSecond`], the destination's pairs have been written by [`AsPairFirst`].
///
/// # Panics
///
/// If the squares exceed `from` or `to`, or if no place is inside.
#[inline(always)]
pub(crate) unsafe fn transform<S, F, T, const N: usize, const M: usize>(t: &mut Transform<<F as Store<S>>::To>)
where
    S: Simd,
    F: Store<S> + Store<Scalar, To = <F as Store<S>>::To>,
    T: Matrix<N, M>,
{
    let Inside { rows, cols } = t.inside.unwrap_or(Inside { rows: [0, N], cols: [0, N] });
    assert!([rows, cols].iter().all(|[from, to]| from < to && *to <= N), "a part of a tile is inside");
    let read = extent(rows[1] - rows[0], cols[1] - cols[0], t.from_step, t.channels);
    assert!(read <= t.from.len(), "a tile lies in its source");
    let written = extent(M, M, t.to_step, t.channels * <F as Store<S>>::WIDTH);
    assert!(written <= t.to.len(), "a tile lies in its destination");
    // SAFETY: the assertions bound all places of both squares.
    unsafe {
        match t.inside {
            None => all_channels::<S, F, T, N, M>(t, None),
            inside => all_channels::<S, F, T, N, M>(t, inside),
        }
    }
}

/// Body of [`transform`]. `inside` is an argument of its own so that for a whole tile, where it is
/// the constant `None`, the loop is compiled without conditions.
///
/// # Safety
///
/// * As for [`transform`].
/// * All places lie in their slices.
#[inline(always)]
unsafe fn all_channels<S, F, T, const N: usize, const M: usize>(
    t: &mut Transform<<F as Store<S>>::To>,
    inside: Option<Inside>,
) where
    S: Simd,
    F: Store<S> + Store<Scalar, To = <F as Store<S>>::To>,
    T: Matrix<N, M>,
{
    // SAFETY: each register lies in the channels; a `Scalar` register is a single value.
    unsafe {
        let mut channel = 0;
        while channel + S::LANES <= t.channels {
            register::<S, F, T, N, M>(t, inside, channel);
            channel += S::LANES;
        }
        while channel < t.channels {
            register::<Scalar, F, T, N, M>(t, inside, channel);
            channel += 1;
        }
    }
}

/// Transforms one register of channels.
///
/// # Safety
///
/// * As for [`all_channels`].
/// * `channel + LANES` is at most `channels`.
#[inline(always)]
unsafe fn register<S: Simd, F: Store<S>, T: Matrix<N, M>, const N: usize, const M: usize>(
    t: &mut Transform<F::To>,
    inside: Option<Inside>,
    channel: usize,
) {
    // SAFETY: all places lie in their slices, and the register lies in each place.
    unsafe {
        let from = t.from.as_ptr().add(channel);
        let to = t.to.as_mut_ptr().cast::<F::To>().add(channel * F::WIDTH);
        // Loops, not closures: a closure does not have the target features of the instruction set,
        // and its vector operations would become calls.
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
                    // The transform of a row of zeros is zeros.
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
            half[i] = T::apply::<S>(row);
        }
        for j in 0..M {
            let mut column = [S::splat(0.0); N];
            for i in 0..N {
                column[i] = half[i][j];
            }
            let column = T::apply::<S>(column);
            for i in 0..M {
                F::store(to.add(i * t.to_step[0] + j * t.to_step[1]), column[i]);
            }
        }
    }
}

//! Instruction sets: one file each, behind one table that is chosen once a process.
//!
//! The loops are written once, in [`super::tile`] and [`super::norm`]; a file here says how many lanes and registers there are, what the few
//! vector operations are called, and compiles the loops with its instructions enabled. To add an instruction set, add a file and name
//! it in [`available`].

use std::{fmt, mem::MaybeUninit, sync::OnceLock};

use crate::{
    factor::{Bf16, Factor},
    norm, pool,
    tile::{Column, WeightTile},
    transform::Compiled,
    update::{Adam, Momentum, Part},
};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

/// The vector operations of an instruction set.
///
/// # Safety
/// All functions need the instruction set. `load` and `store` touch `LANES` values from the pointer on.
pub(crate) trait Simd: Copy {
    /// A register.
    type V: Copy;
    /// Values a register.
    const LANES: usize;
    /// The same value in all lanes.
    unsafe fn splat(value: f32) -> Self::V;
    /// From memory, of any alignment.
    unsafe fn load(from: *const f32) -> Self::V;
    /// To memory, of any alignment.
    unsafe fn store(to: *mut f32, value: Self::V);
    /// a + b.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a − b.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a · b.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

/// How two factors multiply into a register of sums.
///
/// # Safety
/// All functions need the instruction set. `factors` touches `LANES · DEPTH` of them from the pointer on, `spread` `DEPTH`.
pub(crate) trait Product: Copy {
    /// The sums.
    type Sum: Simd;
    /// The factors.
    type Factor: Factor;
    /// A register of factors.
    type Register: Copy;
    /// The same `DEPTH` factors in all lanes.
    unsafe fn spread(from: *const Self::Factor) -> Self::Register;
    /// From memory, of any alignment.
    unsafe fn factors(from: *const Self::Factor) -> Self::Register;
    /// sum + a · b, over the depth of a lane.
    unsafe fn dot(a: Self::Register, b: Self::Register, sum: <Self::Sum as Simd>::V) -> <Self::Sum as Simd>::V;
}

// SAFETY of all: the contract, which is that of `Simd`.
impl<S: Simd> Product for S {
    type Sum = S;
    type Factor = f32;
    type Register = S::V;

    #[inline(always)]
    unsafe fn spread(from: *const f32) -> S::V {
        unsafe { S::splat(*from) }
    }

    #[inline(always)]
    unsafe fn factors(from: *const f32) -> S::V {
        unsafe { S::load(from) }
    }

    #[inline(always)]
    unsafe fn dot(a: S::V, b: S::V, sum: S::V) -> S::V {
        unsafe { S::fma(a, b, sum) }
    }
}

/// Registers of f32 written as bf16.
///
/// # Safety
/// All functions need the instruction set. `half` touches `LANES` values from the pointer on, the others `LANES` pairs.
pub(crate) trait Round: Simd {
    /// Side by side.
    unsafe fn half(to: *mut Bf16, value: Self::V);
    /// As the first of pairs; the second is 0.
    unsafe fn first(to: *mut Bf16, value: Self::V);
    /// As the second of pairs, whose first are there.
    unsafe fn second(to: *mut Bf16, value: Self::V);
}

/// Values, origin, sums, sums of squares.
type MomentsLoop = unsafe fn(&[f32], &[f32], &mut [f32], &mut [f32]);

/// Gradient, sums for γ, sums for β, where to keep what passed.
type SumsLoop = unsafe fn(norm::Pass, &mut [f32], &mut [f32], Option<&mut [MaybeUninit<f32>]>);

/// Shift, skip, whether ReLU, values.
type ShiftActLoop = unsafe fn(&[f32], Option<&[f32]>, bool, &mut [f32]);

/// Values, of a pixel, where in a pixel, the panel.
type LayLines = unsafe fn(&[f32], usize, usize, &mut [f32]);

/// Windows, an image, row of the result, the row.
type MaxRow = unsafe fn(&pool::Windows, &[f32], usize, &mut [MaybeUninit<f32>]);

/// Windows, an image, its result and the result's gradient, its gradient.
type MaxBackward = unsafe fn(&pool::Windows, &[f32], [&[f32]; 2], &mut [f32]);

/// The kernels of one instruction set.
pub struct Isa {
    /// As `BYOL_ISA` names it.
    pub name: &'static str,
    /// Values a register.
    pub(crate) lanes: usize,
    /// Output pixels a tile of the convolution.
    pub(crate) pixels: usize,
    /// Rows a tile of the weight gradient.
    pub(crate) rows: usize,
    /// A column of one and of two registers of channels.
    pub(crate) column: [unsafe fn(&Column<f32>); 2],
    /// The same for the weight gradient.
    pub(crate) weight_tile: [unsafe fn(&WeightTile<f32>); 2],
    /// What multiplies bf16 instead, in the tables that do.
    pub(crate) halves: Option<Halves>,
    /// Lays panels as the weight gradient reads them: of windows, and of one and of two registers of channels.
    pub(crate) lay: unsafe fn(&[f32], &[u32], usize, &mut [f32]),
    pub(crate) lay_lines: [LayLines; 2],
    /// Winograd's maps: a window, its output, the output's gradient, weights, the weights' gradient.
    pub(crate) window: Compiled<f32>,
    pub(crate) output: Compiled<f32>,
    pub(crate) slopes: Compiled<f32>,
    pub(crate) filter: Compiled<f32>,
    pub(crate) filter_slopes: Compiled<f32>,
    /// Independent chains of FMAs: how fast the processor is at most.
    pub(crate) fma_chains: unsafe fn(usize, f32) -> f32,
    /// [`norm`]'s loops.
    pub(crate) moments: MomentsLoop,
    pub(crate) affine_act: unsafe fn(norm::Affine, &mut [MaybeUninit<f32>]),
    pub(crate) shift_act: ShiftActLoop,
    pub(crate) sums: SumsLoop,
    pub(crate) by_y: unsafe fn(norm::Pass, norm::Slope, &mut [MaybeUninit<f32>]),
    pub(crate) by_y_in_place: unsafe fn(norm::Pass, norm::Slope, &mut [f32]),
    /// [`pool`]'s loops.
    pub(crate) max_row: MaxRow,
    pub(crate) max_backward: MaxBackward,
    /// [`crate::update`]'s loops.
    pub(crate) squares: unsafe fn(&[f32], &[f32], f32) -> [f32; 2],
    pub(crate) momentum: unsafe fn(Part, Momentum),
    pub(crate) adam: unsafe fn(Part, Adam),
}

/// Products of bf16 with sums of f32.
pub(crate) struct Halves {
    /// As [`Isa::column`].
    pub column: [unsafe fn(&Column<Bf16>); 2],
    /// As [`Isa::weight_tile`].
    pub weight_tile: [unsafe fn(&WeightTile<Bf16>); 2],
    /// [`crate::factor::round_loop`].
    pub round: unsafe fn(&[f32], &mut [Bf16]),
    /// [`crate::factor::pair_loop`].
    pub pair: unsafe fn(&[f32], usize, &mut [Bf16]),
    /// Winograd's maps, rounded: a window, and windows and output gradients in pairs.
    pub window: Compiled<Bf16>,
    pub window_pairs: [Compiled<Bf16>; 2],
    pub slope_pairs: [Compiled<Bf16>; 2],
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// An instruction set that was asked for is not here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("BYOL_ISA={asked}, but this processor has {}; unset it or name one of these", .have.join(", "))]
pub struct Missing {
    /// The value of `BYOL_ISA`.
    pub asked: String,
    /// What there is.
    pub have: Vec<&'static str>,
}

/// What this processor can run, the widest first.
pub fn available() -> Vec<&'static Isa> {
    let mut all = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            all.push(&avx512::ISA);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(&avx2::ISA);
        }
    }
    #[cfg(target_arch = "aarch64")]
    all.push(&neon::ISA);
    all.push(&portable::ISA);
    all
}

/// The instruction set of this process: what `BYOL_ISA` names, else the widest.
///
/// # Errors
/// [`Missing`] if `BYOL_ISA` names one that is not here.
pub fn choose() -> Result<&'static Isa, Missing> {
    static CHOSEN: OnceLock<Result<&'static Isa, Missing>> = OnceLock::new();
    let pick = || {
        let all = available();
        match std::env::var("BYOL_ISA") {
            Err(_) => Ok(all[0]),
            Ok(asked) => all
                .iter()
                .copied()
                .find(|isa| isa.name == asked)
                .ok_or_else(|| Missing { asked, have: all.iter().map(|isa| isa.name).collect() }),
        }
    };
    CHOSEN.get_or_init(pick).clone()
}

/// The tables that multiply bf16: convolutions round their factors to it, sum in f32, and take and give f32 as all others do.
pub fn available_halves() -> Vec<&'static Isa> {
    available().into_iter().filter_map(halves_of).collect()
}

/// The same instruction set with products of bf16, if the processor has them.
pub fn halves_of(isa: &Isa) -> Option<&'static Isa> {
    match isa.name {
        #[cfg(target_arch = "x86_64")]
        "avx512" if is_x86_feature_detected!("avx512bf16") => Some(&avx512::HALVES),
        // For tests: it is slower than f32.
        "portable" => Some(&portable::HALVES),
        _ => None,
    }
}

/// [`choose`] where the choice was checked before.
///
/// # Panics
/// If `BYOL_ISA` names an instruction set that is not here.
pub fn chosen() -> &'static Isa {
    choose().unwrap_or_else(|missing| panic!("{missing}"))
}

/// Compiles the generic loops for one instruction set: its name, its operations, tile heights and target features.
macro_rules! isa {
    ($name:literal, $simd:ty, pixels $pixels:literal, rows $rows:literal, $(#[$feature:meta])?) => {
        use std::mem::MaybeUninit;

        use crate::{
            isa::{Isa, Simd},
            norm, pool,
            tile::{self, Column, WeightTile},
            transform::{self, Compiled, Map, Transform},
            update::{self, Adam, Momentum, Part},
        };

        $(#[$feature])?
        unsafe fn column<const NV: usize>(t: &Column<f32>) {
            // SAFETY: the caller's.
            unsafe { tile::column::<$simd, $pixels, NV>(t) }
        }

        $(#[$feature])?
        unsafe fn weight_tile<const NV: usize>(t: &WeightTile<f32>) {
            // SAFETY: the caller's.
            unsafe { tile::weight_tile::<$simd, $rows, NV>(t) }
        }

        $(#[$feature])?
        unsafe fn lay(from: &[f32], base: &[u32], at: usize, to: &mut [f32]) {
            tile::lay::<$rows>(from, base, at, to);
        }

        $(#[$feature])?
        unsafe fn lay_lines<const NV: usize>(from: &[f32], step: usize, at: usize, to: &mut [f32]) {
            tile::lay_lines::<{ <$simd as Simd>::LANES }, NV>(from, step, at, to);
        }

        $(#[$feature])?
        unsafe fn transform<L: Map<N, M>, const N: usize, const M: usize>(t: &mut Transform<f32>) {
            // SAFETY: the caller's.
            unsafe { transform::transform::<$simd, transform::Whole, L, N, M>(t) }
        }

        $(#[$feature])?
        unsafe fn fma_chains(n: usize, factor: f32) -> f32 {
            // SAFETY: the caller's.
            unsafe { tile::fma_chains::<$simd>(n, factor) }
        }

        $(#[$feature])?
        unsafe fn moments(y: &[f32], origin: &[f32], sum: &mut [f32], squares: &mut [f32]) {
            norm::moments_loop(y, origin, sum, squares);
        }

        $(#[$feature])?
        unsafe fn affine_act(a: norm::Affine, out: &mut [MaybeUninit<f32>]) {
            norm::affine_act_loop(a, out);
        }

        $(#[$feature])?
        unsafe fn shift_act(shift: &[f32], skip: Option<&[f32]>, relu: bool, y: &mut [f32]) {
            norm::shift_act_loop(shift, skip, relu, y);
        }

        $(#[$feature])?
        unsafe fn sums(p: norm::Pass, of_gamma: &mut [f32], of_beta: &mut [f32], g: Option<&mut [MaybeUninit<f32>]>) {
            norm::sums_loop(p, of_gamma, of_beta, g);
        }

        $(#[$feature])?
        unsafe fn by_y(p: norm::Pass, s: norm::Slope, dy: &mut [MaybeUninit<f32>]) {
            norm::by_y_loop(p, s, dy);
        }

        $(#[$feature])?
        unsafe fn by_y_in_place(p: norm::Pass, s: norm::Slope, g: &mut [f32]) {
            norm::by_y_in_place_loop(p, s, g);
        }

        $(#[$feature])?
        unsafe fn max_row(s: &pool::Windows, x: &[f32], y: usize, out: &mut [MaybeUninit<f32>]) {
            pool::max_row(s, x, y, out);
        }

        $(#[$feature])?
        unsafe fn max_backward(s: &pool::Windows, x: &[f32], out: [&[f32]; 2], dx: &mut [f32]) {
            pool::max_backward_loop(s, x, out, dx);
        }

        $(#[$feature])?
        unsafe fn squares(w: &[f32], g: &[f32], decay: f32) -> [f32; 2] {
            update::squares_loop(w, g, decay)
        }

        $(#[$feature])?
        unsafe fn momentum(p: Part, by: Momentum) {
            update::momentum_loop(p, by);
        }

        $(#[$feature])?
        unsafe fn adam(p: Part, by: Adam) {
            update::adam_loop(p, by);
        }

        const TABLE: Isa = Isa {
            name: $name,
            lanes: <$simd as Simd>::LANES,
            pixels: $pixels,
            rows: $rows,
            column: [column::<1>, column::<2>],
            weight_tile: [weight_tile::<1>, weight_tile::<2>],
            halves: None,
            lay,
            lay_lines: [lay_lines::<1>, lay_lines::<2>],
            window: Compiled { run: transform::<transform::Window, 6, 6>, reads: 6, writes: 6, wide: 1 },
            output: Compiled { run: transform::<transform::Output, 6, 4>, reads: 6, writes: 4, wide: 1 },
            slopes: Compiled { run: transform::<transform::Slopes, 4, 6>, reads: 4, writes: 6, wide: 1 },
            filter: Compiled { run: transform::<transform::Filter, 3, 6>, reads: 3, writes: 6, wide: 1 },
            filter_slopes: Compiled { run: transform::<transform::FilterSlopes, 6, 3>, reads: 6, writes: 3, wide: 1 },
            fma_chains,
            moments,
            affine_act,
            shift_act,
            sums,
            by_y,
            by_y_in_place,
            max_row,
            max_backward,
            squares,
            momentum,
            adam,
        };

        /// The table.
        pub static ISA: Isa = TABLE;
    };
}
use isa;

/// Compiles the loops that multiply bf16 as well, beside [`isa`]: name, products, tile heights as there, target features.
macro_rules! halves {
    ($name:literal, $simd:ty, $product:ty, pixels $pixels:literal, rows $rows:literal, $(#[$feature:meta])?) => {
        use crate::{
            factor::{self, Bf16},
            isa::{Halves, Product, Round},
        };

        $(#[$feature])?
        unsafe fn column_of_halves<const NV: usize>(t: &Column<Bf16>) {
            // SAFETY: the caller's.
            unsafe { tile::column::<$product, $pixels, NV>(t) }
        }

        $(#[$feature])?
        unsafe fn weight_tile_of_halves<const NV: usize>(t: &WeightTile<Bf16>) {
            // SAFETY: the caller's.
            unsafe { tile::weight_tile::<$product, $rows, NV>(t) }
        }

        $(#[$feature])?
        unsafe fn round(from: &[f32], to: &mut [Bf16]) {
            factor::round_loop(from, to);
        }

        $(#[$feature])?
        unsafe fn pair(from: &[f32], width: usize, to: &mut [Bf16]) {
            factor::pair_loop(from, width, to);
        }

        $(#[$feature])?
        unsafe fn rounded<W, L: Map<N, 6>, const N: usize>(t: &mut Transform<Bf16>)
        where
            W: transform::Write<$simd, To = Bf16> + transform::Write<transform::One, To = Bf16>,
        {
            // SAFETY: the caller's.
            unsafe { transform::transform::<$simd, W, L, N, 6>(t) }
        }

        /// The table with products of bf16.
        pub static HALVES: Isa = Isa {
            name: $name,
            halves: Some(Halves {
                column: [column_of_halves::<1>, column_of_halves::<2>],
                weight_tile: [weight_tile_of_halves::<1>, weight_tile_of_halves::<2>],
                round,
                pair,
                window: Compiled { run: rounded::<transform::Half, transform::Window, 6>, reads: 6, writes: 6, wide: 1 },
                window_pairs: [
                    Compiled { run: rounded::<transform::First, transform::Window, 6>, reads: 6, writes: 6, wide: 2 },
                    Compiled { run: rounded::<transform::Second, transform::Window, 6>, reads: 6, writes: 6, wide: 2 },
                ],
                slope_pairs: [
                    Compiled { run: rounded::<transform::First, transform::Slopes, 4>, reads: 4, writes: 6, wide: 2 },
                    Compiled { run: rounded::<transform::Second, transform::Slopes, 4>, reads: 4, writes: 6, wide: 2 },
                ],
            }),
            ..TABLE
        };
    };
}
use halves;

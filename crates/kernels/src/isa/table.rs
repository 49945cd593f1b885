//! The dispatch table, and the macros that compile it for an instruction set.
//!
//! The loops are listed once, in `for_each_f32_loop` and `for_each_bf16_loop`: name, signature, and
//! the generic loop behind it. From the list, `declare_*` makes a struct of function pointers, and
//! `compile_*` makes a value of that struct whose functions have an instruction set's target
//! features. A new loop is one more line in the list.
//!
//! In the generic arguments of the list, `V` is the instruction set's [`Simd`](crate::simd::Simd),
//! `B` its [`Product`](crate::simd::Product) of bf16, and `PIXELS` and `ROWS` are the heights of
//! its tiles. A suffix `_x1` or `_x2` is the number of registers of channels.

use std::{fmt, mem::MaybeUninit};

use crate::{
    loops::{block, matrix, norm, optimizer_step, pool, tile, winograd},
    simd::Bf16,
};

/// The loops over f32.
macro_rules! for_each_f32_loop {
    ($callback:ident $args:tt) => {
        $crate::isa::table::$callback! {
            $args

            // Convolution.

            /// Output of a convolution for a block of channels.
            output_block_x1(block: &tile::OutputBlock<f32>) = tile::output_block::<V, PIXELS, 1>;
            output_block_x2(block: &tile::OutputBlock<f32>) = tile::output_block::<V, PIXELS, 2>;
            /// One tile of a weight gradient.
            weight_grad_tile_x1(tile: &tile::WeightGradTile<f32>) = tile::weight_grad_tile::<V, ROWS, 1>;
            weight_grad_tile_x2(tile: &tile::WeightGradTile<f32>) = tile::weight_grad_tile::<V, ROWS, 2>;
            /// Packing of a panel of windows, as high as a tile of the weight gradient.
            pack_windows(from: &[f32], window_offsets: &[u32], offset: usize, to: &mut [f32]) =
                pack::pack_windows::<ROWS>;
            /// Packing of a panel of channels of pixel rows.
            pack_rows_x1(from: &[f32], channels: usize, channel: usize, to: &mut [f32]) =
                pack::pack_rows::<{ V::LANES }, 1>;
            pack_rows_x2(from: &[f32], channels: usize, channel: usize, to: &mut [f32]) =
                pack::pack_rows::<{ V::LANES }, 2>;

            // Winograd's transforms.

            input_transform(t: &mut winograd::Transform<f32>) =
                winograd::transform::<V, winograd::AsF32, winograd::InputTransform, 6, 6>;
            output_transform(t: &mut winograd::Transform<f32>) =
                winograd::transform::<V, winograd::AsF32, winograd::OutputTransform, 6, 4>;
            output_grad_transform(t: &mut winograd::Transform<f32>) =
                winograd::transform::<V, winograd::AsF32, winograd::OutputGradTransform, 4, 6>;
            weight_transform(t: &mut winograd::Transform<f32>) =
                winograd::transform::<V, winograd::AsF32, winograd::WeightTransform, 3, 6>;
            weight_grad_transform(t: &mut winograd::Transform<f32>) =
                winograd::transform::<V, winograd::AsF32, winograd::WeightGradTransform, 6, 3>;

            // Batch norm.

            norm_moments(y: &[f32], origin: &[f32], sums: &mut [f32], squares: &mut [f32]) = norm::moments;
            affine_act(rows: norm::AffineRows<f32>, out: &mut [MaybeUninit<f32>]) = norm::affine_act;
            affine_act_bf16(rows: norm::AffineRows<Bf16>, out: &mut [MaybeUninit<Bf16>]) = norm::affine_act;
            shift_act(shift: &[f32], skip: Option<&[f32]>, relu: bool, y: &mut [f32]) = norm::shift_act;
            norm_grad_sums(
                rows: norm::BackwardRows<f32>,
                gamma_sums: &mut [f32],
                beta_sums: &mut [f32],
                masked_grad: Option<&mut [MaybeUninit<f32>]>
            ) = norm::grad_sums::<V, f32>;
            norm_grad_sums_bf16(
                rows: norm::BackwardRows<Bf16>,
                gamma_sums: &mut [f32],
                beta_sums: &mut [f32],
                masked_grad: Option<&mut [MaybeUninit<Bf16>]>
            ) = norm::grad_sums::<V, Bf16>;
            norm_input_grad(
                rows: norm::BackwardRows<f32>,
                by: norm::NormGradCoefficients,
                dy: &mut [MaybeUninit<f32>]
            ) = norm::input_grad;
            norm_input_grad_bf16(
                rows: norm::BackwardRows<Bf16>,
                by: norm::NormGradCoefficients,
                dy: &mut [MaybeUninit<Bf16>]
            ) = norm::input_grad;
            norm_input_grad_in_place(
                rows: norm::BackwardRows<f32>,
                by: norm::NormGradCoefficients,
                grad: &mut [f32]
            ) = norm::input_grad_in_place;

            // Pooling.

            max_pool_row(s: &pool::PoolShape, x: &[f32], y: usize, out: &mut [MaybeUninit<f32>]) = pool::max_row;
            max_pool_row_bf16(s: &pool::PoolShape, x: &[Bf16], y: usize, out: &mut [MaybeUninit<Bf16>]) =
                pool::max_row;
            max_pool_backward(s: &pool::PoolShape, x: &[f32], out: &[f32], dout: &[f32], dx: &mut [f32]) =
                pool::max_backward;
            max_pool_backward_bf16(s: &pool::PoolShape, x: &[Bf16], out: &[Bf16], dout: &[f32], dx: &mut [f32]) =
                pool::max_backward;

            // Storage.

            widen(from: &[Bf16], to: &mut [MaybeUninit<f32>]) = bf16::widen;
            narrow(from: &[f32], to: &mut [MaybeUninit<Bf16>]) = bf16::narrow;

            // Optimizer steps.

            squared_norms(w: &[f32], g: &[f32], weight_decay: f32) -> [f32; 2] = optimizer_step::squared_norms;
            momentum_step(part: optimizer_step::StepPart, by: optimizer_step::Momentum) = optimizer_step::momentum;
            adam_step(part: optimizer_step::StepPart, by: optimizer_step::Adam) = optimizer_step::adam;
            /// Moving average of the target network.
            ema(xi: &[f32], theta: &[f32], rate: f32, to: &mut [MaybeUninit<f32>]) = optimizer_step::ema;

            // Benchmark.

            fma_chains(n: usize, factor: f32) -> f32 = roofline::fma_chains::<V>;
        }
    };
}
pub(super) use for_each_f32_loop;

/// The loops over bf16 operands.
macro_rules! for_each_bf16_loop {
    ($callback:ident $args:tt) => {
        $crate::isa::table::$callback! {
            $args

            output_block_x1(block: &tile::OutputBlock<Bf16>) = tile::output_block::<B, PIXELS, 1>;
            output_block_x2(block: &tile::OutputBlock<Bf16>) = tile::output_block::<B, PIXELS, 2>;
            weight_grad_tile_x1(tile: &tile::WeightGradTile<Bf16>) = tile::weight_grad_tile::<B, ROWS, 1>;
            weight_grad_tile_x2(tile: &tile::WeightGradTile<Bf16>) = tile::weight_grad_tile::<B, ROWS, 2>;
            round(from: &[f32], to: &mut [Bf16]) = bf16::round;
            interleave_pairs(from: &[f32], width: usize, to: &mut [Bf16]) = bf16::interleave_pairs;
            input_transform(t: &mut winograd::Transform<Bf16>) =
                winograd::transform::<V, winograd::AsBf16, winograd::InputTransform, 6, 6>;
            /// Transform of the first window of a pair of tiles.
            input_transform_first(t: &mut winograd::Transform<Bf16>) =
                winograd::transform::<V, winograd::AsPairFirst, winograd::InputTransform, 6, 6>;
            /// Transform of the second, after the first.
            input_transform_second(t: &mut winograd::Transform<Bf16>) =
                winograd::transform::<V, winograd::AsPairSecond, winograd::InputTransform, 6, 6>;
            output_grad_transform_first(t: &mut winograd::Transform<Bf16>) =
                winograd::transform::<V, winograd::AsPairFirst, winograd::OutputGradTransform, 4, 6>;
            output_grad_transform_second(t: &mut winograd::Transform<Bf16>) =
                winograd::transform::<V, winograd::AsPairSecond, winograd::OutputGradTransform, 4, 6>;
        }
    };
}
pub(super) use for_each_bf16_loop;

macro_rules! declare_f32_table {
    (() $($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $loop:expr;)*) => {
        /// The kernels of one instruction set: its dispatch table.
        ///
        /// An `Isa` exists only for an instruction set that this processor has: tables are private,
        /// and [`available`](super::available) and [`with_bf16`](super::with_bf16), which hand them
        /// out, check the processor. All calls through the table rely on it.
        pub struct Isa {
            /// Name of the instruction set, as in `BYOL_ISA`.
            pub name: &'static str,
            /// Number of f32 values in a register.
            pub(crate) lanes: usize,
            /// Number of output pixels in a tile of a convolution.
            pub(crate) tile_pixels: usize,
            /// Number of rows in a tile of a weight gradient.
            pub(crate) tile_rows: usize,
            /// Loops that multiply bf16, in the tables that do.
            pub(crate) bf16: Option<Bf16Loops>,
            /// Loops of a matrix unit, in the tables of processors that have one; with `bf16`.
            pub(crate) matrix: Option<MatrixLoops>,
            $($(#[$doc])* pub(crate) $name: unsafe fn($($arg: $type),*) $(-> $out)?,)*
        }
    };
}
use declare_f32_table;
for_each_f32_loop!(declare_f32_table());

macro_rules! declare_bf16_table {
    (() $($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $loop:expr;)*) => {
        /// The loops of an instruction set that multiply bf16 operands and sum in f32.
        pub(crate) struct Bf16Loops {
            $($(#[$doc])* pub $name: unsafe fn($($arg: $type),*) $(-> $out)?,)*
        }
    };
}
use declare_bf16_table;
for_each_bf16_loop!(declare_bf16_table());

/// The loops of a matrix unit ([`crate::loops::matrix`]).
pub(crate) struct MatrixLoops {
    /// Prepares the unit for this thread.
    pub configure: unsafe fn(),
    /// Releases the unit, after `configure`.
    pub release: unsafe fn(),
    /// Product of rows and packed weights, between `configure` and `release`.
    pub multiply: matrix::MultiplyFn,
    /// Block of a weight gradient, between `configure` and `release`.
    pub accumulate: matrix::AccumulateFn,
    /// Epilogue of a block and its storage in an f32 map.
    pub finish: block::FinishFn<f32>,
    /// The same in a bf16 map.
    pub finish_bf16: block::FinishFn<Bf16>,
    /// Packing of the left operand of a weight gradient.
    pub transpose: unsafe fn(&matrix::Rows<f32>, channels: usize, to: *mut Bf16),
    /// The same from values that are rounded already.
    pub transpose_bf16: unsafe fn(&matrix::Rows<Bf16>, channels: usize, to: *mut Bf16),
    /// Packing of weights.
    pub transpose_pairs: unsafe fn(&matrix::ChannelRows, values: usize, to: *mut Bf16),
    /// Packing of the right operand of a weight gradient, and of transposed weights.
    pub interleave: unsafe fn(&matrix::Rows<Bf16>, channels: usize, to: *mut Bf16),
}

macro_rules! compile_f32_table {
    (
        ($name:literal, $simd:ty, pixels: $pixels:literal, rows: $rows:literal, #[$feature:meta])
        $($(#[$doc:meta])* $loop_name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $loop:expr;)*
    ) => {{
        use std::mem::MaybeUninit;
        use $crate::{
            loops::{bf16, norm, optimizer_step, pack, pool, roofline, tile, winograd},
            simd::{Bf16, Simd},
        };

        type V = $simd;
        const PIXELS: usize = $pixels;
        const ROWS: usize = $rows;

        $(
            #[$feature]
            #[allow(unused_unsafe, reason = "some loops are safe functions")]
            unsafe fn $loop_name($($arg: $type),*) $(-> $out)? {
                // SAFETY: the caller keeps the contract of the loop.
                unsafe { $loop($($arg),*) }
            }
        )*

        $crate::isa::table::Isa {
            name: $name,
            lanes: V::LANES,
            tile_pixels: PIXELS,
            tile_rows: ROWS,
            bf16: None,
            matrix: None,
            $($loop_name,)*
        }
    }};
}
pub(super) use compile_f32_table;

macro_rules! compile_bf16_table {
    (
        ($simd:ty, $product:ty, pixels: $pixels:literal, rows: $rows:literal, #[$feature:meta])
        $($(#[$doc:meta])* $loop_name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $loop:expr;)*
    ) => {{
        use $crate::{
            loops::{bf16, tile, winograd},
            simd::Bf16,
        };

        type V = $simd;
        type B = $product;
        const PIXELS: usize = $pixels;
        const ROWS: usize = $rows;

        $(
            #[$feature]
            #[allow(unused_unsafe, reason = "some loops are safe functions")]
            unsafe fn $loop_name($($arg: $type),*) $(-> $out)? {
                // SAFETY: the caller keeps the contract of the loop.
                unsafe { $loop($($arg),*) }
            }
        )*

        $crate::isa::table::Bf16Loops { $($loop_name,)* }
    }};
}
pub(super) use compile_bf16_table;

/// Compiles the loops over f32 into an [`Isa`]: name, implementation of
/// [`Simd`](crate::simd::Simd), heights of the tiles, target features.
macro_rules! compile_f32 {
    ($($isa:tt)*) => { $crate::isa::table::for_each_f32_loop!(compile_f32_table ($($isa)*)) };
}
pub(super) use compile_f32;

/// Compiles the loops over bf16 into [`Bf16Loops`]: implementations of
/// [`StoreBf16`](crate::simd::StoreBf16) and [`Product`](crate::simd::Product), heights of the
/// tiles as for f32, target features.
macro_rules! compile_bf16 {
    ($($isa:tt)*) => { $crate::isa::table::for_each_bf16_loop!(compile_bf16_table ($($isa)*)) };
}
pub(super) use compile_bf16;

impl Isa {
    /// Returns `true` if its products run on a matrix unit.
    pub fn has_matrix_unit(&self) -> bool {
        self.matrix.is_some()
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name)
    }
}

//! Operand types of the products: f32, or pairs of bf16 where the instruction set multiplies them.
//! Sums are f32 with both.

use rayon::prelude::*;

use crate::{
    isa::{Bf16Loops, Isa},
    loops::{
        tile::{OutputBlockFn, WeightGradTileFn},
        winograd::TransformFn,
    },
    simd::{Bf16, Element},
};

/// Returns whether a sum over `channels` channels multiplies pairs of bf16. An odd number, such as
/// the 3 of an RGB image, stays f32.
pub(super) fn uses_bf16(isa: &Isa, channels: usize) -> bool {
    isa.bf16.is_some() && channels.is_multiple_of(2)
}

/// An operand type, with the loops of the dispatch table for it.
pub(super) trait Operand: Element {
    /// Returns the forward micro-kernel for 1 or 2 registers of channels.
    fn output_block(isa: &Isa, registers: usize) -> OutputBlockFn<Self>;

    /// Returns the micro-kernel of the weight gradient for 1 or 2 registers of channels.
    fn weight_grad_tile(isa: &Isa, registers: usize) -> WeightGradTileFn<Self>;

    /// Returns `n` zeros.
    fn zeros(n: usize) -> Vec<Self>;

    /// Overwrites all values with 0.
    fn fill_zero(values: &mut [Self]);

    /// Returns Winograd's transform of a window.
    fn input_transform(isa: &Isa) -> TransformFn<Self>;

    /// Returns Winograd's transforms of windows and of output gradients for the weight gradient,
    /// which interleaves groups of `DEPTH` tiles: each for the first and for the second tile of a
    /// group. With a depth of 1 both are the same.
    fn interleaved_transforms(isa: &Isa) -> [[TransformFn<Self>; 2]; 2];

    /// Returns f32 values as operands, if those are f32.
    fn borrow_f32(values: &[f32]) -> Option<&[Self]>;

    /// Returns operands as f32 values, if they are f32.
    fn as_f32_mut(operands: &mut [Self]) -> Option<&mut [f32]>;

    /// Converts packed weights from blocks of `[rows, 2 · LANES]` (the last may be narrower) to
    /// `[rows / DEPTH, 2 · LANES, DEPTH]`. `rows` is a multiple of the depth.
    fn convert_weights(isa: &Isa, rows: usize, packed: Vec<f32>) -> Vec<Self>;

    /// Rounds each value.
    fn round(isa: &Isa, from: &[f32], to: &mut [Self]);

    /// Rounds rows of `width` values and interleaves groups of `DEPTH` rows
    /// ([`interleave_pairs`](crate::loops::bf16::interleave_pairs)).
    fn interleave(isa: &Isa, from: &[f32], width: usize, to: &mut [Self]);

    /// Reinterprets an f32 buffer as operands, at least as many.
    fn cast_buffer(buffer: &mut [f32]) -> &mut [Self] {
        let n = size_of_val(buffer) / size_of::<Self>();
        const { assert!(align_of::<Self>() <= align_of::<f32>() && size_of::<Self>() <= size_of::<f32>()) };
        // SAFETY: the result has no more bytes than the buffer and no stricter alignment, and any
        // bits are valid values of both types.
        unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast(), n) }
    }

    /// Returns the number of f32 values whose memory holds `n` operands.
    fn buffer_len(n: usize) -> usize {
        (n * size_of::<Self>()).div_ceil(size_of::<f32>())
    }
}

/// Returns the first `n` operands of a buffer, which is enlarged if necessary.
pub(super) fn grow<T: Operand>(buffer: &mut Vec<f32>, n: usize) -> &mut [T] {
    let len = T::buffer_len(n);
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut T::cast_buffer(buffer)[..n]
}

impl Operand for f32 {
    fn output_block(isa: &Isa, registers: usize) -> OutputBlockFn<f32> {
        [isa.output_block_x1, isa.output_block_x2][registers - 1]
    }

    fn weight_grad_tile(isa: &Isa, registers: usize) -> WeightGradTileFn<f32> {
        [isa.weight_grad_tile_x1, isa.weight_grad_tile_x2][registers - 1]
    }

    fn zeros(n: usize) -> Vec<f32> {
        vec![0.0; n]
    }

    fn fill_zero(values: &mut [f32]) {
        values.fill(0.0);
    }

    fn input_transform(isa: &Isa) -> TransformFn<f32> {
        isa.input_transform
    }

    fn interleaved_transforms(isa: &Isa) -> [[TransformFn<f32>; 2]; 2] {
        [[isa.input_transform; 2], [isa.output_grad_transform; 2]]
    }

    fn borrow_f32(values: &[f32]) -> Option<&[f32]> {
        Some(values)
    }

    fn as_f32_mut(operands: &mut [f32]) -> Option<&mut [f32]> {
        Some(operands)
    }

    fn convert_weights(_: &Isa, _: usize, packed: Vec<f32>) -> Vec<f32> {
        packed
    }

    fn round(_: &Isa, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn interleave(_: &Isa, from: &[f32], _: usize, to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

/// The loops over bf16 of a table that has them.
fn bf16(isa: &Isa) -> &Bf16Loops {
    isa.bf16.as_ref().expect("`uses_bf16` chooses bf16 only where the table has it")
}

impl Operand for Bf16 {
    fn output_block(isa: &Isa, registers: usize) -> OutputBlockFn<Bf16> {
        [bf16(isa).output_block_x1, bf16(isa).output_block_x2][registers - 1]
    }

    fn weight_grad_tile(isa: &Isa, registers: usize) -> WeightGradTileFn<Bf16> {
        [bf16(isa).weight_grad_tile_x1, bf16(isa).weight_grad_tile_x2][registers - 1]
    }

    fn zeros(n: usize) -> Vec<Bf16> {
        vec![Bf16::default(); n]
    }

    fn fill_zero(values: &mut [Bf16]) {
        values.fill(Bf16::default());
    }

    fn input_transform(isa: &Isa) -> TransformFn<Bf16> {
        bf16(isa).input_transform
    }

    fn interleaved_transforms(isa: &Isa) -> [[TransformFn<Bf16>; 2]; 2] {
        let loops = bf16(isa);
        [
            [loops.input_transform_first, loops.input_transform_second],
            [loops.output_grad_transform_first, loops.output_grad_transform_second],
        ]
    }

    fn borrow_f32(_: &[f32]) -> Option<&[Bf16]> {
        None
    }

    fn as_f32_mut(_: &mut [Bf16]) -> Option<&mut [f32]> {
        None
    }

    fn convert_weights(isa: &Isa, rows: usize, packed: Vec<f32>) -> Vec<Bf16> {
        let mut weights = Bf16::zeros(packed.len());
        let block = rows * 2 * isa.lanes;
        weights.par_chunks_mut(block).zip(packed.par_chunks(block)).for_each(|(to, from)| {
            Bf16::interleave(isa, from, from.len() / rows, to);
        });
        weights
    }

    fn round(isa: &Isa, from: &[f32], to: &mut [Bf16]) {
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (bf16(isa).round)(from, to) }
    }

    fn interleave(isa: &Isa, from: &[f32], width: usize, to: &mut [Bf16]) {
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (bf16(isa).interleave_pairs)(from, width, to) }
    }
}

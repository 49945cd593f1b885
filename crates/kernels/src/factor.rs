//! What convolutions multiply: f32, or bf16 in pairs, where the instruction set has products of pairs. Sums are f32 with both.

use rayon::prelude::*;

use crate::{
    isa::{Halves, Isa},
    tile::{Column, WeightTile},
    transform::Compiled,
};

/// The upper half of an f32: its sign, its exponent, seven bits of its fraction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(u16);

impl Bf16 {
    /// The nearest; of two that are equally near, the even one.
    #[inline(always)]
    pub fn round(value: f32) -> Bf16 {
        Bf16((rounded(value) >> 16) as u16)
    }

    /// The same number.
    #[inline(always)]
    pub fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// The bits of a value whose upper half is the nearest [`Bf16`]. The lower half means nothing.
#[inline(always)]
fn rounded(value: f32) -> u32 {
    let bits = value.to_bits();
    // A carry would make a number of what is none.
    if value.is_nan() { bits | 1 << 22 } else { bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) }
}

/// Rounds one by one.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub(crate) fn round_loop(from: &[f32], to: &mut [Bf16]) {
    assert_eq!(from.len(), to.len());
    to.iter_mut().zip(from).for_each(|(to, from)| *to = Bf16::round(*from));
}

/// Rows of `width` values as pairs of rows: value j of the first and of the second row of a pair lie side by side. A last row without a
/// partner is paired with zeros.
#[inline(always)]
pub(crate) fn pair_loop(from: &[f32], width: usize, to: &mut [Bf16]) {
    for (from, to) in from.chunks(2 * width).zip(to.chunks_exact_mut(2 * width)) {
        let (first, second) = from.split_at(width);
        let to = to.as_chunks_mut::<2>().0;
        if second.is_empty() {
            to.iter_mut().zip(first).for_each(|(to, a)| *to = [Bf16::round(*a), Bf16(0)]);
        } else {
            to.iter_mut()
                .zip(first.iter().zip(second))
                .for_each(|(to, (a, b))| *to = [Bf16::round(*a), Bf16::round(*b)]);
        }
    }
}

/// A factor of a product.
pub(crate) trait Factor: Copy + Send + Sync + 'static {
    /// Factors that one lane multiplies and adds at once; they lie side by side.
    const DEPTH: usize;

    /// The loop over a column for so many registers of channels.
    fn column(isa: &Isa, registers: usize) -> unsafe fn(&Column<Self>);

    /// The same for the weight gradient.
    fn weight_tile(isa: &Isa, registers: usize) -> unsafe fn(&WeightTile<Self>);

    /// So many zeros.
    fn zeros(n: usize) -> Vec<Self>;

    /// Overwrites all with 0.
    fn zero(values: &mut [Self]);

    /// Winograd's map of a window.
    fn window(isa: &Isa) -> Compiled<Self>;

    /// Winograd's maps of windows and of output gradients, `DEPTH` tiles side by side; with one tile a group both maps are the same.
    fn interleaved(isa: &Isa) -> [[Compiled<Self>; 2]; 2];

    /// The values themselves where nothing is rounded.
    fn borrow(values: &[f32]) -> Option<&[Self]>;

    /// Memory of them as memory of values, where nothing is rounded.
    fn as_values(to: &mut [Self]) -> Option<&mut [f32]>;

    /// Blocks of weights, each `[rows, 2 · LANES]` (the last may be narrower), as factors: `[rows / DEPTH, 2 · LANES, DEPTH]`. `rows` is a
    /// multiple of the depth.
    fn weights(isa: &Isa, rows: usize, packed: Vec<f32>) -> Vec<Self>;

    /// Rounds one by one.
    fn round(isa: &Isa, from: &[f32], to: &mut [Self]);

    /// Rows of `width` values, `DEPTH` rows side by side ([`pair_loop`]).
    fn interleave(isa: &Isa, from: &[f32], width: usize, to: &mut [Self]);

    /// Memory of f32 as memory of factors, at least as many.
    fn room(buffer: &mut [f32]) -> &mut [Self] {
        let n = size_of_val(buffer) / size_of::<Self>();
        const { assert!(align_of::<Self>() <= align_of::<f32>() && size_of::<Self>() <= size_of::<f32>()) };
        // SAFETY: it is as many bytes, aligned enough; both types are plain numbers, for which all bits are good.
        unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast(), n) }
    }

    /// How many f32 hold so many factors.
    fn room_for(n: usize) -> usize {
        (n * size_of::<Self>()).div_ceil(size_of::<f32>())
    }
}

impl Factor for f32 {
    const DEPTH: usize = 1;

    fn column(isa: &Isa, registers: usize) -> unsafe fn(&Column<f32>) {
        isa.column[registers - 1]
    }

    fn weight_tile(isa: &Isa, registers: usize) -> unsafe fn(&WeightTile<f32>) {
        isa.weight_tile[registers - 1]
    }

    fn zeros(n: usize) -> Vec<f32> {
        vec![0.0; n]
    }

    fn zero(values: &mut [f32]) {
        values.fill(0.0);
    }

    fn window(isa: &Isa) -> Compiled<f32> {
        isa.window
    }

    fn interleaved(isa: &Isa) -> [[Compiled<f32>; 2]; 2] {
        [[isa.window; 2], [isa.slopes; 2]]
    }

    fn borrow(values: &[f32]) -> Option<&[f32]> {
        Some(values)
    }

    fn as_values(to: &mut [f32]) -> Option<&mut [f32]> {
        Some(to)
    }

    fn weights(_: &Isa, _: usize, packed: Vec<f32>) -> Vec<f32> {
        packed
    }

    fn round(_: &Isa, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn interleave(_: &Isa, from: &[f32], _: usize, to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

fn halves(isa: &Isa) -> &Halves {
    isa.halves.as_ref().expect("bf16 is chosen where the table has it")
}

impl Factor for Bf16 {
    const DEPTH: usize = 2;

    fn column(isa: &Isa, registers: usize) -> unsafe fn(&Column<Bf16>) {
        halves(isa).column[registers - 1]
    }

    fn weight_tile(isa: &Isa, registers: usize) -> unsafe fn(&WeightTile<Bf16>) {
        halves(isa).weight_tile[registers - 1]
    }

    fn zeros(n: usize) -> Vec<Bf16> {
        vec![Bf16::default(); n]
    }

    fn zero(values: &mut [Bf16]) {
        values.fill(Bf16::default());
    }

    fn window(isa: &Isa) -> Compiled<Bf16> {
        halves(isa).window
    }

    fn interleaved(isa: &Isa) -> [[Compiled<Bf16>; 2]; 2] {
        [halves(isa).window_pairs, halves(isa).slope_pairs]
    }

    fn borrow(_: &[f32]) -> Option<&[Bf16]> {
        None
    }

    fn as_values(_: &mut [Bf16]) -> Option<&mut [f32]> {
        None
    }

    fn weights(isa: &Isa, rows: usize, packed: Vec<f32>) -> Vec<Bf16> {
        let mut factors = Bf16::zeros(packed.len());
        let block = rows * 2 * isa.lanes;
        factors.par_chunks_mut(block).zip(packed.par_chunks(block)).for_each(|(to, from)| {
            Bf16::interleave(isa, from, from.len() / rows, to);
        });
        factors
    }

    fn round(isa: &Isa, from: &[f32], to: &mut [Bf16]) {
        // SAFETY: the processor has this instruction set, or it would not be in the table.
        unsafe { (halves(isa).round)(from, to) }
    }

    fn interleave(isa: &Isa, from: &[f32], width: usize, to: &mut [Bf16]) {
        // SAFETY: as above.
        unsafe { (halves(isa).pair)(from, width, to) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest_and_then_to_even() {
        let round = |bits: u32| Bf16::round(f32::from_bits(bits)).0;
        assert_eq!(round(0x3F80_7FFF), 0x3F80);
        assert_eq!(round(0x3F80_8000), 0x3F80);
        assert_eq!(round(0x3F81_8000), 0x3F82);
        assert_eq!(round(0xBF80_8001), 0xBF81);
        assert_eq!(Bf16::round(f32::MAX).wide(), f32::INFINITY);
        assert!(Bf16::round(f32::from_bits(0x7FFF_FFFF)).wide().is_nan());
        assert_eq!(Bf16::round(-0.0).0, 0x8000);
    }

    #[test]
    fn a_last_row_is_paired_with_zeros() {
        let mut to = [Bf16(7); 8];
        pair_loop(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, &mut to);
        assert_eq!(to.map(Bf16::wide), [1.0, 3.0, 2.0, 4.0, 5.0, 0.0, 6.0, 0.0]);
    }
}

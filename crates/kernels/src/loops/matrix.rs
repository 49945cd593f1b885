//! Products of matrix tiles, for processors with a matrix unit.
//!
//! A tile of operands has 16 rows of 32 bf16 values, a tile of sums 16 rows of 16 f32 values. Both
//! loops compute a *block* of 2 x 2 tiles of sums, 32 rows by 32 columns, which stay in the unit's
//! registers over the summed dimension: each step loads two tiles of either operand for four
//! products. A block may also be one tile high or one tile wide.
//!
//! The right operand is stored in pairs, `[depth / 2, 32, 2]`: the values of two summed rows side
//! by side, as the unit multiplies them.
//!
//! The functions here define the operations in plain Rust. They serve the portable instruction set,
//! where tests run them on any processor; `isa/amx.rs` has those that run on a matrix unit.

use crate::simd::Bf16;

/// Number of rows of a tile, and of columns of a tile of sums.
pub(crate) const TILE: usize = 16;

/// Number of values that a product of two tiles sums.
pub(crate) const DEPTH: usize = 32;

/// Number of rows and of columns of a block.
pub(crate) const BLOCK: usize = 32;

/// Number of values in a tile of operands.
pub(crate) const TILE_VALUES: usize = TILE * DEPTH;

/// Number of values of the right operand that one step multiplies: two tiles.
pub(crate) const STEP_VALUES: usize = 2 * TILE_VALUES;

/// Arguments of [`multiply`]: rows of a source × a block of packed weights.
pub(crate) struct MultiplyArgs {
    /// The source.
    pub source: *const Bf16,
    /// Distance between rows of the source, in values.
    pub source_step: usize,
    /// Number of tiles of rows.
    pub row_tiles: usize,
    /// Offset of each tap from a row.
    pub taps: *const u32,
    /// Number of taps.
    pub tap_count: usize,
    /// Number of steps at each tap.
    pub steps: usize,
    /// Packed weights, `[taps, steps, 16, 32, 2]`.
    pub weights: *const Bf16,
    /// Number of tiles of columns to compute: 1 or 2.
    pub column_tiles: usize,
    /// The sums: 16 · row_tiles rows, 32 values apart.
    pub out: *mut f32,
}

/// A part of the summed dimension of an [`Accumulation`].
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    /// Left operand, tile by tile: `[steps, 16, 32]` for each tile of rows.
    pub left: *const Bf16,
    /// Distance between the tiles of rows of the left operand, in values.
    pub left_step: usize,
    /// Right operand, `[steps, 16, 32, 2]`.
    pub right: *const Bf16,
    /// Number of steps.
    pub steps: usize,
}

/// Arguments of [`accumulate`].
pub(crate) struct Accumulation<'a> {
    /// Operands.
    pub panels: &'a [Panels],
    /// Number of tiles of rows: 1 or 2.
    pub row_tiles: usize,
    /// Number of tiles of columns: 1 or 2.
    pub column_tiles: usize,
    /// Sums, `[16 · row_tiles, 16 · column_tiles]`.
    pub sums: *mut f32,
    /// Distance between rows of the sums, in values.
    pub sums_step: usize,
    /// Add to the sums that are there, instead of overwriting them.
    pub add: bool,
}

/// Compiled [`multiply`].
pub(crate) type MultiplyFn = unsafe fn(&MultiplyArgs);

/// Compiled [`accumulate`].
pub(crate) type AccumulateFn = unsafe fn(&Accumulation);

/// Rows of weights of one tile of channels: a pointer to each.
pub(crate) type ChannelRows = [*const Bf16; TILE];

/// Pixel rows of a transposition or interleaving: a pointer to the first channel of each pixel.
pub(crate) type Rows<T> = [*const T; DEPTH];

/// Computes out = source · weights.
///
/// # Safety
///
/// * `source` holds `(16 · row_tiles − 1) · source_step + tap + 32 · steps` values for each tap,
///   and `taps` holds `tap_count` offsets.
/// * `weights` holds `tap_count · steps · STEP_VALUES` values.
/// * `out` holds `32 · 16 · row_tiles` values, and nothing else accesses them.
pub(crate) unsafe fn multiply(p: &MultiplyArgs) {
    // SAFETY: every offset is one that the contract bounds.
    unsafe {
        for row in 0..TILE * p.row_tiles {
            let out = p.out.add(row * BLOCK);
            for column in 0..TILE * p.column_tiles {
                let mut sum = 0.0;
                for tap in 0..p.tap_count {
                    let source = p.source.add(row * p.source_step + *p.taps.add(tap) as usize);
                    let weights = p.weights.add(tap * p.steps * STEP_VALUES + 2 * column);
                    sum += dot(source, weights, p.steps);
                }
                *out.add(column) = sum;
            }
        }
    }
}

/// Computes the sum of left · right over all panels.
///
/// # Safety
///
/// * For each panel, `left` holds `(row_tiles − 1) · left_step + steps · TILE_VALUES` values and
///   `right` holds `steps · STEP_VALUES`.
/// * `sums` holds `(16 · row_tiles − 1) · sums_step + 16 · column_tiles` values, and nothing else
///   accesses them.
pub(crate) unsafe fn accumulate(a: &Accumulation) {
    // SAFETY: every offset is one that the contract bounds.
    unsafe {
        for row in 0..TILE * a.row_tiles {
            for column in 0..TILE * a.column_tiles {
                let to = a.sums.add(row * a.sums_step + column);
                let mut sum = if a.add { *to } else { 0.0 };
                for panel in a.panels {
                    let left = panel.left.add(row / TILE * panel.left_step + row % TILE * DEPTH);
                    for step in 0..panel.steps {
                        let right = panel.right.add(step * STEP_VALUES + 2 * column);
                        sum += dot(left.add(step * TILE_VALUES), right, 1);
                    }
                }
                *to = sum;
            }
        }
    }
}

/// Sums the products of a row and a column of pairs.
///
/// # Safety
///
/// * `row` holds `32 · steps` values and `column` every second pair of as many values, 32 columns
///   apart.
unsafe fn dot(row: *const Bf16, column: *const Bf16, steps: usize) -> f32 {
    (0..steps * DEPTH)
        // SAFETY: the offsets are those of the contract.
        .map(|k| unsafe { (*row.add(k)).to_f32() * (*column.add(k / 2 * 2 * BLOCK + k % 2)).to_f32() })
        .sum()
}

/// Rounds `channels` channels of 32 pixels and stores them as a tile: value p of row c is channel c
/// of pixel p. Rows of missing channels are 0.
///
/// # Safety
///
/// * Each of `pixels` holds `channels` values, at most 16.
/// * `to` holds `TILE_VALUES` values, and nothing else accesses them.
pub(crate) unsafe fn transpose(pixels: &Rows<f32>, channels: usize, to: *mut Bf16) {
    for (p, pixel) in pixels.iter().enumerate() {
        for c in 0..TILE {
            // SAFETY: the offsets are those of the contract.
            unsafe {
                let value = if c < channels { Bf16::round(*pixel.add(c)) } else { Bf16::default() };
                *to.add(c * DEPTH + p) = value;
            }
        }
    }
}

/// [`transpose`] of values that are rounded already.
///
/// # Safety
///
/// * As for [`transpose`].
pub(crate) unsafe fn transpose_bf16(pixels: &Rows<Bf16>, channels: usize, to: *mut Bf16) {
    for (p, pixel) in pixels.iter().enumerate() {
        for c in 0..TILE {
            // SAFETY: the offsets are those of the contract.
            unsafe { *to.add(c * DEPTH + p) = if c < channels { *pixel.add(c) } else { Bf16::default() } };
        }
    }
}

/// Stores `values` values of 16 channels as 16 rows of 16 pairs, with zeros in place of missing
/// values: pair p of row c becomes pair c of row p. Rows of the result are 32 pairs apart.
///
/// # Safety
///
/// * Each of `channels` holds `values` values, at most 32.
/// * `to` holds `STEP_VALUES − 32` values, and nothing else accesses them.
pub(crate) unsafe fn transpose_pairs(channels: &ChannelRows, values: usize, to: *mut Bf16) {
    for (c, channel) in channels.iter().enumerate() {
        for k in 0..DEPTH {
            // SAFETY: the offsets are those of the contract.
            unsafe {
                let value = if k < values { *channel.add(k) } else { Bf16::default() };
                *to.add(k / 2 * 2 * BLOCK + 2 * c + k % 2) = value;
            }
        }
    }
}

/// Stores `channels` channels of 32 pixels as 16 rows of 32 pairs, with zeros in place of missing
/// channels.
///
/// # Safety
///
/// * Each of `pixels` holds `channels` values, at most 32.
/// * `to` holds `STEP_VALUES` values, and nothing else accesses them.
pub(crate) unsafe fn interleave(pixels: &Rows<Bf16>, channels: usize, to: *mut Bf16) {
    for (p, pixel) in pixels.iter().enumerate() {
        for c in 0..BLOCK {
            // SAFETY: the offsets are those of the contract.
            unsafe {
                let value = if c < channels { *pixel.add(c) } else { Bf16::default() };
                *to.add(p / 2 * 2 * BLOCK + 2 * c + p % 2) = value;
            }
        }
    }
}

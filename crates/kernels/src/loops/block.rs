//! Epilogue and storage of the sums that a matrix unit computes.
//!
//! A block of sums has 32 columns, each a channel of a map, and rows that are pixels or lie between
//! runs of pixels and are dropped. The sums are in the first-level cache; the map is written once.

use crate::{
    loops::matrix::BLOCK,
    simd::{Maps, Scalar, Value},
};

/// One value per channel of a block.
pub(crate) type Channels = [f32; BLOCK];

/// Pixels whose sums are adjacent rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PixelRun {
    /// Row of the first pixel.
    pub row: usize,
    /// Number of pixels.
    pub pixels: usize,
    /// Offset of the first pixel in the map, in values.
    pub at: usize,
}

/// Arguments of [`finish`]. Pointers to maps point to the first channel of the first block.
pub(crate) struct Finish<'a, T> {
    /// Rows of 32 sums of the first block.
    pub sums: *const f32,
    /// Distance between the sums of neighboring blocks, in values.
    pub block_step: usize,
    /// The pixels.
    pub runs: &'a [PixelRun],
    /// Number of channels of all blocks.
    pub channels: usize,
    /// The map to write.
    pub map: *mut T,
    /// Distance between the pixels of a run in all maps, in values.
    pub step: usize,
    /// The operation on the sums before they are stored.
    pub epilogue: BlockEpilogue<T>,
    /// Vectors and totals of the epilogue by block.
    pub blocks: &'a mut [BlockValues],
}

/// Epilogue of a block. Other maps have the shape of the map that is written.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BlockEpilogue<T> {
    /// Nothing.
    None,
    /// Adds y − origin and its square to the totals. Vectors: the origin.
    Moments,
    /// y + map.
    Add(*const T),
    /// max(y + shift (+ skip), low). Vectors: the shift.
    ShiftAct { skip: Option<*const T>, low: f32 },
    /// Adds g (y − mean) and g to the totals, where g is the gradient where scale · y + shift > 0,
    /// else 0. Vectors: scale, shift and mean.
    NormGrads { y: *const T },
}

/// Values of an epilogue for one block of channels.
#[derive(Debug, Default)]
pub(crate) struct BlockValues {
    /// Its vectors.
    pub vectors: [Channels; 3],
    /// Its totals.
    pub totals: [Channels; 2],
}

/// Compiled [`finish`].
pub(crate) type FinishFn<T> = unsafe fn(Finish<T>);

/// Number of values in a group of pixels, which is stored with all its channels before the next
/// group: hardware prefetchers follow writes in order.
const VALUES: usize = 4096;

/// Least number of pixels in a group. Its pixels share the loads of vectors and totals.
const MIN_PIXELS: usize = 16;

/// Applies the epilogue and stores the pixels. `R` registers hold a block's channels.
///
/// # Safety
///
/// * The processor has the instruction set of `V`.
/// * There are `blocks` for all channels.
/// * `sums` holds `32 · (row + pixels)` values for each run, in each block.
/// * For each run, `map` and the map of the epilogue hold `at + (pixels − 1) · step + channels`
///   values, and nothing else accesses those of `map`.
#[inline(always)]
pub(crate) unsafe fn finish<V: Maps, T: Value, const R: usize>(f: Finish<T>) {
    const { assert!(R * V::LANES == BLOCK, "the registers hold a block") }
    let Finish { sums, block_step, runs, channels, map, step, epilogue, blocks } = f;
    let (whole, rest) = (channels / BLOCK, channels % BLOCK);
    let group = (VALUES / channels.max(1)).max(MIN_PIXELS);
    for PixelRun { row, pixels, at } in runs {
        for first in (0..*pixels).step_by(group) {
            // SAFETY: the contract is passed on.
            unsafe {
                let part = Part {
                    epilogue,
                    pixels: group.min(pixels - first),
                    sums: sums.add((row + first) * BLOCK),
                    map,
                    at: at + first * step,
                    step,
                };
                for (block, values) in blocks[..whole].iter_mut().enumerate() {
                    finish_registers::<V, T, R>(part.block(block, block_step), values, 0);
                }
                if rest == 0 {
                    continue;
                }
                let (part, values) = (part.block(whole, block_step), &mut blocks[whole]);
                let lanes = rest / V::LANES * V::LANES;
                for channel in (0..lanes).step_by(V::LANES) {
                    finish_registers::<V, T, 1>(part, values, channel);
                }
                for channel in lanes..rest {
                    finish_registers::<Scalar, T, 1>(part, values, channel);
                }
            }
        }
    }
}

/// Some pixels of a block.
#[derive(Clone, Copy)]
struct Part<T> {
    epilogue: BlockEpilogue<T>,
    pixels: usize,
    /// Sums of the first pixel.
    sums: *const f32,
    map: *mut T,
    /// Offset of the first pixel in the maps.
    at: usize,
    step: usize,
}

impl<T: Copy> Part<T> {
    /// Returns the same pixels of another block.
    #[inline(always)]
    fn block(self, block: usize, step: usize) -> Part<T> {
        Part { sums: self.sums.wrapping_add(block * step), at: self.at + block * BLOCK, ..self }
    }
}

/// Loads `R` registers.
///
/// # Safety
///
/// * The processor has the instruction set of `V`.
/// * `from` holds `R · LANES` values.
#[inline(always)]
unsafe fn load<V: Maps, T: Value, const R: usize>(from: *const T) -> [V::V; R] {
    // SAFETY: the offsets are those of the contract.
    std::array::from_fn(|r| unsafe { T::load::<V>(from.add(r * V::LANES)) })
}

/// Loads the values of `R` registers of channels from `channel` on.
///
/// # Safety
///
/// * The processor has the instruction set of `V`.
/// * `channel + R · LANES` is at most 32.
#[inline(always)]
unsafe fn load_channels<V: Maps, const R: usize>(values: &Channels, channel: usize) -> [V::V; R] {
    // SAFETY: the channels are those of the contract.
    unsafe { load::<V, f32, R>(values.as_ptr().add(channel)) }
}

/// [`load_channels`] of both totals.
///
/// # Safety
///
/// * As there.
#[inline(always)]
unsafe fn load_totals<V: Maps, const R: usize>(totals: &[Channels; 2], channel: usize) -> [[V::V; R]; 2] {
    // SAFETY: the contract is passed on.
    unsafe { [load_channels::<V, R>(&totals[0], channel), load_channels::<V, R>(&totals[1], channel)] }
}

/// Stores both totals.
///
/// # Safety
///
/// * As for [`load_channels`].
#[inline(always)]
unsafe fn store_totals<V: Maps, const R: usize>(totals: &mut [Channels; 2], channel: usize, values: [[V::V; R]; 2]) {
    for (total, values) in totals.iter_mut().zip(values) {
        // SAFETY: the channels are those of the contract.
        unsafe { store::<V, f32, R>(total.as_mut_ptr().add(channel), values) };
    }
}

/// Stores `R` registers.
///
/// # Safety
///
/// * As for [`load`], and nothing else accesses the values.
#[inline(always)]
unsafe fn store<V: Maps, T: Value, const R: usize>(to: *mut T, values: [V::V; R]) {
    for (r, value) in values.into_iter().enumerate() {
        // SAFETY: the offsets are those of the contract.
        unsafe { T::store::<V>(to.add(r * V::LANES), value) };
    }
}

/// Runs code for each pixel, given its sums and its offset in the maps, and stores the sums.
macro_rules! for_each_pixel {
    ($part:ident, $channel:ident, |$y:ident, $at:ident| $body:block) => {
        for p in 0..$part.pixels {
            let $at = $part.at + p * $part.step + $channel;
            #[allow(unused_mut, reason = "without an epilogue")]
            let mut $y = load::<V, f32, R>($part.sums.add(p * BLOCK + $channel));
            $body
            store::<V, T, R>($part.map.add($at), $y);
        }
    };
}

/// [`finish`] for `R` registers of channels of a block, from `channel` on.
///
/// # Safety
///
/// * As for [`finish`].
#[inline(always)]
unsafe fn finish_registers<V: Maps, T: Value, const R: usize>(
    part: Part<T>,
    BlockValues { vectors, totals }: &mut BlockValues,
    channel: usize,
) {
    // SAFETY: the offsets are those of the contract; arrays have the channels of a block.
    unsafe {
        match part.epilogue {
            BlockEpilogue::None => for_each_pixel!(part, channel, |y, at| {}),
            BlockEpilogue::Add(other) => for_each_pixel!(part, channel, |y, at| {
                let other = load::<V, T, R>(other.add(at));
                for r in 0..R {
                    y[r] = V::add(y[r], other[r]);
                }
            }),
            BlockEpilogue::ShiftAct { skip, low } => {
                let (shift, low) = (load_channels::<V, R>(&vectors[0], channel), V::splat(low));
                match skip {
                    None => for_each_pixel!(part, channel, |y, at| {
                        for r in 0..R {
                            y[r] = V::max(V::add(y[r], shift[r]), low);
                        }
                    }),
                    Some(skip) => for_each_pixel!(part, channel, |y, at| {
                        let skip = load::<V, T, R>(skip.add(at));
                        for r in 0..R {
                            y[r] = V::max(V::add(V::add(y[r], shift[r]), skip[r]), low);
                        }
                    }),
                }
            }
            BlockEpilogue::Moments => {
                let origin = load_channels::<V, R>(&vectors[0], channel);
                let [mut sums, mut squares] = load_totals::<V, R>(totals, channel);
                for_each_pixel!(part, channel, |y, at| {
                    for r in 0..R {
                        let d = V::sub(y[r], origin[r]);
                        sums[r] = V::add(sums[r], d);
                        squares[r] = V::fma(d, d, squares[r]);
                    }
                });
                store_totals::<V, R>(totals, channel, [sums, squares]);
            }
            BlockEpilogue::NormGrads { y: input } => {
                let scale = load_channels::<V, R>(&vectors[0], channel);
                let shift = load_channels::<V, R>(&vectors[1], channel);
                let mean = load_channels::<V, R>(&vectors[2], channel);
                let [mut gamma, mut beta] = load_totals::<V, R>(totals, channel);
                for_each_pixel!(part, channel, |g, at| {
                    let y = load::<V, T, R>(input.add(at));
                    for r in 0..R {
                        let masked = V::where_positive(V::fma(y[r], scale[r], shift[r]), g[r]);
                        gamma[r] = V::fma(masked, V::sub(y[r], mean[r]), gamma[r]);
                        beta[r] = V::add(beta[r], masked);
                    }
                });
                store_totals::<V, R>(totals, channel, [gamma, beta]);
            }
        }
    }
}

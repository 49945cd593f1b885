//! AMX, the matrix unit of Intel's server processors: eight registers ("tiles") of 16 rows of 64
//! bytes, and one instruction that multiplies two of them.
//!
//! `tdpbf16ps` adds a product of 16 x 32 by 32 x 16 bf16 values to 16 x 16 f32 sums in 16 cycles:
//! 512 multiply-adds a cycle, 16 times as many as two FMA units of AVX-512. A tile is loaded in 8
//! cycles from the first-level cache. A block of 2 x 2 tiles of sums loads four tiles for four
//! products, so the loads fit beside the products; a single tile of sums would be bound by them.
//!
//! Rust has no stable intrinsics for AMX. The compiler never allocates tile registers, so they keep
//! their values from one `asm!` to the next.

use std::{
    arch::{asm, x86_64::*},
    sync::OnceLock,
};

use super::{
    avx512::{self, Avx512},
    table::{Isa, MatrixLoops},
};
use crate::{
    loops::{
        block::{self, Finish},
        matrix::{Accumulation, BLOCK, ChannelRows, DEPTH, MultiplyArgs, Rows, STEP_VALUES, TILE, TILE_VALUES},
    },
    simd::Bf16,
};

pub(super) static ISA: Isa = Isa {
    name: "avx512 with AMX",
    matrix: Some(MatrixLoops {
        configure,
        release,
        multiply,
        accumulate,
        finish,
        finish_bf16,
        transpose,
        transpose_bf16,
        transpose_pairs,
        interleave,
    }),
    ..avx512::BF16
};

/// Returns whether this process may use AMX: not with `BYOL_AMX=0`. Linux saves the tiles of a
/// process only after it has asked for permission, once.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let [avx512, tiles] = [
            is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bf16"),
            has_tiles(),
        ];
        let allowed = std::env::var_os("BYOL_AMX").is_none_or(|value| value != "0");
        avx512 && tiles && allowed && permitted()
    })
}

/// Returns whether the processor has `AMX-TILE` and `AMX-BF16`, and the system saves the tiles.
fn has_tiles() -> bool {
    // Leaf 7 is read only if it exists.
    let features = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
    let (bf16, tile, saves) = (features >> 22 & 1, features >> 24 & 1, __cpuid(1).ecx >> 27 & 1);
    if bf16 & tile & saves == 0 {
        return false;
    }
    // Bits 17 and 18 of XCR0: the system saves the tiles and their configuration.
    let (low, _high): (u32, u32);
    // SAFETY: the processor and the system support the instruction (OSXSAVE).
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _high, options(nomem, nostack)) };
    low >> 17 & 3 == 3
}

#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two integers and reads no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Configuration of the tiles, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of full size.
static FULL_TILES: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Configures the tiles of this thread.
///
/// # Safety
///
/// * This process may use AMX.
unsafe fn configure() {
    // SAFETY: the operand is a valid configuration.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &FULL_TILES, options(nostack, readonly)) };
}

/// Releases the tiles of this thread, so that the system need not save them when it switches
/// threads.
///
/// # Safety
///
/// * The tiles are configured.
unsafe fn release() {
    // SAFETY: the tiles are configured by the contract.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

// The tiles of a block: sums in 0 to 3 (row by row), the left operand in 4 and 5, the right in 6
// and 7.

/// Sets the sums of a block to zero.
#[inline(always)]
unsafe fn zero() {
    // SAFETY: the tiles are configured.
    unsafe { asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem)) };
}

/// Loads one step of both operands and adds their products to the sums. Steps are in bytes.
///
/// # Safety
///
/// * The tiles are configured.
/// * `left` holds 16 rows of 64 bytes, `left_step` apart, and so does `lower` if `ROWS` is 2.
/// * `right` holds 16 rows of 64 · `COLUMNS` bytes, 128 apart.
#[inline(always)]
unsafe fn step<const ROWS: usize, const COLUMNS: usize>(
    left: *const Bf16,
    lower: *const Bf16,
    left_step: usize,
    right: *const Bf16,
) {
    // SAFETY: the rows are those of the contract.
    unsafe {
        match (ROWS, COLUMNS) {
            (2, 2) => asm!(
                "tileloadd tmm6, [{right} + {right_step}]",
                "tileloadd tmm4, [{left} + {left_step}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + {right_step} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{lower} + {left_step}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                left = in(reg) left, lower = in(reg) lower, left_step = in(reg) left_step,
                right = in(reg) right, right_step = in(reg) 4 * BLOCK, options(nostack, readonly)
            ),
            (2, 1) => asm!(
                "tileloadd tmm6, [{right} + {right_step}]",
                "tileloadd tmm4, [{left} + {left_step}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{lower} + {left_step}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                left = in(reg) left, lower = in(reg) lower, left_step = in(reg) left_step,
                right = in(reg) right, right_step = in(reg) 4 * BLOCK, options(nostack, readonly)
            ),
            (1, 2) => asm!(
                "tileloadd tmm6, [{right} + {right_step}]",
                "tileloadd tmm4, [{left} + {left_step}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + {right_step} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                left = in(reg) left, left_step = in(reg) left_step,
                right = in(reg) right, right_step = in(reg) 4 * BLOCK, options(nostack, readonly)
            ),
            _ => asm!(
                "tileloadd tmm6, [{right} + {right_step}]",
                "tileloadd tmm4, [{left} + {left_step}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                left = in(reg) left, left_step = in(reg) left_step,
                right = in(reg) right, right_step = in(reg) 4 * BLOCK, options(nostack, readonly)
            ),
        }
    }
}

/// Stores the sums of a block. The step is in bytes.
///
/// # Safety
///
/// * The tiles are configured.
/// * `to` holds 16 · `ROWS` rows of 64 · `COLUMNS` bytes, `step` apart.
#[inline(always)]
unsafe fn store<const ROWS: usize, const COLUMNS: usize>(to: *mut f32, step: usize) {
    // SAFETY: the rows are those of the contract.
    unsafe {
        asm!("tilestored [{to} + {step}], tmm0", to = in(reg) to, step = in(reg) step, options(nostack));
        if COLUMNS == 2 {
            asm!("tilestored [{to} + {step} + 64], tmm1", to = in(reg) to, step = in(reg) step, options(nostack));
        }
        if ROWS == 2 {
            let to = to.byte_add(TILE * step);
            asm!("tilestored [{to} + {step}], tmm2", to = in(reg) to, step = in(reg) step, options(nostack));
            if COLUMNS == 2 {
                asm!("tilestored [{to} + {step} + 64], tmm3", to = in(reg) to, step = in(reg) step, options(nostack));
            }
        }
    }
}

/// Loads the sums of a block. The step is in bytes.
///
/// # Safety
///
/// * The tiles are configured.
/// * `from` holds 16 · `ROWS` rows of 64 · `COLUMNS` bytes, `step` apart.
#[inline(always)]
unsafe fn load<const ROWS: usize, const COLUMNS: usize>(from: *const f32, step: usize) {
    // SAFETY: the rows are those of the contract.
    unsafe {
        asm!("tileloadd tmm0, [{from} + {step}]", from = in(reg) from, step = in(reg) step, options(nostack, readonly));
        if COLUMNS == 2 {
            asm!("tileloadd tmm1, [{from} + {step} + 64]", from = in(reg) from, step = in(reg) step, options(nostack, readonly));
        }
        if ROWS == 2 {
            let from = from.byte_add(TILE * step);
            asm!("tileloadd tmm2, [{from} + {step}]", from = in(reg) from, step = in(reg) step, options(nostack, readonly));
            if COLUMNS == 2 {
                asm!("tileloadd tmm3, [{from} + {step} + 64]", from = in(reg) from, step = in(reg) step, options(nostack, readonly));
            }
        }
    }
}

/// [`crate::loops::matrix::multiply`] on the matrix unit.
///
/// # Safety
///
/// * As there, with tiles configured.
unsafe fn multiply(p: &MultiplyArgs) {
    // SAFETY: the contract is passed on.
    unsafe {
        for tile in (0..p.row_tiles).step_by(2) {
            match ((p.row_tiles - tile).min(2), p.column_tiles) {
                (2, 2) => multiply_block::<2, 2>(p, tile),
                (2, _) => multiply_block::<2, 1>(p, tile),
                (_, 2) => multiply_block::<1, 2>(p, tile),
                _ => multiply_block::<1, 1>(p, tile),
            }
        }
    }
}

/// Computes one block of a product, from tile `tile` of the rows on.
///
/// # Safety
///
/// * As for [`multiply`].
#[inline(always)]
unsafe fn multiply_block<const ROWS: usize, const COLUMNS: usize>(p: &MultiplyArgs, tile: usize) {
    // SAFETY: the offsets are those of the contract.
    unsafe {
        let source = p.source.add(tile * TILE * p.source_step);
        let mut weights = p.weights;
        zero();
        for tap in 0..p.tap_count {
            let mut left = source.add(*p.taps.add(tap) as usize);
            for _ in 0..p.steps {
                let lower = left.wrapping_add(TILE * p.source_step);
                step::<ROWS, COLUMNS>(left, lower, size_of::<Bf16>() * p.source_step, weights);
                left = left.wrapping_add(DEPTH);
                weights = weights.wrapping_add(STEP_VALUES);
            }
        }
        store::<ROWS, COLUMNS>(p.out.add(tile * TILE * BLOCK), size_of::<f32>() * BLOCK);
    }
}

/// [`crate::loops::matrix::accumulate`] on the matrix unit.
///
/// # Safety
///
/// * As there, with tiles configured.
unsafe fn accumulate(a: &Accumulation) {
    // SAFETY: the contract is passed on.
    unsafe {
        match (a.row_tiles, a.column_tiles) {
            (2, 2) => accumulate_block::<2, 2>(a),
            (2, _) => accumulate_block::<2, 1>(a),
            (_, 2) => accumulate_block::<1, 2>(a),
            _ => accumulate_block::<1, 1>(a),
        }
    }
}

/// Computes one block of sums.
///
/// # Safety
///
/// * As for [`accumulate`].
#[inline(always)]
unsafe fn accumulate_block<const ROWS: usize, const COLUMNS: usize>(a: &Accumulation) {
    let sums_step = size_of::<f32>() * a.sums_step;
    // SAFETY: the offsets are those of the contract.
    unsafe {
        if a.add {
            load::<ROWS, COLUMNS>(a.sums, sums_step);
        } else {
            zero();
        }
        for p in a.panels {
            let (mut left, mut right) = (p.left, p.right);
            for _ in 0..p.steps {
                let lower = left.wrapping_add(p.left_step);
                step::<ROWS, COLUMNS>(left, lower, size_of::<Bf16>() * DEPTH, right);
                left = left.wrapping_add(TILE_VALUES);
                right = right.wrapping_add(STEP_VALUES);
            }
        }
        store::<ROWS, COLUMNS>(a.sums, sums_step);
    }
}

/// [`block::finish`] of an f32 map with AVX-512.
///
/// # Safety
///
/// * As there, and the processor has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn finish(f: Finish<f32>) {
    // SAFETY: the contract is passed on.
    unsafe { block::finish::<Avx512<true>, f32, 2>(f) };
}

/// [`block::finish`] of a bf16 map with AVX-512.
///
/// # Safety
///
/// * As there, and the processor has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn finish_bf16(f: Finish<Bf16>) {
    // SAFETY: the contract is passed on.
    unsafe { block::finish::<Avx512<true>, Bf16, 2>(f) };
}

/// [`crate::loops::matrix::transpose`] with AVX-512: a transposition of 16 x 16 pairs.
///
/// # Safety
///
/// * As there, and the processor has AVX512-BF16 and AVX512-BW.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn transpose(pixels: &Rows<f32>, channels: usize, to: *mut Bf16) {
    // SAFETY: the masks keep loads within `channels`; stores are those of the contract.
    unsafe {
        let mask = ((1u32 << channels) - 1) as __mmask16;
        // The first and the second half of a register become the halves of each pair.
        let interleaved: [u16; 32] = std::array::from_fn(|i| (i / 2 + 16 * (i % 2)) as u16);
        let interleaved = _mm512_loadu_si512(interleaved.as_ptr().cast());
        let mut rows: [__m512i; TILE] = std::array::from_fn(|i| {
            let [first, second] = [pixels[2 * i], pixels[2 * i + 1]].map(|p| _mm512_maskz_loadu_ps(mask, p));
            let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
            _mm512_permutexvar_epi16(interleaved, rounded)
        });
        store_transposed(&mut rows, to);
    }
}

/// [`crate::loops::matrix::transpose_bf16`] with AVX-512.
///
/// # Safety
///
/// * As there, and the processor has AVX512-BW and AVX512-VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn transpose_bf16(pixels: &Rows<Bf16>, channels: usize, to: *mut Bf16) {
    // SAFETY: the mask keeps loads within `channels`; stores are those of the contract.
    unsafe {
        let mask = ((1u32 << channels) - 1) as __mmask16;
        let mut rows: [__m512i; TILE] = std::array::from_fn(|i| {
            let [first, second] = [pixels[2 * i], pixels[2 * i + 1]]
                .map(|p| _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.cast())));
            _mm512_or_si512(first, _mm512_slli_epi32::<16>(second))
        });
        store_transposed(&mut rows, to);
    }
}

/// Transposes 16 rows of pairs and stores them side by side.
///
/// # Safety
///
/// * `to` holds 16 · 32 values, and nothing else accesses them.
#[target_feature(enable = "avx512f")]
unsafe fn store_transposed(rows: &mut [__m512i; TILE], to: *mut Bf16) {
    transpose_16x16(rows);
    for (c, row) in rows.iter().enumerate() {
        // SAFETY: the offsets are those of the contract.
        unsafe { _mm512_storeu_si512(to.add(c * DEPTH).cast(), *row) };
    }
}

/// Transposes a matrix of 16 x 16 values of 32 bits.
#[target_feature(enable = "avx512f")]
fn transpose_16x16(rows: &mut [__m512i; TILE]) {
    let pairs: [__m512i; TILE] = std::array::from_fn(|i| {
        let (a, b) = (rows[i & !1], rows[i | 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
    });
    // Each 128-bit lane now holds columns of four rows.
    let quads: [__m512i; TILE] = std::array::from_fn(|i| {
        let (group, column) = (i & !3, i & 3);
        let (a, b) = (pairs[group + column / 2], pairs[group + 2 + column / 2]);
        if column % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
    });
    // quads[4 g + c], lane l: column 4 l + c of rows 4 g to 4 g + 3.
    for c in 0..4 {
        let [a, b, c_, d] = [quads[c], quads[4 + c], quads[8 + c], quads[12 + c]];
        let (ab_even, ab_odd) =
            (_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b));
        let (cd_even, cd_odd) =
            (_mm512_shuffle_i32x4::<0b10_00_10_00>(c_, d), _mm512_shuffle_i32x4::<0b11_01_11_01>(c_, d));
        // Lanes of `ab_even`: a0 a2 b0 b2.
        rows[c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_even, cd_even);
        rows[8 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_even, cd_even);
        rows[4 + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_odd, cd_odd);
        rows[12 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_odd, cd_odd);
    }
}

/// [`crate::loops::matrix::transpose_pairs`] with AVX-512.
///
/// # Safety
///
/// * As there, and the processor has AVX512-BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn transpose_pairs(channels: &ChannelRows, values: usize, to: *mut Bf16) {
    // SAFETY: the mask keeps loads within `values`; stores are those of the contract.
    unsafe {
        let mask = ((1u64 << values) - 1) as __mmask32;
        let mut rows = channels.map(|channel| _mm512_maskz_loadu_epi16(mask, channel.cast()));
        transpose_16x16(&mut rows);
        for (p, row) in rows.iter().enumerate() {
            _mm512_storeu_si512(to.add(p * 2 * BLOCK).cast(), *row);
        }
    }
}

/// [`crate::loops::matrix::interleave`] with AVX-512.
///
/// # Safety
///
/// * As there, and the processor has AVX512-BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleave(pixels: &Rows<Bf16>, channels: usize, to: *mut Bf16) {
    // SAFETY: the masks keep loads within `channels`; stores are those of the contract.
    unsafe {
        let mask = ((1u64 << channels) - 1) as __mmask32;
        let [low, high] = [0, 16].map(|first| {
            let places: [u16; 32] = std::array::from_fn(|i| (first + i / 2 + 32 * (i % 2)) as u16);
            _mm512_loadu_si512(places.as_ptr().cast())
        });
        for i in 0..TILE {
            let [a, b] = [pixels[2 * i], pixels[2 * i + 1]].map(|p| _mm512_maskz_loadu_epi16(mask, p.cast()));
            let to = to.add(2 * BLOCK * i);
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(to.add(BLOCK).cast(), _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

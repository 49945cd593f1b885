//! AVX-512: 32 registers of 16 values. A tile of 8 pixels by 2 registers has 16 sums, enough to
//! hide the latency of two FMA units. Tiles of 12 and 14 pixels measured no faster
//! (docs/log/training-speed.md).

use std::arch::x86_64::*;

use super::table::{Isa, compile_bf16, compile_f32};
use crate::simd::{Bf16, Maps, Product, Simd, StoreBf16};

const F32: Isa = compile_f32!("avx512", Avx512<false>, pixels: 8, rows: 8, #[target_feature(enable = "avx512f")]);

pub(super) static ISA: Isa = F32;

/// Base of the tables that multiply bf16.
pub(super) const BF16: Isa = Isa {
    name: "avx512 with bf16",
    bf16: Some(compile_bf16!(
        Avx512<true>, Avx512Pairs, pixels: 8, rows: 8, #[target_feature(enable = "avx512f,avx512bf16")]
    )),
    ..F32
};

pub(super) static BF16_ISA: Isa = BF16;

/// With `BF16`, the processor has AVX512-BF16 too.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>;

/// `vdpbf16ps`: two products of bf16 per lane.
#[derive(Clone, Copy)]
struct Avx512Pairs;

// SAFETY of the methods: the processor has the instructions, and pointers hold one pair, or
// sixteen, by the trait's contract.
impl Product for Avx512Pairs {
    type Sum = Avx512<true>;
    type Operand = Bf16;
    type Register = __m512bh;

    #[inline(always)]
    unsafe fn broadcast(from: *const Bf16) -> __m512bh {
        unsafe { as_bf16(_mm512_set1_epi32(from.cast::<i32>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn load_operands(from: *const Bf16) -> __m512bh {
        unsafe { as_bf16(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn dot(a: __m512bh, b: __m512bh, sum: __m512) -> __m512 {
        unsafe { _mm512_dpbf16_ps(sum, a, b) }
    }
}

/// Reinterprets the bits of a register.
#[inline(always)]
fn as_bf16(register: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes of plain data.
    unsafe { std::mem::transmute(register) }
}

/// Rounds sixteen values to bf16.
///
/// # Safety
///
/// * The processor has AVX512-BF16.
#[inline(always)]
unsafe fn round(value: __m512) -> __m256i {
    // SAFETY: the processor has the instruction; both types are 32 bytes of plain data.
    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(value)) }
}

// SAFETY of the methods: the processor has the instructions, and pointers hold sixteen pairs, by
// the trait's contract.
impl StoreBf16 for Avx512<true> {
    #[inline(always)]
    unsafe fn store_pair_first(to: *mut Bf16, value: __m512) {
        unsafe { _mm512_storeu_si512(to.cast(), _mm512_cvtepu16_epi32(round(value))) }
    }

    #[inline(always)]
    unsafe fn store_pair_second(to: *mut Bf16, value: __m512) {
        unsafe {
            let second = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(round(value)));
            _mm512_storeu_si512(to.cast(), _mm512_or_si512(_mm512_loadu_si512(to.cast_const().cast()), second));
        }
    }
}

// SAFETY of the methods: the processor has the instructions, and pointers hold sixteen values, by
// the trait's contract.
impl<const BF16: bool> Maps for Avx512<BF16> {
    #[inline(always)]
    unsafe fn load_bf16(from: *const Bf16) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut Bf16, value: __m512) {
        unsafe {
            let rounded = if BF16 {
                round(value)
            } else {
                // As in `Bf16::round`.
                let bits = _mm512_castps_si512(value);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let carried = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
                let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
                let rounded = _mm512_mask_or_epi32(carried, is_nan, bits, _mm512_set1_epi32(1 << 22));
                _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
            };
            _mm256_storeu_si256(to.cast(), rounded)
        }
    }

    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn where_positive(condition: __m512, value: __m512) -> __m512 {
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(condition, _mm512_setzero_ps()), value) }
    }
}

// SAFETY of the methods: the processor has the instructions, and pointers hold sixteen values, by
// the trait's contract.
impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
}

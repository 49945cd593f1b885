//! AVX2 with FMA: 16 registers of 8 values. A tile of 6 pixels by 2 registers has 12 sums; with 2
//! registers of weights and 1 broadcast it uses 15 registers.

use std::arch::x86_64::*;

use super::table::{Isa, compile_f32};
use crate::simd::{Bf16, Maps, Simd};

pub(super) static ISA: Isa = compile_f32!("avx2", Avx2, pixels: 6, rows: 6, #[target_feature(enable = "avx2,fma")]);

#[derive(Clone, Copy)]
struct Avx2;

// SAFETY of the methods: the processor has the instructions, and pointers hold eight values, by the
// trait's contract.
impl Maps for Avx2 {
    #[inline(always)]
    unsafe fn load_bf16(from: *const Bf16) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut Bf16, value: __m256) {
        unsafe {
            // As in `Bf16::round`.
            let bits = _mm256_castps_si256(value);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let carried = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
            let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(value, value);
            let rounded = _mm256_blendv_ps(_mm256_castsi256_ps(carried), _mm256_castsi256_ps(quiet), is_nan);
            let upper = _mm256_srli_epi32::<16>(_mm256_castps_si256(rounded));
            // Each 128-bit half is packed on its own: halves 0 and 2 hold the values.
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(upper, upper));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed))
        }
    }

    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn where_positive(condition: __m256, value: __m256) -> __m256 {
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(condition, _mm256_setzero_ps()), value) }
    }
}

// SAFETY of the methods: the processor has the instructions, and pointers hold eight values, by the
// trait's contract.
impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m256) {
        unsafe { _mm256_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
}

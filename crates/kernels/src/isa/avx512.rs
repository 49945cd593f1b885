//! AVX-512: 32 registers of 16. Eight pixels by two registers are 16 sums, enough to hide the latency of two FMA units; the broadcast is part of the FMA.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _mm256_storeu_si256, _mm512_add_ps, _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh,
    _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_ps,
};

super::isa!("avx512", Avx512, pixels 8, rows 8, #[target_feature(enable = "avx512f")]);

super::halves!("avx512 with bf16", Avx512, Pairs, pixels 8, rows 8, #[target_feature(enable = "avx512f,avx512bf16")]);

#[derive(Clone, Copy)]
struct Avx512;

/// `vdpbf16ps`: two products a lane.
#[derive(Clone, Copy)]
struct Pairs;

// SAFETY of all: the instructions are there by the trait's contract, the pointers hold sixteen pairs, or one.
impl Product for Pairs {
    type Sum = Avx512;
    type Factor = Bf16;
    type Register = __m512bh;

    #[inline(always)]
    unsafe fn spread(from: *const Bf16) -> __m512bh {
        unsafe { bits(_mm512_set1_epi32(from.cast::<i32>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn factors(from: *const Bf16) -> __m512bh {
        unsafe { bits(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn dot(a: __m512bh, b: __m512bh, sum: __m512) -> __m512 {
        unsafe { _mm512_dpbf16_ps(sum, a, b) }
    }
}

#[inline(always)]
fn bits(of: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, and all bits are good.
    unsafe { std::mem::transmute(of) }
}

#[inline(always)]
unsafe fn rounded_register(value: __m512) -> __m256i {
    // SAFETY: the caller has the instruction; both are 32 bytes, and all bits are good.
    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(value)) }
}

// SAFETY of all: the instructions are there by the trait's contract, the pointers hold sixteen values, or pairs.
impl Round for Avx512 {
    #[inline(always)]
    unsafe fn half(to: *mut Bf16, value: __m512) {
        unsafe { _mm256_storeu_si256(to.cast(), rounded_register(value)) }
    }

    #[inline(always)]
    unsafe fn first(to: *mut Bf16, value: __m512) {
        unsafe { _mm512_storeu_si512(to.cast(), _mm512_cvtepu16_epi32(rounded_register(value))) }
    }

    #[inline(always)]
    unsafe fn second(to: *mut Bf16, value: __m512) {
        unsafe {
            let second = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(rounded_register(value)));
            _mm512_storeu_si512(to.cast(), _mm512_or_si512(_mm512_loadu_si512(to.cast_const().cast()), second));
        }
    }
}

// SAFETY of all: the instructions are there by the trait's contract, the pointers hold sixteen values.
impl Simd for Avx512 {
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

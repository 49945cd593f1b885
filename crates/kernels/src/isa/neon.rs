//! NEON: 32 registers of 4 values. A tile of 8 pixels by 2 registers has 16 sums.

use std::arch::aarch64::{
    float32x4_t, vaddq_f32, vandq_u32, vbslq_f32, vcgtq_f32, vdupq_n_f32, vfmaq_f32, vld1_u16, vld1q_f32, vmovl_u16,
    vmulq_f32, vreinterpretq_f32_u32, vreinterpretq_u32_f32, vshlq_n_u32, vst1q_f32, vsubq_f32,
};

use super::table::{Isa, compile_f32};
use crate::simd::{Bf16, Maps, Simd};

pub(super) static ISA: Isa = compile_f32!("neon", Neon, pixels: 8, rows: 8, #[target_feature(enable = "neon")]);

#[derive(Clone, Copy)]
struct Neon;

// SAFETY of the methods: every aarch64 processor has NEON, and pointers hold four values by the
// trait's contract.
impl Maps for Neon {
    #[inline(always)]
    unsafe fn load_bf16(from: *const Bf16) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut Bf16, value: float32x4_t) {
        let mut values = [0.0f32; 4];
        unsafe {
            vst1q_f32(values.as_mut_ptr(), value);
            for (i, value) in values.into_iter().enumerate() {
                *to.add(i) = Bf16::round(value);
            }
        }
    }

    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }

    #[inline(always)]
    unsafe fn where_positive(condition: float32x4_t, value: float32x4_t) -> float32x4_t {
        unsafe {
            let positive = vcgtq_f32(condition, vdupq_n_f32(0.0));
            vreinterpretq_f32_u32(vandq_u32(positive, vreinterpretq_u32_f32(value)))
        }
    }
}

// SAFETY of the methods: every aarch64 processor has NEON, and pointers hold four values by the
// trait's contract.
impl Simd for Neon {
    type V = float32x4_t;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: float32x4_t) {
        unsafe { vst1q_f32(to, value) }
    }

    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
}

//! Portable fallback: arrays of four values, which the compiler maps to the target's baseline
//! instructions.

use super::table::{Isa, MatrixLoops, compile_bf16, compile_f32};
use crate::{
    loops::{
        block,
        matrix::{self, BLOCK},
    },
    simd::{Bf16, Maps, Product, Scalar, Simd, StoreBf16},
};

// `cfg(all())` is always true: the place of the target features, of which there are none.
const F32: Isa = compile_f32!("portable", Portable, pixels: 4, rows: 4, #[cfg(all())]);

pub(super) static ISA: Isa = F32;

pub(super) static BF16_ISA: Isa = Isa {
    name: "portable with bf16",
    bf16: Some(compile_bf16!(Portable, PortablePairs, pixels: 4, rows: 4, #[cfg(all())])),
    ..F32
};

/// The definitions of the matrix loops, for tests of everything around them.
pub(super) static MATRIX_ISA: Isa = Isa {
    name: "portable with tiles",
    bf16: Some(compile_bf16!(Portable, PortablePairs, pixels: 4, rows: 4, #[cfg(all())])),
    matrix: Some(MatrixLoops {
        configure: || (),
        release: || (),
        multiply: matrix::multiply,
        accumulate: matrix::accumulate,
        finish: block::finish::<Scalar, f32, BLOCK>,
        finish_bf16: block::finish::<Scalar, Bf16, BLOCK>,
        transpose: matrix::transpose,
        transpose_bf16: matrix::transpose_bf16,
        transpose_pairs: matrix::transpose_pairs,
        interleave: matrix::interleave,
    }),
    ..F32
};

#[derive(Clone, Copy)]
struct Portable;

/// Two products of bf16 per lane, computed in f32.
#[derive(Clone, Copy)]
struct PortablePairs;

// SAFETY of the methods: pointers hold one pair, or four, by the trait's contract.
impl Product for PortablePairs {
    type Sum = Portable;
    type Operand = Bf16;
    type Register = [[Bf16; 2]; 4];

    #[inline(always)]
    unsafe fn broadcast(from: *const Bf16) -> [[Bf16; 2]; 4] {
        unsafe { [from.cast::<[Bf16; 2]>().read_unaligned(); 4] }
    }

    #[inline(always)]
    unsafe fn load_operands(from: *const Bf16) -> [[Bf16; 2]; 4] {
        unsafe { from.cast::<[[Bf16; 2]; 4]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn dot(a: [[Bf16; 2]; 4], b: [[Bf16; 2]; 4], sum: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i][0].to_f32() * b[i][0].to_f32() + a[i][1].to_f32() * b[i][1].to_f32() + sum[i])
    }
}

// SAFETY of the methods: pointers hold four values by the trait's contract.
impl Maps for Portable {
    #[inline(always)]
    unsafe fn load_bf16(from: *const Bf16) -> [f32; 4] {
        unsafe { from.cast::<[Bf16; 4]>().read_unaligned().map(Bf16::to_f32) }
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut Bf16, value: [f32; 4]) {
        unsafe { to.cast::<[Bf16; 4]>().write_unaligned(value.map(Bf16::round)) }
    }

    #[inline(always)]
    unsafe fn max(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i].max(b[i]))
    }

    #[inline(always)]
    unsafe fn where_positive(condition: [f32; 4], value: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if condition[i] > 0.0 { value[i] } else { 0.0 })
    }
}

// SAFETY of the methods: pointers hold four pairs by the trait's contract.
impl StoreBf16 for Portable {
    #[inline(always)]
    unsafe fn store_pair_first(to: *mut Bf16, value: [f32; 4]) {
        unsafe { to.cast::<[[Bf16; 2]; 4]>().write(value.map(|v| [Bf16::round(v), Bf16::default()])) }
    }

    #[inline(always)]
    unsafe fn store_pair_second(to: *mut Bf16, value: [f32; 4]) {
        for (i, v) in value.into_iter().enumerate() {
            unsafe { *to.add(2 * i + 1) = Bf16::round(v) }
        }
    }
}

// SAFETY of the methods: pointers hold four values by the trait's contract.
impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 4] {
        [value; 4]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 4] {
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: [f32; 4]) {
        unsafe { to.cast::<[f32; 4]>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn sub(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
}

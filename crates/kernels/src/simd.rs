//! Vector operations that an instruction set provides, as traits.
//!
//! An instruction set implements [`Simd`] for its f32 registers. Where it multiplies bf16, it also
//! implements [`Product`] and [`StoreBf16`]. The generic loops of [`crate::loops`] are written
//! against these traits alone; [`crate::isa`] compiles them for each instruction set.
//!
//! Every method is `unsafe` and `#[inline(always)]`: it ends up inside a function with the target
//! features of its instruction set. Called from anywhere else, it would be a real call that passes
//! registers through memory, or an illegal instruction.

/// The vector operations on registers of f32.
///
/// # Safety
///
/// Callers of any method guarantee that
///
/// * the processor has the instruction set;
/// * `load` and `store` get a pointer to `LANES` values, of any alignment.
pub(crate) trait Simd: Copy {
    /// A register.
    type V: Copy;
    /// Number of f32 values in a register.
    const LANES: usize;
    /// Returns a register with `value` in all lanes.
    unsafe fn splat(value: f32) -> Self::V;
    /// Loads a register from memory.
    unsafe fn load(from: *const f32) -> Self::V;
    /// Stores a register to memory.
    unsafe fn store(to: *mut f32, value: Self::V);
    /// a + b.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a − b.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a · b.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

/// Scalar type of the operands of a product: f32 or [`Bf16`].
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// Number of adjacent operands that one lane multiplies and adds in a single instruction.
    const DEPTH: usize;
}

impl Element for f32 {
    const DEPTH: usize = 1;
}

impl Element for Bf16 {
    const DEPTH: usize = 2;
}

/// Multiplication of two registers of operands into a register of f32 sums.
///
/// # Safety
///
/// Callers of any method guarantee that
///
/// * the processor has the instruction set;
/// * `broadcast` gets a pointer to `DEPTH` operands, of any alignment;
/// * `load_operands` gets a pointer to `LANES · DEPTH` operands, of any alignment.
pub(crate) trait Product: Copy {
    /// Instruction set of the sums.
    type Sum: Simd;
    /// Scalar type of the operands.
    type Operand: Element;
    /// A register of operands.
    type Register: Copy;
    /// Returns a register with the same `DEPTH` operands in all lanes.
    unsafe fn broadcast(from: *const Self::Operand) -> Self::Register;
    /// Loads a register of operands from memory.
    unsafe fn load_operands(from: *const Self::Operand) -> Self::Register;
    /// sum + a · b, where each lane adds its `DEPTH` products.
    unsafe fn dot(a: Self::Register, b: Self::Register, sum: <Self::Sum as Simd>::V) -> <Self::Sum as Simd>::V;
}

/// Plain f32 multiplication: each lane holds one operand.
impl<S: Simd> Product for S {
    type Sum = S;
    type Operand = f32;
    type Register = S::V;

    #[inline(always)]
    unsafe fn broadcast(from: *const f32) -> S::V {
        // SAFETY: `from` points to one operand by the contract.
        unsafe { S::splat(*from) }
    }

    #[inline(always)]
    unsafe fn load_operands(from: *const f32) -> S::V {
        // SAFETY: with a depth of 1 the contract is that of `Simd::load`.
        unsafe { S::load(from) }
    }

    #[inline(always)]
    unsafe fn dot(a: S::V, b: S::V, sum: S::V) -> S::V {
        // SAFETY: the processor has the instruction set by the contract.
        unsafe { S::fma(a, b, sum) }
    }
}

/// Operations on maps: loads and stores in bf16, and those of a ReLU and its gradient.
///
/// # Safety
///
/// Callers of any method guarantee that
///
/// * the processor has the instruction set;
/// * `load_bf16` and `store_bf16` get a pointer to `LANES` values, of any alignment.
pub(crate) trait Maps: Simd {
    /// Loads a register from values in bf16.
    unsafe fn load_bf16(from: *const Bf16) -> Self::V;
    /// Stores a register, rounded as by [`Bf16::round`]. Subnormal values may become 0.
    unsafe fn store_bf16(to: *mut Bf16, value: Self::V);
    /// The greater of a and b; b if a is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Value where the condition is positive, else 0.
    unsafe fn where_positive(condition: Self::V, value: Self::V) -> Self::V;
}

/// Stores of f32 registers as pairs of bf16.
///
/// # Safety
///
/// Callers of any method guarantee that
///
/// * the processor has the instruction set;
/// * the methods get a pointer to `LANES` pairs of values;
/// * the first values of the pairs are initialized before `store_pair_second`.
pub(crate) trait StoreBf16: Maps {
    /// Stores each lane as the first value of a pair, with 0 as the second.
    unsafe fn store_pair_first(to: *mut Bf16, value: Self::V);
    /// Stores each lane as the second value of a pair and keeps the first.
    unsafe fn store_pair_second(to: *mut Bf16, value: Self::V);
}

/// Brain floating point: the upper half of an f32 (sign, 8 exponent bits, 7 fraction bits).
#[derive(Debug, Clone, Copy, Default)]
#[repr(transparent)]
pub struct Bf16(u16);

impl PartialEq for Bf16 {
    #[inline(always)]
    fn eq(&self, other: &Bf16) -> bool {
        self.to_f32() == other.to_f32()
    }
}

impl PartialOrd for Bf16 {
    #[inline(always)]
    fn partial_cmp(&self, other: &Bf16) -> Option<std::cmp::Ordering> {
        self.to_f32().partial_cmp(&other.to_f32())
    }

    #[inline(always)]
    fn le(&self, other: &Bf16) -> bool {
        self.to_f32() <= other.to_f32()
    }
}

impl Bf16 {
    /// Reinterprets bits as values.
    pub fn from_bits(bits: &[u16]) -> &[Bf16] {
        // SAFETY: `Bf16` has the layout of `u16`, and any bits are a value.
        unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len()) }
    }

    /// Reinterprets values as their bits.
    pub fn into_bits(values: Vec<Bf16>) -> Vec<u16> {
        let mut values = std::mem::ManuallyDrop::new(values);
        // SAFETY: pointer, length and capacity are those of the vector, which is not dropped;
        // `Bf16` has the layout of `u16`.
        unsafe { Vec::from_raw_parts(values.as_mut_ptr().cast(), values.len(), values.capacity()) }
    }

    /// Rounds to the nearest value, ties to even. NaN stays NaN.
    #[inline(always)]
    pub fn round(value: f32) -> Bf16 {
        let bits = value.to_bits();
        // The carry of the addition could turn a NaN into an infinity or zero: it is made quiet
        // instead.
        let rounded = if value.is_nan() { bits | 1 << 22 } else { bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) };
        Bf16((rounded >> 16) as u16)
    }

    /// Converts to f32, exactly.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// Types of stored values: f32 or [`Bf16`].
pub(crate) trait Value: Copy {
    /// Converts to f32, exactly.
    fn widen(self) -> f32;
    /// Rounds to this type.
    fn narrow(value: f32) -> Self;
    /// Loads a register.
    ///
    /// # Safety
    ///
    /// * The processor has the instruction set of `V`.
    /// * `from` points to `LANES` values, of any alignment.
    unsafe fn load<V: Maps>(from: *const Self) -> V::V;
    /// Stores a register, rounded to this type.
    ///
    /// # Safety
    ///
    /// * As for [`load`](Value::load).
    unsafe fn store<V: Maps>(to: *mut Self, value: V::V);
}

impl Value for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    unsafe fn load<V: Maps>(from: *const f32) -> V::V {
        // SAFETY: the contract is the same.
        unsafe { V::load(from) }
    }

    #[inline(always)]
    unsafe fn store<V: Maps>(to: *mut f32, value: V::V) {
        // SAFETY: the contract is the same.
        unsafe { V::store(to, value) }
    }
}

impl Value for Bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(value: f32) -> Bf16 {
        Bf16::round(value)
    }

    #[inline(always)]
    unsafe fn load<V: Maps>(from: *const Bf16) -> V::V {
        // SAFETY: the contract is the same.
        unsafe { V::load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn store<V: Maps>(to: *mut Bf16, value: V::V) {
        // SAFETY: the contract is the same.
        unsafe { V::store_bf16(to, value) }
    }
}

/// A register of a single f32: the remainder loops' "instruction set", available everywhere.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

// SAFETY of the implementation: plain arithmetic; pointers hold one value by the contract.
impl Simd for Scalar {
    type V = f32;
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn splat(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> f32 {
        unsafe { *from }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: f32) {
        unsafe { *to = value }
    }

    #[inline(always)]
    unsafe fn add(a: f32, b: f32) -> f32 {
        a + b
    }

    #[inline(always)]
    unsafe fn sub(a: f32, b: f32) -> f32 {
        a - b
    }

    #[inline(always)]
    unsafe fn mul(a: f32, b: f32) -> f32 {
        a * b
    }

    #[inline(always)]
    unsafe fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

// SAFETY of the methods: pointers hold one value by the contract.
impl Maps for Scalar {
    #[inline(always)]
    unsafe fn load_bf16(from: *const Bf16) -> f32 {
        unsafe { (*from).to_f32() }
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut Bf16, value: f32) {
        unsafe { *to = Bf16::round(value) }
    }

    #[inline(always)]
    unsafe fn max(a: f32, b: f32) -> f32 {
        a.max(b)
    }

    #[inline(always)]
    unsafe fn where_positive(condition: f32, value: f32) -> f32 {
        if condition > 0.0 { value } else { 0.0 }
    }
}

// SAFETY of the implementation: pointers hold one pair by the contract.
impl StoreBf16 for Scalar {
    #[inline(always)]
    unsafe fn store_pair_first(to: *mut Bf16, value: f32) {
        unsafe { to.cast::<[Bf16; 2]>().write([Bf16::round(value), Bf16::default()]) }
    }

    #[inline(always)]
    unsafe fn store_pair_second(to: *mut Bf16, value: f32) {
        unsafe { *to.add(1) = Bf16::round(value) }
    }
}

/// Number of f32 values in a cache line.
pub(crate) const CACHE_LINE: usize = 16;

/// Prefetches a cache line that is about to be read, or written if `WRITE`.
///
/// For access patterns that the hardware prefetcher cannot predict. It is a hint: it changes no
/// value, and it is a no-op on processors other than x86-64.
#[inline(always)]
pub(crate) fn prefetch<const WRITE: bool>(line: *const impl Sized) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, and it accepts any address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
        if WRITE {
            _mm_prefetch::<_MM_HINT_ET0>(line.cast())
        } else {
            _mm_prefetch::<_MM_HINT_T0>(line.cast())
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        let round = |bits: u32| Bf16::round(f32::from_bits(bits)).0;
        assert_eq!(round(0x3F80_7FFF), 0x3F80);
        assert_eq!(round(0x3F80_8000), 0x3F80);
        assert_eq!(round(0x3F81_8000), 0x3F82);
        assert_eq!(round(0xBF80_8001), 0xBF81);
        assert_eq!(Bf16::round(f32::MAX).to_f32(), f32::INFINITY);
        assert!(Bf16::round(f32::from_bits(0x7FFF_FFFF)).to_f32().is_nan());
        assert_eq!(Bf16::round(-0.0).0, 0x8000);
    }
}

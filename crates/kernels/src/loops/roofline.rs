//! Peak arithmetic throughput.

use crate::simd::Simd;

/// Number of independent chains in [`fma_chains`]: more than latency × units of any processor,
/// fewer than the registers of the narrowest instruction set.
pub(crate) const CHAINS: usize = 12;

/// Runs `n` FMAs in each of [`CHAINS`] registers and returns their sum. `factor` must be opaque to
/// the compiler, or it would evaluate the loop in closed form.
///
/// # Safety
///
/// * The processor has `S`.
#[inline(always)]
pub(crate) unsafe fn fma_chains<S: Simd>(n: usize, factor: f32) -> f32 {
    // SAFETY: the processor has `S`, and the buffer holds the widest register.
    unsafe {
        let (a, b) = (S::splat(factor), S::splat(0.001));
        let mut sums = [S::splat(1.0); CHAINS];
        for _ in 0..n {
            for sum in &mut sums {
                *sum = S::fma(*sum, a, b);
            }
        }
        let mut out = [0.0f32; 16];
        let mut total = 0.0;
        for sum in sums {
            S::store(out.as_mut_ptr(), sum);
            total += out[0];
        }
        total
    }
}

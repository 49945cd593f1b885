//! Instruction sets: the loops of `loops` compiled for each, and the choice among them.
//!
//! Each instruction set is one file. It implements `Simd` with its intrinsics, chooses the height
//! of its tiles, and compiles the table's loops with its target features enabled. To add one, write
//! the file and add it to [`available`]; to multiply bf16 with it, add it to [`available_bf16`]
//! too, under a name that begins with the instruction set's.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod table;

pub use table::Isa;
pub(crate) use table::{Bf16Loops, MatrixLoops};

/// Error of [`choose`]: `BYOL_ISA` names an instruction set that this processor does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`BYOL_ISA={requested}` is not supported by this processor\nhint: unset it, or set it to one of: {}",
    .available.join(", ")
)]
pub struct UnsupportedIsa {
    /// Value of `BYOL_ISA`.
    pub requested: String,
    /// Names of the supported instruction sets.
    pub available: Vec<&'static str>,
}

/// Returns the instruction sets of this processor, the widest first.
pub fn available() -> Vec<&'static Isa> {
    let mut all = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            all.push(&avx512::ISA);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(&avx2::ISA);
        }
    }
    #[cfg(target_arch = "aarch64")]
    all.push(&neon::ISA);
    all.push(&portable::ISA);
    all
}

/// Returns the bf16 variants of all instruction sets of this processor. Their convolutions round
/// the operands to bf16 and sum in f32; inputs and outputs are f32 as for all others.
pub fn available_bf16() -> Vec<&'static Isa> {
    let mut all = Vec::new();
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
        if amx::is_available() {
            all.push(&amx::ISA);
        }
        all.push(&avx512::BF16_ISA);
    }
    all.extend([&portable::BF16_ISA, &portable::MATRIX_ISA]);
    all
}

/// Returns the variant of `isa` that multiplies bf16, if the processor has one: the fastest.
pub fn with_bf16(isa: &Isa) -> Option<&'static Isa> {
    // The name of a variant begins with that of its instruction set. (Portable bf16 is slower than
    // f32, and for tests.)
    available_bf16().into_iter().find(|variant| variant.name.split(' ').next() == Some(isa.name))
}

/// Returns the instruction set of this process: the one that `BYOL_ISA` names, else the widest. The
/// variable is read once.
///
/// # Errors
///
/// [`UnsupportedIsa`] if the processor does not have the instruction set that `BYOL_ISA` names.
pub fn choose() -> Result<&'static Isa, UnsupportedIsa> {
    static CHOICE: OnceLock<Result<&'static Isa, UnsupportedIsa>> = OnceLock::new();
    let choose = || {
        let all = available();
        match std::env::var("BYOL_ISA") {
            Err(_) => Ok(all[0]),
            Ok(requested) => all
                .iter()
                .copied()
                .find(|isa| isa.name == requested)
                .ok_or_else(|| UnsupportedIsa { requested, available: all.iter().map(|isa| isa.name).collect() }),
        }
    };
    CHOICE.get_or_init(choose).clone()
}

/// Returns the result of [`choose`], for callers that have checked it before.
///
/// # Panics
///
/// If `BYOL_ISA` names an instruction set that the processor does not have.
pub fn current() -> &'static Isa {
    choose().unwrap_or_else(|error| panic!("{error}"))
}

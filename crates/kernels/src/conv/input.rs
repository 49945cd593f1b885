//! Inputs of convolutions.

use super::operand::Operand;
use crate::{
    isa::Isa,
    memory::as_uninit,
    norm::DeferredNorm,
    simd::Bf16,
    storage::{Storage, Values, to_f32},
};

/// Input of a convolution: a finished map, or the output of another convolution whose norm and ReLU
/// are applied on reading.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// Values, `[n, h, w, c_in]`.
    pub values: Values<'a>,
    /// Norm to apply to every value that is read.
    pub norm: Option<&'a DeferredNorm>,
}

impl<'a, T: Storage> From<&'a [T]> for Input<'a> {
    fn from(values: &'a [T]) -> Self {
        Input { values: T::values(values), norm: None }
    }
}

impl<'a> Input<'a> {
    /// Returns the input with f32 values. Those of another type are converted into `buffer`.
    pub(super) fn to_f32(self, isa: &Isa, buffer: &'a mut Vec<f32>) -> F32Input<'a> {
        let values = match self.values {
            Values::F32(values) => values,
            Values::Bf16(values) => {
                *buffer = to_f32(isa, values);
                buffer
            }
        };
        F32Input { values, norm: self.norm }
    }
}

/// An [`Input`] whose values are f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct F32Input<'a> {
    pub values: &'a [f32],
    pub norm: Option<&'a DeferredNorm>,
}

impl<'a> From<&'a [f32]> for F32Input<'a> {
    fn from(values: &'a [f32]) -> Self {
        F32Input { values, norm: None }
    }
}

impl F32Input<'_> {
    /// Reads finished values into `to`, from offset `from` on. Both are whole pixels.
    pub fn read_f32(&self, isa: &Isa, from: usize, to: &mut [f32]) {
        let values = &self.values[from..from + to.len()];
        match self.norm {
            None => to.copy_from_slice(values),
            // SAFETY: the norm writes numbers only.
            Some(norm) => norm.apply(isa, values, unsafe { as_uninit(to) }),
        }
    }
}

/// Inputs that convert what they read to operands.
pub(super) trait ReadOperands<'a, T: Operand> {
    /// Returns all values, if they are operands already and have no norm.
    fn borrow(&self) -> Option<&'a [T]>;

    /// Reads finished values into `to`, from offset `from` on. Both are whole pixels. `scratch`
    /// holds values between norm and rounding.
    fn read_operands(&self, isa: &Isa, from: usize, to: &mut [T], scratch: &mut Vec<f32>);
}

impl<'a, T: Operand> ReadOperands<'a, T> for F32Input<'a> {
    fn borrow(&self) -> Option<&'a [T]> {
        T::borrow_f32(self.values).filter(|_| self.norm.is_none())
    }

    fn read_operands(&self, isa: &Isa, from: usize, to: &mut [T], scratch: &mut Vec<f32>) {
        if let Some(to) = T::as_f32_mut(to) {
            self.read_f32(isa, from, to);
        } else if self.norm.is_none() {
            T::round(isa, &self.values[from..from + to.len()], to);
        } else {
            scratch.resize(to.len().max(scratch.len()), 0.0);
            let scratch = &mut scratch[..to.len()];
            self.read_f32(isa, from, scratch);
            T::round(isa, scratch, to);
        }
    }
}

impl<'a> ReadOperands<'a, Bf16> for Input<'a> {
    fn borrow(&self) -> Option<&'a [Bf16]> {
        match self.values {
            Values::Bf16(values) if self.norm.is_none() => Some(values),
            _ => None,
        }
    }

    fn read_operands(&self, isa: &Isa, from: usize, to: &mut [Bf16], scratch: &mut Vec<f32>) {
        match (self.values, self.norm) {
            (Values::F32(values), norm) => F32Input { values, norm }.read_operands(isa, from, to, scratch),
            (Values::Bf16(values), None) => to.copy_from_slice(&values[from..from + to.len()]),
            (Values::Bf16(values), Some(norm)) => {
                // SAFETY: the norm writes numbers only.
                norm.apply(isa, &values[from..from + to.len()], unsafe { as_uninit(to) });
            }
        }
    }
}

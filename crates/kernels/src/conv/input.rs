//! Inputs of convolutions.

use super::operand::Operand;
use crate::{isa::Isa, memory::as_uninit, norm::DeferredNorm};

/// Input of a convolution: a finished map, or the output of another convolution whose norm and ReLU
/// are applied on reading.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// Values, `[n, h, w, c_in]`.
    pub values: &'a [f32],
    /// Norm to apply to every value that is read.
    pub norm: Option<&'a DeferredNorm>,
}

impl<'a> From<&'a [f32]> for Input<'a> {
    fn from(values: &'a [f32]) -> Self {
        Input { values, norm: None }
    }
}

impl Input<'_> {
    /// Reads finished values into `to`, from offset `from` on. Both are whole pixels.
    pub(super) fn read_f32(&self, isa: &Isa, from: usize, to: &mut [f32]) {
        let values = &self.values[from..from + to.len()];
        match self.norm {
            None => to.copy_from_slice(values),
            // SAFETY: the norm writes numbers only.
            Some(norm) => norm.apply(isa, values, unsafe { as_uninit(to) }),
        }
    }

    /// Reads operands like [`read_f32`](Input::read_f32). `scratch` holds values between norm and
    /// rounding.
    pub(super) fn read_operands<T: Operand>(&self, isa: &Isa, from: usize, to: &mut [T], scratch: &mut Vec<f32>) {
        if let Some(to) = T::as_f32_mut(to) {
            self.read_f32(isa, from, to);
        } else if self.norm.is_none() {
            T::round(isa, &self.values[from..from + to.len()], to);
        } else {
            scratch.resize(to.len(), 0.0);
            self.read_f32(isa, from, scratch);
            T::round(isa, scratch, to);
        }
    }
}

//! Gradient accumulation for tensors that several layers read, in the kernels of the CPU.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use burn::tensor::Tensor;

/// State shared by the layers that read one map, or one weight. Each adds its part to the gradient;
/// a convolution adds the earlier parts to its own, which saves a pass over both.
#[derive(Debug, Clone, Default)]
pub struct Readers(Arc<AtomicBool>);

impl Readers {
    /// Notes that a reader has registered its part of the gradient. Returns whether another one had
    /// done so.
    pub(crate) fn register(&self) -> bool {
        // The backward passes of a graph run one after the other.
        self.0.swap(true, Ordering::Relaxed)
    }
}

/// Weight of a convolution, `[C_out, C_in, K, K]`.
#[derive(Debug, Clone)]
pub struct Weight {
    pub(super) tensor: Tensor<4>,
    pub(super) readers: Readers,
}

impl From<Tensor<4>> for Weight {
    fn from(tensor: Tensor<4>) -> Self {
        Weight { tensor, readers: Readers::default() }
    }
}

//! Convolution, batch norm, pooling and the update of the weights for the CPU: `f32` slices in, `f32` slices out, channels last. Knows nothing of tensors, autodiff or images.
//!
//! The order of every summation is fixed by the shapes and the instruction set, never by the number of threads: 1 thread and 2 give the
//! same bits.
#![warn(missing_docs)]

pub mod awake;
pub mod conv;
mod factor;
pub mod isa;
pub mod memory;
pub mod norm;
pub mod peak;
pub mod pool;
pub mod reference;
mod tile;
mod transform;
pub mod update;

//! Convolution, batch norm, pooling and optimizer steps on the CPU, channels last: slices in,
//! vectors out. Maps are stored as f32 or bf16 ([`storage`]); arithmetic between products is in
//! f32. The crate knows nothing of tensors, autodiff or images.
//!
//! # Determinism
//!
//! The order of every summation depends on the shapes and the instruction set only, never on the
//! number of threads: 1 thread and 16 threads give the same bits.
//!
//! # Layers
//!
//! Imports go one way, from later layers to earlier ones (`tests/layers.rs` checks it):
//!
//! 1. `simd`: vector operations as traits, the bf16 type, prefetch.
//! 2. `loops`: inner loops, written once, generic over those traits. They know no dispatch table.
//! 3. [`isa`]: the loops compiled for each instruction set, behind one dispatch table.
//! 4. [`storage`], [`norm`], [`pool`], [`optimizer_step`], [`conv`], [`matmul`] and
//!    [`roofline`]: the safe entry points over slices. They check lengths, split the work into
//!    tasks and call the table.
//!
//! `memory` (uninitialized buffers, the recycling allocator) and [`spin`] (keep-awake workers)
//! depend on nothing but the bf16 type. [`mod@reference`] holds the definitions that tests compare
//! with.
//!
//! A new instruction set is a file in `isa/` and an entry in [`isa::available`]. A new operation is
//! a loop in `loops/`, an entry in the list of `isa/table.rs`, and a safe function on top.
#![warn(missing_docs)]

pub mod conv;
pub mod isa;
mod loops;
pub mod matmul;
pub mod memory;
pub mod norm;
pub mod optimizer_step;
pub mod pool;
pub mod reference;
pub mod roofline;
mod simd;
pub mod spin;
pub mod storage;

pub use simd::Bf16;

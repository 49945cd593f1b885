//! The inner loops of all operations, written once for all instruction sets.
//!
//! A loop is a generic function over [`crate::simd`]'s traits, or a plain loop over slices that the
//! compiler vectorizes by itself. It knows no dispatch table and starts no thread.
//!
//! Every loop is `#[inline(always)]`, and so is every function that it calls: [`crate::isa`]
//! inlines it into a function with the target features of each instruction set. A closure does not
//! have those features; its vector operations may stay calls. Arithmetic on registers therefore
//! uses plain loops, and closures contain single loads at most.

pub(crate) mod bf16;
pub(crate) mod block;
pub(crate) mod matrix;
pub(crate) mod norm;
pub(crate) mod optimizer_step;
pub(crate) mod pack;
pub(crate) mod pool;
pub(crate) mod roofline;
pub(crate) mod tile;
pub(crate) mod winograd;

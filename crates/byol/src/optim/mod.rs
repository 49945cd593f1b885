//! OPTIMIZER: updates of θ and the moving average ξ.
//!
//! An update rule is a pure function of one tensor's weights, gradient and state; parameter names
//! decide which tensors weight decay and layer-wise adaptation skip ([`exclusion`]). On the CPU
//! each update is one sweep over a tensor (`fused_cpu.rs`); tests compare it with the formulas of
//! the rules.
//!
//! Imports go one way: {lars, sgd, adamw} ← rule ← fused_cpu ← {optimizer, target}.

pub mod adamw;
#[doc(hidden)]
pub mod exclusion;
mod fused_cpu;
pub mod lars;
pub mod loss_scale;
pub mod optimizer;
pub mod rule;
pub mod schedule;
pub mod sgd;
pub mod target;

pub use adamw::AdamW;
pub use lars::Lars;
pub use loss_scale::LossScale;
pub use optimizer::Optimizer;
pub use rule::Rule;
pub use schedule::Schedule;
pub use sgd::Sgd;

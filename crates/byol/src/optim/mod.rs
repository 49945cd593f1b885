//! OPTIMIZER: updates of θ and the moving average ξ.
//!
//! An update rule is a pure function of one tensor's weights, gradient and state; parameter names
//! decide which tensors weight decay and layer-wise adaptation skip ([`exclusion`]). On the CPU
//! each update is one sweep over a tensor (`fused_cpu.rs`); tests compare it with the formulas of
//! the rules.
//!
//! Imports go one way: {lars, sgd, adamw} ← rule ← fused_cpu ← {optimizer, target}.
//!
//! # Examples
//!
//! ```
//! use byol::{
//!     nn::{Leaf, Tree, tree::host},
//!     optim::{Optimizer, Rule, Schedule, Sgd, target},
//! };
//!
//! # let device = byol::device::open(byol::DeviceChoice::Cpu)?.device;
//! let leaf = |value: f32| Leaf::new(vec![value], &[1], &device);
//! let (mut theta, mut xi, mut grads) = (Tree::new(), Tree::new(), Tree::new());
//! theta.insert("w", leaf(1.0));
//! xi.insert("w", leaf(0.0));
//! grads.insert("w", leaf(2.0));
//!
//! let schedule = Schedule { peak: 0.5, warmup: 0, total: 100, tau_base: 0.75, constant_tau: false };
//! let rule = Rule::Sgd(Sgd { momentum: 0.9, weight_decay: 0.0, nesterov: false });
//! let mut optimizer = Optimizer::new(rule, &theta);
//! theta = optimizer.step(&theta, &grads, schedule.eta(0)); // θ ← θ − η·g
//! xi = target::ema(&xi, &theta, schedule.tau(0)); // ξ ← τ ξ + (1 − τ) θ
//! theta = optimizer.step(&theta, &grads, schedule.eta(1));
//! # assert_eq!(host(xi.get::<1>("w")), [0.0]);
//! # assert!(host(theta.get::<1>("w"))[0] < 0.0);
//! # Ok::<(), byol::device::Error>(())
//! ```

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

//! NETWORKS: the encoder f, the projector g and the predictor q, as descriptions that act on a
//! [`Tree`] of weights.
//!
//! Imports go one way, from right to left:
//!
//! ```text
//! tree, batch_norm, init, readers
//!   ← forward_context
//!     ← cpu
//!       ← pool, conv_norm_act
//!         ← mlp, resnet
//!           ← encoder
//!             ← network; weights ← import
//! ```

mod batch_norm;
#[doc(hidden)]
pub mod conv_norm_act;
pub(crate) mod cpu;
pub mod encoder;
#[doc(hidden)]
pub mod forward_context;
pub mod import;
pub mod init;
pub mod mlp;
pub mod network;
#[doc(hidden)]
pub mod pool;
mod readers;
pub mod resnet;
pub mod tree;
pub mod weights;

pub use crate::device::Precision;
pub use encoder::{Encoder, EncoderSpec, Normalization, Weights};
pub(crate) use encoder::{reference_center, reference_eps};
pub use forward_context::{ForwardContext, Mode, NormConfig, RunningStats, Statistics};
pub use init::Init;
pub use mlp::Mlp;
pub use network::{Backbone, Network};
pub use resnet::{Architecture, ResNet, Stem};
pub use tree::{Leaf, Tree};

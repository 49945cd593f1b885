//! Bootstrap Your Own Latent (Grill et al. 2020) in Rust: from a folder of unlabelled images to an encoder.
//!
//! The modules in the order an image passes through them: [`data`] → [`views`] → [`nn`] → [`byol`] (the method) → [`optim`] →
//! [`train`] → [`eval`] → [`apply`]. Imports go one way.
//!
//! # Load an encoder and embed an image
//!
//! ```no_run
#![doc = include_str!("../examples/embed.rs")]
//! ```
//!
//! # Pretrain on images of one's own, with views of one's own
//!
//! ```no_run
#![doc = include_str!("../examples/own_data.rs")]
//! ```
#![warn(missing_docs)]

pub mod apply;
pub mod byol;
pub mod data;
pub mod device;
pub mod eval;
pub mod files;
pub mod finish;
pub mod guarded;
pub mod nn;
pub mod optim;
pub mod random;
pub mod ranks;
pub mod train;
pub mod views;

//! Bootstrap Your Own Latent (Grill et al. 2020) in Rust: from a folder of unlabeled images to an
//! encoder.
//!
//! # Embed an image
//!
//! ```no_run
//! let encoder = byol::Encoder::open("byol-runs/my-photos")?;
//! let features: Vec<f32> = encoder.embed_image("cat.jpg")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Pretrain
//!
//! ```no_run
//! use byol::{Dataset, Pretraining, Recipe};
//!
//! let encoder = Pretraining::new(Dataset::folder("photos")?)
//!     .recipe(Recipe::named("cifar10")?.epochs(10))
//!     .on_event(|event| println!("{event}"))
//!     .run("byol-runs/photos")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The method
//!
//! [`Byol::step`](byol::Byol::step) is one step of the paper. It works without the training loop,
//! on any tensors of views.
//!
//! # Modules
//!
//! In the order of the data: [`data`] → [`views`] → [`nn`] → [`byol`] (the method) → [`optim`] →
//! [`train`] → [`eval`] → [`apply`]. Imports go one way, which a test checks; `ARCHITECTURE.md` has
//! the order. Modules hidden from these pages serve the command `byol` and the tests, and may
//! change in any release.
#![warn(missing_docs)]

pub mod apply;
#[doc(hidden)]
pub mod atomic_write;
pub mod byol;
#[doc(hidden)]
pub mod catch_panic;
pub mod data;
pub mod device;
mod encoder;
pub mod eval;
pub mod image;
pub mod nn;
pub mod objective;
pub mod optim;
mod pretraining;
pub mod random;
pub mod ranks;
pub mod train;
pub mod views;

pub use crate::{
    byol::Byol,
    data::Dataset,
    device::DeviceChoice,
    encoder::{Encoder, OpenError},
    image::{Image, Pixels},
    pretraining::Pretraining,
    train::{Error, Event, Recipe, Run},
};

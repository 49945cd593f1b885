//! APPLICATION: embedding files, export, and search, duplicates, outliers and maps of embeddings.
//!
//! # Examples
//!
//! ```no_run
//! use byol::apply::{embeddings::Embeddings, search::Index};
//!
//! let embeddings = Embeddings::open("photos.parquet".as_ref())?;
//! let index = Index::new(embeddings.features);
//! for (row, cosine) in index.nearest(index.rows().row(0), 5) {
//!     println!("{cosine:.3} {}", embeddings.paths[row]);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[doc(hidden)]
pub mod chart;
pub mod duplicates;
pub mod embed;
pub mod embeddings;
pub mod export;
#[doc(hidden)]
pub mod hand_labels;
pub mod hub;
pub mod map;
#[doc(hidden)]
pub mod neighbors;
pub mod onnx;
#[doc(hidden)]
pub mod row_images;
#[doc(hidden)]
pub mod same_image;
pub mod search;
#[doc(hidden)]
pub mod sheet;

//! APPLICATION: embedding files, export, and search, duplicates, outliers and maps of embeddings.

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

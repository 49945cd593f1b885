//! APPLICATION: embedding files, export, and search, duplicates, outliers and maps of embeddings.

#[doc(hidden)]
pub mod chart;
pub mod duplicates;
pub mod embed;
pub mod embeddings;
pub mod export;
pub mod map;
pub mod neighbors;
pub mod onnx;
pub mod row_images;
pub mod same_image;
pub mod search;
#[doc(hidden)]
pub mod sheet;

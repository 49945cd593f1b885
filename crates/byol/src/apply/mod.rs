//! USE: what one does with an encoder or a recipe besides training.

pub mod chart;
pub mod duplicates;
pub mod embed;
pub mod embeddings;
pub mod export;
pub mod map;
pub mod neighbours;
pub mod onnx;
pub mod search;
pub mod sheet;

//! USE: what one does with an encoder or a recipe besides training.

pub mod chart;
pub mod sheet;

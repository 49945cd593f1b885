//! Masks and depth maps: an error, or a value for every pixel.
#![no_main]

use byol::data::dense_labels::{parse_depth, parse_mask};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(mask) = parse_mask(bytes) {
        assert_eq!(mask.classes.len(), mask.height * mask.width);
    }
    if let Ok(depth) = parse_depth(bytes) {
        assert_eq!(depth.meters.len(), depth.height * depth.width);
        assert!(depth.meters.iter().all(|m| *m >= 0.0));
    }
});

//! Masks and depth maps from any bytes: an error, or as many values as pixels.
#![no_main]

use byol::data::dense::{depth_of, mask_of};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(mask) = mask_of(bytes) {
        assert_eq!(mask.classes.len(), mask.height * mask.width);
    }
    if let Ok(depth) = depth_of(bytes) {
        assert_eq!(depth.metres.len(), depth.height * depth.width);
        assert!(depth.metres.iter().all(|m| *m >= 0.0));
    }
});

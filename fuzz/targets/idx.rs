//! Decompressed IDX files: an error, or as many values as the dimensions require.
#![no_main]

use byol::data::idx;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok((dimensions, values)) = idx::parse(bytes) {
        assert_eq!(values.len(), dimensions.iter().product::<usize>());
    }
});

//! Image files: an error, or an image of limited size with three bytes per pixel.
#![no_main]

use byol::data::{CHANNELS, Levels, decode};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for levels in [Levels::default(), Levels::legacy(), Levels::uniform(0.0, 1023.0)] {
        if let Ok(image) = decode::bytes(bytes, &levels) {
            assert!(image.width * image.height <= decode::MAX_PIXELS);
            assert_eq!(image.pixels.len(), image.width * image.height * CHANNELS);
        }
    }
});

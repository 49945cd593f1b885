//! Image files and sounds: an error, or an image of limited size with all its values.
#![no_main]

use byol::data::{Levels, MAX_CHANNELS, decode, levels::Sound};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let rgb = [Levels::default(), Levels::legacy(), Levels::uniform(0.0, 1023.0)];
    let pages = Levels { channels: Some("pages".parse().unwrap()), ..Levels::default() };
    let channels = [Levels::with_channels(vec![]), Levels::with_channels(vec![2, 1]), pages];
    let sound = Levels { sound: Some(Sound { rate: 16_000 }), ..Levels::default() };
    for levels in rgb.into_iter().chain(channels).chain([sound]) {
        if let Ok(image) = decode::bytes(bytes, &levels) {
            assert!(image.width * image.height <= decode::MAX_PIXELS);
            assert!((1..=MAX_CHANNELS).contains(&image.channels));
            assert_eq!(image.pixels.len(), image.width * image.height * image.channels);
        }
    }
});

//! CIFAR binary batches, with one label byte (CIFAR-10) and with two (CIFAR-100): an error, or a
//! label for every image.
#![no_main]

use byol::data::cifar;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for label_bytes in [1, 2] {
        if let Ok((images, labels)) = cifar::records(bytes, label_bytes) {
            assert_eq!(images.len(), labels.len());
        }
    }
});

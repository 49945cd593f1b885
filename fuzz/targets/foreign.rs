//! Checkpoints of others: pickles in archives, and safetensors.
#![no_main]

use burn::tensor::Device;
use byol::nn::{
    Normalization,
    foreign::{Preparation, import},
};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("byol-fuzz-{}.pth", std::process::id()));
    std::fs::write(&path, bytes).expect("there is room for a small file");
    let preparation = Preparation { size: None, normalization: Normalization::default() };
    let _ = import(&path, &preparation, &Device::flex());
});

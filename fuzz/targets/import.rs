//! Third-party checkpoints: pickles in archives, and safetensors.
#![no_main]

use burn::tensor::Device;
use byol::nn::{
    Normalization,
    import::{Preparation, import},
};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("byol-fuzz-{}.pth", std::process::id()));
    std::fs::write(&path, bytes).expect("the temporary folder is writable");
    let preparation = Preparation { size: None, normalization: Normalization::default() };
    let _ = import(&path, &preparation, &Device::flex());
});

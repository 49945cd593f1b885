//! Encoder files: safetensors with a description of the network in the metadata.
#![no_main]

use std::path::Path;

use burn::tensor::Device;
use byol::nn::weights;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = weights::parse(Path::new("encoder.safetensors"), bytes, &Device::flex());
});

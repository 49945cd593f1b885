//! Export as a folder in the format of the Hugging Face hub, as timm reads it: `config.json`,
//! `model.safetensors` and a model card, `README.md`.

use std::{fs, io::ErrorKind, path::Path};

use serde_json::{Value, json};

use super::export::{Check, Error, compare_on};
use crate::{
    atomic_write,
    data::{CHANNELS, Images},
    nn::{Encoder, EncoderSpec, Stem, reference_eps, weights},
};

/// Description of the network.
const CONFIG: &str = "config.json";
/// Weights, with timm's parameter names.
const WEIGHTS: &str = weights::HUB_FILE;
/// Model card.
const CARD: &str = "README.md";

/// Writes the encoder into `folder`, which is created if it is missing, after comparing the
/// serialized weights with the encoder on `images`. `card` is the text of the model card.
///
/// # Errors
/// [`Error::Hub`] for an encoder that timm has no architecture for; any other [`Error`].
pub fn write(encoder: &Encoder, folder: &Path, card: &str, images: &Images) -> Result<Check, Error> {
    check(&encoder.spec).map_err(Error::Hub)?;
    let file = |name: &str| folder.join(name);
    let write = |name: &str, bytes: &[u8]| {
        let path = file(name);
        atomic_write::write_checked(&path, bytes).map_err(|source| Error::Write { path, source })
    };
    // transformers requires the entry `format`.
    let bytes = weights::to_file(&encoder.spec, &encoder.weights, Some(("format", "pt".into())));
    let exported = weights::parse(&file(WEIGHTS), &bytes, &encoder.device())?;
    let check = compare_on(images, encoder, &exported, folder)?;
    let io = |source| Error::Write { path: folder.to_owned(), source };
    fs::create_dir_all(folder).map_err(io)?;
    // Weights come last, so that a folder with weights is complete.
    match fs::remove_file(file(WEIGHTS)) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(io(e)),
        _ => {}
    }
    write(CARD, card.as_bytes())?;
    write(CONFIG, format!("{:#}\n", config(encoder)).as_bytes())?;
    write(WEIGHTS, &bytes)?;
    Ok(check)
}

/// Returns the reason if timm has no such network.
fn check(spec: &EncoderSpec) -> Result<(), String> {
    let name = spec.architecture.name();
    if spec.width != 1.0 {
        return Err(format!("timm has no {name} of width {}", spec.width));
    }
    if spec.stem != Stem::Imagenet {
        return Err(format!("timm has no {name} with the {} stem", spec.stem.name()));
    }
    if spec.eps != reference_eps() {
        return Err(format!("timm's {name} has batch norm with epsilon 1e-5, not {:e}", spec.eps));
    }
    Ok(())
}

/// timm's description of the network and of its input.
fn config(encoder: &Encoder) -> Value {
    let EncoderSpec { architecture, size, center, normalization, channels, .. } = &encoder.spec;
    let mut config = json!({
        "architecture": architecture.name(),
        "num_classes": 0,
        "num_features": encoder.features(),
        "global_pool": "avg",
        "pretrained_cfg": {
            "tag": "byol",
            "input_size": [channels, size, size],
            "fixed_input_size": false,
            "interpolation": "bicubic",
            "crop_pct": center,
            "crop_mode": "center",
            "mean": normalization.mean,
            "std": normalization.std,
            "num_classes": 0,
            "pool_size": [size.div_ceil(32), size.div_ceil(32)],
            "first_conv": "conv1",
            "classifier": "fc",
        },
    });
    if *channels != CHANNELS {
        config["model_args"] = json!({"in_chans": channels});
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::{Levels, synthetic},
        nn::{Architecture, Normalization},
    };
    use burn::tensor::Device;

    fn encoder(width: f64, stem: Stem) -> Encoder {
        let spec = EncoderSpec {
            architecture: Architecture::Resnet18,
            width,
            stem,
            size: 64,
            center: 0.875,
            antialias: false,
            channels: 3,
            normalization: Normalization::default(),
            eps: 1e-5,
            levels: Levels::default(),
        };
        Encoder::random(spec, 1, &Device::flex())
    }

    #[test]
    fn folder_holds_the_encoder_and_its_description() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/model");
        let images = synthetic::dataset(1, 4, 0).train;
        let encoder = encoder(1.0, Stem::Imagenet);
        let check = write(&encoder, &path, "# card\n", &images).unwrap();
        assert_eq!((check.images, check.difference), (4, 0.0));
        let loaded = weights::load(&path, &Device::flex()).unwrap();
        assert_eq!(loaded.spec, encoder.spec);
        let config: Value = serde_json::from_slice(&fs::read(path.join(CONFIG)).unwrap()).unwrap();
        assert_eq!(config["pretrained_cfg"]["input_size"], json!([3, 64, 64]));
        assert_eq!(fs::read_to_string(path.join(CARD)).unwrap(), "# card\n");
    }

    #[test]
    fn refuses_networks_that_timm_does_not_have() {
        let folder = tempfile::tempdir().unwrap();
        let images = synthetic::dataset(1, 4, 0).train;
        for (width, stem, words) in [(0.25, Stem::Imagenet, "width 0.25"), (1.0, Stem::Cifar, "CIFAR stem")] {
            let path = folder.path().join("model");
            let error = write(&encoder(width, stem), &path, "", &images).unwrap_err().to_string();
            assert!(error.contains(words) && !path.exists(), "{error}");
        }
    }
}

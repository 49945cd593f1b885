//! Encoders in the formats of other tools. Every file is read back and computes real images before it gets its final name.

use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};

use super::onnx::{self, Model};
use crate::{
    data::{self, CHANNELS, Images},
    eval::Features,
    files,
    nn::{Encoder, tree::host, weights},
    views::evaluation_view,
};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name has no known ending.
    #[error("{} is not named .safetensors or .onnx; name it so", .0.display())]
    Name(PathBuf),
    /// The data of the comparison.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// The encoder file.
    #[error(transparent)]
    Encoder(#[from] weights::Error),
    /// It cannot be written.
    #[error("cannot write {}: {source}; {}", path.display(), files::remedy(source))]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What was written does not compute what the encoder does.
    #[error("{} was not written: read back, it {reason}; please report this with the encoder file", path.display())]
    Differs {
        /// Which file.
        path: PathBuf,
        /// How.
        reason: String,
    },
}

/// How an exported file compares with its encoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Check {
    /// Images.
    pub images: usize,
    /// Largest difference of a feature.
    pub difference: f64,
    /// Largest feature.
    pub largest: f64,
}

/// A difference above this share of the largest feature is an error, not rounding.
const MOST: f64 = 1e-3;

/// Writes `path` as its ending says and compares it on these images. In ONNX the normalisation is part of the graph where `normalise`.
///
/// # Errors
/// Any [`Error`].
pub fn write(encoder: &Encoder, path: &Path, normalise: bool, images: &Images) -> Result<Check, Error> {
    let ending = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    let spec = &encoder.spec;
    let views: Vec<f32> = (0..images.len())
        .map(|i| Ok(evaluation_view(&*images.get(i)?, spec.size, spec.center).interleaved()))
        .collect::<Result<Vec<_>, data::Error>>()?
        .concat();
    let shape = [images.len(), spec.size, spec.size, CHANNELS];
    let x = Tensor::<4>::from_data(TensorData::new(views, shape), &encoder.device());
    let ours = host(encoder.embed(x.clone()));
    let differs = |reason: String| Error::Differs { path: path.to_owned(), reason };
    let write = |source| Error::Write { path: path.to_owned(), source };
    let features = |values: Vec<f32>| Features { n: images.len(), dim: encoder.features(), values };
    match ending.as_deref() {
        Some("safetensors") => {
            let back = weights::parse(path, &weights::to_file(spec, &encoder.weights, None), &encoder.device())?;
            let check = compare(&features(ours), &features(host(back.embed(x)))).map_err(differs)?;
            let bytes = weights::to_file(spec, &encoder.weights, Some((DIFFERENCE, check.to_string())));
            files::write_checked(path, &bytes).map_err(write)?;
            Ok(check)
        }
        Some("onnx") => {
            let normalization = serde_json::to_string(&spec.normalization).expect("numbers serialise");
            let about = [
                ("byol", serde_json::to_string(spec).expect("a description is plain data")),
                ("input", format!("RGB, {}", if normalise { "0..1" } else { "normalised: (x - mean) / std" })),
                ("normalization", normalization),
            ];
            let mut model = onnx::model(encoder, normalise, &about);
            let back = Model::parse(&model.to_bytes()).map_err(differs)?;
            let input = if normalise { x } else { spec.normalization.forward(x) };
            let theirs = host(back.run(input.permute([0, 3, 1, 2])).map_err(differs)?);
            let check = compare(&features(ours), &features(theirs)).map_err(differs)?;
            model.note(DIFFERENCE, check.to_string());
            files::write_checked(path, &model.to_bytes()).map_err(write)?;
            Ok(check)
        }
        _ => Err(Error::Name(path.to_owned())),
    }
}

/// What the difference is called in a file's metadata.
const DIFFERENCE: &str = "largest difference from byol";

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{:e} of features up to {:.3}, {} images", self.difference, self.largest, self.images)
    }
}

fn compare(ours: &Features, theirs: &Features) -> Result<Check, String> {
    if ours.values.len() != theirs.values.len() {
        return Err(format!("gives {} numbers, not {}", theirs.values.len(), ours.values.len()));
    }
    let largest = ours.values.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
    let apart = ours.values.iter().zip(&theirs.values).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    let difference = apart.fold(0.0f64, |m, v| if v.is_nan() { f64::INFINITY } else { m.max(v) });
    if difference > MOST * largest {
        return Err(format!("differs by {difference:.2e} where features reach {largest:.2e}"));
    }
    Ok(Check { images: ours.n, difference, largest })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::synthetic,
        nn::{Architecture, EncoderSpec, Normalization, Stem},
    };
    use burn::tensor::Device;

    #[test]
    fn an_exported_encoder_computes_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let images = synthetic::dataset(1, 6, 0).train;
        let random = |architecture, stem, size| {
            let normalization = Normalization::default();
            let spec = EncoderSpec {
                architecture,
                width: 0.125,
                stem,
                size,
                center: 1.0,
                channels: 3,
                normalization,
                eps: 1e-3,
            };
            Encoder::random(spec, 1, &Device::flex())
        };
        let small = random(Architecture::Resnet18, Stem::Cifar, 32);
        for encoder in [&small, &random(Architecture::Resnet50, Stem::Imagenet, 72)] {
            for (name, normalise) in [("a.onnx", true), ("b.onnx", false), ("c.safetensors", true)] {
                let path = folder.path().join(name);
                let check = write(encoder, &path, normalise, &images).unwrap();
                assert!(check.difference <= 1e-5 * check.largest && check.images == 6, "{name} {check:?}");
                assert!(path.exists());
            }
            let onnx = std::fs::read(folder.path().join("a.onnx")).unwrap();
            assert!(Model::parse(&onnx[..onnx.len() / 2]).is_err());
        }
        let other = folder.path().join("x.txt");
        assert!(matches!(write(&small, &other, true, &images), Err(Error::Name(_))));
    }
}

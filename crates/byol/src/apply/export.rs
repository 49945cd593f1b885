//! Export of encoders to the formats of other tools. Every file is read back and compared with the
//! encoder on real images before it gets its final name.

use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};

use super::onnx::{self, Model};
use crate::{
    atomic_write,
    data::{self, Images},
    nn::{Encoder, tree::host, weights},
};

/// Export error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The output has an unsupported extension.
    #[error("invalid output name {} (expected .safetensors or .onnx)\nhint: pass `--format hf` to write a folder", .0.display())]
    Name(PathBuf),
    /// The comparison images cannot be used.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// The written file cannot be read back.
    #[error(transparent)]
    Encoder(#[from] weights::Error),
    /// The file cannot be written.
    #[error("cannot write {}: {source}\nhint: {}", path.display(), atomic_write::remedy(source))]
    Write {
        /// File.
        path: PathBuf,
        /// I/O error.
        source: std::io::Error,
    },
    /// timm has no such network.
    #[error("cannot export to the Hugging Face format: {0}\nhint: export to NAME.safetensors or NAME.onnx")]
    Hub(String),
    /// The exported model does not compute the same features as the encoder.
    #[error(
        "{} was not written: the exported model {reason}\n\
         hint: this is a bug, please report it with the encoder file",
        path.display()
    )]
    Differs {
        /// File.
        path: PathBuf,
        /// Difference.
        reason: String,
    },
}

/// Comparison of an exported model with its encoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Check {
    /// Number of images compared.
    pub images: usize,
    /// Largest absolute difference of a feature.
    pub difference: f64,
    /// Largest absolute feature.
    pub largest: f64,
}

/// Maximum difference relative to the largest feature that counts as rounding.
const MAX_RELATIVE_DIFFERENCE: f64 = 1e-3;

/// Writes the encoder to `path`, in the format of its extension, and compares it with the encoder
/// on `images`. With `normalize`, an ONNX model takes values in 0..1 and normalizes them itself.
///
/// # Errors
/// Any [`Error`].
///
/// # Examples
///
/// ```no_run
/// use byol::{Dataset, Encoder, apply::export};
///
/// let encoder = Encoder::open("byol-runs/photos")?;
/// let images = Dataset::open("photos")?.train.sample_random(8);
/// export::write(&encoder, "encoder.onnx".as_ref(), true, &images)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write(encoder: &Encoder, path: &Path, normalize: bool, images: &Images) -> Result<Check, Error> {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    let spec = &encoder.spec;
    let differs = |reason: String| Error::Differs { path: path.to_owned(), reason };
    let write_error = |source| Error::Write { path: path.to_owned(), source };
    match extension.as_deref() {
        Some("safetensors") => {
            let exported = weights::parse(path, &weights::to_file(spec, &encoder.weights, None), &encoder.device())?;
            let check = compare_on(images, encoder, &exported, path)?;
            let bytes = weights::to_file(spec, &encoder.weights, Some((DIFFERENCE_KEY, check.to_string())));
            atomic_write::write_checked(path, &bytes).map_err(write_error)?;
            Ok(check)
        }
        Some("onnx") => {
            let normalization = serde_json::to_string(&spec.normalization).expect("a normalization serializes");
            let metadata = [
                ("byol", serde_json::to_string(spec).expect("a spec serializes")),
                (
                    "input",
                    format!("{}, {}", spec.input(), if normalize { "0..1" } else { "normalized: (x - mean) / std" }),
                ),
                ("normalization", normalization),
            ];
            let mut model = onnx::model(encoder, normalize, &metadata);
            let exported = Model::parse(&model.to_bytes()).map_err(differs)?;
            let x = views(encoder, images)?;
            let expected = host(encoder.embed(x.clone()));
            let input = if normalize { x } else { spec.normalization.forward(x) };
            let actual = host(exported.run(input.permute([0, 3, 1, 2])).map_err(differs)?);
            let check = compare(&expected, &actual, images.len()).map_err(differs)?;
            model.add_metadata(DIFFERENCE_KEY, check.to_string());
            atomic_write::write_checked(path, &model.to_bytes()).map_err(write_error)?;
            Ok(check)
        }
        _ => Err(Error::Name(path.to_owned())),
    }
}

/// Evaluation views of all images: `[N, S, S, C]`.
fn views(encoder: &Encoder, images: &Images) -> Result<Tensor<4>, data::Error> {
    let spec = &encoder.spec;
    images.ensure_input(spec.channels, &spec.levels)?;
    let view = |i: usize| Ok(spec.evaluation_view(&*images.get(i)?).interleaved());
    let views = (0..images.len()).map(view).collect::<Result<Vec<_>, data::Error>>()?.concat();
    let shape = [images.len(), spec.size, spec.size, spec.channels];
    Ok(Tensor::from_data(TensorData::new(views, shape), &encoder.device()))
}

/// Compares an exported encoder with the encoder on images. `path` is for messages.
pub(super) fn compare_on(images: &Images, encoder: &Encoder, exported: &Encoder, path: &Path) -> Result<Check, Error> {
    let x = views(encoder, images)?;
    let [expected, actual] = [encoder, exported].map(|encoder| host(encoder.embed(x.clone())));
    compare(&expected, &actual, images.len()).map_err(|reason| Error::Differs { path: path.to_owned(), reason })
}

/// Metadata key of the comparison.
const DIFFERENCE_KEY: &str = "largest difference from byol";

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{:e} of features up to {:.3}, {} images", self.difference, self.largest, self.images)
    }
}

/// Compares two feature matrices of `images` rows.
fn compare(expected: &[f32], actual: &[f32], images: usize) -> Result<Check, String> {
    if expected.len() != actual.len() {
        return Err(format!("outputs {} values instead of {}", actual.len(), expected.len()));
    }
    let largest = expected.iter().fold(0.0f64, |max, v| max.max(f64::from(v.abs())));
    let differences = expected.iter().zip(actual).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    let difference = differences.fold(0.0f64, |max, d| if d.is_nan() { f64::INFINITY } else { max.max(d) });
    if difference > MAX_RELATIVE_DIFFERENCE * largest {
        return Err(format!("differs by {difference:.2e}, the largest feature is {largest:.2e}"));
    }
    Ok(Check { images, difference, largest })
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
    fn exported_models_match_the_encoder() {
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
                antialias: false,
                channels: 3,
                normalization,
                eps: 1e-3,
                levels: crate::data::Levels::default(),
            };
            Encoder::random(spec, 1, &Device::flex())
        };
        let small = random(Architecture::Resnet18, Stem::Cifar, 32);
        for encoder in [&small, &random(Architecture::Resnet50, Stem::Imagenet, 72)] {
            for (name, normalize) in [("a.onnx", true), ("b.onnx", false), ("c.safetensors", true)] {
                let path = folder.path().join(name);
                let check = write(encoder, &path, normalize, &images).unwrap();
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

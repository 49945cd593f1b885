//! Encoder files: safetensors with torchvision's parameter names, which
//! `torchvision.models.resnet18().load_state_dict(…, strict=False)` accepts, and a metadata entry
//! `byol`, the [`EncoderSpec`] as JSON.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use burn::tensor::Device;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use sha2::{Digest, Sha256};

use super::{
    encoder::{Encoder, EncoderSpec, Weights},
    forward_context::{RunningStats, Statistics},
    tree::{self, Leaf, Tree},
};
use crate::atomic_write;

/// Errors of encoder files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error(
        "cannot read encoder {}: {source}\nhint: pass an encoder.safetensors, or a run folder that contains one",
        path.display()
    )]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write encoder {}: {source}\nhint: {}", path.display(), atomic_write::remedy(source))]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The file is not safetensors, or truncated.
    #[error(
        "{} is not a complete safetensors file: {reason}\nhint: the file may be truncated; copy it again",
        path.display()
    )]
    Format {
        /// Path of the file.
        path: PathBuf,
        /// Message of the parser.
        reason: String,
    },
    /// The file is safetensors, but has no description.
    #[error(
        "{} has no encoder description ({reason})\nhint: use an encoder.safetensors written by byol, or convert the \
         file with `byol import`",
        path.display()
    )]
    Foreign {
        /// Path of the file.
        path: PathBuf,
        /// Missing or invalid part.
        reason: String,
    },
    /// The file contains no supported ResNet.
    #[error(
        "cannot import {}: {reason}\nhint: supported are ResNet weights as .pth or .safetensors, with the names of \
         torchvision, timm, lightly or solo-learn",
        path.display()
    )]
    NoResnet {
        /// Path of the file.
        path: PathBuf,
        /// Missing or invalid part.
        reason: String,
    },
    /// The weights do not match the description in the file.
    #[error(
        "{}: `{name}` is {found}, but {encoder} expects {expected}\nhint: the weights belong to another architecture; \
         use the file as byol wrote it",
        path.display()
    )]
    Mismatch {
        /// Path of the file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Type and shape in the file.
        found: String,
        /// Shape according to the description.
        expected: String,
        /// Architecture and width of the description.
        encoder: String,
    },
}

/// Metadata key of the description.
const KEY: &str = "byol";

/// Encodes f32 values as little-endian bytes, as safetensors requires.
pub(crate) fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Decodes f32 values from little-endian bytes.
pub(crate) fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Writes an encoder to `path`, atomically.
///
/// # Errors
/// [`Error::Write`].
pub fn save(path: &Path, spec: &EncoderSpec, weights: &Weights) -> Result<(), Error> {
    let write = |source| Error::Write { path: path.to_owned(), source };
    atomic_write::write_whole(path, &to_file(spec, weights, None)).map_err(write)
}

/// Serializes an encoder, with an optional second metadata entry.
pub(crate) fn to_file(spec: &EncoderSpec, weights: &Weights, note: Option<(&str, String)>) -> Vec<u8> {
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, leaf) in spec.resnet().shapes().iter().filter_map(|(name, _)| Some((name, weights.params.leaf(name)?))) {
        tensors.push((name.clone(), Dtype::F32, leaf.shape.clone(), to_bytes(&leaf.to_vec())));
    }
    for conv in spec.resnet().convs() {
        let (name, r) = (&conv.norm, weights.statistics.get(&conv.norm));
        for (suffix, value) in [("running_mean", &r.mean), ("running_var", &r.var)] {
            let values = tree::host(value.clone());
            tensors.push((format!("{name}.{suffix}"), Dtype::F32, vec![values.len()], to_bytes(&values)));
        }
        let batches = i64::try_from(r.batches).unwrap_or(i64::MAX);
        tensors.push((format!("{name}.num_batches_tracked"), Dtype::I64, vec![], batches.to_le_bytes().to_vec()));
    }
    // A single entry by default: a hash map with more is written in an order that varies between
    // processes, and equal encoders should be equal files.
    let mut metadata =
        HashMap::from([(KEY.to_owned(), serde_json::to_string(spec).expect("a description is serializable"))]);
    metadata.extend(note.map(|(key, value)| (key.to_owned(), value)));
    serialize(&tensors, metadata)
}

/// Serializes named tensors and metadata as a safetensors file.
pub(crate) fn serialize(
    tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)],
    metadata: HashMap<String, String>,
) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("bytes fit the shape"))
    });
    safetensors::serialize(views, Some(metadata)).expect("named tensors of known types are serializable")
}

/// Weights in a folder in the format of the Hugging Face hub.
pub(crate) const HUB_FILE: &str = "model.safetensors";

/// Returns the path of the encoder in a run folder or a folder in the format of the Hugging Face
/// hub, or the path itself for a file.
pub fn resolve(path: &Path) -> PathBuf {
    let (run_file, hub_file) = (path.join("encoder.safetensors"), path.join(HUB_FILE));
    match path.is_dir() {
        true if !run_file.exists() && hub_file.exists() => hub_file,
        true => run_file,
        false => path.to_owned(),
    }
}

/// SHA-256 of an encoder file in hexadecimal, which identifies the encoder.
///
/// # Errors
/// [`Error::Read`].
pub fn sha256(path: &Path) -> Result<String, Error> {
    let bytes = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    Ok(atomic_write::hex(&Sha256::digest(&bytes)))
}

/// Reads an encoder from a file or a run folder.
///
/// # Errors
/// All but [`Error::Write`].
pub fn load(path: &Path, device: &Device) -> Result<Encoder, Error> {
    let path = resolve(path);
    let bytes = fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
    parse(&path, &bytes, device)
}

/// Parses an encoder from bytes. `path` is used in messages.
///
/// # Errors
/// [`Error::Format`], [`Error::Foreign`], [`Error::Mismatch`].
pub fn parse(path: &Path, bytes: &[u8], device: &Device) -> Result<Encoder, Error> {
    let format = |reason: String| Error::Format { path: path.to_owned(), reason };
    let foreign = |reason: String| Error::Foreign { path: path.to_owned(), reason };
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| format(e.to_string()))?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|e| format(e.to_string()))?;
    let entry = metadata.metadata().as_ref().and_then(|m| m.get(KEY));
    let entry = entry.ok_or_else(|| foreign(format!("no metadata entry `{KEY}`")))?;
    let spec: EncoderSpec = serde_json::from_str(entry).map_err(|e| foreign(e.to_string()))?;
    spec.check().map_err(foreign)?;

    let read = |name: &str, shape: &[usize]| -> Result<Vec<f32>, Error> {
        let mismatch = |found: String| Error::Mismatch {
            path: path.to_owned(),
            name: name.to_owned(),
            found,
            expected: format!("{shape:?}"),
            encoder: format!("a {} of width {}", spec.architecture.name(), spec.width),
        };
        let tensor = tensors.tensor(name).map_err(|_| mismatch("missing".into()))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
            return Err(mismatch(format!("{:?} {:?}", tensor.dtype(), tensor.shape())));
        }
        Ok(from_bytes(tensor.data()))
    };
    let mut params = Tree::new();
    for (name, shape) in spec.resnet().shapes() {
        let values = read(&name, &shape)?;
        params.insert(name, Leaf::new(values, &shape, device));
    }
    let mut statistics = Statistics::default();
    for conv in spec.resnet().convs() {
        let flat = |suffix: &str| -> Result<_, Error> {
            let values = read(&format!("{}.{suffix}", conv.norm), &[conv.c_out])?;
            Ok(Leaf::new(values, &[conv.c_out], device).value)
        };
        let (mean, var) = (flat("running_mean")?, flat("running_var")?);
        let batches = tensors.tensor(&format!("{}.num_batches_tracked", conv.norm)).ok();
        let batches = batches.and_then(|t| Some(u64::from_le_bytes(t.data().try_into().ok()?))).unwrap_or(0);
        statistics.insert(&conv.norm, RunningStats { mean, var, batches });
    }
    Ok(Encoder::new(spec, Weights { params, statistics }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Architecture, Normalization, Stem};

    fn small() -> (EncoderSpec, Weights, Device) {
        let spec = EncoderSpec {
            architecture: Architecture::Resnet18,
            width: 0.0625,
            stem: Stem::Cifar,
            size: 8,
            center: 1.0,
            antialias: false,
            channels: 3,
            normalization: Normalization::default(),
            eps: 1e-3,
            levels: crate::data::Levels::default(),
        };
        let device = Device::flex();
        let resnet = spec.resnet();
        let weights = Weights { params: resnet.init(3, "online", &device), statistics: resnet.statistics(&device) };
        (spec, weights, device)
    }

    #[test]
    fn saved_encoder_loads_unchanged() {
        let (spec, weights, device) = small();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("encoder.safetensors");
        save(&path, &spec, &weights).unwrap();
        for from in [path.as_path(), folder.path()] {
            let encoder = load(from, &device).unwrap();
            assert_eq!(encoder.spec, spec);
            for (name, leaf) in weights.params.iter() {
                assert_eq!(leaf.to_vec(), encoder.weights.params.leaf(name).unwrap().to_vec(), "{name}");
            }
        }
    }

    #[test]
    fn rejects_truncated_files() {
        let (spec, weights, device) = small();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("encoder.safetensors");
        save(&path, &spec, &weights).unwrap();
        let bytes = fs::read(&path).unwrap();
        for n in [0, 4, 8, 100, bytes.len() / 2, bytes.len() - 1] {
            assert!(matches!(parse(&path, &bytes[..n], &device), Err(Error::Format { .. })), "cut to {n}");
        }
    }

    #[test]
    fn rejects_weights_of_another_width() {
        let (spec, weights, device) = small();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("encoder.safetensors");
        save(&path, &spec, &weights).unwrap();
        let bytes = fs::read(&path).unwrap();
        // A width of the same length: 0.0625 → 0.1250.
        let at = bytes.windows(6).position(|w| w == b"0.0625").unwrap();
        let mut changed = bytes.clone();
        changed[at..at + 6].copy_from_slice(b"0.1250");
        assert!(matches!(parse(&path, &changed, &device), Err(Error::Mismatch { .. })));
    }
}

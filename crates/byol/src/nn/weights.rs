//! Encoder files: safetensors with torchvision's names, so that `torchvision.models.resnet18().load_state_dict(…, strict=False)` takes
//! them, and a metadata entry `byol` (JSON of [`EncoderSpec`]) that says what they are.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use burn::tensor::Device;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use sha2::{Digest, Sha256};

use super::{Encoder, EncoderSpec, Leaf, Running, Statistics, Tree, Weights};
use crate::files;

/// What can be wrong with an encoder file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the encoder {}: {source}; give an encoder.safetensors or a run folder that holds one", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write the encoder {}: {source}; {}", path.display(), crate::files::remedy(source))]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not safetensors, or truncated.
    #[error("{} is not a whole safetensors file: {reason}; it may be cut off: copy it again", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// Safetensors of someone else.
    #[error("{} does not say which encoder it holds ({reason}); use an encoder.safetensors that byol wrote, or make one of it with `byol import`", path.display())]
    Foreign {
        /// Which file.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A file of someone else without a ResNet that we know.
    #[error("{} cannot be imported: {reason}; give a ResNet's weights as .pth or .safetensors, with torchvision's, timm's, lightly's or solo-learn's names", path.display())]
    NoResnet {
        /// Which file.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// The weights are not those of the architecture that the file names.
    #[error("{} holds {found} for `{name}`, but {encoder} has {expected}: its weights are of another architecture; use the file as byol wrote it", path.display())]
    Mismatch {
        /// Which file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What the file has.
        found: String,
        /// What the description asks for.
        expected: String,
        /// The description.
        encoder: String,
    },
}

/// The metadata key of the description.
const KEY: &str = "byol";

/// Bytes of f32 values, little-endian as safetensors wants them.
pub(crate) fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// f32 values from little-endian bytes.
pub(crate) fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Writes the encoder to `path`, whole or not at all.
///
/// # Errors
/// [`Error::Write`].
pub fn save(path: &Path, spec: &EncoderSpec, weights: &Weights) -> Result<(), Error> {
    let write = |source| Error::Write { path: path.to_owned(), source };
    files::write_whole(path, &to_file(spec, weights, None)).map_err(write)
}

/// The encoder as the bytes of a file, with one more entry of metadata where there is something to say.
pub(crate) fn to_file(spec: &EncoderSpec, weights: &Weights, note: Option<(&str, String)>) -> Vec<u8> {
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, leaf) in spec.resnet().shapes().iter().filter_map(|(name, _)| Some((name, weights.params.leaf(name)?))) {
        tensors.push((name.clone(), Dtype::F32, leaf.shape.clone(), to_bytes(&leaf.to_vec())));
    }
    for conv in spec.resnet().convs() {
        let (name, r) = (&conv.norm, weights.statistics.get(&conv.norm));
        for (what, value) in [("running_mean", &r.mean), ("running_var", &r.var)] {
            let values = super::tree::host(value.clone());
            tensors.push((format!("{name}.{what}"), Dtype::F32, vec![values.len()], to_bytes(&values)));
        }
        let batches = i64::try_from(r.batches).unwrap_or(i64::MAX);
        tensors.push((format!("{name}.num_batches_tracked"), Dtype::I64, vec![], batches.to_le_bytes().to_vec()));
    }
    // One entry: a map of more is written in an order that changes from process to process, and equal encoders are equal files.
    let mut metadata =
        HashMap::from([(KEY.to_owned(), serde_json::to_string(spec).expect("a description is plain data"))]);
    metadata.extend(note.map(|(key, value)| (key.to_owned(), value)));
    serialize(&tensors, metadata)
}

/// Named tensors and metadata as a safetensors file.
pub(crate) fn serialize(
    tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)],
    metadata: HashMap<String, String>,
) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("bytes fit the shape"))
    });
    safetensors::serialize(views, Some(metadata)).expect("named tensors of known types serialise")
}

/// `encoder.safetensors` of a run folder, or the file itself.
pub fn resolve(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("encoder.safetensors") } else { path.to_owned() }
}

/// SHA-256 of a file in hexadecimal: which encoder it is.
///
/// # Errors
/// [`Error::Read`].
pub fn sha256(path: &Path) -> Result<String, Error> {
    let bytes = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    Ok(files::hex(&Sha256::digest(&bytes)))
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

/// As [`load`], from bytes; `path` is for messages.
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
            encoder: format!("{} of width {}", spec.architecture.name(), spec.width),
        };
        let tensor = tensors.tensor(name).map_err(|_| mismatch("nothing".into()))?;
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
        let flat = |what: &str| -> Result<_, Error> {
            let values = read(&format!("{}.{what}", conv.norm), &[conv.c_out])?;
            Ok(Leaf::new(values, &[conv.c_out], device).value)
        };
        let (mean, var) = (flat("running_mean")?, flat("running_var")?);
        let batches = tensors.tensor(&format!("{}.num_batches_tracked", conv.norm)).ok();
        let batches = batches.and_then(|t| Some(u64::from_le_bytes(t.data().try_into().ok()?))).unwrap_or(0);
        statistics.insert(&conv.norm, Running { mean, var, batches });
    }
    Ok(Encoder::new(spec, Weights { params, statistics }))
}

impl EncoderSpec {
    /// Whether the description makes sense; a reason where not.
    ///
    /// # Errors
    /// The reason, for a file from outside.
    pub fn check(&self) -> Result<(), String> {
        let n = &self.normalization;
        if !(self.width > 0.0 && self.width <= 64.0) {
            return Err(format!("width {} is not in (0, 64]", self.width));
        }
        if self.size == 0 || self.size > 8192 || self.channels == 0 || self.channels > 4096 {
            return Err(format!("{} px of {} channels is out of range", self.size, self.channels));
        }
        if !(self.center > 0.0 && self.center <= 1.0) {
            return Err(format!("an evaluation window of {} of the shorter side is not in (0, 1]", self.center));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(format!("an epsilon of {} is not above 0", self.eps));
        }
        if n.mean.len() != self.channels
            || n.std.len() != self.channels
            || n.std.iter().any(|s| s.is_nan() || *s <= 0.0)
        {
            return Err(format!("the normalisation is not of {} channels with deviations above 0", self.channels));
        }
        Ok(())
    }
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
            channels: 3,
            normalization: Normalization::default(),
            eps: 1e-3,
        };
        let device = Device::flex();
        let resnet = spec.resnet();
        let weights = Weights { params: resnet.init(3, "online", &device), statistics: resnet.statistics(&device) };
        (spec, weights, device)
    }

    #[test]
    fn a_saved_encoder_comes_back() {
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
    fn every_cut_of_a_file_is_refused() {
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
    fn another_architectures_weights_are_refused() {
        let (spec, weights, device) = small();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("encoder.safetensors");
        save(&path, &spec, &weights).unwrap();
        let bytes = fs::read(&path).unwrap();
        // Same length: 0.0625 → 0.1250.
        let at = bytes.windows(6).position(|w| w == b"0.0625").unwrap();
        let mut changed = bytes.clone();
        changed[at..at + 6].copy_from_slice(b"0.1250");
        assert!(matches!(parse(&path, &changed, &device), Err(Error::Mismatch { .. })));
    }
}

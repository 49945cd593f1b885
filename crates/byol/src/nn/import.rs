//! Import of pretrained ResNets: PyTorch checkpoints and safetensors with torchvision's names (also
//! timm's, and solo-learn's behind a prefix) or the indices of lightly's `Sequential`. The
//! architecture is inferred from the shapes. Pickles are parsed without executing code.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::Path,
};

use burn::tensor::Device;
use half::{bf16, f16};
use pytorch_reader::{DType, PytorchReader};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::{
    encoder::{Encoder, EncoderSpec, Normalization, Weights, reference_center, reference_eps},
    forward_context::{RunningStats, Statistics},
    resnet::{Architecture, ResNet, Stem},
    tree::{Leaf, Tree},
    weights::{self, Error},
};

/// Input preparation, which checkpoints do not record.
#[derive(Debug, Clone, PartialEq)]
pub struct Preparation {
    /// Side of the views, in pixels. Default: 32 for a 3×3 stem, 224 for a 7×7 stem.
    pub size: Option<usize>,
    /// Input normalization.
    pub normalization: Normalization,
}

impl Preparation {
    /// Fills in size and normalization from the `config.json` beside a checkpoint, in timm's
    /// format, where `size`, `mean` and `std` are `None`; defaults without one.
    pub fn with_config(checkpoint: &Path, size: Option<usize>, mean: Option<Vec<f32>>, std: Option<Vec<f32>>) -> Self {
        let config = checkpoint.parent().and_then(|folder| fs::read(folder.join("config.json")).ok());
        let config: Value = config.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let config = &config["pretrained_cfg"];
        let values = |key: &str| serde_json::from_value::<Vec<f32>>(config[key].clone()).ok();
        let default = Normalization::default();
        Preparation {
            size: size.or_else(|| config["input_size"][1].as_u64().map(|size| size as usize)),
            normalization: Normalization {
                mean: mean.or_else(|| values("mean")).unwrap_or(default.mean),
                std: std.or_else(|| values("std")).unwrap_or(default.std),
            },
        }
    }
}

/// Reads the values of a tensor.
type ReadTensor<'a> = Box<dyn Fn(&str) -> Result<Vec<f32>, String> + 'a>;

/// Tensors of a checkpoint: shapes, and values on demand.
struct Tensors<'a> {
    shapes: BTreeMap<String, Vec<usize>>,
    read: ReadTensor<'a>,
}

/// Index of each of torchvision's modules in lightly's `Sequential`.
const SEQUENTIAL_INDICES: [(&str, &str); 6] =
    [("conv1", "0"), ("bn1", "1"), ("layer1", "4"), ("layer2", "5"), ("layer3", "6"), ("layer4", "7")];

/// Markers in prefixes of copies of the trained network, such as moving averages.
const COPIES: [&str; 5] = ["momentum", "target", "teacher", "ema", "key"];

/// First letters of the modules of a checkpoint that come after the encoder, or do not belong to
/// the network: classifiers, heads of self-supervised methods, and the state of their training.
const OTHER_MODULES: [&str; 14] = [
    "fc",
    "head",
    "classifier",
    "linear",
    "online_",
    "proj",
    "predict",
    "prototypes",
    "queue",
    "mlp",
    "logit",
    "loss",
    "criterion",
    "optim",
];

/// Index of torchvision's classifier in lightly's `Sequential`.
const SEQUENTIAL_CLASSIFIER: &str = "9";

/// Loads an encoder written by byol, or imports a ResNet.
///
/// # Errors
/// All but [`Error::Write`].
pub fn load(path: &Path, preparation: &Preparation, device: &Device) -> Result<Encoder, Error> {
    match weights::load(path, device) {
        Ok(encoder) => Ok(encoder),
        Err(error @ (Error::Foreign { .. } | Error::Format { .. })) => {
            let path = weights::resolve(path);
            // For a truncated file of byol the parser's error is the right one.
            let truncated =
                path.extension().is_some_and(|e| e == "safetensors") && matches!(error, Error::Format { .. });
            if truncated { Err(error) } else { import(&path, preparation, device) }
        }
        Err(other) => Err(other),
    }
}

/// Imports a ResNet from a checkpoint.
///
/// # Errors
/// [`Error::Read`], [`Error::NoResnet`].
pub fn import(path: &Path, preparation: &Preparation, device: &Device) -> Result<Encoder, Error> {
    let bytes = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let format = |reason: String| Error::NoResnet { path: path.to_owned(), reason };
    // A safetensors file starts with the 8-byte length of its header, which starts with a brace.
    let tensors =
        if bytes.get(8) == Some(&b'{') { open_safetensors(&bytes) } else { open_pickle(path) }.map_err(format)?;
    let names = Names::find(&tensors.shapes).map_err(format)?;
    let spec = names.describe(&tensors.shapes, preparation).map_err(format)?;
    let resnet = spec.resnet();
    names.check_complete(&tensors.shapes, &resnet).map_err(format)?;
    let read = |name: &str, shape: &[usize]| -> Result<Vec<f32>, Error> {
        let name = names.in_checkpoint(name);
        let found = tensors.shapes.get(&name);
        if found.map(Vec::as_slice) != Some(shape) {
            let found = found.map_or("missing".into(), |s| format!("{s:?}"));
            let (kind, width) = (spec.architecture.name(), spec.width);
            return Err(format(format!("`{name}` is {found}, but a {kind} of width {width} expects {shape:?}")));
        }
        let values = (tensors.read)(&name).map_err(|e| format(format!("`{name}`: {e}")))?;
        match values.iter().find(|v| !v.is_finite()) {
            Some(v) => Err(format(format!("`{name}` contains {v}"))),
            None => Ok(values),
        }
    };
    let mut params = Tree::new();
    for (name, shape) in resnet.shapes() {
        params.insert(name.clone(), Leaf::new(read(&name, &shape)?, &shape, device));
    }
    let mut statistics = Statistics::default();
    for conv in resnet.convs() {
        let flat = |suffix: &str| -> Result<_, Error> {
            let values = read(&format!("{}.{suffix}", conv.norm), &[conv.c_out])?;
            Ok(Leaf::new(values, &[conv.c_out], device).value)
        };
        let (mean, var) = (flat("running_mean")?, flat("running_var")?);
        statistics.insert(&conv.norm, RunningStats { mean, var, batches: 0 });
    }
    Ok(Encoder::new(spec, Weights { params, statistics }))
}

fn open_safetensors(bytes: &[u8]) -> Result<Tensors<'_>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let shapes = file.iter().map(|(name, view)| (name.to_owned(), view.shape().to_vec())).collect();
    let read = move |name: &str| {
        let view = file.tensor(name).map_err(|e| e.to_string())?;
        let dtype = match view.dtype() {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(format!("unsupported type {other:?}")),
        };
        to_f32(dtype, view.data(), true)
    };
    Ok(Tensors { shapes, read: Box::new(read) })
}

fn open_pickle<'a>(path: &Path) -> Result<Tensors<'a>, String> {
    let file = PytorchReader::new(path).map_err(|e| e.to_string())?;
    let shapes = file.tensors().iter().map(|(name, t)| (name.clone(), t.shape().to_vec())).collect();
    let read = move |name: &str| {
        let tensor = file.get(name).ok_or("not in the checkpoint")?;
        let bytes = tensor.read().map_err(|e| e.to_string())?;
        to_f32(tensor.dtype(), &bytes, cfg!(target_endian = "little"))
    };
    Ok(Tensors { shapes, read: Box::new(read) })
}

/// Converts values of any floating-point type to f32.
fn to_f32(dtype: DType, bytes: &[u8], little_endian: bool) -> Result<Vec<f32>, String> {
    let decode: fn([u8; 8]) -> f32 = match dtype {
        DType::F64 => |b| f64::from_le_bytes(b) as f32,
        DType::F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        DType::BF16 => |b| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        DType::F16 => |b| f16::from_le_bytes([b[0], b[1]]).to_f32(),
        other => return Err(format!("unsupported type {other:?}")),
    };
    let value = |chunk: &[u8]| {
        let mut padded = [0u8; 8];
        padded[..chunk.len()].copy_from_slice(chunk);
        if !little_endian {
            padded[..chunk.len()].reverse();
        }
        decode(padded)
    };
    Ok(bytes.chunks_exact(dtype.size()).map(value).collect())
}

/// Naming scheme of the ResNet in a checkpoint.
struct Names {
    prefix: String,
    /// Lightly's indices instead of torchvision's module names.
    indexed: bool,
    /// Prefixes of the other networks in the checkpoint.
    others: Vec<String>,
}

/// True for the prefix of a copy of the trained network.
fn is_copy(prefix: &str) -> bool {
    let prefix = prefix.to_ascii_lowercase();
    COPIES.iter().any(|marker| prefix.contains(marker)) || prefix.trim_end_matches('.').ends_with("_k")
}

impl Names {
    /// Finds the trained network among all networks in a checkpoint.
    fn find(shapes: &BTreeMap<String, Vec<usize>>) -> Result<Names, String> {
        let mut found: Vec<Names> = Vec::new();
        for name in shapes.keys() {
            for (first, last_group, indexed) in
                [("conv1.weight", "layer4.0.conv1.weight", false), ("0.weight", "7.0.conv1.weight", true)]
            {
                let prefix = name.strip_suffix(first).filter(|p| shapes.contains_key(&format!("{p}{last_group}")));
                found.extend(prefix.map(|p| Names { prefix: p.to_owned(), indexed, others: Vec::new() }));
            }
        }
        let prefixes: Vec<String> = found.iter().map(|names| names.prefix.clone()).collect();
        let rank = |n: &Names| (is_copy(&n.prefix), n.prefix.len(), n.prefix.clone());
        let names = found.into_iter().min_by_key(rank).ok_or_else(|| {
            let first: Vec<&str> = shapes.keys().take(3).map(String::as_str).collect();
            format!("no ResNet among its {} tensors ({}, …)", shapes.len(), first.join(", "))
        })?;
        let others = prefixes.into_iter().filter(|prefix| prefix.len() > names.prefix.len()).collect();
        Ok(Names { others, ..names })
    }

    /// Refuses a network with tensors that a ResNet does not have, such as those of
    /// squeeze-and-excitation or biases of convolutions. Without them it is another function.
    fn check_complete(&self, shapes: &BTreeMap<String, Vec<usize>>, resnet: &ResNet) -> Result<(), String> {
        let params = resnet.shapes().into_iter().map(|(name, _)| name);
        let statistics = resnet
            .convs()
            .flat_map(|conv| ["running_mean", "running_var"].map(|suffix| format!("{}.{suffix}", conv.norm)));
        let known: HashSet<String> = params.chain(statistics).map(|name| self.in_checkpoint(&name)).collect();
        let mut unknown = shapes.keys().filter(|name| !known.contains(*name) && self.belongs_to_encoder(name));
        match unknown.next() {
            None => Ok(()),
            Some(first) => Err(format!(
                "`{first}` does not belong to a plain ResNet ({} such tensors), and leaving it out would change the \
                 outputs",
                1 + unknown.count()
            )),
        }
    }

    /// True if a tensor belongs to the encoder: not to a later module, another network or a
    /// counter.
    fn belongs_to_encoder(&self, name: &str) -> bool {
        let Some(rest) = name.strip_prefix(&self.prefix) else { return false };
        let module = rest.split('.').next().unwrap_or_default().to_ascii_lowercase();
        let is_other = OTHER_MODULES.iter().any(|other| module.starts_with(other))
            || is_copy(&module)
            || (self.indexed && module == SEQUENTIAL_CLASSIFIER)
            || self.others.iter().any(|other| name.starts_with(other));
        !is_other && !name.ends_with("num_batches_tracked")
    }

    /// Translates torchvision's name to that in the checkpoint.
    fn in_checkpoint(&self, name: &str) -> String {
        let Some((first, rest)) = name.split_once('.').filter(|_| self.indexed) else {
            return format!("{}{name}", self.prefix);
        };
        let index = SEQUENTIAL_INDICES.iter().find(|(module, _)| *module == first).map_or(first, |(_, index)| index);
        format!("{}{index}.{rest}", self.prefix)
    }

    /// Infers the description from the shapes.
    fn describe(
        &self,
        shapes: &BTreeMap<String, Vec<usize>>,
        preparation: &Preparation,
    ) -> Result<EncoderSpec, String> {
        let shape = |name: &str| shapes.get(&self.in_checkpoint(name)).map(Vec::as_slice);
        let depth =
            |group: usize| (0..).take_while(|b| shape(&format!("layer{group}.{b}.conv1.weight")).is_some()).count();
        let depths = [1, 2, 3, 4].map(depth);
        let bottleneck = shape("layer1.0.conv3.weight").is_some();
        let architecture = Architecture::from_depths(bottleneck, depths).ok_or_else(|| {
            let block = if bottleneck { "bottlenecks" } else { "basic blocks" };
            format!("{depths:?} {block} are not a ResNet-18, 34, 50, 101, 152 or 200")
        })?;
        let Some(&[c_out, channels, kernel, _]) = shape("conv1.weight") else {
            return Err("conv1.weight does not have four axes".into());
        };
        let stem = match kernel {
            3 => Stem::Cifar,
            7 => Stem::Imagenet,
            k => return Err(format!("the first convolution is {k}x{k}, not 3x3 or 7x7")),
        };
        let spec = EncoderSpec {
            architecture,
            width: c_out as f64 / 64.0,
            stem,
            size: preparation.size.unwrap_or(if stem == Stem::Cifar { 32 } else { 224 }),
            center: if stem == Stem::Cifar { 1.0 } else { reference_center() },
            antialias: false,
            channels,
            normalization: preparation.normalization.clone(),
            eps: reference_eps(),
            levels: crate::data::Levels::default(),
        };
        if channels != 3 {
            return Err(format!("the encoder takes images of {channels} channels; only 3 are supported"));
        }
        spec.check()?;
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::weights::{serialize, to_bytes};
    use std::collections::HashMap;

    fn preparation() -> Preparation {
        Preparation { size: None, normalization: Normalization::default() }
    }

    #[test]
    fn input_is_read_from_the_config_beside_a_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        let read = || Preparation::with_config(&file, None, None, Some(vec![0.2; 3]));
        let normalization = |mean: [f32; 3]| Normalization { mean: mean.into(), std: vec![0.2; 3] };
        let default = Preparation { size: None, normalization: normalization([0.485, 0.456, 0.406]) };
        assert_eq!(read(), default, "no config.json");
        for (config, expected) in [
            ("not json", default.clone()),
            (r#"{"pretrained_cfg": {"mean": "x", "input_size": 3}}"#, default.clone()),
            (
                r#"{"pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [1, 1, 1], "input_size": [3, 160, 160]}}"#,
                Preparation { size: Some(160), normalization: normalization([0.5, 0.4, 0.3]) },
            ),
        ] {
            fs::write(folder.path().join("config.json"), config).unwrap();
            assert_eq!(read(), expected, "{config}");
        }
    }

    /// Writes a small ResNet-18 with renamed tensors.
    fn write(path: &Path, rename: impl Fn(&str) -> String) -> Encoder {
        write_with(path, rename, &[])
    }

    /// [`write`], with additional tensors of one value.
    fn write_with(path: &Path, rename: impl Fn(&str) -> String, more: &[&str]) -> Encoder {
        let device = Device::flex();
        let spec = EncoderSpec {
            architecture: Architecture::Resnet18,
            width: 0.0625,
            stem: Stem::Imagenet,
            size: 224,
            center: 0.875,
            antialias: false,
            channels: 3,
            normalization: Normalization::default(),
            eps: reference_eps(),
            levels: crate::data::Levels::default(),
        };
        let encoder = Encoder::random(spec, 5, &device);
        let mut tensors: Vec<_> = encoder
            .weights
            .params
            .iter()
            .map(|(n, leaf)| (rename(n), Dtype::F32, leaf.shape.clone(), to_bytes(&leaf.to_vec())))
            .collect();
        for (n, leaf) in encoder.weights.statistics.to_tree().iter() {
            tensors.push((rename(n), Dtype::F32, leaf.shape.clone(), to_bytes(&leaf.to_vec())));
        }
        tensors.extend(more.iter().map(|name| (name.to_string(), Dtype::F32, vec![1], to_bytes(&[0.5]))));
        fs::write(path, serialize(&tensors, HashMap::new())).unwrap();
        encoder
    }

    #[test]
    fn refuses_tensors_that_a_resnet_does_not_have() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let extra = [
            "layer1.0.se.fc1.weight",
            "conv1.bias",
            "layer2.1.conv2.bias",
            "layer1.0.downsample.0.weight",
            "layer5.0.conv1.weight",
            "layer1.7.conv1.weight",
            "attnpool.q_proj.weight",
            "norm.mean",
        ];
        for prefix in ["", "module.encoder_q."] {
            for name in extra {
                let name = format!("{prefix}{name}");
                write_with(&path, |n| format!("{prefix}{n}"), &[&name]);
                let error = import(&path, &preparation(), &Device::flex()).unwrap_err().to_string();
                assert!(error.contains(&format!("`{name}` does not belong")), "{error}");
            }
            let other = ["fc.weight", "head.0.bias", "classifier.weight", "bn1.num_batches_tracked"];
            let other = other.map(|name| format!("{prefix}{name}"));
            let other =
                [&other.each_ref().map(String::as_str)[..], &["projector.0.weight", "momentum_encoder.conv1.bias"]];
            write_with(&path, |n| format!("{prefix}{n}"), &other.concat());
            import(&path, &preparation(), &Device::flex()).unwrap();
        }
    }

    #[test]
    fn imports_names_of_other_libraries() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let lightly = |n: &str| {
            let (first, rest) = n.split_once('.').unwrap();
            format!("backbone.{}.{rest}", SEQUENTIAL_INDICES.iter().find(|(module, _)| *module == first).unwrap().1)
        };
        let schemes: [&dyn Fn(&str) -> String; 3] =
            [&|n| n.to_owned(), &|n| format!("state_dict.backbone.{n}"), &lightly];
        for rename in schemes {
            let encoder = write(&path, rename);
            let imported = import(&path, &preparation(), &Device::flex()).unwrap();
            assert_eq!(imported.spec, encoder.spec);
            for (name, leaf) in encoder.weights.params.iter() {
                assert_eq!(leaf.to_vec(), imported.weights.params.leaf(name).unwrap().to_vec(), "{name}");
            }
        }
    }

    #[test]
    fn imports_the_trained_network_not_its_moving_average() {
        let shapes = ["momentum_backbone.", "backbone.", "x.y.backbone."]
            .iter()
            .flat_map(|p| ["conv1.weight", "layer4.0.conv1.weight"].map(|n| (format!("{p}{n}"), vec![1])))
            .collect();
        assert_eq!(Names::find(&shapes).ok().unwrap().prefix, "backbone.");
        let moco = ["module.encoder_k.", "module.encoder_q."];
        let shapes =
            moco.iter().flat_map(|p| ["conv1.weight", "layer4.0.conv1.weight"].map(|n| (format!("{p}{n}"), vec![1])));
        assert_eq!(Names::find(&shapes.collect()).ok().unwrap().prefix, "module.encoder_q.");
    }

    #[test]
    fn rejects_files_without_a_resnet() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pth");
        for bytes in [&b""[..], b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04"] {
            fs::write(&path, bytes).unwrap();
            assert!(matches!(import(&path, &preparation(), &Device::flex()), Err(Error::NoResnet { .. })));
        }
    }

    #[test]
    fn reads_all_float_types_in_both_byte_orders() {
        let f16s = [(0x3C00u16, 1.0), (0xC000, -2.0), (0x0001, 2.0f32.powi(-24)), (0x7BFF, 65504.0)];
        for (bits, want) in f16s {
            assert_eq!(to_f32(DType::F16, &bits.to_le_bytes(), true).unwrap(), [want]);
            assert_eq!(to_f32(DType::F16, &bits.to_be_bytes(), false).unwrap(), [want]);
        }
        assert_eq!(to_f32(DType::BF16, &[0x80, 0x3F], true).unwrap(), [1.0]);
        assert_eq!(
            to_f32(DType::F64, &[1.5f64.to_be_bytes(), (-3.0f64).to_be_bytes()].concat(), false).unwrap(),
            [1.5, -3.0]
        );
        assert_eq!(to_f32(DType::F32, &2.5f32.to_le_bytes(), true).unwrap(), [2.5]);
        assert!(to_f32(DType::I64, &[0; 8], true).is_err());
    }
}

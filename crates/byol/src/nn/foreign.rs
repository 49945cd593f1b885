//! ResNets that others have trained: PyTorch checkpoints and safetensors, with torchvision's names (also timm's, and those of solo-learn behind a
//! prefix) or with the numbers of lightly's `Sequential`. What they are is read off the shapes. A pickle is read by a reader that executes
//! nothing.

use std::{collections::BTreeMap, fs, path::Path};

use burn::tensor::Device;
use half::{bf16, f16};
use pytorch_reader::{DType, PytorchReader};
use safetensors::{Dtype, SafeTensors};

use super::{
    Architecture, Encoder, EncoderSpec, Leaf, Normalization, Running, Statistics, Stem, Tree, Weights,
    reference_center, reference_eps,
    weights::{self, Error},
};

/// What no checkpoint says: how its images are prepared.
#[derive(Debug, Clone, PartialEq)]
pub struct Preparation {
    /// Side of the views, in pixels; none: 32 for a 3x3 stem, 224 for a 7x7 one.
    pub size: Option<usize>,
    /// Of the input.
    pub normalization: Normalization,
}

/// The values of a tensor by its name.
type Read<'a> = Box<dyn Fn(&str) -> Result<Vec<f32>, String> + 'a>;

/// Shapes and, when asked for, values.
struct Tensors<'a> {
    shapes: BTreeMap<String, Vec<usize>>,
    read: Read<'a>,
}

/// Where lightly's `Sequential` of a ResNet's children has what torchvision names.
const NUMBERS: [(&str, &str); 6] =
    [("conv1", "0"), ("bn1", "1"), ("layer1", "4"), ("layer2", "5"), ("layer3", "6"), ("layer4", "7")];

/// Prefixes of networks that are not the one that was trained.
const OTHERS: [&str; 5] = ["momentum", "target", "teacher", "ema", "key"];

/// Reads an encoder of byol's own, or a ResNet of someone else.
///
/// # Errors
/// All but [`Error::Write`].
pub fn load(path: &Path, preparation: &Preparation, device: &Device) -> Result<Encoder, Error> {
    match weights::load(path, device) {
        Ok(own) => Ok(own),
        Err(error @ (Error::Foreign { .. } | Error::Format { .. })) => {
            let path = weights::resolve(path);
            // One of byol's own that is cut off is said to be so.
            let own = path.extension().is_some_and(|e| e == "safetensors") && matches!(error, Error::Format { .. });
            if own { Err(error) } else { import(&path, preparation, device) }
        }
        Err(other) => Err(other),
    }
}

/// Reads a ResNet of someone else.
///
/// # Errors
/// [`Error::Read`], [`Error::NoResnet`].
pub fn import(path: &Path, preparation: &Preparation, device: &Device) -> Result<Encoder, Error> {
    let bytes = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let format = |reason: String| Error::NoResnet { path: path.to_owned(), reason };
    // A safetensors file begins with the length of its header, and that with a brace.
    let tensors = if bytes.get(8) == Some(&b'{') { safe(&bytes) } else { pickled(path) }.map_err(format)?;
    let names = Names::find(&tensors.shapes).map_err(format)?;
    let spec = names.describe(&tensors.shapes, preparation).map_err(format)?;
    let resnet = spec.resnet();
    let read = |name: &str, shape: &[usize]| -> Result<Vec<f32>, Error> {
        let name = names.theirs(name);
        let found = tensors.shapes.get(&name);
        if found.map(Vec::as_slice) != Some(shape) {
            let found = found.map_or("nothing".into(), |s| format!("{s:?}"));
            let (kind, width) = (spec.architecture.name(), spec.width);
            return Err(format(format!("{name} is {found}, but a {kind} of width {width} has {shape:?}")));
        }
        let values = (tensors.read)(&name).map_err(|e| format(format!("{name}: {e}")))?;
        match values.iter().find(|v| !v.is_finite()) {
            Some(v) => Err(format(format!("{name} holds {v}"))),
            None => Ok(values),
        }
    };
    let mut params = Tree::new();
    for (name, shape) in resnet.shapes() {
        params.insert(name.clone(), Leaf::new(read(&name, &shape)?, &shape, device));
    }
    let mut statistics = Statistics::default();
    for conv in resnet.convs() {
        let flat = |what: &str| -> Result<_, Error> {
            let values = read(&format!("{}.{what}", conv.norm), &[conv.c_out])?;
            Ok(Leaf::new(values, &[conv.c_out], device).value)
        };
        let (mean, var) = (flat("running_mean")?, flat("running_var")?);
        statistics.insert(&conv.norm, Running { mean, var, batches: 0 });
    }
    Ok(Encoder::new(spec, Weights { params, statistics }))
}

fn safe(bytes: &[u8]) -> Result<Tensors<'_>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let shapes = file.iter().map(|(name, view)| (name.to_owned(), view.shape().to_vec())).collect();
    let read = move |name: &str| {
        let view = file.tensor(name).map_err(|e| e.to_string())?;
        let kind = match view.dtype() {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(format!("it is of {other:?}, not of floating point numbers")),
        };
        floats(kind, view.data(), true)
    };
    Ok(Tensors { shapes, read: Box::new(read) })
}

fn pickled<'a>(path: &Path) -> Result<Tensors<'a>, String> {
    let file = PytorchReader::new(path).map_err(|e| e.to_string())?;
    let shapes = file.tensors().iter().map(|(name, t)| (name.clone(), t.shape().to_vec())).collect();
    let read = move |name: &str| {
        let tensor = file.get(name).ok_or("it is not there")?;
        let bytes = tensor.read().map_err(|e| e.to_string())?;
        floats(tensor.dtype(), &bytes, cfg!(target_endian = "little"))
    };
    Ok(Tensors { shapes, read: Box::new(read) })
}

/// Numbers of any floating point type as f32; `little`: the order of their bytes.
fn floats(kind: DType, bytes: &[u8], little: bool) -> Result<Vec<f32>, String> {
    let number: fn([u8; 8]) -> f32 = match kind {
        DType::F64 => |b| f64::from_le_bytes(b) as f32,
        DType::F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        DType::BF16 => |b| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        DType::F16 => |b| f16::from_le_bytes([b[0], b[1]]).to_f32(),
        other => return Err(format!("it is of {other:?}, not of floating point numbers")),
    };
    let of = |chunk: &[u8]| {
        let mut all = [0u8; 8];
        all[..chunk.len()].copy_from_slice(chunk);
        if !little {
            all[..chunk.len()].reverse();
        }
        number(all)
    };
    Ok(bytes.chunks_exact(kind.size()).map(of).collect())
}

/// How a checkpoint names the tensors of its ResNet.
struct Names {
    prefix: String,
    numbered: bool,
}

impl Names {
    /// Looks for the trained network among all that a checkpoint may hold.
    fn find(shapes: &BTreeMap<String, Vec<usize>>) -> Result<Names, String> {
        let mut found: Vec<Names> = Vec::new();
        for name in shapes.keys() {
            for (tail, mark, numbered) in
                [("conv1.weight", "layer4.0.conv1.weight", false), ("0.weight", "7.0.conv1.weight", true)]
            {
                let prefix = name.strip_suffix(tail).filter(|p| shapes.contains_key(&format!("{p}{mark}")));
                found.extend(prefix.map(|p| Names { prefix: p.to_owned(), numbered }));
            }
        }
        let other = |prefix: &str| {
            let prefix = prefix.to_ascii_lowercase();
            OTHERS.iter().any(|o| prefix.contains(o)) || prefix.trim_end_matches('.').ends_with("_k")
        };
        let rank = |n: &Names| (other(&n.prefix), n.prefix.len(), n.prefix.clone());
        found.into_iter().min_by_key(rank).ok_or_else(|| {
            let some: Vec<&str> = shapes.keys().take(3).map(String::as_str).collect();
            format!("no ResNet is among its {} tensors ({} …)", shapes.len(), some.join(", "))
        })
    }

    /// torchvision's name in this checkpoint.
    fn theirs(&self, name: &str) -> String {
        let Some((first, rest)) = name.split_once('.').filter(|_| self.numbered) else {
            return format!("{}{name}", self.prefix);
        };
        let number = NUMBERS.iter().find(|(ours, _)| *ours == first).map_or(first, |(_, theirs)| theirs);
        format!("{}{number}.{rest}", self.prefix)
    }

    fn describe(
        &self,
        shapes: &BTreeMap<String, Vec<usize>>,
        preparation: &Preparation,
    ) -> Result<EncoderSpec, String> {
        let shape = |name: &str| shapes.get(&self.theirs(name)).map(Vec::as_slice);
        let depth =
            |group: usize| (0..).take_while(|b| shape(&format!("layer{group}.{b}.conv1.weight")).is_some()).count();
        let depths = [1, 2, 3, 4].map(depth);
        let bottleneck = shape("layer1.0.conv3.weight").is_some();
        let architecture = Architecture::of(bottleneck, depths).ok_or_else(|| {
            let block = if bottleneck { "bottlenecks" } else { "basic blocks" };
            format!("{depths:?} {block} are no ResNet-18, 34, 50, 101, 152 or 200")
        })?;
        let Some(&[c_out, channels, kernel, _]) = shape("conv1.weight") else {
            return Err("conv1.weight has not four axes".into());
        };
        let stem = match kernel {
            3 => Stem::Cifar,
            7 => Stem::Imagenet,
            k => return Err(format!("its first convolution is {k}x{k}, not 3x3 or 7x7")),
        };
        let spec = EncoderSpec {
            architecture,
            width: c_out as f64 / 64.0,
            stem,
            size: preparation.size.unwrap_or(if stem == Stem::Cifar { 32 } else { 224 }),
            center: if stem == Stem::Cifar { 1.0 } else { reference_center() },
            channels,
            normalization: preparation.normalization.clone(),
            eps: reference_eps(),
        };
        if channels != 3 {
            return Err(format!("it takes images of {channels} channels, and all images are read as 3"));
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

    /// A small ResNet-18 under other names.
    fn written(path: &Path, rename: impl Fn(&str) -> String) -> Encoder {
        let device = Device::flex();
        let spec = EncoderSpec {
            architecture: Architecture::Resnet18,
            width: 0.0625,
            stem: Stem::Imagenet,
            size: 224,
            center: 0.875,
            channels: 3,
            normalization: Normalization::default(),
            eps: reference_eps(),
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
        fs::write(path, serialize(&tensors, HashMap::new())).unwrap();
        encoder
    }

    #[test]
    fn the_names_of_others_are_understood() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let lightly = |n: &str| {
            let (first, rest) = n.split_once('.').unwrap();
            format!("backbone.{}.{rest}", NUMBERS.iter().find(|(o, _)| *o == first).unwrap().1)
        };
        let all: [&dyn Fn(&str) -> String; 3] = [&|n| n.to_owned(), &|n| format!("state_dict.backbone.{n}"), &lightly];
        for rename in all {
            let encoder = written(&path, rename);
            let found = import(&path, &preparation(), &Device::flex()).unwrap();
            assert_eq!(found.spec, encoder.spec);
            for (name, leaf) in encoder.weights.params.iter() {
                assert_eq!(leaf.to_vec(), found.weights.params.leaf(name).unwrap().to_vec(), "{name}");
            }
        }
    }

    #[test]
    fn the_trained_network_is_taken_not_its_moving_average() {
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
    fn what_is_no_resnet_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pth");
        for bytes in [&b""[..], b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04"] {
            fs::write(&path, bytes).unwrap();
            assert!(matches!(import(&path, &preparation(), &Device::flex()), Err(Error::NoResnet { .. })));
        }
    }

    #[test]
    fn numbers_of_every_size_are_read_in_either_order() {
        let f16s = [(0x3C00u16, 1.0), (0xC000, -2.0), (0x0001, 2.0f32.powi(-24)), (0x7BFF, 65504.0)];
        for (bits, want) in f16s {
            assert_eq!(floats(DType::F16, &bits.to_le_bytes(), true).unwrap(), [want]);
            assert_eq!(floats(DType::F16, &bits.to_be_bytes(), false).unwrap(), [want]);
        }
        assert_eq!(floats(DType::BF16, &[0x80, 0x3F], true).unwrap(), [1.0]);
        assert_eq!(
            floats(DType::F64, &[1.5f64.to_be_bytes(), (-3.0f64).to_be_bytes()].concat(), false).unwrap(),
            [1.5, -3.0]
        );
        assert_eq!(floats(DType::F32, &2.5f32.to_le_bytes(), true).unwrap(), [2.5]);
        assert!(floats(DType::I64, &[0; 8], true).is_err());
    }
}

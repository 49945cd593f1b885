//! ONNX models of encoders: the required messages of the format, the conversion of an encoder to a
//! graph, and an interpreter that runs the graph, to verify a file before it is published.
//!
//! Opset 17. Input `images`, `[N, C, H, W]`; output `features`, `[N, F]`. Batch norm is folded into
//! the convolutions.

use burn::tensor::{
    Device, Tensor, TensorData,
    activation::relu,
    module::{adaptive_avg_pool2d, conv2d, max_pool2d},
    ops::{ConvOptions, MaxPoolOptions},
};
use prost::Message;

use crate::nn::{Encoder, Stem, conv_norm_act::ConvNorm, tree::host, weights::to_bytes};

/// `ModelProto` of onnx.proto. This message and those below have only the required fields.
#[derive(Clone, PartialEq, Message)]
pub struct Model {
    #[prost(int64, tag = "1")]
    ir_version: i64,
    #[prost(string, tag = "2")]
    producer_name: String,
    #[prost(string, tag = "3")]
    producer_version: String,
    #[prost(message, optional, tag = "7")]
    graph: Option<Graph>,
    #[prost(message, repeated, tag = "8")]
    opset_import: Vec<Opset>,
    #[prost(message, repeated, tag = "14")]
    metadata_props: Vec<Entry>,
}

#[derive(Clone, PartialEq, Message)]
struct Opset {
    #[prost(string, tag = "1")]
    domain: String,
    #[prost(int64, tag = "2")]
    version: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, Message)]
struct Graph {
    #[prost(message, repeated, tag = "1")]
    node: Vec<Node>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<Constant>,
    #[prost(message, repeated, tag = "11")]
    input: Vec<Value>,
    #[prost(message, repeated, tag = "12")]
    output: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Node {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    output: Vec<String>,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    op_type: String,
    #[prost(message, repeated, tag = "5")]
    attribute: Vec<Attribute>,
}

#[derive(Clone, PartialEq, Message)]
struct Attribute {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int64, tag = "3")]
    i: i64,
    #[prost(int64, repeated, tag = "8")]
    ints: Vec<i64>,
    /// Type of the value: 2 is `i`, 7 is `ints`.
    #[prost(int32, tag = "20")]
    kind: i32,
}

/// `TensorProto`.
#[derive(Clone, PartialEq, Message)]
struct Constant {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    /// Element type: 1 is f32.
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(bytes = "vec", tag = "9")]
    raw_data: Vec<u8>,
}

/// `ValueInfoProto`.
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    kind: Option<Type>,
}

#[derive(Clone, PartialEq, Message)]
struct Type {
    #[prost(message, optional, tag = "1")]
    tensor: Option<TensorType>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorType {
    #[prost(int32, tag = "1")]
    elem_type: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Dims>,
}

#[derive(Clone, PartialEq, Message)]
struct Dims {
    #[prost(message, repeated, tag = "1")]
    dim: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(oneof = "Extent", tags = "1, 2")]
    extent: Option<Extent>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Extent {
    #[prost(int64, tag = "1")]
    Fixed(i64),
    #[prost(string, tag = "2")]
    Named(String),
}

const FLOAT: i32 = 1;

fn value(name: &str, dims: &[Extent]) -> Value {
    let dim = dims.iter().map(|d| Dim { extent: Some(d.clone()) }).collect();
    let tensor = TensorType { elem_type: FLOAT, shape: Some(Dims { dim }) };
    Value { name: name.into(), kind: Some(Type { tensor: Some(tensor) }) }
}

fn ints(name: &str, ints: Vec<usize>) -> Attribute {
    Attribute { name: name.into(), i: 0, ints: ints.into_iter().map(|i| i as i64).collect(), kind: 7 }
}

/// Builder of an encoder graph.
struct Builder<'a> {
    encoder: &'a Encoder,
    graph: Graph,
    eps: f64,
}

impl Builder<'_> {
    /// Adds a constant and returns its name.
    fn constant(&mut self, name: &str, dims: &[usize], values: &[f32]) -> String {
        let dims = dims.iter().map(|d| *d as i64).collect();
        let constant = Constant { dims, data_type: FLOAT, name: name.into(), raw_data: to_bytes(values) };
        self.graph.initializer.push(constant);
        name.into()
    }

    /// Adds a node and returns its output, which has the node's name.
    fn node(&mut self, op: &str, name: &str, input: Vec<String>, attribute: Vec<Attribute>) -> String {
        let (name, output) = (name.to_owned(), vec![name.to_owned()]);
        self.graph.node.push(Node { input, output, name: name.clone(), op_type: op.into(), attribute });
        name
    }

    /// Adds a convolution with its batch norm folded in.
    fn conv(&mut self, layer: &ConvNorm, x: String) -> String {
        let weights = &self.encoder.weights;
        let get = |name: String| weights.params.leaf(&name).expect("the encoder is complete").to_vec();
        let (gamma, beta) = (get(format!("{}.weight", layer.norm)), get(format!("{}.bias", layer.norm)));
        let running = weights.statistics.get(&layer.norm);
        let (mean, var) = (host(running.mean.clone()), host(running.var.clone()));
        let scale: Vec<f64> =
            gamma.iter().zip(&var).map(|(g, v)| f64::from(*g) / (f64::from(*v) + self.eps).sqrt()).collect();
        let mut w = get(format!("{}.weight", layer.conv));
        for (w, s) in w.chunks_exact_mut(layer.c_in * layer.kernel * layer.kernel).zip(&scale) {
            w.iter_mut().for_each(|w| *w = (f64::from(*w) * s) as f32);
        }
        let shift = (0..layer.c_out).map(|c| (f64::from(beta[c]) - f64::from(mean[c]) * scale[c]) as f32);
        let shift: Vec<f32> = shift.collect();
        let k = layer.kernel;
        let w = self.constant(&format!("{}.weight", layer.conv), &[layer.c_out, layer.c_in, k, k], &w);
        let b = self.constant(&format!("{}.bias", layer.conv), &[layer.c_out], &shift);
        let attributes = vec![
            ints("kernel_shape", vec![k; 2]),
            ints("strides", vec![layer.stride; 2]),
            ints("pads", vec![layer.dilation * (k / 2); 4]),
            ints("dilations", vec![layer.dilation; 2]),
        ];
        self.node("Conv", &layer.conv, vec![x, w, b], attributes)
    }
}

/// Converts an encoder to a model. With `normalize` it takes values in 0..1, otherwise normalized
/// ones.
pub fn model(encoder: &Encoder, normalize: bool, metadata: &[(&str, String)]) -> Model {
    let (spec, resnet) = (&encoder.spec, encoder.spec.resnet());
    let c = spec.channels;
    let mut b = Builder { encoder, graph: Graph::default(), eps: spec.eps };
    b.graph.name = spec.architecture.name().into();
    let side = Extent::Fixed(spec.size as i64);
    let batch = || Extent::Named("N".into());
    b.graph.input.push(value("images", &[batch(), Extent::Fixed(c as i64), side.clone(), side]));
    b.graph.output.push(value("features", &[batch(), Extent::Fixed(encoder.features() as i64)]));
    let mut x = "images".to_owned();
    if normalize {
        let mean = b.constant("mean", &[1, c, 1, 1], &spec.normalization.mean);
        let std = b.constant("std", &[1, c, 1, 1], &spec.normalization.std);
        x = b.node("Sub", "centered", vec![x, mean], vec![]);
        x = b.node("Div", "normalized", vec![x, std], vec![]);
    }
    let (stem, kind) = resnet.stem();
    x = b.conv(stem, x);
    x = b.node("Relu", "relu", vec![x], vec![]);
    if kind == Stem::Imagenet {
        let pool = vec![ints("kernel_shape", vec![3; 2]), ints("strides", vec![2; 2]), ints("pads", vec![1; 4])];
        x = b.node("MaxPool", "maxpool", vec![x], pool);
    }
    for (convs, projection) in resnet.blocks() {
        let skip = projection.map_or(x.clone(), |p| b.conv(p, x.clone()));
        for (i, conv) in convs.iter().enumerate() {
            x = b.conv(conv, x);
            if i + 1 == convs.len() {
                x = b.node("Add", &format!("{}.add", conv.conv), vec![x, skip.clone()], vec![]);
            }
            x = b.node("Relu", &format!("{}.relu", conv.conv), vec![x], vec![]);
        }
    }
    x = b.node("GlobalAveragePool", "avgpool", vec![x], vec![]);
    let axis = Attribute { name: "axis".into(), i: 1, ints: vec![], kind: 2 };
    b.node("Flatten", "features", vec![x], vec![axis]);
    let entry = |(key, value): &(&str, String)| Entry { key: (*key).into(), value: value.clone() };
    Model {
        ir_version: 8,
        producer_name: "byol".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(b.graph),
        opset_import: vec![Opset { domain: String::new(), version: 17 }],
        metadata_props: metadata.iter().map(entry).collect(),
    }
}

impl Model {
    /// Encodes the model.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// Decodes a model.
    ///
    /// # Errors
    /// A message if `bytes` is not a valid model.
    pub fn parse(bytes: &[u8]) -> Result<Model, String> {
        Model::decode(bytes).map_err(|e| e.to_string())
    }

    /// Adds a metadata entry.
    pub(crate) fn add_metadata(&mut self, key: &str, value: String) {
        self.metadata_props.push(Entry { key: key.into(), value });
    }

    /// Runs the graph with Burn's built-in operations.
    ///
    /// # Shapes
    /// `images`: `[N, C, H, W]`; returns `[N, F]`.
    ///
    /// # Errors
    /// A message if the graph contains an operation [`model`] does not write, or is incomplete.
    pub fn run(&self, images: Tensor<4>) -> Result<Tensor<2>, String> {
        let graph = self.graph.as_ref().ok_or("has no graph")?;
        let device: Device = images.device();
        let mut values = std::collections::HashMap::new();
        values.insert("images".to_owned(), images);
        for node in &graph.node {
            let input = |i: usize| -> Result<Tensor<4>, String> {
                let name = node.input.get(i).ok_or_else(|| format!("lacks an input of node {}", node.name))?;
                if let Some(x) = values.get(name) {
                    return Ok(x.clone());
                }
                let c = graph.initializer.iter().find(|c| c.name == *name);
                let c = c.ok_or_else(|| format!("lacks the value {name}"))?;
                let mut shape = [1usize; 4];
                // A bias has one value per channel.
                let offset = if c.dims.len() == 1 { 1 } else { 4usize.saturating_sub(c.dims.len()) };
                for (to, from) in shape[offset..].iter_mut().zip(&c.dims) {
                    *to = usize::try_from(*from).map_err(|e| e.to_string())?;
                }
                let data = crate::nn::weights::from_bytes(&c.raw_data);
                if data.len() != shape.iter().product::<usize>() {
                    return Err(format!("has {} values for {name}, whose shape is {shape:?}", data.len()));
                }
                Ok(Tensor::from_data(TensorData::new(data, shape), &device))
            };
            let pair = |name: &str, default: usize| -> [usize; 2] {
                let ints = node.attribute.iter().find(|a| a.name == name).map(|a| &a.ints);
                ints.map_or([default; 2], |v| [0, 1].map(|i| v.get(i).map_or(default, |v| *v as usize)))
            };
            let out = match node.op_type.as_str() {
                "Sub" => input(0)? - input(1)?,
                "Div" => input(0)? / input(1)?,
                "Add" => input(0)? + input(1)?,
                "Relu" => relu(input(0)?),
                "Conv" => {
                    let options = ConvOptions::new(pair("strides", 1), pair("pads", 0), pair("dilations", 1), 1);
                    conv2d(input(0)?, input(1)?, None, options) + input(2)?
                }
                "MaxPool" => {
                    let options = MaxPoolOptions::new(pair("kernel_shape", 1));
                    max_pool2d(input(0)?, options.with_stride(pair("strides", 1)).with_padding(pair("pads", 0)))
                }
                "GlobalAveragePool" => adaptive_avg_pool2d(input(0)?, [1, 1]),
                "Flatten" => {
                    let x = input(0)?;
                    let [n, c, h, w] = x.dims();
                    x.reshape([n, c * h * w, 1, 1])
                }
                other => return Err(format!("contains the unsupported operation {other}")),
            };
            let name = node.output.first().ok_or_else(|| format!("lacks the output of node {}", node.name))?;
            values.insert(name.clone(), out);
        }
        let features = values.remove("features").ok_or("has no output `features`")?;
        let [n, f, ..] = features.dims();
        Ok(features.reshape([n, f]))
    }
}

//! ResNet (He et al. 2015, arXiv:1512.03385) in the "v1.5" form: a bottleneck has its stride on the
//! 3×3 convolution.
//!
//! Parameter names, order and padding are torchvision's. The reference differs: it pads like
//! TensorFlow's SAME, and has a projection shortcut in the first group of ResNet-18 and 34 as well
//! (docs/explanation/fidelity.md).

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    conv_norm_act::{ConvNorm, Epilogue, FeatureMap, conv_norm_act},
    forward_context::{ForwardContext, Statistics},
    init::{self, Init},
    pool,
    tree::{Leaf, Tree},
};
use crate::random::{self, Domain};

/// Published depths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Basic blocks 2, 2, 2, 2.
    Resnet18,
    /// Basic blocks 3, 4, 6, 3.
    Resnet34,
    /// Bottlenecks 3, 4, 6, 3.
    Resnet50,
    /// Bottlenecks 3, 4, 23, 3.
    Resnet101,
    /// Bottlenecks 3, 8, 36, 3.
    Resnet152,
    /// Bottlenecks 3, 24, 36, 3.
    Resnet200,
}

impl Architecture {
    /// All architectures, by increasing depth.
    pub const ALL: [Architecture; 6] =
        [Self::Resnet18, Self::Resnet34, Self::Resnet50, Self::Resnet101, Self::Resnet152, Self::Resnet200];

    fn blocks(self) -> (Block, [usize; 4]) {
        match self {
            Self::Resnet18 => (Block::Basic, [2, 2, 2, 2]),
            Self::Resnet34 => (Block::Basic, [3, 4, 6, 3]),
            Self::Resnet50 => (Block::Bottleneck, [3, 4, 6, 3]),
            Self::Resnet101 => (Block::Bottleneck, [3, 4, 23, 3]),
            Self::Resnet152 => (Block::Bottleneck, [3, 8, 36, 3]),
            Self::Resnet200 => (Block::Bottleneck, [3, 24, 36, 3]),
        }
    }

    /// Returns the architecture with these blocks and number of blocks per group, if there is one.
    pub(crate) fn from_depths(bottleneck: bool, depths: [usize; 4]) -> Option<Architecture> {
        let block = if bottleneck { Block::Bottleneck } else { Block::Basic };
        Self::ALL.into_iter().find(|a| a.blocks() == (block, depths))
    }

    /// Name in recipes and files: `resnet18`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resnet18 => "resnet18",
            Self::Resnet34 => "resnet34",
            Self::Resnet50 => "resnet50",
            Self::Resnet101 => "resnet101",
            Self::Resnet152 => "resnet152",
            Self::Resnet200 => "resnet200",
        }
    }
}

/// Residual block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// Two 3×3 convolutions.
    Basic,
    /// 1×1, 3×3 (with the stride), 1×1 to four times the channels.
    Bottleneck,
}

/// Layers before the first group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stem {
    /// 7×7 stride 2, then a 3×3 max pool of stride 2: for views of more than 64 px.
    Imagenet,
    /// 3×3 stride 1, no pool: for views of 64 px or less.
    Cifar,
}

impl Stem {
    /// Name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Stem::Imagenet => "ImageNet",
            Stem::Cifar => "CIFAR",
        }
    }

    /// Default stem for square views of side `size`.
    pub fn for_size(size: usize) -> Stem {
        if size <= 64 { Stem::Cifar } else { Stem::Imagenet }
    }
}

/// A ResNet up to the pooled representation: the description, without weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ResNet {
    stem: (ConvNorm, Stem),
    groups: Vec<Vec<ResidualBlock>>,
    init: Init,
    zero_init_residual: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct ResidualBlock {
    convs: Vec<ConvNorm>,
    projection: Option<ConvNorm>,
}

impl ResNet {
    /// Creates a published architecture. `width` multiplies every channel count (rounded down, at
    /// least 1); `channels` are those of the images.
    pub fn new(architecture: Architecture, width: f64, stem: Stem, channels: usize) -> ResNet {
        let (block, depths) = architecture.blocks();
        let planes = [64.0, 128.0, 256.0, 512.0].map(|c| ((c * width) as usize).max(1));
        Self::custom(block, depths, planes, stem, channels)
    }

    /// Creates a network with any depths and inner channels (`planes`) of the four groups. The stem
    /// has the channels of the first group.
    pub fn custom(block: Block, depths: [usize; 4], planes: [usize; 4], stem: Stem, channels: usize) -> ResNet {
        let conv = |conv: String, c_in, c_out, kernel, stride| {
            let norm = match conv.strip_suffix("downsample.0") {
                Some(block) => format!("{block}downsample.1"),
                None => conv.replace("conv", "bn"),
            };
            ConvNorm { conv, norm, c_in, c_out, kernel, stride, dilation: 1 }
        };
        let (kernel, stride) = if stem == Stem::Cifar { (3, 1) } else { (7, 2) };
        let first = conv("conv1".into(), channels, planes[0], kernel, stride);

        let mut c = planes[0];
        let mut groups = Vec::new();
        for (g, (&depth, &inner)) in depths.iter().zip(&planes).enumerate() {
            let outer = if block == Block::Basic { inner } else { 4 * inner };
            let mut blocks = Vec::new();
            for b in 0..depth {
                let s = if b == 0 && g > 0 { 2 } else { 1 };
                let name = |suffix: &str| format!("layer{}.{b}.{suffix}", g + 1);
                let convs = match block {
                    Block::Basic => {
                        vec![conv(name("conv1"), c, inner, 3, s), conv(name("conv2"), inner, outer, 3, 1)]
                    }
                    Block::Bottleneck => vec![
                        conv(name("conv1"), c, inner, 1, 1),
                        conv(name("conv2"), inner, inner, 3, s),
                        conv(name("conv3"), inner, outer, 1, 1),
                    ],
                };
                let projection = (s != 1 || c != outer).then(|| conv(name("downsample.0"), c, outer, 1, s));
                blocks.push(ResidualBlock { convs, projection });
                c = outer;
            }
            groups.push(blocks);
        }
        ResNet { stem: (first, stem), groups, init: Init::Reference, zero_init_residual: false }
    }

    /// Sets the initialization. With `zero_init_residual` the last norm of each residual branch
    /// starts with scale 0, so that the branch is 0.
    pub(crate) fn with_init(self, init: Init, zero_init_residual: bool) -> ResNet {
        ResNet { init, zero_init_residual, ..self }
    }

    /// Changes the strides of the last group to dilations, for dense prediction with the same
    /// weights: its map keeps its side, and its 3×3 convolutions have dilation 2 (appendix E:
    /// segmentation).
    pub fn dilated(mut self) -> ResNet {
        for conv in
            self.groups.last_mut().into_iter().flatten().flat_map(|b| b.convs.iter_mut().chain(&mut b.projection))
        {
            (conv.stride, conv.dilation) = (1, if conv.kernel == 3 { 2 } else { 1 });
        }
        self
    }

    /// Length of the representation: 512 × width (basic) or 2048 × width (bottleneck).
    pub fn features(&self) -> usize {
        let last = self.groups.last().and_then(|g| g.last()).and_then(|b| b.convs.last());
        last.map_or(self.stem.0.c_out, |conv| conv.c_out)
    }

    /// The first convolution, and the kind of stem.
    pub fn stem(&self) -> (&ConvNorm, Stem) {
        (&self.stem.0, self.stem.1)
    }

    /// The residual blocks: convolutions, and the projection of the skip.
    pub fn blocks(&self) -> impl Iterator<Item = (&[ConvNorm], Option<&ConvNorm>)> {
        self.groups.iter().flatten().map(|b| (b.convs.as_slice(), b.projection.as_ref()))
    }

    /// Channels of the input images.
    pub fn channels(&self) -> usize {
        self.stem.0.c_in
    }

    /// All convolutions, in torchvision's order.
    pub(crate) fn convs(&self) -> impl Iterator<Item = &ConvNorm> {
        let blocks = self.groups.iter().flatten();
        std::iter::once(&self.stem.0).chain(blocks.flat_map(|b| b.convs.iter().chain(&b.projection)))
    }

    /// Each convolution with the side of its input map, for images of side `size`, in the order of
    /// `ResNet::convs`.
    pub fn input_sides(&self, size: usize) -> Vec<(&ConvNorm, usize)> {
        let down = |side: usize, stride: usize| (side - 1) / stride + 1;
        let (stem, kind) = &self.stem;
        let mut all = vec![(stem, size)];
        let mut side = down(size, stem.stride);
        if *kind == Stem::Imagenet {
            side = down(side, 2);
        }
        for block in self.groups.iter().flatten() {
            let mut inner = side;
            for conv in &block.convs {
                all.push((conv, inner));
                inner = down(inner, conv.stride);
            }
            all.extend(block.projection.as_ref().map(|conv| (conv, side)));
            side = inner;
        }
        all
    }

    /// Multiply-adds of the convolutions for one image of side `size`.
    pub fn multiply_adds(&self, size: usize) -> u64 {
        let layer = |(conv, side): &(&ConvNorm, usize)| {
            let pixels = ((side - 1) / conv.stride + 1).pow(2);
            (pixels * conv.c_out * conv.c_in * conv.kernel.pow(2)) as u64
        };
        self.input_sides(size).iter().map(layer).sum()
    }

    /// Names and shapes of all parameters, in torchvision's order.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let layer = |c: &ConvNorm| {
            [
                (format!("{}.weight", c.conv), vec![c.c_out, c.c_in, c.kernel, c.kernel]),
                (format!("{}.weight", c.norm), vec![c.c_out]),
                (format!("{}.bias", c.norm), vec![c.c_out]),
            ]
        };
        self.convs().flat_map(layer).collect()
    }

    /// Draws initial weights. Each tensor depends only on `seed`, `role` (`online` or `target`) and
    /// its own name.
    pub fn init(&self, seed: u64, role: &str, device: &Device) -> Tree {
        let last_norms: Vec<&str> =
            self.groups.iter().flatten().filter_map(|b| b.convs.last().map(|c| c.norm.as_str())).collect();
        let mut tree = Tree::new();
        for (name, shape) in self.shapes() {
            let n: usize = shape.iter().product();
            let values = match shape.as_slice() {
                [c_out, c_in, kh, kw] => {
                    let mut rng = random::named_stream(Domain::Weights, seed, &format!("{role}.{name}"));
                    match self.init {
                        Init::Reference => init::truncated_normal(&mut rng, n, c_in * kh * kw),
                        Init::Torch => init::he_normal_fan_out(&mut rng, n, c_out * kh * kw),
                    }
                }
                _ => {
                    let parent = name.rsplit_once('.').map_or("", |(parent, _)| parent);
                    let zero = self.zero_init_residual && last_norms.contains(&parent);
                    vec![if name.ends_with(".weight") && !zero { 1.0 } else { 0.0 }; n]
                }
            };
            tree.insert(name, Leaf::new(values, &shape, device));
        }
        tree
    }

    /// Initial running statistics.
    pub fn statistics(&self, device: &Device) -> Statistics {
        Statistics::new(self.convs().map(|c| (c.norm.as_str(), c.c_out)), device)
    }

    /// The representation y = f(x).
    ///
    /// # Shapes
    /// `x`: `[N, H, W, C]`, normalized by channel; returns `[N, F]`.
    pub fn forward(&self, ctx: &mut ForwardContext, x: Tensor<4>) -> Tensor<2> {
        pool::mean(self.feature_map(ctx, x))
    }

    /// Last feature map; the representation is its mean.
    ///
    /// # Shapes
    /// `x`: `[N, H, W, C]`, normalized by channel; returns `[N, H', W', F]`.
    pub(crate) fn feature_map(&self, ctx: &mut ForwardContext, x: Tensor<4>) -> Tensor<4> {
        let (stem, kind) = &self.stem;
        let mut x = conv_norm_act(ctx, stem, x, Epilogue::Relu).into_tensor();
        if *kind == Stem::Imagenet {
            x = pool::max_3x3_stride_2(x);
        }
        for block in self.groups.iter().flatten() {
            x = block.forward(ctx, x);
        }
        x
    }
}

impl ResidualBlock {
    fn forward(&self, ctx: &mut ForwardContext, x: Tensor<4>) -> Tensor<4> {
        let x = FeatureMap::from(x);
        let skip = match &self.projection {
            Some(projection) => conv_norm_act(ctx, projection, x.clone(), Epilogue::None),
            None => x.clone(),
        };
        let (last, inner) = self.convs.split_last().expect("a block has convolutions");
        let y = inner.iter().fold(x, |y, conv| conv_norm_act(ctx, conv, y, Epilogue::Relu));
        conv_norm_act(ctx, last, y, Epilogue::AddRelu(skip)).into_tensor()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(net: &ResNet) -> usize {
        net.shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    #[test]
    fn parameter_counts_match_published_values() {
        use Architecture::*;
        let rows = [
            (Resnet18, 1.0, Stem::Imagenet, 512, 11_176_512),
            (Resnet18, 1.0, Stem::Cifar, 512, 11_168_832),
            (Resnet34, 1.0, Stem::Imagenet, 512, 21_284_672),
            (Resnet50, 1.0, Stem::Imagenet, 2048, 23_508_032),
            (Resnet50, 2.0, Stem::Imagenet, 4096, 93_907_072),
            (Resnet50, 3.0, Stem::Imagenet, 6144, 211_197_120),
            (Resnet50, 4.0, Stem::Imagenet, 8192, 375_378_176),
            (Resnet101, 1.0, Stem::Imagenet, 2048, 42_500_160),
            (Resnet101, 2.0, Stem::Imagenet, 4096, 169_771_136),
            (Resnet152, 1.0, Stem::Imagenet, 2048, 58_143_808),
            (Resnet152, 2.0, Stem::Imagenet, 4096, 232_253_568),
            (Resnet200, 1.0, Stem::Imagenet, 2048, 62_624_832),
            (Resnet200, 2.0, Stem::Imagenet, 4096, 250_128_512),
        ];
        for (architecture, width, stem, features, parameters) in rows {
            let net = ResNet::new(architecture, width, stem, 3);
            assert_eq!((net.features(), count(&net)), (features, parameters), "{architecture:?} {width}x");
        }
    }

    #[test]
    fn multiply_adds_match_published_values() {
        // torchvision's values, without the classifier.
        let giga = |a, stem, size| ResNet::new(a, 1.0, stem, 3).multiply_adds(size) as f64 / 1e9;
        assert!((giga(Architecture::Resnet50, Stem::Imagenet, 224) - 4.087).abs() < 0.001);
        assert!((giga(Architecture::Resnet18, Stem::Imagenet, 224) - 1.814).abs() < 0.001);
        assert!((giga(Architecture::Resnet18, Stem::Cifar, 32) - 0.556).abs() < 0.001);
    }

    #[test]
    fn names_match_torchvision() {
        let net = ResNet::new(Architecture::Resnet50, 1.0, Stem::Imagenet, 3);
        let names: Vec<String> = net.shapes().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names[..3], ["conv1.weight", "bn1.weight", "bn1.bias"]);
        assert_eq!(names[3], "layer1.0.conv1.weight");
        assert_eq!(
            names[12..15],
            ["layer1.0.downsample.0.weight", "layer1.0.downsample.1.weight", "layer1.0.downsample.1.bias"]
        );
    }

    #[test]
    fn fractional_width_scales_every_channel_count() {
        let net = ResNet::new(Architecture::Resnet18, 0.25, Stem::Cifar, 3);
        assert_eq!(net.features(), 128);
        assert_eq!(net.shapes()[0].1, [16, 3, 3, 3]);
    }

    #[test]
    fn zero_init_residual_zeroes_the_last_scale_of_each_block() {
        let device = Device::flex();
        let net = ResNet::new(Architecture::Resnet18, 0.125, Stem::Cifar, 3).with_init(Init::Reference, true);
        let tree = net.init(1, "online", &device);
        assert!(tree.leaf("layer1.0.bn2.weight").unwrap().to_vec().iter().all(|v| *v == 0.0));
        assert!(tree.leaf("layer1.0.bn1.weight").unwrap().to_vec().iter().all(|v| *v == 1.0));
    }
}

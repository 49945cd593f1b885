//! Convolution, batch norm, skip and ReLU as one step. **This is the seam where a device brings its own kernels**: every
//! convolution of every encoder goes through [`conv_norm_act`].

use burn::tensor::{Tensor, activation::relu, module::conv2d, ops::ConvOptions};

use super::{
    fused::{self, Options},
    pass::{Mode, Pass},
};
use crate::device::has_kernels;

/// One convolution without bias and the norm behind it.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvNorm {
    /// Name of the convolution: `layer1.0.conv1`. Its weight `NAME.weight` is `[C_out, C_in, K, K]`.
    pub conv: String,
    /// Name of the norm: `layer1.0.bn1`.
    pub norm: String,
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
    /// Side of the kernel; the padding is `dilation · (kernel / 2)` on each side, as torchvision pads.
    pub kernel: usize,
    /// Step of the kernel in both directions.
    pub stride: usize,
    /// Distance of its taps in both directions. 1 but in dense prediction.
    pub dilation: usize,
}

/// What follows the norm.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "passed once by value; a box would be one more allocation a layer")]
pub enum Then {
    /// Nothing.
    Nothing,
    /// max(y, 0).
    Relu,
    /// max(y + skip, 0); the skip has the shape of the output.
    AddRelu(Tensor<4>),
}

/// A map of features on its way from layer to layer: finished, or with its norm and ReLU left to the layer that reads it.
#[derive(Debug, Clone)]
pub struct Map(fused::Source);

impl From<Tensor<4>> for Map {
    fn from(x: Tensor<4>) -> Self {
        Map(fused::Source::Done(x))
    }
}

impl Map {
    /// The map, finished.
    pub fn done(self) -> Tensor<4> {
        match self.0 {
            fused::Source::Done(x) => x,
            fused::Source::Pending(p) => fused::norm_act(p, None, true),
        }
    }
}

/// `then(norm(conv(x)))`.
///
/// # Shapes
/// `x`: `[N, H, W, C_in]`; returns `[N, H', W', C_out]` with H' = ⌊(H + 2 (K / 2) − K) / stride⌋ + 1.
pub fn conv_norm_act(pass: &mut Pass, layer: &ConvNorm, x: impl Into<Map>, then: Then) -> Map {
    let Map(x) = x.into();
    let w = pass.params.get::<4>(&format!("{}.weight", layer.conv));
    let options = Options { stride: layer.stride, dilation: layer.dilation, ..Options::dense(pass) };
    if !has_kernels(&w.device()) {
        return composed(pass, layer, Map(x).done(), then).into();
    }
    let get = |name: &str, what: &str| pass.params.get::<1>(&format!("{name}.{what}"));
    let (gamma, beta) = (get(&layer.norm, "weight"), get(&layer.norm, "bias"));
    if let Mode::Eval(statistics) = &pass.mode {
        let x = Map(x).done();
        // A gradient through running statistics is for the composed layer.
        if x.is_autodiff() || w.is_autodiff() {
            return composed(pass, layer, x, then).into();
        }
        let (skip, relu) = match then {
            Then::Nothing => (None, false),
            Then::Relu => (None, true),
            Then::AddRelu(skip) => (Some(skip), true),
        };
        let running = statistics.get(&layer.norm);
        return fused::eval(x, w, gamma, beta, running, skip, options, pass.norm.eps, relu).into();
    }
    let y = fused::conv(x, w, gamma, beta, options, pass.norm.eps);
    pass.saw(&layer.norm, y.mean.clone(), y.variance.clone());
    match then {
        Then::Nothing => fused::norm_act(y, None, false).into(),
        Then::Relu => Map(fused::Source::Pending(y)),
        Then::AddRelu(skip) => fused::norm_act(y, Some(skip), true).into(),
    }
}

/// The same of Burn's own operations, for every device: convolution, skip and ReLU in the pass's precision, the norm in f32.
pub fn composed(pass: &mut Pass, layer: &ConvNorm, x: Tensor<4>, then: Then) -> Tensor<4> {
    // Burn's operations want [N, C, H, W]. The permutations are views; between two layers they cancel.
    let w = pass.params.get::<4>(&format!("{}.weight", layer.conv));
    let (s, d) = (layer.stride, layer.dilation);
    let p = d * (layer.kernel / 2);
    let (x, w) = (pass.operand(x), pass.operand(w));
    let y = conv2d(x.permute([0, 3, 1, 2]), w, None, ConvOptions::new([s, s], [p, p], [d, d], 1));
    let y = pass.batch_norm(&layer.norm, y);
    let y = match then {
        Then::Nothing => y,
        Then::Relu => relu(y),
        Then::AddRelu(skip) => relu(y + skip.permute([0, 3, 1, 2])),
    };
    y.permute([0, 2, 3, 1])
}

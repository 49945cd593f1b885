//! Convolution, batch norm, skip and ReLU as one step. **This is the seam where a device brings its own kernels**: every
//! convolution of every encoder goes through [`conv_norm_act`].

use burn::tensor::{
    Tensor,
    activation::relu,
    module::conv2d,
    ops::{ConvOptions, PadMode},
};

use super::{
    fused::{self, Options},
    pass::{Mode, Pass, Running},
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

/// `relu(norm(conv(x′)))` or without `relu`, where x′ has a zero to the right of and below each value of `x`, as an up-projection has it, and
/// the kernel's side is 5. Three of four products would be with zeros, so the map at twice the side is put together of four maps, each of the taps
/// that fall on values: 3x3, 3x2, 2x3 and 2x2 of the 25 (Laina et al. 2016, section 3.2). Here they are one convolution of 3x3 with four
/// times the channels.
///
/// # Shapes
/// `x`: `[N, H, W, C_in]`; returns `[N, 2H, 2W, C_out]`. The weight is `[C_out, C_in, 5, 5]`.
pub fn up_conv_norm_act(pass: &mut Pass, layer: &ConvNorm, x: Tensor<4>, relu: bool) -> Map {
    assert_eq!((layer.kernel, layer.stride, layer.dilation), (5, 1, 1), "of an up-projection");
    let w = four_kernels(pass.params.get::<4>(&format!("{}.weight", layer.conv)));
    let get = |name: &str, what: &str| pass.params.get::<1>(&format!("{name}.{what}"));
    let (gamma, beta) = (get(&layer.norm, "weight"), get(&layer.norm, "bias"));
    let (options, eps) = (Options::dense(pass), pass.norm.eps);
    match &pass.mode {
        Mode::Train(..) if has_kernels(&w.device()) => {
            let y = fused::conv(fused::Source::Done(x), w, gamma, beta, options, eps).of_four(four_to_one);
            pass.saw(&layer.norm, y.mean.clone(), y.variance.clone());
            if relu { Map(fused::Source::Pending(y)) } else { fused::norm_act(y, None, false).into() }
        }
        Mode::Eval(statistics) if has_kernels(&w.device()) && !x.is_autodiff() && !w.is_autodiff() => {
            let running = statistics.get(&layer.norm);
            let four = |t: &Tensor<1>| t.clone().repeat(&[4]);
            let running = Running { mean: four(&running.mean), var: four(&running.var), ..*running };
            four_to_one(fused::eval(x, w, four(&gamma), four(&beta), &running, None, options, eps, relu)).into()
        }
        _ => {
            let (x, w) = (pass.operand(x), pass.operand(w));
            let y = conv2d(x.permute([0, 3, 1, 2]), w, None, ConvOptions::new([1, 1], [1, 1], [1, 1], 1));
            let y = four_to_one(y.permute([0, 2, 3, 1])).permute([0, 3, 1, 2]);
            let y = pass.batch_norm(&layer.norm, y).permute([0, 2, 3, 1]);
            if relu { burn::tensor::activation::relu(y) } else { y }.into()
        }
    }
}

/// `[C_out, C_in, 5, 5]` to `[4 C_out, C_in, 3, 3]`: the taps that fall on values for the outputs at even or odd rows and columns. Tap k of an
/// even output looks at value k / 2 − 1 from here, of an odd one at (k − 1) / 2, each an integer for every other k.
fn four_kernels(w: Tensor<4>) -> Tensor<4> {
    let [c_out, c_in, ..] = w.dims();
    let w = w.pad([(1, 0), (1, 0)], PadMode::Constant(0.0));
    // Counted from the padding, taps 1, 3, 5 are those of even outputs, 0, 2, 4 of odd ones.
    let w = w.reshape([c_out, c_in, 3, 2, 3, 2]).permute([3, 5, 0, 1, 2, 4]).flip([0, 1]);
    w.reshape([4 * c_out, c_in, 3, 3])
}

/// Four maps beside each other, `[N, H, W, 4 C]`, as one of twice the side: `[N, 2 H, 2 W, C]`.
fn four_to_one(x: Tensor<4>) -> Tensor<4> {
    let [n, h, w, c] = x.dims();
    let x = x.reshape([n, h, w, 2, 2, c / 4]).permute([0, 1, 3, 2, 4, 5]);
    x.reshape([n, 2 * h, 2 * w, c / 4])
}

/// The same as [`conv_norm_act`] of Burn's own operations, for every device: convolution, skip and ReLU in the pass's precision, the norm in f32.
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

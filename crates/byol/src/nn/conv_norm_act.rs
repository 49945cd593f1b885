//! Convolution, batch norm, skip and ReLU as one step. **Device-specific kernels plug in here**:
//! every convolution of every encoder goes through [`conv_norm_act`].

use burn::tensor::{
    Tensor,
    activation::relu,
    module::conv2d,
    ops::{self, PadMode},
};

pub use super::cpu::{Epilogue, FeatureMap};
use super::{
    cpu::{self, ConvOptions, Norm},
    forward_context::{ForwardContext, Mode, RunningStats},
};
use crate::device::has_kernels;

/// A convolution without bias and the norm behind it.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvNorm {
    /// Name of the convolution: `layer1.0.conv1`. Its weight `NAME.weight` is `[C_out, C_in, K,
    /// K]`.
    pub conv: String,
    /// Name of the norm: `layer1.0.bn1`.
    pub norm: String,
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
    /// Side of the kernel. The padding is `dilation · (kernel / 2)` on each side, as in
    /// torchvision.
    pub kernel: usize,
    /// Step of the kernel in both directions.
    pub stride: usize,
    /// Distance of the kernel's taps in both directions; 1 except for dense prediction.
    pub dilation: usize,
}

impl ConvNorm {
    fn weight(&self, ctx: &ForwardContext) -> Tensor<4> {
        ctx.params.get::<4>(&format!("{}.weight", self.conv))
    }

    fn norm(&self, ctx: &ForwardContext) -> Norm {
        let get = |suffix: &str| ctx.params.get::<1>(&format!("{}.{suffix}", self.norm));
        Norm { gamma: get("weight"), beta: get("bias"), eps: ctx.norm.eps }
    }
}

/// epilogue(norm(conv(x))).
///
/// # Shapes
/// `x`: `[N, H, W, C_in]`; returns `[N, H', W', C_out]` with H' = ⌊(H + 2 (K / 2) − K) / stride⌋ +
/// 1.
pub fn conv_norm_act(
    ctx: &mut ForwardContext,
    layer: &ConvNorm,
    x: impl Into<FeatureMap>,
    epilogue: Epilogue,
) -> FeatureMap {
    let (x, w) = (x.into(), layer.weight(ctx));
    if !has_kernels(&w.device()) {
        return composed(ctx, layer, x.into_tensor(), epilogue).into();
    }
    let norm = layer.norm(ctx);
    let options = ConvOptions { stride: layer.stride, dilation: layer.dilation, ..ConvOptions::new(ctx) };
    if let Mode::Eval(statistics) = &ctx.mode {
        let x = x.into_tensor();
        // The folded layer has no gradient.
        if x.is_autodiff() || w.is_autodiff() {
            return composed(ctx, layer, x, epilogue).into();
        }
        return cpu::folded(x, w, norm, statistics.get(&layer.norm), epilogue, options).into();
    }
    // The maps of a training step take most of its memory.
    let y = cpu::conv_norm(x, w, norm, ConvOptions { storage: ctx.precision, ..options });
    ctx.update_running_stats(&layer.norm, y.mean.clone(), y.variance.clone());
    match epilogue {
        Epilogue::Relu => y.into(),
        other => cpu::norm_act(y, other).into(),
    }
}

/// Up-convolution: epilogue(norm(conv(x′))) with a 5×5 kernel, where x′ has twice the side of x,
/// with the values of x at even rows and columns and zeros elsewhere.
///
/// Three of four products would be with zeros. So the result is assembled from four maps, one per
/// subset of the 25 taps that falls on values: 3×3, 3×2, 2×3 and 2×2 (Laina et al. 2016, section
/// 3.2), computed as one 3×3 convolution with four times the channels.
///
/// # Shapes
/// `x`: `[N, H, W, C_in]`; returns `[N, 2H, 2W, C_out]`. The weight is `[C_out, C_in, 5, 5]`.
///
/// # Panics
/// Unless the layer has kernel 5, stride 1 and dilation 1.
pub fn up_conv_norm_act(ctx: &mut ForwardContext, layer: &ConvNorm, x: Tensor<4>, apply_relu: bool) -> FeatureMap {
    assert_eq!((layer.kernel, layer.stride, layer.dilation), (5, 1, 1), "shape of an up-convolution");
    let w = four_kernels(layer.weight(ctx));
    let (norm, options) = (layer.norm(ctx), ConvOptions::new(ctx));
    let epilogue = if apply_relu { Epilogue::Relu } else { Epilogue::None };
    match &ctx.mode {
        Mode::Train(..) if has_kernels(&w.device()) => {
            let y = cpu::conv_norm(x.into(), w, norm, options).merge_four_maps(four_to_one);
            ctx.update_running_stats(&layer.norm, y.mean.clone(), y.variance.clone());
            if apply_relu { y.into() } else { cpu::norm_act(y, epilogue).into() }
        }
        Mode::Eval(statistics) if has_kernels(&w.device()) && !x.is_autodiff() && !w.is_autodiff() => {
            let running = statistics.get(&layer.norm);
            let repeat = |t: &Tensor<1>| t.clone().repeat(&[4]);
            let running = RunningStats { mean: repeat(&running.mean), var: repeat(&running.var), ..*running };
            let norm = Norm { gamma: repeat(&norm.gamma), beta: repeat(&norm.beta), ..norm };
            four_to_one(cpu::folded(x, w, norm, &running, epilogue, options)).into()
        }
        _ => {
            let (x, w) = (ctx.to_compute_precision(x), ctx.to_compute_precision(w));
            let y = conv2d(x.permute([0, 3, 1, 2]), w, None, ops::ConvOptions::new([1, 1], [1, 1], [1, 1], 1));
            let y = four_to_one(y.permute([0, 2, 3, 1])).permute([0, 3, 1, 2]);
            let y = ctx.batch_norm(&layer.norm, y).permute([0, 2, 3, 1]);
            if apply_relu { relu(y) } else { y }.into()
        }
    }
}

/// Splits a 5×5 kernel into the taps that fall on values for outputs at even and odd rows and
/// columns: `[C_out, C_in, 5, 5]` to `[4 C_out, C_in, 3, 3]`.
///
/// Tap k of an even output reads the value at offset k / 2 − 1, of an odd output at (k − 1) / 2.
/// Both are integers for every other k.
fn four_kernels(w: Tensor<4>) -> Tensor<4> {
    let [c_out, c_in, ..] = w.dims();
    let w = w.pad([(1, 0), (1, 0)], PadMode::Constant(0.0));
    // With the padding, taps 1, 3, 5 belong to even outputs, and 0, 2, 4 to odd ones.
    let w = w.reshape([c_out, c_in, 3, 2, 3, 2]).permute([3, 5, 0, 1, 2, 4]).flip([0, 1]);
    w.reshape([4 * c_out, c_in, 3, 3])
}

/// Interleaves four maps beside each other, `[N, H, W, 4 C]`, to one of twice the side,
/// `[N, 2 H, 2 W, C]`.
fn four_to_one(x: Tensor<4>) -> Tensor<4> {
    let [n, h, w, c] = x.dims();
    let x = x.reshape([n, h, w, 2, 2, c / 4]).permute([0, 1, 3, 2, 4, 5]);
    x.reshape([n, 2 * h, 2 * w, c / 4])
}

/// [`conv_norm_act`] composed of Burn's operations, for every device. Convolution, skip and ReLU
/// run in the compute precision, the norm in f32.
pub fn composed(ctx: &mut ForwardContext, layer: &ConvNorm, x: Tensor<4>, epilogue: Epilogue) -> Tensor<4> {
    // Burn expects [N, C, H, W]. The permutations are views, and cancel between two layers.
    let w = layer.weight(ctx);
    let (s, d) = (layer.stride, layer.dilation);
    let p = d * (layer.kernel / 2);
    let (x, w) = (ctx.to_compute_precision(x), ctx.to_compute_precision(w));
    let y = conv2d(x.permute([0, 3, 1, 2]), w, None, ops::ConvOptions::new([s, s], [p, p], [d, d], 1));
    let y = ctx.batch_norm(&layer.norm, y);
    let y = match epilogue {
        Epilogue::None => y,
        Epilogue::Relu => relu(y),
        Epilogue::AddRelu(skip) => relu(y + skip.into_tensor().permute([0, 3, 1, 2])),
    };
    y.permute([0, 2, 3, 1])
}

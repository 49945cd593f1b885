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
    let (x, w) = (x.into(), ctx.weight(&layer.conv));
    if !has_kernels(&w.tensor.device()) {
        return composed(ctx, layer, x.into_tensor(), epilogue).into();
    }
    let norm = layer.norm(ctx);
    let options = ConvOptions { stride: layer.stride, dilation: layer.dilation, ..ConvOptions::new(ctx) };
    if let Mode::Eval(statistics) = &ctx.mode {
        let x = x.into_tensor();
        // The folded layer has no gradient.
        if x.is_autodiff() || w.tensor.is_autodiff() {
            return composed(ctx, layer, x, epilogue).into();
        }
        return cpu::folded(x, w.tensor, norm, statistics.get(&layer.norm), epilogue, options).into();
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
    let w = four_kernels(ctx.weight(&layer.conv).tensor);
    let (norm, options) = (layer.norm(ctx), ConvOptions::new(ctx));
    let epilogue = if apply_relu { Epilogue::Relu } else { Epilogue::None };
    match &ctx.mode {
        Mode::Train(..) if has_kernels(&w.device()) => {
            let y = cpu::conv_norm(x.into(), w.into(), norm, options).merge_four_maps(four_to_one);
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
    if has_kernels(&w.device()) {
        return cpu::apply(w, FourKernels { c_out, c_in }, [4 * c_out, c_in, 3, 3]);
    }
    composed_four_kernels(w)
}

/// [`four_kernels`] composed of Burn's operations.
fn composed_four_kernels(w: Tensor<4>) -> Tensor<4> {
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
    if has_kernels(&x.device()) {
        return cpu::apply(x, FourToOne { w, c: c / 4 }, [n, 2 * h, 2 * w, c / 4]);
    }
    composed_four_to_one(x)
}

/// [`four_to_one`] composed of Burn's operations.
fn composed_four_to_one(x: Tensor<4>) -> Tensor<4> {
    let [n, h, w, c] = x.dims();
    let x = x.reshape([n, h, w, 2, 2, c / 4]).permute([0, 1, 3, 2, 4, 5]);
    x.reshape([n, 2 * h, 2 * w, c / 4])
}

/// [`four_kernels`] on slices.
#[derive(Debug)]
struct FourKernels {
    c_out: usize,
    c_in: usize,
}

impl FourKernels {
    /// Calls `f` with the index of each tap of the 5×5 kernel and its index in the four 3×3 ones.
    fn for_each_tap(&self, mut f: impl FnMut(usize, usize)) {
        let &FourKernels { c_out, c_in } = self;
        // Parity of the output, and the tap in its kernel.
        let position = |tap: usize| [tap % 2, tap.div_ceil(2)];
        for o in 0..c_out {
            for i in 0..c_in {
                for tap in 0..25 {
                    let ([y, row], [x, column]) = (position(tap / 5), position(tap % 5));
                    let map = (2 * y + x) * c_out + o;
                    f((o * c_in + i) * 25 + tap, (map * c_in + i) * 9 + 3 * row + column);
                }
            }
        }
    }
}

impl cpu::Function for FourKernels {
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / 25 * 36];
        self.for_each_tap(|from, to| y[to] = x[from]);
        y
    }

    fn backward(&self, dy: &[f32]) -> Vec<f32> {
        let mut dx = vec![0.0; dy.len() / 36 * 25];
        self.for_each_tap(|from, to| dx[from] = dy[to]);
        dx
    }
}

/// [`four_to_one`] on slices, for maps `[.., w, 4 c]`.
#[derive(Debug)]
struct FourToOne {
    w: usize,
    c: usize,
}

impl FourToOne {
    /// Calls `f` with the offsets of each `c` values in the four maps and in the merged one.
    fn for_each_pixel(&self, len: usize, mut f: impl FnMut(usize, usize)) {
        let &FourToOne { w, c } = self;
        for pixel in 0..len / (4 * c) {
            let (row, column) = (pixel / w, pixel % w);
            for part in 0..4 {
                let (y, x) = (2 * row + part / 2, 2 * column + part % 2);
                f((4 * pixel + part) * c, (y * 2 * w + x) * c);
            }
        }
    }
}

impl cpu::Function for FourToOne {
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        self.for_each_pixel(x.len(), |from, to| y[to..][..self.c].copy_from_slice(&x[from..][..self.c]));
        y
    }

    fn backward(&self, dy: &[f32]) -> Vec<f32> {
        let mut dx = vec![0.0; dy.len()];
        self.for_each_pixel(dy.len(), |from, to| dx[from..][..self.c].copy_from_slice(&dy[to..][..self.c]));
        dx
    }
}

/// [`conv_norm_act`] composed of Burn's operations, for every device. Convolution, skip and ReLU
/// run in the compute precision, the norm in f32.
pub fn composed(ctx: &mut ForwardContext, layer: &ConvNorm, x: Tensor<4>, epilogue: Epilogue) -> Tensor<4> {
    // Burn expects [N, C, H, W]. The permutations are views, and cancel between two layers.
    let w = ctx.weight(&layer.conv).tensor;
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

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::{super::tree::host, cpu::Function, *};

    #[test]
    fn parts_of_an_up_convolution_match_their_composed_forms() {
        let tensor = |dims: [usize; 4]| {
            let values: Vec<f32> = (1..=dims.iter().product::<usize>()).map(|i| i as f32).collect();
            Tensor::<4>::from_data(TensorData::new(values, dims), &Device::flex())
        };
        let (w, x) = (tensor([2, 3, 5, 5]), tensor([2, 3, 2, 8]));
        assert_eq!(host(four_kernels(w.clone())), host(composed_four_kernels(w.clone())));
        assert_eq!(host(four_to_one(x.clone())), host(composed_four_to_one(x.clone())));
        // The transpose of a permutation is its inverse.
        let (kernels, pixels) = (FourKernels { c_out: 2, c_in: 3 }, FourToOne { w: 2, c: 2 });
        assert_eq!(kernels.backward(&kernels.forward(&host(w.clone()))), host(w));
        assert_eq!(pixels.backward(&pixels.forward(&host(x.clone()))), host(x));
    }
}

//! Convolution, batch norm, skip, ReLU and pooling on the CPU, by the kernels of `byol-kernels`.
//!
//! In training, layers are cut before their norm instead of after it. A convolution returns its raw
//! output with the moments of the batch ([`UnnormalizedMap`]), and the next layer normalizes while
//! it reads. A node of the autodiff graph is then [norm, ReLU →] convolution: the inner maps of a
//! residual block are written once, and never in normalized form. The last norm of a block, with
//! the skip, is a node of its own ([`norm_act`]). The backward pass of a convolution includes the
//! norm of its input: it gathers the norm's sums while it writes dx.
//!
//! In evaluation the norm is folded into the weights, and a layer is a single pass ([`folded`]).
//!
//! `ops.rs` has the passes of one tensor and `autodiff.rs` their graph nodes; `function.rs` has
//! operations without kernels. The functions of this file take Burn's `Tensor` and dispatch to
//! them.

mod autodiff;
mod function;
mod ops;

use burn::{
    backend::{Dispatch, tensor::FloatTensor},
    tensor::Tensor,
};

pub(crate) use function::{Function, apply, loss};
use ops::{ConvInput, FoldedOps, FusedOps, NormParams};
pub use ops::{ConvOptions, PoolOptions};

use super::{
    forward_context::{ForwardContext, RunningStats},
    readers::{Readers, Weight},
};
use crate::{device::Precision, ranks::Ranks};

impl ConvOptions {
    /// Stride and dilation 1, an output in f32, with the moments for a norm.
    pub fn new(ctx: &ForwardContext) -> ConvOptions {
        ConvOptions {
            stride: 1,
            dilation: 1,
            precision: ctx.precision,
            storage: Precision::F32,
            ranks: ctx.ranks(),
            moments: true,
        }
    }
}

/// Learned parameters and ε of a norm, `[C]`.
#[derive(Debug, Clone)]
pub struct Norm {
    /// Scale.
    pub gamma: Tensor<1>,
    /// Shift.
    pub beta: Tensor<1>,
    /// Added to the variance.
    pub eps: f64,
}

/// Output of a convolution, `[N, H, W, C]`, whose norm is left to the layer that reads it.
#[derive(Debug, Clone)]
pub struct UnnormalizedMap {
    y: Tensor<4>,
    norm: Norm,
    /// Mean of the batch, `[C]`.
    pub mean: Tensor<1>,
    /// Biased variance of the batch, `[C]`.
    pub variance: Tensor<1>,
    ranks: Ranks,
}

impl UnnormalizedMap {
    /// Merges four maps beside each other, `[N, H, W, 4 C]`, into one of `C` channels by `merge`. γ
    /// and β are those of the merged map, and the moments those of all four.
    pub(crate) fn merge_four_maps(self, merge: impl Fn(Tensor<4>) -> Tensor<4>) -> UnnormalizedMap {
        let by_map = |t: Tensor<1>| {
            let [c] = t.dims();
            t.reshape([4, c / 4])
        };
        let (means, variances) = (by_map(self.mean), by_map(self.variance));
        let mean = means.clone().mean_dim(0);
        let between = (means - mean.clone()).square().mean_dim(0);
        let variance = (variances.mean_dim(0) + between).squeeze_dim(0);
        UnnormalizedMap { y: merge(self.y), mean: mean.squeeze_dim(0), variance, ..self }
    }

    fn into_dispatch(self) -> (FloatTensor<Dispatch>, NormParams<Dispatch>) {
        let Norm { gamma, beta, eps } = self.norm;
        let [gamma, beta, mean, variance] = [gamma, beta, self.mean, self.variance].map(Tensor::into_dispatch);
        (self.y.into_dispatch(), NormParams { gamma, beta, mean, variance, eps, ranks: self.ranks })
    }
}

/// A map of features between two layers: complete, or with norm and ReLU left to the layer that
/// reads it.
///
/// Where several layers read a complete map, clones of one `FeatureMap` let the kernels add their
/// gradients.
#[derive(Debug, Clone)]
pub struct FeatureMap(Repr);

#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "passed once by value; a box would be an allocation per layer")]
enum Repr {
    Complete(Tensor<4>, Readers),
    /// relu(norm(y)).
    Deferred(UnnormalizedMap),
}

impl From<Tensor<4>> for FeatureMap {
    fn from(x: Tensor<4>) -> Self {
        FeatureMap(Repr::Complete(x, Readers::default()))
    }
}

impl From<UnnormalizedMap> for FeatureMap {
    fn from(y: UnnormalizedMap) -> Self {
        FeatureMap(Repr::Deferred(y))
    }
}

impl FeatureMap {
    /// Returns the map with norm and ReLU applied, `[N, H, W, C]`.
    pub fn into_tensor(self) -> Tensor<4> {
        match self.0 {
            Repr::Complete(x, _) => x,
            Repr::Deferred(y) => norm_act(y, Epilogue::Relu),
        }
    }

    fn into_complete(self) -> (Tensor<4>, Readers) {
        match self.0 {
            Repr::Complete(x, readers) => (x, readers),
            Repr::Deferred(_) => (self.into_tensor(), Readers::default()),
        }
    }

    fn into_dispatch(self) -> ConvInput<Dispatch> {
        match self.0 {
            Repr::Complete(x, readers) => ConvInput::Map { x: x.into_dispatch(), readers },
            Repr::Deferred(y) => {
                let (y, norm) = y.into_dispatch();
                ConvInput::Deferred { y, norm }
            }
        }
    }
}

/// Elementwise operations after a norm.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "passed once by value; a box would be an allocation per layer")]
pub enum Epilogue {
    /// y.
    None,
    /// max(y, 0).
    Relu,
    /// max(y + skip, 0); the skip has the shape of y.
    AddRelu(FeatureMap),
}

impl Epilogue {
    fn into_dispatch(self) -> ops::Epilogue<Dispatch> {
        match self {
            Epilogue::None => ops::Epilogue::None,
            Epilogue::Relu => ops::Epilogue::Relu,
            Epilogue::AddRelu(skip) => {
                let (skip, readers) = skip.into_complete();
                ops::Epilogue::AddRelu { skip: skip.into_dispatch(), readers }
            }
        }
    }
}

/// Convolution with the moments of its output, and the norm that follows.
///
/// # Shapes
/// `x`: `[N, H, W, C_in]`; `w`: `[C_out, C_in, K, K]`; `norm`: `[C_out]`.
pub(crate) fn conv_norm(x: FeatureMap, w: Weight, norm: Norm, options: ConvOptions) -> UnnormalizedMap {
    let options = ConvOptions { moments: true, ..options };
    let (y, moments) = Dispatch::conv(x.into_dispatch(), w.tensor.into_dispatch(), w.readers, options);
    let (mean, variance) = moments.expect("requested by the options");
    let [mean, variance] = [mean, variance].map(Tensor::from_dispatch);
    UnnormalizedMap { y: Tensor::from_dispatch(y), norm, mean, variance, ranks: options.ranks }
}

/// Convolution alone. Shapes as for [`conv_norm`].
pub fn conv(x: FeatureMap, w: Weight, options: ConvOptions) -> Tensor<4> {
    let options = ConvOptions { moments: false, ..options };
    Tensor::from_dispatch(Dispatch::conv(x.into_dispatch(), w.tensor.into_dispatch(), w.readers, options).0)
}

/// epilogue(norm(y)), `[N, H, W, C]`.
pub(crate) fn norm_act(y: UnnormalizedMap, epilogue: Epilogue) -> Tensor<4> {
    let (y, norm) = y.into_dispatch();
    Tensor::from_dispatch(Dispatch::norm_act(y, norm, epilogue.into_dispatch()))
}

/// A layer with running statistics, folded into one convolution:
/// epilogue(conv(x, γ/σ · w) + β − γ/σ · mean). No tensor may be tracked by autodiff.
///
/// # Shapes
/// As for [`conv_norm`]; the skip and the result are `[N, H', W', C_out]`.
pub fn folded(
    x: Tensor<4>,
    w: Tensor<4>,
    norm: Norm,
    running: &RunningStats,
    epilogue: Epilogue,
    options: ConvOptions,
) -> Tensor<4> {
    let scale = norm.gamma / running.var.clone().add_scalar(norm.eps).sqrt();
    let shift = norm.beta - running.mean.clone() * scale.clone();
    let ([x, w], [scale, shift]) = ([x, w].map(Tensor::into_dispatch), [scale, shift].map(Tensor::into_dispatch));
    Tensor::from_dispatch(Dispatch::conv_scale_shift_act(x, w, scale, shift, epilogue.into_dispatch(), options))
}

/// Maximum of each window, `[N, H, W, C]` to `[N, H', W', C]`.
pub(crate) fn max_pool(x: Tensor<4>, options: PoolOptions) -> Tensor<4> {
    Tensor::from_dispatch(Dispatch::max_pool(x.into_dispatch(), options))
}

/// Mean of each map, `[N, H, W, C]` to `[N, C]`.
pub(crate) fn mean_pool(x: Tensor<4>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::mean_pool(x.into_dispatch()))
}

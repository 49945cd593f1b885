//! Forward and backward passes on Burn's Flex backend, by the kernels of `byol-kernels`.
//!
//! Forward and backward operations are separate traits: [`FusedOps`] is also implemented for the
//! autodiff backend (`autodiff.rs`), [`FusedGrads`] and [`FoldedOps`] only for Flex. So a gradient
//! of a gradient does not compile, rather than panic.

// `#[backend_extension]` needs the result types spelled out.
#![allow(clippy::type_complexity)]

use burn::{
    backend::{
        Backend, ExtensionType, Flex, TensorMetadata, backend_extension, flex::FlexTensor, ops::FloatTensorOps,
        tensor::FloatTensor,
    },
    tensor::{DType, FloatDType, TensorData},
};
use byol_kernels::{
    Bf16,
    conv::{self, AddMap, Input, NoEpilogue, Shape, ShiftAct, SumNormGrads, TakeMoments},
    isa::{self, Isa},
    norm::{self, GradTotals, Moments, NormBackward, ReluMask},
    pool::{self, PoolShape},
    storage::{Storage, Values},
};
use half::{bf16, slice::HalfFloatSliceExt, vec::HalfBitsVecExt};
use rayon::prelude::*;

use crate::{
    device::{self, Precision},
    nn::readers::Readers,
    ranks::Ranks,
};

/// Options of a convolution. The padding, `dilation · (kernel / 2)`, preserves the size of a map at
/// stride 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvOptions {
    /// Step of the kernel in both directions.
    pub stride: usize,
    /// Distance of the kernel's taps in both directions.
    pub dilation: usize,
    /// Compute precision of the products.
    pub precision: Precision,
    /// Type of the output in memory: f32 or bf16.
    pub storage: Precision,
    /// Ranks over which the moments of the output are reduced.
    pub ranks: Ranks,
    /// Also compute the moments of the output, for the norm that follows.
    pub moments: bool,
}

impl ConvOptions {
    fn isa(self) -> &'static Isa {
        device::kernels(self.precision).expect("`device::check` has accepted the precision")
    }

    fn shape(self, x: &FlexTensor, w: &FlexTensor) -> Shape {
        let (x, w) = (x.shape(), w.shape());
        let ConvOptions { stride, dilation, .. } = self;
        let (kernel, padding) = (w[2], dilation * (w[2] / 2));
        Shape { n: x[0], h: x[1], w: x[2], c_in: x[3], c_out: w[0], kernel, stride, padding, dilation }
    }
}

/// Options of a max pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolOptions {
    /// Side of the windows.
    pub kernel: usize,
    /// Step of the windows in both directions.
    pub stride: usize,
    /// Padding on each side.
    pub padding: usize,
}

impl PoolOptions {
    fn shape(self, x: &FlexTensor) -> PoolShape {
        let (x, PoolOptions { kernel, stride, padding }) = (x.shape(), self);
        PoolShape { n: x[0], h: x[1], w: x[2], c: x[3], kernel, stride, padding }
    }
}

/// Parameters of a batch norm with the statistics of the batch; tensors are `[C]`.
#[derive(Debug, Clone, ExtensionType)]
pub struct NormParams<B: Backend> {
    /// Scale.
    pub gamma: FloatTensor<B>,
    /// Shift.
    pub beta: FloatTensor<B>,
    /// Mean of the batch.
    pub mean: FloatTensor<B>,
    /// Biased variance of the batch.
    pub variance: FloatTensor<B>,
    /// Added to the variance.
    pub eps: f64,
    /// Ranks that share the batch.
    pub ranks: Ranks,
}

/// Input of a convolution.
#[derive(Debug, Clone, ExtensionType)]
#[allow(clippy::large_enum_variant, reason = "passed once by value; a box would be an allocation per layer")]
pub enum ConvInput<B: Backend> {
    /// A map.
    Map {
        /// The map.
        x: FloatTensor<B>,
        /// Its readers.
        readers: Readers,
    },
    /// relu(norm(y)), computed while the convolution reads y.
    Deferred {
        /// Output of the previous convolution.
        y: FloatTensor<B>,
        /// Its norm.
        #[extension_type]
        norm: NormParams<B>,
    },
}

/// Elementwise operations after a norm.
#[derive(Debug, Clone, ExtensionType)]
pub enum Epilogue<B: Backend> {
    /// y.
    None,
    /// max(y, 0).
    Relu,
    /// max(y + skip, 0).
    AddRelu {
        /// The skip.
        skip: FloatTensor<B>,
        /// Its readers.
        readers: Readers,
    },
}

/// An [`Epilogue`] without its tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EpilogueKind {
    /// y.
    None,
    /// max(y, 0).
    Relu,
    /// max(y + skip, 0).
    AddRelu,
}

/// Mean and biased variance of a convolution's output, `[C_out]`.
pub type OutputMoments<B> = Option<(FloatTensor<B>, FloatTensor<B>)>;

/// Differentiable forward passes.
#[backend_extension(Autodiff, Flex)]
pub trait FusedOps: Backend {
    /// conv(input, w), with the moments of the output over all ranks if `options.moments`.
    /// `w_readers` is shared by the convolutions with this weight.
    fn conv(
        #[extension_type] input: ConvInput<Self>,
        w: FloatTensor<Self>,
        w_readers: Readers,
        options: ConvOptions,
    ) -> (FloatTensor<Self>, Option<(FloatTensor<Self>, FloatTensor<Self>)>);

    /// epilogue(norm(y)).
    fn norm_act(
        y: FloatTensor<Self>,
        #[extension_type] norm: NormParams<Self>,
        #[extension_type] epilogue: Epilogue<Self>,
    ) -> FloatTensor<Self>;

    /// Maximum of each window.
    fn max_pool(x: FloatTensor<Self>, options: PoolOptions) -> FloatTensor<Self>;

    /// Mean of each map, `[N, C]`.
    fn mean_pool(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Forward passes without a gradient.
#[backend_extension(Flex)]
pub trait FoldedOps: Backend {
    /// epilogue(conv(x, scale · w) + shift).
    fn conv_scale_shift_act(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        #[extension_type] epilogue: Epilogue<Self>,
        options: ConvOptions,
    ) -> FloatTensor<Self>;
}

/// Gradients of a convolution.
#[derive(Debug)]
pub struct ConvGradients<B: Backend> {
    /// dx, or dy of a deferred norm; only if requested.
    pub input: Option<FloatTensor<B>>,
    /// dw.
    pub w: FloatTensor<B>,
    /// dγ and dβ of a deferred norm.
    pub norm: Option<[FloatTensor<B>; 2]>,
}

/// Gradients that the other readers of a convolution's input and weight have registered so far.
#[derive(Debug)]
pub struct OtherGradients<B: Backend> {
    /// Gradient of the input, unless its norm is deferred.
    pub input: Option<FloatTensor<B>>,
    /// Gradient of the weight.
    pub w: Option<FloatTensor<B>>,
}

/// Gradients of norm and epilogue.
#[derive(Debug)]
pub struct NormActGradients<B: Backend> {
    /// dy.
    pub y: FloatTensor<B>,
    /// dγ.
    pub gamma: FloatTensor<B>,
    /// dβ.
    pub beta: FloatTensor<B>,
    /// dskip of [`EpilogueKind::AddRelu`].
    pub skip: Option<FloatTensor<B>>,
}

/// Backward passes of [`FusedOps`].
pub trait FusedGrads: FusedOps {
    /// Gradients of [`FusedOps::conv`], plus those of other readers so far.
    fn conv_backward(
        dy: FloatTensor<Self>,
        input: ConvInput<Self>,
        w: FloatTensor<Self>,
        options: ConvOptions,
        needs_input_grad: bool,
        others: OtherGradients<Self>,
    ) -> ConvGradients<Self>;

    /// Gradients of [`FusedOps::norm_act`]. `out` is its output, for [`EpilogueKind::AddRelu`].
    fn norm_act_backward(
        dout: FloatTensor<Self>,
        out: Option<FloatTensor<Self>>,
        y: FloatTensor<Self>,
        norm: NormParams<Self>,
        epilogue: EpilogueKind,
    ) -> NormActGradients<Self>;

    /// dx of [`FusedOps::max_pool`].
    fn max_pool_backward(
        dout: FloatTensor<Self>,
        out: FloatTensor<Self>,
        x: FloatTensor<Self>,
        options: PoolOptions,
    ) -> FloatTensor<Self>;

    /// dx of [`FusedOps::mean_pool`] for maps of `[h, w]` pixels of this type.
    fn mean_pool_backward(dout: FloatTensor<Self>, size: [usize; 2], dtype: DType) -> FloatTensor<Self>;
}

/// Elements of a contiguous f32 tensor, row-major.
pub(super) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("made contiguous on entry")
}

/// Elements of a contiguous map, row-major.
fn map_values(tensor: &FlexTensor) -> Values<'_> {
    match tensor.dtype() {
        DType::BF16 => Values::Bf16(Bf16::slice(tensor)),
        _ => Values::F32(f32::slice(tensor)),
    }
}

/// Element types of maps.
trait Element: Storage {
    /// Elements of a contiguous tensor, row-major.
    fn slice(tensor: &FlexTensor) -> &[Self];

    /// A tensor of these elements.
    fn tensor(values: Vec<Self>, shape: &[usize]) -> FlexTensor;

    /// Converts a gradient to these elements; another reader of the map may compute with others.
    fn convert(gradient: FlexTensor) -> FlexTensor;

    /// Gradient of y from `g`, that of relu(norm(y)).
    fn norm_relu_backward(norm: &NormBackward, totals: &GradTotals, g: Vec<Self>, y: &[Self]) -> Vec<Self>;
}

impl Element for f32 {
    fn slice(tensor: &FlexTensor) -> &[f32] {
        values(tensor)
    }

    fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
        tensor(values, shape)
    }

    fn convert(gradient: FlexTensor) -> FlexTensor {
        if is_bf16(&gradient) { Flex::float_cast(gradient, FloatDType::F32) } else { gradient }.to_contiguous()
    }

    fn norm_relu_backward(norm: &NormBackward, totals: &GradTotals, mut g: Vec<f32>, y: &[f32]) -> Vec<f32> {
        norm.input_grad_in_place(isa::current(), totals, &mut g, y);
        g
    }
}

impl Element for Bf16 {
    fn slice(tensor: &FlexTensor) -> &[Bf16] {
        let values: &[bf16] = tensor.as_slice().expect("made contiguous on entry");
        Bf16::from_bits(values.reinterpret_cast())
    }

    fn tensor(values: Vec<Bf16>, shape: &[usize]) -> FlexTensor {
        let values: Vec<bf16> = Bf16::into_bits(values).reinterpret_into();
        FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
    }

    fn convert(gradient: FlexTensor) -> FlexTensor {
        if is_bf16(&gradient) { gradient } else { Flex::float_cast(gradient, FloatDType::BF16) }.to_contiguous()
    }

    fn norm_relu_backward(norm: &NormBackward, totals: &GradTotals, g: Vec<Bf16>, y: &[Bf16]) -> Vec<Bf16> {
        norm.input_grad(isa::current(), totals, &g, y, ReluMask::FromNorm)
    }
}

/// Calls a function generic over [`Element`] with the type of a map.
macro_rules! with_element {
    ($bf16:expr, $function:ident ( $($argument:expr),* )) => {
        if $bf16 { $function::<Bf16>($($argument),*) } else { $function::<f32>($($argument),*) }
    };
}

/// An f32 tensor of these elements, row-major.
pub(super) fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
}

impl NormParams<Flex> {
    fn contiguous(self) -> Self {
        let [gamma, beta, mean, variance] =
            [self.gamma, self.beta, self.mean, self.variance].map(|t| t.to_contiguous());
        NormParams { gamma, beta, mean, variance, ..self }
    }

    /// Scale and shift equivalent to the norm.
    fn scale_shift(&self) -> (Vec<f32>, Vec<f32>) {
        let inverse_std = norm::inverse_std(values(&self.variance), self.eps);
        norm::scale_shift(values(&self.gamma), values(&self.beta), values(&self.mean), &inverse_std)
    }

    /// The norm, prepared for its backward pass.
    fn backward(&self) -> NormBackward {
        let inverse_std = norm::inverse_std(values(&self.variance), self.eps);
        NormBackward::new(values(&self.gamma), values(&self.beta), values(&self.mean), &inverse_std)
    }

    /// Norm and ReLU as a convolution applies them to its input.
    fn deferred(&self) -> norm::DeferredNorm {
        let (scale, shift) = self.scale_shift();
        norm::DeferredNorm::new(&scale, &shift, true)
    }
}

impl ConvInput<Flex> {
    /// The tensor to read, with the norm to apply to it.
    fn into_parts(self) -> (FlexTensor, Option<NormParams<Flex>>) {
        match self {
            ConvInput::Map { x, .. } => (x.to_contiguous(), None),
            ConvInput::Deferred { y, norm } => (y.to_contiguous(), Some(norm.contiguous())),
        }
    }
}

impl<B: Backend> Epilogue<B> {
    /// The epilogue without its tensor.
    pub fn kind(&self) -> EpilogueKind {
        match self {
            Epilogue::None => EpilogueKind::None,
            Epilogue::Relu => EpilogueKind::Relu,
            Epilogue::AddRelu { .. } => EpilogueKind::AddRelu,
        }
    }
}

impl Epilogue<Flex> {
    /// Splits the epilogue into its ReLU flag and its skip.
    fn into_parts(self) -> (bool, Option<FlexTensor>) {
        match self {
            Epilogue::None => (false, None),
            Epilogue::Relu => (true, None),
            Epilogue::AddRelu { skip, .. } => (true, Some(skip.to_contiguous())),
        }
    }
}

fn conv_forward<T: Element>(
    input: ConvInput<Flex>,
    w: FlexTensor,
    options: ConvOptions,
) -> (FlexTensor, OutputMoments<Flex>) {
    let ((x, norm), w) = (input.into_parts(), w.to_contiguous());
    let (isa, s) = (options.isa(), options.shape(&x, &w));
    let deferred = norm.as_ref().map(NormParams::deferred);
    let input = Input { values: map_values(&x), norm: deferred.as_ref() };
    let y_shape = [s.n, s.h_out(), s.w_out(), s.c_out];
    if !options.moments {
        let (y, _) = conv::forward_fused(isa, &s, input, values(&w), &NoEpilogue);
        return (T::tensor(y, &y_shape), None);
    }
    let (y, parts) = conv::forward_fused(isa, &s, input, values(&w), &TakeMoments { c: s.c_out });
    let mut moments = Moments::merge(&parts, s.c_out);
    if options.ranks != Ranks::SINGLE {
        let mut sums = moments.to_sums();
        options.ranks.all_reduce_sum(&mut sums);
        moments = Moments::from_sums(&sums);
    }
    let (mean, variance) = moments.mean_variance();
    (T::tensor(y, &y_shape), Some((tensor(mean, &[s.c_out]), tensor(variance, &[s.c_out]))))
}

fn norm_act_forward<T: Element>(y: FlexTensor, norm: NormParams<Flex>, epilogue: Epilogue<Flex>) -> FlexTensor {
    let (relu, skip) = epilogue.into_parts();
    let (scale, shift) = norm.contiguous().scale_shift();
    let out = norm::affine_act(isa::current(), T::slice(&y), &scale, &shift, skip.as_ref().map(T::slice), relu);
    T::tensor(out, &y.shape())
}

fn max_pool_forward<T: Element>(x: FlexTensor, options: PoolOptions) -> FlexTensor {
    let s = options.shape(&x);
    T::tensor(pool::max(isa::current(), &s, T::slice(&x)), &[s.n, s.h_out(), s.w_out(), s.c])
}

fn mean_pool_forward<T: Element>(x: FlexTensor) -> FlexTensor {
    let (n, c) = (x.shape()[0], x.shape()[3]);
    tensor(pool::mean(isa::current(), T::slice(&x), n, c), &[n, c])
}

/// Returns whether a map is stored as bf16.
fn is_bf16(map: &FlexTensor) -> bool {
    map.dtype() == DType::BF16
}

impl FusedOps for Flex {
    fn conv(
        input: ConvInput<Self>,
        w: FlexTensor,
        _: Readers,
        options: ConvOptions,
    ) -> (FlexTensor, OutputMoments<Self>) {
        with_element!(options.storage == Precision::Bf16, conv_forward(input, w, options))
    }

    fn norm_act(y: FlexTensor, norm: NormParams<Self>, epilogue: Epilogue<Self>) -> FlexTensor {
        let y = y.to_contiguous();
        with_element!(is_bf16(&y), norm_act_forward(y, norm, epilogue))
    }

    fn max_pool(x: FlexTensor, options: PoolOptions) -> FlexTensor {
        let x = x.to_contiguous();
        with_element!(is_bf16(&x), max_pool_forward(x, options))
    }

    fn mean_pool(x: FlexTensor) -> FlexTensor {
        let x = x.to_contiguous();
        with_element!(is_bf16(&x), mean_pool_forward(x))
    }
}

impl FoldedOps for Flex {
    fn conv_scale_shift_act(
        x: FlexTensor,
        w: FlexTensor,
        scale: FlexTensor,
        shift: FlexTensor,
        epilogue: Epilogue<Self>,
        options: ConvOptions,
    ) -> FlexTensor {
        let ([x, w, scale, shift], (relu, skip)) =
            ([x, w, scale, shift].map(|t| t.to_contiguous()), epilogue.into_parts());
        let (isa, s) = (options.isa(), options.shape(&x, &w));
        let mut scaled = values(&w).to_vec();
        let rows = scaled.par_chunks_exact_mut(s.c_in * s.kernel * s.kernel);
        rows.zip(values(&scale)).for_each(|(row, scale)| row.iter_mut().for_each(|w| *w *= scale));
        let epilogue = ShiftAct { shift: values(&shift), skip: skip.as_ref().map(values), relu };
        let (y, _) = conv::forward_fused::<f32, _>(isa, &s, values(&x).into(), &scaled, &epilogue);
        tensor(y, &[s.n, s.h_out(), s.w_out(), s.c_out])
    }
}

/// Gradient of the weight of a convolution, plus `others`.
fn weight_gradient(
    options: ConvOptions,
    s: &Shape,
    input: Input,
    dy: &FlexTensor,
    others: Option<FlexTensor>,
) -> FlexTensor {
    /// Elements per task.
    const BLOCK: usize = 1 << 14;
    let mut dw = conv::backward_weight(options.isa(), s, input, map_values(dy));
    if let Some(others) = others.map(|others| others.to_contiguous()) {
        let blocks = dw.par_chunks_mut(BLOCK).zip(values(&others).par_chunks(BLOCK));
        blocks.for_each(|(dw, others)| dw.iter_mut().zip(others).for_each(|(dw, other)| *dw += other));
    }
    tensor(dw, &[s.c_out, s.c_in, s.kernel, s.kernel])
}

/// Gradients of a convolution of relu(norm(x)), where x has elements `T`.
fn deferred_backward<T: Element>(
    dy: FlexTensor,
    x: FlexTensor,
    params: NormParams<Flex>,
    w: FlexTensor,
    options: ConvOptions,
    w_others: Option<FlexTensor>,
) -> ConvGradients<Flex> {
    let (isa, s) = (options.isa(), options.shape(&x, &w));
    let deferred = params.deferred();
    let input = Input { values: map_values(&x), norm: Some(&deferred) };
    let dw = weight_gradient(options, &s, input, &dy, w_others);
    // Through the deferred ReLU and norm: the norm's sums are gathered while dx is in the cache.
    let (norm, y) = (params.backward(), T::slice(&x));
    let (g, sums) = conv::backward_data_fused(isa, &s, values(&w), map_values(&dy), &SumNormGrads { norm: &norm, y });
    let totals = norm.grad_totals(&sums, s.n * s.h * s.w, |sums| options.ranks.all_reduce_sum(sums));
    let dx = T::norm_relu_backward(&norm, &totals, g, y);
    let per_channel = |v: Vec<f32>| tensor(v, &[s.c_in]);
    ConvGradients {
        input: Some(T::tensor(dx, &x.shape())),
        w: dw,
        norm: Some([per_channel(totals.dgamma), per_channel(totals.dbeta)]),
    }
}

/// Gradient of the input of a convolution of x, which has elements `T`, plus `others`.
fn input_gradient<T: Element>(
    dy: &FlexTensor,
    x: &FlexTensor,
    w: &FlexTensor,
    options: ConvOptions,
    others: Option<FlexTensor>,
) -> FlexTensor {
    let (isa, s) = (options.isa(), options.shape(x, w));
    let dx = match others.map(T::convert) {
        None => conv::backward_data_fused(isa, &s, values(w), map_values(dy), &NoEpilogue).0,
        Some(others) => conv::backward_data_fused(isa, &s, values(w), map_values(dy), &AddMap(T::slice(&others))).0,
    };
    T::tensor(dx, &x.shape())
}

/// Gradients of norm and epilogue of a map y of elements `T`.
fn norm_act_gradients<T: Element>(
    dout: FlexTensor,
    out: Option<FlexTensor>,
    y: FlexTensor,
    params: NormParams<Flex>,
    epilogue: EpilogueKind,
) -> NormActGradients<Flex> {
    let mask = match (epilogue, &out) {
        (EpilogueKind::None, _) => ReluMask::None,
        (EpilogueKind::Relu, _) => ReluMask::FromNorm,
        (EpilogueKind::AddRelu, Some(out)) => ReluMask::FromOutput(T::slice(out)),
        (EpilogueKind::AddRelu, None) => unreachable!("the output of a skip is kept"),
    };
    let (norm, dout) = (params.backward(), T::convert(dout));
    let all_reduce = |sums: &mut [f64]| params.ranks.all_reduce_sum(sums);
    let g = norm::backward(isa::current(), T::slice(&dout), mask, &norm, T::slice(&y), all_reduce);
    let per_channel = |v: Vec<f32>| tensor(v, &params.gamma.shape());
    NormActGradients {
        y: T::tensor(g.dy, &y.shape()),
        gamma: per_channel(g.dgamma),
        beta: per_channel(g.dbeta),
        skip: g.dskip.map(|dskip| T::tensor(dskip, &y.shape())),
    }
}

fn max_pool_gradient<T: Element>(dout: FlexTensor, out: FlexTensor, x: FlexTensor, options: PoolOptions) -> FlexTensor {
    let (s, dout) = (options.shape(&x), T::convert(dout));
    let dx = pool::max_backward(isa::current(), &s, T::slice(&x), T::slice(&out), T::slice(&dout));
    T::tensor(dx, &x.shape())
}

fn mean_pool_gradient<T: Element>(dout: FlexTensor, [h, w]: [usize; 2]) -> FlexTensor {
    let dout = f32::convert(dout);
    let (n, c) = (dout.shape()[0], dout.shape()[1]);
    T::tensor(pool::mean_backward(isa::current(), values(&dout), h * w, c), &[n, h, w, c])
}

/// The gradient of a map has its type.
impl FusedGrads for Flex {
    fn conv_backward(
        dy: FlexTensor,
        input: ConvInput<Self>,
        w: FlexTensor,
        options: ConvOptions,
        needs_input_grad: bool,
        others: OtherGradients<Self>,
    ) -> ConvGradients<Self> {
        let ((x, norm), [dy, w]) = (input.into_parts(), [dy, w].map(|t| t.to_contiguous()));
        if let Some(params) = norm {
            return with_element!(is_bf16(&x), deferred_backward(dy, x, params, w, options, others.w));
        }
        let input = Input { values: map_values(&x), norm: None };
        let dw = weight_gradient(options, &options.shape(&x, &w), input, &dy, others.w);
        let dx =
            needs_input_grad.then(|| with_element!(is_bf16(&x), input_gradient(&dy, &x, &w, options, others.input)));
        ConvGradients { input: dx, w: dw, norm: None }
    }

    fn norm_act_backward(
        dout: FlexTensor,
        out: Option<FlexTensor>,
        y: FlexTensor,
        norm: NormParams<Self>,
        epilogue: EpilogueKind,
    ) -> NormActGradients<Self> {
        let ([dout, y], params) = ([dout, y].map(|t| t.to_contiguous()), norm.contiguous());
        let out = out.map(|out| out.to_contiguous());
        with_element!(is_bf16(&y), norm_act_gradients(dout, out, y, params, epilogue))
    }

    fn max_pool_backward(dout: FlexTensor, out: FlexTensor, x: FlexTensor, options: PoolOptions) -> FlexTensor {
        let [dout, out, x] = [dout, out, x].map(|t| t.to_contiguous());
        with_element!(is_bf16(&x), max_pool_gradient(dout, out, x, options))
    }

    fn mean_pool_backward(dout: FlexTensor, size: [usize; 2], dtype: DType) -> FlexTensor {
        with_element!(dtype == DType::BF16, mean_pool_gradient(dout, size))
    }
}

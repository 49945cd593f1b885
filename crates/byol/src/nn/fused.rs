//! Convolution + batch norm (+ skip) (+ ReLU) on the CPU, computed by `byol-kernels`: in training one node of the autodiff graph, in
//! evaluation one pass with the norm folded into the weights.
//!
//! The node keeps x, the weight, the convolution's output y, its own output (for the ReLU's mask) and the batch statistics.

// `#[backend_extension]` writes functions with as many arguments and results as the operation has.
#![allow(clippy::too_many_arguments, clippy::type_complexity)]

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        flex::FlexTensor,
        tensor::FloatTensor,
    },
    tensor::{Tensor, TensorData},
};
use byol_kernels::{
    conv::{self, Shape},
    isa,
    norm::{self, Gate, Used},
};

use super::pass::Running;

/// The two passes on one backend.
#[backend_extension(Autodiff, Flex)]
pub trait ConvNormAct: Backend {
    /// (out, y, mean, variance). `skip` counts where `with_skip`.
    fn conv_norm_act_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        skip: FloatTensor<Self>,
        stride: usize,
        eps: f64,
        with_skip: bool,
        relu: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// act(conv(x, w) + shift (+ skip)). Not differentiated.
    fn conv_act(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        skip: FloatTensor<Self>,
        stride: usize,
        with_skip: bool,
        relu: bool,
    ) -> FloatTensor<Self>;

    /// (dx, dw, dγ, dβ, dskip). dx is empty unless `by_x`, dskip unless `with_skip`.
    fn conv_norm_act_backward(
        dout: FloatTensor<Self>,
        out: FloatTensor<Self>,
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        variance: FloatTensor<Self>,
        stride: usize,
        eps: f64,
        with_skip: bool,
        relu: bool,
        by_x: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// The elements, in row-major order.
fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("made contiguous on entry")
}

fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
}

fn shape(x: &FlexTensor, w: &FlexTensor, stride: usize) -> Shape {
    let (x, w) = (x.shape(), w.shape());
    Shape { n: x[0], h: x[1], w: x[2], c_in: x[3], c_out: w[0], kernel: w[2], stride, padding: w[2] / 2, dilation: 1 }
}

impl ConvNormAct for Flex {
    fn conv_norm_act_forward(
        x: FlexTensor,
        w: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        skip: FlexTensor,
        stride: usize,
        eps: f64,
        with_skip: bool,
        relu: bool,
    ) -> (FlexTensor, FlexTensor, FlexTensor, FlexTensor) {
        let [x, w, gamma, beta, skip] = [x, w, gamma, beta, skip].map(|t| t.to_contiguous());
        let (isa, s) = (isa::chosen(), shape(&x, &w, stride));
        let of_part = |_, y: &mut [f32]| norm::Moments::of(isa, y, s.c_out);
        let (y, parts) = conv::forward_then(isa, &s, values(&x), values(&w), of_part);
        let (mean, var) = norm::Moments::total(&parts, s.c_out);
        let inverse = norm::inverse_deviation(&var, eps);
        let (scale, shift) = norm::scale_shift(values(&gamma), values(&beta), &mean, &inverse);
        let out = norm::affine_act(isa, &y, &scale, &shift, with_skip.then(|| values(&skip)), relu);
        let of_y = [s.n, s.h_out(), s.w_out(), s.c_out];
        (tensor(out, &of_y), tensor(y, &of_y), tensor(mean, &[s.c_out]), tensor(var, &[s.c_out]))
    }

    fn conv_act(
        x: FlexTensor,
        w: FlexTensor,
        shift: FlexTensor,
        skip: FlexTensor,
        stride: usize,
        with_skip: bool,
        relu: bool,
    ) -> FlexTensor {
        let [x, w, shift, skip] = [x, w, shift, skip].map(|t| t.to_contiguous());
        let (isa, s) = (isa::chosen(), shape(&x, &w, stride));
        let (y, _) = conv::forward_then(isa, &s, values(&x), values(&w), |at, y| {
            let skip = with_skip.then(|| &values(&skip)[at..at + y.len()]);
            norm::shift_act(isa, y, values(&shift), skip, relu);
        });
        tensor(y, &[s.n, s.h_out(), s.w_out(), s.c_out])
    }

    fn conv_norm_act_backward(
        dout: FlexTensor,
        out: FlexTensor,
        y: FlexTensor,
        x: FlexTensor,
        w: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        mean: FlexTensor,
        variance: FlexTensor,
        stride: usize,
        eps: f64,
        with_skip: bool,
        relu: bool,
        by_x: bool,
    ) -> (FlexTensor, FlexTensor, FlexTensor, FlexTensor, FlexTensor) {
        let [dout, x, w, gamma, beta] = [dout, x, w, gamma, beta].map(|t| t.to_contiguous());
        let (isa, s) = (isa::chosen(), shape(&x, &w, stride));
        let inverse = norm::inverse_deviation(values(&variance), eps);
        let gate = match (with_skip, relu) {
            (false, false) => Gate::Open,
            (false, true) => Gate::Relu,
            (true, false) => Gate::Add,
            (true, true) => Gate::AddRelu(values(&out)),
        };
        let used =
            Used { y: values(&y), gamma: values(&gamma), beta: values(&beta), mean: values(&mean), inverse: &inverse };
        let g = norm::backward(isa, values(&dout), gate, used);
        let dw = conv::backward_weight(isa, &s, values(&x), &g.dy);
        let dx = if by_x {
            tensor(conv::backward_data(isa, &s, values(&w), &g.dy), &[s.n, s.h, s.w, s.c_in])
        } else {
            tensor(Vec::new(), &[0])
        };
        let of_y = [s.n, s.h_out(), s.w_out(), s.c_out];
        (
            dx,
            tensor(dw, &[s.c_out, s.c_in, s.kernel, s.kernel]),
            tensor(g.dgamma, &[s.c_out]),
            tensor(g.dbeta, &[s.c_out]),
            g.dskip.map_or_else(|| tensor(Vec::new(), &[0]), |dskip| tensor(dskip, &of_y)),
        )
    }
}

impl<B: Backend + ConvNormAct, C: CheckpointStrategy> ConvNormAct for Autodiff<B, C> {
    fn conv_norm_act_forward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        skip: FloatTensor<Self>,
        stride: usize,
        eps: f64,
        with_skip: bool,
        relu: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct Fused;

        #[derive(Debug, Clone)]
        struct Kept<F> {
            out: F,
            y: F,
            x: F,
            w: F,
            gamma: F,
            beta: F,
            mean: F,
            variance: F,
            stride: usize,
            eps: f64,
            with_skip: bool,
            relu: bool,
        }

        impl<B: Backend + ConvNormAct> Backward<B, 5> for Fused {
            type State = Kept<B::FloatTensorPrimitive>;

            fn backward(self, ops: Ops<Self::State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
                let [x, w, gamma, beta, skip] = ops.parents;
                let dout = grads.consume::<B>(&ops.node);
                let k = ops.state;
                let (dx, dw, dgamma, dbeta, dskip) = B::conv_norm_act_backward(
                    dout,
                    k.out,
                    k.y,
                    k.x,
                    k.w,
                    k.gamma,
                    k.beta,
                    k.mean,
                    k.variance,
                    k.stride,
                    k.eps,
                    k.with_skip,
                    k.relu,
                    x.is_some(),
                );
                let skip = skip.filter(|_| k.with_skip);
                for (node, gradient) in [(x, dx), (w, dw), (gamma, dgamma), (beta, dbeta), (skip, dskip)] {
                    if let Some(node) = node {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        }

        let nodes = [x.node(), w.node(), gamma.node(), beta.node(), skip.node()];
        let ((x, _), (w, _), (gamma, _), (beta, _), (skip, _)) =
            (x.into_parts(), w.into_parts(), gamma.into_parts(), beta.into_parts(), skip.into_parts());
        let (out, y, mean, variance) = B::conv_norm_act_forward(
            x.clone(),
            w.clone(),
            gamma.clone(),
            beta.clone(),
            skip,
            stride,
            eps,
            with_skip,
            relu,
        );
        let constant = |t: FloatTensor<B>| <Self as burn::backend::AutodiffBackend>::from_inner(t);
        let (of_y, of_mean, of_variance) = (constant(y.clone()), constant(mean.clone()), constant(variance.clone()));
        let out = match Fused.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let kept =
                    Kept { out: out.clone(), y, x, w, gamma, beta, mean, variance, stride, eps, with_skip, relu };
                prep.finish(kept, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        };
        (out, of_y, of_mean, of_variance)
    }

    fn conv_act(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: usize,
        _: bool,
        _: bool,
    ) -> FloatTensor<Self> {
        panic!("the folded layer has no gradient: `conv_norm_act` composes the layer where one is wanted")
    }

    fn conv_norm_act_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: usize,
        _: f64,
        _: bool,
        _: bool,
        _: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        panic!("a gradient of a gradient is not supported")
    }
}

/// The fused layer with batch statistics: (out, mean, variance).
///
/// # Shapes
/// `x`: `[N, H, W, C_in]`; `w`: `[C_out, C_in, K, K]`; `gamma`, `beta`: `[C_out]`; `skip` and the output `[N, H', W', C_out]`.
pub fn train(
    x: Tensor<4>,
    w: Tensor<4>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    skip: Option<Tensor<4>>,
    stride: usize,
    eps: f64,
    relu: bool,
) -> (Tensor<4>, Tensor<1>, Tensor<1>) {
    let with_skip = skip.is_some();
    let skip = skip.unwrap_or_else(|| Tensor::zeros([1, 1, 1, 1], &w.device()));
    let (out, _, mean, variance) = Dispatch::conv_norm_act_forward(
        x.into_dispatch(),
        w.into_dispatch(),
        gamma.into_dispatch(),
        beta.into_dispatch(),
        skip.into_dispatch(),
        stride,
        eps,
        with_skip,
        relu,
    );
    (Tensor::from_dispatch(out), Tensor::from_dispatch(mean), Tensor::from_dispatch(variance))
}

/// The fused layer with running statistics, folded: act(conv(x, γ/σ · w) + β − γ/σ · mean (+ skip)). No tensor of it is tracked.
///
/// # Shapes
/// As for [`train`].
pub fn eval(
    x: Tensor<4>,
    w: Tensor<4>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    running: &Running,
    skip: Option<Tensor<4>>,
    stride: usize,
    eps: f64,
    relu: bool,
) -> Tensor<4> {
    let scale = gamma / running.var.clone().add_scalar(eps).sqrt();
    let shift = beta - running.mean.clone() * scale.clone();
    let [c_out] = scale.dims();
    let w = w * scale.reshape([c_out, 1, 1, 1]);
    let with_skip = skip.is_some();
    let skip = skip.unwrap_or_else(|| Tensor::zeros([1, 1, 1, 1], &w.device()));
    Tensor::from_dispatch(Dispatch::conv_act(
        x.into_dispatch(),
        w.into_dispatch(),
        shift.into_dispatch(),
        skip.into_dispatch(),
        stride,
        with_skip,
        relu,
    ))
}
